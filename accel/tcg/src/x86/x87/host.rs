//! 80-bit arithmetic on the host's x87.
//!
//! Every function loads its operands, runs one instruction under the guest's control word, exceptions
//! unmasked as the guest has them, and takes result and status word back.
//!
//! If the guest masks all exceptions, as nearly every guest does, the status flags may stay set from
//! one operation to the next: they only ever join those that the guest's status word has already
//! ([`prepare`] sees to it), and clearing them would cost more than the operation. Else order matters:
//! the status is cleared first; after the operation it is read and cleared before any instruction that
//! would deliver a pending exception; the host's control word (all exceptions masked) is in place
//! before the result is stored. An operation that an unmasked exception kept from completing leaves
//! the host's stack in disorder, which FNINIT puts right.

use super::F80;
#[cfg(target_arch = "x86_64")]
use std::cell::Cell;

/// Result of an operation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Out {
    /// ST(0) afterwards.
    pub r0: F80,
    /// ST(1) afterwards, for operations with two results.
    pub r1: F80,
    /// Status word.
    pub sw: u16,
}

/// An operation on one or two registers. Operand `a` is ST(0), `b` ST(1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Op {
    Add,
    Mul,
    Sub,
    SubR,
    Div,
    DivR,
    Rem,
    Rem1,
    Scale,
    Yl2x,
    Yl2xp1,
    Atan,
    Sqrt,
    Sin,
    Cos,
    RoundInt,
    TwoToXm1,
    Com,
    UCom,
    Tan,
    SinCos,
    Extract,
}

/// A conversion from memory format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Load {
    F32,
    F64,
    I16,
    I32,
    I64,
    Bcd,
}

/// A conversion to memory format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Store {
    F32,
    F64,
    I16,
    I32,
    I64,
    I16Trunc,
    I32Trunc,
    I64Trunc,
    Bcd,
}

/// Control word of the host while its own code runs.
#[cfg(target_arch = "x86_64")]
static HOST_CW: u16 = super::CW_INIT;

/// Whether this host has an x87.
pub const AVAILABLE: bool = cfg!(target_arch = "x86_64");

#[cfg(target_arch = "x86_64")]
macro_rules! x87_asm {
    ($($part:expr),* ; $($operands:tt)*) => {
        // SAFETY: the operands are live memory of the size that the instructions access; all x87
        // registers are declared as clobbered; the host's control word is restored.
        unsafe {
            std::arch::asm!(
                $($part),*,
                $($operands)*,
                out("ax") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack)
            )
        }
    };
}

/// How an operation is surrounded.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Around {
    /// The guest's control word is the host's.
    Nothing,
    /// The control word is exchanged; no exception is unmasked.
    ControlWord,
    /// Exceptions are unmasked.
    Everything,
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    /// Exception flags that this thread's unit may have set. All ones at first: nobody knows.
    /// (Nothing else in this process computes in 80 bits.)
    static STICKY: Cell<u16> = const { Cell::new(!0) };
}

/// Gets ready for an operation under control word `cw`; `have` is the guest's status word.
#[cfg(target_arch = "x86_64")]
fn prepare(cw: u16, have: u16) -> Around {
    if cw & super::EXCEPTIONS != super::EXCEPTIONS {
        return Around::Everything;
    }
    if STICKY.get() & !have != 0 {
        x87_asm!("fnclex"; in("cx") 0u16);
        STICKY.set(0);
    }
    if cw == HOST_CW { Around::Nothing } else { Around::ControlWord }
}

/// One operation, surrounded as `$around` says: `$before` loads operands and computes, `$after` stores.
#[cfg(target_arch = "x86_64")]
macro_rules! surrounded {
    ($around:expr, $before:expr, $after:expr; $($operands:tt)*) => {
        match $around {
            Around::Nothing => x87_asm!(
                "# {cw} {host}", $before, "fnstsw ax", "mov [{sw}], ax", $after; $($operands)*
            ),
            Around::ControlWord => x87_asm!(
                "fldcw [{cw}]", $before, "fnstsw ax", "mov [{sw}], ax", "fldcw [{host}]", $after;
                $($operands)*
            ),
            Around::Everything => x87_asm!(
                "fnclex", "fldcw [{cw}]", $before, "fnstsw ax", "mov [{sw}], ax", "fnclex",
                "fldcw [{host}]", $after; $($operands)*
            ),
        }
    };
}

