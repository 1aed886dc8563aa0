//! Multiplication, division, bit counting, byte order, bit gathering.
//!
//! Wide products and divisions are bound to RAX and RDX. When those hold pinned globals that the
//! results do not replace, they are set aside around the instruction; for a division, which may
//! trap, the snapshot says where the set-aside globals are.

use super::alloc::*;
use super::alu::zx_of;
use super::asm::*;
use super::frame::*;
use super::generate::Gen;
use super::shift::reg_in;
use crate::ir::{Inst, Op, Val, Width};
use crate::liveness::NONE;
use crate::snapshot::SnapLoc;

/// A fixed register on loan for one instruction.
#[derive(Clone, Copy)]
struct Loan {
    reg: Reg,
    /// Where its pinned global waits.
    aside: Option<Rm>,
    /// The global comes back afterwards.
    restore: bool,
}

impl Gen {
    /// `Mul`.
    pub(super) fn mul(&mut self, inst: &Inst) {
        let wants_fl = self.wants_flags(inst.fl);
        if inst.w == W8 && wants_fl {
            return self.mul_wide(&Inst { op: Op::MulS2, ..*inst });
        }
        let w = if wants_fl { inst.w } else { inst.w.max(W32) };
        let [mut a, mut b, ..] = inst.ins;
        if self.konst(a).is_some() || (self.hint_is(inst.dst, b) && self.konst(b).is_none()) {
            std::mem::swap(&mut a, &mut b);
        }
        let dst = if self.wants(inst.dst) { inst.dst } else { Val::NONE };
        self.clobber();
        if let Some(imm) = self.konst(b).and_then(|c| imm32(w, c)) {
            let rm = self.reg_or_mem(a);
            self.release(a);
            self.release(b);
            let r = self.result(dst, reg_in(rm), 0);
            self.a.imul_i(w, r, rm, imm);
            self.define(dst, r, zx_of(w));
        } else {
            let sa = self.state(a);
            let rm = self.reg_or_mem(b);
            self.release(a);
            self.release(b);
            let avoid = match rm {
                Rm::R(r) if r != sa.reg => 1 << r,
                _ => 0,
            };
            let r = self.result(dst, sa.reg, avoid);
            self.fill_from(r, &sa);
            self.a.imul(w, r, rm);
            self.define(dst, r, zx_of(w));
        }
        self.set_flags(inst.fl);
    }
    /// Whether `dst` goes to the pin that holds `v`.
    fn hint_is(&self, dst: Val, v: Val) -> bool {
        dst.is_some() && self.hint(dst).is_some_and(|p| p == self.rep_reg(v))
    }

    /// Takes fixed register `r` for an instruction whose result there is `result`. `changes`: the
    /// instruction's input is not what the register holds now. `trap`: the global must stay
    /// findable until the instruction is done.
    fn borrow(&mut self, r: Reg, result: Val, changes: bool, trap: bool) -> Loan {
        let loan = if self.is_scratch(r) {
            self.vacate(r);
            Loan { reg: r, aside: None, restore: false }
        } else {
            let hinted = self.wants(result) && self.hint(result) == Some(r);
            let aside = (!hinted || (trap && changes)).then(|| self.set_aside(r));
            if hinted {
                self.vacate(r);
            }
            Loan { reg: r, aside, restore: !hinted }
        };
        self.lock(r);
        loan
    }
    /// Ends a loan: `result`, now in the register, is defined; the global comes back.
    fn give_back(&mut self, loan: Loan, result: Val, zx: u8) {
        let wanted = self.wants(result);
        match loan.aside.filter(|_| loan.restore) {
            None => {
                if wanted {
                    self.define(result, loan.reg, zx);
                } else if self.is_scratch(loan.reg) {
                    self.forget(loan.reg);
                }
            }
            Some(Rm::R(t)) if wanted => {
                self.a.xchg(W64, Rm::R(t), loan.reg);
                self.define(result, t, zx);
            }
            Some(place) => {
                if wanted {
                    let t = self.alloc();
                    self.a.mov(t, loan.reg);
                    self.define(result, t, zx);
                }
                self.a.load(W64, loan.reg, place);
            }
        }
    }

    /// `MulU2` without flags, by MULX if the host has it and a factor is in RDX: no other register is
    /// bound then. Returns whether it was so.
    fn mulx(&mut self, inst: &Inst) -> bool {
        let [mut a, mut b, ..] = inst.ins;
        if self.rep_reg(a) != RDX {
            std::mem::swap(&mut a, &mut b);
        }
        if !self.inner.shared.features.bmi2 || self.rep_reg(a) != RDX {
            return false;
        }
        self.lock(RDX);
        let rm = self.reg_or_mem(b);
        self.release(a);
        self.release(b);
        // Both factors are read before the results are written: these may take their registers.
        let of = |g: &Gen, v: Val| if g.wants(v) { v } else { Val::NONE };
        let (vl, vh) = (of(self, inst.dst), of(self, inst.dst2));
        let hi = self.result(vh, NOREG, 0);
        let lo = if vl.is_some() { self.result(vl, NOREG, 1 << hi) } else { hi };
        self.a.mulx(inst.w, hi, lo, rm);
        self.define(vh, hi, zx_of(inst.w));
        self.define(vl, lo, zx_of(inst.w));
        true
    }

