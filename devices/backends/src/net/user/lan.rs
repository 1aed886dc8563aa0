//! The guest's link: who is where (ARP, NDP), and the way of frames to the guest.

use super::config::UserConfig;
use super::wire::{Builder, Checksum, ETH, Eth, Ip, be16, ether, flag, proto};
use crate::net::{Card, Delivery, MacAddr, Offloads, VnetHeader};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Guests' addresses that are remembered.
const NEIGHBOURS: usize = 256;
/// Small frames that wait for room.
const PENDING: usize = 256;
/// Seconds that a router advertisement holds.
const RA_LIFETIME: u16 = 1800;
/// Bytes of the largest packet.
pub const MTU: usize = 1500;

/// What outlives a turn.
#[derive(Default)]
pub struct LanState {
    neighbours: HashMap<IpAddr, MacAddr>,
    pending: VecDeque<Vec<u8>>,
    news: Vec<IpAddr>,
}

/// The link for one turn.
pub struct Lan<'a> {
    pub config: &'a UserConfig,
    state: &'a mut LanState,
    card: &'a dyn Card,
    offloads: Offloads,
    /// The guest has no room; nothing more goes to it in this turn.
    pub full: bool,
}

/// Ethernet address of the host, as QEMU forms it.
pub fn host_mac(config: &UserConfig) -> MacAddr {
    let v4 = config.v4.map_or(Ipv4Addr::new(10, 0, 2, 2), |n| n.host).octets();
    MacAddr([0x52, 0x55, v4[0], v4[1], v4[2], v4[3]])
}

/// The link-local address that belongs to an Ethernet address (RFC 4291, appendix A).
fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    let bytes = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from(bytes)
}

