//! Guest memory: the inline TLB probe, host pointers, atomics.
//!
//! The probe (see [`crate::target::TlbLayout`]) for `[base + disp]`:
//!
//! ```text
//!   pext  i, addr, [pext_mask]      (or: rorx/shr by the page bits; and i, [mask])
//!   lea   t, [addr + size - 1]      (not for bytes)
//!   and   t, -page
//!   cmp   t, [rsp + i*8 + tag]
//!   jne   cold
//!   mov   i, [rsp + i*8 + addend]
//!   mov   dst, [i + base + disp]
//! ```
//!
//! What the cold piece does is in `probe`; it goes back to the access proper. At the probe no pinned
//! register runs ahead of its global.
//!
//! Members of a group (see `share`) but the first have `test r, r; je cold` in place of the probe.

use super::alloc::*;
use super::asm::*;
use super::frame::*;
use super::generate::{ColdKind, Gen, How, Merge};
use super::probe::Probe;
use super::share::{Places, Role};
use crate::ir::{
    Block, Inst, LD_SX32, LD_SX64, PTR_ALIGNED, PTR_READ, PTR_WRITE, Rmw, SIZE_80, Val, Width,
    access_bytes,
};
use crate::liveness::VecUse;
use crate::snapshot::SnapId;
use crate::target::{AccessInfo, MemModel, TlbLayout};

/// The probe's outcome: host memory operand, and what the cold piece needs.
pub(super) struct Access {
    pub host: Mem,
    pub guest: Mem,
    pub tmp: Reg,
    pub entry: Label,
    /// Behind the check, the addend being in its register.
    pub checked: Label,
}

/// What the cold piece of an access knows of sharing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared {
    /// The addend's register.
    pub addend: Reg,
    /// The access is in a group.
    pub member: bool,
    /// Later members of the group will look at that register.
    pub wanted: bool,
    /// Addends that become invalid in the runtime.
    pub places: Places,
}

/// Which bytes a probe checks.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// First byte, relative to the access.
    pub delta: i64,
    /// Number of bytes.
    pub len: u32,
    /// What the first byte's address must be a multiple of, a power of two.
    pub align: u32,
    /// For writing.
    pub write: bool,
}

impl Span {
    pub(super) fn own(size: u32, access: u8) -> Span {
        let align = if access & PTR_ALIGNED != 0 { size } else { 1 };
        Span { delta: 0, len: size, align, write: access & PTR_WRITE != 0 }
    }
    /// What an access of `size` bytes in this role checks.
    fn of(role: Role, own: Span) -> Span {
        match role {
            Role::Leader { delta, len, align, write, .. } => Span { delta, len, align, write },
            _ => own,
        }
    }
}

impl Gen {
    /// What is known about table `idx`, or `None` for a linear memory.
    fn tlb(&self, idx: u8) -> Option<(TlbLayout, u8)> {
        match &self.inner.shared.target.mem {
            MemModel::Softmmu { page_bits, tables } => {
                tables.get(idx as usize).map(|t| (*t, *page_bits))
            }
            MemModel::Linear { .. } => None,
        }
    }

    /// Takes the registers that the access needs, in front of its snapshot: `(i, t)`.
    pub(super) fn probe_temps(&mut self) -> (Reg, Reg) {
        match self.inner.shared.target.mem {
            MemModel::Softmmu { .. } => {
                let i = self.alloc();
                let t = self.alloc();
                (i, t)
            }
            MemModel::Linear { base: 0 } => (NOREG, NOREG),
            MemModel::Linear { .. } => (self.alloc(), NOREG),
        }
    }

