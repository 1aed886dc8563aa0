//! Linux from virtio-blk disks: what the guest wrote is there at the next boot, in raw and in qcow2
//! images, and the file system is clean; and a Debian system made by scripts/make-disk, as a kernel's
//! root and through firmware and GRUB.

mod vm;

use std::path::Path;
use std::process::Command;
use std::time::Duration;
use vm::pty::Terminal;
use vm::{Dir, finish, guest_file, run, skip, tandem, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);

/// The system's first process. At the first boot it writes 8 MiB that nobody can guess and many
/// small files; at the second it checks them.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -o remount,rw /
if [ -e /data ]; then
    sha256sum -c /sum && echo "data intact"
    [ "$(cat /small/* | wc -l)" = 300 ] && echo "files intact"
    rm -r /data /small
else
    dd if=/dev/urandom of=/data bs=64k count=128 2>/dev/null
    sha256sum /data >/sum
    mkdir /small
    n=0; while [ $n -lt 300 ]; do echo $n >/small/$n; n=$((n + 1)); done
    echo 3 >/proc/sys/vm/drop_caches
    sha256sum -c /sum && echo "data written"
fi

sync
mount -o remount,ro /
poweroff -f
"#;

/// Runs a command that must succeed; says why if it cannot be run.
fn succeed(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}{}", text(&out.stdout), text(&out.stderr));
}

fn command(name: &str, words: &[&str]) -> Command {
    // mke2fs and e2fsck are not on every user's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut c = Command::new(name);
    c.args(words).env("PATH", path);
    c
}

/// Kernel and initial RAM disk; says what is missing.
fn kernel() -> Option<(String, String)> {
    if let Some(why) = vm::unusable("tcg") {
        skip(&format!("accelerator tcg: {why}"));
        return None;
    }
    match (guest_file("vmlinuz-6.1"), guest_file("initramfs-6.1")) {
        (Some(k), Some(i)) => Some((k.display().to_string(), i.display().to_string())),
        _ => {
            skip("guest vmlinuz-6.1 is missing; run scripts/setup");
            None
        }
    }
}

/// A file system with busybox and [`INIT`] on it, as a raw image without partitions.
fn small_system(dir: &Dir) -> Option<String> {
    let Some(busybox) =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|b| Path::new(b).exists())
    else {
        skip("busybox is missing; run scripts/setup");
        return None;
    };
    let tree = dir.path("tree");
    for d in ["bin", "dev", "proc", "sys", "sbin"] {
        std::fs::create_dir_all(tree.join(d)).unwrap();
    }
    std::fs::copy(busybox, tree.join("bin/busybox")).unwrap();
    let init = tree.join("sbin/init");
    std::fs::write(&init, INIT).unwrap();
    succeed(&mut command("chmod", &["755", init.to_str().unwrap()]));
    let image = dir.path("disk.raw").display().to_string();
    succeed(&mut command(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), &image, "64M"],
    ));
    Some(image)
}

/// Boots from `drive`; returns what the guest said.
fn boot(guest: &(String, String), drive: &str) -> String {
    let append = "console=ttyS0 quiet root=/dev/vda panic=-1";
    let words = ["--accel", "tcg", "-m", "256M", "--kernel", &guest.0, "--initrd", &guest.1];
    let out =
        finish(run(&words).args(["--append", append, "--no-reboot", "--drive", drive]), LIMIT);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{drive}: {said}\n{}", text(&out.stderr));
    for complaint in ["I/O error", "EXT4-fs error", "Call Trace", "WARNING"] {
        assert!(!said.contains(complaint), "{drive}: {said}");
    }
    said
}

/// Two boots: the first writes, the second finds what was written.
fn write_and_find(guest: &(String, String), drive: &str) {
    let first = boot(guest, drive);
    assert!(first.contains("data written"), "{drive}: {first}");
    let second = boot(guest, drive);
    assert!(second.contains("data intact"), "{drive}: {second}");
    assert!(second.contains("files intact"), "{drive}: {second}");
}

#[test]
fn a_raw_disk() {
    let Some(guest) = kernel() else { return };
    let dir = Dir::new("raw-disk");
    let Some(image) = small_system(&dir) else { return };
    // Nothing of this may stay, or the next would be a second boot.
    let said = boot(&guest, &format!("file={image},format=raw,snapshot=on"));
    assert!(said.contains("data written"), "{said}");
    write_and_find(&guest, &format!("file={image},format=raw"));
    succeed(&mut command("e2fsck", &["-fn", &image]));
}

#[test]
fn a_qcow2_disk() {
    let Some(guest) = kernel() else { return };
    let dir = Dir::new("qcow2-disk");
    let Some(image) = small_system(&dir) else { return };
    let [qcow2, overlay, back] = ["disk.qcow2", "overlay.qcow2", "back.raw"].map(|n| dir.path(n));
    let [qcow2, overlay, back] = [&qcow2, &overlay, &back].map(|p| p.to_str().unwrap());
    let img = |words: &[&str]| succeed(tandem().arg("img").args(words));
    img(&["convert", "-O", "qcow2", "-c", &image, qcow2]);
    img(&["create", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay]);
    write_and_find(&guest, &format!("file={overlay},format=qcow2"));
    for made in [qcow2, overlay] {
        img(&["check", made]);
    }
    img(&["convert", "-O", "raw", overlay, back]);
    succeed(&mut command("e2fsck", &["-fn", back]));
    // The image behind it has seen nothing of this.
    let said = boot(&guest, &format!("file={qcow2},format=qcow2,aio=threads,discard=unmap"));
    assert!(said.contains("data written"), "{said}");
}

