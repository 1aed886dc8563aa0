//! The ACPI power management timer: a free-running counter at 3.579545 MHz (ACPI 6.4 §4.8.3.3).
//! Its overflow status lives in the PM1 event block ([`crate::legacy::acpi_pm`]).

use super::{nanos, ticks};

/// Frequency in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// The width of the counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub enum PmTimerWidth {
    /// 24 bits; FADT flag TMR_VAL_EXT is clear.
    #[default]
    Bits24,
    /// 32 bits; FADT flag TMR_VAL_EXT is set.
    Bits32,
}

impl PmTimerWidth {
    fn bits(self) -> u32 {
        match self {
            PmTimerWidth::Bits24 => 24,
            PmTimerWidth::Bits32 => 32,
        }
    }

    /// The counter at guest time `ns`.
    pub fn value(self, ns: u64) -> u32 {
        (ticks(ns, PM_TIMER_HZ) & ((1 << self.bits()) - 1)) as u32
    }

    /// How often the most significant bit has changed at guest time `ns`: each change sets TMR_STS.
    pub fn changes(self, ns: u64) -> u64 {
        ticks(ns, PM_TIMER_HZ) >> (self.bits() - 1)
    }

    /// The guest time (ns) of change number `n`.
    pub fn time_of_change(self, n: u64) -> u64 {
        nanos(n.saturating_mul(1 << (self.bits() - 1)), PM_TIMER_HZ)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_wraps() {
        let w = PmTimerWidth::Bits24;
        assert_eq!(w.value(1_000_000_000), 3_579_545);
        let wrap = w.time_of_change(2);
        assert_eq!((w.value(wrap - 1), w.value(wrap)), (0xff_ffff, 0));
        assert_eq!((w.changes(wrap - 1), w.changes(wrap)), (1, 2));
        assert_eq!(PmTimerWidth::Bits32.value(wrap), 1 << 24);
    }
}
