//! One program on the host and on the translated processors, compared.

use super::excuse::{self, Sides, is_memory_fault};
use super::guest::Guest;
use super::host::{AMD, Host};
use super::layout::{DATA_LEN, Memory};
use super::program::Program;
use super::state::{NAMES, Outcome, Trap};
use iced_x86::{FlowControl, Mnemonic};
use std::fmt::Write;
use tandem_tcg::BackendKind;
use tandem_tcg::x86::bits::rflags::{ARITH, TF};
use tandem_tcg::x86::exception::vector;

/// The oracle and the machines under test.
pub struct Lab {
    host: Host,
    guests: [(&'static str, Guest); 2],
    /// The host lets unaligned accesses of 16 bytes and more pass under alignment checks.
    lenient: bool,
}

/// What came of a program.
pub enum Verdict {
    /// All agree; so many instructions were executed to the first exception, loops counted once.
    Same(usize),
    /// Somebody differs: who, and in what.
    Different(String),
    /// It cannot be compared: it tried a system call, or has no encoding.
    Useless,
}

/// Bits of a page fault's error code that mean the same on both sides: the host's kernel does not tell
/// which of its own pages are there, to which the last one of the lower half belongs.
fn error_mask(t: &Trap) -> u32 {
    const LAST: u64 = 0x7fff_ffff_f000;
    if t.vector == vector::PF && t.addr >= LAST { !1 } else { !0 }
}

impl Lab {
    /// Once in a process.
    pub fn new() -> Lab {
        Lab {
            host: Host::new(),
            guests: [
                ("JIT", Guest::new(BackendKind::Jit)),
                ("interpreter", Guest::new(BackendKind::Interp)),
            ],
            lenient: super::host::vendor() != AMD,
        }
    }

    /// Runs `p` everywhere, if nothing of it shows what processors do not agree about.
    pub fn judge(&mut self, p: &Program) -> Verdict {
        if p.shows_save_area() { Verdict::Useless } else { self.compare(p, false) }
    }

    /// Runs `p` everywhere and compares all of it.
    pub fn compare_all(&mut self, p: &Program) -> Verdict {
        self.compare(p, true)
    }

    fn compare(&mut self, p: &Program, all: bool) -> Verdict {
        let mut p = p.clone();
        let Some(undefined) = p.undefined_flags() else { return Verdict::Useless };
        let Some(code) = p.assemble() else { return Verdict::Useless };
        let mut memory = p.memory.clone();
        let Some(want) = self.host.run(&p.state, &mut memory, p.bits) else {
            return Verdict::Useless;
        };
        let offset = want.state.rip.wrapping_sub(p.start()) as usize;
        let done = code.starts.iter().position(|&s| s == offset);
        // Whether an empty mask keeps it from faulting is the processor's business (SDM vol. 2).
        use Mnemonic as M;
        let at = done.and_then(|i| p.items.get(i)).map(|i| i.insn.mnemonic());
        if matches!(at, Some(M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)) {
            return Verdict::Useless;
        }
        // A gather may stop half-way for the single-step trap that follows it (SDM vol. 2).
        let stepped = want.trap.vector == vector::DB || p.state.flags & TF != 0;
        let gather = done.and_then(|i| p.items.get(i)).is_some_and(|i| i.insn.is_vsib());
        if stepped && gather {
            return Verdict::Useless;
        }
        // MXCSR.MM is AMD's, and CPUID says that it is not there.
        if want.state.mxcsr >> 16 != 0 {
            return Verdict::Useless;
        }
        if !all && done.is_some_and(|i| i > 0 && p.items[i - 1].hidden) {
            return Verdict::Useless;
        }
        // A jump to nowhere: everything may be undefined by then.
        let mut ignored = done.map_or(ARITH, |i| undefined[i]);
        // A return may lead anywhere: its address may have been changed, or none at all.
        for (item, flags) in p.items.iter().zip(&undefined) {
            if item.insn.flow_control() == FlowControl::Return {
                ignored |= flags;
            }
        }
        if want.trap.vector == vector::DE {
            ignored = ARITH;
        }
        // A page fault or single step in the midst of a repeated comparison takes the flags back to what
        // they were before it (SDM vol. 2B, REP), or leaves them as the last comparison set them (AMD's
        // processors).
        let compares = done.and_then(|i| p.items.get(i)).is_some_and(|i| {
            let repeated = i.insn.has_rep_prefix() || i.insn.has_repne_prefix();
            repeated && i.insn.is_string_instruction() && i.insn.rflags_written() != 0
        });
        if compares && (is_memory_fault(&want.trap) || want.trap.vector == vector::DB) {
            ignored = ARITH;
        }
        for (name, guest) in &mut self.guests {
            let mut m = p.memory.clone();
            let mut got = guest.run(&p.state, &mut m, p.bits);
            if excuse::is_open(&p, &code, &want, &got, self.lenient) {
                return Verdict::Useless;
            }
            let interpreted = *name == "interpreter";
            let insn = done.and_then(|i| p.items.get(i)).map(|i| i.insn);
            let sides =
                Sides { want: &want, want_memory: &memory, got: &mut got, got_memory: &mut m };
            sides.reconcile(insn, p.bits, interpreted, p.state.mxcsr | want.state.mxcsr);
            let text = differences(&want, &memory, &got, &m, ignored);
            if !text.is_empty() {
                return Verdict::Different(format!("{name} differs from the host:\n{text}"));
            }
        }
        Verdict::Same(done.unwrap_or(0))
    }
}

/// What differs, as text.
fn differences(
    want: &Outcome,
    want_memory: &Memory,
    got: &Outcome,
    got_memory: &Memory,
    ignored_flags: u64,
) -> String {
    let mut s = String::new();
    let (a, b) = (&want.state, &got.state);
    let mask = error_mask(&want.trap);
    let trap = |t: Trap| Trap { error: t.error & mask, ..t };
    if trap(want.trap) != trap(got.trap) || a.rip != b.rip {
        let _ = writeln!(
            s,
            "  exception: host {:x?} at {:#x}, translated {:x?} at {:#x}",
            want.trap, a.rip, got.trap, b.rip
        );
    }
    let mut number = |name: &str, x: u64, y: u64| {
        if x != y {
            let _ = writeln!(s, "  {name}: host {x:#x}, translated {y:#x}");
        }
    };
    for (name, (x, y)) in NAMES.iter().zip(a.gpr.iter().zip(&b.gpr)) {
        number(name, *x, *y);
    }
    number("flags", a.flags & !ignored_flags, b.flags & !ignored_flags);
    number("mxcsr", a.mxcsr.into(), b.mxcsr.into());
    number("cw", a.cw.into(), b.cw.into());
    number("sw", a.sw.into(), b.sw.into());
    number("tags", a.tags.into(), b.tags.into());
    for i in 0..8 {
        number(&format!("k{i}"), a.k[i], b.k[i]);
    }
    for i in 0..8 {
        if a.st[i] != b.st[i] {
            let _ = writeln!(s, "  st{i}: host {:02x?}, translated {:02x?}", a.st[i], b.st[i]);
        }
    }
    for i in 0..32 {
        if a.zmm[i] != b.zmm[i] {
            let at = (0..64).find(|&n| a.zmm[i][n] != b.zmm[i][n]).unwrap_or(0) & !7;
            let (x, y) = (&a.zmm[i][at..at + 8], &b.zmm[i][at..at + 8]);
            let _ = writeln!(s, "  zmm{i} byte {at}: host {x:02x?}, translated {y:02x?}");
        }
    }
    if want_memory.data != got_memory.data {
        let at = (0..DATA_LEN).find(|&i| want_memory.data[i] != got_memory.data[i]).unwrap_or(0);
        let at = at.min(DATA_LEN - 16);
        let _ = writeln!(
            s,
            "  data+{at:#x}: host {:02x?}, translated {:02x?}",
            &want_memory.data[at..at + 16],
            &got_memory.data[at..at + 16]
        );
    }
    s
}
