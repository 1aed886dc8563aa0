//! The backward pass: what nobody uses goes.
//!
//! On the way it counts the uses of each value and collects which flags of each flags value are
//! looked at, for itself (a flags *input* that only fills in flags nobody reads is dropped) and for
//! the forward pass.

use super::{Info, may_fault};
use crate::ir::eval::{CF, FLAGS, OF, shift_count};
use crate::ir::{Block, Cond, Inst, Op, Slot, Val, Width, traits};
use crate::target::Target;

/// The globals that will be written again before anything can look at them.
#[derive(Clone, Copy, Default)]
struct Overwritten([u64; 4]);

impl Overwritten {
    /// What an exit says of the code behind it.
    fn after(block: &Block, exit: &Inst) -> Overwritten {
        let dead = block.exits.get(exit.imm as usize).map_or(0, |e| e.dead);
        Overwritten([dead, 0, 0, 0])
    }
    /// Keeps what is overwritten on the other path too.
    fn both(&mut self, other: Overwritten) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine &= theirs;
        }
    }
    fn has(&self, global: u64) -> bool {
        self.0[(global >> 6 & 3) as usize] >> (global & 63) & 1 != 0
    }
    fn add(&mut self, global: u64) {
        self.0[(global >> 6 & 3) as usize] |= 1 << (global & 63);
    }
    fn remove(&mut self, global: u64) {
        self.0[(global >> 6 & 3) as usize] &= !(1 << (global & 63));
    }
}

/// Removes dead instructions and results; leaves `uses` and `demand` of every value, which must be
/// zero before, up to date.
pub(super) fn sweep(block: &mut Block, target: &Target, vals: &mut [Info]) {
    let mut overwritten = Overwritten::default();
    let end = block.insts.len();
    // Kept instructions gather at the end, in order.
    let mut keep = end;
    for at in (0..end).rev() {
        let inst = &mut block.insts[at];
        let traits = inst.op.traits();
        match inst.op {
            Op::InsnStart => {
                keep -= 1;
                block.insts[keep] = *inst;
                continue;
            }
            Op::Put => {
                if overwritten.has(inst.imm) {
                    continue;
                }
                overwritten.add(inst.imm);
            }
            Op::Get if !used(inst.dst, vals) => continue,
            Op::Get => overwritten.remove(inst.imm),
            _ => {
                if traits & traits::REMOVABLE != 0
                    && !used(inst.dst, vals)
                    && !used(inst.dst2, vals)
                    && !used(inst.fl, vals)
                {
                    continue;
                }
                drop_results(inst, traits, vals);
                if traits & traits::MAY_OBSERVE != 0 {
                    let inst = *inst;
                    match inst.op {
                        Op::Exit => overwritten = Overwritten::after(block, &inst),
                        Op::BrCc => overwritten.both(Overwritten::after(block, &inst)),
                        _ if observes(block, &inst, target) => {
                            overwritten = Overwritten::default();
                        }
                        _ => {}
                    }
                }
            }
        }
        count_uses(&block.insts[at], traits, vals);
        keep -= 1;
        if keep != at {
            block.insts[keep] = block.insts[at];
        }
    }
    if keep != 0 {
        block.insts.copy_within(keep.., 0);
        block.insts.truncate(end - keep);
    }
}

/// Whether `v` is a value that someone uses.
fn used(v: Val, vals: &[Info]) -> bool {
    vals.get(v.index()).is_some_and(|i| i.uses != 0)
}

/// Whether the globals can be looked at from outside at this instruction.
fn observes(block: &Block, inst: &Inst, target: &Target) -> bool {
    if may_fault(block, inst, target) {
        return true;
    }
    if inst.op != Op::Call {
        return false;
    }
    // A helper that writes globals writes some; the others must already be in place.
    let effects = target.helpers[inst.imm as usize].effects;
    effects.reads_globals || effects.writes_globals
}

/// Clears results that are not used, and inputs that only served them; turns an instruction whose
/// one result is known into a constant.
fn drop_results(inst: &mut Inst, traits: u8, vals: &[Info]) {
    if traits & traits::OPTIONAL != 0 {
        let info = inst.op.info();
        if info.fl == Slot::OptFlags && !used(inst.fl, vals) {
            inst.fl = Val::NONE;
        }
        if info.dst == Slot::OptVal && !used(inst.dst, vals) {
            inst.dst = Val::NONE;
        }
        if info.dst2 == Slot::OptVal && !used(inst.dst2, vals) {
            inst.dst2 = Val::NONE;
        }
    }
    if traits & traits::FLAGS_IN != 0 {
        drop_flags_input(inst, vals);
    }
    if traits & traits::PURE != 0 && !inst.fl.is_some() && !inst.dst2.is_some() {
        match vals.get(inst.dst.index()) {
            Some(v) if v.known => {
                *inst = Inst { dst: inst.dst, imm: v.constant, ..Inst::new(Op::Const, Width::W64) };
            }
            _ => {}
        }
    }
}

/// Drops the flags input of an operation that needs it only to complete its own flags result, if
/// the flags it would fill in are not looked at.
pub(super) fn drop_flags_input(inst: &mut Inst, vals: &[Info]) {
    let demand = if inst.fl.is_some() { u64::from(vals[inst.fl.index()].demand) } else { 0 };
    // A shift by a count that is known and not zero sets its flags whatever the old ones were.
    let shifts = |count: Val| {
        let v = &vals[count.index()];
        v.known && shift_count(inst.w, v.constant) != 0
    };
    match inst.op {
        Op::Inc | Op::Dec if demand & CF == 0 => inst.ins[2] = Val::NONE,
        Op::Bt if demand & !CF == 0 => inst.ins[2] = Val::NONE,
        Op::Shl | Op::Shr | Op::Sar if demand == 0 || shifts(inst.ins[1]) => {
            inst.ins[3] = Val::NONE;
        }
        Op::Rol | Op::Ror if demand == 0 || (demand & !(CF | OF) == 0 && shifts(inst.ins[1])) => {
            inst.ins[3] = Val::NONE;
        }
        Op::Shld | Op::Shrd if demand == 0 || shifts(inst.ins[2]) => inst.ins[3] = Val::NONE,
        _ => {}
    }
}

/// Counts the instruction's inputs as uses and passes on its demand for flags.
fn count_uses(inst: &Inst, traits: u8, vals: &mut [Info]) {
    for v in inst.inputs() {
        if let Some(info) = vals.get_mut(v.index()) {
            info.uses = info.uses.saturating_add(1);
        }
    }
    if traits & traits::FLAGS_IN == 0 {
        return;
    }
    let own = vals.get(inst.fl.index()).map_or(0, |i| u64::from(i.demand));
    let wanted = match inst.op {
        Op::BrCc | Op::SetCc | Op::SelCc => Cond::from_code(inst.cond).reads(),
        Op::Adc | Op::Sbb | Op::Inc | Op::Dec => CF,
        Op::Rcl | Op::Rcr => own | CF,
        Op::Bt => own & !CF,
        Op::FlagsImg => FLAGS,
        _ => own,
    } as u16;
    for (k, v) in inst.ins.into_iter().enumerate() {
        if traits >> k & 1 != 0
            && let Some(info) = vals.get_mut(v.index())
        {
            info.demand |= wanted;
        }
    }
}
