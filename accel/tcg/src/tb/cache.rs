//! The table of translation blocks of a machine, shared by its vCPUs.
//!
//! A vCPU stores to guest memory without a look here until it has learnt that the page holds code
//! ([`CodeWatch`]). A block made before all vCPUs know is *provisional*: its bytes are kept and
//! compared with memory before each entry, and nothing links to it, so that it never outlives what
//! it was made from. The first comparison after all know makes it an ordinary block.

use crate::perfmap::PerfMap;
use crate::softmmu::PAGE_MASK;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use tandem_accel::memory::WriteWatch;
use tandem_jit::code::{Backend, CodeCopy, CodePtr, Compiled, ExitRef};
use tandem_jit::ir::{Block, Exit, ExitHint, ExitKind};

/// What a translation depends on besides its code bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TbKey {
    /// Instruction pointer, relative to the code segment.
    pub rip: u64,
    /// Code segment base.
    pub cs_base: u64,
    /// CPU mode word.
    pub mode: u32,
}

impl TbKey {
    /// Linear page of the first byte.
    fn page(&self) -> u64 {
        self.cs_base.wrapping_add(self.rip) & !PAGE_MASK
    }
}

/// A run of guest physical code bytes inside one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes, not crossing the page.
    pub len: u32,
}

/// Where an exit leads.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// To a guest pc; `same_page`: on the block's first page.
    To { pc: u64, same_page: bool },
    /// To what a register says. `near`: in the same mode. Once bound it is so to one `pc` for ever,
    /// but a jump there only while `linked`.
    Indirect { near: bool, bound: Option<u64>, linked: bool },
    /// To the execution loop.
    Out,
}

impl Way {
    fn of(e: &Exit) -> Way {
        match e.kind {
            ExitKind::Goto { pc, same_page } => Way::To { pc, same_page },
            ExitKind::Indirect => {
                let near = matches!(e.hint, ExitHint::Call { .. } | ExitHint::Ret);
                Way::Indirect { near, bound: None, linked: false }
            }
            ExitKind::Leave { .. } => Way::Out,
        }
    }
}

/// A translation block.
pub struct Tb {
    /// Identity, with `phys`.
    pub key: TbKey,
    /// Physical address of the first byte.
    pub phys: u64,
    /// Virtual and physical page of the second code page, if the block has one.
    pub page2: Option<(u64, u64)>,
    /// Generated code.
    pub compiled: Compiled,
    /// Code bytes by physical address.
    pub ranges: Vec<Range>,
    /// The bytes of `ranges` one after the other, while the block is provisional.
    code: Option<Box<[u8]>>,
    /// By exit.
    exits: Vec<Way>,
    /// Guest instructions.
    pub insns: u32,
    /// Exits of other blocks that jump here: (tag, exit index).
    incoming: Vec<ExitRef>,
    valid: bool,
}

/// A block as a vCPU needs it to enter.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Tag of the block.
    pub tag: u64,
    /// Entry that checks mode and pages.
    pub checked: CodePtr,
    /// Entry that checks the pages.
    pub paged: CodePtr,
    /// Entry that checks nothing.
    pub linked: CodePtr,
    /// Second code page: virtual, physical.
    pub page2: Option<(u64, u64)>,
    /// May be entered once, now; to be confirmed ([`TbCache::confirm`]) before the next time.
    pub provisional: bool,
}

impl Found {
    /// The entry for a jump in the same mode, which comes from the same page or not. That page is
    /// known to be mapped as it was; a second one needs its check.
    fn entry(&self, same_page: bool) -> CodePtr {
        if same_page && self.page2.is_none() { self.linked } else { self.paged }
    }
}

/// Makes vCPUs notice their stores to pages that hold code.
pub trait CodeWatch: Send + Sync {
    /// Starts or stops the watch of a physical page. The ticket is for [`CodeWatch::settled`].
    fn watch(&self, ppage: u64, on: bool) -> u64;
    /// Whether all vCPUs follow what the ticket is for. The stores they made before are visible to
    /// the caller then.
    fn settled(&self, ticket: u64) -> bool;
}

