//! A drive: an image as a device uses it, with cache mode and limits.
//!
//! The image may be exchanged for another while the device goes on (snapshots, mirrors), and
//! [`Witness`]es see all changes (backups, mirrors). Requests are inside the drive's gate; who
//! exchanges or installs is alone in it ([`Drive::still`]).

use super::accounting::Accounting;
use super::error::{Error, Result};
use super::gate::{Alone, Gate, Pass};
use super::pieces::{Dst, Src};
use super::throttle::{Limits, Throttle};
use super::{BlockWrite, Direct, Image, Placed};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// What is cached, and when it becomes durable (QEMU's `cache=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheMode {
    /// A write is done when it is in a cache; a flush makes it durable. Else each write is durable
    /// when it is done.
    pub writeback: bool,
    /// The host's page cache is not used (O_DIRECT).
    pub direct: bool,
    /// Flushes do nothing: a crash of the host may lose everything.
    pub no_flush: bool,
}

impl CacheMode {
    /// Names and meanings.
    pub const NAMES: [(&'static str, CacheMode); 5] = [
        ("writeback", CacheMode { writeback: true, direct: false, no_flush: false }),
        ("none", CacheMode { writeback: true, direct: true, no_flush: false }),
        ("writethrough", CacheMode { writeback: false, direct: false, no_flush: false }),
        ("directsync", CacheMode { writeback: false, direct: true, no_flush: false }),
        ("unsafe", CacheMode { writeback: true, direct: false, no_flush: true }),
    ];
}

impl Default for CacheMode {
    fn default() -> CacheMode {
        CacheMode::NAMES[0].1
    }
}

/// Who works on requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// Threads that make blocking system calls.
    #[default]
    Threads,
    /// io_uring where host, image and limits allow, and threads for the rest.
    IoUring,
}

/// How a drive behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DriveOptions {
    /// Cache mode.
    pub cache: CacheMode,
    /// Discards by the guest reach the image.
    pub discard: bool,
    /// Writes of zeros become holes (`detect-zeroes=unmap`), or are not written out (`=on`).
    pub detect_zeroes: DetectZeroes,
    /// Limits.
    pub limits: Limits,
    /// Who works on requests.
    pub engine: EngineKind,
}

/// What is done about writes of zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zeros in the format's way.
    On,
    /// The same, and their room is given back.
    Unmap,
}

/// What a request does.
#[derive(Debug)]
pub enum Op {
    /// Reads from an offset.
    Read(u64, Dst<'static>),
    /// Writes at an offset.
    Write(u64, Src<'static>),
    /// Makes earlier writes durable.
    Flush,
    /// Gives ranges (offset, length) up.
    Discard(Vec<(u64, u64)>),
    /// Makes ranges (offset, length, may be unmapped) zeros.
    WriteZeroes(Vec<(u64, u64, bool)>),
}

impl Op {
    /// Whether it changes anything, and how many bytes it moves, for limits.
    pub fn cost(&self) -> Option<(bool, u64)> {
        match self {
            Op::Read(_, d) => Some((false, d.len())),
            Op::Write(_, s) => Some((true, s.len())),
            Op::WriteZeroes(r) => Some((true, r.iter().map(|r| r.1).sum())),
            Op::Flush | Op::Discard(_) => None,
        }
    }

    /// The ranges (offset, length) that it may change.
    fn changes(&self) -> Vec<(u64, u64)> {
        match self {
            Op::Read(..) | Op::Flush => Vec::new(),
            Op::Write(offset, from) => vec![(*offset, from.len())],
            Op::Discard(ranges) => ranges.clone(),
            Op::WriteZeroes(ranges) => ranges.iter().map(|(at, len, _)| (*at, *len)).collect(),
        }
    }
}

fn throttle(limits: Limits) -> Option<Arc<Throttle>> {
    limits.any().then(|| Arc::new(Throttle::new(limits)))
}

/// Sees the changes that requests make to a drive's disk. Called on the threads of requests.
pub trait Witness: Send + Sync {
    /// A range is about to change. May wait, and may refuse, which fails the request.
    fn before(&self, offset: u64, len: u64) -> Result<()>;
    /// The range has changed, or might have in part. Once for each `before` that was not refused.
    fn after(&self, offset: u64, len: u64);
}

/// What requests work on.
#[derive(Clone)]
struct Subject {
    image: Arc<dyn Image>,
    witnesses: Arc<[Arc<dyn Witness>]>,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} seen by {}", self.image, self.witnesses.len())
    }
}

