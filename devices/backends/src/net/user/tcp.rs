//! TCP between the guest and sockets of the host.
//!
//! The guest's connection ends here; its bytes go on through a socket. Bytes of the guest are
//! written to the socket straight from guest memory and acknowledged when the socket or our buffer
//! has them; bytes for the guest stay in a buffer until the guest has acknowledged them.
//!
//! ```text
//!   guest's SYN ─► Connecting ─ connected ─► Answering ─ guest's ACK ─► Open ─ both FINs, all
//!   host's connection ─► Calling ─ guest's SYN+ACK ──────────────────────┘     acknowledged ─► gone
//! ```
//!
//! The way to the guest loses nothing as long as the guest takes it, so there is no congestion
//! control: the guest's window is the only limit. A guest that drops frames is helped by fast
//! retransmission and a timer (RFC 9293, RFC 5681 §3.2). Segments out of order are dropped.

use super::flows::{Flows, TCP};
use super::lan::{Lan, MTU, host_mac};
use super::ring::Ring;
use super::wire::{Builder, Ip, TcpHeader, flag, proto};
use crate::block::pieces::Src;
use crate::net::gather::{self, would_block};
use crate::net::poller::{Poller, Ready};
use crate::net::{MacAddr, VnetHeader};
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr};
use std::process::Child;
use std::time::{Duration, Instant};

/// Connections at a time.
pub const MAX_FLOWS: usize = 4096;
/// Bytes buffered for one connection in one direction.
const BUFFER: usize = 512 << 10;
/// Bytes that all connections buffer together beyond the first of each.
const BUDGET: usize = 128 << 20;
/// Scale of the window that we offer: it reaches [`BUFFER`].
const WSCALE: u8 = 4;
/// Bytes of one connection that are moved in one turn.
const TURN: usize = 1 << 20;
const FIRST_RTO: Duration = Duration::from_millis(300);
const MAX_RTO: Duration = Duration::from_secs(10);
/// Retransmissions before a connection is given up.
const RETRIES: u32 = 16;

/// The ends of a connection as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's.
    pub guest: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The socket is being connected.
    Connecting,
    /// The guest's SYN is answered.
    Answering,
    /// A SYN is sent to the guest.
    Calling,
    Open,
    /// To be forgotten.
    Gone,
}

/// What is the same in all segments to the guest.
#[derive(Clone, Copy)]
struct Path {
    key: Key,
    mac: MacAddr,
    host: MacAddr,
    flow: u32,
}

struct Flow {
    path: Path,
    state: State,
    socket: Socket,
    /// A program at the other end.
    child: Option<Child>,
    readable: bool,
    writable: bool,

    /// From the guest: the next byte, and what the socket has not taken.
    rcv_nxt: u32,
    to_host: Ring,
    guest_fin: bool,
    host_shut: bool,
    /// The window that the guest knows of.
    told: u32,
    ack_due: bool,

    /// To the guest: acknowledged, sent, and sent at most; the buffer starts at `una`.
    una: u32,
    nxt: u32,
    max: u32,
    to_guest: Ring,
    window: u32,
    wscale: u8,
    scaling: bool,
    mss: usize,
    host_eof: bool,
    fin_sent: bool,
    dup_acks: u32,

    rto: Duration,
    retries: u32,
    deadline: Option<Instant>,
}

/// Whether sequence number `a` comes before `b`.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// All connections.
#[derive(Default)]
pub struct Tcp {
    flows: Flows<Key, Box<Flow>>,
    memory: usize,
    /// No timer is due before.
    next: Option<Instant>,
    seed: RandomState,
}

/// Writes pieces of memory to a socket.
fn send(socket: &Socket, from: &Src<'_>) -> io::Result<usize> {
    // SAFETY: the pieces are readable (their constructor's contract).
    unsafe { gather::send(socket, from.iov()) }
}

