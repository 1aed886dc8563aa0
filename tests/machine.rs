//! The machine's ways to end and to start again, and where its serial ports lead, on every
//! accelerator that works here.

mod vm;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};
use vm::flat::Flat;
use vm::{Dir, finish, run, text};

const LIMIT: Duration = Duration::from_secs(60);

/// PM1 control: SLP_EN with SLP_TYP of S5, which is 0.
const SLEEP_ENABLE_HIGH: u8 = 0x20;
const PM1_CONTROL: u16 = 0x604;
const RESET_CONTROL: u16 = 0xcf9;
const KEYBOARD_COMMAND: u16 = 0x64;
const DEBUG_EXIT: u16 = 0xf4;

/// Runs `test` with each accelerator that works here.
fn on_each(test: impl Fn(&str)) {
    for accel in ["kvm", "tcg", "tcg,backend=interp"] {
        match vm::unusable(accel) {
            None => test(accel),
            Some(why) => vm::skip(&format!("accelerator {accel}: {why}")),
        }
    }
}

fn flat(dir: &Dir, guest: Flat, accel: &str, more: &[&str]) -> Output {
    let image = dir.file("guest", &guest.0);
    let words = ["--accel", accel, "--kernel", &image, "--kernel-format", "flat", "-m", "16M"];
    finish(run(&words).args(more), LIMIT)
}

fn power_off(guest: Flat) -> Flat {
    guest.out(PM1_CONTROL + 1, SLEEP_ENABLE_HIGH).halt()
}

#[test]
fn power_off_is_status_0() {
    on_each(|accel| {
        let dir = Dir::new("off");
        let out = flat(&dir, power_off(Flat::default().print("bye\n")), accel, &[]);
        assert_eq!((out.status.code(), &*text(&out.stdout)), (Some(0), "bye\n"), "{accel}");
    });
}

#[test]
fn debug_exit_is_twice_the_value_and_one() {
    on_each(|accel| {
        let dir = Dir::new("debug-exit");
        for value in [0u8, 0x10, 0x7f] {
            let device = ["--device", "isa-debug-exit,iobase=0xf4"];
            let out = flat(&dir, Flat::default().out(DEBUG_EXIT, value).halt(), accel, &device);
            assert_eq!(out.status.code(), Some(i32::from(value) << 1 | 1), "{accel}");
        }
    });
}

#[test]
fn a_triple_fault_is_status_4_with_a_sentence() {
    on_each(|accel| {
        let dir = Dir::new("triple");
        let out = flat(&dir, Flat::default().triple_fault(), accel, &[]);
        assert_eq!(out.status.code(), Some(4), "{accel}");
        assert!(text(&out.stderr).contains("triple-faulted"), "{accel}: {}", text(&out.stderr));
    });
}

/// How a guest asks for a reset.
type Way = fn(Flat) -> Flat;

/// A reset finds the machine as at first, except that a byte of CMOS RAM says that there was one:
/// `mov al, 50h; out 70h, al; in al, 71h; test al, al; jnz done; mov al, 1; out 71h, al`, then
/// `how`; at `done` the machine is turned off.
fn resets_once(how: impl Fn(Flat) -> Flat) -> Flat {
    let mut guest = Flat::default().print("boot\n");
    guest.0.extend([0xb0, 0x50, 0xe6, 0x70, 0xe4, 0x71, 0x84, 0xc0]);
    let mut reset = Flat(vec![0xb0, 0x01, 0xe6, 0x71]);
    reset = how(reset).halt();
    guest.0.extend([0x75, reset.0.len() as u8]);
    guest.0.extend(reset.0);
    power_off(guest.print("done\n"))
}

#[test]
fn every_kind_of_reset_starts_again() {
    on_each(|accel| {
        let dir = Dir::new("reset");
        let ways: [(&str, Way); 3] = [
            ("port CF9h", |g| g.out(RESET_CONTROL, 0x06)),
            ("keyboard controller", |g| g.out(KEYBOARD_COMMAND, 0xfe)),
            ("port 92h", |g| g.out(0x92, 0x01)),
        ];
        for (name, how) in ways {
            let out = flat(&dir, resets_once(how), accel, &[]);
            let said = (out.status.code(), text(&out.stdout));
            assert_eq!(said, (Some(0), "boot\nboot\ndone\n".into()), "{accel}: {name}");
            let out = flat(&dir, resets_once(how), accel, &["--no-reboot"]);
            let said = (out.status.code(), text(&out.stdout));
            assert_eq!(said, (Some(0), "boot\n".into()), "{accel}: {name} under --no-reboot");
        }
    });
}

