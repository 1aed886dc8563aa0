//! Moves, exchanges and conversions.

use super::Translator;
use super::operand::{Gpr, seg_num};
use crate::x86::bits::rflags::{AF, CF, PF, SF, ZF};
use crate::x86::cpu::Cpu;
use crate::x86::helpers;
use iced_x86::{Instruction, Mnemonic, OpKind};
use std::mem::offset_of;
use tandem_accel::x86::{Segment, seg};
use tandem_jit::ir::{Addr, Cond, LD_SX32, LD_SX64, Op, PTR_READ, PTR_WRITE, Rmw, Val, Width};

const N: Val = Val::NONE;

/// MOV in all its forms.
pub(super) fn mov(t: &mut Translator, insn: &Instruction) {
    let (dst, src) = (insn.op0_register(), insn.op1_register());
    if let Some(n) = seg_num(dst) {
        return load_segment(t, insn, n);
    }
    if let Some(n) = seg_num(src) {
        return store_segment(t, insn, n);
    }
    if dst.is_cr() || dst.is_dr() || src.is_cr() || src.is_dr() {
        return super::system::mov_control(t, insn);
    }
    if dst.is_tr() || src.is_tr() {
        return t.ud();
    }
    let w = t.op_width(insn, 0);
    let v = t.read(insn, 1, w);
    let v = match insn.op1_kind() {
        OpKind::Register if insn.op0_kind() == OpKind::Register => t.zero_upper(w, v),
        OpKind::Immediate32 => t.zero_upper(w, v),
        _ => v,
    };
    t.write(insn, 0, w, v);
}

/// The selector of segment register `n`.
pub(super) fn selector(t: &mut Translator, n: usize) -> Val {
    let at = super::cpu_field(offset_of!(Cpu, seg))
        + (n * size_of::<Segment>() + offset_of!(Segment, selector)) as u32;
    t.b.ldenv(Width::W16, at)
}

fn store_segment(t: &mut Translator, insn: &Instruction, n: usize) {
    let v = selector(t, n);
    match Gpr::of(insn.op0_register()) {
        Some(r) => t.set_gpr(r, v),
        None => t.write(insn, 0, Width::W16, v),
    }
}

fn load_segment(t: &mut Translator, insn: &Instruction, n: usize) {
    if n == seg::CS {
        return t.ud();
    }
    let v = t.read(insn, 1, Width::W16);
    let v = t.b.un(Op::Zext, Width::W16, v);
    set_segment(t, n, v);
    after_segment(t, n);
}

/// Loads segment register `n`; may fault.
pub(super) fn set_segment(t: &mut Translator, n: usize, selector: Val) {
    let n = t.b.iconst(n as u64);
    t.b.call_void(helpers::LOAD_SEG, &[n, selector]);
}

/// Outside 64-bit code a segment load may change the mode, which ends the block. A load of SS also
/// holds interrupts back for one instruction: in 64-bit code the block goes on for just that one.
pub(super) fn after_segment(t: &mut Translator, n: usize) {
    if t.code64() {
        return;
    }
    if n == seg::SS {
        t.shadow_and_leave(false);
    } else {
        let next = t.b.iconst(t.next);
        t.jump(next, tandem_jit::ir::ExitHint::Jump);
    }
}

/// MOVZX, MOVSX, MOVSXD.
pub(super) fn extend(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let from = t.op_width(insn, 1);
    let signed = insn.mnemonic() != Mnemonic::Movzx;
    let v = if insn.op1_kind() == OpKind::Memory {
        let addr = t.mem_addr(insn, from.bytes(), PTR_READ);
        let ext = match (signed && from < dst.w, dst.w) {
            (false, _) => 0,
            (true, Width::W64) => LD_SX64,
            (true, _) => LD_SX32,
        };
        t.b.ld(from, addr, ext)
    } else {
        let v = t.read(insn, 1, from);
        let v = t.b.un(if signed { Op::Sext } else { Op::Zext }, from, v);
        if signed && dst.w == Width::W32 { t.b.un(Op::Zext, Width::W32, v) } else { v }
    };
    t.set_gpr(dst, v);
}

