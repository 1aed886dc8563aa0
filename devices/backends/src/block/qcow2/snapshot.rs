//! Snapshots inside an image: a table of L1 tables.
//!
//! Taking one shares every cluster: counts rise and the COPIED flags go, so that the next write
//! takes a new cluster. All of it happens alone inside the gate with the tables locked.

use super::super::error::{Error, Result};
use super::super::file::HostFile;
use super::super::{BlockRead, Snapshot, Snapshots};
use super::header::{Header, MAX_L1_BYTES, l1_entries};
use super::map::{COPIED, Geometry, Mapping, OFFSET};
use super::{Meta, Qcow2};
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest snapshot table that is read.
const MAX_TABLE: usize = 16 << 20;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub l1_offset: u64,
    pub l1_size: u32,
    pub info: Snapshot,
    /// Extra data beyond what we know.
    extra: Vec<u8>,
}

/// Takes pieces off the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let short = || Error::Corrupt("the snapshot table is cut off".into());
        let (now, later) = self.0.split_at_checked(n).ok_or_else(short)?;
        self.0 = later;
        Ok(now)
    }
    fn number(&mut self, n: usize) -> Result<u64> {
        Ok(self.bytes(n)?.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
    }
    fn text(&mut self, n: usize) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes(n)?).into_owned())
    }
}

/// Reads the snapshot table of the image in `file`.
pub fn read_table(file: &HostFile, h: &Header) -> Result<Vec<Entry>> {
    if h.snapshots == 0 {
        return Ok(Vec::new());
    }
    let len = file.len()?.saturating_sub(h.snapshots_offset).min(MAX_TABLE as u64);
    let mut raw = vec![0; len as usize];
    file.read_bytes(h.snapshots_offset, &mut raw)?;
    let mut entries = Vec::new();
    let mut r = Reader(&raw);
    for _ in 0..h.snapshots {
        let before = r.0.len();
        let (l1_offset, l1_size) = (r.number(8)?, r.number(4)? as u32);
        let (id_len, name_len) = (r.number(2)? as usize, r.number(2)? as usize);
        let date = (r.number(4)? as u32, r.number(4)? as u32);
        let (vm_clock, small_state, extra_len) = (r.number(8)?, r.number(4)?, r.number(4)?);
        let mut extra = Reader(r.bytes(extra_len as usize)?);
        let vm_state_size = extra.number(8).unwrap_or(small_state);
        let disk_size = extra.number(8).unwrap_or(h.size);
        let icount = extra.number(8).ok().filter(|n| *n != u64::MAX);
        let (id, name) = (r.text(id_len)?, r.text(name_len)?);
        let used = before - r.0.len();
        r.bytes((used.next_multiple_of(8) - used).min(r.0.len()))?;
        let aligned = l1_offset & ((1 << h.cluster_bits) - 1) == 0 && l1_offset >> 56 == 0;
        if !aligned || u64::from(l1_size) * 8 > MAX_L1_BYTES {
            return Err(Error::Corrupt(format!("the L1 table of snapshot '{name}' is bad")));
        }
        let info = Snapshot { id, name, disk_size, vm_state_size, date, vm_clock, icount };
        entries.push(Entry { l1_offset, l1_size, info, extra: extra.0.to_vec() });
    }
    Ok(entries)
}

fn encode_table(entries: &[Entry]) -> Vec<u8> {
    let mut b = Vec::new();
    for e in entries {
        let i = &e.info;
        b.extend(e.l1_offset.to_be_bytes());
        b.extend(e.l1_size.to_be_bytes());
        b.extend((i.id.len() as u16).to_be_bytes());
        b.extend((i.name.len() as u16).to_be_bytes());
        b.extend(i.date.0.to_be_bytes());
        b.extend(i.date.1.to_be_bytes());
        b.extend(i.vm_clock.to_be_bytes());
        let small = u32::try_from(i.vm_state_size).unwrap_or(0);
        b.extend(small.to_be_bytes());
        b.extend((24 + e.extra.len() as u32).to_be_bytes());
        b.extend(i.vm_state_size.to_be_bytes());
        b.extend(i.disk_size.to_be_bytes());
        b.extend(i.icount.unwrap_or(u64::MAX).to_be_bytes());
        b.extend(&e.extra);
        b.extend(i.id.as_bytes());
        b.extend(i.name.as_bytes());
        b.resize(b.len().next_multiple_of(8), 0);
    }
    b
}

/// Bytes that the table of `entries` takes in the file.
pub fn table_len(entries: &[Entry]) -> u64 {
    encode_table(entries).len() as u64
}

/// Reads an L1 table of `size` entries at `offset`.
pub fn read_l1(file: &HostFile, offset: u64, size: u32) -> Result<Vec<u64>> {
    let mut raw = vec![0; size as usize * 8];
    file.read_bytes(offset, &mut raw)?;
    Ok(raw.chunks_exact(8).map(|c| u64::from_be_bytes(c.try_into().expect("8 bytes"))).collect())
}

