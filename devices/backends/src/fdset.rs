//! Descriptor sets: files that somebody else has opened for us, under the paths `/dev/fdset/N`
//! (QEMU's `-add-fd`, `add-fd`).
//!
//! What always holds: a set's descriptors are its own; whoever opens its path gets a duplicate of
//! the first one that allows the access wanted. There is one collection for the process, as there
//! is one table of descriptors.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where sets are among paths.
const ROOT: &str = "/dev/fdset/";

/// A descriptor in a set.
#[derive(Debug)]
pub struct Member {
    fd: OwnedFd,
    /// Words of whoever added it.
    pub opaque: Option<String>,
}

impl Member {
    /// Its number.
    pub fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// All sets by number.
pub type Sets = BTreeMap<u64, Vec<Member>>;

static SETS: Mutex<Sets> = Mutex::new(BTreeMap::new());

/// All sets.
pub fn sets() -> MutexGuard<'static, Sets> {
    SETS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds `fd` to a set, or to a new one with the lowest number that is free; returns the numbers of
/// set and descriptor.
pub fn add(fd: OwnedFd, set: Option<u64>, opaque: Option<String>) -> (u64, i32) {
    let mut all = sets();
    let free = || (0..).find(|n| !all.contains_key(n)).unwrap_or(u64::MAX);
    let set = set.unwrap_or_else(free);
    let number = fd.as_raw_fd();
    all.entry(set).or_default().push(Member { fd, opaque });
    (set, number)
}

/// Removes descriptor `number` from a set, or all of it; returns whether it was there.
pub fn remove(set: u64, number: Option<i32>) -> bool {
    let mut all = sets();
    let Some(members) = all.get_mut(&set) else { return false };
    let before = members.len();
    members.retain(|m| number.is_some_and(|n| m.number() != n));
    let gone = members.len() < before;
    if members.is_empty() {
        all.remove(&set);
    }
    gone
}

/// The set that `path` names.
pub fn named(path: &Path) -> Option<u64> {
    path.to_str()?.strip_prefix(ROOT)?.parse().ok()
}

/// Opens `path` with flags of open(2), O_CLOEXEC implied; files that are created get mode 0666 less
/// the umask. Fails with ENOENT or EACCES if `path` names a set that is not there or has nothing
/// for this access.
pub fn open(path: &Path, flags: libc::c_int) -> io::Result<File> {
    let access = flags & libc::O_ACCMODE;
    let Some(set) = named(path) else {
        return OpenOptions::new()
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .create(flags & libc::O_CREAT != 0 && access != libc::O_RDONLY)
            .truncate(flags & libc::O_TRUNC != 0 && access != libc::O_RDONLY)
            .custom_flags(flags & !(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC))
            .open(path);
    };
    let all = sets();
    let none = || io::Error::from_raw_os_error(libc::ENOENT);
    let members = all.get(&set).ok_or_else(none)?;
    let fits = |m: &&Member| {
        // SAFETY: no memory is passed.
        let has = unsafe { libc::fcntl(m.number(), libc::F_GETFL) };
        has >= 0 && (has & libc::O_ACCMODE == access || has & libc::O_ACCMODE == libc::O_RDWR)
    };
    let denied = || io::Error::from_raw_os_error(libc::EACCES);
    let member = members.iter().find(fits).ok_or_else(denied)?;
    let file = File::from(member.fd.try_clone()?);
    drop(all);
    let settable = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT;
    // SAFETY: no memory is passed.
    unsafe {
        let has = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        if libc::fcntl(file.as_raw_fd(), libc::F_SETFL, has | flags & settable) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    if flags & libc::O_TRUNC != 0 && file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_path_gives_what_allows_the_access() {
        let path = std::env::temp_dir().join(format!("tandem-fdset-{}", std::process::id()));
        let writer = File::create(&path).unwrap();
        // A number that no other test takes.
        let (set, first) = add(writer.into(), Some(7001), Some("words".into()));
        let place = format!("{ROOT}{set}");
        let place = Path::new(&place);
        assert_eq!(open(place, libc::O_RDONLY).unwrap_err().raw_os_error(), Some(libc::EACCES));
        open(place, libc::O_WRONLY | libc::O_APPEND).unwrap().write_all(b"kept").unwrap();
        add(File::open(&path).unwrap().into(), Some(set), None);
        let mut text = String::new();
        open(place, libc::O_RDONLY).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
        open(place, libc::O_WRONLY | libc::O_TRUNC).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
        assert!(remove(set, Some(first)) && !remove(set, Some(first)) && remove(set, None));
        assert_eq!(open(place, libc::O_RDONLY).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(named(Path::new("/dev/fdset/x")).is_none());
        std::fs::remove_file(&path).unwrap();
    }
}
