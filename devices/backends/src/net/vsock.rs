//! Virtual sockets between a guest and unix sockets of the host (Virtio 1.3 §5.10), by
//! Firecracker's convention:
//!
//! * A program on the host connects to the socket at PATH, writes `CONNECT PORT\n`, and once it has
//!   read `OK NUMBER\n` talks to whoever listens on that port in the guest.
//! * A guest's connection to port N of the host (CID 2) goes to the unix socket `PATH_N`.
//!
//! A packet is a frame whose first [`HEADER`] bytes are its header; frames' own headers mean
//! nothing here. The guest is never sent more than it has said it has room for, nor is it let send
//! more than [`BUFFER`] bytes that its far end has not taken.

use super::poller::{Poller, Ready};
use super::{Card, Delivery, Link, Taken, VnetHeader};
use crate::block::pieces::Src;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of a packet's header.
pub const HEADER: usize = 44;
/// Bytes of a connection that wait for the host's side.
const BUFFER: u32 = 256 << 10;
/// Longest payload of a packet to the guest: drivers give one buffer for a packet, some of them less than 4 KiB.
const PIECE: usize = 3584;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 1024;
/// Packets moved in one turn.
const TURN: usize = 256;
/// Callers that have not said which port they want; and the longest they may say it.
const MAX_CALLERS: usize = 64;
const MAX_REQUEST: usize = 32;
/// Packets to the guest that wait for room; beyond them connections wait.
const MAX_WAITING: usize = 4096;
/// The host's address.
const HOST: u64 = 2;
/// Where the numbers of calls from the host start.
const FIRST_PORT: u32 = 1 << 30;
const STREAM: u16 = 1;

const LISTENER: u64 = 0;
const CALLER: u64 = 1 << 62;

