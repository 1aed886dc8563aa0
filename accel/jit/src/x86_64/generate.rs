//! The forward pass: walks a block once, assigns places and emits.

use super::alloc::*;
use super::asm::*;
use super::frame::*;
use super::mem::Shared;
use super::share::{Places, Sharing};
use super::{Inner, LEAST_ROOM};
use crate::arena::{CHUNK, Cursor};
use crate::code::{CodePtr, CompileError, Compiled, Compiler, LinkSite};
use crate::ir::{Block, Inst, Op, Val, Verifier};
use crate::liveness::{Liveness, NO_INST, NONE, VecUse};
use crate::snapshot::{SnapId, Snapshots};
use crate::target::MemModel;
use std::sync::Arc;

/// Code that is emitted after the block's main line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cold {
    /// Where it starts.
    pub entry: Label,
    /// Where it goes on.
    pub back: Label,
    pub kind: ColdKind,
    /// The main line takes guest x87 state to be in the host's unit there.
    pub x87: bool,
}

/// What becomes of a slow path's result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    /// It is extended as the load says.
    Extend,
    /// It replaces the low part of the register.
    Merge,
}

/// What a cold piece does.
#[derive(Clone, Copy, Debug)]
pub(super) enum ColdKind {
    /// A load that missed the TLB.
    Load { addr: Mem, info: u32, dst: Reg, aux: u8, how: How, snap: SnapId, shared: Shared },
    /// A store that missed.
    Store { addr: Mem, tmp: Reg, info: u32, value: Opnd, snap: SnapId, shared: Shared },
    /// A pointer that missed.
    Ptr { addr: Mem, tmp: Reg, info: u32, dst: Reg, snap: SnapId, places: Places },
    /// A pass-through instruction whose memory operand missed: number `native`, to be executed on
    /// the pointer in `ptr`, with its general result in `dst`. `trap` says that it can trap.
    NativeMem {
        addr: Mem,
        tmp: Reg,
        info: u32,
        ptr: Reg,
        dst: Reg,
        native: u32,
        trap: bool,
        snap: SnapId,
        shared: Shared,
    },
    /// The end of a bounced pointer access.
    PtrEnd { snap: SnapId, places: Places },
    /// Vector state is not in registers yet.
    Vectors,
    /// x87 state is not in the host's unit.
    X87,
    /// A side exit: its stores, then the exit proper.
    Exit { exit: u16, first: u32, count: u32 },
    /// The unlinked end of exit `exit`.
    Chain { exit: u16 },
    /// The jump cache does not know the guest pc in `target`, where exit `exit` leads; nothing of
    /// that exit is bound, or it is to another pc.
    Lookup { exit: u16, target: Reg },
}

/// A `Deposit` at bit 0 of the 8- or 16-bit result at hand: done by computing in place, because an
/// x86 operation of that width leaves the upper bits of its register alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Merge {
    /// The value inserted into.
    pub into: Val,
    /// The result of the insertion.
    pub dst: Val,
    /// Index of the `Deposit`.
    pub at: u32,
}

/// Source of a store that brings `Env` up to date.
#[derive(Clone, Copy, Debug)]
pub(super) enum Src {
    Reg(Reg),
    Const(u64),
    Mem(i32),
}

/// Most exits of a block: an exit reference has eight bits for the index.
const MAX_EXITS: usize = 256;

