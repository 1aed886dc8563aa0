//! Vector instructions: SSE, AVX, AVX-512 and their relatives, passed through to the host.
//!
//! Nearly all of them take one path ([`plain`]): the operands' places come from the table
//! ([`super::vector_form`]), the memory operand becomes a host pointer, general registers become IR
//! values, and the instruction itself goes into the block as data. What is left are the few whose
//! memory accesses depend on data ([`super::vector_mem`]), those with implicit general registers, and
//! MXCSR.

use super::translator::LEAVE_RAISE;
use super::vector_form::{Form, Kind, NO_OP, form};
use super::{Translator, mmx, vector_mem};
use crate::x86::cpu::global;
use crate::x86::exception::vector;
use crate::x86::flags::CcKind;
use crate::x86::helpers;
use crate::x86::mode::Mode;
use crate::x86::translate::cc::CcOperands;
use crate::x86::translate::operand::Gpr;
use iced_x86::{Instruction, OpKind, Register, RoundingControl};
use tandem_jit::ir::{
    Cond, Encoding, Exit, ExitHint, ExitKind, Inst, NativeReg, Op, PTR_ALIGNED, PTR_READ,
    PTR_WRITE, Val, Width,
};

/// Translates `insn` if it is a vector instruction.
pub fn translate(t: &mut Translator, insn: &Instruction) -> bool {
    let f = form(insn.code());
    match f.kind {
        Kind::None => return mmx::translate_emms(t, insn),
        Kind::Mmx => return mmx::translate(t, insn, f),
        _ => {}
    }
    if !enabled(t, f) {
        return true;
    }
    match f.kind {
        Kind::Plain => plain(t, insn, f),
        Kind::MaskMov => vector_mem::mask_mov(t, insn, f),
        Kind::Gather => vector_mem::gather(t, insn),
        Kind::Scatter => vector_mem::scatter(t, insn),
        Kind::Strings => strings(t, insn),
        Kind::MaskMovDqu => vector_mem::mask_mov_dqu(t, insn),
        Kind::LoadMxcsr => {
            let v = t.read(insn, 0, Width::W32);
            let reserved = t.b.iconst((!helpers::vector::MXCSR_MASK).into());
            raise_if_set(t, v, reserved);
            let ins = [v, Val::NONE, Val::NONE, Val::NONE];
            t.b.push(Inst { ins, ..Inst::new(Op::SetMxcsr, Width::W64) });
        }
        Kind::StoreMxcsr => {
            let addr = t.mem_addr(insn, 4, PTR_WRITE);
            let dst = t.b.new_val();
            t.b.push(Inst { dst, ..Inst::new(Op::GetMxcsr, Width::W64) });
            t.b.st(Width::W32, addr, dst);
        }
        Kind::None | Kind::Mmx => {}
    }
    true
}

/// Whether the mode allows instructions of this encoding; if not, the exception is in the block (SDM
/// vol. 2 §2.4 and §2.8, the "exceptions" tables).
pub(super) fn enabled(t: &mut Translator, f: &Form) -> bool {
    let ok = match f.native.enc {
        Encoding::Legacy => !t.mode.contains(Mode::SSE_UD),
        Encoding::Vex => t.protected() && t.mode.contains(Mode::AVX),
        Encoding::Evex { .. } => t.protected() && t.mode.contains(Mode::AVX512),
    };
    if !ok {
        t.ud();
    } else if t.mode.contains(Mode::SSE_NM) {
        t.nm();
    } else {
        return true;
    }
    false
}

/// The register field for operand `op`.
fn reg_field(insn: &Instruction, op: u8) -> NativeReg {
    let reg = insn.op_register(op.into());
    if reg.is_gpr() {
        // A general register is written only as the first operand.
        return if op == 0 { NativeReg::GprDst } else { NativeReg::GprB };
    }
    let num = reg.number() as u8;
    if reg.is_k() { NativeReg::Mask(num) } else { NativeReg::Vec(num) }
}

