//! What a compiler needs to know of the outside, as data: globals, helpers, the layout of `Env`,
//! how guest memory is reached, and the runtime's entry points.
//!
//! `Env` is the per-vCPU state block that host code addresses directly. The owner of the layout
//! (the translator crate) hands in byte offsets; nothing here knows the Rust type.

use crate::ir::Width;

/// Where a global lives while host code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GlobalClass {
    /// Wants a host register of its own. The number is its priority: lower is pinned first. A back
    /// end with fewer registers treats the rest as `Memory`.
    Pinned(u8),
    /// Lives in `Env`; writes are deferred (see [`crate::ir`]).
    Memory,
}

/// A guest register, 64 bits wide in `Env`.
#[derive(Clone, Copy, Debug)]
pub struct GlobalDesc {
    /// Name for listings.
    pub name: &'static str,
    /// Byte offset of its 8-byte slot in `Env`.
    pub offset: u32,
    /// Where it lives.
    pub class: GlobalClass,
    /// Host register of the x86-64 back end that suits it best (hardware number, e.g. 0 for RAX), so
    /// that shifts and multiplications of the same instruction set need no moves.
    pub x86_hint: Option<u8>,
}

/// What a helper may do. The default is a pure function of its arguments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HelperEffects {
    /// Reads globals in `Env`: all of them are stored before the call.
    pub reads_globals: bool,
    /// Writes globals in `Env`: none is assumed to be cached after the call.
    pub writes_globals: bool,
    /// May raise a guest fault (see [`EnvLayout::fault`]): the call carries a snapshot. In a call to
    /// a helper without `reads_globals` the deferred globals are written back only on a fault.
    pub may_fault: bool,
    /// Reads or writes vector state in `Env`.
    pub vector: bool,
}

/// A function that host code may call: `extern "C" fn(env: *mut Env, a: u64, b: u64, c: u64, d: u64)
/// -> u64` (unused arguments may be missing).
#[derive(Clone, Copy, Debug)]
pub struct HelperDesc {
    /// Name for listings.
    pub name: &'static str,
    /// Address of the function.
    pub addr: usize,
    /// What it may do.
    pub effects: HelperEffects,
}

/// One MMU table: byte offsets in `Env` of its parts. Entry `i` of a table consists of 8-byte words
/// at `tag_r + 8*i`, `tag_w + 8*i` and `addend + 8*i`.
///
/// The probe: `i = (addr >> page_bits) & mask`, where `mask` is the 8-byte word at `mask_off`, or
/// equivalently `i = PEXT(addr, pext_mask)`. An access of `size` bytes at `addr` hits if
/// `(addr + size - 1) & !page_mask == tag`, where for size > 1 the tag comparison uses the *last*
/// byte and the index the *first* byte of the access, so that a page crossing misses. On a hit the
/// host address is `addr + addend`.
#[derive(Clone, Copy, Debug)]
pub struct TlbLayout {
    /// Offset of the 8-byte index mask (number of entries - 1).
    pub mask_off: u32,
    /// Offset of the 8-byte mask for PEXT: index mask shifted left by the page bits.
    pub pext_mask_off: u32,
    /// Offset of the read tags.
    pub tag_r: u32,
    /// Offset of the write tags.
    pub tag_w: u32,
    /// Offset of the addends.
    pub addend: u32,
}

/// How guest memory is reached.
#[derive(Clone, Debug)]
pub enum MemModel {
    /// Through software TLBs, one per MMU index.
    Softmmu {
        /// log2 of the guest page size.
        page_bits: u8,
        /// Tables by MMU index.
        tables: Vec<TlbLayout>,
    },
    /// Guest address + constant is the host address; faults arrive as host signals.
    Linear {
        /// Added to every guest address.
        base: u64,
    },
}

