//! Passes over a block: cheap, linear, and without allocation once warm.
//!
//! ```text
//!   sweep ──► fold
//!   (backwards: dead   (forwards: constants, copies, extensions,
//!    code, flags,       identities, global forwarding, addresses)
//!    puts; use counts)
//! ```
//! What folding leaves without a use stays in the block: a back end that counts uses anyway skips it,
//! and for the others there is [`Passes::tidy`].
//!
//! What always holds: the passes turn a well-formed block into a well-formed block that no guest can
//! tell from it. Instructions that can fault stay, in their order; at each of them, and at each
//! exit, the globals have the values they had. Only what nobody can observe goes: values, flags, and
//! `Put`s that another `Put` overrides before a fault point, an exit, or a helper that looks.

mod fold;
mod rules;
mod sweep;

use crate::ir::{Block, Inst, NativeReg, Op, Val, effect};
use crate::target::{MemModel, Target};

/// The passes, with memory that is reused between blocks.
#[derive(Debug, Default)]
pub struct Passes {
    vals: Vec<Info>,
    /// By global: a value it is known to hold.
    globals: Vec<Val>,
}

/// What is known of a value.
#[derive(Clone, Copy, Debug)]
struct Info {
    /// Its constant (a flags value's image), if `known`.
    constant: u64,
    /// Index of the instruction that defines it.
    def: u32,
    /// Number of inputs that name it.
    uses: u16,
    /// Of a flags value: the image bits that someone looks at.
    demand: u16,
    /// The value that stands for it, or [`Val::NONE`] for itself.
    same_as: Val,
    known: bool,
    /// It is the result of an extension or insertion.
    extends: bool,
    /// All bits from this one up are zero.
    bits: u8,
}

impl Info {
    const UNKNOWN: Info = Info {
        constant: 0,
        def: u32::MAX,
        uses: 0,
        demand: 0,
        same_as: Val::NONE,
        known: false,
        extends: false,
        bits: 64,
    };
}

impl Passes {
    /// Improves `block` in place. The block must be well formed ([`crate::ir::Verifier`]).
    pub fn run(&mut self, block: &mut Block, target: &Target) {
        self.vals.clear();
        self.vals.resize(block.nvals.into(), Info::UNKNOWN);
        self.globals.clear();
        self.globals.resize(target.globals.len(), Val::NONE);
        sweep::sweep(block, target, &mut self.vals);
        fold::fold(block, target, &mut self.vals, &mut self.globals);
    }

    /// Removes what [`Passes::run`] has just left dead in `block`.
    pub fn tidy(&mut self, block: &mut Block, target: &Target) {
        for v in &mut self.vals {
            (v.uses, v.demand) = (0, 0);
        }
        sweep::sweep(block, target, &mut self.vals);
    }
}

/// Whether an instruction can raise a fault where it stands (the table's `FAULT` says that its
/// operation can).
fn may_fault(block: &Block, inst: &Inst, target: &Target) -> bool {
    match inst.op {
        Op::Call => target.helpers[inst.imm as usize].effects.may_fault,
        // Without a software TLB a host pointer faults where it is used, not where it is made.
        Op::LdP | Op::StP | Op::AtomicRmw | Op::AtomicCas => linear(target),
        Op::Native => {
            let native = &block.natives[inst.imm as usize];
            native.fp || (linear(target) && native.rm == NativeReg::Mem)
        }
        op => op.has(effect::FAULT),
    }
}

fn linear(target: &Target) -> bool {
    matches!(target.mem, MemModel::Linear { .. })
}
