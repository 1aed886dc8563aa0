//! Guest memory accesses of helpers and slow paths.
//!
//! Addresses are linear. Every access may cross a page and may hit a device; a fault leaves memory
//! untouched (all pages are checked before the first byte is written).

use super::phys::{self, Ram};
use super::{PAGE_MASK, PAGE_SIZE, Slow, slow};
use crate::env::CODE_MAP_LEN;
use crate::tb;
use crate::x86::Env;
use crate::x86::exception::Exception;
use crate::x86::mode::Mode;
use crate::x86::paging::{self, Access};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// The word of the code map that stands for the virtual page of `addr`.
#[inline]
pub fn code_map_slot(addr: u64) -> usize {
    let page = addr >> super::PAGE_BITS;
    ((page ^ page >> 20) as usize) & (CODE_MAP_LEN - 1)
}

impl Env {
    /// The TLB entry that allows `access` at `addr`, from the TLB or the page tables.
    pub(crate) fn entry(
        &mut self,
        addr: u64,
        access: Access,
        mmu_idx: u8,
    ) -> Result<Slow, Exception> {
        let need = if access == Access::Write { slow::WRITE } else { slow::READ };
        let idx = (mmu_idx as usize).min(self.tlb.len() - 1);
        if access != Access::Fetch
            && let Some(e) = self.tlb[idx].slow_entry(addr)
            && e.phys & need != 0
        {
            return Ok(e);
        }
        self.vcpu().counters.tlb_misses.hit();
        if let Some(space) = &self.vcpu().space {
            // What may be written may be read; addresses are the host's.
            let flags =
                if space.check(addr, access)? { slow::READ | slow::WRITE } else { slow::READ };
            let page = addr & !PAGE_MASK;
            let e = Slow { page, phys: page | flags, addend: 0 };
            self.tlb[idx].fill(e);
            return Ok(e);
        }
        let t = paging::walk(self, addr, access, mmu_idx)?;
        let phys_page = t.phys & !PAGE_MASK;
        let mut flags = 0;
        let mut addend = 0;
        if t.readable {
            flags |= slow::READ;
        }
        if t.writable {
            flags |= slow::WRITE;
        }
        if t.global {
            flags |= slow::GLOBAL;
        }
        let page = addr & !PAGE_MASK;
        match phys::find(&self.vcpu().ram(), phys_page) {
            Some(r) if !self.vcpu().is_apic_page(phys_page) => {
                let off = phys_page - r.gpa;
                addend = (r.host as u64).wrapping_add(off).wrapping_sub(page);
                if r.rom {
                    flags |= slow::IO_WRITE;
                }
                if r.bits.is_watched(off as usize) || r.bits.logging() {
                    flags |= slow::CODE;
                }
            }
            _ => flags |= slow::IO_READ | slow::IO_WRITE,
        }
        if self.cpu.watches_page(page) {
            flags |= slow::WATCH;
        }
        let e = Slow { page, phys: phys_page | flags, addend };
        if access != Access::Fetch {
            self.tlb[idx].fill(e);
        }
        Ok(e)
    }

    /// A read of at most 8 bytes inside one page.
    fn read_piece(&mut self, addr: u64, len: usize, mmu_idx: u8) -> Result<u64, Exception> {
        let e = self.entry(addr, Access::Read, mmu_idx)?;
        if e.phys & slow::WATCH != 0 {
            self.cpu.note_access(addr, len as u64, false);
        }
        let mut buf = [0u8; 8];
        if e.phys & slow::IO_READ != 0 {
            self.vcpu().mmio_read((e.phys & !PAGE_MASK) + (addr & PAGE_MASK), &mut buf[..len]);
            return Ok(u64::from_le_bytes(buf));
        }
        let p = addr.wrapping_add(e.addend) as *const u8;
        // SAFETY: the entry says that [page, page + 4096) is RAM at `addend`; the access stays
        // inside the page, and guest RAM stays mapped while vCPUs run.
        Ok(unsafe { load(p, len) })
    }