/// Emits one segment, or several as one; returns whether the guest took it.
fn segment(
    lan: &mut Lan<'_>,
    path: &Path,
    (seq, ack, flags, window): (u32, u32, u8, u16),
    options: &[u8],
    mss: usize,
    data: (&[u8], &[u8]),
) -> bool {
    let (remote, guest) = (path.key.remote, path.key.guest);
    let payload = data.0.len() + data.1.len();
    let len = 20 + options.len() + payload;
    let mut b = Builder::ip((path.mac, path.host), (remote.ip(), guest.ip()), proto::TCP, len, 64);
    let at = b.transport();
    b.put(&remote.port().to_be_bytes());
    b.put(&guest.port().to_be_bytes());
    b.put(&seq.to_be_bytes());
    b.put(&ack.to_be_bytes());
    b.put(&[((20 + options.len()) as u8) << 2, flags]);
    b.put(&window.to_be_bytes());
    b.put(&[0; 4]);
    b.put(options);
    let mut header = VnetHeader { num_buffers: 1, ..VnetHeader::default() };
    let mut sum = b.pseudo(proto::TCP, len);
    if lan.offloads().csum {
        header.flags = VnetHeader::NEEDS_CSUM;
        (header.csum_start, header.csum_offset) = (at as u16, 16);
        b.set(at + 16, &sum.folded().to_be_bytes());
    } else {
        sum.add(&b.bytes()[at..]);
        sum.add(data.0);
        sum.add(data.1);
        b.set(at + 16, &sum.finish().to_be_bytes());
    }
    if payload > mss {
        let v4 = guest.is_ipv4();
        header.gso_type = if v4 { VnetHeader::GSO_TCP4 } else { VnetHeader::GSO_TCP6 };
        (header.gso_size, header.hdr_len) = (mss as u16, b.bytes().len() as u16);
    }
    lan.send(&header, &[b.bytes(), data.0, data.1], path.flow)
}

impl Flow {
    fn in_flight(&self) -> u32 {
        self.nxt.wrapping_sub(self.una)
    }

    fn free_window(&self) -> u32 {
        (BUFFER - self.to_host.len().min(BUFFER)) as u32
    }

    /// The window field of the next segment.
    fn window_field(&self) -> u16 {
        let scale = if self.scaling && self.state == State::Open { WSCALE } else { 0 };
        (self.free_window() >> scale).min(0xffff) as u16
    }

    fn arm(&mut self, next: &mut Option<Instant>) {
        let at = Instant::now() + self.rto;
        self.deadline = Some(at);
        *next = Some(next.map_or(at, |n| n.min(at)));
    }

    /// Sends a SYN, with ACK if the guest's has come.
    fn syn(&mut self, lan: &mut Lan<'_>, next: &mut Option<Instant>) {
        self.arm(next);
        let Some(mac) = lan.find(self.path.key.guest.ip()) else { return };
        self.path.mac = mac;
        let header = if self.path.key.guest.is_ipv4() { 40 } else { 60 };
        let [a, b] = ((MTU - header) as u16).to_be_bytes();
        let mut options = vec![2, 4, a, b];
        if self.scaling {
            options.extend([1, 3, 3, WSCALE]);
        }
        let (ack, flags) = match self.state {
            State::Calling => (0, flag::SYN),
            _ => (self.rcv_nxt, flag::SYN | flag::ACK),
        };
        let window = self.window_field();
        self.told = window.into();
        segment(lan, &self.path, (self.una, ack, flags, window), &options, MTU, (&[], &[]));
    }

    /// A bare segment. Returns whether the guest took it.
    fn bare(&mut self, lan: &mut Lan<'_>, flags: u8, seq: u32) -> bool {
        let window = self.window_field();
        let words = (seq, self.rcv_nxt, flags | flag::ACK, window);
        let sent = segment(lan, &self.path, words, &[], MTU, (&[], &[]));
        if sent {
            self.ack_due = false;
            self.told = self.free_window();
        }
        sent
    }

    /// Ends the connection at once on both sides.
    fn abort(&mut self, lan: &mut Lan<'_>) {
        if self.state != State::Gone {
            self.bare(lan, flag::RST, self.nxt);
            self.drop_host();
        }
    }

    /// Ends the host's side as the guest has reset its own.
    fn drop_host(&mut self) {
        let _ = self.socket.set_linger(Some(Duration::ZERO));
        self.state = State::Gone;
    }

