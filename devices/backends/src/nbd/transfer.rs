//! Transfer: the requests of one client, worked on by a block engine.
//!
//! ```text
//!   this thread ── reads requests ──► waiting ──► engine ──► complete ── replies ──► socket
//!        └── waits for room: requests and bytes in flight are bounded
//! ```
//!
//! Replies come in any order; each is written whole, under one lock. A failure to write ends the
//! connection for all. Lock order: traffic → engine; the socket's lock is a leaf.

use super::handshake::Agreed;
use super::proto::*;
use super::stream::{Stream, write_all};
use crate::block::chain;
use crate::block::drive::Op;
use crate::block::engine::{self, Engine, Request, Requester};
use crate::block::{Dst, Error, Src, pieces};
use std::collections::{HashMap, VecDeque};
use std::io::{self, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};

/// Requests of one client that are worked on at once.
pub const MAX_IN_FLIGHT: usize = 16;
/// Bytes of their data; a single request may have as many as [`MAX_PAYLOAD`].
pub const MAX_BYTES: u64 = 64 << 20;
/// Extents of one answer about status.
const MAX_EXTENTS: usize = 1024;
/// Looks at an image for one such answer.
const MAX_LOOKS: usize = 8192;
/// Bytes of the buffer that requests are read through.
const READ_BUFFER: usize = 64 << 10;

/// A request as it came.
#[derive(Clone, Copy, Debug)]
struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Header {
    fn read(from: &mut impl Read) -> io::Result<Header> {
        if read_u32(from)? != REQUEST_MAGIC {
            return Err(io::Error::other("a request without its mark"));
        }
        Ok(Header {
            flags: read_u16(from)?,
            kind: read_u16(from)?,
            cookie: read_u64(from)?,
            offset: read_u64(from)?,
            len: read_u32(from)?,
        })
    }

    fn known_flags(&self) -> u16 {
        flag::FUA
            | match self.kind {
                cmd::READ => flag::DF,
                cmd::WRITE_ZEROES => flag::NO_HOLE,
                cmd::BLOCK_STATUS => flag::REQ_ONE,
                _ => 0,
            }
    }
}

/// A request that is worked on.
struct Flight {
    header: Header,
    /// What its `Op` reads into or writes from; it stays where it is while this moves.
    buffer: Vec<u8>,
    /// A flush must follow before it is answered.
    flush_after: bool,
}

#[derive(Default)]
struct Traffic {
    waiting: VecDeque<Request>,
    flights: HashMap<u64, Flight>,
    next_tag: u64,
    /// Bytes of all buffers.
    bytes: u64,
    /// The client is gone.
    broken: bool,
}

/// One client's connection.
struct Link {
    agreed: Agreed,
    traffic: Mutex<Traffic>,
    /// A request was answered.
    room: Condvar,
    stream: Stream,
    /// Held while a reply is written.
    out: Mutex<()>,
    engine: OnceLock<Weak<dyn Engine>>,
}

/// Serves a client until it leaves.
pub fn run(stream: &Stream, agreed: Agreed) -> io::Result<()> {
    let drive = agreed.export.drive.clone();
    let link = Arc::new(Link {
        agreed,
        traffic: Mutex::default(),
        room: Condvar::new(),
        stream: stream.try_clone()?,
        out: Mutex::default(),
        engine: OnceLock::new(),
    });
    let engine = engine::start(&drive, link.clone());
    let _ = link.engine.set(Arc::downgrade(&engine));
    let ended = link.read_requests(stream, &*engine);
    let mut t = link.traffic.lock().unwrap();
    if ended.is_err() {
        t.broken = true;
    }
    // What was asked for before is done and answered.
    drop(link.room.wait_while(t, |t| !t.flights.is_empty()).unwrap());
    ended
}

/// What the client is told of `e`.
fn number(e: &Error, kind: u16) -> u32 {
    match e {
        Error::ReadOnly => errno::EPERM,
        e if e.is_no_space() => errno::ENOSPC,
        Error::OutOfRange => beyond(kind),
        e if e.is_unsupported() => errno::ENOTSUP,
        _ => errno::EIO,
    }
}

/// The error of a request beyond the end.
fn beyond(kind: u16) -> u32 {
    match kind {
        cmd::WRITE | cmd::WRITE_ZEROES => errno::ENOSPC,
        _ => errno::EINVAL,
    }
}

