//! MMX: eight 64-bit registers that lie in the significands of the x87 registers.
//!
//! The registers are fields of `Env` here; what an instruction computes is a helper's job
//! ([`crate::x86::helpers::mmx`]). Every MMX instruction but EMMS also marks all x87 registers valid,
//! sets TOP to 0 and fills the exponent of the register it writes with ones (SDM vol. 1 §9.2).

use super::Translator;
use super::translator::LEAVE_RAISE;
use super::vector_form::Form;
use super::vector_mem::string_destination;
use crate::x86::cpu::Cpu;
use crate::x86::exception::vector;
use crate::x86::helpers::mmx::{Convert, op_index};
use crate::x86::mode::Mode;
use crate::x86::translate::operand::Gpr;
use crate::x86::{Env, helpers};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_jit::ir::{Cond, Exit, ExitHint, ExitKind, Op, PTR_WRITE, Val, Width};

/// `Env` offset of a field of the processor.
pub(super) fn cpu_field(offset: usize) -> u32 {
    (offset_of!(Env, cpu) + offset) as u32
}

/// `Env` offset of MMX register `n`.
fn mm(n: usize) -> u32 {
    cpu_field(offset_of!(Cpu, fpr) + 16 * (n & 7))
}

/// Raises #MF if an unmasked x87 exception is pending.
pub(super) fn check_pending(t: &mut Translator) {
    const ES: u64 = 0x80;
    let sw = t.b.ldenv(Width::W16, cpu_field(offset_of!(Cpu, fsw)));
    let es = t.b.iconst(ES);
    let fl = t.b.flags_of(Op::And, Width::W32, [sw, es, Val::NONE, Val::NONE]);
    let kind = ExitKind::Leave { code: LEAVE_RAISE | u32::from(vector::MF), pc: Some(t.rip) };
    t.b.brcc(Cond::Ne, fl, Exit::new(kind, ExitHint::Jump));
}

/// Whether the mode allows MMX; if not, the exception is in the block.
fn available(t: &mut Translator) -> bool {
    if t.mode.contains(Mode::SSE_NM) {
        t.nm();
    } else if t.mode.contains(Mode::X87_NM) {
        // CR0.EM.
        t.ud();
    } else {
        if !t.mode.contains(Mode::X87_CARE) && !t.x87_synced {
            t.b.call_void(helpers::X87_SYNC, &[]);
            t.x87_synced = true;
        }
        return true;
    }
    false
}

/// As [`available`], and no x87 exception is pending.
fn enabled(t: &mut Translator) -> bool {
    let ok = available(t);
    if ok {
        check_pending(t);
    }
    ok
}

/// The x87 state that every MMX instruction leaves behind.
fn enter_mmx(t: &mut Translator, empty: u64) {
    let zero = t.b.iconst(0);
    t.b.stenv(Width::W32, cpu_field(offset_of!(Cpu, ftop)), zero);
    let tags = t.b.iconst(empty);
    t.b.stenv(Width::W8, cpu_field(offset_of!(Cpu, ftag_empty)), tags);
}

/// EMMS: marks all x87 registers empty.
pub fn translate_emms(t: &mut Translator, insn: &Instruction) -> bool {
    if insn.mnemonic() != Mnemonic::Emms {
        return false;
    }
    if enabled(t) {
        enter_mmx(t, 0xff);
    }
    true
}

fn write_mm(t: &mut Translator, reg: Register, v: Val) {
    let n = reg.number();
    t.b.stenv(Width::W64, mm(n), v);
    let ones = t.b.iconst(0xffff);
    t.b.stenv(Width::W16, mm(n) + 8, ones);
}

/// Reads operand `n`, `w` bits: an MMX, vector or general register, memory, or an immediate.
fn read(t: &mut Translator, insn: &Instruction, n: u32, w: Width) -> Val {
    let reg = insn.op_register(n);
    if insn.op_kind(n) == OpKind::Register && reg.is_mm() {
        return t.b.ldenv(w, mm(reg.number()));
    }
    if insn.op_kind(n) == OpKind::Immediate8 {
        return t.b.iconst(insn.immediate8().into());
    }
    let v = t.read(insn, n, w);
    if w < Width::W64 { t.b.un(Op::Zext, w, v) } else { v }
}

