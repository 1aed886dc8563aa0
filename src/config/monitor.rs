//! Monitors: where they are and which language they speak.

use super::{Fault, parse};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use tandem_accel::suggest::one_of;

/// The language of a monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// QMP, for programs.
    #[default]
    Control,
    /// Command lines, for people.
    Readline,
}

/// A monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// Its language.
    #[serde(default)]
    pub mode: Mode,
    /// QMP is written with line breaks and indentation.
    #[serde(default)]
    pub pretty: bool,
    /// Name of the character device that it is on, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chardev: Option<String>,
    /// Where it is.
    pub at: Endpoint,
}

/// A place where somebody can connect, or that tandem connects to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Endpoint {
    /// This terminal.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// tandem listens; else it connects.
        #[serde(default = "yes")]
        server: bool,
        /// The machine is not started before somebody has connected.
        #[serde(default)]
        wait: bool,
    },
    /// A TCP socket.
    Tcp {
        /// Host to connect to or address to listen on.
        host: String,
        /// Port.
        port: u16,
        /// tandem listens; else it connects.
        #[serde(default = "yes")]
        server: bool,
        /// The machine is not started before somebody has connected.
        #[serde(default)]
        wait: bool,
    },
    /// An inherited socket.
    Fd {
        /// Descriptor.
        fd: i32,
        /// It listens; else it is connected.
        #[serde(default)]
        server: bool,
        /// The machine is not started before somebody has connected.
        #[serde(default)]
        wait: bool,
    },
}

fn yes() -> bool {
    true
}

impl Endpoint {
    /// Reads `stdio`, `pty`, `unix:PATH[,server=on][,wait=off]` or `tcp:HOST:PORT[,…]`. `server` and
    /// `wait` are what holds if nothing is said.
    pub fn parse(s: &str, flag: &str, server: bool, wait: bool) -> Result<Endpoint, Fault> {
        let words = parse::split_commas(s);
        let first = words[0].as_str();
        let (mut is_server, mut is_wait) = (server, None);
        for word in &words[1..] {
            let (key, value) = word.split_once('=').unwrap_or((word, "on"));
            let (key, on) = match (key, value) {
                ("nowait", "on") => ("wait", false),
                ("noserver", "on") => ("server", false),
                (key, "on" | "yes" | "true") => (key, true),
                (key, "off" | "no" | "false") => (key, false),
                _ => {
                    let what = format!("{flag} {key} cannot be '{value}'");
                    return Err(Fault::new(what, "write on or off"));
                }
            };
            match key {
                "server" => is_server = on,
                "wait" => is_wait = Some(on),
                // Small messages are sent at once in any case.
                "delay" | "nodelay" => {}
                _ => {
                    let what = format!("{flag} has no option '{key}'");
                    return Err(Fault::new(what, one_of(key, &["server", "wait"])));
                }
            }
        }
        let wait = is_server && is_wait.unwrap_or(wait);
        let server = is_server;
        match first.split_once(':') {
            None if first == "stdio" => Ok(Endpoint::Stdio),
            None if first == "pty" => Ok(Endpoint::Pty),
            Some(("unix", path)) if !path.is_empty() => {
                Ok(Endpoint::Unix { path: path.into(), server, wait })
            }
            Some(("tcp" | "telnet", address)) => {
                let parts = address.rsplit_once(':');
                match parts.and_then(|(h, p)| Some((h, p.parse().ok()?))) {
                    Some((host, port)) => {
                        let host = host.trim_start_matches('[').trim_end_matches(']').to_string();
                        Ok(Endpoint::Tcp { host, port, server, wait })
                    }
                    None => Err(Fault::new(
                        format!("{flag} '{first}' is not an address"),
                        "write tcp:HOST:PORT",
                    )),
                }
            }
            _ => {
                let names = ["stdio", "pty", "unix:PATH", "tcp:HOST:PORT"];
                let what = format!("{flag} '{first}' leads nowhere we know");
                Err(Fault::new(what, one_of(first, &names)))
            }
        }
    }
}

impl fmt::Display for Endpoint {
    /// As QEMU names character devices.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let server = |s: bool| if s { ",server=on" } else { "" };
        match self {
            Endpoint::Stdio => f.write_str("stdio"),
            Endpoint::Pty => f.write_str("pty"),
            Endpoint::Unix { path, server: s, .. } => {
                write!(f, "unix:{}{}", path.display(), server(*s))
            }
            Endpoint::Tcp { host, port, server: s, .. } => {
                write!(f, "tcp:{host}:{port}{}", server(*s))
            }
            Endpoint::Fd { fd, server: s, .. } => write!(f, "fd:{fd}{}", server(*s)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_in_qemus_words() {
        let p = |s: &str| Endpoint::parse(s, "-qmp", false, true);
        let unix = |server, wait| Endpoint::Unix { path: "/x,y".into(), server, wait };
        assert_eq!(p("unix:/x,,y,server=on,wait=off").unwrap(), unix(true, false));
        assert_eq!(p("unix:/x,,y,server,nowait").unwrap(), unix(true, false));
        assert_eq!(p("unix:/x,,y,server").unwrap(), unix(true, true));
        assert_eq!(p("unix:/x,,y").unwrap(), unix(false, false));
        let tcp = Endpoint::Tcp { host: "::1".into(), port: 4444, server: true, wait: false };
        assert_eq!(p("tcp:[::1]:4444,server=on,wait=off").unwrap(), tcp);
        assert_eq!(p("stdio").unwrap(), Endpoint::Stdio);
        for bad in ["unix:", "tcp:x", "stdoi", "unix:/x,sever=on", "unix:/x,server=maybe"] {
            assert!(p(bad).is_err(), "{bad}");
        }
        let text = toml::to_string(&tcp).unwrap();
        assert_eq!(toml::from_str::<Endpoint>(&text).unwrap(), tcp);
    }
}
