//! DHCP server (RFC 2131, RFC 2132). Addresses are leased for good: a station gets the one it had.

use super::config::V4;
use super::lan::{Lan, MTU};
use super::wire::be32;
use crate::net::MacAddr;
use std::net::{IpAddr, Ipv4Addr};

const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// Seconds.
const LEASE: u32 = 86400;
/// Stations that are served.
const STATIONS: usize = 64;
const COOKIE: u32 = 0x6382_5363;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// Who has which address: station n has the start plus n.
#[derive(Default)]
pub struct Leases(Vec<MacAddr>);

impl Leases {
    fn address(&mut self, net: &V4, mac: MacAddr) -> Option<Ipv4Addr> {
        let n = match self.0.iter().position(|m| *m == mac) {
            Some(n) => n,
            None if self.0.len() < STATIONS => {
                self.0.push(mac);
                self.0.len() - 1
            }
            None => return None,
        };
        let ip = Ipv4Addr::from(u32::from(net.dhcp_start).checked_add(n as u32)?);
        (net.contains(ip) && ip != net.broadcast()).then_some(ip)
    }
}

/// Whether a datagram with these ports is for us.
pub fn is_dhcp(to: u16) -> bool {
    to == SERVER
}

fn option(m: &[u8], kind: u8) -> Option<&[u8]> {
    let mut at = 240;
    loop {
        match *m.get(at)? {
            0 => at += 1,
            255 => return None,
            k => {
                let n = usize::from(*m.get(at + 1)?);
                let value = m.get(at + 2..at + 2 + n)?;
                if k == kind {
                    return Some(value);
                }
                at += 2 + n;
            }
        }
    }
}

/// Answers message `m`.
pub fn input(lan: &mut Lan<'_>, leases: &mut Leases, m: &[u8]) {
    let Some(net) = lan.config.v4 else { return };
    // A request from Ethernet.
    if m.len() < 240 || m[..3] != [1, 1, 6] || be32(m, 236) != COOKIE {
        return;
    }
    let Some(&[kind]) = option(m, 53) else { return };
    let mac = MacAddr([m[28], m[29], m[30], m[31], m[32], m[33]]);
    let ciaddr = Ipv4Addr::from(be32(m, 12));
    let Some(ours) = leases.address(&net, mac) else {
        log::warn!("DHCP: no address is left for {mac}");
        return;
    };
    let (answer, ip) = match kind {
        DISCOVER => (OFFER, ours),
        REQUEST => {
            let other = option(m, 54).is_some_and(|s| s != net.host.octets());
            let wanted = option(m, 50).map_or(ciaddr, |w| Ipv4Addr::from(be32(w, 0)));
            if other {
                return;
            }
            if wanted == ours { (ACK, ours) } else { (NAK, Ipv4Addr::UNSPECIFIED) }
        }
        INFORM => (ACK, Ipv4Addr::UNSPECIFIED),
        _ => return,
    };
    let reply = message(lan, &net, m, answer, ip);
    let to = match (kind, ciaddr) {
        (INFORM, a) => a,
        _ if answer == NAK => Ipv4Addr::BROADCAST,
        // The client asked for broadcasts, or cannot be asked for by ARP yet.
        (_, a) if a.is_unspecified() => Ipv4Addr::BROADCAST,
        (_, a) => a,
    };
    let station = if to.is_broadcast() { MacAddr::BROADCAST } else { mac };
    if answer == ACK && !ip.is_unspecified() {
        lan.learn(ip.into(), mac);
    }
    lan.udp_to(station, (IpAddr::V4(net.host), SERVER), (IpAddr::V4(to), CLIENT), &reply);
}

fn message(lan: &Lan<'_>, net: &V4, m: &[u8], kind: u8, ip: Ipv4Addr) -> Vec<u8> {
    let mut r = vec![2, 1, 6, 0];
    // Transaction, seconds 0, the client's flags and address.
    r.extend(&m[4..8]);
    r.extend([0, 0, m[10], m[11]]);
    r.extend(&m[12..16]);
    r.extend(ip.octets());
    r.extend(net.host.octets());
    r.extend([0; 4]);
    r.extend(&m[28..44]);
    r.extend([0; 192]);
    r.extend(COOKIE.to_be_bytes());
    let mut put = |kind: u8, value: &[u8]| {
        let n = value.len().min(255);
        r.extend([kind, n as u8]);
        r.extend(&value[..n]);
    };
    put(53, &[kind]);
    put(54, &net.host.octets());
    if kind != NAK {
        put(1, &net.mask().octets());
        if !lan.config.restrict {
            put(3, &net.host.octets());
            put(6, &net.dns.octets());
        }
        put(26, &(MTU as u16).to_be_bytes());
        if !ip.is_unspecified() {
            put(51, &LEASE.to_be_bytes());
        }
        if let Some(h) = &lan.config.hostname {
            put(12, h.as_bytes());
        }
        if let Some(d) = &lan.config.domain {
            put(15, d.as_bytes());
        }
    }
    r.push(255);
    // What old relays and clients expect at least.
    r.resize(r.len().max(300), 0);
    r
}
