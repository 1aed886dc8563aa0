//! Managing machines: every command by its own schema, the monitor for people, tandem ctl, and QEMU's
//! command line.

mod vm;

use serde_json::{Map, Value, json};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use vm::flat::Flat;
use vm::qmp::{Qmp, error};
use vm::{Dir, any_accelerator, finish, tandem, text, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// A machine made by QEMU's command line.
struct Vm {
    child: Option<Child>,
    socket: PathBuf,
    _dir: Dir,
}

impl Vm {
    fn start(name: &str, words: &[&str]) -> Option<Vm> {
        let accel = any_accelerator()?;
        let dir = Dir::new(name);
        let socket = dir.path("qmp");
        let place = format!("unix:{},server=on,wait=off", socket.display());
        let mut c = tandem();
        c.args(["qemu", "-accel", accel, "-nodefaults", "-display", "none", "-qmp", &place]);
        c.args(words).stdin(Stdio::null()).stderr(Stdio::piped());
        Some(Vm { child: Some(c.spawn().unwrap()), socket, _dir: dir })
    }

    fn qmp(&self) -> Qmp {
        Qmp::negotiated(&self.socket)
    }

    fn ended(mut self) -> Option<i32> {
        wait(self.child.take().unwrap(), LIMIT).status.code()
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

/// A value of a type that the schema describes.
fn sample(types: &Map<String, Value>, ty: &str, depth: usize) -> Value {
    let t = &types[ty];
    match t["meta-type"].as_str().unwrap() {
        "builtin" => match t["json-type"].as_str().unwrap() {
            "string" => json!("x"),
            "int" => json!(0),
            "boolean" => json!(false),
            _ => json!({}),
        },
        "enum" => t["values"][0].clone(),
        "array" => json!([]),
        "object" if depth < 8 => {
            let members = t["members"].as_array().unwrap();
            let needed = members.iter().filter(|m| m.get("default").is_none());
            let mut made = needed
                .map(|m| {
                    let ty = m["type"].as_str().unwrap();
                    (m["name"].as_str().unwrap().to_string(), sample(types, ty, depth + 1))
                })
                .collect::<Map<_, _>>();
            // What the member that tells variants apart calls for.
            if let Some(tag) = t["tag"].as_str() {
                let case = t["variants"].as_array().unwrap();
                let case = case.iter().find(|v| v["case"] == made[tag]).unwrap();
                let more = sample(types, case["type"].as_str().unwrap(), depth + 1);
                made.extend(more.as_object().unwrap().clone());
            }
            made.into()
        }
        other => panic!("{other}"),
    }
}

/// A value that cannot be of the type; `None` if anything can.
fn wrong(types: &Map<String, Value>, ty: &str) -> Option<Value> {
    let t = &types[ty];
    match (t["meta-type"].as_str().unwrap(), t.get("json-type").and_then(Value::as_str)) {
        (_, Some("value")) => None,
        (_, Some("string")) | ("enum", _) => Some(json!(7)),
        _ => Some(json!("seven")),
    }
}

#[test]
fn every_command_keeps_to_its_schema() {
    let Some(vm) = Vm::start("conformance", &["-machine", "none"]) else { return };
    let mut q = vm.qmp();
    let schema = q.ok("query-qmp-schema", json!({}));
    let schema = schema.as_array().unwrap();
    let types: Map<String, Value> = schema
        .iter()
        .filter(|e| !["command", "event"].contains(&e["meta-type"].as_str().unwrap()))
        .map(|e| (e["name"].as_str().unwrap().to_string(), e.clone()))
        .collect();
    let commands: Vec<&Value> = schema.iter().filter(|e| e["meta-type"] == "command").collect();
    let listed = q.ok("query-commands", json!({}));
    assert_eq!(listed.as_array().unwrap().len(), commands.len());
    for c in commands {
        let name = c["name"].as_str().unwrap();
        let arg = c["arg-type"].as_str().unwrap();
        let good = sample(&types, arg, 0);
        let mut check = |arguments: Value, word: &str| {
            let (class, text) = q.err(name, arguments);
            let class = if name == "qmp_capabilities" { "CommandNotFound" } else { class.as_str() };
            assert!(text.contains(word) || class == "CommandNotFound", "{name}: {text}");
        };
        let mut more = good.clone();
        more["no such member"] = json!(1);
        // Members of a device that its type does not know are told by the type.
        let unknown = if name == "device_add" { "there is no device 'x'" } else { "unexpected" };
        check(more, unknown);
        for m in types[arg]["members"].as_array().unwrap() {
            let (member, ty) = (m["name"].as_str().unwrap(), m["type"].as_str().unwrap());
            if let Some(v) = wrong(&types, ty) {
                let mut bad = good.clone();
                bad[member] = v;
                check(bad, &format!("Invalid parameter type for '{member}"));
            }
            if m.get("default").is_none() {
                let mut less = good.clone();
                less.as_object_mut().unwrap().remove(member);
                check(less, &format!("'{member}' is missing"));
            }
        }
        q.send(json!({ "execute": name, "arguments": [] }).to_string());
        assert!(error(&q.reply()).1.contains("must be an object"));
    }
    q.ok("quit", json!({}));
    assert_eq!(vm.ended(), Some(0));
}

/// A Linux kernel is what QEMU's command line can boot; a machine that is not started reads it only.
#[test]
fn queries_tell_what_was_asked_for() {
    let Some(kernel) = vm::guest_file("vmlinuz-6.1") else {
        return vm::skip("there is no kernel; scripts/fetch-guests gets one");
    };
    let dir = Dir::new("queries-images");
    let disk = dir.file("disk", &vec![0; 1 << 20]);
    let blockdev = json!({
        "node-name": "fmt", "driver": "raw",
        "file": { "driver": "file", "filename": disk, "node-name": "storage" },
    });
    let (kernel, blockdev) = (kernel.display().to_string(), blockdev.to_string());
    let words = [
        "-machine",
        "q35,usb=off",
        "-m",
        "size=128M",
        "-smp",
        "2,sockets=1,cores=2",
        "-name",
        "guest=queried,debug-threads=on",
        "-uuid",
        "12345678-1234-1234-1234-123456789abc",
        "-kernel",
        &kernel,
        "-S",
        "-no-shutdown",
        "-rtc",
        "base=utc",
        "-boot",
        "strict=on",
        "-chardev",
        "pty,id=charserial0",
        "-device",
        "isa-serial,chardev=charserial0,id=serial0",
        "-device",
        r#"{"driver":"pcie-root-port","id":"pci.1","bus":"pcie.0","addr":"0x1"}"#,
        "-blockdev",
        &blockdev,
        "-device",
        "virtio-blk-pci,bus=pci.1,addr=0x0,drive=fmt,id=virtio-disk0,bootindex=1",
        "-object",
        "rng-random,id=rng0,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=rng0,id=rng1",
        "-netdev",
        r#"{"type":"user","id":"hostnet0"}"#,
        "-device",
        r#"{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0"}"#,
    ];
    let Some(vm) = Vm::start("queries", &words) else { return };
    let mut q = vm.qmp();
    assert_eq!(q.ok("query-status", json!({}))["status"], "prelaunch");
    assert_eq!(q.ok("query-name", json!({}))["name"], "queried");
    assert_eq!(q.ok("query-uuid", json!({}))["UUID"], "12345678-1234-1234-1234-123456789abc");
    let cpus = q.ok("query-cpus-fast", json!({}));
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    let pid = vm.child.as_ref().unwrap().id();
    for c in cpus.as_array().unwrap() {
        let task = format!("/proc/{pid}/task/{}", c["thread-id"]);
        assert!(std::path::Path::new(&task).exists(), "{task}");
        q.ok("qom-list", json!({ "path": c["qom-path"] }));
    }
    let all = q.ok("query-chardev", json!({}));
    let serial = all.as_array().unwrap().iter().find(|c| c["label"] == "charserial0").unwrap();
    assert!(serial["filename"].as_str().unwrap().starts_with("pty:/dev/pts/"));
    let block = q.ok("query-block", json!({}));
    assert_eq!(block[0]["qdev"], "/machine/peripheral/virtio-disk0/virtio-backend");
    assert_eq!(block[0]["inserted"]["image"]["virtual-size"], 1 << 20);
    let nodes = q.ok("query-named-block-nodes", json!({ "flat": true }));
    let names: Vec<_> = nodes.as_array().unwrap().iter().map(|n| n["node-name"].clone()).collect();
    assert_eq!(names, ["fmt", "storage"]);
    assert_eq!(q.ok("query-blockstats", json!({}))[0]["stats"]["rd_bytes"], 0);
    let limit = json!({
        "id": "/machine/peripheral/virtio-disk0/virtio-backend", "bps": 1_000_000, "bps_rd": 0,
        "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
    });
    q.ok("block_set_io_throttle", limit);
    assert_eq!(q.ok("query-block", json!({}))[0]["inserted"]["bps"], 1_000_000);
    q.ok("block_resize", json!({ "node-name": "fmt", "size": 2 << 20 }));
    let size = &q.ok("query-block", json!({}))[0]["inserted"]["image"]["virtual-size"];
    assert_eq!(*size, 2 << 20);
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 2 << 20);
    assert!(q.err("block_resize", json!({ "device": "nope", "size": 0 })).0 == "DeviceNotFound");
    let tree = q.ok("qom-list", json!({ "path": "/machine/peripheral" }));
    let names: Vec<_> = tree.as_array().unwrap().iter().map(|n| n["name"].clone()).collect();
    for id in ["pci.1", "virtio-disk0", "rng1", "net0"] {
        assert!(names.contains(&json!(id)), "{names:?}");
    }
    let get = json!({ "path": "/machine/peripheral/rng1", "property": "rng" });
    assert_eq!(q.ok("qom-get", get), "rng0");
    assert!(q.err("object-del", json!({ "id": "rng0" })).1.contains("in use"));
    q.ok("object-add", json!({ "qom-type": "rng-builtin", "id": "more" }));
    q.ok("object-del", json!({ "id": "more" }));
    assert_eq!(q.ok("query-memory-size-summary", json!({}))["base-memory"], 128 << 20);
    q.ok("quit", json!({}));
    assert_eq!(vm.ended(), Some(0));
}

#[test]
fn memory_and_monitor_for_people() {
    let Some(accel) = any_accelerator() else { return };
    let dir = Dir::new("people");
    let image = dir.file("guest", &Flat::default().spin().0);
    let (qmp, hmp) = (dir.path("qmp"), dir.path("hmp"));
    let (at_qmp, at_hmp) = (format!("unix:{}", qmp.display()), format!("unix:{}", hmp.display()));
    let mut c = vm::run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]);
    c.args(["-m", "16M", "--serial", "null", "--qmp", &at_qmp, "--monitor", &at_hmp]);
    let child = c.stderr(Stdio::piped()).spawn().unwrap();
    let mut q = Qmp::negotiated(&qmp);
    let mut hmp_line = |line: &str| {
        let v = q.ok("human-monitor-command", json!({ "command-line": line }));
        v.as_str().unwrap().to_string()
    };
    // jmp $ at 7c00h.
    assert!(hmp_line("xp /2xb 0x7c00").contains("0000000000007c00: 0xeb 0xfe"));
    assert!(hmp_line("x /1xh 0x7c00").contains("0xfeeb"));
    assert!(hmp_line("info registers").contains("RIP=0000000000007c00"));
    assert!(hmp_line("info mtree").contains("COM1"));
    assert!(hmp_line("info pci").contains("00:1f.0"));
    for subject in ["status", "cpus", "qtree", "block", "network", "chardev", "version", "kvm"] {
        assert!(!hmp_line(&format!("info {subject}")).starts_with("Error"), "{subject}");
    }
    assert!(hmp_line("stopp").contains("did you mean 'stop'?"));
    assert!(hmp_line("xp /9z 0").contains("no format"));
    assert!(hmp_line("xp 0xffffffffffff0000").contains("no memory"));
    let saved = dir.path("saved");
    let mut save = |command: &str| {
        let a = json!({ "val": 0x7c00, "size": 2, "filename": saved });
        q.ok(command, a);
        assert_eq!(std::fs::read(&saved).unwrap(), [0xeb, 0xfe], "{command}");
    };
    save("memsave");
    save("pmemsave");
    let (_, why) = q.err("pmemsave", json!({ "val": 1u64 << 40, "size": 1, "filename": saved }));
    assert!(why.contains("no memory"), "{why}");

    // The same by its own socket.
    use std::io::{BufRead, BufReader, Write};
    let mut s = std::os::unix::net::UnixStream::connect(&hmp).unwrap();
    let mut lines = BufReader::new(s.try_clone().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("monitor"));
    s.write_all(b"stop\ninfo status\n").unwrap();
    let said = lines.find(|l| l.as_ref().unwrap().contains("VM status")).unwrap().unwrap();
    assert!(said.contains("paused"), "{said}");
    q.event("STOP");
    s.write_all(b"quit\n").unwrap();
    assert_eq!(wait(child, LIMIT).status.code(), Some(0));
}

