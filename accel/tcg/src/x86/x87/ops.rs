//! What x87 instructions do to the state: stack, tags, condition codes, exceptions (SDM vol. 1 §8).
//!
//! An instruction with an unmasked invalid, denormal or zero-divide exception changes nothing but the
//! status word (§8.7); the exception itself is delivered by the next waiting instruction, for which
//! the front end looks at ES.

use super::host::{self, Load, Op, Store};
use super::{BUSY, C0, C1, C2, C3, Class, Cpu, DE, ES, EXCEPTIONS, F80, IE, SF, ZE, physical};

/// The default NaN that masked invalid operations give ("real indefinite").
const INDEFINITE: F80 = F80 { sig: 0xc000_0000_0000_0000, exp: 0xffff };

/// Where an arithmetic instruction's other operand is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// ST(i), with the result in ST(0).
    St(usize),
    /// Memory, with the result in ST(0).
    Memory(Load, u64),
}

impl Cpu {
    fn st_empty(&self, i: usize) -> bool {
        self.ftag_empty >> physical(self, i) & 1 != 0
    }

    fn st(&self, i: usize) -> F80 {
        F80::from_bytes(&self.fpr[physical(self, i)])
    }

    fn set_st(&mut self, i: usize, v: F80) {
        let p = physical(self, i);
        v.to_bytes(&mut self.fpr[p]);
        self.ftag_empty &= !(1 << p);
    }

    fn st_pop(&mut self) {
        self.ftag_empty |= 1 << physical(self, 0);
        self.ftop = (self.ftop + 1) & 7;
    }

    fn clear_c1(&mut self) {
        self.fsw &= !C1;
    }

    /// Records the exceptions of status word `sw`, with its C1; `true` if the operation completes:
    /// no unmasked one among `fatal`.
    fn record(&mut self, sw: u16, fatal: u16) -> bool {
        let raised = sw & EXCEPTIONS;
        self.fsw = self.fsw & !C1 | raised | sw & (SF | C1);
        let unmasked = raised & !self.fcw;
        if unmasked != 0 {
            self.fsw |= ES | BUSY;
        }
        unmasked & fatal == 0
    }

    /// A stack fault; `true` if it is masked, so that the operation goes on with an indefinite.
    fn stack_fault(&mut self, overflow: bool) -> bool {
        self.record(IE | SF | if overflow { C1 } else { 0 }, IE)
    }
}

/// Exceptions that keep a register operation from completing.
const EARLY: u16 = IE | DE | ZE;
/// Exceptions that keep a store from completing.
const NO_STORE: u16 = IE | super::OE | super::UE;

/// Pushes `v`.
pub fn push(c: &mut Cpu, v: F80) {
    if c.st_empty(7) {
        c.clear_c1();
        c.ftop = (c.ftop + 7) & 7;
        c.set_st(0, v);
    } else if c.stack_fault(true) {
        c.ftop = (c.ftop + 7) & 7;
        c.set_st(0, INDEFINITE);
    }
}

/// FLD and FILD, FBLD from memory format.
pub fn load(c: &mut Cpu, from: Load, lo: u64, hi: u64) {
    let out = host::load(from, lo, hi, c.fcw, c.fsw);
    // A denormal is loaded even if its exception is not masked.
    if !c.st_empty(7) || c.record(out.sw & !C1, IE) {
        push(c, out.r0);
    }
}

/// FLD of a register.
pub fn load_st(c: &mut Cpu, i: usize) {
    if !c.st_empty(i) {
        let v = c.st(i);
        push(c, v);
    } else if c.stack_fault(false) {
        c.ftop = (c.ftop + 7) & 7;
        c.set_st(0, INDEFINITE);
    }
}

/// FLD1 and the other constants, by number (see [`host::constant`]).
pub fn load_constant(c: &mut Cpu, n: u8) {
    let v = host::constant(n, c.fcw);
    push(c, v);
}

/// Result of storing: the bytes for memory, or nothing if an unmasked exception forbids it.
pub fn store(c: &mut Cpu, to: Store) -> Option<u128> {
    if c.st_empty(0) {
        if !c.stack_fault(false) {
            return None;
        }
        // The indefinite of the format; converting cannot raise more than is recorded.
        return Some(host::store(to, &INDEFINITE, c.fcw | EXCEPTIONS, EXCEPTIONS).0);
    }
    let v = c.st(0);
    let (bytes, sw) = host::store(to, &v, c.fcw, c.fsw);
    c.record(sw, NO_STORE | DE).then_some(bytes)
}

/// The bytes of ST(0) for FSTP m80.
pub fn store_80(c: &mut Cpu) -> Option<F80> {
    if c.st_empty(0) {
        return c.stack_fault(false).then_some(INDEFINITE);
    }
    c.clear_c1();
    Some(c.st(0))
}

