//! The face that all back ends share: compile a block, run it, link its exits, forget it.

use crate::ir::{Block, VerifyError};
use std::ops::Range;

/// Names runnable code: an address in the arena's executable mapping (JIT), or a handle
/// (interpreter). Zero is "none".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct CodePtr(pub u64);

/// Names exit `index` of the block compiled with `tag`; generated code stores it to
/// [`crate::target::EnvLayout::exit_ref`] when it leaves through an unlinked exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ExitRef(pub u64);

impl ExitRef {
    /// Exit `index` (0–255) of the block with `tag` (56 bits).
    pub const fn new(tag: u64, index: u8) -> ExitRef {
        ExitRef(tag << 8 | index as u64)
    }
    /// No exit.
    pub const NONE: ExitRef = ExitRef(u64::MAX);
    /// The block's tag.
    pub const fn tag(self) -> u64 {
        self.0 >> 8
    }
    /// The exit's index in the block's table.
    pub const fn index(self) -> usize {
        (self.0 & 0xff) as usize
    }
}

/// A compiled block.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Entry that checks mode and code pages first: for the jump cache and the loop.
    pub checked: CodePtr,
    /// Entry that checks the code pages only: for links from other pages in the same mode.
    pub paged: CodePtr,
    /// Entry without a check: for links from the same page in the same mode.
    pub linked: CodePtr,
    /// Everything the block occupies, cold part included (host addresses; empty if none).
    pub range: Range<u64>,
    /// By exit index: where to patch it (opaque to the caller), if it is a `Goto`, or an `Indirect`
    /// that can be bound.
    pub exits: Vec<Option<LinkSite>>,
}

/// An exit's patchable jump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkSite(pub u64);

/// Why a block could not be compiled.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompileError {
    /// The arena is full: flush and try again.
    #[error("the code memory is full")]
    ArenaFull,
    /// The block is too large for one compilation; translate fewer guest instructions.
    #[error("the block is too large")]
    TooLarge,
    /// The block breaks a rule of the IR: a mistake of its maker.
    #[error("malformed block: {0}")]
    Malformed(#[from] VerifyError),
}

/// A way to run IR blocks; shared by all vCPUs of a machine.
pub trait Backend: Send + Sync {
    /// Its name: `x86_64`, `interp`.
    fn name(&self) -> &'static str;
    /// Whether compilers skip instructions without effect whose results nobody uses, so that nobody
    /// needs to remove them before ([`crate::opt::Passes::tidy`]).
    fn skips_dead_code(&self) -> bool {
        false
    }
    /// A compiler for one thread; keeps its allocations between blocks.
    fn compiler(&self) -> Box<dyn Compiler>;
    /// Runs code on `env` until it leaves; returns the leave code.
    ///
    /// # Safety
    /// `env` points to an `Env` made by [`Backend::alloc_env`] and not in use elsewhere; `code` came
    /// from a compiler of this back end and has not been dropped by [`Backend::reset`].
    unsafe fn run(&self, env: *mut u8, code: CodePtr) -> u32;
    /// Makes the exit at `site` jump straight to `to`. Safe while other threads run the code.
    fn link(&self, site: LinkSite, to: CodePtr);
    /// Makes the indirect exit at `site` jump straight to `to` where the guest pc is `pc`. Safe while
    /// other threads run the code, if it is always the same `pc` for a site.
    fn bind(&self, site: LinkSite, pc: u64, to: CodePtr);
    /// Undoes [`Backend::link`] and [`Backend::bind`].
    fn unlink(&self, site: LinkSite);
    /// Makes the entries of a block refuse (see [`crate::target::Runtime::lookup`]) from now on (for
    /// invalidation while other threads may be about to enter).
    fn poison(&self, block: &Compiled);
    /// Drops all code. No thread may be inside [`Backend::run`].
    fn reset(&self);
    /// Bytes of code memory in use and in total.
    fn usage(&self) -> (usize, usize);
    /// Host code of a block as text, one instruction a line, for `-d out_asm` (empty if none).
    fn code_bytes(&self, range: Range<u64>) -> Vec<u8>;
    /// A copy of all code for a child process, which must not share the parent's: the parent goes on
    /// changing it. Made before the fork; the child adopts it, the parent drops it. Nobody may
    /// compile, link or poison between this call and the fork.
    ///
    /// # Errors
    /// There is no memory.
    fn copy(&self) -> std::io::Result<Box<dyn CodeCopy>>;
    /// Memory for an `Env` of the target's size, zeroed and aligned to a page, arranged as this
    /// back end needs (for example with its host stack below).
    fn alloc_env(&self) -> std::io::Result<EnvMem>;
}

/// A copy of all code (see [`Backend::copy`]).
pub trait CodeCopy {
    /// In the child: its code is this copy from now on, at the same addresses.
    ///
    /// # Errors
    /// The kernel refuses; there may be no code then.
    fn adopt(self: Box<Self>) -> std::io::Result<()>;
}

/// Compiles blocks, one at a time.
pub trait Compiler: Send {
    /// Compiles `block`; `tag` becomes part of its [`ExitRef`]s.
    fn compile(&mut self, block: &Block, tag: u64) -> Result<Compiled, CompileError>;
}

/// Owned memory that holds one `Env` (see [`Backend::alloc_env`]).
#[derive(Debug)]
pub struct EnvMem {
    map: *mut u8,
    map_len: usize,
    env: *mut u8,
}

// SAFETY: EnvMem owns its mapping exclusively; the pointers are plain addresses of that mapping.
unsafe impl Send for EnvMem {}

impl EnvMem {
    /// Maps `stack` bytes (plus a guard page below), then `size` bytes for the `Env`.
    pub fn new(stack: usize, size: usize) -> std::io::Result<EnvMem> {
        const PAGE: usize = 4096;
        let stack = stack.next_multiple_of(PAGE) + PAGE;
        let map_len = stack + size.next_multiple_of(PAGE);
        // SAFETY: a fresh anonymous mapping, no address given.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let map = map.cast::<u8>();
        // SAFETY: the first page of the mapping made above; nothing uses it yet.
        unsafe { libc::mprotect(map.cast(), PAGE, libc::PROT_NONE) };
        // SAFETY: stack < map_len.
        let env = unsafe { map.add(stack) };
        Ok(EnvMem { map, map_len, env })
    }
    /// Address of the `Env`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.env
    }
}

impl Drop for EnvMem {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`, owned by self.
        unsafe { libc::munmap(self.map.cast(), self.map_len) };
    }
}
