//! Bit tests, scans and counts, BMI, ADX, CRC32.

use super::Translator;
use super::cc::CcOperands;
use super::operand::{Gpr, Offset, seg_num};
use crate::x86::bits::rflags::{CF, OF};
use crate::x86::flags::CcKind;
use iced_x86::{Instruction, Mnemonic, OpKind};
use tandem_accel::x86::seg;
use tandem_jit::ir::{
    Addr, Cond, Encoding, Inst, Native, NativeReg, Op, PTR_LOCKED, PTR_READ, PTR_WRITE, Rmw, Val,
    Width,
};

const N: Val = Val::NONE;

/// BT, BTS, BTR, BTC.
pub(super) fn bit_test(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let m = insn.mnemonic();
    let bit = t.read(insn, 1, w);
    if insn.op0_kind() != OpKind::Memory {
        let (place, a) = t.open(insn, 0, w);
        let fl = t.b.flags_of(Op::Bt, w, [a, bit, N, N]);
        if m != Mnemonic::Bt {
            let (op, operand, _) = change(t, m, w, bit);
            let r = t.b.bin(op, w, a, operand);
            t.close(place, w, r);
        }
        return set_bit_flags(t, fl);
    }
    let addr = bit_string(t, insn, w, bit);
    if m == Mnemonic::Bt {
        let a = t.b.ld(w, addr, 0);
        let fl = t.b.flags_of(Op::Bt, w, [a, bit, N, N]);
        return set_bit_flags(t, fl);
    }
    let lock = if insn.has_lock_prefix() { PTR_LOCKED } else { 0 };
    let p = t.b.ptr(w as u8, addr, PTR_READ | PTR_WRITE | lock);
    let (op, operand, rmw) = change(t, m, w, bit);
    let old = if insn.has_lock_prefix() {
        t.rmw(w, p, rmw, operand)
    } else {
        let old = t.ldp(w, p, 0);
        let new = t.b.bin(op, w, old, operand);
        t.stp(w, p, 0, new);
        old
    };
    t.b.ptr_end(p);
    let fl = t.b.flags_of(Op::Bt, w, [old, bit, N, N]);
    set_bit_flags(t, fl);
}

fn set_bit_flags(t: &mut Translator, fl: Val) {
    if t.flags_dead() {
        return t.set_carry(N, fl);
    }
    let cf = t.b.setcc(Cond::B, fl);
    t.set_carry(cf, fl);
}

/// The operation and operand that set, reset or complement bit `bit` mod `w`.
fn change(t: &mut Translator, m: Mnemonic, w: Width, bit: Val) -> (Op, Val, Rmw) {
    // Shifts of narrow operands do not wrap at their width.
    let bit = if w < Width::W32 {
        let mask = t.b.iconst(u64::from(w.bits()) - 1);
        t.b.bin(Op::And, Width::W32, bit, mask)
    } else {
        bit
    };
    let one = t.b.iconst(1);
    let mask = t.b.bin(Op::Shl, w, one, bit);
    match m {
        Mnemonic::Bts => (Op::Or, mask, Rmw::Or),
        Mnemonic::Btr => (Op::And, t.b.un(Op::Not, w, mask), Rmw::And),
        _ => (Op::Xor, mask, Rmw::Xor),
    }
}

/// Linear address of the word that holds bit `bit` of the bit string at the memory operand: a
/// register bit number is signed and reaches beyond the operand, an immediate one does not (SDM
/// vol. 2, BT).
fn bit_string(t: &mut Translator, insn: &Instruction, w: Width, bit: Val) -> Addr {
    let access = if insn.mnemonic() == Mnemonic::Bt { PTR_READ } else { PTR_READ | PTR_WRITE };
    if insn.op1_kind() != OpKind::Register {
        return t.mem_addr(insn, w.bytes(), access);
    }
    let o = t.mem_offset(insn);
    let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
    let base = t.offset_value(o);
    // Word number times word size, in bytes.
    let at = if o.size == Width::W64 { Width::W64 } else { Width::W32 };
    let wide = if w < at || w == Width::W16 { t.b.un(Op::Sext, w, bit) } else { bit };
    let (shift, mask) = (t.b.iconst(3), t.b.iconst(!u64::from(w.bytes() - 1)));
    let bytes = t.b.bin(Op::Sar, at.max(w), wide, shift);
    let bytes = t.b.bin(Op::And, at, bytes, mask);
    let o = Offset { base, index: bytes, scale: 0, disp: 0, size: o.size };
    t.linear(segment, o, w.bytes(), access)
}

