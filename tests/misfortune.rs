//! Guests that panic or do not feed their watchdog, and what comes of it: Linux's drivers of pvpanic
//! (port and PCI) and i6300esb.

mod vm;

use serde_json::json;
use std::time::Duration;
use vm::pty::Terminal;
use vm::qmp::Qmp;
use vm::{Dir, guest_file, run, skip};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);

struct Guest {
    t: Terminal,
    q: Qmp,
    _dir: Dir,
}

/// Debian's kernel for PCs at its shell, on a machine with these words.
fn guest(name: &str, words: &[&str]) -> Option<Guest> {
    let [kernel, initrd] = ["vmlinuz-pc", "initramfs-pc"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        skip("guest vmlinuz-pc is missing; run scripts/setup");
        return None;
    };
    if let Some(why) = vm::unusable("tcg") {
        skip(&format!("accelerator tcg: {why}"));
        return None;
    }
    let dir = Dir::new(name);
    let socket = dir.path("qmp");
    let mut machine = run(&["--accel", "tcg", "-m", "256M", "--append"]);
    machine.arg("console=ttyS0 quiet panic=0");
    machine.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).args(words);
    machine.args(["--qmp", &format!("unix:{}", socket.display())]);
    let mut t = Terminal::prepare();
    t.spawn(&mut machine);
    let q = Qmp::negotiated(&socket);
    t.expect("# ", LIMIT);
    Some(Guest { t, q, _dir: dir })
}

impl Guest {
    fn ask(&mut self, command: &str, answer: &str) {
        self.t.seen.clear();
        self.t.send(format!("{command}\n").as_bytes());
        self.t.expect(answer, LIMIT);
        self.t.expect("# ", LIMIT);
    }
    /// The next event called `name`, which a slow guest may be long about.
    fn event(&mut self, name: &str) -> serde_json::Value {
        loop {
            // The socket gives up after a minute; a question keeps it alive.
            if let Some(i) = self.q.events.iter().position(|e| e["event"] == name) {
                return self.q.events.remove(i).unwrap();
            }
            std::thread::sleep(Duration::from_millis(200));
            self.q.ok("query-status", json!({}));
        }
    }
}

#[test]
fn a_panic_stops_the_machine_and_is_told() {
    for device in ["pvpanic", "pvpanic-pci"] {
        let words = ["--device", device, "--action", "panic=pause"];
        let Some(mut g) = guest(&format!("panic-{device}"), &words) else { return };
        // The events that this driver knows.
        g.ask("cat /sys/bus/*/drivers/pvpanic*/*/capability", "\n3");
        g.t.send(b"echo c >/proc/sysrq-trigger\n");
        assert_eq!(g.event("GUEST_PANICKED")["data"]["action"], "pause");
        let status = g.q.ok("query-status", json!({}));
        assert_eq!(status, json!({ "running": false, "status": "guest-panicked" }), "{device}");
        g.q.ok("quit", json!({}));
        assert_eq!(g.t.wait(LIMIT).code(), Some(0));
    }
}

#[test]
fn a_panic_ends_the_machine_with_a_status() {
    let words = ["--device", "pvpanic-pci", "--action", "panic=none"];
    let Some(mut g) = guest("panic-status", &words) else { return };
    g.q.ok("set-action", json!({ "panic": "exit-failure" }));
    g.t.send(b"echo c >/proc/sysrq-trigger\n");
    assert_eq!(g.t.wait(LIMIT).code(), Some(4), "{}", g.t.seen);
}

#[test]
fn a_hungry_watchdog_does_what_it_is_told() {
    let words = ["--device", "i6300esb", "--action", "watchdog=none"];
    let Some(mut g) = guest("watchdog", &words) else { return };
    g.ask("cat /sys/class/watchdog/watchdog0/identity", "i6300ESB timer");
    // Fed, it is quiet; what feeds it ends without the word that closes it.
    g.ask("watchdog -T 2 -t 1 /dev/watchdog0; sleep 5; echo fed-$((1))", "fed-1");
    g.q.ok("query-status", json!({}));
    assert!(!g.q.event_names().contains(&"WATCHDOG".to_string()));
    g.ask("killall -9 watchdog; echo hungry-$((1))", "hungry-1");
    assert_eq!(g.event("WATCHDOG")["data"]["action"], "none");
    g.q.ok("watchdog-set-action", json!({ "action": "pause" }));
    g.ask(
        "watchdog -T 2 -t 1 /dev/watchdog0; sleep 3; killall -9 watchdog; echo again-$((1))",
        "again-1",
    );
    assert_eq!(g.event("WATCHDOG")["data"]["action"], "pause");
    assert_eq!(g.q.ok("query-status", json!({}))["status"], "watchdog");
    g.q.ok("watchdog-set-action", json!({ "action": "reset" }));
    g.q.ok("cont", json!({}));
    g.ask(
        "watchdog -T 2 -t 1 /dev/watchdog0; sleep 3; killall -9 watchdog; echo last-$((1))",
        "last-1",
    );
    assert_eq!(g.event("WATCHDOG")["data"]["action"], "reset");
    assert_eq!(g.event("RESET")["data"]["reason"], "guest-reset");
    g.t.seen.clear();
    g.t.expect("tandem-init: uptime", LIMIT);
    g.t.expect("# ", LIMIT);
    // The card remembers who has reset the machine.
    g.ask("cat /sys/class/watchdog/watchdog0/bootstatus", "\n32");
    g.q.ok("quit", json!({}));
}
