//! qcow2, versions 2 and 3.
//!
//! ```text
//!   guest offset ─► L1 table ─► L2 table ─► cluster of the file: data, compressed, zero, or nothing
//!                  (in memory)  (cached)                          (nothing: the backing image)
//!   cluster of the file ─► refcount table ─► refcount block ─► number of users
//!                            (in memory)       (cached)
//! ```
//!
//! A request looks its clusters up under the metadata lock ([`Meta`]) and moves data without it.
//!
//! What always holds:
//!
//! * A write to a cluster that is ours alone (COPIED) goes there. Any other write takes new
//!   clusters, fills them whole, and only then enters them into the L2 table. Meanwhile they are in
//!   [`Meta::busy`], and other writers of the same guest clusters wait.
//! * Order on disk, with a flush of the host's caches between: refcounts that grew and data → L2
//!   tables → L1 table → refcounts that shrink. So a crash at any moment leaks at most.
//! * Clusters are freed in two steps: what referred to them is gone from memory
//!   ([`Meta::dropped`]), and after that was flushed ([`Meta::freeable`]) and no request is in
//!   flight ([`Gate`]) their counts fall and they may be handed out anew.
//! * Lock order: gate → metadata. Nothing waits for the gate with the metadata locked.
//! * With lazy refcounts, the dirty bit is on disk before the first cluster is taken; counts are
//!   then written when the image is closed, or rebuilt when it is next opened for writing.

mod cache;
mod check;
mod compress;
pub mod create;
pub mod header;
mod io;
mod map;
mod refcount;
mod resize;
mod snapshot;

pub use create::CreateOptions;
pub use header::Compression;

use super::error::{Error, Result};
use super::file::HostFile;
use super::gate::Gate;
use super::{
    BlockRead, BlockWrite, Check, Compress, Description, Extents, Image, Layered, Placed, Repair,
    Resize, Snapshots,
};
use cache::Cache;
use compress::Recent;
use header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use map::Geometry;
use refcount::Refcounts;
use snapshot::Entry;
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};

/// Bytes of L2 tables kept in memory: enough for 256 GiB of disk with clusters of 64 KiB.
const L2_CACHE_BYTES: usize = 32 << 20;

/// What is particular to a qcow2 image, for those who describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Particulars {
    /// 2 or 3.
    pub version: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Whether refcounts are lazy.
    pub lazy_refcounts: bool,
    /// Bits of a refcount.
    pub refcount_bits: u32,
}

/// How to use an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Freed clusters become holes in the file.
    pub unmap: bool,
    /// A dirty image is repaired at once. Off for a checker, which wants to see it as it is.
    pub repair: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { unmap: true, repair: true }
    }
}

/// The tables, as they will be on disk.
#[derive(Debug)]
struct Meta {
    header: Header,
    l1: Vec<u64>,
    l1_dirty: bool,
    l2: Cache,
    refs: Refcounts,
    /// Guest clusters for which somebody is filling new clusters.
    busy: HashSet<u64>,
    /// Runs of file clusters (index, length) that lost a reference in memory.
    dropped: Vec<(u64, u64)>,
    /// The same, and the loss is on disk.
    freeable: Vec<(u64, u64)>,
    snapshots: Vec<Entry>,
    /// Clusters of the file from this one on have never been used.
    fresh: u64,
    /// Where the next compressed cluster may begin, in a cluster that the last one has begun.
    packing: Option<u64>,
    /// It was found damaged and must not be written any more.
    broken: bool,
}

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    file: Arc<HostFile>,
    geo: Geometry,
    size: AtomicU64,
    options: Options,
    backing: RwLock<Option<Arc<dyn Image>>>,
    meta: Mutex<Meta>,
    /// Some guest clusters are busy no more.
    settled: Condvar,
    gate: Arc<Gate>,
    recent: Recent,
    /// Nothing was written since the last flush.
    clean: AtomicBool,
}

impl std::fmt::Debug for dyn Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({})", self.path().display())
    }
}

impl Qcow2 {
    /// Opens the image in `file`, without its backing image.
    pub fn open(file: Arc<HostFile>, options: Options) -> Result<Qcow2> {
        let mut header = Header::read(&file)?;
        if header.incompatible & INCOMPAT_CORRUPT != 0 && file.writable() && options.repair {
            return Err(Error::Corrupt(format!(
                "image '{}' was found damaged before; repair it with: tandem img check -r all",
                file.path().display()
            )));
        }
        let geo = Geometry::new(&header);
        let refs = Refcounts::open(&file, &header)?;
        let mut raw = vec![0; header.l1_size as usize * 8];
        file.read_bytes(header.l1_offset, &mut raw)?;
        let entry = |c: &[u8]| u64::from_be_bytes(c.try_into().expect("8 bytes"));
        let l1: Vec<u64> = raw.chunks_exact(8).map(entry).collect();
        let snapshots = snapshot::read_table(&file, &header)?;
        let fresh = file.len()?.div_ceil(geo.cluster());
        let unknown = header.autoclear;
        if file.writable() && unknown != 0 && options.repair {
            // We keep none of the features that these bits vouch for.
            header.autoclear = 0;
            header.write(&file)?;
        }
        let mut meta = Meta {
            l1,
            l1_dirty: false,
            l2: Cache::new(geo.cluster() as usize, L2_CACHE_BYTES),
            refs,
            busy: HashSet::new(),
            dropped: Vec::new(),
            freeable: Vec::new(),
            snapshots,
            fresh,
            packing: None,
            broken: false,
            header,
        };
        meta.note_tables(&geo);
        let image = Qcow2 {
            geo,
            size: AtomicU64::new(meta.header.size),
            options,
            backing: RwLock::new(None),
            meta: Mutex::new(meta),
            settled: Condvar::new(),
            gate: Arc::default(),
            recent: Recent::default(),
            clean: AtomicBool::new(true),
            file,
        };
        if image.file.writable() && options.repair && image.is_dirty() {
            log::info!(
                "'{}' was not closed properly; refcounts are rebuilt",
                image.path().display()
            );
            image.check(Repair::All)?;
        }
        Ok(image)
    }

