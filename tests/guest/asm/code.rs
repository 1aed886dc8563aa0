//! What the code of all modes shares: saying something, failing, waiting.
//!
//! All of it is written so that it assembles alike in 16-, 32- and 64-bit code, with data below
//! 64 KiB and DS based at 0.

use crate::layout::{Data, cell};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub type Result<T = (), E = IcedError> = std::result::Result<T, E>;

/// COM1.
pub const COM1: i32 = 0x3f8;
/// isa-debug-exit.
const EXIT: i32 = 0xf4;
const PASS: i32 = 0x10;
const FAIL: i32 = 0x11;

/// An assembler for one mode, with the routines that it carries along.
pub struct Code {
    pub a: CodeAssembler,
    /// Writes the string at ESI to COM1; clobbers EAX, EDX, ESI.
    puts: CodeLabel,
    /// Says where the running stage failed, and exits.
    pub fail: CodeLabel,
}

/// The strings that every mode uses.
struct Words {
    ok: u32,
    failed: u32,
    verdict: u32,
}

impl Code {
    pub fn new(bits: u32) -> Result<Code> {
        let mut a = CodeAssembler::new(bits)?;
        let (puts, fail) = (a.create_label(), a.create_label());
        Ok(Code { a, puts, fail })
    }

    /// Says the string at this address.
    pub fn say(&mut self, text: u32) -> Result {
        self.a.mov(esi, text)?;
        self.a.call(self.puts)
    }

    /// Begins a stage.
    pub fn begin(&mut self, data: &mut Data, name: &str) -> Result {
        let text = data.text(&format!("{name}: "));
        self.a.mov(dword_ptr(cell::STAGE), text)?;
        self.a.mov(dword_ptr(cell::CHECK), 0)?;
        self.say(text)
    }

    /// Ends a stage well.
    pub fn done(&mut self, data: &mut Data) -> Result {
        let ok = words(data).ok;
        self.say(ok)
    }

    /// Begins a check of the running stage; a later jump to `fail` names it.
    pub fn check(&mut self, number: u32) -> Result {
        self.a.mov(dword_ptr(cell::CHECK), number)
    }

    /// Says that all went well, and exits.
    pub fn pass(&mut self, data: &mut Data) -> Result {
        let text = data.text("verdict: ok\r\n");
        self.say(text)?;
        self.exit(PASS)
    }

    fn exit(&mut self, status: i32) -> Result {
        let a = &mut self.a;
        let mut forever = a.create_label();
        a.mov(al, status)?;
        a.out(EXIT, al)?;
        a.cli()?;
        a.set_label(&mut forever)?;
        a.hlt()?;
        a.jmp(forever)
    }

    /// Appends the routines. Call once, at the end.
    pub fn routines(&mut self, data: &mut Data) -> Result {
        let w = words(data);
        self.put_string()?;
        let mut fail = self.fail;
        self.a.set_label(&mut fail)?;
        self.fail = fail;
        self.say(w.failed)?;
        self.hex_byte(cell::CHECK)?;
        self.say(w.verdict)?;
        self.exit(FAIL)
    }

    fn put_string(&mut self) -> Result {
        let mut puts = self.puts;
        let a = &mut self.a;
        let (mut next, mut wait, mut end) = (puts, a.create_label(), a.create_label());
        a.set_label(&mut next)?;
        puts = next;
        a.lodsb()?;
        a.test(al, al)?;
        a.jz(end)?;
        a.mov(ah, al)?;
        a.mov(dx, COM1 + 5)?;
        a.set_label(&mut wait)?;
        a.in_(al, dx)?;
        a.test(al, 0x20)?;
        a.jz(wait)?;
        a.mov(al, ah)?;
        a.mov(dx, COM1)?;
        a.out(dx, al)?;
        a.jmp(puts)?;
        a.set_label(&mut end)?;
        a.ret()?;
        self.puts = puts;
        Ok(())
    }

    /// Writes the byte at `at` as two hexadecimal digits.
    pub fn hex_byte(&mut self, at: u32) -> Result {
        for shift in [4, 0] {
            let a = &mut self.a;
            let mut digit = a.create_label();
            a.mov(al, byte_ptr(at))?;
            if shift != 0 {
                a.shr(al, shift)?;
            }
            a.and(al, 0xf)?;
            a.add(al, i32::from(b'0'))?;
            a.cmp(al, i32::from(b'9'))?;
            a.jbe(digit)?;
            a.add(al, i32::from(b'a' - b'9') - 1)?;
            a.set_label(&mut digit)?;
            a.mov(byte_ptr(cell::SCRATCH), al)?;
            a.mov(byte_ptr(cell::SCRATCH + 1), 0)?;
            self.say(cell::SCRATCH)?;
        }
        Ok(())
    }
}

fn words(data: &mut Data) -> Words {
    Words {
        ok: data.shared("ok\r\n"),
        failed: data.shared("failed at check "),
        verdict: data.shared("\r\nverdict: failed\r\n"),
    }
}
