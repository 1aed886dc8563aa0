//! `tandem`: a virtual machine monitor with two accelerators behind one machine.
//!
//! ```text
//!   cli ──► config (plain data, validate) ──► machine (build order, governor, main loop)
//!                                               │   ├─ boot      kernel to memory and first state
//!                                               │   └─ accel     which accelerator, and why
//!   terminal: raw mode, restored on every way out      doctor: what works on this host
//! ```

mod boot;
mod cli;
mod config;
mod machine;

fn main() {}
