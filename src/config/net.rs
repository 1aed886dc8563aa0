//! Networks, under QEMU's names of `-netdev`.

use super::{Fault, parse};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use tandem_accel::suggest::{closest_or, one_of};
use tandem_backends::net::MacAddr;
use tandem_backends::net::socket::Address;
use tandem_backends::net::user::UserConfig;
use tandem_backends::net::user::config::{GuestForward, HostForward, Target, V4, V6};

/// A network. What is unknown among its keys is refused by its kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Netdev {
    /// Name for cards; made up if absent.
    #[serde(default)]
    pub id: Option<String>,
    /// A card is made for it; else a `--device` names it.
    #[serde(default)]
    pub card: bool,
    /// That card's type; virtio-net-pci if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// That card's address.
    #[serde(default)]
    pub mac: Option<String>,
    /// Where it leads.
    #[serde(flatten)]
    pub kind: Kind,
}

/// Where a network leads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Kind {
    /// The host's network, without privileges.
    User(User),
    /// An interface of the host.
    Tap(Tap),
    /// Another program, over a stream.
    Stream(Stream),
    /// Another program, by datagrams.
    Dgram(Dgram),
}

/// User-mode networking. Absent values are QEMU's defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct User {
    /// No IPv4.
    pub no_ipv4: bool,
    /// No IPv6.
    pub no_ipv6: bool,
    /// IPv4 network, `ADDRESS/BITS` or `ADDRESS/MASK`.
    pub net: Option<String>,
    /// The host in it.
    pub host: Option<Ipv4Addr>,
    /// The name server in it.
    pub dns: Option<Ipv4Addr>,
    /// First address that DHCP gives.
    pub dhcpstart: Option<Ipv4Addr>,
    /// IPv6 network of 64 bits.
    pub ipv6_prefix: Option<Ipv6Addr>,
    /// The host in it.
    pub ipv6_host: Option<Ipv6Addr>,
    /// The name server in it.
    pub ipv6_dns: Option<Ipv6Addr>,
    /// The guest reaches nothing but what is forwarded.
    pub restrict: bool,
    /// Host name for the guest.
    pub hostname: Option<String>,
    /// Domain for the guest.
    pub domainname: Option<String>,
    /// `[tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT`.
    pub hostfwd: Vec<String>,
    /// `[tcp]:SERVER:PORT-cmd:COMMAND`, `-tcp:HOST:PORT` or `-unix:PATH`.
    pub guestfwd: Vec<String>,
}

/// A tap device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tap {
    /// Name of the interface; the host chooses one if absent.
    pub ifname: Option<String>,
    /// An open tap device that this process was given.
    pub fd: Option<i32>,
}

/// Frames over a stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Stream {
    /// Wait for the other program's connection.
    pub server: bool,
    /// `unix:PATH` or `inet:HOST:PORT`.
    pub addr: Option<String>,
    /// A connected socket that this process was given.
    pub fd: Option<i32>,
    /// Milliseconds until a broken connection is made again.
    pub reconnect_ms: Option<u64>,
}

/// Frames as datagrams.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dgram {
    /// Where we receive: `unix:PATH` or `inet:HOST:PORT`.
    pub local: Option<String>,
    /// Where we send.
    pub remote: Option<String>,
    /// A connected socket that this process was given.
    pub fd: Option<i32>,
}

const KINDS: [&str; 4] = ["user", "tap", "stream", "dgram"];
const USER_KEYS: [&str; 16] = [
    "net",
    "host",
    "dns",
    "dhcpstart",
    "ipv4",
    "ipv6",
    "ipv6-net",
    "ipv6-prefix",
    "ipv6-host",
    "ipv6-dns",
    "restrict",
    "hostname",
    "domainname",
    "hostfwd",
    "guestfwd",
    "id",
];
const TAP_KEYS: [&str; 5] = ["ifname", "fd", "script", "downscript", "id"];
const STREAM_KEYS: [&str; 9] = [
    "server",
    "addr.type",
    "addr.path",
    "addr.host",
    "addr.port",
    "addr.str",
    "reconnect",
    "reconnect-ms",
    "id",
];
const DGRAM_KEYS: [&str; 11] = [
    "local.type",
    "local.path",
    "local.host",
    "local.port",
    "local.str",
    "remote.type",
    "remote.path",
    "remote.host",
    "remote.port",
    "remote.str",
    "id",
];

/// A value that does not parse.
fn bad(flag: &str, key: &str, value: &str, remedy: impl Into<String>) -> Fault {
    Fault::new(format!("{flag} {key} cannot be '{value}'"), remedy)
}

