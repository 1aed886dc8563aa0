//! Virtio over PCI, non-transitional (Virtio 1.3 §4.1): four structures in one BAR, named by
//! vendor capabilities, and MSI-X.
//!
//! Interrupts: with MSI-X on, each queue and the configuration have a vector, or none; else INTx
//! with the ISR status byte. The vectors and the ISR are atomic, so a device signals without a lock
//! of the transport.

use super::VirtioDevice;
use super::core::{Core, Notifier};
use crate::firmware::bootorder;
use crate::pci::capability::{Capability, Express, ExpressType, PowerManagement};
use crate::pci::function::BarKind;
use crate::pci::{Bar, Bus, Devfn, Function, FunctionSpec, Identity, Intx, Msix, PciDevice};
use crate::pci::{PciError, Pin};
use crate::registry::{Device, DeviceContext, DeviceFault, Properties};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::GuestMap;

/// Vendor ID of virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// PCI device ID of virtio device type 0.
pub const DEVICE_BASE: u16 = 0x1040;
/// "No vector" in the vector registers.
pub const NO_VECTOR: u16 = 0xffff;

const MSIX_BAR: u8 = 1;
const BAR: u8 = 4;
const BAR_LEN: u64 = 0x4000;
/// Length of each of the four structures, and their offsets in the BAR.
const PART: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PART;
const DEVICE: u64 = 2 * PART;
const NOTIFY: u64 = 3 * PART;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STRIDE: u32 = 4;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Capability type (§4.1.4).
#[derive(Clone, Copy)]
enum CapType {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciCfg = 5,
}

/// Offsets in the PCI configuration access capability: BAR, offset, length, data.
const CFG_BAR: u16 = 4;
const CFG_OFFSET: u16 = 8;
const CFG_LENGTH: u16 = 12;
const CFG_DATA: u16 = 16;

/// `struct virtio_pci_cap` with what follows it.
struct VirtioCap {
    kind: CapType,
    offset: u64,
    length: u64,
    extra: Vec<u8>,
}

impl Capability for VirtioCap {
    fn id(&self) -> u8 {
        0x09
    }
    fn body(&self) -> Vec<u8> {
        let bar = if matches!(self.kind, CapType::PciCfg) { 0 } else { BAR };
        let mut b = vec![16 + self.extra.len() as u8, self.kind as u8, bar, 0, 0, 0];
        b.extend((self.offset as u32).to_le_bytes());
        b.extend((self.length as u32).to_le_bytes());
        b.extend(&self.extra);
        b
    }
    fn writable(&self) -> Vec<u8> {
        let mut w = vec![0; 14 + self.extra.len()];
        if matches!(self.kind, CapType::PciCfg) {
            w[usize::from(CFG_BAR) - 2] = 0xff;
            w[usize::from(CFG_OFFSET) - 2..].fill(0xff);
        }
        w
    }
}

/// Vectors and ISR.
struct Interrupts {
    msix: Arc<Msix>,
    intx: Arc<Intx>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Interrupts {
    fn raise(&self, vector: Option<&AtomicU16>, isr: u8) {
        if self.msix.enabled() {
            // NO_VECTOR is beyond any table.
            if let Some(v) = vector {
                self.msix.notify(v.load(Ordering::Acquire));
            }
        } else {
            self.isr.fetch_or(isr, Ordering::AcqRel);
            self.intx.set(true);
        }
    }
    /// The vector to store for what the driver wrote.
    fn accept(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }
    fn read_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::AcqRel);
        self.intx.set(false);
        // A device may have raised between the two.
        if self.isr.load(Ordering::Acquire) != 0 {
            self.intx.set(true);
        }
        isr
    }
    fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.intx.set(false);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.queue_vectors.iter().for_each(|v| v.store(NO_VECTOR, Ordering::Release));
    }
}

impl Notifier for Interrupts {
    fn queue(&self, queue: u16) {
        self.raise(self.queue_vectors.get(usize::from(queue)), ISR_QUEUE);
    }
    fn config(&self) {
        self.raise(Some(&self.config_vector), ISR_CONFIG);
    }
}

