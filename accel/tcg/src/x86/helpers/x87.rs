//! Entries from generated code into the x87 and the save areas.
//!
//! `what` is the packed instruction ([`Insn`]); `rip` goes to the unit's instruction pointer.

use super::raise;
use crate::x86::exception::Exception;
use crate::x86::mode::Mode;
use crate::x86::x87::host::{Load, Op, Store};
use crate::x86::x87::ops::{self, Source};
use crate::x86::x87::{self, CW_FIXED, CW_MASK, F80};
use crate::x86::xsave::{self, Save};
use crate::x86::{Cpu, Env};
use tandem_accel::x86::seg;

/// What a computing instruction does; the argument `n` of [`Insn`] refines it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Action {
    /// FLD of a memory operand; `n` is the [`Load`].
    Load,
    /// FLD ST(i).
    LoadSt,
    /// FLD1 …; `n` is the constant's number.
    Constant,
    /// FST, FSTP ST(i); `n` is 1 for FSTPNCE.
    StoreSt,
    /// FADD … with ST(0) as destination and ST(i) as source; `n` is the operation.
    Arith,
    /// With ST(i) as destination and ST(0) as source.
    ArithSt,
    /// With a memory operand; `n` is operation and [`Load`] << 4.
    ArithMem,
    /// FCOM, FCOMP; `n` is the number of pops.
    Com,
    /// FUCOM ….
    UCom,
    /// FCOM, FICOM of memory; `n` is pops and [`Load`] << 4.
    ComMem,
    /// FTST.
    Test,
    /// FXAM.
    Examine,
    /// FCHS.
    Chs,
    /// FABS.
    Abs,
    /// FSQRT …; `n` is the operation.
    Unary,
    /// FYL2X ….
    BinaryPop,
    /// FPTAN ….
    UnaryPush,
    /// FXCH.
    Exchange,
    /// FFREE; `n` is 1 for FFREEP.
    Free,
    /// FINCSTP (`n` = 1) and FDECSTP (`n` = 7).
    Rotate,
    /// FCMOVcc; the condition is in the operand.
    Move,
    /// FNOP.
    Nop,
}

/// The actions by number.
const ACTIONS: [Action; 22] = [
    Action::Load,
    Action::LoadSt,
    Action::Constant,
    Action::StoreSt,
    Action::Arith,
    Action::ArithSt,
    Action::ArithMem,
    Action::Com,
    Action::UCom,
    Action::ComMem,
    Action::Test,
    Action::Examine,
    Action::Chs,
    Action::Abs,
    Action::Unary,
    Action::BinaryPop,
    Action::UnaryPush,
    Action::Exchange,
    Action::Free,
    Action::Rotate,
    Action::Move,
    Action::Nop,
];

/// A packed instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Insn {
    /// What it does.
    pub action: Action,
    /// Refinement.
    pub n: u8,
    /// Register number.
    pub i: u8,
    /// It pops.
    pub pop: bool,
    /// Opcode for FOP: low bits of the first byte, second byte.
    pub fop: u16,
    /// Number of the memory operand's segment register, if there is one.
    pub segment: Option<u8>,
}

impl Insn {
    /// As one word for a helper's argument.
    pub fn pack(self) -> u64 {
        u64::from(self.action as u8)
            | u64::from(self.n) << 8
            | u64::from(self.i) << 16
            | u64::from(self.pop) << 20
            | u64::from(self.fop) << 32
            | self.segment.map_or(0, |n| 1 << 52 | u64::from(n) << 48)
    }
}

/// Operations by number, as [`Insn::n`] has them.
pub const OPS: [Op; 22] = [
    Op::Add,
    Op::Mul,
    Op::Com,
    Op::UCom,
    Op::Sub,
    Op::SubR,
    Op::Div,
    Op::DivR,
    Op::Rem,
    Op::Rem1,
    Op::Scale,
    Op::Yl2x,
    Op::Yl2xp1,
    Op::Atan,
    Op::Sqrt,
    Op::Sin,
    Op::Cos,
    Op::RoundInt,
    Op::TwoToXm1,
    Op::Tan,
    Op::SinCos,
    Op::Extract,
];
/// Conversions from memory by number.
pub const LOADS: [Load; 6] = [Load::F32, Load::F64, Load::I16, Load::I32, Load::I64, Load::Bcd];
/// Conversions to memory by number, with the size in bytes.
pub const STORES: [(Store, usize); 9] = [
    (Store::F32, 4),
    (Store::F64, 8),
    (Store::I16, 2),
    (Store::I32, 4),
    (Store::I64, 8),
    (Store::I16Trunc, 2),
    (Store::I32Trunc, 4),
    (Store::I64Trunc, 8),
    (Store::Bcd, 10),
];
/// Number in [`STORES`] place of a plain 80-bit store.
pub const STORE_80: u8 = 9;

