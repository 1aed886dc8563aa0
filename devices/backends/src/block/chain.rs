//! What the parts of a disk are, with everything behind its image.

use super::{ExtentKind, Image, Result};
use std::path::PathBuf;
use std::sync::Arc;

/// A run of bytes of the same kind, from the same layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes.
    pub len: u64,
    /// Images in front of the one that says what it is.
    pub depth: u32,
    /// Some image says something about it.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// There is data.
    pub data: bool,
    /// The data is compressed.
    pub compressed: bool,
    /// Where it lies as it is, in which file.
    pub host: Option<(u64, PathBuf)>,
}

/// The run at `offset` (before the end of the disk), at most `max` bytes; with `depth` images
/// behind the front one at most. Beyond those it counts as nothing.
pub fn status(image: &Arc<dyn Image>, offset: u64, max: u64, depth: u32) -> Result<Status> {
    let mut layer = image.clone();
    let mut len = max.min(image.size() - offset);
    let mut level = 0;
    loop {
        let e = layer.extents().extent(offset)?;
        len = len.min(e.len);
        let nothing = Status {
            len,
            depth: level,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            host: None,
        };
        match e.kind {
            ExtentKind::Unallocated => {}
            kind => {
                let data = kind == ExtentKind::Data;
                let mut zero = !data;
                if let (true, Some(host)) = (data, e.host) {
                    // What was reserved but never written is a hole in the file.
                    let there = layer.file().extent(host)?;
                    let (bytes, run) = there.unwrap_or((false, len));
                    zero = !bytes;
                    len = if run < 512 { len } else { len.min(run & !511) };
                }
                return Ok(Status {
                    len,
                    present: true,
                    zero,
                    data,
                    compressed: e.compressed,
                    host: e.host.map(|h| (h, layer.path().to_path_buf())),
                    ..nothing
                });
            }
        }
        let behind = layer.layered().and_then(|l| l.backing());
        let Some(behind) = behind else { return Ok(nothing) };
        if level == depth {
            return Ok(Status { zero: false, ..nothing });
        }
        // Zeros follow where the image behind ends.
        match behind.size().checked_sub(offset) {
            None | Some(0) => return Ok(nothing),
            Some(left) => len = len.min(left),
        }
        layer = behind;
        level += 1;
    }
}
