//! Making new images.
//!
//! Layout: header, refcount table, refcount blocks, L1 table, then (with preallocation) L2 tables
//! and data. Everything is computed before the first byte is written.

use super::super::error::{Error, Result};
use super::super::file::HostFile;
use super::super::{Preallocation, SECTOR, raw};
use super::header::{
    COMPAT_LAZY, Compression, Header, INCOMPAT_COMPRESSION, MAX_L1_BYTES, MAX_REFTABLE_BYTES,
    l1_entries,
};
use super::map::COPIED;
use super::refcount::set_count;

/// What a new image is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up to a sector.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 (compat=0.10) or 3 (compat=1.1).
    pub version: u32,
    /// Bits of a refcount: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Update refcounts lazily (version 3).
    pub lazy_refcounts: bool,
    /// How clusters will be compressed; zstd in version 3 only.
    pub compression: Compression,
    /// What to prepare.
    pub preallocation: Preallocation,
    /// Name of the backing file, as the image will hold it.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            cluster_size: 65536,
            version: 3,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
        }
    }
}

/// Where everything goes, in clusters.
struct Layout {
    reftable: u64,
    blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    fn tables(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1 + self.l2
    }
    fn total(&self) -> u64 {
        self.tables() + self.data
    }
}

impl CreateOptions {
    fn judge(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Invalid(what));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return bad("the cluster size must be a power of two from 512 to 2M".into());
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return bad("refcount_bits must be a power of two from 1 to 64".into());
        }
        if self.version == 2 && (self.refcount_bits != 16 || self.lazy_refcounts) {
            return bad("compat=0.10 has 16-bit refcounts that are not lazy; use compat=1.1".into());
        }
        if self.version == 2 && self.compression != Compression::Zlib {
            return bad("compat=0.10 has no compression but zlib; use compat=1.1".into());
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off {
            return bad("an image with a backing file cannot be preallocated".into());
        }
        let l1 = l1_entries(self.size, self.cluster_bits());
        if self.size >> 62 != 0 || l1 * 8 > MAX_L1_BYTES {
            return bad(format!(
                "a disk of {} bytes is too large for clusters of {} bytes",
                self.size, self.cluster_size
            ));
        }
        Ok(())
    }

    fn cluster_bits(&self) -> u32 {
        self.cluster_size.trailing_zeros()
    }

    fn layout(&self) -> Result<Layout> {
        let (cluster, bits) = (self.cluster_size, self.cluster_bits());
        let entries = l1_entries(self.size, bits);
        let full = self.preallocation != Preallocation::Off;
        let mut l = Layout {
            reftable: 1,
            blocks: 1,
            // An empty disk has an L1 table, too.
            l1: (entries.max(1) * 8).div_ceil(cluster),
            l2: if full { entries } else { 0 },
            data: if full { self.size.div_ceil(cluster) } else { 0 },
        };
        let per_block = cluster * 8 / u64::from(self.refcount_bits);
        loop {
            let blocks = l.total().div_ceil(per_block);
            let reftable = (blocks * 8).div_ceil(cluster);
            if (blocks, reftable) == (l.blocks, l.reftable) {
                break;
            }
            (l.blocks, l.reftable) = (blocks, reftable);
        }
        if l.reftable * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            let what = "the refcount table would be too large; use larger clusters";
            return Err(Error::Invalid(what.into()));
        }
        Ok(l)
    }

    /// What qemu-img calls a fully allocated image's size: bytes of tables and data of a disk that
    /// is written whole, and bytes needed for `data` of it.
    pub fn measure(&self, data: u64) -> Result<(u64, u64)> {
        self.judge()?;
        let full = CreateOptions { preallocation: Preallocation::Metadata, ..self.clone() };
        let l = full.layout()?;
        let tables = l.tables() * self.cluster_size;
        Ok((tables + l.data * self.cluster_size, tables + data))
    }

    /// Makes `file`, which is empty, an image.
    pub fn create(&self, file: &HostFile) -> Result<()> {
        let options = CreateOptions { size: self.size.next_multiple_of(SECTOR), ..self.clone() };
        options.judge()?;
        let l = options.layout()?;
        options.write(file, &l)
    }

    fn write(&self, file: &HostFile, l: &Layout) -> Result<()> {
        let cluster = self.cluster_size;
        let (bits, order) = (self.cluster_bits(), self.refcount_bits.trailing_zeros());
        let at = |n: u64| n << bits;
        let l1_at = 1 + l.reftable + l.blocks;
        let (l2_at, data_at) = (l1_at + l.l1, l.tables());
        let header = Header {
            version: self.version,
            cluster_bits: bits,
            size: self.size,
            l1_size: l1_entries(self.size, bits).max(1) as u32,
            l1_offset: at(l1_at),
            reftable_offset: at(1),
            reftable_clusters: l.reftable as u32,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => INCOMPAT_COMPRESSION,
            },
            compatible: if self.lazy_refcounts { COMPAT_LAZY } else { 0 },
            autoclear: 0,
            refcount_order: order,
            compression: self.compression,
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_format.clone(),
            others: Vec::new(),
        };
        let head = header.encode()?;
        let table: Vec<u8> = (0..l.reftable * cluster / 8)
            .flat_map(|b| if b < l.blocks { at(1 + l.reftable + b) } else { 0 }.to_be_bytes())
            .collect();
        file.write_bytes(at(1), &table)?;
        let per_block = cluster * 8 / u64::from(self.refcount_bits);
        for b in 0..l.blocks {
            let mut block = vec![0; cluster as usize];
            let used = (l.total() - b * per_block).min(per_block);
            for i in 0..used {
                set_count(&mut block, order, i as usize, 1);
            }
            file.write_bytes(at(1 + l.reftable + b), &block)?;
        }
        let mut l1 = vec![0; at(l.l1) as usize];
        for i in 0..l.l2 {
            let e = at(l2_at + i) | COPIED;
            l1[i as usize * 8..][..8].copy_from_slice(&e.to_be_bytes());
        }
        file.write_bytes(at(l1_at), &l1)?;
        self.write_data(file, l, l2_at, data_at)?;
        file.sync()?;
        // Only now is it an image.
        file.write_bytes(0, &head)?;
        if file.len()? < at(l.total()) {
            file.set_len(at(l.total()))?;
        }
        file.sync()
    }

    fn write_data(&self, file: &HostFile, l: &Layout, l2_at: u64, data_at: u64) -> Result<()> {
        let (bits, per) = (self.cluster_bits(), self.cluster_size / 8);
        for t in 0..l.l2 {
            let mut l2 = vec![0; self.cluster_size as usize];
            for (i, slot) in l2.chunks_exact_mut(8).enumerate() {
                let n = t * per + i as u64;
                if n < l.data {
                    slot.copy_from_slice(&((data_at + n) << bits | COPIED).to_be_bytes());
                }
            }
            file.write_bytes((l2_at + t) << bits, &l2)?;
        }
        let (start, end) = (data_at << bits, (data_at + l.data) << bits);
        match self.preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata => file.set_len(end),
            Preallocation::Falloc => file.preallocate(start, end - start),
            Preallocation::Full => raw::fill_with_zeros(file, start, end),
        }
    }
}