    /// Emits the probe of `span` for an access at `m`. `shared`: the addend stays in `i`.
    fn probe(
        &mut self,
        mmu_idx: u8,
        m: Mem,
        span: Span,
        (i, t): (Reg, Reg),
        shared: bool,
    ) -> Access {
        let entry = self.a.label();
        if !self.softmmu() {
            return self.linear(m, i, entry);
        }
        self.check(mmu_idx, m, span, (i, t), entry);
        let checked = self.a.here();
        // An addend that is not shared makes room for the sum: `t` may be wanted for a value.
        let sum = if shared { t } else { i };
        Access { host: self.host_operand(m, i, sum), guest: m, tmp: t, entry, checked }
    }
    /// Emits the check proper: jumps to `miss`, or leaves the addend in `i`. `t` is overwritten.
    fn check(&mut self, mmu_idx: u8, m: Mem, span: Span, (i, t): (Reg, Reg), miss: Label) {
        let Some((tlb, page_bits)) = self.tlb(mmu_idx) else {
            self.error.get_or_insert(crate::code::CompileError::TooLarge);
            return;
        };
        let disp = i64::from(m.disp) + span.delta;
        // The address in one register; `t` serves until the tag is needed.
        let addr = match m {
            Mem { base, index: NOREG, .. } if base != NOREG && disp == 0 => base,
            Mem { base: NOREG, index: NOREG, .. } => {
                self.a.mov_i(t, disp as u64);
                t
            }
            // A span is only asked for with a small displacement.
            m => {
                self.a.lea(W64, t, Mem { disp: disp as i32, ..m });
                t
            }
        };
        let features = self.inner.shared.features;
        let probe = Probe { tlb, page_bits, features, bias: 0 };
        probe.emit(&mut self.a, addr, (i, t, i), span, miss);
    }
    /// The operand for guest address `m`, the addend being in `i`; `t` may become a sum.
    fn host_operand(&mut self, m: Mem, i: Reg, t: Reg) -> Mem {
        // Two registers and a displacement fit one operand; else the sum is made here.
        match m {
            Mem { base: NOREG, index: NOREG, disp, .. } => Mem::new(i, disp),
            Mem { index: NOREG, base, disp, .. } => Mem::idx(base, i, 0, disp),
            Mem { base: NOREG, index, scale, disp } => Mem::idx(i, index, scale, disp),
            Mem { base, index, scale, disp } => {
                self.a.lea(W64, t, Mem::idx(i, index, scale, 0));
                Mem::idx(base, t, 0, disp)
            }
        }
    }
    /// The probe of an access in `role`: a member takes its group's addend, which is in `i`.
    pub(super) fn reach(
        &mut self,
        mmu_idx: u8,
        m: Mem,
        role: Role,
        own: Span,
        i: Reg,
        t: Reg,
    ) -> Access {
        if !matches!(role, Role::Member { .. }) {
            let shared = matches!(role, Role::Leader { .. });
            return self.probe(mmu_idx, m, Span::of(role, own), (i, t), shared);
        }
        let entry = self.a.label();
        self.a.test(W64, Rm::R(i), i);
        self.a.jcc(CC_E, entry);
        let checked = self.a.here();
        let host = self.host_operand(m, i, t);
        let tmp = if t != NOREG && m.index == NOREG { t } else { i };
        Access { host, guest: m, tmp, entry, checked }
    }
    /// The registers of an access in `role`: `(i, t)` of [`Gen::reach`]. Whether `i` is wanted
    /// afterwards is the third. `waiting`: a value in memory goes through [`Access::tmp`].
    pub(super) fn reach_temps(&mut self, m: Mem, role: Role, waiting: bool) -> (Reg, Reg, bool) {
        match role {
            Role::Member { addend } => {
                let r = self.reg_of(addend);
                self.release_rep(addend);
                // The sum of addend and index, or a value on its way.
                let sum = m.base != NOREG && m.index != NOREG;
                let t = if sum || waiting { self.alloc() } else { NOREG };
                (r, t, self.vals[addend as usize].uses != 0)
            }
            _ => {
                let (i, t) = self.probe_temps();
                (i, t, matches!(role, Role::Leader { .. }))
            }
        }
    }
    /// What the cold piece of an access in `role` must know of its group.
    pub(super) fn shared_piece(&mut self, role: Role, i: Reg, wanted: bool) -> Shared {
        let member = !matches!(role, Role::Alone);
        Shared { addend: i, member, wanted, places: self.addend_places() }
    }
    /// Guest memory at a constant distance.
    fn linear(&mut self, m: Mem, i: Reg, entry: Label) -> Access {
        let base = match self.inner.shared.target.mem {
            MemModel::Linear { base } => base,
            MemModel::Softmmu { .. } => {
                self.error.get_or_insert(crate::code::CompileError::TooLarge);
                0
            }
        };
        let host = if i == NOREG {
            m
        } else {
            self.a.mov_i(i, base);
            match m {
                Mem { base: NOREG, index: NOREG, disp, .. } => Mem::new(i, disp),
                Mem { index: NOREG, base, disp, .. } => Mem::idx(base, i, 0, disp),
                Mem { base: NOREG, index, scale, disp } => Mem::idx(i, index, scale, disp),
                Mem { base, index, scale, disp } => {
                    self.a.lea(W64, i, Mem::idx(i, index, scale, 0));
                    Mem::idx(base, i, 0, disp)
                }
            }
        };
        let checked = self.a.here();
        Access { host, guest: m, tmp: i, entry, checked }
    }
    /// Whether accesses go through the TLB; else a fault comes as a signal at the access itself.
    pub(super) fn softmmu(&self) -> bool {
        matches!(self.inner.shared.target.mem, MemModel::Softmmu { .. })
    }