    /// A write of at most 8 bytes inside one page, which has been checked.
    fn write_piece(&mut self, addr: u64, v: u64, len: usize, mmu_idx: u8) -> Result<(), Exception> {
        let e = self.entry(addr, Access::Write, mmu_idx)?;
        if e.phys & slow::WATCH != 0 {
            self.cpu.note_access(addr, len as u64, true);
        }
        let gpa = (e.phys & !PAGE_MASK) + (addr & PAGE_MASK);
        if e.phys & slow::IO_WRITE != 0 {
            self.vcpu().mmio_write(gpa, &v.to_le_bytes()[..len]);
            self.follow_memory_map();
            return Ok(());
        }
        let p = addr.wrapping_add(e.addend) as *mut u8;
        // SAFETY: as in `read_piece`; the entry allows writing.
        let store = || unsafe { store(p, v, len) };
        if e.phys & slow::CODE != 0 {
            return tb::write_code(self, gpa, len, store);
        }
        store();
        Ok(())
    }

    fn read_n(&mut self, addr: u64, len: usize, mmu_idx: u8) -> Result<u64, Exception> {
        let room = (PAGE_SIZE - (addr & PAGE_MASK)) as usize;
        if len <= room {
            return self.read_piece(addr, len, mmu_idx);
        }
        self.inside(addr, len as u64)?;
        let lo = self.read_piece(addr, room, mmu_idx)?;
        let hi = self.read_piece(self.wrap(addr, room as u64), len - room, mmu_idx)?;
        Ok(lo | hi << (8 * room))
    }

    fn write_n(&mut self, addr: u64, v: u64, len: usize, mmu_idx: u8) -> Result<(), Exception> {
        let room = (PAGE_SIZE - (addr & PAGE_MASK)) as usize;
        if len <= room {
            return self.write_piece(addr, v, len, mmu_idx);
        }
        self.inside(addr, len as u64)?;
        let next = self.wrap(addr, room as u64);
        self.clear_code(addr, len as u64, mmu_idx)?;
        self.write_piece(addr, v, room, mmu_idx)?;
        self.write_piece(next, v >> (8 * room), len - room, mmu_idx)
    }

    /// Linear address arithmetic: wraps at 4 GiB outside long mode, and for what begins below in
    /// compatibility mode.
    fn wrap(&self, addr: u64, add: u64) -> u64 {
        let a = addr.wrapping_add(add);
        let code64 = Mode::from_bits_retain(self.core.mode).contains(Mode::CODE64);
        let long = self.cpu.efer & 1 << 10 != 0;
        let wide = code64 || long && addr > u64::from(u32::MAX);
        if wide { a } else { a & 0xffff_ffff }
    }

    /// #GP(0) for an access that begins inside the address space and runs over its edge: over the limit
    /// of flat 32-bit segments, or into addresses that are not canonical. No check in line catches these,
    /// and they come before the page faults of what is inside.
    fn inside(&self, addr: u64, len: u64) -> Result<(), Exception> {
        let mode = Mode::from_bits_retain(self.core.mode);
        let over = if mode.contains(Mode::CODE64) {
            !self.canonical(addr.wrapping_add(len.max(1) - 1))
        } else {
            let flat = !mode.contains(Mode::SEGMENTED) && self.core.wraps == 0;
            flat && addr <= u64::from(u32::MAX) && addr.saturating_add(len) > 1 << 32
        };
        if over { Err(Exception { addr: Some(addr), ..Exception::gp(0) }) } else { Ok(()) }
    }

