//! Vector instructions whose memory accesses depend on data: masked loads and stores, gathers,
//! scatters.
//!
//! Elements that are masked off are not accessed and do not fault. If the TLB has the whole operand,
//! nothing can fault, and the instruction runs as it is. Else the slow path looks at the mask and gives
//! a host pointer: straight into memory if all of it is on one accessible page, else to a buffer that
//! holds the active elements.

use super::Translator;
use super::mmx::cpu_field;
use super::operand::{Gpr, Offset, seg_num};
use super::simd::{emit, mem_log2};
use super::vector_form::{Form, Kind, form};
use crate::x86::cpu::Cpu;
use crate::x86::helpers;
use crate::x86::helpers::vector::{Gather, Masked};
use crate::x86::mode::Mode;
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_accel::x86::seg;
use tandem_jit::ir::{
    Addr, Native, NativeReg, Op, PTR_ALIGNED, PTR_MASKED, PTR_READ, PTR_WRITE, Val, Width,
};

/// A form of an instruction that reads a mask into a general register.
fn mask_reader(code: Code, source: NativeReg) -> Native {
    Native { reg: NativeReg::GprDst, rm: source, ..form(code).native }
}

/// An EVEX instruction with mask register `k` and a memory operand.
pub(super) fn masked(t: &mut Translator, insn: &Instruction, f: &Form, k: u8) {
    let bits = t.b.new_val();
    // KMOVW is in AVX512F; only AVX512BW has elements enough for more.
    let wide = form(Code::VEX_Kmovq_r64_kr).kind != Kind::None;
    let code = if wide { Code::VEX_Kmovq_r64_kr } else { Code::VEX_Kmovw_r32_kr };
    t.b.native(mask_reader(code, NativeReg::Mask(k)), bits, Val::NONE, Val::NONE, [Val::NONE; 4]);
    // One mask bit governs as much as a broadcast repeats.
    let info = insn.op_code();
    let elem = if info.can_broadcast() {
        info.broadcast_memory_size().size()
    } else {
        insn.memory_size().element_size()
    };
    let elem = elem.max(1);
    let m = Masked {
        log2: mem_log2(insn),
        elem_log2: elem.trailing_zeros() as u8,
        write: f.rm == 0,
        repeated: is_broadcast(insn),
        compressed: f.compressed,
        aligned: f.aligned,
        checked: t.mode.contains(Mode::ALIGN_CHECK),
        mmu_idx: t.mode.mmu_idx(),
    };
    // Only as many mask bits count as there are elements after the repetition.
    let bits = if m.repeated {
        let whole = if insn.is_broadcast() {
            info.memory_size().size()
        } else {
            (0..insn.op_count()).map(|i| insn.op_register(i).size()).max().unwrap_or(64)
        };
        let lanes = (whole / elem).clamp(1, 64);
        let live = t.b.iconst(u64::MAX >> (64 - lanes));
        t.b.bin(Op::And, Width::W64, bits, live)
    } else {
        bits
    };
    run_masked(t, insn, f, m, bits);
}

/// Whether one memory element serves several elements of the destination.
fn is_broadcast(insn: &Instruction) -> bool {
    let info = insn.op_code();
    insn.is_broadcast()
        || info.memory_size().size() < insn.op0_register().size() && is_broadcast_name(insn)
}

fn is_broadcast_name(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
    )
}

fn run_masked(t: &mut Translator, insn: &Instruction, f: &Form, m: Masked, bits: Val) {
    let access = if m.write { PTR_WRITE } else { PTR_READ };
    // For the slow path, which judges alignment by the active elements.
    let what = t.b.iconst(m.pack());
    t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, masked_what)), what);
    t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, masked_bits)), bits);
    let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
    let addr = if t.needs_check(segment, access) {
        // So does the check of the segment.
        let o = t.mem_offset(insn);
        let offset = t.offset_value(o);
        let what = t.b.iconst((segment as u64) << 8 | u64::from(access));
        let linear = t.b.call(helpers::MASKED_SEG_CHECK, &[what, offset]);
        Addr::base(linear)
    } else {
        t.mem_addr_aligned(insn, 1 << m.log2, 1, access)
    };
    let aligned = if m.aligned || m.checked { PTR_ALIGNED } else { 0 };
    let ptr = t.b.ptr(m.log2, addr, access | aligned | PTR_MASKED);
    emit(t, insn, f, ptr);
    if m.write {
        t.b.ptr_end(ptr);
    }
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ.
pub(super) fn mask_mov(t: &mut Translator, insn: &Instruction, form: &Form) {
    let mut f = *form;
    let write = insn.op0_kind() == OpKind::Memory;
    let (reg, mask) = if write { (2, 1) } else { (0, 1) };
    f.native.reg = NativeReg::Vec(insn.op_register(reg).number() as u8);
    f.native.vvvv = NativeReg::Vec(insn.op_register(mask).number() as u8);
    f.native.rm = NativeReg::Mem;
    let double = matches!(insn.mnemonic(), Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq);
    let ymm = insn.op_register(mask).is_ymm();
    // The masks are the elements' sign bits: what VMOVMSKPS collects.
    let code = match (double, ymm) {
        (false, false) => Code::VEX_Vmovmskps_r32_xmm,
        (false, true) => Code::VEX_Vmovmskps_r32_ymm,
        (true, false) => Code::VEX_Vmovmskpd_r32_xmm,
        (true, true) => Code::VEX_Vmovmskpd_r32_ymm,
    };
    let bits = t.b.new_val();
    t.b.native(mask_reader(code, f.native.vvvv), bits, Val::NONE, Val::NONE, [Val::NONE; 4]);
    let m = Masked {
        log2: if ymm { 5 } else { 4 },
        elem_log2: if double { 3 } else { 2 },
        write,
        repeated: false,
        compressed: false,
        aligned: false,
        checked: false,
        mmu_idx: t.mode.mmu_idx(),
    };
    run_masked(t, insn, &f, m, bits);
}

