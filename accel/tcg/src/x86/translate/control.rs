//! Jumps, calls, returns, loops, software interrupts.

use super::Translator;
use super::mov::condition;
use super::operand::{Gpr, seg_num};
use crate::x86::bits::rflags::{OF, ZF};
use crate::x86::helpers;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use tandem_accel::x86::seg;
use tandem_jit::ir::{Addr, Cond, ExitHint, Op, PTR_READ, Val, Width};

const N: Val = Val::NONE;

/// Width of the instruction pointer that a near branch writes: its operand size.
fn branch_width(insn: &Instruction) -> Width {
    match insn.op0_kind() {
        OpKind::NearBranch16 => Width::W16,
        OpKind::NearBranch32 => Width::W32,
        OpKind::NearBranch64 => Width::W64,
        OpKind::Register => Gpr::of(insn.op0_register()).map_or(Width::W64, |r| r.w),
        _ => Width::from_bytes(insn.memory_size().size() as u32).unwrap_or(Width::W64),
    }
}

/// Jcc: a side exit to the target; the block goes on at the next instruction. If it goes on at the
/// target, `taken`, the side exit is to the next instruction.
pub(super) fn jcc(t: &mut Translator, insn: &Instruction, taken: bool) {
    let cond = condition(insn);
    let fl = t.flags(cond.reads());
    branch(t, insn, cond, fl, taken);
}

fn branch(t: &mut Translator, insn: &Instruction, cond: Cond, fl: Val, taken: bool) {
    let target = t.wrap(insn.near_branch_target());
    if taken {
        let exit = t.exit_to(t.next, ExitHint::Jump);
        t.b.brcc(cond.negate(), fl, exit);
        // If the block has no room for what is there, it still goes on there.
        t.next = target;
    } else {
        let exit = t.exit_to(target, ExitHint::Jump);
        t.b.brcc(cond, fl, exit);
    }
}

/// JMP near. A direct one inside the block's page goes on with the target.
pub(super) fn jmp(t: &mut Translator, insn: &Instruction, follow: bool) {
    if is_direct(insn) {
        let target = t.wrap(insn.near_branch_target());
        if follow {
            // If the block has no room for what is there, it still goes on there.
            t.next = target;
        } else {
            t.goto(target);
        }
        return;
    }
    let target = indirect_target(t, insn);
    t.jump(target, ExitHint::Jump);
}

fn is_direct(insn: &Instruction) -> bool {
    matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

fn indirect_target(t: &mut Translator, insn: &Instruction) -> Val {
    let w = branch_width(insn);
    let v = t.read(insn, 0, w);
    if w == Width::W64 || insn.op0_kind() == OpKind::Memory { v } else { t.b.un(Op::Zext, w, v) }
}

/// CALL near.
pub(super) fn call(t: &mut Translator, insn: &Instruction) {
    let w = branch_width(insn);
    let ret = t.b.iconst(t.next);
    if is_direct(insn) {
        t.push(w, ret);
        t.goto_call(t.wrap(insn.near_branch_target()));
    } else {
        let target = indirect_target(t, insn);
        t.push(w, ret);
        t.jump(target, ExitHint::Call { ret: t.next });
    }
}

/// RET near.
pub(super) fn ret(t: &mut Translator, insn: &Instruction) {
    let w = match insn.code() {
        Code::Retnw | Code::Retnw_imm16 => Width::W16,
        Code::Retnd | Code::Retnd_imm16 => Width::W32,
        _ => Width::W64,
    };
    let target = t.top(w);
    let extra = if insn.op_count() > 0 { i64::from(insn.immediate16()) } else { 0 };
    t.drop_stack(i64::from(w.bytes()) + extra);
    t.jump(target, ExitHint::Ret);
}

/// The counter register of a LOOP or JCXZ, as wide as its address size.
fn counter(insn: &Instruction) -> Gpr {
    let w = match insn.code() {
        Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => Width::W16,
        Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => Width::W64,
        _ => Width::W32,
    };
    Gpr { num: 1, w, high: false }
}

/// JCXZ, JECXZ, JRCXZ.
pub(super) fn jcxz(t: &mut Translator, insn: &Instruction, taken: bool) {
    let r = counter(insn);
    let v = t.gpr(r);
    let fl = t.b.flags_of(Op::And, r.w, [v, v, N, N]);
    branch(t, insn, Cond::E, fl, taken);
}

/// LOOP, LOOPE, LOOPNE.
pub(super) fn r#loop(t: &mut Translator, insn: &Instruction, taken: bool) {
    let r = counter(insn);
    // Flags first: having them worked out must not come after the counter's write.
    let zero = match insn.mnemonic() {
        Mnemonic::Loop => None,
        m => {
            let fl = t.flags(ZF);
            let cond = if m == Mnemonic::Loope { Cond::E } else { Cond::Ne };
            Some(t.b.setcc(cond, fl))
        }
    };
    let old = t.gpr(r);
    let one = t.b.iconst(1);
    let (v, mut fl) = t.b.alu(Op::Sub, r.w, [old, one, N, N]);
    t.set_gpr(r, v);
    if let Some(also) = zero {
        let more = t.b.setcc(Cond::Ne, fl);
        fl = t.b.flags_of(Op::And, Width::W32, [more, also, N, N]);
    }
    branch(t, insn, Cond::Ne, fl, taken);
}

