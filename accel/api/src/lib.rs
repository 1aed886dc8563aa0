//! `tandem-accel`: the treaty between an accelerator and its machine.
//!
//! ```text
//!            machine (src)                          accelerator (accel/kvm, accel/tcg)
//!   ┌─────────────────────────────┐  GuestMap      ┌──────────────────────────────────┐
//!   │ devices ── IoBus ◄──────────┼────────────────┤ vCPU thread: vcpu::run_loop      │
//!   │    │                        │  VcpuSpec ───► │   └─ VcpuRunner::run until exit  │
//!   │    └─ IrqLine / MsiMessage ─┼─► IrqSink ───► │ in-kernel chips, or CpuIntc      │
//!   │ run state ── VcpuHandle ────┼─► kick ──────► │                                  │
//!   └─────────────────────────────┘                └──────────────────────────────────┘
//! ```
//!
//! What always holds:
//!
//! * An accelerator never sees a device, and a device never sees an accelerator. They meet in
//!   [`bus::IoBus`], [`irq`] and [`memory::GuestMap`].
//! * Whatever a vCPU needs is in its [`vcpu::VcpuSpec`]; nothing is filled in later.
//! * There is one vCPU loop and one run-state machine ([`vcpu`]), used by every accelerator.
//! * State that is saved ([`x86::X86State`]) names no accelerator.
//! * Lock order: device → interrupt chip → kick. No bus call is made under a chip lock.

pub mod bus;
pub mod clock;
pub mod error;
pub mod irq;
pub mod memory;
pub mod ops;
pub mod suggest;
pub mod vcpu;
pub mod x86;

pub use error::{Error, Result};
pub use ops::{AccelOps, IrqChip};
