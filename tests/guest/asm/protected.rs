//! 32-bit protected mode without paging.

use crate::code::{Code, Result};
use crate::layout::*;
use crate::real::far_jump;
use iced_x86::code_asm::*;

const EFER: u32 = 0xc000_0080;
/// EFER.SCE and LME.
const EFER_SCE_LME: i32 = 0x101;
/// CR4.PAE, PGE, OSFXSR and OSXMMEXCPT.
const CR4: i32 = 0x6a0;
/// CR0.PG, WP, MP, PE (and not EM); ET stays.
const CR0: u32 = 0x8001_0003;

/// The stage, which ends in long mode.
pub fn assemble(data: &mut Data) -> Result<Vec<u8>> {
    let mut c = Code::new(32)?;
    c.a.mov(ax, u32::from(DATA_FLAT))?;
    for s in [ds, es, fs, gs, ss] {
        c.a.mov(s, ax)?;
    }
    c.a.mov(esp, STACK)?;
    c.begin(data, "protected mode")?;
    checks(&mut c)?;
    c.done(data)?;
    let a = &mut c.a;
    a.mov(eax, CR4)?;
    a.mov(cr4, eax)?;
    a.mov(eax, PML4)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, EFER_SCE_LME)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.and(eax, !0xc)?;
    a.or(eax, CR0)?;
    a.mov(cr0, eax)?;
    far_jump(a, CODE64, LONG)?;
    c.routines(data)?;
    c.a.assemble(PROTECTED.into())
}

fn checks(c: &mut Code) -> Result {
    // 1: PE is set.
    c.check(1)?;
    c.a.mov(eax, cr0)?;
    c.a.test(al, 1)?;
    c.a.jz(c.fail)?;
    // 2: a segment with a base.
    c.check(2)?;
    c.a.mov(ax, u32::from(DATA_BASED))?;
    c.a.mov(gs, ax)?;
    c.a.mov(dword_ptr(cell::SCRATCH - DATA).gs(), 0x00c0_ffee)?;
    c.a.cmp(dword_ptr(cell::SCRATCH), 0x00c0_ffee)?;
    c.a.jne(c.fail)?;
    // 3: a store through it with an index; the address wraps nowhere.
    c.check(3)?;
    c.a.mov(ebx, cell::SCRATCH - DATA)?;
    c.a.mov(ecx, 3)?;
    c.a.mov(byte_ptr(ebx + ecx * 4 + 1).gs(), 0x5a)?;
    c.a.cmp(byte_ptr(cell::SCRATCH + 13), 0x5a)?;
    c.a.jne(c.fail)?;
    // 4: shifts and rotates carry into each other.
    c.check(4)?;
    c.a.mov(eax, 0x8000_0001_u32)?;
    c.a.shl(eax, 1)?;
    c.a.rcl(eax, 1)?;
    c.a.cmp(eax, 5)?;
    c.a.jne(c.fail)?;
    // 5: a call through memory.
    c.check(5)?;
    let (mut function, mut over) = (c.a.create_label(), c.a.create_label());
    c.a.call(function)?;
    c.a.jmp(over)?;
    c.a.set_label(&mut function)?;
    c.a.pop(eax)?;
    c.a.mov(dword_ptr(cell::SCRATCH), eax)?;
    c.a.mov(ebx, esp)?;
    c.a.jmp(dword_ptr(cell::SCRATCH))?;
    c.a.set_label(&mut over)?;
    c.a.cmp(ebx, STACK)?;
    c.a.jne(c.fail)?;
    // 6: a loop of LOOP and ADC.
    c.check(6)?;
    let mut again = c.a.create_label();
    c.a.xor(eax, eax)?;
    c.a.mov(ecx, 100)?;
    c.a.set_label(&mut again)?;
    c.a.add(eax, ecx)?;
    c.a.adc(eax, 0)?;
    c.a.loop_(again)?;
    c.a.cmp(eax, 5050)?;
    c.a.jne(c.fail)
}