/// The Env, with the processor's x87 fields up to date.
fn env<'a>(p: *mut Env) -> &'a mut Env {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *p };
    env.x87_sync();
    env
}

/// Brings the processor's x87 fields up to date, for instructions that work on them in line.
pub extern "C" fn x87_sync(p: *mut Env) -> u64 {
    env(p);
    0
}

fn done(env: &mut Env, r: Result<(), Exception>) -> u64 {
    match r {
        Ok(()) => 0,
        Err(e) => raise(env, e),
    }
}

fn op(n: u8) -> Op {
    OPS[usize::from(n & 31).min(OPS.len() - 1)]
}

fn load(n: u8) -> Load {
    LOADS[usize::from(n & 7).min(LOADS.len() - 1)]
}

/// Sets the unit's pointers, apart from the data pointer's offset.
fn pointers(c: &mut Cpu, what: u64, rip: u64) {
    c.fop = (what >> 32) as u16 & 0x7ff;
    c.fip = rip;
    c.fcs = c.seg[seg::CS].selector;
    if what >> 52 & 1 != 0 {
        c.fds = c.seg[(what >> 48 & 7) as usize].selector;
    }
}

/// A computing instruction; `lo` and `hi` are its memory operand, if any.
pub extern "C" fn x87(p: *mut Env, what: u64, rip: u64, lo: u64, hi: u64) -> u64 {
    let c = &mut env(p).cpu;
    pointers(c, what, rip);
    let n = (what >> 8) as u8;
    let i = (what >> 16 & 7) as usize;
    let pop = what >> 20 & 1 != 0;
    let Some(&action) = ACTIONS.get(usize::from(what as u8)) else { return 0 };
    match action {
        Action::Load => ops::load(c, load(n), lo, hi),
        Action::LoadSt => ops::load_st(c, i),
        Action::Constant => ops::load_constant(c, n),
        Action::StoreSt => ops::store_st(c, i, pop, n != 0),
        Action::Arith => ops::arith(c, op(n), 0, Source::St(i), pop),
        Action::ArithSt => ops::arith(c, op(n), i, Source::St(0), pop),
        Action::ArithMem => {
            ops::arith(c, op(n & 15), 0, Source::Memory(load(n >> 4), lo), false);
        }
        Action::Com | Action::UCom => {
            ops::compare(c, action == Action::UCom, Source::St(i), n);
        }
        Action::ComMem => {
            ops::compare(c, false, Source::Memory(load(n >> 4), lo), n & 1);
        }
        Action::Test => ops::test(c),
        Action::Examine => ops::examine(c),
        Action::Chs => ops::sign(c, 0x8000, 0x8000),
        Action::Abs => ops::sign(c, 0, 0),
        Action::Unary => ops::unary(c, op(n)),
        Action::BinaryPop => ops::binary_pop(c, op(n)),
        Action::UnaryPush => ops::unary_push(c, op(n)),
        Action::Exchange => ops::exchange(c, i),
        Action::Free => ops::free(c, i, n != 0),
        Action::Rotate => ops::rotate(c, n.into()),
        Action::Move => ops::conditional_move(c, i, lo != 0),
        Action::Nop => {}
    }
    0
}

/// FLD m80: the 10 bytes in `lo` and `hi`.
pub extern "C" fn x87_load_80(p: *mut Env, what: u64, rip: u64, lo: u64, hi: u64) -> u64 {
    let c = &mut env(p).cpu;
    pointers(c, what, rip);
    ops::push(c, F80 { sig: lo, exp: hi as u16 });
    0
}

/// FST, FSTP, FIST, FISTP, FISTTP, FBSTP to memory at `addr`, which is `offset` in its segment:
/// [`STORES`] or [`STORE_80`] by `n`.
pub extern "C" fn x87_store(p: *mut Env, what: u64, rip: u64, addr: u64, offset: u64) -> u64 {
    let env = env(p);
    let mmu = Mode::from_bits_retain(env.core.mode).mmu_idx();
    let n = (what >> 8) as u8;
    let (size, to) = match STORES.get(usize::from(n)) {
        Some(&(to, size)) => (size, Some(to)),
        None => (10, None),
    };
    // A page fault comes before anything changes.
    if let Err(e) = env.probe_write(addr, size as u64, mmu) {
        return raise(env, e);
    }
    pointers(&mut env.cpu, what, rip);
    let c = &mut env.cpu;
    c.fdp = offset;
    let bytes = match to {
        Some(to) => ops::store(c, to).map(u128::to_le_bytes),
        None => ops::store_80(c).map(|v| {
            let mut b = [0; 16];
            v.to_bytes(&mut b);
            b
        }),
    };
    let Some(bytes) = bytes else { return 0 };
    if what >> 20 & 1 != 0 {
        ops::pop(c);
    }
    let r = if size <= 8 {
        let mut v = [0; 8];
        v.copy_from_slice(&bytes[..8]);
        env.write(addr, u64::from_le_bytes(v), size, mmu)
    } else {
        env.write_bytes(addr, &bytes[..10], mmu)
    };
    done(env, r)
}

