//! Where values are: the forward pass's bookkeeping of registers, spill slots and globals.
//!
//! What always holds between instructions:
//!
//! * A register holds at most one value (`reg_val`), and every listed register really does.
//! * A live value is a constant, or in its `reg`, or at its `mem`; several at once are copies.
//! * Values known to be equal share one representative, whose state counts for all of them.
//! * A dirty global's value is held alive by one use of its own.
//!
//! Nothing here changes EFLAGS, except what says so.

use super::asm::*;
use super::frame::*;
use super::generate::Gen;
use crate::code::CompileError;
use crate::ir::{Val, Width};
use crate::liveness::{Future, NO_INST, NONE};

/// `VState::mem` of a value without a memory copy.
pub(super) const NOMEM: i32 = i32::MIN;
/// No value.
pub(super) const NOVAL: u16 = u16::MAX;

/// Where a flags value is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FlagsAt {
    /// Not defined, or an ordinary value.
    Nowhere,
    /// In EFLAGS.
    Eflags,
    /// A flags register image at `mem`.
    Image,
    /// `mem` holds a byte: 1 if this condition holds.
    Cond(u8),
    /// An image (with other bits around it) is the value with this index.
    Value(u16),
}

/// State of one value.
#[derive(Clone, Copy, Debug)]
pub(super) struct VState {
    /// Uses to come.
    pub uses: u16,
    /// A register that holds it, or [`NOREG`].
    pub reg: Reg,
    /// It is the constant `imm`.
    pub konst: bool,
    /// Bits at and above this position are known to be zero (64: nothing known).
    pub zx: u8,
    /// Where the flags are, for a flags value.
    pub flags: FlagsAt,
    /// Its representative.
    pub rep: u16,
    /// RSP-relative offset of a copy in memory, or [`NOMEM`].
    pub mem: i32,
    /// The constant.
    pub imm: u64,
}

impl VState {
    pub(super) fn new(index: u16, uses: u16) -> VState {
        VState {
            uses,
            reg: NOREG,
            konst: false,
            zx: 64,
            flags: FlagsAt::Nowhere,
            rep: index,
            mem: NOMEM,
            imm: 0,
        }
    }
}

/// An operand ready for use in an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Opnd {
    R(Reg),
    M(Mem),
    I(i32),
}

/// `imm` as a sign-extended 32-bit immediate of a `w`-bit operation.
pub(super) fn imm32(w: Width, imm: u64) -> Option<i32> {
    match w {
        Width::W64 => i32::try_from(imm as i64).ok(),
        Width::W32 => Some(imm as i32),
        Width::W16 => Some(imm as i16 as i32),
        Width::W8 => Some(imm as i8 as i32),
    }
}

impl Gen {
    /// Representative of `v`.
    #[inline]
    pub(super) fn rep(&self, v: Val) -> u16 {
        self.vals[v.index()].rep
    }
    #[inline]
    pub(super) fn st(&mut self, v: u16) -> &mut VState {
        &mut self.vals[v as usize]
    }
    /// The constant that `v` is.
    pub(super) fn konst(&self, v: Val) -> Option<u64> {
        let s = &self.vals[self.rep(v) as usize];
        s.konst.then_some(s.imm)
    }
    /// Makes `v` another name of `of` (same 64 bits).
    pub(super) fn alias(&mut self, v: Val, of: u16) {
        let uses = self.vals[v.index()].uses;
        self.vals[v.index()].rep = of;
        let s = self.st(of);
        s.uses = s.uses.saturating_add(uses);
    }
    /// Keeps `r` from being given away until the instruction is done.
    #[inline]
    pub(super) fn lock(&mut self, r: Reg) {
        self.locked |= 1 << r;
    }
    #[inline]
    pub(super) fn is_scratch(&self, r: Reg) -> bool {
        self.scratch >> r & 1 != 0
    }

    /// One use of `v` is done.
    pub(super) fn release(&mut self, v: Val) {
        if v.is_some() {
            let r = self.rep(v);
            self.release_rep(r);
        }
    }
    pub(super) fn release_rep(&mut self, r: u16) {
        let s = self.st(r);
        s.uses = s.uses.saturating_sub(1);
        if s.uses == 0 {
            let mem = s.mem;
            if is_spill(mem) {
                // The instruction at hand may still read the slot.
                s.mem = NOMEM;
                self.freed.push(mem);
            }
            if let FlagsAt::Value(of) = self.vals[r as usize].flags {
                self.st(r).flags = FlagsAt::Nowhere;
                self.release_rep(of);
            }
        }
    }

    /// A free spill slot, as an RSP-relative offset.
    pub(super) fn take_slot(&mut self) -> i32 {
        for (i, word) in self.slots.iter_mut().enumerate() {
            let bit = word.trailing_ones();
            let slot = i * 64 + bit as usize;
            if bit < 64 && slot < NSPILL {
                *word |= 1 << bit;
                return SPILL + 8 * slot as i32;
            }
        }
        self.error.get_or_insert(CompileError::TooLarge);
        SPILL
    }
    /// Between instructions: nothing is locked, released slots are free.
    pub(super) fn next_inst(&mut self) {
        self.locked = 0;
        while let Some(mem) = self.freed.pop() {
            let slot = ((mem - SPILL) / 8) as usize;
            self.slots[slot / 64] &= !(1 << (slot % 64));
        }
    }

