//! Real mode, and the way into it from multiboot's protected mode.

use crate::code::{COM1, Code, Result};
use crate::layout::*;
use iced_x86::code_asm::*;
use iced_x86::{Code as Op, Instruction};

/// Offset of the multiboot header.
const HEADER: u32 = 0x10;

/// The first bytes: a jump to real mode's code over the multiboot header (Multiboot 0.6.96 §3.1).
pub fn first_bytes(entry_len: usize) -> Vec<u8> {
    assert!(MULTIBOOT_ENTRY as usize + entry_len <= REAL as usize);
    let mut v = vec![0xe9];
    v.extend_from_slice(&((REAL - START - 3) as u16).to_le_bytes());
    v.resize(HEADER as usize, 0x90);
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES: u32 = 1 << 16;
    let at = |a: u32| a - START + LOAD;
    for word in [
        MAGIC,
        ADDRESSES,
        0u32.wrapping_sub(MAGIC.wrapping_add(ADDRESSES)),
        at(START) + HEADER,
        at(START),
        at(END),
        0,
        at(MULTIBOOT_ENTRY),
    ] {
        v.extend_from_slice(&word.to_le_bytes());
    }
    v
}

/// `jmp selector:offset` in 16- or 32-bit code.
pub fn far_jump(a: &mut CodeAssembler, selector: u16, offset: u32) -> Result {
    let op = if a.bitness() == 16 { Op::Jmp_ptr1616 } else { Op::Jmp_ptr1632 };
    a.add_instruction(Instruction::with_far_branch(op, selector, offset)?)
}

/// 32-bit code at 1 MiB: copies the image to where it runs, and returns to real mode (SDM vol. 3
/// §9.9.2): 16-bit segments, PE off, far jump.
pub fn multiboot_entry(size: u32) -> Result<Vec<u8>> {
    let load = LOAD + (MULTIBOOT_ENTRY - START);
    let mut a = CodeAssembler::new(32)?;
    a.cli()?;
    a.cld()?;
    a.mov(esp, STACK)?;
    a.mov(esi, LOAD)?;
    a.mov(edi, START)?;
    a.mov(ecx, size / 4)?;
    a.rep().movsd()?;
    a.lgdt(dword_ptr(cell::GDTR))?;
    // The jump that follows runs in the copy: 16-bit code at the end of this routine.
    let mut probe = CodeAssembler::new(32)?;
    far_jump(&mut probe, CODE16, 0)?;
    let before = a.assemble(load.into())?.len() as u32;
    let jump = probe.assemble(0)?.len() as u32;
    far_jump(&mut a, CODE16, MULTIBOOT_ENTRY + before + jump)?;
    let mut code = a.assemble(load.into())?;
    let mut b = CodeAssembler::new(16)?;
    b.mov(ax, u32::from(DATA16))?;
    for s in [ds, es, fs, gs, ss] {
        b.mov(s, ax)?;
    }
    b.lidt(dword_ptr(cell::REAL_IDTR))?;
    b.mov(eax, cr0)?;
    b.and(al, 0xfe)?;
    b.mov(cr0, eax)?;
    far_jump(&mut b, 0, REAL)?;
    code.extend(b.assemble(u64::from(MULTIBOOT_ENTRY) + code.len() as u64)?);
    Ok(code)
}

/// The stage in real mode, which ends in protected mode.
pub fn assemble(data: &mut Data) -> Result<Vec<u8>> {
    let mut c = Code::new(16)?;
    set_up(&mut c)?;
    let hello = data.text("tandem test guest\r\n");
    c.say(hello)?;
    c.begin(data, "real mode")?;
    checks(&mut c)?;
    c.done(data)?;
    let a = &mut c.a;
    a.lgdt(dword_ptr(cell::GDTR))?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    far_jump(a, CODE32, PROTECTED)?;
    c.routines(data)?;
    c.a.assemble(REAL.into())
}

/// Segments, stack, COM1 at 115200 8N1 without interrupts, PICs masked.
fn set_up(c: &mut Code) -> Result {
    let a = &mut c.a;
    a.cli()?;
    a.cld()?;
    a.xor(eax, eax)?;
    for s in [ds, es, fs, gs, ss] {
        a.mov(s, ax)?;
    }
    a.mov(esp, REAL_STACK)?;
    for (offset, value) in [(1, 0), (3, 0x83), (0, 1), (1, 0), (3, 3), (2, 7), (4, 0xb)] {
        a.mov(dx, COM1 + offset)?;
        a.mov(al, value)?;
        a.out(dx, al)?;
    }
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)
}

fn checks(c: &mut Code) -> Result {
    // 1: it is real mode.
    c.check(1)?;
    c.a.mov(eax, cr0)?;
    c.a.test(al, 1)?;
    c.a.jnz(c.fail)?;
    // 2: flags of an addition that overflows.
    c.check(2)?;
    c.a.mov(ax, 0x7fff)?;
    c.a.add(ax, 1)?;
    c.a.jno(c.fail)?;
    c.a.jc(c.fail)?;
    c.a.jns(c.fail)?;
    // 3: multiplication and division with 32-bit operands.
    c.check(3)?;
    c.a.mov(eax, 123_456_789)?;
    c.a.mov(ecx, 1000)?;
    c.a.mul(ecx)?;
    c.a.mov(ecx, 999)?;
    c.a.div(ecx)?;
    c.a.cmp(eax, 123_580_369)?;
    c.a.jne(c.fail)?;
    c.a.cmp(edx, 369)?;
    c.a.jne(c.fail)?;
    // 4: a string moves and compares.
    c.check(4)?;
    c.a.mov(esi, START)?;
    c.a.mov(edi, cell::SCRATCH)?;
    c.a.mov(ecx, 16)?;
    c.a.rep().movsb()?;
    c.a.mov(esi, START)?;
    c.a.mov(edi, cell::SCRATCH)?;
    c.a.mov(ecx, 16)?;
    c.a.repe().cmpsb()?;
    c.a.jne(c.fail)?;
    // 5: segment × 16 + offset.
    c.check(5)?;
    c.a.mov(ax, DATA >> 4)?;
    c.a.mov(fs, ax)?;
    c.a.mov(dword_ptr(cell::SCRATCH - DATA).fs(), 0x1234_5678)?;
    c.a.cmp(dword_ptr(cell::SCRATCH), 0x1234_5678)?;
    c.a.jne(c.fail)?;
    // 6: IRET takes back IP, CS and FLAGS.
    c.check(6)?;
    let (mut handler, mut back) = (c.a.create_label(), c.a.create_label());
    c.a.stc()?;
    c.a.pushf()?;
    c.a.push(cs)?;
    c.a.call(handler)?;
    c.a.jnc(c.fail)?;
    c.a.jmp(back)?;
    c.a.set_label(&mut handler)?;
    c.a.clc()?;
    c.a.iret()?;
    c.a.set_label(&mut back)
}
