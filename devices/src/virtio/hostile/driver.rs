//! What a hostile driver does, over each transport.

use super::Choices;
use super::subjects::Header;
use crate::registry::Device;
use crate::virtio::mmio::VirtioMmio;
use crate::virtio::testing::{Driver, RAM, Rig};
use crate::virtio::{VirtioDevice, feature, status};
use std::sync::Arc;
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Registers of the common configuration (Virtio 1.3 §4.1.4.3) as the transport lays them out.
mod reg {
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_AVAIL: u64 = 0x28;
    pub const QUEUE_USED: u64 = 0x30;
    pub const QUEUE_RESET: u64 = 0x3a;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
}

/// Where a queue lies and how far its driver is.
#[derive(Clone, Copy)]
struct Queue {
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    notify: u64,
    next: u16,
}

/// A driver over PCI at work.
struct Hostile<'a, 'b> {
    c: &'a mut Choices<'b>,
    ram: Arc<GuestRam>,
    driver: &'a Driver,
    header: Header,
}

/// Runs one case over PCI. Panics if the device cannot be used afterwards.
pub fn pci(device: Arc<dyn VirtioDevice>, header: Header, c: &mut Choices) {
    let rig = Rig::new();
    let queues = device.queue_sizes().len() as u16;
    let driver = rig.attach(device);
    let mut h = Hostile { c, ram: rig.map.ram(), driver: &driver, header };
    while h.c.step() {
        h.life(queues);
    }
    driver.negotiate(feature::VERSION_1).expect("a driver that behaves is accepted");
    drop(driver.queue(0, 8));
    driver.driver_ok();
    assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    driver.write8(reg::STATUS, 0);
}

impl Hostile<'_, '_> {
    /// From one reset to the next.
    fn life(&mut self, queues: u16) {
        let offered = self.driver.negotiate(u64::MAX).unwrap_err();
        // What was not offered is refused; of the rest, anything goes.
        let any = self.c.word();
        let features = offered & self.c.pick(&[u64::MAX, 0, any]) | feature::VERSION_1;
        let agreed = self.driver.negotiate(features).is_ok();
        let mut queues: Vec<_> = (0..queues).map(|i| self.queue(i)).collect();
        self.driver.driver_ok();
        while self.c.step() {
            let i = self.c.below(queues.len() as u64) as usize;
            match self.c.below(16) {
                0 => return,
                1 => self.register(),
                2 => self.device_config(),
                3 => {
                    self.driver.write16(reg::QUEUE_SELECT, queues[i].index);
                    self.driver.write16(reg::QUEUE_RESET, 1);
                    if self.c.below(2) == 0 {
                        queues[i] = self.queue(i as u16);
                    }
                }
                4 => self.litter(),
                _ => {
                    self.table(queues[i].desc, queues[i].size, queues[i], 0);
                    self.offer(&mut queues[i]);
                    self.driver.write16(queues[i].notify, queues[i].index);
                }
            }
        }
        assert!(agreed || self.driver.status() & status::DRIVER_OK == 0);
    }

    /// Sets queue `index` up anywhere, rings over rings.
    fn queue(&mut self, index: u16) -> Queue {
        let d = self.driver;
        d.write16(reg::QUEUE_SELECT, index);
        let max = d.read16(reg::QUEUE_SIZE).max(1);
        let size = (1u16 << self.c.below(9)).min(max);
        let mut place = || RAM / 2 + self.c.below(0x8000) * 16;
        let (desc, avail, used) = (place(), place(), place());
        d.write16(reg::QUEUE_SIZE, size);
        for (at, address) in
            [(reg::QUEUE_DESC, desc), (reg::QUEUE_AVAIL, avail), (reg::QUEUE_USED, used)]
        {
            d.write32(at, address as u32);
            d.write32(at + 4, (address >> 32) as u32);
        }
        d.write16(reg::QUEUE_ENABLE, 1);
        let notify = reg::NOTIFY + 4 * u64::from(d.read16(reg::QUEUE_NOTIFY_OFF));
        // What the ring holds is what somebody else left there.
        let _ = self.ram.write_obj(0u32, GuestAddress(avail));
        Queue { index, size, desc, avail, used, notify, next: 0 }
    }

    /// Mostly in memory, also at its edges, in the rings, and far outside.
    fn address(&mut self, q: Queue) -> u64 {
        match self.c.below(12) {
            0 => RAM - self.c.below(64),
            1 => RAM + self.c.below(1 << 20),
            2 => u64::MAX - self.c.below(8192),
            3 => q.desc + self.c.below(4096),
            4 => q.used + self.c.below(64),
            _ => self.c.below(RAM),
        }
    }

    fn length(&mut self) -> u32 {
        let small = self.c.below(0x10_0000) as u32;
        self.c.pick(&[0, 1, 4, 12, 16, 17, 512, 513, 4096, 65536, u32::MAX, small, small])
    }

