//! Drivers that mean harm, for tests and for the fuzzer (`scripts/fuzz-devices`).
//!
//! ```text
//!   Choices (a seed, or the fuzzer's bytes) ──► driver ──► PCI or MMIO transport ──► a Subject
//! ```
//!
//! A case follows from its [`Choices`] alone. It writes descriptors that loop, point anywhere and are
//! as long as they like, tables in tables, rings over buffers, heads and indices of any value, and
//! registers in any order. What must hold whatever it does: no panic, no hang, no allocation that
//! the guest chose the size of, and after a reset the device serves the next driver.

mod choices;
mod driver;
pub mod subjects;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub mod watchdog;

pub use choices::Choices;
pub use driver::{mmio, pci};
