//! The small chips of a PC's low I/O ports.

pub mod acpi_pm;
pub mod debug;
pub mod i8042;
pub mod reset;
pub mod serial;
pub mod testdev;
pub mod uarts;

#[cfg(test)]
mod hostile_tests;
