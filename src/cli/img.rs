//! `tandem img`: flags, under qemu-img's names.

use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Flags of `tandem img`.
#[derive(Args, Debug)]
pub struct ImgArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ImgCommand,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

/// What is common to commands that look at one image.
#[derive(Args, Debug)]
pub struct Source {
    /// The image
    pub file: PathBuf,
    /// Its format [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Look at it while somebody else may write to it
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum ImgCommand {
    /// Make a new image
    Create(Create),
    /// Tell about an image
    Info(Info),
    /// Check an image for consistency. Exits with 0 if it is sound, 1 if it could not be checked,
    /// 2 if it is corrupt, 3 if it has leaks only, 63 if its format knows no check
    Check(Check),
    /// Copy an image to another format
    Convert(Convert),
    /// Change the size of the disk in an image
    Resize(Resize),
    /// Put another image behind an image
    Rebase(Rebase),
    /// Write what an image holds into the image behind it
    Commit(Commit),
    /// List, take, apply or delete snapshots inside an image
    Snapshot(Snapshot),
    /// Compare what two images hold. Exits with 0 if it is the same, 1 if not, 2 and more on errors
    Compare(Compare),
    /// Tell where the parts of a disk lie
    Map(Map),
}

#[derive(Args, Debug)]
pub struct Create {
    /// Format
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    pub format: String,
    /// Image behind the new one
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Do not look at the image behind
    #[arg(short = 'u', long = "backing-unsafe")]
    pub unsafe_backing: bool,
    /// Options of the format: cluster_size, compat, refcount_bits, lazy_refcounts,
    /// compression_type, preallocation, backing_file, backing_fmt, size
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The new image
    pub file: PathBuf,
    /// Size of its disk: bytes, or with K, M, G or T
    pub size: Option<String>,
}

#[derive(Args, Debug)]
pub struct Info {
    #[command(flatten)]
    pub source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
    /// Also tell about everything behind it
    #[arg(long)]
    pub backing_chain: bool,
}

#[derive(Args, Debug)]
pub struct Check {
    #[command(flatten)]
    pub source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
    /// Put right: leaks or all
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct Convert {
    /// Format of the sources [default: found out]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub source_format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    pub target_format: String,
    /// Image behind the new one; what the source has from behind it is not copied
    #[arg(short = 'B', long, value_name = "FILE")]
    pub backing: Option<String>,
    /// Format of the image behind
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Compress
    #[arg(short, long)]
    pub compress: bool,
    /// Write into an image that is there
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// That image reads as zeros
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,
    /// Options of the new image
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Runs of zeros of at least this many bytes are left out; 0: none are
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k")]
    pub sparse_size: String,
    /// Copy this snapshot (ID or name) instead of the disk as it is
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Show progress
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Read the sources while somebody else may write to them
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Number of requests side by side; accepted for compatibility
    #[arg(short = 'm', value_name = "N", hide = true)]
    pub coroutines: Option<u32>,
    /// Out of order; accepted for compatibility
    #[arg(short = 'W', hide = true)]
    pub out_of_order: bool,
    /// Sources, one behind the other, and the new image
    #[arg(required = true, num_args = 2.., value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Resize {
    /// Its format [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Prepare the new part: off, metadata, falloc, full
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub preallocation: String,
    /// Allow to make it smaller, which loses what is cut off
    #[arg(long)]
    pub shrink: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub file: PathBuf,
    /// New size, or a difference with + or -
    #[arg(allow_hyphen_values = true)]
    pub size: String,
}

#[derive(Args, Debug)]
pub struct Rebase {
    #[command(flatten)]
    pub source: Source,
    /// The image to put behind; empty for none
    #[arg(short, long, value_name = "FILE")]
    pub backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Only change the name: what the image shows may change
    #[arg(short = 'u', long = "unsafe")]
    pub unsafe_mode: bool,
    /// Show progress
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct Commit {
    /// Its format [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Do not empty the image afterwards
    #[arg(short = 'd')]
    pub keep: bool,
    /// Show progress
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub file: PathBuf,
}

#[derive(Args, Debug)]
#[group(id = "action", multiple = false, args = ["list", "create", "apply", "delete"])]
pub struct Snapshot {
    #[command(flatten)]
    pub source: Source,
    /// List all
    #[arg(short, long)]
    pub list: bool,
    /// Take one
    #[arg(short, long, value_name = "NAME")]
    pub create: Option<String>,
    /// Put the disk back to one (ID or name)
    #[arg(short, long, value_name = "SNAPSHOT")]
    pub apply: Option<String>,
    /// Delete one (ID or name)
    #[arg(short, long, value_name = "SNAPSHOT")]
    pub delete: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct Compare {
    /// Format of the first image [default: found out]
    #[arg(short = 'f', value_name = "FMT")]
    pub first_format: Option<String>,
    /// Format of the second image [default: found out]
    #[arg(short = 'F', value_name = "FMT")]
    pub second_format: Option<String>,
    /// Sizes and allocation must be the same, too
    #[arg(short)]
    pub strict: bool,
    /// Show progress
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Look at them while somebody else may write
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The first image
    pub first: PathBuf,
    /// The second image
    pub second: PathBuf,
}

#[derive(Args, Debug)]
pub struct Map {
    #[command(flatten)]
    pub source: Source,
    /// How to print
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
    /// First byte
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    pub start_offset: String,
    /// Bytes at most
    #[arg(short = 'l', long, value_name = "LENGTH")]
    pub max_length: Option<String>,
}
