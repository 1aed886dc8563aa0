//! Frames over sockets, to another program: passt, a switch, another machine.
//!
//! Over a stream each frame follows its length, 32 bits in network byte order; over datagrams each
//! is one. The far end computes checksums and keeps to the MTU: there are no offloads.

use super::gather::{send, would_block};
use super::poller::{Poller, Ready};
use super::{Card, Delivery, Link, MAX_FRAME, Taken, VnetHeader};
use crate::block::pieces::Src;
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Bytes that wait for a slow far end; beyond them the guest waits.
const BACKLOG: usize = 256 << 10;
/// Frames moved in each direction in one turn.
const TURN: usize = 256;
/// Bytes before each frame of a stream.
const PREFIX: usize = 4;

const STREAM: u64 = 0;
const LISTENER: u64 = 1;

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Unix(PathBuf),
    /// An internet address.
    Inet(SocketAddr),
}

impl Address {
    fn to_sock(&self) -> io::Result<(Domain, SockAddr)> {
        Ok(match self {
            Address::Unix(p) => (Domain::UNIX, SockAddr::unix(p)?),
            Address::Inet(a) => (Domain::for_address(*a), (*a).into()),
        })
    }
}

/// Who makes a stream's connection.
pub enum Role {
    /// We accept one connection at a time.
    Server(Socket),
    /// We connect, and again after so long; never again if it is `None`.
    Client(Address, Option<Duration>),
    /// It is made; there will be no other.
    Given,
}

/// Frames over a stream.
pub struct Stream {
    role: Role,
    socket: Option<Socket>,
    connecting: bool,
    retry: Option<Instant>,
    readable: bool,
    writable: bool,
    calling: bool,
    /// Bytes that the far end has not taken.
    out: VecDeque<u8>,
    /// Bytes from the far end; whole frames are at `start..`.
    input: Vec<u8>,
    start: usize,
    end: usize,
}

impl Stream {
    fn new(role: Role, socket: Option<Socket>) -> Stream {
        Stream {
            role,
            socket,
            connecting: false,
            retry: None,
            readable: false,
            writable: false,
            calling: false,
            out: VecDeque::new(),
            input: vec![0; 2 * (PREFIX + MAX_FRAME)],
            start: 0,
            end: 0,
        }
    }

    /// Listens at `address`.
    pub fn listen(address: &Address) -> io::Result<Stream> {
        let (domain, at) = address.to_sock()?;
        let listener = Socket::new(domain, Type::STREAM, None)?;
        if let Address::Inet(_) = address {
            listener.set_reuse_address(true)?;
        }
        listener.bind(&at)?;
        listener.listen(1)?;
        listener.set_nonblocking(true)?;
        Ok(Stream::new(Role::Server(listener), None))
    }

    /// Connects to `address`; a connection that breaks is made again after `reconnect`.
    pub fn connect(address: Address, reconnect: Option<Duration>) -> io::Result<Stream> {
        let mut s = Stream::new(Role::Client(address.clone(), reconnect), None);
        match (s.dial(&address), reconnect) {
            (Err(e), None) => return Err(e),
            (Err(_), Some(t)) => s.retry = Some(Instant::now() + t),
            (Ok(()), _) => {}
        }
        Ok(s)
    }