/// Registers that select what others show.
#[derive(Default)]
struct Selectors {
    device_feature: AtomicU32,
    driver_feature: AtomicU32,
    queue: AtomicU16,
}

/// What is behind the BAR.
struct Registers {
    core: Core,
    interrupts: Arc<Interrupts>,
    select: Selectors,
}

/// Half `n` of a feature word.
fn half(features: u64, n: u32) -> u32 {
    match n {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl Registers {
    /// The common configuration structure (§4.1.4.3) as it reads now.
    fn common(&self) -> [u8; 0x40] {
        let (core, sel, irq) = (&self.core, &self.select, &self.interrupts);
        let mut b = [0; 0x40];
        let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
        let (dfs, gfs) = (
            sel.device_feature.load(Ordering::Acquire),
            sel.driver_feature.load(Ordering::Acquire),
        );
        put(0x00, &dfs.to_le_bytes());
        put(0x04, &half(core.offered(), dfs).to_le_bytes());
        put(0x08, &gfs.to_le_bytes());
        put(0x0c, &half(core.driver_features(), gfs).to_le_bytes());
        put(0x10, &irq.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(0x12, &core.queue_count().to_le_bytes());
        put(0x14, &[core.status(), core.config_generation()]);
        let q = sel.queue.load(Ordering::Acquire);
        put(0x16, &q.to_le_bytes());
        let vector = irq.queue_vectors.get(usize::from(q));
        let vector = vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        put(0x1a, &vector.to_le_bytes());
        if let Some(c) = core.queue(q) {
            put(0x18, &c.size.to_le_bytes());
            put(0x1c, &u16::from(c.enabled).to_le_bytes());
            put(0x1e, &q.to_le_bytes());
            put(0x20, &c.desc.to_le_bytes());
            put(0x28, &c.avail.to_le_bytes());
            put(0x30, &c.used.to_le_bytes());
            put(0x38, &q.to_le_bytes());
        }
        b
    }

    /// Writes one field of the common configuration structure. Drivers write fields whole, 64-bit
    /// ones also by halves (§4.1.3.1); anything else is dropped.
    fn write_common(&self, offset: u64, data: &[u8]) {
        let (core, sel, irq) = (&self.core, &self.select, &self.interrupts);
        let v = data.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
        let q = sel.queue.load(Ordering::Acquire);
        match (offset, data.len()) {
            (0x00, 4) => sel.device_feature.store(v as u32, Ordering::Release),
            (0x08, 4) => sel.driver_feature.store(v as u32, Ordering::Release),
            (0x0c, 4) => {
                core.set_driver_features(sel.driver_feature.load(Ordering::Acquire), v as u32);
            }
            (0x10, 2) => irq.config_vector.store(irq.accept(v as u16), Ordering::Release),
            (0x14, 1) => {
                core.set_status(v as u8);
                if v == 0 {
                    irq.reset();
                }
            }
            (0x16, 2) => sel.queue.store(v as u16, Ordering::Release),
            (0x18, 2) => core.set_queue_size(q, v as u16),
            (0x1a, 2) => {
                if let Some(slot) = irq.queue_vectors.get(usize::from(q)) {
                    slot.store(irq.accept(v as u16), Ordering::Release);
                }
            }
            (0x1c, 2) if v == 1 => core.enable_queue(q),
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                core.configure_queue(q, |c| {
                    let field = match offset & !7 {
                        0x20 => &mut c.desc,
                        0x28 => &mut c.avail,
                        _ => &mut c.used,
                    };
                    *field = match (data.len(), offset & 4) {
                        (8, _) => v,
                        (_, 0) => *field & !0xffff_ffff | v,
                        _ => *field & 0xffff_ffff | v << 32,
                    };
                });
            }
            (0x3a, 2) if v == 1 => core.reset_queue(q),
            _ => {}
        }
    }
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset & !(PART - 1), offset & (PART - 1)) {
            (COMMON, at) => {
                let common = self.common();
                for (d, i) in data.iter_mut().zip(at as usize..) {
                    *d = common.get(i).copied().unwrap_or(0);
                }
            }
            (ISR, 0) => data[0] = self.interrupts.read_isr(),
            (DEVICE, at) => self.core.device().read_config(at, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset & !(PART - 1), offset & (PART - 1)) {
            (COMMON, at) => self.write_common(at, data),
            (DEVICE, at) => self.core.device().write_config(at, data),
            (NOTIFY, at) => self.core.notify((at / u64::from(NOTIFY_STRIDE)) as u16),
            _ => {}
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    function: Function,
    registers: Arc<Registers>,
    at: Devfn,
    /// Offset of the PCI configuration access capability.
    cfg_cap: u16,
    /// One access through that capability at a time.
    cfg_access: Mutex<()>,
}

/// PCI class of a virtio device type, for drivers and tools that go by it.
fn class(device_id: u16) -> u32 {
    match device_id {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 => 0x07_8000,
        8 => 0x01_0000,
        _ => 0x00_ff00,
    }
}

/// Puts `device` on the bus and at the place that its properties say, named by its `id`, else by its
/// type's name.
pub fn attach(
    ctx: &DeviceContext,
    props: &Properties,
    type_name: &str,
    device: Arc<dyn VirtioDevice>,
) -> Result<Arc<dyn Device>, DeviceFault> {
    let at = props.pci_address("addr");
    let name = props.text("id").unwrap_or(type_name);
    let kind = device.device_id();
    let made = VirtioPci::attach(ctx.pci()?, at, name, device, ctx.memory.clone())?;
    if let (Some(index), Some((node, below)), true) =
        (props.uint("bootindex"), boot_node(kind), ctx.pci()?.is_root())
    {
        ctx.boot_order.add(index as u32, bootorder::pci_path(made.at, node, below));
    }
    Ok(made)
}

/// How firmware calls a device that may boot, and what is below it.
fn boot_node(kind: u16) -> Option<(&'static str, &'static str)> {
    match kind {
        super::net::DEVICE_ID => Some(("ethernet", "ethernet-phy@0")),
        super::blk::DEVICE_ID => Some(("scsi", "disk@0,0")),
        _ => None,
    }
}

impl VirtioPci {
    /// Puts `device` on `bus`, at `at` or in the first free slot. `name` names it in listings.
    pub fn attach(
        bus: &Arc<Bus>,
        at: Option<Devfn>,
        name: &str,
        device: Arc<dyn VirtioDevice>,
        memory: Arc<GuestMap>,
    ) -> Result<Arc<VirtioPci>, PciError> {
        let slot = bus.slot(at)?;
        let id = device.device_id();
        let queues = device.queue_sizes().len() as u16;
        let mut spec = FunctionSpec::new(
            name,
            Identity {
                vendor: VENDOR,
                device: DEVICE_BASE + id,
                revision: 1,
                class: class(id),
                subsystem_vendor: VENDOR,
                subsystem: 0x1100,
            },
        );
        let interrupts = Arc::new(Interrupts {
            msix: Msix::new(slot.msi(), queues.saturating_add(1), MSIX_BAR),
            intx: slot.intx(Pin::A),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        });
        let registers = Arc::new(Registers {
            core: Core::new(device, memory, interrupts.clone()),
            interrupts: interrupts.clone(),
            select: Selectors::default(),
        });
        spec.bar(BAR, Bar { kind: BarKind::Mem64, len: BAR_LEN, device: registers.clone() })?;
        spec.intx(interrupts.intx.clone());
        spec.msix(interrupts.msix.clone())?;
        let mut cap = |kind, offset, extra: &[u8]| {
            let length = if offset == ISR { 1 } else { PART };
            spec.capability(&VirtioCap { kind, offset, length, extra: extra.to_vec() })
        };
        cap(CapType::Common, COMMON, &[])?;
        cap(CapType::Isr, ISR, &[])?;
        cap(CapType::Device, DEVICE, &[])?;
        cap(CapType::Notify, NOTIFY, &NOTIFY_STRIDE.to_le_bytes())?;
        let cfg_cap = spec.capability(&VirtioCap {
            kind: CapType::PciCfg,
            offset: 0,
            length: 0,
            extra: vec![0; 4],
        })?;
        spec.capability(&PowerManagement)?;
        let kind = match bus.is_root() {
            true => ExpressType::RootComplexEndpoint,
            false => ExpressType::Endpoint,
        };
        spec.capability(&Express { kind })?;
        let device = Arc::new(VirtioPci {
            function: spec.build(slot.decoder()),
            at: slot.devfn(),
            registers,
            cfg_cap,
            cfg_access: Mutex::new(()),
        });
        slot.attach(device.clone());
        Ok(device)
    }

    /// Status, features and queues.
    pub fn core(&self) -> &Core {
        &self.registers.core
    }

    /// Whether an access touches the data window of the configuration access capability.
    fn hits_cfg_data(&self, at: u16, len: usize) -> bool {
        let data = usize::from(self.cfg_cap + CFG_DATA);
        usize::from(at) < data + 4 && usize::from(at) + len > data
    }

    /// Where in the BAR that capability points, and how many bytes; `None` if nowhere (§4.1.4.9).
    fn cfg_target(&self) -> Option<(u64, usize)> {
        let f = &self.function;
        let offset = u64::from(f.u32(self.cfg_cap + CFG_OFFSET));
        let len = f.u32(self.cfg_cap + CFG_LENGTH);
        let fits = matches!(len, 1 | 2 | 4)
            && f.u8(self.cfg_cap + CFG_BAR) == BAR
            && offset % u64::from(len) == 0
            && offset + u64::from(len) <= BAR_LEN;
        fits.then_some((offset, len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn function(&self) -> &Function {
        &self.function
    }
    fn config_read(&self, at: u16, data: &mut [u8]) {
        if self.hits_cfg_data(at, data.len()) {
            let _one = self.cfg_access.lock().unwrap();
            if let Some((offset, len)) = self.cfg_target() {
                let mut value = [0; 4];
                self.registers.read(offset, &mut value[..len]);
                self.function.poke(self.cfg_cap + CFG_DATA, &value[..len]);
            }
        }
        self.function.read(at, data);
    }
    fn config_write(&self, at: u16, data: &[u8]) {
        self.function.write(at, data);
        if self.hits_cfg_data(at, data.len()) {
            let _one = self.cfg_access.lock().unwrap();
            if let Some((offset, len)) = self.cfg_target() {
                let value = self.function.u32(self.cfg_cap + CFG_DATA).to_le_bytes();
                self.registers.write(offset, &value[..len]);
            }
        }
    }
    fn reset(&self) {
        self.registers.core.reset();
        self.registers.interrupts.reset();
        self.function.reset();
    }
}

impl crate::registry::Device for VirtioPci {
    fn reset(&self) {
        PciDevice::reset(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue::VirtQueue;
    use crate::virtio::testing::{Driver, Rig};
    use crate::virtio::{Activation, Progress, Signaller, feature, status};
    use vm_memory::Bytes;

    type Live = (Vec<Option<VirtQueue>>, Arc<dyn Signaller>);

    /// Copies a request's readable bytes, inverted, to its writable ones.
    #[derive(Default)]
    struct Inverter {
        live: Mutex<Option<Live>>,
        config: AtomicU32,
    }

    impl VirtioDevice for Inverter {
        fn device_id(&self) -> u16 {
            42
        }
        fn features(&self) -> u64 {
            0b101
        }
        fn ring_features(&self) -> u64 {
            feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16, 8]
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            let c = self.config.load(Ordering::Relaxed).to_le_bytes();
            for (d, i) in data.iter_mut().zip(offset as usize..) {
                *d = c.get(i).copied().unwrap_or(0);
            }
        }
        fn write_config(&self, _: u64, data: &[u8]) {
            self.config.store(data[0].into(), Ordering::Relaxed);
        }
        fn activate(&self, a: Activation) {
            *self.live.lock().unwrap() = Some((a.queues, a.signaller));
        }
        fn notify(&self, queue: u16) {
            let mut live = self.live.lock().unwrap();
            let Some((queues, _)) = &mut *live else { return };
            let Some(Some(q)) = queues.get_mut(usize::from(queue)) else { return };
            while q.drain(|ram, chain| {
                let (Ok(mut r), Ok(mut w)) = (chain.clone().reader(ram), chain.writer(ram)) else {
                    return 0;
                };
                let n = r.available_bytes().min(w.available_bytes());
                for _ in 0..n {
                    let Ok(b) = r.read_obj::<u8>() else { break };
                    let _ = w.write_obj(!b);
                }
                n as u32
            }) == Progress::More
            {}
        }
        fn reset(&self) {
            *self.live.lock().unwrap() = None;
        }
        fn reset_queue(&self, queue: u16) {
            if let Some((queues, _)) = &mut *self.live.lock().unwrap() {
                queues[usize::from(queue)] = None;
            }
        }
        fn enable_queue(&self, queue: VirtQueue) {
            if let Some((queues, _)) = &mut *self.live.lock().unwrap() {
                let i = usize::from(queue.index());
                queues[i] = Some(queue);
            }
        }
    }

    fn inverter() -> (Rig, Arc<Inverter>, Driver) {
        let rig = Rig::new();
        let dev = Arc::new(Inverter::default());
        let driver = rig.attach(dev.clone());
        (rig, dev, driver)
    }

    #[test]
    fn negotiates_and_runs_requests_over_both_queues() {
        for features in [0, feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC] {
            let (rig, _, d) = inverter();
            d.negotiate(feature::VERSION_1 | features | 1).unwrap();
            for queue in [1, 0] {
                let mut q = d.queue(queue, 8);
                if queue == 0 {
                    d.driver_ok();
                }
                if queue == 1 {
                    continue;
                }
                for round in 0..40u8 {
                    let out = q.request(&[&[round, 2, 3]], &[2, 4]);
                    assert_eq!(out, [!round, !2, !3, 0, 0, 0]);
                }
            }
            assert!(rig.sink.messages().len() >= 40);
            assert_eq!(rig.sink.messages()[0].data, 0x40);
        }
    }

    #[test]
    fn refuses_features_that_were_not_offered() {
        let (_, dev, d) = inverter();
        for bad in [feature::VERSION_1 | 2, 1, feature::VERSION_1 | 1 << 63] {
            assert!(d.negotiate(bad).is_err(), "{bad:#x}");
            d.driver_ok();
            assert_eq!(d.status() & status::DRIVER_OK, 0);
            assert!(dev.live.lock().unwrap().is_none());
        }
        d.negotiate(feature::VERSION_1).unwrap();
        d.write32(0x0c, 0xffff_ffff);
        assert_eq!(d.read32(0x0c), 1);
    }

    #[test]
    fn senseless_queues_need_a_reset_and_get_well_by_it() {
        let (rig, dev, d) = inverter();
        d.negotiate(feature::VERSION_1).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        // An available index far ahead of what the queue holds.
        q.set_avail_index(1000);
        q.kick();
        assert_ne!(d.status() & status::DEVICE_NEEDS_RESET, 0);
        assert_eq!(rig.sink.messages().last().unwrap().data, 0x4f);
        d.write8(0x14, 0);
        assert_eq!(d.status(), 0);
        assert!(dev.live.lock().unwrap().is_none());
        d.negotiate(feature::VERSION_1).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        assert_eq!(q.request(&[&[1]], &[1]), [0xfe]);
        // A head beyond the table.
        q.add_head(99);
        q.kick();
        assert_ne!(d.status() & status::DEVICE_NEEDS_RESET, 0);
    }

    #[test]
    fn rings_outside_memory_do_not_come_alive() {
        let (_, dev, d) = inverter();
        d.negotiate(feature::VERSION_1).unwrap();
        let _ = d.queue(0, 8);
        d.write16(0x16, 1);
        d.write32(0x20, 0xffff_fff0);
        d.write32(0x24, 0xffff_ffff);
        d.write32(0x28, 0x1000);
        d.write32(0x30, 0x2000);
        d.write16(0x1c, 1);
        d.driver_ok();
        assert_ne!(d.status() & status::DEVICE_NEEDS_RESET, 0);
        assert!(dev.live.lock().unwrap().is_none());
    }

    #[test]
    fn bad_descriptors_fail_only_their_request() {
        let (rig, _, d) = inverter();
        d.negotiate(feature::VERSION_1).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        // A buffer outside memory; a chain that loops; a table inside a table.
        for desc in [(u64::MAX - 4, 64, 2u16, 0u16), (0x9000, 8, 1, 0), (0x1_0000, 16, 4, 0)] {
            q.raw_descriptor(0, desc);
            rig.map.ram().write_obj(4u16, vm_memory::GuestAddress(0x1_000c)).unwrap();
            let before = q.used_index();
            q.add_head(0);
            q.kick();
            assert_eq!(q.used_index(), before.wrapping_add(1));
            assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
        }
        assert_eq!(q.request(&[&[1]], &[1]), [0xfe]);
    }

    #[test]
    fn queues_reset_singly() {
        let (_, _, d) = inverter();
        d.negotiate(feature::VERSION_1 | feature::RING_RESET).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        assert_eq!(q.request(&[&[1]], &[1]), [0xfe]);
        d.write16(0x16, 0);
        d.write16(0x3a, 1);
        assert_eq!((d.read16(0x3a), d.read16(0x1c)), (0, 0));
        let mut q = d.queue(0, 4);
        assert_eq!(q.request(&[&[2]], &[1]), [0xfd]);
    }

    #[test]
    fn intx_and_isr_serve_drivers_without_msix() {
        let (rig, dev, mut d) = inverter();
        d.use_intx();
        d.negotiate(feature::VERSION_1).unwrap();
        let mut q = d.queue(0, 8);
        d.driver_ok();
        q.request(&[&[1]], &[1]);
        assert_eq!(rig.sink.levels(), [(21, true)]);
        assert_eq!(d.read8(ISR), 1);
        assert_eq!(rig.sink.levels(), [(21, false)]);
        let generation = d.read8(0x15);
        dev.live.lock().unwrap().as_ref().unwrap().1.config_changed();
        assert_eq!((d.read8(ISR), d.read8(0x15)), (2, generation.wrapping_add(1)));
        // Interrupts suppressed by flag.
        q.set_avail_flags(1);
        rig.sink.levels();
        q.request(&[&[1]], &[1]);
        assert!(rig.sink.levels().is_empty());
    }

    #[test]
    fn vectors_that_are_not_there_read_back_as_none() {
        let (_, _, d) = inverter();
        d.write16(0x10, 2);
        assert_eq!(d.read16(0x10), 2);
        d.write16(0x10, 3);
        assert_eq!(d.read16(0x10), NO_VECTOR);
        d.write16(0x16, 7);
        assert_eq!((d.read16(0x18), d.read16(0x1a)), (0, NO_VECTOR));
        d.write16(0x1a, 0);
        d.write16(0x1c, 1);
        d.write16(0x3a, 1);
        d.write16(NOTIFY + 28, 7);
        // Odd accesses are harmless.
        d.write8(0x17, 1);
        d.write16(0x3f, 1);
        assert_eq!(d.read32(0x3e), 0);
    }

    #[test]
    fn the_configuration_window_reaches_the_bar() {
        let (_, dev, d) = inverter();
        dev.config.store(0x1234_5678, Ordering::Relaxed);
        let cap = d.capability(5);
        d.config_write(cap + 4, &[BAR]);
        d.config_write(cap + 8, &(DEVICE as u32).to_le_bytes());
        d.config_write(cap + 12, &2u32.to_le_bytes());
        assert_eq!(d.config_read32(cap + 16) & 0xffff, 0x5678);
        d.config_write(cap + 16, &[0x77, 0, 0, 0]);
        assert_eq!(dev.config.load(Ordering::Relaxed), 0x77);
        for (offset, len) in [(DEVICE as u32 + 1, 2), (0xffff_ffff, 1), (0, 3), (BAR_LEN as u32, 4)]
        {
            d.config_write(cap + 8, &offset.to_le_bytes());
            d.config_write(cap + 12, &len_bytes(len));
            d.config_write(cap + 16, &[0; 4]);
            d.config_read32(cap + 16);
        }
        assert_eq!(dev.config.load(Ordering::Relaxed), 0x77);
    }

    fn len_bytes(len: u32) -> [u8; 4] {
        len.to_le_bytes()
    }
}
