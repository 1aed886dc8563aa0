//! Memory accesses of the interpreter: `Env` fields, host pointers, the TLB probe, atomics.
//!
//! Guest memory is shared with other vCPU threads and devices, so aligned accesses are atomic of
//! their size (acquire and release: cheap on x86, and strong enough for a TSO guest elsewhere);
//! unaligned ones may tear, as they may on hardware when they cross a cache line.

use super::exec::State;
use crate::ir::{PTR_ALIGNED, PTR_READ, PTR_WRITE, Width};
use crate::target::MemModel;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Reads `w` bits at `p`, zero-extended.
///
/// # Safety
/// `p` points to that many readable bytes.
pub(super) unsafe fn host_read(p: *const u8, w: Width) -> u64 {
    let aligned = p.addr().is_multiple_of(w.bytes() as usize);
    // SAFETY: readable by the caller's promise; the atomic reads are aligned (checked), and a byte
    // always is.
    unsafe {
        match w {
            Width::W8 => AtomicU8::from_ptr(p.cast_mut()).load(Ordering::Acquire).into(),
            Width::W16 if aligned => {
                AtomicU16::from_ptr(p.cast_mut().cast()).load(Ordering::Acquire).into()
            }
            Width::W32 if aligned => {
                AtomicU32::from_ptr(p.cast_mut().cast()).load(Ordering::Acquire).into()
            }
            Width::W64 if aligned => {
                AtomicU64::from_ptr(p.cast_mut().cast()).load(Ordering::Acquire)
            }
            Width::W16 => p.cast::<u16>().read_unaligned().into(),
            Width::W32 => p.cast::<u32>().read_unaligned().into(),
            Width::W64 => p.cast::<u64>().read_unaligned(),
        }
    }
}

/// Writes the low `w` bits of `v` at `p`.
///
/// # Safety
/// `p` points to that many writable bytes.
pub(super) unsafe fn host_write(p: *mut u8, w: Width, v: u64) {
    let aligned = p.addr().is_multiple_of(w.bytes() as usize);
    // SAFETY: writable by the caller's promise; the atomic writes are aligned (checked), and a byte
    // always is.
    unsafe {
        match w {
            Width::W8 => AtomicU8::from_ptr(p).store(v as u8, Ordering::Release),
            Width::W16 if aligned => {
                AtomicU16::from_ptr(p.cast()).store(v as u16, Ordering::Release);
            }
            Width::W32 if aligned => {
                AtomicU32::from_ptr(p.cast()).store(v as u32, Ordering::Release);
            }
            Width::W64 if aligned => AtomicU64::from_ptr(p.cast()).store(v, Ordering::Release),
            Width::W16 => p.cast::<u16>().write_unaligned(v as u16),
            Width::W32 => p.cast::<u32>().write_unaligned(v as u32),
            Width::W64 => p.cast::<u64>().write_unaligned(v),
        }
    }
}

/// Sequentially consistent compare-and-swap of `w` bits at `p`, at any alignment; returns the old
/// value, zero-extended.
///
/// # Safety
/// `p` points to that many readable and writable bytes.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn cas(p: *mut u8, w: Width, expected: u64, new: u64) -> u64 {
    use std::arch::asm;
    // Rust's atomics demand alignment, which x86 does not; a misaligned LOCK is still atomic.
    let mut old = expected;
    // SAFETY: the instruction accesses exactly the bytes that the caller vouches for, and changes
    // RAX and the flags, both declared.
    unsafe {
        match w {
            Width::W8 => asm!("lock cmpxchg byte ptr [{p}], {new}", p = in(reg) p,
                new = in(reg_byte) new as u8, inout("rax") old),
            Width::W16 => asm!("lock cmpxchg word ptr [{p}], {new:x}", p = in(reg) p,
                new = in(reg) new, inout("rax") old),
            Width::W32 => asm!("lock cmpxchg dword ptr [{p}], {new:e}", p = in(reg) p,
                new = in(reg) new, inout("rax") old),
            Width::W64 => asm!("lock cmpxchg qword ptr [{p}], {new}", p = in(reg) p,
                new = in(reg) new, inout("rax") old),
        }
    }
    old & w.mask()
}

