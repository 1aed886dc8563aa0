//! The verifier: is a block well formed?
//!
//! Checks in one pass what every later stage relies on without looking: values are dense, defined
//! once and before use, and of the class the operation table asks for; the terminator is last; every
//! index (exit, native, global, helper, `Env` offset, MMU table) is in range. A block that passes
//! can be interpreted or compiled without a bounds error.

use super::block::{
    Block, ExitKind, Inst, MAX_VALS, NativeReg, PTR_ALIGNED, PTR_LOCKED, PTR_MASKED, PTR_READ,
    PTR_WRITE, Rmw, SIZE_80, Val,
};
use super::op::{Op, Slot, Width};
use crate::target::{MemModel, Target};

/// What is wrong with a block, and at which instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("instruction {at}: {fault}")]
pub struct VerifyError {
    /// Index of the instruction (the number of instructions if the block as a whole is meant).
    pub at: usize,
    /// What is wrong.
    pub fault: Fault,
}

/// A rule of the IR that a block breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// A value is used before any instruction defined it.
    #[error("value {0} is used before its definition")]
    Undefined(u16),
    /// A value is defined by two instructions, or twice by one.
    #[error("value {0} is defined twice")]
    Redefined(u16),
    /// A value number is not below [`Block::nvals`].
    #[error("value {0} is out of range")]
    ValueRange(u16),
    /// A flags value where a value belongs, or the other way round.
    #[error("value {0} has the wrong class")]
    Class(u16),
    /// An operand that the operation requires is missing.
    #[error("a required operand is missing")]
    Missing,
    /// An operand that the operation does not have is present.
    #[error("an operand is present that the operation does not have")]
    Extra,
    /// The last instruction is not a terminator, or another one is.
    #[error("the terminator is missing or not last")]
    Terminator,
    /// An index into a side table is out of range.
    #[error("{0} index out of range")]
    Index(&'static str),
    /// A small immediate is out of the operation's range.
    #[error("{0} out of range")]
    Immediate(&'static str),
    /// The operation does not exist at this width.
    #[error("the operation does not exist at this width")]
    BadWidth,
    /// The block defines more values than [`MAX_VALS`] or has more than 256 exits.
    #[error("the block is too large")]
    TooLarge,
}

/// Reusable memory of the verifier.
#[derive(Debug, Default)]
pub struct Verifier {
    class: Vec<Class>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Undefined,
    Value,
    Flags,
}

impl Verifier {
    /// Checks `block` against the rules of the IR and the tables of `target`.
    pub fn check(&mut self, block: &Block, target: &Target) -> Result<(), VerifyError> {
        let end = block.insts.len();
        if block.nvals > MAX_VALS || block.exits.len() > 256 {
            return Err(VerifyError { at: end, fault: Fault::TooLarge });
        }
        let tables = match &target.mem {
            MemModel::Softmmu { tables, .. } => tables.len(),
            MemModel::Linear { .. } => usize::MAX,
        };
        if usize::from(block.mmu_idx) >= tables {
            return Err(VerifyError { at: end, fault: Fault::Index("mmu") });
        }
        // A slot beyond the map is a word of `Env` that follows it, compared like one of the map.
        let inside = |slot: u32| {
            let end = u64::from(target.env.code_map) + 4 * (u64::from(slot) + 1);
            end <= target.env.size.into()
        };
        if !block.pages.iter().all(|p| inside(p.slot)) {
            return Err(VerifyError { at: end, fault: Fault::Index("code map") });
        }
        self.class.clear();
        self.class.resize(block.nvals.into(), Class::Undefined);
        for (at, inst) in block.insts.iter().enumerate() {
            self.inst(inst)
                .and_then(|()| immediates(block, inst, target))
                .map_err(|fault| VerifyError { at, fault })?;
            let is_last = at + 1 == end;
            if (inst.op == Op::Exit) != is_last {
                return Err(VerifyError { at, fault: Fault::Terminator });
            }
        }
        if end == 0 {
            return Err(VerifyError { at: 0, fault: Fault::Terminator });
        }
        Ok(())
    }

    fn inst(&mut self, inst: &Inst) -> Result<(), Fault> {
        let info = inst.op.info();
        for (slot, v) in info.ins.into_iter().zip(inst.ins) {
            self.input(slot, v)?;
        }
        self.output(info.dst, inst.dst)?;
        self.output(info.dst2, inst.dst2)?;
        self.output(info.fl, inst.fl)
    }

    /// The class an operand slot asks for; `None` if the operand is rightly absent.
    fn wanted(slot: Slot, v: Val) -> Result<Option<Class>, Fault> {
        match (slot, v.is_some()) {
            (Slot::None, true) => Err(Fault::Extra),
            (Slot::Val | Slot::Flags, false) => Err(Fault::Missing),
            (_, false) => Ok(None),
            (Slot::Val | Slot::OptVal, true) => Ok(Some(Class::Value)),
            (Slot::Flags | Slot::OptFlags, true) => Ok(Some(Class::Flags)),
        }
    }

    fn input(&self, slot: Slot, v: Val) -> Result<(), Fault> {
        let Some(class) = Self::wanted(slot, v)? else { return Ok(()) };
        match self.class.get(v.index()) {
            None => Err(Fault::ValueRange(v.0)),
            Some(Class::Undefined) => Err(Fault::Undefined(v.0)),
            Some(&c) if c != class => Err(Fault::Class(v.0)),
            Some(_) => Ok(()),
        }
    }

    fn output(&mut self, slot: Slot, v: Val) -> Result<(), Fault> {
        let Some(class) = Self::wanted(slot, v)? else { return Ok(()) };
        match self.class.get_mut(v.index()) {
            None => Err(Fault::ValueRange(v.0)),
            Some(c @ Class::Undefined) => {
                *c = class;
                Ok(())
            }
            Some(_) => Err(Fault::Redefined(v.0)),
        }
    }
}

fn immediates(block: &Block, inst: &Inst, target: &Target) -> Result<(), Fault> {
    let index = |len: usize, what| {
        if inst.imm < len as u64 { Ok(()) } else { Err(Fault::Index(what)) }
    };
    let require = |ok: bool, what| if ok { Ok(()) } else { Err(Fault::Immediate(what)) };
    let bits = inst.w.bits();
    match inst.op {
        Op::Get | Op::Put => index(target.globals.len(), "global"),
        Op::LdEnv | Op::StEnv => {
            let end = inst.imm.checked_add(inst.w.bytes().into());
            require(end.is_some_and(|e| e <= target.env.size.into()), "Env offset")
        }
        Op::EnvPtr => require(inst.imm < target.env.size.into(), "Env offset"),
        Op::Deposit | Op::Extract => require(u32::from(inst.aux) + bits <= 64, "bit position"),
        Op::Bswap if inst.w == Width::W8 => Err(Fault::BadWidth),
        Op::Pext | Op::Pdep | Op::Lea if bits < 32 => Err(Fault::BadWidth),
        Op::Lea | Op::Ld | Op::St | Op::LdP | Op::StP => displacement(inst),
        Op::Ptr => {
            displacement(inst)?;
            let masked = inst.cond & PTR_MASKED != 0;
            let extra = if masked { PTR_MASKED | PTR_ALIGNED } else { PTR_LOCKED };
            let access = inst.cond & !extra;
            require(access != 0 && access & !(PTR_READ | PTR_WRITE) == 0, "access")?;
            let locked = inst.cond & PTR_LOCKED != 0;
            require(!locked || access == PTR_READ | PTR_WRITE, "access")?;
            require(inst.aux >> 2 <= SIZE_80, "pointer size")
        }
        Op::AtomicRmw => require(Rmw::from_code(inst.aux).is_some(), "sub-operation"),
        Op::Call => index(target.helpers.len(), "helper"),
        Op::Native => {
            index(block.natives.len(), "native")?;
            native_operands(block, inst)
        }
        Op::NativeMem => {
            let Some(native) = block.natives.get(inst.native_index()) else {
                return Err(Fault::Index("native"));
            };
            let access = inst.cond & (PTR_READ | PTR_WRITE);
            require(access == PTR_READ || access == PTR_WRITE, "access")?;
            require(inst.cond & !(access | PTR_ALIGNED) == 0, "access")?;
            require(inst.aux >> 2 <= SIZE_80, "operand size")?;
            require(native.rm == NativeReg::Mem && !native.dst_in, "pass-through instruction")?;
            let general = |r| matches!(r, NativeReg::GprB | NativeReg::GprC | NativeReg::GprDst2);
            require(!general(native.reg) && !general(native.vvvv), "pass-through instruction")
        }
        Op::BrCc => {
            index(block.exits.len(), "exit")?;
            // A side exit has no operand for a target.
            let indirect = block.exits[inst.imm as usize].kind == ExitKind::Indirect;
            if indirect { Err(Fault::Missing) } else { Ok(()) }
        }
        Op::Exit => {
            index(block.exits.len(), "exit")?;
            let indirect = block.exits[inst.imm as usize].kind == ExitKind::Indirect;
            match (indirect, inst.ins[0].is_some()) {
                (true, false) => Err(Fault::Missing),
                (false, true) => Err(Fault::Extra),
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// The displacement of an address fits 32 bits, signed.
fn displacement(inst: &Inst) -> Result<(), Fault> {
    if i32::try_from(inst.imm as i64).is_ok() {
        Ok(())
    } else {
        Err(Fault::Immediate("displacement"))
    }
}

/// Every operand that the pass-through instruction's fields name is present.
fn native_operands(block: &Block, inst: &Inst) -> Result<(), Fault> {
    let native = &block.natives[inst.imm as usize];
    for reg in [native.reg, native.rm, native.vvvv] {
        let present = match reg {
            NativeReg::GprB => inst.ins[1].is_some(),
            NativeReg::GprC => inst.ins[2].is_some(),
            NativeReg::GprDst => !native.dst_in || inst.ins[3].is_some(),
            NativeReg::Mem => inst.ins[0].is_some(),
            _ => true,
        };
        if !present {
            return Err(Fault::Missing);
        }
    }
    Ok(())
}