    /// A stream that somebody else has connected.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Stream> {
        let socket = Socket::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Stream::new(Role::Given, Some(socket)))
    }

    fn dial(&mut self, address: &Address) -> io::Result<()> {
        let (domain, at) = address.to_sock()?;
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&at) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => self.connecting = true,
            Err(e) => return Err(e),
        }
        self.socket = Some(socket);
        Ok(())
    }

    fn hang_up(&mut self, why: &str) {
        if self.socket.take().is_some() {
            log::warn!("the network's connection is closed: {why}");
        }
        (self.readable, self.writable, self.connecting) = (false, false, false);
        (self.start, self.end) = (0, 0);
        self.out.clear();
        if let Role::Client(_, Some(t)) = &self.role {
            self.retry = Some(Instant::now() + *t);
        }
        self.calling = matches!(self.role, Role::Server(_));
    }

    /// Makes a connection if there is none and one can be made.
    fn join(&mut self, poller: &Poller) {
        if self.socket.is_some() {
            return;
        }
        if let (Role::Server(listener), true) = (&self.role, self.calling) {
            match listener.accept() {
                Ok((s, _)) if s.set_nonblocking(true).is_ok() => self.socket = Some(s),
                _ => self.calling = false,
            }
        } else if self.retry.is_some_and(|t| t <= Instant::now())
            && let Role::Client(address, again) = &self.role
        {
            let (address, again) = (address.clone(), *again);
            let dialled = self.dial(&address).is_ok();
            self.retry = again.filter(|_| !dialled).map(|t| Instant::now() + t);
        }
        if let Some(s) = &self.socket
            && let Err(e) = poller.add_edge(s, STREAM)
        {
            self.hang_up(&e.to_string());
        }
    }

    /// Sends what waits; returns whether the guest may send more.
    fn flush(&mut self) -> bool {
        while self.writable && !self.out.is_empty() {
            let Some(s) = &self.socket else { break };
            let (a, _) = self.out.as_slices();
            // SAFETY: the piece is what waits, borrowed.
            match unsafe { send(s, Src::new(a).iov()) } {
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if would_block(&e) => self.writable = false,
                Err(e) => self.hang_up(&e.to_string()),
            }
        }
        self.out.len() < BACKLOG
    }

    fn put(&mut self, frame: &Src<'_>) {
        let len = frame.len() as usize;
        if self.socket.is_none() || self.connecting || len > MAX_FRAME {
            return;
        }
        let mut prefix = (len as u32).to_be_bytes();
        let mut sent = 0;
        if self.writable
            && self.out.is_empty()
            && let Some(s) = &self.socket
        {
            let mut iov = Vec::with_capacity(1 + frame.iov().len());
            iov.push(libc::iovec { iov_base: prefix.as_mut_ptr().cast(), iov_len: PREFIX });
            iov.extend_from_slice(frame.iov());
            // SAFETY: the prefix is ours, and the frame's pieces are readable (their constructor's
            // contract).
            match unsafe { send(s, &iov) } {
                Ok(n) => sent = n,
                Err(e) if would_block(&e) => self.writable = false,
                Err(e) => return self.hang_up(&e.to_string()),
            }
        }
        if sent < PREFIX {
            self.out.extend(&prefix[sent..]);
        }
        let from = sent.saturating_sub(PREFIX);
        let mut rest = vec![0; len - from];
        frame.sub(from as u64, rest.len() as u64).copy_to(&mut rest);
        self.out.extend(rest);
    }

    /// Gives the guest what has arrived; returns whether there is more.
    fn receive(&mut self, card: &dyn Card) -> bool {
        for _ in 0..TURN {
            let have = self.end - self.start;
            let need = match self.input[self.start..self.end].first_chunk::<PREFIX>() {
                Some(p) => PREFIX + u32::from_be_bytes(*p) as usize,
                None => usize::MAX,
            };
            if need != usize::MAX && need > PREFIX + MAX_FRAME {
                self.hang_up("it sent a frame that is too long");
                return false;
            }
            if need <= have {
                let frame = &self.input[self.start + PREFIX..self.start + need];
                let header = VnetHeader { num_buffers: 1, ..VnetHeader::default() };
                if card.receive(&header, &[frame], 0) == Delivery::Full {
                    return false;
                }
                self.start += need;
                continue;
            }
            if self.start > 0 {
                self.input.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, have);
            }
            let Some(s) = self.socket.as_ref().filter(|_| self.readable) else { return false };
            let mut reader = s;
            match reader.read(&mut self.input[self.end..]) {
                Ok(0) => {
                    self.hang_up("the far end has closed it");
                    return false;
                }
                Ok(n) => self.end += n,
                Err(e) if would_block(&e) => self.readable = false,
                Err(e) => {
                    self.hang_up(&e.to_string());
                    return false;
                }
            }
        }
        true
    }
}

