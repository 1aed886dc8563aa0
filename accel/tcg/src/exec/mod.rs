//! Execution: the vCPU object, the loop that looks blocks up, runs them and delivers what is
//! pending, and the threads.
//!
//! ```text
//!   ┌──► interrupts due? deliver ──► find block at RIP ──► run generated code ──► left: why? ──┐
//!   │                                  │ none: translate                                        │
//!   └───────────────◄── link exit · deliver fault · halt · page check failed ◄──────────────────┘
//! ```
//! Generated code stays inside itself as long as it can: linked exits, the jump cache and
//! [`lookup_from_code`] do not come back to the loop.

mod find;
mod pace;
mod run;
mod shared;
mod turns;
mod vcpu;

pub use find::lookup_from_code;
pub use pace::{Icount, Pace};
pub use run::Runner;
pub use shared::{Doorbell, Shared};
pub use turns::Turns;
pub use vcpu::{Vcpu, VcpuOptions};

/// Codes with which blocks leave to the loop by themselves.
pub mod leave {
    /// Look at everything anew: mode, interrupts, RIP.
    pub const LOOP: u32 = 1;
    /// HLT.
    pub const HALT: u32 = 2;
    /// A debug event for the machine.
    pub const DEBUG: u32 = 3;
    /// An instruction has completed that began with TF set; RIP is past it. A #DB trap follows.
    pub const STEP: u32 = 4;
    /// The vCPU may execute fewer instructions than the block has: see [`super::Pace`].
    pub const SPENT: u32 = 5;
    /// PAUSE, where vCPUs take turns.
    pub const YIELD: u32 = 6;
    /// The instruction at RIP unmasks x87 exceptions: once more, by helpers.
    pub const X87: u32 = 7;
    /// The instruction at RIP raises the exception whose vector is in the low 8 bits, with error
    /// code 0 if it has one.
    pub const RAISE: u32 = 0x100;
}
