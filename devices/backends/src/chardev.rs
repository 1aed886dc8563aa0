//! Character devices: where a serial port's bytes go to and come from.
//!
//! A [`Chardev`] never blocks its caller: what the far end does not take at once is queued and
//! written when the main loop finds the far end ready. The main loop polls one descriptor
//! ([`Chardev::poll_fd`], level-triggered, for reading) whatever the kind, and then calls
//! [`Chardev::service`] and [`Chardev::read`].
//!
//! While somebody is at the far end nothing is lost: when the queue grows past
//! [`CONGESTION_BYTES`] the chardev says so ([`CharSink::congested`]) and the device holds its
//! guest back as a slow line would. While nobody is there (a pty or a socket that is not
//! connected), the newest [`CONGESTION_BYTES`] are kept for whoever comes.
//!
//! A device that takes input joins as its [`CharFront`] ([`CharBackend::attach`]); the main loop
//! then calls [`Chardev::pump`] instead of reading.
//!
//! Lock order: device → chardev. The drained callback and the front run without the chardev's lock.

use crate::fdset;
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

/// Queued bytes above which a chardev calls itself congested.
pub const CONGESTION_BYTES: usize = 64 << 10;
/// Queued bytes above which output is dropped: only a device that ignores congestion gets here.
const QUEUE_LIMIT: usize = 8 << 20;

/// Where a device's output goes.
pub trait CharSink: Send + Sync {
    /// Takes all of `data`; never blocks.
    fn write(&self, data: &[u8]);
    /// Whether the far end is so far behind that the device should hold its guest back.
    fn congested(&self) -> bool {
        false
    }
    /// Installs what is called when congestion ends. At most once.
    fn on_drained(&self, _f: Box<dyn Fn() + Send + Sync>) {}
}

/// A device's side of a character device that takes input.
pub trait CharFront: Send + Sync {
    /// Takes the first bytes of `data`; returns how many. Those it does not take come again after
    /// [`CharBackend::room`].
    fn receive(&self, data: &[u8]) -> usize;
    /// Somebody has come to the far end, or has gone.
    fn opened(&self, _open: bool) {}
}

/// A character device as devices see it that take input.
pub trait CharBackend: CharSink {
    /// Makes `front` the one that takes input; `false` if there is one already.
    fn attach(&self, front: Arc<dyn CharFront>) -> bool;
    /// The front has room for input again. Never blocks.
    fn room(&self);
    /// Whether somebody is at the far end.
    fn is_open(&self) -> bool;
}

/// Drops everything.
#[derive(Debug, Default, Clone, Copy)]
pub struct NullSink;

impl CharSink for NullSink {
    fn write(&self, _: &[u8]) {}
}

/// How an open descriptor avoids blocking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pace {
    /// It is in non-blocking mode.
    NonBlocking,
    /// Its mode is shared with other processes and must stay: ask poll(2) before each small piece.
    PollFirst,
    /// A regular file: always ready, and epoll refuses it.
    Always,
}

struct Port {
    fd: OwnedFd,
    pace: Pace,
}

impl Port {
    /// Whether poll(2) reports any of `events` now.
    fn polls(&self, events: libc::c_short) -> bool {
        let mut p = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
        // SAFETY: p is one valid pollfd and the time-out is 0.
        unsafe { libc::poll(&mut p, 1, 0) > 0 && p.revents & events != 0 }
    }

