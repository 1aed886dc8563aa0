//! vCPUs: what one is made from ([`VcpuSpec`]), how a machine holds it ([`VcpuHandle`]), what an
//! accelerator implements ([`VcpuRunner`]), and what runs it as its control asks ([`Seat`]; on a
//! thread of its own, [`run_loop`]).
//!
//! The run-state machine, drawn in [`RunState`]:
//!
//! ```text
//!             resume                 HLT / wait-for-SIPI
//!   Paused ──────────► Running ─────────────────────────► (idle inside Running: the loop sleeps
//!     ▲  ◄──────────────  │                                until a kick or an interrupt)
//!     │       pause       │ guest asked for power-off, reset; triple fault; accelerator error
//!     │                   ▼
//!     └───────────────  Parked   (the machine decides: reset → Paused/Running, or stop)
//!                         │
//!   any state ── stop ──► Stopped (thread ends; no way back)
//! ```

mod handle;
mod run;

pub use handle::*;
pub use run::*;

use crate::bus::IoBus;
use crate::irq::CpuIntc;
use crate::x86::X86State;
use crate::x86::cpuid::CpuidTable;
use std::sync::Arc;

/// Everything a vCPU is made from.
#[derive(Clone)]
pub struct VcpuSpec {
    /// Index, 0-based; 0 is the bootstrap processor.
    pub index: u32,
    /// Local APIC ID.
    pub apic_id: u32,
    /// What CPUID tells this vCPU's guest.
    pub cpuid: Arc<CpuidTable>,
    /// TSC frequency that the guest is told, in Hz.
    pub tsc_hz: u64,
    /// Where port and memory-mapped I/O goes.
    pub bus: Arc<IoBus>,
    /// The local APIC, if interrupt chips are the machine's.
    pub intc: Option<Arc<dyn CpuIntc>>,
    /// Architectural state to start with.
    pub state: Box<X86State>,
    /// Told when the vCPU stops running by itself.
    pub events: Arc<dyn VcpuEvents>,
}

/// Why a vCPU stopped running by itself.
#[derive(Debug)]
pub enum StopReason {
    /// Triple fault (shutdown state).
    TripleFault,
    /// The accelerator cannot go on; the text says why, with registers.
    AccelError(crate::Error),
    /// A debug event (breakpoint, single step).
    Debug,
}

/// The machine's ear for its vCPUs. Called on the vCPU thread; must not wait for that vCPU.
pub trait VcpuEvents: Send + Sync {
    /// vCPU `index` is now `Parked` because of `reason`.
    fn stopped(&self, index: u32, reason: StopReason);
}

/// State of a vCPU (see the module docs for the arrows).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunState {
    /// Not running; state may be read and written.
    Paused,
    /// Running guest code or idle in HLT.
    Running,
    /// Stopped by itself; the machine decides.
    Parked,
    /// The thread has ended.
    Stopped,
}

/// Why [`VcpuRunner::run`] returned.
#[derive(Debug)]
pub enum VcpuExit {
    /// It was kicked, or a signal interrupted it: look at the commands, then run on.
    Kicked,
    /// HLT (or wait-for-SIPI) with nothing deliverable: sleep until a kick.
    Halted,
    /// Its turn is over, on a thread that it shares with other vCPUs.
    TurnOver,
    /// Stops by itself.
    Stop(StopReason),
}

/// What an accelerator implements: run until an exit, and get and set state. Lives on its vCPU's
/// thread.
pub trait VcpuRunner {
    /// Runs guest code until something needs the loop. Port and memory-mapped I/O is done inside.
    /// After a kick that arrived at any time since the last return, returns soon.
    fn run(&mut self) -> VcpuExit;
    /// Reads the architectural state.
    fn state(&mut self) -> crate::Result<X86State>;
    /// Writes the architectural state, in the order that the accelerator requires.
    fn set_state(&mut self, state: &X86State) -> crate::Result<()>;
}

impl<R: VcpuRunner + ?Sized> VcpuRunner for &mut R {
    fn run(&mut self) -> VcpuExit {
        (**self).run()
    }
    fn state(&mut self) -> crate::Result<X86State> {
        (**self).state()
    }
    fn set_state(&mut self, state: &X86State) -> crate::Result<()> {
        (**self).set_state(state)
    }
}
