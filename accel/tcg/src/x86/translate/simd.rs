//! Vector instructions.

use super::Translator;
use iced_x86::Instruction;

/// Translates `insn` if it is a vector instruction.
pub fn translate(_t: &mut Translator, _insn: &Instruction) -> bool {
    false
}
