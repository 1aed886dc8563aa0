//! What a virtio device is to a transport, and what it gets when its driver is ready.

use super::VirtQueue;
use std::sync::Arc;

/// How a device tells its driver something. Any thread; does not block.
pub trait Signaller: Send + Sync {
    /// Queue `queue` has used buffers and the driver wants to know.
    fn used(&self, queue: u16);
    /// The configuration space has changed.
    fn config_changed(&self);
    /// The device cannot go on until the driver resets it.
    fn needs_reset(&self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Features both sides agreed upon.
    pub features: u64,
    /// Queues by index; `None` for one that the driver did not enable.
    pub queues: Vec<Option<VirtQueue>>,
    /// The way back.
    pub signaller: Arc<dyn Signaller>,
}

/// A device type's behaviour.
///
/// Calls come from vCPU threads, one at a time except [`VirtioDevice::notify`], which may come from
/// several and at any time.
pub trait VirtioDevice: Send + Sync {
    /// Device type (Virtio 1.3 §5).
    fn device_id(&self) -> u16;
    /// Features offered, those of [`super::feature`] apart.
    fn features(&self) -> u64 {
        0
    }
    /// Ring features of [`super::feature`] offered besides VERSION_1 and RING_RESET.
    fn ring_features(&self) -> u64 {
        super::feature::RING_INDIRECT_DESC
    }
    /// The largest size of each queue: powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device's configuration space. Bytes beyond it stay as they are (zero).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    /// Writes the device's configuration space.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready.
    fn activate(&self, activation: Activation);
    /// The driver has made buffers of `queue` available. May be spurious.
    fn notify(&self, queue: u16);
    /// Back to before [`VirtioDevice::activate`]. When it returns, nothing of the device touches
    /// guest memory or signals.
    fn reset(&self);
    /// As [`VirtioDevice::reset`], for one queue.
    fn reset_queue(&self, queue: u16);
    /// A queue that was reset is enabled again.
    fn enable_queue(&self, queue: VirtQueue);
}
