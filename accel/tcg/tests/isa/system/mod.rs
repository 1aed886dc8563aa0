//! System code, judged by the manual: what each piece of code in `cases.txt` ends with, in its mode and
//! ring, on both back ends.

mod machine;

use machine::{CODE, End, Machine, Setting};
use tandem_accel::x86::X86State;
use tandem_tcg::BackendKind;

/// Names of the vectors from 0 (SDM vol. 3 table 6-1).
const VECTORS: [&str; 20] = [
    "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF", "15",
    "MF", "AC", "MC", "XM",
];
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// A line of `cases.txt`.
struct Case<'a> {
    name: &'a str,
    setting: Setting,
    code: Vec<u8>,
    /// What differs from the usual start.
    given: Vec<(&'a str, &'a str)>,
    end: End,
    /// What else must hold at the end.
    then: Vec<(&'a str, &'a str)>,
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("not a hexadecimal number: {text}"))
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| number(&hex[2 * i..2 * i + 2]) as u8).collect()
}

fn pairs<'a>(words: impl Iterator<Item = &'a str>) -> Vec<(&'a str, &'a str)> {
    words.map(|w| w.split_once('=').unwrap_or_else(|| panic!("not name=value: {w}"))).collect()
}

/// `hlt@RIP`, `VECTOR@RIP`, `VECTOR(ERROR)@RIP` or `shutdown`.
fn end(text: &str) -> End {
    if text == "shutdown" {
        return End::TripleFault;
    }
    let (what, rip) = text.split_once('@').unwrap_or_else(|| panic!("no end: {text}"));
    let rip = number(rip);
    if what == "hlt" {
        return End::Halted(rip);
    }
    let (name, error) = match what.split_once('(') {
        Some((name, error)) => (name, Some(number(error.trim_end_matches(')')))),
        None => (what, None),
    };
    let v = VECTORS.iter().position(|n| *n == name);
    let v = v.map_or_else(|| number(name.trim_start_matches("int")) as u8, |v| v as u8);
    End::Vector(v, error, rip)
}

fn parse(line: &str) -> Case<'_> {
    let text = line.split('#').next().unwrap_or_default();
    let (before, after) = text.split_once("=>").unwrap_or_else(|| panic!("no end: {line}"));
    let mut words = before.split_whitespace();
    let mut next = || words.next().unwrap_or_else(|| panic!("too short: {line}"));
    let (name, setting, code) = (next(), next(), next());
    let setting = Setting::parse(setting).unwrap_or_else(|| panic!("no such mode: {line}"));
    let given = pairs(words);
    let mut words = after.split_whitespace();
    let end = end(words.next().unwrap_or_default());
    Case { name, setting, code: bytes(code), given, end, then: pairs(words) }
}

/// A field of the state by name.
fn field<'a>(s: &'a mut X86State, name: &str) -> &'a mut u64 {
    if let Some(i) = REGISTERS.iter().position(|r| *r == name) {
        return &mut s.gpr[i];
    }
    match name {
        "flags" => &mut s.rflags,
        "cr0" => &mut s.cr0,
        "cr2" => &mut s.cr2,
        "cr3" => &mut s.cr3,
        "cr4" => &mut s.cr4,
        "efer" => &mut s.efer,
        "xcr0" => &mut s.xcr0,
        "dr0" => &mut s.dr[0],
        "dr1" => &mut s.dr[1],
        "dr2" => &mut s.dr[2],
        "dr3" => &mut s.dr[3],
        "dr6" => &mut s.dr6,
        "dr7" => &mut s.dr7,
        _ => panic!("no such state: {name}"),
    }
}

/// `name=value` sets, `name+=value` and `name-=value` set and clear bits, `at:ADDRESS=bytes` writes memory.
fn give(m: &Machine, s: &mut X86State, name: &str, value: &str) {
    if let Some(at) = name.strip_prefix("at:") {
        return m.poke(number(at), &bytes(value));
    }
    let v = number(value);
    match name {
        "pkru" => s.pkru = v as u32,
        "mxcsr" => s.fpu.mxcsr = v as u32,
        "fcw" => s.fpu.fcw = v as u16,
        "fsw" => s.fpu.fsw = v as u16,
        _ => match (name.strip_suffix('+'), name.strip_suffix('-')) {
            (Some(name), _) => *field(s, name) |= v,
            (_, Some(name)) => *field(s, name) &= !v,
            _ => *field(s, name) = v,
        },
    }
}

/// What is not as it should be; empty if all is.
fn run(m: &mut Machine, c: &Case) -> String {
    let mut s = m.set_up(c.setting, &c.code);
    for (name, value) in &c.given {
        give(m, &mut s, name, value);
    }
    let (end, mut after) = m.run(c.setting, &s);
    if end != c.end {
        return format!("{end:x?}, not {:x?} (CR2 {:#x})", c.end, after.cr2);
    }
    for (name, value) in &c.then {
        let (want, got) = match name.strip_prefix("at:") {
            Some(at) => (number(value), m.peek(number(at), value.len() as u64 / 2)),
            None => (number(value), *field(&mut after, name)),
        };
        if want != got {
            return format!("{name} is {got:#x}, not {want:#x}");
        }
    }
    String::new()
}

#[test]
fn code_ends_as_the_manual_says() {
    let mut wrong = Vec::new();
    for (backend, name) in [(BackendKind::Jit, "JIT"), (BackendKind::Interp, "interpreter")] {
        let mut m = Machine::new(backend);
        let lines = include_str!("cases.txt").lines();
        for line in lines.filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let case = parse(line);
            assert!(case.code.len() < 0x2000 && CODE > 0, "{}: too long", case.name);
            let text = run(&mut m, &case);
            if !text.is_empty() {
                wrong.push(format!("{name}: {}: {text}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