    /// Whether its refcounts may be behind.
    fn is_dirty(&self) -> bool {
        self.lock().header.incompatible & INCOMPAT_DIRTY != 0
    }

    fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap()
    }

    /// Fails unless the image may be written.
    fn must_write(&self, meta: &Meta) -> Result<()> {
        if meta.broken {
            let what = "the image is damaged and is not written any more";
            return Err(Error::Corrupt(what.into()));
        }
        if self.file.writable() { Ok(()) } else { Err(Error::ReadOnly) }
    }

    /// Passes a result on; an image that turned out to be damaged is marked and not written again.
    fn guard<T>(&self, meta: &mut Meta, result: Result<T>) -> Result<T> {
        if let Err(Error::Corrupt(what)) = &result
            && self.file.writable()
            && !meta.broken
        {
            log::error!("'{}': {what}; it is not written any more", self.path().display());
            meta.broken = true;
            if meta.header.version >= 3 {
                meta.header.incompatible |= INCOMPAT_CORRUPT;
                let _ = meta.header.write(&self.file);
            }
        }
        result
    }

    /// Brings all tables to disk in the order that the module's docs give. What was dropped before
    /// is freeable after.
    fn write_back(&self, meta: &mut Meta) -> Result<()> {
        if meta.broken {
            let what = "the image is damaged and is not written any more";
            return Err(Error::Corrupt(what.into()));
        }
        let file = &*self.file;
        let lazy = meta.header.is_lazy() && !meta.refs.blocks.is_full();
        if !lazy && meta.refs.is_dirty() {
            meta.refs.write_back_to(file, &meta.header)?;
        }
        if meta.l2.is_dirty() || meta.l1_dirty {
            file.sync()?;
            meta.l2.write_back(file)?;
        }
        if meta.l1_dirty {
            file.sync()?;
            let raw: Vec<u8> = meta.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write_bytes(meta.header.l1_offset, &raw)?;
            meta.l1_dirty = false;
        }
        let mut dropped = std::mem::take(&mut meta.dropped);
        if !dropped.is_empty() {
            // What referred to them must be gone for good.
            file.sync()?;
            meta.freeable.append(&mut dropped);
        }
        Ok(())
    }

    /// Frees what is freeable. Nobody else is inside the gate.
    fn release(&self, meta: &mut Meta) -> Result<()> {
        let mut runs = std::mem::take(&mut meta.freeable);
        if runs.is_empty() {
            return Ok(());
        }
        self.recent.clear();
        meta.packing = None;
        runs.sort_unstable();
        let mut holes: Vec<(u64, u64)> = Vec::new();
        for (start, n) in runs {
            for i in start..start + n {
                if meta.refs.decrement(&self.file, i)? > 0 {
                    continue;
                }
                meta.l2.remove(i << self.geo.cluster_bits);
                match holes.last_mut() {
                    Some((s, n)) if *s + *n == i => *n += 1,
                    _ => holes.push((i, 1)),
                }
            }
        }
        if self.options.unmap {
            for (start, n) in holes {
                let bits = self.geo.cluster_bits;
                self.file.discard(start << bits, n << bits)?;
            }
        }
        Ok(())
    }

    /// Everything to disk; `durably` also through the host's caches.
    fn flush_all(&self, durably: bool) -> Result<()> {
        if self.clean.swap(true, Ordering::AcqRel) && !durably {
            return Ok(());
        }
        {
            let mut meta = self.lock();
            let r = self.write_back(&mut meta);
            if let Err(e) = self.guard(&mut meta, r) {
                self.clean.store(false, Ordering::Release);
                return Err(e);
            }
        }
        if durably {
            self.file.sync()?;
        }
        if let Some(_alone) = self.gate.try_alone() {
            let mut meta = self.lock();
            let r = self.release(&mut meta);
            if meta.refs.is_dirty() {
                self.clean.store(false, Ordering::Release);
            }
            return self.guard(&mut meta, r);
        }
        Ok(())
    }

    /// Before the first change since it was clean: the dirty bit, if refcounts are lazy.
    fn about_to_change(&self, meta: &mut Meta) -> Result<()> {
        self.clean.store(false, Ordering::Release);
        if meta.header.is_lazy() && meta.header.incompatible & INCOMPAT_DIRTY == 0 {
            meta.header.incompatible |= INCOMPAT_DIRTY;
            meta.header.write(&self.file)?;
            self.file.sync()?;
        }
        if meta.l2.is_full() || meta.refs.blocks.is_full() {
            self.write_back(meta)?;
        }
        Ok(())
    }

    /// Brings everything to disk and leaves the image clean.
    pub fn close(&self) -> Result<()> {
        if !self.file.writable() || self.lock().broken {
            return Ok(());
        }
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        self.write_back(&mut meta)?;
        self.release(&mut meta)?;
        if meta.refs.is_dirty() {
            let Meta { refs, header, .. } = &mut *meta;
            refs.write_back_to(&self.file, header)?;
        }
        if meta.header.is_lazy() && meta.header.incompatible & INCOMPAT_DIRTY != 0 {
            self.file.sync()?;
            meta.header.incompatible &= !INCOMPAT_DIRTY;
            meta.header.write(&self.file)?;
        }
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.meta.is_poisoned() {
            return;
        }
        if let Err(e) = self.close() {
            log::error!("'{}' was not closed properly: {}", self.path().display(), e.chain());
        }
    }
}

