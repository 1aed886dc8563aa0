//! Executing one block, instruction by instruction.

use super::Code;
use super::mem::{cas, host_read, host_write};
use super::thunk::ThunkArgs;
use crate::code::{CodePtr, ExitRef};
use crate::ir::eval::{Args, FLAGS, divide, eval, sext, sub_flags};
use crate::ir::{
    Cond, Encoding, ExitKind, Inst, LD_SX32, LD_SX64, Native, NativeReg, Op, PTR_READ, PTR_WRITE,
    Rmw, TRAP_DIVIDE, Val, Width, access_bytes,
};
use crate::target::{
    AccessInfo, LEAVE_CHAIN, LEAVE_FAULT, LEAVE_ILLEGAL, LEAVE_LOOKUP, LEAVE_TRAP, Target,
};
use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

/// Values of the block in execution, by [`Val`]; the place of [`Val::NONE`] always holds 0, so that
/// an absent input reads as 0.
pub(super) type Values = [u64; 1 << 16];

thread_local! {
    static VALUES: Cell<Option<Box<Values>>> = const { Cell::new(None) };
}

/// This thread's value memory, or a new one if it is in use (a helper that runs guest code).
pub(super) fn take_values() -> Box<Values> {
    VALUES.take().unwrap_or_else(|| {
        let zeros: Box<[u64]> = vec![0; 1 << 16].into();
        zeros.try_into().expect("the length is that of the array")
    })
}

/// Gives value memory back for the next run.
pub(super) fn put_values(values: Box<Values>) {
    VALUES.set(Some(values));
}

/// Where execution goes after a block.
pub(super) enum Flow {
    /// Into the block with this entry.
    Enter(u64),
    /// Back to the caller with this code.
    Leave(u32),
}

/// SIMD exception status flags of MXCSR (IE, DE, ZE, OE, UE, PE; SDM vol. 1 §10.2.3).
const MXCSR_STATUS: u32 = 0x3f;
/// The exceptions found before the operation is done: invalid, denormal, division by zero.
const MXCSR_EARLY: u32 = 0x07;
/// Exception masks of MXCSR.
const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR: underflow is masked.
const MXCSR_UM: u32 = 1 << 11;
/// MXCSR: underflow has happened.
const MXCSR_UE: u32 = 1 << 4;
/// MXCSR: flush to zero.
const MXCSR_FTZ: u32 = 1 << 15;

/// Whether the instruction writes to its memory operand what a SIMD exception should have kept from
/// it: VCVTPS2PH.
fn stores_result(native: &Native) -> bool {
    native.rm == NativeReg::Mem && native.prefix == 0x66 && (native.map, native.opcode) == (3, 0x1d)
}

/// Whether the instruction raises no underflow for tiny results: its encoding suppresses SIMD exceptions
/// (EVEX.b with registers only), or it is VREDUCEPS and the like.
fn never_underflows(native: &Native) -> bool {
    let Encoding::Evex { b, .. } = native.enc else { return false };
    b && native.rm != NativeReg::Mem || native.map == 3 && matches!(native.opcode, 0x56 | 0x57)
}

/// Trap number of an unmasked SIMD exception (see [`LEAVE_TRAP`]).
const TRAP_SIMD: u32 = 1;

/// An `Env` being worked on.
pub(super) struct State<'a> {
    pub(super) target: &'a Target,
    pub(super) env: *mut u8,
    vals: &'a mut Values,
}

