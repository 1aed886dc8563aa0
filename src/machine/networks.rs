//! The machine's networks, started, and the cards that `--net` makes for them.

use super::{Failure, Machine};
use crate::config::net::{self, Kind, Netdev};
use crate::config::{Device, Fault, VmConfig};
use crate::qapi::{self, Error};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tandem_accel::suggest::one_of;
use tandem_backends::net::socket::{Datagrams, Stream};
use tandem_backends::net::tap::Tap;
use tandem_backends::net::user::UserNet;
use tandem_backends::net::{Link, Network};

/// An own copy of a descriptor that this process was given.
fn given(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is only borrowed for the call, which fails if it is not open.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

/// Opens a network's far side.
fn link(n: &Netdev) -> Result<Box<dyn Link>, Fault> {
    let mut faults = Vec::new();
    match &n.kind {
        Kind::User(u) => {
            let config = u.config(&mut faults);
            let net = UserNet::new(config).map_err(|e| {
                Fault::new(e.to_string(), "choose another port with hostfwd, or end who uses it")
            })?;
            Ok(Box::new(net))
        }
        Kind::Tap(t) => {
            let name = t.ifname.as_deref().unwrap_or_default();
            let tap = match t.fd {
                Some(fd) => given(fd).and_then(Tap::from_fd),
                None => Tap::open(name),
            };
            let tap = tap.map_err(|e| {
                Fault::new(
                    format!("cannot open tap device '{name}': {e}"),
                    "make it beforehand for your user (ip tuntap add mode tap user NAME), or use \
                     --net user, which needs no privileges",
                )
            })?;
            Ok(Box::new(tap))
        }
        Kind::Stream(s) => {
            let reconnect = s.reconnect_ms.filter(|ms| *ms > 0).map(Duration::from_millis);
            let made = match (&s.addr, s.fd) {
                (_, Some(fd)) => given(fd).and_then(Stream::from_fd),
                (Some(a), None) => {
                    let at = net::address(a)?;
                    if s.server { Stream::listen(&at) } else { Stream::connect(at, reconnect) }
                }
                (None, None) => Err(io::Error::other("it has no address")),
            };
            let what = s.addr.as_deref().unwrap_or("the given descriptor");
            let made = made.map_err(|e| socket_fault(what, &e))?;
            Ok(Box::new(made))
        }
        Kind::Dgram(d) => {
            let at = |a: &Option<String>| a.as_deref().map(net::address).transpose();
            let made = match d.fd {
                Some(fd) => given(fd).and_then(Datagrams::from_fd),
                None => Datagrams::new(at(&d.local)?.as_ref(), at(&d.remote)?.as_ref()),
            };
            let what = d.local.as_deref().unwrap_or("its descriptor");
            let made = made.map_err(|e| socket_fault(what, &e))?;
            Ok(Box::new(made))
        }
    }
}

fn socket_fault(what: &str, e: &io::Error) -> Fault {
    let what = format!("cannot open a network at {what}: {e}");
    Fault::new(what, "start the other program first, or add reconnect-ms=1000")
}

/// Starts a network.
fn start(n: &Netdev, name: &str) -> Result<Arc<Network>, Fault> {
    Network::start(name, link(n)?).map_err(|e| {
        let what = format!("network '{name}' cannot start: {e}");
        Fault::new(what, "free some of the host's resources")
    })
}

impl Machine {
    /// Starts a network, for a card that comes later.
    pub fn add_network(&mut self, n: Netdev) -> qapi::Result<()> {
        let name = n.name(0);
        if !qapi::is_well_formed_id(&name) {
            return Err(Error::new("Parameter 'id' expects an identifier"));
        }
        if self.config.networks.iter().enumerate().any(|(i, o)| o.name(i) == name) {
            return Err(Error::new(format!("Duplicate ID '{name}' for netdev")));
        }
        let guest = self.guest.as_mut();
        let guest = guest.ok_or_else(|| Error::new("this machine has no networks"))?;
        let started = start(&n, &name)?;
        let shelf = &mut guest.board.peripherals_mut().context_mut().backends.networks;
        shelf.insert(name, started);
        self.config.networks.push(n);
        Ok(())
    }

    /// Ends a network that no card uses.
    pub fn remove_network(&mut self, id: &str) -> qapi::Result<()> {
        let missing = || Error::no_device(format!("Device '{id}' not found"));
        let mut all = self.config.networks.iter().enumerate();
        let (index, n) = all.find(|(i, n)| n.name(*i) == id).ok_or_else(missing)?;
        let user = self.config.devices.iter().find(|d| d.prop("netdev") == Some(id));
        if n.card || user.is_some() {
            return Err(Error::new(format!("network '{id}' has a card; remove that first")));
        }
        // The others keep their names, which may come from their places.
        for (i, n) in self.config.networks.iter_mut().enumerate() {
            n.id = Some(n.name(i));
        }
        self.config.networks.remove(index);
        if let Some(guest) = &mut self.guest {
            guest.board.peripherals_mut().context_mut().backends.networks.remove(id);
        }
        Ok(())
    }
}

/// Starts all networks. Every one that does not start is reported.
pub fn start_all(config: &VmConfig) -> Result<BTreeMap<String, Arc<Network>>, Failure> {
    let (mut networks, mut faults) = (BTreeMap::new(), Vec::new());
    for (i, n) in config.networks.iter().enumerate() {
        let name = n.name(i);
        match start(n, &name) {
            Ok(n) => drop(networks.insert(name, n)),
            Err(f) => faults.push(f),
        }
    }
    if faults.is_empty() { Ok(networks) } else { Err(Failure::Usage(faults)) }
}

/// The cards of networks that are not left to a `--device`.
pub fn devices(config: &VmConfig) -> Vec<Device> {
    let networks = config.networks.iter().enumerate().filter(|(_, n)| n.card);
    networks
        .map(|(i, n)| {
            let mut props = vec![("netdev".into(), n.name(i))];
            props.extend(n.mac.iter().map(|m| ("mac".into(), m.clone())));
            let driver = n.model.as_deref().unwrap_or("virtio-net-pci").into();
            Device { driver, props }
        })
        .collect()
}

/// What is wrong with the networks and the devices' use of them.
pub fn judge(config: &VmConfig, faults: &mut Vec<Fault>) {
    let names: Vec<String> = config.networks.iter().enumerate().map(|(i, n)| n.name(i)).collect();
    for (i, n) in config.networks.iter().enumerate() {
        n.validate(faults);
        if names[..i].contains(&names[i]) {
            let what = format!("two networks are called '{}'", names[i]);
            faults.push(Fault::new(what, "give each an id of its own"));
        }
    }
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut used: Vec<&str> = Vec::new();
    for device in &config.devices {
        for (_, id) in device.props.iter().filter(|(k, _)| k == "netdev") {
            let what = &device.driver;
            if !known.contains(&id.as_str()) {
                let remedy = match known[..] {
                    [] => format!("add --netdev user,id={id}"),
                    _ => one_of(id, &known),
                };
                let what = format!("device '{what}' names network '{id}', which is not there");
                faults.push(Fault::new(what, remedy));
            }
            used.push(id);
        }
    }
    for (i, n) in config.networks.iter().enumerate() {
        let cards = used.iter().filter(|u| **u == names[i]).count() + usize::from(n.card);
        if cards > 1 {
            let what = format!("network '{}' has several cards", names[i]);
            faults.push(Fault::new(what, "give each card a network of its own"));
        }
    }
}
