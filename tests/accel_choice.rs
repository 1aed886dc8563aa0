//! Which accelerator runs a machine, and what is said about it, for a user who may not open
//! /dev/kvm.

mod vm;

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::Duration;
use vm::flat::Flat;
use vm::{Dir, finish, run, text};

const LIMIT: Duration = Duration::from_secs(60);
const NOBODY: u32 = 65534;

/// Runs a guest that powers off at once, as nobody. `None` if this test cannot become nobody, or
/// nobody may open /dev/kvm here, or there is none.
fn as_nobody(accel: Option<&str>) -> Option<Output> {
    // SAFETY: no memory is passed.
    if unsafe { libc::geteuid() } != 0 {
        vm::skip("only root can become a user without access to /dev/kvm");
        return None;
    }
    let may_open = Command::new("test").args(["-r", "/dev/kvm"]).uid(NOBODY).gid(NOBODY).status();
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there || may_open.is_ok_and(|s| s.success()) {
        vm::skip("there is no /dev/kvm that some user may not open");
        return None;
    }
    let dir = Dir::new(&format!("nobody-{}", accel.unwrap_or("default").replace(':', "-")));
    let image = dir.file("guest", &Flat::default().out(0x605, 0x20).halt().0);
    // The build directory may be closed to others. Another process copies, because a file that
    // this one has open for writing when another test forks cannot be run for a while.
    let program = dir.path("tandem");
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_tandem")).arg(&program).status();
    assert!(copied.is_ok_and(|s| s.success()), "cannot copy the binary");
    let mut command = Command::new(program);
    command.args(run(&["--kernel", &image, "--kernel-format", "flat", "-m", "16M"]).get_args());
    command.args(accel.map(|a| ["--accel", a]).into_iter().flatten());
    Some(finish(command.uid(NOBODY).gid(NOBODY).stdin(std::process::Stdio::null()), LIMIT))
}

#[test]
fn auto_takes_tcg_and_says_why_in_one_line() {
    for accel in [None, Some("auto"), Some("kvm:tcg")] {
        let Some(out) = as_nobody(accel) else { return };
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{accel:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{accel:?}: {said}");
        for words in ["tcg", "/dev/kvm", "permission denied", ";"] {
            assert!(said.contains(words), "{accel:?}: no {words:?} in {said}");
        }
    }
}

#[test]
fn kvm_never_falls_back() {
    let Some(out) = as_nobody(Some("kvm")) else { return };
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(6), "{said}");
    assert!(said.contains("error: /dev/kvm: permission denied; "), "{said}");
}

#[test]
fn tcg_says_nothing() {
    let Some(out) = as_nobody(Some("tcg")) else { return };
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), String::new()));
}
