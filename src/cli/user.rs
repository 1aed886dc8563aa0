//! Flags of `tandem user`; those that qemu-x86_64 has may be written as there ([`super::qemu_user`]).

use clap::Args;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use tandem_tcg::log::{self, Items, NAMES};
use tandem_tcg::user::UserOptions;

/// Runs one Linux program by translation; its system calls are the host's.
#[derive(Args, Debug)]
pub struct UserArgs {
    /// Look for the program interpreter and its libraries under this directory first
    #[arg(short = 'L', value_name = "DIR", env = "QEMU_LD_PREFIX")]
    pub prefix: Option<PathBuf>,
    /// What the program sees as its own name
    #[arg(short = '0', value_name = "NAME")]
    pub argv0: Option<OsString>,
    /// Set a variable of the program's environment
    #[arg(short = 'E', value_name = "NAME=VALUE")]
    set: Vec<OsString>,
    /// Remove a variable from the program's environment
    #[arg(short = 'U', value_name = "NAME")]
    unset: Vec<OsString>,
    /// CPU model
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub cpu: String,
    /// Say every system call on standard error
    #[arg(long)]
    pub strace: bool,
    /// Log execution: comma-separated items, as of tandem run
    #[arg(short = 'd', value_name = "ITEMS")]
    log: Option<String>,
    /// File for the log of -d
    #[arg(short = 'D', value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Translate one guest instruction per block
    #[arg(long)]
    one_insn_per_tb: bool,
    /// Write a map of translated code for perf to /tmp/perf-PID.map
    #[arg(long)]
    perfmap: bool,
    /// The program
    #[arg(value_name = "PROGRAM")]
    pub program: OsString,
    /// Its arguments
    #[arg(value_name = "ARGS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

impl UserArgs {
    /// Options of the translator.
    ///
    /// # Errors
    /// A log item that there is not.
    pub fn options(&self) -> Result<UserOptions, String> {
        let mut items = Items::empty();
        for word in self.log.iter().flat_map(|l| l.split(',')) {
            let known = NAMES.iter().find(|(name, ..)| *name == word);
            let (_, item, _) = known.ok_or_else(|| {
                format!("-d {word}: there is no such item; `tandem run -d help` lists them")
            })?;
            items |= *item;
        }
        let log = log::Options { items, file: self.log_file.clone(), filter: Vec::new() };
        Ok(UserOptions {
            one_insn_per_tb: self.one_insn_per_tb,
            code_bytes: 64 << 20,
            log,
            perf_map: self.perfmap,
        })
    }

    /// The program's environment.
    pub fn environment(&self) -> Vec<OsString> {
        let mut all: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
        for word in &self.set {
            let bytes = word.as_bytes();
            let (name, value) = match bytes.iter().position(|&b| b == b'=') {
                Some(at) => (&bytes[..at], &bytes[at + 1..]),
                None => (bytes, &[][..]),
            };
            all.insert(OsString::from_vec(name.into()), OsString::from_vec(value.into()));
        }
        for name in &self.unset {
            all.remove(name);
        }
        let join = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            name
        };
        all.into_iter().map(join).collect()
    }

    /// Where a file of the program's system is.
    pub fn sysroot(&self, file: &Path) -> PathBuf {
        let under = self.prefix.as_ref().map(|p| p.join(file.strip_prefix("/").unwrap_or(file)));
        under.filter(|p| p.exists()).unwrap_or(file.into())
    }

    /// The flags that programs which this one executes are run with, too.
    pub fn passed_on(&self) -> Vec<OsString> {
        let mut all: Vec<OsString> = Vec::new();
        if let Some(p) = &self.prefix {
            all.extend(["-L".into(), p.clone().into_os_string()]);
        }
        all.extend(["--cpu".into(), OsString::from(&self.cpu)]);
        for (on, flag) in [
            (self.strace, "--strace"),
            (self.one_insn_per_tb, "--one-insn-per-tb"),
            (self.perfmap, "--perfmap"),
        ] {
            all.extend(on.then(|| OsString::from(flag)));
        }
        if let Some(l) = &self.log {
            all.extend(["-d".into(), l.into()]);
        }
        all
    }
}