impl Link for Stream {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        if let Role::Server(l) = &self.role {
            poller.add_edge(l, LISTENER)?;
        }
        match &self.socket {
            Some(s) => poller.add_edge(s, STREAM),
            None => Ok(()),
        }
    }

    fn turn(&mut self, card: &dyn Card, poller: &Poller, ready: &[Ready]) -> Option<Duration> {
        for r in ready {
            if r.token == LISTENER {
                self.calling = true;
            } else {
                self.readable |= r.read;
                self.writable |= r.write;
            }
        }
        if self.connecting
            && self.writable
            && let Some(s) = &self.socket
        {
            match s.take_error() {
                Ok(None) => self.connecting = false,
                Ok(Some(e)) | Err(e) => self.hang_up(&e.to_string()),
            }
        }
        self.join(poller);
        let mut more = false;
        if self.flush() {
            let mut left = TURN;
            more = card.transmit(&mut |_, frame| {
                self.put(frame);
                left -= 1;
                if left == 0 || self.out.len() >= BACKLOG { Taken::Enough } else { Taken::More }
            }) && self.out.len() < BACKLOG;
        }
        if self.receive(card) || more {
            return Some(Duration::ZERO);
        }
        self.retry.map(|t| t.saturating_duration_since(Instant::now()))
    }
}

/// Frames as datagrams.
pub struct Datagrams {
    socket: Socket,
    remote: Option<SockAddr>,
    readable: bool,
    buf: Vec<u8>,
    waiting: usize,
}

impl Datagrams {
    /// Sends to `remote` and receives at `local`; one may be absent if the other end is known to
    /// the far side.
    pub fn new(local: Option<&Address>, remote: Option<&Address>) -> io::Result<Datagrams> {
        let (domain, to) = match remote {
            Some(r) => r.to_sock().map(|(d, a)| (d, Some(a)))?,
            None => (local.map_or(Ok(Domain::UNIX), |l| l.to_sock().map(|l| l.0))?, None),
        };
        let socket = Socket::new(domain, Type::DGRAM, None)?;
        if let Some(l) = local {
            if let Address::Unix(p) = l {
                // A socket that an earlier run has left.
                let _ = std::fs::remove_file(p);
            }
            socket.bind(&l.to_sock()?.1)?;
        }
        Datagrams::with(socket, to)
    }

    /// A socket that somebody else has connected.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Datagrams> {
        Datagrams::with(Socket::from(fd), None)
    }

    fn with(socket: Socket, remote: Option<SockAddr>) -> io::Result<Datagrams> {
        socket.set_nonblocking(true)?;
        let buf = vec![0; MAX_FRAME];
        Ok(Datagrams { socket, remote, readable: false, buf, waiting: 0 })
    }
}

impl Link for Datagrams {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add_edge(&self.socket, 0)
    }

    fn turn(&mut self, card: &dyn Card, _: &Poller, ready: &[Ready]) -> Option<Duration> {
        self.readable |= ready.iter().any(|r| r.read);
        let mut left = TURN;
        let mut frame = Vec::new();
        let more = card.transmit(&mut |_, from| {
            frame.clear();
            frame.resize(from.len().min(MAX_FRAME as u64) as usize, 0);
            from.copy_to(&mut frame);
            // What cannot be sent is lost, as on a wire.
            let _ = match &self.remote {
                Some(to) => self.socket.send_to(&frame, to),
                None => self.socket.send(&frame),
            };
            left -= 1;
            if left == 0 { Taken::Enough } else { Taken::More }
        });
        for _ in 0..TURN {
            if self.waiting == 0 {
                if !self.readable {
                    return more.then_some(Duration::ZERO);
                }
                match (&self.socket).read(&mut self.buf) {
                    Ok(n) => self.waiting = n,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                    // Of an earlier frame that nobody took.
                    Err(_) => {}
                }
                continue;
            }
            let header = VnetHeader { num_buffers: 1, ..VnetHeader::default() };
            if card.receive(&header, &[&self.buf[..self.waiting]], 0) == Delivery::Full {
                return more.then_some(Duration::ZERO);
            }
            self.waiting = 0;
        }
        Some(Duration::ZERO)
    }
}
