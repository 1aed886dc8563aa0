//! Discs changed while a guest runs: what QMP says of trays, and what Linux's driver sees.

mod vm;

use serde_json::{Value, json};
use std::time::Duration;
use vm::pty::Terminal;
use vm::qmp::Qmp;
use vm::{Dir, guest_file, run, skip};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);

/// A disc of 2 MiB, all of `byte`, with `word` in front.
fn disc(dir: &Dir, name: &str, word: &str, byte: u8, len: usize) -> String {
    let mut bytes = word.as_bytes().to_vec();
    bytes.resize(len, byte);
    dir.file(name, &bytes)
}

/// The tray with this id or drive, as query-block has it.
fn tray(q: &mut Qmp, name: &str) -> Value {
    let all = q.ok("query-block", json!({}));
    let path = format!("/machine/peripheral/{name}");
    let found = all.as_array().unwrap().iter().find(|b| b["device"] == name || b["qdev"] == path);
    found.unwrap_or_else(|| panic!("no {name} in {all}")).clone()
}

fn moved(q: &mut Qmp, open: bool) -> Value {
    let event = q.event("DEVICE_TRAY_MOVED");
    assert_eq!(event["data"]["tray-open"], open, "{event}");
    event["data"].clone()
}

#[test]
fn trays_open_and_close_for_clients() {
    let Some(accel) = vm::any_accelerator() else { return };
    let dir = Dir::new("trays");
    let [one, two] = ["one", "two"].map(|n| disc(&dir, n, n, 1, 2 << 20));
    let disk = disc(&dir, "disk", "", 0, 1 << 20);
    let socket = dir.path("qmp");
    let words = ["--accel", accel, "-S", "-m", "64M", "--serial", "null", "--firmware", "bios"];
    let mut machine = run(&words)
        .args(["--qmp", &format!("unix:{}", socket.display())])
        .args(["--drive", &format!("file={one},media=cdrom,id=cd")])
        .args(["--drive", "if=none,media=cdrom,id=empty", "--device", "ide-cd,id=dev,drive=empty"])
        .args(["--device", "ide-cd,id=bare"])
        .args(["--drive", &format!("file={disk},format=raw,id=hd")])
        .spawn()
        .unwrap();
    let q = &mut Qmp::negotiated(&socket);
    let t = tray(q, "cd");
    assert_eq!((&t["tray_open"], &t["removable"]), (&json!(false), &json!(true)));
    assert_eq!(t["inserted"]["file"], one.as_str());
    assert!(tray(q, "dev").get("inserted").is_none());

    // The steps that libvirt takes.
    let err = q.err("blockdev-remove-medium", json!({ "id": "dev" })).1;
    assert!(err.contains("is not open"), "{err}");
    q.ok("blockdev-open-tray", json!({ "id": "dev" }));
    assert_eq!(moved(q, true)["id"], "dev");
    q.ok("blockdev-open-tray", json!({ "id": "dev" }));
    q.ok("blockdev-remove-medium", json!({ "id": "dev" }));
    let node = json!({ "driver": "file", "node-name": "f", "filename": two, "read-only": true });
    q.ok("blockdev-add", node);
    q.ok("blockdev-insert-medium", json!({ "id": "dev", "node-name": "f" }));
    let again = json!({ "id": "dev", "node-name": "f" });
    assert!(q.err("blockdev-insert-medium", again).1.contains("already is a medium"));
    assert!(q.err("blockdev-del", json!({ "node-name": "f" })).1.contains("in use"));
    q.ok("blockdev-close-tray", json!({ "id": "dev" }));
    assert_eq!(moved(q, false), json!({ "device": "empty", "id": "dev", "tray-open": false }));
    assert_eq!(tray(q, "dev")["inserted"]["file"], two.as_str());
    q.ok("eject", json!({ "id": "dev" }));
    moved(q, true);
    assert!(tray(q, "dev").get("inserted").is_none());
    q.ok("blockdev-del", json!({ "node-name": "f" }));

    // A change in one step, of a drive by its name; an image that is not there changes nothing.
    let missing = json!({ "device": "cd", "filename": "/nonexistent.iso" });
    assert!(q.err("blockdev-change-medium", missing).1.contains("/nonexistent.iso"));
    assert_eq!(tray(q, "cd")["inserted"]["file"], one.as_str());
    q.ok("blockdev-change-medium", json!({ "device": "cd", "filename": two, "format": "raw" }));
    moved(q, true);
    moved(q, false);
    assert_eq!(tray(q, "cd")["inserted"]["file"], two.as_str());
    q.ok("eject", json!({ "device": "cd" }));
    let said = |q: &mut Qmp, line: &str| {
        q.ok("human-monitor-command", json!({ "command-line": line })).to_string()
    };
    assert_eq!(said(q, &format!("change cd {one} raw")), "\"\"");
    assert_eq!(tray(q, "cd")["inserted"]["file"], one.as_str());
    assert_eq!(said(q, "eject -f cd"), "\"\"");
    assert!(said(q, "info block").contains("the tray is open"));
    // One without any drive.
    q.ok("blockdev-change-medium", json!({ "id": "bare", "filename": one }));
    assert_eq!(tray(q, "bare")["inserted"]["file"], one.as_str());

    let (class, _) = q.err("eject", json!({ "device": "nobody" }));
    assert_eq!(class, "DeviceNotFound");
    assert!(q.err("eject", json!({ "device": "hd" })).1.contains("not removable"));
    assert!(q.err("eject", json!({})).1.contains("exactly one"));
    q.ok("quit", json!({}));
    assert_eq!(machine.wait().unwrap().code(), Some(0));
}