/// BSF and BSR: the destination stays as it is if the source is 0.
pub(super) fn scan(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = dst.w;
    let src = t.read(insn, 1, w);
    let n = if insn.mnemonic() == Mnemonic::Bsf {
        t.b.un(Op::Ctz, w, src)
    } else {
        let n = t.b.un(Op::Clz, w, src);
        let top = t.b.iconst(u64::from(w.bits()) - 1);
        t.b.bin(Op::Xor, w.max(Width::W32), n, top)
    };
    let fl = t.b.flags_of(Op::And, w, [src, src, N, N]);
    let whole = t.gpr64(dst.num);
    let new = if w == Width::W16 { t.b.deposit(w, whole, n, 0) } else { n };
    let v = t.b.selcc(Width::W64, Cond::E, fl, whole, new);
    t.set_gpr64(dst.num, v);
    t.set_flags(CcKind::Zero, w, CcOperands { dst: src, src: N, src2: N }, fl);
}

/// LZCNT and TZCNT.
pub(super) fn count_zeros(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = dst.w;
    let src = t.read(insn, 1, w);
    let op = if insn.mnemonic() == Mnemonic::Lzcnt { Op::Clz } else { Op::Ctz };
    let n = t.b.un(op, w, src);
    t.set_gpr(dst, n);
    let one = t.b.iconst(1);
    let zero = t.b.flags_of(Op::And, w, [n, n, N, N]);
    // src < 1 is a carry out of src - 1.
    let carry = t.b.flags_of(Op::Sub, w, [src, one, N, N]);
    t.set_flags(CcKind::Count, w, CcOperands { dst: n, src, src2: N }, zero);
    t.override_known(carry, CF);
}

/// POPCNT.
pub(super) fn popcnt(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let src = t.read(insn, 1, dst.w);
    let n = t.b.un(Op::Popcnt, dst.w, src);
    t.set_gpr(dst, n);
    // PF is clear, which no operation on the count gives; the description has it right.
    t.set_flags(CcKind::Zero, dst.w, CcOperands { dst: n, src: N, src2: N }, N);
}

/// ANDN: NOT of the first source AND the second.
pub(super) fn andn(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let b = t.read(insn, 2, dst.w);
    let a = t.read(insn, 1, dst.w);
    let not = t.b.un(Op::Not, dst.w, a);
    let (r, fl) = t.b.alu(Op::And, dst.w, [not, b, N, N]);
    t.set_gpr(dst, r);
    t.set_flags_logic(dst.w, r, fl);
}

/// BLSI, BLSR, BLSMSK.
pub(super) fn lowest_bit(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = dst.w;
    let src = t.read(insn, 1, w);
    let (other, carry, op, kind) = match insn.mnemonic() {
        Mnemonic::Blsi => {
            let (v, c) = t.b.alu(Op::Neg, w, [src, N, N, N]);
            (v, c, Op::And, CcKind::CarryIf)
        }
        m => {
            let one = t.b.iconst(1);
            let (v, c) = t.b.alu(Op::Sub, w, [src, one, N, N]);
            let op = if m == Mnemonic::Blsr { Op::And } else { Op::Xor };
            (v, c, op, CcKind::CarryIfNot)
        }
    };
    let (r, fl) = t.b.alu(op, w, [src, other, N, N]);
    t.set_gpr(dst, r);
    t.set_flags(kind, w, CcOperands { dst: r, src, src2: N }, fl);
    t.override_known(carry, CF);
}

const PASS: Native = Native {
    enc: Encoding::Vex,
    prefix: 0,
    map: 2,
    opcode: 0,
    w: false,
    l: 0,
    reg: NativeReg::GprDst,
    rm: NativeReg::GprB,
    vvvv: NativeReg::GprC,
    imm8: None,
    dst_in: false,
    sets_flags: true,
    vector: false,
    fp: false,
    x87: false,
};

