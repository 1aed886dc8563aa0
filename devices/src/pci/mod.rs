//! PCI: configuration space, functions and their address windows, interrupts, buses, and the q35
//! host bridge and LPC bridge.
//!
//! ```text
//!   0xcf8/0xcfc, ECAM          Bus ──► PciDevice ──► Function (config space, BARs, command)
//!        host::ConfigPorts ──►  │                      │  claims windows on   decode::Decoder
//!        host::Ecam        ──►  └─ bridge ─► Bus       │  gates               Intx, Msi, Msix
//!                                                      ▼
//!   Intx ─► pirq::IrqRouter ─► GSI 16–23 (and ISA IRQs)       Msi, Msix ─► MsiSink
//! ```
//!
//! What always holds:
//!
//! * A window is mapped exactly while the command register enables its space and its BAR holds a
//!   usable address. Two windows on one address: the older keeps it, the younger waits.
//! * Lock order: function → decoder → bus space; function → interrupt state → sink. The callback of
//!   a BAR runs under none of these.
//! * A configuration access never fails: absent functions read as ones and drop writes.

pub mod assign;
pub mod bus;
pub mod capability;
pub mod config;
pub mod decode;
pub mod function;
pub mod host;
pub mod hotplug;
pub mod ich9;
pub mod intx;
pub mod mch;
pub mod msi;
pub mod msix;
pub mod pirq;
pub mod rom;
pub mod root_port;

pub use bus::{Bus, Devfn, PciDevice, Slot};
pub use function::{Bar, Function, FunctionSpec, Identity};
pub use intx::{Intx, Pin};
pub use msi::Msi;
pub use msix::Msix;

/// A PCI device could not be made or attached; a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PciError(pub String);

#[cfg(any(test, feature = "hostile"))]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) mod testing;
