//! Character devices with names, under QEMU's names of `-chardev`.

use super::{Chardev, Fault, Serial, Size, parse};
use tandem_accel::suggest::{closest_or, one_of};

const KINDS: [&str; 6] = ["null", "stdio", "pty", "file", "socket", "ringbuf"];
const KEYS: [&str; 11] = [
    "id",
    "path",
    "host",
    "port",
    "server",
    "wait",
    "reconnect",
    "reconnect-ms",
    "nodelay",
    "size",
    "append",
];

/// What the keys of one `--chardev` say.
#[derive(Default)]
struct Said {
    id: Option<String>,
    path: Option<String>,
    host: Option<String>,
    port: Option<String>,
    server: bool,
    reconnect_ms: Option<u64>,
    size: Option<Size>,
    append: bool,
}

fn on_off(key: &str, value: &str) -> Result<bool, Fault> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(Fault::new(format!("--chardev {key} cannot be '{value}'"), "write on or off")),
    }
}

fn number(key: &str, value: &str) -> Result<u64, Fault> {
    let fault = || Fault::new(format!("--chardev {key} cannot be '{value}'"), "write a number");
    value.parse().map_err(|_| fault())
}

impl Said {
    fn set(&mut self, key: &str, value: &str) -> Result<(), Fault> {
        match key {
            "id" => self.id = Some(value.into()),
            "path" => self.path = Some(value.into()),
            "host" => self.host = Some(value.into()),
            "port" => self.port = Some(value.into()),
            "server" => self.server = on_off(key, value)?,
            // Nobody is waited for: what is written early is kept for whoever comes.
            "wait" | "nodelay" => drop(on_off(key, value)?),
            "append" => self.append = on_off(key, value)?,
            "reconnect" => self.reconnect_ms = Some(number(key, value)?.saturating_mul(1000)),
            "reconnect-ms" => self.reconnect_ms = Some(number(key, value)?),
            "size" => self.size = Some(Size(number(key, value)?)),
            _ => {
                let remedy = closest_or(key, &KEYS, || format!("use {}", KEYS.join(", ")));
                return Err(Fault::new(format!("--chardev has no key '{key}'"), remedy));
            }
        }
        Ok(())
    }

    fn to(self, kind: &str) -> Result<Serial, Fault> {
        let lacks = |what: &str, remedy: &str| {
            Err(Fault::new(format!("--chardev {kind} lacks {what}"), remedy))
        };
        Ok(match kind {
            "null" => Serial::Null,
            "stdio" => Serial::Stdio,
            "pty" => Serial::Pty,
            "file" => match self.path {
                Some(p) if self.append => Serial::Append(p.into()),
                Some(p) => Serial::File(p.into()),
                None => return lacks("a path", "add path=FILE"),
            },
            "ringbuf" => match self.size.unwrap_or(Size(64 << 10)) {
                s if s.bytes() == 0 || s.bytes() > 16 << 20 => {
                    return lacks("a sensible size", "use 1 to 16777216 bytes");
                }
                s => Serial::Ring(s),
            },
            "socket" => match (self.path, self.host, self.port, self.server) {
                (Some(p), None, None, true) => Serial::Unix(p.into()),
                (Some(p), None, None, false) => {
                    Serial::Connect { to: format!("unix:{p}"), reconnect_ms: self.reconnect_ms }
                }
                (None, host, Some(port), server) => {
                    let at = format!("{}:{port}", host.unwrap_or_else(|| "127.0.0.1".into()));
                    match server {
                        true => Serial::Listen(at),
                        false => Serial::Connect {
                            to: format!("inet:{at}"),
                            reconnect_ms: self.reconnect_ms,
                        },
                    }
                }
                _ => return lacks("an address", "add either path=PATH, or host= and port="),
            },
            _ => {
                let what = format!("there is no character device of type '{kind}'");
                return Err(Fault::new(what, one_of(kind, &KINDS)));
            }
        })
    }
}

impl Chardev {
    /// Reads `socket,id=…,path=…,server=on` and the like; every fault is reported.
    pub fn parse(s: &str, faults: &mut Vec<Fault>) -> Option<Chardev> {
        let before = faults.len();
        let mut words = parse::split_commas(s).into_iter();
        let kind = words.next().unwrap_or_default();
        let mut said = Said::default();
        for w in words {
            let (key, value) = w.split_once('=').unwrap_or((&w, "on"));
            faults.extend(said.set(key, value).err());
        }
        let id = said.id.take();
        if id.is_none() {
            faults.push(Fault::new(format!("--chardev {kind} has no name"), "add id=NAME"));
        }
        match said.to(&kind) {
            Ok(to) => id.filter(|_| faults.len() == before).map(|id| Chardev { id, to }),
            Err(f) => {
                faults.push(f);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chardevs_in_qemus_words() {
        let good = |s: &str| {
            let mut f = vec![];
            Chardev::parse(s, &mut f).unwrap_or_else(|| panic!("{s}: {f:?}")).to
        };
        assert_eq!(good("socket,id=a,path=/x,server=on,wait=off"), Serial::Unix("/x".into()));
        assert_eq!(good("socket,id=a,port=99,server"), Serial::Listen("127.0.0.1:99".into()));
        let to = good("socket,id=a,host=h,port=1,reconnect=2");
        let want = Serial::Connect { to: "inet:h:1".into(), reconnect_ms: Some(2000) };
        assert_eq!(to, want);
        assert_eq!(good("ringbuf,id=r,size=4096"), Serial::Ring(Size(4096)));
        assert_eq!(good("file,id=f,path=/x,append=on"), Serial::Append("/x".into()));
        assert_eq!(good("file,id=f,path=/x,append=off"), Serial::File("/x".into()));
        let text = toml::to_string(&Chardev { id: "a".into(), to: want.clone() }).unwrap();
        assert_eq!(toml::from_str::<Chardev>(&text).unwrap().to, want);
    }

    #[test]
    fn every_fault_is_told() {
        let mut f = vec![];
        for s in ["sock,id=a", "socket,id=a,pth=/x", "null", "socket,id=a,path=/x,port=1"] {
            assert!(Chardev::parse(s, &mut f).is_none(), "{s}");
        }
        let said: Vec<String> = f.iter().map(|f| f.to_string()).collect();
        assert!(said[0].contains("'socket'") && said[1].contains("'path'"), "{said:?}");
        assert_eq!(said.len(), 5, "{said:?}");
    }
}