#[test]
fn a_machine_in_the_background_is_found_by_its_name() {
    let Some(accel) = any_accelerator() else { return };
    let dir = Dir::new("ctl");
    let image = dir.file("guest", &Flat::default().print("hello").spin().0);
    let runtime = dir.path("run");
    std::fs::create_dir(&runtime).unwrap();
    let with = |words: &[&str]| {
        let mut c = tandem();
        c.env("XDG_RUNTIME_DIR", &runtime).args(words).stdin(Stdio::null());
        finish(&mut c, LIMIT)
    };
    let started = with(&[
        "run",
        "--accel",
        accel,
        "--kernel",
        &image,
        "--kernel-format",
        "flat",
        "-m",
        "16M",
        "--name",
        "web",
        "--detach",
    ]);
    assert_eq!(started.status.code(), Some(0), "{}", text(&started.stderr));
    let ctl = |words: &[&str]| with(&[&["ctl"], words].concat());
    let out = |words: &[&str]| text(&ctl(words).stdout).trim().to_string();
    assert!(out(&["list"]).contains("web"), "{}", out(&["list"]));
    assert_eq!(out(&["--json", "list"]), r#"[{"name":"web","status":"running"}]"#);
    assert_eq!(out(&["web", "status"]), "running");
    assert_eq!(ctl(&["web", "stop"]).status.code(), Some(0));
    assert_eq!(out(&["web", "status"]), "paused");
    assert_eq!(out(&["web", "raw", r#"{"execute":"query-name"}"#]), r#"{"return":{"name":"web"}}"#);
    assert_eq!(ctl(&["web", "raw", r#"{"execute":"nope"}"#]).status.code(), Some(1));
    assert!(out(&["web", "info", "registers"]).contains("RIP="));
    assert_eq!(ctl(&["web", "wait", "--timeout", "0.1"]).status.code(), Some(4));
    assert_eq!(ctl(&["web", "wait", "--for", "nonsense"]).status.code(), Some(2));
    // It is there until its user leaves; what was written before is shown to whoever comes first.
    let mut console = tandem();
    console.env("XDG_RUNTIME_DIR", &runtime).args(["ctl", "web", "console"]);
    let mut console = console.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 5];
    console.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");
    console.kill().and_then(|()| console.wait()).unwrap();
    assert_eq!(ctl(&["nobody", "status"]).status.code(), Some(3));
    assert_eq!(ctl(&["web", "cont"]).status.code(), Some(0));
    let mut waiting = tandem();
    waiting.env("XDG_RUNTIME_DIR", &runtime).args(["ctl", "web", "wait", "--for", "event=STOP"]);
    let mut waiting = waiting.stdin(Stdio::null()).spawn().unwrap();
    // Nobody knows when it has begun to listen.
    while waiting.try_wait().unwrap().is_none() {
        assert_eq!(ctl(&["web", "stop"]).status.code(), Some(0));
        assert_eq!(ctl(&["web", "cont"]).status.code(), Some(0));
    }
    assert_eq!(wait(waiting, LIMIT).status.code(), Some(0));
    assert_eq!(ctl(&["web", "quit"]).status.code(), Some(0));
    let start = Instant::now();
    while !out(&["list"]).is_empty() {
        assert!(start.elapsed() < LIMIT, "it is still listed");
    }
}

#[test]
fn qemus_words_are_done_or_refused_all_at_once() {
    let run = |words: &[&str]| {
        let mut c = tandem();
        c.arg("qemu").args(words).stdin(Stdio::null());
        finish(&mut c, LIMIT)
    };
    let out = run(&[
        "-fda",
        "x",
        "-vnc",
        ":0",
        "-nosuch",
        "-usb",
        "-sd",
        "y",
        "-device",
        "e1000",
        "-smp",
        "2,maxcpus=4",
        "-chardev",
        "udp,id=c",
        "-kernel",
        "/nonexistent",
    ]);
    assert_eq!(out.status.code(), Some(2));
    let said = text(&out.stderr);
    for word in ["-fda", "-vnc", "-nosuch", "-usb", "-sd", "maxcpus=4", "-chardev udp"] {
        assert!(said.lines().any(|l| l.contains(word)), "{word}: {said}");
    }
    assert!(said.lines().all(|l| l.contains("; ")), "each says what to do: {said}");
    assert!(text(&run(&["-version"]).stdout).starts_with("QEMU emulator version "));
    assert!(text(&run(&["-machine", "help"]).stdout).contains("q35"));
    assert!(text(&run(&["-help"]).stdout).contains("-netdev"));
    // Called by another name, or with QEMU's options at once.
    let out = finish(tandem().args(["-machine", "help"]).stdin(Stdio::null()), LIMIT);
    assert!(text(&out.stdout).contains("q35"));
}

#[test]
fn what_libvirt_asks_first_goes_into_the_background() {
    let Some(accel) = any_accelerator() else { return };
    let dir = Dir::new("probe");
    let (socket, pid) = (dir.path("qmp.monitor"), dir.path("qmp.pid"));
    let place = format!("unix:{},server=on,wait=off", socket.display());
    let mut c = tandem();
    c.args(["-S", "-no-user-config", "-nodefaults", "-nographic", "-machine"]);
    c.arg(format!("none,accel={accel}")).args(["-qmp", &place]);
    c.arg("-pidfile").arg(&pid).arg("-daemonize").stdin(Stdio::null());
    let out = finish(&mut c, LIMIT);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    // When the parent ends, all is there.
    let number: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    assert!(number > 1);
    let mut q = Qmp::negotiated(&socket);
    assert_eq!(q.ok("query-target", json!({}))["arch"], "x86_64");
    let models = q.ok("query-cpu-definitions", json!({}));
    assert!(models.as_array().unwrap().iter().any(|m| m["name"] == "qemu64"));
    let expand =
        |props: Value| json!({ "type": "static", "model": { "name": "max", "props": props } });
    let model = q.ok("query-cpu-model-expansion", expand(json!({ "migratable": false })));
    assert_eq!(model["model"]["props"]["sse2"], true);
    assert!(q.err("query-cpu-model-expansion", expand(json!({ "warp": true }))).1.contains("warp"));
    for ty in ["memory-backend-file", "none-machine", "max-x86_64-cpu"] {
        q.ok("qom-list-properties", json!({ "typename": ty }));
    }
    let (class, _) = q.err("device-list-properties", json!({ "typename": "usb-host" }));
    assert_eq!(class, "DeviceNotFound");
    q.ok("quit", json!({}));
    while q.line().is_some() {}
    // Another that cannot be built says so, with a status.
    let out = finish(
        tandem()
            .args(["-daemonize", "-machine", "none", "-accel", accel, "-qmp"])
            .arg("unix:/nonexistent/x,server=on,wait=off")
            .stdin(Stdio::null()),
        LIMIT,
    );
    assert_ne!(out.status.code(), Some(0));
    assert!(text(&out.stderr).contains("/nonexistent/x"));
}
