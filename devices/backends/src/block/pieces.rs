//! Scattered memory: what a request reads into or writes from.
//!
//! The memory may be a guest's RAM, which its vCPUs change meanwhile; so it is never turned into a
//! Rust slice here, but copied from and to by address, or handed to the kernel as an iovec. Only
//! the bytes' values are then undefined, as on hardware.

use std::marker::PhantomData;

/// Marks pieces to be filled.
#[derive(Debug)]
pub enum Fill {}
/// Marks pieces to be read.
#[derive(Debug)]
pub enum Drain {}

/// Where a read puts its bytes.
pub type Dst<'a> = Pieces<'a, Fill>;
/// Where a write takes its bytes.
pub type Src<'a> = Pieces<'a, Drain>;

/// Pieces of memory in order, valid for `'a`.
#[derive(Debug)]
pub struct Pieces<'a, Mode> {
    iov: Vec<libc::iovec>,
    len: u64,
    _memory: PhantomData<(&'a [u8], Mode)>,
}

// SAFETY: the addresses are valid on any thread for 'a (the constructors' contract), and nothing
// here assumes that others leave the memory alone.
unsafe impl<M> Send for Pieces<'_, M> {}
// SAFETY: as above; shared access only copies by address.
unsafe impl<M> Sync for Pieces<'_, M> {}

impl<'a> Dst<'a> {
    /// One piece to be filled.
    pub fn new(buf: &'a mut [u8]) -> Dst<'a> {
        let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: the slice is writable and ours for 'a.
        unsafe { Pieces::from_raw(vec![iov]) }
    }

    /// Fills all pieces with `byte`.
    pub fn fill(&self, byte: u8) {
        for v in &self.iov {
            // SAFETY: the piece is writable memory (the constructors' contract).
            unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), byte, v.iov_len) };
        }
    }

    /// Copies `data`, which is as long as the pieces are together or shorter, into their start.
    pub fn copy_from(&self, mut data: &[u8]) {
        for v in &self.iov {
            let (now, later) = data.split_at(data.len().min(v.iov_len));
            // SAFETY: the piece is writable for iov_len ≥ now.len() bytes and does not overlap a
            // live Rust slice other than by a guest's doing.
            unsafe { std::ptr::copy(now.as_ptr(), v.iov_base.cast::<u8>(), now.len()) };
            data = later;
        }
    }
}

impl<'a> Src<'a> {
    /// One piece to be read.
    pub fn new(buf: &'a [u8]) -> Src<'a> {
        let iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        // SAFETY: the slice is readable for 'a, and a Src is never written to.
        unsafe { Pieces::from_raw(vec![iov]) }
    }

    /// Copies the start of the pieces into `data`, which is as long as they are or shorter.
    pub fn copy_to(&self, mut data: &mut [u8]) {
        for v in &self.iov {
            let (now, later) = data.split_at_mut(data.len().min(v.iov_len));
            // SAFETY: the piece is readable for iov_len ≥ now.len() bytes.
            unsafe { std::ptr::copy(v.iov_base.cast::<u8>(), now.as_mut_ptr(), now.len()) };
            data = later;
        }
    }
}

impl<'a, M> Pieces<'a, M> {
    /// Pieces at these addresses.
    ///
    /// # Safety
    /// Each piece is mapped memory for `'a`, readable, and for a [`Dst`] writable. Others may
    /// access it at the same time, but not through Rust references.
    pub unsafe fn from_raw(iov: Vec<libc::iovec>) -> Pieces<'a, M> {
        let len = iov.iter().map(|v| v.iov_len as u64).sum();
        Pieces { iov, len, _memory: PhantomData }
    }

    /// Bytes of all pieces.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces for the kernel.
    pub fn iov(&self) -> &[libc::iovec] {
        &self.iov
    }

    /// Bytes `from..from + len` of the pieces taken together; clipped to what there is.
    pub fn sub(&self, mut from: u64, mut len: u64) -> Pieces<'_, M> {
        let mut iov = Vec::new();
        for v in &self.iov {
            let here = v.iov_len as u64;
            if from >= here {
                from -= here;
                continue;
            }
            if len == 0 {
                break;
            }
            let n = (here - from).min(len);
            // In bounds: from < iov_len.
            let base = v.iov_base.wrapping_byte_add(from as usize);
            iov.push(libc::iovec { iov_base: base, iov_len: n as usize });
            (from, len) = (0, len - n);
        }
        // SAFETY: parts of pieces that are valid for as long as self is borrowed.
        unsafe { Pieces::from_raw(iov) }
    }

    /// Whether every piece begins and ends at a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.iov.iter().all(|v| (v.iov_base as usize | v.iov_len) & (align - 1) == 0)
    }
}

impl Src<'_> {
    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        let mut part = [0; 4096];
        let mut at = 0;
        while at < self.len {
            let n = (self.len - at).min(4096) as usize;
            self.sub(at, n as u64).copy_to(&mut part[..n]);
            if !is_zero(&part[..n]) {
                return false;
            }
            at += n as u64;
        }
        true
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any bytes are a valid u64.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().chain(tail).all(|b| *b == 0)
        && words.chunks(64).all(|c| c.iter().fold(0, |a, w| a | w) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_where_they_should_be() {
        let (mut a, mut b) = ([0u8; 3], [0u8; 5]);
        let iov = [(&mut a[..]), (&mut b[..])]
            .map(|s| libc::iovec { iov_base: s.as_mut_ptr().cast(), iov_len: s.len() });
        // SAFETY: both arrays outlive the pieces and are not touched meanwhile.
        let d: Dst = unsafe { Pieces::from_raw(iov.to_vec()) };
        assert_eq!(d.len(), 8);
        d.copy_from(&[1, 2, 3, 4, 5, 6, 7, 8]);
        d.sub(2, 3).fill(9);
        assert!(d.sub(8, 1).is_empty());
        assert_eq!(d.sub(6, 100).len(), 2);
        let mut back = [0; 8];
        // SAFETY: as above; a Src only reads.
        let s: Src = unsafe { Pieces::from_raw(iov.to_vec()) };
        s.copy_to(&mut back);
        assert_eq!(back, [1, 2, 9, 9, 9, 6, 7, 8]);
        assert!(!s.is_zero());
        d.fill(0);
        assert!(s.is_zero());
    }
}