#[test]
fn many_resets_in_a_row_leak_nothing() {
    let Some(accel) = vm::any_accelerator() else { return };
    let dir = Dir::new("resets");
    // Counts in CMOS RAM up to 200: `mov al, 50h; out 70h, al; in al, 71h; inc al; out 71h, al;
    // cmp al, 200; je done; (reset); done: (power off)`.
    let mut guest =
        Flat(vec![0xb0, 0x50, 0xe6, 0x70, 0xe4, 0x71, 0xfe, 0xc0, 0xe6, 0x71, 0x3c, 200]);
    let reset = Flat::default().out(RESET_CONTROL, 0x06).halt();
    guest.0.extend([0x74, reset.0.len() as u8]);
    guest.0.extend(reset.0);
    let out = flat(&dir, power_off(guest.print("all\n")), accel, &[]);
    assert_eq!((out.status.code(), &*text(&out.stdout)), (Some(0), "all\n"));
}

#[test]
fn serial_ports_lead_to_files_sockets_and_terminals() {
    on_each(|accel| {
        let dir = Dir::new("serial");
        let file = dir.path("out").display().to_string();
        let to_file = format!("file:{file}");
        let out = flat(
            &dir,
            power_off(Flat::default().print("to a file")),
            accel,
            &["--serial", &to_file],
        );
        assert_eq!(out.status.code(), Some(0), "{accel}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "to a file", "{accel}");

        let image = dir.file("echo", &Flat::default().print("ready").echo().0);
        let socket = dir.path("sock");
        let serial = format!("unix:{}", socket.display());
        let words = ["--accel", accel, "--kernel", &image, "--kernel-format", "flat"];
        let mut child = run(&words)
            .args(["--serial", &serial, "--serial", "pty"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = Vec::new();
        let start = Instant::now();
        let mut connection = loop {
            match UnixStream::connect(&socket) {
                Ok(c) => break c,
                Err(_) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(10)),
                Err(e) => panic!("{accel}: {e}"),
            }
        };
        connection.set_read_timeout(Some(LIMIT)).unwrap();
        let mut got = [0; 5];
        connection.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ready", "{accel}");
        connection.write_all(b"echo!").unwrap();
        connection.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"echo!", "{accel}");
        // SAFETY: no memory is passed.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        child.stderr.take().unwrap().read_to_end(&mut line).unwrap();
        assert!(text(&line).contains("COM2 is at /dev/pts/"), "{accel}: {}", text(&line));
        child.wait().unwrap();
        assert!(!socket.exists(), "{accel}: the socket is gone");
    });
}

/// An ELF32 multiboot kernel: header, then code at its entry that prints the first module's first
/// four bytes, and the command line up to its end, to COM1, and turns the machine off.
fn multiboot() -> Vec<u8> {
    let load = 0x10_0000u32;
    let mut code: Vec<u8> = Vec::new();
    for v in [0x1bad_b002u32, 3, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(3)] {
        code.extend(v.to_le_bytes());
    }
    // mov dx, 3f8h
    code.extend([0x66, 0xba, 0xf8, 0x03]);
    // mov esi, [ebx+24]; mov esi, [esi]; mov ecx, 4; rep outsb
    code.extend([0x8b, 0x73, 0x18, 0x8b, 0x36, 0xb9, 4, 0, 0, 0, 0xf3, 0x6e]);
    // mov esi, [ebx+16]; next: cmp byte [esi], 0; je done; outsb; jmp next
    code.extend([0x8b, 0x73, 0x10, 0x80, 0x3e, 0x00, 0x74, 0x03, 0x6e, 0xeb, 0xf8]);
    // done: mov dx, 605h; mov al, 20h; out dx, al; cli; hlt; jmp $-1
    code.extend([0x66, 0xba, 0x05, 0x06, 0xb0, 0x20, 0xee, 0xfa, 0xf4, 0xeb, 0xfd]);
    let mut elf = vec![0u8; 84];
    let mut put = |at: usize, v: &[u8]| elf[at..at + v.len()].copy_from_slice(v);
    put(0, b"\x7fELF\x01\x01\x01");
    put(16, &[2, 0, 3, 0, 1]);
    put(24, &(load + 12).to_le_bytes());
    put(28, &52u32.to_le_bytes());
    put(40, &[52, 0, 32, 0, 1]);
    let len = code.len() as u32;
    for (i, v) in [1u32, 84, load, load, len, len, 5, 4].iter().enumerate() {
        put(52 + 4 * i, &v.to_le_bytes());
    }
    elf.extend(code);
    elf
}

#[test]
fn multiboot_kernels_get_command_line_and_modules() {
    on_each(|accel| {
        let dir = Dir::new("multiboot");
        let (kernel, module) = (dir.file("k", &multiboot()), dir.file("m", b"MODULE"));
        let module = format!("{module} its words");
        let words = ["--accel", accel, "--kernel", &kernel, "--module", &module];
        let out = finish(run(&words).args(["--append", "a b=c"]), LIMIT);
        assert_eq!(out.status.code(), Some(0), "{accel}: {}", text(&out.stderr));
        assert_eq!(text(&out.stdout), format!("MODU{kernel} a b=c"), "{accel}");
    });
}