/// Remembers the flags an operation has left, and puts the unit in order if it did not complete.
#[cfg(target_arch = "x86_64")]
fn finish(sw: u16) {
    STICKY.set(sw & (super::EXCEPTIONS | super::SF));
    if sw & super::ES != 0 {
        x87_asm!("fninit"; in("cx") 0u16);
    }
}

/// Runs `op` under control word `cw`; `have` is the guest's status word.
#[cfg(target_arch = "x86_64")]
pub fn run(op: Op, a: &F80, b: &F80, cw: u16, have: u16) -> Out {
    let mut out = Out::default();
    let around = prepare(cw, have);
    macro_rules! go {
        ($loads:literal, $insn:literal, $stores:literal) => {
            surrounded!(
                around, concat!($loads, "\n", $insn), $stores;
                cw = in(reg) &cw, host = in(reg) &HOST_CW, sw = in(reg) &mut out.sw,
                a = in(reg) a, b = in(reg) b, r0 = in(reg) &mut out.r0, r1 = in(reg) &mut out.r1
            )
        };
    }
    // Two operands and one result, with the other operand left over; or popped by the instruction;
    // one operand and one result, or two; comparisons.
    macro_rules! binary {
        ($insn:literal) => {
            go!(
                "fld tbyte ptr [{b}]\nfld tbyte ptr [{a}]",
                $insn,
                "fstp tbyte ptr [{r0}]\nfstp tbyte ptr [{r1}]"
            )
        };
    }
    macro_rules! popping {
        ($insn:literal) => {
            go!(
                "fld tbyte ptr [{b}]\nfld tbyte ptr [{a}]",
                $insn,
                "fstp tbyte ptr [{r0}]\nmov ax, [{r1}]"
            )
        };
    }
    macro_rules! unary {
        ($insn:literal) => {
            go!(
                "fld tbyte ptr [{a}]\nmov ax, [{b}]",
                $insn,
                "fstp tbyte ptr [{r0}]\nmov ax, [{r1}]"
            )
        };
    }
    // FPTAN and FSIN leave one register for arguments out of range: C2 says so.
    macro_rules! twofold {
        ($insn:literal) => {
            go!(
                "fld tbyte ptr [{a}]\nmov ax, [{b}]",
                $insn,
                "fstp tbyte ptr [{r0}]\nfstp tbyte ptr [{r1}]"
            )
        };
    }
    match op {
        Op::Add => binary!(".byte 0xd8, 0xc1"),
        Op::Mul => binary!(".byte 0xd8, 0xc9"),
        Op::Sub => binary!(".byte 0xd8, 0xe1"),
        Op::SubR => binary!(".byte 0xd8, 0xe9"),
        Op::Div => binary!(".byte 0xd8, 0xf1"),
        Op::DivR => binary!(".byte 0xd8, 0xf9"),
        Op::Rem => binary!("fprem"),
        Op::Rem1 => binary!("fprem1"),
        Op::Scale => binary!("fscale"),
        Op::Com => binary!(".byte 0xd8, 0xd1"),
        Op::UCom => binary!(".byte 0xdd, 0xe1"),
        Op::Yl2x => popping!("fyl2x"),
        Op::Yl2xp1 => popping!("fyl2xp1"),
        Op::Atan => popping!("fpatan"),
        Op::Sqrt => unary!("fsqrt"),
        Op::Sin => unary!("fsin"),
        Op::Cos => unary!("fcos"),
        Op::RoundInt => unary!("frndint"),
        Op::TwoToXm1 => unary!("f2xm1"),
        Op::Tan => twofold!("fptan"),
        Op::SinCos => twofold!("fsincos"),
        Op::Extract => twofold!("fxtract"),
    }
    finish(out.sw);
    out
}

