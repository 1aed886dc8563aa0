//! Pieces of one image to another.

use super::Halt;
use super::control::{Control, Side};
use crate::block::chain::{self, Status};
use crate::block::error::{Error, Result};
use crate::block::pieces::is_zero;
use crate::block::{BlockWrite, Image};
use std::sync::Arc;

/// Bytes moved at once, at most.
pub const CHUNK: u64 = 1 << 20;
/// Bytes moved at once, at least, where there are more.
pub const GRAIN: u64 = 64 << 10;

/// Images between `top` and `base` in its chain: 0 if `base` is right behind. All of them if `base`
/// is nothing, or not in the chain.
pub fn depth_above(top: &Arc<dyn Image>, base: Option<&Arc<dyn Image>>) -> u32 {
    let Some(base) = base else { return u32::MAX };
    let mut layer = top.clone();
    let mut depth = 0;
    loop {
        match layer.layered().and_then(|l| l.backing()) {
            Some(behind) if Arc::ptr_eq(&behind, base) => return depth,
            Some(behind) => layer = behind,
            None => return u32::MAX,
        }
        depth += 1;
    }
}

/// What a part of `image` is, looking at most `depth` images behind it. Nothing is guessed: what
/// cannot be found out is data.
pub fn look(image: &Arc<dyn Image>, at: u64, most: u64, depth: u32) -> Status {
    let unknown = Status {
        len: most,
        depth: 0,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        host: None,
    };
    match chain::status(image, at, most, depth) {
        // Where an image in between ends it shows zeros, whatever lies further behind.
        Ok(s) if s.len > 0 && !s.present && s.zero && depth != u32::MAX => {
            Status { present: true, depth: s.depth + 1, ..s }
        }
        Ok(s) if s.len > 0 => s,
        _ => unknown,
    }
}

/// The writing side of an image.
pub fn writer(image: &dyn Image) -> Result<&dyn BlockWrite> {
    image.writable().ok_or(Error::ReadOnly)
}

/// Copies a range; `zero` says that it is known to be zeros. Returns how many bytes were moved.
/// Without a control, the first error ends it.
pub fn copy(
    control: Option<&Control>,
    source: &dyn Image,
    target: &dyn Image,
    (at, len): (u64, u64),
    zero: bool,
) -> std::result::Result<u64, Halt> {
    fn attempt<T>(
        control: Option<&Control>,
        side: Side,
        f: impl FnOnce() -> Result<T>,
    ) -> std::result::Result<Option<T>, Halt> {
        match control {
            Some(c) => c.attempt(side, f),
            None => Ok(Some(f()?)),
        }
    }
    // The target may be shorter than the source's last sector, never by more.
    let clear = || writer(target)?.write_zeroes(at, len, true);
    if zero {
        attempt(control, Side::Target, clear)?;
        return Ok(0);
    }
    let mut buf = vec![0; len as usize];
    if attempt(control, Side::Source, || source.read_bytes(at, &mut buf))?.is_none() {
        return Ok(0);
    }
    match is_zero(&buf) {
        true => attempt(control, Side::Target, clear)?,
        false => attempt(control, Side::Target, || writer(target)?.write_bytes(at, &buf))?,
    };
    Ok(len)
}
