//! Virtio 1.3: devices apart from how a driver reaches them.
//!
//! ```text
//!   registers ─► pci, mmio ───────► Core (status, features, queue set-up) ─► VirtioDevice
//!                     ▲                 │ activate: VirtQueues, Signaller        │
//!                     └── Notifier ◄────┴── Signaller: used, config, broken ◄────┘
//! ```
//!
//! What always holds:
//!
//! * A device sees queues and configuration bytes, never registers or vectors; a transport sees
//!   no buffers.
//! * A bad request fails that request. A queue that makes no sense sets DEVICE_NEEDS_RESET and is
//!   not touched again until the driver resets. Neither ends anything on the host.
//! * Notifications arrive on the vCPU's thread. A device that answers at once (entropy) does so
//!   there, at most one queue length of requests at a time; one that waits for the host (block,
//!   net) moves its queues and signaller, both `Send`, to its worker and only wakes that.
//! * Lock order: core → device → queue → notifier (which is lock-free up to the interrupt sink). A
//!   device may signal from any thread with its own lock held.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod core;
pub mod device;
pub mod mmio;
pub mod net;
pub mod p9;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod spans;
pub mod vsock;

pub use self::core::Core;
pub use device::{Activation, Signaller, VirtioDevice};
pub use queue::{Chain, Progress, VirtQueue};

/// Feature bits that belong to no device type (Virtio 1.3 §6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index rather than by flag.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device or driver.
    pub const VERSION_1: u64 = 1 << 32;
    /// The driver may reset single queues.
    pub const RING_RESET: u64 = 1 << 40;
}

/// Bits of the device status field (Virtio 1.3 §2.1).
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
#[cfg(any(test, feature = "hostile"))]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) mod testing;
