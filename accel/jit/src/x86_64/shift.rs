//! Shifts and rotations.
//!
//! A count of zero leaves the flags alone, in the IR as on the host: a shift by a variable count
//! whose flags are wanted runs with its flags input in EFLAGS. Counts live in CL; when the pinned
//! RCX is something else it is set aside around the instruction.

use super::alloc::*;
use super::alu::zx_of;
use super::asm::*;
use super::frame::frame;
use super::generate::Gen;
use crate::ir::{Inst, Op, Val, Width};

/// The count as the operation sees it.
fn masked(w: Width, n: u64) -> u8 {
    (n & if w == W64 { 63 } else { 31 }) as u8
}

impl Gen {
    /// `Shl`, `Shr`, `Sar`, `Rol`, `Ror`, `Rcl`, `Rcr`.
    pub(super) fn shift(&mut self, inst: &Inst) {
        let op = match inst.op {
            Op::Shl => Sh::Shl,
            Op::Shr => Sh::Shr,
            Op::Sar => Sh::Sar,
            Op::Rol => Sh::Rol,
            Op::Ror => Sh::Ror,
            Op::Rcl => Sh::Rcl,
            _ => Sh::Rcr,
        };
        let through_carry = matches!(op, Sh::Rcl | Sh::Rcr);
        let [a, b, c, d] = inst.ins;
        let fl_in = if through_carry { c } else { d };
        let wants_fl = self.wants_flags(inst.fl);
        let count = self.konst(b).map(|n| masked(inst.w, n));
        let merge =
            self.merge.filter(|m| self.rep(m.into) == self.rep(a) && count.is_some_and(|n| n != 0));
        if !wants_fl
            && !through_carry
            && merge.is_none()
            && self.shift_without_flags(inst, op, count)
        {
            self.release(fl_in);
            return;
        }
        // Flags input: what must be in EFLAGS when the instruction runs.
        let rotates = !matches!(op, Sh::Shl | Sh::Shr | Sh::Sar);
        let carry_only = self.only_carry(inst.fl);
        if through_carry && (!wants_fl || carry_only) {
            self.load_carry(fl_in);
        } else if wants_fl && (count.is_none() || count == Some(0) || (rotates && !carry_only)) {
            self.load_flags_or_zero(fl_in);
        } else {
            self.release(fl_in);
        }
        let dst = if self.wants(inst.dst) { inst.dst } else { Val::NONE };
        match count {
            Some(n) => {
                let sa = self.state(a);
                self.release(a);
                self.release(b);
                let r = self.start_result(inst.dst, merge, &sa, 0);
                self.fill_from(r, &sa);
                self.clobber();
                if n != 0 {
                    self.a.shift_i(op, inst.w, Rm::R(r), n);
                } else if inst.w == W32 {
                    self.a.load(W32, r, Rm::R(r));
                }
                self.finish_result(inst.dst, merge, r, zx_of(inst.w));
            }
            None => {
                let r = self.with_count(b, a, dst, 0, |g, r| g.a.shift_cl(op, inst.w, Rm::R(r)));
                if inst.w == W32 {
                    // A count of zero does not write the upper half.
                    self.a.load(W32, r, Rm::R(r));
                }
                self.define(dst, r, zx_of(inst.w));
            }
        }
        self.set_flags(inst.fl);
    }
    /// Whether only the carry of the flags value is ever looked at.
    fn only_carry(&self, fl: Val) -> bool {
        fl.is_some() && self.live.vals[fl.index()].cond == CC_B
    }

    /// Forms that need no EFLAGS at all; false if there is none.
    fn shift_without_flags(&mut self, inst: &Inst, op: Sh, count: Option<u8>) -> bool {
        let [a, b, ..] = inst.ins;
        let w = inst.w;
        match (op, count) {
            (_, Some(0)) => {
                self.release(b);
                if w == W32 {
                    self.zext(W32, inst.dst, a);
                } else {
                    let i = self.rep(a);
                    self.alias(inst.dst, i);
                    self.release_rep(i);
                }
                true
            }
            (Sh::Shl, Some(n @ 1..=3)) if self.rep_reg(a) != NOREG => {
                let sa = self.state(a);
                let in_place = match self.hint(inst.dst) {
                    Some(p) => p == sa.reg,
                    None => sa.uses == 1 && self.is_scratch(sa.reg),
                };
                if in_place && !self.flags_live() {
                    return false;
                }
                self.release(a);
                self.release(b);
                let r = self.result(inst.dst, sa.reg, 0);
                let m = match n {
                    1 => Mem::idx(sa.reg, sa.reg, 0, 0),
                    n => Mem::idx(NOREG, sa.reg, n, 0),
                };
                self.a.lea(w.max(W32), r, m);
                self.define(inst.dst, r, zx_of(w));
                true
            }
            (Sh::Rol | Sh::Ror, Some(n)) if w >= W32 && self.inner.shared.features.bmi2 => {
                let rm = self.reg_or_mem(a);
                self.release(a);
                self.release(b);
                let n = n & (w.bits() - 1) as u8;
                let n = if op == Sh::Rol { (w.bits() as u8 - n) & (w.bits() - 1) as u8 } else { n };
                let r = self.result(inst.dst, reg_in(rm), 0);
                self.a.rorx(w, r, rm, n);
                self.define(inst.dst, r, zx_of(w));
                true
            }
            (Sh::Shl | Sh::Shr | Sh::Sar, None) if self.inner.shared.features.bmi2 => {
                let rb = self.reg(b);
                let rm = self.reg_or_mem(a);
                self.release(a);
                self.release(b);
                let widened = w < W32 && op != Sh::Shl;
                let avoid = if widened { 1 << rb } else { 0 };
                let r = self.result(inst.dst, reg_in(rm), avoid);
                let mut src = rm;
                if widened {
                    match op {
                        Sh::Shr => self.a.movzx(w, r, rm),
                        _ => self.a.movsx(w, false, r, rm),
                    }
                    src = Rm::R(r);
                }
                self.a.shiftx(op, w.max(W32), r, src, rb);
                self.define(inst.dst, r, zx_of(w));
                true
            }
            _ => false,
        }
    }
    /// Whether EFLAGS holds a value that is still needed.
    pub(super) fn flags_live(&self) -> bool {
        self.flags_now != NOVAL && self.vals[self.flags_now as usize].uses != 0
    }
    /// The register that holds `v`, if any.
    pub(super) fn rep_reg(&self, v: Val) -> Reg {
        self.vals[self.rep(v) as usize].reg
    }

