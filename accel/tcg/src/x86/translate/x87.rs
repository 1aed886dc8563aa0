//! x87 instructions, and those that save and restore extended state.
//!
//! An x87 instruction becomes a helper call with the instruction packed into a constant; memory
//! operands are loaded in line. Waiting instructions first look for a pending exception (#MF). Where
//! the mode allows, [`super::x87_native`] does without helpers.

use super::Translator;
use super::mmx::{check_pending, cpu_field};
use super::operand::seg_num;
use super::x87_native;
use crate::x86::bits::rflags::{CF, PF, ZF};
use crate::x86::cpu::Cpu;
use crate::x86::exception::vector;
use crate::x86::helpers;
use crate::x86::helpers::x87::{Action, Insn, LOADS, OPS, STORE_80, STORES};
use crate::x86::mode::Mode;
use crate::x86::x87::host::{AVAILABLE, Load, Op, Store};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_accel::x86::seg;
use tandem_jit::ir::{Addr, Cond, PTR_READ, PTR_WRITE, Val, Width};

/// Translates `insn` if it is an x87 instruction or one of the XSAVE family.
pub fn translate(t: &mut Translator, insn: &Instruction) -> bool {
    if save_area(t, insn) {
        return true;
    }
    if insn.mnemonic() == Mnemonic::Wait {
        if t.mode.contains(Mode::WAIT_NM) {
            t.nm();
        } else {
            check_pending(t);
        }
        return true;
    }
    let Some(what) = classify(insn) else { return false };
    if t.mode.contains(Mode::X87_NM) {
        t.nm();
        return true;
    }
    if !AVAILABLE {
        return false;
    }
    if !t.mode.contains(Mode::X87_CARE) && x87_native::translate(t, insn, &what) {
        return true;
    }
    match what {
        What::Control => control(t, insn),
        What::Compute(i) => {
            check_pending(t);
            compute(t, insn, i);
        }
        What::Store(i) => {
            check_pending(t);
            let size = insn.memory_size().size() as u32;
            let addr = t.mem_addr(insn, size, PTR_WRITE);
            let addr = t.b.lea(Width::W64, addr);
            let (what, rip) = constants(t, insn, i);
            let offset = data_pointer(t, insn);
            t.b.call_void(helpers::X87_STORE, &[what, rip, addr, offset]);
        }
        What::Flags(i) => {
            check_pending(t);
            let (what, rip) = constants(t, insn, i);
            let image = t.b.call(helpers::X87_COMPARE_FLAGS, &[what, rip]);
            t.set_flags_image(image);
        }
    }
    true
}

/// How an instruction is translated.
pub(super) enum What {
    Control,
    Compute(Insn),
    Store(Insn),
    Flags(Insn),
}

/// The packed instruction, and RIP.
fn constants(t: &mut Translator, insn: &Instruction, i: Insn) -> (Val, Val) {
    let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    let segment = || seg_num(insn.memory_segment()).unwrap_or(seg::DS) as u8;
    let i = Insn { fop: t.x87_opcode(), segment: memory.then(segment), ..i };
    let what = t.b.iconst(i.pack());
    let rip = t.b.iconst(t.rip);
    (what, rip)
}

/// What the unit's data pointer becomes: the offset of the memory operand in its segment.
pub(super) fn data_pointer(t: &mut Translator, insn: &Instruction) -> Val {
    let offset = t.mem_offset(insn);
    t.offset_value(offset)
}

/// Number of `op` in the helpers' table.
fn op_number(op: Op) -> u8 {
    OPS.iter().position(|o| *o == op).unwrap_or(0) as u8
}

fn load_number(from: Load) -> u8 {
    LOADS.iter().position(|l| *l == from).unwrap_or(0) as u8
}

fn store_number(to: Store) -> u8 {
    STORES.iter().position(|(s, _)| *s == to).unwrap_or(0) as u8
}

/// The memory format of the instruction's operand.
fn memory_load(insn: &Instruction) -> Load {
    use iced_x86::MemorySize as M;
    match insn.memory_size() {
        M::Float32 => Load::F32,
        M::Float64 => Load::F64,
        M::Int16 => Load::I16,
        M::Int32 => Load::I32,
        M::Bcd => Load::Bcd,
        _ => Load::I64,
    }
}

