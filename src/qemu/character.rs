//! Options about character devices, serial ports and monitors.

use super::keyval::Pairs;
use super::{Builder, Char, CharTo, Mon};
use crate::config::monitor::{Endpoint, Mode};
use crate::config::{Fault, Serial, Size};
use std::os::fd::{FromRawFd, OwnedFd};

type Done = Result<(), Fault>;

fn no_serial(what: &str) -> Fault {
    let what = format!("a serial port cannot be connected to {what}");
    Fault::new(what, "use stdio, pty, file, null or a unix socket that we listen on")
}

fn no_monitor(what: &str) -> Fault {
    let what = format!("a monitor cannot be connected to {what}");
    Fault::new(what, "use stdio, pty or a socket")
}

impl Builder {
    /// `-add-fd`: takes a descriptor that this process was started with.
    pub(super) fn add_fd(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("add-fd", value, None)?;
        let (fd, set) = (p.number::<i32>("fd")?, p.number::<u64>("set")?);
        let (Some(fd), Some(set)) = (fd, set) else {
            let what = format!("-add-fd {value} lacks a number");
            return Err(Fault::new(what, "write -add-fd fd=N,set=N"));
        };
        let opaque = p.take("opaque");
        self.leftovers(p, &["fd", "set", "opaque"]);
        // SAFETY: no memory is passed.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if fd <= libc::STDERR_FILENO || copy < 0 {
            let what = format!("-add-fd fd={fd}: that descriptor was not passed to this process");
            return Err(Fault::new(what, "open one above 2 for it: 3>FILE"));
        }
        // SAFETY: fcntl has just made it for us.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        tandem_backends::fdset::add(copy, Some(set), opaque);
        Ok(())
    }

    pub(super) fn chardev(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("chardev", value, Some("backend"))?;
        let id = p.need("id")?;
        if self.chardevs.iter().any(|c| c.id == id) {
            let what = format!("two character devices are called '{id}'");
            return Err(Fault::new(what, "give each an id of its own"));
        }
        let kind = p.need("backend")?;
        // Several users of a device would be told apart by Ctrl-A c; there is one.
        if p.flag("mux")? == Some(true) {
            let what = format!("-chardev {kind},mux=on is not supported");
            self.faults.push(Fault::new(what, "give serial port and monitor a device each"));
        }
        if let Some(file) = p.take("logfile") {
            let what = format!("-chardev {kind},logfile={file} is not supported");
            self.faults.push(Fault::new(what, "connect the serial port to a file"));
        }
        let _ = p.take("logappend");
        let to = match kind.as_str() {
            "null" => CharTo { serial: Ok(Serial::Null), monitor: Err(no_monitor("nothing")) },
            "stdio" => {
                let _ = p.take("signal");
                CharTo { serial: Ok(Serial::Stdio), monitor: Ok(Endpoint::Stdio) }
            }
            "pty" => CharTo { serial: Ok(Serial::Pty), monitor: Ok(Endpoint::Pty) },
            "file" => {
                let path = p.need("path")?;
                let serial = match p.flag("append")? {
                    Some(true) => Serial::Append(path.into()),
                    _ => Serial::File(path.into()),
                };
                CharTo { serial: Ok(serial), monitor: Err(no_monitor("a file")) }
            }
            "ringbuf" => {
                let size = p.number::<u64>("size")?.unwrap_or(64 << 10).clamp(1, 16 << 20);
                let size = Size(size);
                CharTo { serial: Ok(Serial::Ring(size)), monitor: Err(no_monitor("a ring")) }
            }
            "socket" => self.socket(&mut p)?,
            _ => {
                let kinds = ["null", "stdio", "pty", "file", "socket", "ringbuf"];
                let remedy = tandem_accel::suggest::one_of(&kind, &kinds);
                return Err(Fault::new(format!("-chardev {kind} is not supported"), remedy));
            }
        };
        self.leftovers(p, &["id", "path", "server", "wait", "host", "port", "fd"]);
        self.chardevs.push(Char { id, to });
        Ok(())
    }

    fn socket(&mut self, p: &mut Pairs) -> Result<CharTo, Fault> {
        let server = p.flag("server")?.unwrap_or(false);
        let wait = server && p.flag("wait")?.unwrap_or(true);
        // A connection that we make is made once, and small messages are sent at once.
        let seconds = p.number::<u64>("reconnect")?;
        let reconnect_ms = p.number("reconnect-ms")?.or(seconds.map(|s| s.saturating_mul(1000)));
        let _ = (p.take("delay"), p.take("nodelay"));
        if p.flag("telnet")? == Some(true) {
            let what = "-chardev socket,telnet=on is not supported";
            self.faults.push(Fault::new(what, "connect with nc or socat"));
        }
        if let Some(fd) = p.number::<i32>("fd")? {
            let monitor = Ok(Endpoint::Fd { fd, server, wait });
            return Ok(CharTo { serial: Err(no_serial("an inherited socket")), monitor });
        }
        if let Some(path) = p.take("path") {
            let serial = match server {
                true => Ok(Serial::Unix(path.clone().into())),
                false => Ok(Serial::Connect { to: format!("unix:{path}"), reconnect_ms }),
            };
            let monitor = Ok(Endpoint::Unix { path: path.into(), server, wait });
            return Ok(CharTo { serial, monitor });
        }
        let port = p.number("port")?.ok_or_else(|| {
            Fault::new("-chardev socket leads nowhere", "add path=PATH, or host= and port=")
        })?;
        let host = p.take("host").unwrap_or_default();
        let _ = (p.take("ipv4"), p.take("ipv6"), p.take("to"));
        let at = match host.as_str() {
            "" => format!("127.0.0.1:{port}"),
            h => format!("{h}:{port}"),
        };
        let serial = match server {
            true => Serial::Listen(at),
            false => Serial::Connect { to: format!("inet:{at}"), reconnect_ms },
        };
        let monitor = Ok(Endpoint::Tcp { host, port, server, wait });
        Ok(CharTo { serial: Ok(serial), monitor })
    }

    /// What the short form of `-serial`, `-monitor` and `-qmp` means; `None` for `none`.
    fn short(&mut self, option: &str, value: &str) -> Result<Option<CharTo>, Fault> {
        if let Some(id) = value.strip_prefix("chardev:") {
            let found = self.chardevs.iter().find(|c| c.id == id);
            return found.map(|c| Some(c.to.clone())).ok_or_else(|| {
                let what = format!("-{option} {value}: there is no such character device");
                Fault::new(what, format!("make it first with -chardev …,id={id}"))
            });
        }
        let value = value.strip_prefix("mon:").unwrap_or(value);
        let file = value.strip_prefix("file:");
        Ok(Some(match (value, file) {
            ("none", _) => return Ok(None),
            ("null", _) => CharTo { serial: Ok(Serial::Null), monitor: Err(no_monitor("nothing")) },
            ("stdio", _) => CharTo { serial: Ok(Serial::Stdio), monitor: Ok(Endpoint::Stdio) },
            ("pty", _) => CharTo { serial: Ok(Serial::Pty), monitor: Ok(Endpoint::Pty) },
            ("vc", _) => CharTo { serial: Ok(Serial::Null), monitor: Err(no_monitor("a window")) },
            (_, Some(path)) => {
                CharTo { serial: Ok(Serial::File(path.into())), monitor: Err(no_monitor("a file")) }
            }
            _ => {
                let at = Endpoint::parse(value, &format!("-{option}"), false, true)?;
                let serial = match &at {
                    Endpoint::Unix { path, server: true, .. } => Ok(Serial::Unix(path.clone())),
                    _ => Err(no_serial(value)),
                };
                CharTo { serial, monitor: Ok(at) }
            }
        }))
    }

    pub(super) fn serial(&mut self, value: &str) -> Done {
        let to = self.short("serial", value)?;
        let nowhere = CharTo { serial: Ok(Serial::Null), monitor: Err(no_monitor("nothing")) };
        // `mon:stdio` shares the terminal with a monitor; Ctrl-A x and Ctrl-A h are there anyway.
        self.serials.push(to.unwrap_or(nowhere));
        Ok(())
    }

    pub(super) fn monitor_at(&mut self, value: &str, control: bool, pretty: bool) -> Done {
        let option = if control { "qmp" } else { "monitor" };
        let mode = if control { Mode::Control } else { Mode::Readline };
        if let Some(to) = self.short(option, value)? {
            match to.monitor {
                Ok(at) => self.monitors.push(Mon { mode, pretty, at: Ok(at) }),
                // `-monitor null` means that there is none.
                Err(_) if value == "null" || value == "vc" => {}
                Err(f) => return Err(f),
            }
        }
        Ok(())
    }

    pub(super) fn mon(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("mon", value, Some("chardev"))?;
        let mode = match p.take("mode").as_deref() {
            None | Some("readline") => Mode::Readline,
            Some("control") => Mode::Control,
            Some(m) => {
                let remedy = tandem_accel::suggest::one_of(m, &["readline", "control"]);
                return Err(Fault::new(format!("-mon mode={m} is unknown"), remedy));
            }
        };
        let pretty = p.flag("pretty")?.unwrap_or(false);
        let at = Err(p.need("chardev")?);
        let _ = p.take("id");
        self.leftovers(p, &["chardev", "mode", "pretty", "id"]);
        self.monitors.push(Mon { mode, pretty, at });
        Ok(())
    }
}