/// Byte offsets in `Env` of the fields that generated code touches itself.
#[derive(Clone, Copy, Debug)]
pub struct EnvLayout {
    /// Size of `Env` proper (everything that offsets may point to).
    pub size: u32,
    /// u32: non-zero asks the vCPU to leave at the next block boundary.
    pub exit_request: u32,
    /// u32: a helper or slow path sets it non-zero to say "a guest fault was raised". The back end
    /// then writes the snapshot back, leaves with [`LEAVE_FAULT`], and clears nothing.
    pub fault: u32,
    /// u8: non-zero while guest vector state is in host registers.
    pub vec_live: u32,
    /// u8, right behind `vec_live`: non-zero while guest x87 state is in the host's unit. On the way
    /// out of generated code it goes to `x87_image`, and the unit is left in its initial state.
    pub x87_live: u32,
    /// u8: non-zero while `x87_image` has guest x87 state that the guest's own fields lack.
    pub x87_saved: u32,
    /// 108 bytes: x87 state as FNSAVE stores it with 32-bit operand size.
    pub x87_image: u32,
    /// u8: non-zero while a `Ptr` bounce buffer waits for its `PtrEnd`.
    pub bounce: u32,
    /// u32: guest MXCSR.
    pub mxcsr: u32,
    /// u32: host MXCSR while guest code runs.
    pub host_mxcsr: u32,
    /// u64: the address that a refused access of linear memory was to.
    pub fault_addr: u32,
    /// u64: host stack pointer while guest code runs.
    pub host_sp: u32,
    /// u64: host pc of the call or fault whose snapshot is wanted.
    pub host_pc: u32,
    /// u64: value that identifies the exit a block left through (see [`crate::code::ExitRef`]).
    pub exit_ref: u32,
    /// 32 vector registers, 64 bytes each, 64-byte aligned.
    pub vec: u32,
    /// 8 opmask registers, 8 bytes each.
    pub opmask: u32,
    /// The code map: `code_map_len` u32 words.
    pub code_map: u32,
    /// Number of words in the code map (a power of two).
    pub code_map_len: u32,
    /// Jump cache: entries of 16 bytes {u64 pc, u64 host code of the checked entry}.
    pub jmp_cache: u32,
    /// log2 of the number of jump cache entries. Index = `(pc ^ pc >> jmp_cache_bits) & (n - 1)`.
    pub jmp_cache_bits: u8,
}

/// How much vector state is kept in host registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VecState {
    /// 16 × 128 bits.
    Xmm,
    /// 16 × 256 bits.
    Ymm,
    /// 32 × 512 bits and 8 opmasks.
    Zmm,
}

/// Addresses of the runtime functions that generated code calls on its slow paths. All are
/// `extern "C"` and get the `Env` pointer first. `info` is [`AccessInfo`].
#[derive(Clone, Copy, Debug)]
pub struct Runtime {
    /// `fn(env, addr: u64, info: u32) -> u64`: a load that missed the TLB; returns the value
    /// zero-extended (the caller extends further). May fault.
    pub load: usize,
    /// `fn(env, addr: u64, info: u32, value: u64)`: a store of the low bits of `value` that missed.
    /// May fault.
    pub store: usize,
    /// `fn(env, addr: u64, info: u32) -> u64`: host pointer for a `Ptr` that missed. May fault.
    pub ptr: usize,
    /// `fn(env)`: writes a bounced `Ptr` back. May fault.
    pub ptr_end: usize,
    /// `fn(env, pc: u64, exit: u64) -> u64`: jump-cache miss: host code of the checked entry of the
    /// block at `pc` in the current mode, or 0 to leave with [`LEAVE_LOOKUP`] (pc global already
    /// set). `exit` is the [`crate::code::ExitRef`] of the exit that asks, which may be bound to what
    /// is found ([`crate::code::Backend::bind`]), or [`crate::code::ExitRef::NONE`].
    pub lookup: usize,
    /// `fn(env)`: brings the guest's x87 state from its own fields to `x87_image`.
    pub x87_image: usize,
    /// `fn(env, pc: u64, exit: u64) -> u64`: an entry of the block at `pc` was refused, because a code
    /// page or the mode has changed; as `lookup`, for no exit, but on 0 the code leaves with [`LEAVE_PAGE`]. What
    /// it returns must be an entry that passes.
    pub refused: usize,
}

