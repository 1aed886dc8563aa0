//! Clocks and timers of a PC. All derive their time from [`tandem_accel::clock::Clock`].

mod tsc;

pub use tsc::TscClock;
