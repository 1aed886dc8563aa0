//! A directory of the host as a 9p server: version 9p2000.L, as Linux's client speaks it.
//!
//! What always holds:
//!
//! * Nothing outside the shared directory is reached: files are held by descriptors (`O_PATH`), each
//!   step goes from one to a name in it without following links, and "above" is remembered rather
//!   than asked of the host. Symbolic links are the client's to follow.
//! * Devices, FIFOs and sockets of the host are seen but never opened.
//! * Files belong to who tandem runs as; the client's wishes about owners are tried, and given up
//!   silently where the host forbids them.
//! * Every message is answered; one that makes no sense with an error. Messages, and the files that
//!   a client holds, are bounded.

mod serve;
mod wire;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use wire::{Qid, Reader, Writer, t};

/// Longest message.
pub const MAX_MESSAGE: usize = 512 << 10;
/// Files that a client holds.
const MAX_FIDS: usize = 65536;
/// Steps of one walk (the protocol's own limit).
const MAX_STEPS: usize = 16;
/// Bytes before a message's contents.
const HEADER: usize = 7;

/// A file below the shared directory.
struct Node {
    fd: OwnedFd,
    /// The directory it was reached from; none for the shared directory itself.
    above: Option<Arc<Node>>,
}

impl Node {
    fn stat(&self) -> Result<Stat, Errno> {
        rustix::fs::fstat(&self.fd)
    }

    /// The entry `name` of this directory.
    fn step(self: &Arc<Self>, name: &[u8]) -> Result<Arc<Node>, Errno> {
        match name {
            b"." => Ok(self.clone()),
            b".." => Ok(self.above.clone().unwrap_or_else(|| self.clone())),
            b"" => Err(Errno::NOENT),
            _ if name.contains(&b'/') || name.contains(&0) => Err(Errno::NOENT),
            _ => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
                Ok(Arc::new(Node { fd, above: Some(self.clone()) }))
            }
        }
    }

    /// A path that leads to this very file.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    fn kind(&self) -> Result<FileType, Errno> {
        Ok(FileType::from_raw_mode(self.stat()?.st_mode))
    }

    /// Opens it; only what holds bytes or names.
    fn open(&self, flags: OFlags) -> Result<File, Errno> {
        match self.kind()? {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat(CWD, self.path(), flags, Mode::empty()).map(File::from)
    }
}

/// What a client holds.
#[derive(Clone)]
struct Fid {
    node: Arc<Node>,
    open: Option<Arc<File>>,
}

/// A shared directory and its client.
pub struct Server {
    root: Arc<Node>,
    read_only: bool,
    device: u64,
    fids: HashMap<u32, Fid>,
    /// Longest message that the client agreed to.
    limit: usize,
}

impl Server {
    /// Shares the directory at `path`.
    pub fn new(path: &Path, read_only: bool) -> std::io::Result<Server> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        let root = Arc::new(Node { fd, above: None });
        let device = root.stat()?.st_dev;
        let limit = MAX_MESSAGE;
        Ok(Server { root, read_only, device, fids: HashMap::new(), limit })
    }

    /// Forgets the client.
    pub fn reset(&mut self) {
        self.fids.clear();
        self.limit = MAX_MESSAGE;
    }

    /// Answers a message. The answer is at most `room` bytes long; `None` if nothing fits or the
    /// message is none.
    pub fn answer(&mut self, message: &[u8], room: usize) -> Option<Vec<u8>> {
        let mut r = Reader::new(message);
        let (size, kind, tag) = (r.u32().ok()?, r.u8().ok()?, r.u16().ok()?);
        let body = message.get(HEADER..size as usize);
        let room = room.min(self.limit);
        let mut w = Writer(vec![0; HEADER]);
        let done = match body {
            // Clients may give no more room than the answer to this very message takes.
            Some(body) if room >= HEADER => {
                self.serve(kind, &mut Reader::new(body), &mut w, room - HEADER)
            }
            _ => Err(Errno::PROTO),
        };
        let kind = match done {
            Ok(()) => kind.wrapping_add(1),
            Err(e) => {
                w.0.truncate(HEADER);
                w.u32(e.raw_os_error() as u32);
                t::LERROR
            }
        };
        if w.0.len() > room {
            return None;
        }
        let len = w.0.len() as u32;
        w.0[..4].copy_from_slice(&len.to_le_bytes());
        w.0[4] = kind;
        w.0[5..7].copy_from_slice(&tag.to_le_bytes());
        Some(w.0)
    }

    fn fid(&self, fid: u32) -> Result<&Fid, Errno> {
        self.fids.get(&fid).ok_or(Errno::BADF)
    }

    fn node(&self, fid: u32) -> Result<Arc<Node>, Errno> {
        self.fid(fid).map(|f| f.node.clone())
    }

    fn file(&self, fid: u32) -> Result<Arc<File>, Errno> {
        self.fid(fid)?.open.clone().ok_or(Errno::BADF)
    }

    /// Gives `fid` a new meaning.
    fn hold(&mut self, fid: u32, node: Arc<Node>, open: Option<File>) -> Result<(), Errno> {
        if self.fids.len() >= MAX_FIDS && !self.fids.contains_key(&fid) {
            return Err(Errno::MFILE);
        }
        self.fids.insert(fid, Fid { node, open: open.map(Arc::new) });
        Ok(())
    }

    fn may_write(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn qid(&self, s: &Stat) -> Qid {
        let kind = match FileType::from_raw_mode(s.st_mode) {
            FileType::Directory => 0x80,
            FileType::Symlink => 0x02,
            _ => 0,
        };
        // What is mounted below may have the same numbers.
        let other = if s.st_dev == self.device { 0 } else { s.st_dev.rotate_right(16) };
        let version = (s.st_mtime as u32) ^ (s.st_mtime_nsec as u32) ^ (s.st_size as u32) << 8;
        Qid { kind, version, path: s.st_ino ^ other }
    }
}

#[cfg(test)]
mod tests;