/// The Debian image; says how to make it.
fn debian() -> Option<String> {
    let image = guest_file("debian.raw").map(|i| i.display().to_string());
    if image.is_none() {
        skip("guest debian.raw is missing; run scripts/make-disk");
    }
    image
}

#[test]
fn debian_to_a_login() {
    let Some(guest) = kernel() else { return };
    let Some(image) = debian() else { return };
    let drive = format!("file={image},format=raw,snapshot=on");
    let append = "console=ttyS0 quiet root=/dev/vda3 panic=-1";
    let words = ["--accel", "tcg", "-m", "512M", "--kernel", &guest.0, "--initrd", &guest.1];
    let mut t = Terminal::prepare();
    t.spawn(run(&words).args(["--append", append, "--no-reboot", "--drive", &drive]));
    t.expect("login: ", LIMIT);
    t.send(b"root\n");
    t.expect("guest:~# ", LIMIT);
    for (command, answer) in [
        ("systemctl is-system-running --wait", "\rrunning"),
        ("findmnt -no SOURCE,FSTYPE /", "/dev/vda3 ext4"),
        ("cat /etc/os-release", "VERSION_CODENAME=bookworm"),
    ] {
        t.seen.clear();
        t.send(format!("{command}\n").as_bytes());
        t.expect(answer, LIMIT);
        t.expect("guest:~# ", LIMIT);
    }
    t.send(b"poweroff\n");
    assert_eq!(t.wait(LIMIT).code(), Some(0), "{}", t.seen);
}

/// A machine that starts with firmware (`words`) and a disk.
struct Booted(Terminal);

impl Booted {
    fn new(words: &[&str]) -> Booted {
        let mut t = Terminal::prepare();
        t.spawn(run(&["--accel", "tcg", "-m", "512M"]).args(words));
        let mut b = Booted(t);
        b.log_in();
        b
    }

    /// GRUB, the kernel, a login.
    fn log_in(&mut self) {
        self.0.seen.clear();
        self.0.expect("Booting `Debian'", LIMIT);
        self.0.expect("login: ", LIMIT);
        self.0.send(b"root\n");
        self.0.expect("guest:~# ", LIMIT);
    }

    fn ask(&mut self, command: &str, answer: &str) {
        self.0.seen.clear();
        self.0.send(format!("{command}\n").as_bytes());
        self.0.expect(answer, LIMIT);
        self.0.expect("guest:~# ", LIMIT);
    }

    fn power_off(mut self) {
        self.0.send(b"poweroff\n");
        assert_eq!(self.0.wait(LIMIT).code(), Some(0), "{}", self.0.seen);
    }
}

/// Whether there is everything that Debian through `firmware` needs; says what is missing.
fn starts(firmware: &str) -> bool {
    if let Some(why) = vm::unusable("tcg") {
        skip(&format!("accelerator tcg: {why}"));
        return false;
    }
    if !Path::new(firmware).exists() {
        skip(&format!("{firmware} is not installed; run scripts/setup"));
        return false;
    }
    true
}

/// A qcow2 image of Debian, and an empty one in front of it.
fn layers(dir: &Dir, image: &str) -> [String; 2] {
    let [back, front] = ["back.qcow2", "front.qcow2"].map(|n| dir.path(n).display().to_string());
    let img = |words: &[&str]| succeed(tandem().arg("img").args(words));
    img(&["convert", "-O", "qcow2", image, &back]);
    img(&["create", "-q", "-f", "qcow2", "-b", &back, "-F", "qcow2", &front]);
    [back, front]
}

#[test]
fn debian_through_a_bios() {
    if !starts("/usr/share/seabios/bios-256k.bin") {
        return;
    }
    let Some(image) = debian() else { return };
    let raw = format!("file={image},format=raw,snapshot=on");
    let mut b = Booted::new(&["--drive", &raw]);
    b.ask("[ -d /sys/firmware/efi ] || echo no-$((1))-efi", "no-1-efi");
    b.ask("touch /run/before; echo $?", "0");
    b.0.send(b"reboot\n");
    b.log_in();
    b.ask("ls /run/before", "No such file");
    b.power_off();
    // What is written stays in the image in front, over a start of tandem's, too.
    let dir = Dir::new("debian-bios");
    let [back, front] = layers(&dir, &image);
    let drive = format!("file={front},format=qcow2");
    let mut b = Booted::new(&["--drive", &drive]);
    b.ask("sha256sum /usr/bin/bash >/root/sum && sync; echo $?", "0");
    b.power_off();
    let mut b = Booted::new(&["--drive", &drive]);
    b.ask("sha256sum -c /root/sum", "/usr/bin/bash: OK");
    b.power_off();
    let img = |words: &[&str]| succeed(tandem().arg("img").args(words));
    [back, front].iter().for_each(|i| img(&["check", "-q", i]));
}

#[test]
fn debian_through_uefi() {
    if !starts("/usr/share/OVMF/OVMF_CODE_4M.fd") {
        return;
    }
    let Some(image) = debian() else { return };
    let raw = format!("file={image},format=raw,snapshot=on");
    let mut b = Booted::new(&["--firmware", "uefi", "--drive", &raw]);
    b.ask("ls /sys/firmware/efi/efivars | grep -c BootOrder", "1");
    b.0.send(b"reboot\n");
    b.log_in();
    b.power_off();
    let dir = Dir::new("debian-uefi");
    let [back, front] = layers(&dir, &image);
    for i in [back, front] {
        let drive = format!("file={i},format=qcow2");
        let mut b = Booted::new(&["--firmware", "uefi", "--drive", &drive]);
        b.ask("systemctl is-system-running --wait", "\rrunning");
        b.power_off();
    }
}
