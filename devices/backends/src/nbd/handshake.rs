//! The handshake: client and server agree on an export and on what they will say about it.
//!
//! ```text
//!   greeting ─► client flags ─► option ─► reply ─┬─► option …
//!                                                ├─► GO, EXPORT_NAME: transfer
//!                                                └─► ABORT: the end
//! ```

use super::Export;
use super::proto::*;
use super::server::Exports;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

/// How long a whole handshake may take.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Data of one option that is looked at.
const MAX_OPTION: u32 = 64 << 10;

/// What was agreed upon.
#[derive(Debug)]
pub struct Agreed {
    /// The export.
    pub export: Arc<Export>,
    /// Replies are structured.
    pub structured: bool,
    /// What the client may ask about parts of the disk.
    pub contexts: Vec<Context>,
}

/// Data of an option, taken apart.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(n)?;
        self.0 = later;
        Some(now)
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }
    /// A length and a string of that length.
    fn string(&mut self) -> Option<&'a str> {
        let n = self.u32()? as usize;
        if n > MAX_STRING {
            return None;
        }
        std::str::from_utf8(self.bytes(n)?).ok()
    }
}

/// What the client has said so far.
struct Handshake<'a, S> {
    io: &'a mut S,
    exports: &'a Exports,
    no_zeroes: bool,
    structured: bool,
    /// Contexts, and the export that they were asked for.
    contexts: (String, Vec<Context>),
}

/// Answers `client` until it has chosen; `None` if it does not want to.
pub fn negotiate<S: Read + Write>(io: &mut S, exports: &Exports) -> io::Result<Option<Agreed>> {
    let mut hello = Vec::new();
    hello.extend(GREETING.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(((FIXED_NEWSTYLE | NO_ZEROES) as u16).to_be_bytes());
    io.write_all(&hello)?;
    let flags = read_u32(io)?;
    if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(io::Error::other(format!("unknown client flags {flags:#x}")));
    }
    let mut h = Handshake {
        io,
        exports,
        no_zeroes: flags & NO_ZEROES != 0,
        structured: false,
        contexts: Default::default(),
    };
    loop {
        match h.option()? {
            Next::Option => {}
            Next::Transfer(agreed) => return Ok(Some(agreed)),
            Next::End => return Ok(None),
        }
    }
}

/// What comes after an option.
enum Next {
    Option,
    Transfer(Agreed),
    End,
}

