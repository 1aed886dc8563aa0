//! Devices that come and go while a Linux guest runs: its pciehp driver works the slots of root ports.

mod vm;

use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use vm::shell::Guest;

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(300);

/// What a healthy guest never says.
const COMPLAINTS: [&str; 6] =
    ["WARNING", "Call Trace", "BUG:", "I/O error", "no space for", "failed to assign"];

/// A guest with two free root ports, and one that takes nothing while it runs.
fn start(name: &str) -> Option<Guest> {
    Guest::start(name, &["id=p1,slot=1", "id=p2,slot=2", "id=fixed,hotplug=off"], LIMIT)
}

impl Guest {
    /// Waits in the guest until `test` (of the shell) holds.
    fn until(&mut self, test: &str) {
        let said = self.say(&format!("until [ {test} ]; do sleep 0.1; done; echo so''far"));
        assert!(said.contains("sofar"), "{said}");
    }

    /// Plugs a disk of `image` into the port `bus`.
    fn plug_disk(&mut self, image: &str, format: &str, bus: &str) {
        let file = json!({ "driver": "file", "node-name": "store", "filename": image });
        self.qmp.ok("blockdev-add", file);
        let node = json!({ "driver": format, "node-name": "disk", "file": "store" });
        self.qmp.ok("blockdev-add", node);
        let device = json!({
            "driver": "virtio-blk-pci", "id": "d1", "bus": bus, "drive": "disk", "serial": "S1",
        });
        self.qmp.ok("device_add", device);
        self.until("-b /dev/vda");
    }

    /// Waits for the event that tells of the end of `id`.
    fn deleted(&mut self, id: &str) {
        let inner = self.qmp.event("DEVICE_DELETED");
        assert_eq!(inner["data"]["path"], format!("/machine/peripheral/{id}/virtio-backend"));
        let event = self.qmp.event("DEVICE_DELETED");
        let path = format!("/machine/peripheral/{id}");
        assert_eq!(event["data"], json!({ "device": id, "path": path }));
    }

    fn unplug_disk(&mut self) {
        self.qmp.ok("device_del", json!({ "id": "d1" }));
        let (_, why) = self.qmp.err("device_del", json!({ "id": "d1" }));
        assert!(why.contains("in the process") || why.contains("busy"), "{why}");
        self.deleted("d1");
        self.until("! -e /sys/block/vda");
        for node in ["disk", "store"] {
            self.qmp.ok("blockdev-del", json!({ "node-name": node }));
        }
    }

    fn power_off(mut self) {
        let log = self.say("dmesg");
        for complaint in COMPLAINTS {
            assert!(!log.contains(complaint), "{complaint}: {log}");
        }
        self.terminal.send(b"poweroff -f\n");
        assert_eq!(self.terminal.wait(LIMIT).code(), Some(0), "{}", self.terminal.seen);
    }
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let all = list.as_array().unwrap().iter();
    all.map(|v| v[key].as_str().unwrap_or_default().to_string()).collect()
}