fn on_off(flag: &str, key: &str, value: &str) -> Result<bool, Fault> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(bad(flag, key, value, "write on or off")),
    }
}

fn value<T: FromStr>(flag: &str, key: &str, text: &str, remedy: &str) -> Result<Option<T>, Fault> {
    text.parse().map(Some).map_err(|_| bad(flag, key, text, remedy))
}

/// A socket address spread over keys such as `addr.type`, `addr.path`.
#[derive(Default)]
struct Pieces {
    kind: Option<String>,
    path: Option<String>,
    host: Option<String>,
    port: Option<String>,
    text: Option<String>,
}

impl Pieces {
    fn set(&mut self, part: &str, v: &str) {
        let slot = match part {
            "type" => &mut self.kind,
            "path" => &mut self.path,
            "host" => &mut self.host,
            "port" => &mut self.port,
            _ => &mut self.text,
        };
        *slot = Some(v.into());
    }

    /// The address as one text, or a descriptor.
    fn join(&self, flag: &str) -> Result<(Option<String>, Option<i32>), Fault> {
        let missing = |what: &str| Fault::new(format!("{flag} lacks {what}"), "add it");
        match self.kind.as_deref() {
            None => Ok((None, None)),
            Some("unix") => match &self.path {
                Some(p) => Ok((Some(format!("unix:{p}")), None)),
                None => Err(missing("the path of its unix socket")),
            },
            Some("inet") => match (&self.host, &self.port) {
                (Some(h), Some(p)) => Ok((Some(format!("inet:{h}:{p}")), None)),
                _ => Err(missing("host or port of its address")),
            },
            Some("fd") => match &self.text {
                Some(t) => Ok((None, value(flag, "str", t, "write the descriptor's number")?)),
                None => Err(missing("the number of its descriptor (str=)")),
            },
            Some(k) => Err(bad(flag, "address type", k, one_of(k, &["unix", "inet", "fd"]))),
        }
    }
}

impl Netdev {
    /// Reads `user,id=…`, `tap,…`, `stream,…` or `dgram,…`; every fault is reported. `flag` is the
    /// flag's name; with `--net` a card is made too.
    pub fn parse(flag: &str, s: &str, faults: &mut Vec<Fault>) -> Option<Netdev> {
        let before = faults.len();
        let mut words = parse::split_commas(s).into_iter();
        let kind = words.next().unwrap_or_default();
        let kind = kind.strip_prefix("type=").unwrap_or(&kind);
        let made = match kind {
            "user" => Kind::User(User::default()),
            "tap" => Kind::Tap(Tap::default()),
            "stream" => Kind::Stream(Stream::default()),
            "dgram" => Kind::Dgram(Dgram::default()),
            _ => {
                let what = format!("there is no network of type '{kind}'");
                faults.push(Fault::new(what, one_of(kind, &KINDS)));
                return None;
            }
        };
        let mut n = Netdev {
            id: None,
            card: matches!(flag, "--net" | "-nic"),
            model: None,
            mac: None,
            kind: made,
        };
        let (mut addr, mut remote) = (Pieces::default(), Pieces::default());
        for w in words {
            let (key, text) = w.split_once('=').unwrap_or((&w, "on"));
            faults.extend(n.set(flag, key, text, (&mut addr, &mut remote)).err());
        }
        let joined = addr.join(flag).and_then(|a| Ok((a, remote.join(flag)?)));
        match (joined, &mut n.kind) {
            (Err(f), _) => faults.push(f),
            (Ok(((text, fd), _)), Kind::Stream(s)) => (s.addr, s.fd) = (text, fd),
            (Ok(((local, fd), (remote, _))), Kind::Dgram(d)) => {
                (d.local, d.remote, d.fd) = (local, remote, fd);
            }
            _ => {}
        }
        (faults.len() == before).then_some(n)
    }

