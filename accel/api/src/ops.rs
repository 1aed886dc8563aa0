//! The accelerator's face.

use crate::Result;
use crate::clock::Clock;
use crate::irq::{IrqSink, MsiSink};
use crate::memory::GuestMap;
use crate::vcpu::{VcpuHandle, VcpuSpec};
use crate::x86::cpuid::CpuidTable;
use std::sync::Arc;

/// Who provides PIC, IOAPIC, LAPICs and PIT.
#[derive(Clone)]
pub enum IrqChip {
    /// The accelerator does; the machine routes its lines and messages there and must not create
    /// its own. GSIs 0–15 reach PIC and IOAPIC, 16–23 the IOAPIC.
    InKernel {
        /// Takes line levels by GSI.
        lines: Arc<dyn IrqSink>,
        /// Takes message-signalled interrupts.
        msi: Arc<dyn MsiSink>,
    },
    /// The machine does, and hands each vCPU its [`crate::irq::CpuIntc`] in the spec.
    Userspace,
}

/// An accelerator, set up for one VM.
///
/// Order of calls: `attach_memory` once, then `create_vcpu_thread` for each vCPU (index order).
/// Vcpus start in the state their spec says.
pub trait AccelOps: Send + Sync {
    /// `kvm` or `tcg`.
    fn name(&self) -> &'static str;
    /// Makes guest memory known to the accelerator, which subscribes to later changes.
    fn attach_memory(&self, map: &Arc<GuestMap>) -> Result<()>;
    /// Who provides the interrupt chips.
    fn irqchip(&self) -> IrqChip;
    /// What CPUID this accelerator can give a guest on this host; CPU models are checked against it
    /// before boot.
    fn supported_cpuid(&self) -> Result<CpuidTable>;
    /// Starts the thread(s) that run a vCPU.
    fn create_vcpu_thread(&self, spec: VcpuSpec) -> Result<VcpuHandle>;
    /// The clock that guest time derives from. An accelerator with clocks of its own follows this
    /// one's pauses.
    fn clock(&self) -> Arc<Clock>;
    /// Frequency at which a vCPU's TSC counts on this host unless its spec says otherwise, in Hz.
    /// The machine puts it into every [`VcpuSpec::tsc_hz`] and into CPUID.
    fn tsc_hz(&self) -> u64;
    /// Guest instructions executed so far, if guest time is made from them.
    fn executed(&self) -> Option<u64> {
        None
    }
    /// The guest has asked, on the calling vCPU's thread, for something that ends its run. Where runs
    /// are to be alike, nothing more is executed until the vCPUs have been paused or stopped, which
    /// the machine will do; elsewhere they go on until then.
    fn hold(&self) {}
    /// RESET of what the accelerator keeps for the machine besides vCPU state: in-kernel interrupt
    /// chips and timers, local APICs included. Called while all vCPUs are paused; their state is
    /// written afterwards.
    fn reset(&self) -> Result<()>;
}