#[test]
fn disks_come_and_go_while_they_are_in_use() {
    let Some(mut g) = start("hotplug-disk") else { return };
    let image = g.dir.file("disk.raw", &vec![0; 16 << 20]);
    g.plug_disk(&image, "raw", "p1");
    let blocks = g.qmp.ok("query-block", json!({}));
    assert_eq!(names(&blocks, "qdev"), ["/machine/peripheral/d1/virtio-backend"]);
    let nodes = g.qmp.ok("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(names(&nodes, "node-name"), ["disk", "store"]);
    assert_eq!(names(&nodes, "drv"), ["raw", "file"]);
    let (_, why) = g.qmp.err("blockdev-del", json!({ "node-name": "disk" }));
    assert!(why.contains("in use"), "{why}");
    let said = g.say("cat /sys/block/vda/size; cat /sys/block/vda/serial; lspci");
    assert!(said.contains("32768") && said.contains("S1"), "{said}");
    // The bytes are on the host's side before the disk has left.
    g.say("seq 1 100000 >/dev/vda; sync; echo 3 >/proc/sys/vm/drop_caches");
    let said = g.say(
        "{ seq 1 100000 | md5sum; dd if=/dev/vda bs=588895 count=1 2>/dev/null | md5sum; } | \
         uniq | wc -l",
    );
    assert!(said.contains("\n1\r"), "{said}");
    g.unplug_disk();
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes.starts_with(b"1\n2\n3\n") && bytes[588_889..].starts_with(b"00000\n"));
    // Again on the same port, now with requests under way when it goes.
    g.plug_disk(&image, "raw", "p1");
    let readers =
        "while dd if=/dev/vda of=/dev/null bs=64k; do echo 3 >/proc/sys/vm/drop_caches; done";
    g.say(&format!("({readers}) >/dev/null 2>&1 & true"));
    g.say("(while printf x >&3; do sync; done) 3<>/dev/vda >/dev/null 2>&1 & true");
    g.say("sleep 1");
    g.unplug_disk();
    assert!(names(&g.qmp.ok("query-named-block-nodes", json!({})), "drv").is_empty());
    // Writers that are left on their own may complain of that disk, nobody else.
    g.say("dmesg -c >/dev/null");
    g.plug_disk(&image, "raw", "p2");
    // A reset takes what was asked for and finds what is there.
    g.power_off();
}

#[test]
fn networks_come_and_go() {
    let Some(mut g) = start("hotplug-net") else { return };
    let net = json!({ "type": "user", "id": "n1", "hostfwd": [{ "str": "tcp:127.0.0.1:0-:22" }] });
    g.qmp.ok("netdev_add", net.clone());
    assert!(g.qmp.err("netdev_add", net).1.contains("Duplicate"));
    // The port is chosen.
    let card = json!({ "driver": "virtio-net-pci", "id": "c1", "netdev": "n1",
                       "mac": "52:54:00:00:00:77" });
    g.qmp.ok("device_add", card.clone());
    assert!(g.qmp.err("device_add", card).1.contains("Duplicate device ID 'c1'"));
    g.until("-e /sys/class/net/eth0");
    let said = g.say("cat /sys/class/net/eth0/address; udhcpc -i eth0 -q -n; ping -c 1 10.0.2.2");
    assert!(said.contains("52:54:00:00:00:77"), "{said}");
    assert!(said.contains("lease of 10.0.2.15") && said.contains("1 packets received"), "{said}");
    assert!(g.qmp.err("netdev_del", json!({ "id": "n1" })).1.contains("has a card"));
    let (_, why) = g.qmp.err("device_add", json!({ "driver": "virtio-rng-pci", "bus": "p1" }));
    assert!(why.contains("has a device already"), "{why}");
    g.say("ping 10.0.2.2 >/dev/null 2>&1 & true");
    g.qmp.ok("device_del", json!({ "id": "/machine/peripheral/c1" }));
    g.deleted("c1");
    g.until("! -e /sys/class/net/eth0");
    g.qmp.ok("netdev_del", json!({ "id": "n1" }));
    // A device that stays in spite of everything: the guest turns its power off and on.
    g.qmp.ok("device_add", json!({ "driver": "virtio-rng-pci", "id": "r1", "bus": "p2" }));
    g.until("-e /sys/bus/pci/slots/2/power");
    g.until("$(cat /sys/bus/pci/slots/2/power) = 1");
    g.say("echo 0 >/sys/bus/pci/slots/2/power; echo 1 >/sys/bus/pci/slots/2/power");
    g.until("$(cat /sys/bus/pci/slots/2/power) = 1");
    let tree = g.qmp.ok("qom-list", json!({ "path": "/machine/peripheral" }));
    assert_eq!(names(&tree, "name"), ["type", "p1", "p2", "fixed", "r1"]);
    g.power_off();
}

