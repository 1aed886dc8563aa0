//! The programs of `cases.txt`: what once differed.

use super::compare::{Lab, Verdict};
use super::host;
use super::layout::Memory;
use super::program::{Item, Program, decode};
use super::state::State;

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal");
    (0..hex.len() / 2).map(|i| digit(2 * i)).collect()
}

/// The program of a line: name, code size, code, then words as [`super::shrink::line`] writes them.
/// The third is the vendor of the only processors that can judge it, if the architecture leaves
/// what happens to the implementation.
fn parse(line: &str) -> (&str, Program, Option<&str>) {
    let text = line.split('#').next().unwrap_or_default();
    let mut words = text.split_whitespace();
    let mut next = || words.next().unwrap_or_else(|| panic!("too short: {line}"));
    let (name, bits, code) = (next(), next(), next());
    let bits: u32 = bits.parse().expect("a code size");
    let mut p = Program {
        bits,
        offset: 0x200,
        items: Vec::new(),
        state: State::default(),
        memory: Memory::default(),
    };
    let mut vendor = None;
    for w in words {
        let (key, value) = w.split_once('=').unwrap_or_else(|| panic!("{name}: {w}"));
        if key == "at" {
            p.offset = u64::from_str_radix(value, 16).expect("an offset");
        } else if key == "vendor" {
            vendor = Some(value);
        } else if let Some((what, at)) = key.split_once('+') {
            let at = usize::from_str_radix(at, 16).expect("an offset");
            let to = if what == "data" { &mut p.memory.data } else { &mut p.memory.read_only };
            let b = bytes(value);
            to[at..at + b.len()].copy_from_slice(&b);
        } else {
            p.state.set(key, value).unwrap_or_else(|| panic!("{name}: {w}"));
        }
    }
    let insns = decode(&bytes(code), bits, p.start());
    let find = |to: u64| {
        let here = insns.iter().position(|i| i.ip() == to);
        here.unwrap_or(insns.len())
    };
    p.items = insns
        .iter()
        .map(|i| {
            let target = i.is_jmp_short_or_near()
                || i.is_jcc_short_or_near()
                || i.is_call_near()
                || i.is_jcx_short()
                || i.is_loop()
                || i.is_loopcc();
            let target = target.then(|| find(i.near_branch_target()));
            Item { insn: *i, target, flow: None, hidden: false }
        })
        .collect();
    (name, p, vendor)
}

#[test]
fn cases() {
    super::alone("whole::cases::here");
}

/// `ISA_CASE`: the lines to run instead of `cases.txt`.
#[test]
#[ignore = "run by `cases` in a process of its own"]
fn here() {
    let mut lab = Lab::new();
    let mut failed = 0;
    let mut others = Vec::new();
    let own = std::env::var("ISA_CASE");
    let text = own.as_deref().unwrap_or(include_str!("cases.txt"));
    for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let (name, p, vendor) = parse(line);
        if vendor.is_some_and(|v| v != host::vendor()) {
            others.push(name);
            continue;
        }
        match lab.compare_all(&p) {
            Verdict::Same(_) => {}
            Verdict::Useless => panic!("{name} cannot be compared"),
            Verdict::Different(text) => {
                eprintln!("{name}: {text}");
                failed += 1;
            }
        }
    }
    if !others.is_empty() {
        println!("skipped: another vendor's processor must judge {}", others.join(", "));
    }
    assert_eq!(failed, 0, "cases differ from the host");
}