    /// `Ld`.
    pub(super) fn ld(&mut self, block: &Block, inst: &Inst) {
        let [a, b, ..] = inst.ins;
        self.clobber();
        let m = self.address(a, b, inst.aux & 3, inst.imm as i32);
        let m = self.narrow_address(m);
        self.release(a);
        self.release(b);
        let role = self.role(inst);
        let (i, t, wanted) = self.reach_temps(m, role, false);
        // The result may replace a register of the address: it is written last.
        let merge = self.merge.filter(|m| self.can_merge_load(m, inst.dst));
        let (d, how) = match merge {
            Some(m) => (self.rep_reg(m.into), How::Merge),
            None => (self.load_result(inst.dst, if wanted { t } else { i }), How::Extend),
        };
        self.lock(d);
        let snap = self.snapshot();
        let own = Span::own(inst.w.bytes(), PTR_READ);
        let acc = self.reach(block.mmu_idx, m, role, own, i, t);
        let back = self.way_back(&acc, wanted);
        if self.softmmu() {
            let shared = self.shared_piece(role, i, wanted);
            let info = AccessInfo::new(inst.w as u8, block.mmu_idx, PTR_READ).0;
            let aux = inst.aux;
            let kind = ColdKind::Load { addr: acc.guest, info, dst: d, aux, how, snap, shared };
            self.push_cold(acc.entry, back, kind);
        } else {
            self.a.bind(acc.entry);
            self.snaps.set_trap(snap, self.a.pos());
        }
        if let Some(m) = merge {
            self.a.load(inst.w, d, acc.host);
            self.bind_back(back, wanted);
            self.define_addend(role, i);
            return self.merged(m, inst.dst, d);
        }
        let zx = self.extending_load(inst.w, inst.aux, d, Rm::M(acc.host));
        self.bind_back(back, wanted);
        self.define_addend(role, i);
        self.define(inst.dst, d, zx);
    }
    /// Where the cold piece of an access goes back to: in front of the access proper, unless that
    /// would leave an addend for later members that is not theirs.
    fn way_back(&mut self, acc: &Access, wanted: bool) -> Label {
        if wanted { self.a.label() } else { acc.checked }
    }
    fn bind_back(&mut self, back: Label, wanted: bool) {
        if wanted {
            self.a.bind(back);
        }
    }
    /// Whether a loaded byte or word can go straight into the pinned register it is inserted into.
    fn can_merge_load(&self, m: &Merge, dst: Val) -> bool {
        let into = &self.vals[self.rep(m.into) as usize];
        // Nobody else may want the loaded value (which is zero-extended) or the old content.
        self.vals[dst.index()].uses == 1
            && into.uses == 1
            && into.reg != NOREG
            && self.hint(m.dst) == Some(into.reg)
    }
    /// A register for a loaded value: its hinted pin, else the probe's own temporary.
    pub(super) fn load_result(&mut self, dst: Val, i: Reg) -> Reg {
        if self.wants(dst)
            && let Some(p) = self.hint(dst)
        {
            self.vacate(p);
            self.lock(p);
            return p;
        }
        if i == NOREG { self.alloc() } else { i }
    }
    /// Emits the load proper; returns the number of bits that can be non-zero.
    fn extending_load(&mut self, w: Width, aux: u8, d: Reg, rm: Rm) -> u8 {
        if aux & LD_SX64 != 0 {
            self.a.movsx(w, true, d, rm);
            64
        } else if aux & LD_SX32 != 0 {
            self.a.movsx(w, false, d, rm);
            32
        } else {
            self.a.movzx(w, d, rm);
            w.bits() as u8
        }
    }

