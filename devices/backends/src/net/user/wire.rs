//! Frames: Ethernet, IPv4, IPv6, TCP and UDP headers, and the Internet checksum. Parsing takes
//! anything; building makes what it says.

use crate::block::pieces::Src;
use crate::net::MacAddr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Ethernet types.
pub mod ether {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocols.
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
}

/// TCP flags.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// Bytes of an Ethernet header.
pub const ETH: usize = 14;
/// Bytes at the start of a frame that are enough for all headers we understand.
pub const HEADERS: usize = 160;

/// A big-endian 16-bit word of `b`; 0 beyond its end.
pub fn be16(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |w| u16::from_be_bytes([w[0], w[1]]))
}

/// A big-endian 32-bit word of `b`; 0 beyond its end.
pub fn be32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).map_or(0, |w| u32::from_be_bytes([w[0], w[1], w[2], w[3]]))
}

/// A running Internet checksum (RFC 1071).
#[derive(Clone, Copy, Default)]
pub struct Checksum {
    sum: u64,
    odd: bool,
}

impl Checksum {
    /// Adds bytes.
    pub fn add(&mut self, mut b: &[u8]) {
        if self.odd
            && let Some((first, rest)) = b.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            b = rest;
        }
        let mut words = b.chunks_exact(8);
        let mut sum: u64 = 0;
        let mut carry: u64 = 0;
        for w in &mut words {
            let w = u64::from_be_bytes([w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]]);
            let (s, c) = sum.overflowing_add(w);
            sum = s;
            carry += u64::from(c);
        }
        // Ones' complement arithmetic: a carry out of any width counts as 1.
        self.sum += (sum >> 48) + (sum >> 32 & 0xffff) + (sum >> 16 & 0xffff) + (sum & 0xffff);
        self.sum += carry;
        let rest = words.remainder();
        for w in rest.chunks(2) {
            self.sum += u64::from(w[0]) << 8 | w.get(1).map_or(0, |b| u64::from(*b));
            self.odd = w.len() == 1;
        }
    }

    /// Adds a 16-bit word.
    pub fn add_word(&mut self, w: u16) {
        self.sum += u64::from(w);
    }

    /// The pseudo-header of a TCP, UDP or ICMPv6 packet.
    pub fn pseudo(src: &IpAddr, dst: &IpAddr, protocol: u8, len: usize) -> Checksum {
        let mut c = Checksum::default();
        for ip in [src, dst] {
            match ip {
                IpAddr::V4(a) => c.add(&a.octets()),
                IpAddr::V6(a) => c.add(&a.octets()),
            }
        }
        c.add_word(protocol.into());
        c.add_word((len >> 16) as u16);
        c.add_word(len as u16);
        c
    }

    /// The sum, folded but not complemented.
    pub fn folded(self) -> u16 {
        let mut s = self.sum;
        while s >> 16 != 0 {
            s = (s & 0xffff) + (s >> 16);
        }
        s as u16
    }

    /// The checksum.
    pub fn finish(self) -> u16 {
        !self.folded()
    }
}

/// An IP packet's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    /// Hop limit.
    pub ttl: u8,
    /// Where the payload starts in the frame.
    pub at: usize,
    /// Bytes of the payload.
    pub len: usize,
}

/// A frame's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eth {
    pub dst: MacAddr,
    pub src: MacAddr,
    pub kind: u16,
}

/// The Ethernet header of a frame.
pub fn eth(b: &[u8]) -> Option<Eth> {
    let mac = |at: usize| b.get(at..at + 6)?.try_into().ok().map(MacAddr);
    Some(Eth { dst: mac(0)?, src: mac(6)?, kind: be16(b.get(..ETH)?, 12) })
}

