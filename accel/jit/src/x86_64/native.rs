//! Pass-through instructions with a memory operand in guest memory.
//!
//! On a hit the instruction runs right behind the probe, its operand being the probe's. The cold
//! piece gets a pointer from the runtime and has a copy of the instruction that goes through it; after
//! a store it writes a bounced access back.

use super::asm::*;
use super::frame::*;
use super::generate::{ColdKind, Gen};
use super::mem::Span;
use crate::code::CompileError;
use crate::ir::{Block, Inst, NativeReg, PTR_WRITE, SIZE_80, access_bytes};
use crate::native::{NO_INDEX, NativeRegs, encode};
use crate::target::AccessInfo;

/// The registers of an instruction with memory operand `m` and general result `dst`.
fn operands(m: Mem, dst: Reg) -> NativeRegs {
    NativeRegs {
        mem: m.base,
        index: if m.index == NOREG { NO_INDEX } else { m.index },
        scale: m.scale,
        disp: m.disp,
        dst: if dst == NOREG { 0 } else { dst },
        ..NativeRegs::default()
    }
}

impl Gen {
    /// `NativeMem`.
    pub(super) fn native_mem(&mut self, block: &Block, inst: &Inst) {
        let Some(native) = block.natives.get(inst.native_index()) else {
            self.error.get_or_insert(CompileError::TooLarge);
            return;
        };
        let [a, b, ..] = inst.ins;
        if native.x87 {
            self.want_x87();
        }
        self.clobber();
        let m = self.address(a, b, inst.aux & 3, inst.disp() as i32);
        let m = self.narrow_address(m);
        let m = self.with_base(m);
        self.release(a);
        self.release(b);
        let role = self.role(inst);
        let (i, t, wanted) = self.reach_temps(m, role, false);
        let has_dst = [native.reg, native.vvvv].contains(&NativeReg::GprDst);
        // The result may replace a register of the address, or the tag: it is written last.
        let dst = if has_dst { self.load_result(inst.dst, t) } else { NOREG };
        if has_dst {
            self.lock(dst);
        }
        let snap = self.snapshot();
        let size = (inst.aux >> 2).min(SIZE_80);
        let own = Span::own(access_bytes(size), inst.cond);
        let acc = self.reach(block.mmu_idx, m, role, own, i, t);
        let back = self.a.label();
        if self.softmmu() {
            let shared = self.shared_piece(role, i, wanted);
            let kind = ColdKind::NativeMem {
                addr: acc.guest,
                tmp: acc.tmp,
                info: AccessInfo::new(size, block.mmu_idx, inst.cond).0,
                ptr: i,
                dst,
                native: inst.native_index() as u32,
                trap: native.fp,
                snap,
                shared,
            };
            self.push_cold(acc.entry, back, kind);
        } else {
            self.a.bind(acc.entry);
        }
        if native.fp || !self.softmmu() {
            self.snaps.set_trap(snap, self.a.pos());
        }
        match encode(native, &operands(acc.host, dst)) {
            Some(bytes) => self.a.raw(bytes.as_slice()),
            None => {
                self.error.get_or_insert(CompileError::TooLarge);
            }
        }
        self.a.bind(back);
        self.define_addend(role, i);
        if has_dst {
            self.define_if_some(inst.dst, dst);
        }
        if native.sets_flags {
            self.set_flags(inst.fl);
        }
    }

    /// In linear memory: the operand with a base register, which these instructions must have.
    fn with_base(&mut self, m: Mem) -> Mem {
        if self.softmmu() || m.base != NOREG {
            return m;
        }
        let base = self.alloc();
        self.a.lea(W64, base, m);
        Mem::new(base, 0)
    }

    /// `GetMxcsr`. The block has vector state, and with it MXCSR, in host registers.
    pub(super) fn get_mxcsr(&mut self, inst: &Inst) {
        let word = env(self.inner.shared.target.env.mxcsr);
        let d = self.result(inst.dst, NOREG, 0);
        self.a.stmxcsr(word);
        self.a.load(W32, d, word);
        self.define(inst.dst, d, 32);
    }
    /// `SetMxcsr`.
    pub(super) fn set_mxcsr(&mut self, inst: &Inst) {
        let word = env(self.inner.shared.target.env.mxcsr);
        self.store_value(W32, word, inst.ins[0]);
        self.a.ldmxcsr(word);
    }

    /// The cold piece of [`Gen::native_mem`]; `back` is where it goes on.
    pub(super) fn cold_native(&mut self, block: &Block, kind: ColdKind, back: Label) {
        let ColdKind::NativeMem { addr, tmp, info, ptr, dst, native, trap, snap, shared } = kind
        else {
            return;
        };
        let native = &block.natives[native as usize];
        if shared.member {
            // The access by itself. All registers are as the snapshot says when it traps.
            let info = AccessInfo(info);
            let busy = 1 << ptr | if dst == NOREG { 0 } else { 1 << dst };
            let (miss, t) = (self.a.label(), self.borrowed(addr, busy));
            let host = self.cold_check(addr, info, (ptr, t), miss);
            self.a.load(W64, t, frame(ARGS + 24));
            if trap {
                self.snaps.also_trap(snap, self.a.pos());
            }
            if let Some(bytes) = encode(native, &operands(host, dst)) {
                self.a.raw(bytes.as_slice());
            }
            self.end_shared(shared);
            self.a.jmp(back);
            self.a.bind(miss);
            self.a.load(W64, t, frame(ARGS + 24));
        }
        self.access_args(addr, tmp, info);
        let to = self.inner.thunks.ptr;
        self.a.call_to(to);
        self.snaps.also(snap, self.a.pos());
        self.reload_vectors();
        self.zero_addends(shared.places);
        self.a.load(W64, ptr, frame(RES));
        if trap {
            self.snaps.also_trap(snap, self.a.pos());
        }
        if let Some(bytes) = encode(native, &operands(Mem::new(ptr, 0), dst)) {
            self.a.raw(bytes.as_slice());
        }
        self.end_shared(shared);
        if AccessInfo(info).access() & PTR_WRITE != 0 {
            self.a.alu_i(Alu::Cmp, W8, env(self.inner.shared.target.env.bounce), 0);
            self.a.jcc(CC_E, back);
            let to = self.inner.thunks.ptr_end;
            self.a.call_to(to);
            self.snaps.also(snap, self.a.pos());
            self.reload_vectors();
        }
    }
}
