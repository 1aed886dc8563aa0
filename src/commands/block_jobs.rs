//! Jobs on disks: backup, mirror, commit, stream; and making images.

use super::jobs::JobType;
use crate::machine::Machine;
use crate::machine::block_jobs::{Layers, Made, Start};
use crate::machine::jobs::Wish;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;
use tandem_backends::block::file::HostFile;
use tandem_backends::block::job::{OnError, backup, mirror};
use tandem_backends::block::qcow2::{Compression, CreateOptions};
use tandem_backends::block::{Preallocation, raw::Raw};

crate::choice! {
    /// What is copied at first.
    pub enum MirrorSyncMode {
        /// What the frontmost image holds itself.
        Top = "top",
        /// The whole disk.
        Full = "full",
        /// Nothing: only what changes.
        None = "none",
        /// What a bitmap marks; there are no bitmaps.
        Incremental = "incremental",
        /// What a bitmap marks; there are no bitmaps.
        Bitmap = "bitmap",
    }
    /// What is done about an error.
    pub enum BlockdevOnError {
        /// The job fails.
        Report = "report",
        /// What cannot be copied is left out.
        Ignore = "ignore",
        /// The job pauses if there is no room, and fails otherwise.
        Enospc = "enospc",
        /// The job pauses.
        Stop = "stop",
        /// The same as report.
        Auto = "auto",
    }
    /// When changes reach a mirror's target.
    pub enum MirrorCopyMode {
        /// Some time later.
        Background = "background",
        /// Before the guest is told that they are done.
        WriteBlocking = "write-blocking",
    }
    /// Version of qcow2.
    pub enum BlockdevQcow2Version {
        /// 2 (compat 0.10).
        V2 = "v2",
        /// 3 (compat 1.1).
        V3 = "v3",
    }
    /// How much room is taken in advance.
    pub enum PreallocMode {
        /// None.
        Off = "off",
        /// The tables'.
        Metadata = "metadata",
        /// That of the data, too.
        Falloc = "falloc",
        /// The same, written as zeros.
        Full = "full",
    }
    /// How clusters are compressed.
    pub enum Qcow2CompressionType {
        /// zlib.
        Zlib = "zlib",
        /// zstd.
        Zstd = "zstd",
    }
}

impl From<BlockdevOnError> for OnError {
    fn from(e: BlockdevOnError) -> OnError {
        match e {
            BlockdevOnError::Report | BlockdevOnError::Auto => OnError::Report,
            BlockdevOnError::Ignore => OnError::Ignore,
            BlockdevOnError::Enospc => OnError::Enospc,
            BlockdevOnError::Stop => OnError::Stop,
        }
    }
}

fn policy(all: [Option<BlockdevOnError>; 2]) -> [OnError; 2] {
    all.map(|e| e.map_or(OnError::Report, OnError::from))
}

crate::object! {
    /// A backup.
    pub struct BlockdevBackup {
        /// Name of the job; that of the drive if absent.
        job_id: Option<String>,
        /// The drive or node that is copied.
        device: String,
        /// The node that it is copied to.
        target: String,
        /// What is copied.
        sync: MirrorSyncMode,
        /// Bytes a second, at most; 0: no limit.
        speed: Option<u64>,
        /// Name of a bitmap; there are none.
        bitmap: Option<String>,
        /// Compress what is written; only false is possible.
        compress: Option<bool>,
        /// What is done when the source cannot be read.
        on_source_error: Option<BlockdevOnError>,
        /// What is done when the target cannot be written.
        on_target_error: Option<BlockdevOnError>,
        /// The job ends without being told to.
        auto_finalize: Option<bool>,
        /// The job vanishes without being told to.
        auto_dismiss: Option<bool>,
        /// Accepted: nothing is put between disk and device.
        filter_node_name: Option<String>,
    }
    /// A new qcow2 image.
    pub struct BlockdevCreateOptionsQcow2 {
        /// Name of the node of its file.
        file: String,
        /// Bytes of its disk.
        size: u64,
        /// Version.
        version: Option<BlockdevQcow2Version>,
        /// What it names as the image behind it.
        backing_file: Option<String>,
        /// The format of that.
        backing_fmt: Option<String>,
        /// Bytes of a cluster.
        cluster_size: Option<u64>,
        /// Room that is taken in advance.
        preallocation: Option<PreallocMode>,
        /// Counts are written late.
        lazy_refcounts: Option<bool>,
        /// Bits of a count.
        refcount_bits: Option<u32>,
        /// How clusters are compressed.
        compression_type: Option<Qcow2CompressionType>,
    }
    /// A new file.
    pub struct BlockdevCreateOptionsFile {
        /// Its path.
        filename: PathBuf,
        /// Its bytes.
        size: u64,
        /// Room that is taken in advance.
        preallocation: Option<PreallocMode>,
    }
}

crate::variants! {
    /// A new image.
    pub enum BlockdevCreateOptions by "driver" {
        /// A file.
        File(BlockdevCreateOptionsFile) = "file",
        /// A qcow2 image in a file.
        Qcow2(BlockdevCreateOptionsQcow2) = "qcow2",
    }
}

