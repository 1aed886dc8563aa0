//! SATA: an AHCI adapter (Serial ATA AHCI 1.3.1) with hard disks and CD drives.
//!
//! ```text
//!   BAR 5 ─► hba::Hba ─► port::Port ──kick──► engine of the drive
//!                          │   ▲                   │ next / complete
//!                fis (guest│   └───────────────────┘
//!                  memory) ▼
//!                        target::Target ─► Action          ata::Disk, atapi::CdDrive (scsi)
//! ```
//!
//! What always holds:
//!
//! * Registers, command lists, tables and frames are the guest's: each value is bounded where it is
//!   read, and what does not lie in memory stops the list with a host bus error.
//! * A device on a port sees commands as data and answers with data: it knows no registers.

pub mod ata;
pub mod atapi;
pub mod fis;
pub mod hba;
mod identify;
mod irq;
mod port;
pub mod scsi;
pub mod target;
pub mod tray;

use crate::firmware::bootorder::{self, BootOrder};
use crate::pci::capability::Capability;
use crate::pci::function::BarKind;
use crate::pci::{
    Bar, Bus, Devfn, Function, FunctionSpec, Identity, Msi, PciDevice, PciError, Pin,
};
use crate::power::News;
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use ata::{Disk, Naming, Shape};
use atapi::CdDrive;
use hba::Hba;
use irq::Irq;
use std::sync::Arc;
use tandem_accel::memory::GuestMap;
use tandem_backends::block::drive::Drive;
use target::Target;
use tray::Tray;

/// Where the board's own adapter is, and the name of its buses.
pub const BUILT_IN: Devfn = Devfn::from_byte(0x1f << 3 | 2);
/// The id of the board's own adapter: its buses are `ide.0` to `ide.5`.
pub const BUILT_IN_ID: &str = "ide";
/// Ports of an adapter, as ICH9 has them.
pub const PORTS: u8 = 6;

const INTEL: u16 = 0x8086;
const ICH9_AHCI: u16 = 0x2922;
const CLASS_AHCI: u32 = 0x01_0601;
const ABAR: u8 = 5;
/// Address map: AHCI mode (ICH9 datasheet §14.1.28).
const MAP: u16 = 0x90;
const MAP_AHCI: u8 = 0x40;

/// SATA capability (Serial ATA AHCI 1.3.1 §2.4): no index and data registers.
struct SataCapability;

impl Capability for SataCapability {
    fn id(&self) -> u8 {
        0x12
    }
    fn body(&self) -> Vec<u8> {
        vec![0x10, 0, 0, 0, 0, 0]
    }
    fn writable(&self) -> Vec<u8> {
        vec![0; 6]
    }
}

/// An AHCI adapter on PCI.
pub struct Ahci {
    function: Function,
    hba: Arc<Hba>,
    at: Devfn,
    on_root: bool,
}

impl Ahci {
    /// Puts an adapter on `bus`, at `at` or in the first free slot.
    pub fn attach(
        bus: &Arc<Bus>,
        at: Option<Devfn>,
        name: &str,
        memory: &Arc<GuestMap>,
    ) -> Result<Arc<Ahci>, PciError> {
        let slot = bus.slot(at)?;
        let id = Identity {
            vendor: INTEL,
            device: ICH9_AHCI,
            revision: 2,
            class: CLASS_AHCI,
            ..Identity::default()
        };
        let mut spec = FunctionSpec::new(name, id);
        spec.config().preset(MAP, &[MAP_AHCI]);
        let (intx, msi) = (slot.intx(Pin::A), Msi::new(slot.msi(), 0));
        spec.intx(intx.clone());
        let hba = Arc::new(Hba::new(PORTS, memory, Irq::new(intx, msi.clone())));
        spec.bar(ABAR, Bar { kind: BarKind::Mem32, len: hba::LEN, device: hba.clone() })?;
        spec.msi(msi)?;
        spec.capability(&SataCapability)?;
        let (at, on_root) = (slot.devfn(), bus.is_root());
        let device = Arc::new(Ahci { function: spec.build(slot.decoder()), hba, at, on_root });
        slot.attach(device.clone());
        Ok(device)
    }

    /// Puts the adapter that the board has into its place.
    pub fn built_in(ctx: &DeviceContext) -> Result<Arc<Ahci>, DeviceFault> {
        let ahci = Ahci::attach(ctx.pci()?, Some(BUILT_IN), "ich9-ahci", &ctx.memory)?;
        ctx.directory.add(BUILT_IN_ID, ahci.clone());
        Ok(ahci)
    }

