//! tandem is killed while it writes to an image: what was flushed is there afterwards, and the image
//! is sound or leaks at worst.
//!
//! `TANDEM_KILLS=N` kills N times for each kind of image instead of a few (scripts/soak-block).

mod images;
mod vm;

use images::{Dir, Random, has_qemu};
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes that are written whole: a page of the host's cache.
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 6144;
/// Requests in flight.
const DEPTH: usize = 12;

/// What may be in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// The number of the write.
    Version(u64),
    Zeros,
}

/// One change of a block.
#[derive(Clone, Copy, Debug)]
struct Change {
    content: Content,
    /// When it was answered, in answers of the server.
    done: Option<u64>,
    /// It may as well not have happened: a discard.
    perhaps: bool,
}

/// What a block may hold: the changes from the last one that is surely durable on.
#[derive(Clone, Debug)]
struct History(Vec<Change>);

impl History {
    fn of(content: Content) -> History {
        History(vec![Change { content, done: Some(0), perhaps: false }])
    }
    /// All that was answered by `time` is durable: forgets what came before the newest of that.
    fn flushed(&mut self, time: u64) {
        let newest = |c: &Change| !c.perhaps && c.done.is_some_and(|t| t <= time);
        let newest = self.0.iter().rposition(newest);
        self.0.drain(..newest.unwrap_or(0));
    }
}

fn fill(block: u64, content: Content) -> Vec<u8> {
    match content {
        Content::Zeros => vec![0; BLOCK as usize],
        Content::Version(v) => {
            let word = (v << 16 | block & 0xffff).to_le_bytes();
            word.repeat(BLOCK as usize / 8)
        }
    }
}

/// A request that has no answer yet.
enum Asked {
    /// Blocks, and whether it is durable when it is answered.
    Change { first: u64, n: u64, fua: bool },
    /// When it was asked for.
    Flush(u64),
}

struct Client {
    socket: UnixStream,
    asked: HashMap<u64, Asked>,
    next: u64,
}

impl Client {
    fn connect(dir: &Dir) -> io::Result<Client> {
        let mut socket = UnixStream::connect(dir.path("sock"))?;
        let mut hello = [0; 18];
        socket.read_exact(&mut hello)?;
        socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut export = [0; 10];
        socket.read_exact(&mut export)?;
        Ok(Client { socket, asked: HashMap::new(), next: 1 })
    }

    fn ask(
        &mut self,
        flags: u16,
        kind: u16,
        first: u64,
        data: &[u8],
        n: u64,
        a: Asked,
    ) -> io::Result<()> {
        let mut b = 0x2560_9513u32.to_be_bytes().to_vec();
        b.extend(flags.to_be_bytes());
        b.extend(kind.to_be_bytes());
        b.extend(self.next.to_be_bytes());
        b.extend((first * BLOCK).to_be_bytes());
        b.extend(((n * BLOCK) as u32).to_be_bytes());
        b.extend(data);
        self.asked.insert(self.next, a);
        self.next += 1;
        self.socket.write_all(&b)
    }

