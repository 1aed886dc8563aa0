//! Where the decisions of a case come from.

/// A stream of numbers, never empty for a caller: past the end of the bytes it is zeros.
pub struct Choices<'a> {
    source: Source<'a>,
}

enum Source<'a> {
    /// xorshift64*, and how many steps the case may take.
    Seed(u64, u32),
    Bytes(&'a [u8]),
}

impl<'a> Choices<'a> {
    /// A case of `steps` steps that repeats exactly for the same seed.
    pub fn seeded(seed: u64, steps: u32) -> Choices<'static> {
        Choices { source: Source::Seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, steps) }
    }

    /// The case that `bytes` are, over when they are used up.
    pub fn bytes(bytes: &'a [u8]) -> Choices<'a> {
        Choices { source: Source::Bytes(bytes) }
    }

    /// Whether the case takes another step.
    pub fn step(&mut self) -> bool {
        match &mut self.source {
            Source::Seed(_, left) => {
                let more = *left > 0;
                *left = left.saturating_sub(1);
                more
            }
            Source::Bytes(b) => !b.is_empty(),
        }
    }

    /// A number of `len` bytes, at most eight.
    fn take(&mut self, len: usize) -> u64 {
        match &mut self.source {
            Source::Seed(x, _) => {
                *x ^= *x >> 12;
                *x ^= *x << 25;
                *x ^= *x >> 27;
                let all = x.wrapping_mul(0x2545_f491_4f6c_dd1d);
                all >> (64 - 8 * len as u32)
            }
            Source::Bytes(b) => {
                let (head, rest) = b.split_at(len.min(b.len()));
                *b = rest;
                head.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
            }
        }
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.take(8)
    }

    /// A number below `n`; 0 for an `n` of 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // No more of the fuzzer's bytes than the range needs, so that a byte has one meaning.
        let len = (n.max(2) - 1).ilog2() as usize / 8 + 1;
        self.take((len + 1).min(8)) % n.max(1)
    }

    /// One of `of`, which is not empty.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
