//! The descriptors of one network, gathered in an epoll set.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Descriptors that are looked at in one turn.
const BATCH: usize = 256;

/// A descriptor that has become ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// As it was registered.
    pub token: u64,
    /// Something to read, an end, or an error.
    pub read: bool,
    /// Room to write, or an error.
    pub write: bool,
}

/// A set of descriptors.
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// An empty set.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller { epoll: Epoll::new()? })
    }

    /// Adds `fd`: ready once per arrival of bytes or of room (edge-triggered), so that a descriptor
    /// that waits for the guest costs nothing. Closing it removes it.
    pub fn add_edge(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.add(fd.as_raw_fd(), set, token)
    }

    /// Adds `fd`: ready while there is something to read.
    pub fn add_level(&self, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.add(fd.as_raw_fd(), EventSet::IN, token)
    }

    fn add(&self, fd: RawFd, set: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token))
    }

    /// Takes `fd` out.
    pub fn remove(&self, fd: &impl AsRawFd) {
        let none = EpollEvent::new(EventSet::empty(), 0);
        // Fails only if it is out already.
        let _ = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), none);
    }

    /// Sleeps until something is ready, at most `limit`; appends to `ready`.
    pub(super) fn wait(&self, limit: Option<Duration>, ready: &mut Vec<Ready>) {
        let ms = match limit {
            // Rounded up, or a short wait would spin.
            Some(t) => t.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32,
            None => -1,
        };
        let mut events = [EpollEvent::default(); BATCH];
        // Interrupted by a signal: as if nothing were ready.
        let n = self.epoll.wait(ms, &mut events).unwrap_or(0);
        let failed = EventSet::ERROR | EventSet::HANG_UP;
        ready.extend(events[..n].iter().map(|e| {
            let set = e.event_set();
            Ready {
                token: e.data(),
                read: set.intersects(EventSet::IN | EventSet::READ_HANG_UP | failed),
                write: set.intersects(EventSet::OUT | failed),
            }
        }));
    }
}