impl Image for Qcow2 {
    fn describe(&self) -> Description {
        let meta = self.lock();
        let h = &meta.header;
        Description {
            format: "qcow2",
            cluster_size: Some(self.geo.cluster()),
            dirty: h.incompatible & INCOMPAT_DIRTY != 0,
            corrupt: h.incompatible & INCOMPAT_CORRUPT != 0,
            qcow2: Some(Particulars {
                version: h.version,
                compression: h.compression,
                lazy_refcounts: h.is_lazy(),
                refcount_bits: 1 << h.refcount_order,
            }),
        }
    }
    fn file(&self) -> &Arc<HostFile> {
        &self.file
    }
    fn path(&self) -> &Path {
        self.file.path()
    }
    fn writable(&self) -> Option<&dyn BlockWrite> {
        self.file.writable().then_some(self)
    }
    fn set_writable(&self, write: bool) -> Result<()> {
        if self.file.writable() == write {
            return Ok(());
        }
        if !write {
            // Everything is on disk before the right to write goes.
            self.close()?;
            self.file.sync()?;
            return self.file.reopen(false);
        }
        self.file.reopen(true)?;
        let unknown = std::mem::take(&mut self.lock().header.autoclear);
        if unknown != 0 {
            // We keep none of the features that these bits vouch for.
            self.lock().header.write(&self.file)?;
        }
        if self.is_dirty() {
            self.check(Repair::All)?;
        }
        Ok(())
    }
    fn extents(&self) -> &dyn Extents {
        self
    }
    fn resizable(&self) -> Option<&dyn Resize> {
        self.file.writable().then_some(self)
    }
    fn layered(&self) -> Option<&dyn Layered> {
        Some(self)
    }
    fn compressor(&self) -> Option<&dyn Compress> {
        self.file.writable().then_some(self)
    }
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
    fn checker(&self) -> Option<&dyn Check> {
        Some(self)
    }
    fn place(&self, offset: u64, len: u64, write: bool) -> Option<Placed> {
        self.in_range(offset, len).ok().filter(|()| len > 0)?;
        // Whoever asks works on many requests and must not wait.
        let pass = self.gate.try_pass()?;
        let mut meta = self.meta.try_lock().ok()?;
        let offset = self.plain_run(&mut meta, offset, len, write)?;
        Some(Placed { file: self.file.clone(), offset, _keep: Some(pass) })
    }
}

impl Layered for Qcow2 {
    fn backing(&self) -> Option<Arc<dyn Image>> {
        self.backing.read().unwrap().clone()
    }
    fn set_backing(&self, backing: Option<Arc<dyn Image>>) {
        *self.backing.write().unwrap() = backing;
    }
    fn backing_name(&self) -> (Option<String>, Option<String>) {
        let meta = self.lock();
        (meta.header.backing_file.clone(), meta.header.backing_format.clone())
    }
    fn rename_backing(&self, file: Option<&str>, format: Option<&str>) -> Result<()> {
        let mut meta = self.lock();
        self.must_write(&meta)?;
        let mut h = meta.header.clone();
        h.backing_file = file.map(str::to_string);
        h.backing_format = format.map(str::to_string);
        h.write(&self.file)?;
        self.file.sync()?;
        meta.header = h;
        Ok(())
    }
    fn clear(&self) -> Result<()> {
        self.drop_from(0)
    }
}

impl Header {
    fn is_lazy(&self) -> bool {
        self.compatible & header::COMPAT_LAZY != 0
    }
}

impl BlockRead for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
    fn read(&self, offset: u64, into: &super::Dst) -> Result<()> {
        self.in_range(offset, into.len())?;
        let _inside = self.gate.enter();
        self.read_inside(offset, into)
    }
}

#[cfg(test)]
mod tests;
