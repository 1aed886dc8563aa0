//! Addition, subtraction, logic, address arithmetic.
//!
//! Results of 8 and 16 bits have unspecified upper bits, so without a wanted flags result these
//! operations run at 32 bits, which neither merges registers nor needs a prefix.

use super::alloc::*;
use super::asm::*;
use super::generate::{Gen, Merge};
use crate::ir::{Inst, Op, Val, Width};

/// Bits of the container that may be non-zero after a `w`-bit operation.
pub(super) fn zx_of(w: Width) -> u8 {
    if w == W32 { 32 } else { 64 }
}

impl Gen {
    /// Whether the result is used.
    pub(super) fn wants(&self, v: Val) -> bool {
        v.is_some() && self.vals[v.index()].uses != 0
    }

    /// `Add`, `Sub`, `And`, `Or`, `Xor`, `Adc`, `Sbb`.
    pub(super) fn alu(&mut self, inst: &Inst) {
        let op = match inst.op {
            Op::Add => Alu::Add,
            Op::Sub => Alu::Sub,
            Op::And => Alu::And,
            Op::Or => Alu::Or,
            Op::Xor => Alu::Xor,
            Op::Adc => Alu::Adc,
            _ => Alu::Sbb,
        };
        let [mut a, mut b, c, _] = inst.ins;
        let wants_fl = self.wants_flags(inst.fl);
        if matches!(op, Alu::Adc | Alu::Sbb) {
            self.load_carry(c);
        } else if self.rep(a) == self.rep(b) && matches!(op, Alu::Sub | Alu::Xor) {
            return self.zero(inst);
        }
        let commutes = !matches!(op, Alu::Sub | Alu::Sbb);
        let into = self.merge.map_or(NOVAL, |m| self.rep(m.into));
        let swap = match into {
            NOVAL => self.better_swapped(inst.dst, a, b),
            i => self.rep(b) == i && self.rep(a) != i,
        };
        if commutes && swap {
            std::mem::swap(&mut a, &mut b);
        }
        let merge = self.merge.filter(|_| self.rep(a) == into);
        let exact = wants_fl || merge.is_some();
        let w = if exact { inst.w } else { inst.w.max(W32) };
        if !self.wants(inst.dst) && matches!(op, Alu::Sub | Alu::And) {
            return self.compare(inst, op, a, b);
        }
        let sa = self.state(a);
        let ob = self.operand(w, b);
        if !exact && w >= W32 && self.try_lea(inst, op, w, &sa, ob, (a, b)) {
            return;
        }
        self.release(a);
        self.release(b);
        let avoid = match ob {
            Opnd::R(r) if r != sa.reg => 1 << r,
            _ => 0,
        };
        let d = self.start_result(inst.dst, merge, &sa, avoid);
        self.fill_from(d, &sa);
        self.clobber();
        match ob {
            Opnd::R(r) => self.a.alu_r(op, w, d, Rm::R(r)),
            Opnd::M(m) => self.a.alu_r(op, w, d, m),
            Opnd::I(1) if op == Alu::Add && !wants_fl => self.a.inc_dec(w, false, Rm::R(d)),
            Opnd::I(imm) => self.a.alu_i(op, w, Rm::R(d), imm),
        }
        self.finish_result(inst.dst, merge, d, zx_of(w));
        self.set_flags(inst.fl);
    }
    /// A register for result `v`, or for the insertion that swallows it.
    pub(super) fn start_result(
        &mut self,
        v: Val,
        merge: Option<Merge>,
        sa: &VState,
        avoid: u16,
    ) -> Reg {
        match merge {
            Some(m) => {
                // The insertion's own use of the old content ends here: else it would be kept.
                self.release(m.into);
                let d = self.result(m.dst, sa.reg, avoid);
                let into = self.rep(m.into);
                self.st(into).uses += 1;
                d
            }
            None => {
                let v = if self.wants(v) { v } else { Val::NONE };
                self.result(v, sa.reg, avoid)
            }
        }
    }
    /// Ends what [`Gen::start_result`] began.
    pub(super) fn finish_result(&mut self, v: Val, merge: Option<Merge>, d: Reg, zx: u8) {
        match merge {
            Some(m) => self.merged(m, v, d),
            None if self.wants(v) => self.define(v, d, zx),
            None => {}
        }
    }

