//! Echo requests: answered for the virtual network's own addresses, passed on through the host's
//! echo sockets otherwise (Linux's unprivileged ICMP sockets; raw ones where those are forbidden
//! and the process may).

use super::flows::{Flows, ICMP};
use super::lan::Lan;
use super::wire::{Ip, be16};
use crate::net::poller::{Poller, Ready};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Conversations at a time.
const MAX_FLOWS: usize = 128;
/// How long a silent conversation is kept.
const IDLE: Duration = Duration::from_secs(60);
/// Answers of one socket that are passed on in one turn.
const TURN: usize = 32;

/// Guest, destination and identifier.
type Key = (IpAddr, IpAddr, u16);

struct Flow {
    key: Key,
    socket: Socket,
    /// It sees all ICMP of the host, with IP headers.
    raw: bool,
    last: Instant,
}

/// All conversations.
#[derive(Default)]
pub struct Icmp {
    flows: Flows<Key, Flow>,
}

/// Types of request and reply.
fn types(ip: &IpAddr) -> (u8, u8) {
    if ip.is_ipv4() { (8, 0) } else { (128, 129) }
}

fn open(to: IpAddr) -> io::Result<(Socket, bool)> {
    let (domain, protocol) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(s) => (s, false),
        Err(_) => (Socket::new(domain, Type::RAW, Some(protocol))?, true),
    };
    socket.set_nonblocking(true)?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    Ok((socket, raw))
}

impl Icmp {
    /// Answers an echo request by ourselves.
    pub fn reply(lan: &mut Lan<'_>, ip: &Ip, body: &[u8]) {
        let mut reply = body.to_vec();
        reply[0] = types(&ip.dst).1;
        lan.icmp((ip.dst, ip.src), &mut reply);
    }

    /// Whether `body` is an echo request.
    pub fn is_request(ip: &Ip, body: &[u8]) -> bool {
        body.len() >= 8 && body[0] == types(&ip.dst).0 && body[1] == 0
    }

    /// Passes the request on to `to`.
    pub fn send(&mut self, poller: &Poller, ip: &Ip, to: IpAddr, body: &[u8]) -> io::Result<()> {
        let key = (ip.src, ip.dst, be16(body, 4));
        let index = match self.flows.find(&key) {
            Some(i) => i,
            None => {
                self.make_room();
                let (socket, raw) = open(to)?;
                let index = self.flows.insert(key, Flow { key, socket, raw, last: Instant::now() });
                let token = self.flows.token(ICMP, index);
                if let Some(f) = self.flows.get(index) {
                    poller.add_edge(&f.socket, token)?;
                }
                index
            }
        };
        let Some(f) = self.flows.get_mut(index) else { return Ok(()) };
        f.last = Instant::now();
        let mut request = body.to_vec();
        request[2..4].fill(0);
        if ip.dst.is_ipv4() {
            let mut sum = super::wire::Checksum::default();
            sum.add(&request);
            request[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        }
        f.socket.send(&request).map(|_| ())
    }

    fn make_room(&mut self) {
        let now = Instant::now();
        for i in self.flows.indices() {
            if self.flows.get(i).is_some_and(|f| now.duration_since(f.last) > IDLE) {
                self.flows.remove(i);
            }
        }
        if self.flows.len() >= MAX_FLOWS {
            let oldest = |i: &u32| self.flows.get(*i).map(|f| f.last);
            if let Some(i) = self.flows.indices().into_iter().min_by_key(oldest) {
                self.flows.remove(i);
            }
        }
    }

    /// A socket has become ready.
    pub fn ready(&mut self, r: &Ready) {
        if let Some(index) = self.flows.by_token(r.token).filter(|_| r.read) {
            self.flows.activate(index);
        }
    }

    /// Passes answers on.
    pub fn pump(&mut self, lan: &mut Lan<'_>) {
        for index in self.flows.take_active() {
            let Some(f) = self.flows.get_mut(index) else { continue };
            if !f.receive(lan) {
                self.flows.activate(index);
            }
        }
    }

    /// Whether there is something that can be done at once.
    pub fn is_busy(&self) -> bool {
        self.flows.any_active()
    }
}

impl Flow {
    /// Receives what there is; returns whether that was all.
    fn receive(&mut self, lan: &mut Lan<'_>) -> bool {
        let mut buf = [0; 65536];
        let (guest, remote, id) = self.key;
        for _ in 0..TURN {
            if lan.full {
                return false;
            }
            let n = match (&self.socket).read(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => continue,
            };
            let skip = if self.raw && guest.is_ipv4() { usize::from(buf[0] & 15) * 4 } else { 0 };
            let Some(body) = buf.get_mut(skip..n).filter(|b| b.len() >= 8) else { continue };
            if body[0] != types(&remote).1 || self.raw && be16(body, 4) != id {
                continue;
            }
            // An unprivileged socket has an identifier of its own.
            body[4..6].copy_from_slice(&id.to_be_bytes());
            lan.icmp((remote, guest), body);
        }
        false
    }
}
