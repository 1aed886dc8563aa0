//! `tandem-devices`: what a guest can see — buses, interrupt chips, PC chips, PCI, virtio, ACPI.
//!
//! What always holds:
//!
//! * A device never sees an accelerator: it raises an [`tandem_accel::irq::IrqLine`] or sends a
//!   message, and its time comes from [`tandem_accel::clock::Clock`].
//! * What a guest writes never panics, indexes or allocates unchecked.
//! * A device guards its own state with its own lock. Lock order: device → interrupt chip → kick;
//!   no bus is called under a chip's lock.
//! * State that is saved is typed, versioned and in the device's own file ([`state::Stateful`]).

pub mod acpi;
pub mod ahci;
pub mod display;
pub mod e1000e;
pub mod firmware;
pub mod gsi;
pub mod irqchip;
pub mod legacy;
pub mod nvme;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod registry;
pub mod spans;
pub mod state;
pub mod timer;
pub mod virtio;
pub mod watchdog;

/// For [`registry::DeviceType`]s registered by other crates and tests.
pub use inventory;

#[cfg(test)]
mod testing;