/// LEA.
pub(super) fn lea(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let mut o = t.mem_offset(insn);
    // A narrow result needs no wide sum.
    if dst.w < o.size && o.size == Width::W64 && i32::try_from(o.disp).is_ok() {
        o.size = Width::W32;
    }
    let v = t.offset_value(o);
    let v = if dst.w == Width::W32 && o.size == Width::W64 { t.zero_upper(dst.w, v) } else { v };
    t.set_gpr(dst, v);
}

/// XCHG; locked when it touches memory.
pub(super) fn xchg(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    // Memory may be either operand.
    let (mem, reg) = if insn.op1_kind() == OpKind::Memory { (1, 0) } else { (0, 1) };
    let Some(r) = Gpr::of(insn.op_register(reg)) else { return t.ud() };
    let v = t.gpr(r);
    if insn.op_kind(mem) == OpKind::Memory {
        let old = t.atomic(insn, w, Rmw::Xchg, v);
        return t.set_gpr(r, old);
    }
    let Some(other) = Gpr::of(insn.op_register(mem)) else { return t.ud() };
    let old = t.gpr(other);
    let v = t.zero_upper(w, v);
    let old = t.zero_upper(w, old);
    t.set_gpr(other, v);
    t.set_gpr(r, old);
}

/// BSWAP. With a 16-bit operand the result is undefined: processors give 0.
pub(super) fn bswap(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let v = if r.w == Width::W16 {
        t.b.iconst(0)
    } else {
        let v = t.gpr(r);
        t.b.un(Op::Bswap, r.w, v)
    };
    t.set_gpr(r, v);
}

/// MOVBE.
pub(super) fn movbe(t: &mut Translator, insn: &Instruction) {
    let w = t.op_width(insn, 0);
    let v = t.read(insn, 1, w);
    let v = t.b.un(Op::Bswap, w, v);
    t.write(insn, 0, w, v);
}

/// XLAT: AL = [rBX + AL].
pub(super) fn xlat(t: &mut Translator, insn: &Instruction) {
    let al = t.gpr64(0);
    let al = t.b.un(Op::Zext, Width::W8, al);
    let mut o = t.mem_offset(insn);
    o.index = al;
    o.scale = 0;
    let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
    let addr = t.linear(segment, o, 1, PTR_READ);
    let v = t.b.ld(Width::W8, addr, 0);
    t.set_gpr(Gpr { num: 0, w: Width::W8, high: false }, v);
}

const fn acc(w: Width) -> Gpr {
    Gpr { num: 0, w, high: false }
}

/// CBW, CWDE, CDQE: the accumulator's lower half sign-extended.
pub(super) fn widen(t: &mut Translator, from: Width, to: Width) {
    let v = t.gpr64(0);
    let v = t.b.un(Op::Sext, from, v);
    let v = t.zero_upper(to, v);
    t.set_gpr(acc(to), v);
}

/// CWD, CDQ, CQO: the accumulator's sign into rDX.
pub(super) fn sign_to_dx(t: &mut Translator, w: Width) {
    let v = t.gpr64(0);
    // Only the low w bits of a narrow result mean anything, and the sign must come from bit w - 1.
    let v = if w == Width::W16 { t.b.un(Op::Sext, w, v) } else { v };
    let (count, at) = if w == Width::W64 { (63, Width::W64) } else { (31, Width::W32) };
    let n = t.b.iconst(count);
    let v = t.b.bin(Op::Sar, at, v, n);
    t.set_gpr(Gpr { num: 2, w, high: false }, v);
}

/// CMOVcc. The source is read, and a 32-bit destination zero-extended, in any case.
pub(super) fn cmov(t: &mut Translator, insn: &Instruction) {
    let Some(dst) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let cond = condition(insn);
    let v = t.read(insn, 1, dst.w);
    let old = t.gpr(dst);
    let fl = t.flags(cond.reads());
    let v = t.b.selcc(dst.w, cond, fl, v, old);
    t.set_gpr(dst, v);
}

/// SETcc.
pub(super) fn setcc(t: &mut Translator, insn: &Instruction) {
    let cond = condition(insn);
    let fl = t.flags(cond.reads());
    let v = t.b.setcc(cond, fl);
    t.write(insn, 0, Width::W8, v);
}

/// The condition of a Jcc, CMOVcc or SETcc.
pub(super) fn condition(insn: &Instruction) -> Cond {
    Cond::from_code((insn.condition_code() as u8).wrapping_sub(1))
}

