//! Backup: the target gets the disk as it was when the job began. A guest that changes a part
//! which is not copied yet copies it first.

use super::Halt;
use super::claims::Claims;
use super::control::Control;
use super::copy::{CHUNK, GRAIN, copy, look, writer};
use super::dirty::Dirty;
use crate::block::Image;
use crate::block::drive::Witness;
use crate::block::error::{Error, Result};
use std::sync::Arc;

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The whole disk.
    Full,
    /// What the frontmost image holds itself.
    Top,
    /// Only what is about to change.
    None,
}

/// A backup.
pub struct Backup {
    source: Arc<dyn Image>,
    target: Arc<dyn Image>,
    extent: Extent,
    /// What is still to be copied.
    todo: Dirty,
    claims: Claims,
    control: Arc<Control>,
}

impl Backup {
    /// Of `source` to `target`, which must not be smaller. The caller lets it witness the drive's
    /// changes from the moment on whose state is wanted.
    pub fn new(
        source: Arc<dyn Image>,
        target: Arc<dyn Image>,
        extent: Extent,
        control: Arc<Control>,
    ) -> Arc<Backup> {
        // Whole clusters of the target, so that none is filled up from behind it.
        let grain = target.describe().cluster_size.unwrap_or(GRAIN).max(GRAIN);
        let todo = Dirty::new(source.size(), grain);
        control.expect(source.size());
        Arc::new(Backup { source, target, extent, todo, claims: Claims::default(), control })
    }

    /// Marks what is to be copied. Before the drive's changes are witnessed.
    pub fn prepare(&self) {
        let size = self.source.size();
        match self.extent {
            // For the guest's changes everything counts.
            Extent::Full | Extent::None => self.todo.mark(0, size),
            Extent::Top => {
                let mut at = 0;
                while at < size {
                    let s = look(&self.source, at, size - at, 0);
                    if s.present {
                        self.todo.mark(at, s.len);
                    }
                    at += s.len;
                }
                self.control.expect(self.todo.bytes());
            }
        }
    }

    /// Copies what is left of a range that does not cross the edge of a grain.
    fn save(&self, control: Option<&Control>, at: u64, len: u64) -> std::result::Result<u64, Halt> {
        let _claim = self.claims.alone(at, len);
        let (mut from, end, mut moved) = (at, at + len, 0);
        while from < end {
            let here = (self.todo.grain() - from % self.todo.grain()).min(end - from);
            if self.todo.has(from) {
                let mut at = from;
                while at < from + here {
                    let s = look(&self.source, at, from + here - at, u32::MAX);
                    moved += copy(control, &*self.source, &*self.target, (at, s.len), s.zero)?;
                    at += s.len;
                }
                self.todo.clear(from, here);
                self.control.advance(here, 0);
            }
            from += here;
        }
        Ok(moved)
    }

    /// Copies all; for a thread of its own.
    pub fn run(&self) -> std::result::Result<(), Halt> {
        if self.extent == Extent::None {
            loop {
                self.control.idle()?;
            }
        }
        let mut at = 0;
        loop {
            self.control.checkpoint()?;
            let most = self.control.piece(CHUNK.max(self.todo.grain()), self.todo.grain());
            let Some((start, len)) = self.todo.next(at, most) else { break };
            let saved = self.save(Some(&self.control), start, len);
            if let Some(moved) = self.control.again(saved)? {
                self.control.advance(0, moved);
                at = start + len;
            }
        }
        writer(&*self.target)?.flush()?;
        Ok(())
    }
}

impl Witness for Backup {
    fn before(&self, offset: u64, len: u64) -> Result<()> {
        let grain = self.todo.grain();
        let end = (offset + len).min(self.source.size());
        let mut at = offset / grain * grain;
        while at < end {
            if self.todo.has(at) {
                let n = grain.min(self.source.size() - at);
                self.save(None, at, n).map_err(|h| match h {
                    Halt::Failed(e) => e,
                    _ => Error::Invalid("the backup was cancelled".into()),
                })?;
            }
            at += grain;
        }
        Ok(())
    }
    fn after(&self, _: u64, _: u64) {}
}
