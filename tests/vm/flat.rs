//! Real-mode guests of a few instructions, for `--kernel-format flat`.

/// Pieces of machine code.
#[derive(Default)]
pub struct Flat(pub Vec<u8>);

impl Flat {
    /// Writes `text` to COM1: `mov dx, 3f8h`, then `mov al, c; out dx, al` for each character.
    pub fn print(mut self, text: &str) -> Flat {
        self.0.extend([0xba, 0xf8, 0x03]);
        for c in text.bytes() {
            self.0.extend([0xb0, c, 0xee]);
        }
        self
    }

    /// Writes `value` to a port: `mov dx, port; mov al, value; out dx, al`.
    pub fn out(mut self, port: u16, value: u8) -> Flat {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0xba, low, high, 0xb0, value, 0xee]);
        self
    }

    /// Echoes COM1's input for ever:
    /// `again: mov dx, 3fdh; wait: in al, dx; test al, 1; jz wait; mov dx, 3f8h; in al, dx;
    /// out dx, al; jmp again`.
    pub fn echo(mut self) -> Flat {
        self.0.extend([0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
        self.0.extend([0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xf1]);
        self
    }

    /// Does nothing for ever: `jmp $`.
    pub fn spin(mut self) -> Flat {
        self.0.extend([0xeb, 0xfe]);
        self
    }

    /// Sleeps for ever: `cli; hlt; jmp $-1`.
    pub fn halt(mut self) -> Flat {
        self.0.extend([0xfa, 0xf4, 0xeb, 0xfd]);
        self
    }

    /// Faults in protected mode without a handler table: `lidt [cs:zero]` with limit 0, then
    /// `mov eax, cr0; or al, 1; mov cr0, eax; ud2`.
    pub fn triple_fault(mut self) -> Flat {
        // The operand lies right behind the instructions: six zero bytes.
        let at = 0x7c00 + self.0.len() as u16 + 16;
        let [low, high] = at.to_le_bytes();
        self.0.extend([0x2e, 0x0f, 0x01, 0x1e, low, high]);
        self.0.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x0f, 0x0b]);
        self.0.extend([0; 6]);
        self
    }
}
