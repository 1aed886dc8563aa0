//! The microvm machine: Debian's kernel finds its virtio devices, and a small guest starts on each
//! accelerator.

mod vm;

use std::time::Duration;
use vm::flat::Flat;
use vm::{Dir, finish, guest_file, run, skip, text};

const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn linux_finds_its_devices() {
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let (Some(kernel), Some(initrd)) = (guest_file("vmlinuz-6.1"), guest_file("initramfs-6.1"))
    else {
        return skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    let dir = Dir::new("microvm");
    let disk = dir.file("disk", &vec![0; 8 << 20]);
    let out = finish(
        run(&["--machine", "microvm", "--accel", "tcg", "--smp", "2", "--net", "user"])
            .args(["--drive", &format!("file={disk},format=raw")])
            .args(["--device", "virtio-rng-device"])
            .args(["--append", "console=ttyS0 tandem.check", "--kernel"])
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd),
        LIMIT,
    );
    let said = text(&out.stdout).replace('\r', "");
    assert_eq!(out.status.code(), Some(0), "{said}\n{}", text(&out.stderr));
    for sign in ["[vda] 16384 512-byte", "LNRO0005:00", "LNRO0005:02", "virtio2", "== end"] {
        assert!(said.contains(sign), "{sign}:\n{said}");
    }
    for complaint in ["WARNING", "BUG", "Call Trace", "ACPI Error", "spurious", "nobody cared"] {
        assert!(!said.contains(complaint), "{complaint}:\n{said}");
    }
}

#[test]
fn a_small_guest_starts_on_each_accelerator() {
    let dir = Dir::new("microvm-small");
    let guest = dir.file("guest", &Flat::default().print("here\n").out(0xf4, 5).halt().0);
    for accel in ["kvm", "tcg"] {
        if let Some(why) = vm::unusable(accel) {
            skip(&format!("accelerator {accel}: {why}"));
            continue;
        }
        let words = ["--machine", "microvm", "--accel", accel, "-m", "16M", "--kernel", &guest];
        let more = ["--kernel-format", "flat", "--device", "isa-debug-exit,iobase=0xf4"];
        let out = finish(run(&words).args(more), LIMIT);
        assert_eq!(out.status.code(), Some(11), "{accel}: {}", text(&out.stderr));
        assert_eq!(text(&out.stdout), "here\n", "{accel}");
    }
}

#[test]
fn devices_for_other_buses_are_refused() {
    let dir = Dir::new("microvm-refuse");
    let guest = dir.file("guest", &Flat::default().halt().0);
    for (machine, device, remedy) in [
        ("microvm", "virtio-rng-pci", "use --machine q35"),
        ("q35", "virtio-rng-device", "--machine microvm"),
    ] {
        let words = ["--machine", machine, "--accel", "tcg", "-m", "16M", "--kernel", &guest];
        let out = finish(run(&words).args(["--kernel-format", "flat", "--device", device]), LIMIT);
        assert_eq!(out.status.code(), Some(2), "{machine}");
        assert!(text(&out.stderr).contains(remedy), "{machine}: {}", text(&out.stderr));
    }
}
