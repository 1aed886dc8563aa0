//! What processors do not agree about and programs could see, overwritten at once: the pointers to the
//! last x87 instruction in areas that FXSAVE, FNSAVE and FNSTENV write, and after FXRSTOR.

use super::generate::Builder;
use super::program::environment_words;
use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, Register};

/// Offsets and sizes of what FXSAVE stores of the host: AMD's processors store x87 pointers only with a
/// pending exception, and know MXCSR.MM.
const SAVE_AREA: [(u64, u8); 6] = [(6, 2), (8, 4), (12, 4), (16, 4), (20, 4), (28, 4)];

impl Builder<'_> {
    /// Hides after `insn`, the last one so far, what it has shown of its processor.
    pub fn hide_pointers(&mut self, insn: &Instruction) {
        match insn.mnemonic() {
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => self.overwrite(insn, &SAVE_AREA),
            Mnemonic::Fnsave | Mnemonic::Fnstenv => self.overwrite(insn, environment_words(insn)),
            Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => self.renew_pointers(),
            _ => {}
        }
    }

    /// Overwrites these offsets of the area that `save` has written.
    fn overwrite(&mut self, save: &Instruction, words: &[(u64, u8)]) {
        let mask = match save.memory_displ_size() {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let any = MemoryOperand::with_base(Register::RBX);
        for &(at, size) in words {
            self.hide_last();
            let code = if size == 2 { Code::Mov_rm16_imm16 } else { Code::Mov_rm32_imm32 };
            let mut mov = Instruction::with2(code, any, 0).unwrap_or_else(|e| panic!("{e}"));
            mov.set_memory_base(save.memory_base());
            mov.set_memory_index(save.memory_index());
            mov.set_memory_index_scale(save.memory_index_scale());
            mov.set_segment_prefix(save.segment_prefix());
            mov.set_memory_displ_size(save.memory_displ_size().max(2));
            mov.set_memory_displacement64(save.memory_displacement64().wrapping_add(at) & mask);
            self.push(mov);
        }
    }

    /// Sets the x87 pointers anew after FXRSTOR, which on AMD's hosts restores them only together with
    /// a pending exception.
    fn renew_pointers(&mut self) {
        self.hide_last();
        let m = match self.bits() {
            64 => MemoryOperand::with_base_displ(Register::RBX, 0x80),
            32 => MemoryOperand::with_base_displ(Register::EBX, 0x80),
            _ => MemoryOperand::with_displ(0x1080, 2),
        };
        self.add(Instruction::with1(Code::Ficom_m16int, m));
    }

    /// Says that the next instruction hides something of the last one.
    fn hide_last(&mut self) {
        if let Some(last) = self.items.last_mut() {
            last.hidden = true;
        }
    }
}
