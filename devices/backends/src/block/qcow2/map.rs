//! From guest offsets to the file: L1 and L2 tables.

use super::super::error::{Error, Result};
use super::super::{Extent, ExtentKind, Extents};
use super::header::Header;
use super::{Meta, Qcow2};
use crate::block::BlockRead;

/// The cluster is ours alone.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3).
pub const ZERO: u64 = 1;
/// Bits of an offset in an entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the entries of an L2 table.
    pub l2_bits: u32,
    /// 2 or 3.
    pub version: u32,
}

impl Geometry {
    pub fn new(h: &Header) -> Geometry {
        Geometry { cluster_bits: h.cluster_bits, l2_bits: h.cluster_bits - 3, version: h.version }
    }
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// Offset in its cluster.
    pub fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }
    /// L1 index of a guest cluster.
    pub fn l1_index(&self, cluster: u64) -> usize {
        (cluster >> self.l2_bits) as usize
    }
    /// L2 index of a guest cluster.
    pub fn l2_index(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.l2_bits) - 1)) as usize
    }
    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// What an L2 entry says.
    pub fn decode(&self, entry: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            let shift = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << shift) - 1) & (OFFSET | 0x1ff);
            let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
            let len = sectors * 512 - (host & 511);
            return Ok(Mapping::Compressed { host, len, entry });
        }
        let host = entry & OFFSET;
        let copied = entry & COPIED != 0;
        if self.within(host) != 0 {
            return Err(Error::Corrupt(format!("an L2 entry points to {host:#x}, unaligned")));
        }
        if self.version >= 3 && entry & ZERO != 0 {
            let host = (host != 0).then_some(host);
            return Ok(Mapping::Zero { host, copied });
        }
        Ok(if host == 0 { Mapping::Unallocated } else { Mapping::Data { host, copied } })
    }

    /// The L2 entry of compressed data of `len` bytes at `host`.
    pub fn encode_compressed(&self, host: u64, len: u64) -> u64 {
        let shift = 62 - (self.cluster_bits - 8);
        let sectors = ((host & 511) + len).div_ceil(512) - 1;
        COMPRESSED | sectors << shift | host
    }
}

/// What a guest cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The backing image's.
    Unallocated,
    /// Zeros; a cluster may be reserved for it.
    Zero { host: Option<u64>, copied: bool },
    /// Data at `host`.
    Data { host: u64, copied: bool },
    /// Compressed data in `len` bytes from `host` on, or fewer.
    Compressed { host: u64, len: u64, entry: u64 },
}

impl Mapping {
    /// The run of file clusters (index, length) that it uses.
    pub fn clusters(&self, bits: u32) -> Option<(u64, u64)> {
        match *self {
            Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } => {
                Some((host >> bits, 1))
            }
            Mapping::Compressed { host, len, .. } => {
                let first = host >> bits;
                Some((first, ((host + len - 1) >> bits) - first + 1))
            }
            _ => None,
        }
    }

    /// What follows it after `n` clusters if the run goes on.
    fn after(self, n: u64, geo: &Geometry) -> Mapping {
        match self {
            Mapping::Data { host, copied } => {
                Mapping::Data { host: host + (n << geo.cluster_bits), copied }
            }
            Mapping::Zero { host: Some(host), copied } => {
                Mapping::Zero { host: Some(host + (n << geo.cluster_bits)), copied }
            }
            m => m,
        }
    }
}

impl Meta {
    /// Notes where L2 tables, the L1 table and the snapshots' tables are.
    pub fn note_tables(&mut self, geo: &Geometry) {
        let l1_clusters = (u64::from(self.header.l1_size) * 8).div_ceil(geo.cluster());
        let l1 = (0..l1_clusters).map(|i| self.header.l1_offset + (i << geo.cluster_bits));
        self.refs.tables.extend(l1);
        self.refs.tables.extend(self.l1.iter().map(|e| e & OFFSET).filter(|o| *o != 0));
        if self.header.snapshots > 0 {
            self.refs.tables.insert(self.header.snapshots_offset);
        }
        for s in &self.snapshots {
            let n = (u64::from(s.l1_size) * 8).div_ceil(geo.cluster());
            self.refs.tables.extend((0..n).map(|i| s.l1_offset + (i << geo.cluster_bits)));
        }
    }
}

impl Qcow2 {
    /// The offset of the L2 table with L1 index `index`, if there is one.
    pub(super) fn l2_offset(&self, meta: &Meta, index: usize) -> Result<Option<u64>> {
        match meta.l1.get(index).map_or(0, |e| e & OFFSET) {
            0 => Ok(None),
            o if self.geo.within(o) != 0 => {
                Err(Error::Corrupt(format!("L1 entry {index} points to {o:#x}, unaligned")))
            }
            o => Ok(Some(o)),
        }
    }

    /// What guest cluster `cluster` is.
    pub(super) fn mapping(&self, meta: &mut Meta, cluster: u64) -> Result<Mapping> {
        let Some(at) = self.l2_offset(meta, self.geo.l1_index(cluster))? else {
            return Ok(Mapping::Unallocated);
        };
        let table = meta.l2.get(&self.file, at)?;
        self.geo.decode(table.entry(self.geo.l2_index(cluster)))
    }

