//! Thunks: one pass-through instruction each, callable from Rust, on an x86-64 host.
//!
//! ```text
//!   call enter      ; save host MXCSR; load guest vector state, MXCSR and operands
//!   <instruction>   ; mem = RSI, b = RDX, c = RCX, dst = RAX, dst2 = R8; RDI = ThunkArgs
//!   jmp leave       ; save flags, results, vector state; restore host MXCSR; return to Rust
//! ```
//!
//! `enter` and `leave` exist once per pool, with and without vector state, and with x87 state (which
//! the unit holds for that one instruction; all its exceptions are masked). Thunks are kept by
//! [`Native`] value and dropped only with all blocks. Memory is mapped twice from one memfd, so that
//! no mapping is both writable and executable.
//!
//! SIMD exceptions never reach the host: the instruction runs with all of them masked and clear
//! status flags; if it set one that the guest has unmasked, `leave` does not store the vector state,
//! so that nothing has happened yet. An unmasked underflow exception is for every tiny result, but a
//! masked one only for inexact ones: flush-to-zero, which matters only while it is masked, makes the
//! two the same. Whether PE comes with an unmasked underflow or overflow is not told: it is set if the
//! masked result would be inexact, where a processor sets it if the normalised one is. (The one instruction with a memory destination, VCVTPS2PH, is first tried on memory of
//! our own.)

use crate::code::CompileError;
use crate::ir::{Encoding, Native, NativeReg};
use crate::native::{NO_INDEX, NativeRegs, encode};
use crate::target::{Target, VecState};
use std::collections::HashMap;
use std::mem::offset_of;

/// Room for thunks; about half a million of them.
const POOL_BYTES: usize = 16 << 20;

/// Where thunks find the memory operand, b, c, dst and dst2: RSI, RDX, RCX, RAX, R8.
const OPERANDS: NativeRegs =
    NativeRegs { b: RDX, c: RCX, dst: RAX, dst2: R8, mem: RSI, index: NO_INDEX, scale: 0, disp: 0 };
const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RSI: u8 = 6;
const RDI: u8 = 7;
const R8: u8 = 8;
const R9: u8 = 9;

/// Operands and results of a thunk, in memory.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct ThunkArgs {
    /// Host pointer of the memory operand.
    pub mem: u64,
    /// Input b.
    pub b: u64,
    /// Input c.
    pub c: u64,
    /// In: input d. Out: first result.
    pub dst: u64,
    /// Second result.
    pub dst2: u64,
    /// RFLAGS after the instruction.
    pub flags: u64,
    /// Address of the guest's vector registers.
    pub vec: u64,
    /// Address of the guest's opmask registers.
    pub opmask: u64,
    /// Address of the guest's x87 image.
    pub x87: u64,
    /// MXCSR to run with: exceptions masked, status flags clear.
    pub mxcsr: u32,
    /// MXCSR afterwards.
    pub mxcsr_out: u32,
    /// Status flags that forbid storing the vector state.
    pub trap_mask: u32,
    /// Scratch of the thunk: the host's MXCSR.
    pub host_mxcsr: u32,
}

/// Entry of a thunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Thunk(usize);

impl Thunk {
    /// Executes the instruction.
    ///
    /// # Safety
    /// The pool that made the thunk has not been cleared. `args.vec` and `args.opmask` point to
    /// vector state of the target's layout and, if the instruction has a memory operand, `args.mem`
    /// to memory that it may access, aligned as it demands.
    pub(super) unsafe fn call(self, args: &mut ThunkArgs) {
        // SAFETY: the address is that of a thunk, which follows the C calling convention: it
        // clobbers only caller-saved registers and restores the host's MXCSR.
        let entry: extern "C" fn(*mut ThunkArgs) = unsafe { std::mem::transmute(self.0) };
        entry(args);
    }
}

/// Executable memory holding the thunks made so far.
#[derive(Debug)]
pub(super) struct ThunkPool {
    vec: VecState,
    made: HashMap<Native, Thunk>,
    mem: Option<Mapping>,
    used: usize,
    /// Offsets of `enter` and `leave`, without and with vector state, and with x87 state.
    stubs: [(usize, usize); 3],
}

impl ThunkPool {
    pub(super) fn new(target: &Target) -> ThunkPool {
        let vec = target.vec;
        ThunkPool { vec, made: HashMap::new(), mem: None, used: 0, stubs: [(0, 0); 3] }
    }

    /// Forgets all thunks.
    pub(super) fn clear(&mut self) {
        self.made.clear();
        self.mem = None;
        self.used = 0;
    }

