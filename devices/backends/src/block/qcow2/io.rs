//! Reading, writing, zeroing, discarding.

use super::super::error::Result;
use super::super::pieces::{Dst, Pieces, Src};
use super::super::{BlockRead, BlockWrite, Compress};
use super::compress::{compress, decompress};
use super::map::{COPIED, Mapping, ZERO};
use super::{Meta, Qcow2};
use crate::block::error::Error;
use std::sync::Arc;

/// Clusters that a write takes at once.
const MAX_RUN: u64 = 1024;

/// What a write does with its next bytes.
enum Step {
    /// They go to this offset of the file.
    InPlace { host: u64, len: u64 },
    /// They fill `n` new clusters of the file at `host`, for guest clusters from `first` on.
    Fill(Filling),
}

/// New clusters that are being filled.
struct Filling {
    first: u64,
    n: u64,
    host: u64,
    /// What the first and the last were.
    before: (Mapping, Mapping),
    /// They have never been used, so they read as zeros.
    fresh: bool,
    /// They were reserved for these guest clusters before.
    reserved: bool,
}

impl Qcow2 {
    /// Reads; the caller is inside the gate, and the range lies in the disk.
    pub(super) fn read_inside(&self, offset: u64, into: &Dst) -> Result<()> {
        let geo = self.geo;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done;
            let left = into.len() - done;
            let (mapping, n) = {
                let mut meta = self.lock();
                let clusters = (geo.within(at) + left).div_ceil(geo.cluster());
                let r = self.run(&mut meta, at >> geo.cluster_bits, clusters);
                self.guard(&mut meta, r)?
            };
            let len = left.min((n << geo.cluster_bits) - geo.within(at));
            self.read_mapping(mapping, at, &into.sub(done, len))?;
            done += len;
        }
        Ok(())
    }

    /// Reads from `at` on, which lies in the first cluster of `mapping`.
    fn read_mapping(&self, mapping: Mapping, at: u64, into: &Dst) -> Result<()> {
        match mapping {
            Mapping::Zero { .. } => into.fill(0),
            Mapping::Data { host, .. } => {
                return self.file.read(host + self.geo.within(at), into);
            }
            Mapping::Unallocated => return self.read_backing(at, into),
            Mapping::Compressed { host, len, entry } => {
                let data = self.decompressed(host, len, entry)?;
                let from = self.geo.within(at) as usize;
                into.copy_from(&data[from..from + into.len() as usize]);
            }
        }
        Ok(())
    }

    fn read_backing(&self, at: u64, into: &Dst) -> Result<()> {
        let Some(backing) = self.backing.read().unwrap().clone() else {
            into.fill(0);
            return Ok(());
        };
        let there = backing.size().saturating_sub(at).min(into.len());
        if there > 0 {
            backing.read(at, &into.sub(0, there))?;
        }
        if there < into.len() {
            into.sub(there, u64::MAX).fill(0);
        }
        Ok(())
    }

    fn decompressed(&self, host: u64, len: u64, entry: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(data) = self.recent.get(entry) {
            return Ok(data);
        }
        let mut packed = vec![0; len as usize];
        self.file.read_bytes(host, &mut packed)?;
        let kind = self.lock().header.compression;
        let data = Arc::new(decompress(kind, &packed, self.geo.cluster() as usize)?);
        self.recent.put(entry, &data);
        Ok(data)
    }

    /// The file's offset of a range that lies there in one piece as data, by tables in memory; for
    /// a write also as ours alone, with nobody filling it.
    pub(super) fn plain_run(&self, meta: &mut Meta, at: u64, len: u64, write: bool) -> Option<u64> {
        let geo = self.geo;
        let (first, within) = (at >> geo.cluster_bits, geo.within(at));
        let clusters = (within + len).div_ceil(geo.cluster());
        let table = self.l2_offset(meta, geo.l1_index(first)).ok()??;
        if meta.broken || !meta.l2.has(table) {
            return None;
        }
        let (mapping, n) = self.run(meta, first, clusters).ok()?;
        let Mapping::Data { host, copied } = mapping else { return None };
        if n < clusters {
            return None;
        }
        let host_cluster = host >> geo.cluster_bits;
        if write {
            let taken = |i| {
                let table = (host_cluster + i) << geo.cluster_bits;
                meta.busy.contains(&(first + i)) || meta.refs.tables.contains(&table)
            };
            if !copied || !self.file.writable() || (0..clusters).any(taken) {
                return None;
            }
            self.clean.store(false, std::sync::atomic::Ordering::Release);
        }
        Some(host + within)
    }

    /// Decides about the next bytes of a write, `left` at `at`. Waits while the first cluster is
    /// busy.
    fn next_step(&self, at: u64, left: u64) -> Result<Step> {
        let geo = self.geo;
        let first = at >> geo.cluster_bits;
        let clusters = (geo.within(at) + left).div_ceil(geo.cluster());
        let meta = self.lock();
        let mut meta = self.settled.wait_while(meta, |m| m.busy.contains(&first)).unwrap();
        self.must_write(&meta)?;
        let r = self.run(&mut meta, first, clusters);
        let (mapping, n) = self.guard(&mut meta, r)?;
        if let Mapping::Data { host, copied: true } = mapping {
            let host = host + geo.within(at);
            let len = left.min((n << geo.cluster_bits) - geo.within(at));
            let last = host + len - 1;
            let tables = &meta.refs.tables;
            let mut hosts = (host >> geo.cluster_bits)..=(last >> geo.cluster_bits);
            if hosts.any(|c| tables.contains(&(c << geo.cluster_bits))) {
                let what = "an L2 entry points to a table".to_string();
                return self.guard(&mut meta, Err(Error::Corrupt(what)));
            }
            self.clean.store(false, std::sync::atomic::Ordering::Release);
            return Ok(Step::InPlace { host, len });
        }
        self.about_to_change(&mut meta)?;
        let r = self.take_clusters(&mut meta, first, clusters, mapping);
        let filling = self.guard(&mut meta, r)?;
        meta.busy.extend(filling.first..filling.first + filling.n);
        Ok(Step::Fill(filling))
    }

    /// Finds clusters of the file for guest clusters from `first` on, up to `max`.
    fn take_clusters(
        &self,
        meta: &mut Meta,
        first: u64,
        max: u64,
        mapping: Mapping,
    ) -> Result<Filling> {
        self.l2_for_change(meta, first)?;
        if let Mapping::Zero { host: Some(host), copied: true } = mapping {
            let before = (mapping, mapping);
            return Ok(Filling { first, n: 1, host, before, fresh: false, reserved: true });
        }
        let room = self.geo.l2_entries() - self.geo.l2_index(first) as u64;
        let (mut want, mut last) = (1, mapping);
        while want < max.min(room).min(MAX_RUN) && !meta.busy.contains(&(first + want)) {
            match self.mapping(meta, first + want)? {
                Mapping::Data { copied: true, .. }
                | Mapping::Zero { host: Some(_), copied: true } => break,
                m => last = m,
            }
            want += 1;
        }
        let Meta { refs, header, .. } = meta;
        let (host, n) = refs.allocate(&self.file, header, want)?;
        if n < want {
            last = self.mapping(meta, first + n - 1)?;
        }
        let fresh = meta.note_used(host >> self.geo.cluster_bits, n);
        Ok(Filling { first, n, host, before: (mapping, last), fresh, reserved: false })
    }

    /// Fills new clusters with the bytes of the guest's that begin at `at`, and what was there
    /// before and after them.
    fn fill(&self, f: &Filling, at: u64, from: &Src) -> Result<()> {
        let geo = self.geo;
        let start = f.first << geo.cluster_bits;
        let end = start + (f.n << geo.cluster_bits);
        let mut head = vec![0; (at - start) as usize];
        let mut tail = vec![0; (end - at - from.len()) as usize];
        self.before(f.before.0, start, &mut head)?;
        self.before(f.before.1, at + from.len(), &mut tail)?;
        let blank = |b: &[u8]| f.fresh && super::super::pieces::is_zero(b);
        let mut iov = Vec::with_capacity(from.iov().len() + 2);
        let mut host = f.host;
        let piece =
            |b: &[u8]| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() };
        if blank(&head) {
            host += head.len() as u64;
        } else {
            iov.push(piece(&head));
        }
        iov.extend(from.iov());
        if !tail.is_empty() && !blank(&tail) {
            iov.push(piece(&tail));
        }
        // SAFETY: head, tail and what from borrows live through the call and are only read.
        let whole: Src = unsafe { Pieces::from_raw(iov) };
        self.file.write(host, &whole)
    }

    /// What a guest cluster said before, from `at` on.
    fn before(&self, mapping: Mapping, at: u64, into: &mut [u8]) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        self.read_mapping(mapping, at, &Dst::new(into))
    }

    /// Enters filled clusters into their L2 table, or gives them back if filling them failed.
    fn settle(&self, f: &Filling, filled: Result<()>) -> Result<()> {
        let mut meta = self.lock();
        let meta = &mut *meta;
        let result = match filled {
            Ok(()) => self.link(meta, f),
            // They were never referred to; whatever fails here leaks.
            Err(e) if f.reserved => Err(e),
            Err(e) => {
                let first = f.host >> self.geo.cluster_bits;
                let freed: Result<Vec<u64>> =
                    (first..first + f.n).map(|i| meta.refs.decrement(&self.file, i)).collect();
                Err(freed.err().unwrap_or(e))
            }
        };
        for c in f.first..f.first + f.n {
            meta.busy.remove(&c);
        }
        self.settled.notify_all();
        self.guard(meta, result)
    }

    fn link(&self, meta: &mut Meta, f: &Filling) -> Result<()> {
        let table = self.l2_for_change(meta, f.first)?;
        for i in 0..f.n {
            let entry = (f.host + (i << self.geo.cluster_bits)) | COPIED;
            self.set_entry(meta, table, f.first + i, entry)?;
        }
        Ok(())
    }

    /// Writes; the caller is inside the gate.
    fn write_inside(&self, offset: u64, from: &Src) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let (at, left) = (offset + done, from.len() - done);
            match self.next_step(at, left)? {
                Step::InPlace { host, len } => {
                    self.file.write(host, &from.sub(done, len))?;
                    done += len;
                }
                Step::Fill(f) => {
                    let end = (f.first + f.n) << self.geo.cluster_bits;
                    let len = left.min(end - at);
                    let filled = self.fill(&f, at, &from.sub(done, len));
                    self.settle(&f, filled)?;
                    done += len;
                }
            }
        }
        Ok(())
    }

    /// Whole clusters of a range; the disk's last cluster counts as whole if the range reaches the
    /// end of the disk.
    fn whole_clusters(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let end = offset + len;
        let first = offset.div_ceil(self.geo.cluster());
        let last = if end == self.size() {
            end.div_ceil(self.geo.cluster())
        } else {
            end >> self.geo.cluster_bits
        };
        first..last.max(first)
    }

    /// Makes whole clusters zeros, or as if nothing had been said of them. The caller is alone
    /// inside the gate.
    fn wipe(&self, clusters: std::ops::Range<u64>, how: Wipe) -> Result<()> {
        let mut meta = self.lock();
        let meta = &mut *meta;
        self.must_write(meta)?;
        let mut at = clusters.start;
        while at < clusters.end {
            self.about_to_change(meta)?;
            let r = self.run(meta, at, clusters.end - at);
            let (mapping, n) = self.guard(meta, r)?;
            let new = |i: u64| self.wiped(mapping, i, how);
            if new(0).is_some() {
                let r = self.l2_for_change(meta, at);
                let table = self.guard(meta, r)?;
                for i in 0..n {
                    if let Some(entry) = new(i) {
                        let r = self.set_entry(meta, table, at + i, entry);
                        self.guard(meta, r)?;
                    }
                }
            }
            at += n;
        }
        Ok(())
    }

    /// The new entry of the `i`-th cluster of a run; `None` if it is to stay.
    fn wiped(&self, mapping: Mapping, i: u64, how: Wipe) -> Option<u64> {
        let v3 = self.geo.version >= 3;
        let has_backing = || self.backing.read().unwrap().is_some();
        let nothing = if v3 { ZERO } else { 0 };
        match (mapping, how) {
            (Mapping::Unallocated, Wipe::Forget | Wipe::Discard) => None,
            (Mapping::Unallocated, Wipe::Zero { .. }) => has_backing().then_some(ZERO),
            (_, Wipe::Forget) => Some(0),
            (Mapping::Zero { host: None, .. }, _) => None,
            // Zeros that must keep their room.
            (Mapping::Zero { .. }, Wipe::Zero { unmap: false }) => None,
            (Mapping::Data { host, copied: true }, Wipe::Zero { unmap: false }) => {
                Some((host + (i << self.geo.cluster_bits)) | COPIED | ZERO)
            }
            // Version 2 cannot say zero over a backing image.
            (_, Wipe::Discard) if !v3 && has_backing() => None,
            _ => Some(nothing),
        }
    }

    /// Forgets all clusters from `first` on.
    pub(super) fn drop_from(&self, first: u64) -> Result<()> {
        let _alone = self.gate.alone();
        let end = self.size().div_ceil(self.geo.cluster());
        self.wipe(first..end, Wipe::Forget)?;
        let mut meta = self.lock();
        self.write_back(&mut meta)?;
        self.release(&mut meta)
    }
}

