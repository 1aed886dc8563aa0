//! ADD, SUB, AND and their kin, with LOCK.

use super::Translator;
use super::cc::CcOperands;
use crate::x86::bits::rflags::CF;
use crate::x86::flags::{self, CcKind};
use iced_x86::{Instruction, Mnemonic};
use tandem_jit::ir::{Op, PTR_READ, PTR_WRITE, Rmw, Val, Width};

const N: Val = Val::NONE;

/// Two-operand arithmetic and logic, CMP and TEST.
pub(super) fn binary(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    match insn.mnemonic() {
        Mnemonic::Cmp => compare(t, insn, w),
        Mnemonic::Test => test(t, insn, w),
        _ if insn.has_lock_prefix() => locked(t, insn, w),
        _ => {
            let b = t.read(insn, 1, w);
            let (place, a) = t.open(insn, 0, w);
            let (r, cc) = compute(t, insn.mnemonic(), w, a, b);
            t.close(place, w, r);
            cc.set(t, w);
        }
    }
}

/// Which flags an operation sets, to be written when the instruction can no longer fault.
struct Cc {
    kind: CcKind,
    o: CcOperands,
    fl: Val,
}

impl Cc {
    fn set(self, t: &mut Translator, w: Width) {
        t.set_flags(self.kind, w, self.o, self.fl);
    }
}

/// The result of `a` op `b` and its flags.
fn compute(t: &mut Translator, m: Mnemonic, w: Width, a: Val, b: Val) -> (Val, Cc) {
    let (op, kind) = match m {
        Mnemonic::Add => (Op::Add, CcKind::Add),
        Mnemonic::Sub => (Op::Sub, CcKind::Sub),
        Mnemonic::Adc => (Op::Adc, CcKind::Adc),
        Mnemonic::Sbb => (Op::Sbb, CcKind::Sbb),
        Mnemonic::And => (Op::And, CcKind::Logic),
        Mnemonic::Or => (Op::Or, CcKind::Logic),
        _ => (Op::Xor, CcKind::Logic),
    };
    let carry = matches!(kind, CcKind::Adc | CcKind::Sbb);
    let c = if carry { t.flags(CF) } else { N };
    let (r, fl) = t.b.alu(op, w, [a, b, c, N]);
    let o = match kind {
        CcKind::Logic => CcOperands { dst: r, src: N, src2: N },
        _ => CcOperands { dst: r, src: b, src2: if carry { a } else { N } },
    };
    (r, Cc { kind, o, fl })
}

fn compare(t: &mut Translator, insn: &Instruction, w: Width) {
    let a = t.read(insn, 0, w);
    let b = t.read(insn, 1, w);
    set_compare(t, w, a, b);
}

/// Sets the flags as CMP of `a` with `b`.
pub(super) fn set_compare(t: &mut Translator, w: Width, a: Val, b: Val) {
    let fl = t.b.flags_of(Op::Sub, w, [a, b, N, N]);
    t.set_flags(CcKind::Cmp, w, CcOperands { dst: a, src: b, src2: N }, fl);
}

fn test(t: &mut Translator, insn: &Instruction, w: Width) {
    let a = t.read(insn, 0, w);
    let same = insn.op0_register() == insn.op1_register() && insn.op_count() == 2;
    if same && insn.op0_kind() == iced_x86::OpKind::Register && insn.op1_kind() == insn.op0_kind() {
        let fl = t.b.flags_of(Op::And, w, [a, a, N, N]);
        return t.set_flags_logic(w, a, fl);
    }
    let b = t.read(insn, 1, w);
    let fl = t.b.flags_of(Op::And, w, [a, b, N, N]);
    t.set_flags(CcKind::Test, w, CcOperands { dst: a, src: b, src2: N }, fl);
}

/// A locked operation on memory: the atomic gives the old value, from which the flags follow.
fn locked(t: &mut Translator, insn: &Instruction, w: Width) {
    let m = insn.mnemonic();
    let b = t.read(insn, 1, w);
    let (rmw, operand) = match m {
        Mnemonic::Add => (Rmw::Add, b),
        Mnemonic::Sub => (Rmw::Sub, b),
        Mnemonic::And => (Rmw::And, b),
        Mnemonic::Or => (Rmw::Or, b),
        Mnemonic::Xor => (Rmw::Xor, b),
        // a + b + c = a + (b + c): the sum wraps the same.
        _ => {
            let fl = t.flags(CF);
            let c = t.b.setcc(tandem_jit::ir::Cond::B, fl);
            let sum = t.b.bin(Op::Add, w, b, c);
            (if m == Mnemonic::Adc { Rmw::Add } else { Rmw::Sub }, sum)
        }
    };
    let a = t.atomic(insn, w, rmw, operand);
    let (_, cc) = compute(t, m, w, a, b);
    cc.set(t, w);
}

