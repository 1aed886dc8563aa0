//! `tandem nbd`: flags, under qemu-nbd's names.

use clap::Args;
use clap::builder::PossibleValuesParser;
use std::path::PathBuf;

/// Flags of `tandem nbd`.
#[derive(Args, Debug)]
pub struct NbdArgs {
    /// TCP port to listen at
    #[arg(short, long, default_value_t = 10809)]
    pub port: u16,
    /// Address to listen at
    #[arg(short, long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    pub bind: String,
    /// Unix socket to listen at, instead of TCP
    #[arg(short = 'k', long, value_name = "PATH", conflicts_with_all = ["port", "bind"])]
    pub socket: Option<PathBuf>,
    /// Clients at once, at most; 0: any number
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 1)]
    pub shared: usize,
    /// Go on when the last client has left
    #[arg(short = 't', long)]
    pub persistent: bool,
    /// Name of the export
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    pub export_name: String,
    /// Words about the export
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// First byte of the disk to export: bytes, or with k, M, G or T
    #[arg(short, long, default_value = "0")]
    pub offset: String,
    /// Let clients ask how many images lie in front of the one that data comes from
    #[arg(short = 'A', long)]
    pub allocation_depth: bool,
    /// Run in the background; this process ends when clients can connect
    #[arg(long)]
    pub fork: bool,
    /// File for the process ID of the server
    #[arg(long, value_name = "PATH")]
    pub pid_file: Option<PathBuf>,
    /// Format of the image [default: found out]
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Clients cannot write
    #[arg(short, long)]
    pub read_only: bool,
    /// What clients write is thrown away in the end
    #[arg(short, long)]
    pub snapshot: bool,
    /// Export this snapshot (ID or name) inside the image instead of the disk as it is, read-only
    #[arg(short = 'l', long, value_name = "SNAPSHOT", conflicts_with = "snapshot")]
    pub load_snapshot: Option<String>,
    /// Past the host's page cache: --cache none
    #[arg(short, long, conflicts_with = "cache")]
    pub nocache: bool,
    /// Cache mode
    #[arg(long, value_name = "MODE", default_value = "writeback",
        value_parser = PossibleValuesParser::new(
            ["writeback", "none", "writethrough", "directsync", "unsafe"]))]
    pub cache: String,
    /// Who works on requests
    #[arg(long, value_name = "MODE", default_value = "threads",
        value_parser = PossibleValuesParser::new(["threads", "io_uring"]))]
    pub aio: String,
    /// Whether trimming makes holes in the image
    #[arg(long, value_name = "MODE", default_value = "ignore",
        value_parser = PossibleValuesParser::new(["ignore", "off", "unmap", "on"]))]
    pub discard: String,
    /// What is done about writes of zeros
    #[arg(long, value_name = "MODE", default_value = "off",
        value_parser = PossibleValuesParser::new(["off", "on", "unmap"]))]
    pub detect_zeroes: String,
    /// The image
    pub file: PathBuf,
}