/// The IPv4 header of a frame whose first bytes are `b` and which is `frame` bytes long. `None` if
/// it makes no sense, or is a fragment.
pub fn ipv4(b: &[u8], frame: usize) -> Option<Ip> {
    let h = b.get(ETH..)?;
    let header = usize::from(h.first()? & 15) * 4;
    let total = usize::from(be16(h, 2));
    let fragment = be16(h, 6) & 0x3fff != 0;
    if h[0] >> 4 != 4 || header < 20 || h.len() < header || total < header || fragment {
        return None;
    }
    let mut sum = Checksum::default();
    sum.add(&h[..header]);
    if ETH + total > frame || sum.folded() != 0xffff {
        return None;
    }
    let ip = |at| IpAddr::V4(Ipv4Addr::from(be32(h, at)));
    Some(Ip {
        src: ip(12),
        dst: ip(16),
        protocol: h[9],
        ttl: h[8],
        at: ETH + header,
        len: total - header,
    })
}

/// The IPv6 header of a frame, extension headers that may be skipped skipped.
pub fn ipv6(b: &[u8], frame: usize) -> Option<Ip> {
    let h = b.get(ETH..)?;
    if h.len() < 40 || h[0] >> 4 != 6 {
        return None;
    }
    let mut len = usize::from(be16(h, 4));
    if ETH + 40 + len > frame {
        return None;
    }
    let ip = |at: usize| {
        let octets: Option<[u8; 16]> = h.get(at..at + 16).and_then(|s| s.try_into().ok());
        octets.map(|o| IpAddr::V6(Ipv6Addr::from(o)))
    };
    let (mut next, mut at) = (h[6], 40);
    // Hop-by-hop and destination options.
    while matches!(next, 0 | 60) {
        let ext = h.get(at..at + 8)?;
        let n = (usize::from(ext[1]) + 1) * 8;
        len = len.checked_sub(n)?;
        next = ext[0];
        at += n;
        if at > h.len() {
            return None;
        }
    }
    Some(Ip { src: ip(8)?, dst: ip(24)?, protocol: next, ttl: h[7], at: ETH + at, len })
}

/// A TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpHeader {
    pub src: u16,
    pub dst: u16,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    /// Option: maximum segment size.
    pub mss: Option<u16>,
    /// Option: window scale.
    pub wscale: Option<u8>,
    /// Bytes of the header.
    pub len: usize,
}

/// The TCP header at the start of `b`.
pub fn tcp(b: &[u8]) -> Option<TcpHeader> {
    let len = usize::from(b.get(12)? >> 4) * 4;
    let header = b.get(..len).filter(|h| h.len() >= 20)?;
    let mut t = TcpHeader {
        src: be16(b, 0),
        dst: be16(b, 2),
        seq: be32(b, 4),
        ack: be32(b, 8),
        flags: b[13],
        window: be16(b, 14),
        len,
        ..TcpHeader::default()
    };
    let mut options = &header[20..];
    while let Some((kind, rest)) = options.split_first() {
        match kind {
            0 => break,
            1 => options = rest,
            _ => {
                let n = usize::from(*rest.first().unwrap_or(&0));
                let Some(o) = options.get(..n).filter(|_| n >= 2) else { break };
                match (kind, n) {
                    (2, 4) => t.mss = Some(be16(o, 2)),
                    (3, 3) => t.wscale = Some(o[2].min(14)),
                    _ => {}
                }
                options = &options[n..];
            }
        }
    }
    Some(t)
}

/// Whether the checksum of a TCP, UDP or ICMP packet is right. `head` holds the frame's first
/// bytes; the rest is read from `frame`.
pub fn checksum_holds(ip: &Ip, frame: &Src<'_>) -> bool {
    let mut sum = match (ip.protocol, ip.src) {
        (proto::ICMP, IpAddr::V4(_)) => Checksum::default(),
        _ => Checksum::pseudo(&ip.src, &ip.dst, ip.protocol, ip.len),
    };
    let mut part = [0; 4096];
    let mut at = 0;
    while at < ip.len {
        let n = (ip.len - at).min(part.len());
        frame.sub((ip.at + at) as u64, n as u64).copy_to(&mut part[..n]);
        sum.add(&part[..n]);
        at += n;
    }
    sum.folded() == 0xffff
}