    /// `St`.
    pub(super) fn st_guest(&mut self, block: &Block, inst: &Inst) {
        let [a, b, c, _] = inst.ins;
        self.clobber();
        let mut value = match self.konst(c).and_then(|k| imm32(inst.w, k)) {
            Some(imm) => Opnd::I(imm),
            None => Opnd::R(self.reg(c)),
        };
        let m = self.address(a, b, inst.aux & 3, inst.imm as i32);
        let role = self.role(inst);
        // A member without an index needs one register more, which there always is.
        let member = matches!(role, Role::Member { .. }) && m.index == NOREG;
        let roomy = member || !self.softmmu() || self.room_for(2);
        if let (Opnd::R(r), false) = (value, roomy)
            && self.is_scratch(r)
            && r != m.base
            && r != m.index
        {
            // The value waits where the cold piece would put it anyway.
            self.a.store(W64, frame(ARGS + 16), r);
            self.locked &= !(1 << r);
            value = Opnd::M(frame(ARGS + 16));
        }
        let full = m;
        // The addend of a group and a waiting value leave no register for a sum with an index.
        let m = match (role, value) {
            (Role::Leader { .. } | Role::Member { .. }, Opnd::M(_)) => self.sum_address(full),
            _ => self.narrow_address(full),
        };
        if let Opnd::R(r) = value
            && m.base != full.base
            && self.is_scratch(r)
            && (r == full.base || r == full.index)
        {
            // The sum has freed the registers of the address, and the value is in one of them.
            self.a.store(W64, frame(ARGS + 16), r);
            value = Opnd::M(frame(ARGS + 16));
        }
        self.release(a);
        self.release(b);
        self.release(c);
        let (i, t, wanted) = self.reach_temps(m, role, matches!(value, Opnd::M(_)));
        let snap = self.snapshot();
        let own = Span::own(inst.w.bytes(), PTR_WRITE);
        let acc = self.reach(block.mmu_idx, m, role, own, i, t);
        let back = self.way_back(&acc, wanted);
        if self.softmmu() {
            let shared = self.shared_piece(role, i, wanted);
            let info = AccessInfo::new(inst.w as u8, block.mmu_idx, PTR_WRITE).0;
            let kind = ColdKind::Store { addr: acc.guest, tmp: acc.tmp, info, value, snap, shared };
            self.push_cold(acc.entry, back, kind);
        } else {
            self.a.bind(acc.entry);
            self.snaps.set_trap(snap, self.a.pos());
        }
        self.store_operand(inst.w, acc.host, value, acc.tmp);
        self.bind_back(back, wanted);
        self.define_addend(role, i);
    }
    /// The store proper; a value that waits in memory goes through `tmp`.
    fn store_operand(&mut self, w: Width, host: Mem, value: Opnd, tmp: Reg) {
        match value {
            Opnd::I(imm) => self.a.store_i(w, host, imm),
            Opnd::R(r) => self.a.store(w, host, r),
            Opnd::M(waiting) => {
                self.a.load(W64, tmp, waiting);
                self.a.store(w, host, tmp);
            }
        }
    }
    /// The probe needs two registers: if base and index leave only one, their sum takes it.
    pub(super) fn narrow_address(&mut self, m: Mem) -> Mem {
        if !self.softmmu() || self.room_for(2) { m } else { self.sum_address(m) }
    }
    /// Base and index as one register, locked in their place.
    fn sum_address(&mut self, m: Mem) -> Mem {
        if m.index == NOREG {
            return m;
        }
        let sum = self.alloc();
        self.a.lea(W64, sum, m);
        for r in [m.base, m.index] {
            if r != NOREG {
                self.locked &= !(1 << r);
            }
        }
        Mem::new(sum, 0)
    }
    /// Whether `n` scratch registers are not locked.
    fn room_for(&self, n: u32) -> bool {
        (self.scratch & !self.locked).count_ones() >= n
    }
    /// `Ptr`.
    pub(super) fn ptr(&mut self, block: &Block, inst: &Inst) {
        let [a, b, ..] = inst.ins;
        self.clobber();
        let m = self.address(a, b, inst.aux & 3, inst.imm as i32);
        let m = self.narrow_address(m);
        self.release(a);
        self.release(b);
        let (i, t) = self.probe_temps();
        let d = if i == NOREG { self.alloc() } else { i };
        let snap = self.snapshot();
        let size = (inst.aux >> 2).min(SIZE_80);
        let span = Span::own(access_bytes(size), inst.cond);
        let acc = self.probe(block.mmu_idx, m, span, (i, t), false);
        let back = self.a.label();
        if self.softmmu() {
            let places = self.addend_places();
            let info = AccessInfo::new(size, block.mmu_idx, inst.cond).0;
            let (addr, tmp) = (acc.guest, acc.tmp);
            let kind = ColdKind::Ptr { addr, tmp, info, dst: d, snap, places };
            self.push_cold(acc.entry, back, kind);
        } else {
            self.a.bind(acc.entry);
        }
        self.a.lea(W64, d, acc.host);
        self.a.bind(back);
        self.define(inst.dst, d, 64);
    }