    /// Whether `v` has a copy besides register `r`.
    fn has_copy(&self, v: u16, r: Reg) -> bool {
        let s = &self.vals[v as usize];
        s.konst
            || s.mem != NOMEM
            || (s.reg != r && s.reg != NOREG)
            || self.other_reg(v, r).is_some()
    }
    fn other_reg(&self, v: u16, r: Reg) -> Option<Reg> {
        let others = self.holders(v) & !(1 << r | 1 << RSP);
        (others != 0).then(|| others.trailing_zeros() as Reg)
    }
    /// The registers that hold `v`.
    #[inline]
    pub(super) fn holders(&self, v: u16) -> u16 {
        let mut set = 0;
        for (r, &held) in self.reg_val.iter().enumerate() {
            set |= u16::from(held == v) << r;
        }
        set
    }

    /// A scratch register that may be overwritten, locked. Spills if it must.
    pub(super) fn alloc(&mut self) -> Reg {
        let r = match self.free_scratch() {
            Some(r) => r,
            None => self.evict_one(),
        };
        self.forget(r);
        self.lock(r);
        r
    }
    /// A scratch register whose content nobody needs; a lent pin only if there is no other.
    fn free_scratch(&self) -> Option<Reg> {
        let own = self.own_scratch;
        self.free_among(self.scratch & own).or_else(|| self.free_among(self.scratch & !own))
    }
    fn free_among(&self, set: u16) -> Option<Reg> {
        let set = set & !self.locked;
        if set & self.empty != 0 {
            return Some((set & self.empty).trailing_zeros() as Reg);
        }
        regs(set).find(|&r| self.vals[self.reg_val[r as usize] as usize].uses == 0)
    }
    /// A scratch register, neither locked nor in `held`, whose content nobody needs; or NOREG. No lent
    /// pin: the instruction at hand may have a fixed use for that register.
    pub(super) fn spare(&mut self, held: u16) -> Reg {
        let r = self.free_among(self.own_scratch & !held);
        r.inspect(|&r| self.forget(r)).unwrap_or(NOREG)
    }
    fn evict_one(&mut self) -> Reg {
        // What is in a lent pin is most often on its way into that global.
        let own = self.own_scratch & !self.locked;
        let candidates = if own != 0 { own } else { self.scratch & !self.locked };
        let mut pick = NOREG;
        for r in regs(candidates) {
            if self.has_copy(self.reg_val[r as usize], r) {
                pick = r;
                break;
            }
        }
        if pick == NOREG {
            // Round robin: the one used longest ago is usually the one needed last.
            for i in 1..=16 {
                let r = (self.last_evicted + i) & 15;
                if candidates >> r & 1 != 0 {
                    pick = r;
                    break;
                }
            }
        }
        if pick == NOREG {
            debug_assert!(false, "one instruction needs too many registers");
            self.error.get_or_insert(CompileError::TooLarge);
            return R11;
        }
        self.last_evicted = pick;
        self.save_elsewhere(pick, false);
        pick
    }

    /// The register's content is about to be replaced: whatever live value needs it is kept in
    /// another place. Leaves the register without a value.
    pub(super) fn vacate(&mut self, r: Reg) {
        self.save_elsewhere(r, true);
        self.forget(r);
    }
    /// Gives the live value in `r` another home if it has none: a free scratch register (if
    /// `to_reg`), else a spill slot.
    fn save_elsewhere(&mut self, r: Reg, to_reg: bool) {
        let v = self.reg_val[r as usize];
        if v == NOVAL || self.vals[v as usize].uses == 0 || self.has_copy(v, r) {
            return;
        }
        if to_reg && let Some(t) = self.free_scratch().filter(|&t| t != r) {
            self.forget(t);
            self.a.mov(t, r);
            self.occupy(t, v);
            self.st(v).reg = t;
            return;
        }
        let slot = self.take_slot();
        self.a.store(W64, frame(slot), r);
        self.st(v).mem = slot;
    }
    /// Notes what a register holds.
    #[inline]
    fn occupy(&mut self, r: Reg, v: u16) {
        self.reg_val[r as usize] = v;
        self.empty = self.empty & !(1 << r) | u16::from(v == NOVAL) << r;
    }
    /// The register holds nothing of interest any more.
    pub(super) fn forget(&mut self, r: Reg) {
        let v = self.reg_val[r as usize];
        self.occupy(r, NOVAL);
        if v != NOVAL && self.vals[v as usize].reg == r {
            let other = self.other_reg(v, r).unwrap_or(NOREG);
            self.st(v).reg = other;
        }
    }
    /// Register `r` now holds `v`.
    pub(super) fn holds(&mut self, r: Reg, v: u16) {
        self.forget(r);
        self.occupy(r, v);
        if self.vals[v as usize].reg == NOREG {
            self.st(v).reg = r;
        }
    }
    /// Defines `v` as the content of `r`, known to be zero from bit `zx` on.
    pub(super) fn define(&mut self, v: Val, r: Reg, zx: u8) {
        if v.is_some() {
            self.holds(r, v.0);
            self.st(v.0).zx = zx;
        }
    }

