//! A guest that is somebody else's TCP/IP stack, and real servers on the host's loopback.

use super::config::{GuestForward, HostForward, Target};
use super::*;
use crate::net::{Delivery, Network, VNET_HEADER};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp as sicmp, tcp as stcp, udp as sudp};
use smoltcp::time::Instant as SmolInstant;
use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, IpEndpoint, Ipv4Address,
    Ipv6Address,
};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;

/// Frames that fit into the guest's receive ring.
const ROOM: usize = 64;

/// A card whose driver is the test.
#[derive(Default)]
struct TestCard {
    to_guest: Mutex<VecDeque<Vec<u8>>>,
    to_host: Mutex<VecDeque<Vec<u8>>>,
}

impl Card for TestCard {
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    fn transmit(&self, take: &mut dyn FnMut(&VnetHeader, &Src<'_>) -> Taken) -> bool {
        loop {
            let Some(f) = self.to_host.lock().unwrap().pop_front() else { return false };
            // In two pieces, as drivers give headers and data.
            let (mut a, mut b) = (f.clone(), f);
            let cut = a.len() / 3;
            a.truncate(cut);
            b.drain(..cut);
            let iov = [&a, &b]
                .map(|v| libc::iovec { iov_base: v.as_ptr().cast_mut().cast(), iov_len: v.len() });
            // SAFETY: both vectors outlive the pieces.
            let pieces: Src<'_> = unsafe { Src::from_raw(iov.to_vec()) };
            if take(&VnetHeader::default(), &pieces) == Taken::Enough {
                return true;
            }
        }
    }
    fn receive(&self, _: &VnetHeader, parts: &[&[u8]], _: u32) -> Delivery {
        let mut queue = self.to_guest.lock().unwrap();
        if queue.len() >= ROOM {
            return Delivery::Full;
        }
        queue.push_back(parts.concat());
        Delivery::Done
    }
    fn commit(&self) {}
}

struct Wire(Arc<TestCard>, Arc<Network>);
struct Rx(Vec<u8>);
struct Tx(Arc<TestCard>, Arc<Network>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
impl TxToken for Tx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let r = f(&mut frame);
        self.0.to_host.lock().unwrap().push_back(frame);
        self.1.kick();
        r
    }
}
impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx;
    fn receive(&mut self, _: SmolInstant) -> Option<(Rx, Tx)> {
        let mut queue = self.0.to_guest.lock().unwrap();
        let was_full = queue.len() >= ROOM;
        let frame = queue.pop_front()?;
        drop(queue);
        if was_full {
            self.1.kick();
        }
        Some((Rx(frame), Tx(self.0.clone(), self.1.clone())))
    }
    fn transmit(&mut self, _: SmolInstant) -> Option<Tx> {
        Some(Tx(self.0.clone(), self.1.clone()))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.medium = Medium::Ethernet;
        c.max_transmission_unit = 1514;
        c
    }
}

struct Guest {
    wire: Wire,
    iface: Interface,
    sockets: SocketSet<'static>,
}

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

