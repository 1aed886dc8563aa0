//! Disks: what they are, what they did, their size and limits.

use crate::config;
use crate::machine::Machine;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use std::sync::Arc;
use tandem_backends::block::accounting::Kind;
use tandem_backends::block::drive::Drive;
use tandem_backends::block::throttle::{Limit, Limits};
use tandem_backends::block::{Image, Preallocation};
use tandem_devices::ahci::tray::Tray;

crate::object! {
    /// An image.
    pub struct ImageInfo {
        /// Its file.
        filename: String,
        /// Its format.
        format: String,
        /// Bytes of the disk in it.
        virtual_size: u64,
        /// Bytes that it takes on the host.
        actual_size: Option<u64>,
        /// Unit of allocation.
        cluster_size: Option<u64>,
        /// It was not closed properly.
        dirty_flag: Option<bool>,
        /// What it names as the image behind it.
        backing_filename: Option<String>,
        /// The format of that.
        backing_filename_format: Option<String>,
    }
    /// How writes are cached.
    pub struct BlockdevCacheInfo {
        /// Writes are done when they are in a cache.
        writeback: bool,
        /// The host's page cache is not used.
        direct: bool,
        /// Flushes do nothing.
        no_flush: bool,
    }
    /// A block node in use. Limits are units a second; 0 is none.
    pub struct BlockDeviceInfo {
        /// Its file.
        file: String,
        /// Its name.
        node_name: Option<String>,
        /// It cannot be written.
        ro: bool,
        /// Its driver.
        drv: String,
        /// Images behind it.
        backing_file_depth as "backing_file_depth": i64,
        /// It is encrypted.
        encrypted: bool,
        /// What is done about writes of zeros.
        detect_zeroes as "detect_zeroes": String,
        /// Bytes.
        bps: u64,
        /// Bytes read.
        bps_rd as "bps_rd": u64,
        /// Bytes written.
        bps_wr as "bps_wr": u64,
        /// Requests.
        iops: u64,
        /// Reads.
        iops_rd as "iops_rd": u64,
        /// Writes.
        iops_wr as "iops_wr": u64,
        /// Bytes in a burst.
        bps_max as "bps_max": Option<u64>,
        /// Bytes read in a burst.
        bps_rd_max as "bps_rd_max": Option<u64>,
        /// Bytes written in a burst.
        bps_wr_max as "bps_wr_max": Option<u64>,
        /// Requests in a burst.
        iops_max as "iops_max": Option<u64>,
        /// Reads in a burst.
        iops_rd_max as "iops_rd_max": Option<u64>,
        /// Writes in a burst.
        iops_wr_max as "iops_wr_max": Option<u64>,
        /// Bytes that count as one request.
        iops_size as "iops_size": Option<u64>,
        /// How writes are cached.
        cache: BlockdevCacheInfo,
        /// The write threshold; 0 is none.
        write_threshold as "write_threshold": i64,
        /// The image.
        image: ImageInfo,
    }
    /// A disk of the machine.
    pub struct BlockInfo {
        /// Name of the drive, if it was made by `-drive`.
        device: String,
        /// The device that the guest sees.
        qdev: Option<String>,
        /// Kind of the device.
        r#type: String,
        /// The medium can be taken out.
        removable: bool,
        /// The guest has locked the tray.
        locked: bool,
        /// The tray is open, if there is one.
        tray_open as "tray_open": Option<bool>,
        /// Whether requests succeed.
        io_status: Option<String>,
        /// The medium.
        inserted: Option<BlockDeviceInfo>,
    }
    /// What was done.
    pub struct BlockDeviceStats {
        /// Bytes read.
        rd_bytes as "rd_bytes": u64,
        /// Bytes written.
        wr_bytes as "wr_bytes": u64,
        /// Bytes given up.
        unmap_bytes as "unmap_bytes": u64,
        /// Reads.
        rd_operations as "rd_operations": u64,
        /// Writes.
        wr_operations as "wr_operations": u64,
        /// Flushes.
        flush_operations as "flush_operations": u64,
        /// Discards.
        unmap_operations as "unmap_operations": u64,
        /// Nanoseconds of all reads.
        rd_total_time_ns as "rd_total_time_ns": u64,
        /// Nanoseconds of all writes.
        wr_total_time_ns as "wr_total_time_ns": u64,
        /// Nanoseconds of all flushes.
        flush_total_time_ns as "flush_total_time_ns": u64,
        /// Nanoseconds of all discards.
        unmap_total_time_ns as "unmap_total_time_ns": u64,
        /// End of the write farthest behind.
        wr_highest_offset as "wr_highest_offset": u64,
        /// Reads that failed.
        failed_rd_operations as "failed_rd_operations": u64,
        /// Writes that failed.
        failed_wr_operations as "failed_wr_operations": u64,
        /// Flushes that failed.
        failed_flush_operations as "failed_flush_operations": u64,
        /// Discards that failed.
        failed_unmap_operations as "failed_unmap_operations": u64,
    }
    /// What was done with a disk or node.
    pub struct BlockStats {
        /// Name of the drive.
        device: Option<String>,
        /// The device that the guest sees.
        qdev: Option<String>,
        /// Name of the node.
        node_name: Option<String>,
        /// The counts.
        stats: BlockDeviceStats,
    }
}

