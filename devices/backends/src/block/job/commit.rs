//! Commit of images that nobody writes to: what those above the base hold goes into the base.

use super::Halt;
use super::control::Control;
use super::copy::{CHUNK, GRAIN, copy, look, writer};
use crate::block::Image;
use std::sync::Arc;

/// Copies what `top`, and images between it and `base`, hold to `base`; for a thread of its own.
/// Nobody sees the base's own data there, so that guests may go on.
pub fn run(
    top: &Arc<dyn Image>,
    base: &Arc<dyn Image>,
    control: &Control,
) -> std::result::Result<(), Halt> {
    let depth = super::depth_above(top, Some(base));
    let size = top.size();
    control.expect(size);
    let mut at = 0;
    while at < size {
        control.checkpoint()?;
        let s = look(top, at, (size - at).min(control.piece(CHUNK, GRAIN)), depth);
        let copied = match s.present {
            true => copy(Some(control), &**top, &**base, (at, s.len), s.zero),
            false => Ok(0),
        };
        if let Some(moved) = control.again(copied)? {
            control.advance(s.len, moved);
            at += s.len;
        }
    }
    writer(&**base)?.flush()?;
    Ok(())
}
