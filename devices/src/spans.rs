//! The buffers of a request as spans of guest memory, for devices that let the host read and write
//! there directly.

use std::ops::Range;
use tandem_accel::memory::GuestRam;
use tandem_backends::block::pieces::Pieces;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Spans of guest memory in order, taken as one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    spans: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Spans {
    /// Adds `len` bytes at `addr`, which need not be in memory.
    pub fn push(&mut self, addr: GuestAddress, len: u32) {
        self.spans.push((addr, len));
        self.len += u64::from(len);
    }

    /// Bytes of all spans.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes `range`, clipped to what there is.
    pub fn part(&self, range: Range<u64>) -> Spans {
        let (mut part, mut at) = (Spans::default(), 0);
        for (addr, len) in &self.spans {
            let end = at + u64::from(*len);
            let (from, to) = (range.start.max(at), range.end.min(end));
            if from < to {
                // An address that wraps is in no memory, which whoever uses it finds out.
                part.push(GuestAddress(addr.0.wrapping_add(from - at)), (to - from) as u32);
            }
            at = end;
        }
        part
    }

    /// Copies the first bytes out; returns whether there were as many and all in memory.
    pub fn read(&self, ram: &GuestRam, mut to: &mut [u8]) -> bool {
        for (addr, len) in &self.spans {
            let (now, later) = to.split_at_mut(to.len().min(*len as usize));
            if ram.read_slice(now, *addr).is_err() {
                return false;
            }
            to = later;
        }
        to.is_empty()
    }

    /// Copies into the first bytes; returns whether there were as many and all in memory.
    pub fn write(&self, ram: &GuestRam, mut from: &[u8]) -> bool {
        for (addr, len) in &self.spans {
            let (now, later) = from.split_at(from.len().min(*len as usize));
            if ram.write_slice(now, *addr).is_err() {
                return false;
            }
            from = later;
        }
        from.is_empty()
    }

    /// The host's addresses of the spans; `None` if one does not lie in memory.
    ///
    /// # Safety
    /// The caller keeps the memory behind `ram` for as long as the result is used, and after
    /// writing there calls [`Spans::written`].
    pub unsafe fn pieces<M>(&self, ram: &GuestRam) -> Option<Pieces<'static, M>> {
        let mut iov = Vec::with_capacity(self.spans.len());
        for (addr, len) in &self.spans {
            for slice in ram.get_slices(*addr, *len as usize) {
                let slice = slice.ok()?;
                let guard = slice.ptr_guard_mut();
                iov.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
        }
        // SAFETY: each piece is mapped guest memory, which is accessed by address only; the caller
        // keeps it.
        Some(unsafe { Pieces::from_raw(iov) })
    }

    /// Notes that the host has written to the spans, for those who watch guest memory.
    pub fn written(&self, ram: &GuestRam) {
        for (addr, len) in &self.spans {
            for slice in ram.get_slices(*addr, *len as usize).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}
