//! Leaving a block: side exits, the terminator, linkable jumps, the indirect-jump probe; and the
//! cold pieces of a block.

use super::asm::*;
use super::frame::*;
use super::generate::{Cold, ColdKind, Gen};
use crate::code::{CompileError, ExitRef};
use crate::ir::{Block, Exit, ExitHint, ExitKind, Inst};

/// From the start of a bound exit's comparison to the displacement of its jump.
pub(super) const SITE_JUMP: usize = 10;

/// Whether nobody looks at global `g` behind `exit`.
fn is_dead(exit: &Exit, g: u8) -> bool {
    g < 64 && exit.dead >> g & 1 != 0
}

impl Gen {
    /// `BrCc`.
    pub(super) fn brcc(&mut self, block: &Block, inst: &Inst) {
        let index = inst.imm as usize;
        let Some(exit) = block.exits.get(index) else {
            self.error.get_or_insert(CompileError::TooLarge);
            return;
        };
        let cc = self.condition(inst.ins[0], inst.cond);
        let entry = self.a.label();
        let live = self.dirty.iter().any(|d| !is_dead(exit, d.0));
        if !live && matches!(exit.kind, ExitKind::Goto { .. }) {
            // Nothing to store: the conditional jump itself is linked.
            self.a.keep_in_word(2);
            self.links[index] = Some((self.a.pos() + 2, entry));
            self.a.jcc(cc, entry);
            let kind = ColdKind::Chain { exit: index as u16 };
            self.push_cold(entry, entry, kind);
            return;
        }
        let (first, count) = self.record_dirty(exit.dead);
        self.a.jcc(cc, entry);
        let kind = ColdKind::Exit { exit: index as u16, first, count };
        self.push_cold(entry, entry, kind);
    }

    /// `Exit`.
    pub(super) fn exit(&mut self, block: &Block, inst: &Inst) {
        let index = inst.imm as usize;
        let Some(exit) = block.exits.get(index).copied() else {
            self.error.get_or_insert(CompileError::TooLarge);
            return;
        };
        self.drop_dirty(exit.dead);
        if exit.kind == ExitKind::Indirect {
            // In a locked register, so that flushing cannot disturb it.
            let t = self.reg(inst.ins[0]);
            self.flush();
            return self.indirect(index, exit.hint, t);
        }
        self.flush();
        self.direct(index, exit.kind);
    }

    /// The end of a `Goto` or `Leave` exit, `Env` being up to date.
    fn direct(&mut self, index: usize, kind: ExitKind) {
        match kind {
            ExitKind::Goto { .. } => {
                self.a.keep_in_word(1);
                let entry = self.a.label();
                self.links[index] = Some((self.a.pos() + 1, entry));
                self.a.jmp(entry);
                let kind = ColdKind::Chain { exit: index as u16 };
                self.push_cold(entry, entry, kind);
            }
            ExitKind::Leave { code, pc } => {
                if let Some(pc) = pc {
                    self.store_pc(pc);
                }
                self.leave(code);
            }
            ExitKind::Indirect => {
                // Only a terminator has a target value.
                self.error.get_or_insert(CompileError::TooLarge);
            }
        }
    }
    fn leave(&mut self, code: u32) {
        self.a.store_i(W32, frame(RES), code as i32);
        let to = self.inner.thunks.leave;
        self.a.jmp_to(to);
    }

    /// The place of an indirect exit that the runtime can bind to the first target it finds
    /// ([`crate::code::Backend::bind`]). It begins in an aligned word, as
    ///
    /// ```text
    ///   jmp lookup; (two bytes of the instruction below; nop)
    ///   je  probe
    /// probe:
    /// ```
    ///
    /// and binding makes it, in this order, by one atomic store each,
    ///
    /// ```text
    ///   cmp t, [pc]; nop            pc: the word in front of `lookup`
    ///   je  block
    /// probe:
    /// ```
    ///
    /// The pc never changes again, so that whoever compares sees the pc that the jump is for.
    fn bound(&mut self, index: usize, t: Reg, lookup: Label) {
        self.a.align(8, 0);
        self.a.jmp(lookup);
        // REX.W and ModRM of CMP r64, [RIP + d].
        self.a.raw(&[0x48 | (t & 8) >> 1, 5 | (t & 7) << 3, 0x90]);
        let probe = self.a.label();
        self.links[index] = Some((self.a.pos() + 2, probe));
        self.a.jcc(CC_E, probe);
        self.a.bind(probe);
    }