/// A drive on which no request is under way.
pub struct Still<'a> {
    drive: &'a Drive,
    _alone: Alone<'a>,
}

impl Still<'_> {
    /// Gives it another image; returns the one that it had.
    pub fn exchange(&self, image: Arc<dyn Image>) -> Arc<dyn Image> {
        std::mem::replace(&mut self.drive.subject.write().unwrap().image, image)
    }

    /// Lets somebody see all changes from now on.
    pub fn admit(&self, witness: Arc<dyn Witness>) {
        let mut s = self.drive.subject.write().unwrap();
        s.witnesses = s.witnesses.iter().cloned().chain([witness]).collect();
    }

    /// Ends that.
    pub fn dismiss(&self, witness: &Arc<dyn Witness>) {
        let mut s = self.drive.subject.write().unwrap();
        s.witnesses = s.witnesses.iter().filter(|w| !Arc::ptr_eq(w, witness)).cloned().collect();
    }
}

/// A drive.
#[derive(Debug)]
pub struct Drive {
    subject: RwLock<Subject>,
    gate: Arc<Gate>,
    options: DriveOptions,
    /// A guest may change this.
    writeback: AtomicBool,
    throttle: RwLock<Option<Arc<Throttle>>>,
    accounting: Accounting,
    taken: AtomicBool,
    resized: Mutex<Option<Resized>>,
}

/// Called when a disk has another size.
struct Resized(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Resized {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resized")
    }
}

impl Drive {
    /// A drive on `image`; it can be written if the image is open for writing.
    pub fn new(image: Arc<dyn Image>, options: DriveOptions) -> Arc<Drive> {
        Arc::new(Drive {
            writeback: AtomicBool::new(options.cache.writeback),
            throttle: RwLock::new(throttle(options.limits)),
            accounting: Accounting::default(),
            subject: RwLock::new(Subject { image, witnesses: Arc::new([]) }),
            gate: Arc::default(),
            options,
            taken: AtomicBool::new(false),
            resized: Mutex::default(),
        })
    }

    /// Installs what is called when the disk has another size; of its device.
    pub fn on_resized(&self, f: impl Fn() + Send + Sync + 'static) {
        *self.resized.lock().unwrap() = Some(Resized(Box::new(f)));
    }
    /// Tells the device that the disk has another size.
    pub fn tell_resized(&self) {
        if let Some(f) = &*self.resized.lock().unwrap() {
            (f.0)();
        }
    }