    /// `MulU2`, `MulS2`.
    pub(super) fn mul_wide(&mut self, inst: &Inst) {
        let ext = if inst.op == Op::MulU2 { 4 } else { 5 };
        let w = inst.w;
        if inst.op == Op::MulU2 && w >= W32 && !self.wants_flags(inst.fl) && self.mulx(inst) {
            return;
        }
        let [mut a, mut b, ..] = inst.ins;
        if self.rep_reg(b) == RAX && self.rep_reg(a) != RAX {
            std::mem::swap(&mut a, &mut b);
        }
        self.clobber();
        let sa = self.state(a);
        let mut rm = self.reg_or_mem(b);
        if rm == Rm::R(RAX) && sa.reg != RAX {
            let t = self.alloc();
            self.a.mov(t, RAX);
            rm = Rm::R(t);
        }
        self.release(a);
        self.release(b);
        let low = self.borrow(RAX, inst.dst, true, false);
        let high = (w != W8).then(|| self.borrow(RDX, inst.dst2, true, false));
        // The vacated registers still hold their values: nothing was emitted that changes them.
        self.fill_from(RAX, &sa);
        self.a.group3(w, ext, rm);
        self.set_flags(inst.fl);
        match high {
            Some(high) => {
                // Operands are spent: their registers may serve the results.
                self.locked = 1 << RAX | 1 << RDX | held(low) | held(high);
                self.give_back(high, inst.dst2, zx_of(w));
            }
            None => {
                self.locked = 1 << RAX | held(low);
                self.high_byte(inst.dst2);
            }
        }
        self.give_back(low, inst.dst, zx_of(w));
    }
    /// Defines `v` as bits 8–15 of RAX.
    fn high_byte(&mut self, v: Val) {
        if !self.wants(v) {
            return;
        }
        let r = self.alloc();
        if self.inner.shared.features.bmi2 {
            self.a.rorx(W64, r, Rm::R(RAX), 8);
        } else {
            self.clobber();
            self.a.mov(r, RAX);
            self.a.shift_i(Sh::Shr, W64, Rm::R(r), 8);
        }
        self.define(v, r, 64);
    }

    /// `DivU2`, `DivS2`.
    pub(super) fn div(&mut self, inst: &Inst) {
        let ext = if inst.op == Op::DivU2 { 6 } else { 7 };
        let w = inst.w;
        let [hi, lo, c, _] = inst.ins;
        self.clobber();
        let (sh, sl) = (self.state(hi), self.state(lo));
        let mut divisor = self.reg_or_mem(c);
        let lo_moves = w == W8 || sl.reg != RAX;
        let hi_moves = w != W8 && sh.reg != RDX;
        // A divisor in a register that gets the dividend moves to a slot.
        if (divisor == Rm::R(RAX) && lo_moves) || (divisor == Rm::R(RDX) && hi_moves) {
            divisor = self.set_aside(reg_in(divisor));
        }
        self.release(hi);
        self.release(lo);
        self.release(c);
        let low = self.borrow(RAX, inst.dst, lo_moves, true);
        let high = (w != W8).then(|| self.borrow(RDX, inst.dst2, hi_moves, true));
        match high {
            Some(_) if sl.reg == RDX && sh.reg == RAX => self.a.xchg(W64, Rm::R(RAX), RDX),
            Some(_) if sl.reg == RDX => {
                self.fill_from(RAX, &sl);
                self.fill_from(RDX, &sh);
            }
            Some(_) => {
                self.fill_from(RDX, &sh);
                self.fill_from(RAX, &sl);
            }
            None => self.byte_dividend(&sh, &sl),
        }
        let loans = [Some(low), high];
        for loan in loans.into_iter().flatten() {
            if let Some(place) = loan.aside {
                self.moved[loan.reg as usize] = match place {
                    Rm::R(t) => self.saved_word(t),
                    Rm::M(m) => m.disp - FRAME,
                };
            }
        }
        let snap = self.snapshot();
        for loan in loans.into_iter().flatten() {
            let g = self.inner.shared.pins.global[loan.reg as usize];
            if loan.aside.is_some() && g != NONE {
                self.snaps.push(g, SnapLoc::Word(self.moved[loan.reg as usize]));
            }
            self.moved[loan.reg as usize] = NOMEM;
        }
        self.snaps.set_trap(snap, self.a.pos());
        self.a.group3(w, ext, divisor);
        self.flags_now = NOVAL;
        match high {
            Some(high) => {
                self.locked = 1 << RAX | 1 << RDX | held(low) | held(high);
                self.give_back(high, inst.dst2, zx_of(w));
            }
            None => {
                self.locked = 1 << RAX | held(low);
                self.high_byte(inst.dst2);
            }
        }
        self.give_back(low, inst.dst, zx_of(w));
    }
    /// AX := high byte : low byte. Needs no further register.
    fn byte_dividend(&mut self, sh: &VState, sl: &VState) {
        if sl.reg == RAX && sh.reg == RAX {
            self.a.movzx(W8, RAX, Rm::R(RAX));
            self.a.imul_i(W32, RAX, Rm::R(RAX), 0x101);
        } else if sl.reg == RAX {
            self.a.shift_i(Sh::Ror, W64, Rm::R(RAX), 8);
            self.low_byte(sh);
            self.a.shift_i(Sh::Rol, W64, Rm::R(RAX), 8);
        } else {
            self.fill_from(RAX, sh);
            self.a.shift_i(Sh::Shl, W32, Rm::R(RAX), 8);
            self.low_byte(sl);
        }
    }
    /// AL := low byte of a value that is not in RAX.
    fn low_byte(&mut self, s: &VState) {
        if s.reg != NOREG {
            self.a.load(W8, RAX, Rm::R(s.reg));
        } else if s.konst {
            self.a.store_i(W8, Rm::R(RAX), s.imm as i32);
        } else {
            self.a.load(W8, RAX, frame(s.mem));
        }
    }