/// INC and DEC.
pub(super) fn inc_dec(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let inc = insn.mnemonic() == Mnemonic::Inc;
    let op = if inc { Op::Inc } else { Op::Dec };
    let (r, fl) = if insn.has_lock_prefix() {
        let one = t.b.iconst(1);
        let old = t.atomic(insn, w, if inc { Rmw::Add } else { Rmw::Sub }, one);
        t.b.alu(op, w, [old, N, N, N])
    } else {
        let (place, a) = t.open(insn, 0, w);
        let out = t.b.alu(op, w, [a, N, N, N]);
        t.close(place, w, out.0);
        out
    };
    t.set_flags_inc(if inc { flags::inc(w) } else { flags::dec(w) }, r, fl);
}

/// NEG and NOT.
pub(super) fn neg_not(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let neg = insn.mnemonic() == Mnemonic::Neg;
    if !neg && insn.has_lock_prefix() {
        let ones = t.b.iconst(u64::MAX);
        t.atomic(insn, w, Rmw::Xor, ones);
        return;
    }
    if insn.has_lock_prefix() {
        let p = t.mem_ptr(insn, w as u8, PTR_READ | PTR_WRITE);
        let old = t.ldp(w, p, 0);
        let (r, fl) = t.b.alu(Op::Neg, w, [old, N, N, N]);
        t.swap_or_retry(p, w, old, r);
        t.set_flags(CcKind::Sub, w, CcOperands { dst: r, src: old, src2: N }, fl);
        return;
    }
    let (place, a) = t.open(insn, 0, w);
    if neg {
        let (r, fl) = t.b.alu(Op::Neg, w, [a, N, N, N]);
        t.close(place, w, r);
        t.set_flags(CcKind::Sub, w, CcOperands { dst: r, src: a, src2: N }, fl);
    } else {
        let r = t.b.un(Op::Not, w, a);
        t.close(place, w, r);
    }
}

/// XADD: the sum goes to the destination, the old destination to the source.
pub(super) fn xadd(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let b = t.read(insn, 1, w);
    let Some(src) = super::operand::Gpr::of(insn.op1_register()) else { return t.ud() };
    let (a, place) = if insn.has_lock_prefix() {
        (t.atomic(insn, w, Rmw::Add, b), None)
    } else {
        let (place, a) = t.open(insn, 0, w);
        (a, Some(place))
    };
    let (r, cc) = compute(t, Mnemonic::Add, w, a, b);
    match place {
        // With both operands in one register the sum wins.
        Some(place @ super::memory::Place::Reg(_)) => {
            let a = t.zero_upper(w, a);
            t.set_gpr(src, a);
            t.close(place, w, r);
        }
        Some(place) => {
            t.close(place, w, r);
            t.set_gpr(src, a);
        }
        None => t.set_gpr(src, a),
    }
    cc.set(t, w);
}

/// CMPXCHG.
pub(super) fn cmpxchg(t: &mut Translator, insn: &Instruction) {
    use super::memory::Place;
    use super::operand::Gpr;
    let w = t.op_width(insn, 0);
    let acc = Gpr { num: 0, w, high: false };
    let new = t.read(insn, 1, w);
    let expect = t.gpr(acc);
    let done = if insn.has_lock_prefix() {
        let p = t.mem_ptr(insn, w as u8, PTR_READ | PTR_WRITE);
        let (old, fl) = t.cas(w, p, expect, new);
        t.b.ptr_end(p);
        (old, fl)
    } else {
        let (place, old) = t.open(insn, 0, w);
        let fl = t.b.flags_of(Op::Sub, w, [expect, old, N, N]);
        match place {
            Place::Mem(_) => {
                let v = t.b.selcc(w, tandem_jit::ir::Cond::E, fl, new, old);
                t.close(place, w, v);
            }
            // A 32-bit register destination stays as it is, upper half included, if the
            // comparison fails.
            Place::Reg(r) => {
                let whole = t.gpr64(r.num);
                let new = t.merged(r, whole, new);
                let v = t.b.selcc(Width::W64, tandem_jit::ir::Cond::E, fl, new, whole);
                t.set_gpr64(r.num, v);
            }
        }
        (old, fl)
    };
    let (old, fl) = done;
    // The accumulator keeps its upper half if the comparison succeeds.
    let whole = t.gpr64(0);
    let loaded = t.merged(acc, whole, old);
    let v = t.b.selcc(Width::W64, tandem_jit::ir::Cond::E, fl, whole, loaded);
    if insn.op0_kind() == iced_x86::OpKind::Memory || Gpr::of(insn.op0_register()) != Some(acc) {
        t.set_gpr64(0, v);
    }
    t.set_flags(CcKind::Cmp, w, CcOperands { dst: expect, src: old, src2: N }, fl);
}
