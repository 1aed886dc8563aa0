//! The check sum of Ethernet frames and PNG chunks (ISO 3309, IEEE 802.3 §3.2.9).

/// The check sum of `data`; on a wire its bytes go least significant first.
pub fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |c, b| TABLE[((c ^ u32::from(*b)) & 0xff) as usize] ^ c >> 8)
}

static TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut c, mut bit) = (n as u32, 0);
        while bit < 8 {
            c = if c & 1 != 0 { 0xedb8_8320 ^ c >> 1 } else { c >> 1 };
            bit += 1;
        }
        table[n] = c;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    #[test]
    fn the_usual_example() {
        assert_eq!(super::crc32(b"123456789"), 0xcbf4_3926);
    }
}
