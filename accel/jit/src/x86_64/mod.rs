//! The back end for x86-64 hosts.
//!
//! # Registers
//! RSP is `Env - FRAME` (see `frame`). Up to twelve globals are pinned to host registers; the rest
//! of the fifteen (R11, R14, R15 at least) are scratch. Guest vector register *n* is host vector
//! register *n* while `vec_live` is set, and in `Env` otherwise.
//!
//! # Invariants
//! * At both entries of a block, and at every exit, pinned registers hold their globals and all
//!   other globals are in `Env`. The pc global is in `Env` only when code leaves to Rust.
//! * Between `Put`s and the next point that can observe them (fault, exit, call), a pinned register
//!   may run ahead of its global; at such a point it never does.
//! * EFLAGS and scratch registers carry nothing between blocks.
//! * The entries are 8-byte aligned and begin with an instruction of at least 8 bytes, so that one
//!   atomic store poisons an entry. A block's first byte is the stub that a poisoned entry jumps to.
//! * The displacement of a linkable jump lies within an aligned 8-byte word, so that one atomic
//!   operation links it.
//!
//! # Files
//! `asm` emits; `frame` fixes roles; `thunks` are the shared ways in and out of Rust; `trap` turns
//! signals of generated code into leaves; `alloc` knows where values are; `gen` walks a block and dispatches to
//! `alu`, `shift`, `muldiv`, `flags`, `mem`, `native`, `call` and `exit`; `share` finds accesses that
//! need only one TLB check; `probe` is that check, and what accesses that miss have in common.

mod alloc;
mod alu;
mod asm;
mod call;
mod exit;
mod flags;
mod frame;
mod generate;
mod globals;
mod mem;
mod muldiv;
mod native;
mod probe;
mod share;
mod shift;
mod thunks;
mod trap;
mod width;

use crate::arena::Arena;
use crate::code::{Backend, CodeCopy, CodePtr, Compiled, Compiler, EnvMem, LinkSite};
use crate::snapshot::{self, FLAGS_MASK, SnapLoc};
use crate::target::Target;
use asm::Asm;
use frame::Pins;
use generate::Gen;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use thunks::Thunks;

/// Least room in a chunk for starting a block in it.
const LEAST_ROOM: usize = 4 << 10;

/// What the host processor offers beyond x86-64.
#[derive(Clone, Copy, Debug)]
struct Features {
    bmi1: bool,
    bmi2: bool,
    lzcnt: bool,
    /// PEXT is one micro-operation, not microcode.
    fast_pext: bool,
    /// Legacy vector instructions mix badly with VEX ones unless the upper parts are known clear.
    clear_uppers: bool,
}

impl Features {
    fn detect() -> Features {
        let bmi2 = std::arch::is_x86_feature_detected!("bmi2");
        Features {
            bmi1: std::arch::is_x86_feature_detected!("bmi1"),
            bmi2,
            lzcnt: std::arch::is_x86_feature_detected!("lzcnt"),
            fast_pext: bmi2 && !slow_pext(),
            clear_uppers: !is_amd(),
        }
    }
}

/// Whether the processor is AMD's or Hygon's.
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    vendor.ebx == 0x6874_7541 || vendor.ebx == 0x6f67_7948
}

/// AMD processors before Zen 3 (family 19h) run PEXT in microcode.
fn slow_pext() -> bool {
    let sig = std::arch::x86_64::__cpuid(1).eax;
    let family = (sig >> 8 & 15) + if sig >> 8 & 15 == 15 { sig >> 20 & 0xff } else { 0 };
    is_amd() && family < 0x19
}

/// What both the code and the Rust functions it calls look at.
struct Shared {
    arena: Arena,
    target: Arc<Target>,
    pins: Pins,
    features: Features,
}

struct Inner {
    // First, so that the signal handler forgets the arena before it is unmapped.
    _watch: trap::Registration,
    thunks: Thunks,
    shared: Arc<Shared>,
}

/// Compiles IR to x86-64 machine code and runs it.
pub struct X64Backend {
    inner: Arc<Inner>,
}

impl X64Backend {
    /// A back end for `target` with (about) `arena_bytes` bytes of code memory.
    ///
    /// # Errors
    /// The code memory could not be mapped, or is too small for the target's helpers; the host
    /// lacks POPCNT (x86-64-v2), which every processor since 2008 has.
    pub fn new(target: Arc<Target>, arena_bytes: usize) -> io::Result<Arc<X64Backend>> {
        if !std::arch::is_x86_feature_detected!("popcnt") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the host has no POPCNT"));
        }
        let pins = Pins::new(&target);
        let shared = Arc::new(Shared {
            arena: Arena::new(arena_bytes)?,
            pins,
            target,
            features: Features::detect(),
        });
        let thunks = emit_thunks(&shared)?;
        let (start, len) = shared.arena.rx_range();
        let e = &shared.target.env;
        let _watch = trap::Registration::new(trap::Watched {
            start,
            len: len as u64,
            thunk: thunks.trap,
            host_pc: e.host_pc,
            fault: e.fault,
            fault_addr: e.fault_addr,
            accesses: matches!(shared.target.mem, crate::target::MemModel::Linear { .. }),
        })?;
        Ok(Arc::new(X64Backend { inner: Arc::new(Inner { _watch, thunks, shared }) }))
    }
}

