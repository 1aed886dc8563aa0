//! The backward pass: what the forward pass of a back end must know of the future.
//!
//! What always holds afterwards: `uses` counts exactly the operands of instructions that are not
//! `dead`; a dead instruction has no effect and no used result, or is a `Put` that is overwritten
//! before anything can observe it; a value's `hint` names the global its first `Put` goes to, and
//! nothing between definition and that `Put` can observe the global's old content through a fault,
//! an exit, a call or a `Get`; a value with a `merge` is defined behind what it is inserted into; a global that is `unseen` at an instruction is neither observed nor
//! written by it, and written before anything observes it (or nobody ever does).

use crate::ir::{Block, Encoding, Inst, Native, NativeReg, Op, Val, Width, effect, traits};
use crate::target::{MemModel, Target};

/// No hint, no condition.
pub(crate) const NONE: u8 = 0xff;
/// `cond`: the flags value has uses that are not one condition.
pub(crate) const MIXED: u8 = 0xfe;
/// No instruction.
pub(crate) const NO_INST: u32 = u32::MAX;

/// How much vector state something uses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) enum VecUse {
    #[default]
    None,
    /// Registers 0–15.
    Low,
    /// Registers 16–31 or opmasks too.
    All,
}

impl VecUse {
    fn of(n: &Native) -> VecUse {
        let masks = [n.reg, n.rm, n.vvvv].iter().any(|r| matches!(r, NativeReg::Mask(_)));
        match n.enc {
            _ if !n.vector => VecUse::None,
            Encoding::Evex { .. } => VecUse::All,
            _ if masks => VecUse::All,
            _ => VecUse::Low,
        }
    }
}

/// The future of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Future {
    /// Number of uses.
    pub uses: u16,
    /// Pinned global to compute it into, or [`NONE`].
    pub hint: u8,
    /// Of a flags value: the one condition that all uses test (bit 0 cleared), [`MIXED`], or
    /// [`NONE`].
    pub cond: u8,
    /// The `Deposit` at bit 0 that puts it into its hinted global, or [`NO_INST`].
    pub merge: u32,
}

impl Future {
    const UNUSED: Future = Future { uses: 0, hint: NONE, cond: NONE, merge: NO_INST };
}

/// Result of the pass; reused between blocks.
#[derive(Default)]
pub(crate) struct Liveness {
    /// By value.
    pub vals: Vec<Future>,
    /// By instruction: not to be emitted.
    pub dead: Vec<bool>,
    /// By instruction: those of the first 64 globals whose content is of no use to anybody there.
    pub unseen: Vec<u64>,
    /// By value, in words of 64: the walk has been at its definition.
    defined: Vec<u64>,
    /// How much vector state the block's pass-through instructions use.
    pub vector: VecUse,
    /// Some value may have a `merge`.
    pub merges: bool,
    /// Number of accesses to guest memory, without `Ptr`.
    pub accesses: usize,
    /// Guest memory is linear.
    linear: bool,
    /// By global: the value of the next `Put` in program order, and the epoch it was seen in.
    pending: Vec<(Val, u32)>,
}

/// State of the walk.
struct Walk {
    /// Counts points that can observe all globals.
    epoch: u32,
    /// Globals whose content is observed before it is overwritten.
    observed: [u64; 4],
}

/// Whether the instruction may hand control to something that sees all globals.
///
/// `linear`: a host pointer faults where it is used.
pub(crate) fn observes(block: &Block, inst: &Inst, linear: bool) -> bool {
    match inst.op {
        Op::LdP | Op::StP | Op::AtomicRmw | Op::AtomicCas => linear,
        Op::Native => block.natives.get(inst.imm as usize).is_some_and(|n| n.fp),
        Op::Call => true,
        op => op.has(effect::FAULT | effect::TERM | effect::SIDE_EXIT),
    }
}

impl Liveness {
    /// Runs the pass over `block`.
    pub(crate) fn run(&mut self, target: &Target, block: &Block) {
        self.vals.clear();
        self.vals.resize(block.nvals.into(), Future::UNUSED);
        self.defined.clear();
        self.defined.resize((block.nvals as usize).div_ceil(64), 0);
        self.dead.clear();
        self.dead.resize(block.insts.len(), false);
        self.unseen.clear();
        self.unseen.resize(block.insts.len(), 0);
        self.pending.clear();
        self.pending.resize(target.globals.len(), (Val::NONE, 0));
        self.vector = VecUse::None;
        self.accesses = 0;
        self.merges = false;
        self.linear = matches!(target.mem, MemModel::Linear { .. });
        let mut walk = Walk { epoch: 1, observed: [u64::MAX; 4] };
        for (i, inst) in block.insts.iter().enumerate().rev() {
            if inst.op == Op::InsnStart {
                continue;
            }
            let behind = walk.observed[0];
            if !self.step(block, i, inst, &mut walk) {
                self.unseen[i] = !(behind | walk.observed[0]);
            }
        }
    }