/// MASKMOVDQU and VMASKMOVDQU.
pub(super) fn mask_mov_dqu(t: &mut Translator, insn: &Instruction) {
    let addr = string_destination(t, insn, 16);
    let regs = insn.op1_register().number() | insn.op2_register().number() << 8;
    let what = t.b.iconst(regs as u64 | u64::from(t.mode.mmu_idx()) << 16);
    t.b.call_void(helpers::MASKMOVDQU, &[addr, what]);
}

/// Linear address of DS:rDI (or another segment by prefix).
pub(super) fn string_destination(t: &mut Translator, insn: &Instruction, size: u32) -> Val {
    let w = match insn.op0_kind() {
        OpKind::MemorySegDI => Width::W16,
        OpKind::MemorySegEDI => Width::W32,
        _ => Width::W64,
    };
    let rdi = t.gpr64(7);
    let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
    let addr = t.linear_aligned(segment, Offset::value(rdi, w), size, 8, PTR_WRITE);
    t.b.lea(Width::W64, addr)
}

/// The operands that gathers and scatters share, with data register and mask register.
fn element_access(
    t: &mut Translator,
    insn: &Instruction,
    data: Register,
    mask: Register,
) -> Gather {
    let index = insn.memory_index();
    let evex = insn.op_code().encoding() == EncodingKind::EVEX;
    let elem = insn.memory_size().element_size().max(4);
    let isize = if insn.is_vsib64() { 8 } else { 4 };
    Gather {
        data: data.number() as u8,
        index: index.number() as u8,
        mask: mask.number() as u8,
        evex,
        elem_log2: elem.trailing_zeros() as u8,
        index_log2: if isize == 8 { 3 } else { 2 },
        scale: insn.memory_index_scale().trailing_zeros() as u8 & 3,
        count: (data.size() / elem).min(index.size() / isize) as u8,
        data_log2: data.size().trailing_zeros() as u8,
        segment: seg_num(insn.memory_segment()).unwrap_or(seg::DS) as u8,
        addr32: !(t.code64()
            && insn.memory_base() != Register::None
            && insn.memory_base().size() == 8
            || t.code64() && insn.memory_base() == Register::None && insn.memory_displ_size() == 8),
        mmu_idx: t.mode.mmu_idx(),
    }
}

/// Base register plus displacement.
fn element_base(t: &mut Translator, insn: &Instruction) -> Val {
    let disp = t.b.iconst(insn.memory_displacement64());
    match Gpr::of(insn.memory_base()) {
        Some(r) => {
            let base = t.gpr64(r.num);
            t.b.bin(Op::Add, Width::W64, base, disp)
        }
        None => disp,
    }
}

/// VGATHER*, VPGATHER*.
pub(super) fn gather(t: &mut Translator, insn: &Instruction) {
    let evex = insn.op_code().encoding() == EncodingKind::EVEX;
    let (dst, index) = (insn.op0_register(), insn.memory_index());
    let mask = if evex { insn.op_mask() } else { insn.op2_register() };
    // Registers must differ (EVEX: destination and index; the mask must not be k0).
    let (d, i) = (dst.number(), index.number());
    let clash = if evex {
        d == i || mask == Register::None
    } else {
        d == i || mask.number() == d || mask.number() == i
    };
    if clash {
        t.ud();
        return;
    }
    let g = element_access(t, insn, dst, mask);
    let base = element_base(t, insn);
    let what = t.b.iconst(g.pack());
    t.b.call_void(helpers::GATHER, &[base, what]);
}

/// VSCATTER*, VPSCATTER*.
pub(super) fn scatter(t: &mut Translator, insn: &Instruction) {
    if insn.op_mask() == Register::None {
        t.ud();
        return;
    }
    let g = element_access(t, insn, insn.op1_register(), insn.op_mask());
    let base = element_base(t, insn);
    let what = t.b.iconst(g.pack());
    t.b.call_void(helpers::SCATTER, &[base, what]);
}
