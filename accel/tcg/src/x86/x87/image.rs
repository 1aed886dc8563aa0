//! x87 state on its way into the host's unit and back.
//!
//! While the guest masks all x87 exceptions, its x87 instructions run as they are: generated code
//! loads the host's unit from an image ([`crate::env::Core::x87_image`]) when a block needs it, and
//! stores it there on the way out. The processor's own fields are then stale; whoever looks at them
//! calls [`Env::x87_sync`] first. Of the control word they have the truth at any time.
//!
//! With an exception unmasked or pending ([`needs_care`]) the mode says so, and every x87 instruction
//! is a helper's job.

use super::{ES, EXCEPTIONS, empty_tags, physical, set_status, status};
use crate::x86::{Cpu, Env};

/// Place of the registers in the image.
const REGISTERS: usize = 28;

/// Whether x87 instructions must not run on the host's unit as they are.
pub fn needs_care(c: &Cpu) -> bool {
    c.fcw & EXCEPTIONS != EXCEPTIONS || c.fsw & ES != 0 || c.x87_care
}

impl Env {
    /// Makes the processor's x87 fields say what the image says, if that is newer.
    pub fn x87_sync(&mut self) {
        if self.core.x87_saved == 0 {
            return;
        }
        self.core.x87_saved = 0;
        let image = &self.core.x87_image.0;
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let c = &mut self.cpu;
        c.fcw = word(0);
        set_status(c, word(4));
        c.ftag_empty = empty_tags(word(8));
        for (i, st) in image[REGISTERS..].chunks_exact(10).enumerate() {
            let p = physical(c, i);
            c.fpr[p] = [0; 16];
            c.fpr[p][..10].copy_from_slice(st);
        }
    }

    /// Makes the image from the processor's fields.
    pub fn make_x87_image(&mut self) {
        let c = &self.cpu;
        let image = &mut self.core.x87_image.0;
        image[..REGISTERS].fill(0);
        image[0..2].copy_from_slice(&c.fcw.to_le_bytes());
        image[4..6].copy_from_slice(&status(c).to_le_bytes());
        // Of a full register FRSTOR looks at the content, not at the tag.
        let tags =
            (0..8).fold(0u16, |w, i| w | (u16::from(c.ftag_empty >> i & 1) * (3 << (2 * i))));
        image[8..10].copy_from_slice(&tags.to_le_bytes());
        for (i, st) in image[REGISTERS..].chunks_exact_mut(10).enumerate() {
            st.copy_from_slice(&c.fpr[physical(c, i)][..10]);
        }
    }

    /// Has the x87 instruction at RIP done by helpers: it is about to unmask exceptions.
    pub fn take_care_of_x87(&mut self) {
        self.x87_sync();
        self.cpu.x87_care = true;
        self.update_mode();
    }

    /// The control or status word may have changed in a way that concerns the mode.
    pub fn x87_changed(&mut self) {
        self.cpu.x87_care = false;
        self.update_mode();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing::Bench;
    use super::*;

    #[test]
    fn an_image_holds_the_whole_unit() {
        let mut b = Bench::new();
        let env = b.env();
        env.cpu.fcw = 0x27f;
        set_status(&mut env.cpu, 5 << 11 | 0x4121);
        env.cpu.ftag_empty = 0x5a;
        for i in 0..8u8 {
            env.cpu.fpr[usize::from(i)][..10].copy_from_slice(&[0x10 + i; 10]);
        }
        env.make_x87_image();
        let before = (env.cpu.fpr, env.cpu.fsw, env.cpu.ftop, env.cpu.ftag_empty);
        env.cpu.fpr = [[0; 16]; 8];
        (env.cpu.fsw, env.cpu.ftop, env.cpu.ftag_empty) = (0, 0, 0);
        env.core.x87_saved = 1;
        env.x87_sync();
        assert_eq!((env.cpu.fpr, env.cpu.fsw, env.cpu.ftop, env.cpu.ftag_empty), before);
        assert_eq!((env.cpu.fcw, env.core.x87_saved), (0x27f, 0));
    }

    #[test]
    fn unmasked_and_pending_exceptions_need_care() {
        let mut b = Bench::new();
        let c = &mut b.env().cpu;
        c.fcw = 0x37f;
        c.fsw = 0;
        assert!(!needs_care(c));
        c.fcw = 0x37b;
        assert!(needs_care(c));
    }
}
