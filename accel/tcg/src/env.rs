//! `Env`: all state of one vCPU that generated code, helpers and the execution loop share, in one
//! block of memory with a fixed layout.
//!
//! What always holds:
//!
//! * Generated code addresses `Env` by byte offset; [`Core::layout`] and the guest's table of
//!   globals are the only places where offsets are taken.
//! * Only the thread that runs the vCPU touches `Env`, except for the atomics
//!   [`Core::exit_request`] and [`Core::insns_left`] and what [`crate::softmmu`] documents.
//! * `Core` knows no guest architecture; `C` is the guest's processor state.

use crate::softmmu::Tlb;
use std::mem::offset_of;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use tandem_jit::target::{EnvLayout, TlbLayout};

/// Words of the code map (see [`Core::code_map`]); a power of two.
pub const CODE_MAP_LEN: usize = 4096;
/// log2 of the number of jump-cache entries.
pub const JMP_CACHE_BITS: u8 = 14;
/// Number of MMU tables.
pub const MMU_MODES: usize = 3;

/// The part of `Env` that every guest architecture has. Field order puts what generated code
/// touches most within a short displacement.
#[repr(C, align(64))]
pub struct Core {
    /// Non-zero asks the vCPU to leave at the next block boundary. Set by any thread.
    pub exit_request: AtomicU32,
    /// Instructions that may be executed, if they are counted. Only the vCPU's thread writes it.
    pub insns_left: AtomicI64,
    /// Non-zero: a helper raised a guest fault (the guest state says which).
    pub fault: u32,
    /// Guest vector state is in host registers.
    pub vec_live: u8,
    /// Guest x87 state is in the host's unit; only while generated code runs.
    pub x87_live: u8,
    /// [`Core::x87_image`] is newer than the processor's own x87 fields.
    pub x87_saved: u8,
    /// A host pointer waits for its end: [`BOUNCED`], [`CODE_OPEN`] or [`MASKED`].
    pub bounce: u8,
    /// The block that runs is a single instruction restarted after a write to code.
    pub restarting: u8,
    /// No other vCPU is in generated code or a helper.
    pub alone: u8,
    /// The instruction that is restarted goes through a segment that runs over 4 GiB.
    pub wraps: u8,
    /// PAUSEs executed, wrapping.
    pub pauses: u32,
    /// Guest MXCSR.
    pub mxcsr: u32,
    /// Host MXCSR while guest code runs.
    pub host_mxcsr: u32,
    /// Address of the guest's access that the host has refused.
    pub fault_addr: u64,
    /// Host stack pointer while guest code runs.
    pub host_sp: u64,
    /// Host pc of the call or trap whose snapshot is wanted.
    pub host_pc: u64,
    /// The unlinked exit that was taken.
    pub exit_ref: u64,
    /// The vCPU that this `Env` belongs to: a `*mut crate::exec::Vcpu`, valid while code runs.
    pub vcpu: *mut (),
    /// Flushes of all code that the jump cache has followed.
    pub flushes_seen: u64,
    /// Bounce buffer of the pending pointer access, and where it goes back to.
    pub bounce_buf: BounceBuf,
    /// Vector registers.
    pub vec: [[u8; 64]; 32],
    /// Opmask registers.
    pub opmask: [u64; 8],
    /// x87 state as FNSAVE stores it.
    pub x87_image: X87Image,
    /// Where generated code puts an x87 status word.
    pub x87_scratch: u64,
    /// Which code pages are mapped where: word `hash(virtual page)` holds the interned id of the
    /// (virtual page, physical page) pair that is valid now, or 0.
    pub code_map: [u32; CODE_MAP_LEN],
    /// CPU mode word, compared like a code-map word at checked entries: slot `CODE_MAP_LEN`.
    pub mode: u32,
    /// By word of the code map, one bit: it is of a translation that is not global.
    pub code_local: [u64; CODE_MAP_LEN / 64],
    /// Jump cache.
    pub jmp_cache: [JmpEntry; 1 << JMP_CACHE_BITS],
}

/// [`Core::bounce`]: the pointer is to the bounce buffer.
pub const BOUNCED: u8 = 1;
/// [`Core::bounce`]: the pointer is to memory that holds code; `BounceBuf::addr` is its guest
/// physical address.
pub const CODE_OPEN: u8 = 2;
/// [`Core::bounce`]: the pointer is to the bounce buffer, of which a masked store writes some bytes.
pub const MASKED: u8 = 3;

