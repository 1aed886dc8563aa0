//! What is where in the memory of a process whose guest addresses are host addresses, and which pages
//! hold code that has been translated.
//!
//! ```text
//!   writable ── code translated from it ──► protected (the host refuses writes)
//!      ▲                                        │ a write: its blocks go
//!      └────────────────────────────────────────┘
//! ```
//! What always holds: a page that the guest may write and that blocks come from is protected, or the
//! blocks are provisional ([`crate::tb`]): compared with memory before each entry.

use crate::softmmu::{PAGE_MASK, PAGE_SIZE};
use crate::tb::CodeWatch;
use crate::x86::exception::Exception;
use crate::x86::paging::{Access, Translation};
use bitflags::bitflags;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

bitflags! {
    /// What a mapping allows.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Prot: u8 {
        /// Reading.
        const READ = 1;
        /// Writing.
        const WRITE = 2;
        /// Execution.
        const EXEC = 4;
    }
}

impl Prot {
    /// Of `PROT_…` bits.
    pub fn of(bits: i32) -> Prot {
        Prot::from_bits_truncate(bits as u8 & 7)
    }
    /// The `PROT_…` bits that the host is asked for: it executes nothing of it, but reads what is to be
    /// translated.
    pub fn host_bits(self) -> i32 {
        let read = if self.is_empty() { 0 } else { libc::PROT_READ };
        let write = if self.contains(Prot::WRITE) { libc::PROT_WRITE } else { 0 };
        read | write
    }
}

/// In the error code of a page fault: there is nothing behind the mapping (SIGBUS).
pub const NO_OBJECT: u32 = 1 << 31;
/// In the error code of a page fault: something is mapped there, which does not allow the access.
pub const REFUSED: u32 = 1 << 30;

/// A run of pages that allow the same.
#[derive(Clone, Copy, Debug)]
struct Area {
    end: u64,
    prot: Prot,
}

/// A page that is or was protected.
#[derive(Clone, Copy, Default, Debug)]
struct Tracked {
    protected: bool,
    /// Instructions that write to it are just being restarted.
    held: u32,
    /// How often it was opened for a write.
    opened: u32,
}

/// After so many writes to a page with code, it is not protected any more.
const PATIENCE: u32 = 64;

/// What a ticket stands for: a page is watched (0), or never will be.
const NEVER: u64 = u64::MAX;

/// The memory of a process.
#[derive(Default)]
pub struct Space {
    /// By first address; they do not overlap.
    areas: RwLock<BTreeMap<u64, Area>>,
    tracked: Mutex<HashMap<u64, Tracked>>,
}

impl Space {
    /// Records that `[start, start + len)` allows `prot` from now on; `None`: nothing is mapped there.
    pub(super) fn set(&self, start: u64, len: u64, prot: Option<Prot>) {
        let end = start.saturating_add(len);
        if start >= end {
            return;
        }
        let mut areas = self.areas.write().unwrap_or_else(PoisonError::into_inner);
        let before = areas.range(..start).next_back().map(|(&s, &a)| (s, a));
        if let Some((s, a)) = before.filter(|(_, a)| a.end > start) {
            areas.insert(s, Area { end: start, ..a });
            if a.end > end {
                areas.insert(end, a);
            }
        }
        let inside: Vec<u64> = areas.range(start..end).map(|(&s, _)| s).collect();
        for s in inside {
            let Some(a) = areas.remove(&s) else { continue };
            if a.end > end {
                areas.insert(end, a);
            }
        }
        let Some(prot) = prot else { return };
        let (mut start, mut end) = (start, end);
        if let Some((&s, a)) = areas.range(..start).next_back()
            && a.end == start
            && a.prot == prot
        {
            start = s;
        }
        if let Some(a) = areas.get(&end).copied().filter(|a| a.prot == prot) {
            areas.remove(&end);
            end = a.end;
        }
        areas.insert(start, Area { end, prot });
    }

    /// What the page of `addr` allows; `None`: nothing is mapped there.
    pub fn prot(&self, addr: u64) -> Option<Prot> {
        let areas = self.areas.read().unwrap_or_else(PoisonError::into_inner);
        let (_, a) = areas.range(..=addr).next_back()?;
        (addr < a.end).then_some(a.prot)
    }

    /// The first run of pages at or above `addr`: start, end, what it allows.
    pub fn next_area(&self, addr: u64) -> Option<(u64, u64, Prot)> {
        let areas = self.areas.read().unwrap_or_else(PoisonError::into_inner);
        let around = areas.range(..=addr).next_back().filter(|(_, a)| a.end > addr);
        let (&start, a) = around.or_else(|| areas.range(addr..).next())?;
        Some((start, a.end, a.prot))
    }

    /// #PF unless `access` is allowed at `addr`; else whether writing is.
    pub(crate) fn check(&self, addr: u64, access: Access) -> Result<bool, Exception> {
        let (mapped, write, user, fetch) = (1, 2, 4, 16);
        let prot = self.prot(addr);
        let (need, error) = match access {
            Access::Write => (Prot::WRITE, write),
            Access::Fetch => (Prot::EXEC, fetch),
            _ => (Prot::READ, 0),
        };
        match prot {
            // What can be written or executed can be read.
            Some(p) if p.contains(need) || (need == Prot::READ && !p.is_empty()) => {
                Ok(p.contains(Prot::WRITE))
            }
            _ => {
                let mapped = if prot.is_some() { mapped | REFUSED } else { 0 };
                Err(Exception::page_fault(addr, user | error | mapped))
            }
        }
    }

