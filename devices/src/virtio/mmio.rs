//! Virtio over MMIO (Virtio 1.3 §4.2): one page of registers and one interrupt line per device.
//!
//! ```text
//!   registers ─► VirtioMmio ─► Core ─► VirtioDevice
//!   line ◄── interrupt status (used, config) ◄── Notifier
//! ```
//!
//! Always: the line is high while the interrupt status is not zero. If an acknowledgement leaves a
//! bit, the line falls and rises again, so that a driver whose input is edge-triggered gets it too.
//! The status is an atomic, so a device signals without a lock of the transport.

use super::VirtioDevice;
use super::core::{Core, Notifier};
use crate::gsi::IrqInputs;
use crate::registry::{Device, DeviceContext, DeviceFault};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::irq::IrqLine;
use tandem_accel::memory::GuestMap;

/// Bytes of one device's registers.
pub const REGISTERS: u64 = 0x200;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version of the interface: not a legacy device.
const VERSION: u32 = 2;
/// "TNDM".
const VENDOR: u32 = 0x4d44_4e54;
/// Start of the device's configuration space.
const CONFIG: u64 = 0x100;

const USED: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// Registers (§4.2.2).
mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// Length and base of a shared memory region: all ones, as there is none.
    pub const SHM: std::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
}

/// Interrupt status and line.
struct Interrupt {
    status: AtomicU32,
    line: IrqLine,
    /// Orders changes of the line as those of the status.
    order: Mutex<()>,
}

impl Interrupt {
    fn raise(&self, bit: u32) {
        let _order = self.order.lock().unwrap();
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.line.set(true);
    }
    fn acknowledge(&self, bits: u32) {
        let _order = self.order.lock().unwrap();
        let left = self.status.fetch_and(!bits, Ordering::AcqRel) & !bits;
        self.line.set(false);
        if left != 0 {
            self.line.set(true);
        }
    }
}

impl Notifier for Interrupt {
    fn queue(&self, _queue: u16) {
        self.raise(USED);
    }
    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }
}

/// A virtio device behind MMIO registers.
pub struct VirtioMmio {
    core: Core,
    interrupt: Arc<Interrupt>,
    device_feature_half: AtomicU32,
    driver_feature_half: AtomicU32,
    queue: AtomicU32,
}

impl VirtioMmio {
    /// `device`, with its registers nowhere yet.
    pub fn new(device: Arc<dyn VirtioDevice>, memory: Arc<GuestMap>, line: IrqLine) -> Arc<Self> {
        let interrupt =
            Arc::new(Interrupt { status: AtomicU32::new(0), line, order: Mutex::new(()) });
        Arc::new(VirtioMmio {
            core: Core::new(device, memory, interrupt.clone()),
            interrupt,
            device_feature_half: AtomicU32::new(0),
            driver_feature_half: AtomicU32::new(0),
            queue: AtomicU32::new(0),
        })
    }

    /// Status, features and queues.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The selected queue; one that is nowhere if the number is too large.
    fn selected(&self) -> u16 {
        u16::try_from(self.queue.load(Ordering::Acquire)).unwrap_or(u16::MAX)
    }

