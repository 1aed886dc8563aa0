//! Which parts of a disk are still to be copied: a bit for each grain.

use std::sync::Mutex;

/// A map of grains.
#[derive(Debug)]
pub struct Dirty {
    grain: u64,
    size: u64,
    bits: Mutex<Bits>,
}

#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    set: u64,
}

impl Dirty {
    /// Nothing marked, on a disk of `size` bytes; `grain` is a power of two.
    pub fn new(size: u64, grain: u64) -> Dirty {
        let words = vec![0; size.div_ceil(grain).div_ceil(64) as usize];
        Dirty { grain, size, bits: Mutex::new(Bits { words, set: 0 }) }
    }

    /// Bytes of a grain.
    pub fn grain(&self) -> u64 {
        self.grain
    }

    /// Grains that a range touches.
    fn touched(&self, at: u64, len: u64) -> std::ops::Range<u64> {
        let end = at.saturating_add(len).min(self.size);
        if at >= end { 0..0 } else { at / self.grain..end.div_ceil(self.grain) }
    }

    /// Marks all that a range touches.
    pub fn mark(&self, at: u64, len: u64) {
        let mut bits = self.bits.lock().unwrap();
        for g in self.touched(at, len) {
            bits.put(g, true);
        }
    }

    /// Takes the marks of all that a range touches away.
    pub fn clear(&self, at: u64, len: u64) {
        let mut bits = self.bits.lock().unwrap();
        for g in self.touched(at, len) {
            bits.put(g, false);
        }
    }

    /// Whether the grain of a byte is marked.
    pub fn has(&self, at: u64) -> bool {
        self.bits.lock().unwrap().get(at / self.grain)
    }

    /// Bytes in marked grains.
    pub fn bytes(&self) -> u64 {
        (self.bits.lock().unwrap().set * self.grain).min(self.size)
    }

    /// The first marked run (start, length) from `at` on, or else from the start, of at most `most`
    /// bytes.
    pub fn next(&self, at: u64, most: u64) -> Option<(u64, u64)> {
        let bits = self.bits.lock().unwrap();
        let grains = self.size.div_ceil(self.grain);
        let from = (at / self.grain).min(grains);
        let first = bits.find(from, grains).or_else(|| bits.find(0, from))?;
        let limit = grains.min(first + (most / self.grain).max(1));
        let end = (first + 1..limit).find(|g| !bits.get(*g)).unwrap_or(limit);
        let start = first * self.grain;
        Some((start, (end * self.grain).min(self.size) - start))
    }
}

impl Bits {
    fn get(&self, g: u64) -> bool {
        self.words.get((g / 64) as usize).is_some_and(|w| w >> (g % 64) & 1 != 0)
    }

    fn put(&mut self, g: u64, on: bool) {
        if self.get(g) == on {
            return;
        }
        let Some(word) = self.words.get_mut((g / 64) as usize) else { return };
        *word ^= 1 << (g % 64);
        self.set = if on { self.set + 1 } else { self.set - 1 };
    }

    /// The first that is set in `from..to`.
    fn find(&self, from: u64, to: u64) -> Option<u64> {
        let mut g = from;
        while g < to {
            let rest = self.words.get((g / 64) as usize)? >> (g % 64);
            if rest != 0 {
                return Some(g + u64::from(rest.trailing_zeros())).filter(|g| *g < to);
            }
            g = (g / 64 + 1) * 64;
        }
        None
    }
}
