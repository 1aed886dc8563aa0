//! The q35 board: which chips there are, where they answer, and how their wires run.
//!
//! ```text
//!   PIRQA–H ── pirq::IrqRouter ──┐
//!   serial, RTC, SCI … ──────────┴─► GSI inputs ─► the accelerator's chips, or IrqChips (TCG)
//!   MSI of PCI functions ─────────────────────────► the same
//! ```

use super::Failure;
use super::backbone::{Backbone, Interrupts, cannot, map};
use super::board::Board;
use super::cpu::Processors;
use super::drives;
use super::firmware::{self, Facts, Firmware, InPlace};
use super::inbox::Inbox;
use super::memmap::{ECAM, IOAPIC, MemoryMap, PCI32, PCI64, PCI64_SIZE};
use super::networks;
use super::peripherals::Peripherals;
use crate::config::VmConfig;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::{CpuIntc, IrqLine};
use tandem_accel::memory::{GuestMap, GuestRam};
use tandem_accel::{AccelOps, Error};
use tandem_backends::chardev::Chardev;
use tandem_devices::acpi::board::SerialPort;
use tandem_devices::ahci::Ahci;
use tandem_devices::firmware::bootorder::BootOrder;
use tandem_devices::firmware::shadow::Shadow;
use tandem_devices::legacy::acpi_pm::{APM_PORT, AcpiPm, PM_BASE};
use tandem_devices::legacy::debug::{POST_PORT, PostCode};
use tandem_devices::legacy::i8042::I8042;
use tandem_devices::legacy::reset::{PORT_A, PortA, ResetControl};
use tandem_devices::legacy::serial::Serial;
use tandem_devices::legacy::uarts::IsaSerial;
use tandem_devices::pci::assign::{Ranges, assign};
use tandem_devices::pci::decode::Decoder;
use tandem_devices::pci::ich9::{Ich9Lpc, Programmed};
use tandem_devices::pci::mch::{Mch, Shadowing};
use tandem_devices::pci::pirq::IrqRouter;
use tandem_devices::pci::{Bus, host};
use tandem_devices::registry::{Backends, DeviceContext};
use tandem_devices::timer::hpet::{HPET_BASE, HPET_SIZE, Hpet};
use tandem_devices::timer::pm_timer::PmTimerWidth;

const KEYBOARD_IRQ: u32 = 1;
const MOUSE_IRQ: u32 = 12;
/// Ports for BARs.
const PCI_IO: Range<u64> = 0xc000..0x1_0000;

/// The chips behind the LPC bridge that concern power, and those that software only probes for.
struct Lpc {
    pm: Arc<AcpiPm>,
    reset_control: Arc<ResetControl>,
    port_a: Arc<PortA>,
    i8042: Arc<I8042>,
}

impl Lpc {
    fn new(
        clock: &Arc<Clock>,
        interrupts: &Interrupts,
        sci: IrqLine,
        bus: &IoBus,
        power: &Arc<Inbox>,
        firmware: bool,
    ) -> Result<Lpc, Failure> {
        // A kernel that starts without firmware finds ACPI mode on.
        let pm = AcpiPm::new(clock, sci, power.clone(), PmTimerWidth::Bits24, !firmware);
        map(&bus.pio, "APM", APM_PORT.into(), 2, pm.apm())?;
        let port_a = PortA::new(power.clone());
        map(&bus.pio, "system control port A", PORT_A.into(), 1, port_a.clone())?;
        let line = |gsi| interrupts.inputs.line(gsi);
        let i8042 = I8042::new(line(KEYBOARD_IRQ), line(MOUSE_IRQ), power.clone());
        for (port, dev) in i8042.ports() {
            map(&bus.pio, "keyboard controller", port.into(), 1, dev)?;
        }
        map(&bus.pio, "POST code", POST_PORT.into(), 1, Arc::new(PostCode::default()))?;
        Ok(Lpc { pm, reset_control: ResetControl::new(power.clone()), port_a, i8042 })
    }

    fn reset(&self) {
        self.pm.reset();
        self.reset_control.reset();
        self.port_a.reset();
        self.i8042.reset();
    }
}

/// The chips of a q35 machine.
pub struct Q35 {
    backbone: Backbone,
    hpet: Arc<Hpet>,
    lpc: Lpc,
    root: Arc<Bus>,
    ahci: Arc<Ahci>,
    peripherals: Peripherals,
    start: Start,
    /// What a BIOS tries after a reset.
    boot_order: [u8; 2],
}

/// What starts the machine.
enum Start {
    /// A kernel, with tables in memory.
    Kernel(InPlace),
    /// Firmware.
    Firmware(Firmware),
}