/// What all jobs are told at their start.
struct Habits {
    job_id: Option<String>,
    speed: Option<u64>,
    policy: [OnError; 2],
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

impl Habits {
    fn start(self, vm: &Machine, kind: JobType, device: &str) -> Result<Start> {
        let id = vm.job_id(self.job_id, device)?;
        let (auto_finalize, auto_dismiss) =
            (self.auto_finalize.unwrap_or(true), self.auto_dismiss.unwrap_or(true));
        let wish = Wish { id, kind, auto_finalize, auto_dismiss };
        Ok(Start { wish, speed: self.speed.unwrap_or(0), policy: self.policy })
    }
}

fn no_bitmaps() -> Error {
    Error::new("there are no dirty bitmaps; use sync=full or sync=top")
}

/// Makes a backup, which is not started.
pub fn make_backup(vm: &mut Machine, b: BlockdevBackup) -> Result<Made> {
    use MirrorSyncMode::*;
    let extent = match b.sync {
        Full => backup::Extent::Full,
        Top => backup::Extent::Top,
        None => backup::Extent::None,
        Incremental | Bitmap => return Err(no_bitmaps()),
    };
    if b.bitmap.is_some() {
        return Err(no_bitmaps());
    }
    if b.compress == Some(true) {
        return Err(Error::new("compress=true is not supported; convert the copy afterwards"));
    }
    let habits = Habits {
        job_id: b.job_id,
        speed: b.speed,
        policy: policy([b.on_source_error, b.on_target_error]),
        auto_finalize: b.auto_finalize,
        auto_dismiss: b.auto_dismiss,
    };
    let start = habits.start(vm, JobType::Backup, &b.device)?;
    vm.make_backup(&b.device, &b.target, extent, start)
}

fn launch(vm: &mut Machine, made: Result<Made>) -> Result<Nothing> {
    let made = made?;
    vm.launch(made);
    Ok(Nothing {})
}

fn one_of(a: Option<String>, b: Option<String>, names: [&str; 2]) -> Result<Option<String>> {
    match (a, b) {
        (Some(_), Some(_)) => {
            let text = format!("'{}' and '{}' are mutually exclusive", names[0], names[1]);
            Err(Error::new(text))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn preallocation(mode: Option<PreallocMode>) -> Preallocation {
    match mode {
        None | Some(PreallocMode::Off) => Preallocation::Off,
        Some(PreallocMode::Metadata) => Preallocation::Metadata,
        Some(PreallocMode::Falloc) => Preallocation::Falloc,
        Some(PreallocMode::Full) => Preallocation::Full,
    }
}

fn create(vm: &mut Machine, job: String, options: BlockdevCreateOptions) -> Result<Nothing> {
    let made = match options {
        BlockdevCreateOptions::File(o) => vm.make_image(job, None, move || {
            let file = HostFile::create(&o.filename)?;
            Raw::create(&file, o.size, preallocation(o.preallocation))
        }),
        BlockdevCreateOptions::Qcow2(o) => {
            let (key, drive) = vm.find_node(&o.file)?;
            vm.must_be_free(&key)?;
            let file: Arc<HostFile> = drive.image().file().clone();
            if drive.read_only() {
                return Err(Error::new(format!("Block node '{key}' is read-only")));
            }
            let d = CreateOptions::default();
            let wanted = CreateOptions {
                size: o.size,
                version: if o.version == Some(BlockdevQcow2Version::V2) { 2 } else { 3 },
                backing_file: o.backing_file,
                backing_format: o.backing_fmt,
                cluster_size: o.cluster_size.unwrap_or(d.cluster_size),
                preallocation: preallocation(o.preallocation),
                lazy_refcounts: o.lazy_refcounts.unwrap_or(false),
                refcount_bits: o.refcount_bits.unwrap_or(d.refcount_bits),
                compression: match o.compression_type {
                    Some(Qcow2CompressionType::Zstd) => Compression::Zstd,
                    _ => Compression::Zlib,
                },
            };
            vm.make_image(job, Some(key), move || wanted.create(&file))
        }
    };
    launch(vm, made)
}

crate::commands! {
    /// Copies a disk as it is now to another node, while the guest goes on.
    fn "blockdev-backup"(cx, [ b: BlockdevBackup ]) -> Nothing {
        let made = make_backup(cx.vm, b);
        launch(cx.vm, made)
    }

    /// Copies a disk to another node, and follows its changes. When the job is completed, the guest
    /// goes on with the copy.
    fn "blockdev-mirror"(cx, {
        /// Name of the job; that of the drive if absent.
        job_id: Option<String>,
        /// The drive or node that is copied.
        device: String,
        /// The node that it is copied to.
        target: String,
        /// What is copied at first.
        sync: MirrorSyncMode,
        /// Bytes a second, at most; 0: no limit.
        speed: Option<u64>,
        /// Bytes that are told apart; a power of two from 512 to 64 MiB.
        granularity: Option<u32>,
        /// Accepted: how much is copied at once follows from the speed.
        buf_size: Option<u64>,
        /// What is done when the source cannot be read.
        on_source_error: Option<BlockdevOnError>,
        /// What is done when the target cannot be written.
        on_target_error: Option<BlockdevOnError>,
        /// Accepted: nothing is put between disk and device.
        filter_node_name: Option<String>,
        /// When changes reach the target.
        copy_mode: Option<MirrorCopyMode>,
        /// The job ends without being told to.
        auto_finalize: Option<bool>,
        /// The job vanishes without being told to.
        auto_dismiss: Option<bool>,
    }) -> Nothing {
        let (_, _) = (buf_size, filter_node_name);
        let policy = policy([on_source_error, on_target_error]);
        let habits = Habits { job_id, speed, policy, auto_finalize, auto_dismiss };
        let extent = match sync {
            MirrorSyncMode::Full => Ok(mirror::Extent::Depth(u32::MAX)),
            MirrorSyncMode::Top => Ok(mirror::Extent::Depth(0)),
            MirrorSyncMode::None => Ok(mirror::Extent::None),
            _ => Err(no_bitmaps()),
        };
        let grain = granularity.filter(|g| *g > 0).map(u64::from);
        let grain = match grain {
            Some(g) if !g.is_power_of_two() || !(512..=64 << 20).contains(&g) => {
                let text = "Parameter 'granularity' expects a power of 2 from 512 to 64 MiB";
                Err(Error::new(text))
            }
            g => Ok(g),
        };
        let made = extent.and_then(|extent| {
            let start = habits.start(cx.vm, JobType::Mirror, &device)?;
            let blocking = copy_mode == Some(MirrorCopyMode::WriteBlocking);
            cx.vm.make_mirror(&device, &target, extent, (grain?, blocking), start)
        });
        launch(cx.vm, made)
    }

    /// Writes what images hold into one behind them. If the frontmost one is among them, the job
    /// follows its changes until it is completed, and the guest goes on with the base.
    fn "block-commit"(cx, {
        /// Name of the job; that of the drive if absent.
        job_id: Option<String>,
        /// The drive or node with the chain.
        device: String,
        /// Node of the image that gets the data; the last one if absent.
        base_node: Option<String>,
        /// The same by its file.
        base: Option<String>,
        /// Node of the frontmost image that is written; the one in use if absent.
        top_node: Option<String>,
        /// The same by its file.
        top: Option<String>,
        /// What the image in front of those names as the one behind it.
        backing_file: Option<String>,
        /// Accepted: the name of a file is its path.
        backing_mask_protocol: Option<bool>,
        /// Bytes a second, at most; 0: no limit.
        speed: Option<u64>,
        /// What is done about errors.
        on_error: Option<BlockdevOnError>,
        /// Accepted: nothing is put between disk and device.
        filter_node_name: Option<String>,
        /// The job ends without being told to.
        auto_finalize: Option<bool>,
        /// The job vanishes without being told to.
        auto_dismiss: Option<bool>,
    }) -> Nothing {
        let (_, _) = (filter_node_name, backing_mask_protocol);
        let policy = policy([on_error, on_error]);
        let habits = Habits { job_id, speed, policy, auto_finalize, auto_dismiss };
        let made = one_of(base_node, base, ["base-node", "base"]).and_then(|base| {
            let top = one_of(top_node, top, ["top-node", "top"])?;
            let start = habits.start(cx.vm, JobType::Commit, &device)?;
            cx.vm.make_commit(&device, Layers { top, base, backing_file }, start)
        });
        launch(cx.vm, made)
    }

    /// Writes what images behind the frontmost one hold into that, so that they are not needed.
    fn "block-stream"(cx, {
        /// Name of the job; that of the drive if absent.
        job_id: Option<String>,
        /// The drive or node with the chain.
        device: String,
        /// Path of the image that stays behind; none if absent.
        base: Option<String>,
        /// The same by its node.
        base_node: Option<String>,
        /// What the frontmost image names as the one behind it.
        backing_file: Option<String>,
        /// Accepted: the name of a file is its path.
        backing_mask_protocol: Option<bool>,
        /// Bytes a second, at most; 0: no limit.
        speed: Option<u64>,
        /// What is done about errors.
        on_error: Option<BlockdevOnError>,
        /// Accepted: nothing is put between disk and device.
        filter_node_name: Option<String>,
        /// The job ends without being told to.
        auto_finalize: Option<bool>,
        /// The job vanishes without being told to.
        auto_dismiss: Option<bool>,
    }) -> Nothing {
        let (_, _) = (filter_node_name, backing_mask_protocol);
        let policy = policy([on_error, on_error]);
        let habits = Habits { job_id, speed, policy, auto_finalize, auto_dismiss };
        let made = one_of(base_node, base, ["base-node", "base"]).and_then(|base| {
            let start = habits.start(cx.vm, JobType::Stream, &device)?;
            cx.vm.make_stream(&device, base, backing_file, start)
        });
        launch(cx.vm, made)
    }

    /// Makes an image, by a job that has to be dismissed.
    fn "blockdev-create"(cx, {
        /// Name of the job.
        job_id: String,
        /// The image.
        options: BlockdevCreateOptions,
    }) -> Nothing { create(cx.vm, job_id, options) }
}
