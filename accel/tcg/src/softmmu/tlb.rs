//! The TLB tables.

use std::mem::offset_of;
use tandem_jit::target::TlbLayout;

/// log2 of the guest page size of TLB entries.
pub const PAGE_BITS: u32 = 12;
/// Guest page size.
pub const PAGE_SIZE: u64 = 1 << PAGE_BITS;
/// Bytes within a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;
/// Most entries of a table.
pub const MAX_ENTRIES: usize = 8192;
/// Entries of a table at first.
const MIN_ENTRIES: usize = 512;
/// Entries that are not global of which a table remembers where they are.
const LOCALS: usize = 256;
/// Entries that were pushed out last and can come back without a walk.
const VICTIMS: usize = 8;
/// A tag that never matches.
pub const NO_TAG: u64 = u64::MAX;

/// What the slow path needs to know of an entry.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slow {
    /// Virtual page address, [`NO_TAG`] if the entry is empty.
    pub page: u64,
    /// Guest physical page address, with [`slow`] flags in the low bits.
    pub phys: u64,
    /// Host address minus virtual address, if RAM or ROM.
    pub addend: u64,
}

/// Flags in [`Slow::phys`].
pub mod slow {
    /// Reads are allowed.
    pub const READ: u64 = 1;
    /// Writes are allowed (the page's dirty bit is set).
    pub const WRITE: u64 = 2;
    /// Not RAM: accesses go to the bus. Writes to ROM too.
    pub const IO_READ: u64 = 4;
    /// Writes go to the bus.
    pub const IO_WRITE: u64 = 8;
    /// Writes must check for translated code.
    pub const CODE: u64 = 16;
    /// The translation is global: survives a CR3 write.
    pub const GLOBAL: u64 = 32;
    /// Holds data that a debug register watches: accesses take the slow path and are noted.
    pub const WATCH: u64 = 64;
    /// What keeps reads off the host pointer.
    pub const BAR_READ: u64 = IO_READ | WATCH;
    /// What keeps writes off the host pointer.
    pub const BAR_WRITE: u64 = IO_WRITE | CODE | WATCH;
}

/// One software TLB: direct-mapped, as many entries in use as the mask says.
///
/// An entry whose accesses need the slow path (I/O, code watch, dirty log) has a tag that never
/// matches, but is found by [`Tlb::slow_entry`]. A page is in the table or among the victims, never
/// both.
#[repr(C, align(64))]
pub struct Tlb {
    mask: u64,
    pext_mask: u64,
    /// Entries that are not global, filled since the last flush.
    locals: u32,
    /// Fills that evicted another page since the last flush.
    evictions: u32,
    /// Where the next victim goes.
    next_victim: u32,
    victims: [Slow; VICTIMS],
    /// Where the first of them are.
    local_at: [u16; LOCALS],
    tag_r: [u64; MAX_ENTRIES],
    tag_w: [u64; MAX_ENTRIES],
    addend: [u64; MAX_ENTRIES],
    slow: [Slow; MAX_ENTRIES],
}

impl Tlb {
    /// Offsets for the compiler, the table being at `base` in `Env`.
    pub fn layout(base: usize) -> TlbLayout {
        let at = |o: usize| (base + o) as u32;
        TlbLayout {
            mask_off: at(offset_of!(Tlb, mask)),
            pext_mask_off: at(offset_of!(Tlb, pext_mask)),
            tag_r: at(offset_of!(Tlb, tag_r)),
            tag_w: at(offset_of!(Tlb, tag_w)),
            addend: at(offset_of!(Tlb, addend)),
        }
    }

    /// Makes a zeroed table usable.
    pub fn init(&mut self) {
        self.resize(MIN_ENTRIES);
    }

    fn resize(&mut self, n: usize) {
        self.flush();
        self.mask = n as u64 - 1;
        self.pext_mask = self.mask << PAGE_BITS;
        self.flush();
    }

    #[inline]
    fn entries(&self) -> usize {
        (self.mask as usize + 1).min(MAX_ENTRIES)
    }

    #[inline]
    fn index(&self, addr: u64) -> usize {
        ((addr >> PAGE_BITS) & self.mask) as usize & (MAX_ENTRIES - 1)
    }

    fn clear(&mut self, i: usize) {
        self.tag_r[i] = NO_TAG;
        self.tag_w[i] = NO_TAG;
        self.slow[i].page = NO_TAG;
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        let n = self.entries();
        self.tag_r[..n].fill(NO_TAG);
        self.tag_w[..n].fill(NO_TAG);
        for s in &mut self.slow[..n] {
            s.page = NO_TAG;
        }
        for v in &mut self.victims {
            v.page = NO_TAG;
        }
        self.locals = 0;
    }

    /// Forgets what is not global (CR3 write with CR4.PGE).
    pub fn flush_local(&mut self) {
        let n = self.entries();
        self.evictions = 0;
        let locals = self.locals as usize;
        self.locals = 0;
        for k in 0..if locals <= LOCALS { locals } else { n } {
            let i = if locals <= LOCALS { self.local_at[k] as usize } else { k };
            if self.slow[i & (MAX_ENTRIES - 1)].phys & slow::GLOBAL == 0 {
                self.clear(i & (MAX_ENTRIES - 1));
            }
        }
        for v in &mut self.victims {
            if v.phys & slow::GLOBAL == 0 {
                v.page = NO_TAG;
            }
        }
    }

    /// Forgets the page of `addr`.
    pub fn flush_page(&mut self, addr: u64) {
        let i = self.index(addr);
        let page = addr & !PAGE_MASK;
        if self.slow[i].page == page {
            self.clear(i);
        }
        for v in self.victims.iter_mut().filter(|v| v.page == page) {
            v.page = NO_TAG;
        }
    }