/// LAHF: SF, ZF, AF, PF and CF, and bit 1, into AH.
pub(super) fn lahf(t: &mut Translator) {
    let image = t.flags_image();
    let two = t.b.iconst(2);
    let v = t.b.bin(Op::Or, Width::W32, image, two);
    t.set_gpr(Gpr { num: 0, w: Width::W8, high: true }, v);
}

/// SAHF: the same flags from AH; OF stays.
pub(super) fn sahf(t: &mut Translator) {
    let fl = t.flags(crate::x86::bits::rflags::OF);
    let of = t.b.setcc(Cond::O, fl);
    let eleven = t.b.iconst(11);
    let of = t.b.bin(Op::Shl, Width::W32, of, eleven);
    let ah = t.gpr(Gpr { num: 0, w: Width::W8, high: true });
    let mask = t.b.iconst(SF | ZF | AF | PF | CF);
    let ah = t.b.bin(Op::And, Width::W32, ah, mask);
    let image = t.b.bin(Op::Or, Width::W32, ah, of);
    t.set_flags_image(image);
}

/// SALC (undocumented): AL = all ones if CF, else 0.
pub(super) fn salc(t: &mut Translator) {
    let fl = t.flags(CF);
    let c = t.b.setcc(Cond::B, fl);
    let v = t.b.un(Op::Neg, Width::W32, c);
    t.set_gpr(acc(Width::W8), v);
}

/// CMPXCHG8B and CMPXCHG16B.
pub(super) fn cmpxchg_wide(t: &mut Translator, insn: &Instruction) {
    let lock = insn.has_lock_prefix();
    if insn.mnemonic() == Mnemonic::Cmpxchg16b {
        let addr = t.mem_addr_aligned(insn, 16, 1, PTR_READ | PTR_WRITE);
        let v = t.b.lea(Width::W64, addr);
        let size = t.b.iconst(16);
        t.b.call_void(helpers::CHECK_ALIGNED, &[v, size]);
        let p = t.b.ptr(4, Addr::base(v), PTR_READ | PTR_WRITE);
        t.b.call_void(helpers::CMPXCHG16B, &[p]);
        t.flags_unknown();
        t.b.ptr_end(p);
        return;
    }
    let pair = |t: &mut Translator, lo: u8, hi: u8| {
        let (lo, hi) = (t.gpr64(lo), t.gpr64(hi));
        t.b.deposit(Width::W32, lo, hi, 32)
    };
    let expect = pair(t, 0, 2);
    let new = pair(t, 3, 1);
    let p = t.mem_ptr(insn, 3, PTR_READ | PTR_WRITE);
    let (old, fl) = if lock {
        t.cas(Width::W64, p, expect, new)
    } else {
        let old = t.ldp(Width::W64, p, 0);
        let fl = t.b.flags_of(Op::Sub, Width::W64, [expect, old, N, N]);
        let v = t.b.selcc(Width::W64, Cond::E, fl, new, old);
        t.stp(Width::W64, p, 0, v);
        (old, fl)
    };
    t.b.ptr_end(p);
    let lo = t.b.un(Op::Zext, Width::W32, old);
    let thirty_two = t.b.iconst(32);
    let hi = t.b.bin(Op::Shr, Width::W64, old, thirty_two);
    wide_result(t, fl, lo, hi);
}

/// Sets rDX:rAX to what was in memory unless the comparison `fl` succeeded, and ZF.
fn wide_result(t: &mut Translator, fl: Val, lo: Val, hi: Val) {
    let zf = t.b.setcc(Cond::E, fl);
    let (a, d) = (t.gpr64(0), t.gpr64(2));
    let image = t.flags_image();
    let a = t.b.selcc(Width::W64, Cond::E, fl, a, lo);
    let d = t.b.selcc(Width::W64, Cond::E, fl, d, hi);
    t.set_gpr64(0, a);
    t.set_gpr64(2, d);
    let mask = t.b.iconst(!ZF);
    let image = t.b.bin(Op::And, Width::W32, image, mask);
    let six = t.b.iconst(6);
    let bit = t.b.bin(Op::Shl, Width::W32, zf, six);
    let image = t.b.bin(Op::Or, Width::W32, image, bit);
    t.set_flags_image(image);
}
