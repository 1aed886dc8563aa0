//! Jobs on disks, snapshots and exports: as programs see them, and under a Linux guest that writes.

mod vm;

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;
use vm::flat::Flat;
use vm::qmp::Qmp;
use vm::shell::Guest;
use vm::{Dir, any_accelerator, run, skip, tandem, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(600);
const MIB: u64 = 1 << 20;

fn img(dir: &Dir, words: &str) -> String {
    let mut c = tandem();
    let out = c.arg("img").args(words.split(' ')).current_dir(dir.path("")).output().unwrap();
    assert!(out.status.success(), "{words}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// What an image shows, also one that somebody writes to.
fn shown(dir: &Dir, name: &str, format: &str) -> Vec<u8> {
    let flat = dir.path("flat");
    img(dir, &format!("convert -U -f {format} -O raw {name} flat"));
    let data = std::fs::read(&flat).unwrap();
    std::fs::remove_file(flat).unwrap();
    data
}

fn node(q: &mut Qmp, name: &str, file: &Path, format: &str, more: Value) {
    let mut o = json!({
        "driver": format, "node-name": name, "discard": "unmap",
        "file": { "driver": "file", "filename": file },
    });
    o.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    q.ok("blockdev-add", o);
}

/// Waits for the end of a job; returns the words of all events about it.
fn until(q: &mut Qmp, event: &str, status: &str) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let e = q.events.pop_front().or_else(|| q.line()).expect("the session lives");
        let name = e["event"].as_str().unwrap().to_string();
        let word = e["data"]["status"].as_str().unwrap_or_default().to_string();
        let over = name == event && (status.is_empty() || word == status);
        seen.push(if word.is_empty() { name } else { word });
        if over {
            return seen;
        }
    }
}

/// A machine whose guest does nothing.
struct Idle {
    child: Child,
    qmp: Qmp,
    dir: Dir,
}

impl Idle {
    fn start(name: &str) -> Option<Idle> {
        let accel = any_accelerator()?;
        let dir = Dir::new(name);
        let image = dir.file("guest", &Flat::default().spin().0);
        let socket = dir.path("qmp");
        let place = format!("unix:{}", socket.display());
        let mut c = run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]);
        c.args(["-m", "16M", "--serial", "null", "--qmp", &place]);
        let child = c.spawn().unwrap();
        Some(Idle { child, qmp: Qmp::negotiated(&socket), dir })
    }

    /// Two images of 4 MiB, the first with data and one behind it, as nodes `a` and `t`.
    fn disks(&mut self) {
        let data: Vec<u8> = (0..4 * MIB).map(|i| (i / 4096 * 7 + i % 251) as u8).collect();
        self.dir.file("raw", &data);
        img(&self.dir, "convert -f raw -O qcow2 raw base");
        img(&self.dir, "create -q -f qcow2 -b base -F qcow2 a");
        img(&self.dir, "create -q -f qcow2 t 4M");
        for name in ["base", "a", "t"] {
            let more = if name == "a" { json!({ "backing": "base" }) } else { json!({}) };
            let mut more = more;
            more["read-only"] = (name == "base").into();
            node(&mut self.qmp, name, &self.dir.path(name), "qcow2", more);
        }
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const BACKUP: [&str; 7] =
    ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"];

#[test]
fn jobs_pass_through_qemus_states() {
    let Some(mut m) = Idle::start("job-states") else { return };
    m.disks();
    let q = &mut m.qmp;
    let backup = json!({ "job-id": "j", "device": "a", "target": "t", "sync": "full" });
    q.ok("blockdev-backup", backup.clone());
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), BACKUP);
    // Slowly, and with every step asked for.
    let mut slow = backup.clone();
    for (key, value) in
        [("auto-finalize", json!(false)), ("auto-dismiss", json!(false)), ("speed", json!(65536))]
    {
        slow[key] = value;
    }
    q.ok("blockdev-backup", slow);
    let (_, why) = q.err("blockdev-backup", backup);
    assert_eq!(why, "Job ID 'j' already in use");
    let (_, why) = q.err("blockdev-del", json!({ "node-name": "t" }));
    assert!(why.starts_with("Node t is in use"), "{why}");
    q.ok("job-pause", json!({ "id": "j" }));
    let (_, why) = q.err("job-pause", json!({ "id": "j" }));
    assert_eq!(why, "Job is already paused");
    let (_, why) = q.err("block-job-cancel", json!({ "device": "j" }));
    assert_eq!(why, "The block job for device 'j' is currently paused");
    q.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "paused"), ["created", "running", "paused"]);
    let job = q.ok("query-block-jobs", json!({}))[0].clone();
    assert_eq!(
        (&job["status"], &job["paused"], &job["type"]),
        (&json!("paused"), &json!(true), &json!("backup"))
    );
    q.ok("job-resume", json!({ "id": "j" }));
    let (_, why) = q.err("job-resume", json!({ "id": "j" }));
    assert_eq!(why, "Can't resume a job that was not paused");
    let seen = until(q, "BLOCK_JOB_PENDING", "");
    assert_eq!(seen, ["running", "waiting", "pending", "BLOCK_JOB_PENDING"]);
    let (_, why) = q.err("job-complete", json!({ "id": "j" }));
    assert_eq!(why, "Job 'j' in state 'pending' cannot accept command verb 'complete'");
    q.ok("job-finalize", json!({ "id": "j" }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", ""), ["BLOCK_JOB_COMPLETED", "concluded"]);
    let job = q.ok("query-jobs", json!({}))[0].clone();
    let want = json!({ "id": "j", "type": "backup", "status": "concluded",
        "current-progress": 4 * MIB, "total-progress": 4 * MIB });
    assert_eq!(job, want);
    q.ok("job-dismiss", json!({ "id": "j" }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", ""), ["null"]);
    // A mirror, left, cancelled and completed.
    let mirror = json!({ "job-id": "m", "device": "a", "target": "t", "sync": "full" });
    let ready = ["created", "running", "ready", "BLOCK_JOB_READY"];
    q.ok("blockdev-mirror", mirror.clone());
    assert_eq!(until(q, "BLOCK_JOB_READY", ""), ready);
    q.ok("block-job-cancel", json!({ "device": "m" }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), BACKUP[2..]);
    q.ok("blockdev-mirror", mirror.clone());
    assert_eq!(until(q, "BLOCK_JOB_READY", ""), ready);
    q.ok("job-cancel", json!({ "id": "m" }));
    let cancelled = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"];
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), cancelled);
    q.ok("blockdev-mirror", mirror);
    assert_eq!(until(q, "BLOCK_JOB_READY", ""), ready);
    q.ok("block-job-complete", json!({ "device": "m" }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), BACKUP[2..]);
    for (command, arguments, class, text) in [
        ("job-dismiss", json!({ "id": "no" }), "GenericError", "Job not found"),
        (
            "block-job-cancel",
            json!({ "device": "no" }),
            "DeviceNotActive",
            "Block job 'no' not found",
        ),
        (
            "blockdev-backup",
            json!({ "device": "t", "target": "a", "sync": "full" }),
            "GenericError",
            "Invalid job ID ''",
        ),
        (
            "blockdev-backup",
            json!({ "job-id": "j", "device": "t", "target": "t", "sync": "full" }),
            "GenericError",
            "Source and target cannot be the same",
        ),
        (
            "block-commit",
            json!({ "job-id": "j", "device": "t", "base-node": "base" }),
            "GenericError",
            "'base' is not in this backing file chain",
        ),
        (
            "transaction",
            json!({ "actions": [
                { "type": "blockdev-backup", "data":
                    { "job-id": "b", "device": "t", "target": "a", "sync": "full" } },
                { "type": "abort", "data": {} },
            ] }),
            "GenericError",
            "Transaction aborted using Abort action",
        ),
    ] {
        assert_eq!(q.err(command, arguments), (class.to_string(), text.to_string()), "{command}");
    }
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), ["created", "aborting", "concluded", "null"]);
    assert!(shown(&m.dir, "t", "qcow2") == std::fs::read(m.dir.path("raw")).unwrap());
}

