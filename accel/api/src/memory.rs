//! Guest physical memory: RAM and ROM regions on vm-memory, their listeners, and one bit of truth
//! per page about writes.
//!
//! Everything that writes guest memory from outside a vCPU goes through vm-memory, whose
//! [`Bitmap`] hook is [`PageBits`]: it feeds the dirty log and tells watchers that a page they
//! watch (translated code) is being written. vCPUs under translation mark through the same object.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionBuilder,
};

/// log2 of the page size of dirty and watch bits.
pub const PAGE_BITS: u32 = 12;

/// Guest RAM as vm-memory knows it, with our bitmap.
pub type GuestRam = GuestMemoryMmap<PageBits>;

/// Told when a watched page is written by somebody other than the watcher itself.
pub trait WriteWatch: Send + Sync {
    /// Bytes `[gpa, gpa + len)` have been or are being written; the range lies in one page.
    fn written(&self, gpa: u64, len: usize);
}

struct Bits {
    base: u64,
    log: AtomicBool,
    dirty: Box<[AtomicU64]>,
    watched: Box<[AtomicU64]>,
    watcher: OnceLock<Arc<dyn WriteWatch>>,
}

/// Dirty and watch bits of one region. Cloning shares them.
#[derive(Clone)]
pub struct PageBits(Arc<Bits>);

/// A view of [`PageBits`] that starts at an offset; what vm-memory's slices carry.
#[derive(Clone)]
pub struct PageBitsSlice {
    bits: PageBits,
    offset: usize,
}

fn words(len: usize) -> Box<[AtomicU64]> {
    let pages = len.div_ceil(1 << PAGE_BITS);
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

impl PageBits {
    /// Bits for `len` bytes at guest physical address `base`.
    pub fn new(base: u64, len: usize) -> PageBits {
        PageBits(Arc::new(Bits {
            base,
            log: AtomicBool::new(false),
            dirty: words(len),
            watched: words(len),
            watcher: OnceLock::new(),
        }))
    }
    fn bit(words: &[AtomicU64], page: usize) -> Option<(&AtomicU64, u64)> {
        words.get(page / 64).map(|w| (w, 1 << (page % 64)))
    }
    /// Whether the page at byte `offset` of the region is watched.
    pub fn is_watched(&self, offset: usize) -> bool {
        Self::bit(&self.0.watched, offset >> PAGE_BITS)
            .is_some_and(|(w, m)| w.load(Ordering::Acquire) & m != 0)
    }
    /// Starts or stops watching the page at byte `offset`.
    pub fn watch(&self, offset: usize, on: bool) {
        if let Some((w, m)) = Self::bit(&self.0.watched, offset >> PAGE_BITS) {
            if on {
                w.fetch_or(m, Ordering::AcqRel);
            } else {
                w.fetch_and(!m, Ordering::AcqRel);
            }
        }
    }
    /// Whether the dirty log is on.
    pub fn logging(&self) -> bool {
        self.0.log.load(Ordering::Relaxed)
    }
    /// Turns the dirty log on (all clean) or off.
    pub fn set_logging(&self, on: bool) {
        for w in &self.0.dirty {
            w.store(0, Ordering::Relaxed);
        }
        self.0.log.store(on, Ordering::Release);
    }
    /// Marks bytes dirty without telling the watcher: for a writer that is the watcher.
    pub fn mark_quiet(&self, offset: usize, len: usize) {
        if !self.logging() || len == 0 {
            return;
        }
        for page in offset >> PAGE_BITS..=(offset + len - 1) >> PAGE_BITS {
            if let Some((w, m)) = Self::bit(&self.0.dirty, page) {
                w.fetch_or(m, Ordering::AcqRel);
            }
        }
    }
    /// Takes and clears the dirty words: bit `n` of word `i` is page `64 * i + n` of the region.
    pub fn take_dirty(&self) -> Vec<u64> {
        self.0.dirty.iter().map(|w| w.swap(0, Ordering::AcqRel)).collect()
    }
}

impl fmt::Debug for PageBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageBits({:#x})", self.0.base)
    }
}

impl fmt::Debug for PageBitsSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.bits, self.offset)
    }
}

impl WithBitmapSlice<'_> for PageBits {
    type S = PageBitsSlice;
}

