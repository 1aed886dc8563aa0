//! Interrupt and exception handlers, and the system call.

use crate::code::{COM1, Code, Result};
use crate::layout::*;
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

/// Vector of the local APIC's timer.
pub const TIMER: u8 = 0x40;
/// Vector of the serial interrupt.
pub const SERIAL: u8 = 0x34;
/// Spurious vector of the local APIC.
pub const SPURIOUS: u8 = 0xff;
/// EOI register of the local APIC.
const EOI: u32 = 0xfee0_00b0;

/// The handlers' code and where each begins.
pub struct Traps {
    pub bytes: Vec<u8>,
    /// Entry points of exceptions 0–31, then of the rest.
    exceptions: Vec<u32>,
    timer: u32,
    serial: u32,
    spurious: u32,
    other: u32,
    /// Where SYSCALL goes: RAX = 1 answers RDI + 1; any other ends ring 3 with RDI as verdict.
    pub syscall: u32,
}

impl Traps {
    pub fn handler(&self, vector: u8) -> u32 {
        match vector {
            0..32 => self.exceptions[usize::from(vector)],
            TIMER => self.timer,
            SERIAL => self.serial,
            SPURIOUS => self.spurious,
            _ => self.other,
        }
    }
}

/// Exceptions that push an error code (SDM vol. 3 table 6-1).
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

pub fn assemble(data: &mut Data) -> Result<Traps> {
    let mut c = Code::new(64)?;
    let mut common = c.a.create_label();
    let mut entries = Vec::new();
    // SYSCALL's target is named by the exception handler.
    let mut syscall = c.a.create_label();
    let entry = |c: &mut Code| -> Result<CodeLabel> {
        let mut l = c.a.create_label();
        c.a.set_label(&mut l)?;
        Ok(l)
    };
    for vector in 0..32u8 {
        entries.push(entry(&mut c)?);
        if !has_error_code(vector) {
            c.a.push(0)?;
        }
        c.a.push(i32::from(vector))?;
        c.a.jmp(common)?;
    }
    let other = entry(&mut c)?;
    c.a.push(0)?;
    c.a.push(0x7f)?;
    c.a.set_label(&mut common)?;
    exception(&mut c, data, syscall)?;
    let timer = entry(&mut c)?;
    timer_interrupt(&mut c)?;
    let serial = entry(&mut c)?;
    serial_interrupt(&mut c)?;
    let spurious = entry(&mut c)?;
    c.a.iretq()?;
    c.a.set_label(&mut syscall)?;
    system_call(&mut c)?;
    c.routines(data)?;
    let result =
        c.a.assemble_options(TRAPS.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = |l: &CodeLabel| Ok::<u32, iced_x86::IcedError>(result.label_ip(l)? as u32);
    let exceptions = entries.iter().map(at).collect::<Result<_>>()?;
    Ok(Traps {
        exceptions,
        timer: at(&timer)?,
        serial: at(&serial)?,
        spurious: at(&spurious)?,
        other: at(&other)?,
        syscall: at(&syscall)?,
        bytes: result.inner.code_buffer,
    })
}

/// An exception: on the stack are vector, error code, RIP, CS, RFLAGS, RSP, SS. An expected one is
/// noted and its code resumed elsewhere; any other ends the guest.
fn exception(c: &mut Code, data: &mut Data, syscall: CodeLabel) -> Result {
    let (mut unexpected, mut expected) = (c.a.create_label(), c.a.create_label());
    let a = &mut c.a;
    a.push(rax)?;
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.cmp(rax, qword_ptr(cell::EXPECTED))?;
    a.je(expected)?;
    incomplete_syscall(a, syscall, unexpected)?;
    a.set_label(&mut expected)?;
    a.mov(qword_ptr(cell::EXPECTED), -1)?;
    a.mov(rax, qword_ptr(rsp + 16))?;
    a.mov(qword_ptr(cell::SEEN_ERROR), rax)?;
    a.mov(rax, qword_ptr(rsp + 32))?;
    a.mov(qword_ptr(cell::SEEN_CS), rax)?;
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(cell::SEEN_CR2), rax)?;
    a.mov(rax, qword_ptr(cell::RESUME))?;
    a.mov(qword_ptr(rsp + 24), rax)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut unexpected)?;
    // Vector, error code (low byte) and the last three bytes of RIP, then the stage's check.
    for (text, offset, len) in [("exception ", 8, 1), (" error ", 16, 1), (" at ", 24, 3)] {
        let text = data.text(text);
        c.say(text)?;
        for byte in (0..len).rev() {
            c.a.mov(al, byte_ptr(rsp + offset + byte))?;
            c.a.mov(byte_ptr(cell::SCRATCH + 8), al)?;
            c.hex_byte(cell::SCRATCH + 8)?;
        }
    }
    let comma = data.text(", ");
    c.say(comma)?;
    c.a.jmp(c.fail)
}

