//! Globals: reading, writing, and bringing `Env` up to date.

use super::alloc::*;
use super::asm::*;
use super::frame::*;
use super::generate::{Gen, Src};
use crate::ir::{Val, Width};
use crate::snapshot::{SnapId, SnapLoc};

impl Gen {
    /// `Env` slot of global `g`.
    pub(super) fn global_mem(&self, g: u8) -> Mem {
        env(self.inner.shared.target.globals[g as usize].offset)
    }

    /// `Get`.
    pub(super) fn get(&mut self, dst: Val, g: u8) {
        let p = self.pin_reg[g as usize];
        if p != NOREG {
            match self.reg_val[p as usize] {
                NOVAL => self.define(dst, p, 64),
                v => self.alias(dst, v),
            }
            return;
        }
        if let Some(&(_, v)) = self.dirty.iter().find(|d| d.0 == g) {
            return self.alias(dst, v);
        }
        match self.env_val[g as usize] {
            NOVAL => {
                self.st(dst.0).mem = self.global_mem(g).disp;
                self.env_val[g as usize] = dst.0;
            }
            v => self.alias(dst, v),
        }
    }

    /// `Put`.
    pub(super) fn put(&mut self, g: u8, v: Val) {
        let i = self.rep(v);
        let p = self.pin_reg[g as usize];
        if p == NOREG {
            return self.put_memory(g, i);
        }
        if self.reg_val[p as usize] != i {
            let reg = self.vals[i as usize].reg;
            if reg != NOREG {
                self.lock(reg);
            }
            self.lock(p);
            self.vacate(p);
            self.fill(p, i);
            self.holds(p, i);
            // The pin is the better place to name: copies in scratch registers are given away.
            self.st(i).reg = p;
        }
        self.release_rep(i);
    }

    fn put_memory(&mut self, g: u8, i: u16) {
        if let Some(at) = self.dirty.iter().position(|d| d.0 == g) {
            let old = self.dirty[at].1;
            self.dirty[at].1 = i;
            self.release_rep(old);
        } else if self.env_val[g as usize] == i {
            self.release_rep(i);
        } else {
            self.dirty.push((g, i));
        }
        // The use of the Put itself is what keeps the dirty value alive from now on.
    }

    /// Where a value can be stored from.
    fn source(&self, i: u16) -> Src {
        let s = &self.vals[i as usize];
        if s.konst {
            Src::Const(s.imm)
        } else if s.reg != NOREG {
            Src::Reg(s.reg)
        } else {
            Src::Mem(s.mem)
        }
    }

    /// Records a snapshot for the point about to be emitted.
    pub(super) fn snapshot(&mut self) -> SnapId {
        let id = self.snaps.begin(self.pc);
        for k in 0..self.dirty.len() {
            let (g, i) = self.dirty[k];
            let loc = match self.source(i) {
                Src::Const(v) => SnapLoc::Const(v),
                Src::Mem(m) => SnapLoc::Word(m - FRAME),
                Src::Reg(r) => SnapLoc::Word(self.saved_word(r)),
            };
            self.snaps.push(g, loc);
        }
        id
    }
    /// Offset from `Env` of the word where thunks keep register `r`.
    pub(super) fn saved_word(&self, r: Reg) -> i32 {
        if self.moved[r as usize] != NOMEM {
            return self.moved[r as usize];
        }
        self.saved[r as usize & 15]
    }

    /// Adds the stores of all dirty globals but those in the set `dead` to `stores`; returns their
    /// range. For a side exit.
    pub(super) fn record_dirty(&mut self, dead: u64) -> (u32, u32) {
        let first = self.stores.len() as u32;
        for k in 0..self.dirty.len() {
            let (g, i) = self.dirty[k];
            if g < 64 && dead >> g & 1 != 0 {
                continue;
            }
            let src = self.source(i);
            self.stores.push((g, src));
        }
        (first, self.stores.len() as u32 - first)
    }

    /// Forgets the deferred writes of the globals in the set `dead`.
    pub(super) fn drop_dirty(&mut self, dead: u64) {
        for k in (0..self.dirty.len()).rev() {
            let (g, i) = self.dirty[k];
            if g < 64 && dead >> g & 1 != 0 {
                self.dirty.swap_remove(k);
                self.release_rep(i);
            }
        }
    }