    fn answer(&mut self) -> io::Result<Asked> {
        let mut b = [0; 16];
        self.socket.read_exact(&mut b)?;
        assert_eq!(b[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        let cookie = u64::from_be_bytes(b[8..].try_into().unwrap());
        Ok(self.asked.remove(&cookie).unwrap())
    }
}

/// Writes until the server is gone. `model` is what the disk may hold.
fn load(dir: &Dir, r: &mut Random, model: &mut [History], version: &mut u64) -> io::Result<()> {
    let mut c = Client::connect(dir)?;
    let mut busy = vec![false; model.len()];
    let mut time = 0;
    loop {
        while c.asked.len() < DEPTH {
            if r.below(12) == 0 {
                c.ask(0, 3, 0, &[], 0, Asked::Flush(time))?;
                continue;
            }
            // Often near each other, so that clusters, tables and their neighbours are shared.
            let spread = if r.below(2) == 0 { BLOCKS } else { 256 };
            let n = 1 + r.below(40);
            let first = r.below(spread).min(BLOCKS - n);
            let range = first as usize..(first + n) as usize;
            if busy[range.clone()].iter().any(|b| *b) {
                // Two writes of a block in flight could land in any order.
                if !c.asked.is_empty() {
                    break;
                }
                continue;
            }
            *version += 1;
            let fua = r.below(8) == 0;
            let (kind, content) = match r.below(10) {
                0 => (6, Content::Zeros),
                1 => (4, Content::Zeros),
                _ => (1, Content::Version(*version)),
            };
            let mut data = Vec::new();
            for b in range.clone() {
                busy[b] = true;
                if kind == 1 {
                    data.extend(fill(b as u64, content));
                }
                model[b].0.push(Change { content, done: None, perhaps: kind == 4 });
            }
            c.ask(fua.into(), kind, first, &data, n, Asked::Change { first, n, fua })?;
        }
        let answered = c.answer()?;
        time += 1;
        match answered {
            Asked::Flush(asked) => model.iter_mut().for_each(|h| h.flushed(asked)),
            Asked::Change { first, n, fua } => {
                for b in first as usize..(first + n) as usize {
                    busy[b] = false;
                    // No other change of it is in flight.
                    let last = model[b].0.len() - 1;
                    model[b].0[last].done = Some(time);
                    if fua && !model[b].0[last].perhaps {
                        model[b].0.drain(..last);
                    }
                }
            }
        }
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the file's locks are free: with io_uring the kernel lets go of it a little after the
/// process is gone.
fn wait_for_locks(dir: &Dir, format: &str) {
    let start = Instant::now();
    while dir.theirs(&format!("info -f {format} img")).0 != 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "somebody still uses the image");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What qemu-img sees must be allowed by `model`, which then is what is there.
fn judge(dir: &Dir, format: &str, lazy: bool, model: &mut [History], what: &str) {
    wait_for_locks(dir, format);
    if format == "qcow2" {
        if lazy {
            // Refcounts are rebuilt by whoever opens it next.
            dir.theirs("check -q -r all -f qcow2 img");
        }
        let (status, out, err) = dir.theirs("check -f qcow2 img");
        assert!(status == 0 || status == 3, "{what}: {out}{err}");
    }
    dir.ok(dir.theirs(&format!("convert -f {format} -O raw img flat")));
    let flat = dir.read("flat");
    for (b, (h, found)) in model.iter_mut().zip(flat.chunks(BLOCK as usize)).enumerate() {
        let fits = |c: &&Change| fill(b as u64, c.content) == found;
        let Some(c) = h.0.iter().rev().find(fits) else {
            let start = u64::from_le_bytes(found[..8].try_into().unwrap());
            panic!("{what}: block {b} starts with {start:#x}, which is none of {h:?}");
        };
        *h = History::of(c.content);
    }
}

fn campaign(name: &str, format: &str, options: &str, arguments: &str) {
    if !has_qemu() {
        return;
    }
    let kills: u64 = std::env::var("TANDEM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let dir = Dir::new(name);
    let mut r = Random(0x2545_f491_4f6c_dd1d ^ name.len() as u64);
    let mut model = vec![History::of(Content::Zeros); BLOCKS as usize];
    let mut version = 0;
    let size = BLOCKS * BLOCK;
    dir.ok(dir.theirs(&format!("create -q -f {format} {options} img {size}")));
    let mut written = 0;
    for kill in 1..=kills {
        let _ = std::fs::remove_file(dir.path("sock"));
        let server = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(["nbd", "-t", "-k", "sock", "-f", format])
            .args(images::split(arguments))
            .arg("img")
            .current_dir(dir.here())
            .stderr(Stdio::inherit())
            .spawn();
        let mut server = Killed(server.unwrap());
        let start = Instant::now();
        while !dir.path("sock").exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "the server does not start");
            assert!(server.0.try_wait().unwrap().is_none(), "the server did not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        let pause = Duration::from_millis(5 + r.below(400));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(pause);
            drop(server);
        });
        let before = version;
        let ended = load(&dir, &mut r, &mut model, &mut version).unwrap_err();
        killer.join().unwrap();
        written += version - before;
        judge(
            &dir,
            format,
            options.contains("lazy"),
            &mut model,
            &format!("{name}, kill {kill}: {ended}"),
        );
    }
    println!("{name}: killed {kills} times under {written} changes");
}

#[test]
fn qcow2() {
    campaign("kill-qcow2", "qcow2", "", "--discard unmap");
}

#[test]
fn qcow2_with_small_clusters() {
    campaign("kill-qcow2-small", "qcow2", "-o cluster_size=4k", "--discard unmap");
}

#[test]
fn qcow2_on_io_uring() {
    campaign("kill-qcow2-uring", "qcow2", "-o cluster_size=16k", "--aio io_uring --discard unmap");
}

#[test]
fn qcow2_with_lazy_refcounts() {
    campaign("kill-qcow2-lazy", "qcow2", "-o lazy_refcounts=on", "");
}

#[test]
fn raw() {
    campaign("kill-raw", "raw", "", "--aio io_uring --discard unmap");
}

/// Bytes that the guest writes at once, and the places where it does in turn.
const CHUNK: usize = 65536;
const PLACES: u64 = 96;

/// What the guest writes the `n`th time: `yes "turn N"`.
fn turn(n: u64) -> Vec<u8> {
    format!("turn {n}\n").bytes().cycle().take(CHUNK).collect()
}

/// Boots Linux with the image as its disk, lets it write and sync, and kills the machine; returns
/// the number of the last turn that the guest said was synced.
fn let_guest_write(dir: &Dir, format: &str, first: u64, pause: Duration) -> Option<u64> {
    let (kernel, initrd) = (vm::guest_file("vmlinuz-6.1")?, vm::guest_file("initramfs-6.1")?);
    let drive = format!("file={},format={format}", dir.path("img").display());
    let mut machine = vm::run(&["--accel", "tcg", "--append", "console=ttyS0 quiet"]);
    machine.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).args(["--drive", &drive]);
    machine.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut machine = Killed(machine.spawn().unwrap());
    let script = format!(
        "i={first}; while :; do yes \"turn $i\" | head -c {CHUNK} | \
         dd of=/dev/vda bs={CHUNK} iflag=fullblock seek=$((i % {PLACES})) conv=notrunc,fsync \
         2>/dev/null && echo \"synced $i.\"; i=$((i + 1)); done\n"
    );
    let mut input = machine.0.stdin.take().unwrap();
    let mut output = BufReader::new(machine.0.stdout.take().unwrap());
    let (mut last, mut line, mut killer) = (None, Vec::new(), None);
    let mut machine = Some(machine);
    while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&line).into_owned();
        line.clear();
        if text.contains("tandem-init: uptime") {
            input.write_all(script.as_bytes()).unwrap();
        }
        let number = text.strip_prefix("synced ").and_then(|t| t.trim().strip_suffix('.'));
        last = number.and_then(|n| n.parse().ok()).or(last);
        if last.is_some()
            && let Some(machine) = machine.take()
        {
            killer = Some(std::thread::spawn(move || {
                std::thread::sleep(pause);
                drop(machine);
            }));
        }
    }
    if let Some(k) = killer {
        k.join().unwrap();
    }
    Some(last.expect("the guest synced nothing"))
}