    fn used(&self, v: Val) -> bool {
        self.vals.get(v.index()).is_some_and(|f| f.uses != 0)
    }

    /// Returns whether the instruction observes all globals.
    fn step(&mut self, block: &Block, i: usize, inst: &Inst, walk: &mut Walk) -> bool {
        let traits = inst.op.traits();
        if traits & traits::REMOVABLE != 0
            && !self.used(inst.dst)
            && !self.used(inst.dst2)
            && !self.used(inst.fl)
        {
            self.dead[i] = true;
            return false;
        }
        for v in [inst.dst, inst.dst2] {
            if v.is_some() {
                self.defined[v.index() / 64] |= 1 << (v.index() % 64);
                self.settle(block, v, walk.epoch);
            }
        }
        let g = inst.imm as usize & 0xff;
        match inst.op {
            Op::Put => {
                let seen = walk.observed[g >> 6] >> (g & 63) & 1 != 0;
                walk.observed[g >> 6] &= !(1 << (g & 63));
                if !seen {
                    self.dead[i] = true;
                    return false;
                }
                self.pending[g] = (inst.ins[0], walk.epoch);
                let f = &mut self.vals[inst.ins[0].index()];
                (f.hint, f.merge) = (g as u8, NO_INST);
            }
            Op::Get => {
                walk.observed[g >> 6] |= 1 << (g & 63);
                self.pending[g].0 = Val::NONE;
            }
            // While vector state is in host registers, so is MXCSR.
            Op::GetMxcsr | Op::SetMxcsr => self.vector = self.vector.max(VecUse::Low),
            Op::Ld | Op::St => self.accesses += 1,
            Op::Native | Op::NativeMem => {
                self.accesses += usize::from(inst.op == Op::NativeMem);
                if let Some(n) = block.natives.get(inst.native_index()) {
                    self.vector = self.vector.max(VecUse::of(n));
                }
            }
            _ => {}
        }
        let may = traits & traits::MAY_OBSERVE != 0 || inst.op == Op::LdP;
        let observes = may && observes(block, inst, self.linear);
        if observes {
            walk.epoch += 1;
            let dead = match inst.op {
                Op::Exit | Op::BrCc => block.exits.get(inst.imm as usize).map_or(0, |e| e.dead),
                _ => 0,
            };
            // What is dead behind a side exit may still be observed on the way on.
            let on = if inst.op == Op::BrCc { walk.observed[0] } else { 0 };
            walk.observed = [!dead | on, u64::MAX, u64::MAX, u64::MAX];
        }
        for (k, &v) in inst.inputs().iter().enumerate() {
            let Some(f) = self.vals.get_mut(v.index()) else { continue };
            f.uses = f.uses.saturating_add(1);
            if traits >> k & 1 != 0 {
                f.note_condition(inst);
            }
        }
        if inst.op == Op::Deposit && inst.aux == 0 && inst.w <= Width::W16 {
            let hint = self.vals[inst.dst.index()].hint;
            if hint != NONE {
                // The hint travels to the value that is merged; `settle` checks it there.
                let f = &mut self.vals[inst.ins[1].index()];
                (f.hint, f.merge) = (hint, i as u32);
                self.merges = true;
            }
        }
        observes
    }

    /// At the definition of `v`: keeps its hint only if nothing observed the global in between.
    fn settle(&mut self, block: &Block, v: Val, epoch: u32) {
        let f = &mut self.vals[v.index()];
        if f.hint == NONE {
            f.merge = NO_INST;
            return;
        }
        let (pending, at) = self.pending[f.hint as usize];
        let (wanted, late) = match f.merge {
            NO_INST => (v, false),
            deposit => {
                // What it is inserted into may be defined only later.
                let inst = &block.insts[deposit as usize];
                let into = inst.ins[0].index();
                (inst.dst, self.defined[into / 64] >> (into % 64) & 1 != 0)
            }
        };
        if at != epoch || pending != wanted || late {
            (f.hint, f.merge) = (NONE, NO_INST);
        }
    }
}

impl Future {
    fn note_condition(&mut self, inst: &Inst) {
        let cond = match inst.op {
            Op::BrCc | Op::SetCc | Op::SelCc => inst.cond & 14,
            Op::Adc | Op::Sbb | Op::Inc | Op::Dec => 2,
            _ => MIXED,
        };
        let known = &mut self.cond;
        *known = if *known == NONE || *known == cond { cond } else { MIXED };
    }
}
