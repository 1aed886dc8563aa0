//! Disk images and the engines that work on them.
//!
//! ```text
//!   device ── Requester ──► Engine (threads | io_uring) ──► Drive (cache mode, limits)
//!                                                             │
//!                     open::open ─────────────────────────► dyn Image
//!                                                             │
//!        Raw ── HostFile (locks, O_DIRECT, holes)     Qcow2 ── HostFile
//!                                                             └── backing: dyn Image …
//! ```
//!
//! Capabilities, each a small trait; an arrow means "needs". Every [`Image`] can be read and says
//! where its data lies; it gives out each of the other powers as an `Option`, and nobody above asks
//! which format it is:
//!
//! ```text
//!   BlockRead ◄── Extents ◄─────────────── Image ──► direct(): Direct     (plain file, for io_uring)
//!       ▲                                    │
//!       └── BlockWrite ◄── Resize            ├── layered():   Layered     (a backing image)
//!              ▲                             ├── compressor(): Compress
//!              ├── Compress                  ├── snapshots():  Snapshots
//!              └── Snapshots                 └── checker():    Check
//! ```
//!
//! What always holds:
//!
//! * All operations are synchronous, may come from any thread at once, and never trust what an
//!   image says: offsets, lengths and counts are checked before they index, allocate or shift.
//! * What a flush has returned for survives a crash of the host (as far as the cache mode says);
//!   what was not flushed may be lost, but a crash of this process alone at any moment leaves an
//!   image whose only flaw may be leaked clusters.
//! * Overlapping requests that are in flight together may land in any order, byte by byte, as on
//!   hardware. They never damage another part of the image.
//!
//! Formats: qcow2 is our own. The `imago` crate (alive, pure Rust) was looked at and does not fit:
//! it has no internal snapshots, consistency check, zstd, compressed writing or lazy refcounts, so
//! `tandem img` would need a second implementation of the same metadata beside it.

pub mod accounting;
pub mod chain;
pub mod drive;
pub mod engine;
pub mod error;
pub mod file;
mod gate;
pub mod job;
pub mod lock;
pub mod open;
pub mod pieces;
pub mod qcow2;
pub mod raw;
pub mod throttle;
mod uring;

pub use error::{Error, Result};
pub use pieces::{Dst, Src};

use file::HostFile;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes that every size and request is a multiple of.
pub const SECTOR: u64 = 512;

/// Can be read.
pub trait BlockRead: Send + Sync {
    /// Bytes of the disk: a multiple of [`SECTOR`].
    fn size(&self) -> u64;
    /// Fills `into` from `offset` on.
    fn read(&self, offset: u64, into: &Dst) -> Result<()>;

    /// Fails if a request does not lie in the disk.
    fn in_range(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::OutOfRange),
        }
    }
    /// Reads into a slice.
    fn read_bytes(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.read(offset, &Dst::new(into))
    }
}

/// Can be written.
pub trait BlockWrite: BlockRead {
    /// Writes `from` at `offset`. Volatile until a flush.
    fn write(&self, offset: u64, from: &Src) -> Result<()>;
    /// Makes what was written before durable.
    fn flush(&self) -> Result<()>;
    /// Makes a range read as zeros; with `unmap` it need not keep its room.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;
    /// Tells that a range is not needed any more. Its contents are then zeros or unchanged, by any
    /// unit that the format has.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Writes a slice.
    fn write_bytes(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.write(offset, &Src::new(from))
    }
}

/// What a part of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Nothing is said here; the backing image is, or zeros.
    Unallocated,
    /// Reads as zeros by this layer's word.
    Zero,
    /// Data of this layer.
    Data,
}

/// A run of bytes of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What it is.
    pub kind: ExtentKind,
    /// Its length; 0 only at the end of the disk.
    pub len: u64,
    /// Where its first byte lies in the file, if it lies there as it is or is reserved there.
    pub host: Option<u64>,
    /// Whether the data is compressed.
    pub compressed: bool,
}

/// Knows what its parts are.
pub trait Extents: BlockRead {
    /// The run that begins at `offset`; as long as is cheap to find out.
    fn extent(&self, offset: u64) -> Result<Extent>;
}

/// How much room is taken in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// The image's tables.
    Metadata,
    /// Tables, and room reserved by the host for the data.
    Falloc,
    /// Tables, and data written as zeros.
    Full,
}

