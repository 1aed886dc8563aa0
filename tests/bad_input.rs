//! Bad input: each fault is one sentence that names the thing and the remedy, all faults come at
//! once, the status is 2, and the terminal is left alone.

mod vm;

use std::time::Duration;
use vm::{Dir, finish, run, text};

const LIMIT: Duration = Duration::from_secs(20);

/// Runs with `words`; there must be one line for each of `expected`, which holds all its parts.
fn refused(words: &[&str], expected: &[&[&str]]) {
    let out = finish(&mut run(words), LIMIT);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{words:?}: {err}");
    assert_eq!(text(&out.stdout), "", "{words:?}");
    for parts in expected {
        let found = err.lines().any(|l| parts.iter().all(|p| l.contains(p)));
        assert!(found, "{words:?}: no line with {parts:?} in:\n{err}");
    }
    assert_eq!(err.lines().count(), expected.len(), "{words:?}:\n{err}");
}

#[test]
fn each_fault_names_the_thing_and_the_remedy() {
    let dir = Dir::new("bad");
    let good = &*dir.file("flat", b"\xf4");
    let flat = ["--kernel", good, "--kernel-format", "flat"];
    let with = |more: &[&'static str]| [&flat[..], more].concat();
    refused(&[], &[&["nothing to boot", "--kernel"]]);
    refused(&["--kernel", "/nonexistent/k"], &[&["'/nonexistent/k'", "no such file", "check"]]);
    refused(&["--kernel", "/etc/passwd"], &[&["'/etc/passwd'", "not a kernel", "give a kernel"]]);
    refused(&["--kernel", "/tmp"], &[&["'/tmp'", "not a regular file"]]);
    refused(&with(&["-m", "3"]), &[&["3M", "too little", "-m"]]);
    refused(&with(&["-m", "lots"]), &[&["'lots'", "512M"]]);
    refused(&with(&["-m", "9999T"]), &[&["9999T", "at most"]]);
    refused(&with(&["--smp", "0"]), &[&["--smp 0", "1 or more"]]);
    refused(&with(&["--smp", "256"]), &[&["256", "1 to 255"]]);
    refused(&with(&["--cpu", "qemu46"]), &[&["'qemu46'", "qemu64"]]);
    refused(&with(&["--cpu", "max,+warp"]), &[&["warp", "feature"]]);
    refused(&with(&["--accel", "kwm"]), &[&["'kwm'", "kvm"]]);
    refused(&with(&["--accel", "tcg,backend=fast"]), &[&["backend=fast", "jit, interp"]]);
    refused(&with(&["--machine", "pc"]), &[&["'pc'", "q35"]]);
    refused(&with(&["--serial", "file:/nonexistent/x"]), &[&["'/nonexistent/x'", "directory"]]);
    refused(&with(&["--serial", "file:/proc"]), &[&["'/proc'", "is a directory"]]);
    refused(&with(&["--serial", "tty"]), &[&["'tty'", "'pty'"]]);
    refused(&with(&["-d", "ints"]), &[&["'ints'", "int"]]);
    refused(&with(&["--device", "no-such-device"]), &[&["no-such-device", "--device help"]]);
}

#[test]
fn an_initrd_that_does_not_fit_says_how_much_is_missing() {
    let Some(kernel) = vm::guest_file("vmlinuz-6.1") else {
        return vm::skip("no guest kernel; run scripts/setup");
    };
    let dir = Dir::new("initrd");
    let initrd = dir.path("i");
    let file = std::fs::File::create(&initrd).unwrap();
    file.set_len(100 << 20).unwrap();
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    refused(
        &["--kernel", &kernel, "--initrd", &initrd, "-m", "128M"],
        &[&["initrd", "100 MiB", "does not fit", "MiB more with -m"]],
    );
    refused(&["--kernel", &kernel, "-m", "32M"], &[&["vmlinuz", "unpack", "at least -m"]]);
}

#[test]
fn several_faults_come_at_once() {
    refused(
        &[
            "--kernel",
            "/nonexistent/k",
            "--initrd",
            "/nonexistent/i",
            "-m",
            "3",
            "--smp",
            "0",
            "--cpu",
            "x86-64-v9",
            "--accel",
            "tgc",
            "--serial",
            "file:/nonexistent/s",
        ],
        &[
            &["3M"],
            &["--smp 0"],
            &["x86-64-v9"],
            &["'tgc'"],
            &["'/nonexistent/s'"],
            &["'/nonexistent/k'"],
            &["'/nonexistent/i'"],
        ],
    );
}

#[test]
fn unknown_flags_are_usage_errors_with_a_suggestion() {
    let out = finish(&mut run(&["--kernal", "x"]), LIMIT);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("--kernel"), "{}", text(&out.stderr));
    let out = finish(vm::tandem().arg("--version"), LIMIT);
    assert_eq!(out.status.code(), Some(0));
    assert!(text(&out.stdout).starts_with("tandem "));
    let out = finish(&mut run(&["--help"]), LIMIT);
    assert!(text(&out.stdout).contains("Exit status"));
}

#[test]
fn a_fault_leaves_the_terminal_as_it_was() {
    let mut t = vm::pty::Terminal::prepare();
    let before = t.modes();
    t.spawn(&mut run(&["--kernel", "/nonexistent/k"]));
    let status = t.wait(LIMIT);
    assert_eq!(status.code(), Some(2));
    assert_eq!(t.modes(), before);
}