/// Gives a command at the prompt of the initial RAM disk's shell.
fn ask(t: &mut Terminal, command: &str, answer: &str) {
    t.seen.clear();
    t.send(format!("{command}\n").as_bytes());
    t.expect(answer, LIMIT);
    t.expect("# ", LIMIT);
}

#[test]
fn linux_sees_the_new_disc() {
    let [kernel, initrd] = ["vmlinuz-6.12", "storage-6.12"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest storage-6.12 is missing; run scripts/setup");
    };
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let dir = Dir::new("new-disc");
    let one = disc(&dir, "one", "first disc\n", 1, 2 << 20);
    let two = disc(&dir, "two", "second disc\n", 2, 4 << 20);
    let socket = dir.path("qmp");
    let mut t = Terminal::prepare();
    let mut machine = run(&["--accel", "tcg", "-m", "256M", "--append", "console=ttyS0 quiet"]);
    machine.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    machine.args(["--drive", &format!("file={one},media=cdrom,id=cd,if=none")]);
    machine.args(["--device", "ide-cd,id=dev,drive=cd"]);
    machine.args(["--qmp", &format!("unix:{}", socket.display())]);
    t.spawn(&mut machine);
    let q = &mut Qmp::negotiated(&socket);
    t.expect("# ", LIMIT);
    ask(&mut t, "head -n1 /dev/sr0; cat /sys/block/sr0/size", "first disc");
    ask(&mut t, "echo size-$(cat /sys/block/sr0/size)", "size-4096");

    // Nobody has it open: it goes at once, and the driver sees the next one.
    q.ok("blockdev-change-medium", json!({ "id": "dev", "filename": two }));
    moved(q, true);
    moved(q, false);
    ask(&mut t, "head -n1 /dev/sr0", "second disc");
    ask(&mut t, "echo size-$(cat /sys/block/sr0/size)", "size-8192");
    ask(&mut t, "tail -c 1 /dev/sr0 | od -An -tx1", "02");

    // Open in the guest, it is locked.
    ask(&mut t, "exec 5</dev/sr0; echo opened-$((1))", "opened-1");
    assert_eq!(tray(q, "dev")["locked"], true);
    let err = q.err("eject", json!({ "id": "dev" })).1;
    assert!(err.contains("locked"), "{err}");
    q.ok("blockdev-open-tray", json!({ "id": "dev" }));
    assert_eq!(tray(q, "dev")["tray_open"], false);
    // Closed there, the guest may open the tray itself, and close it when somebody wants to read.
    let option = |name: &str, on: u8| {
        format!("echo {on} >/proc/sys/dev/cdrom/{name}; echo {name}-$(({on}))")
    };
    ask(&mut t, &option("autoclose", 0), "autoclose-0");
    ask(&mut t, &option("autoeject", 1), "autoeject-1");
    ask(&mut t, "exec 5<&-; echo closed-$((1))", "closed-1");
    assert_eq!(moved(q, true)["id"], "dev");
    ask(&mut t, "head -n1 /dev/sr0; echo done-$?", "No medium found");
    ask(&mut t, &option("autoeject", 0), "autoeject-0");
    ask(&mut t, &option("autoclose", 1), "autoclose-1");
    // The open that closes the tray may be too early for the driver to know the size.
    let reads = |word: &str| format!("until head -n1 /dev/sr0 | grep '{word}'; do sleep 1; done");
    ask(&mut t, &reads("second disc"), "second disc");
    moved(q, false);
    // By force, and empty.
    ask(&mut t, "exec 5</dev/sr0; echo opened-$((1))", "opened-1");
    q.ok("eject", json!({ "id": "dev", "force": true }));
    moved(q, true);
    assert!(tray(q, "dev").get("inserted").is_none());
    ask(&mut t, "exec 5<&-; head -n1 /dev/sr0; echo done-$?", "No medium found");
    q.ok("blockdev-change-medium", json!({ "id": "dev", "filename": one }));
    ask(&mut t, &reads("first disc"), "first disc");
    t.send(b"poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
}