impl<S: Read + Write> Handshake<'_, S> {
    fn option(&mut self) -> io::Result<Next> {
        if read_u64(self.io)? != OPTION_MAGIC {
            return Err(io::Error::other("an option without its mark"));
        }
        let (option, len) = (read_u32(self.io)?, read_u32(self.io)?);
        if len > MAX_OPTION {
            if len > MAX_PAYLOAD || option == opt::EXPORT_NAME {
                return Err(io::Error::other(format!("{len} bytes of data for an option")));
            }
            io::copy(&mut (&mut *self.io).take(len.into()), &mut io::sink())?;
            self.reply(option, rep::ERR_TOO_BIG, b"too much data")?;
            return Ok(Next::Option);
        }
        let mut data = vec![0; len as usize];
        self.io.read_exact(&mut data)?;
        match option {
            opt::EXPORT_NAME => return self.export_name(&data),
            opt::ABORT => {
                // The client may be gone already.
                let _ = self.reply(option, rep::ACK, &[]);
                return Ok(Next::End);
            }
            opt::LIST if data.is_empty() => self.list()?,
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, rep::ACK, &[])?;
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                self.reply(option, rep::ERR_INVALID, b"no data belongs there")?;
            }
            opt::INFO | opt::GO => return self.info(option, &data),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta(option, &data)?,
            _ => self.reply(option, rep::ERR_UNSUP, b"this server does not know the option")?,
        }
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut b = Vec::with_capacity(20 + data.len());
        b.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        b.extend(option.to_be_bytes());
        b.extend(kind.to_be_bytes());
        b.extend((data.len() as u32).to_be_bytes());
        b.extend(data);
        self.io.write_all(&b)
    }

    fn agreed(&mut self, export: Arc<Export>) -> Next {
        let (of, contexts) = std::mem::take(&mut self.contexts);
        let contexts = if of == export.name { contexts } else { Vec::new() };
        Next::Transfer(Agreed { export, structured: self.structured, contexts })
    }

    /// The old way to choose, which cannot fail but by hanging up.
    fn export_name(&mut self, name: &[u8]) -> io::Result<Next> {
        let found = std::str::from_utf8(name).ok().and_then(|n| self.exports.find(n));
        let export = found.ok_or_else(|| io::Error::other("there is no export of that name"))?;
        let mut b = export.size.to_be_bytes().to_vec();
        b.extend(flags(&export, self.structured).to_be_bytes());
        if !self.no_zeroes {
            b.extend([0; 124]);
        }
        self.io.write_all(&b)?;
        Ok(self.agreed(export))
    }

    fn list(&mut self) -> io::Result<()> {
        for e in self.exports.all() {
            let mut b = (e.name.len() as u32).to_be_bytes().to_vec();
            b.extend(e.name.bytes());
            b.extend(e.description.bytes());
            self.reply(opt::LIST, rep::SERVER, &b)?;
        }
        self.reply(opt::LIST, rep::ACK, &[])
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let mut p = Parts(data);
        let parsed = (|| {
            let name = p.string()?;
            let n = p.u16()?;
            let wanted: Option<Vec<u16>> = (0..n).map(|_| p.u16()).collect();
            wanted.filter(|_| p.0.is_empty()).map(|w| (name, w))
        })();
        let Some((name, wanted)) = parsed else {
            self.reply(option, rep::ERR_INVALID, b"the request for information makes no sense")?;
            return Ok(Next::Option);
        };
        let Some(export) = self.exports.find(name) else {
            self.reply(option, rep::ERR_UNKNOWN, b"there is no export of that name")?;
            return Ok(Next::Option);
        };
        let text = |kind: u16, s: &str| [&kind.to_be_bytes()[..], s.as_bytes()].concat();
        if wanted.contains(&info::NAME) {
            self.reply(option, rep::INFO, &text(info::NAME, &export.name))?;
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            self.reply(option, rep::INFO, &text(info::DESCRIPTION, &export.description))?;
        }
        // Any byte may be addressed; whole pages are best.
        let sizes = [1, 4096, MAX_PAYLOAD];
        let mut b = info::BLOCK_SIZE.to_be_bytes().to_vec();
        sizes.iter().for_each(|s: &u32| b.extend(s.to_be_bytes()));
        self.reply(option, rep::INFO, &b)?;
        let mut b = info::EXPORT.to_be_bytes().to_vec();
        b.extend(export.size.to_be_bytes());
        b.extend(flags(&export, self.structured).to_be_bytes());
        self.reply(option, rep::INFO, &b)?;
        self.reply(option, rep::ACK, &[])?;
        Ok(if option == opt::GO { self.agreed(export) } else { Next::Option })
    }

    fn meta(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            self.contexts = Default::default();
        }
        if !self.structured {
            return self.reply(option, rep::ERR_INVALID, b"structured replies come first");
        }
        let mut p = Parts(data);
        let parsed = (|| {
            let name = p.string()?;
            let n = p.u32()?;
            // Each takes four bytes at least.
            let fits = n as usize <= p.0.len() / 4;
            let queries: Option<Vec<&str>> =
                if fits { (0..n).map(|_| p.string()).collect() } else { None };
            queries.filter(|_| p.0.is_empty()).map(|q| (name, q))
        })();
        let Some((name, queries)) = parsed else {
            return self.reply(option, rep::ERR_INVALID, b"the queries make no sense");
        };
        let Some(export) = self.exports.find(name) else {
            return self.reply(option, rep::ERR_UNKNOWN, b"there is no export of that name");
        };
        let all = !set && queries.is_empty();
        let meant = |c: &Context| {
            let name = c.name();
            let offered = *c != Context::Depth || export.allocation_depth;
            let space = &name[..=name.find(':').unwrap_or(0)];
            offered && (all || queries.iter().any(|q| *q == name || (!set && *q == space)))
        };
        let contexts: Vec<Context> = Context::ALL.into_iter().filter(meant).collect();
        for c in &contexts {
            let id = if set { c.id() } else { 0 };
            let b = [&id.to_be_bytes()[..], c.name().as_bytes()].concat();
            self.reply(option, rep::META_CONTEXT, &b)?;
        }
        if set {
            self.contexts = (name.to_string(), contexts);
        }
        self.reply(option, rep::ACK, &[])
    }
}

/// What a client may do with `export`.
fn flags(export: &Export, structured: bool) -> u16 {
    let when = |on: bool, bits: u16| if on { bits } else { 0 };
    can::HAS_FLAGS
        | can::FLUSH
        | can::FUA
        | can::CACHE
        | when(structured, can::DF)
        | when(export.multi_conn, can::MULTI_CONN)
        | when(export.read_only, can::READ_ONLY)
        | when(!export.read_only, can::TRIM | can::WRITE_ZEROES)
}