    fn write(&self, data: &[u8]) -> io::Result<usize> {
        let data = match self.pace {
            Pace::PollFirst if !self.polls(libc::POLLOUT) => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            // A ready terminal or pipe has room for at least this much.
            Pace::PollFirst => &data[..data.len().min(256)],
            _ => data,
        };
        // SAFETY: the pointer and length are those of a live slice.
        let n = unsafe { libc::write(self.fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }

    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if self.pace == Pace::PollFirst && !self.polls(libc::POLLIN | libc::POLLHUP) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // SAFETY: the pointer and length are those of a live, writable slice.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
    }
}

/// What is at the far end.
enum Far {
    Nothing,
    Stdio,
    File,
    Pty {
        name: PathBuf,
    },
    Unix {
        listener: UnixListener,
        path: PathBuf,
    },
    /// A listening TCP socket.
    Tcp {
        listener: Socket,
    },
    /// A connection that we make, and make again after so long.
    Client {
        to: (Domain, SockAddr),
        again: Option<Duration>,
        connecting: bool,
    },
    /// The newest bytes are kept for whoever asks for them.
    Ring {
        size: usize,
    },
}

impl Far {
    /// The far end comes and goes.
    fn is_socket(&self) -> bool {
        matches!(self, Far::Unix { .. } | Far::Tcp { .. } | Far::Client { .. })
    }
    fn listener(&self) -> Option<RawFd> {
        match self {
            Far::Unix { listener, .. } => Some(listener.as_raw_fd()),
            Far::Tcp { listener } => Some(listener.as_raw_fd()),
            _ => None,
        }
    }
    fn accept(&self) -> Option<OwnedFd> {
        match self {
            Far::Unix { listener, .. } => Some(listener.accept().ok()?.0.into()),
            Far::Tcp { listener } => {
                let (socket, _) = listener.accept().ok()?;
                // Keys should not wait for company.
                let _ = socket.set_tcp_nodelay(true);
                Some(socket.into())
            }
            _ => None,
        }
    }
}

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Unix(PathBuf),
    /// An internet address.
    Inet(SocketAddr),
}

struct Inner {
    far: Far,
    input: Option<Port>,
    output: Option<Port>,
    queue: VecDeque<u8>,
    want_input: bool,
    /// Input is in the epoll set. (Setting it there again would repeat an edge.)
    input_watched: bool,
    /// Congestion was reported and its end was not.
    congested: bool,
    dropped: u64,
}

/// A character device on host descriptors.
pub struct Chardev {
    /// Gathers all descriptors, so that the main loop polls one.
    epoll: OwnedFd,
    /// Readable while input is wanted from a descriptor that epoll refuses.
    ready: EventFd,
    inner: Mutex<Inner>,
    drained: OnceLock<Box<dyn Fn() + Send + Sync>>,
    front: OnceLock<Arc<dyn CharFront>>,
    /// Input that the front has not taken. Held while it is given to the front.
    pending: Mutex<VecDeque<u8>>,
    /// What the front was told last about the far end.
    told_open: AtomicBool,
    /// Rings when a connection is to be made again.
    redial: Mutex<TimerFd>,
}

/// Input held for a front that does not take it; beyond it nothing is read on.
const PENDING_LIMIT: usize = 4096;

