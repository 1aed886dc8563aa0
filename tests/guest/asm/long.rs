//! Long mode, and the devices.

use crate::code::{COM1, Code, Result};
use crate::layout::*;
use crate::traps::{SERIAL, SPURIOUS, TIMER, Traps};
use crate::user::User;
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

/// Local APIC and its registers (SDM vol. 3 table 11-1).
const APIC: u32 = 0xfee0_0000;
const SVR: u32 = APIC + 0xf0;
const TPR: u32 = APIC + 0x80;
const LVT_TIMER: u32 = APIC + 0x320;
const LVT_LINT0: u32 = APIC + 0x350;
const INITIAL_COUNT: u32 = APIC + 0x380;
const CURRENT_COUNT: u32 = APIC + 0x390;
const DIVIDE: u32 = APIC + 0x3e0;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;

/// I/O APIC: index and data registers; redirection entry n is at index 10h + 2n.
const IOAPIC_INDEX: u32 = 0xfec0_0000;
const IOAPIC_DATA: u32 = 0xfec0_0010;
const SERIAL_PIN: u32 = 4;

/// pc-testdev's latch and RAM behind MMIO.
const LATCH: i32 = 0xe0;
const MMIO: u32 = 0xff00_0000;

/// Counts of a 1 GHz bus: a millisecond.
const TIMER_COUNT: u32 = 1_000_000;
/// How long to wait for something that should take a millisecond, in TSC ticks: some seconds, so
/// that a busy host does not fail it.
const PATIENCE: u64 = 1 << 34;
/// How long ring 3 stays in its loop, in TSC ticks: many timer periods.
pub const RING3_TICKS: u32 = 100_000_000;

const MSR_EFER: u32 = 0xc000_0080;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;

/// The code.
pub struct Long {
    pub bytes: Vec<u8>,
}