#[test]
fn a_guest_that_syncs() {
    if !has_qemu() {
        return;
    }
    if let Some(why) = vm::unusable("tcg") {
        return vm::skip(&format!("accelerator tcg: {why}"));
    }
    let kills: u64 = std::env::var("TANDEM_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let dir = Dir::new("kill-guest");
    let mut r = Random(1_618_033_988);
    dir.ok(dir.theirs("create -q -f qcow2 -o cluster_size=16k img 16M"));
    let (mut first, mut synced) = (1, HashMap::new());
    for kill in 1..=kills {
        let pause = Duration::from_millis(r.below(2500));
        let Some(last) = let_guest_write(&dir, "qcow2", first, pause) else {
            return vm::skip("guest vmlinuz-6.1 is missing; run scripts/setup");
        };
        wait_for_locks(&dir, "qcow2");
        let (status, out, err) = dir.theirs("check -f qcow2 img");
        assert!(status == 0 || status == 3, "kill {kill}: {out}{err}");
        dir.ok(dir.theirs("convert -f qcow2 -O raw img flat"));
        let flat = dir.read("flat");
        for n in first..=last {
            synced.insert(n % PLACES, n);
        }
        // The turn after the last may have been on its way.
        synced.remove(&((last + 1) % PLACES));
        for (place, n) in &synced {
            let at = *place as usize * CHUNK;
            assert!(flat[at..at + CHUNK] == turn(*n), "kill {kill}: turn {n} of {last} is lost");
        }
        first = last + 2;
    }
    println!("kill-guest: killed {kills} times under {} syncs", first - 2);
}