impl<'a> Lan<'a> {
    pub fn new(config: &'a UserConfig, state: &'a mut LanState, card: &'a dyn Card) -> Lan<'a> {
        Lan { config, state, card, offloads: card.offloads(), full: false }
    }

    /// What the guest can take.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Guests' addresses that have become known since the last call.
    pub fn news(&mut self) -> Vec<IpAddr> {
        std::mem::take(&mut self.state.news)
    }

    /// Sends frames that had to wait.
    pub fn flush(&mut self) {
        while let Some(f) = self.state.pending.pop_front() {
            let header = VnetHeader { num_buffers: 1, ..VnetHeader::default() };
            if self.card.receive(&header, &[&f], 0) == Delivery::Full {
                self.state.pending.push_front(f);
                self.full = true;
                break;
            }
        }
    }

    /// Gives the guest a frame; returns whether it took it. If not, nothing fits in this turn.
    pub fn send(&mut self, header: &VnetHeader, parts: &[&[u8]], flow: u32) -> bool {
        if !self.full {
            self.full = self.card.receive(header, parts, flow) == Delivery::Full;
        }
        !self.full
    }

    /// Gives the guest a frame now or later; when too many wait, it is lost.
    pub fn post(&mut self, frame: &[u8]) {
        let header = VnetHeader { num_buffers: 1, ..VnetHeader::default() };
        if !self.send(&header, &[frame], 0) && self.state.pending.len() < PENDING {
            self.state.pending.push_back(frame.to_vec());
        }
    }

    /// Where `ip` is. The question is asked if it is not known.
    pub fn find(&mut self, ip: IpAddr) -> Option<MacAddr> {
        let known = self.state.neighbours.get(&ip).copied();
        if known.is_none() {
            self.ask(ip);
        }
        known
    }

    /// Where `ip` is, if known.
    pub fn known(&self, ip: &IpAddr) -> Option<MacAddr> {
        self.state.neighbours.get(ip).copied()
    }

    /// Remembers that `ip` is at `mac`.
    pub fn learn(&mut self, ip: IpAddr, mac: MacAddr) {
        let link = matches!(ip, IpAddr::V6(a) if a.segments()[0] & 0xffc0 == 0xfe80);
        if mac.is_multicast() || !(link || self.config.is_guest(&ip)) {
            return;
        }
        if self.state.neighbours.len() >= NEIGHBOURS && !self.state.neighbours.contains_key(&ip) {
            self.state.neighbours.clear();
        }
        if self.state.neighbours.insert(ip, mac) != Some(mac) {
            self.state.news.push(ip);
        }
    }

    fn ask(&mut self, ip: IpAddr) {
        match (ip, self.config.host(&ip)) {
            (IpAddr::V4(a), Some(IpAddr::V4(host))) => {
                let none = MacAddr::default();
                self.arp(1, MacAddr::BROADCAST, (host, a), none);
            }
            (IpAddr::V6(a), Some(host)) => {
                // Neighbor solicitation (RFC 4861 §4.3) to the solicited-node group.
                let o = a.octets();
                let group = Ipv6Addr::new(
                    0xff02,
                    0,
                    0,
                    0,
                    0,
                    1,
                    0xff00 | u16::from(o[13]),
                    u16::from_be_bytes([o[14], o[15]]),
                );
                let to = MacAddr([0x33, 0x33, 0xff, o[13], o[14], o[15]]);
                let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
                body.extend(o);
                body.extend([1, 1]);
                body.extend(host_mac(self.config).0);
                self.icmpv6(to, (host, group.into()), &mut body);
            }
            _ => {}
        }
    }

    fn arp(&mut self, op: u8, to: MacAddr, ips: (Ipv4Addr, Ipv4Addr), target: MacAddr) {
        let mac = host_mac(self.config);
        let mut f = Vec::with_capacity(ETH + 28);
        f.extend(to.0);
        f.extend(mac.0);
        f.extend(ether::ARP.to_be_bytes());
        f.extend([0, 1, 8, 0, 6, 4, 0, op]);
        f.extend(mac.0);
        f.extend(ips.0.octets());
        f.extend(target.0);
        f.extend(ips.1.octets());
        self.post(&f);
    }

    /// A frame of ARP (RFC 826).
    pub fn arp_input(&mut self, b: &[u8]) {
        let Some(p) = b.get(ETH..ETH + 28) else { return };
        if p[..6] != [0, 1, 8, 0, 6, 4] {
            return;
        }
        let v4 = |at: usize| Ipv4Addr::new(p[at], p[at + 1], p[at + 2], p[at + 3]);
        let (from, to) = (v4(14), v4(24));
        let mac = MacAddr([p[8], p[9], p[10], p[11], p[12], p[13]]);
        if !from.is_unspecified() {
            self.learn(from.into(), mac);
        }
        // Probes for the guest's own address must stay without an answer.
        if be16(p, 6) == 1 && from != to && self.config.is_ours(&to.into()) {
            self.arp(2, mac, (to, from), mac);
        }
    }

    /// An ICMPv6 message in `body` that concerns the link (RFC 4861). Returns whether it was one.
    pub fn ndp_input(&mut self, eth: &Eth, ip: &Ip, body: &[u8]) -> bool {
        let option = |kind: u8| {
            let mut at = 24;
            while let Some([k, n]) = body.get(at..at + 2) {
                if *k == kind {
                    return body.get(at + 2..at + 8).and_then(|m| m.try_into().ok()).map(MacAddr);
                }
                at += (usize::from(*n) * 8).max(8);
            }
            None
        };
        let target = body.get(8..24).and_then(|t| <[u8; 16]>::try_from(t).ok());
        match (body.first(), target) {
            (Some(133), _) => {
                self.advertise(eth.src, ip.src);
                true
            }
            (Some(135), Some(t)) => {
                let target = IpAddr::V6(t.into());
                let link = IpAddr::V6(link_local(host_mac(self.config)));
                if !ip.src.is_unspecified()
                    && let Some(mac) = option(1)
                {
                    self.learn(ip.src, mac);
                }
                let ours = self.config.is_ours(&target) || target == link;
                if ours && !ip.src.is_unspecified() {
                    // Advertisement: router, solicited, override.
                    let mut body = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
                    body.extend(t);
                    body.extend([2, 1]);
                    body.extend(host_mac(self.config).0);
                    self.icmpv6(eth.src, (target, ip.src), &mut body);
                }
                true
            }
            (Some(136), Some(t)) => {
                let mac = option(2).unwrap_or(eth.src);
                self.learn(IpAddr::V6(t.into()), mac);
                true
            }
            (Some(130..=137 | 143), _) => true,
            _ => false,
        }
    }

    /// A router advertisement (RFC 4861 §4.2) with the prefix and the name server (RFC 8106).
    fn advertise(&mut self, mac: MacAddr, to: IpAddr) {
        let Some(v6) = self.config.v6 else { return };
        let lifetime = if self.config.restrict { 0 } else { RA_LIFETIME };
        let mut b = vec![134, 0, 0, 0, 64, 0];
        b.extend(lifetime.to_be_bytes());
        b.extend([0; 8]);
        b.extend([1, 1]);
        b.extend(host_mac(self.config).0);
        // On-link, autonomous.
        b.extend([3, 4, 64, 0xc0]);
        b.extend(86400u32.to_be_bytes());
        b.extend(14400u32.to_be_bytes());
        b.extend([0; 4]);
        b.extend(v6.net.octets());
        if !self.config.restrict {
            b.extend([25, 3, 0, 0]);
            b.extend(u32::from(RA_LIFETIME).to_be_bytes());
            b.extend(v6.dns.octets());
        }
        let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let from = IpAddr::V6(link_local(host_mac(self.config)));
        match to.is_unspecified() {
            true => self.icmpv6(MacAddr([0x33, 0x33, 0, 0, 0, 1]), (from, all.into()), &mut b),
            false => self.icmpv6(mac, (from, to), &mut b),
        }
    }

    fn icmpv6(&mut self, to: MacAddr, (src, dst): (IpAddr, IpAddr), body: &mut [u8]) {
        let b = self.builder(to, (src, dst), proto::ICMPV6, body.len(), 255);
        let mut sum = b.pseudo(proto::ICMPV6, body.len());
        body[2..4].fill(0);
        sum.add(body);
        body[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        let frame = [b.bytes(), body].concat();
        self.post(&frame);
    }

    fn builder(
        &self,
        to: MacAddr,
        ips: (IpAddr, IpAddr),
        protocol: u8,
        len: usize,
        ttl: u8,
    ) -> Builder {
        Builder::ip((to, host_mac(self.config)), ips, protocol, len, ttl)
    }

    /// Sends an ICMP or ICMPv6 message with its checksum made.
    pub fn icmp(&mut self, (src, dst): (IpAddr, IpAddr), body: &mut [u8]) {
        let Some(mac) = self.find(dst) else { return };
        if dst.is_ipv6() {
            return self.icmpv6(mac, (src, dst), body);
        }
        let Some(field) = body.get_mut(2..4) else { return };
        field.fill(0);
        let mut sum = Checksum::default();
        sum.add(body);
        body[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        let b = self.builder(mac, (src, dst), proto::ICMP, body.len(), 64);
        let frame = [b.bytes(), body].concat();
        self.post(&frame);
    }

    /// Tells the sender of the packet in frame `head` that its destination cannot be reached:
    /// "port" (3/3, 1/4), or "administratively prohibited" (3/13, 1/1).
    pub fn unreachable(&mut self, ip: &Ip, head: &[u8], port: bool) {
        let Some(from) = self.config.host(&ip.src) else { return };
        let most = if ip.src.is_ipv4() { 28 } else { 48 } + 8;
        let quoted = head.get(ETH..head.len().min(ETH + most)).unwrap_or_default();
        let mut body = match (ip.src.is_ipv4(), port) {
            (true, true) => vec![3, 3],
            (true, false) => vec![3, 13],
            (false, true) => vec![1, 4],
            (false, false) => vec![1, 1],
        };
        body.extend([0; 6]);
        body.extend(quoted);
        let from = if port { ip.dst } else { from };
        self.icmp((from, ip.src), &mut body);
    }

    /// Sends a UDP datagram. The guest's stack puts fragments together if it is long.
    pub fn udp(&mut self, (src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16), data: &[u8]) {
        let Some(mac) = self.find(dst) else { return };
        self.udp_to(mac, (src, sport), (dst, dport), data);
    }

    /// Sends a UDP datagram to this station.
    pub fn udp_to(
        &mut self,
        mac: MacAddr,
        (src, sport): (IpAddr, u16),
        (dst, dport): (IpAddr, u16),
        data: &[u8],
    ) {
        let len = 8 + data.len();
        let mut datagram = Vec::with_capacity(len);
        datagram.extend(sport.to_be_bytes());
        datagram.extend(dport.to_be_bytes());
        datagram.extend((len as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(data);
        let mut sum = Checksum::pseudo(&src, &dst, proto::UDP, len);
        sum.add(&datagram);
        let sum = match sum.finish() {
            0 => 0xffff,
            s => s,
        };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        let header = if src.is_ipv4() { 20 } else { 40 };
        if header + len <= MTU {
            let b = self.builder(mac, (src, dst), proto::UDP, len, 64);
            let frame = [b.bytes(), &datagram].concat();
            self.post(&frame);
        } else if src.is_ipv4() {
            self.fragments(mac, (src, dst), &datagram);
        }
    }

    /// Sends an IPv4 packet in fragments.
    fn fragments(&mut self, mac: MacAddr, ips: (IpAddr, IpAddr), packet: &[u8]) {
        let id = (packet.len() as u16) ^ be16(packet, 6);
        let step = (MTU - 20) / 8 * 8;
        for (n, part) in packet.chunks(step).enumerate() {
            let mut b = self.builder(mac, ips, proto::UDP, part.len(), 64);
            let more = if (n + 1) * step < packet.len() { 0x2000 } else { 0 };
            b.set(ETH + 4, &id.to_be_bytes());
            b.set(ETH + 6, &(more | (n * step / 8) as u16).to_be_bytes());
            b.set(ETH + 10, &[0, 0]);
            let mut sum = Checksum::default();
            sum.add(&b.bytes()[ETH..ETH + 20]);
            b.set(ETH + 10, &sum.finish().to_be_bytes());
            let frame = [b.bytes(), part].concat();
            self.post(&frame);
        }
    }

    /// Answers a TCP segment that belongs to nothing with a reset (RFC 9293 §3.10.7.1).
    pub fn tcp_reset(&mut self, ip: &Ip, t: &super::wire::TcpHeader, len: usize) {
        if t.flags & flag::RST != 0 {
            return;
        }
        let Some(mac) = self.find(ip.src) else { return };
        let (seq, ack, flags) = match t.flags & flag::ACK {
            0 => {
                let n = len as u32
                    + u32::from(t.flags & flag::SYN != 0)
                    + u32::from(t.flags & flag::FIN != 0);
                (0, t.seq.wrapping_add(n), flag::RST | flag::ACK)
            }
            _ => (t.ack, 0, flag::RST),
        };
        let mut b = self.builder(mac, (ip.dst, ip.src), proto::TCP, 20, 64);
        let at = b.transport();
        b.put(&t.dst.to_be_bytes());
        b.put(&t.src.to_be_bytes());
        b.put(&seq.to_be_bytes());
        b.put(&ack.to_be_bytes());
        b.put(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
        let mut sum = b.pseudo(proto::TCP, 20);
        sum.add(&b.bytes()[at..]);
        b.set(at + 16, &sum.finish().to_be_bytes());
        let frame = b.bytes().to_vec();
        self.post(&frame);
    }
}
