//! Flags values: in EFLAGS while they can be, saved when something must clobber EFLAGS.
//!
//! What always holds: `flags_now` is the value that EFLAGS holds, if any. Every emission of an
//! instruction that changes EFLAGS is preceded by [`Gen::clobber`] (after the instruction's own
//! flags input was taken). A flags value of which only one condition is ever tested is saved as
//! that condition (`setcc`), any other as an image (`pushfq`).

use super::alloc::*;
use super::asm::*;
use super::frame::*;
use super::generate::{Gen, Merge};
use crate::ir::{Cond, Inst, Val, Width};
use crate::snapshot::FLAGS_MASK;

impl Gen {
    /// EFLAGS is about to change: saves the value there if it is still needed.
    pub(super) fn clobber(&mut self) {
        let v = std::mem::replace(&mut self.flags_now, NOVAL);
        if v == NOVAL || self.vals[v as usize].uses == 0 {
            return;
        }
        let slot = self.take_slot();
        let cond = self.live.vals[v as usize].cond;
        let at = if cond < 16 {
            self.a.setcc(cond, frame(slot));
            FlagsAt::Cond(cond)
        } else {
            self.a.pushfq();
            self.a.pop_m(frame(slot));
            FlagsAt::Image
        };
        let s = self.st(v);
        s.mem = slot;
        s.flags = at;
    }
    /// The instruction just emitted set EFLAGS to `fl`; what was there before is gone.
    pub(super) fn set_flags(&mut self, fl: Val) {
        debug_assert!(!self.flags_live(), "EFLAGS changed while it was needed");
        self.flags_now = NOVAL;
        if fl.is_some() && self.vals[fl.index()].uses != 0 {
            self.st(fl.0).flags = FlagsAt::Eflags;
            self.flags_now = fl.0;
        }
    }
    /// Whether the flags result is wanted.
    pub(super) fn wants_flags(&self, fl: Val) -> bool {
        fl.is_some() && self.vals[fl.index()].uses != 0
    }

    /// Makes EFLAGS hold all of `fl`; releases it. What was in EFLAGS before is saved if needed.
    pub(super) fn load_flags(&mut self, fl: Val) {
        let s = self.vals[fl.index()];
        match s.flags {
            FlagsAt::Eflags => {}
            FlagsAt::Image => {
                self.clobber();
                self.a.push_m(frame(s.mem));
                self.a.popfq();
                self.flags_now = fl.0;
            }
            FlagsAt::Value(of) => {
                self.clobber();
                let locked = self.locked;
                let t = self.alloc();
                self.locked = locked;
                self.fill(t, of);
                self.a.alu_i(Alu::And, W32, Rm::R(t), FLAGS_MASK as i32);
                self.a.push(t);
                self.a.popfq();
            }
            FlagsAt::Cond(_) | FlagsAt::Nowhere => {
                debug_assert!(false, "flags value {} has no image", fl.0);
            }
        }
        self.release(fl);
        if s.flags == FlagsAt::Image && self.vals[fl.index()].uses != 0 {
            // In both places now; the next clobber would save it again, so forget EFLAGS.
            self.flags_now = NOVAL;
        }
    }
    /// EFLAGS := the flags of image 0.
    pub(super) fn zero_flags(&mut self) {
        self.clobber();
        self.a.raw(&[0x6a, 0]);
        self.a.popfq();
    }
    /// Full flags from `fl`, or zero if none.
    pub(super) fn load_flags_or_zero(&mut self, fl: Val) {
        if fl.is_some() { self.load_flags(fl) } else { self.zero_flags() }
    }
    /// Makes CF that of `fl`; releases it. The other flags are unspecified.
    pub(super) fn load_carry(&mut self, fl: Val) {
        let s = self.vals[fl.index()];
        match s.flags {
            FlagsAt::Eflags => {}
            FlagsAt::Image | FlagsAt::Cond(_) => {
                self.clobber();
                self.a.bt_i(W32, frame(s.mem), 0);
            }
            FlagsAt::Value(of) => {
                self.clobber();
                let locked = self.locked;
                let r = self.reg_of(of);
                self.locked = locked;
                self.a.bt_i(W32, Rm::R(r), 0);
            }
            FlagsAt::Nowhere => debug_assert!(false, "flags value {} undefined", fl.0),
        }
        self.release(fl);
    }
    /// Prepares EFLAGS for testing `cond` of `fl`; returns the host condition to use and releases
    /// the value.
    pub(super) fn condition(&mut self, fl: Val, cond: u8) -> u8 {
        let cond = cond & 15;
        let s = self.vals[fl.index()];
        let mask = Cond::from_code(cond).reads() as i32;
        // L, GE, LE, G compare two bits; all others ask whether any of `mask` is set.
        let simple = cond < 12;
        let cc = match s.flags {
            FlagsAt::Eflags => {
                self.release(fl);
                return cond;
            }
            FlagsAt::Cond(saved) => {
                debug_assert_eq!(saved, cond & 14);
                self.clobber();
                self.a.alu_i(Alu::Cmp, W8, frame(s.mem), 0);
                CC_NE ^ (cond & 1)
            }
            FlagsAt::Image if simple => {
                self.clobber();
                self.test_mask(Rm::M(frame(s.mem)), mask);
                CC_NE ^ (cond & 1)
            }
            FlagsAt::Value(of) if simple => {
                self.clobber();
                let locked = self.locked;
                let r = self.reg_of(of);
                self.locked = locked;
                self.test_mask(Rm::R(r), mask);
                CC_NE ^ (cond & 1)
            }
            _ => {
                self.load_flags(fl);
                return cond;
            }
        };
        self.release(fl);
        cc
    }
    fn test_mask(&mut self, rm: Rm, mask: i32) {
        let w = if mask < 0x80 { W8 } else { W32 };
        self.a.test_i(w, rm, mask);
    }

