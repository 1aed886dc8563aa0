//! Guest time from executed instructions: the same input gives the same run, to the last byte on the
//! serial port and the last instruction; and what the flags refuse.

mod vm;

use std::time::Duration;
use vm::{finish, guest_file, run, skip, text};

/// Generous: hosts are shared, and an unoptimised tandem translates slowly.
const LIMIT: Duration = Duration::from_secs(300);

/// What a boot to power-off writes: on the serial port, and about the number of instructions.
fn boot(more: &[&str]) -> Option<(String, String)> {
    let (Some(kernel), Some(initrd)) = (guest_file("vmlinuz-6.1"), guest_file("initramfs-6.1"))
    else {
        skip("guest vmlinuz-6.1 is missing; run scripts/setup");
        return None;
    };
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    // All the kernel says, with guest time before each line.
    let append = "console=ttyS0 tandem.poweroff";
    let words = ["--kernel", &kernel, "--initrd", &initrd, "--append", append];
    let out = finish(run(&words).args(more), LIMIT);
    let (said, errors) = (text(&out.stdout), text(&out.stderr));
    assert_eq!(out.status.code(), Some(0), "{more:?}: {said}\n{errors}");
    assert!(said.contains("tandem-init: uptime"), "{more:?}: {said}");
    let count = errors.lines().find(|l| l.contains("instructions")).unwrap_or("").to_string();
    Some((said, count))
}

fn same_twice(words: &[&str]) {
    let (Some(a), Some(b)) = (boot(words), boot(words)) else { return };
    assert!(a.1.contains("executed"), "{a:?}");
    assert_eq!(a.1, b.1);
    assert_eq!(a.0, b.0);
}

#[test]
fn two_runs_are_the_same() {
    same_twice(&["--icount", "2,sleep=off"]);
}

#[test]
fn two_runs_with_several_processors_are_the_same() {
    same_twice(&["--smp", "3", "--icount", "1"]);
}

#[test]
fn several_processors_on_one_thread() {
    let Some((said, count)) = boot(&["--accel", "tcg,thread=single", "--smp", "2"]) else { return };
    assert!(said.contains("Brought up 1 node, 2 CPUs"), "{said}");
    assert_eq!(count, "");
}

#[test]
fn time_near_the_host_s() {
    boot(&["--icount", "auto"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (words, why) in [
        (["--icount", "11", "--accel", "tcg"], "0 to 10"),
        (["--icount", "2,doze=on", "--accel", "tcg"], "sleep=on or sleep=off"),
        (["--icount", "2", "--accel", "kvm"], "add tcg to --accel"),
        (["--kernel", "x", "--accel", "tcg,sleep=off"], "icount"),
    ] {
        let out = finish(&mut run(&words), LIMIT);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(why), "{words:?}: {said}");
    }
}
