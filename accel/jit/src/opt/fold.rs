//! The forward pass: what is known replaces what is computed.
//!
//! One walk in program order. For each instruction: put known stand-ins in place of its inputs, look
//! through extensions that it would not notice, try the rules of [`super::rules`], fold it if all
//! inputs are constants, and note what is known of its results.

use super::Info;
use super::rules::Rewrite;
use super::sweep::drop_flags_input;
use crate::ir::eval::{Args, eval, is_pure};
use crate::ir::{Block, Inst, LD_SX32, LD_SX64, Op, Slot, Val, Width};
use crate::target::Target;

/// The pass at work.
pub(super) struct Fold<'a> {
    pub(super) vals: &'a mut [Info],
    globals: &'a mut [Val],
    target: &'a Target,
    /// Instructions before this index are done.
    done: usize,
    insts: &'a mut Vec<Inst>,
}

/// Runs the pass.
pub(super) fn fold(block: &mut Block, target: &Target, vals: &mut [Info], globals: &mut [Val]) {
    let end = block.insts.len();
    let mut f = Fold { vals, globals, target, done: 0, insts: &mut block.insts };
    for at in 0..end {
        let mut inst = f.insts[at];
        if inst.op == Op::InsnStart {
            f.insts[f.done] = inst;
            f.done += 1;
            continue;
        }
        f.replace_inputs(&mut inst);
        match f.rewrite(&mut inst) {
            Rewrite::Keep => f.keep(inst),
            Rewrite::Drop => f.release_inputs(&inst),
            Rewrite::Copy(v) => {
                f.release_inputs(&inst);
                f.stand_in(inst.dst, v);
                if inst.fl.is_some() {
                    // Only rules that leave the flags to an input copy an instruction that has them.
                    f.stand_in(inst.fl, inst.ins[3]);
                }
            }
            Rewrite::End => {
                f.keep(inst);
                break;
            }
        }
    }
    let done = f.done;
    block.insts.truncate(done);
}