    fn set(
        &mut self,
        flag: &str,
        key: &str,
        text: &str,
        (addr, remote): (&mut Pieces, &mut Pieces),
    ) -> Result<(), Fault> {
        match key {
            "id" => {
                self.id = Some(text.into());
                return Ok(());
            }
            "mac" if self.card => {
                self.mac = Some(text.into());
                return Ok(());
            }
            "model" if self.card && matches!(text, "virtio" | "virtio-net-pci" | "e1000e") => {
                self.model = Some(text.into()).filter(|_| text == "e1000e");
                return Ok(());
            }
            _ => {}
        }
        match &mut self.kind {
            Kind::User(u) => u.set(flag, key, text),
            Kind::Tap(t) => match key {
                "ifname" => {
                    t.ifname = Some(text.into());
                    Ok(())
                }
                "fd" => {
                    t.fd = value(flag, key, text, "write the descriptor's number")?;
                    Ok(())
                }
                "script" | "downscript" if matches!(text, "no" | "") => Ok(()),
                "script" | "downscript" => {
                    Err(bad(flag, key, text, "set the interface up beforehand and write no"))
                }
                _ => Err(unknown(flag, key, &TAP_KEYS)),
            },
            Kind::Stream(s) => match (key, key.strip_prefix("addr.")) {
                ("server", _) => {
                    s.server = on_off(flag, key, text)?;
                    Ok(())
                }
                ("reconnect-ms", _) => {
                    s.reconnect_ms = value(flag, key, text, "write milliseconds")?;
                    Ok(())
                }
                ("reconnect", _) => {
                    let seconds: Option<u32> = value(flag, key, text, "write seconds")?;
                    s.reconnect_ms = seconds.map(|s| u64::from(s) * 1000);
                    Ok(())
                }
                (_, Some(part)) if STREAM_KEYS.contains(&key) => {
                    addr.set(part, text);
                    Ok(())
                }
                _ => Err(unknown(flag, key, &STREAM_KEYS)),
            },
            Kind::Dgram(_) if DGRAM_KEYS.contains(&key) => {
                match (key.strip_prefix("local."), key.strip_prefix("remote.")) {
                    (Some(part), _) => addr.set(part, text),
                    (_, Some(part)) => remote.set(part, text),
                    _ => {}
                }
                Ok(())
            }
            Kind::Dgram(_) => Err(unknown(flag, key, &DGRAM_KEYS)),
        }
    }

    /// The name of network number `index`.
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }

    /// What is wrong with it. Touches nothing on the host.
    pub fn validate(&self, faults: &mut Vec<Fault>) {
        if let Some(m) = &self.mac
            && let Err(e) = m.parse::<MacAddr>()
        {
            faults.push(bad("--net", "mac", m, e.to_string()));
        }
        match &self.kind {
            Kind::User(u) => drop(u.config(faults)),
            Kind::Tap(t) => {
                if t.ifname.as_ref().is_some_and(|n| n.is_empty() || n.len() > 15) {
                    let name = t.ifname.as_deref().unwrap_or_default();
                    faults.push(bad("tap", "ifname", name, "write a name of 1 to 15 bytes"));
                }
            }
            Kind::Stream(s) => {
                if s.addr.is_none() && s.fd.is_none() {
                    let what = "a stream network has no address";
                    faults.push(Fault::new(what, "add addr.type=unix,addr.path=PATH"));
                }
                faults.extend(s.addr.as_ref().and_then(|a| address(a).err()));
            }
            Kind::Dgram(d) => {
                if d.remote.is_none() && d.fd.is_none() {
                    let what = "a dgram network has no remote address";
                    faults.push(Fault::new(what, "add remote.type=unix,remote.path=PATH"));
                }
                let both = [&d.local, &d.remote].into_iter().flatten();
                faults.extend(both.filter_map(|a| address(a).err()));
            }
        }
    }
}

fn unknown(flag: &str, key: &str, keys: &[&str]) -> Fault {
    let all = || format!("use {}", keys.join(", "));
    Fault::new(format!("{flag} has no key '{key}'"), closest_or(key, keys, all))
}

/// The address that `unix:PATH` or `inet:HOST:PORT` writes.
pub fn address(text: &str) -> Result<Address, Fault> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Address::Unix(path.into()));
    }
    let inet = text.strip_prefix("inet:").unwrap_or(text);
    let found = inet.to_socket_addrs().ok().and_then(|mut a| a.next());
    found.map(Address::Inet).ok_or_else(|| {
        let what = format!("'{text}' is no socket address");
        Fault::new(what, "write unix:PATH or inet:HOST:PORT")
    })
}

