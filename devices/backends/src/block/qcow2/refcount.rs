//! Reference counts and the allocation of clusters.
//!
//! Always: in memory, a cluster that is in use has a count above zero. On disk the counts may be
//! too high after a crash (a leak), never too low: increments are written before what refers to the
//! cluster, decrements are made only after what referred to it is gone from the disk
//! ([`super::Qcow2::release`]).

use super::super::error::{Error, Result};
use super::super::file::HostFile;
use super::cache::Cache;
use super::header::{Header, MAX_REFTABLE_BYTES};
use std::collections::HashSet;

/// Bytes of refcount blocks kept in memory.
const CACHE_BYTES: usize = 8 << 20;

/// The refcount structure of an image.
#[derive(Debug)]
pub struct Refcounts {
    /// Offsets of refcount blocks; 0 for one that is not there.
    pub table: Vec<u64>,
    pub(super) table_dirty: bool,
    pub(super) blocks: Cache,
    cluster_bits: u32,
    order: u32,
    /// No cluster before this one is free.
    hint: u64,
    /// Offsets of clusters that hold tables of any kind: never handed out, never written as data.
    pub(super) tables: HashSet<u64>,
}

/// Count `index` of a refcount block.
pub fn get_count(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let bits = 1 << order;
        let bit = index * bits;
        let mask = (1u16 << bits) - 1;
        let byte = block.get(bit / 8).copied().unwrap_or(0);
        return u64::from(u16::from(byte) >> (bit % 8) & mask);
    }
    let bytes = 1usize << (order - 3);
    let at = index * bytes;
    block.get(at..at + bytes).map_or(0, |b| b.iter().fold(0, |v, x| v << 8 | u64::from(*x)))
}

/// Sets count `index` of a refcount block; returns the bytes that changed.
pub fn set_count(block: &mut [u8], order: u32, index: usize, count: u64) -> std::ops::Range<usize> {
    if order < 3 {
        let bits = 1 << order;
        let bit = index * bits;
        let mask = (((1u16 << bits) - 1) << (bit % 8)) as u8;
        if let Some(b) = block.get_mut(bit / 8) {
            *b = *b & !mask | ((count << (bit % 8)) as u8 & mask);
        }
        return bit / 8..bit / 8 + 1;
    }
    let bytes = 1usize << (order - 3);
    let at = index * bytes;
    if let Some(b) = block.get_mut(at..at + bytes) {
        b.copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
    }
    at..at + bytes
}

impl Refcounts {
    /// Reads the table of the image in `file`.
    pub fn open(file: &HostFile, h: &Header) -> Result<Refcounts> {
        let bytes = (u64::from(h.reftable_clusters) << h.cluster_bits) as usize;
        let mut raw = vec![0; bytes];
        file.read_bytes(h.reftable_offset, &mut raw)?;
        let table: Vec<u64> = raw
            .chunks_exact(8)
            .map(|c| u64::from_be_bytes(c.try_into().expect("8 bytes")) & !0x1ff)
            .collect();
        let cluster = 1usize << h.cluster_bits;
        let mut r = Refcounts {
            table,
            table_dirty: false,
            blocks: Cache::new(cluster, CACHE_BYTES),
            cluster_bits: h.cluster_bits,
            order: h.refcount_order,
            hint: 0,
            tables: HashSet::new(),
        };
        r.note_tables(h);
        Ok(r)
    }

    /// Notes where header, refcount table and blocks are.
    fn note_tables(&mut self, h: &Header) {
        self.tables.insert(0);
        for i in 0..u64::from(h.reftable_clusters) {
            self.tables.insert(h.reftable_offset + (i << h.cluster_bits));
        }
        let blocks: Vec<u64> = self.table.iter().copied().filter(|o| *o != 0).collect();
        self.tables.extend(blocks);
    }