/// FCOMI, FCOMIP, FUCOMI (`n` = 1), FUCOMIP: the flags' image.
pub extern "C" fn x87_compare_flags(p: *mut Env, what: u64, rip: u64) -> u64 {
    let c = &mut env(p).cpu;
    pointers(c, what, rip);
    ops::compare_flags(c, what >> 8 & 1 != 0, (what >> 16 & 7) as usize, what >> 20 & 1 != 0)
}

/// FLDCW.
pub extern "C" fn fldcw(p: *mut Env, cw: u64) -> u64 {
    let env = env(p);
    env.cpu.fcw = cw as u16 & CW_MASK | CW_FIXED;
    x87::update_summary(&mut env.cpu);
    env.x87_changed();
    0
}

/// The status word, TOP included.
pub extern "C" fn fnstsw(p: *mut Env) -> u64 {
    x87::status(&env(p).cpu).into()
}

/// FNCLEX.
pub extern "C" fn fnclex(p: *mut Env) -> u64 {
    let env = env(p);
    env.cpu.fsw &= !(x87::EXCEPTIONS | x87::SF | x87::ES | x87::BUSY);
    env.x87_changed();
    0
}

/// FNINIT.
pub extern "C" fn fninit(p: *mut Env) -> u64 {
    let env = env(p);
    x87::init(&mut env.cpu, false);
    env.x87_changed();
    0
}

/// FNSTENV (`registers` 0) and FNSAVE (1) at `addr`, in 16-bit format if `small`.
pub extern "C" fn fnsave(p: *mut Env, addr: u64, small: u64, registers: u64) -> u64 {
    let env = env(p);
    let r = save_env(env, addr, small != 0, registers != 0);
    done(env, r)
}

/// Whether pointers are stored as segment and offset (protected mode) or as linear addresses (real
/// and virtual-8086 mode).
fn protected(env: &Env) -> bool {
    let mode = Mode::from_bits_retain(env.core.mode);
    mode.contains(Mode::PE) && !mode.contains(Mode::VM86)
}

/// The seven words of the environment (SDM vol. 1 §8.1.10, figures 8-9 to 8-12).
fn environment(env: &Env, small: bool) -> [u32; 7] {
    let c = &env.cpu;
    let (ip, dp) = (c.fip as u32, c.fdp as u32);
    let (fop, tags) = (u32::from(c.fop), x87::full_tags(c).into());
    let mut w = [c.fcw.into(), x87::status(c).into(), tags, ip, 0, dp, 0];
    if protected(env) {
        w[4] = fop << 16 | u32::from(c.fcs);
        w[6] = c.fds.into();
    } else if small {
        w[4] = (ip >> 4 & 0xf000) | fop;
        w[6] = dp >> 4 & 0xf000;
    } else {
        w[3] = ip & 0xffff;
        w[4] = (ip >> 16) << 12 | fop;
        w[5] = dp & 0xffff;
        w[6] = (dp >> 16) << 12;
    }
    if small {
        return w.map(|v| v & 0xffff);
    }
    // The upper halves of the first three are reserved and stored as ones; so are those of
    // selectors and of the short offsets.
    for v in &mut w[..3] {
        *v |= 0xffff_0000;
    }
    w[6] |= if protected(env) { 0xffff_0000 } else { 0 };
    w
}

fn save_env(env: &mut Env, addr: u64, small: bool, registers: bool) -> Result<(), Exception> {
    let mmu = Mode::from_bits_retain(env.core.mode).mmu_idx();
    let mut out = [0u8; 108];
    let word = if small { 2 } else { 4 };
    for (to, v) in out.chunks_exact_mut(word).zip(environment(env, small)) {
        to.copy_from_slice(&v.to_le_bytes()[..word]);
    }
    let mut len = 7 * word;
    if registers {
        for i in 0..8 {
            let r = &env.cpu.fpr[x87::physical(&env.cpu, i)];
            out[len..len + 10].copy_from_slice(&r[..10]);
            len += 10;
        }
    }
    env.write_bytes(addr, &out[..len], mmu)?;
    if registers {
        x87::init(&mut env.cpu, false);
    } else {
        // FNSTENV masks all exceptions.
        env.cpu.fcw |= x87::EXCEPTIONS;
        x87::update_summary(&mut env.cpu);
    }
    Ok(())
}