    /// `v` in a register (locked).
    pub(super) fn reg(&mut self, v: Val) -> Reg {
        let i = self.rep(v);
        self.reg_of(i)
    }
    pub(super) fn reg_of(&mut self, i: u16) -> Reg {
        let s = self.vals[i as usize];
        if s.reg != NOREG {
            self.lock(s.reg);
            return s.reg;
        }
        let r = self.alloc();
        self.fill(r, i);
        self.holds(r, i);
        r
    }
    /// Emits a load of value `i` into `r`; changes no bookkeeping.
    pub(super) fn fill(&mut self, r: Reg, i: u16) {
        let s = self.vals[i as usize];
        self.fill_from(r, &s);
    }
    /// As [`Gen::fill`], from a state remembered earlier in the same instruction (its register, if
    /// any, is locked).
    pub(super) fn fill_from(&mut self, r: Reg, s: &VState) {
        if s.reg != NOREG {
            self.a.mov(r, s.reg);
        } else if s.konst {
            self.a.mov_i(r, s.imm);
        } else if s.mem != NOMEM {
            self.a.load(W64, r, frame(s.mem));
        } else {
            debug_assert!(false, "value {} is nowhere", s.rep);
        }
    }
    /// The state of `v` for [`Gen::fill_from`]; locks its register.
    pub(super) fn state(&mut self, v: Val) -> VState {
        let s = self.vals[self.rep(v) as usize];
        if s.reg != NOREG {
            self.lock(s.reg);
        }
        s
    }
    /// `v` as the second operand of a `w`-bit operation: immediate, memory or register (locked).
    pub(super) fn operand(&mut self, w: Width, v: Val) -> Opnd {
        let i = self.rep(v);
        let s = self.vals[i as usize];
        if s.konst
            && let Some(imm) = imm32(w, s.imm)
        {
            return Opnd::I(imm);
        }
        if s.reg == NOREG && s.mem != NOMEM && s.uses == 1 {
            return Opnd::M(frame(s.mem));
        }
        Opnd::R(self.reg_of(i))
    }
    /// As [`Gen::operand`], without immediates.
    pub(super) fn reg_or_mem(&mut self, v: Val) -> Rm {
        let i = self.rep(v);
        let s = self.vals[i as usize];
        if s.reg == NOREG && s.mem != NOMEM && s.uses == 1 {
            return Rm::M(frame(s.mem));
        }
        Rm::R(self.reg_of(i))
    }

    /// The pinned register that `v` should be computed into.
    pub(super) fn hint(&self, v: Val) -> Option<Reg> {
        let Future { hint: g, merge, .. } = self.live.vals[v.index()];
        // A value on its way into an insertion has that insertion's hint, for the merged form only.
        if g == NONE || merge != NO_INST {
            return None;
        }
        let r = self.pin_reg[g as usize];
        (r != NOREG).then_some(r)
    }
    /// A register for result `v` (locked and free to overwrite): its hinted pin unless that is in
    /// `avoid`; else `reuse` if it is a scratch register that nobody needs any more; else a fresh
    /// one. Operands have been released, their registers are locked.
    pub(super) fn result(&mut self, v: Val, reuse: Reg, avoid: u16) -> Reg {
        if v.is_some()
            && let Some(p) = self.hint(v)
            && avoid >> p & 1 == 0
        {
            self.vacate(p);
            self.lock(p);
            return p;
        }
        if reuse != NOREG && self.is_scratch(reuse) && avoid >> reuse & 1 == 0 {
            let held = self.reg_val[reuse as usize];
            if held == NOVAL || self.vals[held as usize].uses == 0 {
                self.forget(reuse);
                return reuse;
            }
            if self.scratch & !self.locked == 0 {
                // The operands fill all scratch registers: one of them is overwritten after all.
                self.save_elsewhere(reuse, false);
                self.forget(reuse);
                return reuse;
            }
        }
        self.alloc()
    }
}

/// The registers of a set, lowest first.
pub(super) fn regs(mut set: u16) -> impl Iterator<Item = Reg> {
    std::iter::from_fn(move || {
        let r = set.trailing_zeros() as Reg;
        set &= set.wrapping_sub(1);
        (r < 16).then_some(r)
    })
}

/// Whether a memory offset is a spill slot.
pub(super) fn is_spill(mem: i32) -> bool {
    (SPILL..SPILL + 8 * NSPILL as i32).contains(&mem)
}