    /// The thunk of `native`; `None` if it has no encoding, or the host refuses executable memory.
    pub(super) fn thunk(&mut self, native: &Native) -> Result<Option<Thunk>, CompileError> {
        if let Some(&t) = self.made.get(native) {
            return Ok(Some(t));
        }
        let Some(insn) = encode(native, &OPERANDS) else { return Ok(None) };
        if self.mem.is_none() {
            match Mapping::new(POOL_BYTES) {
                Ok(m) => self.mem = Some(m),
                Err(e) => {
                    log::warn!("no executable memory for pass-through instructions: {e}");
                    return Ok(None);
                }
            }
            for vector in [false, true] {
                let enter = self.place(&enter_stub(vector.then_some(self.vec)))?;
                let leave = self.place(&leave_stub(vector.then_some(self.vec)))?;
                self.stubs[usize::from(vector)] = (enter, leave);
            }
            // FRSTOR before everything else; FNSAVE behind, before registers are reused.
            let mut enter = x87_state(4);
            enter.extend(enter_stub(None));
            let mut leave = leave_stub(None);
            leave.pop();
            leave.extend(x87_state(6));
            leave.push(0xc3);
            self.stubs[2] = (self.place(&enter)?, self.place(&leave)?);
        }
        let kind = if native.x87 { 2 } else { usize::from(native.vector) };
        let (enter, leave) = self.stubs[kind];
        let at = self.used;
        let mut code = Vec::with_capacity(32);
        // Displacements count from the end of the branch; the pool is smaller than 2 GiB.
        let rel = |to: usize, from: usize| (to as i64 - from as i64) as i32;
        code.push(0xe8);
        code.extend(rel(enter, at + 5).to_le_bytes());
        code.extend(insn.as_slice());
        code.push(0xe9);
        code.extend(rel(leave, at + code.len() + 4).to_le_bytes());
        self.place(&code)?;
        let Some(mem) = &self.mem else { return Ok(None) };
        let thunk = Thunk(mem.exec as usize + at);
        self.made.insert(*native, thunk);
        Ok(Some(thunk))
    }

    /// Appends code to the pool; returns its offset.
    fn place(&mut self, code: &[u8]) -> Result<usize, CompileError> {
        let at = self.used;
        let mem = self.mem.as_mut().ok_or(CompileError::ArenaFull)?;
        if at + code.len() > POOL_BYTES {
            return Err(CompileError::ArenaFull);
        }
        // SAFETY: at + len is within the mapping (checked above), which only this pool writes, and
        // threads may be executing only bytes below `at`.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), mem.write.add(at), code.len()) };
        self.used = (at + code.len()).next_multiple_of(16);
        Ok(at)
    }
}

/// An instruction with ModRM, from opcode map and opcode, REX.W, reg number, `[base + disp]`.
fn mem_op(map: u8, opcode: u8, w: bool, reg: u8, base: u8, disp: usize) -> Vec<u8> {
    let native =
        Native { reg: NativeReg::Fixed(reg), ..native_mem(Encoding::Legacy, 0, map, opcode, w) };
    bytes(&native, base, disp)
}

/// A memory instruction without its `reg` field.
fn native_mem(enc: Encoding, prefix: u8, map: u8, opcode: u8, w: bool) -> Native {
    Native {
        enc,
        prefix,
        map,
        opcode,
        w,
        l: 0,
        reg: NativeReg::Fixed(0),
        rm: NativeReg::Mem,
        vvvv: NativeReg::Fixed(0),
        imm8: None,
        dst_in: false,
        sets_flags: false,
        vector: false,
        fp: false,
        x87: false,
    }
}

fn bytes(native: &Native, base: u8, disp: usize) -> Vec<u8> {
    let regs = NativeRegs { mem: base, disp: disp as i32, ..NativeRegs::default() };
    encode(native, &regs).map(|b| b.as_slice().to_vec()).unwrap_or_default()
}

/// MOV between `reg` and a field of the arguments (`load`: from memory).
fn arg(load: bool, reg: u8, field: usize) -> Vec<u8> {
    mem_op(0, if load { 0x8b } else { 0x89 }, true, reg, RDI, field)
}

/// FRSTOR (/4) or FNSAVE (/6) of the guest's image. R9 is lost.
fn x87_state(ext: u8) -> Vec<u8> {
    let mut out = arg(true, R9, offset_of!(ThunkArgs, x87));
    out.extend(mem_op(0, 0xdd, false, ext, R9, 0));
    out
}

/// LDMXCSR (/2) or STMXCSR (/3) of a field of the arguments.
fn mxcsr(ext: u8, field: usize) -> Vec<u8> {
    mem_op(1, 0xae, false, ext, RDI, field)
}

