//! QMP, as programs see it: negotiation, requests, events, errors, and clients that misbehave.

mod vm;

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;
use vm::flat::Flat;
use vm::qmp::{Qmp, error};
use vm::{Dir, any_accelerator, run, wait};

/// A machine with a QMP socket.
struct Vm {
    child: Option<Child>,
    socket: PathBuf,
    _dir: Dir,
}

impl Vm {
    fn start(name: &str, guest: Flat, words: &[&str]) -> Option<Vm> {
        let accel = any_accelerator()?;
        let dir = Dir::new(name);
        let image = dir.file("guest", &guest.0);
        let socket = dir.path("qmp");
        let place = format!("unix:{}", socket.display());
        let mut c = run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]);
        c.args(["-m", "16M", "--serial", "null", "--qmp", &place]).args(words);
        c.stderr(std::process::Stdio::piped());
        Some(Vm { child: Some(c.spawn().unwrap()), socket, _dir: dir })
    }

    fn qmp(&self) -> Qmp {
        Qmp::negotiated(&self.socket)
    }

    /// Waits for the end; returns the exit status.
    fn ended(mut self) -> Option<i32> {
        wait(self.child.take().unwrap(), Duration::from_secs(60)).status.code()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(mut c) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}

fn status(q: &mut Qmp) -> String {
    q.ok("query-status", json!({}))["status"].as_str().unwrap().to_string()
}

