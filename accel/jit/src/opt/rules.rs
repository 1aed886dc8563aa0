//! The rules of the forward pass: identities, one family a function.
//!
//! A rule may only use what [`Fold`] knows: constants, significant bits, definitions. After the first
//! sweep a flags result that is present is used, so rules that lose flags apply only without one.

use super::fold::Fold;
use crate::ir::eval::{FLAGS, PF, ZF, sext, shift_count};
use crate::ir::{Cond, Inst, LD_SX32, LD_SX64, Op, Val, Width};

/// What becomes of an instruction.
pub(super) enum Rewrite {
    /// It stays, possibly changed.
    Keep,
    /// Its result is this value; its flags result, if any, is input `d`.
    Copy(Val),
    /// It has no effect.
    Drop,
    /// It has become the terminator; the rest of the block is unreachable.
    End,
}

impl Fold<'_> {
    /// Applies the rules for the instruction's operation.
    pub(super) fn apply_rules(&mut self, inst: &mut Inst) -> Rewrite {
        self.constant_last(inst);
        match inst.op {
            Op::Zext => self.zext(inst),
            Op::Sext => self.sext(inst),
            Op::Extract if inst.aux == 0 => {
                inst.op = Op::Zext;
                self.zext(inst)
            }
            Op::Deposit => self.deposit(inst),
            Op::Add | Op::Sub | Op::Or | Op::Xor | Op::And => self.logic(inst),
            Op::Mul => self.mul(inst),
            Op::Shl | Op::Shr | Op::Sar | Op::Rol | Op::Ror => self.shift(inst),
            Op::Lea => self.lea(inst),
            Op::Ld | Op::St | Op::Ptr | Op::NativeMem => {
                self.fold_address(inst);
                Rewrite::Keep
            }
            Op::ImgFlags => self.img_flags(inst),
            Op::SetCc => self.set_cc(inst),
            Op::SelCc => self.sel_cc(inst),
            Op::BrCc => self.br_cc(inst),
            _ => Rewrite::Keep,
        }
    }

    /// Moves the constant input of a commutative operation to `b`, where back ends look for it.
    fn constant_last(&self, inst: &mut Inst) {
        let commutes = matches!(inst.op, Op::Add | Op::Adc | Op::And | Op::Or | Op::Xor | Op::Mul);
        if commutes && self.known(inst.ins[0]).is_some() && self.known(inst.ins[1]).is_none() {
            inst.ins.swap(0, 1);
        }
    }

    /// The result is `a` cut to the instruction's width.
    fn copy(&mut self, inst: &mut Inst, a: Val) -> Rewrite {
        if inst.w != Width::W32 || self.bits(a) <= 32 {
            return Rewrite::Copy(a);
        }
        for v in inst.ins {
            if v.is_some() && v != a {
                self.release(v);
            }
        }
        *inst = Inst {
            dst: inst.dst,
            ins: [a, Val::NONE, Val::NONE, Val::NONE],
            ..Inst::new(Op::Zext, Width::W32)
        };
        Rewrite::Keep
    }

    fn zext(&mut self, inst: &mut Inst) -> Rewrite {
        let a = inst.ins[0];
        if self.bits(a) <= inst.w.bits() {
            return Rewrite::Copy(a);
        }
        // SETcc and MOVZX: what was inserted is as narrow as what is read back.
        if let Some(def) = self.def(a)
            && def.op == Op::Deposit
            && def.aux == 0
            && def.w >= inst.w
            && self.bits(def.ins[1]) <= inst.w.bits()
        {
            return Rewrite::Copy(def.ins[1]);
        }
        match self.sole_def(a) {
            Some(def)
                if inst.w == Width::W32
                    && def.op == Op::Ld
                    && def.aux & LD_SX64 != 0
                    && def.w <= Width::W32 =>
            {
                let narrow = if def.w < Width::W32 { LD_SX32 } else { 0 };
                let aux = def.aux & !LD_SX64 | narrow;
                self.redefine(a, Inst { aux, ..def }, 32);
                Rewrite::Copy(a)
            }
            _ => Rewrite::Keep,
        }
    }

    fn sext(&mut self, inst: &mut Inst) -> Rewrite {
        let a = inst.ins[0];
        // Without a sign bit there is nothing to extend.
        if inst.w == Width::W64 || self.bits(a) < inst.w.bits() {
            return Rewrite::Copy(a);
        }
        match self.sole_def(a) {
            Some(def) if def.op == Op::Ld && def.w == inst.w && def.aux & LD_SX32 == 0 => {
                self.redefine(a, Inst { aux: def.aux | LD_SX64, ..def }, 64);
                Rewrite::Copy(a)
            }
            _ => Rewrite::Keep,
        }
    }

    fn deposit(&mut self, inst: &mut Inst) -> Rewrite {
        let [a, b, ..] = inst.ins;
        if inst.aux == 0 && (inst.w == Width::W64 || a == b) {
            return Rewrite::Copy(b);
        }
        if inst.aux == 0 && self.known(a) == Some(0) {
            self.release(a);
            *inst = Inst {
                dst: inst.dst,
                ins: [b, Val::NONE, Val::NONE, Val::NONE],
                ..Inst::new(Op::Zext, inst.w)
            };
            return self.zext(inst);
        }
        // What an earlier insertion put where this one goes is lost.
        if let Some(def) = self.sole_def(a) {
            let (lo, hi) = (u32::from(inst.aux), u32::from(inst.aux) + inst.w.bits());
            let (dlo, dhi) = (u32::from(def.aux), u32::from(def.aux) + def.w.bits());
            if def.op == Op::Deposit && lo <= dlo && dhi <= hi {
                self.release(a);
                self.retain(def.ins[0]);
                inst.ins[0] = def.ins[0];
            }
        }
        Rewrite::Keep
    }

    /// Addition, subtraction and the bitwise operations.
    fn logic(&mut self, inst: &mut Inst) -> Rewrite {
        let [a, b, ..] = inst.ins;
        if matches!(inst.op, Op::Xor | Op::Sub) && a == b {
            self.learn(inst, 0, 0, ZF | PF);
            return Rewrite::Keep;
        }
        let m = inst.w.mask();
        let constant = self.known(b).map(|k| k & m);
        if inst.op == Op::And && constant == Some(0) {
            self.learn(inst, 0, 0, ZF | PF);
            return Rewrite::Keep;
        }
        if inst.fl.is_some() || !inst.dst.is_some() {
            return Rewrite::Keep;
        }
        match (inst.op, constant) {
            (Op::And | Op::Or, _) if a == b => self.copy(inst, a),
            (Op::Add | Op::Sub | Op::Or | Op::Xor, Some(0)) => self.copy(inst, a),
            (Op::And, Some(k)) => {
                let set = ones(self.bits(a)) & m;
                if k & set == set {
                    return self.copy(inst, a);
                }
                let narrow = match k {
                    0xff => Width::W8,
                    0xffff => Width::W16,
                    0xffff_ffff => Width::W32,
                    _ => return Rewrite::Keep,
                };
                self.release(b);
                *inst = Inst {
                    dst: inst.dst,
                    ins: [a, Val::NONE, Val::NONE, Val::NONE],
                    ..Inst::new(Op::Zext, narrow)
                };
                self.zext(inst)
            }
            _ => Rewrite::Keep,
        }
    }

    fn mul(&mut self, inst: &mut Inst) -> Rewrite {
        if inst.fl.is_some() || inst.w < Width::W32 {
            return Rewrite::Keep;
        }
        let [a, b, ..] = inst.ins;
        let (with_base, scale) = match self.known(b).map(|k| k & inst.w.mask()) {
            Some(1) => return self.copy(inst, a),
            Some(2) => (false, 1),
            Some(4) => (false, 2),
            Some(8) => (false, 3),
            Some(3) => (true, 1),
            Some(5) => (true, 2),
            Some(9) => (true, 3),
            _ => return Rewrite::Keep,
        };
        self.release(b);
        if with_base {
            self.retain(a);
        }
        *inst = Inst {
            dst: inst.dst,
            aux: scale,
            ins: [if with_base { a } else { Val::NONE }, a, Val::NONE, Val::NONE],
            ..Inst::new(Op::Lea, inst.w)
        };
        Rewrite::Keep
    }

    fn shift(&mut self, inst: &mut Inst) -> Rewrite {
        let Some(n) = self.known(inst.ins[1]) else { return Rewrite::Keep };
        if shift_count(inst.w, n) != 0 {
            return Rewrite::Keep;
        }
        let [a, _, _, old] = inst.ins;
        // Old flags that are absent are zero, which only a constant could say.
        if inst.fl.is_some() && !old.is_some() {
            return Rewrite::Keep;
        }
        if inst.w == Width::W32 && self.bits(a) > 32 && inst.fl.is_some() {
            return Rewrite::Keep;
        }
        self.copy(inst, a)
    }

    fn lea(&mut self, inst: &mut Inst) -> Rewrite {
        self.fold_address(inst);
        let [base, index, ..] = inst.ins;
        if let Some(k) = self.known(index) {
            self.fold_constant(inst, 1, k << (inst.aux & 3));
        } else if !base.is_some() && inst.aux & 3 == 0 {
            inst.ins.swap(0, 1);
        }
        if let Some(k) = self.known(inst.ins[0]) {
            self.fold_constant(inst, 0, k);
        }
        let [base, index, ..] = inst.ins;
        if base.is_some() && !index.is_some() && inst.imm == 0 {
            return self.copy(inst, base);
        }
        Rewrite::Keep
    }

    /// Moves the constant `k` of address input `slot` to the displacement, if it fits there.
    fn fold_constant(&mut self, inst: &mut Inst, slot: usize, k: u64) {
        let sum = inst.imm.wrapping_add(k);
        let sum =
            if inst.w == Width::W32 && inst.op == Op::Lea { sext(Width::W32, sum) } else { sum };
        if i32::try_from(sum as i64).is_ok() {
            self.release(inst.ins[slot]);
            inst.ins[slot] = Val::NONE;
            inst.imm = sum;
        }
    }

    /// Takes a constant or an address computation that only this instruction uses into its own
    /// address `a + (b << scale) + imm`.
    fn fold_address(&mut self, inst: &mut Inst) {
        let base = inst.ins[0];
        let Some(def) = self.sole_def(base) else { return };
        if def.w != Width::W64 {
            return;
        }
        let (source, index, scale, disp) = match def.op {
            Op::Add | Op::Sub if !def.fl.is_some() => match self.known(def.ins[1]) {
                Some(k) if def.op == Op::Add => (def.ins[0], Val::NONE, 0, k),
                Some(k) => (def.ins[0], Val::NONE, 0, k.wrapping_neg()),
                None => return,
            },
            Op::Lea if def.ins[0].is_some() => (def.ins[0], def.ins[1], def.aux & 3, def.imm),
            _ => return,
        };
        let Ok(sum) = i32::try_from(inst.disp().wrapping_add(disp as i64)) else { return };
        if index.is_some() && inst.ins[1].is_some() {
            return;
        }
        self.release(base);
        self.retain(source);
        inst.ins[0] = source;
        inst.set_disp(sum);
        if index.is_some() {
            self.retain(index);
            inst.ins[1] = index;
            inst.aux = inst.aux & !3 | scale;
        }
    }

    fn img_flags(&mut self, inst: &mut Inst) -> Rewrite {
        if let Some(k) = self.known(inst.ins[0]) {
            self.learn(inst, 0, 0, k & FLAGS);
            return Rewrite::Keep;
        }
        match self.def(inst.ins[0]) {
            Some(def) if def.op == Op::FlagsImg => {
                self.forward_flags(inst.fl, def.ins[0]);
                Rewrite::Drop
            }
            _ => Rewrite::Keep,
        }
    }

    /// A flag that was put into an image is read back.
    fn set_cc(&mut self, inst: &mut Inst) -> Rewrite {
        let cond = Cond::from_code(inst.cond);
        let image = self.def(inst.ins[0]).filter(|d| d.op == Op::ImgFlags);
        // CF is bit 0.
        if let Some(d) = image
            && cond == Cond::B
            && self.bits(d.ins[0]) <= 1
        {
            return Rewrite::Copy(d.ins[0]);
        }
        let flag = image.and_then(|d| self.def(d.ins[0])).filter(|d| {
            d.op == Op::Shl
                && d.w >= Width::W32
                && self.bits(d.ins[0]) <= 1
                && self.known(d.ins[1]).is_some_and(|n| n < 32 && 1 << n == cond.reads())
        });
        match flag {
            // Odd conditions are negated ones.
            Some(d) if inst.cond & 1 == 0 => Rewrite::Copy(d.ins[0]),
            _ => Rewrite::Keep,
        }
    }

    fn sel_cc(&mut self, inst: &mut Inst) -> Rewrite {
        let [fl, t, e, _] = inst.ins;
        let pick = match self.known(fl) {
            Some(img) if Cond::from_code(inst.cond).holds(img) => t,
            Some(_) => e,
            None if t == e => t,
            None => return Rewrite::Keep,
        };
        self.copy(inst, pick)
    }

    fn br_cc(&mut self, inst: &mut Inst) -> Rewrite {
        match self.known(inst.ins[0]) {
            None => Rewrite::Keep,
            Some(img) if Cond::from_code(inst.cond).holds(img) => {
                *inst = Inst { imm: inst.imm, ..Inst::new(Op::Exit, Width::W64) };
                Rewrite::End
            }
            Some(_) => Rewrite::Drop,
        }
    }
}

fn ones(bits: u32) -> u64 {
    if bits == 0 { 0 } else { u64::MAX >> (64 - bits.min(64)) }
}
