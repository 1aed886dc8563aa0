//! The microvm board: what a kernel needs that starts at once, and nothing that has to be searched
//! for. Interrupt chips, PIT, RTC, ACPI power registers, serial ports, and places for virtio devices
//! in memory; no PCI, no firmware.
//!
//! ```text
//!   feb0_0000 ─┬─ virtio device 0: 512 bytes of registers, GSI 5
//!   feb0_0200 ─┼─ virtio device 1, GSI 6 …
//!              ┴─ 16 of them
//! ```
//!
//! A kernel finds the devices in the ACPI tables. For one that is told `acpi=off`, and so uses the
//! PICs only, they are named on its command line: `virtio_mmio.device=512@0xfeb00000:5`.

use super::backbone::{Backbone, cannot, map};
use super::board::Board;
use super::cpu::Processors;
use super::inbox::Inbox;
use super::peripherals::Peripherals;
use super::{Failure, drives, networks};
use crate::config::{Device as Configured, VmConfig};
use std::collections::BTreeMap;
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::irq::CpuIntc;
use tandem_accel::memory::{GuestMap, GuestRam};
use tandem_accel::{AccelOps, Error};
use tandem_backends::chardev::Chardev;
use tandem_devices::acpi;
use tandem_devices::legacy::acpi_pm::{AcpiPm, PM_BASE, PM_SIZE};
use tandem_devices::legacy::reset::{RESET_PORT, ResetControl};
use tandem_devices::legacy::serial::{COM, Serial};
use tandem_devices::pci::Bus;
use tandem_devices::registry::{self, Backends, BusKind, DeviceContext};
use tandem_devices::timer::pm_timer::PmTimerWidth;
use tandem_devices::virtio::mmio::{REGISTERS, Slot, Slots};
use vm_memory::{Bytes, GuestAddress};

/// The machine type's name.
pub const NAME: &str = "microvm";
const SCI: u32 = 9;
/// Registers of the first virtio device.
const VIRTIO: u64 = 0xfeb0_0000;
/// Interrupts of the virtio devices: first the free ones of the PICs, then those of the IOAPIC only.
const VIRTIO_GSIS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The places for virtio devices.
fn slots() -> Vec<Slot> {
    let place = |(i, gsi): (usize, &u32)| Slot { base: VIRTIO + i as u64 * REGISTERS, gsi: *gsi };
    VIRTIO_GSIS.iter().enumerate().map(place).collect()
}

/// All devices that `config` asks for, in order.
fn devices(config: &VmConfig) -> Vec<Configured> {
    let mut made = [drives::devices(config), networks::devices(config)].concat();
    // What a machine with PCI makes as a function of PCI.
    for d in &mut made {
        d.driver = d.driver.replace("-pci", "-device");
    }
    made.extend(config.devices.iter().cloned());
    made
}

/// What the kernel's command line must say of the devices: nothing, unless the kernel does not look
/// at the ACPI tables.
pub fn command_line(config: &VmConfig) -> String {
    if !config.boot.append.split_whitespace().any(|w| w == "acpi=off") {
        return String::new();
    }
    let on_bus =
        |d: &&Configured| registry::find(&d.driver).is_ok_and(|t| t.bus == BusKind::VirtioMmio);
    let n = devices(config).iter().filter(on_bus).count();
    let word = |s: &Slot| format!(" virtio_mmio.device={REGISTERS}@{:#x}:{}", s.base, s.gsi);
    slots().iter().take(n).map(word).collect()
}

/// The chips of a microvm.
pub struct Microvm {
    backbone: Backbone,
    pm: Arc<AcpiPm>,
    reset_control: Arc<ResetControl>,
    peripherals: Peripherals,
    tables: acpi::Image,
}

