//! The x86 guest: its processor state, front end, helpers and system behaviour.

pub mod bits;
pub mod cpu;
pub mod exception;
pub mod features;
pub mod flags;
pub mod helpers;
pub mod mode;
pub mod msr;
pub mod paging;
pub mod translate;

pub use cpu::Cpu;
/// The state block of an x86 vCPU.
pub type Env = crate::env::Env<Cpu>;
