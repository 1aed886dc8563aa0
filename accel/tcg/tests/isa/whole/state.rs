//! All state that a user program can see, and how a run of one ended.

use std::fmt::Write;
use tandem_tcg::x86::bits::rflags;
use tandem_tcg::x86::exception::vector;

/// RFLAGS bits that are compared: the arithmetic flags, TF, DF, NT, AC, ID.
pub const FLAGS: u64 =
    rflags::ARITH | rflags::DF | rflags::TF | rflags::NT | rflags::AC | rflags::ID;

/// State of a user program.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer, relative to the code segment.
    pub rip: u64,
    /// RFLAGS, [`FLAGS`] only.
    pub flags: u64,
    /// Bases of FS and GS (64-bit code).
    pub fs_gs: [u64; 2],
    /// ZMM0–31.
    pub zmm: [[u8; 64]; 32],
    /// k0–k7.
    pub k: [u64; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// x87 control word.
    pub cw: u16,
    /// x87 status word.
    pub sw: u16,
    /// Bit n set: physical x87 register n is in use.
    pub tags: u8,
    /// ST(0)–ST(7); MMX registers are their low halves when TOP is 0.
    pub st: [[u8; 10]; 8],
}

impl Default for State {
    fn default() -> State {
        State {
            gpr: [0; 16],
            rip: 0,
            flags: 0,
            fs_gs: [0; 2],
            zmm: [[0; 64]; 32],
            k: [0; 8],
            mxcsr: 0x1f80,
            cw: 0x37f,
            sw: 0,
            tags: 0,
            st: [[0; 10]; 8],
        }
    }
}

/// How a run ended: with this exception. Programs end with HLT, which raises #GP(0) in user mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Trap {
    /// Vector.
    pub vector: u8,
    /// Error code, 0 for the vectors that have none.
    pub error: u32,
    /// CR2 of a page fault.
    pub addr: u64,
}

/// What a run left behind.
#[derive(Clone)]
pub struct Outcome {
    /// Registers.
    pub state: State,
    /// How it ended.
    pub trap: Trap,
}

/// Whether exceptions of this vector have an error code.
pub fn has_error(v: u8) -> bool {
    matches!(v, vector::DF | vector::TS..=vector::PF | vector::AC)
}

/// Names of the general registers in cases.
pub const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Bytes of a hexadecimal number, lowest first.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    if text.len() > 2 * N {
        return None;
    }
    let padded = format!("{text:0>width$}", width = 2 * N);
    for (i, b) in out.iter_mut().rev().enumerate() {
        *b = u8::from_str_radix(padded.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

impl State {
    /// What differs from the default state, as `name=hex` words.
    pub fn words(&self) -> String {
        let plain = State::default();
        let mut s = String::new();
        let mut word = |name: &str, v: u64, usual: u64| {
            if v != usual {
                let _ = write!(s, " {name}={v:x}");
            }
        };
        for (name, v) in NAMES.iter().zip(self.gpr) {
            word(name, v, 0);
        }
        word("flags", self.flags, 0);
        word("fs", self.fs_gs[0], 0);
        word("gs", self.fs_gs[1], 0);
        for (i, v) in self.k.iter().enumerate() {
            word(&format!("k{i}"), *v, 0);
        }
        word("mxcsr", self.mxcsr.into(), plain.mxcsr.into());
        word("cw", self.cw.into(), plain.cw.into());
        word("sw", self.sw.into(), 0);
        word("tags", self.tags.into(), 0);
        for (i, v) in self.st.iter().enumerate().filter(|(_, v)| **v != [0; 10]) {
            let _ = write!(s, " st{i}={}", hex(v));
        }
        for (i, v) in self.zmm.iter().enumerate().filter(|(_, v)| **v != [0; 64]) {
            let _ = write!(s, " zmm{i}={}", hex(v).trim_start_matches('0'));
        }
        s
    }

    /// Sets what one word says; `None` if it is not one of [`State::words`].
    pub fn set(&mut self, name: &str, value: &str) -> Option<()> {
        let n = u64::from_str_radix(value, 16);
        if let Some(i) = NAMES.iter().position(|r| *r == name) {
            self.gpr[i] = n.ok()?;
            return Some(());
        }
        match name {
            "flags" => self.flags = n.ok()?,
            "fs" => self.fs_gs[0] = n.ok()?,
            "gs" => self.fs_gs[1] = n.ok()?,
            "mxcsr" => self.mxcsr = n.ok()? as u32,
            "cw" => self.cw = n.ok()? as u16,
            "sw" => self.sw = n.ok()? as u16,
            "tags" => self.tags = n.ok()? as u8,
            _ => {
                let digits = name.trim_start_matches(|c: char| c.is_ascii_alphabetic());
                let i: usize = digits.parse().ok()?;
                match &name[..name.len() - digits.len()] {
                    "k" => *self.k.get_mut(i)? = n.ok()?,
                    "st" => *self.st.get_mut(i)? = bytes(value)?,
                    "zmm" => *self.zmm.get_mut(i)? = bytes(value)?,
                    _ => return None,
                }
            }
        }
        Some(())
    }
}

#[test]
fn words_round_trip() {
    let mut s = State::default();
    s.gpr[9] = 0xdead_beef;
    s.flags = 0x8d5;
    s.zmm[17][40] = 9;
    s.st[3] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
    s.k[2] = u64::MAX;
    s.cw = 0x27f;
    let mut t = State::default();
    for w in s.words().split_whitespace() {
        let (name, value) = w.split_once('=').expect("a word");
        t.set(name, value).expect("a known word");
    }
    assert!(s == t);
}
