//! Where machines that have a name are found: a directory of this user's with a socket for each.

use crate::config::monitor::{Endpoint, Mode, Monitor};
use crate::config::{Fault, Serial};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

/// The places of one machine.
pub struct Place {
    dir: PathBuf,
    name: String,
}

/// The directory: `$XDG_RUNTIME_DIR/tandem`, else `/run/user/UID/tandem` or `/tmp/tandem-UID`.
pub fn directory() -> PathBuf {
    // SAFETY: geteuid takes no memory and cannot fail.
    let uid = unsafe { libc::geteuid() };
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        return PathBuf::from(dir).join("tandem");
    }
    let run = PathBuf::from(format!("/run/user/{uid}"));
    match run.is_dir() {
        true => run.join("tandem"),
        false => PathBuf::from(format!("/tmp/tandem-{uid}")),
    }
}

/// The places of the machine `name`; the directory is made if needed.
pub fn place(name: &str) -> Result<Place, Fault> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) || name.starts_with('.') {
        let what = format!("'{name}' is no name for a machine");
        return Err(Fault::new(what, "use up to 64 letters, digits, '-', '_' and '.'"));
    }
    let dir = directory();
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    let cannot = |why: String| {
        Fault::new(format!("'{}' cannot be used: {why}", dir.display()), "set XDG_RUNTIME_DIR")
    };
    made.map_err(|e| cannot(e.to_string()))?;
    let meta = std::fs::symlink_metadata(&dir).map_err(|e| cannot(e.to_string()))?;
    // SAFETY: geteuid takes no memory and cannot fail.
    if !meta.is_dir() || meta.uid() != unsafe { libc::geteuid() } {
        return Err(cannot("it belongs to somebody else".into()));
    }
    Ok(Place { dir, name: name.into() })
}

impl Place {
    /// Path of the QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.dir.join(format!("{}.qmp", self.name))
    }

    /// Path of the serial port's socket.
    pub fn console(&self) -> PathBuf {
        self.dir.join(format!("{}.console", self.name))
    }

    /// The monitor there.
    pub fn monitor(&self) -> Monitor {
        let at = Endpoint::Unix { path: self.qmp(), server: true, wait: false };
        Monitor { mode: Mode::Control, pretty: false, chardev: None, at }
    }

    /// The serial port there.
    pub fn serial(&self) -> Serial {
        Serial::Unix(self.console())
    }
}

/// Names of all machines of this user, whether they still run or not.
pub fn names() -> Vec<String> {
    let entries = std::fs::read_dir(directory()).into_iter().flatten().flatten();
    let mut all: Vec<String> = entries
        .filter_map(|e| Some(e.file_name().to_str()?.strip_suffix(".qmp")?.to_string()))
        .collect();
    all.sort();
    all
}
