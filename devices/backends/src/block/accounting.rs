//! What a drive has done so far: requests, bytes, time.

use super::drive::Op;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes, of zeros too.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
}

/// Counts of one kind.
#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
}

/// The same at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that succeeded.
    pub done: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Nanoseconds from start to end, those of all requests added up.
    pub nanos: u64,
}

/// The books of a drive.
#[derive(Debug, Default)]
pub struct Accounting {
    kinds: [Counters; 4],
    highest_write: AtomicU64,
}

impl Accounting {
    /// Enters a request.
    pub fn enter(&self, op: &Op, took: Duration, succeeded: bool) {
        let (kind, bytes) = match op {
            Op::Read(_, to) => (Kind::Read, to.len()),
            Op::Write(at, from) => {
                let end = at.saturating_add(from.len());
                self.highest_write.fetch_max(end, Ordering::Relaxed);
                (Kind::Write, from.len())
            }
            Op::WriteZeroes(r) => (Kind::Write, r.iter().map(|r| r.1).sum()),
            Op::Flush => (Kind::Flush, 0),
            Op::Discard(r) => (Kind::Discard, r.iter().map(|r| r.1).sum()),
        };
        let c = &self.kinds[kind as usize];
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        c.nanos.fetch_add(nanos, Ordering::Relaxed);
        if succeeded {
            c.done.fetch_add(1, Ordering::Relaxed);
            c.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            c.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The counts of a kind.
    pub fn counts(&self, kind: Kind) -> Counts {
        let c = &self.kinds[kind as usize];
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Counts {
            done: get(&c.done),
            failed: get(&c.failed),
            bytes: get(&c.bytes),
            nanos: get(&c.nanos),
        }
    }

    /// End of the write farthest behind.
    pub fn highest_write(&self) -> u64 {
        self.highest_write.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pieces::{Dst, Src};
    use super::*;

    #[test]
    fn requests_are_counted_by_kind() {
        let a = Accounting::default();
        let ms = Duration::from_millis(1);
        let (read, write) = (Vec::leak(vec![0; 512]), Vec::leak(vec![0; 1024]));
        a.enter(&Op::Read(0, Dst::new(read)), ms, true);
        a.enter(&Op::Write(4096, Src::new(write)), ms, true);
        a.enter(&Op::WriteZeroes(vec![(0, 100, false)]), ms, false);
        a.enter(&Op::Flush, ms, true);
        let one = Counts { done: 1, failed: 0, bytes: 512, nanos: 1_000_000 };
        assert_eq!(a.counts(Kind::Read), one);
        assert_eq!(
            a.counts(Kind::Write),
            Counts { done: 1, failed: 1, bytes: 1024, nanos: 2_000_000 }
        );
        assert_eq!(a.counts(Kind::Flush).done, 1);
        assert_eq!(a.highest_write(), 5120);
    }
}
