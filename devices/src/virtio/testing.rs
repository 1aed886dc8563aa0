//! The other side, for tests: a driver that finds a device on PCI, negotiates, and runs requests.

use super::VirtioDevice;
use super::mmio::{Slot, Slots};
use super::pci::VirtioPci;
use super::status;
use crate::gsi::IrqInputs;
use crate::pci::assign::{Ranges, assign};
use crate::pci::testing::Recorder;
use crate::pci::{Devfn, PciDevice};
use crate::power::{PowerRequest, PowerSink};
use crate::registry::{Backends, DeviceContext};
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::memory::{GuestMap, RegionKind};
use vm_memory::{Bytes, GuestAddress};

/// Size of guest memory.
pub const RAM: u64 = 0x20_0000;
/// Where queue `n` lives: descriptors, available ring, used ring, buffers.
const QUEUE_AREA: u64 = 0x10_0000;
const AREA_LEN: u64 = 0x2_0000;

/// The place for a device without PCI.
pub const MMIO_SLOT: Slot = Slot { base: 0xfeb0_0000, gsi: 5 };

/// An empty machine with RAM and a root bus.
pub struct Rig {
    pub pci: crate::pci::testing::Rig,
    pub sink: Arc<Recorder>,
    pub map: Arc<GuestMap>,
    /// Places for devices without PCI.
    pub slots: Arc<Slots>,
}

impl Rig {
    pub fn new() -> Rig {
        let pci = crate::pci::testing::rig();
        let map = GuestMap::new();
        map.add("ram", RegionKind::Ram, 0, RAM).unwrap();
        let slots = Arc::new(Slots::new(vec![MMIO_SLOT]));
        Rig { sink: pci.sink.clone(), pci, map, slots }
    }

    pub fn context(&self) -> DeviceContext {
        struct Deaf;
        impl PowerSink for Deaf {
            fn request(&self, _: PowerRequest) {}
        }
        DeviceContext {
            io: self.pci.io.clone(),
            irqs: IrqInputs::new(self.sink.clone()),
            msi: self.sink.clone(),
            clock: Clock::new(),
            memory: self.map.clone(),
            power: Arc::new(Deaf),
            pci: Some(self.pci.bus.clone()),
            buses: Default::default(),
            virtio_mmio: Some(self.slots.clone()),
            boot_order: Default::default(),
            backends: Backends::default(),
            directory: Default::default(),
        }
    }

    /// Attaches `device` in slot 1, places its BARs and turns MSI-X on: vector `n` carries data
    /// 0x40 + n, the configuration's last vector 0x4f.
    pub fn attach(&self, device: Arc<dyn VirtioDevice>) -> Driver {
        let at = Devfn::new(1, 0);
        let queues = device.queue_sizes().len() as u16;
        let pci = VirtioPci::attach(&self.pci.bus, at, "test", device, self.map.clone()).unwrap();
        let ranges = Ranges { io: 0..0, mem32: 0xc000_0000..0xd000_0000, mem64: 0..0 };
        assign(&self.pci.bus, ranges).unwrap();
        let f = pci.function();
        let d = Driver {
            io: self.pci.io.clone(),
            map: self.map.clone(),
            bar: f.bar_address(4).unwrap(),
            msix: Some((f.bar_address(1).unwrap(), queues)),
            pci,
        };
        d.config_write(4, &[0x06, 0]);
        d.enable_msix();
        d
    }
}

/// A driver of one device.
pub struct Driver {
    io: Arc<IoBus>,
    map: Arc<GuestMap>,
    bar: u64,
    /// Address of the vector table, and the configuration's vector.
    msix: Option<(u64, u16)>,
    pci: Arc<VirtioPci>,
}

impl Driver {
    pub fn read8(&self, at: u64) -> u8 {
        let mut d = [0];
        self.io.mmio_read(self.bar + at, &mut d);
        d[0]
    }
    pub fn read16(&self, at: u64) -> u16 {
        let mut d = [0; 2];
        self.io.mmio_read(self.bar + at, &mut d);
        u16::from_le_bytes(d)
    }
    pub fn read32(&self, at: u64) -> u32 {
        let mut d = [0; 4];
        self.io.mmio_read(self.bar + at, &mut d);
        u32::from_le_bytes(d)
    }
    pub fn write8(&self, at: u64, v: u8) {
        self.io.mmio_write(self.bar + at, &[v]);
    }
    pub fn write16(&self, at: u64, v: u16) {
        self.io.mmio_write(self.bar + at, &v.to_le_bytes());
    }
    pub fn write32(&self, at: u64, v: u32) {
        self.io.mmio_write(self.bar + at, &v.to_le_bytes());
    }
    pub fn status(&self) -> u8 {
        self.read8(0x14)
    }
    pub fn config_read32(&self, at: u16) -> u32 {
        let mut d = [0; 4];
        self.pci.config_read(at, &mut d);
        u32::from_le_bytes(d)
    }
    pub fn config_write(&self, at: u16, data: &[u8]) {
        self.pci.config_write(at, data);
    }

