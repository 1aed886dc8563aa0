//! x87 instructions passed through to the host's unit.
//!
//! What always holds: the mode says that no exception is unmasked or pending
//! ([`crate::x86::x87::image`]), so no instruction here raises one but for its memory operand. The
//! processor's own field of the control word is kept up to date.

use super::Translator;
use super::mmx::cpu_field;
use super::mov::selector;
use super::operand::seg_num;
use super::x87::{What, data_pointer, st_operand};
use crate::env::Core;
use crate::exec::leave;
use crate::x86::Env;
use crate::x86::cpu::Cpu;
use crate::x86::flags::CcKind;
use crate::x86::helpers::x87::Action;
use crate::x86::translate::CcOperands;
use crate::x86::x87::{CW_FIXED, CW_INIT, CW_MASK, EXCEPTIONS};
use iced_x86::{Instruction, Mnemonic, OpKind};
use std::mem::offset_of;
use tandem_accel::x86::seg;
use tandem_jit::ir::{
    Cond, Encoding, Exit, ExitHint, ExitKind, Native, NativeReg, Op, PTR_READ, PTR_WRITE, SIZE_80,
    Val, Width,
};

const N: Val = Val::NONE;

/// The instruction with opcode byte `opcode` and ModRM.reg `reg`.
fn form(opcode: u8, reg: u8, rm: NativeReg) -> Native {
    Native {
        enc: Encoding::Legacy,
        prefix: 0,
        map: 0,
        opcode,
        w: false,
        l: 0,
        reg: NativeReg::Fixed(reg),
        rm,
        vvvv: NativeReg::Fixed(0),
        imm8: None,
        dst_in: false,
        sets_flags: false,
        vector: false,
        fp: false,
        x87: true,
    }
}

/// A form without memory operand, from its two bytes.
fn two_bytes(opcode: u8, modrm: u8) -> Native {
    form(opcode, modrm >> 3 & 7, NativeReg::Fixed(modrm & 7))
}

/// `insn` as it is, apart from its address.
fn same(insn: &Instruction) -> Option<Native> {
    let op = insn.op_code();
    let code = op.op_code();
    if insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory {
        let group = u8::try_from(op.group_index()).ok()?;
        return Some(form(code as u8, group, NativeReg::Mem));
    }
    // Two bytes, of which the second may have a register number added.
    (op.op_code_len() == 2).then(|| {
        let numbered =
            (0..op.op_count()).any(|n| op.op_kind(n) == iced_x86::OpCodeOperandKind::sti_opcode);
        let i = if numbered { st_operand(insn) } else { 0 };
        two_bytes((code >> 8) as u8, code as u8 + i)
    })
}

/// Translates `insn`, which does `what`. False if it is left to helpers.
pub(super) fn translate(t: &mut Translator, insn: &Instruction, what: &What) -> bool {
    let ok = match what {
        What::Control => control(t, insn),
        // FCMOVcc looks at flags that are nowhere near the host's.
        What::Compute(i) if i.action == Action::Move => false,
        What::Compute(_) | What::Store(_) => {
            let access = if matches!(what, What::Store(_)) { PTR_WRITE } else { PTR_READ };
            match same(insn) {
                Some(native) if native.rm == NativeReg::Mem => memory(t, insn, native, access),
                Some(native) => plain(t, native),
                None => return false,
            }
            pointers(t, insn);
            true
        }
        What::Flags(_) => {
            let Some(native) = same(insn) else { return false };
            let fl = t.b.new_val();
            t.b.native(Native { sets_flags: true, ..native }, N, N, fl, [N; 4]);
            let image = t.b.un(Op::FlagsImg, Width::W64, fl);
            let o = CcOperands { dst: N, src: image, src2: N };
            t.set_flags(CcKind::Eflags, Width::W8, o, fl);
            pointers(t, insn);
            true
        }
    };
    if ok {
        t.x87_synced = false;
    }
    ok
}

/// Appends an instruction without memory operand.
fn plain(t: &mut Translator, native: Native) {
    t.b.native(native, N, N, N, [N; 4]);
}

fn memory(t: &mut Translator, insn: &Instruction, native: Native, access: u8) {
    let bytes = insn.memory_size().size() as u32;
    let size = if bytes == 10 { SIZE_80 } else { bytes.trailing_zeros() as u8 };
    let addr = t.mem_addr(insn, bytes, access);
    t.b.native_mem(native, size, addr, access, N, N);
}

/// Notes where the last instruction was that is not a control instruction, and its operand.
fn pointers(t: &mut Translator, insn: &Instruction) {
    let rip = t.b.iconst(t.rip);
    t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, fip)), rip);
    let opcode = t.x87_opcode() & 0x7ff;
    let opcode = t.b.iconst(opcode.into());
    t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fop)), opcode);
    let cs = selector(t, seg::CS);
    t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fcs)), cs);
    if insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory {
        let offset = data_pointer(t, insn);
        t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, fdp)), offset);
        let ds = selector(t, seg_num(insn.memory_segment()).unwrap_or(seg::DS));
        t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fds)), ds);
    }
}

/// Sets the processor's control word, and the unit's.
fn set_control(t: &mut Translator, v: Val) {
    let field = cpu_field(offset_of!(Cpu, fcw));
    t.b.stenv(Width::W16, field, v);
    let at = t.b.env_ptr(field);
    t.b.native(form(0xd9, 5, NativeReg::Mem), N, N, N, [at, N, N, N]);
}

/// Instructions that read or write control state. False for those that touch much of it.
fn control(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Fldcw => {
            let v = t.read(insn, 0, Width::W16);
            let masks = t.b.iconst(EXCEPTIONS.into());
            let masked = t.b.bin(Op::And, Width::W32, v, masks);
            let fl = t.b.flags_of(Op::Sub, Width::W32, [masked, masks, N, N]);
            let kind = ExitKind::Leave { code: leave::X87, pc: Some(t.rip) };
            t.b.brcc(Cond::Ne, fl, Exit::new(kind, ExitHint::Jump));
            let writable = t.b.iconst(CW_MASK.into());
            let v = t.b.bin(Op::And, Width::W32, v, writable);
            let fixed = t.b.iconst(CW_FIXED.into());
            let v = t.b.bin(Op::Or, Width::W32, v, fixed);
            set_control(t, v);
        }
        M::Fnstsw | M::Fstsw => {
            let word = (offset_of!(Env, core) + offset_of!(Core, x87_scratch)) as u32;
            let at = t.b.env_ptr(word);
            t.b.native(form(0xdd, 7, NativeReg::Mem), N, N, N, [at, N, N, N]);
            let v = t.b.ldenv(Width::W16, word);
            t.write(insn, 0, Width::W16, v);
        }
        M::Fnclex | M::Fclex => plain(t, two_bytes(0xdb, 0xe2)),
        M::Fninit | M::Finit => {
            plain(t, two_bytes(0xdb, 0xe3));
            let init = t.b.iconst(CW_INIT.into());
            t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fcw)), init);
            let zero = t.b.iconst(0);
            t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fop)), zero);
            t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, fip)), zero);
            t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, fdp)), zero);
            t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fcs)), zero);
            t.b.stenv(Width::W16, cpu_field(offset_of!(Cpu, fds)), zero);
        }
        _ => return false,
    }
    true
}