impl Preallocation {
    /// All with their names.
    pub const NAMES: [(&'static str, Preallocation); 4] = [
        ("off", Preallocation::Off),
        ("metadata", Preallocation::Metadata),
        ("falloc", Preallocation::Falloc),
        ("full", Preallocation::Full),
    ];
}

/// Can change its size.
pub trait Resize: BlockWrite {
    /// Makes the disk `size` bytes; what is new reads as zeros.
    fn resize(&self, size: u64, how: Preallocation) -> Result<()>;
}

/// Has something behind it.
pub trait Layered: BlockRead {
    /// The image that is read where this one says nothing.
    fn backing(&self) -> Option<Arc<dyn Image>>;
    /// Puts `backing` behind it while it is open.
    fn set_backing(&self, backing: Option<Arc<dyn Image>>);
    /// What the image names as its backing file, and that file's format.
    fn backing_name(&self) -> (Option<String>, Option<String>);
    /// Changes these names in the image.
    fn rename_backing(&self, file: Option<&str>, format: Option<&str>) -> Result<()>;
    /// Forgets all data of this layer, so that everything shows what is behind it.
    fn clear(&self) -> Result<()>;
}

/// Can store data compressed.
pub trait Compress: BlockWrite {
    /// Bytes compressed together.
    fn unit(&self) -> u64;
    /// Writes one unit, or the last part of the disk, compressed if that saves room. Only where
    /// nothing was written before.
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()>;
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique name for machines.
    pub id: String,
    /// Name for people; need not be unique.
    pub name: String,
    /// Size of the disk then.
    pub disk_size: u64,
    /// Bytes of machine state.
    pub vm_state_size: u64,
    /// When it was taken: seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Guest clock then, in ns.
    pub vm_clock: u64,
    /// Executed instructions then, if they were counted.
    pub icount: Option<u64>,
}

/// Holds snapshots.
pub trait Snapshots: BlockWrite {
    /// All, oldest first.
    fn list(&self) -> Vec<Snapshot>;
    /// Takes one of the disk as it is, called `name`.
    fn create(&self, name: &str) -> Result<()>;
    /// Puts the disk back to the snapshot with this ID or name.
    fn apply(&self, which: &str) -> Result<()>;
    /// Removes the snapshot with this ID or name.
    fn delete(&self, which: &str) -> Result<()>;
}

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Clusters that nobody uses are freed.
    Leaks,
    /// Everything that can be put right is.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
    /// Parts that could not be looked at.
    pub check_errors: u64,
    /// Corruptions put right.
    pub corruptions_fixed: u64,
    /// Leaks put right.
    pub leaks_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Of those, how many have data.
    pub allocated_clusters: u64,
    /// Of those, how many do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Of those, how many are compressed.
    pub compressed_clusters: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end: u64,
    /// A sentence for each finding.
    pub findings: Vec<String>,
}

/// Can be checked for consistency.
pub trait Check: BlockRead {
    /// Looks at all metadata; nobody else uses the image meanwhile.
    fn check(&self, repair: Repair) -> Result<CheckReport>;
}

/// A part of the disk that is plainly in a file, byte for byte.
#[derive(Clone, Debug)]
pub struct Direct {
    /// The file; byte 0 of the disk is its byte 0.
    pub file: Arc<HostFile>,
}

/// Where a range of the disk lies plainly in a file, for as long as this lives.
pub struct Placed {
    /// The file.
    pub file: Arc<HostFile>,
    /// Offset there of the range's first byte.
    pub offset: u64,
    /// Keeps it from being moved.
    _keep: Option<gate::Pass>,
}

/// What people want to know about an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Description {
    /// Name of the format.
    pub format: &'static str,
    /// Unit of allocation.
    pub cluster_size: Option<u64>,
    /// Whether it was not closed properly.
    pub dirty: bool,
    /// Whether it was found damaged.
    pub corrupt: bool,
    /// What is particular to a qcow2 image.
    pub qcow2: Option<qcow2::Particulars>,
}

/// An open image.
pub trait Image: BlockRead {
    /// What it is.
    fn describe(&self) -> Description;
    /// The file it is in.
    fn file(&self) -> &Arc<HostFile>;
    /// Where that is.
    fn path(&self) -> &Path;
    /// Its writing side, if it is open for writing.
    fn writable(&self) -> Option<&dyn BlockWrite>;
    /// Opens it again for writing, or for reading only. No request is under way.
    fn set_writable(&self, write: bool) -> Result<()>;
    /// What its parts are.
    fn extents(&self) -> &dyn Extents;
    /// Whether it can be resized.
    fn resizable(&self) -> Option<&dyn Resize> {
        None
    }
    /// Whether it has, or could have, something behind it.
    fn layered(&self) -> Option<&dyn Layered> {
        None
    }
    /// Whether it stores compressed data.
    fn compressor(&self) -> Option<&dyn Compress> {
        None
    }
    /// Whether it holds snapshots.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
    /// Whether there is something to check.
    fn checker(&self) -> Option<&dyn Check> {
        None
    }
    /// Whether all of it is plainly in a file.
    fn direct(&self) -> Option<Direct> {
        None
    }
    /// Where a range lies, to be read or written there without asking further. Nothing if it does
    /// not lie in one piece, or if finding out would take time.
    fn place(&self, _offset: u64, _len: u64, _write: bool) -> Option<Placed> {
        None
    }
}

/// The file that `name`, found in the image at `image`, means: relative names are relative to the
/// image's directory.
pub fn resolve(image: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    match image.parent() {
        Some(dir) if !Path::new(name).is_absolute() => dir.join(name),
        _ => PathBuf::from(name),
    }
}
