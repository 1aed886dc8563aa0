//! `-d`: what the translator sees and makes, to a file or to standard error.

mod vm;

use std::time::Duration;
use vm::flat::Flat;
use vm::{Dir, finish, run, text};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a guest that writes to isa-debug-exit with these flags; returns the log.
fn log(name: &str, flags: &[&str]) -> Option<String> {
    if let Some(why) = vm::unusable("tcg") {
        vm::skip(&format!("accelerator tcg: {why}"));
        return None;
    }
    let dir = Dir::new(name);
    let image = dir.file("guest", &Flat::default().out(0xf4, 1).halt().0);
    let file = dir.path("log").display().to_string();
    let words = ["--accel", "tcg", "--kernel", &image, "--kernel-format", "flat", "-D", &file];
    let devices = ["--device", "isa-debug-exit,iobase=0xf4"];
    let out = finish(run(&words).args(devices).args(flags), LIMIT);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    Some(std::fs::read_to_string(file).unwrap())
}

#[test]
fn every_item_shows_its_part() {
    let Some(l) = log("items", &["-d", "in_asm,op,out_asm,cpu,exec,nochain"]) else { return };
    for words in ["mov dx,0F4h", "out dx,al", "block 0x7c00", "OUT: [size=", "Trace 0:"] {
        assert!(l.contains(words), "no {words:?} in\n{l}");
    }
    let Some(l) = log("one", &["-d", "in_asm", "--one-insn-per-tb"]) else { return };
    assert!(l.matches("IN: ").count() >= 3, "{l}");
}

#[test]
fn the_filter_restricts_it() {
    let Some(l) = log("filter", &["-d", "in_asm", "--dfilter", "0x100000+0x1000"]) else { return };
    assert_eq!(l, "");
    let Some(l) = log("filter2", &["-d", "in_asm", "--dfilter", "0x7c00..0x7cff"]) else { return };
    assert!(l.contains("out dx,al"), "{l}");
}