/// How whole clusters are wiped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wipe {
    /// They read as zeros.
    Zero { unmap: bool },
    /// They read as zeros, or as before where the format cannot say that.
    Discard,
    /// They show the backing image.
    Forget,
}

impl BlockWrite for Qcow2 {
    fn write(&self, offset: u64, from: &Src) -> Result<()> {
        self.in_range(offset, from.len())?;
        let _inside = self.gate.enter();
        self.write_inside(offset, from)
    }

    fn flush(&self) -> Result<()> {
        if self.file.writable() { self.flush_all(true) } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.in_range(offset, len)?;
        let end = offset + len;
        let mut whole = self.whole_clusters(offset, len);
        if self.geo.version < 3 && (!unmap || self.backing.read().unwrap().is_some()) {
            whole = whole.start..whole.start;
        }
        let cut = |c: u64| (c << self.geo.cluster_bits).clamp(offset, end);
        let (middle, after) = (cut(whole.start), cut(whole.end.max(whole.start)));
        if !whole.is_empty() {
            let _alone = self.gate.alone();
            self.wipe(whole, Wipe::Zero { unmap })?;
        }
        for (mut at, end) in [(offset, middle), (after.max(middle), end)] {
            while at < end {
                let n = (end - at).min(self.geo.cluster() - self.geo.within(at));
                self.zero_part(at, n)?;
                at += n;
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.in_range(offset, len)?;
        let whole = self.whole_clusters(offset, len);
        if whole.is_empty() {
            return Ok(());
        }
        let _alone = self.gate.alone();
        self.wipe(whole, Wipe::Discard)
    }
}

impl Qcow2 {
    /// Makes a part of one cluster zeros.
    fn zero_part(&self, at: u64, n: u64) -> Result<()> {
        let _inside = self.gate.enter();
        let mapping = self.mapping(&mut self.lock(), at >> self.geo.cluster_bits)?;
        let zero_already = match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => {
                let backing = self.backing.read().unwrap();
                backing.as_ref().is_none_or(|b| b.size() <= at)
            }
            _ => false,
        };
        if zero_already {
            return Ok(());
        }
        self.write_inside(at, &Src::new(&vec![0; n as usize]))
    }
}

impl Compress for Qcow2 {
    fn unit(&self) -> u64 {
        self.geo.cluster()
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.in_range(offset, data.len() as u64)?;
        let cluster = self.geo.cluster();
        let at_end = offset + data.len() as u64 == self.size();
        if self.geo.within(offset) != 0 || (data.len() as u64 != cluster && !at_end) {
            let what = "compressed data is written by whole clusters";
            return Err(Error::Invalid(what.into()));
        }
        let mut whole;
        let mut bytes = data;
        if (data.len() as u64) < cluster {
            whole = data.to_vec();
            whole.resize(cluster as usize, 0);
            bytes = &whole;
        }
        let kind = self.lock().header.compression;
        let Some(packed) = compress(kind, bytes) else {
            return self.write(offset, &Src::new(data));
        };
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        let meta = &mut *meta;
        self.must_write(meta)?;
        self.about_to_change(meta)?;
        let r = self.place_compressed(meta, offset >> self.geo.cluster_bits, &packed);
        self.guard(meta, r)
    }
}

impl Qcow2 {
    fn place_compressed(&self, meta: &mut Meta, cluster: u64, packed: &[u8]) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let table = self.l2_for_change(meta, cluster)?;
        let len = packed.len() as u64;
        // Packed data may straddle clusters that follow each other.
        let host = match meta.packing {
            Some(at) if self.geo.within(at) + len <= self.geo.cluster() => {
                meta.refs.increment(&self.file, at >> bits)?;
                at
            }
            Some(at) => {
                let Meta { refs, header, .. } = &mut *meta;
                let (next, _) = refs.allocate(&self.file, header, 1)?;
                meta.note_used(next >> bits, 1);
                if next == (at & !(self.geo.cluster() - 1)) + self.geo.cluster()
                    && meta.refs.get(&self.file, at >> bits)? < meta.refs.max()
                {
                    meta.refs.increment(&self.file, at >> bits)?;
                    at
                } else {
                    next
                }
            }
            None => {
                let Meta { refs, header, .. } = &mut *meta;
                let (next, _) = refs.allocate(&self.file, header, 1)?;
                meta.note_used(next >> bits, 1);
                next
            }
        };
        self.file.write_bytes(host, packed)?;
        let end = host + len;
        // The next one begins where this one ends, unless nothing is left there or another would
        // overflow the count.
        let open =
            self.geo.within(end) != 0 && meta.refs.get(&self.file, end >> bits)? < meta.refs.max();
        meta.packing = open.then_some(end);
        self.set_entry(meta, table, cluster, self.geo.encode_compressed(host, len))
    }
}
