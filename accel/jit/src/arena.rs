//! Memory for generated code, mapped twice: once writable, once executable, never both (W^X).
//!
//! What always holds:
//!
//! * Offsets name the same byte in both mappings; only this file turns them into pointers.
//! * Space is handed out in chunks of [`CHUNK`] bytes. A chunk belongs to one compiler, so threads
//!   compile in parallel; a block lies within one chunk.
//! * Beside each chunk lies the table of its blocks with their snapshots (see
//!   [`crate::snapshot`]), in address order, so that a host pc leads to its snapshot.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Unit of allocation, and the most one block may occupy.
pub(crate) const CHUNK: usize = 128 << 10;

/// A block's entry in its chunk's table.
#[derive(Clone, Copy)]
struct BlockMeta {
    /// Offset in the arena.
    start: u32,
    /// Offset one past the end.
    end: u32,
    /// First word of its snapshot table in `ChunkMeta::words`.
    words: u32,
}

#[derive(Default)]
struct ChunkMeta {
    blocks: Vec<BlockMeta>,
    words: Vec<u64>,
}

/// The code memory.
pub(crate) struct Arena {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    /// Offset of the next free chunk.
    next: AtomicUsize,
    /// Offset where chunks start again after a reset.
    first: AtomicUsize,
    /// Counts resets.
    generation: AtomicU32,
    /// Bytes of code.
    used: AtomicUsize,
    meta: Vec<Mutex<ChunkMeta>>,
    /// Chunks of compilers that are gone.
    begun: Mutex<Vec<Cursor>>,
}

// SAFETY: the mappings live as long as the Arena; writes go through `write` (to space that its
// compiler owns exclusively) and the atomic patch functions.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// A compiler's current chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    generation: u32,
    pos: usize,
    end: usize,
}

impl Cursor {
    /// A cursor without a chunk.
    pub(crate) const EMPTY: Cursor = Cursor { generation: u32::MAX, pos: 0, end: 0 };
    /// Offset of the next free byte.
    pub(crate) fn pos(&self) -> usize {
        self.pos
    }
    /// Bytes left.
    pub(crate) fn room(&self) -> usize {
        self.end - self.pos
    }
}

fn lock(m: &Mutex<ChunkMeta>) -> MutexGuard<'_, ChunkMeta> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two mappings of `len` bytes of the same new memory: one to write, one to execute.
///
/// Shared anonymous memory rather than a memfd: `perf` looks for its map of generated code (see
/// `/tmp/perf-PID.map`) only where it sees anonymous memory.
fn map_twice(len: usize) -> io::Result<(*mut u8, *mut u8)> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping, no address given.
    let rw = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    if rw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let failed = |also: Option<*mut libc::c_void>| {
        let e = io::Error::last_os_error();
        for p in also.into_iter().chain([rw]) {
            // SAFETY: a mapping of this length made by this function, not yet given to anybody.
            unsafe { libc::munmap(p, len) };
        }
        e
    };
    // SAFETY: an old size of 0 makes a second mapping of shared pages and leaves the first (mremap(2)).
    let rx = unsafe { libc::mremap(rw, 0, len, libc::MREMAP_MAYMOVE) };
    if rx == libc::MAP_FAILED {
        return Err(failed(None));
    }
    // SAFETY: the mapping made above; nobody uses it yet.
    if unsafe { libc::mprotect(rx, len, libc::PROT_READ | libc::PROT_EXEC) } < 0 {
        return Err(failed(Some(rx)));
    }
    Ok((rw.cast(), rx.cast()))
}

/// The code memory's content in memory of its own, for a child process (see
/// [`crate::code::Backend::copy`]). In the parent, dropping it gives the memory back.
pub(crate) struct Copied {
    rw: *mut u8,
    rx: *mut u8,
    /// Where the child wants them.
    at: (*mut u8, *mut u8),
    len: usize,
}

