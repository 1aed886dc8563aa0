//! Moves between widths: extension, insertion, extraction. All spare EFLAGS on hosts with BMI2.

use super::alu::zx_of;
use super::asm::*;
use super::generate::Gen;
use super::shift::reg_in;
use crate::ir::{Inst, Val, Width};

impl Gen {
    /// `dst = zero-extend low w bits of a`.
    pub(super) fn zext(&mut self, w: Width, dst: Val, a: Val) {
        let i = self.rep(a);
        let s = self.vals[i as usize];
        if s.konst {
            self.release(a);
            let d = self.st(dst.0);
            (d.konst, d.imm) = (true, s.imm & w.mask());
            d.zx = (64 - d.imm.leading_zeros()) as u8;
            return;
        }
        if w == W64 || s.zx as u32 <= w.bits() {
            self.alias(dst, i);
            self.release_rep(i);
            return;
        }
        let rm = self.reg_or_mem(a);
        self.release(a);
        let r = self.result(dst, reg_in(rm), 0);
        self.a.movzx(w, r, rm);
        self.define(dst, r, w.bits() as u8);
    }
    /// `dst = sign-extend low w bits of a`.
    pub(super) fn sext(&mut self, w: Width, dst: Val, a: Val) {
        let i = self.rep(a);
        if w == W64 || (self.vals[i as usize].zx as u32) < w.bits() {
            // Nothing above, and the sign bit is known to be zero.
            self.alias(dst, i);
            self.release_rep(i);
            return;
        }
        let rm = self.reg_or_mem(a);
        self.release(a);
        let r = self.result(dst, reg_in(rm), 0);
        self.a.movsx(w, true, r, rm);
        self.define(dst, r, 64);
    }

    /// `Extract`.
    pub(super) fn extract(&mut self, inst: &Inst) {
        let (a, w, pos) = (inst.ins[0], inst.w, inst.aux & 63);
        if pos == 0 {
            return self.zext(w, inst.dst, a);
        }
        let s = self.state(a);
        if pos == 8 && w == W8 && s.reg < 4 {
            self.release(a);
            let r = self.result(inst.dst, s.reg, 0);
            if r < 8 {
                self.a.movzx_high(r, s.reg);
            } else {
                self.shift_right(r, s.reg, 8);
                self.a.movzx(W8, r, Rm::R(r));
            }
            return self.define(inst.dst, r, 8);
        }
        let ra = self.reg(a);
        self.release(a);
        let r = self.result(inst.dst, ra, 0);
        if pos as u32 + w.bits() >= 64 {
            // Up to the top: a plain shift leaves nothing above.
            self.clobber();
            self.a.mov(r, ra);
            self.a.shift_i(Sh::Shr, W64, Rm::R(r), pos);
        } else {
            self.shift_right(r, ra, pos);
            self.a.movzx(w, r, Rm::R(r));
        }
        self.define(inst.dst, r, w.bits() as u8);
    }
    /// `r = ra` moved right by `pos`; the bits above are unspecified.
    fn shift_right(&mut self, r: Reg, ra: Reg, pos: u8) {
        if self.inner.shared.features.bmi2 {
            self.a.rorx(W64, r, Rm::R(ra), pos);
        } else {
            self.clobber();
            self.a.mov(r, ra);
            self.a.shift_i(Sh::Shr, W64, Rm::R(r), pos);
        }
    }
    fn rotate_right(&mut self, r: Reg, pos: u8) {
        if pos & 63 == 0 {
            return;
        }
        if self.inner.shared.features.bmi2 {
            self.a.rorx(W64, r, Rm::R(r), pos & 63);
        } else {
            self.clobber();
            self.a.shift_i(Sh::Ror, W64, Rm::R(r), pos & 63);
        }
    }

    /// `Deposit`.
    pub(super) fn deposit(&mut self, inst: &Inst) {
        let [a, b, ..] = inst.ins;
        let (w, pos) = (inst.w, inst.aux & 63);
        if w == W64 {
            let i = self.rep(b);
            self.release(a);
            self.alias(inst.dst, i);
            self.release_rep(i);
            return;
        }
        if w == W32 {
            return self.deposit_word(inst, pos);
        }
        let sa = self.state(a);
        let kb = self.konst(b);
        let rb = if kb.is_none() { self.reg(b) } else { NOREG };
        self.release(a);
        self.release(b);
        let avoid = if rb != NOREG && rb != sa.reg { 1 << rb } else { 0 };
        if rb == sa.reg && rb != NOREG {
            // Inserting a register into itself: the low part of the copy is the source.
            let r = self.result(inst.dst, NOREG, 1 << rb);
            self.a.mov(r, sa.reg);
            self.rotate_right(r, pos);
            self.a.load(w, r, Rm::R(rb));
            self.rotate_right(r, 64 - pos);
            return self.define(inst.dst, r, 64);
        }
        let r = self.result(inst.dst, sa.reg, avoid);
        self.fill_from(r, &sa);
        if pos == 8 && w == W8 && r < 4 && (rb < 4 || kb.is_some()) {
            match kb {
                Some(c) => self.a.mov_high_i(r, c as u8),
                None => self.a.mov_high(r, rb),
            }
            return self.define(inst.dst, r, 64);
        }
        self.rotate_right(r, pos);
        match kb {
            Some(c) => self.a.store_i(w, Rm::R(r), c as i32),
            None => self.a.load(w, r, Rm::R(rb)),
        }
        self.rotate_right(r, 64 - pos);
        self.define(inst.dst, r, 64);
    }
    /// Insertion of 32 bits.
    fn deposit_word(&mut self, inst: &Inst, pos: u8) {
        let [a, b, ..] = inst.ins;
        let low = self.take_copy_keep(b);
        let sa = self.state(a);
        self.release(a);
        self.release(b);
        let r = self.result(inst.dst, sa.reg, 0);
        self.fill_from(r, &sa);
        self.clobber();
        // r = (a rotated so that the field is lowest), low half replaced, rotated back.
        if pos != 0 {
            self.a.shift_i(Sh::Ror, W64, Rm::R(r), pos);
        }
        self.a.shift_i(Sh::Shr, W64, Rm::R(r), 32);
        self.a.shift_i(Sh::Shl, W64, Rm::R(r), 32);
        self.a.load(W32, low, Rm::R(low));
        self.a.alu_r(Alu::Or, W64, r, Rm::R(low));
        if pos != 0 {
            self.a.shift_i(Sh::Rol, W64, Rm::R(r), pos);
        }
        self.define(inst.dst, r, zx_of(W64));
    }
    /// A private copy of `v`; `v` is not released.
    pub(super) fn take_copy_keep(&mut self, v: Val) -> Reg {
        let s = self.state(v);
        let t = self.alloc();
        self.fill_from(t, &s);
        t
    }
}