    /// What guest cluster `cluster` is, and how many from there on (at most `max`, at least one)
    /// continue it in guest and file.
    pub(super) fn run(&self, meta: &mut Meta, cluster: u64, max: u64) -> Result<(Mapping, u64)> {
        let geo = self.geo;
        let first = geo.l2_index(cluster);
        let left = (geo.l2_entries() - first as u64).min(max.max(1));
        let Some(at) = self.l2_offset(meta, geo.l1_index(cluster))? else {
            return Ok((Mapping::Unallocated, left));
        };
        let table = meta.l2.get(&self.file, at)?;
        let mapping = geo.decode(table.entry(first))?;
        if matches!(mapping, Mapping::Compressed { .. }) {
            return Ok((mapping, 1));
        }
        let mut n = 1;
        while n < left {
            match geo.decode(table.entry(first + n as usize)) {
                Ok(m) if m == mapping.after(n, &geo) => n += 1,
                _ => break,
            }
        }
        Ok((mapping, n))
    }

    /// The offset of the L2 table of guest cluster `cluster`, ours alone and ready to be changed.
    pub(super) fn l2_for_change(&self, meta: &mut Meta, cluster: u64) -> Result<u64> {
        let index = self.geo.l1_index(cluster);
        let Some(&entry) = meta.l1.get(index) else {
            return Err(Error::OutOfRange);
        };
        let old = self.l2_offset(meta, index)?;
        if let (Some(at), true) = (old, entry & COPIED != 0) {
            return Ok(at);
        }
        let bytes = match old {
            Some(at) => meta.l2.get(&self.file, at)?.bytes.clone(),
            None => vec![0; self.geo.cluster() as usize].into_boxed_slice(),
        };
        let Meta { refs, header, .. } = meta;
        let (at, _) = refs.allocate(&self.file, header, 1)?;
        refs.tables.insert(at);
        meta.note_used(at >> self.geo.cluster_bits, 1);
        meta.l2.insert(at, bytes);
        meta.l1[index] = at | COPIED;
        meta.l1_dirty = true;
        if let Some(old) = old {
            meta.dropped.push((old >> self.geo.cluster_bits, 1));
        }
        Ok(at)
    }

    /// Changes the entry of guest cluster `cluster` in the L2 table at `table`, and lets go of what
    /// it referred to, unless that is `keep`.
    pub(super) fn set_entry(
        &self,
        meta: &mut Meta,
        table: u64,
        cluster: u64,
        entry: u64,
    ) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let index = self.geo.l2_index(cluster);
        let t = meta.l2.get(&self.file, table)?;
        let old = self.geo.decode(t.entry(index))?.clusters(bits);
        let new = self.geo.decode(entry)?.clusters(bits);
        t.set_entry(index, entry);
        if let Some(run) = old
            && old != new
        {
            meta.dropped.push(run);
        }
        Ok(())
    }
}

impl Meta {
    /// Notes that `n` clusters of the file from `index` on are used now; returns whether they had
    /// never been.
    pub fn note_used(&mut self, index: u64, n: u64) -> bool {
        let new = index >= self.fresh;
        self.fresh = self.fresh.max(index + n);
        new
    }
}

impl Extents for Qcow2 {
    fn extent(&self, offset: u64) -> Result<Extent> {
        let size = self.size();
        if offset >= size {
            let kind = ExtentKind::Unallocated;
            return Ok(Extent { kind, len: 0, host: None, compressed: false });
        }
        let _inside = self.gate.enter();
        let within = self.geo.within(offset);
        let mut at = offset >> self.geo.cluster_bits;
        let end = size.div_ceil(self.geo.cluster());
        let (mapping, mut n) = self.run(&mut self.lock(), at, end - at)?;
        // Runs that end with an L2 table go on in the next one.
        while !matches!(mapping, Mapping::Compressed { .. }) && self.geo.l2_index(at + n) == 0 {
            at += n;
            if at >= end {
                break;
            }
            let (next, more) = self.run(&mut self.lock(), at, end - at)?;
            let so_far = at - (offset >> self.geo.cluster_bits);
            if next != mapping.after(so_far, &self.geo) {
                n = 0;
                break;
            }
            n = more;
        }
        let clusters = at + n - (offset >> self.geo.cluster_bits);
        let len = ((clusters << self.geo.cluster_bits) - within).min(size - offset);
        let (kind, host, compressed) = match mapping {
            Mapping::Unallocated => (ExtentKind::Unallocated, None, false),
            Mapping::Zero { host, .. } => (ExtentKind::Zero, host.map(|h| h + within), false),
            Mapping::Data { host, .. } => (ExtentKind::Data, Some(host + within), false),
            Mapping::Compressed { .. } => (ExtentKind::Data, None, true),
        };
        Ok(Extent { kind, len, host, compressed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_for_every_cluster_size() {
        for bits in 9..=21 {
            let geo = Geometry { cluster_bits: bits, l2_bits: bits - 3, version: 3 };
            let host = 0x12_3456_7000 + 77;
            let longest = geo.cluster() - 1;
            for len in [1, 435, 436, 512, longest] {
                let len = len.min(longest);
                let e = geo.encode_compressed(host, len);
                let Mapping::Compressed { host: h, len: l, .. } = geo.decode(e).unwrap() else {
                    panic!()
                };
                assert_eq!(h, host);
                assert!(l >= len && l < len + 512, "{bits} {len} {l}");
            }
        }
    }

    #[test]
    fn hostile_entries_are_judged() {
        let geo = Geometry { cluster_bits: 16, l2_bits: 13, version: 3 };
        assert!(geo.decode(0x1200).is_err());
        assert_eq!(geo.decode(0).unwrap(), Mapping::Unallocated);
        assert_eq!(geo.decode(1).unwrap(), Mapping::Zero { host: None, copied: false });
        let v2 = Geometry { version: 2, ..geo };
        assert_eq!(v2.decode(1).unwrap(), Mapping::Unallocated);
        // The largest compressed descriptor does not overflow.
        let Mapping::Compressed { host, len, .. } = geo.decode(u64::MAX).unwrap() else { panic!() };
        assert!(host.checked_add(len).is_some());
    }
}