pub fn assemble(data: &mut Data, user: &User, traps: &Traps) -> Result<Long> {
    let mut c = Code::new(64)?;
    c.a.mov(eax, u32::from(DATA_FLAT))?;
    for s in [ds, es, fs, gs, ss] {
        c.a.mov(s, ax)?;
    }
    c.a.mov(esp, STACK)?;
    c.a.lidt(dword_ptr(cell::IDTR))?;
    c.a.mov(ax, u32::from(TASK))?;
    c.a.ltr(ax)?;
    c.begin(data, "long mode")?;
    mode(&mut c)?;
    exceptions(&mut c)?;
    c.done(data)?;
    c.begin(data, "port I/O")?;
    ports(&mut c)?;
    c.done(data)?;
    c.begin(data, "MMIO")?;
    mmio(&mut c)?;
    c.done(data)?;
    c.begin(data, "APIC timer")?;
    timer(&mut c)?;
    c.done(data)?;
    c.begin(data, "ring 3")?;
    ring3(&mut c, user, traps)?;
    c.done(data)?;
    note_incomplete_syscall(&mut c, data)?;
    c.begin(data, "serial interrupt")?;
    serial(&mut c)?;
    c.done(data)?;
    c.pass(data)?;
    c.routines(data)?;
    let result =
        c.a.assemble_options(LONG.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    Ok(Long { bytes: result.inner.code_buffer })
}

fn mode(c: &mut Code) -> Result {
    // 1: EFER.LMA.
    c.check(1)?;
    c.a.mov(ecx, MSR_EFER)?;
    c.a.rdmsr()?;
    c.a.test(eax, 1 << 10)?;
    c.a.jz(c.fail)?;
    // 2: CPUID says so too.
    c.check(2)?;
    c.a.mov(eax, 0x8000_0001_u32)?;
    c.a.cpuid()?;
    c.a.test(edx, 1 << 29)?;
    c.a.jz(c.fail)?;
    // 3: registers that only 64-bit code has, and a 64-bit product.
    c.check(3)?;
    c.a.mov(r8, 0xfedc_ba98_7654_3210_u64)?;
    c.a.mov(r15, r8)?;
    c.a.mov(rax, 0x1_0000_0001_u64)?;
    c.a.mul(r15)?;
    c.a.mov(rcx, 0x7654_3210_u64 + 0xfedc_ba98)?;
    c.a.shl(rcx, 32)?;
    c.a.mov(ebx, 0x7654_3210)?;
    c.a.or(rcx, rbx)?;
    c.a.cmp(rax, rcx)?;
    c.a.jne(c.fail)?;
    // 4: a 32-bit result clears the upper half.
    c.check(4)?;
    c.a.mov(r9, -1i64)?;
    c.a.mov(r9d, 5)?;
    c.a.cmp(r9, 5)?;
    c.a.jne(c.fail)?;
    // 5: the upper half shows the same memory.
    c.check(5)?;
    c.a.mov(rbx, ALIAS + u64::from(cell::SCRATCH))?;
    c.a.mov(qword_ptr(rbx), r15)?;
    c.a.cmp(qword_ptr(cell::SCRATCH), r15)?;
    c.a.jne(c.fail)?;
    // 6: relative to RIP.
    c.check(6)?;
    let mut here = c.a.create_label();
    c.a.lea(rax, qword_ptr(here))?;
    c.a.set_label(&mut here)?;
    c.a.cmp(eax, LONG)?;
    c.a.jb(c.fail)?;
    c.a.cmp(eax, TRAPS)?;
    c.a.ja(c.fail)
}

/// Provokes an exception by `code` and checks what the handler saw.
fn provoke(
    c: &mut Code,
    check: u32,
    vector: u32,
    error: u32,
    code: impl FnOnce(&mut CodeAssembler) -> Result,
) -> Result {
    c.check(check)?;
    let mut resume = c.a.create_label();
    c.a.lea(rax, qword_ptr(resume))?;
    c.a.mov(qword_ptr(cell::RESUME), rax)?;
    c.a.mov(dword_ptr(cell::EXPECTED + 4), 0)?;
    c.a.mov(dword_ptr(cell::EXPECTED), vector)?;
    code(&mut c.a)?;
    c.a.jmp(c.fail)?;
    c.a.set_label(&mut resume)?;
    c.a.cmp(qword_ptr(cell::SEEN_ERROR), error as i32)?;
    c.a.jne(c.fail)?;
    c.a.cmp(dword_ptr(cell::SEEN_CS), u32::from(CODE64))?;
    c.a.jne(c.fail)
}

fn exceptions(c: &mut Code) -> Result {
    // 7–11: page not present, page read-only, invalid opcode, divide error, non-canonical address.
    provoke(c, 7, 14, 0, |a| a.mov(eax, dword_ptr(NOT_PRESENT + 0x123)))?;
    c.a.mov(eax, NOT_PRESENT + 0x123)?;
    c.a.cmp(qword_ptr(cell::SEEN_CR2), rax)?;
    c.a.jne(c.fail)?;
    provoke(c, 8, 14, 3, |a| a.mov(byte_ptr(READ_ONLY), 1))?;
    provoke(c, 9, 6, 0, |a| a.ud2())?;
    provoke(c, 10, 0, 0, |a| {
        a.xor(edx, edx)?;
        a.xor(ecx, ecx)?;
        a.div(ecx)
    })?;
    provoke(c, 11, 13, 0, |a| {
        a.mov(rbx, 0x8000_0000_0000_u64)?;
        a.mov(al, byte_ptr(rbx))
    })
}

fn ports(c: &mut Code) -> Result {
    // 1–3: the latch in three widths.
    c.check(1)?;
    c.a.mov(eax, 0x1234_5678)?;
    c.a.out(LATCH, eax)?;
    c.a.xor(eax, eax)?;
    c.a.in_(eax, LATCH)?;
    c.a.cmp(eax, 0x1234_5678)?;
    c.a.jne(c.fail)?;
    c.check(2)?;
    c.a.mov(dx, LATCH + 1)?;
    c.a.mov(al, 0xa5)?;
    c.a.out(dx, al)?;
    c.a.in_(al, dx)?;
    c.a.cmp(al, 0xa5)?;
    c.a.jne(c.fail)?;
    c.check(3)?;
    c.a.mov(dx, LATCH)?;
    c.a.in_(ax, dx)?;
    c.a.cmp(ax, 0xa578)?;
    c.a.jne(c.fail)?;
    // 4: a string of bytes; the last stays.
    c.check(4)?;
    c.a.mov(esi, LONG)?;
    c.a.mov(ecx, 9)?;
    c.a.rep().outsb()?;
    c.a.mov(edi, cell::SCRATCH)?;
    c.a.mov(ecx, 4)?;
    c.a.rep().insb()?;
    c.a.mov(al, byte_ptr(LONG + 8))?;
    c.a.cmp(byte_ptr(cell::SCRATCH + 3), al)?;
    c.a.jne(c.fail)?;
    c.a.cmp(edi, cell::SCRATCH + 4)?;
    c.a.jne(c.fail)
}

fn mmio(c: &mut Code) -> Result {
    // 1: a quadword, read in pieces.
    c.check(1)?;
    c.a.mov(ebx, MMIO)?;
    c.a.mov(rax, 0x8877_6655_4433_2211_u64)?;
    c.a.mov(qword_ptr(rbx), rax)?;
    c.a.cmp(qword_ptr(rbx), rax)?;
    c.a.jne(c.fail)?;
    c.check(2)?;
    c.a.mov(eax, dword_ptr(rbx + 2))?;
    c.a.cmp(eax, 0x6655_4433)?;
    c.a.jne(c.fail)?;
    c.check(3)?;
    c.a.movzx(eax, word_ptr(rbx + 6))?;
    c.a.cmp(eax, 0x8877)?;
    c.a.jne(c.fail)?;
    c.check(4)?;
    c.a.movsx(eax, byte_ptr(rbx + 7))?;
    c.a.cmp(eax, 0xffff_ff88_u32)?;
    c.a.jne(c.fail)?;
    // 5: read, modify, write.
    c.check(5)?;
    c.a.mov(dword_ptr(rbx + 0x100), 40)?;
    c.a.add(dword_ptr(rbx + 0x100), 2)?;
    c.a.mov(eax, dword_ptr(rbx + 0x100))?;
    c.a.cmp(eax, 42)?;
    c.a.jne(c.fail)?;
    // 6: strings to and from.
    c.check(6)?;
    c.a.mov(esi, LONG)?;
    c.a.mov(edi, MMIO + 0x200)?;
    c.a.mov(ecx, 12)?;
    c.a.rep().movsb()?;
    c.a.mov(esi, MMIO + 0x200)?;
    c.a.mov(edi, cell::SCRATCH)?;
    c.a.mov(ecx, 3)?;
    c.a.rep().movsd()?;
    c.a.mov(rax, qword_ptr(LONG))?;
    c.a.cmp(qword_ptr(cell::SCRATCH), rax)?;
    c.a.jne(c.fail)?;
    c.a.mov(eax, dword_ptr(LONG + 8))?;
    c.a.cmp(dword_ptr(cell::SCRATCH + 8), eax)?;
    c.a.jne(c.fail)
}

/// Writes a register of memory-mapped hardware.
fn poke(a: &mut CodeAssembler, at: u32, value: u32) -> Result {
    a.mov(eax, at)?;
    a.mov(dword_ptr(rax), value)
}

/// Waits until the cell at `at` is at least `least`, or fails. Interrupts are on meanwhile.
fn wait_for(c: &mut Code, at: u32, least: i32) -> Result {
    let (mut again, mut there) = (c.a.create_label(), c.a.create_label());
    let a = &mut c.a;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.mov(r8, PATIENCE)?;
    a.add(r8, rax)?;
    a.sti()?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(qword_ptr(at), least)?;
    a.jae(there)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.cmp(rax, r8)?;
    a.jb(again)?;
    a.cli()?;
    a.jmp(c.fail)?;
    c.a.set_label(&mut there)?;
    c.a.cli()
}

fn timer(c: &mut Code) -> Result {
    c.check(1)?;
    poke(&mut c.a, SVR, 0x100 | u32::from(SPURIOUS))?;
    poke(&mut c.a, TPR, 0)?;
    poke(&mut c.a, LVT_LINT0, MASKED)?;
    // Divide by 1.
    poke(&mut c.a, DIVIDE, 0xb)?;
    poke(&mut c.a, LVT_TIMER, TIMER.into())?;
    poke(&mut c.a, INITIAL_COUNT, TIMER_COUNT)?;
    wait_for(c, cell::TICKS, 1)?;
    // 2: it came upon ring 0, and once only.
    c.check(2)?;
    c.a.cmp(dword_ptr(cell::TICK_CS), u32::from(CODE64))?;
    c.a.jne(c.fail)?;
    c.a.mov(eax, CURRENT_COUNT)?;
    c.a.cmp(dword_ptr(rax), 0)?;
    c.a.jne(c.fail)?;
    c.a.cmp(dword_ptr(cell::TICKS), 1)?;
    c.a.jne(c.fail)?;
    // 3: periodic, sleeping in HLT in between.
    c.check(3)?;
    poke(&mut c.a, LVT_TIMER, PERIODIC | u32::from(TIMER))?;
    poke(&mut c.a, INITIAL_COUNT, TIMER_COUNT)?;
    let mut again = c.a.create_label();
    c.a.set_label(&mut again)?;
    c.a.sti()?;
    c.a.hlt()?;
    c.a.cli()?;
    c.a.cmp(dword_ptr(cell::TICKS), 4)?;
    c.a.jb(again)?;
    poke(&mut c.a, INITIAL_COUNT, 0)
}

fn wrmsr(a: &mut CodeAssembler, msr: u32, value: u64) -> Result {
    a.mov(ecx, msr)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn ring3(c: &mut Code, user: &User, traps: &Traps) -> Result {
    let star = u64::from(SYSRET_BASE) << 48 | u64::from(CODE64) << 32;
    wrmsr(&mut c.a, MSR_STAR, star)?;
    wrmsr(&mut c.a, MSR_LSTAR, traps.syscall.into())?;
    wrmsr(&mut c.a, MSR_FMASK, 0x200)?;
    c.check(0x10)?;
    // A periodic timer that interrupts ring 3.
    c.a.mov(dword_ptr(cell::TICKS), 0)?;
    c.a.mov(dword_ptr(cell::TICK_CS), 0)?;
    poke(&mut c.a, INITIAL_COUNT, TIMER_COUNT)?;
    // Ring 3's general-protection fault is expected.
    c.a.mov(dword_ptr(cell::EXPECTED + 4), 0)?;
    c.a.mov(dword_ptr(cell::EXPECTED), 13)?;
    c.a.mov(qword_ptr(cell::RESUME), user.after_fault as i32)?;
    // Where the last system call returns to.
    let mut back = c.a.create_label();
    c.a.lea(rax, qword_ptr(back))?;
    c.a.mov(qword_ptr(cell::BACK), rax)?;
    c.a.push(i32::from(USER_DATA))?;
    c.a.push(USER_STACK as i32)?;
    c.a.push(0x202)?;
    c.a.push(i32::from(USER_CODE))?;
    c.a.push(USER as i32)?;
    // Ring 3 inherits nothing.
    c.a.mov(eax, u32::from(USER_DATA))?;
    for s in [ds, es, fs, gs] {
        c.a.mov(s, ax)?;
    }
    c.a.iretq()?;
    c.a.set_label(&mut back)?;
    c.a.mov(eax, u32::from(DATA_FLAT))?;
    for s in [ds, es, fs, gs] {
        c.a.mov(s, ax)?;
    }
    poke(&mut c.a, INITIAL_COUNT, 0)?;
    // Ring 3's own verdict: the number of its failed check.
    c.a.mov(dword_ptr(cell::CHECK), edi)?;
    c.a.test(edi, edi)?;
    c.a.jnz(c.fail)?;
    c.check(0x11)?;
    c.a.cmp(dword_ptr(cell::SEEN_CS), u32::from(USER_CODE))?;
    c.a.jne(c.fail)?;
    c.a.cmp(dword_ptr(cell::SEEN_ERROR), 0)?;
    c.a.jne(c.fail)?;
    c.check(0x12)?;
    c.a.cmp(dword_ptr(cell::TICKS), 0)?;
    c.a.je(c.fail)?;
    c.a.cmp(dword_ptr(cell::TICK_CS), u32::from(USER_CODE))?;
    c.a.jne(c.fail)
}

fn note_incomplete_syscall(c: &mut Code, data: &mut Data) -> Result {
    let text =
        data.text("note: SYSCALL stays in ring 3 here; its page fault was taken instead\r\n");
    let mut whole = c.a.create_label();
    c.a.cmp(dword_ptr(cell::SYSCALL_FAULTS), 0)?;
    c.a.je(whole)?;
    c.say(text)?;
    c.a.set_label(&mut whole)
}

fn ioapic(a: &mut CodeAssembler, index: u32, value: u32) -> Result {
    poke(a, IOAPIC_INDEX, index)?;
    poke(a, IOAPIC_DATA, value)
}

fn serial(c: &mut Code) -> Result {
    c.check(1)?;
    // Edge-triggered, active high, physical destination: APIC ID 0.
    ioapic(&mut c.a, 0x11 + 2 * SERIAL_PIN, 0)?;
    ioapic(&mut c.a, 0x10 + 2 * SERIAL_PIN, SERIAL.into())?;
    // "Transmitter empty" interrupts; a blank makes it busy and empty again.
    c.a.mov(dx, COM1 + 1)?;
    c.a.mov(al, 2)?;
    c.a.out(dx, al)?;
    c.a.mov(dx, COM1)?;
    c.a.mov(al, i32::from(b' '))?;
    c.a.out(dx, al)?;
    wait_for(c, cell::SERIALS, 1)?;
    c.a.mov(dx, COM1 + 1)?;
    c.a.mov(al, 0)?;
    c.a.out(dx, al)?;
    // 2: it was the transmitter.
    c.check(2)?;
    c.a.mov(al, byte_ptr(cell::SERIAL_ID))?;
    c.a.and(al, 0xf)?;
    c.a.cmp(al, 2)?;
    c.a.jne(c.fail)?;
    ioapic(&mut c.a, 0x10 + 2 * SERIAL_PIN, MASKED)
}
