//! What a user-mode network looks like to its guest, as plain data. Defaults are QEMU's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

/// The IPv4 side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V4 {
    /// Network address.
    pub net: Ipv4Addr,
    /// Its length in bits, 1 to 30.
    pub prefix: u8,
    /// The host: gateway, DHCP server, and the host's loopback.
    pub host: Ipv4Addr,
    /// Forwards to the host's name server.
    pub dns: Ipv4Addr,
    /// The first address that DHCP gives.
    pub dhcp_start: Ipv4Addr,
}

impl V4 {
    /// The network `net`/`prefix` with host .2, name server .3 and guests from .15.
    pub fn new(net: Ipv4Addr, prefix: u8) -> V4 {
        let net = Ipv4Addr::from(u32::from(net) & mask(prefix));
        let at = |n: u32| Ipv4Addr::from(u32::from(net) | n & !mask(prefix));
        V4 { net, prefix, host: at(2), dns: at(3), dhcp_start: at(15) }
    }
    /// Whether `ip` is in the network.
    pub fn contains(&self, ip: Ipv4Addr) -> bool {
        u32::from(ip) & mask(self.prefix) == u32::from(self.net)
    }
    /// The network mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from(mask(self.prefix))
    }
    /// The network's broadcast address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.net) | !mask(self.prefix))
    }
}

impl Default for V4 {
    fn default() -> V4 {
        V4::new(Ipv4Addr::new(10, 0, 2, 0), 24)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

/// The IPv6 side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V6 {
    /// Network address, 64 bits long.
    pub net: Ipv6Addr,
    /// The host: router, and the host's loopback.
    pub host: Ipv6Addr,
    /// Forwards to the host's name server.
    pub dns: Ipv6Addr,
}

impl V6 {
    /// The network `net`/64 with host ::2 and name server ::3.
    pub fn new(net: Ipv6Addr) -> V6 {
        let net = u128::from(net) & !u128::from(u64::MAX);
        V6 { net: net.into(), host: (net | 2).into(), dns: (net | 3).into() }
    }
    /// Whether `ip` is in the network.
    pub fn contains(&self, ip: Ipv6Addr) -> bool {
        u128::from(ip) >> 64 == u128::from(self.net) >> 64
    }
}

impl Default for V6 {
    fn default() -> V6 {
        V6::new(Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0))
    }
}

/// Connections to the host that are passed to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostForward {
    /// UDP instead of TCP.
    pub udp: bool,
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest; the first that DHCP serves if absent.
    pub guest: Option<IpAddr>,
    /// Its port.
    pub port: u16,
}

/// What answers a guest's connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A TCP server.
    Tcp(SocketAddr),
    /// A unix socket's server.
    Unix(PathBuf),
    /// A program, started by the shell for each connection; standard input and output.
    Command(String),
}

/// Connections of a guest to an address of the virtual network that the host answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestForward {
    /// The address in the virtual network.
    pub server: SocketAddr,
    /// What answers.
    pub target: Target,
}

/// A user-mode network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// IPv4, if any.
    pub v4: Option<V4>,
    /// IPv6, if any.
    pub v6: Option<V6>,
    /// Guests reach nothing but what is forwarded.
    pub restrict: bool,
    /// Host name that DHCP gives.
    pub hostname: Option<String>,
    /// Domain that DHCP gives.
    pub domain: Option<String>,
    /// Forwarded to the guest.
    pub host_forwards: Vec<HostForward>,
    /// Forwarded from the guest.
    pub guest_forwards: Vec<GuestForward>,
    /// Name server of the host; its `/etc/resolv.conf` says if absent.
    pub name_server: Option<SocketAddr>,
}

impl Default for UserConfig {
    fn default() -> UserConfig {
        UserConfig {
            v4: Some(V4::default()),
            v6: Some(V6::default()),
            restrict: false,
            hostname: None,
            domain: None,
            host_forwards: Vec::new(),
            guest_forwards: Vec::new(),
            name_server: None,
        }
    }
}

/// Where a packet of the guest's is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To this address of the host's network.
    Out(SocketAddr),
    /// To number n of the guest forwards.
    Forward(usize),
    /// Nowhere: it is forbidden, or nobody is there.
    Closed,
}

impl UserConfig {
    /// Whether `ip` is one of the addresses that we answer for.
    pub fn is_ours(&self, ip: &IpAddr) -> bool {
        let forwarded = || self.guest_forwards.iter().any(|f| f.server.ip() == *ip);
        self.is_host(ip) || self.is_dns(ip) || forwarded()
    }

