//! Debian's kernels with a busybox initial RAM disk, booted by translation to a shell and to
//! power-off, and what they say on the way. The guests come from scripts/fetch-guests.

mod vm;

use std::time::Duration;
use vm::pty::Terminal;
use vm::{finish, guest_file, run, skip, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(300);

/// What a healthy boot never says.
const COMPLAINTS: [&str; 22] = [
    "WARNING",
    "BUG",
    "Oops",
    "Call Trace",
    "timer doesn't work",
    "unable to",
    "Unable to",
    "Marking clocksource",
    "TSC unstable",
    "unstable clock",
    "calibration failed",
    "Unable to calibrate",
    "not synchronized",
    "lockup",
    "stall",
    "blocked for more than",
    "firmware bug",
    "Firmware Bug",
    "ACPI Error",
    "ACPI BIOS Error",
    "not using MMCONFIG",
    "spurious",
];

struct Guest {
    kernel: String,
    initrd: String,
}

impl Guest {
    /// The fetched kernel `kernel` with the RAM disk of `version`.
    fn find(kernel: &str, version: &str) -> Option<Guest> {
        if let Some(why) = vm::unusable("tcg") {
            skip(&format!("accelerator tcg: {why}"));
            return None;
        }
        match (guest_file(kernel), guest_file(&format!("initramfs-{version}"))) {
            (Some(k), Some(i)) => {
                Some(Guest { kernel: k.display().to_string(), initrd: i.display().to_string() })
            }
            _ => {
                skip(&format!("guest {kernel} is missing; run scripts/setup"));
                None
            }
        }
    }

    fn words<'a>(&'a self, append: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut w = vec!["--accel", "tcg", "--kernel", &self.kernel, "--initrd", &self.initrd];
        w.extend(["--append", append, "--device", "virtio-rng-pci"]);
        w.extend(more);
        w
    }

    /// Boots, lets init show the machine, and checks what it shows.
    fn check(&self, more: &[&str]) -> String {
        let words = self.words("console=ttyS0 tandem.check", more);
        let out = finish(&mut run(&words), LIMIT);
        let said = text(&out.stdout).replace('\r', "");
        assert_eq!(out.status.code(), Some(0), "{more:?}:\n{said}\n{}", text(&out.stderr));
        assert!(said.contains("== end"), "{more:?}:\n{said}");
        for line in said.lines() {
            let found = COMPLAINTS.iter().find(|c| line.contains(**c));
            assert_eq!(found, None, "{more:?}: the guest complains: {line}\n{said}");
        }
        said
    }
}

/// The part of the output under `== name`.
fn section<'a>(said: &'a str, name: &str) -> &'a str {
    let start = said.find(&format!("== {name}\n")).unwrap_or_else(|| panic!("no {name} in {said}"));
    let rest = &said[start + name.len() + 4..];
    &rest[..rest.find("\n== ").unwrap_or(rest.len())]
}

#[test]
fn a_healthy_pc() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let said = guest.check(&["-m", "512M"]);
    let interrupts = section(&said, "interrupts");
    for word in ["IO-APIC", "ttyS0", "LOC:", "acpi", "rtc0"] {
        assert!(interrupts.contains(word), "no {word} in {interrupts}");
    }
    let lspci = section(&said, "lspci");
    for id in ["8086:29c0", "8086:2918", "1af4:1044"] {
        assert!(lspci.contains(id), "no {id} in {lspci}");
    }
    assert_eq!(section(&said, "hwrng").split_whitespace().count(), 16, "{said}");
    assert!(section(&said, "cpuinfo").contains("model name"), "{said}");
    let iomem = section(&said, "iomem");
    assert!(iomem.contains("IOAPIC 0") && iomem.contains("Local APIC"), "{iomem}");
}

#[test]
fn the_kernel_of_backports() {
    let Some(guest) = Guest::find("vmlinuz-6.12", "6.12") else { return };
    guest.check(&["-m", "512M"]);
}

#[test]
fn an_uncompressed_pvh_kernel() {
    let Some(guest) = Guest::find("vmlinux-6.1", "6.1") else { return };
    guest.check(&["-m", "512M"]);
}

#[test]
fn little_and_much_memory() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    for (size, least_kib) in [("256M", 190 << 10), ("4G", 3900 << 10)] {
        let said = guest.check(&["-m", size]);
        let total = section(&said, "meminfo").split_whitespace().nth(1).unwrap();
        let total: u64 = total.parse().unwrap();
        assert!(total > least_kib, "{size}: {total} KiB");
    }
}