/// Packed description of a memory access on a slow path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessInfo(pub u32);

impl AccessInfo {
    /// Size [`crate::ir::access_bytes`]`(size)`, MMU index, access bits ([`crate::ir::PTR_READ`] …).
    pub const fn new(size: u8, mmu_idx: u8, access: u8) -> AccessInfo {
        AccessInfo(size as u32 | (mmu_idx as u32) << 8 | (access as u32) << 16)
    }
    /// Size in bytes.
    pub const fn size(self) -> u32 {
        crate::ir::access_bytes(self.0 as u8)
    }
    /// MMU index.
    pub const fn mmu_idx(self) -> u8 {
        (self.0 >> 8) as u8
    }
    /// Access bits.
    pub const fn access(self) -> u8 {
        (self.0 >> 16) as u8
    }
    /// Width of a scalar access.
    pub const fn width(self) -> Width {
        match self.0 & 0xff {
            0 => Width::W8,
            1 => Width::W16,
            2 => Width::W32,
            _ => Width::W64,
        }
    }
}

/// Leave code: a guest fault is pending; all state is in `Env`.
pub const LEAVE_FAULT: u32 = 0xffff_0000;
/// Leave code: `exit_request` was set; the pc global is the next block's.
pub const LEAVE_REQUEST: u32 = 0xffff_0001;
/// Leave code: an unchained `Goto` exit; `exit_ref` names it, the pc global is the target.
pub const LEAVE_CHAIN: u32 = 0xffff_0002;
/// Leave code: the block lookup wants the execution loop.
pub const LEAVE_LOOKUP: u32 = 0xffff_0003;
/// Leave code: the page check at a checked entry failed; the pc global is the block's.
pub const LEAVE_PAGE: u32 = 0xffff_0004;
/// Leave code: a host trap in generated code; the state is written back, the trap number
/// ([`crate::ir::TRAP_DIVIDE`], 1 for a SIMD exception, or [`TRAP_ACCESS`] with its bits) is in
/// `fault`.
pub const LEAVE_TRAP: u32 = 0xffff_0005;

/// Trap number: the host has refused an access of linear memory (SIGSEGV, SIGBUS); the address is at
/// [`EnvLayout::fault_addr`].
pub const TRAP_ACCESS: u32 = 2;
/// With [`TRAP_ACCESS`]: it was a write.
pub const TRAP_WRITE: u32 = 1 << 8;
/// With [`TRAP_ACCESS`]: something is mapped there, which does not allow it.
pub const TRAP_MAPPED: u32 = 1 << 9;
/// With [`TRAP_ACCESS`]: there is nothing behind the mapping (SIGBUS).
pub const TRAP_BUS: u32 = 1 << 10;
/// With [`TRAP_ACCESS`]: no memory can have this address, which is not known either.
pub const TRAP_NO_ADDRESS: u32 = 1 << 11;
/// With [`TRAP_ACCESS`]: there was a page, as the host's error code says.
pub const TRAP_PRESENT: u32 = 1 << 12;

/// Leave code: a pass-through instruction that this host cannot execute (only the interpreter meets
/// one: on hosts other than x86-64, or if the instruction has no encoding). The pc global is the
/// instruction's; nothing of it has been done.
pub const LEAVE_ILLEGAL: u32 = 0xffff_0006;

/// Everything a compiler needs to know.
#[derive(Clone, Debug)]
pub struct Target {
    /// Globals; [`crate::ir::Global`] indexes this.
    pub globals: Vec<GlobalDesc>,
    /// Index of the pc global (class `Memory`). It is written only by exits and snapshots.
    pub pc_global: u8,
    /// Helpers; [`crate::ir::Helper`] indexes this.
    pub helpers: Vec<HelperDesc>,
    /// `Env` layout.
    pub env: EnvLayout,
    /// Guest memory.
    pub mem: MemModel,
    /// Vector state.
    pub vec: VecState,
    /// Runtime entry points.
    pub runtime: Runtime,
}
