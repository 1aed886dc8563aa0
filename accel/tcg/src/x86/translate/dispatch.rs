//! Which translate function is an instruction's.

use super::{Translator, simd, x87};
use iced_x86::{Instruction, Mnemonic};

/// Translates one instruction.
pub(super) fn translate(t: &mut Translator, insn: &Instruction) {
    use Mnemonic::*;
    match insn.mnemonic() {
        Nop | Pause => {}
        _ => {
            if !simd::translate(t, insn) && !x87::translate(t, insn) {
                t.ud();
            }
        }
    }
}
