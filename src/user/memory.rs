//! The program's calls about memory: they go to the host, and the translator is told.

use super::host;
use std::sync::{Mutex, MutexGuard};
use tandem_tcg::user::{Process, Prot};

const PAGE: u64 = 4096;

/// The program's break.
#[derive(Clone, Copy, Debug)]
struct Break {
    start: u64,
    end: u64,
}

/// The program's memory.
pub struct Memory(Mutex<Break>);

impl Memory {
    /// With an empty heap at `start`.
    pub fn new(start: u64) -> Memory {
        Memory(Mutex::new(Break { start, end: start }))
    }

    /// Held while the host's mappings and what the translator knows of them differ.
    fn lock(&self) -> MutexGuard<'_, Break> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// mmap(2).
    pub fn map(&self, process: &Process, a: [u64; 6]) -> i64 {
        let _changing = self.lock();
        let prot = Prot::of(a[2] as i32);
        let host = a[2] & !7 | prot.host_bits() as u64;
        // SAFETY: where the program wants memory is its affair: it can only take what it has, or what
        // is free, unless it names our own memory, to which it has access in any case.
        let r = unsafe { host::syscall(libc::SYS_mmap, [a[0], a[1], host, a[3], a[4], a[5]]) };
        if r >= 0 {
            process.mapped(r as u64, a[1], Some(prot));
        }
        r
    }

    /// munmap(2).
    pub fn unmap(&self, process: &Process, addr: u64, len: u64) -> i64 {
        let _changing = self.lock();
        // SAFETY: as for `map`.
        let r = unsafe { host::syscall(libc::SYS_munmap, [addr, len, 0, 0, 0, 0]) };
        if r == 0 {
            process.mapped(addr, len, None);
        }
        r
    }

    /// mprotect(2) and pkey_mprotect(2).
    pub fn protect(&self, process: &Process, nr: i64, a: [u64; 6]) -> i64 {
        let _changing = self.lock();
        let prot = Prot::of(a[2] as i32);
        let host = a[2] & !7 | prot.host_bits() as u64;
        // SAFETY: as for `map`.
        let r = unsafe { host::syscall(nr, [a[0], a[1], host, a[3], a[4], a[5]]) };
        if r == 0 {
            process.mapped(a[0], a[1], Some(prot));
        }
        r
    }

    /// mremap(2).
    pub fn remap(&self, process: &Process, a: [u64; 6]) -> i64 {
        let _changing = self.lock();
        let prot = process.space().prot(a[0]);
        // A page that is protected would be left so at its new place.
        process.rewritten(a[0], a[1]);
        // SAFETY: as for `map`.
        let r = unsafe { host::syscall(libc::SYS_mremap, a) };
        if r >= 0 {
            if a[3] & libc::MREMAP_DONTUNMAP as u64 == 0 {
                process.mapped(a[0], a[1], None);
            }
            process.mapped(r as u64, a[2], prot);
        }
        r
    }

    /// brk(2).
    pub fn set_break(&self, process: &Process, to: u64) -> i64 {
        let mut b = self.lock();
        if to < b.start {
            return b.end as i64;
        }
        let (old, new) = (b.end.next_multiple_of(PAGE), to.next_multiple_of(PAGE));
        if new > old {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let a = [old, new - old, prot as u64, flags as u64, u64::MAX, 0];
            // SAFETY: takes only what is free.
            let r = unsafe { host::syscall(libc::SYS_mmap, a) };
            if r != old as i64 {
                if r >= 0 {
                    // An old kernel that takes the address for a hint.
                    // SAFETY: just mapped, used by nobody.
                    unsafe { host::syscall(libc::SYS_munmap, [r as u64, new - old, 0, 0, 0, 0]) };
                }
                return b.end as i64;
            }
            process.mapped(old, new - old, Some(Prot::READ | Prot::WRITE));
        } else if new < old {
            // SAFETY: the program's own heap, which it gives up.
            unsafe { host::syscall(libc::SYS_munmap, [new, old - new, 0, 0, 0, 0]) };
            process.mapped(new, old - new, None);
        }
        b.end = to;
        to as i64
    }

    /// Does `f` while nobody changes the mappings: a fork takes what it finds.
    pub fn still<R>(&self, f: impl FnOnce() -> R) -> R {
        let _unchanged = self.lock();
        f()
    }
}
