//! Entropy device (Virtio 1.3 §5.4): fills whatever buffers the driver gives with random bytes.
//!
//! It answers on the vCPU thread that notifies: the host's generator does not block, and one
//! request takes at most [`MAX_REQUEST`] bytes.

use super::pci;
use super::queue::{Chain, VirtQueue};
use super::{Activation, VirtioDevice, mmio};
use crate::registry::{BusKind, DeviceType, Property, PropertyKind};
use std::io::Write;
use std::sync::{Arc, Mutex};
use tandem_accel::memory::GuestRam;
use tandem_backends::entropy::{EntropySource, HostEntropy};

/// Virtio device type.
pub const DEVICE_ID: u16 = 4;
/// The most bytes of one request that are filled; the driver learns how many were.
pub const MAX_REQUEST: usize = 64 << 10;

const QUEUE_SIZES: [u16; 1] = [8];

/// An entropy device.
pub struct VirtioRng {
    source: Arc<dyn EntropySource>,
    queue: Mutex<Option<VirtQueue>>,
}

impl VirtioRng {
    /// A device that draws from `source`.
    pub fn new(source: Arc<dyn EntropySource>) -> VirtioRng {
        VirtioRng { source, queue: Mutex::new(None) }
    }

    /// Fills a request; returns how many bytes it wrote.
    fn fill(&self, ram: &GuestRam, chain: Chain<'_>) -> u32 {
        let Ok(mut writer) = chain.writer(ram) else {
            log::warn!("virtio-rng: a buffer is not in memory; the request gets nothing");
            return 0;
        };
        let mut left = writer.available_bytes().min(MAX_REQUEST);
        let mut written = 0;
        let mut bytes = [0; 1024];
        while left > 0 {
            let part = &mut bytes[..left.min(1024)];
            if let Err(e) = self.source.fill(part) {
                log::warn!("virtio-rng: {e}");
                break;
            }
            if writer.write_all(part).is_err() {
                break;
            }
            left -= part.len();
            written += part.len() as u32;
        }
        written
    }
}

impl VirtioDevice for VirtioRng {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn activate(&self, mut activation: Activation) {
        *self.queue.lock().unwrap() = activation.queues.pop().flatten();
    }
    fn notify(&self, _queue: u16) {
        if let Some(q) = &mut *self.queue.lock().unwrap() {
            // Late requests have a notification of their own: suppression is never on.
            q.drain(|ram, chain| self.fill(ram, chain));
        }
    }
    fn reset(&self) {
        *self.queue.lock().unwrap() = None;
    }
    fn reset_queue(&self, _queue: u16) {
        self.reset();
    }
    fn enable_queue(&self, queue: VirtQueue) {
        *self.queue.lock().unwrap() = Some(queue);
    }
}

const PROPERTIES: &[Property] = &[Property {
    name: "rng",
    kind: PropertyKind::Text,
    default: None,
    description: "the object that entropy comes from; the host's if absent",
}];

inventory::submit! {
    DeviceType {
        name: "virtio-rng-pci",
        bus: BusKind::Pci,
        description: "entropy from the host",
        properties: PROPERTIES,
        create: |ctx, props| {
            let device = Arc::new(VirtioRng::new(Arc::new(HostEntropy)));
            pci::attach(ctx, props, "virtio-rng-pci", device)
        },
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-rng-device",
        bus: BusKind::VirtioMmio,
        description: "entropy from the host",
        properties: PROPERTIES,
        create: |ctx, _| mmio::attach(ctx, Arc::new(VirtioRng::new(Arc::new(HostEntropy)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Rig;
    use crate::virtio::{feature, status};
    use std::io;

    struct Ones;
    impl EntropySource for Ones {
        fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
            bytes.fill(1);
            Ok(())
        }
    }
    struct Dry;
    impl EntropySource for Dry {
        fn fill(&self, _: &mut [u8]) -> io::Result<()> {
            Err(io::Error::other("dry"))
        }
    }

    #[test]
    fn buffers_are_filled() {
        let rig = Rig::new();
        let d = rig.attach(Arc::new(VirtioRng::new(Arc::new(Ones))));
        d.negotiate(feature::VERSION_1 | feature::RING_INDIRECT_DESC).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        assert_eq!(q.request(&[], &[3, 2000]), vec![1; 2003]);
        assert_eq!(q.last_len(), 2003);
        // Readable buffers are none of its business.
        q.request(&[&[0; 4]], &[]);
        assert_eq!(q.last_len(), 0);
        assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
    }

    #[test]
    fn a_dry_source_fails_the_request_only() {
        let rig = Rig::new();
        let d = rig.attach(Arc::new(VirtioRng::new(Arc::new(Dry))));
        d.negotiate(feature::VERSION_1).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        assert_eq!(q.request(&[], &[4]), [0; 4]);
        assert_eq!(q.last_len(), 0);
    }

    #[test]
    fn the_registry_makes_it() {
        let rig = Rig::new();
        let props = [("addr".to_string(), "4".to_string())];
        let dev = crate::registry::create(&rig.context(), "virtio-rng-pci", &props).unwrap();
        let mut id = [0; 4];
        rig.pci.bus.config_read(0, "4".parse().unwrap(), 0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
        dev.reset();
        let again = crate::registry::create(&rig.context(), "virtio-rng-pci", &props);
        assert!(again.err().unwrap()[0].to_string().contains("taken"));
    }
}