    /// A segment of the guest's.
    fn input(
        &mut self,
        lan: &mut Lan<'_>,
        t: &TcpHeader,
        data: &Src<'_>,
        next: &mut Option<Instant>,
    ) {
        if t.flags & flag::RST != 0 {
            let fits = match self.state {
                State::Calling => t.ack == self.una.wrapping_add(1),
                _ => t.seq == self.rcv_nxt,
            };
            if fits {
                self.drop_host();
            }
            return;
        }
        match self.state {
            State::Gone | State::Connecting => return,
            State::Calling => {
                let both = flag::SYN | flag::ACK;
                if t.flags & both != both || t.ack != self.una.wrapping_add(1) {
                    return;
                }
                self.hear_syn(t);
                self.established(t);
                self.ack_due = true;
                return;
            }
            State::Answering => {
                if t.flags & flag::SYN != 0 {
                    return self.syn(lan, next);
                }
                if t.flags & flag::ACK == 0 || t.ack != self.una.wrapping_add(1) {
                    return;
                }
                self.established(t);
            }
            State::Open => {}
        }
        if t.flags & flag::SYN != 0 || t.flags & flag::ACK == 0 {
            self.ack_due = true;
            return;
        }
        self.acknowledged(t, data.is_empty());
        self.take(t, data);
    }

    fn hear_syn(&mut self, t: &TcpHeader) {
        self.rcv_nxt = t.seq.wrapping_add(1);
        let most = MTU - if self.path.key.guest.is_ipv4() { 40 } else { 60 };
        self.mss = usize::from(t.mss.unwrap_or(536)).clamp(64, most);
        self.scaling = t.wscale.is_some();
        self.wscale = t.wscale.unwrap_or(0);
    }

    fn established(&mut self, t: &TcpHeader) {
        self.una = t.ack;
        self.nxt = t.ack;
        self.max = t.ack;
        // A window in a SYN is not scaled.
        let scale = if t.flags & flag::SYN != 0 { 0 } else { self.wscale };
        self.window = u32::from(t.window) << scale;
        self.state = State::Open;
        self.quiet();
    }

    /// Nothing is on the way any more.
    fn quiet(&mut self) {
        (self.deadline, self.rto, self.retries) = (None, FIRST_RTO, 0);
    }

    fn acknowledged(&mut self, t: &TcpHeader, bare: bool) {
        let window = u32::from(t.window) << self.wscale;
        let advance = t.ack.wrapping_sub(self.una);
        if advance > 0 && advance <= self.max.wrapping_sub(self.una) {
            // The FIN counts as one byte that is in no buffer.
            self.to_guest.consume(advance as usize);
            self.una = t.ack;
            if before(self.nxt, self.una) {
                self.nxt = self.una;
            }
            self.dup_acks = 0;
            self.quiet();
        } else if advance == 0 && bare && window == self.window && self.in_flight() > 0 {
            // Whoever answers is alive, however long its window stays shut.
            self.retries = 0;
            self.dup_acks += 1;
            if self.dup_acks == 3 {
                self.nxt = self.una;
                self.fin_sent = false;
            }
        } else if advance != 0 {
            return;
        } else {
            self.retries = 0;
        }
        self.window = window;
    }