impl User {
    fn set(&mut self, flag: &str, key: &str, text: &str) -> Result<(), Fault> {
        let v4 = "write an IPv4 address";
        let v6 = "write an IPv6 address";
        match key {
            "net" => self.net = Some(text.into()),
            "host" => self.host = value(flag, key, text, v4)?,
            "dns" => self.dns = value(flag, key, text, v4)?,
            "dhcpstart" => self.dhcpstart = value(flag, key, text, v4)?,
            "ipv4" => self.no_ipv4 = !on_off(flag, key, text)?,
            "ipv6" => self.no_ipv6 = !on_off(flag, key, text)?,
            "ipv6-net" | "ipv6-prefix" => {
                let (net, bits) = text.split_once('/').unwrap_or((text, "64"));
                if bits != "64" {
                    return Err(bad(flag, key, text, "use a network of 64 bits"));
                }
                self.ipv6_prefix = value(flag, key, net, v6)?;
            }
            "ipv6-prefixlen" if text == "64" => {}
            "ipv6-host" => self.ipv6_host = value(flag, key, text, v6)?,
            "ipv6-dns" => self.ipv6_dns = value(flag, key, text, v6)?,
            "restrict" => self.restrict = on_off(flag, key, text)?,
            "hostname" => self.hostname = Some(text.into()),
            "domainname" => self.domainname = Some(text.into()),
            "hostfwd" => self.hostfwd.push(text.into()),
            "guestfwd" => self.guestfwd.push(text.into()),
            _ => return Err(unknown(flag, key, &USER_KEYS)),
        }
        Ok(())
    }

    /// The network that this describes; every fault is reported.
    pub fn config(&self, faults: &mut Vec<Fault>) -> UserConfig {
        let v4 = (!self.no_ipv4).then(|| self.v4(faults));
        let v6 = (!self.no_ipv6).then(|| {
            let mut n = self.ipv6_prefix.map_or_else(V6::default, V6::new);
            n.host = self.ipv6_host.unwrap_or(n.host);
            n.dns = self.ipv6_dns.unwrap_or(n.dns);
            n
        });
        let mut c = UserConfig {
            v4,
            v6,
            restrict: self.restrict,
            hostname: self.hostname.clone(),
            domain: self.domainname.clone(),
            ..UserConfig::default()
        };
        if c.v4.is_none() && c.v6.is_none() {
            let what = "a user network has neither IPv4 nor IPv6";
            faults.push(Fault::new(what, "remove ipv4=off or ipv6=off"));
        }
        for f in &self.hostfwd {
            match host_forward(f) {
                Some(f) => c.host_forwards.push(f),
                None => faults.push(Fault::new(
                    format!("hostfwd '{f}' cannot be read"),
                    "write tcp:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT, for example tcp::2222-:22",
                )),
            }
        }
        for f in &self.guestfwd {
            match guest_forward(f) {
                Some(f) => c.guest_forwards.push(f),
                None => faults.push(Fault::new(
                    format!("guestfwd '{f}' cannot be read"),
                    "write tcp:SERVER:PORT-cmd:COMMAND, -tcp:HOST:PORT or -unix:PATH",
                )),
            }
        }
        c
    }

    fn v4(&self, faults: &mut Vec<Fault>) -> V4 {
        let mut n = V4::default();
        if let Some(text) = &self.net {
            match network(text) {
                Some((net, bits)) => n = V4::new(net, bits),
                None => faults.push(bad(
                    "a user network's",
                    "net",
                    text,
                    "write ADDRESS/BITS with 1 to 28 bits, for example 192.168.76.0/24",
                )),
            }
        }
        let mut place = |name: &str, given: Option<Ipv4Addr>, slot: &mut Ipv4Addr| {
            if let Some(ip) = given {
                if !n.contains(ip) {
                    let what = format!("{name}={ip} is outside the network {}/{}", n.net, n.prefix);
                    faults.push(Fault::new(what, "choose an address in it, or change net="));
                }
                *slot = ip;
            }
        };
        let (mut host, mut dns, mut start) = (n.host, n.dns, n.dhcp_start);
        place("host", self.host, &mut host);
        place("dns", self.dns, &mut dns);
        place("dhcpstart", self.dhcpstart, &mut start);
        (n.host, n.dns, n.dhcp_start) = (host, dns, start);
        n
    }
}

/// `ADDRESS/BITS` or `ADDRESS/MASK`; without either, the class of the address decides as of old.
fn network(s: &str) -> Option<(Ipv4Addr, u8)> {
    let (net, bits) = s.split_once('/').unwrap_or((s, "24"));
    let bits = match bits.parse::<Ipv4Addr>() {
        Ok(mask) => {
            let mask = u32::from(mask);
            (mask.leading_ones() + mask.trailing_zeros() == 32)
                .then(|| mask.leading_ones() as u8)?
        }
        Err(_) => bits.parse().ok()?,
    };
    let net = net.parse().ok()?;
    (1..=28).contains(&bits).then_some((net, bits))
}

