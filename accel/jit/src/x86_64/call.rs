//! Helper calls and pass-through instructions.

use super::alloc::*;
use super::alu::zx_of;
use super::asm::*;
use super::frame::*;
use super::generate::{ColdKind, Gen};
use crate::code::CompileError;
use crate::ir::{Block, Inst, NativeReg, Op, Val};
use crate::native::{self, NativeRegs};

impl Gen {
    /// `Call`.
    pub(super) fn call(&mut self, inst: &Inst) {
        let target = self.inner.shared.target.clone();
        let index = inst.imm as usize;
        let Some(helper) = target.helpers.get(index) else {
            self.error.get_or_insert(CompileError::TooLarge);
            return;
        };
        let effects = helper.effects;
        self.clobber();
        self.pass_args(&inst.ins);
        if effects.reads_globals || effects.writes_globals {
            self.flush();
        }
        if effects.writes_globals {
            self.forget_globals();
        }
        let snap = effects.may_fault.then(|| self.snapshot());
        let to = self.inner.thunks.helpers[index];
        self.a.call_to(to);
        self.x87 = false;
        if let Some(snap) = snap {
            self.snaps.set_host(snap, self.a.pos());
        }
        self.reload_vectors();
        self.fetch_result(inst.dst);
    }
    /// Puts call arguments into the frame and releases them.
    fn pass_args(&mut self, args: &[Val]) {
        for (k, &v) in args.iter().enumerate() {
            if v.is_some() {
                let locked = self.locked;
                self.store_value(W64, frame(ARGS + 8 * k as i32), v);
                self.locked = locked;
            }
        }
    }
    fn fetch_result(&mut self, dst: Val) {
        if self.wants(dst) {
            self.locked = 0;
            let d = self.result(dst, NOREG, 0);
            self.a.load(W64, d, frame(RES));
            self.define(dst, d, 64);
        }
    }
    /// Globals may change behind our back: live values move out of pins and `Env` slots.
    fn forget_globals(&mut self) {
        for r in 0..16 {
            if r != RSP && !self.is_scratch(r) {
                self.vacate(r);
            }
        }
        for g in 0..self.env_val.len() {
            if self.env_val[g] != NOVAL {
                self.displace(g as u8);
            }
        }
    }
    /// `Pext`, `Pdep` on a host without BMI2.
    pub(super) fn gather_bits_by_call(&mut self, inst: &Inst, dep: bool) {
        self.clobber();
        let w = inst.w.max(W32);
        let narrow = |g: &mut Gen, k: i32, v: Val| {
            let t = g.take_copy(v);
            g.a.movzx(w, t, Rm::R(t));
            g.a.store(W64, frame(ARGS + 8 * k), t);
            g.locked = 0;
        };
        narrow(self, 0, inst.ins[0]);
        narrow(self, 1, inst.ins[1]);
        let th = &self.inner.thunks;
        let to = if dep { th.pdep } else { th.pext };
        self.a.call_to(to);
        self.x87 = false;
        self.reload_vectors();
        self.fetch_result(inst.dst);
    }

    /// `Native`.
    pub(super) fn native(&mut self, block: &Block, inst: &Inst) {
        let Some(native) = block.natives.get(inst.imm as usize) else {
            self.error.get_or_insert(CompileError::TooLarge);
            return;
        };
        let [a, b, c, d] = inst.ins;
        if native.x87 {
            self.want_x87();
        }
        if native.sets_flags {
            self.clobber();
        }
        let mut regs = NativeRegs::default();
        for (v, field) in [(a, &mut regs.mem), (b, &mut regs.b), (c, &mut regs.c)] {
            if v.is_some() {
                *field = self.reg(v);
            }
        }
        let before = d.is_some().then(|| self.state(d));
        for v in [a, b, c, d] {
            self.release(v);
        }
        let names = |f: NativeReg| native.reg == f || native.rm == f || native.vvvv == f;
        let (has_dst, has_dst2) = (names(NativeReg::GprDst), names(NativeReg::GprDst2));
        // A result never shares a register with an input: the instruction may write one result
        // before it has read every input, or fault in between.
        let inputs =
            self.locked & !before.map_or(0, |s| if s.reg == NOREG { 0 } else { 1 << s.reg });
        let used = |v: Val, r: u8| if v.is_some() { 1u16 << r } else { 0 };
        let keep = inputs | used(a, regs.mem) | used(b, regs.b) | used(c, regs.c);
        if has_dst {
            regs.dst = self.native_result(inst.dst, before, keep);
        }
        if has_dst2 {
            let avoid = keep | if has_dst { 1 << regs.dst } else { 0 };
            regs.dst2 = self.native_result(inst.dst2, None, avoid);
        }
        let snap = native.fp.then(|| self.snapshot());
        if let Some(snap) = snap {
            self.snaps.set_trap(snap, self.a.pos());
        }
        match native::encode(native, &regs) {
            Some(bytes) => self.a.raw(bytes.as_slice()),
            None => {
                self.error.get_or_insert(CompileError::TooLarge);
                return;
            }
        }
        // A 32-bit destination zero-extends; narrower ones (PEXTRB to a register) do too.
        if has_dst {
            self.define_if_some(inst.dst, regs.dst);
        }
        if has_dst2 {
            self.define_if_some(inst.dst2, regs.dst2);
        }
        if native.sets_flags {
            self.set_flags(inst.fl);
        }
        debug_assert_eq!(inst.op, Op::Native);
    }
    /// Makes sure that guest x87 state is in the host's unit.
    pub(super) fn want_x87(&mut self) {
        if self.x87 {
            return;
        }
        self.clobber();
        let (entry, back) = (self.a.label(), self.a.label());
        self.a.alu_i(Alu::Cmp, W8, env(self.inner.shared.target.env.x87_live), 0);
        self.a.jcc(CC_E, entry);
        self.a.bind(back);
        self.push_cold(entry, back, ColdKind::X87);
        self.x87 = true;
    }
    fn native_result(&mut self, v: Val, before: Option<VState>, avoid: u16) -> Reg {
        let v = if self.wants(v) { v } else { Val::NONE };
        let reuse = before.map_or(NOREG, |s| s.reg);
        let r = self.result(v, reuse, avoid);
        if let Some(s) = before {
            self.fill_from(r, &s);
        }
        r
    }
    pub(super) fn define_if_some(&mut self, v: Val, r: Reg) {
        if v.is_some() {
            self.define(v, r, zx_of(W64));
        }
    }
}