/// Fills in the EVEX bits that come from the instruction; returns the mask register's number.
fn evex_bits(insn: &Instruction, f: &mut Form) -> u8 {
    let Encoding::Evex { aaa, z, b } = &mut f.native.enc else { return 0 };
    *aaa = insn.op_mask().number() as u8;
    *z = insn.zeroing_masking();
    *b = insn.is_broadcast() || insn.suppress_all_exceptions();
    let k = *aaa;
    let rounding = insn.rounding_control();
    if rounding != RoundingControl::None {
        *b = true;
        f.native.l = rounding as u8 - RoundingControl::RoundToNearest as u8;
    }
    if insn.op_mask() == iced_x86::Register::None { 0 } else { k }
}

/// An instruction that the host executes as it is.
fn plain(t: &mut Translator, insn: &Instruction, form: &Form) {
    let mut f = *form;
    let mask = evex_bits(insn, &mut f);
    if f.reg != NO_OP {
        f.native.reg = reg_field(insn, f.reg);
    }
    if f.vvvv != NO_OP {
        f.native.vvvv = reg_field(insn, f.vvvv);
    }
    if f.is4 != NO_OP {
        f.native.imm8 = Some((insn.op_register(f.is4.into()).number() as u8) << 4);
    } else if f.imm {
        f.native.imm8 = Some(insn.immediate8());
    }
    if f.rm == NO_OP {
        emit(t, insn, &f, Val::NONE);
    } else if insn.op_kind(f.rm.into()) == OpKind::Memory {
        f.native.rm = NativeReg::Mem;
        if mask != 0 && !f.whole {
            vector_mem::masked(t, insn, &f, mask);
        } else {
            memory(t, insn, &f);
        }
    } else {
        f.native.rm = reg_field(insn, f.rm);
        emit(t, insn, &f, Val::NONE);
    }
}

/// log2 of the size of the memory operand; vector operands have powers of two up to 64 bytes.
pub(super) fn mem_log2(insn: &Instruction) -> u8 {
    (insn.memory_size().size().max(1).trailing_zeros() as u8).min(6)
}

fn memory(t: &mut Translator, insn: &Instruction, f: &Form) {
    let access = if f.rm == 0 { PTR_WRITE } else { PTR_READ };
    let log2 = mem_log2(insn);
    let addr = if f.aligned {
        // #GP(0) comes before #AC(0).
        t.mem_addr_aligned(insn, 1 << log2, 1, access)
    } else if f.compressed && f.rm == 0 {
        let elem = insn.memory_size().element_size() as u32;
        t.mem_addr_aligned(insn, 1 << log2, elem, access)
    } else {
        t.mem_addr(insn, 1 << log2, access)
    };
    if f.rm == 0 && insn.op_mask() != Register::None {
        // The mask keeps elements of memory as they are.
        let p = t.b.ptr(log2, addr, PTR_READ | PTR_WRITE);
        emit(t, insn, f, p);
        t.b.ptr_end(p);
        return;
    }
    let access = if f.aligned { access | PTR_ALIGNED } else { access };
    let r = results(t, insn, f);
    t.b.native_mem(f.native, log2, addr, access, r.dst, r.fl);
    finish(t, r);
}

/// Raises #GP(0) unless the linear address is a multiple of `1 << log2`.
pub(super) fn check_aligned(t: &mut Translator, addr: Val, log2: u8) {
    let low = t.b.iconst((1 << log2) - 1);
    raise_if_set(t, addr, low);
}

/// Raises #GP(0) if any of the bits `mask` (32 bits) is set in `v`.
fn raise_if_set(t: &mut Translator, v: Val, mask: Val) {
    let fl = t.b.flags_of(Op::And, Width::W32, [v, mask, Val::NONE, Val::NONE]);
    let code = LEAVE_RAISE | u32::from(vector::GP);
    let kind = ExitKind::Leave { code, pc: Some(t.rip) };
    t.b.brcc(Cond::Ne, fl, Exit::new(kind, ExitHint::Jump));
}

/// What an instruction writes besides vector registers.
struct Results {
    /// Value for the general register.
    dst: Val,
    gpr: Option<Gpr>,
    fl: Val,
}

