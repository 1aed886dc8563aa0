//! The user's terminal as the guest's serial port: raw while the guest runs, as it was after every
//! way out, with the escape keys in between.

mod vm;

use std::time::Duration;
use vm::flat::Flat;
use vm::pty::Terminal;
use vm::{Dir, run};

const LIMIT: Duration = Duration::from_secs(60);

/// A terminal in which a guest that echoes its input has said "ready"; `None` if no accelerator
/// works here. Returns also the modes before.
fn echo(dir: &Dir, guest: Flat) -> Option<(Terminal, String)> {
    let accel = vm::any_accelerator()?;
    let image = dir.file("echo", &guest.0);
    let mut t = Terminal::prepare();
    let before = t.modes();
    t.spawn(&mut run(&["--accel", accel, "--kernel", &image, "--kernel-format", "flat"]));
    t.expect("ready", LIMIT);
    assert_ne!(t.modes(), before, "the terminal is raw while the guest runs");
    Some((t, before))
}

fn echoing() -> Flat {
    Flat::default().print("ready").echo()
}

#[test]
fn ctrl_a_x_quits() {
    let dir = Dir::new("quit");
    let Some((mut t, before)) = echo(&dir, echoing()) else { return };
    t.send(b"hello");
    t.expect("readyhello", LIMIT);
    // Ctrl-C belongs to the guest.
    t.send(b"\x03z");
    t.expect("hello\x03z", LIMIT);
    t.send(b"\x01h");
    t.expect("Ctrl-A x", LIMIT);
    t.send(b"\x01\x01y");
    t.expect("\x01y", LIMIT);
    t.send(b"\x01x");
    assert_eq!(t.wait(LIMIT).code(), Some(0));
    assert_eq!(t.modes(), before);
}

#[test]
fn ctrl_a_x_quits_although_the_guest_reads_nothing() {
    let dir = Dir::new("deaf");
    let Some((mut t, before)) = echo(&dir, Flat::default().print("ready").spin()) else { return };
    for _ in 0..20 {
        t.send(&[b'x'; 500]);
        std::thread::sleep(Duration::from_millis(5));
    }
    t.send(b"\x01x");
    assert_eq!(t.wait(LIMIT).code(), Some(0));
    assert_eq!(t.modes(), before);
}

#[test]
fn signals_that_ask_for_an_end_restore_the_terminal() {
    use std::os::unix::process::ExitStatusExt;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let dir = Dir::new(&format!("signal{signal}"));
        let Some((mut t, before)) = echo(&dir, echoing()) else { return };
        t.signal(signal);
        assert_eq!(t.wait(LIMIT).signal(), Some(signal));
        assert_eq!(t.modes(), before, "after signal {signal}");
    }
}

#[test]
fn crashes_restore_the_terminal() {
    use std::os::unix::process::ExitStatusExt;
    for signal in [libc::SIGSEGV, libc::SIGABRT, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
        let dir = Dir::new(&format!("crash{signal}"));
        let Some((mut t, before)) = echo(&dir, echoing()) else { return };
        // A signal that was sent is not repeated by returning to an instruction, so an earlier
        // handler may need a second one.
        for _ in 0..50 {
            t.signal(signal);
            std::thread::sleep(Duration::from_millis(20));
            if t.has_ended() {
                break;
            }
        }
        assert_eq!(t.wait(LIMIT).signal(), Some(signal));
        assert_eq!(t.modes(), before, "after signal {signal}");
    }
}

#[test]
fn the_guests_end_restores_the_terminal() {
    let dir = Dir::new("end");
    // The triple fault comes when a key does, so that the raw mode can be seen first.
    let mut guest = Flat::default().print("ready");
    guest.0.extend([0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
    let Some((mut t, before)) = echo(&dir, guest.triple_fault()) else { return };
    t.send(b"k");
    assert_eq!(t.wait(LIMIT).code(), Some(4), "{}", t.seen);
    assert!(t.seen.contains("triple-faulted"), "{}", t.seen);
    assert_eq!(t.modes(), before);
}

#[test]
fn suspension_gives_the_terminal_to_the_shell_and_back() {
    let dir = Dir::new("stop");
    let Some((mut t, before)) = echo(&dir, echoing()) else { return };
    let raw = t.modes();
    t.signal(libc::SIGTSTP);
    t.expect_modes(|m| m == before, LIMIT);
    t.signal(libc::SIGCONT);
    t.expect_modes(|m| m == raw, LIMIT);
    t.send(b"back");
    t.expect("back", LIMIT);
    t.send(b"\x01x");
    assert_eq!(t.wait(LIMIT).code(), Some(0));
    assert_eq!(t.modes(), before);
}