/// The arithmetic operation, and whether the instruction pops.
fn arithmetic(m: Mnemonic) -> Option<(Op, bool)> {
    use Mnemonic as M;
    Some(match m {
        M::Fadd | M::Fiadd => (Op::Add, false),
        M::Faddp => (Op::Add, true),
        M::Fmul | M::Fimul => (Op::Mul, false),
        M::Fmulp => (Op::Mul, true),
        M::Fsub | M::Fisub => (Op::Sub, false),
        M::Fsubp => (Op::Sub, true),
        M::Fsubr | M::Fisubr => (Op::SubR, false),
        M::Fsubrp => (Op::SubR, true),
        M::Fdiv | M::Fidiv => (Op::Div, false),
        M::Fdivp => (Op::Div, true),
        M::Fdivr | M::Fidivr => (Op::DivR, false),
        M::Fdivrp => (Op::DivR, true),
        _ => return None,
    })
}

/// Instructions without operands, or with none that matters here.
fn simple(m: Mnemonic) -> Option<(Action, u8)> {
    use Mnemonic as M;
    Some(match m {
        M::Fld1 => (Action::Constant, 0),
        M::Fldl2t => (Action::Constant, 1),
        M::Fldl2e => (Action::Constant, 2),
        M::Fldpi => (Action::Constant, 3),
        M::Fldlg2 => (Action::Constant, 4),
        M::Fldln2 => (Action::Constant, 5),
        M::Fldz => (Action::Constant, 6),
        M::Ftst => (Action::Test, 0),
        M::Fxam => (Action::Examine, 0),
        M::Fchs => (Action::Chs, 0),
        M::Fabs => (Action::Abs, 0),
        M::Fincstp => (Action::Rotate, 1),
        M::Fdecstp => (Action::Rotate, 7),
        M::Ffree => (Action::Free, 0),
        M::Ffreep => (Action::Free, 1),
        M::Fxch => (Action::Exchange, 0),
        M::Fsqrt => (Action::Unary, op_number(Op::Sqrt)),
        M::Fsin => (Action::Unary, op_number(Op::Sin)),
        M::Fcos => (Action::Unary, op_number(Op::Cos)),
        M::Frndint => (Action::Unary, op_number(Op::RoundInt)),
        M::F2xm1 => (Action::Unary, op_number(Op::TwoToXm1)),
        M::Fprem => (Action::Unary, op_number(Op::Rem)),
        M::Fprem1 => (Action::Unary, op_number(Op::Rem1)),
        M::Fscale => (Action::Unary, op_number(Op::Scale)),
        M::Fyl2x => (Action::BinaryPop, op_number(Op::Yl2x)),
        M::Fyl2xp1 => (Action::BinaryPop, op_number(Op::Yl2xp1)),
        M::Fpatan => (Action::BinaryPop, op_number(Op::Atan)),
        M::Fptan => (Action::UnaryPush, op_number(Op::Tan)),
        M::Fsincos => (Action::UnaryPush, op_number(Op::SinCos)),
        M::Fxtract => (Action::UnaryPush, op_number(Op::Extract)),
        _ => return None,
    })
}

/// Number of ST(i) for the operand that is not the implied ST(0).
pub(super) fn st_operand(insn: &Instruction) -> u8 {
    let number = |n: u32| {
        let r = insn.op_register(n);
        if r.is_st() { r.number() as u8 } else { 0 }
    };
    (0..insn.op_count()).map(number).max().unwrap_or(0)
}