    /// The entry of `addr`, if present. One that another page has pushed out changes places with that.
    #[inline]
    pub fn slow_entry(&mut self, addr: u64) -> Option<Slow> {
        let (i, page) = (self.index(addr), addr & !PAGE_MASK);
        if self.slow[i].page != page {
            let k = self.victims.iter().position(|v| v.page == page)?;
            let found = std::mem::replace(&mut self.victims[k], self.slow[i]);
            self.place(i, found);
        }
        Some(self.slow[i])
    }

    /// Installs a translation.
    ///
    /// A table in which as many pages have pushed others out as it has entries, within the time
    /// between two flushes, is too small for what the guest is doing: it grows, empty.
    pub fn fill(&mut self, entry: Slow) {
        let mut i = self.index(entry.page);
        let old = self.slow[i].page;
        if old != NO_TAG && old != entry.page {
            self.evictions += 1;
            if self.evictions as usize > self.entries() && self.entries() < MAX_ENTRIES {
                self.evictions = 0;
                self.resize(2 * self.entries());
                i = self.index(entry.page);
            } else {
                self.victims[self.next_victim as usize % VICTIMS] = self.slow[i];
                self.next_victim = self.next_victim.wrapping_add(1);
            }
        }
        self.place(i, entry);
    }

    /// Puts `entry` at index `i`.
    fn place(&mut self, i: usize, entry: Slow) {
        if entry.phys & slow::GLOBAL == 0 {
            if let Some(at) = self.local_at.get_mut(self.locals as usize) {
                *at = i as u16;
            }
            self.locals += 1;
        }
        let p = entry.phys;
        self.slow[i] = entry;
        self.addend[i] = entry.addend;
        let tag = |need, bar| if p & need != 0 && p & bar == 0 { entry.page } else { NO_TAG };
        self.tag_r[i] = tag(slow::READ, slow::BAR_READ);
        self.tag_w[i] = tag(slow::WRITE, slow::BAR_WRITE);
    }

    /// Changes whether writes to physical page `phys` take the slow path, in all entries.
    pub fn watch_phys(&mut self, phys: u64, on: bool) {
        for v in self.victims.iter_mut().filter(|v| v.phys & !PAGE_MASK == phys) {
            v.phys = if on { v.phys | slow::CODE } else { v.phys & !slow::CODE };
        }
        for i in 0..self.entries() {
            let s = &mut self.slow[i];
            if s.page == NO_TAG || s.phys & !PAGE_MASK != phys {
                continue;
            }
            if on {
                s.phys |= slow::CODE;
                self.tag_w[i] = NO_TAG;
            } else {
                s.phys &= !slow::CODE;
                if s.phys & slow::WRITE != 0 && s.phys & slow::BAR_WRITE == 0 {
                    self.tag_w[i] = s.page;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table with its first size.
    fn table() -> Box<Tlb> {
        // SAFETY: `Tlb` consists of integers, for which all zeros are valid.
        let mut t = unsafe { Box::<Tlb>::new_zeroed().assume_init() };
        t.init();
        t
    }

    fn entry(page: u64, flags: u64) -> Slow {
        Slow { page, phys: (page + 0x10_0000) | slow::READ | slow::WRITE | flags, addend: 0x7000 }
    }

    /// Distance of pages that share an index.
    const STRIDE: u64 = MIN_ENTRIES as u64 * PAGE_SIZE;

    #[test]
    fn what_was_pushed_out_comes_back() {
        let mut t = table();
        for k in 0..4 {
            t.fill(entry(k * STRIDE + 0x1000, 0));
        }
        for k in [0, 3, 1, 2, 0] {
            let page = k * STRIDE + 0x1000;
            let e = t.slow_entry(page + 5).expect("is still known");
            assert_eq!((e.page, e.phys & !PAGE_MASK), (page, page + 0x10_0000));
            assert_eq!((t.tag_r[1], t.tag_w[1], t.addend[1]), (page, page, 0x7000));
        }
        assert!(t.slow_entry(4 * STRIDE + 0x1000).is_none());
    }

    #[test]
    fn flushes_reach_victims() {
        let mut t = table();
        for k in 0..3 {
            t.fill(entry(k * STRIDE, if k == 1 { slow::GLOBAL } else { 0 }));
        }
        t.flush_page(0x123);
        assert!(t.slow_entry(0).is_none());
        assert!(t.slow_entry(STRIDE).is_some());
        t.flush_local();
        assert!(t.slow_entry(2 * STRIDE).is_none());
        assert!(t.slow_entry(STRIDE).is_some());
        // Out again, and flushed there.
        t.fill(entry(0, 0));
        t.fill(entry(2 * STRIDE, 0));
        t.flush_local();
        assert!(t.slow_entry(0).is_none() && t.slow_entry(STRIDE).is_some());
        t.flush();
        assert!(t.slow_entry(STRIDE).is_none());
    }

    #[test]
    fn a_victim_is_watched_like_the_rest() {
        let mut t = table();
        t.fill(entry(0, 0));
        t.fill(entry(STRIDE, 0));
        t.watch_phys(0x10_0000, true);
        assert!(t.slow_entry(0).is_some_and(|e| e.phys & slow::CODE != 0));
        assert_eq!((t.tag_r[0], t.tag_w[0]), (0, NO_TAG));
        t.fill(entry(STRIDE, 0));
        t.watch_phys(0x10_0000, false);
        assert!(t.slow_entry(0).is_some_and(|e| e.phys & slow::CODE == 0));
        assert_eq!(t.tag_w[0], 0);
    }
}