impl Guest {
    fn new(config: UserConfig) -> Guest {
        let net = Network::start("test", Box::new(UserNet::new(config).unwrap())).unwrap();
        let card = Arc::new(TestCard::default());
        net.attach(card.clone());
        let mut wire = Wire(card, net);
        let config = Config::new(EthernetAddress(MAC).into());
        let mut iface = Interface::new(config, &mut wire, SmolInstant::now());
        iface.update_ip_addrs(|a| {
            a.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap();
            a.push(IpCidr::new(IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 15), 64)).unwrap();
        });
        iface.routes_mut().add_default_ipv4_route(Ipv4Address::new(10, 0, 2, 2)).unwrap();
        Guest { wire, iface, sockets: SocketSet::new(Vec::new()) }
    }

    fn poll(&mut self) {
        self.iface.poll(SmolInstant::now(), &mut self.wire, &mut self.sockets);
    }

    /// Polls until `done`.
    fn run(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            self.poll();
            if done(self) {
                return self.poll();
            }
            assert!(Instant::now() < end, "{what} did not happen");
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn tcp(&mut self) -> SocketHandle {
        let buffer = || stcp::SocketBuffer::new(vec![0; 65535]);
        self.sockets.add(stcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: IpEndpoint, port: u16) -> SocketHandle {
        let h = self.tcp();
        let cx = self.iface.context();
        self.sockets.get_mut::<stcp::Socket>(h).connect(cx, to, port).unwrap();
        h
    }

    fn socket(&mut self, h: SocketHandle) -> &mut stcp::Socket<'static> {
        self.sockets.get_mut(h)
    }

    fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || sudp::PacketBuffer::new(vec![sudp::PacketMetadata::EMPTY; 16], vec![0; 65536]);
        let mut s = sudp::Socket::new(buffer(), buffer());
        s.bind(port).unwrap();
        self.sockets.add(s)
    }

    /// Sends `data` and receives as much again.
    fn exchange(&mut self, h: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut got) = (0, Vec::new());
        self.run("the exchange", |g| {
            let s = g.socket(h);
            if s.can_send() && sent < data.len() {
                sent += s.send_slice(&data[sent..]).unwrap();
            }
            while s.can_recv() {
                s.recv(|b| {
                    got.extend_from_slice(b);
                    (b.len(), ())
                })
                .unwrap();
            }
            got.len() >= data.len()
        });
        got
    }
}

/// A server that sends back what it gets until the end, and then ends too.
fn echo_server(ip: &str) -> Option<u16> {
    let listener = TcpListener::bind((ip, 0)).ok()?;
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for c in listener.incoming() {
            let Ok(mut c) = c else { return };
            thread::spawn(move || {
                let mut back = c.try_clone().unwrap();
                let _ = std::io::copy(&mut c, &mut back);
            });
        }
    });
    Some(port)
}

fn noise(n: usize) -> Vec<u8> {
    let mut x = 12345u64;
    let next = |x: &mut u64| {
        *x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*x >> 56) as u8
    };
    (0..n).map(|_| next(&mut x)).collect()
}

#[test]
fn dhcp_gives_the_usual_addresses() {
    let mut g = Guest::new(UserConfig::default());
    let h = g.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    g.run("a lease", |g| {
        if let Some(dhcpv4::Event::Configured(c)) = g.sockets.get_mut::<dhcpv4::Socket>(h).poll() {
            lease = Some((c.address.to_string(), c.router, c.dns_servers.to_vec()));
        }
        lease.is_some()
    });
    let (address, router, dns) = lease.unwrap();
    assert_eq!(address, "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Address::new(10, 0, 2, 2)));
    assert_eq!(dns, [Ipv4Address::new(10, 0, 2, 3)]);
}

#[test]
fn bytes_go_both_ways_unharmed_and_ends_are_passed_on() {
    let port = echo_server("127.0.0.1").unwrap();
    let mut g = Guest::new(UserConfig::default());
    let h = g.connect((IpAddress::v4(10, 0, 2, 2), port).into(), 40000);
    let data = noise(3 << 20);
    assert!(g.exchange(h, &data) == data);
    g.socket(h).close();
    g.run("the end", |g| {
        matches!(g.socket(h).state(), stcp::State::TimeWait | stcp::State::Closed)
    });
}

#[test]
fn two_hundred_connections_at_once() {
    let port = echo_server("127.0.0.1").unwrap();
    let mut g = Guest::new(UserConfig::default());
    let to: IpEndpoint = (IpAddress::v4(10, 0, 2, 2), port).into();
    let all: Vec<_> = (0..200).map(|i| g.connect(to, 30000 + i)).collect();
    g.run("200 connections", |g| all.iter().all(|h| g.socket(*h).may_send()));
    for (i, h) in all.iter().enumerate() {
        g.socket(*h).send_slice(format!("connection {i}").as_bytes()).unwrap();
    }
    let mut answers = vec![String::new(); all.len()];
    g.run("200 answers", |g| {
        for (i, h) in all.iter().enumerate() {
            if g.socket(*h).can_recv() {
                let text = g.socket(*h).recv(|b| (b.len(), b.to_vec())).unwrap();
                answers[i] += std::str::from_utf8(&text).unwrap();
            }
        }
        answers.iter().enumerate().all(|(i, a)| *a == format!("connection {i}"))
    });
}

#[test]
fn a_closed_port_resets() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut g = Guest::new(UserConfig::default());
    let h = g.connect((IpAddress::v4(10, 0, 2, 2), port).into(), 40001);
    g.run("a reset", |g| g.socket(h).state() == stcp::State::Closed);
    let h = g.connect((IpAddress::v4(10, 0, 2, 77), 80).into(), 40002);
    g.iface.routes_mut().remove_default_ipv4_route();
    g.socket(h).abort();
}

