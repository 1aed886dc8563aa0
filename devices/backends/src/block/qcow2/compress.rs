//! Compression of clusters: raw deflate with a window of 4 KiB, or Zstandard frames.

use super::super::error::{Error, Result};
use super::header::Compression;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush, Status};

/// log2 of deflate's window, as the format fixes it.
const WINDOW_BITS: u8 = 12;
/// zlib's default trade of time for room.
const LEVEL: i32 = 6;
/// Uncompressed bytes kept for the next reader.
const KEEP: usize = 1 << 20;

/// `data` compressed, if that makes it shorter.
pub fn compress(kind: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let packed = match kind {
        Compression::Zlib => {
            // Room for less than the input: a result that is not shorter is of no use.
            let mut out = vec![0; data.len().saturating_sub(1)];
            let mut d = Deflate::new(LEVEL, false, WINDOW_BITS);
            match d.compress(data, &mut out, DeflateFlush::Finish) {
                Ok(Status::StreamEnd) => {}
                _ => return None,
            }
            out.truncate(d.total_out() as usize);
            out
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
        }
    };
    (packed.len() < data.len()).then_some(packed)
}

/// The `len` bytes that `packed` holds, which may have something else at its end.
pub fn decompress(kind: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let bad = || Error::Corrupt("a compressed cluster cannot be decompressed".into());
    let mut out = vec![0; len];
    match kind {
        Compression::Zlib => {
            let mut i = Inflate::new(false, WINDOW_BITS);
            i.decompress(packed, &mut out, InflateFlush::Finish)
                .or_else(|e| {
                    // All output may be there although the input goes on.
                    if i.total_out() == len as u64 { Ok(Status::BufError) } else { Err(e) }
                })
                .map_err(|_| bad())?;
            if i.total_out() != len as u64 {
                return Err(bad());
            }
        }
        Compression::Zstd => {
            let mut d = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|_| bad())?;
            std::io::Read::read_exact(&mut d, &mut out).map_err(|_| bad())?;
        }
    }
    Ok(out)
}

/// Clusters decompressed not long ago, by the L2 entry that describes them.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>);

impl Recent {
    /// The cluster that `entry` describes, if it is here.
    pub fn get(&self, entry: u64) -> Option<Arc<Vec<u8>>> {
        self.0.lock().unwrap().iter().find(|(e, _)| *e == entry).map(|(_, d)| d.clone())
    }
    /// Keeps it.
    pub fn put(&self, entry: u64, data: &Arc<Vec<u8>>) {
        let mut q = self.0.lock().unwrap();
        q.push_back((entry, data.clone()));
        while q.len() > 1 && q.len() * data.len() > KEEP {
            q.pop_front();
        }
    }
    /// Forgets all, as clusters are freed or written.
    pub fn clear(&self) {
        self.0.lock().unwrap().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_give_back_what_they_got() {
        let text: Vec<u8> = (0..65536u32).map(|i| (i / 7 % 251) as u8 ^ (i / 4096) as u8).collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            let mut packed = compress(kind, &text).unwrap();
            assert!(packed.len() < text.len() / 2);
            // The rest of the sector is of no concern.
            packed.extend([0xa5; 300]);
            assert_eq!(decompress(kind, &packed, text.len()).unwrap(), text);
            packed.truncate(packed.len() / 2);
            assert!(decompress(kind, &packed, text.len()).is_err());
            assert!(decompress(kind, &[0xff; 64], 512).is_err());
            let mut noise = vec![0u8; 4096];
            crate::entropy::EntropySource::fill(&crate::entropy::HostEntropy, &mut noise).unwrap();
            assert!(compress(kind, &noise).is_none());
        }
    }
}
