//! Locks on image files, compatible with QEMU's (its `locking=auto` for files).
//!
//! Open-file-description locks on single bytes far from any that matter to readers of the file.
//! For each permission there are two bytes: one at [`HELD`] that everyone who holds the permission
//! locks *shared*, and one at [`DENIED`] that everyone who denies it to others locks shared. Before
//! going on, one probes that nobody has locked the DENIED byte of a permission one wants, nor the
//! HELD byte of one that one denies. So any number of readers coexist, and a writer excludes other
//! writers.

use super::error::{Error, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

const HELD: i64 = 100;
const DENIED: i64 = 200;

/// Reads see consistent data.
const CONSISTENT_READ: u32 = 1;
/// Writes.
const WRITE: u32 = 1 << 1;
/// Changes of the file's length.
const RESIZE: u32 = 1 << 3;
const PERMISSIONS: u32 = 5;
/// Further attempts, 10 ms apart: whoever has just closed the image may have forked, and its child
/// holds the description until it executes another program.
const PATIENCE: u32 = 5;

/// What a user of an image does and lets others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads; others may read but not write.
    Read,
    /// Writes; others neither write nor read anything that has to be consistent with it, except
    /// readers that deny nothing.
    Write,
    /// Looks without a lock (`--force-share`): what it sees may be in the middle of a change.
    Unlocked,
}

impl Access {
    /// Permissions wanted, and denied to others.
    fn masks(self) -> (u32, u32) {
        match self {
            Access::Read => (CONSISTENT_READ, WRITE | RESIZE),
            Access::Write => (CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE),
            Access::Unlocked => (0, 0),
        }
    }
}

fn range(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: a flock of zeros is valid.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    l.l_start = byte;
    l.l_len = 1;
    l
}

fn set(file: &File, kind: libc::c_int, byte: i64) -> io::Result<()> {
    let l = range(kind, byte);
    // SAFETY: fcntl reads the flock during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &l) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file description has locked `byte`.
fn taken(file: &File, byte: i64) -> io::Result<bool> {
    let mut l = range(libc::F_WRLCK, byte);
    // SAFETY: fcntl reads and writes the flock during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut l) } {
        0 => Ok(l.l_type != libc::F_UNLCK as libc::c_short),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Locks `file` for `access`, replacing what this description had. The locks end with the last
/// descriptor of it. File systems without locks are used without.
pub fn acquire(file: &File, path: &Path, access: Access) -> Result<()> {
    let (want, deny) = access.masks();
    let mut outcome = take(file, want, deny);
    for _ in 0..PATIENCE {
        if !matches!(outcome, Ok(Some(_))) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        outcome = take(file, want, deny);
    }
    if outcome.is_err() || matches!(outcome, Ok(Some(_))) {
        // Nothing is left behind that would keep others out.
        let _ = take(file, 0, 0);
    }
    match outcome {
        Ok(None) => Ok(()),
        Ok(Some(why)) => Err(Error::Locked(format!(
            "image '{}' is {why}; stop that process first, or read it with --force-share \
             where that is offered",
            path.display()
        ))),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS)) => {
            log::debug!("'{}' cannot be locked: {e}", path.display());
            Ok(())
        }
        Err(e) => Err(Error::at("lock", path, e)),
    }
}

/// Takes the locks; returns why others forbid it, if they do.
fn take(file: &File, want: u32, deny: u32) -> io::Result<Option<&'static str>> {
    for i in 0..PERMISSIONS {
        let bit = |mask: u32| if mask & 1 << i != 0 { libc::F_RDLCK } else { libc::F_UNLCK };
        set(file, bit(want), HELD + i64::from(i))?;
        set(file, bit(deny), DENIED + i64::from(i))?;
    }
    for i in 0..PERMISSIONS {
        if want & 1 << i != 0 && taken(file, DENIED + i64::from(i))? {
            return Ok(Some("in use by another process that lets nobody else write to it"));
        }
        if deny & 1 << i != 0 && taken(file, HELD + i64::from(i))? {
            return Ok(Some("being written by another process"));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn readers_coexist_and_a_writer_is_alone() {
        let path = PathBuf::from(format!("/tmp/tandem-lock-{}", std::process::id()));
        let open = || File::options().read(true).append(true).create(true).open(&path).unwrap();
        let (a, b, c) = (open(), open(), open());
        acquire(&a, &path, Access::Read).unwrap();
        acquire(&b, &path, Access::Read).unwrap();
        assert!(matches!(acquire(&c, &path, Access::Write), Err(Error::Locked(_))));
        drop((a, b));
        acquire(&c, &path, Access::Write).unwrap();
        assert!(acquire(&open(), &path, Access::Read).is_err());
        assert!(acquire(&open(), &path, Access::Write).is_err());
        acquire(&open(), &path, Access::Unlocked).unwrap();
        // A refused attempt leaves nothing behind.
        acquire(&c, &path, Access::Read).unwrap();
        acquire(&open(), &path, Access::Read).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
