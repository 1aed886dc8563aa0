//! The intermediate representation: values, instructions, blocks.
//!
//! # Model
//! A [`Block`] is a single straight line of SSA instructions. A [`Val`] is a 64-bit container. An
//! instruction of width `w` reads the low `w` bits of its inputs and defines:
//!
//! | width | bits above `w` in the result |
//! | --- | --- |
//! | W64 | none |
//! | W32 | zero |
//! | W8, W16 | unspecified: extend before looking |
//!
//! Guest registers are *globals* (see [`crate::target::GlobalDesc`]); [`Op::Get`] reads one,
//! [`Op::Put`] writes one. A `Put` of a pinned global takes effect at once; a `Put` of a memory
//! global is *deferred*: the value is stored to `Env` no later than the next point that can observe
//! it there (an exit, a helper that reads globals). A point that can fault records in its
//! *snapshot* where each deferred value is, so that a fault can put it there; this is why writing
//! condition-code state at every guest instruction costs nothing.
//!
//! # Flags
//! An arithmetic instruction may define a second value, `fl`, of class *flags*: the six arithmetic
//! flags of the x86 architecture (SDM vol. 1 §3.4.3.1) as that operation sets them. Only
//! [`Op::BrCc`], [`Op::SetCc`], [`Op::SelCc`], [`Op::FlagsImg`] and instructions with a flags input
//! may consume it. The image of a flags value is CF bit 0, PF bit 2, AF bit 4, ZF bit 6, SF bit 7,
//! OF bit 11; other bits are zero. A flags value nobody consumes costs nothing.
//!
//! # Faults
//! Instructions whose table entry says `FAULT` may transfer control to the runtime, which sees the
//! architectural state exactly as it was at the last [`Op::InsnStart`], plus every `Put` since
//! then. A front end therefore orders, within one guest instruction, all faulting operations
//! before the `Put`s (or only those `Put`s that the guest architecture allows).

mod block;
pub mod eval;
mod op;
pub mod parse;
pub mod print;
pub(crate) mod traits;
pub mod verify;

pub use block::*;
pub use op::*;
pub use parse::{ParseError, parse};
pub use verify::{Verifier, VerifyError};