/// The compiler of one thread.
pub(super) struct Gen {
    pub inner: Arc<Inner>,
    cursor: Cursor,
    pub a: Asm,
    pub snaps: Snapshots,
    pub live: Liveness,
    pub sharing: Sharing,
    verifier: Verifier,
    // ---- roles of registers, from the target ----
    pub pin_reg: [Reg; 256],
    /// Registers that need not hold a global at the instruction at hand.
    pub scratch: u16,
    /// Registers that hold no global.
    pub own_scratch: u16,
    /// The pinned ones among the first 64 globals.
    pinned: u64,
    /// By register: offset from `Env` of the word where thunks keep it.
    pub saved: [i32; 16],
    // ---- places ----
    pub vals: Vec<VState>,
    pub reg_val: [u16; 16],
    /// Registers that hold no value.
    pub empty: u16,
    pub locked: u16,
    pub slots: [u64; NSPILL.div_ceil(64)],
    pub freed: Vec<i32>,
    pub last_evicted: u8,
    /// By register: where its content is set aside while a snapshot is taken, or [`NOMEM`].
    pub moved: [i32; 16],
    /// The insertion that swallows the result of the instruction at hand.
    pub merge: Option<Merge>,
    /// The flags value in EFLAGS.
    pub flags_now: u16,
    // ---- globals in memory ----
    /// Globals whose value is not in `Env` yet.
    pub dirty: Vec<(u8, u16)>,
    /// By global: the value known to be in its `Env` slot.
    pub env_val: Vec<u16>,
    // ---- the block ----
    /// Index of the instruction at hand.
    pub at: usize,
    pub pc: u64,
    pub tag: u64,
    pub cold: Vec<Cold>,
    /// Stores of side exits.
    pub stores: Vec<(u8, Src)>,
    /// By exit: (offset of the patchable displacement, stub).
    pub links: Vec<Option<(u32, Label)>>,
    pub error: Option<CompileError>,
    /// Guest x87 state is in the host's unit here.
    pub x87: bool,
}

impl Gen {
    pub(super) fn new(inner: Arc<Inner>) -> Gen {
        let pins = &inner.shared.pins;
        let mut pin_reg = [NOREG; 256];
        for (g, &r) in pins.reg.iter().enumerate().take(256) {
            pin_reg[g] = r;
        }
        let scratch = pins.scratch;
        let pinned = pins.global.iter().filter(|&&g| g < 64).fold(0, |set, &g| set | 1 << g);
        let mut saved = std::array::from_fn(|r| SAVE + 8 * r as i32 - FRAME);
        for &(r, offset) in &pins.list {
            saved[r as usize & 15] = offset as i32;
        }
        Gen {
            cursor: Cursor::EMPTY,
            a: Asm::default(),
            snaps: Snapshots::default(),
            live: Liveness::default(),
            sharing: Sharing::default(),
            verifier: Verifier::default(),
            pin_reg,
            scratch,
            own_scratch: scratch,
            pinned,
            saved,
            vals: Vec::new(),
            reg_val: [NOVAL; 16],
            empty: !0,
            locked: 0,
            slots: [0; NSPILL.div_ceil(64)],
            freed: Vec::new(),
            last_evicted: 0,
            moved: [NOMEM; 16],
            merge: None,
            flags_now: NOVAL,
            dirty: Vec::new(),
            env_val: Vec::new(),
            at: 0,
            pc: 0,
            tag: 0,
            cold: Vec::new(),
            stores: Vec::new(),
            links: Vec::new(),
            error: None,
            x87: false,
            inner,
        }
    }

    fn start(&mut self, block: &Block, tag: u64) {
        // States are left over from other blocks until their values are defined.
        let n = block.nvals as usize + self.sharing.uses().len();
        if self.vals.len() < n {
            self.vals.resize(n, VState::new(0, 0));
        }
        // Behind the block's own values come the addends of groups.
        for (uses, i) in self.sharing.uses().zip(block.nvals..) {
            self.vals[i as usize] = VState::new(i, uses);
        }
        self.reg_val = [NOVAL; 16];
        self.empty = !0;
        self.locked = 0;
        self.slots = [0; NSPILL.div_ceil(64)];
        self.freed.clear();
        self.flags_now = NOVAL;
        self.dirty.clear();
        self.env_val.clear();
        self.env_val.resize(self.inner.shared.target.globals.len(), NOVAL);
        self.pc = block.pc;
        self.tag = tag;
        self.cold.clear();
        self.stores.clear();
        self.links.clear();
        self.links.resize(block.exits.len(), None);
        self.snaps.clear();
        self.error = None;
        self.x87 = false;
    }