fn emit_thunks(shared: &Arc<Shared>) -> io::Result<Thunks> {
    let input = thunks::Input {
        target: &shared.target,
        pins: &shared.pins,
        writeback: writeback as *const () as usize,
        context: Arc::as_ptr(shared) as usize,
        features: shared.features,
    };
    let arena = &shared.arena;
    let mut a = Asm::default();
    a.start(arena.addr(0));
    let thunks = thunks::build(&mut a, &input);
    let chunks = a.bytes().len().div_ceil(crate::arena::CHUNK);
    let mut cursor = arena
        .span(chunks)
        .ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "code memory too small"))?;
    arena.commit(&mut cursor, a.bytes(), &[0]);
    arena.keep();
    Ok(thunks)
}

/// Called by thunks after a fault: brings the deferred globals and the pc of the snapshot at
/// `host_pc` into `Env`.
extern "C" fn writeback(env: *mut u8, host_pc: u64, shared: *const Shared) {
    // SAFETY: the thunk passes the address of the Shared that its arena belongs to; the back end
    // that owns it outlives every run.
    let shared = unsafe { &*shared };
    let target = &*shared.target;
    let mut values = [(0u8, 0u64); 256];
    let mut n = 0;
    let found = shared.arena.offset(host_pc).and_then(|off| {
        shared.arena.with_block(off, |start, words| {
            snapshot::find(words, (off - start) as u32, |global, loc| {
                let word = |at: i32| {
                    // SAFETY: offsets were made by the compiler and lie in the frame or in Env.
                    unsafe { env.offset(at as isize).cast::<u64>().read_unaligned() }
                };
                let v = match loc {
                    SnapLoc::Const(v) => v,
                    SnapLoc::Word(at) => word(at),
                    SnapLoc::Flags(at) => word(at) & FLAGS_MASK,
                };
                values[n.min(255)] = (global, v);
                n += 1;
            })
        })
    });
    let Some(Some(pc)) = found else {
        log::error!("no snapshot at host pc {host_pc:#x}");
        return;
    };
    let put = |global: u8, v: u64| {
        if let Some(g) = target.globals.get(global as usize) {
            // SAFETY: the target's owner says that this offset is an 8-byte word of Env.
            unsafe { env.add(g.offset as usize).cast::<u64>().write_unaligned(v) };
        }
    };
    // All were read before any is written: one global's old value may be another's new one.
    values[..n.min(256)].iter().for_each(|&(g, v)| put(g, v));
    put(target.pc_global, pc);
}

/// `jmp rel32` from offset `from` to offset `to`.
fn jump_word(from: usize, to: usize) -> u64 {
    let rel = (to as i64 - (from as i64 + 5)) as u32;
    0xcccc_cc00_0000_00e9 | (rel as u64) << 8
}

impl Backend for X64Backend {
    fn name(&self) -> &'static str {
        "x86_64"
    }
    fn skips_dead_code(&self) -> bool {
        true
    }
    fn compiler(&self) -> Box<dyn Compiler> {
        Box::new(Gen::new(self.inner.clone()))
    }
    unsafe fn run(&self, env: *mut u8, code: CodePtr) -> u32 {
        // SAFETY: the enter thunk has this signature and keeps the System V ABI.
        let enter: extern "C" fn(*mut u8, u64) -> u32 =
            unsafe { std::mem::transmute(self.inner.thunks.enter as usize) };
        enter(env, code.0)
    }
    fn link(&self, site: LinkSite, to: CodePtr) {
        let arena = &self.inner.shared.arena;
        let at = site.0 as u32 as usize;
        if let Some(to) = arena.offset(to.0) {
            arena.patch32(at, (to as i64 - (at as i64 + 4)) as u32);
        }
    }
    fn bind(&self, site: LinkSite, pc: u64, to: CodePtr) {
        let arena = &self.inner.shared.arena;
        // See `Gen::bound`: the word in front of the jump.
        let Some(at) = (site.0 as u32 as usize).checked_sub(exit::SITE_JUMP) else { return };
        let [0xe9, d0, d1, d2, d3, rex, modrm, _] = arena.word(at).to_le_bytes() else {
            // Compares with the same pc already.
            return self.link(site, to);
        };
        let stub = at as i64 + 5 + i64::from(i32::from_le_bytes([d0, d1, d2, d3]));
        let key = stub - 8;
        let [k0, k1, k2, k3] = ((key - (at as i64 + 7)) as i32).to_le_bytes();
        arena.patch64(key as usize, pc);
        self.link(site, to);
        arena.patch64(at, u64::from_le_bytes([rex, 0x3b, modrm, k0, k1, k2, k3, 0x90]));
    }
    fn unlink(&self, site: LinkSite) {
        let at = site.0 as u32 as usize;
        let stub = (site.0 >> 32) as usize;
        self.inner.shared.arena.patch32(at, (stub as i64 - (at as i64 + 4)) as u32);
    }
    fn poison(&self, block: &Compiled) {
        let arena = &self.inner.shared.arena;
        let Some(stub) = arena.offset(block.range.start) else { return };
        for entry in [block.checked, block.paged, block.linked] {
            if let Some(at) = arena.offset(entry.0) {
                arena.patch64(at, jump_word(at, stub));
            }
        }
    }
    fn reset(&self) {
        self.inner.shared.arena.reset();
    }
    fn copy(&self) -> io::Result<Box<dyn CodeCopy>> {
        Ok(Box::new(self.inner.shared.arena.copy()?))
    }
    fn usage(&self) -> (usize, usize) {
        self.inner.shared.arena.usage()
    }
    fn code_bytes(&self, range: Range<u64>) -> Vec<u8> {
        let arena = &self.inner.shared.arena;
        arena
            .offset(range.start)
            .map(|off| arena.read(off, (range.end - range.start) as usize))
            .unwrap_or_default()
    }
    fn alloc_env(&self) -> io::Result<EnvMem> {
        EnvMem::new(frame::STACK, self.inner.shared.target.env.size as usize)
    }
}