    /// Runs `emit` with `count` in CL and a copy of `a` in the returned register (the place of
    /// `dst`). Registers in `avoid` stay. Releases `count` and `a`, and saves EFLAGS if needed.
    fn with_count(
        &mut self,
        count: Val,
        a: Val,
        dst: Val,
        avoid: u16,
        emit: impl FnOnce(&mut Gen, Reg),
    ) -> Reg {
        let sa = self.state(a);
        let sc = self.state(count);
        self.release(a);
        self.release(count);
        let in_rcx = sc.reg == RCX || self.reg_val[RCX as usize] == sc.rep;
        if in_rcx {
            self.lock(RCX);
            let keep = if sa.reg == RCX { 0 } else { 1 << RCX };
            let r = self.result(dst, sa.reg, avoid | keep);
            self.fill_from(r, &sa);
            self.clobber();
            emit(self, r);
            return r;
        }
        if self.is_scratch(RCX) {
            if sa.reg != RCX {
                self.vacate(RCX);
            }
            self.lock(RCX);
        }
        // The count must survive until it is in RCX.
        let count_reg = if sc.reg == NOREG || sc.reg == sa.reg { 0 } else { 1 << sc.reg };
        let r = self.result(dst, sa.reg, avoid | count_reg | 1 << RCX);
        self.fill_from(r, &sa);
        let aside = (!self.is_scratch(RCX)).then(|| self.set_aside(RCX));
        if self.is_scratch(RCX) {
            self.vacate(RCX);
        }
        self.fill_from(RCX, &sc);
        self.clobber();
        emit(self, r);
        if let Some(place) = aside {
            self.a.load(W64, RCX, place);
        }
        r
    }
    /// Copies a pinned register to a spare scratch register or a spill slot, for the rest of the
    /// instruction.
    pub(super) fn set_aside(&mut self, r: Reg) -> Rm {
        let t = self.spare(0);
        if t != NOREG {
            self.lock(t);
            self.a.mov(t, r);
            return Rm::R(t);
        }
        let slot = self.take_slot();
        self.freed.push(slot);
        self.a.store(W64, frame(slot), r);
        Rm::M(frame(slot))
    }

    /// `Shld`, `Shrd`.
    pub(super) fn shift_double(&mut self, inst: &Inst) {
        let right = inst.op == Op::Shrd;
        let w = inst.w.max(W16);
        let [a, b, c, d] = inst.ins;
        let wants_fl = self.wants_flags(inst.fl);
        let count = self.konst(c).map(|n| masked(w, n));
        if wants_fl && matches!(count, None | Some(0)) {
            self.load_flags_or_zero(d);
        } else {
            self.release(d);
        }
        let dst = if self.wants(inst.dst) { inst.dst } else { Val::NONE };
        let r = match count {
            Some(n) => {
                let sa = self.state(a);
                let rb = self.reg(b);
                self.release(a);
                self.release(b);
                self.release(c);
                let avoid = if rb == sa.reg { 0 } else { 1 << rb };
                let r = self.result(dst, sa.reg, avoid);
                self.fill_from(r, &sa);
                self.clobber();
                if n != 0 {
                    self.a.shiftd_i(right, w, Rm::R(r), rb, n);
                }
                r
            }
            None => {
                let mut rb = self.reg(b);
                if rb == RCX && self.rep_reg(c) != RCX {
                    // RCX will hold the count.
                    rb = self.alloc();
                    self.a.mov(rb, RCX);
                }
                self.release(b);
                // A copy of `a` in the register of `b` would be both operands.
                let avoid = if rb == self.rep_reg(a) { 0 } else { 1 << rb };
                self.with_count(c, a, dst, avoid, |g, r| g.a.shiftd_cl(right, w, Rm::R(r), rb))
            }
        };
        if w == W32 && count.is_none_or(|n| n == 0) {
            self.a.load(W32, r, Rm::R(r));
        }
        self.define(dst, r, zx_of(w));
        self.set_flags(inst.fl);
    }
}

/// The register of an operand, or [`NOREG`].
pub(super) fn reg_in(rm: Rm) -> Reg {
    match rm {
        Rm::R(r) => r,
        Rm::M(_) => NOREG,
    }
}
