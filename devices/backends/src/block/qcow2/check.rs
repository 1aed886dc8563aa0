//! Consistency: counts every reference and compares with the refcounts on disk.

use super::super::error::Result;
use super::super::{Check, CheckReport, Repair};
use super::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::map::{COPIED, Mapping, OFFSET};
use super::snapshot::{entries, read_l1, table_len};
use super::{Meta, Qcow2};
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;

/// Findings beyond this many are counted but not told.
const MAX_FINDINGS: usize = 1000;

/// References counted.
#[derive(Default)]
struct Census {
    counts: HashMap<u64, u64>,
    report: CheckReport,
    /// Clusters that the file has, with a last one that is not whole.
    clusters: u64,
    bits: u32,
    /// Where the data cluster before this one was.
    last_data: Option<u64>,
}

impl Census {
    fn say(&mut self, what: String) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(what);
        }
    }
    fn corrupt(&mut self, what: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR {what}"));
    }
    /// Counts one reference to each cluster of a range of bytes; returns whether the file has them.
    fn refer(&mut self, at: u64, len: u64, what: &str) -> bool {
        let (first, last) = (at >> self.bits, at.saturating_add(len.max(1) - 1) >> self.bits);
        // The file may end in the middle of its last cluster, or just before one that is reserved.
        if last > self.clusters {
            self.corrupt(format!("{what} at {at:#x} lies beyond the end of the file"));
            return false;
        }
        for c in first..=last {
            *self.counts.entry(c).or_insert(0) += 1;
        }
        true
    }
    fn aligned(&mut self, at: u64, what: &str) -> bool {
        let ok = at & ((1 << self.bits) - 1) == 0;
        if !ok {
            self.corrupt(format!("{what} is at {at:#x}, which is no cluster's start"));
        }
        ok
    }
}

impl Qcow2 {
    /// Counts everything that anything refers to.
    fn take_census(&self, meta: &mut Meta) -> Result<Census> {
        let geo = self.geo;
        let mut c = Census {
            clusters: self.file.len()?.div_ceil(geo.cluster()),
            bits: geo.cluster_bits,
            ..Census::default()
        };
        c.refer(0, 1, "the header");
        let l1: Vec<u64> = meta.l1.clone();
        c.report.total_clusters = meta.header.size.div_ceil(geo.cluster());
        self.count_l1(meta, &mut c, &l1, true)?;
        if !l1.is_empty() {
            c.refer(meta.header.l1_offset, l1.len() as u64 * 8, "the L1 table");
        }
        if !meta.snapshots.is_empty() {
            let len = table_len(&meta.snapshots);
            c.refer(meta.header.snapshots_offset, len, "the snapshot table");
        }
        for s in meta.snapshots.clone() {
            let what = format!("the L1 table of snapshot '{}'", s.info.name);
            if s.l1_size > 0 && c.refer(s.l1_offset, u64::from(s.l1_size) * 8, &what) {
                let l1 = read_l1(&self.file, s.l1_offset, s.l1_size)?;
                self.count_l1(meta, &mut c, &l1, false)?;
            }
        }
        self.count_bitmaps(meta, &mut c)?;
        let len = u64::from(meta.header.reftable_clusters) << geo.cluster_bits;
        c.refer(meta.header.reftable_offset, len, "the refcount table");
        for (i, at) in meta.refs.table.clone().into_iter().enumerate() {
            let what = format!("refcount block {i}");
            if at != 0 && c.aligned(at, &what) && c.refer(at, 1, &what) {
                let n = c.counts[&(at >> geo.cluster_bits)];
                if n != 1 {
                    c.corrupt(format!("{what} at {at:#x} is used {n} times"));
                }
            }
        }
        Ok(c)
    }

