//! Serial ports and what they lead to on the host.

use super::inbox::{Event, Inbox};
use super::main_loop::watch;
use crate::commands::run_state::ShutdownCause;
use crate::config;
use crate::terminal::{EscapeKeys, HELP, Key};
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::collections::VecDeque;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use tandem_accel::{Error, Result};
use tandem_backends::chardev::{Address, Chardev};
use tandem_devices::legacy::serial::Serial;
use vmm_sys_util::eventfd::EventFd;

/// Input held for a guest that does not take it. Beyond it a file or socket is not read on; the
/// terminal's keys are read all the same, or Ctrl-A x would not be seen, and dropped.
const PENDING_LIMIT: usize = 4096;

/// Opens what a serial port leads to.
pub fn open(serial: &config::Serial) -> Result<Arc<Chardev>> {
    let (what, made) = match serial {
        config::Serial::Stdio => ("standard input and output".into(), Chardev::stdio()),
        // Validation has found where a named one leads.
        config::Serial::Null | config::Serial::Chardev(_) => ("nowhere".into(), Chardev::null()),
        config::Serial::Pty => ("a new pseudo-terminal".into(), Chardev::pty()),
        config::Serial::File(p) => (format!("file '{}'", p.display()), Chardev::file(p, false)),
        config::Serial::Append(p) => (format!("file '{}'", p.display()), Chardev::file(p, true)),
        config::Serial::Unix(p) => (format!("unix socket '{}'", p.display()), Chardev::unix(p)),
        config::Serial::Listen(at) => (format!("port {at}"), inet(at).and_then(Chardev::tcp)),
        config::Serial::Connect { to, reconnect_ms } => {
            let again = reconnect_ms.filter(|ms| *ms > 0).map(Duration::from_millis);
            let address = match to.strip_prefix("unix:") {
                Some(path) => Ok(Address::Unix(path.into())),
                None => inet(to.strip_prefix("inet:").unwrap_or(to)).map(Address::Inet),
            };
            (to.clone(), address.and_then(|a| Chardev::client(&a, again)))
        }
        config::Serial::Ring(size) => ("memory".into(), Chardev::ring(size.bytes() as usize)),
    };
    let dev = made.map_err(|e| {
        Error::new(format!("cannot connect a character device to {what}"))
            .caused_by(e)
            .remedy("choose another place with --serial or --chardev")
    })?;
    Ok(Arc::new(dev))
}

/// The first address that `HOST:PORT` means.
fn inet(at: &str) -> std::io::Result<SocketAddr> {
    let none = || std::io::Error::other("there is no such host");
    at.to_socket_addrs()?.next().ok_or_else(none)
}

/// Carries input from a chardev to the device that has joined it, on the main loop.
pub struct NamedPort(pub Arc<Chardev>);

impl MutEventSubscriber for NamedPort {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.service();
        self.0.pump();
    }
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &*self.0);
    }
}

/// Carries input from a chardev to a serial port, on the main loop.
pub struct SerialPort {
    chardev: Arc<Chardev>,
    serial: Arc<Serial>,
    pending: VecDeque<u8>,
    /// Present if the input is the user's terminal.
    keys: Option<EscapeKeys>,
    inbox: Arc<Inbox>,
    /// Written when the port has room again.
    room: Arc<EventFd>,
}

impl SerialPort {
    /// Joins `chardev`'s input to `serial`; `keys` says whether the escape key is recognised.
    pub fn new(
        chardev: Arc<Chardev>,
        serial: Arc<Serial>,
        keys: bool,
        inbox: Arc<Inbox>,
    ) -> Result<SerialPort> {
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::new("cannot make a serial port").caused_by(e))?;
        let room = Arc::new(room);
        let bell = room.clone();
        serial.on_room(move || {
            let _ = bell.write(1);
        });
        let keys = keys.then(EscapeKeys::default);
        Ok(SerialPort { chardev, serial, pending: VecDeque::new(), keys, inbox, room })
    }

    /// Reads all there is to read.
    fn read(&mut self) {
        let mut buf = [0u8; 1024];
        while self.wants_input() {
            let n = self.chardev.read(&mut buf);
            if n == 0 {
                break;
            }
            match &mut self.keys {
                None => self.pending.extend(&buf[..n]),
                Some(keys) => {
                    let meant: Vec<Key> = buf[..n].iter().filter_map(|b| keys.key(*b)).collect();
                    meant.into_iter().for_each(|k| self.key(k));
                }
            }
        }
    }

    fn key(&mut self, key: Key) {
        match key {
            Key::Guest(b) if self.pending.len() < PENDING_LIMIT => self.pending.push_back(b),
            Key::Guest(_) => {}
            Key::Quit => self.inbox.post(Event::Quit(ShutdownCause::HostUi)),
            Key::Help => eprint!("{HELP}"),
            Key::Break => self.serial.receive_break(),
        }
    }

    fn wants_input(&self) -> bool {
        self.keys.is_some() || self.pending.len() < PENDING_LIMIT
    }

    fn push(&mut self) {
        while !self.pending.is_empty() {
            let taken = self.serial.receive(self.pending.make_contiguous());
            if taken == 0 {
                break;
            }
            self.pending.drain(..taken);
        }
    }
}

impl MutEventSubscriber for SerialPort {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        if events.fd() == self.room.as_raw_fd() {
            let _ = self.room.read();
        } else {
            self.chardev.service();
        }
        self.read();
        self.push();
        self.chardev.want_input(self.wants_input());
    }
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &*self.room);
        watch(ops, &*self.chardev);
    }
}