    /// Stubs that poisoned and refused entries jump to (their thunks expect the second stub and the
    /// pc right behind the first), then the entries. Returns their offsets: checked, paged, linked.
    fn prologue(&mut self, block: &Block) -> (u32, u32, u32) {
        let e = self.inner.shared.target.env;
        let (page, request) = (self.inner.thunks.page, self.inner.thunks.request);
        let page_stub = self.a.here();
        self.a.call_to(page);
        let request_stub = self.a.here();
        self.a.call_to(request);
        self.a.data64(block.pc);
        self.a.align(16, 0);
        let checked = self.a.pos();
        // The words of the map are of pages, that behind it is of the mode.
        let (modes, pages) = (|s| s >= e.code_map_len, |s| s < e.code_map_len);
        self.check_words(block, modes, page_stub);
        self.a.align(8, 0);
        let paged = self.a.pos();
        self.check_words(block, pages, page_stub);
        self.a.align(8, 0);
        let linked = self.a.pos();
        self.a.alu_i(Alu::Cmp, W32, env(e.exit_request), 0);
        self.a.jcc_back(CC_NE, request_stub);
        if self.live.vector != VecUse::None {
            let (entry, back) = (self.a.label(), self.a.label());
            let live = env(e.vec_live);
            if self.live.vector == VecUse::Low {
                self.a.alu_i(Alu::Cmp, W8, live, 0);
                self.a.jcc(CC_E, entry);
            } else {
                self.a.alu_i(Alu::Cmp, W8, live, VEC_ALL);
                self.a.jcc(CC_NE, entry);
            }
            self.a.bind(back);
            self.push_cold(entry, back, ColdKind::Vectors);
        }
        (checked, paged, linked)
    }
    /// Checks the words of the code map that the block wants and that `which` chooses.
    fn check_words(&mut self, block: &Block, which: impl Fn(u32) -> bool, refused: Label) {
        let e = self.inner.shared.target.env;
        for page in block.pages.iter().filter(|p| which(p.slot)) {
            if page.slot > e.code_map_len {
                self.error.get_or_insert(CompileError::TooLarge);
                continue;
            }
            self.a.cmp_d_imm32(env(e.code_map + 4 * page.slot), page.id);
            self.a.jcc_back(CC_NE, refused);
        }
    }

    /// Stores a constant to the pc global. May use R11.
    pub(super) fn store_pc(&mut self, pc: u64) {
        let t = &self.inner.shared.target;
        let off = t.globals[t.pc_global as usize].offset;
        self.store_const(env(off), pc, R11);
    }
    /// Stores a 64-bit constant, through `tmp` if it must and has one.
    pub(super) fn store_const(&mut self, m: Mem, v: u64, tmp: Reg) {
        match i32::try_from(v as i64) {
            Ok(imm) => self.a.store_i(W64, m, imm),
            Err(_) if tmp == NOREG => {
                self.a.store_i(W32, m, v as i32);
                self.a.store_i(W32, Mem { disp: m.disp + 4, ..m }, (v >> 32) as i32);
            }
            Err(_) => {
                self.a.mov_i(tmp, v);
                self.a.store(W64, m, tmp);
            }
        }
    }

    fn body(&mut self, block: &Block) {
        for (i, inst) in block.insts.iter().enumerate() {
            if inst.op == Op::InsnStart {
                self.pc = inst.imm;
                continue;
            }
            if self.live.dead[i] {
                // A dead instruction's operands were not counted; a dead Put merely does nothing.
                continue;
            }
            self.next_inst();
            let unseen = self.live.unseen[i];
            self.scratch = self.own_scratch;
            if unseen != 0 {
                if !self.dirty.is_empty() {
                    // Nobody will want these writes.
                    self.drop_dirty(unseen);
                }
                self.lend_pins(unseen & self.pinned, inst);
            }
            self.at = i;
            for v in [inst.dst, inst.dst2, inst.fl] {
                if v.is_some() {
                    self.begin(v);
                }
            }
            self.merge = if self.live.merges { self.find_merge(block, inst) } else { None };
            self.inst(block, inst);
        }
        self.scratch = self.own_scratch;
    }
    /// Value `v` is about to be defined.
    fn begin(&mut self, v: Val) {
        self.vals[v.index()] = VState::new(v.0, self.live.vals[v.index()].uses);
    }