    /// Offset of the vendor capability of type `kind`.
    pub fn capability(&self, kind: u8) -> u16 {
        let byte = |at| self.config_read32(at) as u8;
        let mut at = u16::from(byte(0x34));
        while at != 0 {
            if byte(at) == 9 && byte(at + 3) == kind {
                return at;
            }
            at = byte(at + 1).into();
        }
        panic!("no capability of type {kind}");
    }

    fn msix_cap(&self) -> u16 {
        let mut at = self.config_read32(0x34) as u8;
        while self.config_read32(at.into()) as u8 != 0x11 {
            at = (self.config_read32(at.into()) >> 8) as u8;
        }
        at.into()
    }

    fn enable_msix(&self) {
        let Some((table, config)) = self.msix else { return };
        for n in 0..=config {
            let entry = table + 16 * u64::from(n);
            let data = if n == config { 0x4f } else { 0x40 + u32::from(n) };
            self.io.mmio_write(entry, &0xfee0_0000u64.to_le_bytes());
            self.io.mmio_write(entry + 8, &data.to_le_bytes());
            self.io.mmio_write(entry + 12, &[0; 4]);
        }
        self.config_write(self.msix_cap() + 2, &0x8000u16.to_le_bytes());
    }

    /// Turns MSI-X off for good.
    pub fn use_intx(&mut self) {
        self.config_write(self.msix_cap() + 2, &[0, 0]);
        self.msix = None;
    }

    /// Resets the device and agrees on `features`; else the features it offers.
    pub fn negotiate(&self, features: u64) -> Result<(), u64> {
        self.write8(0x14, 0);
        assert_eq!(self.status(), 0);
        self.write8(0x14, status::ACKNOWLEDGE);
        self.write8(0x14, status::ACKNOWLEDGE | status::DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write32(0, half);
            offered |= u64::from(self.read32(4)) << (32 * half);
            self.write32(8, half);
            self.write32(0xc, (features >> (32 * half)) as u32);
        }
        self.write8(0x14, self.status() | status::FEATURES_OK);
        if let Some((_, vector)) = self.msix {
            self.write16(0x10, vector);
        }
        if self.status() & status::FEATURES_OK != 0 { Ok(()) } else { Err(offered) }
    }

    pub fn driver_ok(&self) {
        self.write8(0x14, self.status() | status::DRIVER_OK);
    }

    /// Sets queue `index` up with `size` descriptors and enables it.
    pub fn queue(&self, index: u16, size: u16) -> DriverQueue {
        let base = QUEUE_AREA + AREA_LEN * u64::from(index);
        let ram = self.map.ram();
        ram.write_slice(&vec![0; 0x8000], GuestAddress(base)).unwrap();
        self.write16(0x16, index);
        assert!(self.read16(0x18) >= size);
        self.write16(0x18, size);
        for (at, addr) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
            self.write32(at, addr as u32);
            self.write32(at + 4, (addr >> 32) as u32);
        }
        if self.msix.is_some() {
            self.write16(0x1a, index);
            assert_eq!(self.read16(0x1a), index);
        }
        self.write16(0x1c, 1);
        let notify = u64::from(self.read16(0x1e)) * 4 + 0x3000;
        DriverQueue {
            io: self.io.clone(),
            map: self.map.clone(),
            notify: self.bar + notify,
            index,
            size,
            base,
            avail: 0,
            seen: 0,
            last_len: 0,
        }
    }
}

/// The driver's side of a queue.
pub struct DriverQueue {
    io: Arc<IoBus>,
    map: Arc<GuestMap>,
    notify: u64,
    index: u16,
    size: u16,
    base: u64,
    avail: u16,
    seen: u16,
    last_len: u32,
}