impl Link {
    fn read_requests(&self, stream: &Stream, engine: &dyn Engine) -> io::Result<()> {
        let mut from = BufReader::with_capacity(READ_BUFFER, stream);
        loop {
            let h = Header::read(&mut from)?;
            if h.kind == cmd::DISC {
                return Ok(());
            }
            let data = h.kind == cmd::WRITE;
            if data && h.len > MAX_PAYLOAD {
                return Err(io::Error::other(format!("a write of {} bytes", h.len)));
            }
            match self.judge(&h) {
                Ok(()) => {}
                Err((error, why)) => {
                    if data {
                        io::copy(&mut (&mut from).take(h.len.into()), &mut io::sink())?;
                    }
                    self.fail(&h, error, why)?;
                    continue;
                }
            }
            if h.kind == cmd::BLOCK_STATUS {
                self.status(&h)?;
                continue;
            }
            let room = match h.kind {
                cmd::READ | cmd::WRITE => h.len,
                // Read ahead, as far as is worth it.
                cmd::CACHE => h.len.min(MAX_PAYLOAD),
                _ => 0,
            };
            self.wait_for_room(room.into())?;
            let mut buffer = vec![0; room as usize];
            if data {
                from.read_exact(&mut buffer)?;
            }
            self.submit(h, buffer);
            engine.kick();
        }
    }