    /// Makes it the caller's alone, as one drive belongs to one device.
    pub fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }
    /// Gives it back.
    pub fn give_back(&self) {
        self.taken.store(false, Ordering::Release);
    }
    /// The image.
    pub fn image(&self) -> Arc<dyn Image> {
        self.subject.read().unwrap().image.clone()
    }
    /// Waits until no request is under way; others wait as long as the result lives. Not for
    /// threads of requests.
    pub fn still(&self) -> Still<'_> {
        Still { _alone: self.gate.alone(), drive: self }
    }
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.image().size()
    }
    /// Whether it cannot be written.
    pub fn read_only(&self) -> bool {
        self.image().writable().is_none()
    }
    /// Whether discards do something.
    pub fn discards(&self) -> bool {
        self.options.discard && !self.read_only()
    }
    /// How it behaves.
    pub fn options(&self) -> &DriveOptions {
        &self.options
    }
    /// What enforces its limits, if it has any.
    pub fn throttle(&self) -> Option<Arc<Throttle>> {
        self.throttle.read().unwrap().clone()
    }
    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.throttle().map(|t| *t.limits()).unwrap_or_default()
    }
    /// Changes its limits, at any time.
    pub fn set_limits(&self, limits: Limits) {
        *self.throttle.write().unwrap() = throttle(limits);
    }
    /// What it has done so far.
    pub fn accounting(&self) -> &Accounting {
        &self.accounting
    }
    /// Whether writes may stay in a cache until a flush.
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }
    /// Changes that, as a guest may.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Release);
    }
    /// The plain file that a flush is about, and the right to work there; nothing if the image has
    /// more to do for one.
    pub(super) fn direct_pass(&self) -> Option<(Direct, Pass)> {
        let pass = self.gate.try_pass()?;
        Some((self.image().direct()?, pass))
    }

    /// Where a range lies in a file, and the right to work there as long as the pass is kept.
    /// Nothing if somebody has to see what is done, or limits it.
    pub(super) fn place(&self, offset: u64, len: u64, write: bool) -> Option<(Placed, Pass)> {
        let pass = self.gate.try_pass()?;
        if self.throttle().is_some() {
            return None;
        }
        let subject = self.subject.read().unwrap();
        let seen = !subject.witnesses.is_empty() || self.options.detect_zeroes != DetectZeroes::Off;
        if write && (seen || !self.writeback()) {
            return None;
        }
        Some((subject.image.place(offset, len, write)?, pass))
    }

    /// Does what `op` says.
    pub fn execute(&self, op: &Op) -> Result<()> {
        let _inside = self.gate.enter();
        let Subject { image, witnesses } = self.subject.read().unwrap().clone();
        if let Op::Read(offset, into) = op {
            return image.read(*offset, into);
        }
        let Some(w) = image.writable() else {
            return if matches!(op, Op::Flush) { Ok(()) } else { Err(Error::ReadOnly) };
        };
        if matches!(op, Op::Flush) {
            return self.flush(w);
        }
        let mut seen = Vec::new();
        if !witnesses.is_empty() {
            for (offset, len) in op.changes() {
                image.in_range(offset, len)?;
                for witness in &*witnesses {
                    witness.before(offset, len)?;
                    seen.push(Seen { witness, offset, len });
                }
            }
        }
        self.change(&*image, w, op)?;
        drop(seen);
        if self.writeback() { Ok(()) } else { self.flush(w) }
    }

    fn change(&self, image: &dyn Image, w: &dyn BlockWrite, op: &Op) -> Result<()> {
        match op {
            Op::Read(..) | Op::Flush => {}
            Op::Write(offset, from) => {
                if self.options.detect_zeroes != DetectZeroes::Off && from.is_zero() {
                    let unmap = self.options.detect_zeroes == DetectZeroes::Unmap;
                    w.write_zeroes(*offset, from.len(), unmap && self.options.discard)?;
                } else {
                    w.write(*offset, from)?;
                }
            }
            Op::Discard(ranges) => {
                for (offset, len) in ranges {
                    if self.options.discard {
                        w.discard(*offset, *len)?;
                    } else {
                        image.in_range(*offset, *len)?;
                    }
                }
            }
            Op::WriteZeroes(ranges) => {
                for (offset, len, unmap) in ranges {
                    w.write_zeroes(*offset, *len, *unmap && self.options.discard)?;
                }
            }
        }
        Ok(())
    }

    fn flush(&self, w: &dyn BlockWrite) -> Result<()> {
        if self.options.cache.no_flush { Ok(()) } else { w.flush() }
    }
}

/// A change that a witness was told of, and is told the end of.
struct Seen<'a> {
    witness: &'a Arc<dyn Witness>,
    offset: u64,
    len: u64,
}

impl Drop for Seen<'_> {
    fn drop(&mut self) {
        self.witness.after(self.offset, self.len);
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        // The way out is as durable as the guest's last flush would have been.
        let image = self.image();
        if let Some(Err(e)) = image.writable().map(|w| self.flush(w)) {
            log::error!("'{}' was not flushed: {}", image.path().display(), e.chain());
        }
    }
}