#[test]
fn forwarded_ports_reach_the_guest() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (host, uhost) = (free(), free());
    let mut c = UserConfig::default();
    c.host_forwards.push(HostForward { udp: false, host, guest: None, port: 22 });
    c.host_forwards.push(HostForward { udp: true, host: uhost, guest: None, port: 53 });
    let mut g = Guest::new(c);
    let h = g.tcp();
    g.socket(h).listen(22).unwrap();
    let data = noise(300_000);
    let (sent, len) = (data.clone(), data.len());
    let client = thread::spawn(move || {
        let mut s = TcpStream::connect(host).unwrap();
        let mut back = s.try_clone().unwrap();
        let writer = thread::spawn(move || s.write_all(&sent).unwrap());
        let mut got = vec![0; len];
        back.read_exact(&mut got).unwrap();
        writer.join().unwrap();
        got
    });
    let mut echoed = 0;
    g.run("the echo", |g| {
        let s = g.socket(h);
        if s.can_recv() && s.can_send() {
            let room = s.send_capacity() - s.send_queue();
            let part = s.recv(|b| (b.len().min(room), b[..b.len().min(room)].to_vec())).unwrap();
            echoed += s.send_slice(&part).unwrap();
        }
        echoed == len
    });
    assert_eq!(g.socket(h).remote_endpoint().unwrap().addr, IpAddress::v4(10, 0, 2, 2));
    g.run("the client", |_| client.is_finished());
    assert!(client.join().unwrap() == data);

    let u = g.udp(53);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"question", uhost).unwrap();
    g.run("a question", |g| g.sockets.get_mut::<sudp::Socket>(u).can_recv());
    let s = g.sockets.get_mut::<sudp::Socket>(u);
    let from = s.recv().map(|(d, m)| (d.to_vec(), m.endpoint)).unwrap();
    assert_eq!(from.0, b"question");
    s.send_slice(b"answer", from.1).unwrap();
    g.poll();
    let mut b = [0; 16];
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(client.recv(&mut b).unwrap(), 6);
}

#[test]
fn datagrams_and_names() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let at = server.local_addr().unwrap();
    thread::spawn(move || {
        let mut b = [0; 65536];
        while let Ok((n, from)) = server.recv_from(&mut b) {
            b[..n].reverse();
            let _ = server.send_to(&b[..n], from);
        }
    });
    let c = UserConfig { name_server: Some(at), ..UserConfig::default() };
    let mut g = Guest::new(c);
    let u = g.udp(5000);
    for to in [(IpAddress::v4(10, 0, 2, 3), 53), (IpAddress::v4(10, 0, 2, 2), at.port())] {
        g.sockets.get_mut::<sudp::Socket>(u).send_slice(b"abc", to).unwrap();
        g.run("an answer", |g| g.sockets.get_mut::<sudp::Socket>(u).can_recv());
        let s = g.sockets.get_mut::<sudp::Socket>(u);
        let (data, meta) = s.recv().unwrap();
        assert_eq!(data, b"cba");
        assert_eq!(meta.endpoint.addr, to.0);
    }
}

