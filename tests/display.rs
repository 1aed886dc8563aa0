//! What a display shows: text that SeaBIOS, memtest86+ and Linux write to a VGA, pixels that UEFI and
//! Linux draw, and pictures of both.

mod vm;

use serde_json::json;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use vm::qmp::Qmp;
use vm::{Dir, guest_file, run, skip, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(1800);
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const VGABIOS: &str = "/usr/share/seabios/vgabios-stdvga.bin";
const OVMF: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const MEMTEST: &str = "/boot/memtest86+x64.bin";

/// Whether everything is there; says what is missing.
fn there(accel: &str, files: &[&str]) -> bool {
    if let Some(why) = vm::unusable(accel) {
        skip(&format!("accelerator {accel}: {why}"));
        return false;
    }
    let missing = files.iter().find(|f| !Path::new(f).exists());
    if let Some(f) = missing {
        skip(&format!("{f} is missing; run scripts/setup"));
    }
    missing.is_none()
}

/// A machine with a display, and a session with it.
struct Shown {
    dir: Dir,
    machine: Child,
    qmp: Qmp,
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

impl Shown {
    fn start(dir: Dir, words: &[&str]) -> Shown {
        let socket = dir.path("qmp");
        let qmp = format!("unix:{}", socket.display());
        let mut command = run(&["-m", "256M", "--serial", "null", "--qmp", &qmp]);
        let machine = command.args(words).spawn().expect("the built binary");
        Shown { qmp: Qmp::negotiated(&socket), dir, machine }
    }

    fn human(&mut self, line: &str) -> String {
        let said = self.qmp.ok("human-monitor-command", json!({ "command-line": line }));
        said.as_str().unwrap().to_string()
    }

    /// Where the card's memory is, if firmware has placed it.
    fn memory(&mut self) -> Option<u64> {
        let all = self.human("info mtree");
        let line = all.lines().find(|l| l.ends_with("VGA memory (Device)"))?;
        u64::from_str_radix(line.trim().split('-').next()?, 16).ok()
    }

    /// The text in the 32 KiB of the window, in rows of 80 columns, as a console may scroll through
    /// them: in the card's memory the character is the first byte of four.
    fn text(&mut self) -> Option<String> {
        let at = self.memory()?;
        let file = self.dir.path("text");
        let args = json!({ "val": at, "size": 0x1_0000, "filename": file });
        self.qmp.execute("pmemsave", args).get("return")?;
        let bytes = std::fs::read(&file).unwrap();
        let codes: Vec<u8> = bytes.chunks_exact(4).map(|c| c[0]).collect();
        let printable = |b: &u8| if (0x20..0x7f).contains(b) { char::from(*b) } else { ' ' };
        Some(codes.chunks(80).map(|r| r.iter().map(printable).collect::<String>() + "\n").collect())
    }

    fn expect_text(&mut self, what: &str) {
        let start = Instant::now();
        loop {
            let seen = self.text().unwrap_or_default();
            if seen.contains(what) {
                return;
            }
            assert!(start.elapsed() < LIMIT, "never saw {what:?} in:\n{seen}");
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// What is shown: width, height, pixels.
    fn picture(&mut self) -> (usize, usize, Vec<u8>) {
        let file = self.dir.path("picture.ppm");
        self.qmp.ok("screendump", json!({ "filename": file }));
        let bytes = std::fs::read(&file).unwrap();
        let header: Vec<String> = bytes.splitn(4, |b| *b == b'\n').take(3).map(text).collect();
        assert_eq!((header[0].as_str(), header[2].as_str()), ("P6", "255"));
        let (w, h) = header[1].split_once(' ').unwrap();
        let start = header.iter().map(|l| l.len() + 1).sum::<usize>();
        let (w, h) = (w.parse().unwrap(), h.parse().unwrap());
        assert_eq!(bytes.len() - start, w * h * 3);
        (w, h, bytes[start..].to_vec())
    }
}

/// A disc whose GRUB starts `kernel` with `words`, and an initial RAM disk.
fn disc(dir: &Dir, kernel: &str, words: &str, initrd: Option<&str>) -> Option<String> {
    let tree = dir.path("tree");
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    std::fs::copy(kernel, tree.join("boot/kernel")).unwrap();
    let mut menu = format!("set timeout=0\nmenuentry 'it' {{\n linux /boot/kernel {words}\n");
    if let Some(initrd) = initrd {
        std::fs::copy(initrd, tree.join("boot/initrd")).unwrap();
        menu += " initrd /boot/initrd\n";
    }
    std::fs::write(tree.join("boot/grub/grub.cfg"), menu + "}\n").unwrap();
    let iso = dir.path("it.iso").display().to_string();
    let made = Command::new("grub-mkrescue").args(["-o", &iso]).arg(&tree).output();
    match made {
        Ok(out) if out.status.success() => Some(iso),
        _ => {
            skip("grub-mkrescue does not work; run scripts/setup");
            None
        }
    }
}

#[test]
fn seabios_writes_to_the_vga() {
    for accel in ["tcg", "kvm"] {
        if !there(accel, &[SEABIOS, VGABIOS]) {
            continue;
        }
        let dir = Dir::new(&format!("vga-bios-{accel}"));
        let mut m = Shown::start(dir, &["--accel", accel, "--vga", "std", "--firmware", "bios"]);
        m.expect_text("SeaBIOS (version");
        m.expect_text("No bootable device");
        let (w, h, rgb) = m.picture();
        assert_eq!((w, h), (720, 400), "{accel}");
        let lit = rgb.chunks(3).filter(|p| *p == [0xaa; 3]).count();
        assert!(lit > 500, "{accel}: {lit}");
        assert!(rgb.chunks(3).all(|p| p == [0xaa; 3] || p == [0; 3]), "{accel}");
        let png = m.dir.path("picture.png");
        m.qmp.ok("screendump", json!({ "filename": png, "format": "png" }));
        assert!(std::fs::read(&png).unwrap().starts_with(b"\x89PNG"));
        let said = m.human(&format!("screendump {} -f ppm", m.dir.path("again").display()));
        assert_eq!(said, "");
        assert!(std::fs::read(m.dir.path("again")).unwrap().starts_with(b"P6\n720 400\n"));
        // RESET takes the card back to nothing, and the BIOS to its beginning.
        m.qmp.ok("system_reset", json!({}));
        m.expect_text("No bootable device");
        m.qmp.ok("quit", json!({}));
    }
}

#[test]
fn a_display_that_is_not_there_is_told() {
    if !there("tcg", &[]) {
        return;
    }
    let dir = Dir::new("no-display");
    let words = ["--accel", "tcg", "--firmware", "bios", "-S"];
    let mut m = Shown::start(dir, &[&words[..], &["--device", "bochs-display,id=d"]].concat());
    let file = m.dir.path("x");
    assert!(m.qmp.ok("screendump", json!({ "filename": file, "device": "d" })).is_object());
    let (_, said) = m.qmp.err("screendump", json!({ "filename": file, "device": "e" }));
    assert!(said.contains("'e'"), "{said}");
    let (_, said) = m.qmp.err("screendump", json!({ "filename": "/nonexistent/x" }));
    assert!(said.contains("/nonexistent/x"), "{said}");
    let args = json!({ "filename": file, "device": "d", "head": 1 });
    assert!(m.qmp.err("screendump", args).1.contains("head"));
}

#[test]
fn memtest_runs_from_a_disc_and_is_seen() {
    if !there("tcg", &[SEABIOS, VGABIOS, MEMTEST]) {
        return;
    }
    let dir = Dir::new("memtest");
    let Some(iso) = disc(&dir, MEMTEST, "", None) else { return };
    let mut m = Shown::start(dir, &["--accel", "tcg", "--vga", "std", "--cdrom", &iso]);
    m.expect_text("Memtest86+ v");
    m.expect_text("Errors: 0");
    let seen = m.text().unwrap();
    assert!(seen.contains("256MB") || seen.contains("255MB"), "{seen}");
    let (w, h, rgb) = m.picture();
    assert_eq!((w, h), (720, 400));
    let blue = rgb.chunks(3).filter(|p| *p == [0, 0, 0xaa]).count();
    assert!(blue > w * h / 2, "{blue}");
}

#[test]
fn linux_has_a_text_console() {
    let [kernel, initrd] = ["vmlinuz-6.1", "initramfs-6.1"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    if !there("tcg", &[SEABIOS, VGABIOS]) {
        return;
    }
    let dir = Dir::new("text-console");
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    // GRUB would hand over a graphics mode if it could.
    let words = "console=tty0 panic=-1";
    let Some(iso) = disc(&dir, &kernel, words, Some(&initrd)) else { return };
    let mut m = Shown::start(dir, &["--accel", "tcg", "--vga", "std", "--cdrom", &iso]);
    m.expect_text("tandem-init: uptime");
    m.expect_text("/ # ");
    let (w, h, _) = m.picture();
    assert_eq!((w, h), (720, 400));
}

#[test]
fn uefi_and_linux_draw_on_a_frame_buffer() {
    let [kernel, initrd] = ["vmlinuz-6.1", "initramfs-6.1"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest vmlinuz-6.1 is missing; run scripts/setup");
    };
    if !there("tcg", &[OVMF]) {
        return;
    }
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    for card in ["VGA", "bochs-display"] {
        let dir = Dir::new(&format!("frame-buffer-{card}"));
        let log = dir.path("serial").display().to_string();
        let serial = format!("file:{log}");
        let socket = dir.path("qmp");
        let qmp = format!("unix:{}", socket.display());
        let mut command = run(&["-m", "256M", "--serial", &serial, "--qmp", &qmp]);
        command.args(["--accel", "tcg", "--firmware", "uefi", "--device", card]);
        command.args(["--kernel", &kernel, "--initrd", &initrd, "--append"]);
        command.arg("console=tty0 console=ttyS0 panic=-1");
        let machine = command.spawn().expect("the built binary");
        let mut m = Shown { qmp: Qmp::negotiated(&socket), dir, machine };
        let start = Instant::now();
        let mut said = String::new();
        while !said.contains("tandem-init: uptime") {
            assert!(start.elapsed() < LIMIT, "{said}");
            std::thread::sleep(Duration::from_millis(300));
            said = text(&std::fs::read(&log).unwrap_or_default());
        }
        assert!(
            said.contains("switching to colour frame buffer") || said.contains("efifb: mode is")
        );
        let (w, h, rgb) = m.picture();
        assert_eq!((w, h), (1280, 800), "{card}: {said}");
        // Letters on black, in every part of the upper half.
        for part in rgb.chunks(rgb.len() / 10).take(5) {
            let lit = part.chunks(3).filter(|p| *p != [0; 3]).count();
            assert!(lit > 200 && lit < part.len() / 6, "{card}: {lit}: {said}");
        }
    }
}

#[test]
fn linux_drives_the_card_itself() {
    let [kernel, initrd] = ["vmlinuz-pc", "initramfs-pc"].map(guest_file);
    let (Some(kernel), Some(initrd)) = (kernel, initrd) else {
        return skip("guest vmlinuz-pc is missing; run scripts/setup");
    };
    if !there("tcg", &[]) {
        return;
    }
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    for card in ["VGA,romfile=", "bochs-display,xres=1024,yres=768,romfile="] {
        let mut m = Shown::start(
            Dir::new(&format!("bochs-drm-{}", &card[..3])),
            &[
                &["--accel", "tcg", "--device", card, "--kernel", &kernel, "--initrd", &initrd][..],
                &["--append", "console=tty0 panic=-1"],
            ]
            .concat(),
        );
        let size = if card.starts_with("VGA") { (1280, 800) } else { (1024, 768) };
        let start = Instant::now();
        loop {
            let (w, h, rgb) = m.picture();
            let lit = rgb.chunks(3).filter(|p| *p != [0; 3]).count();
            // The console has been drawn, letters on black.
            if (w, h) == size && lit > 2000 && lit < w * h / 6 {
                break;
            }
            assert!(start.elapsed() < LIMIT, "{card}: {w}x{h}, {lit}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
