//! The messages, one by one.

use super::*;
use rustix::fs::{
    Gid, RawDir, RenameFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;

/// Flags of opening (Linux's generic values, as the protocol has them).
mod open_flag {
    pub const ACCESS: u32 = 3;
    pub const EXCL: u32 = 0o200;
    pub const TRUNC: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
}

/// What is to be set.
mod attr {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 16;
    pub const MTIME: u32 = 32;
    pub const ATIME_SET: u32 = 128;
    pub const MTIME_SET: u32 = 256;
}

/// Attributes that are always given: all but birth time, generation and data version.
const BASIC: u64 = 0x7ff;
/// Flag of unlinking: a directory.
const REMOVEDIR: u32 = 0x200;
/// Longest target of a symbolic link.
const MAX_TARGET: usize = 4096;

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

fn ignore_forbidden(r: Result<(), Errno>) -> Result<(), Errno> {
    match r {
        Err(Errno::PERM) => Ok(()),
        r => r,
    }
}

impl Server {
    /// Carries a message out and writes the answer's contents, at most `room` bytes.
    pub(super) fn serve(
        &mut self,
        kind: u8,
        r: &mut Reader<'_>,
        w: &mut Writer,
        room: usize,
    ) -> Result<(), Errno> {
        match kind {
            t::VERSION => self.version(r, w),
            t::ATTACH => {
                let fid = r.u32()?;
                let root = self.root.clone();
                w.qid(self.qid(&root.stat()?));
                self.hold(fid, root, None)
            }
            t::WALK => self.walk(r, w),
            t::CLUNK => {
                let fid = r.u32()?;
                self.fids.remove(&fid).map(|_| ()).ok_or(Errno::BADF)
            }
            // The client has a newer message for it; the fid is gone all the same.
            t::REMOVE => {
                let fid = r.u32()?;
                self.fids.remove(&fid);
                Err(Errno::OPNOTSUPP)
            }
            // Messages are answered one after the other: there is nothing left to be flushed.
            t::FLUSH => Ok(()),
            t::LOPEN | t::READ | t::WRITE | t::FSYNC | t::LOCK | t::GETLOCK => {
                self.serve_file(kind, r, w, room)
            }
            t::GETATTR => self.getattr(r, w),
            t::SETATTR => self.setattr(r),
            t::STATFS => self.statfs(r, w),
            t::READDIR => self.readdir(r, w, room),
            t::READLINK => {
                let node = self.node(r.u32()?)?;
                let target = rustix::fs::readlinkat(&node.fd, "", Vec::new())?;
                w.text(target.to_bytes());
                Ok(())
            }
            t::LCREATE | t::SYMLINK | t::MKNOD | t::LINK | t::MKDIR | t::RENAMEAT | t::UNLINKAT => {
                self.may_write()?;
                self.serve_names(kind, r, w)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn version(&mut self, r: &mut Reader<'_>, w: &mut Writer) -> Result<(), Errno> {
        let (limit, version) = (r.u32()? as usize, r.text()?);
        self.reset();
        if limit < 4096 {
            return Err(Errno::MSGSIZE);
        }
        self.limit = limit.min(MAX_MESSAGE);
        w.u32(self.limit as u32);
        w.text(if version == b"9P2000.L" { version } else { b"unknown" });
        Ok(())
    }

    fn walk(&mut self, r: &mut Reader<'_>, w: &mut Writer) -> Result<(), Errno> {
        let (fid, new, steps) = (r.u32()?, r.u32()?, usize::from(r.u16()?));
        if steps > MAX_STEPS {
            return Err(Errno::PROTO);
        }
        let mut node = self.node(fid)?;
        let mut qids = Vec::new();
        for _ in 0..steps {
            let name = r.text()?;
            let stepped = node.step(name).and_then(|n| Ok((self.qid(&n.stat()?), n)));
            match stepped {
                Ok((q, n)) => {
                    qids.push(q);
                    node = n;
                }
                Err(e) if qids.is_empty() => return Err(e),
                // A part of the way: the new fid is not made.
                Err(_) => break,
            }
        }
        if qids.len() == steps {
            self.hold(new, node, None)?;
        }
        w.u16(qids.len() as u16);
        qids.into_iter().for_each(|q| w.qid(q));
        Ok(())
    }

    /// Bytes of a read or write that fit into one message.
    fn io_unit(&self) -> u32 {
        (self.limit - HEADER - 4 - 17) as u32
    }

    fn serve_file(
        &mut self,
        kind: u8,
        r: &mut Reader<'_>,
        w: &mut Writer,
        room: usize,
    ) -> Result<(), Errno> {
        let fid = r.u32()?;
        match kind {
            t::LOPEN => {
                let flags = r.u32()?;
                let node = self.node(fid)?;
                let mut how = match flags & open_flag::ACCESS {
                    0 => OFlags::RDONLY,
                    1 => OFlags::WRONLY,
                    _ => OFlags::RDWR,
                };
                how.set(OFlags::APPEND, flags & open_flag::APPEND != 0);
                how.set(OFlags::TRUNC, flags & open_flag::TRUNC != 0);
                if flags & (open_flag::ACCESS | open_flag::TRUNC) != 0 {
                    self.may_write()?;
                }
                let file = node.open(how)?;
                w.qid(self.qid(&node.stat()?));
                w.u32(self.io_unit());
                self.hold(fid, node, Some(file))
            }
            t::READ => {
                let (offset, count) = (r.u64()?, r.u32()? as usize);
                let file = self.file(fid)?;
                let at = w.0.len();
                w.0.resize(at + 4 + count.min(room.saturating_sub(4)), 0);
                let n = file.read_at(&mut w.0[at + 4..], offset).map_err(errno)?;
                w.0.truncate(at + 4 + n);
                w.0[at..at + 4].copy_from_slice(&(n as u32).to_le_bytes());
                Ok(())
            }
            t::WRITE => {
                self.may_write()?;
                let (offset, count) = (r.u64()?, r.u32()? as usize);
                let data = r.bytes(count)?;
                let n = self.file(fid)?.write_at(data, offset).map_err(errno)?;
                w.u32(n as u32);
                Ok(())
            }
            t::FSYNC => {
                let file = self.file(fid)?;
                match r.u32() {
                    Ok(1) => rustix::fs::fdatasync(&*file),
                    _ => rustix::fs::fsync(&*file),
                }
            }
            t::LOCK => {
                // Locks hold among the guest's own processes, which its kernel sees to.
                self.fid(fid)?;
                w.u8(0);
                Ok(())
            }
            _ => {
                self.fid(fid)?;
                let (_, start, len, process) = (r.u8()?, r.u64()?, r.u64()?, r.u32()?);
                let client = r.text()?;
                // Nobody else has a lock.
                w.u8(2);
                w.u64(start);
                w.u64(len);
                w.u32(process);
                w.text(client);
                Ok(())
            }
        }
    }

    fn getattr(&mut self, r: &mut Reader<'_>, w: &mut Writer) -> Result<(), Errno> {
        let fid = self.fid(r.u32()?)?;
        // A file that has lost its name is known by its open descriptor as well.
        let s = match &fid.open {
            Some(f) => rustix::fs::fstat(&**f)?,
            None => fid.node.stat()?,
        };
        w.u64(BASIC);
        w.qid(self.qid(&s));
        w.u32(s.st_mode);
        w.u32(s.st_uid);
        w.u32(s.st_gid);
        #[allow(clippy::unnecessary_cast)] // widths differ between architectures
        for v in [
            s.st_nlink as u64,
            s.st_rdev as u64,
            s.st_size as u64,
            s.st_blksize as u64,
            s.st_blocks as u64,
            s.st_atime as u64,
            s.st_atime_nsec as u64,
            s.st_mtime as u64,
            s.st_mtime_nsec as u64,
            s.st_ctime as u64,
            s.st_ctime_nsec as u64,
            0,
            0,
            0,
            0,
        ] {
            w.u64(v);
        }
        Ok(())
    }

    fn setattr(&mut self, r: &mut Reader<'_>) -> Result<(), Errno> {
        self.may_write()?;
        let fid = self.fid(r.u32()?)?.clone();
        let (valid, bits, uid, gid, size) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u64()?);
        let mut time = |set: u32, given: u32| -> Result<Timespec, Errno> {
            let (tv_sec, nsec) = (r.u64()? as i64, r.u64()?);
            let tv_nsec = match valid {
                v if v & set == 0 => UTIME_OMIT,
                v if v & given == 0 => UTIME_NOW,
                _ if nsec < 1_000_000_000 => nsec as _,
                _ => return Err(Errno::INVAL),
            };
            Ok(Timespec { tv_sec, tv_nsec })
        };
        let times = Timestamps {
            last_access: time(attr::ATIME, attr::ATIME_SET)?,
            last_modification: time(attr::MTIME, attr::MTIME_SET)?,
        };
        let (node, path) = (&fid.node, fid.node.path());
        let link = node.kind()? == FileType::Symlink;
        if valid & (attr::UID | attr::GID) != 0 {
            let uid = (valid & attr::UID != 0 && uid != u32::MAX).then(|| Uid::from_raw(uid));
            let gid = (valid & attr::GID != 0 && gid != u32::MAX).then(|| Gid::from_raw(gid));
            let done = rustix::fs::chownat(&node.fd, "", uid, gid, AtFlags::EMPTY_PATH);
            ignore_forbidden(done)?;
        }
        if link {
            return Ok(());
        }
        if valid & attr::MODE != 0 {
            rustix::fs::chmodat(CWD, &path, mode(bits), AtFlags::empty())?;
        }
        if valid & attr::SIZE != 0 {
            let file = match fid.open {
                Some(f) => f,
                None => Arc::new(node.open(OFlags::WRONLY)?),
            };
            rustix::fs::ftruncate(&*file, size)?;
        }
        if valid & (attr::ATIME | attr::MTIME) != 0 {
            rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty())?;
        }
        Ok(())
    }

    fn statfs(&mut self, r: &mut Reader<'_>, w: &mut Writer) -> Result<(), Errno> {
        let s = rustix::fs::fstatvfs(&self.node(r.u32()?)?.fd)?;
        // V9FS_MAGIC.
        w.u32(0x0102_1997);
        w.u32(s.f_bsize as u32);
        for v in [s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_fsid] {
            w.u64(v);
        }
        w.u32(s.f_namemax as u32);
        Ok(())
    }

    fn readdir(&mut self, r: &mut Reader<'_>, w: &mut Writer, room: usize) -> Result<(), Errno> {
        let (fid, offset, count) = (r.u32()?, r.u64()?, r.u32()? as usize);
        let (dir, node) = (self.file(fid)?, self.node(fid)?);
        let (here, limit) = (node.stat()?, count.min(room.saturating_sub(4)));
        rustix::fs::seek(&*dir, SeekFrom::Start(offset))?;
        let at = w.0.len();
        w.u32(0);
        let mut buf = vec![MaybeUninit::uninit(); 32 << 10];
        let mut entries = RawDir::new(dir.as_fd(), &mut buf);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if w.0.len() - at - 4 + 24 + name.len() > limit {
                break;
            }
            let kind = match entry.file_type() {
                FileType::Directory => 0x80,
                FileType::Symlink => 0x02,
                _ => 0,
            };
            // What is above the shared directory is nobody's business.
            let path = if name == b".." { here.st_ino } else { entry.ino() };
            w.qid(Qid { kind, version: 0, path });
            w.u64(entry.next_entry_cookie());
            w.u8(match entry.file_type() {
                FileType::Fifo => libc::DT_FIFO,
                FileType::CharacterDevice => libc::DT_CHR,
                FileType::Directory => libc::DT_DIR,
                FileType::BlockDevice => libc::DT_BLK,
                FileType::RegularFile => libc::DT_REG,
                FileType::Symlink => libc::DT_LNK,
                FileType::Socket => libc::DT_SOCK,
                FileType::Unknown => libc::DT_UNKNOWN,
            });
            w.text(name);
        }
        let n = (w.0.len() - at - 4) as u32;
        w.0[at..at + 4].copy_from_slice(&n.to_le_bytes());
        Ok(())
    }

    /// Messages that change directories.
    fn serve_names(&mut self, kind: u8, r: &mut Reader<'_>, w: &mut Writer) -> Result<(), Errno> {
        let fid = r.u32()?;
        let dir = self.node(fid)?;
        match kind {
            t::LCREATE => {
                let (name, flags, bits) = (r.name()?, r.u32()?, r.u32()?);
                let mut how = match flags & open_flag::ACCESS {
                    0 => OFlags::RDONLY,
                    1 => OFlags::WRONLY,
                    _ => OFlags::RDWR,
                };
                how.set(OFlags::EXCL, flags & open_flag::EXCL != 0);
                how.set(OFlags::TRUNC, flags & open_flag::TRUNC != 0);
                how.set(OFlags::APPEND, flags & open_flag::APPEND != 0);
                how |= OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                how |= OFlags::NONBLOCK | OFlags::NOCTTY;
                if let Ok(there) = dir.step(name)
                    && there.kind()? != FileType::RegularFile
                {
                    return Err(Errno::EXIST);
                }
                let fd = rustix::fs::openat(&dir.fd, name, how, mode(bits))?;
                let node = dir.step(name)?;
                w.qid(self.qid(&rustix::fs::fstat(&fd)?));
                w.u32(self.io_unit());
                return self.hold(fid, node, Some(fd.into()));
            }
            t::SYMLINK => {
                let (name, target) = (r.name()?, r.text()?);
                if target.len() > MAX_TARGET {
                    return Err(Errno::NAMETOOLONG);
                }
                rustix::fs::symlinkat(target, &dir.fd, name)?;
                w.qid(self.qid(&dir.step(name)?.stat()?));
            }
            t::MKNOD => {
                let (name, bits) = (r.name()?, r.u32()?);
                let kind = FileType::from_raw_mode(bits);
                // Devices of the guest's making would be the host's.
                if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
                    return Err(Errno::PERM);
                }
                rustix::fs::mknodat(&dir.fd, name, kind, mode(bits), 0)?;
                w.qid(self.qid(&dir.step(name)?.stat()?));
            }
            t::MKDIR => {
                let (name, bits) = (r.name()?, r.u32()?);
                rustix::fs::mkdirat(&dir.fd, name, mode(bits))?;
                w.qid(self.qid(&dir.step(name)?.stat()?));
            }
            t::LINK => {
                let (old, name) = (self.node(r.u32()?)?, r.name()?);
                let follow = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(CWD, old.path(), &dir.fd, name, follow)?;
            }
            t::RENAMEAT => {
                let (name, to, new) = (r.name()?, self.node(r.u32()?)?, r.name()?);
                rustix::fs::renameat_with(&dir.fd, name, &to.fd, new, RenameFlags::empty())?;
            }
            _ => {
                let (name, flags) = (r.name()?, r.u32()?);
                let flags = match flags & REMOVEDIR {
                    0 => AtFlags::empty(),
                    _ => AtFlags::REMOVEDIR,
                };
                rustix::fs::unlinkat(&dir.fd, name, flags)?;
            }
        }
        Ok(())
    }
}

fn errno(e: std::io::Error) -> Errno {
    Errno::from_io_error(&e).unwrap_or(Errno::IO)
}