/// Operations (§5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Port of the host, port of the guest.
type Key = (u32, u32);

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Packet {
    fn parse(b: &[u8; HEADER]) -> Packet {
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let u16_at = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Packet {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    fn bytes(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        b
    }
}

/// The guest has no room.
struct Full;

/// A connection.
struct Connection {
    stream: UnixStream,
    /// The guest has answered, or has asked itself.
    open: bool,
    readable: bool,
    writable: bool,
    /// Bytes that the stream has not taken.
    to_host: VecDeque<u8>,
    /// What the guest has said: its room, and what it has taken; and what we sent.
    peer_alloc: u32,
    peer_taken: u32,
    sent: u32,
    /// What the stream has taken, and what the guest was told of that.
    taken: u32,
    told: u32,
    /// The guest sends no more; the stream gives no more.
    guest_done: bool,
    host_done: bool,
}

/// A caller from the host who has not said which port it wants.
struct Caller {
    stream: UnixStream,
    said: Vec<u8>,
}

/// Virtual sockets of one guest.
pub struct Vsock {
    path: PathBuf,
    listener: UnixListener,
    cid: u64,
    calling: bool,
    callers: HashMap<u64, Caller>,
    next_caller: u64,
    next_port: u32,
    connections: HashMap<Key, Connection>,
    /// Packets without payload for the guest.
    waiting: VecDeque<Packet>,
}

impl Vsock {
    /// Sockets of the guest with address `cid`, on the host at `path`, where nothing or a stale
    /// socket may be.
    pub fn new(path: &Path, cid: u64) -> io::Result<Vsock> {
        use std::os::unix::fs::FileTypeExt;
        let stale = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
            && UnixStream::connect(path)
                .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
        if stale {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Vsock {
            path: path.into(),
            listener,
            cid,
            calling: false,
            callers: HashMap::new(),
            next_caller: 0,
            next_port: FIRST_PORT,
            connections: HashMap::new(),
            waiting: VecDeque::new(),
        })
    }

    fn token((host, guest): Key) -> u64 {
        // Ports of the host that we give are below 2^31; a guest's choice above is refused.
        1 << 63 | u64::from(host) << 32 & !(1 << 63) | u64::from(guest)
    }

    fn packet(&self, (host, guest): Key, op: u16) -> Packet {
        let c = self.connections.get(&(host, guest));
        Packet {
            src_cid: HOST,
            dst_cid: self.cid,
            src_port: host,
            dst_port: guest,
            kind: STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: c.map_or(0, |c| c.taken),
            ..Packet::default()
        }
    }

    fn say(&mut self, key: Key, op: u16, flags: u32) {
        if self.waiting.len() < MAX_WAITING {
            let packet = Packet { flags, ..self.packet(key, op) };
            self.waiting.push_back(packet);
        }
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, key: Key) {
        self.connections.remove(&key);
        self.say(key, op::RST, 0);
    }

    fn add(&mut self, poller: &Poller, key: Key, stream: UnixStream, open: bool) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS || self.connections.contains_key(&key) {
            return Err(io::Error::other("no more connections"));
        }
        stream.set_nonblocking(true)?;
        poller.add_edge(&stream, Vsock::token(key))?;
        let connection = Connection {
            stream,
            open,
            readable: false,
            writable: false,
            to_host: VecDeque::new(),
            peer_alloc: 0,
            peer_taken: 0,
            sent: 0,
            taken: 0,
            told: 0,
            guest_done: false,
            host_done: false,
        };
        self.connections.insert(key, connection);
        Ok(())
    }

    /// A packet of the guest's.
    fn input(&mut self, poller: &Poller, frame: &Src<'_>) {
        let mut header = [0; HEADER];
        if frame.len() < HEADER as u64 {
            return;
        }
        frame.copy_to(&mut header);
        let p = Packet::parse(&header);
        let key = (p.dst_port, p.src_port);
        if p.src_cid != self.cid || p.dst_cid != HOST {
            return;
        }
        if p.kind != STREAM || p.dst_port >> 31 != 0 {
            if p.op != op::RST {
                self.say(key, op::RST, 0);
            }
            return;
        }
        if p.op == op::REQUEST {
            let mut path = self.path.clone().into_os_string();
            path.push(format!("_{}", p.dst_port));
            let made = UnixStream::connect(path).and_then(|s| self.add(poller, key, s, true));
            if made.is_err() {
                return self.say(key, op::RST, 0);
            }
        }
        let Some(c) = self.connections.get_mut(&key) else {
            if p.op != op::RST {
                self.say(key, op::RST, 0);
            }
            return;
        };
        (c.peer_alloc, c.peer_taken) = (p.buf_alloc, p.fwd_cnt);
        match p.op {
            op::REQUEST => self.say(key, op::RESPONSE, 0),
            op::RESPONSE if !c.open => {
                c.open = true;
                let answer = format!("OK {}\n", key.0);
                if c.stream.write_all(answer.as_bytes()).is_err() {
                    self.reset(key);
                }
            }
            op::RST => drop(self.connections.remove(&key)),
            op::SHUTDOWN => {
                // 1: it receives no more; 2: it sends no more.
                c.guest_done |= p.flags & 2 != 0;
                c.host_done |= p.flags & 1 != 0;
                if c.guest_done && c.host_done && c.to_host.is_empty() {
                    self.reset(key);
                }
            }
            op::RW if c.open && !c.guest_done => {
                let len = u64::from(p.len).min(frame.len() - HEADER as u64);
                if c.to_host.len() as u64 + len > BUFFER.into() {
                    // It was told how much room there is.
                    return self.reset(key);
                }
                let mut data = vec![0; len as usize];
                frame.sub(HEADER as u64, len).copy_to(&mut data);
                c.to_host.extend(data);
            }
            op::CREDIT_REQUEST => self.say(key, op::CREDIT_UPDATE, 0),
            _ => {}
        }
    }

    /// Takes calls from the host, and what the callers say.
    fn calls(&mut self, poller: &Poller, ready: &[Ready]) {
        while self.calling {
            let Ok((stream, _)) = self.listener.accept() else {
                self.calling = false;
                break;
            };
            let token = CALLER | self.next_caller;
            let added = stream.set_nonblocking(true).and_then(|()| poller.add_edge(&stream, token));
            if self.callers.len() < MAX_CALLERS && added.is_ok() {
                self.next_caller += 1;
                self.callers.insert(token, Caller { stream, said: Vec::new() });
            }
        }
        let said = ready.iter().filter(|r| r.token & CALLER != 0 && r.token >> 63 == 0);
        let tokens: Vec<u64> = said.map(|r| r.token).collect();
        for token in tokens {
            let Some(caller) = self.callers.get_mut(&token) else { continue };
            match caller.listen() {
                None => {}
                Some(port) => {
                    let Some(caller) = self.callers.remove(&token) else { continue };
                    poller.remove(&caller.stream);
                    let Some(port) = port else { continue };
                    let host = self.next_port;
                    self.next_port = FIRST_PORT | host.wrapping_add(1) & (FIRST_PORT - 1);
                    if self.add(poller, (host, port), caller.stream, false).is_ok() {
                        self.say((host, port), op::REQUEST, 0);
                    }
                }
            }
        }
    }

    /// Sends what waits; returns whether that was all.
    fn flush(&mut self, card: &dyn Card) -> bool {
        while let Some(p) = self.waiting.front() {
            if card.receive(&VnetHeader::default(), &[&p.bytes()], 0) == Delivery::Full {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// Moves the bytes of a connection. Returns whether it may have more to do at once.
    fn pump(&mut self, card: &dyn Card, key: Key) -> Result<bool, Full> {
        let template = self.packet(key, op::RW);
        let Some(c) = self.connections.get_mut(&key) else { return Ok(false) };
        if c.flush().is_err() {
            self.reset(key);
            return Ok(false);
        }
        if c.guest_done && c.to_host.is_empty() {
            let _ = c.stream.shutdown(Shutdown::Write);
        }
        // Room that the guest does not know of is worth telling when it is much.
        let tell = c.taken.wrapping_sub(c.told) >= BUFFER / 4;
        if tell {
            c.told = c.taken;
            self.say(key, op::CREDIT_UPDATE, 0);
        }
        let mut buf = [0; PIECE];
        for _ in 0..8 {
            let Some(c) = self.connections.get_mut(&key) else { return Ok(false) };
            let credit = c.peer_alloc.saturating_sub(c.sent.wrapping_sub(c.peer_taken)) as usize;
            let n = credit.min(PIECE);
            if !c.open || c.host_done || !c.readable || n == 0 {
                return Ok(false);
            }
            // Nothing may be taken from the stream that the guest cannot be given: look first.
            let got = peek(&c.stream, &mut buf[..n]);
            match got {
                Ok(0) => {
                    c.host_done = true;
                    c.readable = false;
                    let over = c.guest_done && c.to_host.is_empty();
                    self.say(key, op::SHUTDOWN, 3);
                    if over {
                        self.reset(key);
                    }
                    return Ok(false);
                }
                Ok(n) => {
                    let p = Packet { len: n as u32, fwd_cnt: c.taken, ..template };
                    let header = VnetHeader::default();
                    if card.receive(&header, &[&p.bytes(), &buf[..n]], 0) == Delivery::Full {
                        return Err(Full);
                    }
                    c.told = c.taken;
                    c.sent = c.sent.wrapping_add(n as u32);
                    let _ = (&c.stream).read_exact(&mut buf[..n]);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => c.readable = false,
                Err(_) => {
                    self.reset(key);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Reads without taking.
fn peek(stream: &UnixStream, buf: &mut [u8]) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    // SAFETY: the pointer and length are those of a live, writable slice.
    let n = unsafe {
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        libc::recv(stream.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags)
    };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

impl Connection {
    /// Writes what waits.
    fn flush(&mut self) -> io::Result<()> {
        while self.writable && !self.to_host.is_empty() {
            match self.stream.write(self.to_host.as_slices().0) {
                Ok(n) => {
                    self.to_host.drain(..n);
                    self.taken = self.taken.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Caller {
    /// Reads `CONNECT PORT\n`, and not a byte more. Some(None): it said something else, or nothing.
    fn listen(&mut self) -> Option<Option<u32>> {
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => {
                    let text = std::str::from_utf8(&self.said).ok();
                    let port = text.and_then(|t| t.strip_prefix("CONNECT "));
                    return Some(port.and_then(|p| p.trim().parse().ok()));
                }
                Ok(1) if self.said.len() < MAX_REQUEST => self.said.push(byte[0]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return Some(None),
            }
        }
    }
}

impl Link for Vsock {
    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add_edge(&self.listener, LISTENER)
    }

    fn attached(&mut self, _: &dyn Card) {
        // Another driver knows nothing of the connections of the one before.
        self.connections.clear();
        self.waiting.clear();
    }

    fn turn(&mut self, card: &dyn Card, poller: &Poller, ready: &[Ready]) -> Option<Duration> {
        for r in ready {
            if r.token == LISTENER {
                self.calling = true;
            } else if r.token >> 63 != 0 {
                let key = ((r.token >> 32) as u32 & (u32::MAX >> 1), r.token as u32);
                if let Some(c) = self.connections.get_mut(&key) {
                    c.readable |= r.read;
                    c.writable |= r.write;
                }
            }
        }
        self.calls(poller, ready);
        let mut left = TURN;
        // What the guest makes us say must have room to wait.
        let mut more = self.waiting.len() < MAX_WAITING / 2
            && card.transmit(&mut |_, frame| {
                self.input(poller, frame);
                left -= 1;
                if left == 0 { Taken::Enough } else { Taken::More }
            });
        // An answer goes before what follows it.
        let mut full = !self.flush(card);
        let keys: Vec<Key> = self.connections.keys().copied().collect();
        for key in keys {
            match self.pump(card, key) {
                Ok(again) => more |= again,
                Err(Full) => full = true,
            }
            if full {
                break;
            }
        }
        full |= !self.flush(card);
        (more && !full).then_some(Duration::ZERO)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
