//! A guest on user-mode networking: addresses, a download, many connections, forwarded ports.

mod vm;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use vm::pty::Terminal;
use vm::{finish, guest_file, run, skip, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(300);
/// Connections at a time.
const MANY: usize = 200;

/// Serves `body` over HTTP to whoever asks; returns the port.
fn web_server(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut c in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = c.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = c.write_all(head.as_bytes()).and_then(|()| c.write_all(&body));
        }
    });
    port
}

/// Answers with what it got, but only when [`MANY`] connections are there at once.
fn patient_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let all = Arc::new(Barrier::new(MANY));
        for mut c in listener.incoming().flatten() {
            let all = all.clone();
            thread::spawn(move || {
                let mut said = Vec::new();
                let _ = c.read_to_end(&mut said);
                all.wait();
                let _ = c.write_all(&said);
            });
        }
    });
    port
}

#[test]
fn the_guest_and_the_host_reach_each_other() {
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let (Some(kernel), Some(initrd)) = (guest_file("vmlinuz-6.1"), guest_file("initramfs-6.1"))
    else {
        return skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    let body: Vec<u8> = (0..8u64 << 20).map(|i| (i.wrapping_mul(i) >> 11) as u8).collect();
    let (web, many) = (web_server(body.clone()), patient_server());
    let forwarded = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let net = format!("user,id=n0,hostfwd=tcp:127.0.0.1:{}-:22", forwarded.port());
    let mut t = Terminal::prepare();
    t.spawn(&mut run(&[
        "--accel",
        "tcg",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--append",
        "console=ttyS0 quiet",
        "--netdev",
        &net,
        "--device",
        "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:05",
    ]));
    t.expect("# ", LIMIT);
    let mut say = |command: &str, answer: &str| {
        t.seen.clear();
        // Not the word that the shell echoes.
        t.send(format!("{command}; echo fini''shed\n").as_bytes());
        t.expect("finished", LIMIT);
        assert!(t.seen.contains(answer), "{command}: {}", t.seen);
    };
    say("cat /sys/class/net/eth0/address", "52:54:00:00:00:05");
    say("udhcpc -i eth0 -q -n", "lease of 10.0.2.15 obtained");
    say("ping -c 1 10.0.2.2", "1 packets received");
    say("cat /etc/resolv.conf; ip route", "default via 10.0.2.2");
    say(&format!("wget -q -O /tmp/body http://10.0.2.2:{web}/"), "");
    let sum = {
        let mut c = std::process::Command::new("md5sum");
        let mut c = c
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        c.stdin.take().unwrap().write_all(&body).unwrap();
        text(&c.wait_with_output().unwrap().stdout)
    };
    say("md5sum < /tmp/body", sum.trim());
    say(
        &format!(
            "for i in $(seq {MANY}); do echo line $i | nc 10.0.2.2 {many} > /tmp/o$i & done; wait; \
             cat /tmp/o* | sort -u | wc -l"
        ),
        &format!("\n{MANY}"),
    );
    say("mkfifo /tmp/f; (nc -l -p 22 < /tmp/f | tee /tmp/got > /tmp/f) & sleep 1", "");
    // The connection is made before the guest is asked: it is reset until somebody listens there.
    let echo = |text: &[u8]| -> std::io::Result<Vec<u8>> {
        let mut c = TcpStream::connect(forwarded)?;
        c.set_read_timeout(Some(LIMIT))?;
        c.write_all(text)?;
        let mut back = vec![0; text.len()];
        c.read_exact(&mut back)?;
        Ok(back)
    };
    let start = Instant::now();
    let back = loop {
        match echo(b"from the host") {
            Ok(back) => break back,
            Err(e) => assert!(start.elapsed() < LIMIT, "{e}"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(back, b"from the host");
    say("cat /tmp/got", "from the host");
    t.send(b"poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
}

#[test]
fn a_network_that_cannot_be_is_told_before_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let dir = vm::Dir::new("network");
    let image = dir.file("guest", &vm::flat::Flat::default().triple_fault().0);
    let net = format!("user,hostfwd=tcp:127.0.0.1:{port}-:22");
    let base = ["--kernel", &image, "--kernel-format", "flat", "-m", "16M"];
    for (words, answer) in [
        (["--net", "usr"], "did you mean 'user'"),
        (["--net", "user,hostfwd=tcp:22"], "for example tcp::2222-:22"),
        (["--device", "virtio-net-pci,netdev=n1"], "--netdev user,id=n1"),
        (["--net", &net], "cannot listen on TCP port 127.0.0.1"),
    ] {
        let out = finish(&mut run(&[&words[..], &base].concat()), LIMIT);
        assert_eq!(out.status.code(), Some(2), "{words:?}: {}", text(&out.stderr));
        assert!(text(&out.stderr).contains(answer), "{words:?}: {}", text(&out.stderr));
    }
}
