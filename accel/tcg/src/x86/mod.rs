//! The x86 guest: its processor state, front end, helpers and system behaviour.

pub mod bits;
pub mod cpu;
pub mod cpuid;
pub mod cr;
pub mod debug;
pub mod delivery;
pub mod exception;
pub mod far;
pub mod features;
pub mod flags;
pub mod helpers;
pub mod interrupt;
pub mod io;
pub mod iret;
pub mod mode;
pub mod msr;
pub mod paging;
pub mod seg;
pub mod stack;
pub mod stack_fault;
pub mod state;
pub mod syscall;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod translate;
pub mod tsc;
pub mod x87;
pub mod xsave;

pub use cpu::Cpu;
/// The state block of an x86 vCPU.
pub type Env = crate::env::Env<Cpu>;
