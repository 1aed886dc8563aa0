//! The small chips of a PC's low I/O ports.

pub mod serial;
