//! Claims on ranges of a disk: who copies a range excludes those who change it.

use std::sync::{Condvar, Mutex};

#[derive(Debug)]
struct Range {
    start: u64,
    end: u64,
    alone: bool,
}

/// Claims that are held.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Vec<Range>>,
    freed: Condvar,
}

/// A claim, as long as it lives.
pub struct Claim<'a> {
    claims: &'a Claims,
    start: u64,
    end: u64,
}

impl Claims {
    /// Waits until a range can be claimed: `alone`, or together with others that are not.
    fn take(&self, start: u64, end: u64, alone: bool) {
        let held = self.held.lock().unwrap();
        let clash = |r: &Range| r.start < end && start < r.end && (alone || r.alone);
        let mut held = self.freed.wait_while(held, |h| h.iter().any(clash)).unwrap();
        held.push(Range { start, end, alone });
    }

    fn give_back(&self, start: u64, end: u64, alone: bool) {
        let mut held = self.held.lock().unwrap();
        let same = |r: &Range| (r.start, r.end, r.alone) == (start, end, alone);
        if let Some(i) = held.iter().position(same) {
            held.swap_remove(i);
        }
        drop(held);
        self.freed.notify_all();
    }

    /// Claims a range alone. The holder waits for nobody.
    pub fn alone(&self, start: u64, len: u64) -> Claim<'_> {
        self.take(start, start + len, true);
        Claim { claims: self, start, end: start + len }
    }

    /// Claims a range with others, until [`Claims::unshare`].
    pub fn share(&self, start: u64, len: u64) {
        self.take(start, start + len, false);
    }

    /// Gives a shared claim back.
    pub fn unshare(&self, start: u64, len: u64) {
        self.give_back(start, start + len, false);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.give_back(self.start, self.end, true);
    }
}