fn classify(insn: &Instruction) -> Option<What> {
    use Mnemonic as M;
    let m = insn.mnemonic();
    let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    let i = st_operand(insn);
    let make = |action, n, pop| Insn { action, n, i, pop, fop: 0, segment: None };
    let compute = |action, n, pop| Some(What::Compute(make(action, n, pop)));
    if let Some((op, pop)) = arithmetic(m) {
        let n = op_number(op);
        return if memory {
            compute(Action::ArithMem, n | load_number(memory_load(insn)) << 4, false)
        } else if pop || insn.op0_register() != Register::ST0 {
            compute(Action::ArithSt, n, pop)
        } else if insn.op_code().op0_kind() == iced_x86::OpCodeOperandKind::sti_opcode {
            // DC and DE forms name ST(i) first, and i may be 0.
            compute(Action::ArithSt, n, pop)
        } else {
            compute(Action::Arith, n, pop)
        };
    }
    if let Some((action, n)) = simple(m) {
        return compute(action, n, false);
    }
    let store = |to: u8, pop| Some(What::Store(make(Action::StoreSt, to, pop)));
    let by_size = |sizes: [Store; 3]| match insn.memory_size().size() {
        2 => store_number(sizes[0]),
        4 => store_number(sizes[1]),
        _ => store_number(sizes[2]),
    };
    match m {
        M::Fld if memory => compute(Action::Load, load_number(memory_load(insn)), false),
        M::Fld => compute(Action::LoadSt, 0, false),
        M::Fild | M::Fbld => compute(Action::Load, load_number(memory_load(insn)), false),
        M::Fst | M::Fstp if memory => {
            let to = match insn.memory_size().size() {
                4 => store_number(Store::F32),
                8 => store_number(Store::F64),
                _ => STORE_80,
            };
            store(to, m == M::Fstp)
        }
        M::Fst => compute(Action::StoreSt, 0, false),
        M::Fstp => compute(Action::StoreSt, 0, true),
        M::Fstpnce => compute(Action::StoreSt, 1, true),
        M::Fist | M::Fistp => store(by_size([Store::I16, Store::I32, Store::I64]), m == M::Fistp),
        M::Fisttp => store(by_size([Store::I16Trunc, Store::I32Trunc, Store::I64Trunc]), true),
        M::Fbstp => store(store_number(Store::Bcd), true),
        M::Fcom | M::Fcomp | M::Ficom | M::Ficomp if memory => {
            let pops = u8::from(matches!(m, M::Fcomp | M::Ficomp));
            compute(Action::ComMem, pops | load_number(memory_load(insn)) << 4, false)
        }
        M::Fcom => compute(Action::Com, 0, false),
        M::Fcomp => compute(Action::Com, 1, false),
        M::Fucom => compute(Action::UCom, 0, false),
        M::Fucomp => compute(Action::UCom, 1, false),
        // These compare with ST(1) without naming it.
        M::Fcompp => Some(What::Compute(Insn { i: 1, ..make(Action::Com, 2, false) })),
        M::Fucompp => Some(What::Compute(Insn { i: 1, ..make(Action::UCom, 2, false) })),
        M::Fcomi | M::Fcomip => Some(What::Flags(make(Action::Com, 0, m == M::Fcomip))),
        M::Fucomi | M::Fucomip => Some(What::Flags(make(Action::UCom, 1, m == M::Fucomip))),
        M::Fcmovb
        | M::Fcmovbe
        | M::Fcmove
        | M::Fcmovu
        | M::Fcmovnb
        | M::Fcmovnbe
        | M::Fcmovne
        | M::Fcmovnu => compute(Action::Move, 0, false),
        M::Fnop
        | M::Fldcw
        | M::Fnstcw
        | M::Fstcw
        | M::Fnstsw
        | M::Fstsw
        | M::Fnclex
        | M::Fclex
        | M::Fninit
        | M::Finit
        | M::Fnstenv
        | M::Fstenv
        | M::Fldenv
        | M::Fnsave
        | M::Fsave
        | M::Frstor
        | M::Fneni
        | M::Fndisi
        | M::Fnsetpm => Some(What::Control),
        _ => None,
    }
}

fn compute(t: &mut Translator, insn: &Instruction, i: Insn) {
    let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    let zero = t.b.iconst(0);
    let (mut lo, mut hi) = (zero, zero);
    let mut helper = helpers::X87;
    if memory {
        let size = insn.memory_size().size() as u32;
        let addr = t.mem_addr(insn, size, PTR_READ);
        if size == 10 {
            let base = t.b.lea(Width::W64, addr);
            lo = t.b.ld(Width::W64, Addr::base(base), 0);
            hi = t.b.ld(Width::W16, Addr::disp(base, 8), 0);
            if insn.mnemonic() == Mnemonic::Fld {
                helper = helpers::X87_LOAD_80;
            }
        } else {
            let w = Width::from_bytes(size).unwrap_or(Width::W64);
            lo = t.b.ld(w, addr, 0);
        }
        let offset = data_pointer(t, insn);
        t.b.stenv(Width::W64, cpu_field(offset_of!(Cpu, fdp)), offset);
    } else if i.action == Action::Move {
        let cond = move_condition(insn.mnemonic());
        let fl = t.flags(cond.reads());
        lo = t.b.setcc(cond, fl);
    }
    let (what, rip) = constants(t, insn, i);
    t.b.call_void(helper, &[what, rip, lo, hi]);
}

/// The condition of FCMOVcc.
fn move_condition(m: Mnemonic) -> Cond {
    use Mnemonic as M;
    debug_assert_eq!(Cond::Be.reads() | Cond::P.reads(), CF | ZF | PF);
    match m {
        M::Fcmovb => Cond::B,
        M::Fcmove => Cond::E,
        M::Fcmovbe => Cond::Be,
        M::Fcmovu => Cond::P,
        M::Fcmovnb => Cond::Ae,
        M::Fcmovne => Cond::Ne,
        M::Fcmovnbe => Cond::A,
        _ => Cond::Np,
    }
}