impl Chardev {
    fn new(far: Far, input: Option<Port>, output: Option<Port>) -> io::Result<Chardev> {
        // SAFETY: no memory is passed.
        let raw = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(raw) };
        let dev = Chardev {
            epoll,
            ready: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            inner: Mutex::new(Inner {
                far,
                input,
                output,
                queue: VecDeque::new(),
                want_input: true,
                input_watched: false,
                congested: false,
                dropped: 0,
            }),
            drained: OnceLock::new(),
            front: OnceLock::new(),
            pending: Mutex::default(),
            told_open: AtomicBool::new(false),
            redial: Mutex::new(TimerFd::new()?),
        };
        dev.ctl(dev.ready.as_raw_fd(), libc::EPOLLIN as u32);
        let mut inner = dev.lock();
        if let Some(listener) = inner.far.listener() {
            dev.ctl(listener, libc::EPOLLIN as u32);
        }
        let timer = dev.redial.lock().unwrap_or_else(|e| e.into_inner()).as_raw_fd();
        dev.ctl(timer, libc::EPOLLIN as u32);
        dev.watch(&mut inner);
        drop(inner);
        Ok(dev)
    }

    /// Takes no output and gives no input.
    pub fn null() -> io::Result<Chardev> {
        Chardev::new(Far::Nothing, None, None)
    }

    /// Standard input and output of the process. Terminal modes are the caller's business.
    pub fn stdio() -> io::Result<Chardev> {
        Chardev::new(Far::Stdio, Some(own_std(0)?), Some(own_std(1)?))
    }

    /// Output to the file at `path`, which is created or, unless told to `append`, emptied; no
    /// input.
    pub fn file(path: &Path, append: bool) -> io::Result<Chardev> {
        // O_NONBLOCK: a FIFO without a reader must fail to open rather than hang.
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = fdset::open(path, flags | if append { libc::O_APPEND } else { libc::O_TRUNC })?;
        let pace =
            if file.metadata()?.file_type().is_file() { Pace::Always } else { Pace::NonBlocking };
        Chardev::new(Far::File, None, Some(Port { fd: file.into(), pace }))
    }

    /// A new pseudo-terminal in raw mode; its name is [`Chardev::pty_name`].
    pub fn pty() -> io::Result<Chardev> {
        let master = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
            .open("/dev/ptmx")?;
        let fd = master.as_raw_fd();
        let mut n: libc::c_int = 0;
        let unlock: libc::c_int = 0;
        // SAFETY: both requests take a pointer to an int, which lives through the call.
        let ok = unsafe {
            libc::ioctl(fd, libc::TIOCSPTLCK, &unlock) == 0
                && libc::ioctl(fd, libc::TIOCGPTN, &mut n) == 0
        };
        if !ok {
            return Err(io::Error::last_os_error());
        }
        let name = PathBuf::from(format!("/dev/pts/{n}"));
        {
            // Opened and closed once: this sets raw mode, and from now on the master reports a
            // hang-up whenever nobody has the other end open.
            let slave = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
                .open(&name)?;
            // SAFETY: termios is plain data, filled by tcgetattr before it is used.
            unsafe {
                let mut t: libc::termios = std::mem::zeroed();
                if libc::tcgetattr(slave.as_raw_fd(), &mut t) == 0 {
                    libc::cfmakeraw(&mut t);
                    libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &t);
                }
            }
        }
        let copy = master.try_clone()?;
        Chardev::new(
            Far::Pty { name },
            Some(Port { fd: master.into(), pace: Pace::NonBlocking }),
            Some(Port { fd: copy.into(), pace: Pace::NonBlocking }),
        )
    }

    /// A listening unix socket at `path`, one connection at a time. A stale socket that nobody
    /// listens on is replaced; it is removed again on drop.
    pub fn unix(path: &Path) -> io::Result<Chardev> {
        if let Ok(m) = std::fs::symlink_metadata(path) {
            let stale = m.file_type().is_socket()
                && UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if stale {
                std::fs::remove_file(path)?;
            }
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Chardev::new(Far::Unix { listener, path: path.into() }, None, None)
    }

    /// A listening TCP socket at `address`, one connection at a time.
    pub fn tcp(address: SocketAddr) -> io::Result<Chardev> {
        let listener = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        listener.set_reuse_address(true)?;
        listener.bind(&address.into())?;
        listener.listen(1)?;
        listener.set_nonblocking(true)?;
        Chardev::new(Far::Tcp { listener }, None, None)
    }

    /// A connection to a server at `address`. A connection that breaks, or cannot be made, is made
    /// again after `reconnect`; without that, it must be possible at once.
    pub fn client(address: &Address, reconnect: Option<Duration>) -> io::Result<Chardev> {
        let to = match address {
            Address::Unix(p) => (Domain::UNIX, SockAddr::unix(p)?),
            Address::Inet(a) => (Domain::for_address(*a), (*a).into()),
        };
        let dev =
            Chardev::new(Far::Client { to, again: reconnect, connecting: false }, None, None)?;
        let mut inner = dev.lock();
        let dialled = dev.dial(&mut inner);
        dev.watch(&mut inner);
        drop(inner);
        match (dialled, reconnect) {
            (Err(e), None) => Err(e),
            _ => Ok(dev),
        }
    }

    /// Keeps the newest `size` bytes of output, for [`Chardev::kept`]; no input.
    pub fn ring(size: usize) -> io::Result<Chardev> {
        Chardev::new(Far::Ring { size }, None, None)
    }

    /// Takes the oldest bytes that a ring has kept, at most `len`.
    pub fn kept(&self, len: usize) -> Vec<u8> {
        let mut inner = self.lock();
        match inner.far {
            Far::Ring { .. } => {
                let n = len.min(inner.queue.len());
                inner.queue.drain(..n).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Connects to the far end, or sees to it that this is tried again.
    fn dial(&self, inner: &mut Inner) -> io::Result<()> {
        let Far::Client { to: (domain, to), again, connecting } = &mut inner.far else {
            return Ok(());
        };
        let dial = || -> io::Result<(Socket, bool)> {
            let socket = Socket::new(*domain, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            if *domain != Domain::UNIX {
                socket.set_tcp_nodelay(true)?;
            }
            match socket.connect(to) {
                Ok(()) => Ok((socket, false)),
                Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok((socket, true)),
                Err(e) => Err(e),
            }
        };
        let made = dial().and_then(|(s, c)| Ok((s.try_clone()?, s, c)));
        match made {
            Ok((copy, socket, under_way)) => {
                *connecting = under_way;
                inner.input = Some(Port { fd: socket.into(), pace: Pace::NonBlocking });
                inner.output = Some(Port { fd: copy.into(), pace: Pace::NonBlocking });
                Ok(())
            }
            Err(e) => {
                if let Some(wait) = *again {
                    self.redial_after(wait);
                }
                Err(e)
            }
        }
    }

    /// Whether it is time to connect again; says so once.
    fn redial_is_due(&self) -> bool {
        let mut timer = self.redial.lock().unwrap_or_else(|e| e.into_inner());
        let mut p = libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: p is one valid pollfd and the time-out is 0.
        let due = unsafe { libc::poll(&mut p, 1, 0) } > 0;
        if due {
            let _ = timer.wait();
        }
        due
    }

    fn redial_after(&self, wait: Duration) {
        let mut timer = self.redial.lock().unwrap_or_else(|e| e.into_inner());
        // Zero would disarm it.
        if let Err(e) = timer.reset(wait.max(Duration::from_millis(1)), None) {
            log::warn!("chardev: no timer to connect again: {e}");
        }
    }

    /// Finds out whether a connection that was under way is there.
    fn check_dial(&self, inner: &mut Inner) {
        if !matches!(inner.far, Far::Client { connecting: true, .. }) {
            return;
        }
        let Some(out) = inner.output.as_ref().filter(|p| p.polls(libc::POLLOUT | libc::POLLERR))
        else {
            return;
        };
        let mut error: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        let fd = out.fd.as_raw_fd();
        // SAFETY: both pointers are to variables that live through the call, of the length given.
        let got = unsafe {
            let to = (&raw mut error).cast();
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, to, &mut len)
        };
        if got == 0 && error == 0 {
            if let Far::Client { connecting, .. } = &mut inner.far {
                *connecting = false;
            }
        } else {
            self.hang_up(inner);
        }
    }

    /// Moves input to the front, and tells it of comings and goings. After [`Chardev::service`].
    pub fn pump(&self) {
        let Some(front) = self.front.get() else { return };
        let open = is_connected(&self.lock());
        if self.told_open.swap(open, Ordering::AcqRel) != open {
            front.opened(open);
        }
        let mut pending = self.pending.lock().unwrap_or_else(|e| e.into_inner());
        let mut buf = [0; 4096];
        loop {
            while !pending.is_empty() {
                let taken = front.receive(pending.make_contiguous());
                if taken == 0 {
                    break;
                }
                let taken = taken.min(pending.len());
                pending.drain(..taken);
            }
            if pending.len() >= PENDING_LIMIT {
                break;
            }
            let n = self.read(&mut buf);
            if n == 0 {
                break;
            }
            pending.extend(&buf[..n]);
        }
        self.want_input(pending.len() < PENDING_LIMIT);
        drop(pending);
        let open = is_connected(&self.lock());
        if self.told_open.swap(open, Ordering::AcqRel) != open {
            front.opened(open);
        }
    }

    /// The terminal's path, if it is a pty.
    pub fn pty_name(&self) -> Option<PathBuf> {
        match &self.lock().far {
            Far::Pty { name } => Some(name.clone()),
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn ctl(&self, fd: RawFd, events: u32) -> bool {
        let mut ev = libc::epoll_event { events, u64: fd as u64 };
        let ep = self.epoll.as_raw_fd();
        // SAFETY: ev lives through the calls; both descriptors are open.
        unsafe {
            libc::epoll_ctl(ep, libc::EPOLL_CTL_MOD, fd, &mut ev) == 0
                || libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, fd, &mut ev) == 0
        }
    }

    fn unwatch(&self, fd: RawFd) {
        // SAFETY: DEL takes no event.
        unsafe {
            libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut())
        };
    }

    /// Makes the epoll set follow what is wanted now.
    fn watch(&self, inner: &mut Inner) {
        let mut always = false;
        if let Some(p) = &inner.input {
            // A pty without a user reports a hang-up all the time: edge-triggered tells it once.
            let edge = if matches!(inner.far, Far::Pty { .. }) { libc::EPOLLET } else { 0 };
            if !inner.want_input {
                if std::mem::take(&mut inner.input_watched) {
                    self.unwatch(p.fd.as_raw_fd());
                }
            } else if !inner.input_watched {
                inner.input_watched = p.pace != Pace::Always
                    && self.ctl(p.fd.as_raw_fd(), (libc::EPOLLIN | edge) as u32);
                always = !inner.input_watched;
            }
        }
        let _ = if always { self.ready.write(1) } else { self.ready.read().map(|_| ()) };
        if let Some(p) = &inner.output {
            let connecting = matches!(inner.far, Far::Client { connecting: true, .. });
            if !connecting && (inner.queue.is_empty() || !is_connected(inner)) {
                self.unwatch(p.fd.as_raw_fd());
            } else {
                self.ctl(p.fd.as_raw_fd(), libc::EPOLLOUT as u32);
            }
        }
    }

    /// Writes what the far end takes. Returns whether congestion ended.
    fn flush(&self, inner: &mut Inner) -> bool {
        if is_connected(inner) {
            while !inner.queue.is_empty() {
                let Some(out) = &inner.output else { break };
                match out.write(inner.queue.as_slices().0) {
                    Ok(n) => drop(inner.queue.drain(..n)),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => {
                        log::warn!("chardev output failed, it is dropped from now on: {e}");
                        inner.queue.clear();
                        if !inner.far.is_socket() && !matches!(inner.far, Far::Pty { .. }) {
                            self.unwatch(out.fd.as_raw_fd());
                            inner.output = None;
                        }
                        break;
                    }
                }
            }
        }
        if !is_connected(inner) {
            let keep = match inner.far {
                Far::Ring { size } => size,
                _ => CONGESTION_BYTES,
            };
            let excess = inner.queue.len().saturating_sub(keep);
            inner.queue.drain(..excess);
        }
        let ended = inner.congested && inner.queue.len() <= CONGESTION_BYTES / 2;
        if ended {
            inner.congested = false;
        }
        ended
    }

    fn tell_drained(&self, ended: bool) {
        if let (true, Some(f)) = (ended, self.drained.get()) {
            f();
        }
    }

    /// The one descriptor to poll for readability.
    pub fn poll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Does what the polled descriptor asks for other than input: accepts a connection, writes
    /// queued output.
    pub fn service(&self) {
        // Takes note of edges, which would keep the set readable otherwise.
        let mut seen = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: the array and its length are passed; the time-out is 0.
        unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), seen.as_mut_ptr(), 8, 0) };
        let ended = {
            let mut inner = self.lock();
            self.accept(&mut inner);
            self.check_dial(&mut inner);
            if inner.output.is_none() && self.redial_is_due() {
                let _ = self.dial(&mut inner);
            }
            let ended = self.flush(&mut inner);
            self.watch(&mut inner);
            ended
        };
        self.tell_drained(ended);
    }

    fn accept(&self, inner: &mut Inner) {
        while let Some(conn) = inner.far.accept() {
            if inner.input.is_some() {
                // One at a time: a second caller is hung up on.
                continue;
            }
            let Ok(copy) = set_nonblocking(&conn).and_then(|()| conn.try_clone()) else {
                continue;
            };
            inner.input = Some(Port { fd: conn, pace: Pace::NonBlocking });
            inner.output = Some(Port { fd: copy, pace: Pace::NonBlocking });
        }
    }

    fn hang_up(&self, inner: &mut Inner) {
        inner.input_watched = false;
        for p in [inner.input.take(), inner.output.take()].into_iter().flatten() {
            self.unwatch(p.fd.as_raw_fd());
        }
        if let Far::Client { again, connecting, .. } = &mut inner.far {
            *connecting = false;
            if let Some(wait) = *again {
                self.redial_after(wait);
            }
        }
    }

    /// Reads what has arrived; 0 means nothing now (also after the end of the input). After
    /// [`Chardev::service`], call it until it gives 0 or input is no longer wanted: a pty tells of
    /// arriving input once.
    pub fn read(&self, buf: &mut [u8]) -> usize {
        let mut inner = self.lock();
        if buf.is_empty() {
            return 0;
        }
        let n = loop {
            let Some(p) = &inner.input else { break 0 };
            match p.read(buf) {
                Ok(0) => {}
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break 0,
                // A pty whose user has gone reads as an error until the next one comes.
                Err(_) if matches!(inner.far, Far::Pty { .. }) => break 0,
                Err(_) => {}
            }
            if inner.far.is_socket() {
                self.hang_up(&mut inner);
                self.accept(&mut inner);
            } else if let Some(p) = inner.input.take() {
                inner.input_watched = false;
                self.unwatch(p.fd.as_raw_fd());
            }
            break 0;
        };
        self.watch(&mut inner);
        n
    }

    /// Says whether input is wanted; while it is not, arriving input does not make
    /// [`Chardev::poll_fd`] readable. It is wanted at first.
    pub fn want_input(&self, want: bool) {
        let mut inner = self.lock();
        if inner.want_input != want {
            inner.want_input = want;
            self.watch(&mut inner);
        }
    }

    /// Waits at most `limit` until all queued output has been taken; for the way out.
    pub fn drain(&self, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            self.service();
            let fd = {
                let inner = self.lock();
                match &inner.output {
                    Some(p) if !inner.queue.is_empty() && is_connected(&inner) => p.fd.as_raw_fd(),
                    _ => return,
                }
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let mut p = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
            let ms = (left.as_millis() as libc::c_int).clamp(1, 100);
            // SAFETY: p is one valid pollfd.
            unsafe { libc::poll(&mut p, 1, ms) };
        }
    }
}

