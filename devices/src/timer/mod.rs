//! Clocks and timers of a PC. All derive their time from [`tandem_accel::clock::Clock`].
//!
//! What always holds: a callback of a timer looks at the chip's state again under the chip's lock,
//! because the arming that it was for may be void by then; a guest cannot make a timer fire more
//! often than every [`MIN_INTERVAL`].

pub mod hpet;
pub mod pit;
pub mod pm_timer;
pub mod rtc;
mod tsc;

pub use tsc::TscClock;

/// Shortest time (ns) between two expiries of a periodic timer, so that a guest cannot keep the
/// timer thread busy.
pub const MIN_INTERVAL: u64 = 20_000;

/// `ns` of guest time in ticks of `hz`.
pub(crate) fn ticks(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / u128::from(tandem_accel::clock::NANOS_PER_SEC)) as u64
}

/// The first nanosecond at which `ticks` of `hz` have passed; `hz` is not 0.
pub(crate) fn nanos(ticks: u64, hz: u64) -> u64 {
    let ns = (u128::from(ticks) * u128::from(tandem_accel::clock::NANOS_PER_SEC))
        .div_ceil(u128::from(hz));
    u64::try_from(ns).unwrap_or(u64::MAX)
}
