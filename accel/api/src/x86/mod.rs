//! The x86 processor as plain data: architectural state ([`X86State`], the snapshot schema), CPUID
//! tables, features and CPU models.

pub mod cpuid;
pub mod feature;
pub mod model;
mod state;

pub use state::*;