    /// Reads 1, 2, 4 or 8 bytes, zero-extended.
    pub fn read(&mut self, addr: u64, len: usize, mmu_idx: u8) -> Result<u64, Exception> {
        self.read_n(addr, len.min(8), mmu_idx)
    }
    /// Writes the low 1, 2, 4 or 8 bytes of `v`.
    pub fn write(&mut self, addr: u64, v: u64, len: usize, mmu_idx: u8) -> Result<(), Exception> {
        self.write_n(addr, v, len.min(8), mmu_idx)
    }
    /// Reads a byte.
    pub fn read_u8(&mut self, addr: u64, mmu_idx: u8) -> Result<u8, Exception> {
        Ok(self.read_n(addr, 1, mmu_idx)? as u8)
    }
    /// Reads two bytes.
    pub fn read_u16(&mut self, addr: u64, mmu_idx: u8) -> Result<u16, Exception> {
        Ok(self.read_n(addr, 2, mmu_idx)? as u16)
    }
    /// Reads four bytes.
    pub fn read_u32(&mut self, addr: u64, mmu_idx: u8) -> Result<u32, Exception> {
        Ok(self.read_n(addr, 4, mmu_idx)? as u32)
    }
    /// Reads eight bytes.
    pub fn read_u64(&mut self, addr: u64, mmu_idx: u8) -> Result<u64, Exception> {
        self.read_n(addr, 8, mmu_idx)
    }
    /// Writes a byte.
    pub fn write_u8(&mut self, addr: u64, v: u8, mmu_idx: u8) -> Result<(), Exception> {
        self.write_n(addr, v.into(), 1, mmu_idx)
    }
    /// Writes two bytes.
    pub fn write_u16(&mut self, addr: u64, v: u16, mmu_idx: u8) -> Result<(), Exception> {
        self.write_n(addr, v.into(), 2, mmu_idx)
    }
    /// Writes four bytes.
    pub fn write_u32(&mut self, addr: u64, v: u32, mmu_idx: u8) -> Result<(), Exception> {
        self.write_n(addr, v.into(), 4, mmu_idx)
    }
    /// Writes eight bytes.
    pub fn write_u64(&mut self, addr: u64, v: u64, mmu_idx: u8) -> Result<(), Exception> {
        self.write_n(addr, v, 8, mmu_idx)
    }