/// JMP and CALL far.
pub(super) fn far(t: &mut Translator, insn: &Instruction) {
    let call = insn.mnemonic() == Mnemonic::Call;
    let (w, selector, offset) = match insn.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => {
            let wide = insn.op0_kind() == OpKind::FarBranch32;
            let offset = if wide { insn.far_branch32() } else { u32::from(insn.far_branch16()) };
            let sel = t.b.iconst(insn.far_branch_selector().into());
            let off = t.b.iconst(offset.into());
            (if wide { Width::W32 } else { Width::W16 }, sel, off)
        }
        _ => {
            let w = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => Width::W16,
                Code::Jmp_m1632 | Code::Call_m1632 => Width::W32,
                _ => Width::W64,
            };
            let addr = t.mem_addr(insn, w.bytes() + 2, PTR_READ);
            let offset = t.b.ld(w, addr, 0);
            let at = t.b.lea(Width::W64, addr);
            let sel = t.b.ld(Width::W16, Addr::disp(at, w.bytes() as i32), 0);
            (w, sel, offset)
        }
    };
    let size = t.b.iconst(w.bytes().into());
    let next = t.b.iconst(t.next);
    let helper = if call { helpers::FAR_CALL } else { helpers::FAR_JMP };
    t.b.call_void(helper, &[selector, offset, size, next]);
    t.jump_rip();
}

/// RETF.
pub(super) fn retf(t: &mut Translator, insn: &Instruction) {
    let bytes = match insn.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let extra = if insn.op_count() > 0 { insn.immediate16() } else { 0 };
    let size = t.b.iconst(bytes);
    let extra = t.b.iconst(extra.into());
    t.b.call_void(helpers::FAR_RET, &[size, extra]);
    t.jump_rip();
}

/// IRET, IRETD, IRETQ.
pub(super) fn iret(t: &mut Translator, insn: &Instruction) {
    let size = match insn.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    let size = t.b.iconst(size);
    let next = t.b.iconst(t.next);
    t.b.call_void(helpers::IRET, &[size, next]);
    t.jump_rip();
}

/// INT n, INT3, INT1: `kind` is 0, 1 or 3.
pub(super) fn int(t: &mut Translator, vector: u8, kind: u64) {
    let vector = t.b.iconst(vector.into());
    let next = t.b.iconst(t.next);
    let kind = t.b.iconst(kind);
    t.b.call_void(helpers::INT_N, &[vector, next, kind]);
    // The way into the handler is no instruction to step over: TF is clear by now.
    t.jump_rip_unstepped();
}

/// INTO: INT 4 if OF.
pub(super) fn into(t: &mut Translator) {
    // Without OF, on to the next instruction.
    let fl = t.flags(OF);
    let exit = t.exit_to(t.next, ExitHint::Jump);
    t.b.brcc(Cond::No, fl, exit);
    int(t, crate::x86::exception::vector::OF, 2);
}

/// BOUND: #BR unless lower <= index <= upper, signed.
pub(super) fn bound(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let n = r.w.bytes();
    let o = t.mem_offset(insn);
    let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
    let addr = t.linear_aligned(segment, o, 2 * n, n, PTR_READ);
    let lower = t.b.ld(r.w, addr, 0);
    let at = t.b.lea(Width::W64, addr);
    let upper = t.b.ld(r.w, Addr::disp(at, n as i32), 0);
    let args = [t.gpr(r), lower, upper].map(|v| t.b.un(Op::Sext, r.w, v));
    t.b.call_void(helpers::BOUND, &args);
}

/// UD0, UD1, UD2 and the rest of what is not there.
pub(super) fn undefined(t: &mut Translator, insn: &Instruction) {
    // An instruction longer than 15 bytes is #GP, not #UD (SDM vol. 2 §2.3.11).
    if insn.is_invalid() && insn.len() >= 15 {
        return t.gp0();
    }
    t.ud();
}
