//! Rings of descriptors: where they are, as registers say.

use super::state::State;

/// A ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Guest physical address of the first descriptor.
    pub base: u64,
    /// Number of descriptors of 16 bytes; may be 0.
    pub count: u32,
}

impl Ring {
    /// The ring of these registers: base, high base, length.
    pub fn of(s: &State, [low, high, len]: [u64; 3]) -> Ring {
        let base = u64::from(s.get(low) & !0xf) | u64::from(s.get(high)) << 32;
        // Lengths are multiples of 128 bytes, with 20 bits.
        Ring { base, count: (s.get(len) & 0xf_ff80) / 16 }
    }
}