    /// `PtrEnd`.
    pub(super) fn ptr_end(&mut self, inst: &Inst) {
        self.release(inst.ins[0]);
        if !self.softmmu() {
            return;
        }
        self.clobber();
        let snap = self.snapshot();
        let bounce = env(self.inner.shared.target.env.bounce);
        self.a.alu_i(Alu::Cmp, W8, bounce, 0);
        let (entry, back) = (self.a.label(), self.a.label());
        self.a.jcc(CC_NE, entry);
        self.a.bind(back);
        let places = self.addend_places();
        self.push_cold(entry, back, ColdKind::PtrEnd { snap, places });
    }

    /// `LdP`.
    pub(super) fn ldp(&mut self, inst: &Inst) {
        let p = self.reg(inst.ins[0]);
        let snap = self.pointer_snapshot();
        self.release(inst.ins[0]);
        let d = self.result(inst.dst, p, 0);
        self.may_be_refused(snap);
        self.a.movzx(inst.w, d, Mem::new(p, inst.imm as i32));
        self.define(inst.dst, d, inst.w.bits() as u8);
    }
    /// `StP`.
    pub(super) fn stp(&mut self, inst: &Inst) {
        let p = self.reg(inst.ins[0]);
        let value = match self.konst(inst.ins[1]).and_then(|k| imm32(inst.w, k)) {
            Some(imm) => Opnd::I(imm),
            None => Opnd::R(self.reg(inst.ins[1])),
        };
        let snap = self.pointer_snapshot();
        self.may_be_refused(snap);
        self.store_operand(inst.w, Mem::new(p, inst.imm as i32), value, NOREG);
        self.release(inst.ins[1]);
        self.release(inst.ins[0]);
    }

    /// The snapshot of an access through a pointer, which can fault only in linear memory.
    fn pointer_snapshot(&mut self) -> Option<SnapId> {
        (!self.softmmu()).then(|| self.snapshot())
    }
    /// The next instruction is that access.
    fn may_be_refused(&mut self, snap: Option<SnapId>) {
        if let Some(snap) = snap {
            self.snaps.set_trap(snap, self.a.pos());
        }
    }

    /// `AtomicRmw`.
    pub(super) fn atomic_rmw(&mut self, inst: &Inst) {
        let [p, b, ..] = inst.ins;
        let w = inst.w;
        let Some(op) = Rmw::from_code(inst.aux) else {
            self.error.get_or_insert(crate::code::CompileError::TooLarge);
            return;
        };
        let wanted = self.wants(inst.dst);
        let rp = self.reg(p);
        let m = Mem::new(rp, 0);
        let alu = match op {
            Rmw::Add => Alu::Add,
            Rmw::Sub => Alu::Sub,
            Rmw::And => Alu::And,
            Rmw::Or => Alu::Or,
            _ => Alu::Xor,
        };
        if op != Rmw::Xchg {
            self.clobber();
        }
        if !wanted && op != Rmw::Xchg {
            let r = self.reg(b);
            let snap = self.pointer_snapshot();
            self.may_be_refused(snap);
            self.a.lock_alu(alu, w, m, r);
            self.release(b);
        } else if matches!(op, Rmw::Xchg | Rmw::Add | Rmw::Sub) {
            let sb = self.state(b);
            let snap = self.pointer_snapshot();
            self.release(b);
            let dst = if wanted { inst.dst } else { Val::NONE };
            let d = self.result(dst, sb.reg, 1 << rp);
            self.fill_from(d, &sb);
            if op == Rmw::Sub {
                self.a.group3(w.max(W32), 3, Rm::R(d));
            }
            self.may_be_refused(snap);
            if op == Rmw::Xchg {
                self.a.xchg(w, m, d);
            } else {
                self.a.lock_xadd(w, m, d);
            }
            if w < W32 {
                self.a.movzx(w, d, Rm::R(d));
            }
            self.define(dst, d, w.bits() as u8);
        } else {
            self.rmw_loop(inst, alu, m);
        }
        self.release(p);
    }
    /// AND, OR, XOR with the old value wanted: a compare-and-swap loop.
    fn rmw_loop(&mut self, inst: &Inst, alu: Alu, m: Mem) {
        let w = inst.w;
        let rb = self.reg(inst.ins[1]);
        let new = self.alloc();
        let mut rp = m.base;
        let operand = self.lend_rax(&mut rp, rb);
        let m = Mem { base: rp, ..m };
        let snap = self.pointer_snapshot();
        self.may_be_refused(snap);
        self.a.movzx(w, RAX, m);
        let again = self.a.here();
        self.a.mov(new, RAX);
        self.a.alu_r(alu, w.max(W32), new, operand);
        self.a.lock_cmpxchg(w, m, new);
        self.a.jcc(CC_NE, again);
        self.a.movzx(w, new, Rm::R(RAX));
        self.return_rax();
        self.release(inst.ins[1]);
        self.define(inst.dst, new, w.bits() as u8);
    }
    /// Frees RAX for CMPXCHG: its content goes to a frame word. Returns where operand `r` is then;
    /// pointer `p` moves to another register if it was there.
    fn lend_rax(&mut self, p: &mut Reg, r: Reg) -> Rm {
        self.a.store(W64, frame(ARGS + 24), RAX);
        if *p == RAX {
            *p = self.alloc();
            self.a.mov(*p, RAX);
        }
        if self.is_scratch(RAX) {
            self.vacate(RAX);
            self.lock(RAX);
        }
        if r == RAX { Rm::M(frame(ARGS + 24)) } else { Rm::R(r) }
    }
    /// Ends [`Gen::lend_rax`].
    fn return_rax(&mut self) {
        if !self.is_scratch(RAX) {
            self.a.load(W64, RAX, frame(ARGS + 24));
        }
    }