/// Loads or stores all vector registers at `[RSI]`, opmask registers at `[R9]`.
fn vector_moves(load: bool, vec: VecState) -> Vec<u8> {
    let mut out = Vec::new();
    let (enc, l, n, w) = match vec {
        VecState::Xmm => (Encoding::Legacy, 0, 16, false),
        VecState::Ymm => (Encoding::Vex, 1, 16, false),
        VecState::Zmm => (Encoding::Evex { aaa: 0, z: false, b: false }, 2, 32, false),
    };
    for i in 0..n {
        // MOVUPS / VMOVUPS.
        let op = if load { 0x10 } else { 0x11 };
        let mov = Native { l, reg: NativeReg::Vec(i), ..native_mem(enc, 0, 1, op, w) };
        out.extend(bytes(&mov, RSI, usize::from(i) * 64));
    }
    if vec == VecState::Zmm {
        for i in 0..8 {
            // KMOVQ.
            let op = if load { 0x90 } else { 0x91 };
            let mov =
                Native { reg: NativeReg::Mask(i), ..native_mem(Encoding::Vex, 0, 1, op, true) };
            out.extend(bytes(&mov, R9, usize::from(i) * 8));
        }
    }
    out
}

fn enter_stub(vector: Option<VecState>) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(vec) = vector {
        out.extend(mxcsr(3, offset_of!(ThunkArgs, host_mxcsr)));
        out.extend(mxcsr(2, offset_of!(ThunkArgs, mxcsr)));
        out.extend(arg(true, RSI, offset_of!(ThunkArgs, vec)));
        out.extend(arg(true, R9, offset_of!(ThunkArgs, opmask)));
        out.extend(vector_moves(true, vec));
    }
    out.extend(arg(true, RSI, offset_of!(ThunkArgs, mem)));
    out.extend(arg(true, RDX, offset_of!(ThunkArgs, b)));
    out.extend(arg(true, RCX, offset_of!(ThunkArgs, c)));
    out.extend(arg(true, RAX, offset_of!(ThunkArgs, dst)));
    out.push(0xc3);
    out
}

fn leave_stub(vector: Option<VecState>) -> Vec<u8> {
    let mut out = vec![0x9c, 0x41, 0x59]; // pushfq; pop r9
    out.extend(arg(false, R9, offset_of!(ThunkArgs, flags)));
    out.extend(arg(false, RAX, offset_of!(ThunkArgs, dst)));
    out.extend(arg(false, R8, offset_of!(ThunkArgs, dst2)));
    if let Some(vec) = vector {
        out.extend(mxcsr(3, offset_of!(ThunkArgs, mxcsr_out)));
        out.extend(mem_op(0, 0x8b, false, RAX, RDI, offset_of!(ThunkArgs, mxcsr_out)));
        // and eax, trap_mask; jnz past the stores
        out.extend(mem_op(0, 0x23, false, RAX, RDI, offset_of!(ThunkArgs, trap_mask)));
        let mut stores = arg(true, RSI, offset_of!(ThunkArgs, vec));
        stores.extend(arg(true, R9, offset_of!(ThunkArgs, opmask)));
        stores.extend(vector_moves(false, vec));
        out.extend([0x0f, 0x85]);
        out.extend((stores.len() as u32).to_le_bytes());
        out.extend(stores);
        out.extend(mxcsr(2, offset_of!(ThunkArgs, host_mxcsr)));
        if vec != VecState::Xmm {
            out.extend([0xc5, 0xf8, 0x77]); // vzeroupper
        }
    }
    out.push(0xc3);
    out
}

/// One memfd mapped twice: writable here, executable there.
#[derive(Debug)]
struct Mapping {
    write: *mut u8,
    exec: *const u8,
    len: usize,
}

// SAFETY: a Mapping owns its two mappings; the pool that holds it is behind a lock.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(len: usize) -> std::io::Result<Mapping> {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        let last = std::io::Error::last_os_error;
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"tandem-thunks".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(last());
        }
        // SAFETY: a descriptor just created, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain system call on an owned descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } != 0 {
            return Err(last());
        }
        let map = |prot| {
            // SAFETY: a fresh shared mapping at an address of the kernel's choice.
            let p = unsafe {
                libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd.as_raw_fd(), 0)
            };
            if p == libc::MAP_FAILED { Err(last()) } else { Ok(p.cast::<u8>()) }
        };
        let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
        match map(libc::PROT_READ | libc::PROT_EXEC) {
            Ok(exec) => Ok(Mapping { write, exec, len }),
            Err(e) => {
                // SAFETY: exactly the mapping made above.
                unsafe { libc::munmap(write.cast(), len) };
                Err(e)
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mappings made in `new`, owned by self.
        unsafe {
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.exec.cast_mut().cast(), self.len);
        }
    }
}