#[test]
fn images_are_made_exported_and_reopened() {
    let Some(mut m) = Idle::start("exports") else { return };
    m.disks();
    let (q, dir) = (&mut m.qmp, &m.dir);
    let path = dir.path("new");
    let file = json!({ "driver": "file", "filename": path, "size": 0 });
    q.ok("blockdev-create", json!({ "job-id": "c", "options": file }));
    assert_eq!(
        until(q, "JOB_STATUS_CHANGE", "concluded"),
        ["created", "running", "waiting", "pending", "concluded"]
    );
    q.ok("job-dismiss", json!({ "id": "c" }));
    q.ok("blockdev-add", json!({ "driver": "file", "node-name": "nf", "filename": path }));
    let qcow2 = json!({ "driver": "qcow2", "file": "nf", "size": 4 * MIB, "cluster-size": 4096,
        "backing-file": "base", "backing-fmt": "qcow2" });
    q.ok("blockdev-create", json!({ "job-id": "c", "options": qcow2 }));
    until(q, "JOB_STATUS_CHANGE", "concluded");
    assert!(q.ok("query-jobs", json!({}))[0].get("error").is_none());
    q.ok("job-dismiss", json!({ "id": "c" }));
    q.ok(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "n", "file": "nf", "backing": null }),
    );
    // In front of another, and streamed into.
    q.ok("blockdev-snapshot", json!({ "node": "a", "overlay": "n" }));
    let (_, why) = q.err("blockdev-snapshot", json!({ "node": "t", "overlay": "n" }));
    assert!(why == "The overlay already has a backing image", "{why}");
    q.events.clear();
    q.ok("block-stream", json!({ "job-id": "s", "device": "n" }));
    assert_eq!(until(q, "JOB_STATUS_CHANGE", "null"), BACKUP);
    assert!(img(dir, "info -U --output=json new").contains("\"virtual-size\": 4194304"));
    assert!(!img(dir, "info -U --output=json new").contains("backing-filename"));
    q.ok("blockdev-del", json!({ "node-name": "a" }));
    // Exports.
    let place = json!({ "type": "unix", "data": { "path": dir.path("nbd") } });
    let (_, why) = q.err("nbd-server-add", json!({ "device": "n" }));
    assert_eq!(why, "NBD server not running");
    q.ok("nbd-server-start", json!({ "addr": place }));
    let (_, why) = q.err("nbd-server-start", json!({ "addr": place }));
    assert_eq!(why, "NBD server already running");
    q.ok("nbd-server-add", json!({ "device": "n", "name": "e", "writable": true }));
    let export = json!({ "type": "nbd", "id": "x", "node-name": "t", "name": "tee" });
    q.ok("block-export-add", export.clone());
    assert_eq!(q.err("block-export-add", export).1, "Block export id 'x' is already in use");
    let all = q.ok("query-block-exports", json!({}));
    let want = json!({ "id": "x", "node-name": "t", "type": "nbd", "shutting-down": false });
    assert_eq!(all[1], want);
    if Command::new("qemu-io").arg("--version").output().is_ok() {
        let url = format!("nbd+unix:///e?socket={}", dir.path("nbd").display());
        let out = Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write -P 9 64k 64k", "-c", "flush", &url])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
        let now = shown(dir, "new", "qcow2");
        assert!(now[65536..131_072].iter().all(|b| *b == 9) && now[0] == 0 && now[1] == 1);
    } else {
        skip("qemu-io is not installed");
    }
    q.ok("block-export-del", json!({ "id": "x" }));
    q.event("BLOCK_EXPORT_DELETED");
    q.ok("nbd-server-remove", json!({ "name": "e" }));
    assert_eq!(q.err("nbd-server-remove", json!({ "name": "e" })).1, "Export 'e' is not found");
    q.ok("nbd-server-stop", json!({}));
    assert_eq!(q.err("nbd-server-stop", json!({})).1, "NBD server not running");
    // Reopened for reading, a node cannot be a job's target.
    let mut t = json!({ "driver": "qcow2", "node-name": "t", "read-only": true, "discard": "unmap",
        "file": { "driver": "file", "filename": dir.path("t") } });
    q.ok("blockdev-reopen", json!({ "options": [t] }));
    let backup = json!({ "job-id": "j", "device": "n", "target": "t", "sync": "full" });
    assert_eq!(q.err("blockdev-backup", backup.clone()).1, "Block node 't' is read-only");
    t["read-only"] = false.into();
    q.ok("blockdev-reopen", json!({ "options": [t] }));
    q.ok("blockdev-backup", backup);
    until(q, "JOB_STATUS_CHANGE", "null");
    assert!(shown(dir, "t", "qcow2") == shown(dir, "new", "qcow2"));
}