    /// `AtomicCas`.
    pub(super) fn atomic_cas(&mut self, inst: &Inst) {
        let [p, expect, new, _] = inst.ins;
        let w = inst.w;
        self.clobber();
        let mut rp = self.reg(p);
        let mut rn = self.reg(new);
        let se = self.state(expect);
        let snap = self.pointer_snapshot();
        if rn == RAX {
            rn = self.alloc();
            self.a.mov(rn, RAX);
        }
        self.release(p);
        self.release(expect);
        self.release(new);
        // The guest's own accumulator usually takes the result: then RAX needs no detour.
        let in_place = self.wants(inst.dst) && self.hint(inst.dst) == Some(RAX);
        if in_place {
            if rp == RAX {
                rp = self.alloc();
                self.a.mov(rp, RAX);
            }
            self.vacate(RAX);
        } else {
            self.lend_rax(&mut rp, NOREG);
        }
        self.fill_from(RAX, &se);
        self.may_be_refused(snap);
        self.a.lock_cmpxchg(w, Mem::new(rp, 0), rn);
        let zx = w.bits() as u8;
        if in_place {
            if w < W64 {
                self.a.movzx(w, RAX, Rm::R(RAX));
            }
            self.define(inst.dst, RAX, zx);
        } else {
            if self.wants(inst.dst) {
                self.locked = 1 << RAX;
                let d = self.alloc();
                self.a.movzx(w, d, Rm::R(RAX));
                self.define(inst.dst, d, zx);
            }
            self.return_rax();
        }
        self.set_flags(inst.fl);
    }

    /// A register that a cold piece may borrow: neither in `addr` nor in `busy`.
    pub(super) fn borrowed(&self, addr: Mem, busy: u16) -> Reg {
        let parts = [addr.base, addr.index].into_iter().filter(|&r| r != NOREG);
        let busy = parts.fold(busy | 1 << RSP, |set, r| set | 1 << r);
        // There are fifteen, and an access takes six at most.
        regs(!busy).next().unwrap_or(R11)
    }
    /// Checks an access by itself, with `t` borrowed: its content waits in the frame. Leaves the
    /// addend, or its sum with an index, in `i`.
    pub(super) fn cold_check(
        &mut self,
        addr: Mem,
        info: AccessInfo,
        (i, t): (Reg, Reg),
        miss: Label,
    ) -> Mem {
        self.a.store(W64, frame(ARGS + 24), t);
        self.check(info.mmu_idx(), addr, Span::own(info.size(), info.access()), (i, t), miss);
        self.host_operand(addr, i, i)
    }
    /// The addend's register says "not shared" from here on, if anybody asks. Keeps EFLAGS.
    pub(super) fn end_shared(&mut self, shared: Shared) {
        if shared.wanted {
            self.a.mov_i(shared.addend, 0);
        }
    }
    /// Brings a loaded value from `m` into its register.
    fn cold_result(&mut self, info: AccessInfo, dst: Reg, aux: u8, how: How, m: Mem) {
        match how {
            How::Merge => self.a.load(info.width(), dst, m),
            How::Extend => {
                self.extending_load(info.width(), aux, dst, Rm::M(m));
            }
        }
    }

