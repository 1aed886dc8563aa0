//! Files that commands write into. Commands run on the main loop, which must not wait for somebody
//! at the other end.

use crate::qapi::{Error, Result};
use std::fs::File;
use std::path::Path;
use tandem_backends::fdset;

/// Creates or empties the file at `path`. Refuses what could make its writer wait: FIFOs, terminals
/// and other devices than `/dev/null`'s kind are for `fd:NAME` or a program of their own.
pub fn create(path: &Path) -> Result<File> {
    let cannot = |why: &str| Error::new(format!("'{}': {why}", path.display()));
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = fdset::open(path, flags).map_err(|e| match e.raw_os_error() {
        Some(libc::ENXIO) => cannot("it is a FIFO without a reader; name a file"),
        _ => cannot(&e.to_string()),
    })?;
    let kind = file.metadata().map_err(|e| cannot(&e.to_string()))?.file_type();
    use std::os::unix::fs::FileTypeExt;
    match kind.is_fifo() || kind.is_socket() || std::io::IsTerminal::is_terminal(&file) {
        true => Err(cannot("who reads it could make the machine wait; name a file")),
        false => Ok(file),
    }
}