impl Fold<'_> {
    /// The constant that `v` is, if known.
    pub(super) fn known(&self, v: Val) -> Option<u64> {
        let info = self.vals.get(v.index())?;
        info.known.then_some(info.constant)
    }

    /// Number of low bits of `v` that can be set.
    pub(super) fn bits(&self, v: Val) -> u32 {
        self.vals.get(v.index()).map_or(0, |i| i.bits.into())
    }

    /// The instruction that defines `v`.
    pub(super) fn def(&self, v: Val) -> Option<Inst> {
        let at = self.vals.get(v.index())?.def as usize;
        (at < self.done).then(|| self.insts[at])
    }

    /// As [`Fold::def`], if there is exactly one use of `v`.
    pub(super) fn sole_def(&self, v: Val) -> Option<Inst> {
        if self.vals.get(v.index())?.uses == 1 { self.def(v) } else { None }
    }

    /// Replaces the definition of `v` (same operation and results) in place.
    pub(super) fn redefine(&mut self, v: Val, inst: Inst, bits: u32) {
        let info = &mut self.vals[v.index()];
        info.bits = bits as u8;
        self.insts[info.def as usize] = inst;
    }

    /// Uses `to` for `v` from here on.
    fn stand_in(&mut self, v: Val, to: Val) {
        if v.is_some() && to.is_some() {
            let uses = self.vals[v.index()].uses;
            self.vals[v.index()].same_as = to;
            let info = &mut self.vals[to.index()];
            info.uses = info.uses.saturating_add(uses);
        }
    }

    /// Uses flags value `to` for `fl` from here on.
    pub(super) fn forward_flags(&mut self, fl: Val, to: Val) {
        self.stand_in(fl, to);
    }

    /// Uncounts the uses that a removed instruction made.
    fn release_inputs(&mut self, inst: &Inst) {
        for &v in inst.inputs() {
            self.release(v);
        }
    }

    pub(super) fn release(&mut self, v: Val) {
        if let Some(info) = self.vals.get_mut(v.index()) {
            info.uses = info.uses.saturating_sub(1);
        }
    }

    /// Counts a use that a rule adds.
    pub(super) fn retain(&mut self, v: Val) {
        if let Some(info) = self.vals.get_mut(v.index()) {
            info.uses = info.uses.saturating_add(1);
        }
    }

    fn replace_inputs(&mut self, inst: &mut Inst) {
        for k in 0..inst.op.inputs() {
            let Some(mut info) = self.vals.get(inst.ins[k].index()) else { continue };
            if info.same_as.is_some() {
                inst.ins[k] = info.same_as;
                info = &self.vals[info.same_as.index()];
            }
            if info.extends && info.uses == 1 {
                let bits = read_bits(inst, k);
                if bits < 64 {
                    self.look_through(inst, k, bits);
                }
            }
        }
    }

    /// If input `k`, of which `bits` low bits are read, is an extension (or insertion) that does not
    /// change them and has no other use, reads its source instead.
    fn look_through(&mut self, inst: &mut Inst, k: usize, bits: u32) {
        let Some(def) = self.sole_def(inst.ins[k]) else { return };
        if def.w.bits() < bits {
            return;
        }
        let source = match def.op {
            Op::Zext | Op::Sext => def.ins[0],
            Op::Deposit if def.aux == 0 => def.ins[1],
            _ => return,
        };
        self.release(inst.ins[k]);
        self.retain(source);
        inst.ins[k] = source;
    }

    /// Tries all ways to make the instruction simpler.
    fn rewrite(&mut self, inst: &mut Inst) -> Rewrite {
        match inst.op {
            Op::Get => return self.get(inst),
            Op::Put => return self.put(inst),
            Op::Call => {
                if self.target.helpers[inst.imm as usize].effects.writes_globals {
                    self.globals.fill(Val::NONE);
                }
                return Rewrite::Keep;
            }
            _ => {}
        }
        if matches!(inst.op, Op::Shl | Op::Shr | Op::Sar | Op::Rol | Op::Ror | Op::Shld | Op::Shrd)
        {
            let old = inst.ins[3];
            drop_flags_input(inst, self.vals);
            if !inst.ins[3].is_some() {
                self.release(old);
            }
        }
        match self.apply_rules(inst) {
            Rewrite::Keep => {}
            done => return done,
        }
        if is_pure(inst.op) && inst.op != Op::Const {
            self.evaluate(inst);
        }
        Rewrite::Keep
    }

    fn get(&mut self, inst: &Inst) -> Rewrite {
        let slot = &mut self.globals[inst.imm as usize];
        if slot.is_some() {
            return Rewrite::Copy(*slot);
        }
        *slot = inst.dst;
        Rewrite::Keep
    }

    fn put(&mut self, inst: &Inst) -> Rewrite {
        let (old, new) = (self.globals[inst.imm as usize], inst.ins[0]);
        let same_constant = || {
            self.known(old).is_some() && self.known(old) == self.known(new) && self.is_exact(old)
        };
        if old == new || same_constant() {
            return Rewrite::Drop;
        }
        self.globals[inst.imm as usize] = new;
        Rewrite::Keep
    }

    /// Whether the code that computes a known value leaves just that in the whole container. An
    /// operation of 8 or 16 bits that stays for its flags leaves what it likes above them.
    fn is_exact(&self, v: Val) -> bool {
        self.def(v).is_some_and(|d| d.op == Op::Const || d.w >= Width::W32)
    }

    /// Computes the results of a pure operation on constants.
    fn evaluate(&mut self, inst: &mut Inst) {
        if inst.inputs().iter().any(|&v| v.is_some() && self.known(v).is_none()) {
            return;
        }
        let mut args = Args { aux: inst.aux, cond: inst.cond, imm: inst.imm, ..Args::default() };
        for (arg, v) in args.ins.iter_mut().zip(inst.ins) {
            *arg = self.known(v).unwrap_or(0);
        }
        let r = eval(inst.op, inst.w, &args);
        self.learn(inst, r.dst, r.dst2, r.fl);
    }

    /// Notes that the results are these constants, and turns the instruction into a constant if it
    /// has but one result.
    pub(super) fn learn(&mut self, inst: &mut Inst, dst: u64, dst2: u64, fl: u64) {
        for (v, k) in [(inst.dst, dst), (inst.dst2, dst2), (inst.fl, fl)] {
            if v.is_some() {
                let info = &mut self.vals[v.index()];
                info.known = true;
                info.constant = k;
            }
        }
        if inst.dst.is_some() && !inst.dst2.is_some() && !inst.fl.is_some() {
            self.release_inputs(inst);
            *inst = Inst { dst: inst.dst, imm: dst, ..Inst::new(Op::Const, Width::W64) };
        }
    }

    /// Emits the instruction and notes what is known of its results.
    fn keep(&mut self, inst: Inst) {
        let at = self.done;
        self.insts[at] = inst;
        self.done += 1;
        if let Some(info) = self.vals.get_mut(inst.fl.index()) {
            info.def = at as u32;
        }
        if !inst.dst.is_some() && !inst.dst2.is_some() {
            return;
        }
        let bits = self.result_bits(&inst) as u8;
        if let Some(info) = self.vals.get_mut(inst.dst2.index()) {
            (info.def, info.bits) = (at as u32, bits);
        }
        if let Some(info) = self.vals.get_mut(inst.dst.index()) {
            (info.def, info.bits) = (at as u32, bits);
            if inst.op == Op::Const {
                (info.known, info.constant) = (true, inst.imm);
            }
            info.extends = matches!(inst.op, Op::Zext | Op::Sext | Op::Deposit);
        }
    }

    /// Upper bound of the significant bits of an instruction's value results.
    fn result_bits(&self, inst: &Inst) -> u32 {
        let w = inst.w.bits();
        let of = |k: usize| self.bits(inst.ins[k]);
        // Below 32 bits an operation leaves the rest of its result unspecified.
        let limit = if w == 32 { 32 } else { 64 };
        match inst.op {
            Op::Const => 64 - inst.imm.leading_zeros(),
            Op::Zext => w.min(of(0)),
            Op::Extract | Op::LdEnv | Op::LdP | Op::AtomicRmw | Op::AtomicCas => w,
            Op::GetMxcsr => 32,
            Op::Ld if inst.aux & LD_SX64 != 0 => 64,
            Op::Ld if inst.aux & LD_SX32 != 0 => 32,
            Op::Ld => w,
            Op::SetCc => 1,
            Op::FlagsImg => 12,
            Op::Deposit => of(0).max((u32::from(inst.aux) + w).min(64)),
            Op::And if w >= 32 => limit.min(of(0)).min(of(1)),
            Op::Or | Op::Xor if w >= 32 => limit.min(of(0).max(of(1))),
            Op::SelCc if w >= 32 => limit.min(of(1).max(of(2))),
            Op::Shr if w >= 32 => {
                let n = self.known(inst.ins[1]).map_or(0, |n| n as u32 & (w - 1));
                limit.min(of(0)).saturating_sub(n)
            }
            Op::Clz | Op::Ctz | Op::Popcnt if w >= 32 => 7,
            Op::Sext | Op::Get | Op::Call | Op::Native | Op::NativeMem | Op::Ptr => 64,
            _ => limit,
        }
    }
}

