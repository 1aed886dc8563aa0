//! The stack: PUSH, POP, ENTER, LEAVE and what calls share with them.

use super::Translator;
use super::mov::{after_segment, selector, set_segment};
use super::operand::{Gpr, Offset, seg_num};
use crate::x86::bits::rflags;
use crate::x86::cpu::{Cpu, global};
use crate::x86::flags;
use crate::x86::helpers;
use crate::x86::mode::Mode;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_accel::x86::{gpr, seg};
use tandem_jit::ir::{Addr, Op, PTR_READ, PTR_WRITE, Val, Width};

const RSP: u8 = gpr::RSP as u8;
const RBP: u8 = gpr::RBP as u8;

impl Translator<'_> {
    /// Width of the stack pointer.
    pub fn stack_width(&self) -> Width {
        if self.code64() {
            Width::W64
        } else if self.mode.contains(Mode::SS32) {
            Width::W32
        } else {
            Width::W16
        }
    }

    /// Linear address of the `size` bytes at stack pointer `sp` + `disp`.
    pub fn stack_addr(&mut self, sp: Val, disp: i64, size: u32, access: u8) -> Addr {
        let o = Offset { disp, ..Offset::value(sp, self.stack_width()) };
        self.linear(seg::SS, o, size, access)
    }

    /// Sets the stack pointer to `sp` + `disp`; only the part that the stack's width has changes.
    pub fn set_sp(&mut self, sp: Val, disp: i64) {
        let w = self.stack_width();
        let v = if disp == 0 {
            self.zero_upper(w, sp)
        } else {
            let lea = Addr::disp(sp, disp as i32);
            self.b.lea(w.max(Width::W32), lea)
        };
        self.set_gpr(Gpr { num: RSP, w, high: false }, v);
    }

    /// Pushes the low `w` bits of `v`.
    pub fn push(&mut self, w: Width, v: Val) {
        let n = -i64::from(w.bytes());
        let sp = self.gpr64(RSP);
        let addr = self.stack_addr(sp, n, w.bytes(), PTR_WRITE);
        self.b.st(w, addr, v);
        self.set_sp(sp, n);
    }

    /// Reads the `w` bits on top of the stack, zero-extended; the stack pointer stays.
    pub fn top(&mut self, w: Width) -> Val {
        let sp = self.gpr64(RSP);
        let addr = self.stack_addr(sp, 0, w.bytes(), PTR_READ);
        self.b.ld(w, addr, 0)
    }

    /// Adds `n` bytes to the stack pointer.
    pub fn drop_stack(&mut self, n: i64) {
        let sp = self.gpr64(RSP);
        self.set_sp(sp, n);
    }
}

/// Operand size of a push or pop of something without a size of its own.
fn stack_operand(insn: &Instruction) -> Width {
    Width::from_bytes(insn.stack_pointer_increment().unsigned_abs()).unwrap_or(Width::W64)
}

/// PUSH.
pub(super) fn push(t: &mut Translator, insn: &Instruction) {
    let w = stack_operand(insn);
    let v = match seg_num(insn.op0_register()) {
        Some(n) => selector(t, n),
        None => t.read(insn, 0, w),
    };
    t.push(w, v);
}

/// POP.
pub(super) fn pop(t: &mut Translator, insn: &Instruction) {
    let w = stack_operand(insn);
    let n = i64::from(w.bytes());
    let v = t.top(w);
    if let Some(segment) = seg_num(insn.op0_register()) {
        if segment == seg::CS {
            return t.ud();
        }
        let v = t.b.un(Op::Zext, Width::W16, v);
        // The stack's width is that of the old SS.
        let sp = t.gpr64(RSP);
        set_segment(t, segment, v);
        t.set_sp(sp, n);
        return after_segment(t, segment);
    }
    if insn.op0_kind() == OpKind::Memory {
        // An address based on the stack pointer is formed after the increment.
        let mut o = t.mem_offset(insn);
        if insn.memory_base().full_register() == Register::RSP {
            o.disp += n;
        }
        let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
        let addr = t.linear(segment, o, w.bytes(), PTR_WRITE);
        t.b.st(w, addr, v);
        return t.drop_stack(n);
    }
    // POP of the stack pointer itself: the loaded value wins.
    t.drop_stack(n);
    if let Some(r) = Gpr::of(insn.op0_register()) {
        t.set_gpr(r, v);
    }
}

/// PUSHA and PUSHAD.
pub(super) fn pusha(t: &mut Translator, insn: &Instruction) {
    let w = if insn.mnemonic() == Mnemonic::Pushad { Width::W32 } else { Width::W16 };
    let n = i64::from(w.bytes());
    let sp = t.gpr64(RSP);
    for r in 0..8 {
        let v = t.gpr64(r);
        let addr = t.stack_addr(sp, -n * i64::from(r + 1), w.bytes(), PTR_WRITE);
        t.b.st(w, addr, v);
    }
    t.set_sp(sp, -8 * n);
}

