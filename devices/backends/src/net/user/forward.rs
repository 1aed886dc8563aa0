//! Forwarded ports: listening sockets of the host, and what answers the guest's connections to
//! virtual servers.

use super::config::{HostForward, Target, UserConfig};
use super::flows::LISTENER;
use super::lan::Lan;
use super::tcp::{self, Key, Tcp};
use super::udp::{Udp, seen};
use crate::net::poller::{Poller, Ready};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 256;
/// Connections that are accepted from one socket in one turn.
const TURN: usize = 64;

/// Something that cannot be forwarded.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {} port {}: {error}", if self.forward.udp { "UDP" } else { "TCP" },
        .forward.host)]
pub struct ForwardError {
    /// What.
    pub forward: HostForward,
    /// Why.
    pub error: io::Error,
}

enum Bound {
    Tcp(Socket),
    Udp(UdpSocket),
}

/// A port of the host that leads to the guest.
pub struct Listener {
    bound: Option<Bound>,
    guest: SocketAddr,
    readable: bool,
}

/// Binds all forwarded ports, so that the first that is taken is known before the machine starts.
pub fn bind(config: &UserConfig) -> Result<Vec<Listener>, ForwardError> {
    config.host_forwards.iter().map(|f| bind_one(config, f)).collect()
}

fn bind_one(config: &UserConfig, f: &HostForward) -> Result<Listener, ForwardError> {
    let fail = |error| ForwardError { forward: *f, error };
    let first = config.v4.map(|n| n.dhcp_start.into());
    let guest = f
        .guest
        .or(first)
        .ok_or_else(|| fail(io::Error::other("the guest has no IPv4 address; name its address")))?;
    let make = || -> io::Result<Bound> {
        let kind = if f.udp { Type::DGRAM } else { Type::STREAM };
        let socket = Socket::new(Domain::for_address(f.host), kind, None)?;
        socket.set_nonblocking(true)?;
        if f.udp {
            socket.bind(&f.host.into())?;
            return Ok(Bound::Udp(socket.into()));
        }
        socket.set_reuse_address(true)?;
        socket.bind(&f.host.into())?;
        socket.listen(BACKLOG)?;
        Ok(Bound::Tcp(socket))
    };
    let bound = make().map_err(fail)?;
    Ok(Listener { bound: Some(bound), guest: SocketAddr::new(guest, f.port), readable: false })
}

/// The listening sockets.
pub struct Listeners(Vec<Listener>);

impl Listeners {
    /// Takes bound ports over.
    pub fn new(listeners: Vec<Listener>) -> Listeners {
        Listeners(listeners)
    }

    /// Puts the sockets into the set; those for datagrams go to `udp`.
    pub fn start(&mut self, poller: &Poller, udp: &mut Udp) -> io::Result<()> {
        for (i, l) in self.0.iter_mut().enumerate() {
            match l.bound.take() {
                Some(Bound::Udp(s)) => udp.forward(poller, s, l.guest)?,
                Some(Bound::Tcp(s)) => {
                    poller.add_edge(&s, LISTENER << 56 | i as u64)?;
                    l.bound = Some(Bound::Tcp(s));
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Somebody is calling.
    pub fn ready(&mut self, r: &Ready) {
        if let Some(l) = self.0.get_mut((r.token & 0xffff_ffff) as usize) {
            l.readable = true;
        }
    }

    /// Whether somebody may be calling.
    pub fn is_busy(&self) -> bool {
        self.0.iter().any(|l| l.readable)
    }

    /// Accepts connections.
    pub fn pump(&mut self, lan: &mut Lan<'_>, poller: &Poller, tcp: &mut Tcp) {
        for l in &mut self.0 {
            let Some(Bound::Tcp(listener)) = &l.bound else { continue };
            for _ in 0..TURN {
                if !l.readable || lan.full || !tcp.has_room() {
                    break;
                }
                match listener.accept() {
                    Ok((socket, from)) => accept(lan, poller, tcp, (socket, from), l.guest),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        if e.kind() != io::ErrorKind::WouldBlock {
                            log::warn!("a forwarded connection is refused: {e}");
                        }
                        l.readable = false;
                    }
                }
            }
        }
    }
}

fn accept(
    lan: &mut Lan<'_>,
    poller: &Poller,
    tcp: &mut Tcp,
    (socket, from): (Socket, SockAddr),
    guest: SocketAddr,
) {
    let remote = from.as_socket().and_then(|f| seen(lan.config, f, &guest));
    let ready = socket.set_nonblocking(true).and_then(|()| socket.set_tcp_nodelay(true));
    let called = match (remote, ready) {
        (Some(remote), Ok(())) => tcp.call(lan, poller, Key { guest, remote }, socket),
        (None, _) => Err(io::Error::other("the caller has no address in the guest's network")),
        (_, Err(e)) => Err(e),
    };
    if let Err(e) = called {
        log::warn!("a connection to the guest's port {} is dropped: {e}", guest.port());
    }
}

/// A socket to what answers a virtual server's connections.
pub fn answer(target: &Target) -> io::Result<(Socket, Option<Child>)> {
    match target {
        Target::Tcp(to) => Ok((tcp::connect(*to)?, None)),
        Target::Unix(path) => {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            Ok((tcp::begin(socket, &SockAddr::unix(path)?)?, None))
        }
        Target::Command(command) => {
            let (ours, theirs) = Socket::pair(Domain::UNIX, Type::STREAM, None)?;
            ours.set_nonblocking(true)?;
            let output: OwnedFd = theirs.try_clone()?.into();
            let input: OwnedFd = theirs.into();
            let child = Command::new("/bin/sh")
                .args(["-c", command])
                .stdin(Stdio::from(input))
                .stdout(Stdio::from(output))
                .spawn()?;
            Ok((ours, Some(child)))
        }
    }
}