#[test]
fn a_drive_keeps_its_name_whatever_is_in_it() {
    let Some(accel) = any_accelerator() else { return };
    let dir = Dir::new("job-drive");
    let image = dir.file("guest", &Flat::default().spin().0);
    let data: Vec<u8> = (0..4 * MIB).map(|i| (i / 512 % 253) as u8).collect();
    dir.file("raw", &data);
    img(&dir, "convert -f raw -O qcow2 raw disk");
    img(&dir, "create -q -f qcow2 target 4M");
    let (socket, disk) = (dir.path("qmp"), dir.path("disk"));
    let place = format!("unix:{}", socket.display());
    let mut c = run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]);
    c.args(["-m", "16M", "--serial", "null", "--qmp", &place]);
    c.args(["--drive", &format!("file={},format=qcow2,if=none,id=d0", disk.display())]);
    c.args(["--device", "virtio-blk-pci,drive=d0,id=vd"]);
    let mut m = Idle { child: c.spawn().unwrap(), qmp: Qmp::negotiated(&socket), dir };
    let q = &mut m.qmp;
    let inside = |q: &mut Qmp| {
        let disk = q.ok("query-block", json!({}))[0].clone();
        assert_eq!(disk["device"], "d0");
        let nodes = q.ok("query-named-block-nodes", json!({}));
        let depth = disk["inserted"]["backing_file_depth"].as_i64().unwrap();
        let name = disk["inserted"]["node-name"].as_str().unwrap().to_string();
        (name, depth, nodes.as_array().unwrap().len())
    };
    let (one, two) = (m.dir.path("one"), m.dir.path("two"));
    q.ok("blockdev-snapshot-sync", json!({ "device": "d0", "snapshot-file": one }));
    let named = json!({ "device": "d0", "snapshot-file": two, "snapshot-node-name": "two" });
    q.ok("blockdev-snapshot-sync", named);
    assert_eq!(inside(q), ("two".into(), 2, 1));
    // Without names, by files; a job without a name has the drive's.
    q.ok("block-commit", json!({ "device": "d0", "top": one }));
    until(q, "JOB_STATUS_CHANGE", "null");
    assert_eq!(inside(q).1, 1);
    q.ok("block-commit", json!({ "device": "d0" }));
    until(q, "BLOCK_JOB_READY", "");
    q.ok("job-complete", json!({ "id": "d0" }));
    until(q, "JOB_STATUS_CHANGE", "null");
    let (name, depth, nodes) = inside(q);
    assert!(name.starts_with('#') && depth == 0 && nodes == 3, "{name} {depth} {nodes}");
    // The image that a client has named is there, with its file, until it is removed; nobody uses the others.
    img(&m.dir, "check -q one");
    q.ok("blockdev-del", json!({ "node-name": "two" }));
    img(&m.dir, "check -q two");
    node(q, "target", &m.dir.path("target"), "qcow2", json!({}));
    q.ok("blockdev-mirror", json!({ "device": "d0", "target": "target", "sync": "full" }));
    until(q, "BLOCK_JOB_READY", "");
    q.ok("block-job-complete", json!({ "device": "d0" }));
    until(q, "JOB_STATUS_CHANGE", "null");
    assert_eq!(inside(q), ("target".into(), 0, 1));
    img(&m.dir, "check -q disk");
    assert!(shown(&m.dir, "disk", "qcow2") == data && shown(&m.dir, "target", "qcow2") == data);
}

