//! Clients that are written by hand: orderly ones byte by byte, and hostile ones.

use super::proto::*;
use super::server::{Listener, Server};
use super::*;
use crate::block::drive::{DriveOptions, EngineKind};
use crate::block::file::HostFile;
use crate::block::qcow2::{CreateOptions, Options, Qcow2};
use crate::block::raw::Raw;
use crate::block::{Image, drive::Drive};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

const SIZE: u64 = 4 << 20;

struct Rig {
    server: Server,
    path: PathBuf,
}

fn drive(qcow2: bool, engine: EngineKind) -> Arc<Drive> {
    let file = Arc::new(HostFile::temporary(std::path::Path::new("/var/tmp")).unwrap());
    let image: Arc<dyn Image> = if qcow2 {
        CreateOptions { size: SIZE, ..CreateOptions::default() }.create(&file).unwrap();
        Arc::new(Qcow2::open(file, Options { unmap: true, ..Options::default() }).unwrap())
    } else {
        file.set_len(SIZE).unwrap();
        Arc::new(Raw::new(file).unwrap())
    };
    Drive::new(image, DriveOptions { engine, discard: true, ..DriveOptions::default() })
}

fn rig(export: Export) -> Rig {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("tandem-nbd-{}-{n}", std::process::id()));
    let listener = Listener::unix(&path).unwrap();
    let server = Server::start(listener, 4, [], Box::new(|| ())).unwrap();
    assert!(server.add(export.clone()));
    assert!(!server.add(export));
    Rig { server, path }
}

struct Client(UnixStream);

