//! `tandem nbd` with qemu-img and qemu-io as clients.

mod images;

use images::{Dir, Random, format_options, has_qemu, noise, rounds};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A server of ours.
struct Server(Child);

impl Server {
    /// Starts it and waits until clients can connect.
    fn start(dir: &Dir, words: &str) -> Server {
        let socket = dir.path("sock");
        let _ = std::fs::remove_file(&socket);
        let mut c = Command::new(env!("CARGO_BIN_EXE_tandem"));
        c.arg("nbd").args(["-k", "sock"]).args(images::split(words)).current_dir(dir.here());
        let mut s = Server(c.spawn().unwrap());
        let start = Instant::now();
        while !socket.exists() {
            assert!(s.0.try_wait().unwrap().is_none(), "the server did not start");
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        s
    }
    /// Asks it to end; returns its status.
    fn stop(mut self) -> i32 {
        // SAFETY: our own child, which has not been waited for.
        unsafe { libc::kill(self.0.id() as i32, libc::SIGTERM) };
        self.0.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What clients call an export.
fn url(name: &str) -> String {
    format!("nbd+unix:///{name}?socket=sock")
}

fn qemu_io(dir: &Dir, url: &str, commands: &[String]) {
    let mut c = Command::new("qemu-io");
    c.args(["-f", "raw"]).current_dir(dir.here());
    for command in commands {
        c.args(["-c", command]);
    }
    let out = c.arg(url).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    let bad = said.contains("failed") || !out.status.success();
    assert!(!bad, "{commands:?}: {said}{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn clients_see_and_change_the_disk() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("nbd");
    for seed in 1..=rounds(8) {
        let mut r = Random(seed.wrapping_mul(0x51ed_270b_7a32_9c15) | 1);
        let size = (8 + r.below(4 * 2048)) * 512;
        let mut data = noise(&mut r, size);
        dir.write("raw", &data);
        let o = format_options(&mut r);
        let format = r.pick(&["raw", "qcow2"]);
        if format == "qcow2" {
            dir.ok(dir.ours(&format!("convert -q -f raw -O qcow2 -o {o} raw img")));
        } else {
            dir.write("img", &data);
        }
        let more = r.pick(&["", "--discard unmap", "--aio io_uring", "-n", "--detect-zeroes on"]);
        let words = format!("-t -e 0 -x disk -f {format} {more} img");
        let server = Server::start(&dir, &words);
        let (at, what) = (url("disk"), format!("seed {seed}: {words} {o}"));
        dir.ok(dir.theirs(&format!("compare -f raw -F raw {at} raw")));
        // The map's runs cover the disk, and what it calls zeros is zeros.
        let mut next = 0;
        for run in
            dir.json(dir.theirs(&format!("map --output=json -f raw {at}"))).as_array().unwrap()
        {
            let (start, len) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
            assert_eq!(start, next, "{what}");
            next = start + len;
            let zero = data[start as usize..next as usize].iter().all(|b| *b == 0);
            assert!(zero || run["zero"] == false, "{what}: {run}");
        }
        assert_eq!(next, size, "{what}");
        let mut commands = Vec::new();
        for _ in 0..40 {
            let at = r.below(size);
            let len = (1 + r.below(300 * 1024)).min(size - at);
            let here = at as usize..(at + len) as usize;
            let byte = r.next() as u8;
            match r.below(8) {
                0 => commands.push("flush".to_string()),
                1 => {
                    data[here].fill(0);
                    let flags = r.pick(&["-z", "-z -u", "-z -f", "-z -u -f"]);
                    commands.push(format!("write -q {flags} {at} {len}"));
                }
                2 => {
                    // What was discarded is anything; zeros make it known again.
                    let (at, len) = (at & !511, len.next_multiple_of(512).min(size - (at & !511)));
                    data[at as usize..(at + len) as usize].fill(0);
                    commands.push(format!("discard -q {at} {len}"));
                    commands.push(format!("write -q -z {at} {len}"));
                }
                3 => {
                    data[here].fill(byte);
                    commands.push(format!("aio_write -q -P {byte} {at} {len}"));
                    commands.push("aio_flush".into());
                }
                _ => {
                    data[here].fill(byte);
                    let fua = r.pick(&["", "-f"]);
                    commands.push(format!("write -q {fua} -P {byte} {at} {len}"));
                    commands.push(format!("read -q -P {byte} {at} {len}"));
                }
            }
        }
        qemu_io(&dir, &at, &commands);
        dir.write("raw", &data);
        dir.ok(dir.theirs(&format!("compare -f raw -F raw {at} raw")));
        assert_eq!(server.stop(), 0, "{what}");
        dir.ok(dir.theirs(&format!("compare -f {format} -F raw img raw")));
        if format == "qcow2" {
            dir.ok(dir.theirs("check -f qcow2 img"));
        }
    }
}

#[test]
fn options_do_what_they_do_in_qemu_nbd() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("nbd-options");
    let mut r = Random(577_215_664);
    let data = noise(&mut r, 1 << 20);
    dir.write("raw", &data);
    dir.ok(dir.ours("convert -f raw -O qcow2 raw base"));
    dir.ok(dir.ours("snapshot -c then base"));
    dir.ok(dir.ours("create -q -f qcow2 -b base -F qcow2 top"));
    let at = url("");
    // It ends with its last client, and takes its socket away.
    let mut s = Server::start(&dir, "-A top");
    qemu_io(&dir, &at, &["write -q -P 9 64k 64k".into()]);
    assert!(s.0.wait().unwrap().success());
    assert!(!dir.path("sock").exists());
    // How deep data lies.
    let s = Server::start(&dir, "-t -A --description words top");
    let opts = "driver=nbd,server.type=unix,server.path=sock,\
                x-dirty-bitmap=qemu:allocation-depth";
    let map = dir.theirs(&format!("map --output=json --image-opts {opts}"));
    assert_eq!(map.0, 0, "{map:?}");
    let out = Command::new("qemu-nbd").args(["-L", "-k"]).arg(dir.path("sock")).output();
    let list = String::from_utf8_lossy(&out.unwrap().stdout).into_owned();
    for word in ["exports available: 1", "words", "qemu:allocation-depth", "base:allocation"] {
        assert!(list.contains(word), "{word}: {list}");
    }
    assert_eq!(s.stop(), 0);
    // Read-only, a snapshot inside the image, a throw-away layer, a part.
    let s = Server::start(&dir, "-t -r top");
    let mut c = Command::new("qemu-io");
    let out =
        c.args(["-f", "raw", "-c", "write 0 512", &at]).current_dir(dir.here()).output().unwrap();
    assert!(!out.status.success() || String::from_utf8_lossy(&out.stdout).contains("failed"));
    drop(s);
    let s = Server::start(&dir, "-t -l snapshot.name=then base");
    dir.ok(dir.theirs(&format!("compare -f raw -F raw {at} raw")));
    drop(s);
    let s = Server::start(&dir, "-t -s base");
    qemu_io(&dir, &at, &["write -q -P 3 0 1M".into(), "read -q -P 3 0 1M".into()]);
    drop(s);
    dir.ok(dir.theirs("compare base raw"));
    let s = Server::start(&dir, "-t -r -o 512k base");
    dir.write("half", &data[512 << 10..]);
    dir.ok(dir.theirs(&format!("compare -f raw -F raw {at} half")));
    drop(s);
    // In the background, with a file that says which process it is.
    let mut c = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let pid_file = dir.path("pid");
    c.args(["nbd", "-k"]).arg(dir.path("sock2")).args(["--fork", "--pid-file"]).arg(&pid_file);
    assert!(c.arg(dir.path("base")).status().unwrap().success());
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    dir.ok(dir.theirs("info nbd+unix:///?socket=sock2"));
    let start = Instant::now();
    // SAFETY: signal 0 only asks whether the process is.
    while unsafe { libc::kill(pid, 0) } == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "it goes on without clients");
        std::thread::sleep(Duration::from_millis(5));
    }
    for bad in ["nowhere", "-o 2M base", "-o 7 base", "--cache=fast base", "-k", "-l gone base"] {
        let out = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(["nbd", "-k", "sock3"])
            .args(images::split(bad))
            .current_dir(dir.here())
            .output()
            .unwrap();
        assert!(!out.status.success() && !out.stderr.is_empty(), "{bad}");
    }
}