    /// The page of `addr`, to fetch code from.
    pub(crate) fn code_page(&self, addr: u64) -> Result<Translation, Exception> {
        let writable = self.check(addr, Access::Fetch)?;
        let phys = addr & !PAGE_MASK;
        // Of a file that has become shorter, nothing is left there.
        if copy(phys, &mut [0]) != 1 {
            return Err(Exception::page_fault(addr, NO_OBJECT | 4));
        }
        Ok(Translation { phys, writable, readable: true, global: false, page_size_log2: 12 })
    }

    /// Reads guest memory; zeros where it is not there any more.
    pub(crate) fn read(addr: u64, buf: &mut [u8]) {
        let done = copy(addr, buf);
        buf[done..].fill(0);
    }

    fn tracked(&self) -> MutexGuard<'_, HashMap<u64, Tracked>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the host refuses writes to the page although the guest may write it.
    pub fn is_protected(&self, page: u64) -> bool {
        self.tracked().get(&page).is_some_and(|t| t.protected)
    }

    /// Whether any page is protected.
    pub fn protects_any(&self) -> Vec<u64> {
        self.tracked().iter().filter(|(_, t)| t.protected).map(|(&p, _)| p).collect()
    }

    /// Until [`Space::release`] the page is not protected: an instruction that writes to it runs.
    pub(crate) fn hold(&self, page: u64) {
        let mut tracked = self.tracked();
        let t = tracked.entry(page).or_default();
        t.held += 1;
        t.opened += 1;
    }
    /// Ends [`Space::hold`].
    pub(crate) fn release(&self, page: u64) {
        if let Some(t) = self.tracked().get_mut(&page) {
            t.held = t.held.saturating_sub(1);
        }
    }

    /// Other memory is in these pages, or it allows other things: they are not protected any more.
    pub(super) fn renewed(&self, start: u64, len: u64) {
        self.tracked().retain(|&p, _| p.wrapping_sub(start) >= len);
    }
}

/// Copies as much of the memory at `addr` as there is; returns how much.
fn copy(addr: u64, buf: &mut [u8]) -> usize {
    let to = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let from = libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: buf.len() };
    // SAFETY: `to` is `buf`; the kernel checks `from`.
    let n = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    n.max(0) as usize
}

fn mprotect(page: u64, prot: Prot) -> bool {
    // SAFETY: the page is the guest's; that it may be written as the guest asked, or less, is what
    // generated code and helpers expect and handle.
    unsafe { libc::mprotect(page as *mut libc::c_void, PAGE_SIZE as usize, prot.host_bits()) == 0 }
}

impl CodeWatch for Space {
    fn watch(&self, ppage: u64, on: bool) -> u64 {
        let page = ppage & !PAGE_MASK;
        let Some(prot) = self.prot(page).filter(|p| p.contains(Prot::WRITE)) else { return 0 };
        let mut tracked = self.tracked();
        let t = tracked.entry(page).or_default();
        if !on {
            if std::mem::take(&mut t.protected) {
                mprotect(page, prot);
            }
            return 0;
        }
        if t.held > 0 || t.opened > PATIENCE {
            return NEVER;
        }
        t.protected = mprotect(page, prot - Prot::WRITE);
        if t.protected { 0 } else { NEVER }
    }

    fn settled(&self, ticket: u64) -> bool {
        // All threads obey the protection at once.
        ticket != NEVER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn areas(s: &Space) -> Vec<(u64, u64, u8)> {
        let mut all = Vec::new();
        let mut at = 0;
        while let Some((start, end, prot)) = s.next_area(at) {
            all.push((start, end, prot.bits()));
            at = end;
        }
        all
    }

    #[test]
    fn areas_are_split_and_joined() {
        let s = Space::default();
        let rw = Prot::READ | Prot::WRITE;
        s.set(0x1000, 0x4000, Some(rw));
        s.set(0x5000, 0x1000, Some(rw));
        assert_eq!(areas(&s), [(0x1000, 0x6000, 3)]);
        s.set(0x2000, 0x1000, Some(Prot::READ));
        assert_eq!(areas(&s), [(0x1000, 0x2000, 3), (0x2000, 0x3000, 1), (0x3000, 0x6000, 3)]);
        s.set(0x1800, 0x2800, None);
        assert_eq!(areas(&s), [(0x1000, 0x1800, 3), (0x4000, 0x6000, 3)]);
        s.set(0x1800, 0x2800, Some(rw));
        assert_eq!(areas(&s), [(0x1000, 0x6000, 3)]);
        assert_eq!((s.prot(0xfff), s.prot(0x1000), s.prot(0x6000)), (None, Some(rw), None));
        s.set(0x2000, 0, None);
        s.set(u64::MAX - 5, 100, None);
        assert_eq!(areas(&s).len(), 1);
    }

    #[test]
    fn faults_say_why() {
        let s = Space::default();
        s.set(0x1000, 0x1000, Some(Prot::READ));
        let error = |addr, access| s.check(addr, access).unwrap_err().error;
        assert_eq!(s.check(0x1fff, Access::Read), Ok(false));
        assert_eq!(error(0x1004, Access::Write), Some(1 | 2 | 4 | REFUSED));
        assert_eq!(error(0x1004, Access::Fetch), Some(1 | 4 | 16 | REFUSED));
        assert_eq!(error(0x2000, Access::Read), Some(4));
        s.set(0x1000, 0x1000, Some(Prot::EXEC));
        assert_eq!(s.check(0x1000, Access::Read), Ok(false));
    }
}