impl Microvm {
    /// Builds the board. Its wires end at the accelerator's interrupt chips, or at its own.
    pub fn build(
        config: &VmConfig,
        memory: &Arc<GuestMap>,
        accel: &dyn AccelOps,
        processors: &Processors,
        (chardevs, named): (&[Arc<Chardev>], &BTreeMap<String, Arc<Chardev>>),
        inbox: &Arc<Inbox>,
    ) -> Result<Microvm, Failure> {
        let backbone = Backbone::build(config, accel, processors, chardevs)?;
        let Backbone { bus, interrupts, clock, .. } = &backbone;
        // A kernel that starts without firmware finds ACPI mode on.
        let sci = interrupts.inputs.line(SCI);
        let pm = AcpiPm::new(clock, sci, inbox.clone(), PmTimerWidth::Bits24, true);
        map(&bus.pio, "ACPI PM", PM_BASE.into(), PM_SIZE, pm.clone())?;
        let reset_control = ResetControl::new(inbox.clone());
        map(&bus.pio, "reset control", RESET_PORT.into(), 1, reset_control.clone())?;
        let places = Arc::new(Slots::new(slots()));
        let backends = Backends {
            drives: drives::open_all(config)?,
            empty: drives::empty(config),
            networks: networks::start_all(config)?,
            chardevs: named.iter().map(|(n, c)| (n.clone(), c.clone() as _)).collect(),
        };
        let context = DeviceContext {
            virtio_mmio: Some(places.clone()),
            ..backbone.context(memory, inbox, backends)
        };
        let mut peripherals = Peripherals::new(context);
        peripherals.install_all(&devices(config))?;
        let tables = tables(config, processors, backbone.serials.len(), places.taken())?;
        Ok(Microvm { backbone, pm, reset_control, peripherals, tables })
    }
}

impl Board for Microvm {
    fn bus(&self) -> &Arc<IoBus> {
        &self.backbone.bus
    }

    fn serials(&self) -> &[Arc<Serial>] {
        &self.backbone.serials
    }

    fn peripherals(&self) -> &Peripherals {
        &self.peripherals
    }

    fn peripherals_mut(&mut self) -> &mut Peripherals {
        &mut self.peripherals
    }

    // There is no PCI.
    fn pci(&self) -> Option<&Arc<Bus>> {
        None
    }

    fn cpu_intc(&self, index: usize) -> Option<Arc<dyn CpuIntc>> {
        self.backbone.interrupts.cpu_intc(index)
    }

    fn rsdp(&self) -> Option<u64> {
        Some(self.tables.rsdp)
    }

    // Puts the ACPI tables into memory.
    fn start_firmware(&self, ram: &GuestRam) -> Result<(), Error> {
        ram.write_slice(&self.tables.bytes, GuestAddress(self.tables.base))
            .map_err(|e| Error::new("cannot place the ACPI tables").caused_by(e))
    }

    fn press_power_button(&self) {
        self.pm.press_power_button();
    }

    fn reset(&self) {
        self.peripherals.reset();
        self.pm.reset();
        self.reset_control.reset();
        self.backbone.reset();
    }
}

/// The ACPI tables.
fn tables(
    config: &VmConfig,
    processors: &Processors,
    serials: usize,
    virtio: &[Slot],
) -> Result<acpi::Image, Failure> {
    let virtio = virtio.iter().map(|s| acpi::board::VirtioMmio {
        base: s.base as u32,
        len: REGISTERS as u32,
        gsi: s.gsi,
    });
    let mut board = acpi::Board::microvm(processors.apic_ids.clone(), virtio.collect());
    board.numa = super::nodes::nodes(config);
    board.serial = COM[..serials]
        .iter()
        .map(|(port, irq)| acpi::board::SerialPort { port: *port, irq: *irq as u8 })
        .collect();
    acpi::layout(&board, acpi::BIOS_AREA, acpi::BIOS_AREA_LEN).map_err(cannot("the ACPI tables"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_where_acpi_is_not() {
        let mut c = VmConfig { machine: NAME.into(), ..VmConfig::default() };
        for driver in ["virtio-rng-device", "virtio-rng-device", "isa-debug-exit"] {
            c.devices.push(Configured { driver: driver.into(), props: vec![] });
        }
        assert_eq!(command_line(&c), "");
        c.boot.append = "console=ttyS0 acpi=off".into();
        assert_eq!(
            command_line(&c),
            " virtio_mmio.device=512@0xfeb00000:5 virtio_mmio.device=512@0xfeb00200:6"
        );
    }
}
