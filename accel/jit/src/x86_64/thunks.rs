//! Shared pieces of host code, emitted once per arena: entering and leaving generated code, calls
//! into Rust, vector state.
//!
//! What always holds: generated code reaches Rust only through these. On the way out the guest's
//! pinned registers go to their `Env` slots, scratch registers to the save area, live vector state
//! to `Env` (with the host's MXCSR back in force); on the way in the registers come back, and
//! vector state stays in `Env` until a block wants it.

use super::Features;
use super::asm::*;
use super::frame::*;
use super::probe::{Missed, NESTED};
use crate::code::ExitRef;
use crate::target::*;

/// Addresses of the thunks (offsets from the start of the buffer while building).
#[derive(Clone, Debug, Default)]
pub(super) struct Thunks {
    pub enter: u64,
    /// Leaves with the code in `RES`.
    pub leave: u64,
    /// Looks the block up anew (else leaves with LEAVE_PAGE), and leaves with LEAVE_REQUEST; entered
    /// by CALL from a block's first and second instruction, behind which lies the pc.
    pub page: u64,
    pub request: u64,
    /// Leaves with LEAVE_CHAIN; entered by CALL; behind that lie the pc and the exit reference.
    pub chain: u64,
    /// Loads and stores that missed the TLB in line.
    pub missed: Missed,
    /// Slow paths: arguments in `ARGS`, result in `RES`; entered by CALL.
    pub ptr: u64,
    pub ptr_end: u64,
    /// Entered by JMP, guest pc and exit reference in `ARGS`.
    pub lookup: u64,
    /// Load vector registers 0–15, or all vector state (what of it is not loaded yet); entered by
    /// CALL; change no general register.
    pub vec_load_low: u64,
    pub vec_load_all: u64,
    /// Brings x87 state to its image; entered by CALL.
    pub x87_image: u64,
    /// Loads the x87 unit from its image; entered by CALL; changes no register.
    pub x87_load: u64,
    /// Where the signal handler sends a trap.
    pub trap: u64,
    /// Bit gather and scatter for hosts without BMI2; entered by CALL.
    pub pext: u64,
    pub pdep: u64,
    /// By helper; entered by CALL.
    pub helpers: Vec<u64>,
}

/// How a call thunk treats the guest's registers.
#[derive(Clone, Copy, PartialEq, Eq)]
struct CallKind {
    /// Bytes between the return address and the one that the snapshot is found by.
    nested: i32,
    /// All registers are saved and reloaded; else only those that the callee may change.
    full: bool,
    /// The callee may raise a guest fault.
    fault: bool,
}

/// What the thunks are built from.
pub(super) struct Input<'a> {
    pub target: &'a Target,
    pub pins: &'a Pins,
    /// `extern "C" fn(env, host pc, context)`: writes the snapshot back.
    pub writeback: usize,
    /// Third argument of `writeback`.
    pub context: usize,
    pub features: Features,
}

/// The thunks under construction.
pub(super) struct Builder<'a> {
    pub(super) a: &'a mut Asm,
    pub(super) t: &'a Target,
    pins: &'a Pins,
    writeback: usize,
    context: usize,
    clear_uppers: bool,
    vec_save: Label,
    leave: Label,
    leave_saved: Label,
}

