//! What a device says of itself: the 256 words of IDENTIFY (ACS-2 §7.12, §7.13).

/// The words.
pub struct Words([u16; 256]);

impl Words {
    /// All zero.
    pub fn new() -> Words {
        Words([0; 256])
    }

    /// Sets word `at` (0–254).
    pub fn set(&mut self, at: usize, value: u16) -> &mut Words {
        self.0[at] = value;
        self
    }

    /// Sets words from `at` on, the low one first.
    pub fn wide(&mut self, at: usize, value: u64, words: usize) -> &mut Words {
        for i in 0..words.min(4) {
            self.0[at + i] = (value >> (16 * i)) as u16;
        }
        self
    }

    /// Text in `words` words from `at` on, padded with blanks; the first byte is the upper one.
    pub fn text(&mut self, at: usize, words: usize, text: &str) -> &mut Words {
        let mut bytes = text.bytes().map(|b| if (0x20..0x7f).contains(&b) { b } else { b'?' });
        for w in &mut self.0[at..at + words] {
            let (high, low) = (bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' '));
            *w = u16::from_be_bytes([high, low]);
        }
        self
    }

    /// The sector, with the checksum that makes its bytes add up to 0 (ACS-2 §7.12.7.85).
    pub fn sector(&self) -> Vec<u8> {
        let mut b: Vec<u8> = self.0.iter().flat_map(|w| w.to_le_bytes()).collect();
        b[510] = 0xa5;
        let sum = b[..511].iter().fold(0u8, |a, x| a.wrapping_add(*x));
        b[511] = sum.wrapping_neg();
        b
    }
}