impl Bitmap for PageBits {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        self.mark_quiet(offset, len);
        let Some(watcher) = self.0.watcher.get() else { return };
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let page_end = ((at >> PAGE_BITS) + 1) << PAGE_BITS;
            let n = page_end.min(end) - at;
            if self.is_watched(at) {
                watcher.written(self.0.base + at as u64, n);
            }
            at += n;
        }
    }
    fn dirty_at(&self, offset: usize) -> bool {
        Self::bit(&self.0.dirty, offset >> PAGE_BITS)
            .is_some_and(|(w, m)| w.load(Ordering::Acquire) & m != 0)
    }
    fn slice_at(&self, offset: usize) -> PageBitsSlice {
        PageBitsSlice { bits: self.clone(), offset }
    }
}

impl WithBitmapSlice<'_> for PageBitsSlice {
    type S = PageBitsSlice;
}

impl BitmapSlice for PageBitsSlice {}

impl Bitmap for PageBitsSlice {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bits.mark_dirty(self.offset + offset, len);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.bits.dirty_at(self.offset + offset)
    }
    fn slice_at(&self, offset: usize) -> PageBitsSlice {
        PageBitsSlice { bits: self.bits.clone(), offset: self.offset + offset }
    }
}

/// What a region of guest memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegionKind {
    /// Readable and writable.
    Ram,
    /// Guest writes go to the I/O bus (and usually nowhere).
    Rom,
}

/// A contiguous piece of guest physical memory backed by host memory.
#[derive(Clone)]
pub struct Region {
    /// Name for listings.
    pub name: &'static str,
    /// What it is.
    pub kind: RegionKind,
    /// First guest physical address.
    pub gpa: u64,
    mmap: Arc<MmapRegion<PageBits>>,
}

impl Region {
    /// Length in bytes, a multiple of 4 KiB.
    pub fn len(&self) -> u64 {
        self.mmap.size() as u64
    }
    /// Never: a region has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }
    /// Host address of the first byte. Valid while the [`GuestMap`] lives.
    pub fn host_addr(&self) -> *mut u8 {
        self.mmap.as_ptr()
    }
    /// Dirty and watch bits.
    pub fn bits(&self) -> &PageBits {
        self.mmap.bitmap()
    }
    /// Writes `data` at byte `offset`, for loaders of ROM contents; `false` if it does not fit.
    pub fn load(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        if offset.checked_add(data.len()).is_none_or(|end| end > self.mmap.size()) {
            return false;
        }
        // SAFETY: the range lies inside the mapping, which self keeps alive; guest memory is only
        // ever accessed through raw pointers, so no reference aliases it.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.host_addr().add(offset), data.len())
        };
        self.bits().mark_dirty(offset, data.len());
        true
    }
    /// Whether `gpa` lies in it.
    pub fn contains(&self, gpa: u64) -> bool {
        gpa >= self.gpa && gpa - self.gpa < self.len()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {:#x}+{:#x}", self.name, self.kind, self.gpa, self.len())
    }
}

/// Follows changes of the guest memory map (KVM: memslots; TCG: TLBs and TBs).
pub trait MemoryListener: Send + Sync {
    /// A region appeared.
    fn added(&self, region: &Region);
    /// A region is about to disappear; no vCPU may reach it when this returns.
    fn removed(&self, region: &Region);
}

/// The one table of guest memory.
#[derive(Default)]
pub struct GuestMap {
    regions: RwLock<Vec<Region>>,
    ram: RwLock<Arc<GuestRam>>,
    listeners: RwLock<Vec<Arc<dyn MemoryListener>>>,
    watcher: OnceLock<Arc<dyn WriteWatch>>,
}

impl GuestMap {
    /// An empty map.
    pub fn new() -> Arc<GuestMap> {
        Arc::new(GuestMap::default())
    }

