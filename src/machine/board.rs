//! What a machine asks of its board, whichever type it is.

use super::peripherals::Peripherals;
use std::sync::Arc;
use tandem_accel::Error;
use tandem_accel::bus::IoBus;
use tandem_accel::irq::CpuIntc;
use tandem_accel::memory::GuestRam;
use tandem_devices::legacy::serial::Serial;
use tandem_devices::pci::Bus;

/// The chips of a machine.
pub trait Board {
    /// The I/O address spaces.
    fn bus(&self) -> &Arc<IoBus>;
    /// The serial ports, COM1 first.
    fn serials(&self) -> &[Arc<Serial>];
    /// What the configuration adds.
    fn peripherals(&self) -> &Peripherals;
    /// As above, to be changed.
    fn peripherals_mut(&mut self) -> &mut Peripherals;
    /// The PCI root bus, if there is PCI.
    fn pci(&self) -> Option<&Arc<Bus>>;
    /// The local APIC of vCPU `index`, if it is not the accelerator's.
    fn cpu_intc(&self, index: usize) -> Option<Arc<dyn CpuIntc>>;
    /// Address of the ACPI root pointer, if it is in memory from the start.
    fn rsdp(&self) -> Option<u64>;
    /// Where a kernel starts the machine: leaves memory and chips as firmware leaves them to it.
    fn start_firmware(&self, ram: &GuestRam) -> Result<(), Error>;
    /// Presses the power button of the case.
    fn press_power_button(&self);
    /// RESET of all chips. vCPUs are paused.
    fn reset(&self);
}
