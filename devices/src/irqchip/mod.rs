//! The machine's own interrupt chips, for accelerators without in-kernel ones.
//!
//! ```text
//!  IrqLine ──► IrqRouter ──► DualPic ──INTR──┐ (LINT0 of every local APIC)
//!  (GSI)            └──────► IoApic ──┐      ▼
//!  MsiMessage ─────────────────────► ApicBus ──► Lapic 0..n ──Kick──► vCPU
//!                                       ▲            │ ICR: IPIs; EOI of level interrupts
//!                                       └────────────┘──► IoApic
//! ```
//!
//! Lock order: device → IoApic → Lapic → kick, and device → DualPic. No two LAPIC locks are ever
//! held together, and a LAPIC sends (IPI, EOI) only after its lock is released. The PIC's output
//! is an atomic that LAPICs sample, so neither lock is taken under the other.

mod apic_bus;
mod ioapic;
mod lapic;
mod lapic_regs;
mod lapic_state;
mod pic;
mod router;

pub use apic_bus::{ApicBus, ApicConfig, Delivery, DeliveryMode};
pub use ioapic::{IOAPIC_BASE, IOAPIC_PINS, IOAPIC_SIZE, IoApic, IoApicState};
pub use lapic::Lapic;
pub use lapic_state::LapicState;
pub use pic::{DualPic, PicState, PicsState};
pub use router::{GSIS, IrqChips, IrqRouter};