    fn count_l1(&self, meta: &mut Meta, c: &mut Census, l1: &[u64], active: bool) -> Result<()> {
        for (i, entry) in l1.iter().enumerate() {
            let at = entry & OFFSET;
            let what = format!("L2 table {i}");
            if at == 0 || !c.aligned(at, &what) || !c.refer(at, 1, &what) {
                continue;
            }
            let table = match meta.l2.get(&self.file, at) {
                Ok(t) => t.bytes.clone(),
                Err(e) => {
                    c.report.check_errors += 1;
                    c.say(format!("ERROR {what}: {}", e.chain()));
                    continue;
                }
            };
            // Runs are followed within a table, as qemu-img does.
            c.last_data = None;
            for (j, e) in entries(&table).enumerate() {
                self.count_entry(c, e, (i << self.geo.l2_bits) + j, active);
            }
        }
        Ok(())
    }

    fn count_entry(&self, c: &mut Census, entry: u64, cluster: usize, active: bool) {
        let what = || format!("guest cluster {cluster}");
        let mapping = match self.geo.decode(entry) {
            Ok(m) => m,
            Err(_) => {
                c.corrupt(format!("{} is at {:#x}, unaligned", what(), entry & OFFSET));
                return;
            }
        };
        match mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => {}
            Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } => {
                if c.refer(host, 1, &what()) && active {
                    c.report.allocated_clusters += 1;
                    if c.last_data.is_some_and(|l| l + self.geo.cluster() != host) {
                        c.report.fragmented_clusters += 1;
                    }
                    c.last_data = Some(host);
                }
            }
            Mapping::Compressed { host, len, .. } => {
                if entry & COPIED != 0 {
                    c.corrupt(format!("{} is compressed but says that it is not shared", what()));
                }
                if c.refer(host, len, &what()) && active {
                    c.report.allocated_clusters += 1;
                    c.report.compressed_clusters += 1;
                    // Compressed clusters are never in the file's order.
                    c.report.fragmented_clusters += 1;
                }
            }
        }
    }

    /// Clusters of consistent bitmaps, which we keep but do not understand otherwise.
    fn count_bitmaps(&self, meta: &Meta, c: &mut Census) -> Result<()> {
        let Some((at, len, n)) = meta.header.bitmap_directory() else { return Ok(()) };
        if len > 64 << 20 || !c.refer(at, len, "the bitmap directory") {
            return Ok(());
        }
        let mut raw = vec![0; len as usize];
        self.file.read_bytes(at, &mut raw)?;
        let mut rest = &raw[..];
        for _ in 0..n.min(65535) {
            let Some(fixed) = rest.get(..24) else { break };
            let number = |r: std::ops::Range<usize>| {
                fixed[r].iter().fold(0u64, |v, b| v << 8 | u64::from(*b))
            };
            let (table, entries) = (number(0..8), number(8..12));
            let used = 24 + (number(18..20) + number(20..24)) as usize;
            rest = rest.get(used.next_multiple_of(8)..).unwrap_or_default();
            if entries > 1 << 27 || !c.refer(table, entries * 8, "a bitmap's table") {
                continue;
            }
            for e in read_l1(&self.file, table, entries as u32)? {
                if e & OFFSET != 0 {
                    c.refer(e & OFFSET, 1, "a part of a bitmap");
                }
            }
        }
        Ok(())
    }

    /// Compares the census with the counts, and puts right what may be.
    fn compare(&self, meta: &mut Meta, c: &mut Census, repair: Repair) -> Result<()> {
        let counted = c.counts.keys().max().map_or(0, |m| m + 1);
        c.report.image_end = counted << self.geo.cluster_bits;
        let per = meta.refs.per_block();
        let there = meta.refs.table.iter().enumerate().filter(|(_, o)| **o != 0);
        // Only these: a damaged image may be of any length.
        let mut blocks: BTreeSet<u64> = there.map(|(i, _)| i as u64).collect();
        blocks.extend(c.counts.keys().map(|k| k / per));
        for block in blocks {
            let (at, end) = (block * per, (block + 1) * per);
            for i in at..end {
                let count = meta.refs.get(&self.file, i).unwrap_or(0);
                let right = c.counts.get(&i).copied().unwrap_or(0);
                if count == right {
                    continue;
                }
                let leak = count > right;
                let text = format!("cluster {i} refcount={count} reference={right}");
                let fix = match repair {
                    Repair::None => false,
                    Repair::Leaks => leak,
                    Repair::All => true,
                };
                let what = if leak { "Leaked" } else { "ERROR" };
                c.say(format!("{} {text}", if fix { "Repairing" } else { what }));
                if fix {
                    let Meta { refs, header, .. } = &mut *meta;
                    refs.ensure(&self.file, header, i)?;
                    refs.set(&self.file, i, right.min(refs.max()))?;
                }
                match (leak, fix) {
                    (true, true) => c.report.leaks_fixed += 1,
                    (true, false) => c.report.leaks += 1,
                    (false, true) => c.report.corruptions_fixed += 1,
                    (false, false) => c.report.corruptions += 1,
                }
            }
        }
        Ok(())
    }

    /// Compares COPIED flags of the active tables with the counts.
    fn compare_flags(&self, meta: &mut Meta, c: &mut Census, repair: Repair) -> Result<()> {
        let bits = self.geo.cluster_bits;
        let fix = repair == Repair::All;
        let mut wrong = 0;
        let mut tell = |c: &mut Census, what: String, entry: u64, count: u64| {
            if (count == 1) != (entry & COPIED != 0) {
                wrong += 1;
                let verb = if fix { "Repairing" } else { "ERROR" };
                c.say(format!("{verb} COPIED flag of {what}: entry {entry:#x} refcount {count}"));
            }
        };
        for (i, entry) in meta.l1.clone().into_iter().enumerate() {
            let at = entry & OFFSET;
            if at == 0 || self.geo.within(at) != 0 || at >> bits > c.clusters {
                continue;
            }
            let count = meta.refs.get(&self.file, at >> bits).unwrap_or(0);
            tell(c, format!("L2 table {i}"), entry, count);
            let Ok(table) = meta.l2.get(&self.file, at).map(|t| t.bytes.clone()) else { continue };
            for (j, e) in entries(&table).enumerate() {
                if let Ok(Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. }) =
                    self.geo.decode(e)
                {
                    let count = meta.refs.get(&self.file, host >> bits).unwrap_or(0);
                    tell(c, format!("guest cluster {}", (i << self.geo.l2_bits) + j), e, count);
                }
            }
        }
        if fix {
            c.report.corruptions_fixed += wrong;
            if wrong > 0 {
                self.refresh_flags(meta)?;
            }
        } else {
            c.report.corruptions += wrong;
        }
        Ok(())
    }
}

