//! The thread of a network.

use super::poller::{Poller, Ready};
use super::{Card, Link, Offloads};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Token of the bell; links use smaller ones.
const BELL: u64 = u64::MAX;

/// What the thread shares with the device.
struct Shared {
    bell: EventFd,
    card: Mutex<Slot>,
    end: AtomicBool,
    taken: AtomicBool,
}

/// The card that is attached. Held by the thread during each turn.
#[derive(Default)]
struct Slot {
    card: Option<Arc<dyn Card>>,
    /// The link has not been told of it.
    fresh: bool,
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn ring(&self) {
        // Fails only if the counter is full, and then the thread is awake already.
        let _ = self.bell.write(1);
    }
}

/// A network that one card can be attached to.
pub struct Network {
    shared: Arc<Shared>,
    offloads: Offloads,
    thread: Option<JoinHandle<()>>,
}

impl Network {
    /// Starts the thread of `link`; `name` names it (at most 15 bytes are shown).
    pub fn start(name: &str, mut link: Box<dyn Link>) -> io::Result<Arc<Network>> {
        let shared = Arc::new(Shared {
            bell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            card: Mutex::default(),
            end: AtomicBool::new(false),
            taken: AtomicBool::new(false),
        });
        let poller = Poller::new()?;
        poller.add_level(&shared.bell, BELL)?;
        link.start(&poller)?;
        let offloads = link.offloads();
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("net {name}"))
            .spawn(move || work(&theirs, &poller, link))?;
        Ok(Arc::new(Network { shared, offloads, thread: Some(thread) }))
    }

    /// What the guest may leave undone.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Makes it the caller's alone, as one network belongs to one card.
    pub fn take(&self) -> bool {
        !self.shared.taken.swap(true, Ordering::AcqRel)
    }

    /// Gives it back.
    pub fn give_back(&self) {
        self.shared.taken.store(false, Ordering::Release);
    }

    /// Joins `card`, whose driver is ready.
    pub fn attach(&self, card: Arc<dyn Card>) {
        *self.shared.slot() = Slot { card: Some(card), fresh: true };
        self.shared.ring();
    }

    /// Parts from the card. When it returns, nothing touches the card any more.
    pub fn detach(&self) {
        self.shared.slot().card = None;
    }

    /// The guest has made buffers available. Any thread; does not block.
    pub fn kick(&self) {
        self.shared.ring();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        self.shared.ring();
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn work(shared: &Shared, poller: &Poller, mut link: Box<dyn Link>) {
    let mut ready: Vec<Ready> = Vec::new();
    let mut nap = None;
    while !shared.end.load(Ordering::Acquire) {
        if shared.slot().card.is_none() {
            // What becomes ready stays so until a card comes.
            wait_for_bell(shared);
            nap = Some(Duration::ZERO);
        }
        if ready.is_empty() {
            poller.wait(nap, &mut ready);
        }
        if ready.iter().any(|r| r.token == BELL) {
            let _ = shared.bell.read();
            ready.retain(|r| r.token != BELL);
        }
        let mut slot = shared.slot();
        let fresh = std::mem::take(&mut slot.fresh);
        // Without a card, what was ready is kept: its edges are not told again.
        if let Some(card) = &slot.card {
            if fresh {
                link.attached(&**card);
            }
            nap = link.turn(&**card, poller, &ready);
            card.commit();
            ready.clear();
        }
    }
}

fn wait_for_bell(shared: &Shared) {
    use std::os::fd::AsRawFd;
    let mut p = libc::pollfd { fd: shared.bell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: p is one valid pollfd.
    unsafe { libc::poll(&mut p, 1, -1) };
    let _ = shared.bell.read();
}
