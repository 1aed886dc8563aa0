//! Pictures as files: PPM (netpbm's P6) and PNG (ISO/IEC 15948).

use crate::crc32::crc32;
use zlib_rs::{Deflate, DeflateFlush, Status};

/// The trade of time for room: fast, as pictures are taken while a guest waits.
const LEVEL: i32 = 1;
/// A window of 32 KiB, the largest that PNG allows.
const WINDOW_BITS: u8 = 15;

/// A PPM file. `rgb` has three bytes for each of `width * height` pixels.
pub fn ppm(width: u32, height: u32, rgb: &[u8]) -> Vec<u8> {
    let mut file = format!("P6\n{width} {height}\n255\n").into_bytes();
    file.extend_from_slice(rgb);
    file
}

/// A PNG file. `rgb` has three bytes for each of `width * height` pixels; `None` if it has not.
pub fn png(width: u32, height: u32, rgb: &[u8]) -> Option<Vec<u8>> {
    let line = (width as usize).checked_mul(3).filter(|l| *l > 0)?;
    if rgb.len() != line.checked_mul(height as usize)? {
        return None;
    }
    // Each line says first how it is filtered: not at all.
    let lines: Vec<u8> = rgb.chunks(line).flat_map(|l| [&[0], l].concat()).collect();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
    // Eight bits, red, green and blue; deflate; filters; not interlaced.
    header.extend([8, 2, 0, 0, 0]);
    chunk(&mut file, b"IHDR", &header);
    chunk(&mut file, b"IDAT", &deflate(&lines)?);
    chunk(&mut file, b"IEND", &[]);
    Some(file)
}

fn deflate(data: &[u8]) -> Option<Vec<u8>> {
    // What deflate can add to what it cannot make shorter, generously.
    let mut out = vec![0; data.len() + data.len() / 1000 + 1024];
    let mut d = Deflate::new(LEVEL, true, WINDOW_BITS);
    match d.compress(data, &mut out, DeflateFlush::Finish) {
        Ok(Status::StreamEnd) => out.truncate(d.total_out() as usize),
        _ => return None,
    }
    Some(out)
}

fn chunk(file: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
    file.extend((data.len() as u32).to_be_bytes());
    let start = file.len();
    file.extend(name);
    file.extend(data);
    let sum = crc32(&file[start..]);
    file.extend(sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use zlib_rs::{Inflate, InflateFlush};

    #[test]
    fn png_holds_the_pixels() {
        let rgb: Vec<u8> = (0..40 * 30 * 3).map(|i| (i * 7) as u8).collect();
        let file = png(40, 30, &rgb).unwrap();
        assert_eq!(file[..8], *b"\x89PNG\r\n\x1a\n");
        // The check sum of an empty IEND is well known.
        assert!(file.ends_with(b"IEND\xae\x42\x60\x82"));
        let at = file.windows(4).position(|w| w == b"IDAT").unwrap();
        let len = u32::from_be_bytes(file[at - 4..at].try_into().unwrap()) as usize;
        let mut out = vec![0; 30 * 121];
        let mut i = Inflate::new(true, 15);
        i.decompress(&file[at + 4..at + 4 + len], &mut out, InflateFlush::Finish).unwrap();
        let back: Vec<u8> = out.chunks(121).flat_map(|l| l[1..].to_vec()).collect();
        assert_eq!(back, rgb);
        assert_eq!(png(41, 30, &rgb), None);
        assert!(ppm(40, 30, &rgb).starts_with(b"P6\n40 30\n255\n"));
    }
}