/// What is known of a page before its bytes are read for a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watched {
    /// Writes seen so far.
    writes: u64,
    /// Ticket of the watch.
    ticket: u64,
}

/// A compiled block on its way into the table.
pub struct NewTb {
    /// Identity, with `phys`.
    pub key: TbKey,
    /// Physical address of the first byte.
    pub phys: u64,
    /// From [`TbCache::reserve`].
    pub tag: u64,
    /// Virtual and physical page of the second code page, if the block has one.
    pub page2: Option<(u64, u64)>,
    /// Code bytes by physical address.
    pub ranges: Vec<Range>,
    /// The bytes, if the watch of a page was not settled before they were read.
    pub code: Option<Box<[u8]>>,
    /// Guest instructions.
    pub insns: u32,
    /// Generated code.
    pub compiled: Compiled,
}

/// Blocks on one physical page.
#[derive(Default)]
struct Page {
    tags: Vec<u64>,
    /// 64-byte lines that contain code bytes of some block.
    lines: u64,
    /// Ticket of the watch.
    ticket: u64,
    /// Number of writes seen while watched; a translation made across one is thrown away.
    writes: u64,
}

#[derive(Default)]
struct Inner {
    /// By tag minus `first_tag`; none, or beyond the end, for tags that are only reserved.
    tbs: Vec<Option<Box<Tb>>>,
    /// Tag of `tbs[0]`: tags are never reused, so that a stale exit reference finds nothing.
    first_tag: u64,
    pages: WordMap<u64, Page>,
    /// Most writes that a page had seen when its watch ended: a later watch of it counts on from
    /// there, so that a translation from before is not taken for one of the new watch.
    unwatched: u64,
    /// Interned (virtual page, physical page) pairs for the code map; ids start at 1.
    page_ids: WordMap<(u64, u64), u32>,
}

/// Statistics of the translator.
#[derive(Default, Debug)]
pub struct Counters {
    /// Blocks translated.
    pub translations: AtomicU64,
    /// Guest instructions translated.
    pub insns: AtomicU64,
    /// Blocks invalidated because their code was written.
    pub invalidations: AtomicU64,
    /// Exits linked.
    pub links: AtomicU64,
    /// Flushes of all code.
    pub flushes: AtomicU64,
}