/// A drive with the names under which it is known.
struct Disk<'a> {
    name: String,
    config: Option<&'a config::Drive>,
    /// The device that uses it.
    qdev: Option<String>,
    drive: Arc<Drive>,
}

fn disks(vm: &Machine) -> Vec<Disk<'_>> {
    let c = vm.config();
    let configured =
        |name: &str| c.drives.iter().enumerate().find(|(i, d)| d.name(*i) == name).map(|(_, d)| d);
    let qdev = |name: &str| {
        let uses = |d: &&config::Device| d.props.iter().any(|(k, v)| k == "drive" && v == name);
        let device = c.devices.iter().find(uses)?;
        let (_, id) = device.props.iter().find(|(k, _)| k == "id")?;
        // The disk of a virtio device is a child of its PCI function.
        let inner = if device.driver.starts_with("virtio-blk") { "/virtio-backend" } else { "" };
        Some(format!("/machine/peripheral/{id}{inner}"))
    };
    let one = |(name, drive): (String, Arc<Drive>)| Disk {
        config: configured(&name),
        qdev: qdev(&name),
        name,
        drive,
    };
    vm.drives().into_iter().map(one).collect()
}

impl Disk<'_> {
    /// Whether its medium can be taken out, as far as the machine's definition says.
    fn is_removable(&self) -> bool {
        self.config.is_some_and(|d| d.media == config::Media::Cdrom)
    }

    /// Whether it is a node of `-blockdev`, which has no drive's name.
    fn is_node(&self) -> bool {
        self.config.is_some_and(config::Drive::is_node)
    }

    /// Name of the node in it.
    fn node(&self) -> String {
        self.config.and_then(|d| d.node.clone()).unwrap_or_else(|| self.name.clone())
    }

    fn device(&self) -> String {
        if self.is_node() { String::new() } else { self.name.clone() }
    }

    fn info(&self, node: Option<&str>) -> BlockDeviceInfo {
        let image = self.drive.image();
        let (options, limits) = (self.drive.options(), self.drive.limits());
        let avg = |l: Limit| l.avg as u64;
        let max = |l: Limit| Some(l.max as u64).filter(|m| *m > 0);
        let protocol = node.is_some() || self.config.is_some_and(|d| d.protocol);
        let drv = if protocol { "file" } else { image.describe().format };
        let image = &image;
        BlockDeviceInfo {
            file: image.path().display().to_string(),
            node_name: Some(node.map_or_else(|| self.node(), str::to_string)),
            ro: self.drive.read_only(),
            drv: drv.into(),
            backing_file_depth: depth(&**image),
            encrypted: false,
            detect_zeroes: self
                .config
                .and_then(|d| d.detect_zeroes.clone())
                .unwrap_or_else(|| "off".into()),
            bps: avg(limits.bps),
            bps_rd: avg(limits.bps_rd),
            bps_wr: avg(limits.bps_wr),
            iops: avg(limits.iops),
            iops_rd: avg(limits.iops_rd),
            iops_wr: avg(limits.iops_wr),
            bps_max: max(limits.bps),
            bps_rd_max: max(limits.bps_rd),
            bps_wr_max: max(limits.bps_wr),
            iops_max: max(limits.iops),
            iops_rd_max: max(limits.iops_rd),
            iops_wr_max: max(limits.iops_wr),
            iops_size: Some(limits.iops_size).filter(|n| *n > 0),
            cache: BlockdevCacheInfo {
                writeback: self.drive.writeback(),
                direct: options.cache.direct,
                no_flush: options.cache.no_flush,
            },
            write_threshold: 0,
            image: image_info(&**image, drv),
        }
    }

    fn stats(&self) -> BlockDeviceStats {
        let a = self.drive.accounting();
        let [rd, wr, flush, unmap] =
            [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard].map(|k| a.counts(k));
        BlockDeviceStats {
            rd_bytes: rd.bytes,
            wr_bytes: wr.bytes,
            unmap_bytes: unmap.bytes,
            rd_operations: rd.done,
            wr_operations: wr.done,
            flush_operations: flush.done,
            unmap_operations: unmap.done,
            rd_total_time_ns: rd.nanos,
            wr_total_time_ns: wr.nanos,
            flush_total_time_ns: flush.nanos,
            unmap_total_time_ns: unmap.nanos,
            wr_highest_offset: a.highest_write(),
            failed_rd_operations: rd.failed,
            failed_wr_operations: wr.failed,
            failed_flush_operations: flush.failed,
            failed_unmap_operations: unmap.failed,
        }
    }
}