/// Pops, after a store has gone through.
pub fn pop(c: &mut Cpu) {
    c.st_pop();
}

/// FST and FSTP to ST(i). `quiet` for the alias of FSTP that does not mind an empty register: it then
/// only pops.
pub fn store_st(c: &mut Cpu, i: usize, pop: bool, quiet: bool) {
    if quiet && c.st_empty(0) {
        c.clear_c1();
        c.st_pop();
        return;
    }
    let v = if c.st_empty(0) {
        if !c.stack_fault(false) {
            return;
        }
        INDEFINITE
    } else {
        c.clear_c1();
        c.st(0)
    };
    c.set_st(i, v);
    if pop {
        c.st_pop();
    }
}

/// A two-operand arithmetic instruction: ST(`dst`) = ST(`dst`) op source. `op` is one of `Add` to
/// `DivR`.
pub fn arith(c: &mut Cpu, op: Op, dst: usize, source: Source, pop: bool) {
    let other_empty = matches!(source, Source::St(i) if c.st_empty(i));
    let result = if c.st_empty(dst) || other_empty {
        if !c.stack_fault(false) {
            return;
        }
        INDEFINITE
    } else {
        let a = c.st(dst);
        let out = match source {
            Source::St(i) => host::run(op, &a, &c.st(i), c.fcw, c.fsw),
            Source::Memory(from, v) => host::run_memory(op, &a, from, v, c.fcw, c.fsw),
        };
        if !c.record(out.sw, EARLY) {
            return;
        }
        out.r0
    };
    c.set_st(dst, result);
    if pop {
        c.st_pop();
    }
}

/// FCOM and FUCOM and their forms: sets C3, C2 and C0; `pops` registers afterwards. Returns whether
/// it completed.
pub fn compare(c: &mut Cpu, quiet: bool, source: Source, pops: u8) -> bool {
    let other_empty = matches!(source, Source::St(i) if c.st_empty(i));
    let (codes, completes) = if c.st_empty(0) || other_empty {
        (C3 | C2 | C0, c.stack_fault(false))
    } else {
        let a = c.st(0);
        let op = if quiet { Op::UCom } else { Op::Com };
        let out = match source {
            Source::St(i) => host::run(op, &a, &c.st(i), c.fcw, c.fsw),
            Source::Memory(from, v) => host::run_memory(op, &a, from, v, c.fcw, c.fsw),
        };
        (out.sw, c.record(out.sw & !C1, EARLY))
    };
    // The codes are set even if an unmasked exception keeps the stack from being popped.
    c.fsw = c.fsw & !(C3 | C2 | C0) | codes & (C3 | C2 | C0);
    if completes {
        for _ in 0..pops {
            c.st_pop();
        }
    }
    completes
}

/// FCOMI and FUCOMI: the image of ZF, PF and CF ("unordered" for an invalid operation, as AMD's
/// processors have it even if that is unmasked).
pub fn compare_flags(c: &mut Cpu, quiet: bool, i: usize, pop: bool) -> u64 {
    const CODES: u16 = C3 | C2 | C0;
    let empty = c.st_empty(0) || c.st_empty(i);
    // The condition codes stay, C1 too but for a stack fault.
    let keep = if empty { CODES } else { CODES | C1 };
    let old = c.fsw & keep;
    compare(c, quiet, Source::St(i), pop.into());
    let codes = c.fsw;
    c.fsw = c.fsw & !keep | old;
    let bit = |on: u16, flag: u64| if codes & on != 0 { flag } else { 0 };
    bit(C0, 1) | bit(C2, 4) | bit(C3, 0x40)
}

/// FTST: compares ST(0) with zero.
pub fn test(c: &mut Cpu) {
    let zero = Source::Memory(Load::I16, 0);
    compare(c, false, zero, 0);
}

/// FXAM: what ST(0) holds, in C3, C2, C0, its sign in C1.
pub fn examine(c: &mut Cpu) {
    let v = c.st(0);
    let codes = if c.st_empty(0) {
        C3 | C0
    } else {
        match v.class() {
            Class::Unsupported => 0,
            Class::Nan => C0,
            Class::Normal => C2,
            Class::Infinity => C2 | C0,
            Class::Zero => C3,
            Class::Denormal => C3 | C2,
        }
    };
    let sign = if v.exp >> 15 != 0 { C1 } else { 0 };
    c.fsw = c.fsw & !(C3 | C2 | C1 | C0) | codes | sign;
}

/// FCHS and FABS: `keep` and `flip` the sign bit.
pub fn sign(c: &mut Cpu, keep: u16, flip: u16) {
    if c.st_empty(0) {
        if c.stack_fault(false) {
            c.set_st(0, INDEFINITE);
        }
        return;
    }
    c.clear_c1();
    let mut v = c.st(0);
    v.exp = v.exp & (0x7fff | keep) ^ flip;
    c.set_st(0, v);
}