/// A KVM without hardware does all of SYSCALL but the change of rings: it goes to LSTAR in ring 3,
/// where fetching faults. No processor does; so such a fault is taken for the call that it was, and
/// counted.
fn incomplete_syscall(a: &mut CodeAssembler, syscall: CodeLabel, unexpected: CodeLabel) -> Result {
    a.cmp(eax, 14)?;
    a.jne(unexpected)?;
    a.lea(rax, qword_ptr(syscall))?;
    a.cmp(qword_ptr(rsp + 24), rax)?;
    a.jne(unexpected)?;
    a.cmp(dword_ptr(rsp + 32), u32::from(USER_CODE))?;
    a.jne(unexpected)?;
    a.inc(qword_ptr(cell::SYSCALL_FAULTS))?;
    a.mov(qword_ptr(rsp + 32), i32::from(CODE64))?;
    a.mov(qword_ptr(rsp + 56), i32::from(DATA_FLAT))?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()
}

fn end_of_interrupt(c: &mut Code) -> Result {
    c.a.mov(eax, EOI)?;
    c.a.mov(dword_ptr(rax), 0)
}

fn timer_interrupt(c: &mut Code) -> Result {
    c.a.push(rax)?;
    c.a.inc(qword_ptr(cell::TICKS))?;
    c.a.mov(rax, qword_ptr(rsp + 16))?;
    c.a.mov(qword_ptr(cell::TICK_CS), rax)?;
    end_of_interrupt(c)?;
    c.a.pop(rax)?;
    c.a.iretq()
}

/// Reading the identification acknowledges "transmitter empty".
fn serial_interrupt(c: &mut Code) -> Result {
    c.a.push(rax)?;
    c.a.push(rdx)?;
    c.a.mov(dx, COM1 + 2)?;
    c.a.in_(al, dx)?;
    c.a.mov(byte_ptr(cell::SERIAL_ID), al)?;
    c.a.inc(qword_ptr(cell::SERIALS))?;
    end_of_interrupt(c)?;
    c.a.pop(rdx)?;
    c.a.pop(rax)?;
    c.a.iretq()
}

fn system_call(c: &mut Code) -> Result {
    let mut finish = c.a.create_label();
    let a = &mut c.a;
    a.mov(qword_ptr(cell::USER_RSP), rsp)?;
    a.mov(esp, TRAP_STACK)?;
    a.cmp(rax, 1)?;
    a.jne(finish)?;
    a.lea(rax, qword_ptr(rdi + 1))?;
    // By IRET: KVM's emulator has no SYSRET.
    a.push(i32::from(USER_DATA))?;
    a.push(qword_ptr(cell::USER_RSP))?;
    a.push(r11)?;
    a.push(i32::from(USER_CODE))?;
    a.push(rcx)?;
    a.iretq()?;
    // Ring 3 has ended: back to the stage that entered it, which left its address.
    a.set_label(&mut finish)?;
    a.mov(esp, STACK)?;
    a.jmp(qword_ptr(cell::BACK))
}