impl<'a> State<'a> {
    /// # Safety
    /// `env` points to an Env of `target`'s layout that only this thread uses.
    pub(super) unsafe fn new(target: &'a Target, env: *mut u8, vals: &'a mut Values) -> State<'a> {
        State { target, env, vals }
    }

    fn val(&self, v: Val) -> u64 {
        self.vals[v.index()]
    }

    fn set(&mut self, v: Val, x: u64) {
        if v.is_some() {
            self.vals[v.index()] = x;
        }
    }

    /// Writes the pc global.
    pub(super) fn set_pc(&self, pc: u64) {
        let offset = self.target.globals[usize::from(self.target.pc_global)].offset;
        self.env_write(offset.into(), Width::W64, pc);
    }

    /// Word `slot` of the code map.
    pub(super) fn code_map(&self, slot: u32) -> u32 {
        self.env_read(u64::from(self.target.env.code_map) + 4 * u64::from(slot), Width::W32) as u32
    }

    /// Whether someone asked the vCPU to leave.
    pub(super) fn exit_requested(&self) -> bool {
        self.env_read(self.target.env.exit_request.into(), Width::W32) != 0
    }

    fn faulted(&self) -> bool {
        self.env_read(self.target.env.fault.into(), Width::W32) != 0
    }

    /// Runs `code` from its first instruction.
    pub(super) fn run_block(&mut self, code: &Code) -> Flow {
        for inst in &code.insts {
            if let Some(flow) = self.step(code, inst) {
                return flow;
            }
        }
        // A verified block ends with an exit.
        Flow::Leave(LEAVE_LOOKUP)
    }

    /// Executes one instruction; `None` to go on with the next.
    fn step(&mut self, code: &Code, inst: &Inst) -> Option<Flow> {
        let [a, b, c, _] = inst.ins;
        let w = inst.w;
        match inst.op {
            Op::InsnStart => self.set_pc(inst.imm),
            Op::Const => self.set(inst.dst, inst.imm),
            // `compile` has replaced the global's index by its offset.
            Op::Get => {
                let v = self.env_read(inst.imm, Width::W64);
                self.set(inst.dst, v);
            }
            Op::Put => self.env_write(inst.imm, Width::W64, self.val(a)),
            Op::EnvPtr => self.set(inst.dst, self.env_addr(inst.imm as u32, 1)),
            Op::LdEnv => {
                let v = self.env_read(inst.imm, w);
                self.set(inst.dst, v);
            }
            Op::StEnv => self.env_write(inst.imm, w, self.val(a)),
            // The commonest operations, when nobody wants their flags.
            Op::Add if !inst.fl.is_some() => {
                self.set(inst.dst, self.val(a).wrapping_add(self.val(b)) & w.mask());
            }
            Op::Sub if !inst.fl.is_some() => {
                self.set(inst.dst, self.val(a).wrapping_sub(self.val(b)) & w.mask());
            }
            Op::And if !inst.fl.is_some() => {
                self.set(inst.dst, self.val(a) & self.val(b) & w.mask());
            }
            Op::Zext => self.set(inst.dst, self.val(a) & w.mask()),
            Op::DivU2 | Op::DivS2 => return self.divide(inst),
            Op::Ld | Op::St | Op::Ptr | Op::PtrEnd => return self.guest_access(code, inst),
            Op::LdP => {
                let p = self.val(a).wrapping_add(inst.imm) as *const u8;
                // SAFETY: the IR's contract: `a` is a live pointer of a `Ptr` that covers this
                // access, made by the TLB or the runtime.
                let v = unsafe { host_read(p, w) };
                self.set(inst.dst, v);
            }
            Op::StP => {
                let p = self.val(a).wrapping_add(inst.imm) as *mut u8;
                // SAFETY: as for LdP, with a pointer made for writing.
                unsafe { host_write(p, w, self.val(b)) };
            }
            Op::AtomicRmw => self.atomic_rmw(inst),
            Op::AtomicCas => {
                let expected = self.val(b) & w.mask();
                // SAFETY: as for StP.
                let old = unsafe { cas(self.val(a) as *mut u8, w, expected, self.val(c)) };
                self.set(inst.dst, old);
                self.set(inst.fl, sub_flags(w, expected, old, expected.wrapping_sub(old)));
            }
            Op::Fence => fence(Ordering::SeqCst),
            Op::Call => return self.call(inst),
            Op::Native => {
                let mem = self.val(a);
                return self.native(code, inst, mem);
            }
            Op::NativeMem => return self.native_mem(code, inst),
            Op::GetMxcsr => {
                let v = self.env_read(self.target.env.mxcsr.into(), Width::W32);
                self.set(inst.dst, v);
            }
            Op::SetMxcsr => {
                self.env_write(self.target.env.mxcsr.into(), Width::W32, self.val(a));
            }
            Op::BrCc => {
                if Cond::from_code(inst.cond).holds(self.val(a)) {
                    return Some(self.exit(code, inst));
                }
            }
            Op::Exit => return Some(self.exit(code, inst)),
            op => {
                let ins = inst.ins.map(|v| self.val(v));
                let args = Args { aux: inst.aux, cond: inst.cond, imm: inst.imm, ins };
                let r = eval(op, w, &args);
                self.set(inst.dst, r.dst);
                self.set(inst.dst2, r.dst2);
                self.set(inst.fl, r.fl);
            }
        }
        None
    }

    /// Leaves because of a fault that a slow path or helper raised, if one did. The pc global is
    /// the current instruction's already.
    fn check_fault(&self) -> Option<Flow> {
        self.faulted().then_some(Flow::Leave(LEAVE_FAULT))
    }

    /// Leaves with a host-trap code.
    fn trap(&self, number: u32) -> Option<Flow> {
        self.env_write(self.target.env.fault.into(), Width::W32, number.into());
        Some(Flow::Leave(LEAVE_TRAP))
    }

    fn divide(&mut self, inst: &Inst) -> Option<Flow> {
        let [hi, lo, by, _] = inst.ins.map(|v| self.val(v));
        let Some((q, r)) = divide(inst.op == Op::DivS2, inst.w, hi, lo, by) else {
            return self.trap(TRAP_DIVIDE);
        };
        self.set(inst.dst, q);
        self.set(inst.dst2, r);
        None
    }

    fn address(&self, inst: &Inst) -> u64 {
        let index = self.val(inst.ins[1]) << (inst.aux & 3);
        self.val(inst.ins[0]).wrapping_add(index).wrapping_add(inst.disp() as u64)
    }

    fn guest_access(&mut self, code: &Code, inst: &Inst) -> Option<Flow> {
        type Load = extern "C" fn(*mut u8, u64, u32) -> u64;
        type Store = extern "C" fn(*mut u8, u64, u32, u64);
        let (env, runtime, mmu) = (self.env, &self.target.runtime, code.mmu_idx);
        let w = inst.w;
        let addr = self.address(inst);
        let info = |access| AccessInfo::new(w.bytes().trailing_zeros() as u8, mmu, access).0;
        match inst.op {
            Op::Ld => {
                let v = match self.probe(mmu, addr, w.bytes(), PTR_READ) {
                    // SAFETY: a TLB hit: the runtime put the page there, and all bytes are on it.
                    Some(p) => unsafe { host_read(p, w) },
                    None => {
                        // SAFETY: `Runtime` says that this address is such a function.
                        let load: Load = unsafe { std::mem::transmute(runtime.load) };
                        let v = load(env, addr, info(PTR_READ)) & w.mask();
                        if let leave @ Some(_) = self.check_fault() {
                            return leave;
                        }
                        v
                    }
                };
                let v = match inst.aux & (LD_SX64 | LD_SX32) {
                    0 => v,
                    LD_SX32 => sext(w, v) & Width::W32.mask(),
                    _ => sext(w, v),
                };
                self.set(inst.dst, v);
            }
            Op::St => {
                let v = self.val(inst.ins[2]) & w.mask();
                match self.probe(mmu, addr, w.bytes(), PTR_WRITE) {
                    // SAFETY: a TLB hit, as for Ld.
                    Some(p) => unsafe { host_write(p, w, v) },
                    None => {
                        // SAFETY: `Runtime` says that this address is such a function.
                        let store: Store = unsafe { std::mem::transmute(runtime.store) };
                        store(env, addr, info(PTR_WRITE), v);
                        return self.check_fault();
                    }
                }
            }
            Op::Ptr => match self.pointer(mmu, addr, inst.aux >> 2, inst.cond) {
                Ok(p) => self.set(inst.dst, p),
                Err(leave) => return Some(leave),
            },
            _ => return self.pointer_end(),
        }
        None
    }

    /// A host pointer to [`access_bytes`]`(size)` bytes at `addr`, or where to leave to.
    fn pointer(&self, mmu: u8, addr: u64, size: u8, access: u8) -> Result<u64, Flow> {
        if let Some(p) = self.probe(mmu, addr, access_bytes(size), access) {
            return Ok(p as u64);
        }
        // SAFETY: `Runtime` says that this address is such a function.
        let ptr: extern "C" fn(*mut u8, u64, u32) -> u64 =
            unsafe { std::mem::transmute(self.target.runtime.ptr) };
        let p = ptr(self.env, addr, AccessInfo::new(size, mmu, access).0);
        match self.check_fault() {
            Some(leave) => Err(leave),
            None => Ok(p),
        }
    }

    /// Writes a bounced pointer access back, if there is one.
    fn pointer_end(&self) -> Option<Flow> {
        if self.env_read(self.target.env.bounce.into(), Width::W8) == 0 {
            return None;
        }
        // SAFETY: `Runtime` says that this address is such a function.
        let end: extern "C" fn(*mut u8) =
            unsafe { std::mem::transmute(self.target.runtime.ptr_end) };
        end(self.env);
        self.check_fault()
    }

    fn native_mem(&mut self, code: &Code, inst: &Inst) -> Option<Flow> {
        let addr = self.address(inst);
        let mem = match self.pointer(code.mmu_idx, addr, inst.aux >> 2, inst.cond) {
            Ok(p) => p,
            Err(leave) => return Some(leave),
        };
        let leave = self.native(code, inst, mem);
        if leave.is_none() && inst.cond & PTR_WRITE != 0 {
            return self.pointer_end();
        }
        leave
    }

    fn atomic_rmw(&mut self, inst: &Inst) {
        let (p, w, v) = (self.val(inst.ins[0]) as *mut u8, inst.w, self.val(inst.ins[1]));
        // The verifier has checked the encoding.
        let op = Rmw::from_code(inst.aux).unwrap_or(Rmw::Xchg);
        // SAFETY: as for StP in `step`.
        let mut old = unsafe { host_read(p, w) };
        loop {
            let new = match op {
                Rmw::Xchg => v,
                Rmw::Add => old.wrapping_add(v),
                Rmw::And => old & v,
                Rmw::Or => old | v,
                Rmw::Xor => old ^ v,
                Rmw::Sub => old.wrapping_sub(v),
            };
            // SAFETY: as above.
            let seen = unsafe { cas(p, w, old, new) };
            if seen == old {
                break;
            }
            old = seen;
        }
        self.set(inst.dst, old);
    }

    fn call(&mut self, inst: &Inst) -> Option<Flow> {
        let helper = &self.target.helpers[inst.imm as usize];
        let [a, b, c, d] = inst.ins.map(|v| self.val(v));
        // SAFETY: `HelperDesc` says that this address is a C function taking up to these arguments;
        // under the C calling convention of every supported host surplus ones are ignored.
        let f: extern "C" fn(*mut u8, u64, u64, u64, u64) -> u64 =
            unsafe { std::mem::transmute(helper.addr) };
        let r = f(self.env, a, b, c, d);
        if helper.effects.may_fault && self.faulted() {
            return self.check_fault();
        }
        self.set(inst.dst, r);
        None
    }

    /// Executes a pass-through instruction with its memory operand at host address `mem`.
    fn native(&mut self, code: &Code, inst: &Inst, mem: u64) -> Option<Flow> {
        let Some(&(native, Some(thunk))) = code.natives.get(inst.native_index()) else {
            return Some(Flow::Leave(LEAVE_ILLEGAL));
        };
        let layout = &self.target.env;
        if native.x87 && self.env_read(layout.x87_saved.into(), Width::W8) == 0 {
            // SAFETY: `Runtime` says that this address is such a function.
            let image: extern "C" fn(*mut u8) =
                unsafe { std::mem::transmute(self.target.runtime.x87_image) };
            image(self.env);
            self.env_write(layout.x87_saved.into(), Width::W8, 1);
        }
        let guest = self.env_read(layout.mxcsr.into(), Width::W32) as u32;
        let [_, b, c, d] = inst.ins.map(|v| self.val(v));
        let tiny = native.fp && guest & MXCSR_UM == 0 && !never_underflows(&native);
        let underflow = if tiny { MXCSR_FTZ } else { 0 };
        let mut args = ThunkArgs {
            mem,
            b,
            c,
            dst: d,
            vec: self.env_addr(layout.vec, 32 * 64),
            opmask: self.env_addr(layout.opmask, 8 * 8),
            x87: self.env_addr(layout.x87_image, 108),
            mxcsr: guest & !MXCSR_STATUS | MXCSR_MASKS | underflow,
            // A status flag whose mask bit, seven places up, is clear.
            trap_mask: if native.fp { !(guest >> 7) & MXCSR_STATUS } else { 0 },
            ..ThunkArgs::default()
        };
        if args.trap_mask != 0 && stores_result(&native) {
            let mut scratch = [0u8; 64];
            args.mem = scratch.as_mut_ptr() as u64;
            // SAFETY: as below; the result has at most 32 bytes.
            unsafe { thunk.call(&mut args) };
            if args.mxcsr_out & MXCSR_STATUS & args.trap_mask == 0 {
                args.mem = mem;
            }
        }
        // SAFETY: thunks live as long as the blocks that name them. The vector state is the Env's;
        // a memory operand is a pointer made by a `Ptr` of the size that the instruction accesses.
        unsafe { thunk.call(&mut args) };
        if native.vector {
            let mut raised = args.mxcsr_out & MXCSR_STATUS;
            if underflow != 0 && raised & MXCSR_UE != 0 {
                // Flushing to zero is inexact; whether the result itself is, is seen without.
                // That it has happened is in the status flags from the start, so that nothing is stored.
                (args.mxcsr, args.dst) = (args.mxcsr & !MXCSR_FTZ | MXCSR_UE, d);
                // SAFETY: as above: the operands are as they were, and so is memory.
                unsafe { thunk.call(&mut args) };
                raised = args.mxcsr_out & MXCSR_STATUS;
            }
            let trapped = raised & args.trap_mask;
            // An unmasked exception found early hides those that the result would have raised.
            let shown = if trapped & MXCSR_EARLY != 0 { raised & MXCSR_EARLY } else { raised };
            self.env_write(layout.mxcsr.into(), Width::W32, (guest | shown).into());
            if trapped != 0 {
                return self.trap(TRAP_SIMD);
            }
        }
        let names = |reg| [native.reg, native.rm, native.vvvv].contains(&reg);
        if names(NativeReg::GprDst) {
            self.set(inst.dst, args.dst);
        }
        if names(NativeReg::GprDst2) {
            self.set(inst.dst2, args.dst2);
        }
        self.set(inst.fl, args.flags & FLAGS);
        None
    }

    fn exit(&mut self, code: &Code, inst: &Inst) -> Flow {
        let index = inst.imm as usize;
        match code.exits[index].kind {
            ExitKind::Goto { pc, .. } => match code.links[index].load(Ordering::Acquire) {
                0 => {
                    self.set_pc(pc);
                    let exit = code.exit_ref(index).0;
                    self.env_write(self.target.env.exit_ref.into(), Width::W64, exit);
                    Flow::Leave(LEAVE_CHAIN)
                }
                to => Flow::Enter(to),
            },
            ExitKind::Indirect => self.indirect(self.val(inst.ins[0])),
            ExitKind::Leave { code, pc } => {
                if let Some(pc) = pc {
                    self.set_pc(pc);
                }
                Flow::Leave(code)
            }
        }
    }

    /// Goes to the block at `pc`: by the jump cache, else as the runtime's lookup says.
    fn indirect(&mut self, pc: u64) -> Flow {
        let layout = &self.target.env;
        let index = (pc ^ pc >> layout.jmp_cache_bits) & ((1 << layout.jmp_cache_bits) - 1);
        let entry = u64::from(layout.jmp_cache) + 16 * index;
        let code = self.env_read(entry + 8, Width::W64);
        if code != 0 && self.env_read(entry, Width::W64) == pc {
            return Flow::Enter(code);
        }
        self.set_pc(pc);
        // SAFETY: `Runtime` says that this address is such a function.
        let lookup: extern "C" fn(*mut u8, u64, u64) -> u64 =
            unsafe { std::mem::transmute(self.target.runtime.lookup) };
        match lookup(self.env, pc, ExitRef::NONE.0) {
            0 => Flow::Leave(LEAVE_LOOKUP),
            code => Flow::Enter(CodePtr(code).0),
        }
    }
}