#[test]
fn what_cannot_be_plugged_is_told() {
    let Some(mut g) = start("hotplug-errors") else { return };
    let qmp = &mut g.qmp;
    let mut fails = |command: &str, arguments: Value, class: &str, words: &str| {
        let (c, text) = qmp.err(command, arguments.clone());
        assert!(c == class && text.contains(words), "{command} {arguments}: {c}: {text}");
    };
    let generic = "GenericError";
    let device = |driver: &str, bus: &str| json!({ "driver": driver, "id": "x", "bus": bus });
    fails("device_add", device("virtio-rmg-pci", "p1"), generic, "did you mean 'virtio-rng");
    fails(
        "device_add",
        device("virtio-rng-pci", "pcie.0"),
        generic,
        "does not support hotplugging",
    );
    fails("device_add", device("virtio-rng-pci", "fixed"), generic, "does not support hotplugging");
    fails("device_add", device("virtio-rng-pci", "p9"), generic, "Bus 'p9' not found");
    fails("device_add", device("isa-debugcon", "p1"), generic, "does not support hotplugging");
    fails("device_add", device("pcie-root-port", "p1"), generic, "root bus");
    fails("device_add", device("virtio-blk-pci", "p1"), generic, "it has no drive");
    let mut odd = device("virtio-rng-pci", "p1");
    odd["no such"] = json!(1);
    fails("device_add", odd.clone(), generic, "no property 'no such'");
    odd["no such"] = json!([1]);
    fails("device_add", odd, generic, "Invalid parameter type for 'no such'");
    let mut odd = device("virtio-rng-pci", "p1");
    odd["addr"] = json!("3");
    fails("device_add", odd, generic, "behind a PCI Express port");
    fails("device_del", json!({ "id": "x" }), "DeviceNotFound", "'x' not found");
    fails("device_del", json!({ "id": "p1" }), generic, "does not support hotplugging");
    let file =
        |name: &str, path: &str| json!({ "driver": "file", "node-name": name, "filename": path });
    fails("blockdev-add", file("", "/x"), generic, "node-name");
    fails("blockdev-add", file("a b", "/x"), generic, "Invalid node-name");
    fails("blockdev-add", file("n", "/nonexistent/x"), generic, "/nonexistent/x");
    let on = |file: Value| json!({ "driver": "qcow2", "node-name": "f", "file": file });
    fails("blockdev-add", on(json!("nobody")), generic, "nor node-name='nobody'");
    fails("blockdev-add", on(json!(7)), generic, "no 'file'");
    fails("blockdev-del", json!({ "node-name": "n" }), generic, "Failed to find node");
    fails("netdev_del", json!({ "id": "n" }), "DeviceNotFound", "not found");
    let user = |net: &str| json!({ "type": "user", "id": "n", "net": net });
    fails("netdev_add", user("nonsense"), generic, "nonsense");
    let tap = json!({ "type": "tap", "id": "n", "fd": "nobody" });
    fails("netdev_add", tap, generic, "'nobody' has not been found");
    // The monitor for people.
    let mut hmp = |line: &str| {
        let v = g.qmp.ok("human-monitor-command", json!({ "command-line": line }));
        v.as_str().unwrap().to_string()
    };
    assert!(hmp("device_add virtio-rng-pci,bus=p9").contains("Bus 'p9' not found"));
    assert_eq!(hmp("device_add virtio-rng-pci,id=r1,bus=p1"), "");
    assert!(hmp("info qtree").contains("r1"));
    assert!(hmp("device_del r2").contains("not found"));
    // What failed leaves nothing behind.
    let raw = g.dir.file("raw", &vec![0; 1 << 20]);
    let inner = json!({ "driver": "file", "filename": raw });
    let (_, why) = g.qmp.err("blockdev-add", on(inner.clone()));
    assert!(why.contains("qcow2"), "{why}");
    assert_eq!(g.qmp.ok("query-named-block-nodes", json!({})), json!([]));
    g.qmp.ok("blockdev-add", json!({ "driver": "raw", "node-name": "f", "file": inner }));
    g.qmp.ok("blockdev-del", json!({ "node-name": "f" }));
    assert_eq!(g.qmp.ok("query-named-block-nodes", json!({})), json!([]));
    assert!(Path::new(&raw).exists());
    g.power_off();
}
