//! User-mode networking: a network of its own for a guest, joined to the host's through the
//! process's own sockets. No privileges, no interface, no other program.
//!
//! ```text
//!   guest ─ frames ─► input ─┬─ ARP, NDP, RA, DHCP: answered here         (lan, dhcp)
//!                            ├─ TCP ─► a connection of ours per the guest's (tcp)
//!                            ├─ UDP ─► a socket per port of the guest's     (udp)
//!                            └─ ICMP echo ─► the host's echo sockets        (icmp)
//!   host ─ forwarded ports ─► connections and datagrams to the guest       (forward)
//! ```
//!
//! What the guest sees ([`config`]): 10.0.2.0/24 with the host at .2, a name server at .3 and
//! itself at .15; fec0::/64 likewise. The host's address leads to the host's loopback.
//!
//! What always holds:
//!
//! * A guest reaches only what [`UserConfig::way`] says.
//! * Nothing is kept per packet. Connections, datagram conversations, neighbours, leases and frames
//!   that wait are bounded, and so are their buffers.
//! * What is malformed is dropped.

pub mod config;
mod dhcp;
mod flows;
mod forward;
mod icmp;
mod lan;
mod ring;
mod tcp;
mod udp;
mod wire;

pub use config::UserConfig;
pub use forward::ForwardError;

