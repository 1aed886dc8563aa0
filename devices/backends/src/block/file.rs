//! A file or block device of the host, as images use it: positioned, scattered I/O.
//!
//! What always holds: reads beyond the end give zeros (an image may end in the middle of a cluster);
//! a short transfer is continued; with O_DIRECT, whatever is not aligned goes through an aligned
//! buffer, so that nobody above needs to know about alignment.

use super::error::{Error, Result};
use super::lock::{self, Access};
use super::pieces::{Dst, Src};
use crate::fdset;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, RwLock};

/// iovecs per system call (IOV_MAX).
const MAX_IOV: usize = 1024;
/// Bytes moved at once through an aligned buffer.
const BOUNCE: u64 = 1 << 20;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing, too.
    pub write: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Lock to take.
    pub access: Access,
}

impl OpenMode {
    /// For reading, locked against writers.
    pub const READ: OpenMode = OpenMode { write: false, direct: false, access: Access::Read };
    /// For writing, alone.
    pub const WRITE: OpenMode = OpenMode { write: true, direct: false, access: Access::Write };
}

/// An open file.
#[derive(Debug)]
pub struct HostFile {
    file: RwLock<File>,
    path: PathBuf,
    mode: Mutex<OpenMode>,
    /// Alignment of memory, offsets and lengths; 1 without O_DIRECT.
    align: u64,
    device: bool,
    /// Held while an unaligned write reads, changes and writes back.
    bounce: Mutex<()>,
}

/// Memory aligned for O_DIRECT.
struct Aligned {
    ptr: *mut u8,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize, align: usize) -> Aligned {
        let layout = Layout::from_size_align(len.max(1), align.max(16)).expect("a sane layout");
        // SAFETY: the layout is not empty.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Aligned { ptr, layout }
    }
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: we own the allocation, which is initialised.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in new with this layout.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}

