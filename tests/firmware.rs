//! Machines that start with firmware from Debian's packages: SeaBIOS to a disk's boot sector, UEFI
//! to its shell.

mod vm;

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;
use vm::flat::Flat;
use vm::{Dir, finish, run, tandem, text};

const LIMIT: Duration = Duration::from_secs(120);
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const OVMF: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
const DEBUG_EXIT: u16 = 0x501;

/// Runs `test` with each accelerator that works here, if `firmware` is installed.
fn on_each(firmware: &str, accels: &[&str], test: impl Fn(&str)) {
    if !Path::new(firmware).exists() {
        return vm::skip(&format!("{firmware} is not installed"));
    }
    for accel in accels {
        match vm::unusable(accel) {
            None => test(accel),
            Some(why) => vm::skip(&format!("accelerator {accel}: {why}")),
        }
    }
}

/// A disk whose boot sector holds this code.
fn disk(dir: &Dir, code: Flat) -> String {
    let mut sector = code.0;
    assert!(sector.len() <= 510);
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    dir.file("disk", &sector)
}

fn boot(accel: &str, disk: &str, more: &[&str]) -> Output {
    let drive = format!("file={disk},format=raw");
    let words = ["--accel", accel, "-m", "64M", "--drive", &drive, "--device", "isa-debug-exit"];
    finish(run(&words).args(more), LIMIT)
}

#[test]
fn seabios_boots_a_disk() {
    on_each(SEABIOS, &["kvm", "tcg", "tcg,backend=interp"], |accel| {
        let dir = Dir::new("seabios");
        // Without interrupts, in which the BIOS would go on with its own output.
        let quiet = Flat(vec![0xfa]);
        let disk = disk(&dir, quiet.print("sector\n").out(DEBUG_EXIT, 0x10).halt());
        let log = dir.path("log").display().to_string();
        let out = boot(accel, &disk, &["--debugcon", &log]);
        let said = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0x21), "{accel}: {said}");
        assert!(said.contains("SeaBIOS") && said.ends_with("sector\n"), "{accel}: {said}");
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(log.contains("Booting from 0000:7c00"), "{accel}: {log}");
    });
}

#[test]
fn a_reset_starts_firmware_again() {
    on_each(SEABIOS, &["tcg"], |accel| {
        let dir = Dir::new("seabios-reset");
        // CMOS byte 7fh survives: the first time it is 0, and the sector counts it up and resets.
        // `mov dx, 70h; mov al, 7fh; out dx, al; inc dx; in al, dx; test al, al; jnz over; inc al;
        // out dx, al; mov dx, cf9h; mov al, 6; out dx, al; hlt; over:`
        let reset_once = Flat(vec![
            0xba, 0x70, 0x00, 0xb0, 0x7f, 0xee, 0x42, 0xec, 0x84, 0xc0, 0x75, 0x0a, 0xfe, 0xc0,
            0xee, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4,
        ]);
        let disk = disk(&dir, reset_once.print("again\n").out(DEBUG_EXIT, 0x10).halt());
        let out = boot(accel, &disk, &[]);
        let said = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0x21), "{said}");
        assert_eq!(said.matches("SeaBIOS").count(), 2, "{said}");
        assert!(said.ends_with("again\n"), "{said}");
    });
}