    /// Whether `ip` stands for the host.
    pub fn is_host(&self, ip: &IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => self.v4.is_some_and(|n| n.host == *a),
            IpAddr::V6(a) => self.v6.is_some_and(|n| n.host == *a),
        }
    }

    /// Whether `ip` stands for the name server.
    pub fn is_dns(&self, ip: &IpAddr) -> bool {
        match ip {
            IpAddr::V4(a) => self.v4.is_some_and(|n| n.dns == *a),
            IpAddr::V6(a) => self.v6.is_some_and(|n| n.dns == *a),
        }
    }

    /// The address that stands for the host in the family of `like`.
    pub fn host(&self, like: &IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.v4.map(|n| n.host.into()),
            IpAddr::V6(_) => self.v6.map(|n| n.host.into()),
        }
    }

    /// The address that stands for the name server in the family of `like`.
    pub fn dns(&self, like: &IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.v4.map(|n| n.dns.into()),
            IpAddr::V6(_) => self.v6.map(|n| n.dns.into()),
        }
    }

    /// Whether `ip` may be a guest's: the source of a packet.
    pub fn is_guest(&self, ip: &IpAddr) -> bool {
        !self.is_ours(ip)
            && match ip {
                IpAddr::V4(a) => {
                    self.v4.is_some_and(|n| n.contains(*a) && *a != n.net && *a != n.broadcast())
                }
                IpAddr::V6(a) => self.v6.is_some_and(|n| n.contains(*a)),
            }
    }

    /// The way to `to`; `name_server` is the host's.
    pub fn way(&self, to: SocketAddr, tcp: bool, name_server: Option<SocketAddr>) -> Way {
        let forward = self.guest_forwards.iter().position(|f| tcp && f.server == to);
        if let Some(n) = forward {
            return Way::Forward(n);
        }
        if self.restrict {
            return Way::Closed;
        }
        if self.is_dns(&to.ip()) {
            return match name_server {
                Some(s) if to.port() == 53 => Way::Out(s),
                _ => Way::Closed,
            };
        }
        if self.is_host(&to.ip()) {
            return Way::Out(SocketAddr::new(loopback(&to.ip()), to.port()));
        }
        let outside = match to.ip() {
            IpAddr::V4(a) => {
                let local = self.v4.is_none_or(|n| n.contains(a)) || a.octets()[0] == 0;
                !(local || a.is_loopback() || a.is_multicast() || a.is_broadcast())
            }
            IpAddr::V6(a) => {
                let local = self.v6.is_none_or(|n| n.contains(a));
                let link = a.segments()[0] & 0xffc0 == 0xfe80 || a.to_ipv4_mapped().is_some();
                let none = a.is_loopback() || a.is_multicast() || a.is_unspecified();
                !(local || link || none)
            }
        };
        if outside { Way::Out(to) } else { Way::Closed }
    }
}

/// The host's loopback address in the family of `like`.
pub fn loopback(like: &IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// The name server that the text of a `resolv.conf` names first.
pub fn first_name_server(text: &str) -> Option<SocketAddr> {
    let mut words = text.lines().filter_map(|l| l.strip_prefix("nameserver"));
    let ip = words.find_map(|w| w.trim().parse::<IpAddr>().ok())?;
    Some(SocketAddr::new(ip, 53))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_out_and_none() {
        let mut c = UserConfig::default();
        let dns: SocketAddr = "192.0.2.1:53".parse().unwrap();
        let way = |c: &UserConfig, to: &str| c.way(to.parse().unwrap(), true, Some(dns));
        let out = |to: &str| Way::Out(to.parse().unwrap());
        for (to, want) in [
            ("10.0.2.2:80", out("127.0.0.1:80")),
            ("10.0.2.3:53", Way::Out(dns)),
            ("10.0.2.3:80", Way::Closed),
            ("10.0.2.9:80", Way::Closed),
            ("127.0.0.1:80", Way::Closed),
            ("224.0.0.1:80", Way::Closed),
            ("198.51.100.7:80", out("198.51.100.7:80")),
            ("[fec0::2]:80", out("[::1]:80")),
            ("[::1]:80", Way::Closed),
            ("[::ffff:127.0.0.1]:80", Way::Closed),
            ("[2001:db8::1]:80", out("[2001:db8::1]:80")),
        ] {
            assert_eq!(way(&c, to), want, "{to}");
        }
        c.restrict = true;
        let server = "10.0.2.100:1".parse().unwrap();
        c.guest_forwards.push(GuestForward { server, target: Target::Command("cat".into()) });
        assert_eq!(way(&c, "10.0.2.2:80"), Way::Closed);
        assert_eq!(way(&c, "10.0.2.100:1"), Way::Forward(0));
        assert!(!c.is_guest(&server.ip()) && c.is_guest(&"10.0.2.15".parse().unwrap()));
    }

    #[test]
    fn networks_of_any_size() {
        let n = V4::new("192.168.77.200".parse().unwrap(), 28);
        assert_eq!(n.net.to_string(), "192.168.77.192");
        assert_eq!(n.host.to_string(), "192.168.77.194");
        assert_eq!(
            (n.mask().to_string(), n.broadcast().octets()[3]),
            ("255.255.255.240".into(), 207)
        );
        assert_eq!(first_name_server("# x\nnameserver 1.2.3.4\n"), "1.2.3.4:53".parse().ok());
        assert_eq!(first_name_server("search x"), None);
    }
}