/// Emits the thunks into `a` (already started at its final base address).
pub(super) fn build(a: &mut Asm, input: &Input) -> Thunks {
    let (vec_save, leave, leave_saved) = (a.label(), a.label(), a.label());
    let mut b = Builder {
        a,
        t: input.target,
        pins: input.pins,
        writeback: input.writeback,
        context: input.context,
        clear_uppers: input.features.clear_uppers && input.target.vec != VecState::Xmm,
        vec_save,
        leave,
        leave_saved,
    };
    let mut out = Thunks { enter: b.enter(), ..Thunks::default() };
    out.leave = b.leave();
    out.request = b.leave_with(LEAVE_REQUEST, 0, None);
    out.chain = b.leave_with(LEAVE_CHAIN, 0, Some(8));
    b.vec_save();
    out.x87_load = b.x87_load();
    out.vec_load_low = b.vec_load(VEC_LOW);
    out.vec_load_all = b.vec_load(VEC_ALL);
    (out.lookup, out.page) = b.lookup();
    out.trap = b.trap();
    let kinds = [(false, false), (false, true), (true, false), (true, true)]
        .map(|(full, fault)| CallKind { nested: 0, full, fault });
    let common = kinds.map(|k| b.call(k));
    let access = b.call(CallKind { nested: NESTED, full: true, fault: true });
    let full_fault = common[3];
    let rt = &input.target.runtime;
    let [load, store] = [rt.load, rt.store].map(|function| {
        let l = b.a.here();
        b.stub(function, access);
        l
    });
    out.missed = b.missed(input.features, load, store);
    out.ptr = b.stub(rt.ptr, full_fault);
    out.ptr_end = b.stub(rt.ptr_end, full_fault);
    out.x87_image = b.stub(rt.x87_image, common[0]);
    out.pext = b.stub(pext as *const () as usize, common[0]);
    out.pdep = b.stub(pdep as *const () as usize, common[0]);
    for h in &input.target.helpers {
        let e = h.effects;
        let full = e.reads_globals || e.writes_globals;
        let l = common[(full as usize) << 1 | e.may_fault as usize];
        let at = b.stub(h.addr, l);
        out.helpers.push(at);
    }
    b.a.finish();
    out
}