    /// Whether a commutative operation is better done as `b op a`.
    fn better_swapped(&self, dst: Val, a: Val, b: Val) -> bool {
        let (sa, sb) = (&self.vals[self.rep(a) as usize], &self.vals[self.rep(b) as usize]);
        if sb.konst || sa.konst {
            return sa.konst && !sb.konst;
        }
        let p = if dst.is_some() { self.hint(dst) } else { None };
        if p.is_some_and(|p| sa.reg == p || sb.reg == p) {
            return p == Some(sb.reg);
        }
        // Two-operand form destroys the first: let that be one that dies in a scratch register.
        let dies = |s: &VState| s.uses == 1 && s.reg != NOREG && self.is_scratch(s.reg);
        !dies(sa) && dies(sb)
    }

    /// `x - x` and `x ^ x`.
    fn zero(&mut self, inst: &Inst) {
        self.release(inst.ins[0]);
        self.release(inst.ins[1]);
        let wants_fl = self.wants_flags(inst.fl);
        let dst = if self.wants(inst.dst) { inst.dst } else { Val::NONE };
        if !wants_fl && !self.hint_some(dst) {
            let s = self.st(inst.dst.0);
            (s.konst, s.imm, s.zx) = (true, 0, 0);
            return;
        }
        let d = self.result(dst, NOREG, 0);
        if self.flags_live() && !wants_fl {
            self.a.mov_i(d, 0);
        } else {
            self.clobber();
            self.a.alu_r(Alu::Xor, W32, d, Rm::R(d));
            self.set_flags(inst.fl);
        }
        self.define(dst, d, 0);
    }
    fn hint_some(&self, v: Val) -> bool {
        v.is_some() && self.hint(v).is_some()
    }

    /// `cmp` or `test`: only flags are wanted.
    fn compare(&mut self, inst: &Inst, op: Alu, a: Val, b: Val) {
        let w = inst.w;
        let ob = self.operand(w, b);
        let ra = match self.reg_or_mem(a) {
            // An instruction has one memory operand at most.
            Rm::M(_) if matches!(ob, Opnd::M(_)) => Rm::R(self.reg(a)),
            rm => rm,
        };
        self.clobber();
        match (op, ob, ra) {
            (Alu::Sub, Opnd::I(imm), _) => self.a.alu_i(Alu::Cmp, w, ra, imm),
            (Alu::Sub, Opnd::R(r), _) => self.a.alu_m(Alu::Cmp, w, ra, r),
            (Alu::Sub, Opnd::M(m), Rm::R(r)) => self.a.alu_r(Alu::Cmp, w, r, m),
            (_, Opnd::I(imm), _) => self.a.test_i(w, ra, imm),
            (_, Opnd::R(r), _) => self.a.test(w, ra, r),
            // TEST takes memory only as its first operand.
            (_, Opnd::M(m), Rm::R(r)) => self.a.test(w, m, r),
            (_, Opnd::M(_), Rm::M(_)) => debug_assert!(false, "two memory operands"),
        }
        self.release(a);
        self.release(b);
        self.set_flags(inst.fl);
    }
    /// `Add`, and `Sub` of a constant, as LEA: saves a move, and spares EFLAGS if they are live.
    fn try_lea(
        &mut self,
        inst: &Inst,
        op: Alu,
        w: Width,
        sa: &VState,
        ob: Opnd,
        ab: (Val, Val),
    ) -> bool {
        let (index, disp) = match (op, ob) {
            (Alu::Add, Opnd::I(imm)) => (NOREG, imm),
            (Alu::Sub, Opnd::I(imm)) if imm != i32::MIN => (NOREG, -imm),
            (Alu::Add, Opnd::R(r)) => (r, 0),
            _ => return false,
        };
        if sa.reg == NOREG {
            return false;
        }
        let in_place = match self.hint(inst.dst) {
            Some(p) => p == sa.reg,
            None => sa.uses == 1 && self.is_scratch(sa.reg),
        };
        if in_place && !self.flags_live() {
            return false;
        }
        self.release(ab.0);
        self.release(ab.1);
        let d = self.result(inst.dst, sa.reg, 0);
        self.a.lea(w, d, Mem { base: sa.reg, index, scale: 0, disp });
        self.define(inst.dst, d, zx_of(w));
        true
    }
    /// `Andn`: `a & !b`.
    pub(super) fn andn(&mut self, inst: &Inst) {
        let [a, b, ..] = inst.ins;
        let w = inst.w.max(W32);
        self.clobber();
        if self.inner.shared.features.bmi1 {
            let (ra, rb) = (self.reg_or_mem(a), self.reg(b));
            self.release(a);
            self.release(b);
            let d = self.result(inst.dst, rb, 0);
            self.a.andn(w, d, rb, ra);
            self.define(inst.dst, d, zx_of(w));
        } else {
            let ra = self.reg_or_mem(a);
            let t = self.take_copy(b);
            self.release(a);
            self.a.group3(w, 2, Rm::R(t));
            self.a.alu_r(Alu::And, w, t, ra);
            self.define(inst.dst, t, zx_of(w));
        }
    }