/// A Linux guest with the disk `vda`, a node called `disk` with another behind it.
fn start(name: &str) -> Option<Guest> {
    let mut g = Guest::start(name, &["id=p1,slot=1"], LIMIT)?;
    img(&g.dir, "create -q -f qcow2 base 16M");
    img(&g.dir, "create -q -f qcow2 -b base -F qcow2 disk");
    node(&mut g.qmp, "base", &g.dir.path("base"), "qcow2", json!({ "read-only": true }));
    node(&mut g.qmp, "disk", &g.dir.path("disk"), "qcow2", json!({ "backing": "base" }));
    let device = json!({ "driver": "virtio-blk-pci", "id": "d1", "bus": "p1", "drive": "disk" });
    g.qmp.ok("device_add", device);
    g.say("until [ -b /dev/vda ]; do sleep 0.1; done");
    Some(g)
}

impl Guest {
    /// Begins to write everywhere, and waits until it does.
    fn write(&mut self) {
        self.say(
            "touch /go; rm -f /n; (n=0; while [ -e /go ]; do n=$((n + 1)); \
             dd if=/dev/urandom of=/dev/vda bs=16k count=$((1 + n % 5)) conv=notrunc,fsync \
             seek=$((n * 37 % 1000)) 2>/dev/null || echo bad >>/bad; echo $n >/n; done; echo o >/off) & \
             until [ \"$(cat /n 2>/dev/null || echo 0)\" -gt 3 ]; do sleep 0.1; done",
        );
    }