    /// `SetCc`.
    pub(super) fn setcc(&mut self, inst: &Inst) {
        let cc = self.condition(inst.ins[0], inst.cond);
        // The value to insert into may be read only after this instruction.
        let there = |m: &Merge| self.vals[self.rep(m.into) as usize].reg != NOREG;
        let once = self.vals[inst.dst.index()].uses == 1;
        if let Some(m) = self.merge.filter(|m| once && there(m)) {
            let sa = self.state(m.into);
            let r = self.start_result(inst.dst, Some(m), &sa, 0);
            self.fill_from(r, &sa);
            self.a.setcc(cc, Rm::R(r));
            return self.merged(m, inst.dst, r);
        }
        let r = self.result(inst.dst, NOREG, 0);
        self.a.setcc(cc, Rm::R(r));
        self.a.movzx(W8, r, Rm::R(r));
        self.define(inst.dst, r, 1);
    }
    /// `SelCc`.
    pub(super) fn selcc(&mut self, inst: &Inst) {
        let [fl, t, e, _] = inst.ins;
        let cc = self.condition(fl, inst.cond);
        let w = if inst.w == Width::W64 { W64 } else { W32 };
        let (rt, re) = (self.reg_or_mem(t), self.reg(e));
        self.release(t);
        self.release(e);
        let avoid = match rt {
            Rm::R(r) if r != re => 1 << r,
            _ => 0,
        };
        let d = self.result(inst.dst, re, avoid);
        self.a.mov(d, re);
        self.a.cmov(cc, w, d, rt);
        self.define(inst.dst, d, if w == W32 { 32 } else { 64 });
    }
    /// `FlagsImg`.
    pub(super) fn flags_img(&mut self, inst: &Inst) {
        let fl = inst.ins[0];
        let s = self.vals[fl.index()];
        let r = self.result(inst.dst, NOREG, 0);
        match s.flags {
            FlagsAt::Eflags => {
                self.a.pushfq();
                self.a.pop(r);
            }
            FlagsAt::Image => self.a.load(W64, r, frame(s.mem)),
            FlagsAt::Value(of) => self.fill(r, of),
            FlagsAt::Cond(_) | FlagsAt::Nowhere => debug_assert!(false, "flags image is lost"),
        }
        self.release(fl);
        let more = self.vals[fl.index()].uses != 0;
        let in_image = s.flags == FlagsAt::Eflags && more && self.wants(inst.dst);
        if in_image {
            // Who else wants the flags finds them in the image: they need not be saved as well.
            self.flags_now = NOVAL;
        }
        self.clobber();
        self.a.alu_i(Alu::And, W32, Rm::R(r), FLAGS_MASK as i32);
        self.define(inst.dst, r, 12);
        if in_image {
            self.st(fl.0).flags = FlagsAt::Value(inst.dst.0);
            let image = self.st(inst.dst.0);
            image.uses = image.uses.saturating_add(1);
        }
    }
    /// `ImgFlags`: nothing is emitted until a consumer comes.
    pub(super) fn img_flags(&mut self, inst: &Inst) {
        let of = self.rep(inst.ins[0]);
        // The use of this instruction passes to the flags value.
        self.st(inst.fl.0).flags = FlagsAt::Value(of);
    }
    /// `Bt`.
    pub(super) fn bt(&mut self, inst: &Inst) {
        let [a, b, other, _] = inst.ins;
        let w = inst.w.max(W16);
        let bits = inst.w.bits();
        if other.is_some() {
            self.load_flags(other);
            self.clobber();
        } else if self.live.vals[inst.fl.index()].cond & 14 != CC_B {
            self.zero_flags();
        } else {
            self.clobber();
        }
        // BT leaves ZF as it is. The architecture calls the other flags undefined; processors leave
        // them too, and a guest cannot ask for more than the host's own BT does.
        let ra = self.reg(a);
        match self.konst(b) {
            Some(n) => self.a.bt_i(w, Rm::R(ra), (n % bits as u64) as u8),
            None if inst.w == W8 => {
                let t = self.take_copy(b);
                // MOV and BT only: EFLAGS must stay.
                self.bt_byte(ra, t);
            }
            None => {
                let rb = self.reg(b);
                self.a.bt(w, ra, rb);
                self.release(b);
            }
        }
        if self.konst(b).is_some() {
            self.release(b);
        }
        self.release(a);
        self.set_flags(inst.fl);
    }
    /// A private copy of `v` in a scratch register; `v` is released.
    pub(super) fn take_copy(&mut self, v: Val) -> Reg {
        let i = self.rep(v);
        if self.vals[i as usize].reg != NOREG {
            let r = self.vals[i as usize].reg;
            self.lock(r);
        }
        let t = self.alloc();
        self.fill(t, i);
        self.release_rep(i);
        t
    }
    fn bt_byte(&mut self, ra: Reg, count: Reg) {
        // Replicating the byte makes bit (n mod 16) equal bit (n mod 8).
        let t = self.alloc();
        self.a.movzx(W8, t, Rm::R(ra));
        self.a.pushfq();
        self.a.imul_i(W32, t, Rm::R(t), 0x101);
        self.a.popfq();
        self.a.bt(W16, t, count);
    }
}