impl DriverQueue {
    fn put<T: vm_memory::ByteValued>(&self, v: T, at: u64) {
        self.map.ram().write_obj(v, GuestAddress(at)).unwrap();
    }
    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.map.ram().read_obj(GuestAddress(at)).unwrap()
    }
    /// Descriptor `n`: address, length, flags, next.
    pub fn raw_descriptor(&self, n: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = self.base + 16 * u64::from(n);
        self.put(addr, at);
        self.put(len, at + 8);
        self.put(flags, at + 12);
        self.put(next, at + 14);
    }
    pub fn set_avail_flags(&self, flags: u16) {
        self.put(flags, self.base + 0x1000);
    }
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail = index;
        self.put(index, self.base + 0x1002);
    }
    pub fn add_head(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.put(head, self.base + 0x1004 + 2 * slot);
        self.set_avail_index(self.avail.wrapping_add(1));
        self.seen = self.used_index();
        // used_event: tell me of the next one.
        self.put(self.seen, self.base + 0x1004 + 2 * u64::from(self.size));
    }
    pub fn used_index(&self) -> u16 {
        self.get(self.base + 0x2002)
    }
    pub fn kick(&self) {
        self.io.mmio_write(self.notify, &self.index.to_le_bytes());
    }
    /// Waits until the last request added is used.
    pub fn wait(&self) {
        let start = std::time::Instant::now();
        while self.used_index() != self.seen.wrapping_add(1) {
            assert!(start.elapsed().as_secs() < 10, "the request was not used");
            std::thread::yield_now();
        }
    }
    /// Makes descriptor `n` a writable buffer of `len` bytes, at most 4096, and available. Does not
    /// wait.
    pub fn offer(&mut self, n: u16, len: u32) {
        self.raw_descriptor(n, (self.buffer(n), len, 2, 0));
        self.add_head(n);
        self.kick();
    }
    fn buffer(&self, n: u16) -> u64 {
        self.base + 0x4000 + 0x1000 * u64::from(n)
    }
    /// The bytes of used buffer number `nth` since the queue began, after waiting for it.
    pub fn used_bytes(&self, nth: u16) -> Vec<u8> {
        let start = std::time::Instant::now();
        while self.used_index().wrapping_sub(nth) as i16 <= 0 {
            assert!(start.elapsed().as_secs() < 10, "buffer {nth} was not used");
            std::thread::yield_now();
        }
        let slot = self.base + 0x2004 + 8 * u64::from(nth % self.size);
        let (head, len) = (self.get::<u32>(slot), self.get::<u32>(slot + 4));
        let mut bytes = vec![0; len as usize];
        let at = GuestAddress(self.buffer(head as u16));
        self.map.ram().read_slice(&mut bytes, at).unwrap();
        bytes
    }
    /// Length that the device wrote in the last request.
    pub fn last_len(&self) -> u32 {
        self.last_len
    }

    /// Runs one request with these readable buffers and writable lengths; returns the writable
    /// bytes.
    pub fn request(&mut self, readable: &[&[u8]], writable: &[u32]) -> Vec<u8> {
        let (mut at, mut n) = (self.base + 0x4000, 0);
        let total = (readable.len() + writable.len()) as u16;
        let mut place = |q: &DriverQueue, len: u32, write: u16| {
            let more = u16::from(n + 1 < total);
            q.raw_descriptor(n, (at, len, write | more, n + 1));
            n += 1;
            at += u64::from(len);
            at - u64::from(len)
        };
        for r in readable {
            let to = place(self, r.len() as u32, 0);
            self.map.ram().write_slice(r, GuestAddress(to)).unwrap();
        }
        let places: Vec<_> = writable.iter().map(|w| (place(self, *w, 2), *w)).collect();
        let ram = self.map.ram();
        for (to, len) in &places {
            ram.write_slice(&vec![0; *len as usize], GuestAddress(*to)).unwrap();
        }
        self.add_head(0);
        self.kick();
        self.wait();
        let slot = self.base + 0x2004 + 8 * u64::from(self.seen % self.size);
        assert_eq!(self.get::<u32>(slot), 0);
        self.last_len = self.get(slot + 4);
        let mut out = Vec::new();
        for (from, len) in places {
            let mut b = vec![0; len as usize];
            ram.read_slice(&mut b, GuestAddress(from)).unwrap();
            out.extend(b);
        }
        out
    }
}
