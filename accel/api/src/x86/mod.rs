//! The x86 processor as plain data: architectural state ([`X86State`], the snapshot schema), CPUID
//! tables and CPU models.

pub mod cpuid;
mod state;

pub use state::*;