/// Runs `op`, one of `Add` to `DivR` or `Com`, on `a` and a memory operand. (Loading the operand first
/// would raise exceptions that the operation, finding a worse one, does not.)
#[cfg(target_arch = "x86_64")]
pub fn run_memory(op: Op, a: &F80, from: Load, m: u64, cw: u16, have: u16) -> Out {
    let mut out = Out::default();
    let around = prepare(cw, have);
    macro_rules! go {
        ($insn:expr) => {
            surrounded!(
                around, concat!("fld tbyte ptr [{a}]\n", $insn), "fstp tbyte ptr [{r0}]";
                cw = in(reg) &cw, host = in(reg) &HOST_CW, sw = in(reg) &mut out.sw,
                a = in(reg) a, m = in(reg) &m, r0 = in(reg) &mut out.r0
            )
        };
    }
    macro_rules! sized {
        ($float:literal, $int:literal) => {
            match from {
                Load::F32 => go!(concat!($float, " dword ptr [{m}]")),
                Load::F64 => go!(concat!($float, " qword ptr [{m}]")),
                Load::I16 => go!(concat!($int, " word ptr [{m}]")),
                _ => go!(concat!($int, " dword ptr [{m}]")),
            }
        };
    }
    match op {
        Op::Add => sized!("fadd", "fiadd"),
        Op::Mul => sized!("fmul", "fimul"),
        Op::Sub => sized!("fsub", "fisub"),
        Op::SubR => sized!("fsubr", "fisubr"),
        Op::Div => sized!("fdiv", "fidiv"),
        Op::DivR => sized!("fdivr", "fidivr"),
        _ => sized!("fcom", "ficom"),
    }
    finish(out.sw);
    out
}

/// Converts from memory format: `lo` holds up to 8 bytes, `hi` the rest of a BCD number.
#[cfg(target_arch = "x86_64")]
pub fn load(from: Load, lo: u64, hi: u64, cw: u16, have: u16) -> Out {
    let mut out = Out::default();
    let around = prepare(cw, have);
    let m = u128::from(hi) << 64 | u128::from(lo);
    macro_rules! go {
        ($insn:literal) => {
            surrounded!(
                around, $insn, "fstp tbyte ptr [{r0}]";
                cw = in(reg) &cw, host = in(reg) &HOST_CW, sw = in(reg) &mut out.sw,
                m = in(reg) &m, r0 = in(reg) &mut out.r0
            )
        };
    }
    match from {
        Load::F32 => go!("fld dword ptr [{m}]"),
        Load::F64 => go!("fld qword ptr [{m}]"),
        Load::I16 => go!("fild word ptr [{m}]"),
        Load::I32 => go!("fild dword ptr [{m}]"),
        Load::I64 => go!("fild qword ptr [{m}]"),
        Load::Bcd => go!("fbld tbyte ptr [{m}]"),
    }
    finish(out.sw);
    out
}

/// Converts to memory format: the bytes, zero-extended, and the status word.
#[cfg(target_arch = "x86_64")]
pub fn store(to: Store, a: &F80, cw: u16, have: u16) -> (u128, u16) {
    let (mut m, mut sw) = (0u128, 0u16);
    let around = prepare(cw, have);
    macro_rules! go {
        ($insn:literal) => {
            surrounded!(
                around, concat!("fld tbyte ptr [{a}]\n", $insn), "";
                cw = in(reg) &cw, host = in(reg) &HOST_CW, sw = in(reg) &mut sw,
                m = in(reg) &mut m, a = in(reg) a
            )
        };
    }
    match to {
        Store::F32 => go!("fstp dword ptr [{m}]"),
        Store::F64 => go!("fstp qword ptr [{m}]"),
        Store::I16 => go!("fistp word ptr [{m}]"),
        Store::I32 => go!("fistp dword ptr [{m}]"),
        Store::I64 => go!("fistp qword ptr [{m}]"),
        Store::I16Trunc => go!("fisttp word ptr [{m}]"),
        Store::I32Trunc => go!("fisttp dword ptr [{m}]"),
        Store::I64Trunc => go!("fisttp qword ptr [{m}]"),
        Store::Bcd => go!("fbstp tbyte ptr [{m}]"),
    }
    finish(sw);
    (m, sw)
}