impl Builder<'_> {
    /// `Env` field while `bias` bytes are pushed.
    fn env(&self, off: u32, bias: i32) -> Mem {
        Mem::new(RSP, FRAME + off as i32 + bias)
    }
    fn save_pins(&mut self, mask: u16, bias: i32) {
        for &(r, off) in &self.pins.list {
            if mask >> r & 1 != 0 {
                self.a.store(W64, Mem::new(RSP, FRAME + off as i32 + bias), r);
            }
        }
    }
    fn load_pins(&mut self, mask: u16, bias: i32) {
        for &(r, off) in &self.pins.list {
            if mask >> r & 1 != 0 {
                self.a.load(W64, r, Mem::new(RSP, FRAME + off as i32 + bias));
            }
        }
    }
    /// Saves (or reloads) the scratch registers in `mask`.
    fn move_scratch(&mut self, mask: u16, bias: i32, store: bool) {
        for r in 0..16u8 {
            if self.pins.scratch & mask & 1 << r != 0 {
                let m = Mem::new(RSP, SAVE + 8 * r as i32 + bias);
                if store {
                    self.a.store(W64, m, r);
                } else {
                    self.a.load(W64, r, m);
                }
            }
        }
    }
    /// Saves vector and x87 state if it is live. RAX (already saved) is lost.
    fn vec_out(&mut self, bias: i32) {
        let skip = self.a.label();
        // Both flags in one look: they are neighbours.
        self.a.alu_i(Alu::Cmp, W16, self.env(self.t.env.vec_live, bias), 0);
        self.a.jcc(CC_E, skip);
        self.a.lea(W64, RAX, self.env(0, bias));
        self.a.call(self.vec_save);
        self.a.bind(skip);
    }
    fn enter(&mut self) -> u64 {
        let at = self.a.addr();
        let e = &self.t.env;
        for r in [RBX, RBP, R12, R13, R14, R15] {
            self.a.push(r);
        }
        self.a.store(W64, Mem::new(RDI, e.host_sp as i32), RSP);
        self.a.stmxcsr(Mem::new(RDI, e.host_mxcsr as i32));
        self.a.lea(W64, RSP, Mem::new(RDI, -FRAME));
        self.a.store(W64, frame(RES), RSI);
        self.load_pins(!0, 0);
        self.a.jmp_rm(frame(RES));
        at
    }
    fn leave(&mut self) -> u64 {
        let at = self.a.addr();
        self.a.bind(self.leave);
        self.save_pins(!0, 0);
        self.a.bind(self.leave_saved);
        self.vec_out(0);
        self.a.load(W32, RAX, frame(RES));
        self.a.load(W64, RSP, self.env(self.t.env.host_sp, 0));
        for r in [R15, R14, R13, R12, RBP, RBX] {
            self.a.pop(r);
        }
        self.a.ret();
        at
    }
    /// Leaves with `code`. The word at `pc` bytes behind the return address is the guest pc, that
    /// at `exit` bytes the exit reference.
    fn leave_with(&mut self, code: u32, pc: i32, exit: Option<i32>) -> u64 {
        let at = self.a.addr();
        let pc_slot = self.t.globals[self.t.pc_global as usize].offset;
        // Between blocks scratch registers hold nothing: R11 always is one.
        self.a.pop(R11);
        if let Some(exit) = exit {
            self.a.load(W64, R14, Mem::new(R11, exit));
            self.a.store(W64, self.env(self.t.env.exit_ref, 0), R14);
        }
        self.a.load(W64, R11, Mem::new(R11, pc));
        self.a.store(W64, self.env(pc_slot, 0), R11);
        self.a.store_i(W32, frame(RES), code as i32);
        self.a.jmp(self.leave);
        at
    }
    /// Loads the x87 unit.
    fn x87_load(&mut self) -> u64 {
        let at = self.a.addr();
        let e = self.t.env;
        self.a.x87_state(false, self.env(e.x87_image, 8));
        self.a.store_i(W8, self.env(e.x87_live, 8), 1);
        self.a.store_i(W8, self.env(e.x87_saved, 8), 0);
        self.a.ret();
        at
    }
    /// Subroutine: vector and x87 state, what of it is live, to the `Env` at RAX.
    fn vec_save(&mut self) {
        self.a.bind(self.vec_save);
        let e = self.t.env;
        let at = |off: u32| Mem::new(RAX, off as i32);
        let (no_x87, vectors) = (self.a.label(), self.a.label());
        self.a.alu_i(Alu::Cmp, W8, at(e.x87_live), 0);
        self.a.jcc(CC_E, no_x87);
        // Leaves the unit initialised, as the host wants it.
        self.a.x87_state(true, at(e.x87_image));
        self.a.store_i(W8, at(e.x87_live), 0);
        self.a.store_i(W8, at(e.x87_saved), 1);
        self.a.bind(no_x87);
        self.a.alu_i(Alu::Cmp, W8, at(e.vec_live), 0);
        self.a.jcc(CC_NE, vectors);
        self.a.ret();
        self.a.bind(vectors);
        self.move_low(true, at(e.vec), self.width());
        if self.t.vec == VecState::Zmm {
            let skip = self.a.label();
            self.a.alu_i(Alu::Cmp, W8, at(e.vec_live), VEC_ALL);
            self.a.jcc(CC_NE, skip);
            self.move_high(true, at(e.vec), at(e.opmask));
            self.a.bind(skip);
        }
        self.a.stmxcsr(at(e.mxcsr));
        self.a.ldmxcsr(at(e.host_mxcsr));
        self.a.store_i(W8, at(e.vec_live), 0);
        if self.t.vec != VecState::Xmm {
            self.a.vzeroupper();
        }
        self.a.ret();
    }
    fn vec_load(&mut self, what: i32) -> u64 {
        let at = self.a.addr();
        let e = self.t.env;
        let (vec, opmask) = (self.env(e.vec, 8), self.env(e.opmask, 8));
        let low_is_live = self.a.label();
        if what == VEC_ALL {
            self.a.alu_i(Alu::Cmp, W8, self.env(e.vec_live, 8), VEC_LOW);
            self.a.jcc(CC_E, low_is_live);
        }
        self.load_low(vec);
        self.a.ldmxcsr(self.env(e.mxcsr, 8));
        self.a.bind(low_is_live);
        if what == VEC_ALL && self.t.vec == VecState::Zmm {
            self.move_high(false, vec, opmask);
        }
        self.a.store_i(W8, self.env(e.vec_live, 8), what);
        self.a.ret();
        at
    }
    /// Loads vector registers 0–15. Where the host tells clear upper parts from loaded zeros, they
    /// are left clear if they can be: every change between legacy and VEX instructions costs such
    /// a host some hundred cycles otherwise. Changes EFLAGS.
    fn load_low(&mut self, vec: Mem) {
        if !self.clear_uppers {
            return self.move_low(false, vec, self.width());
        }
        let (wide, done) = (self.a.label(), self.a.label());
        let part = |v: i32, from: i32| Mem { disp: vec.disp + 64 * v + from, ..vec };
        // Bytes 16–31 gather in register 0, bytes 32–63 in register 1; nothing else is there yet.
        self.a.vzeroupper();
        self.a.mov_vec(16, false, 0, part(0, 16));
        (1..16).for_each(|v| self.a.or_vec(16, 0, part(v, 16)));
        if self.t.vec == VecState::Zmm {
            self.a.mov_vec(32, false, 1, part(0, 32));
            (1..16).for_each(|v| self.a.or_vec(32, 1, part(v, 32)));
            self.a.or_vec(32, 0, Rm::R(1));
        }
        self.a.test_vec(0);
        self.a.jcc(CC_NE, wide);
        self.a.vzeroupper();
        self.move_low(false, vec, 16);
        self.a.jmp(done);
        self.a.bind(wide);
        self.move_low(false, vec, self.width());
        self.a.bind(done);
    }
    /// Bytes of a vector register.
    fn width(&self) -> u32 {
        match self.t.vec {
            VecState::Xmm => 16,
            VecState::Ymm => 32,
            VecState::Zmm => 64,
        }
    }
    /// The low `bytes` bytes of vector registers 0–15. As wide as the host has them, an
    /// instruction of any encoding then does to the upper parts what it must.
    fn move_low(&mut self, store: bool, vec: Mem, bytes: u32) {
        for v in 0..16 {
            self.a.mov_vec(bytes, store, v, Mem { disp: vec.disp + 64 * v as i32, ..vec });
        }
    }
    /// Vector registers 16–31 and the opmasks.
    fn move_high(&mut self, store: bool, vec: Mem, opmask: Mem) {
        for v in 16..32 {
            self.a.mov_vec(64, store, v, Mem { disp: vec.disp + 64 * v as i32, ..vec });
        }
        for k in 0..8 {
            self.a.kmovq(store, k, Mem { disp: opmask.disp + 8 * k as i32, ..opmask });
        }
    }
    /// The ways to the runtime's look-up: from a jump-cache miss, and from an entry that was refused
    /// (by CALL from a block's first instruction; the pc lies behind its second).
    fn lookup(&mut self) -> (u64, u64) {
        let rt = self.t.runtime;
        let missed = self.a.addr();
        self.look_up(rt.lookup, LEAVE_LOOKUP);
        let refused = self.a.addr();
        self.a.pop(R11);
        self.a.load(W64, R11, Mem::new(R11, 5));
        self.a.store(W64, frame(ARGS), R11);
        self.a.store_i(W64, frame(ARGS + 8), ExitRef::NONE.0 as i32);
        self.look_up(rt.refused, LEAVE_PAGE);
        (missed, refused)
    }
    /// Asks `function` for the block at the pc in `ARGS`, for the exit behind it, and goes there, or leaves with `code`.
    fn look_up(&mut self, function: usize, code: u32) {
        let none = self.a.label();
        self.save_pins(!0, 0);
        self.vec_out(0);
        self.a.lea(W64, RDI, self.env(0, 0));
        self.a.load(W64, RSI, frame(ARGS));
        self.a.load(W64, RDX, frame(ARGS + 8));
        let pc = self.t.globals[self.t.pc_global as usize].offset;
        self.a.store(W64, self.env(pc, 0), RSI);
        self.a.mov_i(RAX, function as u64);
        self.a.call_rm(Rm::R(RAX));
        self.a.test(W64, Rm::R(RAX), RAX);
        self.a.jcc(CC_E, none);
        self.a.store(W64, frame(RES), RAX);
        self.load_pins(!0, 0);
        self.a.jmp_rm(frame(RES));
        self.a.bind(none);
        self.a.store_i(W32, frame(RES), code as i32);
        self.a.jmp(self.leave_saved);
    }
    fn trap(&mut self) -> u64 {
        let at = self.a.addr();
        self.save_pins(!0, 0);
        self.move_scratch(!0, 0, true);
        self.vec_out(0);
        self.a.load(W64, RSI, self.env(self.t.env.host_pc, 0));
        self.call_writeback(0);
        self.a.store_i(W32, frame(RES), LEAVE_TRAP as i32);
        self.a.jmp(self.leave_saved);
        at
    }
    /// Writes the snapshot of host pc RSI back.
    fn call_writeback(&mut self, bias: i32) {
        self.a.lea(W64, RDI, self.env(0, bias));
        self.a.mov_i(RDX, self.context as u64);
        self.a.mov_i(RAX, self.writeback as u64);
        self.a.call_rm(Rm::R(RAX));
    }
    /// Entry of one callee: pushes RAX and loads the function's address into it.
    fn stub(&mut self, addr: usize, common: Label) -> u64 {
        let at = self.a.addr();
        self.a.push(RAX);
        self.a.mov_i(RAX, addr as u64);
        self.a.jmp(common);
        at
    }
    /// The common part: function in RAX, the old RAX at RSP, the return address above it.
    fn call(&mut self, kind: CallKind) -> Label {
        let l = self.a.here();
        let bias = 16 + kind.nested;
        let mask = if kind.full { !0 } else { CALLER_SAVED };
        self.save_pins(mask & !(1 << RAX), bias);
        self.move_scratch(mask & !(1 << RAX), bias, true);
        // RCX is saved (or free) by now.
        self.a.load(W64, RCX, Mem::new(RSP, 0));
        let rax_home = match self.pins.list.iter().find(|p| p.0 == RAX) {
            Some(&(_, off)) => self.env(off, bias),
            None => Mem::new(RSP, SAVE + bias),
        };
        self.a.store(W64, rax_home, RCX);
        let no_vec = self.a.label();
        self.a.alu_i(Alu::Cmp, W16, self.env(self.t.env.vec_live, bias), 0);
        self.a.jcc(CC_E, no_vec);
        self.a.mov(RCX, RAX);
        self.a.lea(W64, RAX, self.env(0, bias));
        self.a.call(self.vec_save);
        self.a.mov(RAX, RCX);
        self.a.bind(no_vec);
        self.a.lea(W64, RDI, self.env(0, bias));
        for (i, r) in [RSI, RDX, RCX, R8].into_iter().enumerate() {
            self.a.load(W64, r, Mem::new(RSP, ARGS + 8 * i as i32 + bias));
        }
        self.a.call_rm(Rm::R(RAX));
        self.a.store(W64, Mem::new(RSP, RES + bias), RAX);
        let faulted = self.a.label();
        if kind.fault {
            self.a.alu_i(Alu::Cmp, W32, self.env(self.t.env.fault, bias), 0);
            self.a.jcc(CC_NE, faulted);
        }
        self.load_pins(mask, bias);
        self.move_scratch(mask, bias, false);
        self.a.lea(W64, RSP, Mem::new(RSP, 8));
        self.a.ret();
        if kind.fault {
            self.a.bind(faulted);
            if !kind.full {
                self.save_pins(!CALLER_SAVED, bias);
                self.move_scratch(!CALLER_SAVED, bias, true);
            }
            self.a.load(W64, RSI, Mem::new(RSP, bias - 8));
            self.call_writeback(bias);
            self.a.lea(W64, RSP, Mem::new(RSP, bias));
            self.a.store_i(W32, frame(RES), LEAVE_FAULT as i32);
            self.a.jmp(self.leave_saved);
        }
        l
    }
}

/// Bit gather (SDM vol. 2, PEXT).
extern "C" fn pext(_env: *mut u8, value: u64, mut mask: u64) -> u64 {
    let mut out = 0;
    let mut at = 0;
    while mask != 0 {
        let bit = mask.trailing_zeros();
        out |= (value >> bit & 1) << at;
        at += 1;
        mask &= mask - 1;
    }
    out
}

/// Bit scatter (SDM vol. 2, PDEP).
extern "C" fn pdep(_env: *mut u8, value: u64, mut mask: u64) -> u64 {
    let mut out = 0;
    let mut at = 0;
    while mask != 0 {
        out |= (value >> at & 1) << mask.trailing_zeros();
        at += 1;
        mask &= mask - 1;
    }
    out
}