use super::poller::{Poller, Ready};
use super::{Card, Link, MAX_FRAME, Offloads, Taken, VnetHeader};
use crate::block::pieces::Src;
use config::Way;
use dhcp::Leases;
use forward::Listeners;
use icmp::Icmp;
use lan::{Lan, LanState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tcp::Tcp;
use udp::Udp;
use wire::{Eth, HEADERS, Ip, ether, proto};

/// Frames of the guest's that are taken in one turn.
const TURN: usize = 512;
/// Longest message to a protocol that is looked into whole.
const MESSAGE: usize = 65536;

/// A user-mode network.
pub struct UserNet {
    config: UserConfig,
    name_server: Option<SocketAddr>,
    lan: LanState,
    rest: Protocols,
    listeners: Listeners,
}

/// What is behind the link.
#[derive(Default)]
struct Protocols {
    leases: Leases,
    tcp: Tcp,
    udp: Udp,
    icmp: Icmp,
    scratch: Vec<u8>,
}

impl UserNet {
    /// A network with its forwarded ports bound.
    pub fn new(config: UserConfig) -> Result<UserNet, ForwardError> {
        let listeners = Listeners::new(forward::bind(&config)?);
        let name_server = config.name_server.or_else(|| {
            let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
            config::first_name_server(&text)
        });
        let (lan, rest) = (LanState::default(), Protocols::default());
        Ok(UserNet { config, name_server, lan, rest, listeners })
    }
}

/// What the protocols need of a turn.
struct Turn<'a, 'l> {
    lan: &'a mut Lan<'l>,
    poller: &'a Poller,
    name_server: Option<SocketAddr>,
}

impl Protocols {
    /// A frame of the guest's.
    fn input(&mut self, turn: &mut Turn<'_, '_>, header: &VnetHeader, frame: &Src<'_>) {
        let len = frame.len() as usize;
        if len > MAX_FRAME {
            return;
        }
        let mut head = [0; HEADERS];
        let n = len.min(HEADERS);
        frame.copy_to(&mut head[..n]);
        let head = &head[..n];
        let Some(eth) = wire::eth(head) else { return };
        let ip = match eth.kind {
            ether::ARP => return turn.lan.arp_input(head),
            ether::IPV4 if turn.lan.config.v4.is_some() => wire::ipv4(head, len),
            ether::IPV6 if turn.lan.config.v6.is_some() => wire::ipv6(head, len),
            _ => return,
        };
        let Some(ip) = ip else { return };
        // A checksum that was left to us needs not be made to be checked.
        let unchecked = header.flags & VnetHeader::NEEDS_CSUM == 0;
        if unchecked && !udp_without_checksum(&ip, head) && !wire::checksum_holds(&ip, frame) {
            return;
        }
        if turn.lan.known(&ip.src) != Some(eth.src) {
            turn.lan.learn(ip.src, eth.src);
        }
        match ip.protocol {
            proto::TCP => self.tcp_input(turn, &eth, &ip, head, frame),
            proto::UDP => self.udp_input(turn, &ip, head, frame),
            proto::ICMP if ip.src.is_ipv4() => self.icmp_input(turn, &eth, &ip, head, frame),
            proto::ICMPV6 if ip.src.is_ipv6() => self.icmp_input(turn, &eth, &ip, head, frame),
            _ if turn.lan.config.is_guest(&ip.src) => turn.lan.unreachable(&ip, head, false),
            _ => {}
        }
    }

    /// The packet's payload from byte `from`, in one piece.
    fn message(&mut self, ip: &Ip, frame: &Src<'_>, from: usize) -> Option<Vec<u8>> {
        let len = ip.len.checked_sub(from)?;
        let mut m = std::mem::take(&mut self.scratch);
        m.clear();
        m.resize(len.min(MESSAGE), 0);
        frame.sub((ip.at + from) as u64, len as u64).copy_to(&mut m);
        Some(m)
    }

    fn tcp_input(
        &mut self,
        turn: &mut Turn<'_, '_>,
        eth: &Eth,
        ip: &Ip,
        head: &[u8],
        frame: &Src<'_>,
    ) {
        let header = head.get(ip.at..).and_then(wire::tcp).filter(|t| t.len <= ip.len);
        let Some(t) = header.filter(|_| turn.lan.config.is_guest(&ip.src)) else { return };
        let data = frame.sub((ip.at + t.len) as u64, (ip.len - t.len) as u64);
        let way = turn.lan.config.way(SocketAddr::new(ip.dst, t.dst), true, turn.name_server);
        let targets = &turn.lan.config.guest_forwards;
        let connect = || match way {
            Way::Out(to) => Ok((tcp::connect(to)?, None)),
            Way::Forward(n) => forward::answer(&targets[n].target),
            Way::Closed => Err(io::ErrorKind::ConnectionRefused.into()),
        };
        self.tcp.input(turn.lan, turn.poller, (ip, eth.src), &t, &data, connect);
    }

    fn udp_input(&mut self, turn: &mut Turn<'_, '_>, ip: &Ip, head: &[u8], frame: &Src<'_>) {
        let Some(h) = head.get(ip.at..ip.at + 8).filter(|_| ip.len >= 8) else { return };
        let (sport, dport) = (wire::be16(h, 0), wire::be16(h, 2));
        let len = usize::from(wire::be16(h, 4));
        if len < 8 || len > ip.len {
            return;
        }
        let ip = Ip { len, ..*ip };
        let Some(data) = self.message(&ip, frame, 8) else { return };
        if ip.dst.is_ipv4() && dhcp::is_dhcp(dport) {
            dhcp::input(turn.lan, &mut self.leases, &data);
        } else if turn.lan.config.is_guest(&ip.src) {
            self.datagram(turn, &ip, head, (sport, dport), &data);
        }
        self.scratch = data;
    }

    fn datagram(
        &mut self,
        turn: &mut Turn<'_, '_>,
        ip: &Ip,
        head: &[u8],
        (sport, dport): (u16, u16),
        data: &[u8],
    ) {
        let (from, to) = (SocketAddr::new(ip.src, sport), SocketAddr::new(ip.dst, dport));
        if self.udp.answer(from, to, data) {
            return;
        }
        let asks_dns = turn.lan.config.is_dns(&ip.dst);
        match turn.lan.config.way(to, false, turn.name_server) {
            Way::Out(host) => {
                if let Err(e) = self.udp.send(turn.poller, from, (host, asks_dns), data) {
                    log::debug!("datagram of the guest to {to}: {e}");
                    let port = e.kind() == io::ErrorKind::ConnectionRefused;
                    turn.lan.unreachable(ip, head, port);
                }
            }
            _ if is_group(&ip.dst, turn.lan.config) => {}
            _ => turn.lan.unreachable(ip, head, turn.lan.config.is_ours(&ip.dst)),
        }
    }

    fn icmp_input(
        &mut self,
        turn: &mut Turn<'_, '_>,
        eth: &Eth,
        ip: &Ip,
        head: &[u8],
        frame: &Src<'_>,
    ) {
        let Some(body) = self.message(ip, frame, 0) else { return };
        let link = ip.src.is_ipv6() && turn.lan.ndp_input(eth, ip, &body);
        if !link && Icmp::is_request(ip, &body) {
            let config = turn.lan.config;
            let to = SocketAddr::new(ip.dst, 0);
            let local = matches!(ip.dst, IpAddr::V6(a) if a.segments()[0] & 0xffc0 == 0xfe80);
            if config.is_ours(&ip.dst) || local {
                Icmp::reply(turn.lan, ip, &body);
            } else if let Way::Out(to) = config.way(to, false, None) {
                if let Err(e) = self.icmp.send(turn.poller, ip, to.ip(), &body) {
                    log::debug!("echo request of the guest to {}: {e}", ip.dst);
                    turn.lan.unreachable(ip, head, false);
                }
            } else if !is_group(&ip.dst, config) {
                turn.lan.unreachable(ip, head, false);
            }
        }
        self.scratch = body;
    }
}

/// A UDP packet that carries no checksum, as IPv4 allows.
fn udp_without_checksum(ip: &Ip, head: &[u8]) -> bool {
    ip.protocol == proto::UDP && ip.src.is_ipv4() && wire::be16(head, ip.at + 6) == 0
}

/// Whether `ip` is several stations.
fn is_group(ip: &IpAddr, config: &UserConfig) -> bool {
    match ip {
        IpAddr::V4(a) => {
            let ours = config.v4.is_some_and(|n| n.broadcast() == *a);
            a.is_multicast() || a.is_broadcast() || ours
        }
        IpAddr::V6(a) => a.is_multicast(),
    }
}

impl Link for UserNet {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        self.listeners.start(poller, &mut self.rest.udp)
    }

    fn turn(&mut self, card: &dyn Card, poller: &Poller, ready: &[Ready]) -> Option<Duration> {
        let UserNet { config, name_server, lan, rest, listeners } = self;
        for r in ready {
            match flows::kind(r.token) {
                flows::TCP => rest.tcp.ready(r),
                flows::UDP => rest.udp.ready(r),
                flows::ICMP => rest.icmp.ready(r),
                flows::LISTENER => listeners.ready(r),
                flows::UDP_FORWARD => rest.udp.forward_ready(r),
                _ => {}
            }
        }
        let mut lan = Lan::new(config, lan, card);
        lan.flush();
        let mut left = TURN;
        let mut turn = Turn { lan: &mut lan, poller, name_server: *name_server };
        let more = card.transmit(&mut |header, frame| {
            rest.input(&mut turn, header, frame);
            left -= 1;
            if left == 0 { Taken::Enough } else { Taken::More }
        });
        for ip in lan.news() {
            rest.tcp.neighbour(&mut lan, ip);
        }
        listeners.pump(&mut lan, poller, &mut rest.tcp);
        rest.tcp.pump(&mut lan);
        rest.udp.pump(&mut lan, *name_server);
        rest.icmp.pump(&mut lan);
        // With a guest that takes nothing, only its frames can be moved; it wakes us.
        let busy = rest.tcp.is_busy() || rest.udp.is_busy() || rest.icmp.is_busy();
        let calls = listeners.is_busy() && rest.tcp.has_room();
        if more || (busy || calls) && !lan.full {
            return Some(Duration::ZERO);
        }
        let deadlines = [rest.tcp.deadline(), rest.udp.deadline()];
        let next = deadlines.into_iter().flatten().min();
        next.map(|d| d.saturating_duration_since(Instant::now()))
    }
}

#[cfg(test)]
mod tests;
