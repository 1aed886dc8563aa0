//! Multiplication and division.

use super::Translator;
use super::cc::CcOperands;
use super::operand::Gpr;
use crate::x86::flags::CcKind;
use iced_x86::{Instruction, Mnemonic};
use tandem_jit::ir::{Inst, Op, Val, Width};

const N: Val = Val::NONE;

/// MUL, and IMUL in all its forms.
pub(super) fn mul(t: &mut Translator, insn: &Instruction) {
    let signed = insn.mnemonic() == Mnemonic::Imul;
    if insn.op_count() > 1 {
        return mul_into(t, insn);
    }
    let w = t.op_width(insn, 0);
    let b = t.read(insn, 0, w);
    let a = t.gpr64(0);
    if w == Width::W8 {
        // AX = AL * source: the 16-bit product of the extended bytes.
        let ext = if signed { Op::Sext } else { Op::Zext };
        let a = t.b.un(ext, w, a);
        let b = t.b.un(ext, w, b);
        let r = t.b.bin(Op::Mul, Width::W32, a, b);
        let hi = t.b.extract(Width::W8, r, 8);
        t.set_gpr(Gpr { num: 0, w: Width::W16, high: false }, r);
        let kind = if signed { CcKind::Imul } else { CcKind::Mul };
        return t.set_flags(kind, w, CcOperands { dst: r, src: hi, src2: N }, N);
    }
    let (lo, hi, fl) = (t.b.new_val(), t.b.new_val(), t.b.new_val());
    let (op, kind) = if signed { (Op::MulS2, CcKind::Imul) } else { (Op::MulU2, CcKind::Mul) };
    t.b.push(Inst { dst: lo, dst2: hi, fl, ins: [a, b, N, N], ..Inst::new(op, w) });
    t.set_gpr(Gpr { num: 0, w, high: false }, lo);
    t.set_gpr(Gpr { num: 2, w, high: false }, hi);
    t.set_flags(kind, w, CcOperands { dst: lo, src: hi, src2: N }, fl);
}

/// IMUL with two or three operands.
fn mul_into(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = dst.w;
    let (a, b) = if insn.op_count() == 3 {
        let a = t.read(insn, 1, w);
        (a, t.read(insn, 2, w))
    } else {
        let b = t.read(insn, 1, w);
        (t.gpr(dst), b)
    };
    let (r, fl) = t.b.alu(Op::Mul, w, [a, b, N, N]);
    t.set_gpr(dst, r);
    t.set_flags(CcKind::Imul2, w, CcOperands { dst: r, src: a, src2: b }, fl);
}

/// DIV and IDIV. The flags, undefined after them, stay as they are.
pub(super) fn div(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let d = t.read(insn, 0, w);
    let ax = t.gpr64(0);
    let hi = if w == Width::W8 { t.b.extract(Width::W8, ax, 8) } else { t.gpr64(2) };
    let (q, r) = (t.b.new_val(), t.b.new_val());
    let op = if insn.mnemonic() == Mnemonic::Idiv { Op::DivS2 } else { Op::DivU2 };
    t.b.push(Inst { dst: q, dst2: r, ins: [hi, ax, d, N], ..Inst::new(op, w) });
    let acc = Gpr { num: 0, w, high: false };
    t.set_gpr(acc, q);
    let rest = if w == Width::W8 { Gpr { high: true, ..acc } } else { Gpr { num: 2, ..acc } };
    t.set_gpr(rest, r);
}
