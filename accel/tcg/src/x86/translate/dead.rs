//! Looking ahead: flags that are overwritten before anything can see them need no description.
//!
//! Two looks: within the block, from each instruction; and behind its direct exits, where the
//! description would have to be stored. The bytes looked at there are part of what the block
//! depends on.

use super::{CodeFetch, CodeRange, MAX_RANGES, TbKey};
use crate::x86::cpu::global;
use crate::x86::mode::Mode;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

/// What an instruction does to flags set before it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Sets all six without reading any, and cannot fault.
    Kills,
    /// Neither touches flags nor faults.
    Passes,
    /// May look at them, fault or leave.
    Sees,
}

/// Most instructions to look ahead in the block.
const HORIZON: usize = 6;
/// IR values that the instructions looked at ahead can need together; they make no exits. A block with
/// less room may end before them.
pub(super) const ROOM: u16 = 100 * HORIZON as u16;
/// Most bytes to look at behind an exit.
const BEHIND: usize = 32;
const PAGE: u64 = !0xfff;

/// The globals that describe the flags.
pub(super) const DESCRIPTION: u64 = 1 << global::CC_OP.0
    | 1 << global::CC_DST.0
    | 1 << global::CC_SRC.0
    | 1 << global::CC_SRC2.0
    | 1 << global::CC_INC.0
    | 1 << global::CC_OVER.0
    | 1 << global::CC_OVER_OF.0;

/// Whether all six flags that `insn` may set are overwritten by the instructions that follow it in
/// the block, with nothing in between that could see them.
pub(super) fn flags_dead(insn: &Instruction, rest: &[Instruction]) -> bool {
    // Most instructions set none: MOV alone is a third of all code.
    if insn.mnemonic() == Mnemonic::Mov {
        return false;
    }
    for next in rest.iter().take(HORIZON) {
        match effect(next) {
            Effect::Kills => return true,
            Effect::Passes => {}
            Effect::Sees => return false,
        }
    }
    false
}

/// Looks at the code behind exits.
pub(super) struct Peek<'a> {
    fetch: &'a mut dyn CodeFetch,
    key: TbKey,
    ranges: [CodeRange; MAX_RANGES],
    count: usize,
}

impl<'a> Peek<'a> {
    /// For a block at `key`.
    pub(super) fn new(fetch: &'a mut dyn CodeFetch, key: TbKey) -> Peek<'a> {
        Peek { fetch, key, ranges: Default::default(), count: 0 }
    }

    /// What has been relied on.
    pub(super) fn ranges(&self) -> ([CodeRange; MAX_RANGES], usize) {
        (self.ranges, self.count)
    }

    /// What the x87 unit remembers of the instruction at `rip`, of `len` bytes: the low bits of its
    /// first opcode byte, and the second.
    pub(super) fn x87_opcode(&mut self, rip: u64, len: usize) -> u16 {
        let mut bytes = [0; 15];
        let len = len.min(bytes.len());
        let mut have = 0;
        while have < len {
            let linear = self.key.linear(rip.wrapping_add(have as u64));
            match self.fetch.fetch(linear, &mut bytes[have..len]) {
                Ok(n) if n > 0 => have += n,
                _ => return 0,
            }
        }
        // Behind the prefixes. No prefix is an x87 opcode.
        let opcode = bytes.iter().position(|b| b & 0xf8 == 0xd8);
        opcode.map_or(0, |i| {
            let second = bytes.get(i + 1).copied().unwrap_or(0);
            u16::from(bytes[i] & 7) << 8 | u16::from(second)
        })
    }

    /// The globals whose content does not matter at `rip`: those that describe the flags, if the
    /// code there overwrites all flags first thing. Only the block's own page is looked at.
    pub(super) fn dead_at(&mut self, rip: u64) -> u64 {
        let linear = self.key.linear(rip);
        let page = self.key.linear(self.key.rip) & PAGE;
        // Someone who steps through the code looks at the flags.
        let watched = Mode::TF | Mode::BREAKPOINTS | Mode::WATCH | Mode::ONE_INSN;
        if linear & PAGE != page || self.key.mode.intersects(watched) || self.count == MAX_RANGES {
            return 0;
        }
        let mut bytes = [0; BEHIND];
        let Ok(n) = self.fetch.fetch(linear, &mut bytes) else { return 0 };
        let bytes = &bytes[..n.min(BEHIND)];
        let mut decoder = Decoder::with_ip(self.key.code_bits(), bytes, rip, DecoderOptions::NONE);
        let mut insn = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut insn);
            match effect(&insn) {
                Effect::Kills => {
                    let len = decoder.position() as u32;
                    self.ranges[self.count] = CodeRange { linear, len };
                    self.count += 1;
                    return DESCRIPTION;
                }
                Effect::Passes => {}
                Effect::Sees => return 0,
            }
        }
        0
    }
}

fn effect(insn: &Instruction) -> Effect {
    use Mnemonic::*;
    let effect = match insn.mnemonic() {
        Add | Sub | And | Or | Xor | Cmp | Test | Neg | Imul => Effect::Kills,
        Shl | Shr | Sar if insn.op1_kind() != OpKind::Register && insn.immediate8() & 31 != 0 => {
            Effect::Kills
        }
        Lea | Nop | Movzx | Movsx | Movsxd | Bswap | Cdqe | Cwde | Cbw | Cdq | Cqo | Cwd => {
            Effect::Passes
        }
        Mov if insn.op0_kind() == OpKind::Register && is_general(insn) => Effect::Passes,
        _ => return Effect::Sees,
    };
    // LEA's memory operand is not accessed.
    let memory = insn.op0_kind() == OpKind::Memory || insn.op1_kind() == OpKind::Memory;
    if memory && insn.mnemonic() != Lea && insn.mnemonic() != Nop {
        return Effect::Sees;
    }
    effect
}

/// MOV between general registers, or from an immediate.
fn is_general(insn: &Instruction) -> bool {
    insn.op0_register().is_gpr()
        && (insn.op1_kind() != OpKind::Register || insn.op1_register().is_gpr())
}