fn depth(image: &dyn Image) -> i64 {
    let behind = image.layered().and_then(|l| l.backing());
    behind.map_or(0, |b| 1 + depth(&*b))
}

fn image_info(image: &dyn Image, format: &str) -> ImageInfo {
    let d = image.describe();
    let (backing, backing_format) = image.layered().map(|l| l.backing_name()).unwrap_or_default();
    ImageInfo {
        filename: image.path().display().to_string(),
        format: format.into(),
        virtual_size: image.size(),
        actual_size: image.file().allocated().ok(),
        cluster_size: d.cluster_size,
        dirty_flag: d.qcow2.is_some().then_some(d.dirty),
        backing_filename: backing,
        backing_filename_format: backing_format,
    }
}

fn query_block(vm: &Machine) -> Vec<BlockInfo> {
    let one = |d: &Disk<'_>| BlockInfo {
        device: d.device(),
        qdev: d.qdev.clone(),
        r#type: "unknown".into(),
        removable: d.is_removable(),
        locked: false,
        tray_open: None,
        io_status: Some("ok".into()),
        inserted: Some(d.info(None)),
    };
    let (all, trays) = (disks(vm), vm.trays());
    let in_tray = |d: &Disk<'_>| trays.iter().any(|t| t.medium().as_ref() == Some(&d.name));
    // Nodes are disks when a device uses them.
    let fixed = all.iter().filter(|d| (!d.is_node() || d.qdev.is_some()) && !in_tray(d));
    let tray = |t: &Arc<Tray>| {
        let medium = all.iter().find(|d| t.medium().as_ref() == Some(&d.name));
        let node = vm.config().drives.iter().any(|d| d.is_node() && d.name(0) == t.slot);
        BlockInfo {
            device: if node { String::new() } else { t.slot.clone() },
            qdev: Some(&t.id).filter(|i| !i.is_empty()).map(|i| format!("/machine/peripheral/{i}")),
            r#type: "unknown".into(),
            removable: true,
            locked: t.is_locked(),
            tray_open: Some(t.is_open()),
            io_status: Some("ok".into()),
            inserted: medium.map(|d| d.info(None)),
        }
    };
    fixed.map(one).chain(trays.iter().map(tray)).collect()
}

