//! What every transport does alike: device status, feature negotiation and queue set-up (Virtio
//! 1.3 §2.1, §2.2, §3.1).
//!
//! ```text
//!   Reset ──ACKNOWLEDGE, DRIVER──► Driver ──FEATURES_OK──► Agreed ──DRIVER_OK──► Live
//!     ▲                              (subset of the offer,    (device activated)    │
//!     │                               with VERSION_1)                               │
//!     └──────────────────────────── status := 0 ◄──────────── DEVICE_NEEDS_RESET ◄──┘
//! ```
//!
//! Always: status bits are only ever added, except by a reset; features are fixed from Agreed on;
//! a device is activated exactly once per way to Live.

use super::device::{Activation, Signaller, VirtioDevice};
use super::queue::{QueueConfig, VirtQueue};
use super::{feature, status};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use tandem_accel::memory::GuestMap;

/// How a transport interrupts the driver. Any thread.
pub trait Notifier: Send + Sync {
    /// For used buffers of `queue`.
    fn queue(&self, queue: u16);
    /// For a change of configuration or status.
    fn config(&self);
}

/// The part of the state that devices reach through their [`Signaller`]; free of locks.
struct Face {
    status: AtomicU8,
    generation: AtomicU8,
    notifier: Arc<dyn Notifier>,
}

impl Face {
    fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }
    fn is_live(&self) -> bool {
        self.status() & status::DRIVER_OK != 0
    }
}

impl Signaller for Face {
    fn used(&self, queue: u16) {
        self.notifier.queue(queue);
    }
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.is_live() {
            self.notifier.config();
        }
    }
    fn needs_reset(&self) {
        let bit = status::DEVICE_NEEDS_RESET;
        let old = self.status.fetch_or(bit, Ordering::AcqRel);
        if old & bit == 0 && old & status::DRIVER_OK != 0 {
            self.notifier.config();
        }
    }
}

struct State {
    driver_features: u64,
    queues: Vec<QueueConfig>,
}

/// Status, features and queues of one device.
pub struct Core {
    device: Arc<dyn VirtioDevice>,
    memory: Arc<GuestMap>,
    face: Arc<Face>,
    state: Mutex<State>,
}