/// `HOST:PORT` with either possibly empty; an IPv6 address stands in brackets.
fn host_port(s: &str) -> Option<(Option<IpAddr>, u16)> {
    let (host, port) = s.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    match host {
        "" => Some((None, port)),
        "localhost" => Some((Some(Ipv4Addr::LOCALHOST.into()), port)),
        _ => Some((Some(host.parse().ok()?), port)),
    }
}

fn host_forward(s: &str) -> Option<HostForward> {
    let (kind, rest) = s.split_once(':')?;
    let udp = match kind {
        "tcp" | "" => false,
        "udp" => true,
        _ => return None,
    };
    let (host, guest) = rest.split_once('-')?;
    let ((host, hport), (guest, port)) = (host_port(host)?, host_port(guest)?);
    let host = SocketAddr::new(host.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), hport);
    (port != 0).then_some(HostForward { udp, host, guest, port })
}

fn guest_forward(s: &str) -> Option<GuestForward> {
    let (kind, rest) = s.split_once(':')?;
    if !matches!(kind, "tcp" | "") {
        return None;
    }
    let (server, target) = rest.split_once('-')?;
    let (host, port) = host_port(server)?;
    let target = match target.split_once(':')? {
        ("cmd", c) => Target::Command(c.into()),
        ("unix", p) => Target::Unix(PathBuf::from(p)),
        ("tcp", a) => {
            let (host, port) = host_port(a)?;
            Target::Tcp(SocketAddr::new(host.unwrap_or(Ipv4Addr::LOCALHOST.into()), port))
        }
        _ => return None,
    };
    Some(GuestForward { server: SocketAddr::new(host?, port), target })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good(flag: &str, s: &str) -> Netdev {
        let mut f = vec![];
        let n = Netdev::parse(flag, s, &mut f).unwrap_or_else(|| panic!("{s}: {f:?}"));
        n.validate(&mut f);
        assert!(f.is_empty(), "{s}: {f:?}");
        let text = toml::to_string(&n).unwrap();
        assert_eq!(toml::from_str::<Netdev>(&text).unwrap(), n, "{text}");
        n
    }

    #[test]
    fn networks_in_qemus_words() {
        let n = good(
            "--netdev",
            "user,id=n0,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:5353-10.0.2.16:53,net=10.9.0.0/16,\
             guestfwd=tcp:10.9.0.100:80-cmd:cat,,x,restrict=on,hostname=vm",
        );
        assert_eq!(n.name(3), "n0");
        let Kind::User(u) = &n.kind else { panic!() };
        let c = u.config(&mut vec![]);
        assert_eq!(c.v4.unwrap().host, Ipv4Addr::new(10, 9, 0, 2));
        assert_eq!(c.host_forwards[0].host, "0.0.0.0:2222".parse().unwrap());
        assert!(c.host_forwards[1].udp && c.restrict);
        assert_eq!(c.guest_forwards[0].target, Target::Command("cat,x".into()));
        assert!(good("--net", "user,mac=52:54:00:00:00:01").card);
        good("--netdev", "tap,id=t,ifname=tap0,script=no");
        let s =
            good("--netdev", "stream,id=s,server=off,addr.type=unix,addr.path=/x,reconnect-ms=9");
        let Kind::Stream(s) = s.kind else { panic!() };
        assert_eq!((s.addr.as_deref(), s.reconnect_ms), (Some("unix:/x"), Some(9)));
        good("--netdev", "stream,id=s,addr.type=fd,addr.str=7");
        good(
            "--netdev",
            "dgram,id=d,local.type=unix,local.path=/a,remote.type=unix,remote.path=/b",
        );
    }

    #[test]
    fn every_fault_is_told() {
        let mut f = vec![];
        for s in
            ["usr", "user,hostfw=x", "user,restrict=2,host=x", "stream,addr.type=unix", "tap,x=1"]
        {
            assert!(Netdev::parse("--netdev", s, &mut f).is_none(), "{s}");
        }
        let said: Vec<String> = f.iter().map(|f| f.to_string()).collect();
        assert_eq!(said.len(), 6, "{said:?}");
        assert!(said[0].contains("'user'") && said[1].contains("did you mean 'hostfwd'"));
        let mut f = vec![];
        let all = "user,net=1.2.3.4/30,dns=9.9.9.9,hostfwd=tcp:x,guestfwd=udp::-,ipv6=off";
        Netdev::parse("--netdev", all, &mut f).unwrap().validate(&mut f);
        assert_eq!(f.len(), 4, "{f:?}");
    }
}
