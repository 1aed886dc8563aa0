//! One machine, assembled and governed.

pub mod memmap;