impl Q35 {
    /// Builds the board. Its wires end at the accelerator's interrupt chips, or at its own.
    pub fn build(
        config: &VmConfig,
        memory: &Arc<GuestMap>,
        accel: &dyn AccelOps,
        processors: &Processors,
        (chardevs, named): (&[Arc<Chardev>], &BTreeMap<String, Arc<Chardev>>),
        inbox: &Arc<Inbox>,
    ) -> Result<Q35, Failure> {
        let backbone = Backbone::build(config, accel, processors, chardevs)?;
        let Backbone { bus, interrupts, clock, .. } = &backbone;
        let hpet = hpet(&backbone)?;
        let router = IrqRouter::new(&interrupts.inputs);
        let drives = drives::open_all(config)?;
        let mut firmware = match config.starts_with_firmware() {
            true => Some(Firmware::place(config, memory, bus, &drives)?),
            false => None,
        };
        let lpc = Lpc::new(clock, interrupts, router.sci(), bus, inbox, firmware.is_some())?;
        let shadow = firmware.as_ref().map(Firmware::shadow);
        let (root, mch) = pci(bus, interrupts, router, &lpc, shadow)?;
        let boot_order = Arc::new(BootOrder::default());
        let backends = Backends {
            drives,
            empty: drives::empty(config),
            networks: networks::start_all(config)?,
            chardevs: named.iter().map(|(n, c)| (n.clone(), c.clone() as _)).collect(),
        };
        let context = DeviceContext {
            pci: Some(root.clone()),
            boot_order: boot_order.clone(),
            ..backbone.context(memory, inbox, backends)
        };
        let ahci = Ahci::built_in(&context).map_err(cannot("the SATA adapter"))?;
        let made = [drives::devices(config), networks::devices(config)].concat();
        let mut peripherals = Peripherals::new(context);
        peripherals.install_all(made.iter().chain(&config.devices))?;
        // Power-on: slots of ports find what is in them.
        root.reset();
        let facts = Facts {
            config,
            processors,
            serials: backbone.serials.len(),
            more_serials: uarts(peripherals.context()),
            map: MemoryMap::new(config.memory),
        };
        facts.to_cmos(&backbone.rtc);
        let start = match firmware.take() {
            Some(mut firmware) => {
                firmware.offer(facts.items(mch, root.clone(), &boot_order)?, memory, bus)?;
                Start::Firmware(firmware)
            }
            None => Start::Kernel(facts.in_place()?),
        };
        let boot_order = config.firmware.boot.cmos_bytes().1;
        Ok(Q35 { backbone, hpet, lpc, root, ahci, peripherals, start, boot_order })
    }
}

impl Board for Q35 {
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

    fn pci(&self) -> Option<&Arc<Bus>> {
        Some(&self.root)
    }

    fn cpu_intc(&self, index: usize) -> Option<Arc<dyn CpuIntc>> {
        self.backbone.interrupts.cpu_intc(index)
    }

    fn rsdp(&self) -> Option<u64> {
        match &self.start {
            Start::Kernel(tables) => Some(tables.rsdp()),
            Start::Firmware(_) => None,
        }
    }

    // Where there is no firmware: puts its tables into memory and places the BARs of PCI functions,
    // as firmware does before it starts a kernel.
    fn start_firmware(&self, ram: &GuestRam) -> Result<(), Error> {
        let Start::Kernel(tables) = &self.start else { return Ok(()) };
        tables.write(ram)?;
        let mem64 = PCI64..PCI64 + PCI64_SIZE;
        assign(&self.root, Ranges { io: PCI_IO, mem32: PCI32..IOAPIC, mem64 })
            .map_err(|e| Error::new(e.to_string()))
    }

    fn press_power_button(&self) {
        self.lpc.pm.press_power_button();
    }

    fn reset(&self) {
        self.peripherals.reset();
        tandem_devices::registry::Device::reset(&*self.ahci);
        self.root.reset();
        if let Start::Firmware(f) = &self.start {
            f.reset();
        }
        self.lpc.reset();
        self.hpet.reset();
        self.backbone.reset();
        firmware::set_boot_order(&self.backbone.rtc, self.boot_order);
    }
}

/// The HPET, which can take PIT's and RTC's interrupts over.
fn hpet(backbone: &Backbone) -> Result<Arc<Hpet>, Failure> {
    let hpet = Hpet::new(&backbone.clock, &backbone.interrupts.inputs);
    map(&backbone.bus.mmio, "HPET", HPET_BASE, HPET_SIZE, hpet.clone())?;
    let (pit, rtc) = (backbone.pit.clone(), backbone.rtc.clone());
    hpet.on_legacy(move |replaced| {
        pit.iter().for_each(|p| p.set_irq_enabled(!replaced));
        rtc.set_irq_enabled(!replaced);
    });
    Ok(hpet)
}

/// The serial ports that devices add, for tables.
fn uarts(context: &DeviceContext) -> Vec<SerialPort> {
    let all = context.directory.all::<IsaSerial>();
    all.iter().map(|s| SerialPort { port: s.base, irq: s.irq }).collect()
}

/// The PCI root bus with host bridge and LPC bridge: as after RESET with a shadow, for firmware;
/// without one as firmware leaves them.
fn pci(
    bus: &Arc<IoBus>,
    interrupts: &Interrupts,
    router: Arc<IrqRouter>,
    lpc: &Lpc,
    shadow: Option<Arc<Shadow>>,
) -> Result<(Arc<Bus>, Arc<Mch>), Failure> {
    let root = Bus::root(Decoder::new(bus.clone()), interrupts.msi.clone(), router.clone());
    host::map_ports(bus, &root, Some(lpc.reset_control.clone()))
        .map_err(cannot("the PCI configuration ports"))?;
    let programmed = match shadow {
        Some(_) => None,
        None => Some(Programmed { pm_base: PM_BASE, ..Programmed::default() }),
    };
    let ecam = programmed.as_ref().map(|_| ECAM);
    let shadowing = shadow.map(|s| s as Arc<dyn Shadowing>);
    let mch = Mch::attach(&root, ecam, shadowing).map_err(cannot("the PCI host bridge"))?;
    Ich9Lpc::attach(&root, router, Some(lpc.pm.clone()), programmed)
        .map_err(cannot("the LPC bridge"))?;
    Ok((root, mch))
}