fn cvt(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

impl HostFile {
    /// Opens what is at `path`.
    pub fn open(path: &Path, mode: OpenMode) -> Result<HostFile> {
        let file = open_raw(path, mode)?;
        HostFile::from_file(file, path, mode)
    }

    /// Creates a file, or empties one that is there. Block devices keep their contents.
    pub fn create(path: &Path) -> Result<HostFile> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| Error::at("create", path, e))?;
        let file = HostFile::from_file(file, path, OpenMode::WRITE)?;
        if !file.device {
            // Only now that it is locked.
            file.set_len(0)?;
        }
        Ok(file)
    }

    /// A nameless file in `dir` that vanishes when it is closed.
    pub fn temporary(dir: &Path) -> Result<HostFile> {
        let open = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir);
        let file = open.map_err(|e| Error::at("create a temporary file in", dir, e))?;
        let mode = OpenMode { access: Access::Unlocked, ..OpenMode::WRITE };
        HostFile::from_file(file, &dir.join("(temporary)"), mode)
    }

    fn from_file(file: File, path: &Path, mode: OpenMode) -> Result<HostFile> {
        let meta = file.metadata().map_err(|e| Error::at("look at", path, e))?;
        let device = meta.file_type().is_block_device();
        if !device && !meta.is_file() {
            return Err(Error::Invalid(format!(
                "'{}' is neither a file nor a block device",
                path.display()
            )));
        }
        if mode.access != Access::Unlocked {
            lock::acquire(&file, path, mode.access)?;
        }
        let align = if mode.direct { direct_alignment(&file) } else { 1 };
        Ok(HostFile {
            file: RwLock::new(file),
            path: path.into(),
            mode: Mutex::new(mode),
            align,
            device,
            bounce: Mutex::new(()),
        })
    }

    /// Opens it again with or without write access, as `commit` needs for backing files.
    pub fn reopen(&self, write: bool) -> Result<()> {
        let mut mode = self.mode.lock().unwrap();
        let mut wanted = OpenMode { write, ..*mode };
        if wanted.access != Access::Unlocked {
            wanted.access = if write { Access::Write } else { Access::Read };
        }
        let mut slot = self.file.write().unwrap();
        let file = open_raw(&self.path, wanted)?;
        // Our own old locks would be in the way of the new description's.
        lock::acquire(&slot, &self.path, Access::Unlocked)?;
        if let Err(e) = lock::acquire(&file, &self.path, wanted.access) {
            let _ = lock::acquire(&slot, &self.path, mode.access);
            return Err(e);
        }
        *slot = file;
        *mode = wanted;
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Whether it is open for writing.
    pub fn writable(&self) -> bool {
        self.mode.lock().unwrap().write
    }
    /// Whether it is open with O_DIRECT.
    pub fn is_direct(&self) -> bool {
        self.align > 1
    }
    /// Alignment that O_DIRECT asks for; 1 without it.
    pub fn alignment(&self) -> u64 {
        self.align
    }
    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }
    /// The descriptor, valid as long as this is and is not reopened.
    pub fn raw_fd(&self) -> RawFd {
        self.file.read().unwrap().as_raw_fd()
    }
    /// Device and inode, which identify it.
    pub fn identity(&self) -> Result<(u64, u64)> {
        let m = self.file.read().unwrap().metadata();
        let m = m.map_err(|e| Error::at("look at", &self.path, e))?;
        Ok((m.dev(), m.ino()))
    }

    /// Length in bytes.
    pub fn len(&self) -> Result<u64> {
        let file = self.file.read().unwrap();
        let len = if self.device {
            use std::io::Seek;
            (&*file).seek(io::SeekFrom::End(0))
        } else {
            file.metadata().map(|m| m.len())
        };
        len.map_err(|e| Error::at("find the length of", &self.path, e))
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Bytes that it occupies on the host.
    pub fn allocated(&self) -> Result<u64> {
        let m = self.file.read().unwrap().metadata();
        m.map(|m| m.blocks() * 512).map_err(|e| Error::at("look at", &self.path, e))
    }

    /// Sets the length of a file; a block device's must suffice.
    pub fn set_len(&self, len: u64) -> Result<()> {
        if self.device {
            return if self.len()? >= len {
                Ok(())
            } else {
                Err(Error::Invalid(format!("device '{}' is too small", self.path.display())))
            };
        }
        let file = self.file.read().unwrap();
        file.set_len(len).map_err(|e| Error::at("resize", &self.path, e))
    }

    /// Reads; zeros beyond the end.
    pub fn read(&self, offset: u64, into: &Dst) -> Result<()> {
        let result = if self.is_aligned(offset, into.len()) && into.is_aligned(self.align as usize)
        {
            self.read_plain(offset, into)
        } else {
            self.read_bounced(offset, into)
        };
        result.map_err(|e| Error::at("read", &self.path, e))
    }

    /// Reads into a slice.
    pub fn read_bytes(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.read(offset, &Dst::new(into))
    }

    /// Writes.
    pub fn write(&self, offset: u64, from: &Src) -> Result<()> {
        let result = if self.is_aligned(offset, from.len()) && from.is_aligned(self.align as usize)
        {
            self.write_plain(offset, from)
        } else {
            self.write_bounced(offset, from)
        };
        result.map_err(|e| Error::at("write", &self.path, e))
    }

    /// Writes a slice.
    pub fn write_bytes(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.write(offset, &Src::new(from))
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len) & (self.align - 1) == 0
    }

    fn read_plain(&self, offset: u64, into: &Dst) -> io::Result<()> {
        let file = self.file.read().unwrap();
        let mut done = 0;
        while done < into.len() {
            let rest;
            let now = if done == 0 {
                into
            } else {
                rest = into.sub(done, u64::MAX);
                &rest
            };
            let count = now.iov().len().min(MAX_IOV) as libc::c_int;
            let at = signed(offset + done)?;
            // SAFETY: the iovecs are writable memory for the call.
            let n = unsafe { libc::preadv(file.as_raw_fd(), now.iov().as_ptr(), count, at) };
            match cvt(n) {
                Ok(0) => {
                    now.fill(0);
                    return Ok(());
                }
                Ok(n) => done += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            // A short direct read ends at an unaligned end of file.
            if self.align > 1 && done < into.len() && done & (self.align - 1) != 0 {
                into.sub(done, u64::MAX).fill(0);
                return Ok(());
            }
        }
        Ok(())
    }

    fn write_plain(&self, offset: u64, from: &Src) -> io::Result<()> {
        let file = self.file.read().unwrap();
        let mut done = 0;
        while done < from.len() {
            let rest;
            let now = if done == 0 {
                from
            } else {
                rest = from.sub(done, u64::MAX);
                &rest
            };
            let count = now.iov().len().min(MAX_IOV) as libc::c_int;
            let at = signed(offset + done)?;
            // SAFETY: the iovecs are readable memory for the call.
            let n = unsafe { libc::pwritev(file.as_raw_fd(), now.iov().as_ptr(), count, at) };
            match cvt(n) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_bounced(&self, offset: u64, into: &Dst) -> io::Result<()> {
        let mut buf = Aligned::new((BOUNCE + 2 * self.align) as usize, self.align as usize);
        let mut done = 0;
        while done < into.len() {
            let at = offset + done;
            let n = (into.len() - done).min(BOUNCE);
            let start = at & !(self.align - 1);
            let end = (at + n).next_multiple_of(self.align);
            let bytes = &mut buf.bytes()[..(end - start) as usize];
            self.read_plain(start, &Dst::new(bytes))?;
            let skip = (at - start) as usize;
            into.sub(done, n).copy_from(&bytes[skip..skip + n as usize]);
            done += n;
        }
        Ok(())
    }

    fn write_bounced(&self, offset: u64, from: &Src) -> io::Result<()> {
        let _alone = self.bounce.lock().unwrap();
        let mut buf = Aligned::new((BOUNCE + 2 * self.align) as usize, self.align as usize);
        let mut done = 0;
        while done < from.len() {
            let at = offset + done;
            let n = (from.len() - done).min(BOUNCE);
            let start = at & !(self.align - 1);
            let end = (at + n).next_multiple_of(self.align);
            let bytes = &mut buf.bytes()[..(end - start) as usize];
            if (start, end) != (at, at + n) {
                self.read_plain(start, &Dst::new(bytes))?;
            }
            let skip = (at - start) as usize;
            from.sub(done, n).copy_to(&mut bytes[skip..skip + n as usize]);
            self.write_plain(start, &Src::new(bytes))?;
            done += n;
        }
        Ok(())
    }

    /// What was written survives a crash of the host.
    pub fn sync(&self) -> Result<()> {
        let file = self.file.read().unwrap();
        file.sync_data().map_err(|e| Error::at("flush", &self.path, e))
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let file = self.file.read().unwrap();
        loop {
            // SAFETY: no memory is passed.
            let r =
                unsafe { libc::fallocate(file.as_raw_fd(), mode, signed(offset)?, signed(len)?) };
            if r == 0 {
                return Ok(());
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }

    fn device_range(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        let file = self.file.read().unwrap();
        // SAFETY: both requests read two u64.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) };
        if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Gives a range back to the host where it can take it; contents are then zeros, or stay on
    /// hosts that cannot. A hint: refusals of the file system's are no errors.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let result = if self.device {
            self.device_range(BLKDISCARD, offset, len)
        } else {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            self.fallocate(mode, offset, len)
        };
        match result {
            Err(e) if !cannot(&e) => Err(Error::at("discard a part of", &self.path, e)),
            _ => Ok(()),
        }
    }

    /// Makes a range zeros; with `unmap`, preferably without occupying room. Extends the file.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let fast = if self.device {
            self.device_range(BLKZEROOUT, offset, len)
        } else if unmap {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            self.fallocate(mode, offset, len)
        } else {
            self.fallocate(libc::FALLOC_FL_ZERO_RANGE, offset, len)
        };
        match fast {
            Ok(()) => {
                if unmap && !self.device && self.len()? < offset + len {
                    self.set_len(offset + len)?;
                }
                return Ok(());
            }
            Err(e) if !cannot(&e) => return Err(Error::at("zero a part of", &self.path, e)),
            Err(_) => {}
        }
        let mut zeros = Aligned::new(len.min(BOUNCE) as usize, self.align as usize);
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE);
            self.write_bytes(offset + done, &zeros.bytes()[..n as usize])?;
            done += n;
        }
        Ok(())
    }

    /// Reserves room for a range, so that writing there cannot fail for want of it; extends the
    /// file.
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        if self.device || len == 0 {
            return Ok(());
        }
        match self.fallocate(0, offset, len) {
            Err(e) if cannot(&e) => self.set_len(self.len()?.max(offset + len)),
            r => r.map_err(|e| Error::at("reserve room for", &self.path, e)),
        }
    }

    /// Whether the byte at `offset` is data or in a hole, and how far that goes on; `None` at or
    /// beyond the end. On hosts that do not know, all is data.
    pub fn extent(&self, offset: u64) -> Result<Option<(bool, u64)>> {
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        let file = self.file.read().unwrap();
        let seek = |whence| -> io::Result<u64> {
            // SAFETY: no memory is passed. The file position is used by nobody.
            let r = unsafe { libc::lseek(file.as_raw_fd(), signed(offset)?, whence) };
            u64::try_from(r).map_err(|_| io::Error::last_os_error())
        };
        let run = match seek(libc::SEEK_DATA) {
            Ok(at) if at > offset => (false, at.min(len) - offset),
            Ok(_) => {
                (true, seek(libc::SEEK_HOLE).map_or(len, |h| h.clamp(offset + 1, len)) - offset)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => (false, len - offset),
            Err(_) => (true, len - offset),
        };
        Ok(Some(run))
    }
}

