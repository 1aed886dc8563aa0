//! A drive: an image as a device uses it, with cache mode and limits.

use super::accounting::Accounting;
use super::error::{Error, Result};
use super::pieces::{Dst, Src};
use super::throttle::{Limits, Throttle};
use super::{Direct, Image};
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
    /// io_uring, where image, limits and host allow; else threads.
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
}

fn throttle(limits: Limits) -> Option<Arc<Throttle>> {
    limits.any().then(|| Arc::new(Throttle::new(limits)))
}

/// A drive.
#[derive(Debug)]
pub struct Drive {
    image: Arc<dyn Image>,
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
            image,
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
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }
    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.image.size()
    }
    /// Whether it cannot be written.
    pub fn read_only(&self) -> bool {
        self.image.writable().is_none()
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
    /// The plain file, if reads and writes of ranges may go there without asking the image.
    pub fn direct(&self) -> Option<Direct> {
        let plain = self.throttle().is_none() && self.options.detect_zeroes == DetectZeroes::Off;
        self.image.direct().filter(|_| plain)
    }

    /// Does what `op` says.
    pub fn execute(&self, op: &Op) -> Result<()> {
        if let Op::Read(offset, into) = op {
            return self.image.read(*offset, into);
        }
        let Some(w) = self.image.writable() else {
            return if matches!(op, Op::Flush) { Ok(()) } else { Err(Error::ReadOnly) };
        };
        match op {
            Op::Read(..) => {}
            Op::Flush => return self.flush(),
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
                        self.image.in_range(*offset, *len)?;
                    }
                }
            }
            Op::WriteZeroes(ranges) => {
                for (offset, len, unmap) in ranges {
                    w.write_zeroes(*offset, *len, *unmap && self.options.discard)?;
                }
            }
        }
        if self.writeback() { Ok(()) } else { self.flush() }
    }

    fn flush(&self) -> Result<()> {
        match self.image.writable() {
            Some(w) if !self.options.cache.no_flush => w.flush(),
            _ => Ok(()),
        }
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        // The way out is as durable as the guest's last flush would have been.
        if let Err(e) = self.flush() {
            log::error!("'{}' was not flushed: {}", self.image.path().display(), e.chain());
        }
    }
}