fn nodes(vm: &Machine) -> Vec<BlockDeviceInfo> {
    let mut all = Vec::new();
    for d in disks(vm) {
        all.push(d.info(None));
        if let Some(file) = d.config.and_then(|c| c.file_node.as_deref()) {
            all.push(d.info(Some(file)));
        }
    }
    all
}

fn stats(vm: &Machine, by_node: bool) -> Vec<BlockStats> {
    let mut all = Vec::new();
    for d in disks(vm).into_iter().filter(|d| by_node || !d.is_node() || d.qdev.is_some()) {
        let stats = d.stats();
        if by_node {
            let names = [Some(d.node()), d.config.and_then(|c| c.file_node.clone())];
            for node_name in names.into_iter().flatten() {
                let stats = stats.clone();
                let node_name = Some(node_name);
                all.push(BlockStats { device: None, qdev: None, node_name, stats });
            }
        } else {
            let (device, qdev) = (Some(d.device()), d.qdev.clone());
            let node_name = Some(d.node());
            all.push(BlockStats { device, qdev, node_name, stats });
        }
    }
    all
}

/// The disk that a client means by a drive's name, a node's name or a device.
fn find<'a>(
    vm: &'a Machine,
    device: Option<&str>,
    id: Option<&str>,
    node: Option<&str>,
) -> Result<Disk<'a>> {
    let wanted = [device, id, node].into_iter().flatten().next();
    let Some(wanted) = wanted else {
        return Err(Error::new("name a device, id or node-name"));
    };
    let fits = |d: &Disk<'_>| {
        let by_node =
            |n: &str| d.node() == n || d.config.is_some_and(|c| c.file_node.as_deref() == Some(n));
        let by_id = |i: &str| {
            d.qdev.as_deref().is_some_and(|q| {
                q == i || q.trim_end_matches("/virtio-backend").rsplit('/').next() == Some(i)
            })
        };
        device.is_none_or(|n| d.name == n) && id.is_none_or(by_id) && node.is_none_or(by_node)
    };
    let found = disks(vm).into_iter().find(fits);
    found.ok_or_else(|| Error::no_device(format!("Cannot find device or node '{wanted}'")))
}

fn resize(d: &Disk<'_>, size: u64) -> Result<Nothing> {
    if !size.is_multiple_of(512) {
        return Err(Error::new("Parameter 'size' expects a multiple of 512"));
    }
    let no = || Error::new(format!("the image of '{}' cannot be resized", d.name));
    let image = d.drive.image();
    let resizable = image.resizable().filter(|_| !d.drive.read_only()).ok_or_else(no)?;
    resizable.resize(size, Preallocation::Off).map_err(|e| Error::new(e.chain()))?;
    d.drive.tell_resized();
    Ok(Nothing {})
}

crate::object! {
    /// Limits of a disk. Units a second; 0 is none.
    struct Throttle {
        /// Name of the drive.
        device: Option<String>,
        /// The device that the guest sees.
        id: Option<String>,
        /// Bytes.
        bps: u64,
        /// Bytes read.
        bps_rd as "bps_rd": u64,
        /// Bytes written.
        bps_wr as "bps_wr": u64,
        /// Requests.
        iops: u64,
        /// Reads.
        iops_rd as "iops_rd": u64,
        /// Writes.
        iops_wr as "iops_wr": u64,
        /// Bytes in a burst.
        bps_max as "bps_max": Option<u64>,
        /// Bytes read in a burst.
        bps_rd_max as "bps_rd_max": Option<u64>,
        /// Bytes written in a burst.
        bps_wr_max as "bps_wr_max": Option<u64>,
        /// Requests in a burst.
        iops_max as "iops_max": Option<u64>,
        /// Reads in a burst.
        iops_rd_max as "iops_rd_max": Option<u64>,
        /// Writes in a burst.
        iops_wr_max as "iops_wr_max": Option<u64>,
        /// Seconds that a burst of bytes may last.
        bps_max_length as "bps_max_length": Option<u64>,
        /// Seconds that a burst of bytes read may last.
        bps_rd_max_length as "bps_rd_max_length": Option<u64>,
        /// Seconds that a burst of bytes written may last.
        bps_wr_max_length as "bps_wr_max_length": Option<u64>,
        /// Seconds that a burst of requests may last.
        iops_max_length as "iops_max_length": Option<u64>,
        /// Seconds that a burst of reads may last.
        iops_rd_max_length as "iops_rd_max_length": Option<u64>,
        /// Seconds that a burst of writes may last.
        iops_wr_max_length as "iops_wr_max_length": Option<u64>,
        /// Bytes that count as one request.
        iops_size as "iops_size": Option<u64>,
        /// A group that shares the limits; there are none but the disk itself.
        group: Option<String>,
    }
}

