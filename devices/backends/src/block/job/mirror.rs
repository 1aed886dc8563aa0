//! Mirror: the target gets all that the disk holds, and follows its changes until the job is told
//! to complete. A commit of the frontmost image is a mirror to an image behind it.

use super::Halt;
use super::claims::Claims;
use super::control::{Control, Idle};
use super::copy::{CHUNK, GRAIN, copy, look, writer};
use super::dirty::Dirty;
use crate::block::Image;
use crate::block::drive::Witness;
use crate::block::error::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is copied before changes are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// What lies at most so many images behind the frontmost one.
    Depth(u32),
    /// Nothing: the target follows changes only.
    None,
}

/// A mirror.
pub struct Mirror {
    source: Arc<dyn Image>,
    target: Arc<dyn Image>,
    extent: Extent,
    dirty: Dirty,
    claims: Claims,
    control: Arc<Control>,
    /// A change is on the target before the guest is told that it is done.
    blocking: AtomicBool,
}

/// How a mirror ended that was not cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target shall take the source's place.
    Replace,
    /// The target is a copy, and that is all.
    Leave,
}

impl Mirror {
    /// From `source` to `target`, which must not be smaller. The caller lets it witness the drive's
    /// changes before it runs. `grain` is a power of two.
    pub fn new(
        source: Arc<dyn Image>,
        target: Arc<dyn Image>,
        extent: Extent,
        grain: u64,
        control: Arc<Control>,
    ) -> Mirror {
        Mirror {
            dirty: Dirty::new(source.size(), grain),
            source,
            target,
            extent,
            claims: Claims::default(),
            control,
            blocking: AtomicBool::new(false),
        }
    }

    /// The grain that is best for a target.
    pub fn grain(target: &dyn Image) -> u64 {
        target.describe().cluster_size.unwrap_or(GRAIN).max(GRAIN)
    }

    /// Whether changes are on the target before the guest is told that they are done.
    pub fn block_writes(&self, on: bool) {
        self.blocking.store(on, Ordering::Release);
    }

    /// Whether they are.
    pub fn blocks_writes(&self) -> bool {
        self.blocking.load(Ordering::Acquire)
    }

    /// Copies a range that is marked.
    fn follow(
        &self,
        control: Option<&Control>,
        at: u64,
        len: u64,
    ) -> std::result::Result<u64, Halt> {
        let _claim = self.claims.alone(at, len);
        // Before the data is read: what changes from now on is marked anew.
        self.dirty.clear(at, len);
        let (mut from, mut moved) = (at, 0);
        while from < at + len {
            let s = look(&self.source, from, at + len - from, u32::MAX);
            let part = (from, s.len);
            match copy(control, &*self.source, &*self.target, part, s.zero) {
                Ok(n) => moved += n,
                Err(e) => {
                    self.dirty.mark(at, len);
                    return Err(e);
                }
            }
            from += s.len;
        }
        Ok(moved)
    }

    /// Marks what is to be copied first.
    fn survey(&self) -> std::result::Result<(), Halt> {
        let Extent::Depth(depth) = self.extent else { return Ok(()) };
        let (size, mut at) = (self.source.size(), 0);
        while at < size {
            self.control.checkpoint()?;
            let s = look(&self.source, at, size - at, depth);
            // Also zeros that nobody speaks of: the target may hold anything.
            if s.present || depth == u32::MAX {
                self.dirty.mark(at, s.len);
            }
            at += s.len;
        }
        Ok(())
    }

    /// Copies, follows, and returns when told to end; for a thread of its own.
    pub fn run(&self) -> std::result::Result<End, Halt> {
        let c = &*self.control;
        self.survey()?;
        c.expect(self.dirty.bytes());
        let mut at = 0;
        loop {
            c.checkpoint()?;
            let most = c.piece(CHUNK.max(self.dirty.grain()), self.dirty.grain());
            if let Some((start, len)) = self.dirty.next(at, most) {
                if let Some(moved) = c.again(self.follow(Some(c), start, len))? {
                    c.advance(len, moved);
                    c.remaining(self.dirty.bytes());
                    at = start + len;
                }
                continue;
            }
            writer(&*self.target)?.flush()?;
            c.get_ready();
            match c.idle()? {
                Idle::Work => {}
                Idle::Complete => return Ok(End::Replace),
                Idle::Leave => return Ok(End::Leave),
            }
        }
    }

    /// Copies what has changed since [`Mirror::run`] returned. The drive is still.
    pub fn settle(&self) -> Result<()> {
        while let Some((at, len)) = self.dirty.next(0, CHUNK) {
            match self.follow(None, at, len) {
                Ok(_) => {}
                Err(Halt::Failed(e)) => return Err(e),
                Err(Halt::Cancelled | Halt::Again) => break,
            }
        }
        writer(&*self.target)?.flush()
    }
}

impl Witness for Mirror {
    fn before(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
    fn after(&self, offset: u64, len: u64) {
        self.dirty.mark(offset, len);
        if self.blocking.load(Ordering::Acquire) && len > 0 {
            let grain = self.dirty.grain();
            let start = offset / grain * grain;
            let end = (offset + len).next_multiple_of(grain).min(self.source.size());
            // A failure leaves it marked, and the job meets it.
            let _ = self.follow(None, start, end.saturating_sub(start));
        }
        self.control.poke();
    }
}
