//! Reading, changing and writing an operand in one instruction, atomically where LOCK says so.

use super::Translator;
use super::operand::Gpr;
use iced_x86::{Instruction, OpKind};
use tandem_jit::ir::{Cond, ExitHint, Inst, Op, PTR_READ, PTR_WRITE, Rmw, Val, Width};

const N: Val = Val::NONE;

/// An operand that has been read and is about to be written.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A general register.
    Reg(Gpr),
    /// Memory at a host pointer.
    Mem(Val),
}

impl Translator<'_> {
    /// Reads operand `n` (a general register or memory) for [`Translator::close`] to write. No
    /// other access to memory may come between.
    pub fn open(&mut self, insn: &Instruction, n: u32, w: Width) -> (Place, Val) {
        if insn.op_kind(n) == OpKind::Memory {
            let p = self.mem_ptr(insn, w as u8, PTR_READ | PTR_WRITE);
            let v = self.ldp(w, p, 0);
            return (Place::Mem(p), v);
        }
        let r = Gpr::of(insn.op_register(n)).unwrap_or(Gpr { num: 0, w, high: false });
        (Place::Reg(r), self.gpr(r))
    }

    /// Writes an operand that [`Translator::open`] has read.
    pub fn close(&mut self, place: Place, w: Width, v: Val) {
        match place {
            Place::Reg(r) => self.set_gpr(r, v),
            Place::Mem(p) => {
                self.stp(w, p, 0, v);
                self.b.ptr_end(p);
            }
        }
    }

    /// Writes operand `n`, a general register or memory, at width `w`.
    pub fn write(&mut self, insn: &Instruction, n: u32, w: Width, v: Val) {
        if insn.op_kind(n) == OpKind::Memory {
            let addr = self.mem_addr(insn, w.bytes(), PTR_WRITE);
            self.b.st(w, addr, v);
        } else if let Some(r) = Gpr::of(insn.op_register(n)) {
            self.set_gpr(r, v);
        }
    }

    /// A general register's 64 bits `whole` with `v` written into part `r`, as
    /// [`Translator::set_gpr`] would, whatever the upper bits of `v`.
    pub fn merged(&mut self, r: Gpr, whole: Val, v: Val) -> Val {
        match r.w {
            Width::W64 => v,
            Width::W32 => self.b.un(Op::Zext, Width::W32, v),
            w => self.b.deposit(w, whole, v, if r.high { 8 } else { 0 }),
        }
    }

    /// `v` fit for [`Translator::set_gpr`] at width `w`.
    pub fn zero_upper(&mut self, w: Width, v: Val) -> Val {
        if w == Width::W32 { self.b.un(Op::Zext, Width::W32, v) } else { v }
    }

    /// Loads from host pointer `p + disp`.
    pub fn ldp(&mut self, w: Width, p: Val, disp: u64) -> Val {
        let dst = self.b.new_val();
        self.b.push(Inst { dst, ins: [p, N, N, N], imm: disp, ..Inst::new(Op::LdP, w) });
        dst
    }

    /// Stores to host pointer `p + disp`.
    pub fn stp(&mut self, w: Width, p: Val, disp: u64, v: Val) {
        self.b.push(Inst { ins: [p, v, N, N], imm: disp, ..Inst::new(Op::StP, w) });
    }

    /// Atomic operation on the memory operand of `insn`; gives the old value.
    pub fn atomic(&mut self, insn: &Instruction, w: Width, op: Rmw, v: Val) -> Val {
        let p = self.mem_ptr(insn, w as u8, PTR_READ | PTR_WRITE);
        let old = self.rmw(w, p, op, v);
        self.b.ptr_end(p);
        old
    }

    /// Atomic operation at host pointer `p`; gives the old value.
    pub fn rmw(&mut self, w: Width, p: Val, op: Rmw, v: Val) -> Val {
        let dst = self.b.new_val();
        let inst = Inst { dst, aux: op as u8, ins: [p, v, N, N], ..Inst::new(Op::AtomicRmw, w) };
        self.b.push(inst);
        dst
    }

    /// Atomic compare-and-swap at host pointer `p`: the old value, and the flags of comparing
    /// `expect` with it.
    pub fn cas(&mut self, w: Width, p: Val, expect: Val, new: Val) -> (Val, Val) {
        self.b.alu(Op::AtomicCas, w, [p, expect, new, N])
    }

    /// Replaces `old`, read before through `p`, by `new`; if someone else has changed it since, the
    /// instruction starts over. Ends the use of `p`.
    pub fn swap_or_retry(&mut self, p: Val, w: Width, old: Val, new: Val) {
        let (_, fl) = self.cas(w, p, old, new);
        self.b.ptr_end(p);
        let exit = self.exit_to(self.rip, ExitHint::Jump);
        self.b.brcc(Cond::Ne, fl, exit);
    }
}