    /// Counts per block.
    pub fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// The greatest count.
    pub fn max(&self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << (1 << self.order)) - 1 }
    }

    fn block_offset(&self, block: u64) -> Result<Option<u64>> {
        let offset = usize::try_from(block).ok().and_then(|b| self.table.get(b)).copied();
        match offset.unwrap_or(0) {
            0 => Ok(None),
            o if o & ((1 << self.cluster_bits) - 1) != 0 => {
                Err(Error::Corrupt(format!("refcount block {block} is at {o:#x}, unaligned")))
            }
            o => Ok(Some(o)),
        }
    }

    /// Count of cluster `index` of the file.
    pub fn get(&mut self, file: &HostFile, index: u64) -> Result<u64> {
        let per = self.per_block();
        let Some(offset) = self.block_offset(index / per)? else { return Ok(0) };
        let block = self.blocks.get(file, offset)?;
        Ok(get_count(&block.bytes, self.order, (index % per) as usize))
    }

    /// Sets the count of cluster `index`, whose block exists.
    pub fn set(&mut self, file: &HostFile, index: u64, count: u64) -> Result<()> {
        let (per, order) = (self.per_block(), self.order);
        let Some(offset) = self.block_offset(index / per)? else {
            return Err(Error::Corrupt(format!("cluster {index} has no refcount block")));
        };
        let block = self.blocks.get(file, offset)?;
        let changed = set_count(&mut block.bytes, order, (index % per) as usize, count);
        block.touch(changed);
        if count == 0 {
            self.hint = self.hint.min(index);
        }
        Ok(())
    }

    /// Adds one to the count of cluster `index`; returns the new count.
    pub fn increment(&mut self, file: &HostFile, index: u64) -> Result<u64> {
        let count = self.get(file, index)?;
        if count == 0 {
            let what = format!("cluster {index} is in use but its refcount is 0");
            return Err(Error::Corrupt(what));
        }
        if count >= self.max() {
            let what = "a cluster is shared by more snapshots than its refcount can hold";
            return Err(Error::Unsupported(what.into()));
        }
        self.set(file, index, count + 1)?;
        Ok(count + 1)
    }

    /// Takes one from the count of cluster `index`; returns the new count. A cluster that becomes
    /// free is no table any more.
    pub fn decrement(&mut self, file: &HostFile, index: u64) -> Result<u64> {
        let count = self.get(file, index)?;
        if count == 0 {
            let what = format!("cluster {index} is freed but its refcount is 0 already");
            return Err(Error::Corrupt(what));
        }
        self.set(file, index, count - 1)?;
        if count == 1 {
            self.blocks.remove(index << self.cluster_bits);
            self.tables.remove(&(index << self.cluster_bits));
        }
        Ok(count - 1)
    }

    /// Makes sure that block `block` exists, so that the counts of its clusters can be set. A new
    /// one takes the first cluster that it counts.
    fn ensure_block(&mut self, file: &HostFile, h: &mut Header, block: u64) -> Result<()> {
        if self.block_offset(block)?.is_some() {
            return Ok(());
        }
        if block >= self.table.len() as u64 {
            return self.grow_table(file, h, block);
        }
        let index = block * self.per_block();
        let offset = index << self.cluster_bits;
        self.check_free(offset)?;
        let mut bytes = vec![0; 1 << self.cluster_bits].into_boxed_slice();
        set_count(&mut bytes, self.order, 0, 1);
        self.blocks.insert(offset, bytes);
        self.table[block as usize] = offset;
        self.table_dirty = true;
        self.tables.insert(offset);
        Ok(())
    }

    /// Fails if the cluster at `offset`, which counts as free, is a table.
    fn check_free(&self, offset: u64) -> Result<()> {
        if self.tables.contains(&offset) {
            let what = format!("the cluster at {offset:#x} holds a table but counts as free");
            return Err(Error::Corrupt(what));
        }
        Ok(())
    }

    /// Replaces the table by a longer one that has a place for block `block`, with that block. Both
    /// lie in the clusters that the block counts, and are on disk when this returns.
    fn grow_table(&mut self, file: &HostFile, h: &mut Header, block: u64) -> Result<()> {
        let (per, entries) = (self.per_block(), 1u64 << (self.cluster_bits - 3));
        let start = block * per;
        let (mut clusters, mut blocks) = (1, 1);
        loop {
            let needed = (block + blocks).max(self.table.len() as u64 * 3 / 2);
            let (c, b) = (needed.div_ceil(entries), (blocks + clusters).div_ceil(per));
            if (c, b) == (clusters, blocks) {
                break;
            }
            (clusters, blocks) = (c.max(clusters), b.max(blocks));
        }
        if clusters << self.cluster_bits > MAX_REFTABLE_BYTES {
            let what = "the image has grown to the most that its refcount table can describe";
            return Err(Error::Unsupported(what.into()));
        }
        // What the old table says must be there before it is copied.
        self.write_back(file)?;
        let at = |i: u64| (start + i) << self.cluster_bits;
        let mut table = self.table.clone();
        table.resize((clusters * entries) as usize, 0);
        for b in 0..blocks {
            let mut bytes = vec![0; 1 << self.cluster_bits];
            let used = (blocks + clusters).saturating_sub(b * per).min(per);
            for i in 0..used {
                set_count(&mut bytes, self.order, i as usize, 1);
            }
            file.write_bytes(at(b), &bytes)?;
            table[(block + b) as usize] = at(b);
            self.tables.insert(at(b));
        }
        let raw: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        file.write_bytes(at(blocks), &raw)?;
        file.sync()?;
        let (old, old_clusters) = (h.reftable_offset, u64::from(h.reftable_clusters));
        let new =
            Header { reftable_offset: at(blocks), reftable_clusters: clusters as u32, ..h.clone() };
        new.write(file)?;
        file.sync()?;
        *h = new;
        self.table = table;
        self.table_dirty = false;
        self.tables.extend((0..clusters).map(|i| at(blocks + i)));
        for i in 0..old_clusters {
            self.decrement(file, (old >> self.cluster_bits) + i)?;
        }
        Ok(())
    }

    /// Takes up to `want` free clusters that lie together; returns the offset of the first and how
    /// many they are, at least one.
    pub fn allocate(&mut self, file: &HostFile, h: &mut Header, want: u64) -> Result<(u64, u64)> {
        let (per, order) = (self.per_block(), self.order);
        loop {
            let block = self.hint / per;
            self.ensure_block(file, h, block)?;
            let Some(offset) = self.block_offset(block)? else { continue };
            let first = (self.hint % per) as usize;
            let bytes = &self.blocks.get(file, offset)?.bytes;
            let is_free = |i: &usize| get_count(bytes, order, *i) == 0;
            let Some(start) = (first..per as usize).find(is_free) else {
                self.hint = (block + 1) * per;
                continue;
            };
            let end = (start as u64 + want.max(1)).min(per) as usize;
            let stop = (start..end).find(|i| !is_free(i)).unwrap_or(end);
            let index = block * per + start as u64;
            let n = (stop - start) as u64;
            self.claim(file, index, n)?;
            self.hint = index + n;
            return Ok((index << self.cluster_bits, n));
        }
    }

    /// Takes `n` free clusters that lie together; returns the offset of the first.
    pub fn allocate_together(&mut self, file: &HostFile, h: &mut Header, n: u64) -> Result<u64> {
        let per = self.per_block();
        if n >= per {
            let what = "a table is too large for this cluster size; use larger clusters";
            return Err(Error::Unsupported(what.into()));
        }
        let (mut start, mut at) = (self.hint, self.hint);
        while at - start < n {
            self.ensure_block(file, h, at / per)?;
            if self.get(file, at)? != 0 {
                start = at + 1;
            }
            at += 1;
        }
        self.claim(file, start, n)?;
        Ok(start << self.cluster_bits)
    }

    /// Counts the free clusters from `index` on as used once.
    fn claim(&mut self, file: &HostFile, index: u64, n: u64) -> Result<()> {
        for i in index..index + n {
            self.check_free(i << self.cluster_bits)?;
        }
        for i in index..index + n {
            self.set(file, i, 1)?;
        }
        Ok(())
    }

    /// Makes sure that the count of cluster `index` can be set, for a repair.
    pub fn ensure(&mut self, file: &HostFile, h: &mut Header, index: u64) -> Result<()> {
        self.ensure_block(file, h, index / self.per_block())
    }

    /// Whether anything is to be written back.
    pub fn is_dirty(&self) -> bool {
        self.table_dirty || self.blocks.is_dirty()
    }

    /// Writes back blocks, then the table if it has changed.
    pub fn write_back_to(&mut self, file: &HostFile, h: &Header) -> Result<()> {
        self.blocks.write_back(file)?;
        if self.table_dirty {
            // A table must not point to a block that is not there yet.
            file.sync()?;
            let raw: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            file.write_bytes(h.reftable_offset, &raw)?;
            self.table_dirty = false;
        }
        Ok(())
    }

    /// Writes back blocks only: the table is about to be replaced.
    fn write_back(&mut self, file: &HostFile) -> Result<()> {
        self.blocks.write_back(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width() {
        for order in 0..=6 {
            let mut block = vec![0u8; 512];
            let n = (512 * 8) >> order;
            let max = if order == 6 { u64::MAX } else { (1u64 << (1 << order)) - 1 };
            for i in 0..n {
                set_count(&mut block, order, i, (i as u64 * 7 + 1) & max);
            }
            for i in 0..n {
                assert_eq!(get_count(&block, order, i), (i as u64 * 7 + 1) & max, "{order} {i}");
            }
            assert_eq!(get_count(&block, order, n), 0);
        }
        let mut b = [0; 2];
        set_count(&mut b, 4, 0, 0x0102);
        assert_eq!(b, [1, 2]);
        set_count(&mut b, 0, 3, 1);
        assert_eq!(b[0], 0b1001);
    }
}
