//! Machines that start from a CD in the SATA drive, through SeaBIOS and through UEFI: a disc made by
//! grub-mkrescue with a Linux on it, iPXE; and Linux's drivers with SATA, NVMe and virtio disks.

mod vm;

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use vm::pty::Terminal;
use vm::{Dir, finish, guest_file, run, skip, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const OVMF: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";

/// Whether everything is there; says what is missing.
fn there(files: &[&str]) -> bool {
    if let Some(why) = vm::unusable("tcg") {
        skip(&format!("accelerator tcg: {why}"));
        return false;
    }
    let missing = files.iter().find(|f| !Path::new(f).exists());
    if let Some(f) = missing {
        skip(&format!("{f} is missing; run scripts/setup"));
    }
    missing.is_none()
}

/// Kernel and initial RAM disk with the drivers of SATA disks and CD-ROMs.
fn linux() -> Option<(String, String)> {
    let [kernel, initrd] = ["vmlinuz-6.12", "storage-6.12"].map(guest_file);
    let both = kernel.zip(initrd);
    if both.is_none() {
        skip("guest storage-6.12 is missing; run scripts/setup");
    }
    both.map(|(k, i)| (k.display().to_string(), i.display().to_string()))
}

/// A disc with GRUB for BIOS and UEFI, a kernel and `/marker`.
fn rescue(dir: &Dir, linux: &(String, String)) -> Option<String> {
    let tree = dir.path("tree");
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    std::fs::copy(&linux.0, tree.join("boot/vmlinuz")).unwrap();
    std::fs::copy(&linux.1, tree.join("boot/initrd.img")).unwrap();
    std::fs::write(tree.join("marker"), "on the disc\n").unwrap();
    let menu = "serial --unit=0\nterminal_input serial\nterminal_output serial\nset timeout=0\n\
                menuentry 'disc' {\n linux /boot/vmlinuz console=ttyS0 quiet panic=-1\n \
                initrd /boot/initrd.img\n}\n";
    std::fs::write(tree.join("boot/grub/grub.cfg"), menu).unwrap();
    let iso = dir.path("grub.iso").display().to_string();
    let made = Command::new("grub-mkrescue").args(["-o", &iso]).arg(&tree).output();
    match made {
        Ok(out) if out.status.success() => Some(iso),
        Ok(out) => {
            skip(&format!("grub-mkrescue: {}", text(&out.stderr).trim().replace('\n', " ")));
            None
        }
        Err(_) => {
            skip("grub-mkrescue is missing; run scripts/setup");
            None
        }
    }
}

/// Gives a command at the prompt of the initial RAM disk's shell.
fn ask(t: &mut Terminal, command: &str, answer: &str) {
    t.seen.clear();
    t.send(format!("{command}\n").as_bytes());
    t.expect(answer, LIMIT);
    t.expect("# ", LIMIT);
}

#[test]
fn a_rescue_disc_starts_linux() {
    if !there(&[SEABIOS, OVMF]) {
        return;
    }
    let Some(linux) = linux() else { return };
    let dir = Dir::new("rescue");
    let Some(iso) = rescue(&dir, &linux) else { return };
    for more in [&[][..], &["--firmware", "uefi"]] {
        let mut t = Terminal::prepare();
        t.spawn(run(&["--accel", "tcg", "-m", "256M", "--cdrom", &iso]).args(more));
        t.expect("Booting `disc'", LIMIT);
        t.expect("# ", LIMIT);
        ask(&mut t, "mount -t iso9660 -o ro /dev/sr0 /tmp; cat /tmp/marker", "on the disc");
        let compare = "cmp /tmp/boot/initrd.img /tmp/boot/initrd.img && echo same-$((1))";
        ask(&mut t, compare, "same-1");
        ask(&mut t, "dmesg | grep -cE 'ata[0-9].*(error|failed|frozen|timeout)'", "\n0\r");
        t.send(b"umount /tmp; eject /dev/sr0; poweroff -f\n");
        assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
    }
}

/// Runs until `words` were said on the serial port.
fn says(arguments: &[&str], words: &[&str]) {
    let mut t = Terminal::prepare();
    t.spawn(run(&["--accel", "tcg", "-m", "256M"]).args(arguments));
    for w in words {
        t.expect(w, LIMIT);
    }
    t.signal(libc::SIGTERM);
    t.wait(LIMIT);
}

#[test]
fn ipxe_starts_from_its_disc() {
    const ISO: &str = "/usr/lib/ipxe/ipxe.iso";
    if there(&[SEABIOS, ISO]) {
        says(
            &["--cdrom", ISO],
            &["ISOLINUX", "iPXE initialising devices", "Press Ctrl-B for the iPXE command line"],
        );
    }
}

/// Three disks of a Linux, one on each kind of adapter: what is written comes back, in Linux and in
/// the images; what was never written, and what was given up, reads as zeros.
#[test]
fn dd_with_verification_over_sata_nvme_and_virtio() {
    if !there(&[]) {
        return;
    }
    let Some((kernel, initrd)) = linux() else { return };
    let dir = Dir::new("three-disks");
    let disks = [("sda", "if=ide"), ("nvme0n1", "if=none,id=n"), ("vda", "if=virtio")];
    let image = |name: &str| dir.path(&format!("{name}.qcow2")).display().to_string();
    let mut t = Terminal::prepare();
    let words = ["--accel", "tcg", "-m", "256M", "--kernel", &kernel, "--initrd", &initrd];
    let mut machine = run(&words);
    machine.args(["--append", "console=ttyS0 quiet", "--device", "nvme,drive=n,serial=n1"]);
    for (name, place) in disks {
        let made = ["img", "create", "-q", "-f", "qcow2", &image(name), "64M"];
        assert!(vm::tandem().args(made).status().unwrap().success());
        let drive = format!("file={},format=qcow2,{place},discard=unmap", image(name));
        machine.args(["--drive", &drive]);
    }
    t.spawn(&mut machine);
    t.expect("# ", LIMIT);
    ask(&mut t, "dd if=/dev/urandom of=/tmp/data bs=1M count=16; echo $?", "\n0\r");
    for (name, _) in disks {
        let dev = format!("/dev/{name}");
        let write = format!("dd if=/tmp/data of={dev} bs=64k seek=16 conv=fsync; echo $?");
        ask(&mut t, &write, "\n0\r");
        ask(&mut t, "echo 3 >/proc/sys/vm/drop_caches; echo dropped-$((1))", "dropped-1");
        let compare =
            format!("dd if={dev} bs=64k skip=16 count=256 | cmp - /tmp/data && echo same-$((1))");
        ask(&mut t, &compare, "same-1");
        ask(&mut t, &format!("dd if={dev} bs=1M count=1 | tr -d '\\0' | wc -c"), "\n0\r");
        ask(&mut t, &format!("blkdiscard -o 1M -l 1M {dev}; echo $?"), "\n0\r");
    }
    let complaints = "dmesg | grep -ciE '(ata[0-9]|nvme).*(error|failed|frozen|timeout)'";
    ask(&mut t, complaints, "\n0\r");
    t.send(b"tail -c +1048577 /tmp/data | sha256sum | sed s/^/sum-/; poweroff -f\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
    for (name, _) in disks {
        let raw = dir.path("disk.raw").display().to_string();
        let convert = ["img", "convert", "-O", "raw", &image(name), &raw];
        assert!(vm::tandem().args(convert).status().unwrap().success());
        let data = std::fs::read(&raw).unwrap();
        let written = dir.file("written", &data[2 << 20..17 << 20]);
        let sum = text(&Command::new("sha256sum").arg(&written).output().unwrap().stdout);
        let sum = sum.split(' ').next().unwrap();
        assert!(t.seen.contains(&format!("sum-{sum}")), "{name} {sum}: {}", t.seen);
        assert!(data[..2 << 20].iter().all(|b| *b == 0), "{name}");
    }
}

#[test]
fn drives_that_do_not_fit_are_told() {
    let dir = Dir::new("sata-faults");
    let disk = dir.file("disk", &[0; 1 << 20]);
    let ide = format!("file={disk},format=raw,if=ide,readonly=on,index=7");
    let virtio = format!("file={disk},format=raw,media=cdrom,if=virtio");
    for (words, said) in [
        (vec!["--drive", &ide], "index=0 to 5"),
        (vec!["--drive", &virtio], "if=ide"),
        (vec!["--cdrom", "/nonexistent.iso"], "/nonexistent.iso"),
        (vec!["--drive", "media=cdrom", "--device", "ide-hd"], "drive=ID"),
        (vec!["--drive", "media=cdrom", "--device", "ide-cd,bus=ide.9"], "ide.5"),
    ] {
        let out = finish(&mut run(&words), LIMIT);
        let all = text(&out.stderr);
        assert!(!out.status.success() && all.contains(said), "{words:?}: {all}");
    }
}
