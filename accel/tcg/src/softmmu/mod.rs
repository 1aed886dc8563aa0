//! Guest virtual memory: software TLBs and the slow paths behind them.
//!
//! A hit is inline in generated code. A miss asks the guest's page walker
//! ([`crate::x86::paging`]), fills the TLB, and accesses RAM directly or a device through the bus.
//! Every access of helpers goes through [`access`] and gives a guest fault as a value.

pub mod access;
pub mod phys;
mod tlb;

pub use tlb::*;
