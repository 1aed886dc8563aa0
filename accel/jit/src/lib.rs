//! `tandem-jit`: a small, fast compiler for dynamic binary translation.
//!
//! A front end (another crate) turns guest code into an IR [`Block`](ir::Block); this crate turns
//! the block into host code, or runs it directly.
//!
//! ```text
//!   front end            this crate
//!  ┌──────────┐   ┌──────────────────────────────────────────────────────────┐
//!  │ Builder  │──►│ ir::Block ──► opt ──► liveness ──► x86_64 ──► CodeArena  │──► chained execution
//!  └──────────┘   │     │        (passes) (last uses,  (allocate   (W^X dual │
//!                 │     │                  hints)       and emit)   mapping) │
//!                 │     └──────────────► interp (portable fallback, oracle)  │
//!                 └──────────────────────────────────────────────────────────┘
//! ```
//!
//! What is true between the stages:
//!
//! * **Block**: one straight line of [`Inst`](ir::Inst)s in SSA form. Control leaves it only through
//!   side exits ([`Op::BrCc`](ir::Op)) and one terminator at the end; there are no labels and no
//!   joins. Every value is defined before it is used.
//! * **after `opt`**: constants folded, dead pure operations removed; fault points and their order
//!   are untouched.
//! * **after `liveness`**: the last use of each value is known, snapshots included.
//! * **host code**: pinned globals live in their host registers at every instruction that can
//!   fault, leave, or call; each such host pc has a snapshot that says where the rest is.
//!
//! This crate knows no guest instruction set, no page table and no device. What it needs of the
//! outside arrives as data in a [`Target`](target::Target).

#[cfg(target_arch = "x86_64")]
mod arena;
pub mod code;
pub mod interp;
pub mod ir;
#[cfg(target_arch = "x86_64")]
mod liveness;
pub mod native;
pub mod opt;
#[cfg(target_arch = "x86_64")]
mod snapshot;
pub mod target;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;