    /// Emits the cold part of a load or store (see [`super::probe`]).
    pub(super) fn cold_access(&mut self, kind: ColdKind) {
        let (addr, info, snap, shared) = match kind {
            ColdKind::Load { addr, info, snap, shared, .. }
            | ColdKind::Store { addr, info, snap, shared, .. } => {
                (addr, AccessInfo(info), snap, shared)
            }
            _ => return,
        };
        let i = shared.addend;
        let Some(to) = self.inner.thunks.missed.at(i, info) else {
            self.error.get_or_insert(crate::code::CompileError::TooLarge);
            return;
        };
        match kind {
            ColdKind::Store { value: Opnd::I(imm), .. } => {
                self.a.store_i(W64, frame(ARGS + 16), imm);
            }
            ColdKind::Store { value: Opnd::R(r), .. } => {
                self.a.store(W64, frame(ARGS + 16), r);
            }
            // A value that waits does so there.
            _ => {}
        }
        match addr {
            Mem { base, index: NOREG, disp: 0, .. } if base != NOREG => self.a.mov(i, base),
            Mem { base: NOREG, index: NOREG, disp, .. } => {
                self.a.mov_i(i, i64::from(disp) as u64);
            }
            m => self.a.lea(W64, i, m),
        }
        self.a.call_to(to);
        self.snaps.set_host(snap, self.a.pos());
        let others = shared.places.without(i);
        if self.x87 || self.live.vector != VecUse::None || !others.is_empty() {
            let hit = self.a.label();
            self.a.jcc(CC_AE, hit);
            self.reload_vectors();
            self.zero_addends(others);
            self.a.bind(hit);
        }
        if !shared.wanted {
            return;
        }
        let host = self.host_operand(addr, i, i);
        match kind {
            ColdKind::Load { dst, aux, how, .. } => self.cold_result(info, dst, aux, how, host),
            ColdKind::Store { value, tmp, .. } => {
                self.store_operand(info.width(), host, value, tmp);
            }
            _ => {}
        }
        self.a.alu_r(Alu::Xor, W32, i, Rm::R(i));
    }
    /// Emits the cold part of a pointer.
    pub(super) fn cold_pointer(&mut self, kind: ColdKind) {
        let ColdKind::Ptr { addr, tmp, info, dst, snap, places } = kind else { return };
        self.access_args(addr, tmp, info);
        let to = self.inner.thunks.ptr;
        self.a.call_to(to);
        self.snaps.set_host(snap, self.a.pos());
        self.reload_vectors();
        self.zero_addends(places);
        self.a.load(W64, dst, frame(RES));
    }
    /// Puts address and description of an access where the slow paths' thunks look for them.
    pub(super) fn access_args(&mut self, addr: Mem, tmp: Reg, info: u32) {
        match addr {
            Mem { base, index: NOREG, disp: 0, .. } if base != NOREG => {
                self.a.store(W64, frame(ARGS), base);
            }
            Mem { base: NOREG, index: NOREG, disp, .. } => {
                self.a.store_i(W64, frame(ARGS), disp);
            }
            m => {
                self.a.lea(W64, tmp, m);
                self.a.store(W64, frame(ARGS), tmp);
            }
        }
        self.a.store_i(W32, frame(ARGS + 8), info as i32);
    }
    /// After a call: brings back what the thunk has taken out of the host's registers and the main
    /// line takes to be there.
    pub(super) fn reload_vectors(&mut self) {
        if self.x87 {
            // Slow paths of accesses leave x87 state where the thunk has put it.
            let to = self.inner.thunks.x87_load;
            self.a.call_to(to);
        }
        let to = match self.live.vector {
            VecUse::None => return,
            VecUse::Low => self.inner.thunks.vec_load_low,
            VecUse::All => self.inner.thunks.vec_load_all,
        };
        self.a.call_to(to);
    }
}