#[test]
fn two_processors() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let said = guest.check(&["--smp", "2"]);
    let processors = section(&said, "cpuinfo").matches("processor\t").count();
    assert_eq!(processors, 2, "{said}");
}

#[test]
fn nodes() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let said = guest.check(&[
        "--smp",
        "4,sockets=2",
        "--numa",
        "node,cpus=0-1,mem=128M",
        "--numa",
        "node,cpus=2-3,mem=384M",
        "--numa",
        "dist,src=0,dst=1,val=31",
    ]);
    let nodes: Vec<&str> = section(&said, "nodes").lines().collect();
    assert_eq!(nodes.len(), 2, "{said}");
    let kib = |line: &str| line.split_whitespace().rev().nth(1).unwrap().parse::<u64>().unwrap();
    assert!(nodes[0].starts_with("node0 cpus 0-1 distance 10 31 "), "{said}");
    assert!(nodes[1].starts_with("node1 cpus 2-3 distance 31 10 "), "{said}");
    assert!(kib(nodes[0]) <= 128 << 10 && kib(nodes[1]) > 300 << 10, "{said}");
}

#[test]
fn twenty_boots_in_a_row() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    for n in 0..20 {
        let out = finish(&mut run(&guest.words("console=ttyS0 quiet tandem.poweroff", &[])), LIMIT);
        let said = text(&out.stdout);
        assert!(said.contains("tandem-init: uptime"), "boot {n}: {said}");
        assert_eq!(out.status.code(), Some(0), "boot {n}: {said}");
    }
}

#[test]
fn reboot_starts_the_kernel_again() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let out = finish(&mut run(&guest.words("console=ttyS0 quiet tandem.reboot", &[])), LIMIT);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{said}");
    assert_eq!(said.matches("tandem-init: uptime").count(), 2, "{said}");
    let mut command = run(&guest.words("console=ttyS0 quiet tandem.reboot", &["--no-reboot"]));
    let out = finish(&mut command, LIMIT);
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(text(&out.stdout).matches("tandem-init: uptime").count(), 1);
}

/// A host that gives the machine no processor for a while: the guest's time does not run away from its
/// vCPUs, which would be a hang to its watchdogs.
#[test]
fn time_waits_for_a_starved_machine() {
    const AWAY: u64 = 12;
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let mut t = Terminal::prepare();
    t.spawn(&mut run(&guest.words("console=ttyS0 quiet", &["--smp", "2"])));
    t.expect("# ", LIMIT);
    let uptime = |t: &mut Terminal| -> f64 {
        t.seen.clear();
        t.send(b"echo up=$(cut -d' ' -f1 /proc/uptime)=\n");
        t.expect("\nup=", LIMIT);
        t.expect("# ", LIMIT);
        let said = t.seen.rsplit("\nup=").next().unwrap();
        said.split('=').next().unwrap().parse().expect("seconds")
    };
    let before = uptime(&mut t);
    t.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_secs(AWAY));
    t.signal(libc::SIGCONT);
    let passed = uptime(&mut t) - before;
    assert!(passed < AWAY as f64 - 5.0, "{passed} s have passed in the guest");
    t.seen.clear();
    t.send(b"dmesg | grep -cE 'lockup|stall'; poweroff -f\n");
    t.expect("\n0", LIMIT);
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
}

#[test]
fn a_person_at_the_shell() {
    let Some(guest) = Guest::find("vmlinuz-6.1", "6.1") else { return };
    let mut t = Terminal::prepare();
    let before = t.modes();
    t.spawn(&mut run(&guest.words("console=ttyS0 quiet", &[])));
    t.expect("# ", LIMIT);
    for (command, answer) in [
        ("uname -s", "\nLinux"),
        ("echo $((6*7))", "\n42"),
        ("cat /proc/sys/kernel/osrelease", "cloud-amd64"),
        ("ls /sys/bus/pci/devices | wc -l", "\n"),
        ("for i in 1 2 3; do echo -n x$i; done; echo", "x1x2x3"),
        ("sleep 100", ""),
    ] {
        t.seen.clear();
        t.send(format!("{command}\n").as_bytes());
        t.expect(answer, LIMIT);
        if command.starts_with("sleep") {
            // The key must reach the guest's terminal, not tandem's.
            std::thread::sleep(Duration::from_millis(500));
            t.send(b"\x03");
        }
        t.expect("# ", LIMIT);
    }
    t.send(b"poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
    assert_eq!(t.modes(), before);
}
