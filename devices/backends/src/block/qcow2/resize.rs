//! Changing the size of the disk.

use super::super::error::{Error, Result};
use super::super::{BlockRead, BlockWrite, Preallocation, Resize, SECTOR};
use super::header::{Header, MAX_L1_BYTES, l1_entries};
use super::map::OFFSET;
use super::{Meta, Qcow2};
use std::sync::atomic::Ordering;

impl Resize for Qcow2 {
    fn resize(&self, size: u64, how: Preallocation) -> Result<()> {
        let old = self.size();
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::Invalid(format!("the size must be a multiple of {SECTOR}")));
        }
        if size != old && self.geo.version < 3 && !self.lock().snapshots.is_empty() {
            // Its snapshots do not say how large the disk was.
            let what = "a compat=0.10 image with snapshots cannot be resized; delete them first";
            return Err(Error::Unsupported(what.into()));
        }
        if size < old {
            self.shrink(size)?;
        } else if size > old {
            self.grow(size)?;
            // Nothing that lay behind the old end may show: neither the rest of its cluster nor a
            // longer backing image.
            let behind = self.backing.read().unwrap().as_ref().map_or(0, |b| b.size());
            let end = old.next_multiple_of(self.geo.cluster()).max(behind).min(size);
            self.write_zeroes(old, end - old, true)?;
            self.preallocate(old, size, how)?;
        }
        self.flush()
    }
}

impl Qcow2 {
    fn grow(&self, size: u64) -> Result<()> {
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        let meta = &mut *meta;
        self.must_write(meta)?;
        let entries = l1_entries(size, self.geo.cluster_bits);
        if size >> 62 != 0 || entries * 8 > MAX_L1_BYTES {
            let what = format!("a disk of {size} bytes is too large for this cluster size");
            return Err(Error::Invalid(what));
        }
        if entries > meta.l1.len() as u64 {
            let r = self.grow_l1(meta, entries);
            self.guard(meta, r)?;
        }
        let h = Header { size, ..meta.header.clone() };
        h.write(&self.file)?;
        self.file.sync()?;
        meta.header = h;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Moves the L1 table to where it has room for `entries`.
    pub(super) fn grow_l1(&self, meta: &mut Meta, entries: u64) -> Result<()> {
        self.about_to_change(meta)?;
        let bits = self.geo.cluster_bits;
        let n = self.geo.clusters_of(entries * 8);
        let Meta { refs, header, .. } = &mut *meta;
        let at = refs.allocate_together(&self.file, header, n)?;
        refs.tables.extend((0..n).map(|i| at + (i << bits)));
        meta.note_used(at >> bits, n);
        let mut l1 = meta.l1.clone();
        l1.resize(entries as usize, 0);
        // L2 tables and counts must be there before the new L1 table counts.
        self.write_back(meta)?;
        let mut bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize((n << bits) as usize, 0);
        self.file.write_bytes(at, &bytes)?;
        self.file.sync()?;
        let old = (meta.header.l1_offset >> bits, self.geo.clusters_of(meta.l1.len() as u64 * 8));
        let h = Header { l1_offset: at, l1_size: entries as u32, ..meta.header.clone() };
        h.write(&self.file)?;
        self.file.sync()?;
        meta.header = h;
        meta.l1 = l1;
        meta.l1_dirty = false;
        if old.1 > 0 {
            meta.dropped.push(old);
        }
        self.write_back(meta)?;
        self.release(meta)
    }

    fn shrink(&self, size: u64) -> Result<()> {
        let cluster = self.geo.cluster();
        // What is cut off of the last cluster must not show again when the disk grows.
        let end = size.next_multiple_of(cluster).min(self.size());
        if size < end {
            self.write_zeroes(size, end - size, false)?;
        }
        self.drop_from(size.div_ceil(cluster))?;
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        let meta = &mut *meta;
        let keep = l1_entries(size, self.geo.cluster_bits) as usize;
        for i in keep..meta.l1.len() {
            let e = std::mem::take(&mut meta.l1[i]);
            if e & OFFSET != 0 {
                // Nothing is left in it, whether or not a snapshot has it, too.
                meta.dropped.push(((e & OFFSET) >> self.geo.cluster_bits, 1));
                meta.l1_dirty = true;
            }
        }
        self.write_back(meta)?;
        self.release(meta)?;
        let h = Header { size, ..meta.header.clone() };
        h.write(&self.file)?;
        self.file.sync()?;
        meta.header = h;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Prepares the part of the disk that is new.
    fn preallocate(&self, old: u64, size: u64, how: Preallocation) -> Result<()> {
        if how == Preallocation::Off {
            return Ok(());
        }
        let start = old.next_multiple_of(self.geo.cluster());
        let mut at = start.min(size);
        // Writing reserves clusters; marking them zero keeps them.
        while at < size {
            let n = (size - at).min(1 << 20);
            self.write_bytes(at, &vec![0; n as usize])?;
            at += n;
        }
        if how == Preallocation::Full {
            return Ok(());
        }
        if start < size && self.geo.version >= 3 && how == Preallocation::Metadata {
            self.write_zeroes(start, size - start, false)?;
            self.punch(start, size)?;
        }
        Ok(())
    }

    /// Gives the room of reserved clusters back to the host; they read as zeros by their entries.
    fn punch(&self, mut at: u64, end: u64) -> Result<()> {
        use super::super::Extents;
        while at < end {
            let e = self.extent(at)?;
            if let (Some(host), true) = (e.host, e.len > 0) {
                self.file.write_zeroes(host, e.len.next_multiple_of(self.geo.cluster()), true)?;
            }
            at += e.len.max(1);
        }
        Ok(())
    }
}