/// How many low bits of input `k` the instruction looks at; 64 for inputs that are no plain value.
fn read_bits(inst: &Inst, k: usize) -> u32 {
    let w = inst.w.bits();
    if !matches!(inst.op.info().ins[k], Slot::Val | Slot::OptVal) {
        return 64;
    }
    match (inst.op, k) {
        // Shift counts are masked to five or six bits, bit numbers to at most six.
        (Op::Shl | Op::Shr | Op::Sar | Op::Rol | Op::Ror | Op::Rcl | Op::Rcr | Op::Bt, 1)
        | (Op::Shld | Op::Shrd, 2) => 8,
        (Op::Deposit, 0) => 64,
        (Op::Extract, _) => (u32::from(inst.aux) + w).min(64),
        (Op::St, 2) | (Op::StP, 1) | (Op::AtomicRmw, 1) | (Op::AtomicCas, 1 | 2) => w,
        (
            Op::Put
            | Op::ImgFlags
            | Op::Call
            | Op::Native
            | Op::NativeMem
            | Op::Exit
            | Op::Ld
            | Op::St
            | Op::Ptr
            | Op::PtrEnd
            | Op::LdP
            | Op::StP
            | Op::AtomicRmw
            | Op::AtomicCas,
            _,
        ) => 64,
        _ => w,
    }
}
