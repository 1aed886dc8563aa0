//! The raw format: the bytes of the disk are the bytes of the file.

use super::error::{Error, Result};
use super::file::HostFile;
use super::pieces::{Dst, Src};
use super::{
    BlockRead, BlockWrite, Description, Direct, Extent, ExtentKind, Extents, Image, Placed,
    Preallocation, Resize,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: Arc<HostFile>,
    /// Length in bytes, rounded up to a sector for those above.
    size: AtomicU64,
}

impl Raw {
    /// The whole of `file`.
    pub fn new(file: Arc<HostFile>) -> Result<Raw> {
        let size = AtomicU64::new(file.len()?.next_multiple_of(512));
        Ok(Raw { file, size })
    }

    /// Makes `file` a raw image of `size` bytes.
    pub fn create(file: &HostFile, size: u64, how: Preallocation) -> Result<()> {
        file.set_len(size)?;
        match how {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => file.preallocate(0, size),
            Preallocation::Full => fill_with_zeros(file, 0, size),
        }
    }
}

/// Writes zeros as bytes, so that the room is there and has been written.
pub(super) fn fill_with_zeros(file: &HostFile, mut at: u64, end: u64) -> Result<()> {
    let zeros = vec![0; 1 << 20];
    while at < end {
        let n = (end - at).min(zeros.len() as u64);
        file.write_bytes(at, &zeros[..n as usize])?;
        at += n;
    }
    Ok(())
}

impl BlockRead for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
    fn read(&self, offset: u64, into: &Dst) -> Result<()> {
        self.in_range(offset, into.len())?;
        self.file.read(offset, into)
    }
}

impl BlockWrite for Raw {
    fn write(&self, offset: u64, from: &Src) -> Result<()> {
        self.in_range(offset, from.len())?;
        self.file.write(offset, from)
    }
    fn flush(&self) -> Result<()> {
        self.file.sync()
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.in_range(offset, len)?;
        self.file.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.in_range(offset, len)?;
        if len == 0 { Ok(()) } else { self.file.discard(offset, len) }
    }
}

impl Extents for Raw {
    fn extent(&self, offset: u64) -> Result<Extent> {
        let left = self.size() - offset.min(self.size());
        Ok(match self.file.extent(offset)? {
            Some((data, len)) => Extent {
                kind: if data { ExtentKind::Data } else { ExtentKind::Zero },
                // The last sector may be longer than the file.
                len: if len.next_multiple_of(512) >= left { left } else { len },
                host: Some(offset),
                compressed: false,
            },
            None => Extent { kind: ExtentKind::Zero, len: left, host: None, compressed: false },
        })
    }
}

impl Resize for Raw {
    fn resize(&self, size: u64, how: Preallocation) -> Result<()> {
        let old = self.file.len()?;
        if how == Preallocation::Metadata {
            let what = "a raw image has no metadata to preallocate; use off, falloc or full";
            return Err(Error::Unsupported(what.into()));
        }
        self.file.set_len(size)?;
        if size > old {
            match how {
                Preallocation::Falloc => self.file.preallocate(old, size - old)?,
                Preallocation::Full => fill_with_zeros(&self.file, old, size)?,
                _ => {}
            }
        }
        self.size.store(size.next_multiple_of(512), Ordering::Release);
        Ok(())
    }
}

impl Image for Raw {
    fn describe(&self) -> Description {
        Description { format: "raw", cluster_size: None, ..Description::default() }
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
        match self.file.writable() == write {
            true => Ok(()),
            false => self.file.reopen(write),
        }
    }
    fn extents(&self) -> &dyn Extents {
        self
    }
    fn resizable(&self) -> Option<&dyn Resize> {
        self.file.writable().then_some(self)
    }
    fn direct(&self) -> Option<Direct> {
        Some(Direct { file: self.file.clone() })
    }
    fn place(&self, offset: u64, len: u64, write: bool) -> Option<Placed> {
        let may = self.in_range(offset, len).is_ok() && (!write || self.file.writable());
        may.then(|| Placed { file: self.file.clone(), offset, _keep: None })
    }
}