/// A file offset as the kernel takes it.
fn signed(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// Whether the host lacks the operation, as opposed to having failed at it.
fn cannot(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::ENODEV)
    )
}

fn open_raw(path: &Path, mode: OpenMode) -> Result<File> {
    let flags = if mode.direct { libc::O_DIRECT } else { 0 };
    let access = if mode.write { libc::O_RDWR } else { libc::O_RDONLY };
    // Opening a FIFO must not wait for its other end.
    let open = |flags| fdset::open(path, access | flags | libc::O_NONBLOCK);
    open(flags).map_err(|e| {
        if mode.direct && e.raw_os_error() == Some(libc::EINVAL) && open(0).is_ok() {
            return Error::Unsupported(format!(
                "the file system of '{}' has no direct I/O; use cache=writeback",
                path.display()
            ));
        }
        Error::at("open", path, e)
    })
}

/// The alignment that direct I/O on `file` needs, found by trying.
fn direct_alignment(file: &File) -> u64 {
    let mut buf = Aligned::new(8192, 8192);
    for align in [512u64, 1024, 2048, 4096] {
        let start = &mut buf.bytes()[align as usize..2 * align as usize];
        // SAFETY: the slice is writable for its length.
        let n = unsafe { libc::pread(file.as_raw_fd(), start.as_mut_ptr().cast(), start.len(), 0) };
        if n >= 0 {
            return align;
        }
    }
    4096
}
