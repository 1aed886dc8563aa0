//! Looking ahead: flags that are overwritten before anything can see them need no description.

use iced_x86::{Instruction, Mnemonic, OpKind};

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

/// Most instructions to look ahead.
const HORIZON: usize = 6;

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