    /// `Neg`, `Not`.
    pub(super) fn neg_not(&mut self, inst: &Inst) {
        let merge = self.merge.filter(|m| self.rep(m.into) == self.rep(inst.ins[0]));
        let exact = self.wants_flags(inst.fl) || merge.is_some();
        let w = if exact { inst.w } else { inst.w.max(W32) };
        let sa = self.state(inst.ins[0]);
        self.release(inst.ins[0]);
        let d = self.start_result(inst.dst, merge, &sa, 0);
        self.fill_from(d, &sa);
        if inst.op == Op::Neg {
            self.clobber();
            self.a.group3(w, 3, Rm::R(d));
        } else {
            self.a.group3(w, 2, Rm::R(d));
        }
        self.finish_result(inst.dst, merge, d, zx_of(w));
        if inst.op == Op::Neg {
            self.set_flags(inst.fl);
        }
    }

    /// `Inc`, `Dec`.
    pub(super) fn inc_dec(&mut self, inst: &Inst) {
        let dec = inst.op == Op::Dec;
        let wants_fl = self.wants_flags(inst.fl);
        let [a, _, c, _] = inst.ins;
        let merge = self.merge.filter(|m| self.rep(m.into) == self.rep(a));
        let exact = wants_fl || merge.is_some();
        let w = if exact { inst.w } else { inst.w.max(W32) };
        if c.is_some() {
            if wants_fl {
                self.load_carry(c);
            } else {
                self.release(c);
            }
        }
        let sa = self.state(a);
        if !exact {
            let step = if dec { -1 } else { 1 };
            if self.try_lea(inst, Alu::Add, w, &sa, Opnd::I(step), (a, Val::NONE)) {
                return;
            }
        }
        self.release(a);
        let d = self.start_result(inst.dst, merge, &sa, 0);
        self.fill_from(d, &sa);
        self.clobber();
        if wants_fl && !c.is_some() {
            // CLC: the carry is defined to be 0 then.
            self.a.raw(&[0xf8]);
        }
        self.a.inc_dec(w, dec, Rm::R(d));
        self.finish_result(inst.dst, merge, d, zx_of(w));
        self.set_flags(inst.fl);
    }

    /// `Lea`.
    pub(super) fn lea(&mut self, inst: &Inst) {
        let w = inst.w.max(W32);
        let [a, b, ..] = inst.ins;
        let m = self.address(a, b, inst.aux & 3, inst.imm as i32);
        self.release(a);
        self.release(b);
        let d = self.result(inst.dst, m.base, 0);
        self.a.lea(w, d, m);
        self.define(inst.dst, d, zx_of(w));
    }
    /// `a + (b << scale) + disp` as a memory operand; constants are folded where they fit.
    pub(super) fn address(&mut self, a: Val, b: Val, scale: u8, disp: i32) -> Mem {
        let mut m = Mem { base: NOREG, index: NOREG, scale, disp };
        let mut fold = |v: u64| match i32::try_from((m.disp as i64).wrapping_add(v as i64)) {
            Ok(d) => {
                m.disp = d;
                true
            }
            Err(_) => false,
        };
        let ka = a.is_some() && self.konst(a).is_some_and(&mut fold);
        let kb = b.is_some() && self.konst(b).is_some_and(|v| fold(v << scale));
        if a.is_some() && !ka {
            m.base = self.reg(a);
        }
        if b.is_some() && !kb {
            m.index = self.reg(b);
        }
        if m.base == NOREG && m.index != NOREG && m.scale == 0 {
            m.base = std::mem::replace(&mut m.index, NOREG);
        }
        m
    }
}