    /// Makes the pins of the globals `unseen`, whose content is of no use, scratch registers as well
    /// for `inst`. Not those that its results go to: their place must not serve something else in
    /// between.
    fn lend_pins(&mut self, mut unseen: u64, inst: &Inst) {
        for v in [inst.dst, inst.dst2] {
            let hint = self.live.vals.get(v.index()).map_or(NONE, |f| f.hint);
            if hint < 64 {
                unseen &= !(1 << hint);
            }
        }
        while unseen != 0 {
            let g = unseen.trailing_zeros();
            self.scratch |= 1 << self.pin_reg[g as usize];
            unseen &= unseen - 1;
        }
    }

    fn find_merge(&mut self, block: &Block, inst: &Inst) -> Option<Merge> {
        let at = self.live.vals.get(inst.dst.index())?.merge;
        if at == NO_INST {
            return None;
        }
        let deposit = &block.insts[at as usize];
        // The widths agree but for SETcc, whose result fits a byte.
        let fits = if inst.op == Op::SetCc { deposit.w == W8 } else { deposit.w == inst.w };
        if !fits {
            return None;
        }
        self.begin(deposit.dst);
        Some(Merge { into: deposit.ins[0], dst: deposit.dst, at })
    }
    /// The instruction at hand has put the result of the insertion into `r`. Its own result `v` is
    /// the low part of that.
    pub(super) fn merged(&mut self, m: Merge, v: Val, r: Reg) {
        self.define(m.dst, r, 64);
        self.alias(v, m.dst.0);
        self.live.dead[m.at as usize] = true;
        self.release(v);
        self.release(m.into);
    }

    fn inst(&mut self, block: &Block, inst: &Inst) {
        match inst.op {
            Op::InsnStart => {}
            Op::Const => self.set_const(inst.dst, inst.imm),
            Op::Get => self.get(inst.dst, inst.imm as u8),
            Op::Put => self.put(inst.imm as u8, inst.ins[0]),
            Op::EnvPtr => {
                let r = self.result(inst.dst, NOREG, 0);
                self.a.lea(W64, r, env(inst.imm as u32));
                self.define(inst.dst, r, 64);
            }
            Op::LdEnv => {
                let r = self.result(inst.dst, NOREG, 0);
                self.a.movzx(inst.w, r, env(inst.imm as u32));
                self.define(inst.dst, r, inst.w.bits() as u8);
            }
            Op::StEnv => self.store_value(inst.w, env(inst.imm as u32), inst.ins[0]),
            Op::Zext => self.zext(inst.w, inst.dst, inst.ins[0]),
            Op::Sext => self.sext(inst.w, inst.dst, inst.ins[0]),
            Op::Deposit => self.deposit(inst),
            Op::Extract => self.extract(inst),
            Op::Add | Op::Sub | Op::And | Op::Or | Op::Xor | Op::Adc | Op::Sbb => self.alu(inst),
            Op::Andn => self.andn(inst),
            Op::Neg | Op::Not => self.neg_not(inst),
            Op::Inc | Op::Dec => self.inc_dec(inst),
            Op::Shl | Op::Shr | Op::Sar | Op::Rol | Op::Ror | Op::Rcl | Op::Rcr => self.shift(inst),
            Op::Shld | Op::Shrd => self.shift_double(inst),
            Op::Mul => self.mul(inst),
            Op::MulU2 | Op::MulS2 => self.mul_wide(inst),
            Op::DivU2 | Op::DivS2 => self.div(inst),
            Op::Clz | Op::Ctz | Op::Popcnt => self.count_bits(inst),
            Op::Bswap => self.bswap(inst),
            Op::Pext | Op::Pdep => self.gather_bits(inst),
            Op::Lea => self.lea(inst),
            Op::SetCc => self.setcc(inst),
            Op::SelCc => self.selcc(inst),
            Op::FlagsImg => self.flags_img(inst),
            Op::ImgFlags => self.img_flags(inst),
            Op::Bt => self.bt(inst),
            Op::Ld => self.ld(block, inst),
            Op::St => self.st_guest(block, inst),
            Op::Ptr => self.ptr(block, inst),
            Op::PtrEnd => self.ptr_end(inst),
            Op::LdP => self.ldp(inst),
            Op::StP => self.stp(inst),
            Op::AtomicRmw => self.atomic_rmw(inst),
            Op::AtomicCas => self.atomic_cas(inst),
            Op::Fence => self.a.mfence(),
            Op::Call => self.call(inst),
            Op::Native => self.native(block, inst),
            Op::NativeMem => self.native_mem(block, inst),
            Op::GetMxcsr => self.get_mxcsr(inst),
            Op::SetMxcsr => self.set_mxcsr(inst),
            Op::BrCc => self.brcc(block, inst),
            Op::Exit => self.exit(block, inst),
        }
    }