impl Core {
    /// A device in reset.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: Arc<GuestMap>,
        notifier: Arc<dyn Notifier>,
    ) -> Core {
        let queues = fresh_queues(&*device);
        Core {
            device,
            memory,
            face: Arc::new(Face {
                status: AtomicU8::new(0),
                generation: AtomicU8::new(0),
                notifier,
            }),
            state: Mutex::new(State { driver_features: 0, queues }),
        }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.device.queue_sizes().len() as u16
    }

    /// All features offered.
    pub fn offered(&self) -> u64 {
        let d = &self.device;
        d.features() | d.ring_features() | feature::VERSION_1 | feature::RING_RESET
    }

    /// Features the driver has written.
    pub fn driver_features(&self) -> u64 {
        self.state.lock().unwrap().driver_features
    }

    /// Writes the features that the driver accepts: 32 bits, the low half (0) or the high one (1).
    /// Ignored once they are agreed upon.
    pub fn set_driver_features(&self, half: u32, value: u32) {
        let mut s = self.state.lock().unwrap();
        if self.face.status() & status::FEATURES_OK != 0 || half > 1 {
            return;
        }
        let shift = 32 * half;
        s.driver_features = s.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        self.face.status()
    }

    /// Number of changes of the configuration space, modulo 256.
    pub fn config_generation(&self) -> u8 {
        self.face.generation.load(Ordering::Acquire)
    }

    /// Writes the device status field.
    pub fn set_status(&self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut s = self.state.lock().unwrap();
        let old = self.face.status();
        let mut add = value & !old & !status::DEVICE_NEEDS_RESET;
        if add & status::FEATURES_OK != 0 && !self.agrees(s.driver_features) {
            log::warn!(
                "virtio device {}: driver asks for features {:#x}, offered are {:#x}",
                self.device.device_id(),
                s.driver_features,
                self.offered()
            );
            add &= !status::FEATURES_OK;
        }
        if (old | add) & status::FEATURES_OK == 0 {
            add &= !status::DRIVER_OK;
        }
        self.face.status.fetch_or(add, Ordering::AcqRel);
        if add & status::DRIVER_OK != 0 {
            self.activate(&mut s);
        }
    }

    fn agrees(&self, features: u64) -> bool {
        features & !self.offered() == 0 && features & feature::VERSION_1 != 0
    }

    fn make_queue(&self, index: usize, s: &State) -> Option<VirtQueue> {
        let (config, max) = (s.queues.get(index)?, *self.device.queue_sizes().get(index)?);
        let queue = VirtQueue::new(
            index as u16,
            config,
            max,
            s.driver_features,
            self.memory.clone(),
            self.face.clone(),
        );
        if queue.is_none() {
            log::warn!(
                "virtio device {}: queue {index} has impossible rings {config:x?}",
                self.device.device_id()
            );
            self.face.needs_reset();
        }
        queue
    }

    fn activate(&self, s: &mut State) {
        let enabled = |i: usize| s.queues[i].enabled;
        let queues: Vec<_> = (0..s.queues.len())
            .map(|i| if enabled(i) { self.make_queue(i, s) } else { None })
            .collect();
        if self.face.status() & status::DEVICE_NEEDS_RESET == 0 {
            let signaller = self.face.clone();
            self.device.activate(Activation { features: s.driver_features, queues, signaller });
        }
    }

    /// Back to the start.
    pub fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        // No notification reaches the device from here on.
        self.face.status.store(0, Ordering::Release);
        self.device.reset();
        s.driver_features = 0;
        s.queues = fresh_queues(&*self.device);
        // The device may have signalled until its reset returned.
        self.face.status.store(0, Ordering::Release);
    }

    /// Set-up of a queue; `None` if there is no such queue.
    pub fn queue(&self, index: u16) -> Option<QueueConfig> {
        self.state.lock().unwrap().queues.get(usize::from(index)).copied()
    }

    /// Changes the set-up of a queue that is not enabled.
    pub fn configure_queue(&self, index: u16, change: impl FnOnce(&mut QueueConfig)) {
        let mut s = self.state.lock().unwrap();
        if let Some(q) = s.queues.get_mut(usize::from(index)).filter(|q| !q.enabled) {
            change(q);
        }
    }

    /// Sets the size of a queue that is not enabled; sizes that are no power of two or too large
    /// are ignored.
    pub fn set_queue_size(&self, index: u16, size: u16) {
        let max = self.device.queue_sizes().get(usize::from(index)).copied().unwrap_or(0);
        if size.is_power_of_two() && size <= max {
            self.configure_queue(index, |q| q.size = size);
        }
    }

    /// Enables a queue. A live device gets it at once.
    pub fn enable_queue(&self, index: u16) {
        let mut s = self.state.lock().unwrap();
        let live = self.face.is_live();
        if live && s.driver_features & feature::RING_RESET == 0 {
            return;
        }
        let Some(q) = s.queues.get_mut(usize::from(index)).filter(|q| !q.enabled) else { return };
        q.enabled = true;
        if live && let Some(queue) = self.make_queue(index.into(), &s) {
            self.device.enable_queue(queue);
        }
    }

    /// Resets one queue, where that was agreed upon.
    pub fn reset_queue(&self, index: u16) {
        let mut s = self.state.lock().unwrap();
        let i = usize::from(index);
        if s.driver_features & feature::RING_RESET == 0 || i >= s.queues.len() {
            return;
        }
        if self.face.is_live() && s.queues[i].enabled {
            self.device.reset_queue(index);
        }
        s.queues[i] = QueueConfig { size: self.device.queue_sizes()[i], ..QueueConfig::default() };
    }

    /// The driver notifies of queue `index`.
    pub fn notify(&self, index: u16) {
        let st = self.face.status();
        if st & (status::DRIVER_OK | status::DEVICE_NEEDS_RESET) == status::DRIVER_OK
            && index < self.queue_count()
        {
            self.device.notify(index);
        }
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueConfig> {
    let fresh = |size: &u16| QueueConfig { size: *size, ..QueueConfig::default() };
    device.queue_sizes().iter().map(fresh).collect()
}