/// Instructions that read or write control state.
fn control(t: &mut Translator, insn: &Instruction) {
    use Mnemonic as M;
    let m = insn.mnemonic();
    let waits = matches!(
        m,
        M::Fnop
            | M::Fldcw
            | M::Fldenv
            | M::Frstor
            | M::Fstcw
            | M::Fstsw
            | M::Fclex
            | M::Finit
            | M::Fstenv
            | M::Fsave
    );
    if waits {
        check_pending(t);
    }
    match m {
        M::Fldcw => {
            let v = t.read(insn, 0, Width::W16);
            t.b.call_void(helpers::FLDCW, &[v]);
            t.next_block();
        }
        M::Fnstcw | M::Fstcw => {
            let v = t.b.ldenv(Width::W16, cpu_field(offset_of!(Cpu, fcw)));
            t.write(insn, 0, Width::W16, v);
        }
        M::Fnstsw | M::Fstsw => {
            let v = t.b.call(helpers::FNSTSW, &[]);
            t.write(insn, 0, Width::W16, v);
        }
        M::Fnclex | M::Fclex => {
            t.b.call_void(helpers::FNCLEX, &[]);
            t.next_block();
        }
        M::Fninit | M::Finit => {
            t.b.call_void(helpers::FNINIT, &[]);
            t.next_block();
        }
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave | M::Fldenv | M::Frstor => {
            let size = insn.memory_size().size() as u32;
            let small = matches!(size, 14 | 94);
            let saves = !matches!(m, M::Fldenv | M::Frstor);
            let access = if saves { PTR_WRITE } else { PTR_READ };
            let addr = t.mem_addr_aligned(insn, size, if small { 2 } else { 4 }, access);
            let addr = t.b.lea(Width::W64, addr);
            let small = t.b.iconst(small.into());
            let registers = t.b.iconst((size >= 94).into());
            let helper = if saves { helpers::FNSAVE } else { helpers::FRSTOR };
            t.b.call_void(helper, &[addr, small, registers]);
            if !saves {
                t.next_block();
            }
        }
        // It counts as an instruction on data.
        M::Fnop => {
            let nop = Insn { action: Action::Nop, n: 0, i: 0, pop: false, fop: 0, segment: None };
            let (what, rip) = constants(t, insn, nop);
            let zero = t.b.iconst(0);
            t.b.call_void(helpers::X87, &[what, rip, zero, zero]);
        }
        // What did something on the 8087 and 80287 only.
        _ => {}
    }
}

/// FXSAVE, FXRSTOR and the XSAVE family.
fn save_area(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic as M;
    let (helper, how) = match insn.mnemonic() {
        M::Fxsave => (helpers::FXSAVE, 0),
        M::Fxsave64 => (helpers::FXSAVE, 1),
        M::Fxrstor => (helpers::FXRSTOR, 0),
        M::Fxrstor64 => (helpers::FXRSTOR, 1),
        M::Xsave => (helpers::XSAVE, 0),
        M::Xsave64 => (helpers::XSAVE, 1),
        M::Xsaveopt => (helpers::XSAVE, 2),
        M::Xsaveopt64 => (helpers::XSAVE, 3),
        M::Xsavec => (helpers::XSAVE, 4),
        M::Xsavec64 => (helpers::XSAVE, 5),
        M::Xsaves => (helpers::XSAVE, 6),
        M::Xsaves64 => (helpers::XSAVE, 7),
        M::Xrstor => (helpers::XRSTOR, 0),
        M::Xrstor64 => (helpers::XRSTOR, 1),
        M::Xrstors => (helpers::XRSTOR, 2),
        M::Xrstors64 => (helpers::XRSTOR, 3),
        _ => return false,
    };
    let xsave = helper == helpers::XSAVE || helper == helpers::XRSTOR;
    let supervisor = matches!(insn.mnemonic(), M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64);
    if xsave && !t.mode.contains(Mode::OSXSAVE) {
        t.ud();
    } else if supervisor && t.cpl() != 0 {
        t.gp0();
    } else if t.mode.contains(if xsave { Mode::SSE_NM } else { Mode::X87_NM }) {
        t.raise(vector::NM, None);
    } else {
        let size = if xsave { 576 } else { 512 };
        let access = if helper == helpers::XSAVE || helper == helpers::FXSAVE {
            PTR_WRITE
        } else {
            PTR_READ
        };
        // FXSAVE's and FXRSTOR's other misalignments raise #GP(0).
        let align = if xsave { 1 } else { 4 };
        let addr = t.mem_addr_aligned(insn, size, align, access);
        let addr = t.b.lea(Width::W64, addr);
        let how = t.b.iconst(how);
        t.b.call_void(helper, &[addr, how]);
        if access == PTR_READ {
            t.next_block();
        }
    }
    true
}