/// Instructions of one operand, and those of two that replace ST(0): FSQRT, FSIN, FPREM, FSCALE….
pub fn unary(c: &mut Cpu, op: Op) {
    let two = matches!(op, Op::Rem | Op::Rem1 | Op::Scale);
    if c.st_empty(0) || two && c.st_empty(1) {
        if matches!(op, Op::Rem | Op::Rem1 | Op::Sin | Op::Cos) {
            // "Reduction complete", "within range".
            c.fsw &= !C2;
        }
        if c.stack_fault(false) {
            c.set_st(0, INDEFINITE);
        }
        return;
    }
    let out = host::run(op, &c.st(0), &c.st(1), c.fcw, c.fsw);
    // The condition codes of FPREM are parts of its result; C2 of FSIN says "out of range".
    let codes = match op {
        // No quotient: the result is a NaN, or the operation does not complete.
        Op::Rem | Op::Rem1 if out.sw & !c.fcw & EARLY != 0 || out.r0.class() == Class::Nan => C2,
        Op::Rem | Op::Rem1 => C0 | C1 | C2 | C3,
        Op::Sin | Op::Cos => C2,
        _ => 0,
    };
    let completes = c.record(out.sw, EARLY);
    c.fsw = c.fsw & !codes | out.sw & codes;
    if completes {
        c.set_st(0, out.r0);
    }
}

/// FYL2X, FYL2XP1, FPATAN: the result replaces ST(1), and ST(0) is popped.
pub fn binary_pop(c: &mut Cpu, op: Op) {
    let result = if c.st_empty(0) || c.st_empty(1) {
        if !c.stack_fault(false) {
            return;
        }
        INDEFINITE
    } else {
        let out = host::run(op, &c.st(0), &c.st(1), c.fcw, c.fsw);
        if !c.record(out.sw, EARLY) {
            return;
        }
        out.r0
    };
    c.set_st(1, result);
    c.st_pop();
}

/// FPTAN, FSINCOS, FXTRACT: two results, the second of which is pushed.
pub fn unary_push(c: &mut Cpu, op: Op) {
    if c.st_empty(0) || !c.st_empty(7) {
        let overflow = !c.st_empty(0);
        if op != Op::Extract {
            c.fsw &= !C2;
        }
        if c.stack_fault(overflow) {
            c.set_st(0, INDEFINITE);
            c.ftop = (c.ftop + 7) & 7;
            c.set_st(0, INDEFINITE);
        }
        return;
    }
    if op != Op::Extract && beyond_angles(c.st(0)) {
        c.fsw = c.fsw & !C1 | C2;
        return;
    }
    let out = host::run(op, &c.st(0), &c.st(1), c.fcw, c.fsw);
    let completes = c.record(out.sw, EARLY);
    if op != Op::Extract {
        c.fsw = c.fsw & !C2 | out.sw & C2;
        if out.sw & C2 != 0 {
            return;
        }
    }
    if completes {
        c.set_st(0, out.r1);
        c.ftop = (c.ftop + 7) & 7;
        c.set_st(0, out.r0);
    }
}

/// Whether the magnitude is a finite one of at least 2^63, which the trigonometric instructions do not
/// take.
fn beyond_angles(v: F80) -> bool {
    v.class() == Class::Normal && v.exp & 0x7fff >= 0x3fff + 63
}

/// FXCH.
pub fn exchange(c: &mut Cpu, i: usize) {
    if c.st_empty(0) || c.st_empty(i) {
        if !c.stack_fault(false) {
            return;
        }
        for n in [0, i] {
            if c.st_empty(n) {
                c.set_st(n, INDEFINITE);
            }
        }
    } else {
        c.clear_c1();
    }
    let (a, b) = (c.st(0), c.st(i));
    c.set_st(0, b);
    c.set_st(i, a);
}

/// FCMOVcc, with the condition already decided.
pub fn conditional_move(c: &mut Cpu, i: usize, take: bool) {
    if c.st_empty(0) || c.st_empty(i) {
        if c.stack_fault(false) {
            c.set_st(0, INDEFINITE);
        }
        return;
    }
    if take {
        let v = c.st(i);
        c.set_st(0, v);
    }
}

/// FFREE; `pop` for FFREEP.
pub fn free(c: &mut Cpu, i: usize, pop: bool) {
    c.clear_c1();
    c.ftag_empty |= 1 << physical(c, i);
    if pop {
        c.st_pop();
    }
}

/// FINCSTP and FDECSTP.
pub fn rotate(c: &mut Cpu, by: u32) {
    c.clear_c1();
    c.ftop = (c.ftop + by) & 7;
}