impl Check for Qcow2 {
    fn check(&self, repair: Repair) -> Result<CheckReport> {
        if self.file.writable() && repair == Repair::None {
            self.flush_all(true)?;
        }
        let _alone = self.gate.alone();
        let mut meta = self.lock();
        let meta = &mut *meta;
        let mut c = self.take_census(meta)?;
        self.compare(meta, &mut c, repair)?;
        self.compare_flags(meta, &mut c, repair)?;
        if repair != Repair::None {
            let sound = c.report.corruptions == 0 && c.report.check_errors == 0;
            let Meta { refs, header, .. } = &mut *meta;
            refs.write_back_to(&self.file, header)?;
            meta.broken &= !sound;
            self.write_back(meta)?;
            self.file.sync()?;
            let marks = match (repair, sound) {
                (Repair::All, true) => INCOMPAT_DIRTY | INCOMPAT_CORRUPT,
                _ => 0,
            };
            if meta.header.incompatible & marks != 0 {
                meta.header.incompatible &= !marks;
                meta.header.write(&self.file)?;
                self.file.sync()?;
            }
            meta.note_tables(&self.geo);
            self.clean.store(true, Ordering::Release);
            if c.report.corruptions_fixed + c.report.leaks_fixed > 0 {
                // What is told in the end is what is left.
                let mut again = self.take_census(meta)?;
                self.compare(meta, &mut again, Repair::None)?;
                c.report.corruptions = again.report.corruptions;
                c.report.leaks = again.report.leaks;
                c.report.image_end = again.report.image_end;
            }
        }
        Ok(c.report)
    }
}