/// The constants 1, log2(10), log2(e), pi, log10(2), ln(2), 0 under the rounding of `cw`.
#[cfg(target_arch = "x86_64")]
pub fn constant(n: u8, cw: u16) -> F80 {
    let mut r = F80::default();
    macro_rules! go {
        ($insn:literal) => {
            if cw == HOST_CW {
                x87_asm!($insn, "fstp tbyte ptr [{r}]"; r = in(reg) &mut r)
            } else {
                x87_asm!(
                    "fldcw [{cw}]", $insn, "fldcw [{host}]", "fstp tbyte ptr [{r}]";
                    cw = in(reg) &(cw | super::EXCEPTIONS), host = in(reg) &HOST_CW,
                    r = in(reg) &mut r
                )
            }
        };
    }
    match n {
        0 => go!("fld1"),
        1 => go!("fldl2t"),
        2 => go!("fldl2e"),
        3 => go!("fldpi"),
        4 => go!("fldlg2"),
        5 => go!("fldln2"),
        _ => go!("fldz"),
    }
    r
}

/// Without an x87 there is nothing to run on; the front end offers no x87 instructions there.
#[cfg(not(target_arch = "x86_64"))]
mod absent {
    use super::{F80, Load, Op, Out, Store};

    const NOTHING: Out = Out { r0: F80 { sig: 0, exp: 0 }, r1: F80 { sig: 0, exp: 0 }, sw: 0 };

    pub fn run(_: Op, _: &F80, _: &F80, _: u16, _: u16) -> Out {
        NOTHING
    }
    pub fn run_memory(_: Op, _: &F80, _: Load, _: u64, _: u16, _: u16) -> Out {
        NOTHING
    }
    pub fn load(_: Load, _: u64, _: u64, _: u16, _: u16) -> Out {
        NOTHING
    }
    pub fn store(_: Store, _: &F80, _: u16, _: u16) -> (u128, u16) {
        (0, 0)
    }
    pub fn constant(_: u8, _: u16) -> F80 {
        NOTHING.r0
    }
}
#[cfg(not(target_arch = "x86_64"))]
pub use absent::{constant, load, run, run_memory, store};

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::super::{CW_INIT, ES, IE, PE, ZE};
    use super::*;

    fn f(v: f64) -> F80 {
        load(Load::F64, v.to_bits(), 0, CW_INIT, 0).r0
    }
    fn back(r: &F80) -> f64 {
        f64::from_bits(store(Store::F64, r, CW_INIT, 0).0 as u64)
    }

    #[test]
    fn arithmetic() {
        let (a, b) = (f(10.0), f(4.0));
        for (op, want) in [
            (Op::Add, 14.0),
            (Op::Mul, 40.0),
            (Op::Sub, 6.0),
            (Op::SubR, -6.0),
            (Op::Div, 2.5),
            (Op::DivR, 0.4),
            (Op::Rem, 2.0),
            (Op::Scale, 160.0),
        ] {
            assert_eq!(back(&run(op, &a, &b, CW_INIT, 0).r0), want, "{op:?}");
        }
        assert_eq!(back(&run(Op::Sqrt, &b, &b, CW_INIT, 0).r0), 2.0);
        let t = run(Op::Extract, &f(12.0), &b, CW_INIT, 0);
        assert_eq!((back(&t.r0), back(&t.r1)), (1.5, 3.0));
        // y * log2(x) with x in ST(0).
        assert_eq!(back(&run(Op::Yl2x, &f(8.0), &f(5.0), CW_INIT, 0).r0), 15.0);
    }

    #[test]
    fn exceptions_are_reported_and_leave_the_host_clean() {
        let (one, zero, three) = (f(1.0), f(0.0), f(3.0));
        assert_eq!(run(Op::Div, &one, &three, CW_INIT, 0).sw & 0x3f, PE);
        let unmasked = CW_INIT & !ZE;
        let r = run(Op::Div, &one, &zero, unmasked, 0);
        assert_eq!(r.sw & (ZE | ES), ZE | ES);
        let snan = F80 { sig: 0x8000_0000_0000_0001, exp: 0x7fff };
        assert_ne!(run(Op::Add, &snan, &one, CW_INIT & !IE, 0).sw & ES, 0);
        assert_ne!(load(Load::F32, 0x7f80_0001, 0, CW_INIT & !IE, 0).sw & ES, 0);
        assert_ne!(store(Store::I16, &f(1e9), CW_INIT & !IE, 0).1 & ES, 0);
        // Eight operations in a row would show a stack that was not left empty.
        for _ in 0..10 {
            assert_eq!(back(&run(Op::Add, &one, &three, CW_INIT, 0).r0), 4.0);
            assert_eq!(run(Op::Yl2x, &zero, &one, unmasked, 0).sw & ES, ES);
        }
    }
}