    /// `Clz`, `Ctz`, `Popcnt`.
    pub(super) fn count_bits(&mut self, inst: &Inst) {
        self.clobber();
        let w = inst.w;
        let bits = w.bits() as i32;
        let wide = w.max(W32);
        let rm = self.reg_or_mem(inst.ins[0]);
        self.release(inst.ins[0]);
        let r = self.result(inst.dst, reg_in(rm), 0);
        let mut src = rm;
        if w < W32 {
            self.a.movzx(w, r, rm);
            src = Rm::R(r);
        }
        match inst.op {
            Op::Popcnt => self.a.op0f(0xf3, wide, 0xb8, r, src),
            Op::Ctz => {
                if w < W32 {
                    // A bit just above the operand stops the search.
                    self.a.alu_i(Alu::Or, W32, Rm::R(r), 1 << bits);
                }
                if self.inner.shared.features.bmi1 {
                    self.a.op0f(0xf3, wide, 0xbc, r, src);
                } else {
                    self.scan(wide, 0xbc, r, src, bits);
                }
            }
            _ => {
                if self.inner.shared.features.lzcnt {
                    self.a.op0f(0xf3, wide, 0xbd, r, src);
                } else {
                    // BSR gives the index of the highest bit: 31 - index, with -1 for no bit.
                    self.scan(wide, 0xbd, r, src, -1);
                    self.a.group3(W32, 3, Rm::R(r));
                    self.a.alu_i(Alu::Add, W32, Rm::R(r), wide.bits() as i32 - 1);
                }
                if w < W32 {
                    self.a.alu_i(Alu::Sub, W32, Rm::R(r), 32 - bits);
                }
            }
        }
        self.define(inst.dst, r, 8);
    }
    /// BSF or BSR with `none` as the result for an operand of zero.
    fn scan(&mut self, w: Width, op: u8, r: Reg, src: Rm, none: i32) {
        let t = self.alloc();
        self.a.mov_i(t, none as u32 as u64);
        self.a.op0f(0, w, op, r, src);
        self.a.cmov(CC_E, W32, r, Rm::R(t));
    }

    /// `Bswap`.
    pub(super) fn bswap(&mut self, inst: &Inst) {
        let sa = self.state(inst.ins[0]);
        self.release(inst.ins[0]);
        let r = self.result(inst.dst, sa.reg, 0);
        self.fill_from(r, &sa);
        if inst.w >= W32 {
            self.a.bswap(inst.w, r);
        } else {
            self.clobber();
            self.a.shift_i(Sh::Rol, W16, Rm::R(r), 8);
        }
        self.define(inst.dst, r, zx_of(inst.w));
    }

    /// `Pext`, `Pdep`.
    pub(super) fn gather_bits(&mut self, inst: &Inst) {
        let dep = inst.op == Op::Pdep;
        let w = inst.w.max(W32);
        let [a, b, ..] = inst.ins;
        if !self.inner.shared.features.bmi2 {
            return self.gather_bits_by_call(inst, dep);
        }
        let ra = self.reg(a);
        let rm = self.reg_or_mem(b);
        self.release(a);
        self.release(b);
        let r = self.result(inst.dst, ra, 0);
        self.a.pext(dep, w, r, ra, rm);
        self.define(inst.dst, r, zx_of(w));
    }
}

/// The register in which a loan's global waits, as a mask.
fn held(loan: Loan) -> u16 {
    match loan.aside {
        Some(Rm::R(r)) => 1 << r,
        _ => 0,
    }
}
