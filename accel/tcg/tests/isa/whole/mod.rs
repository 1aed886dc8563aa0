//! Whole programs on a whole translated processor, beside the host processor: general, vector, mask
//! and x87 registers, MXCSR, flags, memory, and the exception that ends each.
//!
//! ```text
//!   generate ──► Program ──► host: trampoline, signal ──┐
//!                      └───► guest: JIT, interpreter ───┴──► compare ──► shrink ──► one line
//! ```
//!
//! [`cases`] runs the lines of `cases.txt`; [`fuzz`] runs random programs and prints such a line for
//! what differs. All of it runs on one thread of a process of its own ([`alone`]): the oracle needs
//! the address space below 4 GiB, signals and a system-call filter to itself.

mod cases;
mod compare;
mod coverage;
mod excuse;
mod fuzz;
mod garbage;
mod generate;
mod guest;
mod hide;
mod host;
mod layout;
mod program;
mod shrink;
mod start;
mod state;

/// Runs the ignored test `name` in a process of its own.
fn alone(name: &str) {
    let me = std::env::current_exe().expect("a path");
    let out = std::process::Command::new(me)
        .args(["--ignored", "--exact", name, "--nocapture"])
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name}: {}\n{text}", out.status);
    for line in String::from_utf8_lossy(&out.stdout).lines().filter(|l| l.starts_with("skipped")) {
        println!("{line}");
    }
}