/// The 108 bytes that FNSAVE stores with 32-bit operand size (SDM vol. 1 figure 8-9).
#[repr(C, align(16))]
pub struct X87Image(pub [u8; 108]);

/// Bounce buffer for [`tandem_jit::ir::Op::Ptr`].
#[repr(C, align(64))]
pub struct BounceBuf {
    /// The bytes.
    pub data: [u8; 64],
    /// Guest virtual address; physical if the buffer is not used ([`CODE_OPEN`]).
    pub addr: u64,
    /// Packed access description.
    pub info: u32,
}

/// One entry of the jump cache.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct JmpEntry {
    /// Guest pc. Of an empty entry, one that belongs into another: all 2⁶⁴ are addresses to which code
    /// may jump, so no value stands for none.
    pub pc: u64,
    /// Host code of the block's checked entry.
    pub code: u64,
}

/// Which entry of the jump cache is for `pc`.
pub fn jmp_slot(pc: u64) -> usize {
    (pc ^ pc >> JMP_CACHE_BITS) as usize & ((1 << JMP_CACHE_BITS) - 1)
}

/// The pc of entry `i` when it is empty: 0 belongs into the first entry, 1 into the second.
fn empty_pc(i: usize) -> u64 {
    u64::from(i == 0)
}

/// State block of one vCPU with guest processor state `C`.
#[repr(C, align(64))]
pub struct Env<C> {
    /// Architecture-independent part.
    pub core: Core,
    /// The guest's processor.
    pub cpu: C,
    /// Software TLBs, by MMU index.
    pub tlb: [Tlb; MMU_MODES],
}

impl Core {
    /// Asks the vCPU to leave at the next block boundary.
    pub fn request_exit(&self) {
        self.exit_request.store(1, Ordering::Release);
    }
    /// Empties the jump cache.
    pub fn clear_jump_cache(&mut self) {
        for (i, e) in self.jmp_cache.iter_mut().enumerate() {
            e.pc = empty_pc(i);
        }
    }
    /// Byte offsets for the compiler; `size` is that of the whole `Env`.
    pub fn layout(size: usize) -> EnvLayout {
        EnvLayout {
            size: size as u32,
            exit_request: offset_of!(Core, exit_request) as u32,
            fault: offset_of!(Core, fault) as u32,
            vec_live: offset_of!(Core, vec_live) as u32,
            x87_live: offset_of!(Core, x87_live) as u32,
            x87_saved: offset_of!(Core, x87_saved) as u32,
            x87_image: offset_of!(Core, x87_image) as u32,
            bounce: offset_of!(Core, bounce) as u32,
            mxcsr: offset_of!(Core, mxcsr) as u32,
            host_mxcsr: offset_of!(Core, host_mxcsr) as u32,
            fault_addr: offset_of!(Core, fault_addr) as u32,
            host_sp: offset_of!(Core, host_sp) as u32,
            host_pc: offset_of!(Core, host_pc) as u32,
            exit_ref: offset_of!(Core, exit_ref) as u32,
            vec: offset_of!(Core, vec) as u32,
            opmask: offset_of!(Core, opmask) as u32,
            code_map: offset_of!(Core, code_map) as u32,
            code_map_len: CODE_MAP_LEN as u32,
            jmp_cache: offset_of!(Core, jmp_cache) as u32,
            jmp_cache_bits: JMP_CACHE_BITS,
        }
    }
}

impl<C> Env<C> {
    /// Offsets of the TLB tables for the compiler.
    pub fn tlb_layouts() -> Vec<TlbLayout> {
        (0..MMU_MODES)
            .map(|i| Tlb::layout(offset_of!(Env<C>, tlb) + i * size_of::<Tlb>()))
            .collect()
    }
}

// Generated code looks at both flags at once.
const _: () = assert!(offset_of!(Core, x87_live) == offset_of!(Core, vec_live) + 1);
// The mode word must directly follow the code map: checked entries compare it as one more word.
const _: () = assert!(offset_of!(Core, mode) == offset_of!(Core, code_map) + 4 * CODE_MAP_LEN);

#[test]
fn nothing_is_found_in_an_empty_jump_cache() {
    for i in 0..1 << JMP_CACHE_BITS {
        assert_ne!(jmp_slot(empty_pc(i)), i);
    }
}