/// FLDENV (`registers` 0) and FRSTOR (1) from `addr`.
pub extern "C" fn frstor(p: *mut Env, addr: u64, small: u64, registers: u64) -> u64 {
    let env = env(p);
    let r = load_env(env, addr, small != 0, registers != 0);
    env.x87_changed();
    done(env, r)
}

fn load_env(env: &mut Env, addr: u64, small: bool, registers: bool) -> Result<(), Exception> {
    let mmu = Mode::from_bits_retain(env.core.mode).mmu_idx();
    let mut data = [0u8; 108];
    let word = if small { 2 } else { 4 };
    let len = 7 * word + if registers { 80 } else { 0 };
    env.read_bytes(addr, &mut data[..len], mmu)?;
    let mut w = [0u32; 7];
    for (v, from) in w.iter_mut().zip(data.chunks_exact(word)) {
        let mut b = [0; 4];
        b[..word].copy_from_slice(from);
        *v = u32::from_le_bytes(b);
    }
    let prot = protected(env);
    let c = &mut env.cpu;
    c.fcw = w[0] as u16 & CW_MASK | CW_FIXED;
    x87::set_status(c, w[1] as u16);
    c.ftag_empty = x87::empty_tags(w[2] as u16);
    (c.fip, c.fdp) = (w[3].into(), w[5].into());
    if prot {
        // The short format has no room for it.
        c.fop = if small { 0 } else { (w[4] >> 16) as u16 & 0x7ff };
        (c.fcs, c.fds) = (w[4] as u16, w[6] as u16);
    } else {
        c.fop = w[4] as u16 & 0x7ff;
        let high = |v: u32| u64::from(v >> 12 & 0xffff) << 16;
        c.fip = c.fip & 0xffff | high(w[4]);
        c.fdp = c.fdp & 0xffff | high(w[6]);
    }
    if registers {
        for (i, from) in data[7 * word..len].chunks_exact(10).enumerate() {
            let p = x87::physical(c, i);
            c.fpr[p] = [0; 16];
            c.fpr[p][..10].copy_from_slice(from);
        }
    }
    Ok(())
}

/// FXSAVE (`how` bit 0: REX.W).
pub extern "C" fn fxsave(p: *mut Env, addr: u64, how: u64) -> u64 {
    let env = env(p);
    let r = xsave::fxsave(env, addr, how & 1 != 0);
    done(env, r)
}

/// FXRSTOR.
pub extern "C" fn fxrstor(p: *mut Env, addr: u64, how: u64) -> u64 {
    let env = env(p);
    let r = xsave::fxrstor(env, addr, how & 1 != 0);
    env.x87_changed();
    done(env, r)
}

/// EDX:EAX.
fn request(c: &Cpu) -> u64 {
    c.gpr[2] << 32 | c.gpr[0] & u64::from(u32::MAX)
}

/// XSAVE (`how` >> 1 is the [`Save`]; bit 0: REX.W).
pub extern "C" fn xsave(p: *mut Env, addr: u64, how: u64) -> u64 {
    let env = env(p);
    let kind = match how >> 1 {
        0 => Save::Plain,
        1 => Save::Optimised,
        2 => Save::Compacted,
        _ => Save::Supervisor,
    };
    // CPUID.0Dh.1:EAX says which forms exist.
    let needs = match kind {
        Save::Plain => 0,
        Save::Optimised => 1,
        Save::Compacted => 1 << 1,
        Save::Supervisor => 1 << 3,
    };
    if env.cpu.feat.xsave & needs != needs {
        return raise(env, Exception::UD);
    }
    let request = request(&env.cpu);
    let r = xsave::xsave(env, addr, request, kind, how & 1 != 0);
    done(env, r)
}

/// XRSTOR (`how` bit 1: XRSTORS; bit 0: REX.W).
pub extern "C" fn xrstor(p: *mut Env, addr: u64, how: u64) -> u64 {
    let env = env(p);
    if how & 2 != 0 && env.cpu.feat.xsave & 1 << 3 == 0 {
        return raise(env, Exception::UD);
    }
    let request = request(&env.cpu);
    let r = xsave::xrstor(env, addr, request, how & 2 != 0, how & 1 != 0);
    env.x87_changed();
    done(env, r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_at_their_numbers() {
        for (i, a) in ACTIONS.iter().enumerate() {
            assert_eq!(*a as usize, i);
        }
        assert_eq!(Action::Nop as usize + 1, ACTIONS.len());
    }
}