    /// Tells firmware to try the device on `port` as number `index`.
    fn boot(&self, order: &BootOrder, index: u32, port: usize) {
        if self.on_root {
            let below = format!("drive@{port}/disk@0");
            order.add(index, bootorder::pci_path(self.at, "pci8086,2922", &below));
        }
    }
}

impl PciDevice for Ahci {
    fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for Ahci {
    fn reset(&self) {
        self.hba.reset();
    }
}

inventory::submit! {
    DeviceType {
        name: "ahci",
        bus: BusKind::Pci,
        description: "SATA adapter with six ports, buses ID.0 to ID.5",
        properties: &[],
        create: |ctx, props| {
            let id = props.text("id").unwrap_or_default();
            if id == BUILT_IN_ID {
                return Err(DeviceFault::new("'ide' is the board's own", "use another id"));
            }
            let ahci = Ahci::attach(ctx.pci()?, props.pci_address("addr"), "ahci", &ctx.memory)?;
            ctx.directory.add(id, ahci.clone());
            Ok(ahci)
        },
    }
}

/// The bus resets what is on a port.
struct OnPort;

impl Device for OnPort {
    fn reset(&self) {}
}

const fn property(
    name: &'static str,
    kind: PropertyKind,
    default: Option<&'static str>,
    description: &'static str,
) -> Property {
    Property { name, kind, default, description }
}

const DRIVE: Property =
    property("drive", PropertyKind::Text, None, "ID of the drive (--drive id=…)");
const BUS: Property =
    property("bus", PropertyKind::Text, None, "port: ide.0 to ide.5, or ID.0 to ID.5 of an ahci");
const UNIT: Property =
    property("unit", PropertyKind::Uint { min: 0, max: 0 }, None, "a port has one device");
const SERIAL: Property =
    property("serial", PropertyKind::Text, None, "serial number, at most 20 bytes");
const MODEL: Property = property("model", PropertyKind::Text, None, "model, at most 40 bytes");
const VERSION: Property =
    property("ver", PropertyKind::Text, Some("1.0"), "version of the firmware, at most 8 bytes");
const WWN: Property = property(
    "wwn",
    PropertyKind::Uint { min: 0, max: u64::MAX },
    Some("0"),
    "world-wide name; none if 0",
);
const BOOT_INDEX: Property = bootorder::PROPERTY;

/// The property `name` if it is not longer than `most` bytes.
fn short(p: &Properties, name: &str, most: usize, or: &str) -> Result<String, DeviceFault> {
    let text = p.text(name).unwrap_or(or);
    if text.len() > most {
        let what = format!("{name} '{text}' is longer than {most} bytes");
        return Err(DeviceFault::new(what, "shorten it"));
    }
    Ok(text.into())
}

fn naming(p: &Properties, serial: &str, model: &str) -> Result<Naming, DeviceFault> {
    Ok(Naming {
        serial: short(p, "serial", 20, serial)?,
        model: short(p, "model", 40, model)?,
        version: short(p, "ver", 8, "1.0")?,
        wwn: p.uint("wwn").unwrap_or(0),
    })
}

/// The adapter and port that a device belongs on.
fn place(ctx: &DeviceContext, p: &Properties) -> Result<(Arc<Ahci>, usize), DeviceFault> {
    let Some(bus) = p.text("bus") else {
        let ahci = ctx.directory.find::<Ahci>(None).ok_or_else(|| {
            DeviceFault::new("this machine has no SATA adapter", "add --device ahci before it")
        })?;
        let port = ahci.hba.free_port().ok_or_else(|| {
            let what = "all ports of the SATA adapter are taken";
            DeviceFault::new(what, "add --device ahci,id=ID and use bus=ID.0")
        })?;
        return Ok((ahci, port));
    };
    let parts = bus.rsplit_once('.').and_then(|(id, n)| Some((id, n.parse().ok()?)));
    let found = parts.and_then(|(id, n)| Some((ctx.directory.find::<Ahci>(Some(id))?, n)));
    found.filter(|(a, n): &(Arc<Ahci>, usize)| *n < a.hba.ports()).ok_or_else(|| {
        let what = format!("there is no bus '{bus}'");
        DeviceFault::new(what, "use ide.0 to ide.5, or ID.0 to ID.5 of --device ahci,id=ID")
    })
}

/// A default serial number: QEMU's, with the number of the port.
fn serial(port: usize) -> String {
    format!("QM{:05}", port + 1)
}

/// The drive that `p` names, the caller's alone.
fn take_drive(ctx: &DeviceContext, id: &str) -> Result<Arc<Drive>, DeviceFault> {
    let drive = ctx.backends.drive(id)?;
    if !drive.take() {
        return Err(DeviceFault::new(
            format!("drive '{id}' has a device already"),
            "give each device a drive of its own",
        ));
    }
    Ok(drive)
}

fn plug(
    ctx: &DeviceContext,
    p: &Properties,
    (ahci, port): (Arc<Ahci>, usize),
    target: Arc<dyn Target>,
) -> Result<Arc<dyn Device>, DeviceFault> {
    if !ahci.hba.plug(port, target) {
        let what = format!("port {port} of the SATA adapter is taken");
        return Err(DeviceFault::new(what, "use another bus, or leave it out"));
    }
    if let Some(index) = p.uint("bootindex") {
        ahci.boot(&ctx.boot_order, index as u32, port);
    }
    Ok(Arc::new(OnPort))
}

fn create_disk(ctx: &DeviceContext, p: &Properties) -> Result<Arc<dyn Device>, DeviceFault> {
    let place = place(ctx, p)?;
    let naming = naming(p, &serial(place.1), "TANDEM HARDDISK")?;
    let physical = p.uint("physical_block_size").unwrap_or(512);
    if !physical.is_power_of_two() || !(512..=2 << 20).contains(&physical) {
        return Err(DeviceFault::new(
            format!("a physical block of {physical} bytes does not fit"),
            "use a power of two from 512 to 2M",
        ));
    }
    let shape = Shape {
        physical: (physical / 512).trailing_zeros() as u8,
        rotation: p.uint("rotation_rate").unwrap_or(0) as u16,
    };
    let Some(id) = p.text("drive") else {
        return Err(DeviceFault::new("it has no drive", "name one with drive=ID"));
    };
    let drive = take_drive(ctx, id)?;
    match p.text("write-cache") {
        Some("on") => drive.set_writeback(true),
        Some("off") => drive.set_writeback(false),
        _ => {}
    }
    plug(ctx, p, place, Arc::new(Disk::new(drive, naming, shape)))
}

fn create_cd(ctx: &DeviceContext, p: &Properties) -> Result<Arc<dyn Device>, DeviceFault> {
    let place = place(ctx, p)?;
    let naming = naming(p, &serial(place.1), "TANDEM DVD-ROM")?;
    let slot = p.text("drive").unwrap_or_default();
    let drive = match slot.is_empty() || ctx.backends.empty.contains(slot) {
        true => None,
        false => Some(take_drive(ctx, slot)?),
    };
    let (id, slot) = (p.text("id").unwrap_or_default().to_string(), slot.to_string());
    let medium = drive.is_some().then(|| slot.clone());
    let cd = Arc::new(CdDrive::new(drive, naming));
    let (power, names) = (ctx.power.clone(), (id.clone(), slot.clone()));
    cd.on_moved(move |open| {
        let (id, drive) = names.clone();
        power.tell(News::TrayMoved { drive, id, open });
    });
    let at = (place.0.hba.clone(), place.1);
    let device = plug(ctx, p, place, cd.clone())?;
    let tray = Tray::new((id.clone(), slot), cd, at, medium);
    ctx.directory.add(&id, Arc::new(tray));
    Ok(device)
}

inventory::submit! {
    DeviceType {
        name: "ide-hd",
        bus: BusKind::Ide,
        description: "SATA disk",
        properties: &[
            DRIVE,
            BUS,
            UNIT,
            BOOT_INDEX,
            SERIAL,
            MODEL,
            VERSION,
            WWN,
            property(
                "physical_block_size",
                PropertyKind::Size,
                Some("512"),
                "bytes of a physical sector",
            ),
            property(
                "logical_block_size",
                PropertyKind::Uint { min: 512, max: 512 },
                Some("512"),
                "bytes of a sector",
            ),
            property(
                "rotation_rate",
                PropertyKind::Uint { min: 0, max: 0xfffe },
                Some("0"),
                "rotations a minute; 1 does not rotate, 0 does not say",
            ),
            property(
                "write-cache",
                PropertyKind::Choice(&["auto", "on", "off"]),
                Some("auto"),
                "whether writes are cached until a flush; auto as the drive's cache mode says",
            ),
        ],
        create: create_disk,
    }
}

inventory::submit! {
    DeviceType {
        name: "ide-cd",
        bus: BusKind::Ide,
        description: "SATA CD drive; empty without a drive",
        properties: &[DRIVE, BUS, UNIT, BOOT_INDEX, SERIAL, MODEL, VERSION, WWN],
        create: create_cd,
    }
}

#[cfg(test)]
mod tests;