/// The shell runs `startup.nsh` of a FAT disk, which says that it is there and resets the machine.
#[test]
fn uefi_reaches_its_shell_and_keeps_its_variables() {
    on_each(OVMF, &["tcg"], |accel| {
        let dir = Dir::new("ovmf");
        let script = "echo the shell runs\r\nsetvar marker -nv -bs -guid \
                      4f9d8f5c-3a8b-4c55-9a4e-6a1f0c7d2e11 =0x4b455054\r\nreset -s\r\n";
        let Some(disk) = fat(&dir, script) else {
            return vm::skip("mtools is not installed");
        };
        let vars = dir.file("vars", &std::fs::read(OVMF_VARS).unwrap());
        let drive = format!("file={disk},format=raw");
        let keeps = |words: &[&str]| {
            std::fs::write(&vars, std::fs::read(OVMF_VARS).unwrap()).unwrap();
            let out = finish(tandem().args(words).stdin(Stdio::null()), LIMIT);
            let said = text(&out.stdout);
            assert_eq!(out.status.code(), Some(0), "{words:?}: {said}\n{}", text(&out.stderr));
            assert!(said.contains("the shell runs"), "{words:?}: {said}");
            let name: Vec<u8> = "marker".encode_utf16().flat_map(u16::to_le_bytes).collect();
            let kept = std::fs::read(&vars).unwrap();
            assert!(kept.windows(name.len()).any(|w| w == name), "{words:?}: no variable is kept");
        };
        let firmware = format!("code={OVMF},vars={vars}");
        let run = ["run", "--accel", accel, "-m", "256M", "--firmware", &firmware];
        keeps(&[&run[..], &["--drive", &drive]].concat());
        // The same as libvirt says it to QEMU.
        let node = |name: &str, file: &str, readonly: &str| {
            format!(
                "driver=raw,node-name={name},file.driver=file,file.filename={file},read-only={readonly}"
            )
        };
        let (code, kept) = (node("code", OVMF, "on"), node("vars", &vars, "off"));
        let machine = "q35,pflash0=code,pflash1=vars";
        let qemu = ["qemu", "-accel", accel, "-m", "256", "-nographic", "-machine", machine];
        keeps(&[&qemu[..], &["-blockdev", &kept, "-blockdev", &code, "-drive", &drive]].concat());
    });
}

#[test]
fn qemus_options_start_firmware() {
    on_each(SEABIOS, &["tcg"], |accel| {
        let dir = Dir::new("seabios-qemu");
        let disk = disk(&dir, Flat(vec![0xfa]).print("sector\n").out(DEBUG_EXIT, 0x10).halt());
        let drive = format!("file={disk},format=raw,if=virtio");
        let item = dir.file("item", b"contents");
        let item = format!("name=opt/org.example/item,file={item}");
        let base = ["qemu", "-accel", accel, "-m", "64", "-nographic", "-device", "isa-debug-exit"];
        let firmware = ["-bios", SEABIOS, "-drive", &drive, "-fw_cfg", &item];
        let with = |more: &[&str]| {
            let words = [&base[..], &firmware, more].concat();
            finish(tandem().args(words).stdin(Stdio::null()), LIMIT)
        };
        let out = with(&["-fw_cfg", "opt/org.example/text,string=a"]);
        let said = text(&out.stdout);
        assert_eq!(out.status.code(), Some(0x21), "{said}\n{}", text(&out.stderr));
        assert!(said.contains("SeaBIOS") && said.ends_with("sector\n"), "{said}");
        for (more, why) in [
            (["-fw_cfg", "etc/e820,string=x"], "name it opt/"),
            (["-fw_cfg", "opt/x"], "string= and file="),
            (["-fw_cfg", "opt/x,file=/nonexistent"], "/nonexistent"),
            (["-fw_cfg", &item], "given twice"),
            (["-machine", "q35,pflash0=nobody"], "'nobody'"),
        ] {
            let said = text(&with(&more).stderr);
            assert!(said.contains(why), "{more:?}: {said}");
        }
    });
}

/// A disk image with a FAT file system that holds `startup.nsh`; `None` without mtools.
fn fat(dir: &Dir, script: &str) -> Option<String> {
    let image = dir.file("fat", &vec![0; 8 << 20]);
    let script = dir.file("startup.nsh", script.as_bytes());
    let tool = |name: &str, args: &[&str]| {
        let status = std::process::Command::new(name).args(args).status().ok()?;
        assert!(status.success(), "{name}");
        Some(())
    };
    tool("mformat", &["-i", &image, "::"])?;
    tool("mcopy", &["-i", &image, &script, "::/startup.nsh"])?;
    Some(image)
}

#[test]
fn what_cannot_start_is_told() {
    let dir = Dir::new("firmware-faults");
    let odd = dir.file("odd", &[0; 1000]);
    for (words, said) in [
        (vec![], "nothing to boot"),
        (vec!["--bios", &odd], "no firmware image"),
        (vec!["--bios", "/nonexistent"], "/nonexistent"),
        (vec!["--firmware", "efi"], "uefi"),
        (vec!["--pflash", &odd], "4096"),
    ] {
        let out = finish(&mut run(&words), LIMIT);
        let all = text(&out.stderr);
        assert!(!out.status.success() && all.contains(said), "{words:?}: {all}");
    }
}
