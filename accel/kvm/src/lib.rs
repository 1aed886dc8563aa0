//! `tandem-kvm`: the accelerator treaty kept by the kernel.
//!
//! ```text
//!   machine ── AccelOps ──► KvmAccel ── Arc ──► Vm (VM file descriptor, what the kernel can)
//!      │                        │                ▲  memslots ◄── GuestMap (memory)
//!      │                        │                │  KVM_IRQ_LINE, KVM_SIGNAL_MSI ◄── lines (irq)
//!      │                        │                │  PIC, IOAPIC, PIT images for RESET (chips)
//!      └── VcpuHandle ── kick ──┴─► vCPU thread: tandem_accel::vcpu::run_loop
//!                                        └─ Vcpu: KVM_RUN ⇄ IoBus (vcpu/run)
//!                                             state ⇄ ioctls (vcpu/{state,regs,msrs,xsave,cpuid})
//! ```
//!
//! What always holds:
//!
//! * This is the only crate that names `kvm_*`; nothing that it returns does.
//! * PIC, IOAPIC, local APICs and the PIT are the kernel's ([`tandem_accel::IrqChip::InKernel`]);
//!   HLT sleeps in the kernel.
//! * An ioctl that fails becomes a sentence that says what was attempted and what to do.
//! * A kick is never lost: it sets `immediate_exit`, which only the vCPU thread clears, after
//!   KVM_RUN has returned because of it.
//! * Guest memory stays mapped while a memslot refers to it, because the slot table holds it.
//!
//! Source for everything said about ioctls: Linux `Documentation/virt/kvm/api.rst`.

#![cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    allow(unused_crate_dependencies)
)]

mod diagnose;

pub use diagnose::{Cause, Diagnosis, Info, has_hardware, probe};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod caps;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod chips;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod error;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod irq;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod memory;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tsc;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod vcpu;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod vm;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use vm::KvmAccel;