    /// A table of at most `n` descriptors at `at`; some are right.
    fn table(&mut self, at: u64, n: u16, q: Queue, depth: u32) {
        for i in 0..n {
            if i > 3 && !self.c.step() {
                return;
            }
            let (mut addr, mut len) = (self.address(q), self.length());
            let mut flags = self.c.pick(&[0u16, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 0xffff]);
            let any = self.c.below(1 << 16) as u16;
            let mut next = self.c.pick(&[i.wrapping_add(1), i, 0, any]);
            if self.c.below(2) == 0 {
                // A request as drivers make it: header, data, status.
                let place = self.c.below(RAM / 2);
                let header = (self.header)(self.c);
                let _ = self.ram.write_slice(&header, GuestAddress(place));
                (addr, len, flags, next) = (place, header.len() as u32, 1, i.wrapping_add(1));
            }
            if flags & 4 != 0 && depth < 2 && self.c.below(2) == 0 {
                let entries = self.c.pick(&[1u16, 2, 7, 64]);
                addr = self.c.below(RAM / 16 - 256) * 16;
                len = u32::from(entries) * 16 + self.c.pick(&[0, 0, 0, 1, 15]);
                self.table(addr, entries, q, depth + 1);
            }
            self.descriptor(at + 16 * u64::from(i), addr, len, flags, next);
        }
    }

    fn descriptor(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut b = addr.to_le_bytes().to_vec();
        b.extend(len.to_le_bytes());
        b.extend(flags.to_le_bytes());
        b.extend(next.to_le_bytes());
        // Tables may lie where there is no memory.
        let _ = self.ram.write_slice(&b, GuestAddress(at));
    }

    /// Makes some heads available, seldom more than there are.
    fn offer(&mut self, q: &mut Queue) {
        let n = match self.c.below(50) {
            0 => self.c.below(1 << 16) as u16,
            _ => self.c.below(u64::from(q.size.min(8)) + 1) as u16,
        };
        for i in 0..n.min(q.size) {
            let head = match self.c.below(100) {
                0 => self.c.below(1 << 16) as u16,
                _ => self.c.below(q.size.into()) as u16,
            };
            let slot = u64::from(q.next.wrapping_add(i) % q.size);
            let _ = self.ram.write_obj(head.to_le(), GuestAddress(q.avail + 4 + 2 * slot));
        }
        q.next = q.next.wrapping_add(n);
        let _ = self.ram.write_obj(self.c.pick(&[0u16, 1]), GuestAddress(q.avail));
        let _ = self.ram.write_obj(q.next.to_le(), GuestAddress(q.avail + 2));
    }

    /// Words in memory that may be taken for anything.
    fn litter(&mut self) {
        let at = self.c.below(RAM) & !7;
        for i in 0..self.c.below(16) {
            let _ = self.ram.write_obj(self.c.word(), GuestAddress(at + 8 * i));
        }
    }

    fn device_config(&mut self) {
        let at = reg::DEVICE + self.c.pick(&[0, 1, 8, 32, 59, 60, 200, 0xffd]);
        let value = self.c.word();
        match self.c.below(4) {
            0 => drop(self.driver.read32(at)),
            1 => self.driver.write8(at, value as u8),
            2 => self.driver.write16(at, value as u16),
            _ => self.driver.write32(at, value as u32),
        }
    }

    fn register(&mut self) {
        let (at, value, len) = access(self.c);
        match len {
            1 => self.driver.write8(at, value as u8),
            2 => self.driver.write16(at, value as u16),
            _ => self.driver.write32(at, value as u32),
        }
        self.driver.read32(at);
    }
}

/// A register, a value and a width.
fn access(c: &mut Choices) -> (u64, u64, usize) {
    let (near, far) = (c.below(0x48), c.below(0x4000));
    let at = c.pick(&[near, near, near * 4, far % 0x200, far]);
    let (any, word) = (c.word(), c.below(RAM));
    let value = c.pick(&[0, 1, 2, 4, 8, 15, 64, any, word, u64::MAX]);
    (at, value, c.pick(&[1, 2, 4, 4, 4, 8]))
}

/// Runs one case over the MMIO transport: registers in any order, with any value.
pub fn mmio(device: Arc<dyn VirtioDevice>, c: &mut Choices) {
    let rig = Rig::new();
    let mmio = VirtioMmio::new(device, rig.map.clone(), rig.context().irqs.line(5));
    while c.step() {
        let (at, value, len) = access(c);
        let at = at % 0x200;
        let mut data = value.to_le_bytes();
        mmio.write(at, &data[..len]);
        mmio.read(at, &mut data[..len]);
        if c.below(64) == 0 {
            // Otherwise most of it would happen to a device that waits for a reset.
            Device::reset(&*mmio);
        }
    }
    Device::reset(&*mmio);
}
