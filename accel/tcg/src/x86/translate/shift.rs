//! Shifts and rotates.

use super::Translator;
use super::cc::CcOperands;
use super::operand::Gpr;
use crate::x86::bits::rflags::{ARITH, CF, OF};
use crate::x86::flags::{self, CcKind};
use iced_x86::{Instruction, Mnemonic, OpKind};
use tandem_jit::ir::{Op, PTR_READ, Val, Width};

const N: Val = Val::NONE;

/// A shift count: constant (already masked) or in CL.
#[derive(Clone, Copy)]
enum Count {
    Const(u64),
    Cl(Val),
}

/// The mask that the processor applies to counts.
fn count_mask(w: Width) -> u64 {
    if w == Width::W64 { 63 } else { 31 }
}

fn count(t: &mut Translator, insn: &Instruction, n: u32, w: Width) -> Count {
    match insn.op_kind(n) {
        OpKind::Register => Count::Cl(t.gpr64(1)),
        _ => Count::Const(insn.try_immediate(n).unwrap_or(0) & count_mask(w)),
    }
}

/// SHL, SHR, SAR.
pub(super) fn shift(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let (op, kind) = match insn.mnemonic() {
        Mnemonic::Shr => (Op::Shr, CcKind::Shr),
        Mnemonic::Sar => (Op::Sar, CcKind::Sar),
        _ => (Op::Shl, CcKind::Shl),
    };
    let count = count(t, insn, 1, w);
    // SAR and SHR look at bits above the operand only through the operation's own width.
    move_bits(t, insn, w, (op, kind), None, count);
}

/// SHLD, SHRD.
pub(super) fn double(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let (op, kind) = match insn.mnemonic() {
        Mnemonic::Shld => (Op::Shld, CcKind::Shl),
        _ => (Op::Shrd, CcKind::Shr),
    };
    let count = count(t, insn, 2, w);
    let fill = t.read(insn, 1, w);
    move_bits(t, insn, w, (op, kind), Some(fill), count);
}

/// Shifts operand 0, `fill` coming in where there is one.
fn move_bits(
    t: &mut Translator,
    insn: &Instruction,
    w: Width,
    (op, kind): (Op, CcKind),
    fill: Option<Val>,
    count: Count,
) {
    let (place, a) = t.open(insn, 0, w);
    let ins = |n: Val, prior: Val| match fill {
        Some(fill) => [a, fill, n, prior],
        None => [a, n, N, prior],
    };
    match count {
        Count::Const(0) => {
            let a = t.zero_upper(w, a);
            t.close(place, w, a);
        }
        Count::Const(n) => {
            let n = t.b.iconst(n);
            let (r, fl) = t.b.alu(op, w, ins(n, N));
            t.close(place, w, r);
            t.set_flags(kind, w, CcOperands { dst: r, src: a, src2: n }, fl);
        }
        Count::Cl(cl) => {
            let prior = t.known_flags(ARITH);
            let (r, fl) = t.b.alu(op, w, ins(cl, prior));
            t.close(place, w, r);
            set_counted(t, kind, w, CcOperands { dst: r, src: a, src2: cl }, prior, fl);
        }
    }
}

/// Sets the flags of a shift by CL: they stay as they are if the masked count is 0.
fn set_counted(t: &mut Translator, kind: CcKind, w: Width, o: CcOperands, prior: Val, fl: Val) {
    let mask = t.b.iconst(count_mask(w));
    let (n, zero) = t.b.alu(Op::And, Width::W32, [o.src2, mask, N, N]);
    // `fl` has the flags for a count of 0 only if the prior ones were at hand.
    let fl = if prior.is_some() { fl } else { N };
    t.set_flags_unless(zero, kind, w, CcOperands { src2: n, ..o }, fl);
}

/// ROL, ROR.
pub(super) fn rotate(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let left = insn.mnemonic() == Mnemonic::Rol;
    let op = if left { Op::Rol } else { Op::Ror };
    let word = if left { flags::rol(w) } else { flags::ror(w) };
    let count = count(t, insn, 1, w);
    let (place, a) = t.open(insn, 0, w);
    match count {
        Count::Const(0) => {
            let a = t.zero_upper(w, a);
            t.close(place, w, a);
        }
        Count::Const(n) => {
            let n = t.b.iconst(n);
            let (r, fl) = t.b.alu(op, w, [a, n, N, N]);
            t.close(place, w, r);
            t.set_flags_rotate(word, r, fl);
        }
        Count::Cl(cl) => {
            let prior = t.known_flags(CF | OF);
            let (r, fl) = t.b.alu(op, w, [a, cl, N, prior]);
            t.close(place, w, r);
            let mask = t.b.iconst(count_mask(w));
            let zero = t.b.flags_of(Op::And, Width::W32, [cl, mask, N, N]);
            let fl = if prior.is_some() { fl } else { N };
            t.set_flags_rotate_unless(zero, word, r, fl);
        }
    }
}

/// RCL, RCR.
pub(super) fn rotate_carry(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let op = if insn.mnemonic() == Mnemonic::Rcl { Op::Rcl } else { Op::Rcr };
    let (n, constant) = match count(t, insn, 1, w) {
        Count::Const(n) => (t.b.iconst(n), Some(n)),
        Count::Cl(cl) => (cl, None),
    };
    let prior = t.flags(CF | OF);
    let (place, a) = t.open(insn, 0, w);
    let (r, fl) = t.b.alu(op, w, [a, n, prior, N]);
    t.close(place, w, r);
    if constant != Some(0) {
        t.override_flags(fl, CF | OF);
    }
}

/// SHLX, SHRX, SARX, RORX: no flags.
pub(super) fn without_flags(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let op = match insn.mnemonic() {
        Mnemonic::Shlx => Op::Shl,
        Mnemonic::Shrx => Op::Shr,
        Mnemonic::Sarx => Op::Sar,
        _ => Op::Ror,
    };
    let a = if insn.op1_kind() == OpKind::Memory {
        let addr = t.mem_addr(insn, dst.w.bytes(), PTR_READ);
        t.b.ld(dst.w, addr, 0)
    } else {
        t.read(insn, 1, dst.w)
    };
    let n = t.read(insn, 2, dst.w);
    let r = t.b.bin(op, dst.w, a, n);
    t.set_gpr(dst, r);
}
