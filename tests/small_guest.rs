//! The small guest of tests/guest: the same verdict on every accelerator, through both of its
//! entries.

mod vm;

use std::time::Duration;
use vm::{Dir, finish, run, text};

const LIMIT: Duration = Duration::from_secs(120);

fn passes(accel: &str, format: &str) {
    if let Some(why) = vm::unusable(accel) {
        return vm::skip(&format!("accelerator {accel}: {why}"));
    }
    let dir = Dir::new(&format!("small-{}-{format}", accel.replace(',', "-")));
    let image = dir.file("guest", tandem_guest::IMAGE);
    let words = ["--accel", accel, "--kernel", &image, "--kernel-format", format, "-m", "32M"];
    let devices = tandem_guest::DEVICES.iter().flat_map(|d| ["--device", *d]);
    let out = finish(run(&words).args(devices), LIMIT);
    let (serial, said) = (text(&out.stdout), text(&out.stderr));
    let verdict = tandem_guest::judge(out.status.code(), &serial);
    assert_eq!(verdict, Ok(()), "{accel}, {format}:\n{serial}\n{said}");
}

#[test]
fn kvm_multiboot() {
    passes("kvm", "multiboot");
}

#[test]
fn kvm_flat() {
    passes("kvm", "flat");
}

#[test]
fn tcg_multiboot() {
    passes("tcg", "multiboot");
}

#[test]
fn tcg_flat() {
    passes("tcg", "flat");
}

#[test]
fn interpreter_multiboot() {
    passes("tcg,backend=interp", "multiboot");
}

#[test]
fn one_instruction_per_block() {
    passes("tcg,one-insn-per-tb=on", "multiboot");
}

#[test]
fn the_doctor_proves_what_works() {
    let out = finish(vm::tandem().arg("doctor"), LIMIT);
    let report = text(&out.stdout);
    for accel in ["kvm", "tcg"] {
        let works = report.contains(&format!("{accel}: works"));
        if works {
            assert!(report.contains(&format!("--accel {accel}: ran in")), "{report}");
        } else {
            let why = report.contains("why: ") && report.contains("fix: ");
            assert!(why || report.contains("failed after"), "{report}");
        }
    }
    let any = report.contains(": works");
    assert_eq!(out.status.code(), Some(if any { 0 } else { 6 }), "{report}");
}
