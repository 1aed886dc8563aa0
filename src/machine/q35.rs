//! The q35 board: which chips there are, where they answer, and how their wires run.
//!
//! ```text
//!   PIRQA–H ── pirq::IrqRouter ──┐
//!   serial, RTC, SCI … ──────────┴─► GSI inputs ─► the accelerator's chips, or IrqChips (TCG)
//!   MSI of PCI functions ─────────────────────────► the same
//! ```

use super::Failure;
use super::board::Board;
use super::cpu::Processors;
use super::drives;
use super::firmware::{Facts, Firmware, InPlace};
use super::inbox::Inbox;
use super::memmap::{ECAM, IOAPIC, MemoryMap, PCI32, PCI64, PCI64_SIZE};
use super::networks;
use super::peripherals::Peripherals;
use crate::config::VmConfig;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tandem_accel::bus::{BusDevice, IoBus, Space};
use tandem_accel::clock::Clock;
use tandem_accel::irq::{CpuIntc, IrqLine, IrqSink, MsiSink};
use tandem_accel::memory::{GuestMap, GuestRam};
use tandem_accel::{AccelOps, Error, IrqChip};
use tandem_backends::chardev::Chardev;
use tandem_devices::ahci::Ahci;
use tandem_devices::firmware::bootorder::BootOrder;
use tandem_devices::firmware::shadow::Shadow;
use tandem_devices::gsi::IrqInputs;
use tandem_devices::irqchip::{IOAPIC_BASE, IOAPIC_SIZE, IrqChips};
use tandem_devices::legacy::acpi_pm::{APM_PORT, AcpiPm, PM_BASE};
use tandem_devices::legacy::debug::{POST_PORT, PostCode};
use tandem_devices::legacy::i8042::I8042;
use tandem_devices::legacy::reset::{PORT_A, PortA, ResetControl};
use tandem_devices::legacy::serial::{COM, PORTS, Serial};
use tandem_devices::pci::assign::{Ranges, assign};
use tandem_devices::pci::decode::Decoder;
use tandem_devices::pci::ich9::{Ich9Lpc, Programmed};
use tandem_devices::pci::mch::{Mch, Shadowing};
use tandem_devices::pci::pirq::IrqRouter;
use tandem_devices::pci::{Bus, host};
use tandem_devices::registry::{Backends, DeviceContext, Directory};
use tandem_devices::timer::hpet::{HPET_BASE, HPET_SIZE, Hpet};
use tandem_devices::timer::pit::{PIT_PORT, PORT_B, Pit};
use tandem_devices::timer::pm_timer::PmTimerWidth;
use tandem_devices::timer::rtc::{RTC_PORT, Rtc};

const PIT_IRQ: u32 = 0;
const KEYBOARD_IRQ: u32 = 1;
const RTC_IRQ: u32 = 8;
const MOUSE_IRQ: u32 = 12;
/// Ports for BARs.
const PCI_IO: Range<u64> = 0xc000..0x1_0000;

/// Fails with what could not be made.
pub(super) fn cannot<E: std::error::Error + Send + Sync + 'static>(
    what: &str,
) -> impl FnOnce(E) -> Failure {
    move |e| Failure::Host(Error::new(format!("cannot make {what}")).caused_by(e))
}

/// Puts `dev` at these addresses.
pub(super) fn map(
    space: &Space,
    name: &str,
    start: u64,
    len: u64,
    dev: Arc<dyn BusDevice>,
) -> Result<(), Failure> {
    space.insert(name, start, len, dev).map_err(cannot(name))
}

/// The machine's interrupt inputs, whoever has the chips.
pub(super) struct Interrupts {
    pub inputs: IrqInputs,
    pub msi: Arc<dyn MsiSink>,
    /// The machine's own chips, if the accelerator has none.
    pub chips: Option<IrqChips>,
}

impl Interrupts {
    /// Those of `accel`, or chips of their own on `bus`.
    pub fn new(
        accel: &dyn AccelOps,
        processors: &Processors,
        bus: &IoBus,
    ) -> Result<Self, Failure> {
        match accel.irqchip() {
            IrqChip::InKernel { lines, msi } => {
                Ok(Interrupts { inputs: IrqInputs::new(lines), msi, chips: None })
            }
            IrqChip::Userspace => {
                let config = processors.apic_config();
                let chips = IrqChips::new(&processors.apic_ids, config, &accel.clock());
                for (port, len, dev) in chips.pic.ports() {
                    map(&bus.pio, "PIC", port.into(), len, dev)?;
                }
                map(&bus.mmio, "IOAPIC", IOAPIC_BASE, IOAPIC_SIZE, chips.ioapic.clone())?;
                let sink: Arc<dyn IrqSink> = chips.router.clone();
                let inputs = IrqInputs::new(sink);
                Ok(Interrupts { inputs, msi: chips.router.clone(), chips: Some(chips) })
            }
        }
    }

    /// The local APIC of vCPU `index`, if it is not the accelerator's.
    pub fn cpu_intc(&self, index: usize) -> Option<Arc<dyn CpuIntc>> {
        let lapic = self.chips.as_ref()?.lapic(index)?;
        Some(lapic)
    }