/// A hasher for keys of a few words that the guest has no interest in colliding: it would only slow
/// itself down.
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        // The table takes its bucket from the low bits and its tag from the high ones.
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b.into()));
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(v.into());
    }
    fn write_u64(&mut self, v: u64) {
        // Multiplication by 2^64 / golden ratio spreads the bits upwards.
        self.0 = (self.0.rotate_left(23) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// Blocks that there is room for from the beginning: a table that grows is moved.
const BLOCKS: usize = 10_000;

type WordMap<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;

/// The table.
pub struct TbCache {
    /// Runs and links code.
    pub backend: Arc<dyn Backend>,
    /// Statistics.
    pub counters: Counters,
    table: RwLock<WordMap<(TbKey, u64), Found>>,
    inner: Mutex<Inner>,
    /// The tag that is reserved next.
    next_tag: AtomicU64,
    perf_map: Option<PerfMap>,
    watch: Arc<dyn CodeWatch>,
}

fn line_mask(r: &Range) -> u64 {
    let first = (r.gpa & PAGE_MASK) >> 6;
    let last = ((r.gpa & PAGE_MASK) + u64::from(r.len.max(1)) - 1).min(PAGE_MASK) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

impl TbCache {
    /// An empty table over `backend`; `watch` makes vCPUs notice writes to the pages with code.
    pub fn new(
        backend: Arc<dyn Backend>,
        perf_map: Option<PerfMap>,
        watch: Arc<dyn CodeWatch>,
    ) -> Arc<TbCache> {
        Arc::new(TbCache {
            backend,
            counters: Counters::default(),
            table: RwLock::new(WordMap::with_capacity_and_hasher(BLOCKS, Default::default())),
            inner: Mutex::default(),
            next_tag: AtomicU64::new(0),
            perf_map,
            watch,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The valid block with this identity.
    pub fn find(&self, key: TbKey, phys: u64) -> Option<Found> {
        self.table.read().unwrap().get(&(key, phys)).copied()
    }

    /// The code-map id of a virtual page that maps to a physical page.
    pub fn page_id(&self, vpage: u64, ppage: u64) -> u32 {
        let mut inner = self.lock();
        let next = inner.page_ids.len() as u32 + 1;
        *inner.page_ids.entry((vpage, ppage)).or_insert(next)
    }

    /// Enters a compiled block; `block` is what it was compiled from, and `pages` are its physical
    /// pages with what [`TbCache::watch_page`] said of them. `None` if one of them has been written
    /// since: translate again.
    pub fn insert(
        &self,
        new: NewTb,
        block: &Block,
        pages: impl IntoIterator<Item = (u64, Watched)>,
    ) -> Option<Found> {
        let exits = block.exits.iter().map(Way::of).collect();
        let NewTb { key, phys, tag, page2, ranges, code, insns, compiled } = new;
        let Compiled { checked, paged, linked, .. } = compiled;
        let found = Found { tag, checked, paged, linked, page2, provisional: code.is_some() };
        let mut inner = self.lock();
        let written =
            |(p, w): (_, Watched)| inner.pages.get(&p).is_none_or(|x| x.writes != w.writes);
        if pages.into_iter().any(written) {
            return None;
        }
        for r in &ranges {
            let p = inner.pages.entry(r.gpa & !PAGE_MASK).or_default();
            p.lines |= line_mask(r);
            if p.tags.last() != Some(&tag) {
                p.tags.push(tag);
            }
        }
        if let Some(map) = &self.perf_map {
            map.block(&compiled.range, key.rip, (key.mode & 3) as u8);
        }
        let incoming = Vec::new();
        let tb =
            Tb { key, phys, page2, compiled, ranges, code, exits, insns, incoming, valid: true };
        // A flush since the reservation has dropped the tag, and the code with it.
        let slot = tag.checked_sub(inner.first_tag)? as usize;
        if inner.tbs.len() <= slot {
            inner.tbs.resize_with(slot + 1, || None);
        }
        inner.tbs[slot] = Some(Box::new(tb));
        self.counters.translations.fetch_add(1, Ordering::Relaxed);
        self.counters.insns.fetch_add(insns.into(), Ordering::Relaxed);
        self.table.write().unwrap().insert((key, phys), found);
        Some(found)
    }

    /// Looks whether a provisional block is still what memory holds: `same` compares bytes with those
    /// at a physical address. The block may then be entered as the answer says; `None`: it is gone.
    pub fn confirm(&self, found: Found, same: impl Fn(u64, &[u8]) -> bool) -> Option<Found> {
        let mut inner = self.lock();
        let tb = inner.get(found.tag)?;
        let Some(code) = &tb.code else { return Some(Found { provisional: false, ..found }) };
        // Asked before the bytes are compared: what they hold then, only noticed writes change.
        let pages = tb.ranges.iter().map(|r| r.gpa & !PAGE_MASK);
        let tickets = pages.filter_map(|p| inner.pages.get(&p)).map(|p| p.ticket);
        let settled = tickets.max().is_none_or(|t| self.watch.settled(t));
        let mut rest = &code[..];
        let unchanged = tb.ranges.iter().all(|r| {
            let (piece, more) = rest.split_at(rest.len().min(r.len as usize));
            rest = more;
            same(r.gpa, piece)
        });
        if !unchanged {
            self.drop_block(&mut inner, found.tag);
            return None;
        }
        if !settled {
            return Some(found);
        }
        let found = Found { provisional: false, ..found };
        let tb = inner.get_mut(found.tag)?;
        tb.code = None;
        self.table.write().unwrap().insert((tb.key, tb.phys), found);
        Some(found)
    }

    /// Reserves a tag (which names no block until [`TbCache::insert`]).
    pub fn reserve(&self) -> u64 {
        self.next_tag.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts watching a physical page for writes. Called before the page's bytes are read for
    /// translation, so that no write is missed.
    pub fn watch_page(&self, ppage: u64) -> Watched {
        let mut inner = self.lock();
        if let Some(page) = inner.pages.get(&ppage) {
            return Watched { writes: page.writes, ticket: page.ticket };
        }
        // Under the lock, so that it cannot cross with the end of an earlier watch.
        let ticket = self.watch.watch(ppage, true);
        let writes = inner.unwatched;
        inner.pages.insert(ppage, Page { writes, ticket, ..Page::default() });
        Watched { writes, ticket }
    }

    /// Whether all vCPUs notice their stores to the page, so that what is translated from now on
    /// needs no confirmation.
    pub fn is_settled(&self, page: Watched) -> bool {
        self.watch.settled(page.ticket)
    }

    /// Makes exit `from` jump straight to block `to`, if both are still valid and `to` is where the
    /// exit leads (an interrupt may have come between).
    pub fn link(&self, from: ExitRef, to: Found) {
        let mut inner = self.lock();
        let (Some(tb), Some(target)) = (inner.get(from.tag()), inner.get(to.tag)) else { return };
        let (Some(Way::To { pc, same_page }), Some(Some(site))) =
            (tb.exits.get(from.index()).copied(), tb.compiled.exits.get(from.index()).copied())
        else {
            return;
        };
        if (TbKey { rip: pc, ..tb.key }) != target.key || to.provisional {
            return;
        }
        let Some(target) = inner.get_mut(to.tag) else { return };
        target.incoming.push(from);
        self.backend.link(site, to.entry(same_page));
        self.counters.links.fetch_add(1, Ordering::Relaxed);
    }

    /// Makes indirect exit `from` jump straight to block `to` whenever it leads to that guest pc, if
    /// it is not bound to another pc.
    pub fn bind(&self, from: ExitRef, to: Found) {
        let mut inner = self.lock();
        let (Some(tb), Some(target)) = (inner.get(from.tag()), inner.get(to.tag)) else { return };
        let (Some(Way::Indirect { near, bound, linked: false }), Some(Some(site))) =
            (tb.exits.get(from.index()).copied(), tb.compiled.exits.get(from.index()).copied())
        else {
            return;
        };
        let pc = target.key.rip;
        if bound.is_some_and(|b| b != pc) || to.provisional {
            return;
        }
        let entry = if near {
            if (TbKey { rip: pc, ..tb.key }) != target.key {
                return;
            }
            to.entry(tb.key.page() == target.key.page())
        } else {
            // The entry checks the mode, but no code segment.
            if target.key.cs_base != 0 {
                return;
            }
            to.checked
        };
        let Some(tb) = inner.get_mut(from.tag()) else { return };
        tb.exits[from.index()] = Way::Indirect { near, bound: Some(pc), linked: true };
        let Some(target) = inner.get_mut(to.tag) else { return };
        target.incoming.push(from);
        self.backend.bind(site, pc, entry);
        self.counters.links.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes `[gpa, gpa + len)`, inside one page, are being or have been written: drops the blocks
    /// made from them. Returns whether there were any. A page that holds no block is not watched
    /// any more.
    ///
    /// For a writer that is watched, `store` writes the bytes, in one step with the look at the
    /// blocks: what is translated later sees them.
    pub fn write(&self, gpa: u64, len: usize, store: impl FnOnce(bool)) -> bool {
        let range = Range { gpa, len: len as u32 };
        let ppage = gpa & !PAGE_MASK;
        let mut inner = self.lock();
        if let Some(page) = inner.pages.get_mut(&ppage) {
            page.writes += 1;
            let writes = page.writes;
            if page.tags.is_empty() {
                // Memory that once held code is data again: its writes need no look any more. A
                // translation that is being made from it will find its page gone and start over.
                inner.unwatched = inner.unwatched.max(writes);
                inner.pages.remove(&ppage);
                self.watch.watch(ppage, false);
            }
        }
        let hit = inner.blocks_of(&range);
        for &tag in &hit {
            self.drop_block(&mut inner, tag);
        }
        store(!hit.is_empty());
        !hit.is_empty()
    }

    /// Drops all blocks with code in `[gpa, gpa + len)` and stops watching these pages: other memory
    /// is there now.
    pub fn forget(&self, gpa: u64, len: u64) {
        let mut inner = self.lock();
        let inside = |p: &u64| *p >= gpa & !PAGE_MASK && p.wrapping_sub(gpa) < len;
        let pages: Vec<u64> = inner.pages.keys().copied().filter(inside).collect();
        for ppage in pages {
            for tag in inner.pages.get(&ppage).map_or(Vec::new(), |p| p.tags.clone()) {
                self.drop_block(&mut inner, tag);
            }
            if let Some(page) = inner.pages.remove(&ppage) {
                // A translation in progress finds its page gone, or with another count.
                inner.unwatched = inner.unwatched.max(page.writes + 1);
                self.watch.watch(ppage, false);
            }
        }
    }

    fn drop_block(&self, inner: &mut Inner, tag: u64) {
        let Some(tb) = inner.get_mut(tag) else { return };
        tb.valid = false;
        let (key, phys) = (tb.key, tb.phys);
        let incoming = std::mem::take(&mut tb.incoming);
        let ranges = std::mem::take(&mut tb.ranges);
        self.backend.poison(&tb.compiled);
        {
            let mut table = self.table.write().unwrap();
            if table.get(&(key, phys)).is_some_and(|f| f.tag == tag) {
                table.remove(&(key, phys));
            }
        }
        for from in incoming {
            let slot = from.tag().wrapping_sub(inner.first_tag) as usize;
            if let Some(Some(tb)) = inner.tbs.get_mut(slot)
                && let Some(Some(site)) = tb.compiled.exits.get(from.index()).copied()
            {
                self.backend.unlink(site);
                if let Some(Way::Indirect { linked, .. }) = tb.exits.get_mut(from.index()) {
                    *linked = false;
                }
            }
        }
        for r in &ranges {
            inner.forget(r.gpa & !PAGE_MASK, tag);
        }
        self.counters.invalidations.fetch_add(1, Ordering::Relaxed);
    }

    /// Drops everything. No vCPU may be inside generated code; their jump caches must be cleared.
    pub fn flush(&self) {
        let mut inner = self.lock();
        self.table.write().unwrap().clear();
        // Blocks that are being compiled are of the past too.
        let first_tag = self.next_tag.load(Ordering::Relaxed);
        let pages = std::mem::take(&mut inner.pages);
        let page_ids = std::mem::take(&mut inner.page_ids);
        let unwatched = inner.unwatched;
        *inner = Inner { first_tag, page_ids, unwatched, ..Inner::default() };
        self.backend.reset();
        for ppage in pages.keys() {
            self.watch.watch(*ppage, false);
        }
        drop(inner);
        self.counters.flushes.fetch_add(1, Ordering::Relaxed);
    }

    /// A copy of the code for a child process; see [`Backend::copy`].
    ///
    /// # Errors
    /// There is no memory.
    pub fn copy(&self) -> std::io::Result<Box<dyn CodeCopy>> {
        // Nobody is linking or dropping blocks.
        let _inner = self.lock();
        self.backend.copy()
    }

    /// Number of valid blocks.
    pub fn len(&self) -> usize {
        self.table.read().unwrap().len()
    }
    /// Whether there is no valid block.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl WriteWatch for TbCache {
    fn written(&self, gpa: u64, len: usize) {
        self.write(gpa, len, |_| ());
    }
}

impl Tb {
    fn touches(&self, w: &Range) -> bool {
        self.ranges
            .iter()
            .any(|r| w.gpa < r.gpa + u64::from(r.len) && r.gpa < w.gpa + u64::from(w.len))
    }
}

impl Inner {
    fn get(&self, tag: u64) -> Option<&Tb> {
        self.tbs.get(tag.checked_sub(self.first_tag)? as usize)?.as_deref().filter(|t| t.valid)
    }
    fn get_mut(&mut self, tag: u64) -> Option<&mut Tb> {
        let slot = tag.checked_sub(self.first_tag)? as usize;
        self.tbs.get_mut(slot)?.as_deref_mut().filter(|t| t.valid)
    }
    /// The blocks made from some of these bytes, inside one page.
    fn blocks_of(&self, range: &Range) -> Vec<u64> {
        let page = self.pages.get(&(range.gpa & !PAGE_MASK));
        page.filter(|p| p.lines & line_mask(range) != 0)
            .into_iter()
            .flat_map(|p| &p.tags)
            .copied()
            .filter(|&t| self.get(t).is_some_and(|tb| tb.touches(range)))
            .collect()
    }
    /// Takes a block off its page and recomputes the lines that still hold code.
    fn forget(&mut self, ppage: u64, tag: u64) {
        let Some(page) = self.pages.get(&ppage) else { return };
        let tags: Vec<u64> = page.tags.iter().copied().filter(|&t| t != tag).collect();
        let lines = tags
            .iter()
            .filter_map(|&t| self.get(t))
            .flat_map(|tb| &tb.ranges)
            .filter(|r| r.gpa & !PAGE_MASK == ppage)
            .fold(0, |m, r| m | line_mask(r));
        let page = Page { tags, lines, writes: page.writes, ticket: page.ticket };
        self.pages.insert(ppage, page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_jit::code::LinkSite;
    use tandem_jit::interp::InterpBackend;

    /// Keeps what it is told.
    #[derive(Default)]
    struct Watch {
        notes: Mutex<Vec<(u64, bool)>>,
        settled: Mutex<bool>,
    }

    impl CodeWatch for Watch {
        fn watch(&self, ppage: u64, on: bool) -> u64 {
            let mut notes = self.notes.lock().unwrap();
            notes.push((ppage, on));
            notes.len() as u64
        }
        fn settled(&self, _: u64) -> bool {
            *self.settled.lock().unwrap()
        }
    }

    #[test]
    fn a_page_without_blocks_is_watched_until_its_next_write() {
        let backend = InterpBackend::new(Arc::new(crate::accel::host_target()));
        let watch = Arc::new(Watch::default());
        let tbs = TbCache::new(backend, None, watch.clone());
        let seen = tbs.watch_page(0x5000);
        assert_eq!(tbs.watch_page(0x5000), seen);
        assert!(!tbs.write(0x5010, 8, |hit| assert!(!hit)));
        assert_eq!(*watch.notes.lock().unwrap(), [(0x5000, true), (0x5000, false)]);
        // A new watch is told from the old one.
        assert_ne!(tbs.watch_page(0x5000).writes, seen.writes);
        assert_eq!(watch.notes.lock().unwrap().len(), 3);
    }

    #[test]
    fn pages_of_other_memory_are_forgotten() {
        let backend = InterpBackend::new(Arc::new(crate::accel::host_target()));
        let watch = Arc::new(Watch::default());
        let tbs = TbCache::new(backend, None, watch.clone());
        let (inside, outside) = (tbs.watch_page(0x5000), tbs.watch_page(0x6000));
        tbs.forget(0x4000, 0x2000);
        assert_eq!(watch.notes.lock().unwrap().last(), Some(&(0x5000, false)));
        // What is being translated from it is thrown away, and a new watch is set.
        assert_ne!(tbs.watch_page(0x5000).writes, inside.writes);
        assert_eq!(watch.notes.lock().unwrap().last(), Some(&(0x5000, true)));
        assert_eq!(tbs.watch_page(0x6000), outside);
    }

    #[test]
    fn a_provisional_block_holds_while_its_bytes_do_until_the_watch_is_settled() {
        let backend = InterpBackend::new(Arc::new(crate::accel::host_target()));
        let watch = Arc::new(Watch::default());
        let tbs = TbCache::new(backend, None, watch.clone());
        let key = TbKey { rip: 0x5010, cs_base: 0, mode: 0 };
        let enter = || {
            let pages = [(0x5000, tbs.watch_page(0x5000))];
            let new = NewTb {
                key,
                phys: 0x5010,
                tag: tbs.reserve(),
                page2: None,
                ranges: vec![Range { gpa: 0x5010, len: 2 }],
                code: (!tbs.is_settled(pages[0].1)).then(|| Box::from([0x90, 0xc3])),
                insns: 2,
                compiled: Compiled {
                    checked: CodePtr(0),
                    paged: CodePtr(0),
                    linked: CodePtr(0),
                    range: 0..0,
                    exits: Vec::new(),
                },
            };
            tbs.insert(new, &Block::default(), pages).unwrap()
        };
        let found = enter();
        assert!(found.provisional);
        let is = |bytes: [u8; 2]| move |gpa: u64, code: &[u8]| gpa == 0x5010 && code == bytes;
        assert!(tbs.confirm(found, is([0x90, 0xc3])).unwrap().provisional);
        // Another vCPU, which does not watch yet, has written.
        assert!(tbs.confirm(found, is([0x90, 0xcc])).is_none());
        assert!(tbs.find(key, 0x5010).is_none());
        let found = enter();
        *watch.settled.lock().unwrap() = true;
        assert!(!tbs.confirm(found, is([0x90, 0xc3])).unwrap().provisional);
        assert!(!tbs.find(key, 0x5010).unwrap().provisional);
        // From now on writes are noticed.
        assert!(tbs.write(0x5011, 1, |hit| assert!(hit)));
        assert!(tbs.find(key, 0x5010).is_none());
        assert!(!enter().provisional);
    }

    /// Keeps what is linked; compiles nothing.
    #[derive(Default)]
    struct Links(Mutex<Vec<(u64, Option<u64>, u64)>>);

    impl Backend for Links {
        fn name(&self) -> &'static str {
            "links"
        }
        fn compiler(&self) -> Box<dyn tandem_jit::code::Compiler> {
            unimplemented!()
        }
        unsafe fn run(&self, _: *mut u8, _: CodePtr) -> u32 {
            0
        }
        fn link(&self, site: LinkSite, to: CodePtr) {
            self.0.lock().unwrap().push((site.0, None, to.0));
        }
        fn bind(&self, site: LinkSite, pc: u64, to: CodePtr) {
            self.0.lock().unwrap().push((site.0, Some(pc), to.0));
        }
        fn unlink(&self, site: LinkSite) {
            self.0.lock().unwrap().push((site.0, None, 0));
        }
        fn poison(&self, _: &Compiled) {}
        fn reset(&self) {}
        fn copy(&self) -> std::io::Result<Box<dyn CodeCopy>> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn usage(&self) -> (usize, usize) {
            (0, 0)
        }
        fn code_bytes(&self, _: std::ops::Range<u64>) -> Vec<u8> {
            Vec::new()
        }
        fn alloc_env(&self) -> std::io::Result<tandem_jit::code::EnvMem> {
            tandem_jit::code::EnvMem::new(0, 0)
        }
    }

    /// Enters a block whose entries are 16 `n` + 1, 2, 3, with one exit, at site `n`.
    fn enter(tbs: &TbCache, n: u64, key: TbKey, exit: Exit) -> Found {
        let phys = key.cs_base + key.rip;
        let pages = [(phys & !PAGE_MASK, tbs.watch_page(phys & !PAGE_MASK))];
        let entry = |k| CodePtr(16 * n + k);
        let new = NewTb {
            key,
            phys,
            tag: tbs.reserve(),
            page2: None,
            ranges: vec![Range { gpa: phys, len: 2 }],
            code: None,
            insns: 2,
            compiled: Compiled {
                checked: entry(1),
                paged: entry(2),
                linked: entry(3),
                range: 0..0,
                exits: vec![Some(LinkSite(n))],
            },
        };
        let block = Block { exits: vec![exit], ..Block::default() };
        tbs.insert(new, &block, pages).unwrap()
    }

    #[test]
    fn indirect_exits_are_bound_to_the_first_target_of_their_mode() {
        let links = Arc::new(Links::default());
        let tbs = TbCache::new(links.clone(), None, Arc::new(Watch::default()));
        let at = |rip| TbKey { rip, cs_base: 0, mode: 3 };
        let exit = |hint| Exit::new(ExitKind::Indirect, hint);
        let ret = enter(&tbs, 1, at(0x5000), exit(ExitHint::Ret));
        let jump = enter(&tbs, 2, at(0x5100), exit(ExitHint::Jump));
        let near = enter(&tbs, 3, at(0x5200), exit(ExitHint::Far));
        let away = enter(&tbs, 4, at(0x6000), exit(ExitHint::Far));
        let other = TbKey { mode: 0, ..at(0x6100) };
        let other = enter(&tbs, 5, other, exit(ExitHint::Far));
        let based = enter(&tbs, 6, TbKey { cs_base: 0x10, ..at(0x6200) }, exit(ExitHint::Far));
        let of = |f: Found| ExitRef::new(f.tag, 0);
        let done = || std::mem::take(&mut *links.0.lock().unwrap());

        tbs.bind(of(ret), other);
        assert_eq!(done(), [], "a near return stays in its mode");
        tbs.bind(of(ret), near);
        assert_eq!(done(), [(1, Some(0x5200), 0x33)]);
        tbs.bind(of(ret), near);
        tbs.bind(of(ret), away);
        assert_eq!(done(), [], "once");
        tbs.bind(of(jump), based);
        assert_eq!(done(), [], "the entry checks no base");
        tbs.bind(of(jump), other);
        assert_eq!(done(), [(2, Some(0x6100), 0x51)]);

        // The target's code is written and translated again.
        assert!(tbs.write(0x5201, 1, |_| ()));
        assert_eq!(done(), [(1, None, 0)]);
        tbs.bind(of(ret), away);
        assert_eq!(done(), [], "the guest pc stays");
        let near = enter(&tbs, 7, at(0x5200), exit(ExitHint::Far));
        tbs.bind(of(ret), near);
        assert_eq!(done(), [(1, Some(0x5200), 0x73)]);

        let far = enter(&tbs, 8, at(0x7000), exit(ExitHint::Call { ret: 0 }));
        tbs.bind(of(far), near);
        assert_eq!(done(), [(8, Some(0x5200), 0x72)], "from another page");
    }

    #[test]
    fn lines_of_a_range() {
        assert_eq!(line_mask(&Range { gpa: 0x1000, len: 1 }), 1);
        assert_eq!(line_mask(&Range { gpa: 0x103f, len: 2 }), 0b11);
        assert_eq!(line_mask(&Range { gpa: 0x1fff, len: 1 }), 1 << 63);
        assert_eq!(line_mask(&Range { gpa: 0x1000, len: 4096 }), u64::MAX);
    }
}
