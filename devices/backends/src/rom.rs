//! Option ROMs of cards, as the host's packages have them.

use std::io;
use std::path::{Path, PathBuf};

/// Where packages put them.
const DIRECTORIES: [&str; 4] =
    ["/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu", "/usr/share/vgabios"];
/// The longest image that is taken.
const MAX_LEN: u64 = 1 << 20;

/// Where the ROM called `name` is: a path, or the name of a file that a package has installed.
pub fn find(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(name.into());
    }
    DIRECTORIES.iter().map(|d| Path::new(d).join(name)).find(|p| p.is_file())
}

/// Reads a ROM.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let len = std::fs::metadata(path)?.len();
    if len == 0 || len > MAX_LEN {
        return Err(io::Error::other("a ROM has 1 byte to 1 MiB"));
    }
    std::fs::read(path)
}
