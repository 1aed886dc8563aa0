//! NVMe: a controller with one namespace (NVM Express Base 1.4, NVM command set).
//!
//! ```text
//!   BAR 0 ─► controller::Controller ──kick──► engine of the drive
//!              │ admin (identify)  ▲               │ next / complete
//!              ▼                   └───────────────┘
//!   queue::Submission, Completion, command (PRP lists): guest memory        MSI-X in BAR 4
//! ```
//!
//! What always holds: registers, queues, commands and lists are the guest's, and each value is
//! bounded where it is read; a command that makes no sense fails with the status for it, and the
//! controller lives on.

mod admin;
mod command;
mod controller;
mod identify;
mod queue;

use crate::firmware::bootorder;
use crate::pci::capability::{Express, ExpressType, PowerManagement};
use crate::pci::function::BarKind;
use crate::pci::{Bar, Function, FunctionSpec, Identity, Msix, PciDevice, Pin};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use controller::Controller;
use identify::Facts;
use std::sync::Arc;
use tandem_accel::bus::BusDevice;
use tandem_backends::block::engine::{self, Engine, Requester};

/// The controller that QEMU has, which guests know.
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0010;
const SUBSYSTEM_VENDOR: u16 = 0x1af4;
const CLASS_NVME: u32 = 0x01_0802;
const REGISTERS_BAR: u8 = 0;
const MSIX_BAR: u8 = 4;

/// The registers, and who works on commands.
struct Registers {
    controller: Arc<Controller>,
    engine: Arc<dyn Engine>,
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut word = (u64::MAX, [0; 4]);
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            if word.0 != at & !3 {
                word = (at & !3, self.controller.read(at & !3).to_le_bytes());
            }
            *d = word.1[(at & 3) as usize];
        }
    }

    // Registers are written in whole words (§3.1).
    fn write(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return log::debug!("nvme: {} bytes are written at {offset:#x}", data.len());
        }
        let mut kick = false;
        for (i, w) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes(w.try_into().unwrap_or_default());
            kick |= self.controller.write(offset + 4 * i as u64, value);
        }
        if kick {
            self.engine.kick();
        }
    }
}

/// A controller on PCI.
pub struct Nvme {
    function: Function,
    controller: Arc<Controller>,
}

impl PciDevice for Nvme {
    fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for Nvme {
    fn reset(&self) {
        self.controller.reset();
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.controller.reset();
        self.controller.drive().give_back();
    }
}

const fn property(
    name: &'static str,
    kind: PropertyKind,
    default: Option<&'static str>,
    description: &'static str,
) -> Property {
    Property { name, kind, default, description }
}

const BLOCK: PropertyKind = PropertyKind::Uint { min: 512, max: 4096 };
const PAIRS: PropertyKind = PropertyKind::Uint { min: 1, max: 64 };

inventory::submit! {
    DeviceType {
        name: "nvme",
        bus: BusKind::Pci,
        description: "NVMe disk",
        properties: &[
            property("drive", PropertyKind::Text, None, "ID of the drive (--drive id=…)"),
            property("serial", PropertyKind::Text, None, "serial number, at most 20 bytes"),
            property("max_ioqpairs", PAIRS, Some("64"), "pairs of queues for I/O"),
            property("logical_block_size", BLOCK, Some("512"), "bytes of a block: 512 or 4096"),
            bootorder::PROPERTY,
        ],
        create,
    }
}

fn create(ctx: &DeviceContext, p: &Properties) -> Result<Arc<dyn Device>, DeviceFault> {
    let Some(serial) = p.text("serial").filter(|s| !s.is_empty()) else {
        return Err(DeviceFault::new("it has no serial number", "give it one with serial=TEXT"));
    };
    if serial.len() > 20 {
        let what = format!("serial number '{serial}' is longer than 20 bytes");
        return Err(DeviceFault::new(what, "shorten it"));
    }
    let block = p.uint("logical_block_size").unwrap_or(512);
    if !matches!(block, 512 | 4096) {
        let what = format!("a block of {block} bytes does not fit");
        return Err(DeviceFault::new(what, "use logical_block_size=512 or 4096"));
    }
    let Some(id) = p.text("drive") else {
        return Err(DeviceFault::new("it has no drive", "name one with drive=ID"));
    };
    let drive = ctx.backends.drive(id)?;
    if drive.size() % block != 0 || drive.size() == 0 {
        let what = format!("drive '{id}' is not a whole number of blocks");
        return Err(DeviceFault::new(what, "use logical_block_size=512, or another image"));
    }
    let bus = ctx.pci()?;
    let slot = bus.slot(p.pci_address("addr"))?;
    let mut spec = FunctionSpec::new(
        p.text("id").unwrap_or("nvme"),
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision: 2,
            class: CLASS_NVME,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: 0x1100,
        },
    );
    let pairs = p.uint("max_ioqpairs").unwrap_or(64) as u16;
    let (msix, intx) = (Msix::new(slot.msi(), pairs + 1, MSIX_BAR), slot.intx(Pin::A));
    if !drive.take() {
        let what = format!("drive '{id}' has a device already");
        return Err(DeviceFault::new(what, "give each device a drive of its own"));
    }
    let facts = Facts {
        serial: serial.into(),
        model: "TANDEM NVMe Ctrl".into(),
        blocks: drive.size() / block,
        block_shift: block.trailing_zeros() as u8,
        discard: drive.discards(),
        read_only: drive.read_only(),
        vendor: VENDOR,
        subsystem: SUBSYSTEM_VENDOR,
    };
    let irq = (msix.clone(), intx.clone());
    let controller =
        Arc::new(Controller::new(facts, pairs, drive.clone(), ctx.memory.clone(), irq));
    let requester: Arc<dyn Requester> = controller.clone();
    let registers =
        Registers { controller: controller.clone(), engine: engine::start(&drive, requester) };
    spec.intx(intx);
    let len = controller.len();
    spec.bar(REGISTERS_BAR, Bar { kind: BarKind::Mem64, len, device: Arc::new(registers) })?;
    spec.msix(msix)?;
    spec.capability(&PowerManagement)?;
    let kind = match bus.is_root() {
        true => ExpressType::RootComplexEndpoint,
        false => ExpressType::Endpoint,
    };
    spec.capability(&Express { kind })?;
    let at = slot.devfn();
    if let (Some(index), true) = (p.uint("bootindex"), bus.is_root()) {
        let path = bootorder::pci_path(at, "pci1b36,10", "namespace@1,0");
        ctx.boot_order.add(index as u32, path);
    }
    let device = Arc::new(Nvme { function: spec.build(slot.decoder()), controller });
    slot.attach(device.clone());
    Ok(device)
}

#[cfg(test)]
mod tests;