    /// Takes the bytes of a segment that are new, as far as there is room.
    fn take(&mut self, t: &TcpHeader, data: &Src<'_>) {
        let len = data.len() as u32;
        let fin = t.flags & flag::FIN != 0;
        if len == 0 && !fin {
            // A probe of a keep-alive.
            self.ack_due |= t.seq != self.rcv_nxt;
            return;
        }
        self.ack_due = true;
        let old = self.rcv_nxt.wrapping_sub(t.seq);
        if before(self.rcv_nxt, t.seq) || self.guest_fin || old > len {
            return;
        }
        let new = len - old;
        let room = self.free_window().min(new);
        let taken = self.pass_on(&data.sub(old.into(), room.into()));
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken);
        if fin && taken == new {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.guest_fin = true;
        }
    }

    /// Writes to the socket what it takes, and keeps the rest, which fits.
    fn pass_on(&mut self, data: &Src<'_>) -> u32 {
        let len = data.len();
        let mut sent = 0;
        while self.to_host.is_empty() && self.writable && sent < len {
            match send(&self.socket, &data.sub(sent, len - sent)) {
                Ok(n) => sent += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if would_block(&e) => self.writable = false,
                Err(_) => {
                    // The reader is gone: what is on the way is lost, as with a real one.
                    self.host_shut = true;
                    return len as u32;
                }
            }
        }
        if self.host_shut {
            return len as u32;
        }
        while sent < len {
            if self.to_host.is_full() {
                self.to_host.grow();
            }
            let spare = self.to_host.spare();
            let n = (spare.len() as u64).min(len - sent);
            data.sub(sent, n).copy_to(&mut spare[..n as usize]);
            self.to_host.commit(n as usize);
            sent += n;
        }
        len as u32
    }

    /// Writes what was kept.
    fn flush(&mut self) {
        while self.writable && !self.to_host.is_empty() {
            let (a, _) = self.to_host.slices(0, usize::MAX);
            match send(&self.socket, &Src::new(a)) {
                Ok(n) => self.to_host.consume(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if would_block(&e) => self.writable = false,
                Err(_) => {
                    self.to_host = Ring::default();
                    self.host_shut = true;
                }
            }
        }
        if self.guest_fin && self.to_host.is_empty() && !self.host_shut {
            let _ = self.socket.shutdown(Shutdown::Write);
            self.host_shut = true;
        }
    }

    /// Reads from the socket into the buffer. Returns whether it may have more for now.
    fn fill(&mut self, memory: usize, lan: &mut Lan<'_>) -> bool {
        let mut left = TURN;
        while self.readable && left > 0 {
            if self.to_guest.is_full() {
                let first = self.to_guest.capacity() == 0;
                let more = self.to_guest.capacity() < BUFFER && memory < BUDGET;
                if !(first || more) {
                    return false;
                }
                self.to_guest.grow();
            }
            match (&self.socket).read(self.to_guest.spare()) {
                Ok(0) => {
                    self.host_eof = true;
                    self.readable = false;
                }
                Ok(n) => {
                    self.to_guest.commit(n);
                    left = left.saturating_sub(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if would_block(&e) => self.readable = false,
                Err(_) => {
                    self.readable = false;
                    self.abort(lan);
                }
            }
        }
        self.readable
    }

    /// Sends what the guest's window allows.
    fn emit(&mut self, lan: &mut Lan<'_>, next: &mut Option<Instant>) {
        let offloads = lan.offloads();
        let tso = if self.path.key.guest.is_ipv4() { offloads.tso4 } else { offloads.tso6 };
        let most = if tso && offloads.csum { 65535 - 60 } else { self.mss };
        loop {
            let sent = self.in_flight() as usize;
            if sent > self.to_guest.len() {
                break;
            }
            let window = (self.window as usize).saturating_sub(sent);
            let unsent = self.to_guest.len() - sent;
            let mut n = unsent.min(window).min(most);
            if n == 0 || n < self.mss && n < unsent && sent > 0 {
                break;
            }
            if n > self.mss && n < unsent {
                // Whole segments.
                n -= n % self.mss;
            }
            let last = n == unsent;
            let data = self.to_guest.slices(sent, n);
            let flags = flag::ACK | if last { flag::PSH } else { 0 };
            let words = (self.nxt, self.rcv_nxt, flags, self.window_field());
            if !segment(lan, &self.path, words, &[], self.mss, data) {
                return;
            }
            self.ack_due = false;
            self.told = self.free_window();
            self.advance(n as u32, next);
        }
        let all = self.in_flight() as usize == self.to_guest.len();
        if self.host_eof && all && !self.fin_sent && self.bare(lan, flag::FIN, self.nxt) {
            self.fin_sent = true;
            self.advance(1, next);
        }
        // A window that has opened by much is worth telling of.
        let opened = self.free_window() as usize >= self.told as usize + BUFFER / 4;
        if (self.ack_due || opened) && self.state == State::Open {
            self.ack_due = !self.bare(lan, 0, self.nxt);
        }
        // The timer sends again what is lost, and probes a window that is shut.
        let waiting = self.in_flight() > 0 || !self.to_guest.is_empty();
        if self.deadline.is_none() && waiting {
            self.arm(next);
        }
    }

    fn advance(&mut self, n: u32, next: &mut Option<Instant>) {
        self.nxt = self.nxt.wrapping_add(n);
        if before(self.max, self.nxt) {
            self.max = self.nxt;
        }
        if self.deadline.is_none() {
            self.arm(next);
        }
    }

    /// Both sides have ended and know it.
    fn is_over(&self) -> bool {
        let acknowledged = self.fin_sent && self.una == self.max;
        self.guest_fin && self.host_shut && self.host_eof && acknowledged && !self.ack_due
    }

    /// The timer has run out.
    fn timeout(&mut self, lan: &mut Lan<'_>, next: &mut Option<Instant>) {
        self.deadline = None;
        // A guest that takes no frames at all, as a stopped one, loses none.
        self.retries += u32::from(!lan.full);
        if self.retries > RETRIES {
            return self.abort(lan);
        }
        self.rto = (self.rto * 2).min(MAX_RTO);
        match self.state {
            State::Calling | State::Answering => self.syn(lan, next),
            State::Open if self.in_flight() > 0 => {
                // Everything again.
                self.nxt = self.una;
                self.fin_sent = false;
                self.arm(next);
            }
            State::Open if self.window == 0 && !self.to_guest.is_empty() => {
                let data = self.to_guest.slices(0, 1);
                let words = (self.nxt, self.rcv_nxt, flag::ACK, self.window_field());
                if segment(lan, &self.path, words, &[], self.mss, data) {
                    self.max = self.nxt.wrapping_add(1);
                }
                self.arm(next);
            }
            _ => {}
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It has lost its input; one that does not care is ended.
            if !matches!(child.try_wait(), Ok(Some(_))) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Tcp {
    /// A random sequence number to start with.
    fn isn(&self, key: &Key) -> u32 {
        let now = Instant::now();
        self.seed.hash_one((key, now)) as u32
    }

    fn add(
        &mut self,
        poller: &Poller,
        path: Path,
        state: State,
        socket: Socket,
        child: Option<Child>,
    ) -> io::Result<u32> {
        let isn = self.isn(&path.key);
        let flow = Flow {
            path,
            state,
            socket,
            child,
            readable: false,
            writable: false,
            rcv_nxt: 0,
            to_host: Ring::default(),
            guest_fin: false,
            host_shut: false,
            told: 0,
            ack_due: false,
            una: isn,
            nxt: isn.wrapping_add(1),
            max: isn.wrapping_add(1),
            to_guest: Ring::default(),
            window: 0,
            wscale: 0,
            scaling: true,
            mss: 536,
            host_eof: false,
            fin_sent: false,
            dup_acks: 0,
            rto: FIRST_RTO,
            retries: 0,
            deadline: None,
        };
        let index = self.flows.insert(path.key, Box::new(flow));
        let token = self.flows.token(TCP, index);
        let made = match self.flows.get(index) {
            Some(f) => poller.add_edge(&f.socket, token),
            None => Ok(()),
        };
        if let Err(e) = made {
            self.flows.remove(index);
            return Err(e);
        }
        Ok(index)
    }

    /// Whether another connection can be kept.
    pub fn has_room(&self) -> bool {
        self.flows.len() < MAX_FLOWS
    }

    /// Connects a socket for the guest's SYN.
    fn open(
        &mut self,
        lan: &mut Lan<'_>,
        poller: &Poller,
        (key, mac): (Key, MacAddr),
        t: &TcpHeader,
        made: io::Result<(Socket, Option<Child>)>,
    ) -> bool {
        let host = host_mac(lan.config);
        let path = Path { key, mac, host, flow: u32::from(key.guest.port()) };
        let added = made.and_then(|(s, child)| self.add(poller, path, State::Connecting, s, child));
        match added {
            Ok(index) => {
                if let Some(f) = self.flows.get_mut(index) {
                    f.hear_syn(t);
                }
                true
            }
            Err(e) => {
                log::debug!("connection of the guest to {}: {e}", key.remote);
                false
            }
        }
    }

    /// A connection to the host that is to reach the guest.
    pub fn call(
        &mut self,
        lan: &mut Lan<'_>,
        poller: &Poller,
        key: Key,
        socket: Socket,
    ) -> io::Result<()> {
        if self.flows.find(&key).is_some() || !self.has_room() {
            return Err(io::Error::other("the connection cannot be told from another"));
        }
        let host = host_mac(lan.config);
        let mac = MacAddr::default();
        let path = Path { key, mac, host, flow: u32::from(key.guest.port()) };
        let index = self.add(poller, path, State::Calling, socket, None)?;
        if let Some(f) = self.flows.get_mut(index) {
            f.syn(lan, &mut self.next);
        }
        Ok(())
    }

    /// A segment of the guest's. `connect` makes the socket for a new connection.
    pub fn input(
        &mut self,
        lan: &mut Lan<'_>,
        poller: &Poller,
        (ip, mac): (&Ip, MacAddr),
        t: &TcpHeader,
        data: &Src<'_>,
        connect: impl FnOnce() -> io::Result<(Socket, Option<Child>)>,
    ) {
        let key =
            Key { guest: SocketAddr::new(ip.src, t.src), remote: SocketAddr::new(ip.dst, t.dst) };
        if let Some(index) = self.flows.find(&key) {
            if let Some(f) = self.flows.get_mut(index) {
                f.path.mac = mac;
                f.input(lan, t, data, &mut self.next);
            }
            self.flows.activate(index);
            return;
        }
        let begins = t.flags & (flag::SYN | flag::ACK | flag::RST) == flag::SYN;
        let fits = begins && self.has_room();
        if !fits || !self.open(lan, poller, (key, mac), t, connect()) {
            lan.tcp_reset(ip, t, data.len() as usize);
        }
    }

    /// A socket has become ready.
    pub fn ready(&mut self, r: &Ready) {
        if let Some(index) = self.flows.by_token(r.token) {
            if let Some(f) = self.flows.get_mut(index) {
                f.readable |= r.read;
                f.writable |= r.write;
            }
            self.flows.activate(index);
        }
    }

    /// Moves the bytes of all connections that something has happened to.
    pub fn pump(&mut self, lan: &mut Lan<'_>) {
        self.timers(lan);
        for index in self.flows.take_active() {
            let Some(f) = self.flows.get_mut(index) else { continue };
            let before = f.to_guest.capacity() + f.to_host.capacity();
            let again = step(f, lan, self.memory, &mut self.next);
            let after = f.to_guest.capacity() + f.to_host.capacity();
            let gone = f.state == State::Gone || f.is_over();
            self.memory = (self.memory + after).saturating_sub(before);
            if gone {
                self.memory = self.memory.saturating_sub(after);
                self.flows.remove(index);
            } else if again {
                self.flows.activate(index);
            }
        }
    }

    fn timers(&mut self, lan: &mut Lan<'_>) {
        let now = Instant::now();
        if self.next.is_none_or(|n| n > now) {
            return;
        }
        let mut next = None;
        for index in self.flows.indices() {
            let Some(f) = self.flows.get_mut(index) else { continue };
            if f.deadline.is_some_and(|d| d <= now) {
                f.timeout(lan, &mut next);
                self.flows.activate(index);
            } else if let Some(d) = f.deadline {
                next = Some(next.map_or(d, |n: Instant| n.min(d)));
            }
        }
        self.next = next;
    }

    /// A guest's address has become known: who waits for it need not wait for the timer.
    pub fn neighbour(&mut self, lan: &mut Lan<'_>, ip: std::net::IpAddr) {
        for index in self.flows.indices() {
            if let Some(f) = self.flows.get_mut(index)
                && f.state == State::Calling
                && f.path.key.guest.ip() == ip
            {
                f.syn(lan, &mut self.next);
            }
        }
    }

    /// Whether there is something that can be done at once.
    pub fn is_busy(&self) -> bool {
        self.flows.any_active()
    }

    /// When a timer runs out.
    pub fn deadline(&self) -> Option<Instant> {
        self.next
    }

    /// Connections.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.flows.len()
    }
}

/// Moves the bytes of a connection. Returns whether it has more to do without being woken.
fn step(f: &mut Flow, lan: &mut Lan<'_>, memory: usize, next: &mut Option<Instant>) -> bool {
    match f.state {
        State::Connecting if f.writable || f.readable => {
            match f.socket.take_error() {
                Ok(None) if f.writable => {
                    f.state = State::Answering;
                    f.syn(lan, next);
                }
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => {
                    f.nxt = f.una;
                    f.abort(lan);
                }
            }
            return false;
        }
        State::Open => {}
        _ => return false,
    }
    f.flush();
    let more = f.fill(memory, lan);
    if f.state == State::Open {
        f.emit(lan, next);
    }
    // With the guest's buffers full, the guest wakes us; the flow must be looked at then.
    more && !f.to_guest.is_full() || lan.full
}

/// A socket that is being connected to `to`.
pub fn connect(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    begin(socket, &to.into())
}

/// Begins to connect `socket`.
pub fn begin(socket: Socket, to: &SockAddr) -> io::Result<Socket> {
    match socket.connect(to) {
        Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) && !would_block(&e) => Err(e),
        _ => Ok(socket),
    }
}