    /// Waits until it has written some more.
    fn write_on(&mut self) {
        self.say("m=$(($(cat /n) + 5)); until [ $(cat /n) -gt $m ]; do sleep 0.1; done");
    }

    /// Stops writing; returns what the disk then shows to the guest, as a sum.
    fn quiet(&mut self) -> String {
        let said = self.say(
            "rm -f /off; rm /go; until [ -e /off ]; do sleep 0.1; done; sync; \
             echo 3 >/proc/sys/vm/drop_caches; [ -e /bad ] && echo trou''ble; sha256sum /dev/vda",
        );
        assert!(!said.contains("trouble"), "{said}");
        let word = said.split_whitespace().find(|w| w.len() == 64);
        word.unwrap_or_else(|| panic!("{said}")).to_string()
    }

    fn same(&mut self, name: &str, format: &str, sum: &str) {
        let data = shown(&self.dir, name, format);
        let file = self.dir.file("sum", &data);
        let out = Command::new("sha256sum").arg(file).output().unwrap();
        assert!(text(&out.stdout).starts_with(sum), "{name} is not what the guest sees");
    }

    fn inserted(&mut self) -> String {
        let all = self.qmp.ok("query-block", json!({}));
        let disk = all
            .as_array()
            .unwrap()
            .iter()
            .find(|d| d["qdev"].as_str().is_some_and(|q| q.contains("d1")));
        disk.unwrap_or_else(|| panic!("{all}"))["inserted"]["node-name"].as_str().unwrap().into()
    }
}