    /// RESET of the machine's own chips.
    pub fn reset(&self) {
        if let Some(chips) = &self.chips {
            chips.reset();
            chips.bus.lapics().iter().for_each(|l| l.reset());
        }
    }
}

/// PIT, RTC and HPET.
struct Timers {
    /// Absent if it is part of the accelerator's interrupt chips.
    pit: Option<Arc<Pit>>,
    rtc: Arc<Rtc>,
    hpet: Arc<Hpet>,
}

impl Timers {
    fn new(
        clock: &Arc<Clock>,
        interrupts: &Interrupts,
        bus: &IoBus,
        ram: &MemoryMap,
    ) -> Result<Timers, Failure> {
        let line = |gsi| interrupts.inputs.line(gsi);
        let rtc = Rtc::new(clock, line(RTC_IRQ), i64::try_from(clock.epoch()).unwrap_or(i64::MAX));
        rtc.set_memory(ram.low_end, ram.high);
        map(&bus.pio, "RTC", RTC_PORT.into(), 2, rtc.clone())?;
        let hpet = Hpet::new(clock, &interrupts.inputs);
        map(&bus.mmio, "HPET", HPET_BASE, HPET_SIZE, hpet.clone())?;
        let pit = interrupts.chips.is_some().then(|| Pit::new(clock, line(PIT_IRQ)));
        if let Some(pit) = &pit {
            map(&bus.pio, "PIT", PIT_PORT.into(), 4, pit.clone())?;
            map(&bus.pio, "system control port B", PORT_B.into(), 1, pit.port_b())?;
        }
        let (their_pit, their_rtc) = (pit.clone(), rtc.clone());
        hpet.on_legacy(move |replaced| {
            their_pit.iter().for_each(|p| p.set_irq_enabled(!replaced));
            their_rtc.set_irq_enabled(!replaced);
        });
        Ok(Timers { pit, rtc, hpet })
    }

    fn reset(&self) {
        self.hpet.reset();
        self.pit.iter().for_each(|p| p.reset());
        self.rtc.reset();
    }
}

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
    bus: Arc<IoBus>,
    interrupts: Interrupts,
    timers: Timers,
    lpc: Lpc,
    root: Arc<Bus>,
    ahci: Arc<Ahci>,
    serials: Vec<Arc<Serial>>,
    peripherals: Peripherals,
    start: Start,
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
        let bus = Arc::new(IoBus::default());
        let interrupts = Interrupts::new(accel, processors, &bus)?;
        let mut serials = Vec::new();
        for (i, (chardev, (port, irq))) in chardevs.iter().zip(COM).enumerate() {
            let serial = Serial::new(interrupts.inputs.line(irq), chardev.clone());
            map(&bus.pio, &format!("COM{}", i + 1), port.into(), PORTS, serial.clone())?;
            serials.push(serial);
        }
        let clock = accel.clock();
        let timers = Timers::new(&clock, &interrupts, &bus, &MemoryMap::new(config.memory))?;
        let router = IrqRouter::new(&interrupts.inputs);
        let drives = drives::open_all(config)?;
        let mut firmware = match config.starts_with_firmware() {
            true => Some(Firmware::place(config, memory, &bus, &drives)?),
            false => None,
        };
        let lpc = Lpc::new(&clock, &interrupts, router.sci(), &bus, inbox, firmware.is_some())?;
        let shadow = firmware.as_ref().map(Firmware::shadow);
        let (root, mch) = pci(&bus, &interrupts, router, &lpc, shadow)?;
        let boot_order = Arc::new(BootOrder::default());
        let context = DeviceContext {
            io: bus.clone(),
            irqs: interrupts.inputs.clone(),
            msi: interrupts.msi.clone(),
            clock,
            memory: memory.clone(),
            power: inbox.clone(),
            pci: Some(root.clone()),
            buses: Default::default(),
            directory: Directory::default(),
            virtio_mmio: None,
            boot_order: boot_order.clone(),
            backends: Backends {
                drives,
                networks: networks::start_all(config)?,
                chardevs: named.iter().map(|(n, c)| (n.clone(), c.clone() as _)).collect(),
            },
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
            serials: serials.len(),
            map: MemoryMap::new(config.memory),
        };
        facts.to_cmos(&timers.rtc);
        let start = match firmware.take() {
            Some(mut firmware) => {
                firmware.offer(facts.items(mch, root.clone(), &boot_order)?, memory, &bus)?;
                Start::Firmware(firmware)
            }
            None => Start::Kernel(facts.in_place()?),
        };
        Ok(Q35 { bus, interrupts, timers, lpc, root, ahci, serials, peripherals, start })
    }
}

impl Board for Q35 {
    fn bus(&self) -> &Arc<IoBus> {
        &self.bus
    }

    fn serials(&self) -> &[Arc<Serial>] {
        &self.serials
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
        self.interrupts.cpu_intc(index)
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
        self.serials.iter().for_each(|s| s.reset());
        self.lpc.reset();
        self.timers.reset();
        self.interrupts.reset();
    }
}

impl Drop for Q35 {
    fn drop(&mut self) {
        self.bus.pio.clear();
        self.bus.mmio.clear();
    }
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