#[test]
fn echo_requests_to_the_host_are_answered() {
    let mut g = Guest::new(UserConfig::default());
    let buffer = || sicmp::PacketBuffer::new(vec![sicmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
    let mut s = sicmp::Socket::new(buffer(), buffer());
    s.bind(sicmp::Endpoint::Ident(7)).unwrap();
    let h = g.sockets.add(s);
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: b"hello" };
    let caps = g.wire.capabilities();
    let s = g.sockets.get_mut::<sicmp::Socket>(h);
    let room = s.send(request.buffer_len(), IpAddress::v4(10, 0, 2, 2)).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &caps.checksum);
    g.run("an answer", |g| g.sockets.get_mut::<sicmp::Socket>(h).can_recv());
    let (b, from) = g.sockets.get_mut::<sicmp::Socket>(h).recv().unwrap();
    assert_eq!(from, IpAddress::v4(10, 0, 2, 2));
    let packet = Icmpv4Packet::new_checked(b).unwrap();
    assert_eq!(packet.data(), b"hello");
}

#[test]
fn ipv6_too() {
    let Some(port) = echo_server("::1") else {
        println!("skipped: the host has no IPv6");
        return;
    };
    let mut g = Guest::new(UserConfig::default());
    let host = Ipv6Address::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
    let h = g.connect((IpAddress::Ipv6(host), port).into(), 40003);
    let data = noise(100_000);
    assert!(g.exchange(h, &data) == data);
}

#[test]
fn virtual_servers_and_restriction() {
    let port = echo_server("127.0.0.1").unwrap();
    let mut c = UserConfig { restrict: true, ..UserConfig::default() };
    let virt = |n: u8| SocketAddr::new(std::net::Ipv4Addr::new(10, 0, 2, n).into(), 7);
    c.guest_forwards
        .push(GuestForward { server: virt(100), target: Target::Command("cat".into()) });
    let to = SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), port);
    c.guest_forwards.push(GuestForward { server: virt(101), target: Target::Tcp(to) });
    let mut g = Guest::new(c);
    for n in [100, 101] {
        let h = g.connect((IpAddress::v4(10, 0, 2, n), 7).into(), 41000 + u16::from(n));
        assert_eq!(g.exchange(h, b"meow"), b"meow");
    }
    let h = g.connect((IpAddress::v4(10, 0, 2, 2), port).into(), 42000);
    g.run("a refusal", |g| g.socket(h).state() == stcp::State::Closed);
}

#[test]
fn frames_of_any_bytes_do_no_harm() {
    let mut net = UserNet::new(UserConfig::default()).unwrap();
    let poller = Poller::new().unwrap();
    let card = TestCard::default();
    let mut x = 99u64;
    let mut rand = |n: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % n
    };
    let heads: [&[u8]; 4] = [
        &[0x08, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2],
        &[0x08, 0, 0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255],
        &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 40, 58, 255, 0xfe, 0x80],
        &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1],
    ];
    for round in 0..20_000 {
        let mut f = vec![0x52; 12];
        f.extend(heads[round % heads.len()]);
        f.resize(14 + rand(120) as usize, 0);
        for _ in 0..rand(12) {
            let at = rand(f.len() as u64) as usize;
            f[at] = rand(256) as u8;
        }
        if f.get(12..14) == Some(&[8, 0]) && f.len() >= 34 {
            // Most would die of their checksum.
            f[24..26].fill(0);
            let mut sum = wire::Checksum::default();
            sum.add(&f[14..34]);
            f[24..26].copy_from_slice(&sum.finish().to_be_bytes());
        }
        let header =
            VnetHeader { flags: rand(2) as u8, ..VnetHeader::from_bytes([7; VNET_HEADER]) };
        let config = net.config.clone();
        let mut lan = Lan::new(&config, &mut net.lan, &card);
        let mut turn = Turn { lan: &mut lan, poller: &poller, name_server: None };
        net.rest.input(&mut turn, &header, &Src::new(&f));
        if round % 64 == 0 {
            net.rest.tcp.pump(&mut lan);
            card.to_guest.lock().unwrap().clear();
        }
    }
    assert!(net.rest.tcp.len() <= tcp::MAX_FLOWS);
}