fn throttle(vm: &Machine, t: Throttle) -> Result<Nothing> {
    let d = find(vm, t.device.as_deref(), t.id.as_deref(), None)?;
    let limit = |what: &str, avg: u64, max: Option<u64>, length: Option<u64>| {
        let (max, length) = (max.unwrap_or(0), length.unwrap_or(1).max(1));
        match max > 0 && max < avg.max(1) {
            true => Err(Error::new(format!("{what}_max must not be below {what}"))),
            false => Ok(Limit { avg: avg as f64, max: max as f64, length: length as f64 }),
        }
    };
    let (total, each) = ("total and read or write limits exclude each other", |a: u64, b, c| {
        a > 0 && (b > 0 || c > 0)
    });
    if each(t.bps, t.bps_rd, t.bps_wr) || each(t.iops, t.iops_rd, t.iops_wr) {
        return Err(Error::new(total));
    }
    d.drive.set_limits(Limits {
        bps: limit("bps", t.bps, t.bps_max, t.bps_max_length)?,
        bps_rd: limit("bps_rd", t.bps_rd, t.bps_rd_max, t.bps_rd_max_length)?,
        bps_wr: limit("bps_wr", t.bps_wr, t.bps_wr_max, t.bps_wr_max_length)?,
        iops: limit("iops", t.iops, t.iops_max, t.iops_max_length)?,
        iops_rd: limit("iops_rd", t.iops_rd, t.iops_rd_max, t.iops_rd_max_length)?,
        iops_wr: limit("iops_wr", t.iops_wr, t.iops_wr_max, t.iops_wr_max_length)?,
        iops_size: t.iops_size.unwrap_or(0),
    });
    Ok(Nothing {})
}

crate::commands! {
    /// Lists the disks.
    fn "query-block"(cx) -> Vec<BlockInfo> { Ok(query_block(cx.vm)) }

    /// Lists the block nodes that disks use.
    fn "query-named-block-nodes"(cx, {
        /// Leave images behind images out; they are not nodes here in any case.
        flat: Option<bool>,
    }) -> Vec<BlockDeviceInfo> {
        let _ = flat;
        Ok(nodes(cx.vm))
    }

    /// Tells what was done with disks.
    fn "query-blockstats"(cx, {
        /// By nodes instead of disks.
        query_nodes: Option<bool>,
    }) -> Vec<BlockStats> { Ok(stats(cx.vm, query_nodes == Some(true))) }

    /// Changes the size of a disk while the guest runs.
    fn "block_resize"(cx, {
        /// Name of the drive.
        device: Option<String>,
        /// Name of the node.
        node_name: Option<String>,
        /// New size in bytes.
        size: u64,
    }) -> Nothing { resize(&find(cx.vm, device.as_deref(), None, node_name.as_deref())?, size) }

    /// Sets the limits of a disk.
    fn "block_set_io_throttle"(cx, [ limits: Throttle ]) -> Nothing { throttle(cx.vm, limits) }
}