/// As the x86-64 version. On hosts whose atomics need alignment, a misaligned operation is atomic
/// only against other misaligned operations of this process (one lock serves them all).
///
/// # Safety
/// `p` points to that many readable and writable bytes.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn cas(p: *mut u8, w: Width, expected: u64, new: u64) -> u64 {
    use std::sync::{Mutex, PoisonError};
    static MISALIGNED: Mutex<()> = Mutex::new(());
    const SEQ: Ordering = Ordering::SeqCst;
    let expected = expected & w.mask();
    if !p.addr() % w.bytes() as usize == 0 {
        let _guard = MISALIGNED.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: accessible by the caller's promise.
        return unsafe {
            let old = host_read(p, w);
            if old == expected {
                host_write(p, w, new);
            }
            old
        };
    }
    // SAFETY: accessible by the caller's promise, aligned as checked.
    unsafe {
        match w {
            Width::W8 => AtomicU8::from_ptr(p)
                .compare_exchange(expected as u8, new as u8, SEQ, SEQ)
                .unwrap_or_else(|old| old)
                .into(),
            Width::W16 => AtomicU16::from_ptr(p.cast())
                .compare_exchange(expected as u16, new as u16, SEQ, SEQ)
                .unwrap_or_else(|old| old)
                .into(),
            Width::W32 => AtomicU32::from_ptr(p.cast())
                .compare_exchange(expected as u32, new as u32, SEQ, SEQ)
                .unwrap_or_else(|old| old)
                .into(),
            Width::W64 => AtomicU64::from_ptr(p.cast())
                .compare_exchange(expected, new, SEQ, SEQ)
                .unwrap_or_else(|old| old),
        }
    }
}

impl State<'_> {
    /// The `Env` address at `offset`.
    ///
    /// Callers pass offsets of the target's layout or such as the verifier has checked; the bound is
    /// asserted all the same, since a wrong one would corrupt the process.
    fn env_at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset + len <= u64::from(self.target.env.size), "Env offset {offset:#x}");
        // SAFETY: within the Env (asserted), which `State::new`'s caller vouches for.
        unsafe { self.env.add(offset as usize) }
    }

    /// Reads `w` bits of `Env`, zero-extended.
    pub(super) fn env_read(&self, offset: u64, w: Width) -> u64 {
        // SAFETY: `env_at` gives an address within the Env.
        unsafe { host_read(self.env_at(offset, w.bytes().into()), w) }
    }

    /// Writes the low `w` bits of `v` to `Env`.
    pub(super) fn env_write(&self, offset: u64, w: Width, v: u64) {
        // SAFETY: `env_at` gives an address within the Env.
        unsafe { host_write(self.env_at(offset, w.bytes().into()), w, v) }
    }

    /// Address of `len` bytes of `Env` for handing on.
    pub(super) fn env_addr(&self, offset: u32, len: u64) -> u64 {
        self.env_at(offset.into(), len) as u64
    }

    /// Probes the TLB of MMU table `mmu_idx` for an access of `size` bytes with `access` bits;
    /// returns the host address on a hit. Without a software TLB everything goes to the runtime,
    /// which knows how to check an address.
    pub(super) fn probe(&self, mmu_idx: u8, addr: u64, size: u32, access: u8) -> Option<*mut u8> {
        let MemModel::Softmmu { page_bits, tables } = &self.target.mem else { return None };
        let table = tables.get(usize::from(mmu_idx))?;
        let mask = self.env_read(table.mask_off.into(), Width::W64);
        let entry = 8 * (addr >> page_bits & mask);
        // The tag of the last byte against the entry of the first: a page crossing never hits.
        // An aligned access cannot cross; its alignment is part of the tag.
        let (byte, low) = if access & PTR_ALIGNED != 0 {
            (addr, u64::from(size) - 1)
        } else {
            (addr.wrapping_add(u64::from(size) - 1), 0)
        };
        let tag = byte & (!((1 << page_bits) - 1) | low);
        let hit = |tags: u32| self.env_read(u64::from(tags) + entry, Width::W64) == tag;
        if access & PTR_READ != 0 && !hit(table.tag_r) {
            return None;
        }
        if access & PTR_WRITE != 0 && !hit(table.tag_w) {
            return None;
        }
        let addend = self.env_read(u64::from(table.addend) + entry, Width::W64);
        Some(addr.wrapping_add(addend) as *mut u8)
    }
}
