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
mod memory;
mod mmx;
mod mov;
mod muldiv;
mod operand;
mod shift;
mod simd;
mod stack;
mod string;
mod system;
mod translator;
mod vector_form;
mod vector_mem;
mod x87;

pub use cc::CcOperands;
pub use memory::Place;
pub use operand::{Gpr, Offset, seg_num};
pub use translator::Translator;

use crate::x86::mode::Mode;
use crate::x86::{Env, exception::Exception};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic};
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
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_insns: MAX_INSNS as u32 }
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
}

impl TranslateEnd {
    /// The code that the translation depends on, in execution order. Pieces may overlap.
    pub fn ranges(&self) -> &[CodeRange] {
        &self.ranges[..self.nranges]
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
/// Most conditional branches that a block runs past.
const MAX_SIDE_EXITS: u32 = 4;
const PAGE: u64 = !0xfff;

/// Byte offset in `Env` of the processor field at `offset` in [`crate::x86::Cpu`].
const fn cpu_field(offset: usize) -> u32 {
    (std::mem::offset_of!(Env, cpu) + offset) as u32
}

/// Translates the code at `key` into `block`.
///
/// # Errors
/// The exception that fetching the first instruction raises; `block` then means nothing.
pub fn translate(
    fetch: &mut dyn CodeFetch,
    key: TbKey,
    limits: Limits,
    block: &mut Block,
) -> Result<TranslateEnd, Exception> {
    let mut source = Source::new(fetch, key, limits);
    source.decode()?;
    block.clear(key.rip, key.mode.mmu_idx());
    let mut t = Translator::new(block, key);
    let mut end = TranslateEnd::default();
    let insns = &source.insns[..source.count];
    for (i, insn) in insns.iter().enumerate() {
        let linear = key.linear(insn.ip());
        if !end.add(linear, insn.len() as u32) {
            break;
        }
        end.bytes += insn.len() as u32;
        end.insns += 1;
        let rest = &insns[i + 1..];
        t.start(insn, dead::flags_dead(insn, rest));
        dispatch::translate(&mut t, insn, !rest.is_empty());
        if rest.is_empty() && !t.ended() && makes_shadow(insn) {
            t.shadow_and_leave();
        }
        if t.ended() || t.b.nvals >= VALS_FULL {
            break;
        }
    }
    t.finish();
    Ok(end)
}

/// The decoded instructions of a block.
struct Source<'a> {
    fetch: &'a mut dyn CodeFetch,
    key: TbKey,
    max: usize,
    bits: u32,
    window: [u8; WINDOW],
    insns: [Instruction; MAX_INSNS],
    count: usize,
}

const WINDOW: usize = 256;

/// What follows an instruction in its block.
enum After {
    Next,
    Jump(u64),
    End,
}

impl<'a> Source<'a> {
    fn new(fetch: &'a mut dyn CodeFetch, key: TbKey, limits: Limits) -> Source<'a> {
        let single = Mode::TF | Mode::BREAKPOINTS | Mode::ONE_INSN;
        let max = if key.mode.intersects(single) { 1 } else { limits.max_insns.max(1) as usize };
        let bits = if key.mode.contains(Mode::CODE64) {
            64
        } else if key.mode.contains(Mode::CODE32) {
            32
        } else {
            16
        };
        Source {
            fetch,
            key,
            max: max.min(MAX_INSNS),
            bits,
            window: [0; WINDOW],
            insns: [Instruction::default(); MAX_INSNS],
            count: 0,
        }
    }

    /// Wraps an instruction pointer to the code size.
    fn wrap(&self, rip: u64) -> u64 {
        if self.bits == 64 { rip } else { rip & u32::MAX as u64 }
    }

    fn decode(&mut self) -> Result<(), Exception> {
        let first_page = self.key.linear(self.key.rip) & PAGE;
        let mut rip = self.key.rip;
        let mut branches = 0;
        let mut shadow = false;
        // One turn per window of bytes.
        'window: loop {
            let linear = self.key.linear(rip);
            let mut have = match self.fetch.fetch(linear, &mut self.window) {
                Ok(n) => n.min(WINDOW),
                Err(e) if self.count == 0 => return Err(e),
                Err(_) => return Ok(()),
            };
            let mut at = 0;
            loop {
                let crosses = self.decode_one(rip, at, &mut have)?;
                let Some(crosses) = crosses else { return Ok(()) };
                let insn = &self.insns[self.count];
                let len = insn.len();
                let after = self.after(insn, &mut branches, first_page);
                let was_shadow = std::mem::replace(&mut shadow, makes_shadow(insn));
                self.count += 1;
                // The instruction after STI and the like belongs into the same block.
                let room = if shadow && self.max > 1 { MAX_INSNS } else { self.max };
                if self.count >= room {
                    return Ok(());
                }
                if crosses || was_shadow {
                    return Ok(());
                }
                rip = match after {
                    After::End => return Ok(()),
                    After::Next => self.wrap(rip.wrapping_add(len as u64)),
                    After::Jump(target) => target,
                };
                let next = self.key.linear(rip);
                if next & PAGE != first_page {
                    return Ok(());
                }
                at += len;
                if matches!(after, After::Jump(_)) || at + 15 > have && have == WINDOW || at >= have
                {
                    continue 'window;
                }
            }
        }
    }