/// BEXTR and BZHI, by the host's own instruction.
pub(super) fn extract(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = dst.w;
    let src = t.read(insn, 1, w);
    let control = t.read(insn, 2, w);
    let bzhi = insn.mnemonic() == Mnemonic::Bzhi;
    let native = Native { opcode: if bzhi { 0xf5 } else { 0xf7 }, w: w == Width::W64, ..PASS };
    let (r, fl) = (t.b.new_val(), t.b.new_val());
    t.b.native(native, r, N, fl, [N, src, control, N]);
    t.set_gpr(dst, r);
    if !bzhi {
        return t.set_flags_logic(w, r, fl);
    }
    // CF: the bit number, 8 bits of it, is beyond the operand.
    let index = t.b.un(Op::Zext, Width::W8, control);
    let shift = t.b.iconst(if w == Width::W64 { 6 } else { 5 });
    let beyond = t.b.bin(Op::Shr, Width::W32, index, shift);
    t.set_flags(CcKind::CarryIf, w, CcOperands { dst: r, src: beyond, src2: N }, fl);
}

/// PDEP and PEXT.
pub(super) fn deposit(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let mask = t.read(insn, 2, dst.w);
    let src = t.read(insn, 1, dst.w);
    let op = if insn.mnemonic() == Mnemonic::Pdep { Op::Pdep } else { Op::Pext };
    let r = t.b.bin(op, dst.w, src, mask);
    t.set_gpr(dst, r);
}

/// ADCX and ADOX: an addition whose carry is CF or OF, and no other flag.
pub(super) fn add_carry(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let b = t.read(insn, 1, w);
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let a = t.gpr(dst);
    // The carry is a value of its own, so that two chains do not fight for the flags.
    let adcx = insn.mnemonic() == Mnemonic::Adcx;
    let (flag, cond) = if adcx { (CF, Cond::B) } else { (OF, Cond::O) };
    let fl = t.flags(flag);
    let carry = t.b.setcc(cond, fl);
    let zero = t.b.iconst(0);
    let c = t.b.flags_of(Op::Bt, Width::W32, [carry, zero, N, N]);
    let (r, out) = t.b.alu(Op::Adc, w, [a, b, c, N]);
    t.set_gpr(dst, r);
    let mut image = t.b.setcc(Cond::B, out);
    if !adcx {
        let eleven = t.b.iconst(11);
        image = t.b.bin(Op::Shl, Width::W32, image, eleven);
    }
    let fl = t.image_flags(image);
    t.override_flags(fl, flag);
}

/// CRC32.
pub(super) fn crc32(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let w = t.op_width(insn, 1);
    let mut data = t.read(insn, 1, w);
    let mut sum = t.gpr64(dst.num);
    let native = Native {
        enc: Encoding::Legacy,
        prefix: 0xf2,
        opcode: if w < Width::W32 { 0xf0 } else { 0xf1 },
        w: w == Width::W64,
        vvvv: NativeReg::Fixed(0),
        dst_in: true,
        sets_flags: false,
        ..PASS
    };
    // A 16-bit step is two 8-bit steps.
    for step in 0..if w == Width::W16 { 2 } else { 1 } {
        if step == 1 {
            data = t.b.extract(Width::W8, data, 8);
        }
        let r = t.b.new_val();
        t.b.native(native, r, N, N, [N, data, N, sum]);
        sum = r;
    }
    t.set_gpr64(dst.num, sum);
}

/// MULX: high and low half of rDX times the source, no flags.
pub(super) fn mulx(t: &mut Translator, insn: &Instruction) {
    let (Some(hi), Some(lo)) = (Gpr::of(insn.op0_register()), Gpr::of(insn.op1_register())) else {
        return t.ud();
    };
    let w = hi.w;
    let b = t.read(insn, 2, w);
    let a = t.gpr64(2);
    let (low, high) = (t.b.new_val(), t.b.new_val());
    let ins = [a, b, N, N];
    t.b.push(Inst { dst: low, dst2: high, ins, ..Inst::new(Op::MulU2, w) });
    t.set_gpr(lo, low);
    // With both in one register the high half wins.
    t.set_gpr(hi, high);
}
