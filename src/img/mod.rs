//! `tandem img`: disk images without a machine, with qemu-img's options, output and exit statuses.
//!
//! Every command returns its exit status; what fails is a sentence on standard error and status 1.

mod copy;
mod create;
mod report;

use crate::cli::img::{ImgArgs, ImgCommand, Resize, Snapshot};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_backends::block::open::{self as images, OpenSpec};
use tandem_backends::block::{Error, Image};

/// Why a command failed.
#[derive(Debug)]
pub struct Failure(String);

impl Failure {
    /// The command makes no sense.
    pub fn usage(what: impl Into<String>) -> Failure {
        Failure(what.into())
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        Failure(e.chain())
    }
}

fn open(spec: &OpenSpec) -> Result<Arc<dyn Image>, Error> {
    images::open(spec)
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A number of bytes, with an optional fraction and unit (powers of 1024).
pub fn size(text: &str) -> Result<u64, Failure> {
    let bad = || Failure::usage(format!("'{text}' is not a size; write for example 512M or 10G"));
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).map_err(|_| bad());
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => return Err(bad()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let n: u64 = whole.parse().map_err(|_| bad())?;
    let n = n.checked_mul(1 << shift).ok_or_else(bad)?;
    if fraction.is_empty() {
        return Ok(n);
    }
    let f: f64 = format!("0.{fraction}").parse().map_err(|_| bad())?;
    n.checked_add((f * (1u64 << shift) as f64) as u64).ok_or_else(bad)
}

/// A line that says how far long work is: asked for with -p, or on a terminal when it takes long.
struct Progress {
    total: u64,
    /// Show it from the start.
    always: bool,
    may: bool,
    start: Instant,
    last: Option<Instant>,
}

impl Progress {
    fn new(asked: bool, quiet: bool, total: u64) -> Progress {
        let may = !quiet && (asked || std::io::stderr().is_terminal());
        Progress { total, always: asked, may, start: Instant::now(), last: None }
    }
    fn at(&mut self, done: u64) {
        let patience = Duration::from_secs(if self.always { 0 } else { 1 });
        let recently = self.last.is_some_and(|t| t.elapsed() < Duration::from_millis(100));
        if self.may && !recently && self.start.elapsed() >= patience {
            self.last = Some(Instant::now());
            self.show(done as f64 * 100.0 / self.total.max(1) as f64);
        }
    }
    fn show(&self, percent: f64) {
        let text = format!("    ({percent:.2}/100%)\r");
        // With -p programs read it, where qemu-img writes it.
        let _ = match self.always {
            true => std::io::stdout()
                .write_all(text.as_bytes())
                .and_then(|()| std::io::stdout().flush()),
            false => std::io::stderr().write_all(text.as_bytes()),
        };
    }
    fn finish(&self) {
        if self.may && (self.always || self.last.is_some()) {
            self.show(100.0);
            if self.always { println!() } else { eprintln!() }
        }
    }
}

/// Runs a command.
pub fn run(args: &ImgArgs) -> ExitCode {
    // Whoever reads the output may have had enough of it.
    // SAFETY: the default action needs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let outcome = match &args.command {
        ImgCommand::Create(a) => create::create(a),
        ImgCommand::Info(a) => report::info(a),
        ImgCommand::Check(a) => report::check(a),
        ImgCommand::Convert(a) => copy::convert(a),
        ImgCommand::Resize(a) => resize(a),
        ImgCommand::Rebase(a) => copy::rebase(a),
        ImgCommand::Commit(a) => copy::commit(a),
        ImgCommand::Snapshot(a) => snapshot(a),
        ImgCommand::Compare(a) => Ok(copy::compare(a)),
        ImgCommand::Map(a) => report::map(a),
    };
    match outcome {
        Ok(status) => status.into(),
        Err(Failure(what)) => {
            crate::log::error(&what);
            1.into()
        }
    }
}

fn resize(a: &Resize) -> Result<u8, Failure> {
    let how = create::preallocation(&a.preallocation)?;
    let spec = OpenSpec { format: a.format.clone(), ..OpenSpec::write(&a.file) };
    let image = open(&spec)?;
    let old = image.size();
    let wanted = match a.size.split_at_checked(1) {
        Some(("+", by)) => old.checked_add(size(by)?),
        Some(("-", by)) => old.checked_sub(size(by)?),
        _ => Some(size(&a.size)?),
    };
    let Some(wanted) = wanted.and_then(|n| n.checked_next_multiple_of(512)) else {
        return Err(Failure::usage(format!("a disk of {old} bytes cannot change by {}", a.size)));
    };
    if wanted < old && !a.shrink {
        return Err(Failure::usage(
            "making the image smaller loses what is cut off; add --shrink if that is meant",
        ));
    }
    if wanted < old && how != tandem_backends::block::Preallocation::Off {
        return Err(Failure::usage("an image that becomes smaller cannot be preallocated"));
    }
    let r = image.resizable().ok_or(Error::ReadOnly)?;
    r.resize(wanted, how)?;
    if !a.quiet {
        println!("Image resized.");
    }
    Ok(0)
}

fn snapshot(a: &Snapshot) -> Result<u8, Failure> {
    let changes = a.create.is_some() || a.apply.is_some() || a.delete.is_some();
    let spec = OpenSpec {
        format: a.source.format.clone(),
        force_share: a.source.force_share && !changes,
        write: changes,
        ..OpenSpec::read(&a.source.file)
    };
    let image = open(&spec)?;
    let Some(snapshots) = image.snapshots() else {
        let format = image.describe().format;
        return Err(Failure::usage(format!("format {format} holds no snapshots; use qcow2")));
    };
    if let Some(name) = &a.create {
        snapshots.create(name)?;
    } else if let Some(which) = &a.apply {
        snapshots.apply(which)?;
    } else if let Some(which) = &a.delete {
        snapshots.delete(which)?;
    } else {
        let list = snapshots.list();
        if !list.is_empty() && !a.quiet {
            print!("Snapshot list:\n{}", report::snapshot_table(&list));
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_qemus_spelling() {
        for (text, n) in
            [("512", 512), ("1k", 1024), ("1.5M", 3 << 19), ("0x10", 16), ("2T", 2 << 40)]
        {
            assert_eq!(size(text).ok(), Some(n), "{text}");
        }
        for bad in ["", "x", "-1", "1Q", "99999999E", "1.x"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