/// Whether somebody is at the far end.
fn is_connected(inner: &Inner) -> bool {
    match &inner.far {
        Far::Pty { .. } => inner.output.as_ref().is_some_and(|p| !p.polls(libc::POLLHUP)),
        Far::Client { connecting: true, .. } => false,
        _ => inner.output.is_some(),
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let set = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl CharBackend for Chardev {
    fn attach(&self, front: Arc<dyn CharFront>) -> bool {
        self.front.set(front).is_ok()
    }
    fn room(&self) {
        // Fails only if the counter is full, and then the main loop is awake already.
        let _ = self.ready.write(1);
    }
    fn is_open(&self) -> bool {
        is_connected(&self.lock())
    }
}

impl CharSink for Chardev {
    fn write(&self, data: &[u8]) {
        let mut inner = self.lock();
        let keeps = inner.far.is_socket() || matches!(inner.far, Far::Ring { .. });
        if inner.output.is_none() && !keeps {
            return;
        }
        let was_empty = inner.queue.is_empty();
        let room = QUEUE_LIMIT - inner.queue.len();
        let n = data.len().min(room);
        inner.queue.extend(&data[..n]);
        if n < data.len() {
            if inner.dropped == 0 {
                log::warn!("chardev output is dropped: the far end takes none");
            }
            inner.dropped += (data.len() - n) as u64;
        }
        // With a backlog the main loop is already waiting for the far end; a pty's user may have
        // come without a sign.
        let keeps = keeps || matches!(inner.far, Far::Pty { .. });
        if was_empty || keeps {
            self.flush(&mut inner);
        }
        if was_empty != inner.queue.is_empty() {
            self.watch(&mut inner);
        }
        if inner.queue.len() > CONGESTION_BYTES {
            inner.congested = true;
        }
    }

    fn congested(&self) -> bool {
        self.lock().congested
    }

    fn on_drained(&self, f: Box<dyn Fn() + Send + Sync>) {
        let _ = self.drained.set(f);
    }
}

impl AsRawFd for Chardev {
    fn as_raw_fd(&self) -> RawFd {
        self.poll_fd()
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        if let Far::Unix { path, .. } = &self.lock().far {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// An own, non-blocking open of standard descriptor `n`. O_NONBLOCK on the inherited one would
/// change it for every process that shares it (the user's shell), so it is opened anew where that
/// works, and polled before each access where it does not.
fn own_std(n: RawFd) -> io::Result<Port> {
    // SAFETY: n is only borrowed: the duplicate is owned instead.
    let dup = unsafe { libc::fcntl(n, libc::F_DUPFD_CLOEXEC, 3) };
    if dup < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(dup) };
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(Port { fd: file.into(), pace: Pace::Always });
    }
    if kind.is_fifo() || kind.is_char_device() {
        let anew = OpenOptions::new()
            .read(n == 0)
            .write(n != 0)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
            .open(format!("/proc/self/fd/{n}"));
        if let Ok(f) = anew {
            return Ok(Port { fd: f.into(), pace: Pace::NonBlocking });
        }
    }
    Ok(Port { fd: file.into(), pace: Pace::PollFirst })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn readable(dev: &Chardev) -> bool {
        let mut p = libc::pollfd { fd: dev.poll_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut p, 1, 200) > 0 }
    }

    fn socket_path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tandem-chardev-{}-{name}", std::process::id()))
    }

    #[test]
    fn unix_keeps_early_output_and_takes_one_caller_after_another() {
        let path = socket_path("one");
        let dev = Chardev::unix(&path).unwrap();
        dev.write(b"early ");
        for round in 0..2 {
            let mut c = UnixStream::connect(&path).unwrap();
            assert!(readable(&dev));
            dev.service();
            dev.write(b"bird");
            let want: &[u8] = if round == 0 { b"early bird" } else { b"bird" };
            let mut got = vec![0; want.len()];
            c.read_exact(&mut got).unwrap();
            assert_eq!(got, want);
            c.write_all(b"in").unwrap();
            assert!(readable(&dev));
            let mut buf = [0; 8];
            assert_eq!(dev.read(&mut buf), 2);
            drop(c);
            assert!(readable(&dev));
            assert_eq!(dev.read(&mut buf), 0);
        }
        drop(dev);
        assert!(!path.exists());
    }

    #[test]
    fn a_slow_reader_congests_and_loses_nothing() {
        let path = socket_path("slow");
        let dev = Chardev::unix(&path).unwrap();
        let mut c = UnixStream::connect(&path).unwrap();
        dev.service();
        let told = Arc::new(AtomicBool::new(false));
        let t = told.clone();
        dev.on_drained(Box::new(move || t.store(true, Ordering::Release)));
        let mut sent = 0usize;
        while !dev.congested() {
            let piece: Vec<u8> = (0..1000).map(|i| (sent + i) as u8).collect();
            dev.write(&piece);
            sent += 1000;
            assert!(sent < 16 << 20);
        }
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; sent];
            c.read_exact(&mut all).unwrap();
            all
        });
        dev.drain(Duration::from_secs(10));
        let all = reader.join().unwrap();
        assert!(all.iter().enumerate().all(|(i, b)| *b == i as u8));
        assert!(told.load(Ordering::Acquire) && !dev.congested());
    }

    #[test]
    fn unwanted_input_does_not_wake() {
        let path = socket_path("want");
        let dev = Chardev::unix(&path).unwrap();
        let mut c = UnixStream::connect(&path).unwrap();
        dev.service();
        dev.want_input(false);
        c.write_all(b"x").unwrap();
        assert!(!readable(&dev));
        dev.want_input(true);
        assert!(readable(&dev));
    }

    #[test]
    fn pty_without_a_user_is_quiet_and_keeps_the_newest() {
        let dev = Chardev::pty().unwrap();
        readable(&dev);
        dev.service();
        dev.read(&mut [0; 4]);
        assert!(!readable(&dev), "a hung-up pty must not spin the main loop");
        dev.write(&vec![b'a'; 2 * CONGESTION_BYTES]);
        assert!(!dev.congested());
        assert_eq!(dev.lock().queue.len(), CONGESTION_BYTES);
        dev.lock().queue.clear();
        dev.write(b"old ");
        let name = dev.pty_name().unwrap();
        let mut user = OpenOptions::new().read(true).write(true).open(name).unwrap();
        dev.write(b"new");
        let mut got = [0; 7];
        user.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"old new");
        user.write_all(b"k").unwrap();
        assert!(readable(&dev));
        let mut b = [0; 4];
        assert_eq!(dev.read(&mut b), 1);
    }

    #[test]
    fn clients_connect_again_and_fronts_are_told() {
        #[derive(Default)]
        struct Front {
            got: Mutex<Vec<u8>>,
            open: Mutex<Vec<bool>>,
            room: std::sync::atomic::AtomicUsize,
        }
        impl CharFront for Front {
            fn receive(&self, data: &[u8]) -> usize {
                let n = data.len().min(self.room.load(Ordering::Acquire));
                self.room.fetch_sub(n, Ordering::AcqRel);
                self.got.lock().unwrap().extend(&data[..n]);
                n
            }
            fn opened(&self, open: bool) {
                self.open.lock().unwrap().push(open);
            }
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = Address::Inet(listener.local_addr().unwrap());
        let dev = Chardev::client(&at, Some(Duration::from_millis(20))).unwrap();
        let front = Arc::new(Front::default());
        assert!(dev.attach(front.clone()) && !dev.attach(front.clone()));
        let turn = || {
            readable(&dev);
            dev.service();
            dev.pump();
        };
        for round in 1..3 {
            let (mut c, _) = listener.accept().unwrap();
            while !dev.is_open() {
                turn();
            }
            c.write_all(b"hello").unwrap();
            turn();
            // Nothing is lost while the front has no room.
            front.room.store(3, Ordering::Release);
            dev.room();
            while front.got.lock().unwrap().len() < 3 {
                turn();
            }
            front.room.store(100, Ordering::Release);
            dev.room();
            while front.got.lock().unwrap().len() < 5 {
                turn();
            }
            assert_eq!(std::mem::take(&mut *front.got.lock().unwrap()), b"hello");
            dev.write(b"bye");
            let mut b = [0; 3];
            c.read_exact(&mut b).unwrap();
            drop(c);
            while dev.is_open() {
                turn();
            }
            turn();
            assert_eq!(front.open.lock().unwrap().len(), 2 * round);
        }
        assert!(Chardev::client(&Address::Unix("/nonexistent/x".into()), None).is_err());
    }

    #[test]
    fn tcp_servers_and_rings() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dev = Chardev::tcp(free).unwrap();
        let mut c = std::net::TcpStream::connect(free).unwrap();
        while !dev.is_open() {
            readable(&dev);
            dev.service();
        }
        dev.write(b"x");
        c.read_exact(&mut [0]).unwrap();
        let ring = Chardev::ring(4).unwrap();
        ring.write(b"abc");
        ring.write(b"def");
        assert_eq!((ring.kept(2), ring.kept(9)), (b"cd".to_vec(), b"ef".to_vec()));
    }

    #[test]
    fn file_takes_output_at_once() {
        let path = socket_path("file");
        let dev = Chardev::file(&path, false).unwrap();
        dev.write(b"hello");
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        assert!(!readable(&dev));
        Chardev::file(&path, true).unwrap().write(b" again");
        assert_eq!(std::fs::read(&path).unwrap(), b"hello again");
        drop(Chardev::file(&path, false).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        std::fs::remove_file(&path).unwrap();
    }
}