fn encode_l1(l1: &[u64]) -> Vec<u8> {
    l1.iter().flat_map(|e| e.to_be_bytes()).collect()
}

/// What a walk over an L1 table does with counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    /// Everything is shared once more.
    Share,
    /// Everything is shared once less.
    Drop,
}

impl Qcow2 {
    /// Walks over all L2 tables and clusters below `l1`.
    fn walk(&self, meta: &mut Meta, l1: &[u64], walk: Walk) -> Result<()> {
        let bits = self.geo.cluster_bits;
        for entry in l1 {
            let at = entry & OFFSET;
            if at == 0 {
                continue;
            }
            if self.geo.within(at) != 0 {
                return Err(Error::Corrupt(format!("an L1 entry points to {at:#x}, unaligned")));
            }
            let table = meta.l2.get(&self.file, at)?.bytes.clone();
            for e in entries(&table) {
                let Some((start, n)) = self.geo.decode(e)?.clusters(bits) else { continue };
                for c in start..start + n {
                    match walk {
                        Walk::Share => drop(meta.refs.increment(&self.file, c)?),
                        Walk::Drop => meta.dropped.push((c, 1)),
                    }
                }
            }
            match walk {
                Walk::Share => drop(meta.refs.increment(&self.file, at >> bits)?),
                Walk::Drop => meta.dropped.push((at >> bits, 1)),
            }
        }
        Ok(())
    }

