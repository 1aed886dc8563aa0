//! String instructions. A single step is inline; repetition is a helper's work, which does a
//! bounded part and comes back to the same instruction for the rest.

use super::Translator;
use super::alu::set_compare;
use super::operand::{Gpr, Offset, seg_num};
use crate::x86::cpu::global;
use crate::x86::helpers;
use crate::x86::helpers::string::Info;
use crate::x86::mode::Mode;
use iced_x86::{Instruction, OpKind};
use tandem_accel::x86::seg;
use tandem_jit::ir::{Addr, Cond, ExitHint, Helper, Op, PTR_READ, PTR_WRITE, Val, Width};

const N: Val = Val::NONE;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// What a string instruction does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

/// Translates a string instruction of the given kind and element width.
pub(super) fn string(t: &mut Translator, insn: &Instruction, kind: Kind, w: Width) {
    let address = address_size(insn);
    let source = source_segment(insn);
    let repeat = insn.has_rep_prefix() || insn.has_repne_prefix();
    let io = matches!(kind, Kind::Ins | Kind::Outs);
    if io && !t.mode.contains(Mode::IOPL_OK) {
        let port = port(t);
        let size = t.b.iconst(w.bytes().into());
        t.b.call_void(helpers::CHECK_IO, &[port, size]);
    }
    if repeat || io || t.needs_check(source, PTR_READ) {
        return helper(t, insn, kind, w, address, source, repeat);
    }
    let acc = Gpr { num: 0, w, high: false };
    match kind {
        Kind::Movs => {
            let from = element(t, source, RSI, address, w, PTR_READ);
            let v = t.b.ld(w, from, 0);
            let to = element(t, seg::ES, RDI, address, w, PTR_WRITE);
            t.b.st(w, to, v);
            advance(t, RSI, address, w);
            advance(t, RDI, address, w);
        }
        Kind::Stos => {
            let v = t.gpr(acc);
            let to = element(t, seg::ES, RDI, address, w, PTR_WRITE);
            t.b.st(w, to, v);
            advance(t, RDI, address, w);
        }
        Kind::Lods => {
            let from = element(t, source, RSI, address, w, PTR_READ);
            let v = t.b.ld(w, from, 0);
            t.set_gpr(acc, v);
            advance(t, RSI, address, w);
        }
        Kind::Scas => {
            let at = element(t, seg::ES, RDI, address, w, PTR_READ);
            let v = t.b.ld(w, at, 0);
            let a = t.gpr(acc);
            advance(t, RDI, address, w);
            set_compare(t, w, a, v);
        }
        _ => {
            let from = element(t, source, RSI, address, w, PTR_READ);
            let a = t.b.ld(w, from, 0);
            let at = element(t, seg::ES, RDI, address, w, PTR_READ);
            let b = t.b.ld(w, at, 0);
            advance(t, RSI, address, w);
            advance(t, RDI, address, w);
            set_compare(t, w, a, b);
        }
    }
}

fn port(t: &mut Translator) -> Val {
    let dx = t.gpr64(2);
    t.b.un(Op::Zext, Width::W16, dx)
}

fn address_size(insn: &Instruction) -> Width {
    let of = |kind| match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(Width::W16),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(Width::W32),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(Width::W64),
        _ => None,
    };
    of(insn.op0_kind()).or_else(|| of(insn.op1_kind())).unwrap_or(Width::W64)
}

fn source_segment(insn: &Instruction) -> usize {
    seg_num(insn.memory_segment()).unwrap_or(seg::DS)
}

/// Linear address of the element at register `num`.
fn element(t: &mut Translator, segment: usize, num: u8, a: Width, w: Width, access: u8) -> Addr {
    let v = t.gpr64(num);
    t.linear(segment, Offset::value(v, a), w.bytes(), access)
}

/// Moves register `num` on by one element in the direction of DF.
fn advance(t: &mut Translator, num: u8, address: Width, w: Width) {
    let r = Gpr { num, w: address, high: false };
    let base = t.gpr64(num);
    let index = t.b.get(global::DF);
    let next = Addr { base, index, scale: w as u8, disp: 0 };
    let v = t.b.lea(address.max(Width::W32), next);
    t.set_gpr(r, v);
}

fn helper(
    t: &mut Translator,
    insn: &Instruction,
    kind: Kind,
    w: Width,
    address: Width,
    source: usize,
    repeat: bool,
) {
    let info = Info {
        width: w,
        address,
        source: source as u8,
        mmu_idx: t.mode.mmu_idx(),
        code64: t.code64(),
        segmented: t.needs_check(source, PTR_READ),
        repeat,
        until_equal: insn.has_repne_prefix(),
        checked: t.mode.contains(Mode::ALIGN_CHECK),
        // The trap comes after each repetition (SDM vol. 3 §18.3.1.4).
        single: t.mode.intersects(Mode::TF | Mode::WATCH),
    };
    let name: Helper = match kind {
        Kind::Movs => helpers::MOVS,
        Kind::Stos => helpers::STOS,
        Kind::Lods => helpers::LODS,
        Kind::Scas => helpers::SCAS,
        Kind::Cmps => helpers::CMPS,
        Kind::Ins => helpers::INS,
        Kind::Outs => helpers::OUTS,
    };
    let arg = t.b.iconst(info.pack());
    let again = t.b.call(name, &[arg]);
    if matches!(kind, Kind::Scas | Kind::Cmps) {
        t.flags_unknown();
    }
    if repeat {
        let fl = t.b.flags_of(Op::And, Width::W32, [again, again, N, N]);
        let exit = t.exit_to(t.rip, ExitHint::Jump);
        t.b.brcc(Cond::Ne, fl, exit);
    }
}