    /// Adds zeroed anonymous memory of `len` bytes (a multiple of 4 KiB) at `gpa`.
    pub fn add(
        &self,
        name: &'static str,
        kind: RegionKind,
        gpa: u64,
        len: u64,
    ) -> crate::Result<Region> {
        let fail = |why: String| {
            crate::Error::new(format!(
                "cannot add {name} memory ({len:#x} bytes at {gpa:#x}): {why}"
            ))
        };
        let page = 1u64 << PAGE_BITS;
        if len == 0 || len % page != 0 || gpa % page != 0 || gpa.checked_add(len).is_none() {
            return Err(fail("address and length must be multiples of 4 KiB".into()));
        }
        let size = usize::try_from(len).map_err(|_| fail("too large for this host".into()))?;
        let mmap = MmapRegionBuilder::new_with_bitmap(size, PageBits::new(gpa, size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| fail(e.to_string()))?;
        let region = Region { name, kind, gpa, mmap: Arc::new(mmap) };
        if let Some(w) = self.watcher.get() {
            let _ = region.bits().0.watcher.set(w.clone());
        }
        let mut regions = self.regions.write().unwrap();
        if let Some(o) = regions.iter().find(|r| r.gpa < gpa + len && gpa < r.gpa + r.len()) {
            return Err(fail(format!("it overlaps {}", o.name)));
        }
        regions.push(region.clone());
        regions.sort_by_key(|r| r.gpa);
        if kind == RegionKind::Ram {
            let arcs = regions
                .iter()
                .filter(|r| r.kind == RegionKind::Ram)
                .filter_map(|r| GuestRegionMmap::with_arc(r.mmap.clone(), GuestAddress(r.gpa)))
                .map(Arc::new)
                .collect();
            let ram = GuestRam::from_arc_regions(arcs).map_err(|e| fail(e.to_string()))?;
            *self.ram.write().unwrap() = Arc::new(ram);
        }
        drop(regions);
        for l in self.listeners.read().unwrap().iter() {
            l.added(&region);
        }
        Ok(region)
    }

    /// Subscribes `l`; it is told of all present regions at once.
    pub fn subscribe(&self, l: Arc<dyn MemoryListener>) {
        for r in self.regions() {
            l.added(&r);
        }
        self.listeners.write().unwrap().push(l);
    }

    /// Installs the watcher of written code pages, for all present and later regions' bits. At most
    /// one per machine (the accelerator).
    pub fn set_watcher(&self, w: Arc<dyn WriteWatch>) {
        if self.watcher.set(w.clone()).is_ok() {
            for r in self.regions.read().unwrap().iter() {
                let _ = r.bits().0.watcher.set(w.clone());
            }
        }
    }

    /// All regions in address order.
    pub fn regions(&self) -> Vec<Region> {
        self.regions.read().unwrap().clone()
    }

    /// The region at `gpa`.
    pub fn find(&self, gpa: u64) -> Option<Region> {
        self.regions.read().unwrap().iter().find(|r| r.contains(gpa)).cloned()
    }

    /// RAM for devices and loaders (vm-memory).
    pub fn ram(&self) -> Arc<GuestRam> {
        self.ram.read().unwrap().clone()
    }

    /// Total RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        use vm_memory::GuestMemoryBackend;
        self.ram().iter().map(|r| r.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use vm_memory::Bytes;

    struct Seen(Mutex<Vec<(u64, usize)>>);
    impl WriteWatch for Seen {
        fn written(&self, gpa: u64, len: usize) {
            self.0.lock().unwrap().push((gpa, len));
        }
    }

    #[test]
    fn writes_reach_log_and_watcher() {
        let m = GuestMap::new();
        let r = m.add("ram", RegionKind::Ram, 0x10000, 0x4000).unwrap();
        let seen = Arc::new(Seen(Mutex::default()));
        m.set_watcher(seen.clone());
        r.bits().watch(0x1000, true);
        r.bits().set_logging(true);
        m.ram().write_slice(&[1; 0x20], GuestAddress(0x10ff0)).unwrap();
        assert_eq!(*seen.0.lock().unwrap(), [(0x11000, 0x10)]);
        assert_eq!(r.bits().take_dirty(), [0b11]);
        assert_eq!(r.bits().take_dirty(), [0]);
    }

    #[test]
    fn overlapping_or_odd_regions_are_refused() {
        let m = GuestMap::new();
        m.add("a", RegionKind::Ram, 0, 0x2000).unwrap();
        assert!(m.add("b", RegionKind::Rom, 0x1000, 0x1000).is_err());
        assert!(m.add("c", RegionKind::Ram, 0x2000, 0x800).is_err());
        assert!(m.add("d", RegionKind::Rom, 0x2000, 0x1000).is_ok());
        assert_eq!(m.ram_size(), 0x2000);
    }
}
