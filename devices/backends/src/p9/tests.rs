use super::*;

/// A client.
struct Client(Server);

fn text(s: &str) -> Vec<u8> {
    let mut b = (s.len() as u16).to_le_bytes().to_vec();
    b.extend(s.as_bytes());
    b
}

macro_rules! body {
    ($($part:expr),*) => {{
        let mut b: Vec<u8> = Vec::new();
        $(b.extend_from_slice(&$part[..]);)*
        b
    }};
}

impl Client {
    fn say(&mut self, kind: u8, body: &[u8]) -> Result<Vec<u8>, u32> {
        let mut m = ((HEADER + body.len()) as u32).to_le_bytes().to_vec();
        m.push(kind);
        m.extend([7, 0]);
        m.extend(body);
        let a = self.0.answer(&m, 1 << 20).unwrap();
        assert_eq!(u32::from_le_bytes(*a.first_chunk().unwrap()) as usize, a.len());
        assert_eq!(a[5..7], [7, 0]);
        match a[4] {
            t::LERROR => Err(u32::from_le_bytes(*a[7..].first_chunk().unwrap())),
            k => {
                assert_eq!(k, kind + 1);
                Ok(a[7..].to_vec())
            }
        }
    }
    fn walk(&mut self, fid: u32, new: u32, names: &[&str]) -> Result<usize, u32> {
        let mut b = body!(fid.to_le_bytes(), new.to_le_bytes(), (names.len() as u16).to_le_bytes());
        names.iter().for_each(|n| b.extend(text(n)));
        self.say(t::WALK, &b).map(|a| usize::from(a[0]))
    }
    fn open(&mut self, fid: u32, flags: u32) -> Result<Vec<u8>, u32> {
        self.say(t::LOPEN, &body!(fid.to_le_bytes(), flags.to_le_bytes()))
    }
    fn read(&mut self, fid: u32) -> Result<Vec<u8>, u32> {
        let b = body!(fid.to_le_bytes(), 0u64.to_le_bytes(), 1000u32.to_le_bytes());
        self.say(t::READ, &b).map(|a| a[4..].to_vec())
    }
}

struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Tree {
        let dir = std::env::temp_dir().join(format!("tandem-9p-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("share/sub")).unwrap();
        std::fs::write(dir.join("secret"), "not yours").unwrap();
        std::fs::write(dir.join("share/file"), "hello").unwrap();
        std::os::unix::fs::symlink("../secret", dir.join("share/out")).unwrap();
        Tree(dir)
    }
    fn client(&self, read_only: bool) -> Client {
        let mut c = Client(Server::new(&self.0.join("share"), read_only).unwrap());
        let v = c.say(t::VERSION, &body!(65536u32.to_le_bytes(), text("9P2000.L"))).unwrap();
        assert_eq!(v, body!(65536u32.to_le_bytes(), text("9P2000.L")));
        let who = body!(1u32.to_le_bytes(), u32::MAX.to_le_bytes(), text("u"), text(""), [0; 4]);
        c.say(t::ATTACH, &who).unwrap();
        c
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn files_are_read_written_and_listed() {
    let tree = Tree::new("rw");
    let mut c = tree.client(false);
    assert_eq!(c.walk(1, 2, &["file"]), Ok(1));
    c.open(2, 2).unwrap();
    assert_eq!(c.read(2).unwrap(), b"hello");
    let b = body!(2u32.to_le_bytes(), 5u64.to_le_bytes(), 6u32.to_le_bytes(), b" world");
    assert_eq!(c.say(t::WRITE, &b).unwrap(), 6u32.to_le_bytes());
    assert_eq!(std::fs::read(tree.0.join("share/file")).unwrap(), b"hello world");
    c.say(t::FSYNC, &body!(2u32.to_le_bytes(), [0; 4])).unwrap();
    // Truncated, its mode set.
    let set = body!(
        2u32.to_le_bytes(),
        9u32.to_le_bytes(),
        0o600u32.to_le_bytes(),
        [0; 8],
        3u64.to_le_bytes(),
        [0; 32]
    );
    c.say(t::SETATTR, &set).unwrap();
    let a = c.say(t::GETATTR, &body!(2u32.to_le_bytes(), BASIC_MASK.to_le_bytes())).unwrap();
    assert_eq!(u32::from_le_bytes(*a[21..].first_chunk().unwrap()), 0o100600);
    assert_eq!(u64::from_le_bytes(*a[49..].first_chunk().unwrap()), 3);
    // Made, linked, renamed, removed.
    c.walk(1, 3, &[]).unwrap();
    let make =
        body!(3u32.to_le_bytes(), text("new"), 1u32.to_le_bytes(), 0o644u32.to_le_bytes(), [0; 4]);
    c.say(t::LCREATE, &make).unwrap();
    c.say(t::WRITE, &body!(3u32.to_le_bytes(), [0; 8], 2u32.to_le_bytes(), b"ab")).unwrap();
    c.say(t::LINK, &body!(1u32.to_le_bytes(), 3u32.to_le_bytes(), text("other"))).unwrap();
    c.say(t::MKDIR, &body!(1u32.to_le_bytes(), text("d"), 0o755u32.to_le_bytes(), [0; 4])).unwrap();
    c.walk(1, 4, &["d"]).unwrap();
    let b = body!(1u32.to_le_bytes(), text("new"), 4u32.to_le_bytes(), text("moved"));
    c.say(t::RENAMEAT, &b).unwrap();
    c.say(t::SYMLINK, &body!(4u32.to_le_bytes(), text("ln"), text("../file"), [0; 4])).unwrap();
    c.walk(4, 5, &["ln"]).unwrap();
    assert_eq!(c.say(t::READLINK, &5u32.to_le_bytes()).unwrap(), text("../file"));
    assert_eq!(std::fs::read(tree.0.join("share/d/moved")).unwrap(), b"ab");
    c.say(t::UNLINKAT, &body!(1u32.to_le_bytes(), text("other"), [0; 4])).unwrap();
    let rmdir = body!(1u32.to_le_bytes(), text("d"), 0x200u32.to_le_bytes());
    assert_eq!(c.say(t::UNLINKAT, &rmdir), Err(libc::ENOTEMPTY as u32));
    // Listed, in small pieces.
    c.walk(1, 6, &[]).unwrap();
    c.open(6, 0).unwrap();
    let (mut names, mut offset) = (Vec::new(), 0u64);
    loop {
        let b = body!(6u32.to_le_bytes(), offset.to_le_bytes(), 60u32.to_le_bytes());
        let a = c.say(t::READDIR, &b).unwrap();
        let mut rest = &a[4..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            offset = u64::from_le_bytes(*rest[13..].first_chunk().unwrap());
            let n = usize::from(u16::from_le_bytes(*rest[22..].first_chunk().unwrap()));
            names.push(String::from_utf8(rest[24..24 + n].to_vec()).unwrap());
            rest = &rest[24 + n..];
        }
    }
    names.sort();
    assert_eq!(names, [".", "..", "d", "file", "out", "sub"]);
    let s = c.say(t::STATFS, &1u32.to_le_bytes()).unwrap();
    assert_eq!(s.len(), 60);
    c.say(t::CLUNK, &6u32.to_le_bytes()).unwrap();
    assert_eq!(c.read(6), Err(libc::EBADF as u32));
}

const BASIC_MASK: u64 = 0x7ff;

#[test]
fn nothing_outside_is_reached() {
    let tree = Tree::new("jail");
    let mut c = tree.client(false);
    // Above the top is the top.
    assert_eq!(c.walk(1, 2, &["..", "..", "secret"]), Ok(2));
    assert_eq!(c.walk(1, 2, &["../secret"]), Err(libc::ENOENT as u32));
    assert_eq!(c.walk(1, 2, &["sub", "..", "..", "file"]), Ok(4));
    // Links are not followed: not on the way, not at its end.
    assert_eq!(c.walk(1, 3, &["out"]), Ok(1));
    assert_eq!(c.open(3, 0), Err(libc::ELOOP as u32));
    for name in ["out", "../x", "", ".", "..", "a/b"] {
        let b = body!(
            1u32.to_le_bytes(),
            text(name),
            1u32.to_le_bytes(),
            0o644u32.to_le_bytes(),
            [0; 4]
        );
        c.walk(1, 9, &[]).unwrap();
        assert!(c.say(t::LCREATE, &b).is_err(), "{name}");
    }
    // A directory that moves out under our feet.
    assert_eq!(c.walk(1, 4, &["sub"]), Ok(1));
    std::fs::rename(tree.0.join("share/sub"), tree.0.join("sub")).unwrap();
    assert_eq!(c.walk(4, 5, &["..", "secret"]), Ok(1));
    assert_eq!(c.walk(4, 5, &["..", "file"]), Ok(2));
    assert_eq!(std::fs::read(tree.0.join("secret")).unwrap(), b"not yours");
}

#[test]
fn an_answer_needs_no_more_room_than_it_takes() {
    let tree = Tree::new("room");
    let mut c = tree.client(true);
    // A walk without steps answers with a count alone; a clunk with nothing at all.
    let walk = [17, 0, 0, 0, t::WALK, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0];
    assert_eq!(c.0.answer(&walk, 9).unwrap(), [9, 0, 0, 0, t::WALK + 1, 1, 0, 0, 0]);
    let clunk = [11, 0, 0, 0, t::CLUNK, 1, 0, 2, 0, 0, 0];
    assert_eq!(c.0.answer(&clunk, 7).unwrap(), [7, 0, 0, 0, t::CLUNK + 1, 1, 0]);
    assert!(c.0.answer(&clunk, 10).is_none());
}

#[test]
fn read_only_means_it() {
    let tree = Tree::new("ro");
    let mut c = tree.client(true);
    c.walk(1, 2, &["file"]).unwrap();
    let refused = Err(libc::EROFS as u32);
    assert_eq!(c.open(2, 1), refused);
    assert_eq!(c.open(2, 0o1000), refused);
    c.open(2, 0).unwrap();
    assert_eq!(c.read(2).unwrap(), b"hello");
    let mkdir = body!(1u32.to_le_bytes(), text("d"), 0o755u32.to_le_bytes(), [0; 4]);
    assert_eq!(c.say(t::MKDIR, &mkdir), refused);
    assert_eq!(c.say(t::WRITE, &body!(2u32.to_le_bytes(), [0; 12])), refused);
    assert_eq!(c.say(t::SETATTR, &body!(2u32.to_le_bytes(), [0; 60])), refused);
}

#[test]
fn messages_of_any_bytes_do_no_harm() {
    let tree = Tree::new("any");
    let mut c = tree.client(false);
    let mut x = 5u64;
    let mut rand = |n: u64| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) % n
    };
    for _ in 0..20_000 {
        let len = rand(60) as usize;
        let body: Vec<u8> =
            (0..len).map(|_| if rand(2) == 0 { rand(4) } else { rand(256) } as u8).collect();
        let mut m = ((HEADER + len) as u32).to_le_bytes().to_vec();
        m.push(
            [t::WALK, t::LOPEN, t::READ, t::READDIR, t::GETATTR, rand(256) as u8][rand(6) as usize],
        );
        m.extend([0, 0]);
        m.extend(body);
        let room = rand(300) as usize;
        if let Some(a) = c.0.answer(&m, room) {
            assert!(a.len() <= room);
        }
    }
    assert!(c.0.answer(&[], 100).is_none());
    assert!(c.0.answer(&[255, 255, 255, 255, t::READ, 0, 0], 100).is_some());
}