    /// Decodes the instruction at `window[at..have]`, reading on into the next page if it needs to.
    /// Tells whether it ran over the page, or `None` if its bytes cannot be had and it is not the
    /// first.
    fn decode_one(
        &mut self,
        rip: u64,
        at: usize,
        have: &mut usize,
    ) -> Result<Option<bool>, Exception> {
        let options = DecoderOptions::NONE;
        let out = &mut self.insns[self.count];
        let mut decoder = Decoder::with_ip(self.bits, &self.window[at..*have], rip, options);
        decoder.decode_out(out);
        if decoder.last_error() != DecoderError::NoMoreBytes {
            return Ok(Some(false));
        }
        // Only the page's end cuts an instruction short.
        let mut bytes = [0; 15];
        let low = *have - at;
        if low >= bytes.len() {
            return Ok(Some(false));
        }
        bytes[..low].copy_from_slice(&self.window[at..*have]);
        let linear = self.key.linear(rip.wrapping_add(low as u64));
        let high = match self.fetch.fetch(linear, &mut bytes[low..]) {
            Ok(n) => n.min(15 - low),
            Err(e) if self.count == 0 => return Err(e),
            Err(_) => return Ok(None),
        };
        Decoder::with_ip(self.bits, &bytes[..low + high], rip, options).decode_out(out);
        Ok(Some(true))
    }

    fn after(&self, insn: &Instruction, branches: &mut u32, first_page: u64) -> After {
        match insn.flow_control() {
            FlowControl::Next if !ends_block(insn) => After::Next,
            FlowControl::ConditionalBranch if *branches < MAX_SIDE_EXITS => {
                *branches += 1;
                After::Next
            }
            FlowControl::UnconditionalBranch if is_near_jump(insn.code()) => {
                let target = self.wrap(insn.near_branch_target());
                let seen = self.insns[..=self.count].iter().any(|i| i.ip() == target);
                if seen || self.key.linear(target) & PAGE != first_page {
                    After::End
                } else {
                    After::Jump(target)
                }
            }
            _ => After::End,
        }
    }
}

/// A direct jump whose target is not cut to 16 bits.
fn is_near_jump(code: Code) -> bool {
    matches!(code, Code::Jmp_rel8_32 | Code::Jmp_rel8_64 | Code::Jmp_rel32_32 | Code::Jmp_rel32_64)
}

/// Instructions after which interrupts are held back for one more (SDM vol. 3 §6.8.3).
fn makes_shadow(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Sti => true,
        Mnemonic::Mov | Mnemonic::Pop => insn.op0_register() == iced_x86::Register::SS,
        _ => false,
    }
}

/// Instructions after which the block ends because the mode may have changed or the processor
/// must be seen by the execution loop.
fn ends_block(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Lmsw | Clts
            | Wrmsr
            | Invlpg
            | Invpcid
            | Popf
            | Popfd
            | Popfq
            | Stac
            | Clac
            | Hlt
            | Mwait
            | Xsetbv
            | Wrpkru
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Lgdt
            | Lidt
            | Lldt
            | Ltr
            | Swapgs
            | Cli
    ) || insn.mnemonic() == Mov && writes_control(insn)
}

/// MOV to CR, DR or, outside 64-bit code, to a segment register.
fn writes_control(insn: &Instruction) -> bool {
    let r = insn.op0_register();
    r.is_cr() || r.is_dr()
}
