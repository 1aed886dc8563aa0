//! Endpoints, opened: listening sockets and streams that never block.

use crate::config::monitor::Endpoint;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tandem_accel::{Error, Result};
use tandem_backends::chardev::{CharSink, Chardev};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Descriptors that one message may carry.
const MAX_FDS: usize = 8;

/// Somewhere to connect to.
pub enum Listener {
    /// A unix socket; if it is ours, its path is removed in the end.
    Unix(UnixListener, Option<PathBuf>),
    /// A TCP socket.
    Tcp(TcpListener),
}

/// A connection.
pub enum Stream {
    /// A unix socket, which can carry descriptors.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
    /// A terminal.
    Chardev(Arc<Chardev>),
}

/// What an endpoint became.
pub enum Opened {
    /// It listens.
    Listener(Listener),
    /// It is connected.
    Stream(Stream),
}

impl Listener {
    /// Takes a connection that waits.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
        }
    }

    fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Listener::Unix(l, _) => l.set_nonblocking(on),
            Listener::Tcp(l) => l.set_nonblocking(on),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Unix(l, _) => l.as_raw_fd(),
            Listener::Tcp(l) => l.as_raw_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, Some(path)) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Stream {
    /// Makes it one that never blocks.
    pub fn prepare(&self) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_nonblocking(true),
            Stream::Tcp(s) => {
                // Replies are small and awaited.
                let _ = s.set_nodelay(true);
                s.set_nonblocking(true)
            }
            Stream::Chardev(_) => Ok(()),
        }
    }

    /// Reads what is there; 0 bytes are the end of the input. Descriptors that come along are
    /// handed to `fds`.
    pub fn read(&mut self, buf: &mut [u8], fds: impl FnOnce(Vec<OwnedFd>)) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => {
                let mut raw = [-1; MAX_FDS];
                let mut vecs =
                    [libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }];
                // SAFETY: the vector describes `buf`, which is live, writable and borrowed for the
                // call.
                let (n, count) = unsafe { s.recv_with_fds(&mut vecs, &mut raw) }
                    .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
                if count > 0 {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else owns
                    // them.
                    let own = raw[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                    fds(own.collect());
                }
                Ok(n)
            }
            Stream::Tcp(s) => s.read(buf),
            Stream::Chardev(c) => {
                c.service();
                match c.read(buf) {
                    // Somebody may come again.
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    n => Ok(n),
                }
            }
        }
    }

    /// Writes what is taken.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(bytes),
            Stream::Tcp(s) => s.write(bytes),
            Stream::Chardev(c) => {
                c.write(bytes);
                Ok(bytes.len())
            }
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Stream::Unix(s) => s.as_raw_fd(),
            Stream::Tcp(s) => s.as_raw_fd(),
            Stream::Chardev(c) => c.as_raw_fd(),
        }
    }
}

/// Opens `at`. If it shall wait, this returns when somebody has connected.
pub fn open(at: &Endpoint) -> Result<Vec<Opened>> {
    try_open(at).map_err(|e| Error::new(format!("cannot make a monitor at {at}")).caused_by(e))
}

fn try_open(at: &Endpoint) -> io::Result<Vec<Opened>> {
    let (listener, wait) = match at {
        Endpoint::Stdio => return stream(Stream::Chardev(Arc::new(Chardev::stdio()?))),
        Endpoint::Pty => {
            let pty = Chardev::pty()?;
            if let Some(name) = pty.pty_name() {
                crate::log::note(&format!("a monitor is at {}", name.display()));
            }
            return stream(Stream::Chardev(Arc::new(pty)));
        }
        Endpoint::Unix { path, server: false, .. } => {
            return stream(Stream::Unix(UnixStream::connect(path)?));
        }
        Endpoint::Tcp { host, port, server: false, .. } => {
            return stream(Stream::Tcp(TcpStream::connect((host.as_str(), *port))?));
        }
        Endpoint::Fd { fd, server: false, .. } => return stream(inherited_stream(*fd)?),
        Endpoint::Unix { path, wait, .. } => {
            remove_stale(path);
            (Listener::Unix(UnixListener::bind(path)?, Some(path.clone())), *wait)
        }
        Endpoint::Tcp { host, port, wait, .. } => {
            let host = if host.is_empty() { "0.0.0.0" } else { host };
            (Listener::Tcp(TcpListener::bind((host, *port))?), *wait)
        }
        Endpoint::Fd { fd, wait, .. } => (inherited_listener(*fd)?, *wait),
    };
    let mut all = Vec::new();
    if wait {
        crate::log::note(&format!("waiting for a connection to the monitor at {at}"));
        listener.set_nonblocking(false)?;
        let stream = listener.accept()?;
        stream.prepare()?;
        all.push(Opened::Stream(stream));
    }
    listener.set_nonblocking(true)?;
    all.push(Opened::Listener(listener));
    Ok(all)
}

fn stream(s: Stream) -> io::Result<Vec<Opened>> {
    s.prepare()?;
    Ok(vec![Opened::Stream(s)])
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refuses =
        || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && refuses() {
        let _ = std::fs::remove_file(path);
    }
}

/// Takes over an inherited socket; returns whether it is a unix socket.
fn inherited(fd: RawFd) -> io::Result<(OwnedFd, bool)> {
    let (mut domain, mut len) = (0 as libc::c_int, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: both pointers are to live integers, and len says how large the first is.
    let got = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut domain).cast(),
            &raw mut len,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is passed.
    unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    // SAFETY: the descriptor is open, as getsockopt has shown, and whoever started us gave it to us
    // for this purpose alone; validation refuses to use one twice and those below 3.
    let own = unsafe { File::from_raw_fd(fd) };
    Ok((own.into(), domain == libc::AF_UNIX))
}

fn inherited_stream(fd: RawFd) -> io::Result<Stream> {
    Ok(match inherited(fd)? {
        (fd, true) => Stream::Unix(fd.into()),
        (fd, false) => Stream::Tcp(fd.into()),
    })
}

fn inherited_listener(fd: RawFd) -> io::Result<Listener> {
    Ok(match inherited(fd)? {
        (fd, true) => Listener::Unix(fd.into(), None),
        (fd, false) => Listener::Tcp(fd.into()),
    })
}