    /// Reads any number of bytes.
    pub fn read_bytes(&mut self, addr: u64, buf: &mut [u8], mmu_idx: u8) -> Result<(), Exception> {
        self.inside(addr, buf.len() as u64)?;
        let mut at = addr;
        let mut rest = buf;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - (at & PAGE_MASK)) as usize;
            let (piece, more) = rest.split_at_mut(room.min(rest.len()));
            if let Some(p) = self.host_page(at, Access::Read, mmu_idx)? {
                // SAFETY: the pointer is good to the end of the page, and the piece ends there at
                // the latest; `piece` is not guest memory.
                unsafe { std::ptr::copy_nonoverlapping(p, piece.as_mut_ptr(), piece.len()) };
            } else {
                let mut from = at;
                for chunk in piece.chunks_mut(8) {
                    let v = self.read_n(from, chunk.len(), mmu_idx)?;
                    chunk.copy_from_slice(&v.to_le_bytes()[..chunk.len()]);
                    from += chunk.len() as u64;
                }
            }
            at = self.wrap(at, piece.len() as u64);
            rest = more;
        }
        Ok(())
    }

    /// Writes any number of bytes; a fault comes before the first byte is written.
    pub fn write_bytes(&mut self, addr: u64, data: &[u8], mmu_idx: u8) -> Result<(), Exception> {
        self.probe_write(addr, data.len() as u64, mmu_idx)?;
        let mut at = addr;
        let mut rest = data;
        while !rest.is_empty() {
            let room = (PAGE_SIZE - (at & PAGE_MASK)) as usize;
            let (piece, more) = rest.split_at(room.min(rest.len()));
            if let Some(p) = self.host_page(at, Access::Write, mmu_idx)? {
                // SAFETY: as in `read_bytes`, for a page that can be written.
                unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), p, piece.len()) };
            } else {
                let mut to = at;
                for chunk in piece.chunks(8) {
                    let mut b = [0; 8];
                    b[..chunk.len()].copy_from_slice(chunk);
                    self.write_n(to, u64::from_le_bytes(b), chunk.len(), mmu_idx)?;
                    to += chunk.len() as u64;
                }
            }
            at = self.wrap(at, piece.len() as u64);
            rest = more;
        }
        Ok(())
    }

    /// Faults as a write of `len` bytes would, and writes nothing.
    pub fn probe_write(&mut self, addr: u64, len: u64, mmu_idx: u8) -> Result<(), Exception> {
        self.inside(addr, len)?;
        let mut done = 0;
        while done < len {
            let at = self.wrap(addr, done);
            self.entry(at, Access::Write, mmu_idx)?;
            done += PAGE_SIZE - (at & PAGE_MASK);
        }
        Ok(())
    }

    /// Faults as a write of `len` bytes would, and drops code translated from what lies there, so
    /// that the write is not restarted half-way.
    pub fn clear_code(&mut self, addr: u64, len: u64, mmu_idx: u8) -> Result<(), Exception> {
        self.probe_write(addr, len, mmu_idx)?;
        let mut done = 0;
        while done < len {
            let at = self.wrap(addr, done);
            let n = (PAGE_SIZE - (at & PAGE_MASK)).min(len - done);
            let e = self.entry(at, Access::Write, mmu_idx)?;
            if e.phys & slow::CODE != 0 {
                tb::clear_code(self, e.phys & !PAGE_MASK | at & PAGE_MASK, n as usize)?;
            }
            done += n;
        }
        Ok(())
    }

    /// A direct pointer for `access` at `addr`, valid to the end of its page; `None` if the page
    /// needs the slow path (I/O, or a write to watched code).
    pub fn host_page(
        &mut self,
        addr: u64,
        access: Access,
        mmu_idx: u8,
    ) -> Result<Option<*mut u8>, Exception> {
        let e = self.entry(addr, access, mmu_idx)?;
        let bar = match access {
            Access::Write => slow::BAR_WRITE,
            _ => slow::BAR_READ,
        };
        Ok((e.phys & bar == 0).then(|| addr.wrapping_add(e.addend) as *mut u8))
    }

    #[inline]
    fn phys_ptr(&self, gpa: u64, len: u64, write: bool) -> Option<*mut u8> {
        let ram = self.vcpu().ram();
        let r: &Ram = phys::find(&ram, gpa)?;
        let off = gpa - r.gpa;
        (len <= r.len - off && !(write && r.rom)).then(|| (r.host as u64 + off) as *mut u8)
    }

    /// Reads a naturally aligned 8-byte word of physical memory; all ones where there is no RAM.
    #[inline]
    pub fn phys_read_u64(&self, gpa: u64) -> u64 {
        match self.phys_ptr(gpa & !7, 8, false) {
            // SAFETY: `phys_ptr` gives 8 accessible bytes, aligned; other vCPUs access them
            // atomically as well.
            Some(p) => unsafe { AtomicU64::from_ptr(p.cast()).load(Ordering::Acquire) },
            None => u64::MAX,
        }
    }
    /// Reads a naturally aligned 4-byte word of physical memory; all ones where there is no RAM.
    pub fn phys_read_u32(&self, gpa: u64) -> u32 {
        match self.phys_ptr(gpa & !3, 4, false) {
            // SAFETY: as in `phys_read_u64`.
            Some(p) => unsafe { AtomicU32::from_ptr(p.cast()).load(Ordering::Acquire) },
            None => u32::MAX,
        }
    }
    /// Replaces `old` by `new` in an aligned 8-byte word of physical memory; `false` if it has
    /// changed meanwhile. Where there is no RAM, nothing happens and the answer is `true`.
    pub fn phys_cas_u64(&self, gpa: u64, old: u64, new: u64) -> bool {
        let Some(p) = self.phys_ptr(gpa & !7, 8, true) else { return true };
        // SAFETY: as in `phys_read_u64`; the region is writable.
        let done = unsafe { AtomicU64::from_ptr(p.cast()) }
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        self.phys_mark(gpa & !7, 8);
        done
    }
    /// As [`Env::phys_cas_u64`] for 4 bytes.
    pub fn phys_cas_u32(&self, gpa: u64, old: u32, new: u32) -> bool {
        let Some(p) = self.phys_ptr(gpa & !3, 4, true) else { return true };
        // SAFETY: as in `phys_read_u64`; the region is writable.
        let done = unsafe { AtomicU32::from_ptr(p.cast()) }
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        self.phys_mark(gpa & !3, 4);
        done
    }
    /// Writes physical memory (RAM only, elsewhere dropped).
    pub fn phys_write(&self, gpa: u64, data: &[u8]) {
        if let Some(p) = self.phys_ptr(gpa, data.len() as u64, true) {
            // SAFETY: `phys_ptr` gives data.len() writable bytes.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()) };
            self.phys_mark(gpa, data.len());
        }
    }
    /// Tells the dirty log and the code watch of bytes that have been written.
    fn phys_mark(&self, gpa: u64, len: usize) {
        use vm_memory::bitmap::Bitmap;
        // Whoever starts a watch after this look reads what was written before it.
        fence(Ordering::SeqCst);
        if let Some(r) = phys::find(&self.vcpu().ram(), gpa) {
            let off = (gpa - r.gpa) as usize;
            if r.bits.logging() || r.bits.is_watched(off) {
                r.bits.mark_dirty(off, len);
            }
        }
    }

    /// Forgets all translations (CR0.PG, CR4 paging bits, INVPCID all).
    pub fn tlb_flush_all(&mut self) {
        self.vcpu().counters.flushes_all.hit();
        for t in &mut self.tlb {
            t.flush();
        }
        self.core.code_map.fill(0);
        self.core.code_local.fill(0);
    }
    /// Forgets all translations that are not global (CR3 write).
    pub fn tlb_flush_local(&mut self) {
        self.vcpu().counters.flushes_local.hit();
        for t in &mut self.tlb {
            t.flush_local();
        }
        for (i, bits) in self.core.code_local.iter_mut().enumerate() {
            while *bits != 0 {
                self.core.code_map[64 * i + bits.trailing_zeros() as usize] = 0;
                *bits &= *bits - 1;
            }
        }
    }
    /// Enters code page translation `id` into the code map.
    pub(crate) fn enter_code_map(&mut self, slot: usize, id: u32, global: bool) {
        let bit = 1 << (slot & 63);
        let local = &mut self.core.code_local[(slot / 64) & (CODE_MAP_LEN / 64 - 1)];
        if global {
            *local &= !bit;
        } else {
            *local |= bit;
        }
        self.core.code_map[slot & (CODE_MAP_LEN - 1)] = id;
    }
    /// Forgets the translation of one page (INVLPG).
    pub fn tlb_flush_page(&mut self, addr: u64) {
        self.vcpu().counters.flushes_page.hit();
        for t in &mut self.tlb {
            t.flush_page(addr);
        }
        self.core.code_map[code_map_slot(addr)] = 0;
    }
    /// Makes all TLBs of a zeroed `Env` usable.
    pub fn tlb_init(&mut self) {
        for t in &mut self.tlb {
            t.init();
        }
        self.core.clear_jump_cache();
    }
}