#[test]
fn a_guest_writes_on_through_jobs() {
    let Some(mut g) = start("jobs-guest") else { return };
    g.write();
    // A backup is the disk at its beginning, whatever is written meanwhile.
    let sum = g.quiet();
    img(&g.dir, "create -q -f raw backup 16M");
    let backup = g.dir.path("backup");
    node(&mut g.qmp, "backup", &backup, "raw", json!({}));
    let speed = 8 * MIB;
    let start = json!({ "job-id": "b", "device": "disk", "target": "backup", "sync": "full", "speed": speed });
    g.qmp.ok("blockdev-backup", start);
    g.write();
    until(&mut g.qmp, "JOB_STATUS_CHANGE", "null");
    g.qmp.ok("blockdev-del", json!({ "node-name": "backup" }));
    g.same("backup", "raw", &sum);
    // A snapshot, and its commit into the two images behind it while the guest writes.
    let overlay = g.dir.path("over");
    let snapshot =
        json!({ "node-name": "disk", "snapshot-file": overlay, "snapshot-node-name": "over" });
    g.qmp.ok("blockdev-snapshot-sync", snapshot);
    assert_eq!(g.inserted(), "over");
    g.write_on();
    g.qmp.ok(
        "block-commit",
        json!({ "job-id": "c", "device": "over", "top-node": "disk", "base-node": "base" }),
    );
    until(&mut g.qmp, "JOB_STATUS_CHANGE", "null");
    g.qmp.ok("blockdev-del", json!({ "node-name": "disk" }));
    g.write_on();
    g.qmp.ok("block-commit", json!({ "job-id": "c", "device": "over", "base-node": "base" }));
    until(&mut g.qmp, "BLOCK_JOB_READY", "");
    g.write_on();
    g.qmp.ok("block-job-complete", json!({ "device": "c" }));
    until(&mut g.qmp, "JOB_STATUS_CHANGE", "null");
    assert_eq!(g.inserted(), "base");
    g.qmp.ok("blockdev-del", json!({ "node-name": "over" }));
    g.write_on();
    let sum = g.quiet();
    g.same("base", "qcow2", &sum);
    // A mirror to another format and place.
    for (target, format, mode) in
        [("copy", "raw", "background"), ("again", "qcow2", "write-blocking")]
    {
        let from = g.inserted();
        img(&g.dir, &format!("create -q -f {format} {target} 16M"));
        let path = g.dir.path(target);
        node(&mut g.qmp, target, &path, format, json!({}));
        g.write();
        let start = json!({ "job-id": "m", "device": from, "target": target, "sync": "full", "copy-mode": mode });
        g.qmp.ok("blockdev-mirror", start);
        until(&mut g.qmp, "BLOCK_JOB_READY", "");
        g.write_on();
        g.qmp.ok("block-job-complete", json!({ "device": "m" }));
        until(&mut g.qmp, "JOB_STATUS_CHANGE", "null");
        assert_eq!(g.inserted(), target);
        g.qmp.ok("blockdev-del", json!({ "node-name": from }));
        g.write_on();
        let sum = g.quiet();
        g.same(target, format, &sum);
    }
    // A new image in front, which takes over all that is behind it.
    let last = g.dir.path("last");
    let snapshot =
        json!({ "node-name": "again", "snapshot-file": last, "snapshot-node-name": "last" });
    g.qmp.ok("blockdev-snapshot-sync", snapshot);
    g.write();
    g.qmp.ok("block-stream", json!({ "job-id": "s", "device": "last" }));
    until(&mut g.qmp, "JOB_STATUS_CHANGE", "null");
    g.qmp.ok("blockdev-del", json!({ "node-name": "again" }));
    let sum = g.quiet();
    assert!(!img(&g.dir, "info -U --output=json last").contains("backing-filename"));
    g.same("last", "qcow2", &sum);
    g.terminal.send(b"poweroff -f\n");
    assert_eq!(g.terminal.wait(LIMIT).code(), Some(0), "{}", g.terminal.seen);
    for name in ["base", "again", "last"] {
        img(&g.dir, &format!("check -q {name}"));
    }
}