#[test]
fn negotiation_comes_first() {
    let Some(vm) = Vm::start("negotiation", Flat::default().spin(), &[]) else { return };
    let mut q = Qmp::connect(&vm.socket);
    assert!(q.greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{}", q.greeting);
    assert!(q.greeting["QMP"]["capabilities"].is_array());
    assert_eq!(q.err("query-status", json!({})).0, "CommandNotFound");
    // Nobody who has not negotiated is told of events.
    vm.qmp().ok("stop", json!({}));
    let (class, text) = q.err("qmp_capabilities", json!({ "enable": ["oob"] }));
    assert_eq!(class, "GenericError", "{text}");
    q.ok("qmp_capabilities", json!({ "enable": [] }));
    assert_eq!(q.err("qmp_capabilities", json!({})).0, "CommandNotFound");
    assert_eq!(status(&mut q), "paused");
    assert!(q.events.is_empty());
}

#[test]
fn run_state_is_told_before_the_reply() {
    let Some(vm) = Vm::start("state", Flat::default().spin(), &["--paused"]) else { return };
    let (mut q, mut other) = (vm.qmp(), vm.qmp());
    assert_eq!(status(&mut q), "prelaunch");
    q.ok("cont", json!({}));
    assert_eq!(q.event_names(), ["RESUME"]);
    q.ok("cont", json!({}));
    q.ok("stop", json!({}));
    q.ok("stop", json!({}));
    assert_eq!(q.event_names(), ["STOP"], "what changes nothing is not told");
    let info = q.ok("query-status", json!({}));
    assert_eq!(info, json!({ "running": false, "status": "paused" }));
    q.ok("system_reset", json!({}));
    assert_eq!(q.event_names(), ["RESET"]);
    assert_eq!(status(&mut q), "prelaunch");
    q.ok("cont", json!({}));
    q.ok("system_reset", json!({}));
    assert_eq!(q.event_names(), ["RESUME", "RESET"]);
    assert_eq!(status(&mut q), "running");
    q.ok("system_powerdown", json!({}));
    assert_eq!(q.event_names(), ["POWERDOWN"]);
    q.ok("quit", json!({}));
    let event = q.event("SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
    // The other session has seen the same.
    for name in ["RESUME", "STOP", "RESET", "RESUME", "RESET", "POWERDOWN", "SHUTDOWN"] {
        assert_eq!(other.line().unwrap()["event"], name);
    }
    assert!(other.line().is_none(), "the end of the machine ends its sessions");
    let socket = vm.socket.clone();
    assert_eq!(vm.ended(), Some(0));
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn a_machine_that_shut_down_can_be_kept() {
    // The reset control register, hard reset: under --no-reboot a shut-down.
    let guest = Flat::default().out(0xcf9, 0x06).halt();
    let words = ["--paused", "--no-shutdown", "--no-reboot"];
    let Some(vm) = Vm::start("kept", guest, &words) else { return };
    let mut q = vm.qmp();
    q.ok("cont", json!({}));
    let event = q.event("SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": true, "reason": "guest-reset" }));
    q.event("STOP");
    assert_eq!(status(&mut q), "shutdown");
    assert!(q.err("cont", json!({})).1.contains("Reset"), "only a reset helps");
    q.ok("system_reset", json!({}));
    assert_eq!(status(&mut q), "prelaunch");
    q.ok("cont", json!({}));
    q.event("SHUTDOWN");
    q.ok("quit", json!({}));
    assert_eq!(vm.ended(), Some(0));
}

#[test]
fn requests_that_are_wrong() {
    let Some(vm) = Vm::start("wrong", Flat::default().spin(), &[]) else { return };
    let mut q = vm.qmp();
    let mut wrong = |text: &str| {
        q.send(text);
        error(&q.reply())
    };
    for (text, class, word) in [
        ("[]", "GenericError", "object"),
        ("12\n", "GenericError", "object"),
        ("{}", "GenericError", "lacks member 'execute'"),
        (r#"{"execute": 1}"#, "GenericError", "must be a string"),
        (r#"{"execute": "stop", "arguments": 1}"#, "GenericError", "must be an object"),
        (r#"{"execute": "stop", "extra": 1}"#, "GenericError", "'extra' is unexpected"),
        (r#"{"exec-oob": "stop"}"#, "GenericError", "'exec-oob' is unexpected"),
        (r#"{"execute": "stpo"}"#, "CommandNotFound", "stpo"),
        (r#"{"execute": "stop", "arguments": {"x": 1}}"#, "GenericError", "'x' is unexpected"),
        ("{\"execute\": }", "GenericError", "JSON parse error"),
        ("}", "GenericError", "JSON parse error"),
        ("\u{7f}\n", "GenericError", "JSON parse error"),
    ] {
        let (c, desc) = wrong(text);
        assert_eq!(c, class, "{text}");
        assert!(desc.contains(word), "{text}: {desc}");
    }
    // The id comes back whatever it is, with errors too.
    for id in [json!(1), json!("a"), json!({"x": [null]}), Value::Null] {
        q.send(json!({ "execute": "nope", "id": id }).to_string());
        assert_eq!(q.reply()["id"], id);
        q.send(json!({ "id": id, "execute": "query-status" }).to_string());
        assert_eq!(q.reply()["id"], id);
    }
    // Several at once, in pieces, in single quotes.
    q.send("{'execute':'query-status','id':1}{'execute':'query-status','id':2} {'exec");
    q.send("ute':'query-status','id':3}");
    for id in 1..=3 {
        assert_eq!(q.reply()["id"], id);
    }
}

#[test]
fn clients_that_misbehave_disturb_nobody() {
    let Some(vm) = Vm::start("hostile", Flat::default().spin(), &[]) else { return };
    let mut good = vm.qmp();
    let raw = || UnixStream::connect(&vm.socket).unwrap();
    // Half a message, and away.
    raw().write_all(b"{\"execute\": \"qmp_cap").unwrap();
    // Brackets without end, and a string without end.
    let (mut deep, mut long) = (raw(), raw());
    deep.write_all(&vec![b'['; 1 << 20]).unwrap();
    long.write_all(b"\"").unwrap();
    let junk = vec![b'x'; 1 << 20];
    for _ in 0..20 {
        long.write_all(&junk).unwrap();
    }
    // One that asks and asks and never reads.
    let mut deaf = raw();
    deaf.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    deaf.write_all(b"{'execute':'qmp_capabilities'}").unwrap();
    let question = b"{'execute':'query-qmp-schema'}".repeat(1000);
    while deaf.write(&question).is_ok() {}
    // Fifty at once.
    let mut many: Vec<Qmp> = (0..50).map(|_| vm.qmp()).collect();
    for q in &mut many {
        q.send("{'execute':'query-status'}".repeat(20));
    }
    for q in &mut many {
        for _ in 0..20 {
            assert_eq!(q.reply()["return"]["running"], true);
        }
    }
    good.ok("stop", json!({}));
    for q in &mut many {
        q.event("STOP");
    }
    good.ok("cont", json!({}));
    assert_eq!(status(&mut good), "running");
    drop((deep, long, deaf, many));
    // Whoever comes late is served all the same.
    assert_eq!(status(&mut vm.qmp()), "running");
    good.ok("quit", json!({}));
    assert_eq!(vm.ended(), Some(0));
}

#[test]
fn what_was_asked_before_hanging_up_is_done() {
    let Some(vm) = Vm::start("hangup", Flat::default().spin(), &[]) else { return };
    drop(vm.qmp());
    let mut s = UnixStream::connect(&vm.socket).unwrap();
    s.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").unwrap();
    s.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = String::new();
    s.read_to_string(&mut all).unwrap();
    // Whether the event that follows still reaches someone who has hung up is open.
    assert_eq!(all.matches("\"return\"").count(), 2, "{all}");
    assert_eq!(vm.ended(), Some(0));
}

#[test]
fn a_client_of_others_understands_it() {
    use qapi::qmp;
    let Some(vm) = Vm::start("qapi", Flat::default().spin(), &[]) else { return };
    drop(vm.qmp());
    let stream = UnixStream::connect(&vm.socket).unwrap();
    let mut client = qapi::Qmp::from_stream(&stream);
    let info = client.handshake().unwrap();
    assert!(info.version.qemu.major >= 4);
    assert!(client.execute(&qmp::query_status {}).unwrap().running);
    client.execute(&qmp::stop {}).unwrap();
    client.nop().unwrap();
    let events: Vec<_> = client.events().collect();
    assert!(matches!(events[..], [qmp::Event::STOP { .. }]), "{events:?}");
    let target = client.execute(&qmp::query_target {}).unwrap();
    assert_eq!(format!("{:?}", target.arch), "x86_64");
    let names = client.execute(&qmp::query_commands {}).unwrap();
    assert!(names.iter().any(|c| c.name == "system_reset"));
    client.execute(&qmp::quit {}).unwrap();
    assert_eq!(vm.ended(), Some(0));
}

#[test]
fn tcp_and_standard_input() {
    let Some(accel) = any_accelerator() else { return };
    let dir = Dir::new("stdio");
    let image = dir.file("guest", &Flat::default().spin().0);
    let mut c = run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]);
    c.args(["-m", "16M", "--serial", "null", "--qmp", "stdio"]);
    c.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    c.stderr(std::process::Stdio::piped());
    let mut child = c.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"{'execute':'qmp_capabilities'}\n{'execute':'quit'}\n").unwrap();
    let out = wait(child, Duration::from_secs(60));
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(0), "{text}");
    assert!(text.contains("host-qmp-quit"), "{text}");
    drop(input);
}

#[test]
fn a_dump_is_a_core_file() {
    let Some(vm) = Vm::start("dump", Flat::default().spin(), &[]) else { return };
    let mut q = vm.qmp();
    let none = q.ok("query-dump", json!({}));
    assert_eq!(none, json!({ "status": "none", "completed": 0, "total": 0 }));
    let file = vm._dir.path("core");
    let to = |p: &str| json!({ "paging": false, "protocol": p });
    let protocol = format!("file:{}", file.display());
    q.ok("dump-guest-memory", to(&protocol));
    assert_eq!(q.event_names(), ["STOP", "DUMP_COMPLETED", "RESUME"]);
    let mut detached = to(&protocol);
    detached["detach"] = json!(true);
    q.ok("dump-guest-memory", detached);
    let end = q.event("DUMP_COMPLETED");
    // All but the hole below 1 MiB.
    let memory = (16 << 20) - (128 << 10);
    let result = json!({ "status": "completed", "completed": memory, "total": memory });
    assert_eq!(end["data"], json!({ "result": result }));
    assert_eq!(q.ok("query-dump", json!({})), result);
    let core = std::fs::read(&file).unwrap();
    assert!(core.starts_with(b"\x7fELF") && core.len() > memory);
    // The guest's program, at 7c00h of the first region.
    let n = |at: usize| u64::from_le_bytes(core[at..at + 8].try_into().unwrap()) as usize;
    let (offset, at) = (n(64 + 56 + 8), n(64 + 56 + 24));
    assert_eq!(at, 0);
    assert_eq!(core[offset + 0x7c00..][..2], Flat::default().spin().0[..2]);
    for (protocol, why) in [
        ("tcp:x", "must start with"),
        ("fd:nobody", "detach=true"),
        ("file:/nonexistent/core", "/nonexistent/core"),
    ] {
        assert!(q.err("dump-guest-memory", to(protocol)).1.contains(why), "{protocol}");
    }
    let mut paged = to(&protocol);
    paged["paging"] = json!(true);
    assert!(q.err("dump-guest-memory", paged).1.contains("paging"));
    assert_eq!(status(&mut q), "running");
}

#[test]
fn a_fifo_does_not_stop_the_machine() {
    let Some(vm) = Vm::start("fifo", Flat::default().spin(), &[]) else { return };
    let mut q = vm.qmp();
    let fifo = vm._dir.path("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for reader in [false, true] {
        // Somebody who has opened it and never reads.
        let _end = reader.then(|| {
            let mut o = std::fs::OpenOptions::new();
            o.read(true).write(true).open(&fifo).unwrap()
        });
        let file = json!({ "driver": "file", "node-name": "n", "filename": fifo });
        let qcow2 = json!({ "driver": "qcow2", "node-name": "q", "file": file });
        for (command, arguments) in [
            ("blockdev-add", file),
            ("blockdev-add", qcow2),
            (
                "dump-guest-memory",
                json!({ "paging": false, "protocol": format!("file:{}", fifo.display()) }),
            ),
            ("pmemsave", json!({ "val": 0, "size": 1 << 20, "filename": fifo })),
        ] {
            let (_, why) = q.err(command, arguments);
            assert!(why.contains("fifo"), "{command}: {why}");
        }
    }
    assert_eq!(status(&mut q), "running");
}

#[test]
fn descriptors_are_added_and_removed() {
    use std::os::fd::AsRawFd;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let Some(vm) = Vm::start("fdsets", Flat::default().spin(), &[]) else { return };
    let s = UnixStream::connect(&vm.socket);
    let s = s.unwrap_or_else(|_| {
        drop(vm.qmp());
        UnixStream::connect(&vm.socket).unwrap()
    });
    let mut lines = std::io::BufReader::new(s.try_clone().unwrap());
    let mut line = || -> Value {
        let mut text = String::new();
        std::io::BufRead::read_line(&mut lines, &mut text).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    line();
    (&s).write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
    line();
    let path = vm._dir.path("memory");
    let file = std::fs::File::create(&path).unwrap();
    let mut ask = |text: String, fd: Option<i32>| {
        match fd {
            Some(fd) => drop(s.send_with_fd(text.as_bytes(), fd).unwrap()),
            None => (&s).write_all(text.as_bytes()).unwrap(),
        }
        line()
    };
    let add = r#"{"execute":"add-fd","arguments":{"opaque":"words"}}"#;
    assert_eq!(
        ask(add.into(), None)["error"]["desc"],
        "No file descriptor supplied via SCM_RIGHTS"
    );
    let added = ask(add.into(), Some(file.as_raw_fd()))["return"].clone();
    let set = added["fdset-id"].as_u64().unwrap();
    let list = ask(r#"{"execute":"query-fdsets"}"#.into(), None);
    let want = json!([{ "fdset-id": set, "fds": [{ "fd": added["fd"], "opaque": "words" }] }]);
    assert_eq!(list["return"], want);
    let save = format!(
        r#"{{"execute":"pmemsave","arguments":{{"val":0,"size":4096,"filename":"/dev/fdset/{set}"}}}}"#
    );
    assert!(ask(save.clone(), None).get("return").is_some());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
    let remove = format!(r#"{{"execute":"remove-fd","arguments":{{"fdset-id":{set}}}}}"#);
    assert!(ask(remove.clone(), None).get("return").is_some());
    assert!(ask(remove, None).get("error").is_some());
    assert!(ask(save, None).get("error").is_some());
}

#[test]
fn a_serial_port_leads_to_an_inherited_descriptor() {
    let Some(accel) = any_accelerator() else { return };
    let Some(kernel) = vm::guest_file("vmlinuz-6.1") else {
        return vm::skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    let dir = Dir::new("add-fd");
    let log = dir.file("log", b"before ");
    // As libvirt does it: the file is open already, and output is added to it.
    let script = format!(
        "exec 5>>{log}; exec {} qemu -M q35 -accel tcg -m 128 -nodefaults -display none \
         -no-reboot -kernel {} -append 'console=ttyS0 quiet panic=-1' \
         -add-fd set=2,fd=5,opaque=serial \
         -chardev file,id=c,path=/dev/fdset/2,append=on -serial chardev:c",
        env!("CARGO_BIN_EXE_tandem"),
        kernel.display()
    );
    let shell = |script: &str| {
        let mut c = std::process::Command::new("sh");
        c.args(["-c", script]).stdin(std::process::Stdio::null());
        vm::finish(&mut c, Duration::from_secs(600))
    };
    if accel == "tcg" || vm::unusable("tcg").is_none() {
        let out = shell(&script);
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(said.starts_with("before ") && said.contains("Kernel panic"), "{said:?} {out:?}");
    }
    let out = shell(&script.replace("set=2,fd=5", "set=3,fd=5"));
    assert!(vm::text(&out.stderr).contains("no such set of descriptors"), "{out:?}");
}
