//! Text cases: IR in, expected state out, on every back end, with and without the passes.
//!
//! A case file under `tests/ir/` holds cases of this form (`;` starts a comment):
//!
//! ```text
//! === name
//! %rax = 0x10            ; state before: globals, vec, mxcsr, scratch, mem
//! vec3 = 00 01 02 …      ; bytes from the lowest; the rest of the register is 0
//! mem 0x10000 = ff 00
//! ---
//! insn 0x1000 3          ; the block, as documented in tandem_jit::ir::print
//! …
//! ---
//! leave chain            ; chain | fault | request | lookup | page | trap | illegal | number
//! %rax = 0x11            ; state after: what is not mentioned must be as before
//! ```
//!
//! `SCRATCH1` in a block is the `Env` offset of state field 1.
//!
//! Globals that the "after" part does not name must be unchanged, except the pc. Memory and vector
//! registers are compared where named.

mod harness;

use harness::{GLOBALS, Machine, PC, RAM, backends, target};
use tandem_jit::ir::{Block, Verifier, parse};
use tandem_jit::target::*;

struct Case {
    name: String,
    before: Vec<String>,
    block: String,
    after: Vec<String>,
}

fn cases(text: &str) -> Vec<Case> {
    let mut out: Vec<Case> = Vec::new();
    let mut part = 0;
    for line in text.lines() {
        let bare = line.split(';').next().unwrap_or("").trim();
        if let Some(name) = bare.strip_prefix("===") {
            let name = name.trim().to_string();
            out.push(Case { name, before: vec![], block: String::new(), after: vec![] });
            part = 0;
        } else if bare == "---" {
            part += 1;
        } else if let (Some(case), false) = (out.last_mut(), bare.is_empty()) {
            match part {
                0 => case.before.push(bare.into()),
                1 => case.block.push_str(&format!("{bare}\n")),
                _ => case.after.push(bare.into()),
            }
        }
    }
    out
}

fn number(s: &str) -> u64 {
    let s = s.trim();
    match s.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => s.parse(),
    }
    .unwrap_or_else(|_| panic!("{s:?} is not a number"))
}

fn bytes(s: &str) -> Vec<u8> {
    s.split_whitespace().map(|b| u8::from_str_radix(b, 16).expect("a hex byte")).collect()
}

fn global(name: &str) -> usize {
    GLOBALS.iter().position(|g| *g == name).unwrap_or_else(|| panic!("no global {name}"))
}

/// Applies a state line; with `check`, compares instead.
fn state_line(m: &mut Machine, line: &str, check: bool) {
    let (what, value) = line.split_once('=').expect("`thing = value`");
    let (what, value) = (what.trim(), value.trim());
    let one = |slot: &mut u64| {
        let v = number(value);
        if check {
            assert_eq!(*slot, v, "{what}: is {slot:#x}, expected {v:#x}");
        } else {
            *slot = v;
        }
    };
    let many = |slot: &mut [u8]| {
        let v = bytes(value);
        if check {
            assert_eq!(slot[..v.len()], v, "{what}");
        } else {
            slot[..v.len()].copy_from_slice(&v);
        }
    };
    let word = |slot: &mut u32| {
        let mut v = u64::from(*slot);
        one(&mut v);
        *slot = v as u32;
    };
    if let Some(g) = what.strip_prefix('%') {
        one(&mut m.env().globals[global(g)]);
    } else if let Some(n) = what.strip_prefix("vec") {
        many(&mut m.env().vec[number(n) as usize]);
    } else if let Some(n) = what.strip_prefix("scratch") {
        one(&mut m.env().scratch[number(n) as usize]);
    } else if let Some(n) = what.strip_prefix("opmask") {
        one(&mut m.env().opmask[number(n) as usize]);
    } else if let Some(n) = what.strip_prefix("code_map") {
        word(&mut m.env().code_map[number(n) as usize]);
    } else if let Some(addr) = what.strip_prefix("mem") {
        let at = (number(addr) - RAM.start) as usize;
        many(&mut m.world().ram[at..]);
    } else {
        match what {
            "mxcsr" => word(&mut m.env().mxcsr),
            "exit_request" => word(&mut m.env().exit_request),
            "fault" => word(&mut m.env().fault),
            "fault_addr" => one(&mut m.env().fault_addr),
            "exit_ref" => one(&mut m.env().exit_ref),
            "mmio" => {
                let log: Vec<String> =
                    m.world().mmio_log.iter().map(|(a, v)| format!("{a:x}:{v:02x}")).collect();
                assert!(check, "the device's log is a result");
                assert_eq!(log.join(" "), value);
            }
            _ => panic!("unknown state {what:?}"),
        }
    }
}

fn leave_code(s: &str) -> u32 {
    match s {
        "fault" => LEAVE_FAULT,
        "request" => LEAVE_REQUEST,
        "chain" => LEAVE_CHAIN,
        "lookup" => LEAVE_LOOKUP,
        "page" => LEAVE_PAGE,
        "trap" => LEAVE_TRAP,
        "illegal" => LEAVE_ILLEGAL,
        n => number(n) as u32,
    }
}

fn run(case: &Case, block: &Block, mut m: Machine) {
    for line in &case.before {
        state_line(&mut m, line, false);
    }
    let before = m.env().globals;
    let code = m.add(block).checked;
    let leave = m.run(code);
    let mut named = vec![PC];
    for line in &case.after {
        match line.strip_prefix("leave ") {
            Some(expected) => {
                assert_eq!(leave, leave_code(expected), "left with {leave:#x}, not {expected}");
            }
            None => {
                if let Some((g, _)) = line.strip_prefix('%').and_then(|l| l.split_once('=')) {
                    named.push(global(g.trim()));
                }
                state_line(&mut m, line, true);
            }
        }
    }
    for (i, old) in before.into_iter().enumerate() {
        if !named.contains(&i) {
            assert_eq!(m.env().globals[i], old, "%{} changed", GLOBALS[i]);
        }
    }
}

fn run_file(text: &str) {
    let target = target();
    for case in cases(text) {
        println!("case {}", case.name);
        let text = case.block.replace("SCRATCH1", &harness::scratch(1).to_string());
        let mut block = parse(&text, &target).unwrap_or_else(|e| panic!("{e}"));
        Verifier::default().check(&block, &target).unwrap_or_else(|e| panic!("{e}"));
        let text = block.listing(Some(&target)).to_string();
        let again = parse(&text, &target).unwrap_or_else(|e| panic!("{e} in\n{text}"));
        assert_eq!(text, again.listing(Some(&target)).to_string(), "round trip");
        let bare = block.listing(None).to_string();
        assert_eq!(text, parse(&bare, &target).unwrap().listing(Some(&target)).to_string());
        block.pc = if block.pc == 0 { 0x1000 } else { block.pc };
        for backend in backends(&target) {
            println!("  on {}", backend.name());
            run(&case, &block, Machine::new(backend.clone()));
        }
    }
}

macro_rules! files {
    ($($(#[$attr:meta])* $name:ident),*) => {
        $(#[test]
        $(#[$attr])*
        fn $name() {
            run_file(include_str!(concat!("ir/", stringify!($name), ".ir")));
        })*
    };
}

files!(
    alu,
    shift,
    memory,
    control,
    calls,
    #[cfg(target_arch = "x86_64")]
    native
);