    /// Why a request cannot be done.
    fn judge(&self, h: &Header) -> Result<(), (u32, &'static str)> {
        let export = &self.agreed.export;
        let unknown = h.flags & !h.known_flags() != 0;
        if unknown || (h.flags & flag::DF != 0 && !self.agreed.structured) {
            return Err((errno::EINVAL, "unknown flags"));
        }
        let changes = matches!(h.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if changes && export.read_only {
            return Err((errno::EPERM, "the export is read-only"));
        }
        match h.kind {
            cmd::FLUSH if h.offset != 0 || h.len != 0 => {
                return Err((errno::EINVAL, "a flush has no range"));
            }
            cmd::FLUSH => return Ok(()),
            cmd::READ if h.len > MAX_PAYLOAD => {
                return Err((errno::EINVAL, "too much at once"));
            }
            cmd::BLOCK_STATUS if self.agreed.contexts.is_empty() => {
                return Err((errno::EINVAL, "no status was agreed upon"));
            }
            cmd::BLOCK_STATUS if h.len == 0 => return Err((errno::EINVAL, "an empty range")),
            cmd::READ..=cmd::BLOCK_STATUS => {}
            _ => return Err((errno::EINVAL, "an unknown request")),
        }
        match h.offset.checked_add(h.len.into()) {
            Some(end) if end <= export.size => Ok(()),
            _ => Err((beyond(h.kind), "beyond the end of the export")),
        }
    }

    /// Waits until a request with this many bytes may be in flight.
    fn wait_for_room(&self, bytes: u64) -> io::Result<()> {
        let t = self.traffic.lock().unwrap();
        let full = |t: &mut Traffic| {
            let many = t.flights.len() >= MAX_IN_FLIGHT;
            let much = t.bytes + bytes > MAX_BYTES;
            !t.broken && (many || much)
        };
        let t = self.room.wait_while(t, full).unwrap();
        if t.broken { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn submit(&self, header: Header, mut buffer: Vec<u8>) {
        let iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let at = self.agreed.export.offset + header.offset;
        let len = u64::from(header.len);
        let op = match header.kind {
            // SAFETY: the flight keeps the buffer until the request came back, and nobody else
            // looks at it meanwhile.
            cmd::READ | cmd::CACHE => Op::Read(at, unsafe { Dst::from_raw(vec![iov]) }),
            // SAFETY: as above.
            cmd::WRITE => Op::Write(at, unsafe { Src::from_raw(vec![iov]) }),
            cmd::TRIM => Op::Discard(vec![(at, len)]),
            cmd::WRITE_ZEROES => {
                Op::WriteZeroes(vec![(at, len, header.flags & flag::NO_HOLE == 0)])
            }
            _ => Op::Flush,
        };
        let changes = matches!(header.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let flush_after = changes && header.flags & flag::FUA != 0;
        let mut t = self.traffic.lock().unwrap();
        let tag = t.next_tag;
        t.next_tag += 1;
        t.bytes += buffer.len() as u64;
        t.flights.insert(tag, Flight { header, buffer, flush_after });
        t.waiting.push_back(Request { op, tag });
    }

    fn send(&self, parts: &[&[u8]]) -> io::Result<()> {
        let _whole = self.out.lock().unwrap();
        write_all(&self.stream, parts)
    }

    fn simple(&self, h: &Header, error: u32, data: &[u8]) -> io::Result<()> {
        let mut b = [0; 16];
        b[..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        b[4..8].copy_from_slice(&error.to_be_bytes());
        b[8..].copy_from_slice(&h.cookie.to_be_bytes());
        self.send(&[&b, data])
    }

    /// One chunk, of which `body` and `data` are the contents.
    fn chunk(&self, h: &Header, done: bool, kind: u16, body: &[u8], data: &[u8]) -> io::Result<()> {
        let mut b = [0; 20];
        b[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
        b[6..8].copy_from_slice(&kind.to_be_bytes());
        b[8..16].copy_from_slice(&h.cookie.to_be_bytes());
        b[16..].copy_from_slice(&((body.len() + data.len()) as u32).to_be_bytes());
        self.send(&[&b, body, data])
    }

    fn fail(&self, h: &Header, error: u32, why: &str) -> io::Result<()> {
        if !self.agreed.structured {
            return self.simple(h, error, &[]);
        }
        let n = cut(why, MAX_STRING - 1);
        let mut body = error.to_be_bytes().to_vec();
        body.extend((n as u16).to_be_bytes());
        self.chunk(h, true, chunk::ERROR, &body, &why.as_bytes()[..n])
    }

    fn succeed(&self, h: &Header, data: &[u8]) -> io::Result<()> {
        let data = if h.kind == cmd::READ { data } else { &[] };
        if !self.agreed.structured {
            return self.simple(h, 0, data);
        }
        let offset = h.offset.to_be_bytes();
        if data.is_empty() {
            self.chunk(h, true, chunk::NONE, &[], &[])
        } else if pieces::is_zero(data) {
            self.chunk(h, true, chunk::OFFSET_HOLE, &offset, &h.len.to_be_bytes())
        } else {
            self.chunk(h, true, chunk::OFFSET_DATA, &offset, data)
        }
    }

    fn status(&self, h: &Header) -> io::Result<()> {
        let contexts = &self.agreed.contexts;
        let mut answers = Vec::new();
        for context in contexts {
            match self.extents(h, *context) {
                Ok(body) => answers.push(body),
                Err(e) => return self.fail(h, number(&e, h.kind), &e.chain()),
            }
        }
        for (i, body) in answers.iter().enumerate() {
            self.chunk(h, i + 1 == answers.len(), chunk::BLOCK_STATUS, body, &[])?;
        }
        Ok(())
    }

    /// The body of an answer about a range: as much of it as fits, at least one extent.
    fn extents(&self, h: &Header, context: Context) -> Result<Vec<u8>, Error> {
        let export = &self.agreed.export;
        let image = export.drive.image();
        let most = if h.flags & flag::REQ_ONE != 0 { 1 } else { MAX_EXTENTS };
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let (mut at, mut left) = (export.offset + h.offset, h.len);
        for _ in 0..MAX_LOOKS {
            if left == 0 {
                break;
            }
            let s = chain::status(&image, at, left.into(), u32::MAX)?;
            let flags = match context {
                Context::Allocation => {
                    let hole = if s.data { 0 } else { Context::HOLE };
                    hole | if s.zero { Context::ZERO } else { 0 }
                }
                Context::Depth if s.present => s.depth.saturating_add(1),
                Context::Depth => 0,
            };
            let len = s.len.clamp(1, left.into()) as u32;
            let full = runs.len() == most;
            match runs.last_mut() {
                Some(last) if last.1 == flags => last.0 += len,
                _ if full => break,
                _ => runs.push((len, flags)),
            }
            at += u64::from(len);
            left -= len;
        }
        let mut body = context.id().to_be_bytes().to_vec();
        for (len, flags) in runs {
            body.extend(len.to_be_bytes());
            body.extend(flags.to_be_bytes());
        }
        Ok(body)
    }
}

/// Where `text` may be cut to at most `most` bytes.
fn cut(text: &str, most: usize) -> usize {
    (0..=most.min(text.len())).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0)
}

impl Requester for Link {
    fn next(&self) -> Option<Request> {
        self.traffic.lock().unwrap().waiting.pop_front()
    }

    fn has_more(&self) -> bool {
        !self.traffic.lock().unwrap().waiting.is_empty()
    }

    fn complete(&self, request: Request, result: Result<(), Error>) {
        let mut t = self.traffic.lock().unwrap();
        let Some(flight) = t.flights.get_mut(&request.tag) else { return };
        let header = flight.header;
        if std::mem::take(&mut flight.flush_after) && result.is_ok() {
            t.waiting.push_back(Request { op: Op::Flush, tag: request.tag });
            // Under the lock and with the flight in place, the client's own thread keeps the
            // engine, so that it is not dropped here, on one of its threads.
            if let Some(engine) = self.engine.get().and_then(Weak::upgrade) {
                engine.kick();
            }
            return;
        }
        // It stays accounted for until its data is sent.
        let buffer = std::mem::take(&mut flight.buffer);
        drop(t);
        // Nothing points to the buffer any more.
        drop(request.op);
        let sent = match &result {
            Ok(()) => self.succeed(&header, &buffer),
            Err(e) => self.fail(&header, number(e, header.kind), &e.chain()),
        };
        let mut t = self.traffic.lock().unwrap();
        t.flights.remove(&request.tag);
        t.bytes -= buffer.len() as u64;
        if sent.is_err() && !t.broken {
            t.broken = true;
            self.stream.shutdown();
        }
        drop(t);
        self.room.notify_all();
    }

    fn hurried(&self) -> bool {
        self.traffic.lock().unwrap().broken
    }
}
