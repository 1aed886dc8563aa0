//! What every board is built around: the I/O address spaces, the interrupt inputs, PIT and RTC, and
//! the serial ports.
//!
//! What always holds: the wires end at the accelerator's interrupt chips, or at chips made here.

use super::Failure;
use super::cpu::Processors;
use super::inbox::Inbox;
use super::memmap::MemoryMap;
use crate::config::VmConfig;
use std::sync::Arc;
use tandem_accel::bus::{BusDevice, IoBus, Space};
use tandem_accel::clock::Clock;
use tandem_accel::irq::{CpuIntc, IrqSink, MsiSink};
use tandem_accel::memory::GuestMap;
use tandem_accel::{AccelOps, Error, IrqChip};
use tandem_backends::chardev::Chardev;
use tandem_devices::gsi::IrqInputs;
use tandem_devices::irqchip::{IOAPIC_BASE, IOAPIC_SIZE, IrqChips};
use tandem_devices::legacy::serial::{COM, PORTS, Serial};
use tandem_devices::registry::{Backends, DeviceContext};
use tandem_devices::timer::pit::{PIT_PORT, PORT_B, Pit};
use tandem_devices::timer::rtc::{RTC_PORT, Rtc};

const PIT_IRQ: u32 = 0;
const RTC_IRQ: u32 = 8;

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

/// Buses, interrupts, clocks and serial ports of a machine. They leave the buses when it goes.
pub(super) struct Backbone {
    pub bus: Arc<IoBus>,
    pub interrupts: Interrupts,
    pub clock: Arc<Clock>,
    /// Absent if it is part of the accelerator's interrupt chips.
    pub pit: Option<Arc<Pit>>,
    pub rtc: Arc<Rtc>,
    /// COM1 first.
    pub serials: Vec<Arc<Serial>>,
}

impl Backbone {
    /// Builds it, with a serial port for each of `chardevs`.
    pub fn build(
        config: &VmConfig,
        accel: &dyn AccelOps,
        processors: &Processors,
        chardevs: &[Arc<Chardev>],
    ) -> Result<Backbone, Failure> {
        let bus = Arc::new(IoBus::default());
        let interrupts = Interrupts::new(accel, processors, &bus)?;
        let line = |gsi| interrupts.inputs.line(gsi);
        let mut serials = Vec::new();
        for (i, (chardev, (port, irq))) in chardevs.iter().zip(COM).enumerate() {
            let serial = Serial::new(line(irq), chardev.clone());
            map(&bus.pio, &format!("COM{}", i + 1), port.into(), PORTS, serial.clone())?;
            serials.push(serial);
        }
        let clock = accel.clock();
        let ram = MemoryMap::new(config.memory);
        let shown = config.rtc.base.at(i64::try_from(clock.epoch()).unwrap_or(i64::MAX));
        let rtc = Rtc::new(&clock, line(RTC_IRQ), shown, config.rtc.lost_ticks());
        rtc.set_memory(ram.low_end, ram.high);
        map(&bus.pio, "RTC", RTC_PORT.into(), 2, rtc.clone())?;
        let pit = interrupts.chips.is_some().then(|| Pit::new(&clock, line(PIT_IRQ)));
        if let Some(pit) = &pit {
            map(&bus.pio, "PIT", PIT_PORT.into(), 4, pit.clone())?;
            map(&bus.pio, "system control port B", PORT_B.into(), 1, pit.port_b())?;
        }
        Ok(Backbone { bus, interrupts, clock, pit, rtc, serials })
    }

    /// What constructors of devices are given: without PCI and places of virtio devices, which a
    /// board adds that has them.
    pub fn context(
        &self,
        memory: &Arc<GuestMap>,
        inbox: &Arc<Inbox>,
        backends: Backends,
    ) -> DeviceContext {
        DeviceContext {
            io: self.bus.clone(),
            irqs: self.interrupts.inputs.clone(),
            msi: self.interrupts.msi.clone(),
            clock: self.clock.clone(),
            memory: memory.clone(),
            power: inbox.clone(),
            pci: None,
            buses: Default::default(),
            virtio_mmio: None,
            boot_order: Default::default(),
            backends,
            directory: Default::default(),
        }
    }

    /// RESET.
    pub fn reset(&self) {
        self.serials.iter().for_each(|s| s.reset());
        self.pit.iter().for_each(|p| p.reset());
        self.rtc.reset();
        self.interrupts.reset();
    }
}

impl Drop for Backbone {
    fn drop(&mut self) {
        self.bus.pio.clear();
        self.bus.mmio.clear();
    }
}