impl Copied {
    /// In the child: puts the copies into the place of what is shared with the parent.
    ///
    /// # Errors
    /// The kernel refuses; the shared memory may be gone then.
    pub(crate) fn adopt(self) -> io::Result<()> {
        let copied = std::mem::ManuallyDrop::new(self);
        for (from, to) in [(copied.rw, copied.at.0), (copied.rx, copied.at.1)] {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: `from` is a mapping of `len` bytes that nobody uses; at `to` is one of the same
            // length with the same content, of an arena in a process that has only this thread.
            let r = unsafe {
                libc::mremap(from.cast(), copied.len, copied.len, flags, to.cast::<libc::c_void>())
            };
            if r == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl crate::code::CodeCopy for Copied {
    fn adopt(self: Box<Self>) -> io::Result<()> {
        Copied::adopt(*self)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        // SAFETY: exactly the mappings made in `Arena::copy`, which nobody uses.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}

impl Arena {
    /// A copy for a child process. Nobody compiles, links or poisons meanwhile.
    ///
    /// # Errors
    /// There is no memory.
    pub(crate) fn copy(&self) -> io::Result<Copied> {
        let (rw, rx) = map_twice(self.len)?;
        let used = self.next.load(Ordering::Acquire).min(self.len);
        // SAFETY: both mappings have `len` bytes, and the new one is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(self.rw, rw, used) };
        Ok(Copied { rw, rx, at: (self.rw, self.rx), len: self.len })
    }
    /// Maps at least `bytes` bytes (rounded up to chunks; at most 1 GiB, so that every jump within
    /// fits 32 bits).
    pub(crate) fn new(bytes: usize) -> io::Result<Arena> {
        let len = bytes.clamp(4 * CHUNK, 1 << 30).next_multiple_of(CHUNK);
        let (rw, rx) = map_twice(len)?;
        let meta = (0..len / CHUNK).map(|_| Mutex::default()).collect();
        Ok(Arena {
            rw,
            rx,
            len,
            next: AtomicUsize::new(0),
            first: AtomicUsize::new(0),
            generation: AtomicU32::new(0),
            used: AtomicUsize::new(0),
            meta,
            begun: Mutex::default(),
        })
    }
    /// Address of offset `off` in the executable mapping.
    pub(crate) fn addr(&self, off: usize) -> u64 {
        self.rx as u64 + off as u64
    }
    /// Offset of executable address `addr`, if it lies in the arena.
    pub(crate) fn offset(&self, addr: u64) -> Option<usize> {
        let off = addr.wrapping_sub(self.rx as u64);
        (off < self.len as u64).then_some(off as usize)
    }
    /// First address and length of the executable mapping.
    pub(crate) fn rx_range(&self) -> (u64, usize) {
        (self.rx as u64, self.len)
    }
    /// Whether `cursor` still owns its chunk.
    pub(crate) fn is_current(&self, cursor: &Cursor) -> bool {
        cursor.generation == self.generation.load(Ordering::Acquire)
    }
    /// Takes a chunk with at least `room` bytes left: one that a former compiler has begun, or a
    /// fresh one.
    pub(crate) fn chunk(&self, room: usize) -> Option<Cursor> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.retain(|c| self.is_current(c));
        if let Some(i) = begun.iter().position(|c| c.room() >= room) {
            return Some(begun.swap_remove(i));
        }
        drop(begun);
        self.span(1)
    }
    /// Returns the chunk of a compiler that ends.
    pub(crate) fn give_back(&self, cursor: Cursor) {
        if self.is_current(&cursor) {
            self.begun.lock().unwrap_or_else(PoisonError::into_inner).push(cursor);
        }
    }
    /// Takes `n` adjacent chunks.
    pub(crate) fn span(&self, n: usize) -> Option<Cursor> {
        let generation = self.generation.load(Ordering::Acquire);
        let bytes = n * CHUNK;
        self.next
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |at| {
                (at + bytes <= self.len).then_some(at + bytes)
            })
            .ok()
            .map(|pos| {
                self.populate(pos, bytes);
                Cursor { generation, pos, end: pos + bytes }
            })
    }
    /// Has the kernel bring in the pages of a fresh piece at once; one by one as they are written they
    /// cost a fault each. Where they are executed the kernel maps those around a fault with it. Kernels
    /// before 5.14 refuse, which does no harm.
    fn populate(&self, at: usize, len: usize) {
        // SAFETY: at + len <= self.len. Nothing changes in the content of the pages.
        unsafe { libc::madvise(self.rw.add(at).cast(), len, libc::MADV_POPULATE_WRITE) };
    }
    /// Makes everything handed out so far survive resets. It counts no longer.
    pub(crate) fn keep(&self) {
        self.used.store(0, Ordering::Relaxed);
        self.first.store(self.next.load(Ordering::Acquire), Ordering::Release);
    }
    /// Appends code at the cursor, with the words of its snapshot table. The caller has checked
    /// that it fits ([`Cursor::room`]). The cursor moves on to the next multiple of 16.
    pub(crate) fn commit(&self, cursor: &mut Cursor, code: &[u8], snapshots: &[u64]) {
        let start = cursor.pos;
        assert!(code.len() <= cursor.room());
        // SAFETY: start + len <= cursor.end <= self.len, and the chunk belongs to this cursor alone.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(start), code.len()) };
        cursor.pos = (start + code.len()).next_multiple_of(16).min(cursor.end);
        self.used.fetch_add(cursor.pos - start, Ordering::Relaxed);
        let mut meta = lock(&self.meta[start / CHUNK]);
        if meta.blocks.capacity() == 0 {
            // What a chunk holds of blocks of common size.
            meta.blocks.reserve_exact(CHUNK >> 9);
            meta.words.reserve_exact(CHUNK >> 5);
        }
        let words = meta.words.len() as u32;
        meta.words.extend_from_slice(snapshots);
        meta.blocks.push(BlockMeta {
            start: start as u32,
            end: (start + code.len()) as u32,
            words,
        });
    }
    /// Calls `f` with the offset and snapshot words of the block that contains offset `off`.
    pub(crate) fn with_block<R>(
        &self,
        off: usize,
        f: impl FnOnce(usize, &[u64]) -> R,
    ) -> Option<R> {
        let meta = lock(self.meta.get(off / CHUNK)?);
        let after = meta.blocks.partition_point(|b| b.start as usize <= off);
        let block = meta.blocks.get(after.checked_sub(1)?)?;
        // A call's return address may be the first byte past the block's last instruction.
        (off <= block.end as usize)
            .then(|| f(block.start as usize, meta.words.get(block.words as usize..).unwrap_or(&[])))
    }
    /// Drops all code made after [`Arena::keep`]. No other thread executes or compiles.
    pub(crate) fn reset(&self) {
        let first = self.first.load(Ordering::Acquire);
        for m in &self.meta[first / CHUNK..] {
            let mut m = lock(m);
            m.blocks.clear();
            m.words.clear();
        }
        self.used.store(0, Ordering::Relaxed);
        self.next.store(first, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }
    /// Bytes in use and in total.
    pub(crate) fn usage(&self) -> (usize, usize) {
        (self.used.load(Ordering::Relaxed), self.len - self.first.load(Ordering::Relaxed))
    }
    /// Copies bytes out.
    pub(crate) fn read(&self, off: usize, len: usize) -> Vec<u8> {
        let off = off.min(self.len);
        let len = len.min(self.len - off);
        // SAFETY: within the mapping. Concurrent patching may tear a displacement; this is for
        // listings only.
        unsafe { std::slice::from_raw_parts(self.rx.add(off), len).to_vec() }
    }
    /// Atomically replaces the four bytes at `off`, which lie within an aligned 8-byte word.
    pub(crate) fn patch32(&self, off: usize, value: u32) {
        let shift = 8 * (off % 8) as u32;
        assert!(off % 8 <= 4 && off + 4 <= self.len);
        // SAFETY: in bounds and aligned; all writers of published code use atomics.
        let word = unsafe { &*self.rw.add(off & !7).cast::<AtomicU64>() };
        let insert = |old| Some(old & !(0xffff_ffff << shift) | (value as u64) << shift);
        // The closure never refuses.
        let _ = word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, insert);
    }
    /// The 8-byte aligned word at `off`.
    pub(crate) fn word(&self, off: usize) -> u64 {
        assert!(off.is_multiple_of(8) && off + 8 <= self.len);
        // SAFETY: in bounds and aligned; all writers of published code use atomics.
        let word = unsafe { &*self.rw.add(off).cast::<AtomicU64>() };
        word.load(Ordering::Acquire)
    }
    /// Atomically replaces the 8-byte aligned word at `off`.
    pub(crate) fn patch64(&self, off: usize, value: u64) {
        assert!(off.is_multiple_of(8) && off + 8 <= self.len);
        // SAFETY: in bounds and aligned; all writers of published code use atomics.
        let word = unsafe { &*self.rw.add(off).cast::<AtomicU64>() };
        word.store(value, Ordering::Release);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly the mappings made in `new`; nobody borrows them any more.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_by_address_and_dropped_by_reset() {
        let arena = Arena::new(1 << 20).expect("memfd");
        arena.span(1).expect("thunks");
        arena.keep();
        let mut c = arena.chunk(1).expect("chunk");
        let a = c.pos();
        arena.commit(&mut c, &[0x90; 20], &[1, 2]);
        let b = c.pos();
        assert_eq!(b, a + 32);
        arena.commit(&mut c, &[0xc3; 5], &[3]);
        assert_eq!(arena.with_block(a + 7, |s, w| (s, w[0])), Some((a, 1)));
        assert_eq!(arena.with_block(b, |s, w| (s, w[0])), Some((b, 3)));
        assert_eq!(arena.with_block(b + 9, |s, _| s), None);
        assert_eq!(arena.read(b, 2), [0xc3; 2]);
        assert_eq!(arena.offset(arena.addr(b)), Some(b));
        arena.reset();
        assert!(!arena.is_current(&c));
        assert_eq!(arena.with_block(a, |s, _| s), None);
        assert_eq!(arena.usage().0, 0);
    }

    #[test]
    fn runs_out_of_chunks_without_harm() {
        let arena = Arena::new(0).expect("memfd");
        let n = std::iter::from_fn(|| arena.chunk(1)).count();
        assert_eq!(n, 4);
        assert!(arena.chunk(1).is_none());
    }
}