/// Values for the results of an instruction.
fn results(t: &mut Translator, insn: &Instruction, f: &Form) -> Results {
    let mut r = Results { dst: Val::NONE, gpr: None, fl: Val::NONE };
    for (field, op) in [(f.native.reg, f.reg), (f.native.rm, f.rm), (f.native.vvvv, f.vvvv)] {
        if field == NativeReg::GprDst {
            r.dst = t.b.new_val();
            r.gpr = Gpr::of(insn.op_register(op.into()));
        }
    }
    if f.native.sets_flags {
        r.fl = t.b.new_val();
    }
    r
}

/// Writes the results to the guest's state.
fn finish(t: &mut Translator, r: Results) {
    if let Some(g) = r.gpr {
        // The host has cleared the upper half of a 32-bit destination.
        t.set_gpr64(g.num, r.dst);
    }
    if r.fl.is_some() {
        let image = t.b.un(Op::FlagsImg, Width::W64, r.fl);
        let o = CcOperands { dst: Val::NONE, src: image, src2: Val::NONE };
        t.set_flags(CcKind::Eflags, Width::W8, o, r.fl);
    }
}

/// Appends the instruction with host pointer `ptr` as its memory operand, if any, and what it
/// writes.
pub(super) fn emit(t: &mut Translator, insn: &Instruction, f: &Form, ptr: Val) {
    let mut b = Val::NONE;
    for (field, op) in [(f.native.reg, f.reg), (f.native.rm, f.rm), (f.native.vvvv, f.vvvv)] {
        if field == NativeReg::GprB {
            let gpr = Gpr::of(insn.op_register(op.into()));
            b = gpr.map_or(Val::NONE, |r| t.gpr64(r.num));
        }
    }
    let r = results(t, insn, f);
    t.b.native(f.native, r.dst, Val::NONE, r.fl, [ptr, b, Val::NONE, Val::NONE]);
    finish(t, r);
}

/// PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM.
fn strings(t: &mut Translator, insn: &Instruction) {
    use iced_x86::Mnemonic as M;
    let m = insn.mnemonic();
    let explicit = matches!(m, M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64)
        || matches!(m, M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64);
    let wide = matches!(m, M::Pcmpestri64 | M::Vpcmpestri64 | M::Pcmpestrm64 | M::Vpcmpestrm64);
    let index = matches!(
        m,
        M::Pcmpestri
            | M::Pcmpestri64
            | M::Vpcmpestri
            | M::Vpcmpestri64
            | M::Pcmpistri
            | M::Vpcmpistri
    );
    let vex = insn.op_code().encoding() == iced_x86::EncodingKind::VEX;
    let in_memory = insn.op1_kind() == OpKind::Memory;
    let mut what = u64::from(insn.immediate8()) | (insn.op0_register().number() as u64) << 8;
    for (on, bit) in [
        (explicit, helpers::pcmpstr::EXPLICIT),
        (wide, helpers::pcmpstr::WIDE),
        (index, helpers::pcmpstr::INDEX),
        (vex, helpers::pcmpstr::VEX),
        (in_memory, helpers::pcmpstr::MEMORY),
    ] {
        if on {
            what |= bit;
        }
    }
    let (lo, hi) = if in_memory {
        let addr = t.mem_addr(insn, 16, PTR_READ);
        let base = t.b.lea(Width::W64, addr);
        let lo = t.b.ld(Width::W64, tandem_jit::ir::Addr::base(base), 0);
        (lo, t.b.ld(Width::W64, tandem_jit::ir::Addr::disp(base, 8), 0))
    } else {
        what |= (insn.op1_register().number() as u64) << 16;
        let zero = t.b.iconst(0);
        (zero, zero)
    };
    let what = t.b.iconst(what);
    let r = t.b.call(helpers::PCMPSTR, &[what, lo, hi]);
    let image = t.b.un(Op::Zext, Width::W32, r);
    if index {
        let n = t.b.extract(Width::W32, r, 32);
        t.b.put(global::RCX, n);
    }
    t.set_flags_image(image);
}