/// Loads `len` (1–8) bytes, as one access when `len` is a power of two.
///
/// # Safety
/// `p` points to `len` readable bytes.
unsafe fn load(p: *const u8, len: usize) -> u64 {
    // SAFETY: the caller's promise; unaligned reads are allowed by read_unaligned/volatile copies
    // of the right size (the guest's own data races are the guest's business).
    unsafe {
        match len {
            1 => p.read_volatile().into(),
            2 => p.cast::<u16>().read_unaligned().into(),
            4 => p.cast::<u32>().read_unaligned().into(),
            8 => p.cast::<u64>().read_unaligned(),
            _ => {
                let mut b = [0; 8];
                std::ptr::copy_nonoverlapping(p, b.as_mut_ptr(), len.min(8));
                u64::from_le_bytes(b)
            }
        }
    }
}

/// Stores the low `len` (1–8) bytes of `v`.
///
/// # Safety
/// `p` points to `len` writable bytes.
unsafe fn store(p: *mut u8, v: u64, len: usize) {
    // SAFETY: as in `load`.
    unsafe {
        match len {
            1 => p.write_volatile(v as u8),
            2 => p.cast::<u16>().write_unaligned(v as u16),
            4 => p.cast::<u32>().write_unaligned(v as u32),
            8 => p.cast::<u64>().write_unaligned(v),
            _ => std::ptr::copy_nonoverlapping(v.to_le_bytes().as_ptr(), p, len.min(8)),
        }
    }
}