    /// Makes the COPIED flags of the active tables agree with the counts.
    pub(super) fn refresh_flags(&self, meta: &mut Meta) -> Result<()> {
        let bits = self.geo.cluster_bits;
        for i in 0..meta.l1.len() {
            let at = meta.l1[i] & OFFSET;
            if at == 0 {
                continue;
            }
            let alone = meta.refs.get(&self.file, at >> bits)? == 1;
            let new = if alone { at | COPIED } else { at };
            if meta.l1[i] != new {
                meta.l1[i] = new;
                meta.l1_dirty = true;
            }
            let table = meta.l2.get(&self.file, at)?.bytes.clone();
            for (index, e) in entries(&table).enumerate() {
                let host = match self.geo.decode(e)? {
                    Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } => host,
                    _ => continue,
                };
                let alone = meta.refs.get(&self.file, host >> bits)? == 1;
                let new = if alone { e | COPIED } else { e & !COPIED };
                if new != e {
                    meta.l2.get(&self.file, at)?.set_entry(index, new);
                }
            }
            if meta.l2.is_full() {
                self.write_back(meta)?;
            }
        }
        Ok(())
    }

    /// Everything to disk and freed, alone inside the gate.
    fn finish(&self, meta: &mut Meta) -> Result<()> {
        self.write_back(meta)?;
        self.release(meta)?;
        self.refresh_flags(meta)?;
        self.write_back(meta)?;
        self.file.sync()
    }

    /// Writes `bytes` to new clusters that lie together.
    fn place(&self, meta: &mut Meta, bytes: &[u8]) -> Result<u64> {
        let n = (bytes.len() as u64).div_ceil(self.geo.cluster()).max(1);
        let Meta { refs, header, .. } = &mut *meta;
        let at = refs.allocate_together(&self.file, header, n)?;
        refs.tables.extend((0..n).map(|i| at + (i << self.geo.cluster_bits)));
        meta.note_used(at >> self.geo.cluster_bits, n);
        self.file.write_bytes(at, bytes)?;
        Ok(at)
    }

    /// Replaces the snapshot table on disk.
    fn write_table(&self, meta: &mut Meta, entries: Vec<Entry>) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let raw = encode_table(&entries);
        let at = if entries.is_empty() { 0 } else { self.place(meta, &raw)? };
        // Counts and the table first, then what points to it.
        self.write_back(meta)?;
        self.file.sync()?;
        let old = (meta.header.snapshots_offset, table_len(&meta.snapshots));
        let h =
            Header { snapshots: entries.len() as u32, snapshots_offset: at, ..meta.header.clone() };
        h.write(&self.file)?;
        self.file.sync()?;
        if meta.header.snapshots > 0 {
            meta.dropped.push((old.0 >> bits, old.1.div_ceil(self.geo.cluster())));
        }
        meta.header = h;
        meta.snapshots = entries;
        Ok(())
    }

    fn find(meta: &Meta, which: &str) -> Result<usize> {
        let by = |f: fn(&Entry) -> &str| meta.snapshots.iter().position(|e| f(e) == which);
        by(|e| &e.info.id)
            .or_else(|| by(|e| &e.info.name))
            .ok_or_else(|| Error::Invalid(format!("the image has no snapshot '{which}'")))
    }

    /// Makes the disk of this image, open for reading, that of a snapshot.
    pub fn show_snapshot(&self, which: &str) -> Result<()> {
        if self.file.writable() {
            let what = "a snapshot is looked at in an image that is open for reading";
            return Err(Error::Invalid(what.into()));
        }
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        let entry = meta.snapshots[Self::find(&meta, which)?].clone();
        let needed = l1_entries(entry.info.disk_size, self.geo.cluster_bits);
        if needed > u64::from(entry.l1_size) {
            return Err(Error::Corrupt("the snapshot's L1 table is too small".into()));
        }
        meta.l1 = read_l1(&self.file, entry.l1_offset, entry.l1_size)?;
        self.size.store(entry.info.disk_size, Ordering::Release);
        Ok(())
    }

    fn create_inside(&self, meta: &mut Meta, name: &str) -> Result<()> {
        self.write_back(meta)?;
        let l1: Vec<u64> = meta.l1.iter().map(|e| e & OFFSET).collect();
        self.walk(meta, &l1, Walk::Share)?;
        self.refresh_flags(meta)?;
        let l1_offset = self.place(meta, &encode_l1(&l1))?;
        let number = |e: &Entry| e.info.id.parse::<u64>().unwrap_or(0);
        let id = meta.snapshots.iter().map(number).max().unwrap_or(0).saturating_add(1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let info = Snapshot {
            id: id.to_string(),
            name: name.to_string(),
            disk_size: self.size(),
            vm_state_size: 0,
            date: (now.as_secs() as u32, now.subsec_nanos()),
            vm_clock: 0,
            icount: None,
        };
        let mut entries = meta.snapshots.clone();
        entries.push(Entry { l1_offset, l1_size: l1.len() as u32, info, extra: Vec::new() });
        self.write_table(meta, entries)?;
        self.finish(meta)
    }

    fn apply_inside(&self, meta: &mut Meta, which: &str) -> Result<()> {
        let entry = meta.snapshots[Self::find(meta, which)?].clone();
        let size = entry.info.disk_size;
        let needed = l1_entries(size, self.geo.cluster_bits).max(1);
        if needed * 8 > MAX_L1_BYTES {
            let what = format!("snapshot '{which}' is of a disk of {size} bytes, which cannot be");
            return Err(Error::Corrupt(what));
        }
        if needed > meta.l1.len() as u64 {
            self.grow_l1(meta, needed)?;
        }
        let old: Vec<u64> = meta.l1.iter().map(|e| e & OFFSET).collect();
        let mut new: Vec<u64> = read_l1(&self.file, entry.l1_offset, entry.l1_size)?;
        new.iter_mut().for_each(|e| *e &= OFFSET);
        new.resize(meta.l1.len(), 0);
        self.write_back(meta)?;
        self.walk(meta, &new, Walk::Share)?;
        meta.l1 = new;
        meta.l1_dirty = true;
        // Shared with the snapshot, until the flags are refreshed.
        self.write_back(meta)?;
        if size != self.size() {
            let h = Header { size, ..meta.header.clone() };
            h.write(&self.file)?;
            meta.header = h;
            self.size.store(size, Ordering::Release);
        }
        self.walk(meta, &old, Walk::Drop)?;
        self.finish(meta)
    }

    fn delete_inside(&self, meta: &mut Meta, which: &str) -> Result<()> {
        let index = Self::find(meta, which)?;
        let mut entries = meta.snapshots.clone();
        let gone = entries.remove(index);
        let l1 = read_l1(&self.file, gone.l1_offset, gone.l1_size)?;
        self.write_table(meta, entries)?;
        self.walk(meta, &l1, Walk::Drop)?;
        let n = (u64::from(gone.l1_size) * 8).div_ceil(self.geo.cluster());
        meta.dropped.push((gone.l1_offset >> self.geo.cluster_bits, n));
        self.finish(meta)
    }

    fn alone(&self, change: impl FnOnce(&mut Meta) -> Result<()>) -> Result<()> {
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        self.must_write(&meta)?;
        self.about_to_change(&mut meta)?;
        meta.packing = None;
        let r = change(&mut meta);
        self.guard(&mut meta, r)
    }
}

/// The entries of an L2 table's bytes.
pub fn entries(table: &[u8]) -> impl Iterator<Item = u64> + '_ {
    table.chunks_exact(8).map(|c| u64::from_be_bytes(c.try_into().expect("8 bytes")))
}

impl Snapshots for Qcow2 {
    fn list(&self) -> Vec<Snapshot> {
        self.lock().snapshots.iter().map(|e| e.info.clone()).collect()
    }
    fn create(&self, name: &str) -> Result<()> {
        if name.len() > 255 {
            return Err(Error::Invalid("a snapshot's name has at most 255 bytes".into()));
        }
        self.alone(|meta| self.create_inside(meta, name))
    }
    fn apply(&self, which: &str) -> Result<()> {
        self.alone(|meta| self.apply_inside(meta, which))
    }
    fn delete(&self, which: &str) -> Result<()> {
        self.alone(|meta| self.delete_inside(meta, which))
    }
}

impl Geometry {
    /// Clusters that a table of `bytes` takes.
    pub fn clusters_of(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }
}
