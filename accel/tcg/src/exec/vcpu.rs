//! What a vCPU owns besides its `Env`: the outside world as helpers reach it.

use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::CpuIntc;
use tandem_accel::x86::cpuid::CpuidTable;

/// Reached from helpers through [`crate::x86::Env::vcpu`].
pub struct Vcpu {
    /// Index.
    pub index: u32,
    /// Local APIC ID.
    pub apic_id: u32,
    /// What CPUID answers.
    pub cpuid: Arc<CpuidTable>,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Port and memory-mapped I/O.
    pub bus: Arc<IoBus>,
    /// The local APIC.
    pub intc: Option<Arc<dyn CpuIntc>>,
    /// Virtual clock.
    pub clock: Arc<Clock>,
}
