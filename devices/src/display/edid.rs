//! What the monitor says of itself (VESA E-EDID 1.4).

/// Length of a block.
pub const LEN: usize = 128;

/// A detailed timing for `width` by `height` at about 75 Hz (§3.10.2), with blanking of modest size.
fn timing(width: u32, height: u32) -> [u8; 18] {
    let (h_blank, v_blank) = ((width / 5) & !7, (height / 28).max(8));
    let (h_front, h_sync) = ((width / 25) & !7, (width * 3 / 100) & !7);
    let (v_front, v_sync) = (5.min(v_blank / 3), 5.min(v_blank / 3));
    let clock = (width + h_blank) * (height + v_blank) / 10_000 * 75;
    let clock = clock.min(0xffff) as u16;
    let (w_mm, h_mm) = (width * 254 / 1000, height * 254 / 1000);
    let mut t = [0; 18];
    t[..2].copy_from_slice(&clock.to_le_bytes());
    (t[2], t[3], t[4]) = (width as u8, h_blank as u8, ((width >> 8) << 4 | h_blank >> 8) as u8);
    (t[5], t[6], t[7]) = (height as u8, v_blank as u8, ((height >> 8) << 4 | v_blank >> 8) as u8);
    (t[8], t[9], t[10]) = (h_front as u8, h_sync as u8, (v_front << 4 | v_sync) as u8);
    t[11] = ((h_front >> 8) << 6 | (h_sync >> 8) << 4) as u8;
    (t[12], t[13], t[14]) = (w_mm as u8, h_mm as u8, ((w_mm >> 8) << 4 | h_mm >> 8) as u8);
    t[17] = 0x18;
    t
}

/// A descriptor of text (§3.10.3).
fn text(tag: u8, words: &str) -> [u8; 18] {
    let mut d = [b' '; 18];
    d[..5].copy_from_slice(&[0, 0, 0, tag, 0]);
    let room = &mut d[5..];
    for (to, from) in room.iter_mut().zip(words.bytes().chain([b'\n'])) {
        *to = from;
    }
    d
}

/// The block of a monitor that prefers `width` by `height`, each less than 4096.
pub fn block(width: u32, height: u32) -> [u8; LEN] {
    let (width, height) = (width.min(4095), height.min(4095));
    let mut e = [0; LEN];
    e[..8].copy_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // Manufacturer "TDM", three letters of five bits; product 1; made in 2024; version 1.4.
    let name = [b'T', b'D', b'M'].iter().fold(0u16, |n, c| n << 5 | u16::from(c - b'@'));
    e[8..10].copy_from_slice(&name.to_be_bytes());
    (e[10], e[16], e[17], e[18], e[19]) = (1, 1, 34, 1, 4);
    // Digital, 8 bits a colour; centimetres; gamma 2.2; sRGB, and the first timing is preferred.
    (e[20], e[21], e[22]) = (0xa5, (width * 254 / 10_000) as u8, (height * 254 / 10_000) as u8);
    (e[23], e[24]) = (120, 6);
    e[25..35].copy_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    // 640x480, 800x600, 1024x768 at 60 Hz.
    (e[35], e[36]) = (0x21, 0x08);
    e[38..54].fill(1);
    e[54..72].copy_from_slice(&timing(width, height));
    // 50 to 125 Hz, 30 to 160 kHz, at most 2550 MHz.
    let mut limits = text(0xfd, "");
    limits[5..11].copy_from_slice(&[50, 125, 30, 160, 255, 1]);
    limits[11] = b'\n';
    e[72..90].copy_from_slice(&limits);
    e[90..108].copy_from_slice(&text(0xfc, "tandem"));
    e[108..126].copy_from_slice(&text(0xff, "1"));
    let sum = e.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    e[127] = sum.wrapping_neg();
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_zero_and_the_size_is_there() {
        for (w, h) in [(640, 480), (1280, 800), (4095, 4095), (9000, 9)] {
            let e = block(w, h);
            assert_eq!(e.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let width = u32::from(e[56]) | u32::from(e[58] >> 4) << 8;
            let height = u32::from(e[59]) | u32::from(e[61] >> 4) << 8;
            assert_eq!((width, height), (w.min(4095), h.min(4095)));
        }
    }
}
