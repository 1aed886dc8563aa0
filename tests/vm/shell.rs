//! A shell in a translated Linux guest with free PCIe root ports, managed over QMP.

use super::pty::Terminal;
use super::qmp::Qmp;
use super::{Dir, guest_file, run, skip, unusable};
use std::time::Duration;

/// The guest. Tests add what they do with it.
pub struct Guest {
    /// Where its shell is.
    pub terminal: Terminal,
    /// Its monitor.
    pub qmp: Qmp,
    /// Files of the test.
    pub dir: Dir,
    limit: Duration,
}

impl Guest {
    /// A guest with these root ports, at its prompt; `None` (and a word why) where it cannot be had.
    /// What it is waited for may take until `limit`.
    pub fn start(name: &str, ports: &[&str], limit: Duration) -> Option<Guest> {
        if let Some(why) = unusable("tcg") {
            skip(&format!("accelerator tcg: {why}"));
            return None;
        }
        let (Some(kernel), Some(initrd)) = (guest_file("vmlinuz-6.1"), guest_file("initramfs-6.1"))
        else {
            skip("guest vmlinuz-6.1 is missing; run scripts/setup");
            return None;
        };
        let dir = Dir::new(name);
        let socket = dir.path("qmp");
        let mut terminal = Terminal::prepare();
        let mut c = run(&["--accel", "tcg", "-m", "256M"]);
        c.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        c.args(["--append", "console=ttyS0 quiet"]);
        c.args(["--qmp", &format!("unix:{}", socket.display())]);
        for port in ports {
            c.args(["--device", &format!("pcie-root-port,{port}")]);
        }
        terminal.spawn(&mut c);
        terminal.expect("/ # ", limit);
        Some(Guest { terminal, qmp: Qmp::negotiated(&socket), dir, limit })
    }

    /// Runs a command line in the guest; returns what it printed.
    pub fn say(&mut self, command: &str) -> String {
        let t = &mut self.terminal;
        t.seen.clear();
        // Not the word that the shell echoes.
        t.send(format!("{command}; echo fini''shed\n").as_bytes());
        t.expect("finished", self.limit);
        t.seen.clone()
    }
}