    /// `Const`.
    fn set_const(&mut self, dst: Val, imm: u64) {
        let s = self.st(dst.0);
        s.konst = true;
        s.imm = imm;
        s.zx = (64 - imm.leading_zeros()) as u8;
    }

    /// Adds a piece of cold code.
    pub(super) fn push_cold(&mut self, entry: Label, back: Label, kind: ColdKind) {
        self.cold.push(Cold { entry, back, kind, x87: self.x87 });
    }

    fn emit(&mut self, block: &Block) -> (u32, u32, u32) {
        let entries = self.prologue(block);
        self.body(block);
        let mut i = 0;
        // Cold pieces may add further ones.
        while i < self.cold.len() {
            let c = self.cold[i];
            self.cold_piece(block, c);
            i += 1;
        }
        self.a.finish();
        entries
    }
}

impl Drop for Gen {
    fn drop(&mut self) {
        self.inner.shared.arena.give_back(self.cursor);
    }
}

impl Gen {
    /// Gives the current chunk up for one with at least `room` bytes.
    fn take_chunk(&mut self, room: usize) -> Result<(), CompileError> {
        let arena = &self.inner.shared.arena;
        let old = std::mem::replace(&mut self.cursor, Cursor::EMPTY);
        if old.room() >= LEAST_ROOM {
            arena.give_back(old);
        }
        self.cursor = arena.chunk(room).ok_or(CompileError::ArenaFull)?;
        Ok(())
    }
}

impl Compiler for Gen {
    fn compile(&mut self, block: &Block, tag: u64) -> Result<Compiled, CompileError> {
        let inner = self.inner.clone();
        let arena = &inner.shared.arena;
        if cfg!(debug_assertions) {
            // A release build trusts its front end, which is this program's own.
            self.verifier.check(block, &inner.shared.target)?;
        }
        if block.exits.len() > MAX_EXITS {
            return Err(CompileError::TooLarge);
        }
        if !arena.is_current(&self.cursor) || self.cursor.room() < LEAST_ROOM {
            self.take_chunk(LEAST_ROOM)?;
        }
        self.live.run(&inner.shared.target, block);
        if matches!(inner.shared.target.mem, MemModel::Softmmu { .. }) {
            self.sharing.plan(block, self.live.accesses);
        }
        self.start(block, tag);
        self.a.start(arena.addr(self.cursor.pos()));
        let (checked, paged, linked) = self.emit(block);
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let len = self.a.bytes().len();
        if len > CHUNK {
            return Err(CompileError::TooLarge);
        }
        if len > self.cursor.room() {
            self.take_chunk(len)?;
            self.a.rebase(arena.addr(self.cursor.pos()));
        }
        let pos = self.cursor.pos();
        arena.commit(&mut self.cursor, self.a.bytes(), self.snaps.finish());
        let start = arena.addr(pos);
        let site = |&(at, stub): &(u32, Label)| {
            let stub = pos as u64 + self.a.offset(stub) as u64;
            LinkSite((pos as u64 + at as u64) | (stub << 32))
        };
        Ok(Compiled {
            checked: CodePtr(start + checked as u64),
            paged: CodePtr(start + paged as u64),
            linked: CodePtr(start + linked as u64),
            range: start..start + len as u64,
            exits: self.links.iter().map(|l| l.as_ref().map(site)).collect(),
        })
    }
}