/// A header under construction; enough for Ethernet, IPv6 and TCP with options.
pub struct Builder {
    bytes: [u8; HEADERS],
    len: usize,
    /// Where the IP header starts.
    ip: usize,
    src: IpAddr,
    dst: IpAddr,
}

impl Builder {
    /// Ethernet and IP headers for a packet of `protocol` with `len` bytes after the IP header.
    pub fn ip(
        (to, from): (MacAddr, MacAddr),
        (src, dst): (IpAddr, IpAddr),
        protocol: u8,
        len: usize,
        ttl: u8,
    ) -> Builder {
        let mut b = Builder { bytes: [0; HEADERS], len: 0, ip: ETH, src, dst };
        b.put(&to.0);
        b.put(&from.0);
        match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                b.put(&ether::IPV4.to_be_bytes());
                b.put(&[0x45, 0]);
                b.put(&((len + 20) as u16).to_be_bytes());
                // Don't fragment; so the identification means nothing (RFC 6864).
                b.put(&[0, 0, 0x40, 0, ttl, protocol, 0, 0]);
                b.put(&s.octets());
                b.put(&d.octets());
                let mut sum = Checksum::default();
                sum.add(&b.bytes[ETH..ETH + 20]);
                b.set(ETH + 10, &sum.finish().to_be_bytes());
            }
            _ => {
                b.put(&ether::IPV6.to_be_bytes());
                b.put(&[0x60, 0, 0, 0]);
                b.put(&(len as u16).to_be_bytes());
                b.put(&[protocol, ttl]);
                for ip in [src, dst] {
                    let v6 = match ip {
                        IpAddr::V6(a) => a,
                        IpAddr::V4(a) => a.to_ipv6_mapped(),
                    };
                    b.put(&v6.octets());
                }
            }
        }
        b
    }

    /// Appends bytes; what does not fit is dropped, which a test over all headers finds.
    pub fn put(&mut self, bytes: &[u8]) {
        debug_assert!(self.len + bytes.len() <= HEADERS);
        let n = bytes.len().min(HEADERS - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&bytes[..n]);
        self.len += n;
    }

    /// Overwrites bytes that are there.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where the packet's payload starts.
    pub fn transport(&self) -> usize {
        self.ip + if self.src.is_ipv4() { 20 } else { 40 }
    }

    /// The headers.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The pseudo-header's sum for `len` bytes after the IP header.
    pub fn pseudo(&self, protocol: u8, len: usize) -> Checksum {
        Checksum::pseudo(&self.src, &self.dst, protocol, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_do_not_depend_on_how_bytes_come() {
        let bytes: Vec<u8> = (0..999u32).map(|i| (i * 7 + i / 13) as u8).collect();
        let simple = {
            let mut s = 0u32;
            for w in bytes.chunks(2) {
                s += u32::from(w[0]) << 8 | w.get(1).map_or(0, |b| u32::from(*b));
            }
            while s >> 16 != 0 {
                s = (s & 0xffff) + (s >> 16);
            }
            s as u16
        };
        for cut in [0, 1, 7, 8, 9, 500, 998, 999] {
            let mut c = Checksum::default();
            c.add(&bytes[..cut]);
            c.add(&bytes[cut..]);
            assert_eq!(c.folded(), simple, "{cut}");
        }
    }

    #[test]
    fn headers_of_any_bytes_are_taken_or_refused() {
        let mut x = 1u64;
        for len in 0..HEADERS {
            for _ in 0..50 {
                let b: Vec<u8> = (0..len)
                    .map(|i| {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        match i {
                            14 if x >> 63 == 0 => 0x45,
                            14 => 0x60,
                            _ => (x >> 56) as u8,
                        }
                    })
                    .collect();
                eth(&b);
                for ip in [ipv4(&b, len), ipv6(&b, len)].into_iter().flatten() {
                    assert!(ip.at + ip.len <= len);
                    tcp(b.get(ip.at..).unwrap_or_default());
                }
                tcp(&b);
            }
        }
    }
}
