//! The time-stamp counter as a function of guest time.

use tandem_accel::clock::NANOS_PER_SEC;

/// Converts between guest time and TSC values: TSC = ns × `hz` / 10⁹ + `offset` (wrapping).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TscClock {
    /// Frequency in Hz, not 0.
    hz: u64,
    /// Value at guest time 0.
    pub offset: u64,
}

impl TscClock {
    /// A counter at `hz` (0 is taken as 1) that starts at 0.
    pub fn new(hz: u64) -> TscClock {
        TscClock { hz: hz.max(1), offset: 0 }
    }

    /// The same counter with this value at guest time 0.
    pub fn with_offset(self, offset: u64) -> TscClock {
        TscClock { offset, ..self }
    }

    /// The counter at guest time `ns`.
    pub fn at(&self, ns: u64) -> u64 {
        let ticks = u128::from(ns) * u128::from(self.hz) / u128::from(NANOS_PER_SEC);
        (ticks as u64).wrapping_add(self.offset)
    }

    /// The first guest time at which the counter is at least `tsc`; 0 if that was before time 0.
    pub fn time_of(&self, tsc: u64) -> u64 {
        // The offset is a signed number of ticks, so that 2^64 - 1 ("never") stays in the future.
        let ticks = i128::from(tsc) - i128::from(self.offset as i64);
        let Ok(ticks) = u128::try_from(ticks) else { return 0 };
        let ns = (ticks * u128::from(NANOS_PER_SEC)).div_ceil(u128::from(self.hz));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let mut c = TscClock::new(2_500_000_000);
        assert_eq!(c.at(1_000_000), 2_500_000);
        for tsc in [0, 1, 7, 2_500_000_001, 1 << 60] {
            let t = c.time_of(tsc);
            assert!(c.at(t) >= tsc && (t == 0 || c.at(t - 1) < tsc));
        }
        c.offset = 0u64.wrapping_sub(1_000_000);
        assert_eq!(c.at(400_000), 0);
        assert_eq!(c.time_of(0), 400_000);
        c.offset = 1_000_000;
        assert_eq!(c.time_of(5), 0);
        assert_eq!(c.time_of(u64::MAX), TscClock::new(2_500_000_000).time_of(u64::MAX - 1_000_000));
    }
}
