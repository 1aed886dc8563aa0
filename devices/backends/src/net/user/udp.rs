//! UDP between the guest and sockets of the host: one socket for each of the guest's ports, so
//! that whoever the guest has written to can answer. A conversation ends when nothing was sent
//! either way for [`IDLE`]; when there are too many, the oldest ends.

use super::config::UserConfig;
use super::flows::{Flows, UDP, UDP_FORWARD};
use super::lan::Lan;
use crate::net::poller::{Poller, Ready};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// Conversations at a time.
const MAX_FLOWS: usize = 1024;
/// How long a silent conversation is kept.
pub const IDLE: Duration = Duration::from_secs(240);
/// Datagrams of one socket that are moved in one turn.
const TURN: usize = 64;
/// Callers of one forwarded port that are remembered.
const CALLERS: usize = 1024;

/// The guest's address, whether the host's socket is of IPv4, and whether it is for the virtual
/// network's name server.
type Key = (SocketAddr, bool, bool);

struct Flow {
    guest: SocketAddr,
    socket: UdpSocket,
    last: Instant,
    /// Its answers come from the virtual network's name server.
    asks_dns: bool,
}

/// A forwarded port.
struct Forward {
    socket: UdpSocket,
    guest: SocketAddr,
    /// Callers by the address under which the guest sees them.
    callers: HashMap<SocketAddr, SocketAddr>,
    readable: bool,
}

/// All conversations.
#[derive(Default)]
pub struct Udp {
    flows: Flows<Key, Flow>,
    forwards: Vec<Forward>,
    sweep: Option<Instant>,
}

/// The address under which the guest sees `from`.
pub fn seen(config: &UserConfig, from: SocketAddr, guest: &SocketAddr) -> Option<SocketAddr> {
    let from = match from.ip() {
        IpAddr::V6(a) => {
            a.to_ipv4_mapped().map_or(from, |a| SocketAddr::new(a.into(), from.port()))
        }
        IpAddr::V4(_) => from,
    };
    let same = from.is_ipv4() == guest.is_ipv4();
    match from.ip().is_loopback() || !same {
        true => config.host(&guest.ip()).map(|h| SocketAddr::new(h, from.port())),
        false => Some(from),
    }
}

impl Udp {
    /// Forwards what `socket` receives to `guest`.
    pub fn forward(
        &mut self,
        poller: &Poller,
        socket: UdpSocket,
        guest: SocketAddr,
    ) -> io::Result<()> {
        poller.add_edge(&socket, UDP_FORWARD << 56 | self.forwards.len() as u64)?;
        let callers = HashMap::new();
        self.forwards.push(Forward { socket, guest, callers, readable: false });
        Ok(())
    }

    /// Whether a datagram answers a caller of a forwarded port; it has been sent then.
    pub fn answer(&mut self, from: SocketAddr, to: SocketAddr, data: &[u8]) -> bool {
        let mut forwards = self.forwards.iter().filter(|f| f.guest == from);
        let found = forwards.find_map(|f| f.callers.get(&to).map(|c| (f, c)));
        if let Some((f, caller)) = found {
            // A datagram that cannot be sent is lost.
            let _ = f.socket.send_to(data, caller);
        }
        found.is_some()
    }

    /// Sends a datagram of the guest's to `to`; `asks_dns`: as the virtual network's name server.
    pub fn send(
        &mut self,
        poller: &Poller,
        guest: SocketAddr,
        (to, asks_dns): (SocketAddr, bool),
        data: &[u8],
    ) -> io::Result<()> {
        let key = (guest, to.is_ipv4(), asks_dns);
        let index = match self.flows.find(&key) {
            Some(i) => i,
            None => self.open(poller, key)?,
        };
        let Some(f) = self.flows.get_mut(index) else { return Ok(()) };
        f.last = Instant::now();
        match f.socket.send_to(data, to) {
            // A full socket buffer loses datagrams, as a full router does.
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(()),
        }
    }