/// Translates an instruction that names an MMX register.
pub fn translate(t: &mut Translator, insn: &Instruction, _form: &Form) -> bool {
    use Mnemonic as M;
    let m = insn.mnemonic();
    // With a memory operand no MMX register takes part in these.
    let only_vector = matches!(m, M::Cvtpi2ps | M::Cvtpi2pd) && insn.op1_kind() == OpKind::Memory;
    let ok = if only_vector { available(t) } else { enabled(t) };
    if !ok {
        return true;
    }
    let imm = u64::from(insn.immediate8());
    let dst = insn.op0_register();
    match m {
        M::Movd | M::Movq | M::Movntq => moves(t, insn),
        M::Pshufw => {
            let a = read(t, insn, 1, Width::W64);
            let imm = t.b.iconst(imm);
            let r = t.b.call(helpers::MMX_PSHUFW, &[a, imm]);
            write_mm(t, dst, r);
        }
        M::Palignr => {
            let (a, b) = (read(t, insn, 0, Width::W64), read(t, insn, 1, Width::W64));
            let n = t.b.iconst(imm);
            let r = t.b.call(helpers::MMX_PALIGNR, &[a, b, n]);
            write_mm(t, dst, r);
        }
        M::Pmovmskb | M::Pextrw => {
            let a = read(t, insn, 1, Width::W64);
            let r = if m == M::Pmovmskb {
                t.b.call(helpers::MMX_PMOVMSKB, &[a])
            } else {
                t.b.extract(Width::W16, a, 16 * (imm as u8 & 3))
            };
            if let Some(g) = Gpr::of(dst) {
                t.set_gpr64(g.num, r);
            }
        }
        M::Pinsrw => {
            let a = read(t, insn, 0, Width::W64);
            let b = read(t, insn, 1, Width::W16);
            let r = t.b.deposit(Width::W16, a, b, 16 * (imm as u8 & 3));
            write_mm(t, dst, r);
        }
        M::Maskmovq => {
            let addr = string_destination(t, insn, 8);
            let (data, mask) = (read(t, insn, 1, Width::W64), read(t, insn, 2, Width::W64));
            let mmu = t.b.iconst(t.mode.mmu_idx().into());
            t.b.call_void(helpers::MMX_MASKMOVQ, &[addr, data, mask, mmu]);
        }
        M::Movq2dq
        | M::Movdq2q
        | M::Cvtpi2ps
        | M::Cvtpi2pd
        | M::Cvtps2pi
        | M::Cvttps2pi
        | M::Cvtpd2pi
        | M::Cvttpd2pi => {
            with_vectors(t, insn, only_vector);
            return true;
        }
        _ => {
            let Some(op) = op_index(m) else {
                t.ud();
                return true;
            };
            let (a, b) = (read(t, insn, 0, Width::W64), read(t, insn, 1, operand_width(insn)));
            let op = t.b.iconst(op as u64);
            let r = t.b.call(helpers::MMX_OP, &[op, a, b]);
            write_mm(t, dst, r);
        }
    }
    enter_mmx(t, 0);
    true
}

/// Width of a memory operand: PUNPCKL* read 32 bits.
fn operand_width(insn: &Instruction) -> Width {
    let small = insn.op1_kind() == OpKind::Memory && insn.memory_size().size() == 4;
    if small { Width::W32 } else { Width::W64 }
}

fn moves(t: &mut Translator, insn: &Instruction) {
    let dst = insn.op0_register();
    let w = if insn.mnemonic() == Mnemonic::Movd { Width::W32 } else { Width::W64 };
    if insn.op0_kind() == OpKind::Memory {
        let v = read(t, insn, 1, w);
        let addr = t.mem_addr(insn, w.bytes(), PTR_WRITE);
        t.b.st(w, addr, v);
        return;
    }
    // MOVD of a 64-bit general register is MOVQ to iced; both are told by the operand.
    let v = read(t, insn, 1, w);
    match Gpr::of(dst) {
        Some(g) => t.set_gpr64(g.num, v),
        None => write_mm(t, dst, v),
    }
}

/// Instructions with one MMX and one vector register, or with memory in the place of the former.
fn with_vectors(t: &mut Translator, insn: &Instruction, only_vector: bool) {
    use Mnemonic as M;
    let (dst, src) = (insn.op0_register(), insn.op1_register());
    let op = match insn.mnemonic() {
        M::Movq2dq => {
            let v = read(t, insn, 1, Width::W64);
            let what = t.b.iconst(dst.number() as u64);
            t.b.call_void(helpers::SET_XMM_LOW, &[what, v]);
            return enter_mmx(t, 0);
        }
        M::Movdq2q => {
            let what = t.b.iconst(src.number() as u64);
            let v = t.b.call(helpers::GET_XMM, &[what]);
            write_mm(t, dst, v);
            return enter_mmx(t, 0);
        }
        M::Cvtpi2ps => Convert::Pi2Ps,
        M::Cvtpi2pd => Convert::Pi2Pd,
        M::Cvtps2pi => Convert::Ps2Pi,
        M::Cvttps2pi => Convert::Tps2Pi,
        M::Cvtpd2pi => Convert::Pd2Pi,
        _ => Convert::Tpd2Pi,
    };
    let to_vector = matches!(op, Convert::Pi2Ps | Convert::Pi2Pd);
    let zero = t.b.iconst(0);
    let (lo, hi) = if to_vector {
        (read(t, insn, 1, Width::W64), zero)
    } else if insn.op1_kind() == OpKind::Memory {
        memory_pair(t, insn)
    } else {
        let at = |half: u64| src.number() as u64 | half << 8;
        let (l, h) = (t.b.iconst(at(0)), t.b.iconst(at(1)));
        (t.b.call(helpers::GET_XMM, &[l]), t.b.call(helpers::GET_XMM, &[h]))
    };
    if !only_vector {
        // Even if the conversion then raises an exception.
        enter_mmx(t, 0);
    }
    let what = t.b.iconst(op as u64 | if to_vector { (dst.number() as u64) << 8 } else { 0 });
    let r = t.b.call(helpers::MMX_CONVERT, &[what, lo, hi]);
    if !to_vector {
        write_mm(t, dst, r);
    }
}

/// The 8 or 16 bytes of a memory operand.
fn memory_pair(t: &mut Translator, insn: &Instruction) -> (Val, Val) {
    let size = insn.memory_size().size() as u32;
    // #GP(0) comes before #AC(0).
    let align = if size == 16 { 1 } else { size };
    let addr = t.mem_addr_aligned(insn, size, align, tandem_jit::ir::PTR_READ);
    let base = t.b.lea(Width::W64, addr);
    if size == 16 {
        super::simd::check_aligned(t, base, 4);
    }
    let lo = t.b.ld(Width::W64, tandem_jit::ir::Addr::base(base), 0);
    let hi = if size == 16 {
        t.b.ld(Width::W64, tandem_jit::ir::Addr::disp(base, 8), 0)
    } else {
        t.b.iconst(0)
    };
    (lo, hi)
}
