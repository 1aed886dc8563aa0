//! `tandem-tcg`: processors in software.

pub mod env;
pub mod exec;
pub mod softmmu;
pub mod tb;
pub mod x86;