impl Client {
    fn new(rig: &Rig) -> Client {
        let mut c = Client(UnixStream::connect(&rig.path).unwrap());
        assert_eq!(c.bytes(18), *b"NBDMAGICIHAVEOPT\0\x03");
        c.put(&3u32.to_be_bytes());
        c
    }
    fn put(&mut self, b: &[u8]) {
        self.0.write_all(b).unwrap();
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut b = vec![0; n];
        self.0.read_exact(&mut b).unwrap();
        b
    }
    fn u32(&mut self) -> u32 {
        read_u32(&mut self.0).unwrap()
    }
    fn send_option(&mut self, option: u32, data: &[u8]) {
        let head = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
        self.put(&head.concat());
        self.put(data);
    }
    /// Type and data of the next reply to `option`.
    fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(read_u64(&mut self.0).unwrap(), OPTION_REPLY_MAGIC);
        assert_eq!(self.u32(), option);
        let (kind, len) = (self.u32(), self.u32());
        (kind, self.bytes(len as usize))
    }
    fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<u8>) {
        self.send_option(option, data);
        self.reply(option)
    }
    /// All replies to an option up to the last.
    fn replies(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data);
        let mut all = Vec::new();
        loop {
            let r = self.reply(option);
            all.push(r);
            let kind = all[all.len() - 1].0;
            if kind == rep::ACK || kind >> 31 != 0 {
                return all;
            }
        }
    }
    fn go(&mut self, name: &str) -> u16 {
        let data = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat();
        let all = self.replies(opt::GO, &data);
        let export = all.iter().find(|r| r.1.len() == 12 && r.1[..2] == [0, 0]).unwrap();
        u16::from_be_bytes(export.1[10..].try_into().unwrap())
    }
    fn request(&mut self, flags: u16, kind: u16, offset: u64, len: u32, data: &[u8]) {
        let mut b = REQUEST_MAGIC.to_be_bytes().to_vec();
        b.extend(flags.to_be_bytes());
        b.extend(kind.to_be_bytes());
        b.extend((0xc00_c1e0 + u64::from(kind)).to_be_bytes());
        b.extend(offset.to_be_bytes());
        b.extend(len.to_be_bytes());
        b.extend(data);
        self.put(&b);
    }
    /// Error of the next simple reply.
    fn simple(&mut self, kind: u16) -> u32 {
        assert_eq!(self.u32(), SIMPLE_MAGIC);
        let e = self.u32();
        assert_eq!(read_u64(&mut self.0).unwrap(), 0xc00_c1e0 + u64::from(kind));
        e
    }
    fn do_it(&mut self, flags: u16, kind: u16, offset: u64, len: u32, data: &[u8]) -> u32 {
        self.request(flags, kind, offset, len, data);
        self.simple(kind)
    }
    /// Flags, type and body of the next chunk.
    fn chunk(&mut self) -> (u16, u16, Vec<u8>) {
        assert_eq!(self.u32(), CHUNK_MAGIC);
        let (flags, kind) = (read_u16(&mut self.0).unwrap(), read_u16(&mut self.0).unwrap());
        read_u64(&mut self.0).unwrap();
        let len = self.u32();
        (flags, kind, self.bytes(len as usize))
    }
    fn is_over(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

#[test]
fn any_byte_may_be_written_and_read() {
    for qcow2 in [false, true] {
        for engine in [EngineKind::Threads, EngineKind::IoUring] {
            let rig = rig(Export::whole(drive(qcow2, engine)));
            let mut c = Client::new(&rig);
            c.go("");
            let mut model = vec![0u8; SIZE as usize];
            let mut r = 0x9e37_79b9_7f4a_7c15u64;
            let mut below = |n: u64| {
                r ^= r << 13;
                r ^= r >> 7;
                r ^= r << 17;
                r % n
            };
            for round in 0..300 {
                let at = below(SIZE) as usize;
                let len = 1 + below((SIZE - at as u64).min(150_000)) as usize;
                let range = (at as u64, len as u32);
                let flags = if below(4) == 0 { flag::FUA } else { 0 };
                match below(4) {
                    0 => {
                        model[at..at + len].fill(0);
                        let e = c.do_it(flags, cmd::WRITE_ZEROES, range.0, range.1, &[]);
                        assert_eq!(e, 0);
                    }
                    1 => {
                        assert_eq!(c.do_it(0, cmd::READ, range.0, range.1, &[]), 0);
                        assert!(c.bytes(len) == model[at..at + len], "round {round}");
                    }
                    _ => {
                        let data: Vec<u8> = (0..len).map(|i| (i + round) as u8 | 1).collect();
                        model[at..at + len].copy_from_slice(&data);
                        assert_eq!(c.do_it(flags, cmd::WRITE, range.0, range.1, &data), 0);
                    }
                }
            }
            assert_eq!(c.do_it(0, cmd::FLUSH, 0, 0, &[]), 0);
            assert_eq!(c.do_it(0, cmd::READ, 0, SIZE as u32, &[]), 0);
            assert!(c.bytes(SIZE as usize) == model);
        }
    }
}

#[test]
fn options_are_answered() {
    let export = Export {
        name: "disk".into(),
        description: "words".into(),
        allocation_depth: true,
        multi_conn: true,
        ..Export::whole(drive(true, EngineKind::Threads))
    };
    let rig = rig(export);
    let mut c = Client::new(&rig);
    assert_eq!(c.option(99, b"abc").0, rep::ERR_UNSUP);
    assert_eq!(c.option(opt::LIST, b"x").0, rep::ERR_INVALID);
    let list = c.replies(opt::LIST, &[]);
    assert_eq!(list[0], (rep::SERVER, b"\0\0\0\x04diskwords".to_vec()));
    assert_eq!(list.len(), 2);
    // Lengths that lie, and names that are not there.
    for bad in [&b""[..], b"\0\0\0\x09disk\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x04disk\0\x05\0"] {
        assert_eq!(c.option(opt::INFO, bad).0, rep::ERR_INVALID);
        assert_eq!(c.option(opt::GO, bad).0, rep::ERR_INVALID);
    }
    assert_eq!(c.option(opt::GO, b"\0\0\0\x01x\0\0").0, rep::ERR_UNKNOWN);
    let meta = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x04ding";
    assert_eq!(c.option(opt::SET_META_CONTEXT, meta).0, rep::ERR_INVALID);
    assert_eq!(c.option(opt::STRUCTURED_REPLY, &[]).0, rep::ACK);
    assert_eq!(c.replies(opt::LIST_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0").len(), 3);
    let many = b"\0\0\0\x04disk\xff\xff\xff\xff";
    assert_eq!(c.option(opt::LIST_META_CONTEXT, many).0, rep::ERR_INVALID);
    let set = c.replies(opt::SET_META_CONTEXT, meta);
    assert_eq!(set[0], (rep::META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()));
    assert_eq!(set.len(), 2);
    let data = b"\0\0\0\x04disk\0\x03\0\x01\0\x02\0\x03";
    assert_eq!(c.replies(opt::INFO, data).len(), 5);
    let flags = c.go("disk");
    assert_eq!(flags & can::MULTI_CONN, can::MULTI_CONN);
    assert_eq!(rig.server.users("disk"), 1);
    // Holes, data and status in structured replies.
    c.request(0, cmd::WRITE, 65536, 4, b"data");
    assert_eq!(c.chunk(), (1, chunk::NONE, vec![]));
    c.request(0, cmd::READ, 65536, 6, &[]);
    let data = [&65536u64.to_be_bytes()[..], b"data\0\0"].concat();
    assert_eq!(c.chunk(), (1, chunk::OFFSET_DATA, data));
    c.request(flag::DF, cmd::READ, 0, 512, &[]);
    let hole = [&0u64.to_be_bytes()[..], &512u32.to_be_bytes()].concat();
    assert_eq!(c.chunk(), (1, chunk::OFFSET_HOLE, hole));
    c.request(0, cmd::BLOCK_STATUS, 0, 3 * 65536, &[]);
    let words = [0u32, 65536, 3, 65536, 0, 65536, 3];
    let body: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    assert_eq!(c.chunk(), (1, chunk::BLOCK_STATUS, body.clone()));
    c.request(flag::REQ_ONE, cmd::BLOCK_STATUS, 0, 3 * 65536, &[]);
    assert_eq!(c.chunk(), (1, chunk::BLOCK_STATUS, body[..12].to_vec()));
    c.request(0, cmd::READ, SIZE - 1, 2, &[]);
    let (_, kind, body) = c.chunk();
    assert_eq!((kind, &body[..4]), (chunk::ERROR, &errno::EINVAL.to_be_bytes()[..]));
    assert!(rig.server.remove("disk", true));
    assert!(c.is_over());
}

#[test]
fn bad_requests_are_refused_and_the_stream_stays_in_step() {
    let export = Export::whole(drive(false, EngineKind::Threads));
    let rig = rig(Export { offset: SIZE / 2, size: SIZE / 2, ..export });
    let mut c = Client::new(&rig);
    c.go("");
    let end = SIZE / 2;
    for (flags, kind, offset, len, error) in [
        (0, cmd::WRITE, end - 1, 2u32, errno::ENOSPC),
        (0, cmd::WRITE, u64::MAX, 2, errno::ENOSPC),
        (0, cmd::WRITE_ZEROES, 0, u32::MAX, errno::ENOSPC),
        (0, cmd::TRIM, end, 1, errno::EINVAL),
        (0, cmd::READ, end, 1, errno::EINVAL),
        (0, cmd::READ, 0, u32::MAX, errno::EINVAL),
        (0, cmd::CACHE, 1, u32::MAX, errno::EINVAL),
        (0, cmd::FLUSH, 1, 0, errno::EINVAL),
        (0, cmd::BLOCK_STATUS, 0, 512, errno::EINVAL),
        (flag::DF, cmd::READ, 0, 1, errno::EINVAL),
        (1 << 9, cmd::READ, 0, 1, errno::EINVAL),
        (0, 77, 0, 1, errno::EINVAL),
    ] {
        let data = vec![7; if kind == cmd::WRITE { len as usize } else { 0 }];
        assert_eq!(c.do_it(flags, kind, offset, len, &data), error, "{kind} {offset} {len}");
    }
    assert_eq!(c.do_it(0, cmd::CACHE, 0, 4096, &[]), 0);
    assert_eq!(c.do_it(0, cmd::READ, 0, 0, &[]), 0);
    assert_eq!(c.do_it(flag::FUA, cmd::WRITE, end - 2, 2, &[1, 2]), 0);
    // More requests than may be in flight, none of whose answers is read until later.
    for i in 0..100 {
        c.request(0, cmd::READ, end - 2 - i, 2, &[]);
    }
    for _ in 0..100 {
        assert_eq!(c.simple(cmd::READ), 0);
        c.bytes(2);
    }
    c.request(0, cmd::DISC, 0, 0, &[]);
    assert!(c.is_over());
}

#[test]
fn hostile_clients_only_lose_their_connection() {
    let export = Export { read_only: true, ..Export::whole(drive(false, EngineKind::Threads)) };
    let rig = rig(export);
    let hello = |words: &[u8]| {
        let mut c = Client::new(&rig);
        c.put(words);
        c
    };
    // No mark, too much data, an export that is not there.
    assert!(hello(b"GET / HTTP/1.0\r\n\r\n").is_over());
    assert!(hello(b"IHAVEOPT\0\0\0\x03\xff\xff\xff\xff").is_over());
    assert!(hello(b"IHAVEOPT\0\0\0\x01\0\0\0\x01x").is_over());
    let mut c = Client(UnixStream::connect(&rig.path).unwrap());
    c.bytes(18);
    c.put(&[0xff; 4]);
    assert!(c.is_over());
    let mut c = hello(b"IHAVEOPT\0\0\0\x03\0\x02\0\0");
    c.put(&vec![0; 0x2_0000]);
    assert_eq!(c.reply(opt::LIST).0, rep::ERR_TOO_BIG);
    assert_eq!(c.option(opt::ABORT, &[]).0, rep::ACK);
    assert!(c.is_over());
    // Writes to what is read-only, then one that is too long to be skipped.
    let mut c = Client::new(&rig);
    assert_eq!(c.go("") & can::READ_ONLY, can::READ_ONLY);
    assert_eq!(c.do_it(0, cmd::WRITE, 0, 3, b"abc"), errno::EPERM);
    assert_eq!(c.do_it(0, cmd::TRIM, 0, 512, &[]), errno::EPERM);
    c.request(0, cmd::WRITE, 0, u32::MAX, &[]);
    assert!(c.is_over());
    // One that asks for much, reads nothing, and holds on; the server ends all the same.
    let mut held = Client::new(&rig);
    held.go("");
    for _ in 0..40 {
        held.request(0, cmd::READ, 0, SIZE as u32, &[]);
    }
    let _silent = UnixStream::connect(&rig.path).unwrap();
    drop(rig);
}
