//! Guest physical memory: RAM and ROM regions on vm-memory, their listeners, and one bit of truth
//! per page about writes.
//!
//! Everything that writes guest memory from outside a vCPU goes through vm-memory, whose
//! [`Bitmap`] hook is [`PageBits`]: it feeds the dirty log and tells watchers that a page they
//! watch (translated code) is being written. vCPUs under translation mark through the same object.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
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
    /// Where the first byte is; it changes only while the region is in no map.
    base: AtomicU64,
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
            base: AtomicU64::new(base),
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
        write!(f, "PageBits({:#x})", self.0.base.load(Ordering::Relaxed))
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
        // The bytes have been written; whoever starts a watch after our look at it reads them.
        fence(Ordering::SeqCst);
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let page_end = ((at >> PAGE_BITS) + 1) << PAGE_BITS;
            let n = page_end.min(end) - at;
            if self.is_watched(at) {
                watcher.written(self.0.base.load(Ordering::Relaxed) + at as u64, n);
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
    /// Readable and writable memory of a device, behind a BAR: no part of the machine's RAM.
    Device,
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
    /// Zeroed anonymous memory of `len` bytes (a multiple of 4 KiB) for `gpa`, in no map yet.
    pub fn new(name: &'static str, kind: RegionKind, gpa: u64, len: u64) -> crate::Result<Region> {
        let fail = |why: &str| cannot_add(name, gpa, len, why);
        let page = 1u64 << PAGE_BITS;
        if len == 0
            || !len.is_multiple_of(page)
            || !gpa.is_multiple_of(page)
            || gpa.checked_add(len).is_none()
        {
            return Err(fail("address and length must be multiples of 4 KiB"));
        }
        let size = usize::try_from(len).map_err(|_| fail("too large for this host"))?;
        let mmap = MmapRegionBuilder::new_with_bitmap(size, PageBits::new(gpa, size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| fail(&e.to_string()))?;
        Ok(Region { name, kind, gpa, mmap: Arc::new(mmap) })
    }
    /// The same memory as another kind of region: RAM that becomes write-protected, or back.
    pub fn with_kind(&self, kind: RegionKind) -> Region {
        Region { kind, ..self.clone() }
    }
    /// The same memory at another address, for a region that is in no map: a device's, which
    /// software places.
    pub fn moved(&self, gpa: u64) -> Region {
        self.bits().0.base.store(gpa, Ordering::Relaxed);
        Region { gpa, ..self.clone() }
    }
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
    /// Copies bytes from `offset` on; `false` if they do not all lie in it.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Ok(offset) = usize::try_from(offset) else { return false };
        if offset.checked_add(data.len()).is_none_or(|end| end > self.mmap.size()) {
            return false;
        }
        // SAFETY: as in `load`.
        unsafe {
            let from = self.host_addr().add(offset);
            std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len());
        };
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
    /// A region has gone. When this returns, the vCPU whose bus access caused it reaches it no more;
    /// others do not either once they have left the code they are in.
    fn removed(&self, region: &Region);
}

/// The one table of guest memory.
#[derive(Default)]
pub struct GuestMap {
    regions: RwLock<Vec<Region>>,
    ram: RwLock<Arc<GuestRam>>,
    listeners: RwLock<Vec<Arc<dyn MemoryListener>>>,
    watcher: OnceLock<Arc<dyn WriteWatch>>,
    /// The memory of all regions that ever were in the map: an accelerator may still hold its host
    /// address for a moment after a region has gone.
    kept: Mutex<Vec<Arc<MmapRegion<PageBits>>>>,
}

