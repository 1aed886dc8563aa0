//! A queue in use: takes chains from the driver's available ring and gives them back used.

use super::device::Signaller;
use super::feature;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tandem_accel::memory::{GuestMap, GuestRam};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// A chain of descriptors: one request.
pub type Chain<'a> = DescriptorChain<&'a GuestRam>;

/// Flag of the available ring: the driver wants no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Set-up of a queue as its driver wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Whether the driver has enabled it.
    pub enabled: bool,
}

/// How far a look at a queue got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Nothing is left; the driver will notify of more.
    Empty,
    /// A queue length of requests was done and there may be more. With RING_EVENT_IDX the driver
    /// need not notify of them: come back by yourself. Without, and with notifications never
    /// turned off, whatever came late has its own notification.
    More,
    /// The queue makes no sense; the driver has been told to reset.
    Broken,
}

/// A queue in use.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestMap>,
    signaller: Arc<dyn Signaller>,
    broken: bool,
}

impl VirtQueue {
    /// Queue `index` as `config` says, with these features. `None` if its rings do not lie in RAM
    /// or are not aligned.
    pub fn new(
        index: u16,
        config: &QueueConfig,
        max_size: u16,
        features: u64,
        memory: Arc<GuestMap>,
        signaller: Arc<dyn Signaller>,
    ) -> Option<VirtQueue> {
        let mut queue = Queue::new(max_size).ok()?;
        queue.try_set_size(config.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(config.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(config.avail)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(config.used)).ok()?;
        queue.set_event_idx(features & feature::RING_EVENT_IDX != 0);
        queue.set_ready(true);
        // Address 0 is how the queue crate spells "not set".
        let valid = config.avail != 0 && queue.is_valid(&*memory.ram());
        valid.then_some(VirtQueue { index, queue, memory, signaller, broken: false })
    }

    /// Which queue of the device.
    pub fn index(&self) -> u16 {
        self.index
    }
    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
    /// Guest RAM as it is now.
    pub fn ram(&self) -> Arc<GuestRam> {
        self.memory.ram()
    }

    /// Declares the queue senseless and tells the driver.
    fn fail(&mut self, e: &Error) {
        log::warn!("virtio queue {}: {e}; the device needs a reset", self.index);
        self.broken = true;
        self.signaller.needs_reset();
    }

    /// Takes the next request out of the available ring of `ram`. Give it back with
    /// [`VirtQueue::push`]; a chain may be kept meanwhile by its head index.
    pub fn pop<'a>(&mut self, ram: &'a GuestRam) -> Option<Chain<'a>> {
        if self.broken {
            return None;
        }
        let next = self.queue.iter(ram).map(|mut i| i.next());
        next.unwrap_or_else(|e| {
            self.fail(&e);
            None
        })
    }

    /// Puts the last `n` requests taken by [`VirtQueue::pop`] back, as if they had not been taken.
    /// They have not been given back by [`VirtQueue::push`].
    pub fn unpop(&mut self, n: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(n));
    }

    /// Whether [`VirtQueue::pop`] would give a request. A hint: it takes nothing and blames nobody.
    pub fn has_more(&self, ram: &GuestRam) -> bool {
        let available = self.queue.avail_idx(ram, Ordering::Acquire);
        !self.broken && available.is_ok_and(|i| i.0 != self.queue.next_avail())
    }

    /// Gives the request with head `head` back, with `len` bytes written to it. The driver learns
    /// of it by [`VirtQueue::signal`].
    pub fn push(&mut self, ram: &GuestRam, head: u16, len: u32) {
        if self.broken {
            return;
        }
        if let Err(e) = self.queue.add_used(ram, head, len) {
            self.fail(&e);
        }
    }

    /// Signals the driver of what was pushed, if it wants to know.
    pub fn signal(&mut self, ram: &GuestRam) {
        if self.broken {
            return;
        }
        let wanted = match self.queue.needs_notification(ram) {
            Ok(false) => Ok(false),
            // The crate knows the index form of suppression only.
            Ok(true) if self.queue.event_idx_enabled() => Ok(true),
            Ok(true) => ram
                .read_obj::<u16>(GuestAddress(self.queue.avail_ring()))
                .map(|flags| u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
                .map_err(Error::GuestMemory),
            Err(e) => Err(e),
        };
        match wanted {
            Ok(true) => self.signaller.used(self.index),
            Ok(false) => {}
            Err(e) => self.fail(&e),
        }
    }

    /// Asks the driver not to notify, as far as the queue's form of suppression can.
    pub fn disable_notifications(&mut self, ram: &GuestRam) {
        if let (false, Err(e)) = (self.broken, self.queue.disable_notification(ram)) {
            self.fail(&e);
        }
    }

    /// Asks the driver to notify again. Returns whether something came meanwhile.
    pub fn enable_notifications(&mut self, ram: &GuestRam) -> bool {
        if self.broken {
            return false;
        }
        let more = self.queue.enable_notification(ram);
        more.unwrap_or_else(|e| {
            self.fail(&e);
            false
        })
    }

    /// Handles what is available, at most one queue length of requests. `handle` returns the number
    /// of bytes it wrote to the chain.
    pub fn drain(&mut self, mut handle: impl FnMut(&GuestRam, Chain<'_>) -> u32) -> Progress {
        let memory = self.ram();
        let ram = &*memory;
        let mut done = 0;
        while done < self.size() {
            let Some(chain) = self.pop(ram) else { break };
            let head = chain.head_index();
            let len = handle(ram, chain);
            self.push(ram, head, len);
            done += 1;
        }
        if done > 0 {
            self.signal(ram);
        }
        let more = if self.queue.event_idx_enabled() {
            self.enable_notifications(ram)
        } else {
            done == self.size()
        };
        match (self.broken, more) {
            (true, _) => Progress::Broken,
            (_, true) => Progress::More,
            _ => Progress::Empty,
        }
    }
}
