//! Limits of I/O: leaky buckets, with QEMU's meaning of the numbers.
//!
//! Each limit has a bucket that leaks `avg` units a second. A request may start while the bucket is
//! not above its brim; then the request's units are poured in. Without a burst the brim is a tenth
//! of a second's worth. With `max`, bursts at that rate are allowed for `length` seconds.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// One limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limit {
    /// Units a second, in the long run; 0 for no limit.
    pub avg: f64,
    /// Units a second in a burst; 0 for none.
    pub max: f64,
    /// Seconds that a burst may last, at least 1.
    pub length: f64,
}

/// Limits of a drive: bytes and requests, together and by direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// Bytes read or written.
    pub bps: Limit,
    /// Bytes read.
    pub bps_rd: Limit,
    /// Bytes written.
    pub bps_wr: Limit,
    /// Requests.
    pub iops: Limit,
    /// Reads.
    pub iops_rd: Limit,
    /// Writes.
    pub iops_wr: Limit,
    /// Bytes that count as one request; 0: a request counts as one whatever its length.
    pub iops_size: u64,
}

impl Limits {
    /// Whether anything is limited.
    pub fn any(&self) -> bool {
        self.all().iter().any(|l| l.avg > 0.0)
    }
    fn all(&self) -> [Limit; 6] {
        [self.bps, self.bps_rd, self.bps_wr, self.iops, self.iops_rd, self.iops_wr]
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

impl Limit {
    fn leak(&self, b: &mut Bucket, seconds: f64) {
        b.level = (b.level - self.avg * seconds).max(0.0);
        if self.max > 0.0 {
            b.burst = (b.burst - self.max * seconds).max(0.0);
        }
    }
    /// Seconds until the next request may start.
    fn wait(&self, b: &Bucket) -> f64 {
        if self.avg <= 0.0 {
            return 0.0;
        }
        if self.max <= 0.0 {
            return ((b.level - self.avg / 10.0) / self.avg).max(0.0);
        }
        let brim = self.max * self.length.max(1.0);
        let long = (b.level - brim) / self.avg;
        // Even a burst keeps to its own rate.
        let short = if self.length > 1.0 { (b.burst - self.max / 10.0) / self.max } else { 0.0 };
        long.max(short).max(0.0)
    }
}

/// The buckets of a drive.
#[derive(Debug)]
pub struct Throttle {
    limits: Limits,
    state: Mutex<([Bucket; 6], Instant)>,
}

impl Throttle {
    /// Empty buckets.
    pub fn new(limits: Limits) -> Throttle {
        Throttle { limits, state: Mutex::new((Default::default(), Instant::now())) }
    }

    /// What it enforces.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Asks to start a request of `bytes`. Zero: it has been counted and may start. Else ask again
    /// after that time.
    pub fn ask(&self, write: bool, bytes: u64) -> Duration {
        self.ask_at(write, bytes, Instant::now())
    }

    fn ask_at(&self, write: bool, bytes: u64, now: Instant) -> Duration {
        let mut state = self.state.lock().unwrap();
        let (buckets, last) = &mut *state;
        let seconds = now.saturating_duration_since(*last).as_secs_f64();
        *last = now.max(*last);
        let limits = self.limits.all();
        let requests = match self.limits.iops_size {
            0 => 1.0,
            n => (bytes as f64 / n as f64).max(1.0),
        };
        let of = |i: usize| match (i % 3, write) {
            (1, true) | (2, false) => 0.0,
            _ if i < 3 => bytes as f64,
            _ => requests,
        };
        let mut wait = 0.0f64;
        for (i, (l, b)) in limits.iter().zip(buckets.iter_mut()).enumerate() {
            l.leak(b, seconds);
            if of(i) > 0.0 {
                wait = wait.max(l.wait(b));
            }
        }
        // Less than this is not worth a sleep.
        if wait > 1e-6 {
            return Duration::from_secs_f64(wait.min(10.0));
        }
        for (i, b) in buckets.iter_mut().enumerate() {
            b.level += of(i);
            b.burst += of(i);
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that get through in `seconds` of simulated time.
    fn through(limits: Limits, seconds: u64, size: u64, write: bool) -> u64 {
        let t = Throttle::new(limits);
        let start = t.state.lock().unwrap().1;
        let (mut now, mut done) = (Duration::ZERO, 0);
        while now < Duration::from_secs(seconds) {
            match t.ask_at(write, size, start + now) {
                Duration::ZERO => done += size,
                d => now += d,
            }
        }
        done
    }

    #[test]
    fn averages_hold() {
        let l = Limit { avg: 1e6, ..Limit::default() };
        let n = through(Limits { bps: l, ..Limits::default() }, 10, 4096, false);
        assert!((10_000_000..10_200_000).contains(&n), "{n}");
        let n = through(Limits { bps_wr: l, ..Limits::default() }, 10, 65536, true);
        assert!((10_000_000..10_300_000).contains(&n), "{n}");
        let iops = Limit { avg: 100.0, ..Limit::default() };
        let n = through(Limits { iops, ..Limits::default() }, 10, 512, true) / 512;
        assert!((1000..1020).contains(&n), "{n}");
    }

    #[test]
    fn bursts_are_longer_and_end() {
        let bps = Limit { avg: 1e6, max: 4e6, length: 5.0 };
        let n = through(Limits { bps, ..Limits::default() }, 60, 4096, false);
        // 60 s at 1 MB/s, and a bucket of 20 MB.
        assert!((79_000_000..81_000_000).contains(&n), "{n}");
        let n = through(Limits { bps, ..Limits::default() }, 3, 4096, false);
        assert!((11_900_000..13_000_000).contains(&n), "{n}");
    }

    #[test]
    fn directions_are_told_apart() {
        let t = Throttle::new(Limits {
            iops_wr: Limit { avg: 1.0, ..Limit::default() },
            ..Limits::default()
        });
        assert_eq!(t.ask(true, 512), Duration::ZERO);
        assert!(t.ask(true, 512) > Duration::from_millis(500));
        assert_eq!(t.ask(false, 512), Duration::ZERO);
    }
}
