//! The x86 front end: guest bytes in, one IR block out.
//!
//! ```text
//!  CodeFetch ──► decode (iced-x86): the instructions of a superblock ──► one translate function per
//!                instruction family ──► ir::Block
//! ```
//!
//! What always holds:
//!
//! * A block starts on one page and touches at most one more, which its last instruction runs into.
//! * Within one instruction every operation that can fault comes before the first write of guest
//!   state (see [`tandem_jit::ir`], "Faults").
//! * Everything the [`Mode`] word states is a constant of the translation; nothing else is.
//! * An instruction that does not exist in the current mode, or that nobody translates, raises #UD
//!   when it is executed. Guest bytes can make translation neither fail nor panic.

mod alu;
mod bcd;
mod bits;
mod cc;
mod control;
mod dead;
mod dispatch;
mod gate;
mod memory;
mod mmx;
mod mov;
mod muldiv;
mod operand;
mod shift;
mod simd;
mod source;
mod stack;
mod string;
mod system;
mod translator;
mod vector_form;
mod vector_mem;
mod x87;
mod x87_native;

pub use cc::CcOperands;
pub use gate::{Gate, feature_of};
pub use memory::Place;
pub use operand::{Gpr, Offset, seg_num};
pub use translator::Translator;
pub use vector_form::{host_has, supports};

use crate::x86::mode::Mode;
use crate::x86::{Env, exception::Exception};
use source::Source;
use tandem_jit::ir::Block;

/// What a block is found by, besides the physical address of its code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct TbKey {
    /// Instruction pointer (relative to CS base).
    pub rip: u64,
    /// CS base (0 in 64-bit code).
    pub cs_base: u64,
    /// CPU mode word.
    pub mode: Mode,
}

impl TbKey {
    /// Size of the code: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        if self.mode.contains(Mode::CODE64) {
            64
        } else if self.mode.contains(Mode::CODE32) {
            32
        } else {
            16
        }
    }

    /// An instruction pointer wrapped to what the code size can hold.
    pub fn wrap(&self, rip: u64) -> u64 {
        if self.mode.contains(Mode::CODE64) { rip } else { rip & u64::from(u32::MAX) }
    }

    /// Linear address of `rip` in this code segment.
    pub fn linear(&self, rip: u64) -> u64 {
        if self.mode.contains(Mode::CODE64) {
            rip
        } else {
            self.cs_base.wrapping_add(rip) & u32::MAX as u64
        }
    }
}

/// Where code bytes come from.
pub trait CodeFetch {
    /// Copies code bytes at `linear` into `buf`: as many as fit, but none beyond the end of the
    /// page, and at least one. Returns their number, or the exception that fetching them raises.
    fn fetch(&mut self, linear: u64, buf: &mut [u8]) -> Result<usize, Exception>;
}

/// Bounds of a translation.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most guest instructions in a block, at least 1.
    pub max_insns: u32,
    /// The block counts its instructions ([`crate::exec::Pace`]).
    pub count: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_insns: source::MAX_INSNS as u32, count: false }
    }
}

/// A contiguous piece of guest code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CodeRange {
    /// Linear address of the first byte.
    pub linear: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Most pieces of code in a block.
pub const MAX_RANGES: usize = 8;

/// What a block was made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct TranslateEnd {
    /// Code bytes in total.
    pub bytes: u32,
    /// Guest instructions.
    pub insns: u32,
    ranges: [CodeRange; MAX_RANGES],
    nranges: usize,
    peeked: [CodeRange; MAX_RANGES],
    npeeked: usize,
}

impl TranslateEnd {
    /// The code that was translated, in execution order. Pieces may overlap.
    pub fn ranges(&self) -> &[CodeRange] {
        &self.ranges[..self.nranges]
    }

    /// Code behind the block's exits that the translation depends on too. It is on the same page as
    /// the block's start.
    pub fn peeked(&self) -> &[CodeRange] {
        &self.peeked[..self.npeeked]
    }

    /// Adds the instruction at `linear`; false if there is no room for another piece.
    fn add(&mut self, linear: u64, len: u32) -> bool {
        if self.nranges > 0 {
            let last = &mut self.ranges[self.nranges - 1];
            if last.linear.wrapping_add(last.len.into()) == linear {
                last.len += len;
                return true;
            }
        }
        if self.nranges == MAX_RANGES {
            return false;
        }
        self.ranges[self.nranges] = CodeRange { linear, len };
        self.nranges += 1;
        true
    }
}

/// Most instructions in a block.
pub const MAX_INSNS: usize = 64;
/// IR values at which a block ends; the rest of [`tandem_jit::ir::MAX_VALS`] is for one instruction.
const VALS_FULL: u16 = 3000;
/// Exits at which a block ends: 256 can be told apart, and one instruction makes few.
const EXITS_FULL: usize = 200;
const PAGE: u64 = !0xfff;

/// Byte offset in `Env` of the processor field at `offset` in [`crate::x86::Cpu`].
const fn cpu_field(offset: usize) -> u32 {
    (std::mem::offset_of!(Env, cpu) + offset) as u32
}

/// The front end, with memory that is reused between blocks.
#[derive(Default)]
pub struct FrontEnd {
    source: Source,
    /// What exists on the processor; everything if nobody says.
    gate: Option<Gate>,
}

impl FrontEnd {
    /// A front end for a processor on which only what `gate` says exists.
    pub fn new(gate: Gate) -> FrontEnd {
        FrontEnd { gate: Some(gate), ..FrontEnd::default() }
    }

    /// Translates the code at `key` into `block`.
    ///
    /// # Errors
    /// The exception that fetching the first instruction raises; `block` then means nothing.
    pub fn translate(
        &mut self,
        fetch: &mut dyn CodeFetch,
        key: TbKey,
        limits: Limits,
        block: &mut Block,
    ) -> Result<TranslateEnd, Exception> {
        self.source.decode(fetch, key, limits)?;
        block.clear(key.rip, key.mode.mmu_idx());
        let mut t = Translator::new(block, key, dead::Peek::new(fetch, key), limits.count);
        let mut end = TranslateEnd::default();
        let insns = self.source.insns();
        let counted = limits.count.then(|| t.count_insns());
        for (i, insn) in insns.iter().enumerate() {
            let linear = key.linear(insn.ip());
            if !end.add(linear, insn.len() as u32) {
                break;
            }
            end.bytes += insn.len() as u32;
            end.insns += 1;
            let rest = &insns[i + 1..];
            // What is relied on is surely part of the block.
            let room = t.b.nvals < VALS_FULL - dead::ROOM && t.b.exits.len() < EXITS_FULL;
            t.start(insn, room && dead::flags_dead(insn, rest));
            t.check_code_limit(insn.len());
            let insn = match &self.gate {
                Some(gate) => gate.meaning(insn, t.code64()),
                None => Some(*insn),
            };
            match &insn {
                Some(insn) => {
                    let then = rest.first().map(|i| i.ip());
                    dispatch::translate(&mut t, insn, then);
                }
                None => t.ud(),
            }
            if rest.is_empty() && !t.ended() && source::makes_shadow(&insns[i]) {
                t.shadow_and_leave(insns[i].mnemonic() == iced_x86::Mnemonic::Sti);
            }
            if t.ended() || t.b.nvals >= VALS_FULL || t.b.exits.len() >= EXITS_FULL {
                break;
            }
        }
        t.finish();
        if let Some(at) = counted {
            t.set_count(at, end.insns);
        }
        (end.peeked, end.npeeked) = t.peek.ranges();
        Ok(end)
    }
}
