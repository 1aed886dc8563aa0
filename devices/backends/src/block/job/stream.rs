//! Stream: what images behind the frontmost one hold goes into that, so that they are not needed
//! any more.

use super::Halt;
use super::claims::Claims;
use super::control::{Control, Side};
use super::copy::{CHUNK, GRAIN, look, writer};
use crate::block::Image;
use crate::block::drive::Witness;
use crate::block::error::Result;
use std::sync::Arc;

/// A stream.
pub struct Stream {
    top: Arc<dyn Image>,
    /// Images behind the top one whose data is taken over.
    depth: u32,
    claims: Claims,
    control: Arc<Control>,
}

impl Stream {
    /// Into `top` from what lies at most `depth` images behind it. The caller lets it witness the
    /// drive's changes before it runs.
    pub fn new(top: Arc<dyn Image>, depth: u32, control: Arc<Control>) -> Arc<Stream> {
        Arc::new(Stream { top, depth, claims: Claims::default(), control })
    }

    /// Copies; for a thread of its own.
    pub fn run(&self) -> std::result::Result<(), Halt> {
        let (c, size) = (&*self.control, self.top.size());
        c.expect(size);
        let mut at = 0;
        while at < size {
            c.checkpoint()?;
            let piece = self.piece(at, (size - at).min(c.piece(CHUNK, GRAIN)));
            if let Some((len, moved)) = c.again(piece)? {
                c.advance(len, moved);
                at += len;
            }
        }
        writer(&*self.top)?.flush()?;
        Ok(())
    }

    /// Takes over the part at `at`, if the top image has nothing there and one behind it has;
    /// returns how long it is, and how many bytes were moved.
    fn piece(&self, at: u64, most: u64) -> std::result::Result<(u64, u64), Halt> {
        // Nobody writes there between the look and the copy.
        let _claim = self.claims.alone(at, most);
        let s = look(&self.top, at, most, self.depth);
        if s.depth == 0 || !s.present {
            return Ok((s.len, 0));
        }
        let w = writer(&*self.top)?;
        if s.zero {
            self.control.attempt(Side::Target, || w.write_zeroes(at, s.len, false))?;
            return Ok((s.len, 0));
        }
        let mut buf = vec![0; s.len as usize];
        if self.control.attempt(Side::Source, || self.top.read_bytes(at, &mut buf))?.is_some() {
            self.control.attempt(Side::Target, || w.write_bytes(at, &buf))?;
        }
        Ok((s.len, s.len))
    }
}

impl Witness for Stream {
    fn before(&self, offset: u64, len: u64) -> Result<()> {
        self.claims.share(offset, len);
        Ok(())
    }
    fn after(&self, offset: u64, len: u64) {
        self.claims.unshare(offset, len);
    }
}
