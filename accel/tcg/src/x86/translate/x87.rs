//! x87 instructions.

use super::Translator;
use iced_x86::Instruction;

/// Translates `insn` if it is an x87 instruction.
pub fn translate(_t: &mut Translator, _insn: &Instruction) -> bool {
    false
}