    fn open(&mut self, poller: &Poller, key: Key) -> io::Result<u32> {
        if self.flows.len() >= MAX_FLOWS {
            let oldest = |i: &u32| self.flows.get(*i).map(|f| f.last);
            if let Some(i) = self.flows.indices().into_iter().min_by_key(oldest) {
                self.flows.remove(i);
            }
        }
        let any: IpAddr = match key.1 {
            true => Ipv4Addr::UNSPECIFIED.into(),
            false => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        let now = Instant::now();
        self.sweep.get_or_insert(now + IDLE);
        let index =
            self.flows.insert(key, Flow { guest: key.0, socket, last: now, asks_dns: key.2 });
        let token = self.flows.token(UDP, index);
        if let Some(f) = self.flows.get(index) {
            poller.add_edge(&f.socket, token)?;
        }
        Ok(index)
    }

    /// A socket has become ready.
    pub fn ready(&mut self, r: &Ready) {
        if let Some(index) = self.flows.by_token(r.token).filter(|_| r.read) {
            self.flows.activate(index);
        }
    }

    /// The socket of a forwarded port has become ready.
    pub fn forward_ready(&mut self, r: &Ready) {
        if let Some(f) = self.forwards.get_mut((r.token & 0xffff_ffff) as usize) {
            f.readable |= r.read;
        }
    }

    /// Passes on what has arrived.
    pub fn pump(&mut self, lan: &mut Lan<'_>, name_server: Option<SocketAddr>) {
        self.expire();
        let mut buf = [0; 65536];
        for f in &mut self.forwards {
            for _ in 0..TURN {
                if !f.readable || lan.full {
                    break;
                }
                match f.socket.recv_from(&mut buf) {
                    Ok((n, from)) => {
                        let Some(s) = seen(lan.config, from, &f.guest) else { continue };
                        if f.callers.len() >= CALLERS && !f.callers.contains_key(&s) {
                            f.callers.clear();
                        }
                        f.callers.insert(s, from);
                        let guest = (f.guest.ip(), f.guest.port());
                        lan.udp((s.ip(), s.port()), guest, &buf[..n]);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => f.readable = false,
                    // Of an earlier datagram that nobody took.
                    Err(_) => {}
                }
            }
        }
        for index in self.flows.take_active() {
            let Some(f) = self.flows.get_mut(index) else { continue };
            if !f.receive(lan, name_server, &mut buf) {
                self.flows.activate(index);
            }
        }
    }

    /// Ends what has been silent for long.
    fn expire(&mut self) {
        let now = Instant::now();
        if self.sweep.is_none_or(|s| s > now) {
            return;
        }
        for i in self.flows.indices() {
            if self.flows.get(i).is_some_and(|f| now.duration_since(f.last) >= IDLE) {
                self.flows.remove(i);
            }
        }
        self.sweep = (self.flows.len() > 0).then_some(now + IDLE / 4);
    }

    /// When the next conversation may end.
    pub fn deadline(&self) -> Option<Instant> {
        self.sweep
    }

    /// Whether there is something that can be done at once.
    pub fn is_busy(&self) -> bool {
        self.flows.any_active() || self.forwards.iter().any(|f| f.readable)
    }
}

impl Flow {
    /// Receives what there is; returns whether that was all.
    fn receive(&mut self, lan: &mut Lan<'_>, server: Option<SocketAddr>, buf: &mut [u8]) -> bool {
        for _ in 0..TURN {
            if lan.full {
                return false;
            }
            let (n, from) = match self.socket.recv_from(buf) {
                Ok(r) => r,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => continue,
            };
            self.last = Instant::now();
            let dns = lan.config.dns(&self.guest.ip()).filter(|_| self.asks_dns);
            let from = match (dns, server == Some(from)) {
                (Some(dns), true) => Some(SocketAddr::new(dns, 53)),
                _ => seen(lan.config, from, &self.guest),
            };
            if let (Some(f), Some(data)) = (from, buf.get(..n)) {
                lan.udp((f.ip(), f.port()), (self.guest.ip(), self.guest.port()), data);
            }
        }
        false
    }
}