/// POPA and POPAD; the stack pointer's own slot is skipped.
pub(super) fn popa(t: &mut Translator, insn: &Instruction) {
    let w = if insn.mnemonic() == Mnemonic::Popad { Width::W32 } else { Width::W16 };
    let n = i64::from(w.bytes());
    let sp = t.gpr64(RSP);
    let mut values = [Val::NONE; 8];
    for r in (0..8u8).rev().filter(|&r| r != RSP) {
        let addr = t.stack_addr(sp, n * i64::from(7 - r), w.bytes(), PTR_READ);
        values[r as usize] = t.b.ld(w, addr, 0);
    }
    for r in (0..8u8).filter(|&r| r != RSP) {
        t.set_gpr(Gpr { num: r, w, high: false }, values[r as usize]);
    }
    t.set_sp(sp, 8 * n);
}

/// PUSHF.
pub(super) fn pushf(t: &mut Translator, insn: &Instruction) {
    let w = stack_operand(insn);
    if t.mode.contains(Mode::VM86) {
        let size = t.b.iconst(w.bytes().into());
        let v = t.b.call(helpers::PUSHF, &[size]);
        return t.push(w, v);
    }
    let arith = t.flags_image();
    // All ones when DF is set, 1 when it is clear.
    let df = t.b.get(global::DF);
    let mask = t.b.iconst(rflags::DF);
    let df = t.b.bin(Op::And, Width::W32, df, mask);
    let v = t.b.bin(Op::Or, Width::W32, arith, df);
    let system = t.b.ldenv(Width::W64, super::cpu_field(offset_of!(Cpu, eflags)));
    let mask = t.b.iconst(flags::SYSTEM & !(rflags::RF | rflags::VM));
    let system = t.b.bin(Op::And, Width::W32, system, mask);
    let v = t.b.bin(Op::Or, Width::W32, v, system);
    let one = t.b.iconst(rflags::ONE);
    let v = t.b.bin(Op::Or, Width::W32, v, one);
    t.push(w, v);
}

/// POPF. The mode may have changed (TF, AC, IOPL).
pub(super) fn popf(t: &mut Translator, insn: &Instruction) {
    let w = stack_operand(insn);
    let v = t.top(w);
    let size = t.b.iconst(w.bytes().into());
    // The helper can fault only where IOPL forbids the instruction, before it changes anything.
    t.b.call_void(helpers::POPF, &[v, size]);
    t.flags_unknown();
    t.drop_stack(w.bytes().into());
    let next = t.b.iconst(t.next);
    t.jump(next, tandem_jit::ir::ExitHint::Jump);
}

/// LEAVE: SP = BP, then pop BP.
pub(super) fn leave(t: &mut Translator, insn: &Instruction) {
    let w = leave_operand(insn);
    let bp = t.gpr64(RBP);
    let addr = t.stack_addr(bp, 0, w.bytes(), PTR_READ);
    let v = t.b.ld(w, addr, 0);
    t.set_sp(bp, w.bytes().into());
    t.set_gpr(Gpr { num: RBP, w, high: false }, v);
}

fn leave_operand(insn: &Instruction) -> Width {
    match insn.mnemonic() {
        Mnemonic::Leave | Mnemonic::Enter => match insn.code() {
            iced_x86::Code::Leavew | iced_x86::Code::Enterw_imm16_imm8 => Width::W16,
            iced_x86::Code::Leaved | iced_x86::Code::Enterd_imm16_imm8 => Width::W32,
            _ => Width::W64,
        },
        _ => Width::W64,
    }
}

/// ENTER: frame of op0 bytes, nesting level op1 (SDM vol. 2, ENTER).
pub(super) fn enter(t: &mut Translator, insn: &Instruction) {
    let w = leave_operand(insn);
    let n = i64::from(w.bytes());
    let size = i64::from(insn.immediate16());
    let level = i64::from(insn.immediate8_2nd() & 31);
    let (sp, bp) = (t.gpr64(RSP), t.gpr64(RBP));
    let addr = t.stack_addr(sp, -n, w.bytes(), PTR_WRITE);
    t.b.st(w, addr, bp);
    // The frame pointer's value: the stack pointer after the first push.
    let stack = t.stack_width();
    let frame = t.b.lea(stack.max(Width::W32), Addr::disp(sp, -n as i32));
    for i in 1..level {
        let from = t.stack_addr(bp, -n * i, w.bytes(), PTR_READ);
        let v = t.b.ld(w, from, 0);
        let to = t.stack_addr(sp, -n * (i + 1), w.bytes(), PTR_WRITE);
        t.b.st(w, to, v);
    }
    let mut depth = n;
    if level > 0 {
        depth = n * (level + 1);
        let to = t.stack_addr(sp, -depth, w.bytes(), PTR_WRITE);
        t.b.st(w, to, frame);
    }
    // The new top of the stack must be writable (SDM: a fault leaves BP and SP alone).
    let probe = t.stack_addr(sp, -depth - size, w.bytes(), PTR_WRITE);
    let p = t.b.ptr(w as u8, probe, PTR_READ | PTR_WRITE);
    t.b.ptr_end(p);
    t.set_gpr(Gpr { num: RBP, w, high: false }, frame);
    t.set_sp(sp, -depth - size);
}