    /// Jumps to the block at the guest pc in `t`: where exit `index` is bound to, or through the jump
    /// cache.
    fn indirect(&mut self, index: usize, hint: ExitHint, t: Reg) {
        let lookup = self.a.label();
        if hint != ExitHint::Far {
            self.bound(index, t, lookup);
        }
        self.push_cold(lookup, lookup, ColdKind::Lookup { exit: index as u16, target: t });
        let shared = self.inner.shared.clone();
        let e = &shared.target.env;
        self.locked = 1 << t;
        let i = self.alloc();
        let n_bits = e.jmp_cache_bits;
        if shared.features.bmi2 {
            self.a.rorx(W64, i, Rm::R(t), n_bits);
        } else {
            self.a.mov(i, t);
            self.a.shift_i(Sh::Shr, W64, Rm::R(i), n_bits);
        }
        self.a.alu_r(Alu::Xor, W32, i, Rm::R(t));
        self.a.alu_i(Alu::And, W32, Rm::R(i), (1i32 << n_bits) - 1);
        self.a.shift_i(Sh::Shl, W32, Rm::R(i), 4);
        let entry = |off: i32| Mem::idx(RSP, i, 0, FRAME + e.jmp_cache as i32 + off);
        self.a.alu_r(Alu::Cmp, W64, t, entry(0));
        self.a.jcc(CC_NE, lookup);
        self.a.jmp_rm(entry(8));
    }

    /// Has the runtime find the block.
    fn lookup(&mut self, exit: u16, target: Reg) {
        let may_bind = self.links[exit as usize].is_some();
        let exit = if may_bind { ExitRef::new(self.tag, exit as u8) } else { ExitRef::NONE };
        self.a.store(W64, frame(ARGS), target);
        self.store_const(frame(ARGS + 8), exit.0, NOREG);
        let to = self.inner.thunks.lookup;
        self.a.jmp_to(to);
    }

    /// Emits one piece of cold code.
    pub(super) fn cold_piece(&mut self, block: &Block, c: Cold) {
        if let ColdKind::Lookup { .. } = c.kind {
            // The pc that the exit is bound to.
            self.a.align(8, 0);
            self.a.data64(0);
        }
        self.a.bind(c.entry);
        self.x87 = c.x87;
        match c.kind {
            ColdKind::Load { .. } | ColdKind::Store { .. } => self.cold_access(c.kind),
            ColdKind::Ptr { .. } => self.cold_pointer(c.kind),
            ColdKind::NativeMem { .. } => self.cold_native(block, c.kind, c.back),
            ColdKind::PtrEnd { snap, places } => {
                let to = self.inner.thunks.ptr_end;
                self.a.call_to(to);
                self.snaps.set_host(snap, self.a.pos());
                self.reload_vectors();
                self.zero_addends(places);
            }
            ColdKind::Vectors => self.reload_vectors(),
            ColdKind::X87 => {
                let (saved, th) = (self.a.label(), &self.inner.thunks);
                let (image, load) = (th.x87_image, th.x87_load);
                let flag = env(self.inner.shared.target.env.x87_saved);
                self.a.alu_i(Alu::Cmp, W8, flag, 0);
                self.a.jcc(CC_NE, saved);
                self.a.call_to(image);
                self.reload_vectors();
                self.a.bind(saved);
                self.a.call_to(load);
            }
            ColdKind::Exit { exit, first, count } => {
                // Between blocks scratch registers hold nothing.
                self.emit_stores(first, count, self.scratch);
                self.direct(exit as usize, block.exits[exit as usize].kind);
                return;
            }
            ColdKind::Chain { exit } => {
                if let ExitKind::Goto { pc, .. } = block.exits[exit as usize].kind {
                    let chain = self.inner.thunks.chain;
                    self.a.call_to(chain);
                    self.a.data64(pc);
                    self.a.data64(ExitRef::new(self.tag, exit as u8).0);
                }
                return;
            }
            ColdKind::Lookup { exit, target } => return self.lookup(exit, target),
        }
        self.a.jmp(c.back);
    }
}