    /// Emits stores, correct also where one global's source is another's slot. Of `free` scratch
    /// registers, those that are no source may be overwritten.
    pub(super) fn emit_stores(&mut self, first: u32, count: u32, free: u16) {
        let range = first as usize..(first + count) as usize;
        let (mut free, mut in_memory) = (free, 0);
        for (_, src) in &self.stores[range.clone()] {
            match src {
                Src::Reg(r) => free &= !(1 << r),
                Src::Mem(_) => in_memory += 1,
                Src::Const(_) => {}
            }
        }
        let tmp = regs(free).next().unwrap_or(NOREG);
        // A single memory source goes through a register, several through the stack.
        let mut pushed = 0;
        for k in range.clone() {
            if let (_, Src::Mem(m)) = self.stores[k] {
                if in_memory == 1 && tmp != NOREG {
                    self.a.load(W64, tmp, frame(m));
                } else {
                    self.a.push_m(Mem::new(RSP, m + 8 * pushed));
                    pushed += 1;
                }
            }
        }
        for k in range.clone() {
            if let (g, Src::Reg(r)) = self.stores[k] {
                let m = self.global_mem(g);
                self.a.store(W64, Mem { disp: m.disp + 8 * pushed, ..m }, r);
            }
        }
        for k in range.clone().rev() {
            if let (g, Src::Mem(_)) = self.stores[k] {
                let m = self.global_mem(g);
                if in_memory == 1 && tmp != NOREG {
                    self.a.store(W64, m, tmp);
                } else {
                    pushed -= 1;
                    // POP computes its address after RSP was incremented.
                    self.a.pop_m(Mem { disp: m.disp + 8 * pushed, ..m });
                }
            }
        }
        for k in range {
            if let (g, Src::Const(v)) = self.stores[k] {
                let m = self.global_mem(g);
                self.store_const(m, v, tmp);
            }
        }
    }

    /// Brings `Env` up to date: afterwards no global is dirty. Registers keep their values.
    pub(super) fn flush(&mut self) {
        if self.dirty.is_empty() {
            return;
        }
        // Values that live only in a slot about to be overwritten move out first.
        for k in 0..self.dirty.len() {
            let g = self.dirty[k].0;
            self.displace(g);
        }
        let held = self.dirty.iter().fold(0u16, |set, d| {
            let r = self.vals[d.1 as usize].reg;
            if r == NOREG { set } else { set | 1 << r }
        });
        let tmp = match self.spare(held) {
            NOREG => 0,
            r => 1 << r,
        };
        let (first, count) = self.record_dirty(0);
        self.emit_stores(first, count, tmp);
        self.stores.truncate(first as usize);
        while let Some((g, i)) = self.dirty.pop() {
            let disp = self.global_mem(g).disp;
            let mem = self.vals[i as usize].mem;
            if is_spill(mem) {
                self.freed.push(mem);
            }
            if is_spill(mem) || mem == NOMEM {
                self.st(i).mem = disp;
            }
            // Known to be in the slot, and reachable there for as long as that is known.
            self.env_val[g as usize] = if self.vals[i as usize].mem == disp { i } else { NOVAL };
            self.release_rep(i);
        }
    }

    /// The `Env` slot of `g` is about to change: its known value loses that copy.
    pub(super) fn displace(&mut self, g: u8) {
        let old = self.env_val[g as usize];
        self.env_val[g as usize] = NOVAL;
        if old == NOVAL {
            return;
        }
        let disp = self.global_mem(g).disp;
        let s = self.vals[old as usize];
        if s.mem != disp {
            return;
        }
        if s.uses != 0 && s.reg == NOREG && !s.konst {
            let locked = self.locked;
            self.reg_of(old);
            self.locked = locked;
        }
        self.st(old).mem = NOMEM;
    }

    /// Stores the low `w` bits of `v` and releases it.
    pub(super) fn store_value(&mut self, w: Width, m: Mem, v: Val) {
        match self.konst(v).and_then(|c| imm32(w, c)) {
            Some(imm) => self.a.store_i(w, m, imm),
            None => {
                let r = self.reg(v);
                self.a.store(w, m, r);
            }
        }
        self.release(v);
    }
}
