//! The order in which a BIOS tries devices, its menu, and serial ports that devices add.

mod vm;

use std::path::Path;
use std::time::Duration;
use vm::flat::Flat;
use vm::pty::Terminal;
use vm::{Dir, finish, guest_file, run, skip, tandem, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const DEBUG_EXIT: u16 = 0x501;

/// Whether SeaBIOS and an accelerator are there; says what is missing.
fn bios() -> bool {
    if let Some(why) = vm::unusable("tcg") {
        skip(&format!("accelerator tcg: {why}"));
        return false;
    }
    let there = Path::new(SEABIOS).exists();
    if !there {
        skip(&format!("{SEABIOS} is missing; run scripts/setup"));
    }
    there
}

fn sector(code: Flat) -> Vec<u8> {
    let mut sector = code.0;
    assert!(sector.len() <= 510);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// A boot sector that says `word` and ends the machine.
fn says(word: &str) -> Vec<u8> {
    sector(Flat(vec![0xfa]).print(word).out(DEBUG_EXIT, 0x10).halt())
}

/// A bootable disc whose image, without emulation, is `code` (El Torito 1.0 §2).
fn disc(code: &[u8]) -> Vec<u8> {
    let mut iso = vec![0; 40 << 11];
    let mut put = |block: usize, bytes: &[u8]| {
        iso[block << 11..][..bytes.len()].copy_from_slice(bytes);
    };
    put(16, b"\x01CD001\x01");
    let mut record = b"\0CD001\x01EL TORITO SPECIFICATION".to_vec();
    record.resize(0x47, 0);
    record.extend(20u32.to_le_bytes());
    put(17, &record);
    put(18, b"\xffCD001\x01");
    let mut catalogue = [0u8; 64];
    (catalogue[0], catalogue[30], catalogue[31]) = (1, 0x55, 0xaa);
    let sum = catalogue[..32]
        .chunks(2)
        .fold(0u16, |s, w| s.wrapping_add(u16::from_le_bytes([w[0], w[1]])));
    catalogue[28..30].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    catalogue[32] = 0x88;
    catalogue[38..40].copy_from_slice(&4u16.to_le_bytes());
    catalogue[40..44].copy_from_slice(&21u32.to_le_bytes());
    put(20, &catalogue);
    put(21, code);
    iso
}

#[test]
fn letters_say_what_starts_and_once_holds_once() {
    if !bios() {
        return;
    }
    let dir = Dir::new("boot-letters");
    let disk = dir.file("disk", &[says("from disk\n"), vec![0; 1 << 20]].concat());
    let cd = dir.file("cd", &disc(&says("from disc\n")));
    // A disc that resets the machine by the keyboard controller.
    let again = Flat(vec![0xfa]).print("once\n").out(0x64, 0xfe).halt();
    let reset = dir.file("reset", &disc(&sector(again)));
    let drive = format!("file={disk},format=raw");
    for (cd, boot, said) in [
        (&cd, "order=cd", vec!["from disk\n"]),
        (&cd, "dc", vec!["from disc\n"]),
        (&reset, "once=d", vec!["once\n", "from disk\n"]),
    ] {
        let words = ["--accel", "tcg", "-m", "64M", "--drive", &drive, "--cdrom", cd];
        let more = ["--device", "isa-debug-exit", "--boot", boot];
        let out = finish(run(&words).args(more), LIMIT);
        let all = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0x21), "{boot}: {all}");
        let mut rest = all.as_str();
        for word in said {
            let at = rest.find(word).unwrap_or_else(|| panic!("{boot}: no {word:?} in {all}"));
            rest = &rest[at + word.len()..];
        }
    }
    // The same from QEMU's command line, with the menu.
    let mut qemu = tandem();
    qemu.args(["qemu", "-accel", "tcg", "-m", "64", "-nographic", "-cdrom", &cd]);
    qemu.args(["-drive", &drive, "-device", "isa-debug-exit,iobase=0x501,iosize=2"]);
    qemu.args(["-boot", "order=d,menu=on,splash-time=2000"]);
    let mut t = Terminal::prepare();
    t.spawn(&mut qemu);
    t.expect("Press ESC for boot menu", LIMIT);
    t.expect("from disc", LIMIT);
    assert_eq!(t.wait(LIMIT).code(), Some(0x21), "{}", t.seen);
}

#[test]
fn strict_tries_nothing_else() {
    if !bios() {
        return;
    }
    let dir = Dir::new("boot-strict");
    let disk = dir.file("disk", &[says("from disk\n"), vec![0; 1 << 20]].concat());
    let drive = format!("file={disk},format=raw");
    let mut t = Terminal::prepare();
    let words = ["--accel", "tcg", "-m", "64M", "--drive", &drive, "--boot", "strict=on"];
    t.spawn(run(&words).args(["--device", "isa-debug-exit"]));
    t.expect("No bootable device", LIMIT);
    assert!(!t.seen.contains("from disk"), "{}", t.seen);
    t.signal(libc::SIGTERM);
    t.wait(LIMIT);
}

#[test]
fn wrong_letters_are_told() {
    let words = ["--firmware", "bios", "--boot", "order=ccz", "--boot", "splash-time=x"];
    let out = finish(&mut run(&words), LIMIT);
    let all = text(&out.stderr);
    for said in ["'z'", "twice", "splash-time=x"] {
        assert!(out.status.code() == Some(2) && all.contains(said), "{all}");
    }
}

#[test]
fn linux_uses_serial_ports_that_devices_add() {
    let [kernel, initrd] = ["vmlinuz-6.1", "initramfs-6.1"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    if let Some(why) = vm::unusable("tcg") {
        return skip(&format!("accelerator tcg: {why}"));
    }
    let dir = Dir::new("serial-devices");
    let [isa, pci] = ["isa", "pci"].map(|n| dir.path(n));
    let chardev = |id: &str, path: &Path| format!("file,id={id},path={}", path.display());
    let mut machine = run(&["--accel", "tcg", "-m", "256M", "--append", "console=ttyS0 quiet"]);
    machine.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    machine.args(["--chardev", &chardev("a", &isa), "--chardev", &chardev("b", &pci)]);
    machine.args(["--device", "isa-serial,chardev=a,index=1", "--device", "pci-serial,chardev=b"]);
    let mut t = Terminal::prepare();
    t.spawn(&mut machine);
    t.expect("# ", LIMIT);
    t.send(b"echo over-isa >/dev/ttyS1; echo pci-$(dmesg | grep -c '1b36:0002')\n");
    // The port on PCI gets the next free number.
    t.send(b"for p in /sys/class/tty/ttyS*; do [ -e $p/device/resource0 ] && echo over-pci >/dev/${p##*/}; done\n");
    t.send(b"poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
    let read = |p: &Path| text(&std::fs::read(p).unwrap());
    assert_eq!(
        (read(&isa), read(&pci)),
        ("over-isa\r\n".into(), "over-pci\r\n".into()),
        "{}",
        t.seen
    );
}