fn cannot_add(name: &str, gpa: u64, len: u64, why: &str) -> crate::Error {
    crate::Error::new(format!("cannot add {name} memory ({len:#x} bytes at {gpa:#x}): {why}"))
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
        let region = Region::new(name, kind, gpa, len)?;
        self.insert(&region)?;
        Ok(region)
    }

    /// Puts a region into the map, so that guests find it at its address. Any thread, also a vCPU's
    /// that is inside a bus access. Its memory is kept as long as the map lives, even if the region
    /// is removed.
    pub fn insert(&self, region: &Region) -> crate::Result<()> {
        if let Some(w) = self.watcher.get() {
            let _ = region.bits().0.watcher.set(w.clone());
        }
        let (gpa, len) = (region.gpa, region.len());
        let mut regions = self.regions.write().unwrap();
        if let Some(o) = regions.iter().find(|r| r.gpa < gpa + len && gpa < r.gpa + r.len()) {
            let why = format!("it overlaps {}", o.name);
            return Err(cannot_add(region.name, gpa, len, &why));
        }
        let mut kept = self.kept.lock().unwrap();
        if !kept.iter().any(|k| Arc::ptr_eq(k, &region.mmap)) {
            kept.push(region.mmap.clone());
        }
        drop(kept);
        regions.push(region.clone());
        regions.sort_by_key(|r| r.gpa);
        self.follow(&regions);
        drop(regions);
        for l in self.listeners.read().unwrap().iter() {
            l.added(region);
        }
        Ok(())
    }

    /// Takes the region that starts at `gpa` out of the map. Any thread, also a vCPU's that is
    /// inside a bus access.
    pub fn remove(&self, gpa: u64) -> Option<Region> {
        let mut regions = self.regions.write().unwrap();
        let i = regions.iter().position(|r| r.gpa == gpa)?;
        let region = regions.remove(i);
        self.follow(&regions);
        drop(regions);
        for l in self.listeners.read().unwrap().iter() {
            l.removed(&region);
        }
        Some(region)
    }

    /// Makes what devices and loaders see of RAM follow the regions.
    fn follow(&self, regions: &[Region]) {
        let arcs = regions
            .iter()
            .filter(|r| r.kind != RegionKind::Rom)
            .filter_map(|r| GuestRegionMmap::with_arc(r.mmap.clone(), GuestAddress(r.gpa)))
            .map(Arc::new)
            .collect();
        // Fails only if there is no RAM or regions overlap; the latter was checked.
        let ram = GuestRam::from_arc_regions(arcs).unwrap_or_default();
        *self.ram.write().unwrap() = Arc::new(ram);
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

    /// Gives the host pages of RAM back that lie wholly in `[gpa, gpa + len)`; they read as zero
    /// afterwards. What is not RAM is left alone.
    pub fn discard(&self, gpa: u64, len: u64) {
        let page = 1u64 << PAGE_BITS;
        let end = gpa.saturating_add(len) & !(page - 1);
        let Some(start) = gpa.checked_next_multiple_of(page) else { return };
        for r in self.regions.read().unwrap().iter().filter(|r| r.kind == RegionKind::Ram) {
            let (from, to) = (start.max(r.gpa), end.min(r.gpa + r.len()));
            if from >= to {
                continue;
            }
            let (offset, n) = ((from - r.gpa) as usize, (to - from) as usize);
            // SAFETY: the range lies inside the mapping, which r keeps alive. It is private and
            // anonymous, so the pages become zero pages; guest memory is only ever accessed through
            // raw pointers, so no reference sees its bytes change.
            let done =
                unsafe { libc::madvise(r.host_addr().add(offset).cast(), n, libc::MADV_DONTNEED) };
            if done != 0 {
                log::debug!("guest memory at {from:#x} stays: {}", std::io::Error::last_os_error());
                continue;
            }
            r.bits().mark_dirty(offset, n);
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

    /// What devices and loaders may write: RAM, and devices' memory (vm-memory).
    pub fn ram(&self) -> Arc<GuestRam> {
        self.ram.read().unwrap().clone()
    }

    /// Total RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        let regions = self.regions.read().unwrap();
        regions.iter().filter(|r| r.kind == RegionKind::Ram).map(Region::len).sum()
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
    fn discarded_pages_read_as_zero() {
        let m = GuestMap::new();
        m.add("low", RegionKind::Ram, 0, 0x4000).unwrap();
        m.add("rom", RegionKind::Rom, 0x4000, 0x1000).unwrap();
        m.add("high", RegionKind::Ram, 0x5000, 0x1000).unwrap();
        let ram = m.ram();
        for gpa in (0..0x4000).chain(0x5000..0x6000) {
            ram.write_obj(1u8, GuestAddress(gpa)).unwrap();
        }
        let rom = m.find(0x4000).unwrap();
        assert!(rom.load(0, &[1]));
        m.discard(0x1800, 0x4000);
        m.discard(u64::MAX - 10, 100);
        let byte = |gpa| ram.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!((byte(0x1fff), byte(0x2000), byte(0x3fff), byte(0x5000)), (1, 0, 0, 1));
        m.discard(0, u64::MAX);
        assert_eq!((byte(0), byte(0x5fff)), (0, 0));
        // SAFETY: the first byte of a region that lives.
        assert_eq!(unsafe { *rom.host_addr() }, 1);
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

    #[derive(Default)]
    struct Changes(Mutex<Vec<(bool, u64, RegionKind)>>);
    impl MemoryListener for Changes {
        fn added(&self, r: &Region) {
            self.0.lock().unwrap().push((true, r.gpa, r.kind));
        }
        fn removed(&self, r: &Region) {
            self.0.lock().unwrap().push((false, r.gpa, r.kind));
        }
    }

    #[test]
    fn a_device_s_memory_moves_and_is_no_ram() {
        let m = GuestMap::new();
        m.add("ram", RegionKind::Ram, 0, 0x1000).unwrap();
        let seen = Arc::new(Seen(Mutex::default()));
        m.set_watcher(seen.clone());
        let vram = Region::new("vram", RegionKind::Device, 0, 0x2000).unwrap();
        for at in [0x10000, 0x40000] {
            m.insert(&vram.moved(at)).unwrap();
            assert_eq!(m.ram_size(), 0x1000);
            vram.bits().watch(0x1000, true);
            m.ram().write_obj(7u8, GuestAddress(at + 0x1008)).unwrap();
            assert_eq!(seen.0.lock().unwrap().pop(), Some((at + 0x1008, 1)));
            m.remove(at).unwrap();
        }
        let mut b = [0];
        assert!(vram.read(0x1008, &mut b) && b == [7]);
    }

    #[test]
    fn regions_come_and_go_with_their_contents() {
        let (m, seen) = (GuestMap::new(), Arc::new(Changes::default()));
        m.add("a", RegionKind::Ram, 0, 0x1000).unwrap();
        m.subscribe(seen.clone());
        let shadow = Region::new("s", RegionKind::Ram, 0x2000, 0x1000).unwrap();
        m.insert(&shadow).unwrap();
        m.ram().write_obj(7u8, GuestAddress(0x2004)).unwrap();
        assert!(m.insert(&shadow).is_err());
        m.remove(0x2000).unwrap();
        assert!(m.find(0x2004).is_none() && m.ram().write_obj(8u8, GuestAddress(0x2004)).is_err());
        m.insert(&shadow.with_kind(RegionKind::Rom)).unwrap();
        let mut b = [0];
        assert!(m.find(0x2004).unwrap().read(4, &mut b) && b == [7]);
        assert!(m.ram().write_obj(8u8, GuestAddress(0x2004)).is_err(), "devices respect ROM");
        assert!(m.remove(0x5000).is_none());
        use RegionKind::{Ram, Rom};
        let at = 0x2000;
        let want = [(true, 0, Ram), (true, at, Ram), (false, at, Ram), (true, at, Rom)];
        assert_eq!(*seen.0.lock().unwrap(), want);
    }
}
