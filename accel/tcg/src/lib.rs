//! `tandem-tcg`: processors in software, by dynamic binary translation.
//!
//! ```text
//!  guest bytes ─► decode ─► translate ─► IR ─► passes ─► host code ─► block cache ─► chained execution
//!              (iced-x86)  (x86::translate)  (tandem_jit::{opt, x86_64 | interp})  (tb)      (exec)
//! ```
//! What is true between the stages:
//!
//! * **decoded**: bytes come from physical pages that are watched for writes from before they are
//!   read; a translation made across a write is thrown away.
//! * **IR**: one straight line of SSA, within at most two code pages; all of the CPU mode word is
//!   constant in it; within a guest instruction, everything that can fault comes before the first
//!   write of a register.
//! * **host code**: guest registers are pinned to host registers across blocks; at every host pc
//!   that can fault, the architectural state is recoverable.
//! * **in the cache**: a block is valid exactly while its code bytes are unchanged; entries from
//!   elsewhere check that the code pages are mapped as they were.
//!
//! `Env` ([`env`]) holds one vCPU's state; system behaviour is in [`x86`]; guest memory behind the
//! inline TLB hit is in [`softmmu`]; [`user`] runs a program without a machine.

pub mod accel;
pub mod counters;
pub mod env;
pub mod exec;
pub mod log;
pub mod perfmap;
pub mod runtime;
pub mod softmmu;
pub mod tb;
pub mod user;
pub mod x86;

pub use accel::{BackendKind, TcgAccel, TcgOptions};
pub use exec::Icount;