    fn register(&self, at: u64) -> u32 {
        let (core, queue) = (&self.core, self.selected());
        let half = |features: u64| match self.device_feature_half.load(Ordering::Acquire) {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        match at {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => core.device().device_id().into(),
            reg::VENDOR => VENDOR,
            reg::DEVICE_FEATURES => half(core.offered()),
            reg::QUEUE_SIZE_MAX => {
                let sizes = core.device().queue_sizes();
                sizes.get(usize::from(queue)).copied().unwrap_or(0).into()
            }
            reg::QUEUE_READY => core.queue(queue).is_some_and(|q| q.enabled).into(),
            reg::INTERRUPT_STATUS => self.interrupt.status.load(Ordering::Acquire),
            reg::STATUS => core.status().into(),
            reg::CONFIG_GENERATION => core.config_generation().into(),
            at if reg::SHM.contains(&at) => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, at: u64, value: u32) {
        let (core, queue) = (&self.core, self.selected());
        let low = |old: &mut u64| *old = *old & !0xffff_ffff | u64::from(value);
        let high = |old: &mut u64| *old = *old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            reg::DEVICE_FEATURES_SEL => self.device_feature_half.store(value, Ordering::Release),
            reg::DRIVER_FEATURES_SEL => self.driver_feature_half.store(value, Ordering::Release),
            reg::DRIVER_FEATURES => {
                core.set_driver_features(self.driver_feature_half.load(Ordering::Acquire), value);
            }
            reg::QUEUE_SEL => self.queue.store(value, Ordering::Release),
            reg::QUEUE_SIZE => core.set_queue_size(queue, u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_READY if value & 1 == 1 => core.enable_queue(queue),
            // A driver takes its queues away after a reset, when they are gone already, or singly.
            reg::QUEUE_READY => core.reset_queue(queue),
            reg::QUEUE_RESET if value & 1 == 1 => core.reset_queue(queue),
            reg::QUEUE_NOTIFY => {
                if let Ok(index) = u16::try_from(value) {
                    core.notify(index);
                }
            }
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => {
                core.set_status(value as u8);
                if value as u8 == 0 {
                    self.interrupt.acknowledge(u32::MAX);
                }
            }
            reg::QUEUE_DESC_LOW => core.configure_queue(queue, |q| low(&mut q.desc)),
            reg::QUEUE_DESC_HIGH => core.configure_queue(queue, |q| high(&mut q.desc)),
            reg::QUEUE_DRIVER_LOW => core.configure_queue(queue, |q| low(&mut q.avail)),
            reg::QUEUE_DRIVER_HIGH => core.configure_queue(queue, |q| high(&mut q.avail)),
            reg::QUEUE_DEVICE_LOW => core.configure_queue(queue, |q| low(&mut q.used)),
            reg::QUEUE_DEVICE_HIGH => core.configure_queue(queue, |q| high(&mut q.used)),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.core.device().read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Only such accesses exist (§4.2.2.2).
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.core.device().write_config(offset - CONFIG, data);
        } else if let (Ok(value), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}

impl Device for VirtioMmio {
    fn reset(&self) {
        self.core.reset();
        self.interrupt.acknowledge(u32::MAX);
    }
}

/// A place for a device: its registers and its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Address of the registers.
    pub base: u64,
    /// GSI of the interrupt.
    pub gsi: u32,
}

/// The places that a machine has for devices, filled from the first on.
#[derive(Debug)]
pub struct Slots {
    all: Vec<Slot>,
    used: Mutex<usize>,
}

impl Slots {
    /// These places.
    pub fn new(all: Vec<Slot>) -> Slots {
        Slots { all, used: Mutex::new(0) }
    }

    /// Those that are taken.
    pub fn taken(&self) -> &[Slot] {
        &self.all[..*self.used.lock().unwrap()]
    }

    /// Puts `device` into the first free place.
    fn attach(
        &self,
        device: Arc<dyn VirtioDevice>,
        io: &IoBus,
        irqs: &IrqInputs,
        memory: Arc<GuestMap>,
    ) -> Result<Arc<VirtioMmio>, DeviceFault> {
        let mut used = self.used.lock().unwrap();
        let Some(slot) = self.all.get(*used) else {
            return Err(DeviceFault::new(
                format!("all {} places for virtio devices are taken", self.all.len()),
                "use fewer devices, or --machine q35",
            ));
        };
        let d = VirtioMmio::new(device, memory, irqs.line(slot.gsi));
        io.mmio
            .insert("virtio-mmio", slot.base, REGISTERS, d.clone())
            .map_err(|e| DeviceFault::new(e.to_string(), "use --machine q35"))?;
        *used += 1;
        Ok(d)
    }
}

/// Puts `device` into the machine's first free place for such devices.
pub fn attach(
    ctx: &DeviceContext,
    device: Arc<dyn VirtioDevice>,
) -> Result<Arc<dyn Device>, DeviceFault> {
    let Some(slots) = &ctx.virtio_mmio else {
        return Err(DeviceFault::new(
            "this machine has no places for virtio devices but PCI",
            "use the device's name with -pci at its end, or --machine microvm",
        ));
    };
    Ok(slots.attach(device, &ctx.io, &ctx.irqs, ctx.memory.clone())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{MMIO_SLOT, Rig};
    use crate::virtio::{feature, status};
    use vm_memory::{Bytes, GuestAddress};

    struct Registers(Rig);

    impl Registers {
        fn read(&self, at: u64) -> u32 {
            let mut d = [0; 4];
            self.0.pci.io.mmio_read(MMIO_SLOT.base + at, &mut d);
            u32::from_le_bytes(d)
        }
        fn write(&self, at: u64, v: u32) {
            self.0.pci.io.mmio_write(MMIO_SLOT.base + at, &v.to_le_bytes());
        }
        fn negotiate(&self) {
            self.write(reg::STATUS, 0);
            for s in [1, 3] {
                self.write(reg::STATUS, s);
            }
            self.write(reg::DEVICE_FEATURES_SEL, 1);
            assert_eq!(self.read(reg::DEVICE_FEATURES) & 1, 1);
            self.write(reg::DRIVER_FEATURES_SEL, 1);
            self.write(reg::DRIVER_FEATURES, (feature::VERSION_1 >> 32) as u32);
            self.write(reg::STATUS, 11);
            assert_eq!(self.read(reg::STATUS), 11);
        }
        fn queue(&self, at: u32) {
            self.write(reg::QUEUE_SEL, 0);
            assert_eq!(self.read(reg::QUEUE_SIZE_MAX), 8);
            self.write(reg::QUEUE_SIZE, 8);
            for (r, part) in [
                (reg::QUEUE_DESC_LOW, at),
                (reg::QUEUE_DRIVER_LOW, at + 0x1000),
                (reg::QUEUE_DEVICE_LOW, at + 0x2000),
            ] {
                self.write(r, part);
                self.write(r + 4, 0);
            }
            self.write(reg::QUEUE_READY, 1);
        }
    }

    #[test]
    fn a_driver_finds_it_and_gets_its_bytes() {
        let rig = Rig::new();
        let create = || crate::registry::create(&rig.context(), "virtio-rng-device", &[]);
        let device = create().unwrap();
        assert!(create().err().unwrap()[0].to_string().contains("taken"));
        assert_eq!(rig.slots.taken(), [MMIO_SLOT]);
        let r = Registers(rig);
        assert_eq!((r.read(reg::MAGIC), r.read(reg::VERSION)), (MAGIC, 2));
        assert_eq!((r.read(reg::DEVICE_ID), r.read(0xb0)), (4, u32::MAX));
        r.negotiate();
        r.queue(0x10_0000);
        assert_eq!(r.read(reg::QUEUE_READY), 1);
        r.write(reg::STATUS, 15);
        let ram = r.0.map.ram();
        // One writable buffer of 16 bytes, made available.
        ram.write_obj(0x1_0000u64, GuestAddress(0x10_0000)).unwrap();
        ram.write_obj(16u32, GuestAddress(0x10_0008)).unwrap();
        ram.write_obj(2u16, GuestAddress(0x10_000c)).unwrap();
        ram.write_obj(1u16, GuestAddress(0x10_1002)).unwrap();
        r.write(reg::QUEUE_NOTIFY, 0);
        assert_eq!(ram.read_obj::<u16>(GuestAddress(0x10_2002)).unwrap(), 1);
        assert_ne!(ram.read_obj::<u128>(GuestAddress(0x1_0000)).unwrap(), 0);
        assert_eq!(r.0.sink.levels(), [(MMIO_SLOT.gsi, true)]);
        assert_eq!(r.read(reg::INTERRUPT_STATUS), USED);
        r.write(reg::INTERRUPT_ACK, USED);
        assert_eq!(r.0.sink.levels(), [(MMIO_SLOT.gsi, false)]);
        device.reset();
        assert_eq!((r.read(reg::STATUS), r.read(reg::QUEUE_READY)), (0, 0));
        // A queue nowhere, and numbers that are too large.
        r.negotiate();
        r.queue(0xfff0_0000);
        r.write(reg::STATUS, 15);
        assert_ne!(r.read(reg::STATUS) & u32::from(status::DEVICE_NEEDS_RESET), 0);
        for v in [1, 0xffff, u32::MAX] {
            r.write(reg::QUEUE_SEL, v);
            assert_eq!((r.read(reg::QUEUE_SIZE_MAX), r.read(reg::QUEUE_READY)), (0, 0));
            r.write(reg::QUEUE_READY, 1);
            r.write(reg::QUEUE_NOTIFY, v);
        }
    }

    #[test]
    fn what_an_acknowledgement_leaves_is_an_edge() {
        let rig = Rig::new();
        let line = rig.context().irqs.line(7);
        let i = Interrupt { status: AtomicU32::new(0), line, order: Mutex::new(()) };
        i.queue(0);
        i.config();
        rig.sink.levels();
        i.acknowledge(USED);
        assert_eq!(rig.sink.levels(), [(7, false), (7, true)]);
        i.acknowledge(CONFIG_CHANGE);
        assert_eq!(rig.sink.levels(), [(7, false)]);
    }
}
