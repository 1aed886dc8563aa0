//! Decimal adjustment. The helpers work on AX and the flags as values.

use super::Translator;
use super::operand::Gpr;
use crate::x86::exception::vector;
use crate::x86::helpers;
use iced_x86::{Instruction, Mnemonic};
use tandem_jit::ir::{Op, Val, Width};

const AX: Gpr = Gpr { num: 0, w: Width::W16, high: false };

/// DAA, DAS, AAA, AAS: the helper returns AX, and the flags' image above bit 16.
pub(super) fn adjust(t: &mut Translator, insn: &Instruction) {
    let helper = match insn.mnemonic() {
        Mnemonic::Daa => helpers::DAA,
        Mnemonic::Das => helpers::DAS,
        Mnemonic::Aaa => helpers::AAA,
        _ => helpers::AAS,
    };
    let image = t.flags_image();
    let ax = t.gpr64(0);
    let v = t.b.call(helper, &[ax, image]);
    t.set_gpr(AX, v);
    let n = t.b.iconst(16);
    let image = t.b.bin(Op::Shr, Width::W32, v, n);
    t.set_flags_image(image);
}

/// AAM: AH = AL / imm, AL = AL mod imm; #DE for 0.
pub(super) fn aam(t: &mut Translator, insn: &Instruction) {
    let base = u64::from(insn.immediate8());
    if base == 0 {
        return t.raise(vector::DE, None);
    }
    let al = t.gpr64(0);
    let al = t.b.un(Op::Zext, Width::W8, al);
    let base = t.b.iconst(base);
    let zero = t.b.iconst(0);
    let (q, r) = (t.b.new_val(), t.b.new_val());
    t.b.push(tandem_jit::ir::Inst {
        dst: q,
        dst2: r,
        ins: [zero, al, base, Val::NONE],
        ..tandem_jit::ir::Inst::new(Op::DivU2, Width::W32)
    });
    let v = t.b.deposit(Width::W8, r, q, 8);
    finish(t, v, r);
}

/// AAD: AL = AL + AH * imm, AH = 0.
pub(super) fn aad(t: &mut Translator, insn: &Instruction) {
    let ax = t.gpr64(0);
    let ah = t.b.extract(Width::W8, ax, 8);
    let base = t.b.iconst(insn.immediate8().into());
    let tens = t.b.bin(Op::Mul, Width::W32, ah, base);
    let sum = t.b.bin(Op::Add, Width::W32, tens, ax);
    let v = t.b.un(Op::Zext, Width::W8, sum);
    finish(t, v, v);
}

fn finish(t: &mut Translator, ax: Val, al: Val) {
    let none = Val::NONE;
    let fl = t.b.flags_of(Op::And, Width::W8, [al, al, none, none]);
    t.set_gpr(AX, ax);
    t.set_flags_logic(Width::W8, al, fl);
}
