//! Ring 3. It may touch its code page, its stack page and nothing else, so its check number lives in
//! EBX until the last system call hands it over.

use crate::code::Result;
use crate::layout::{USER, USER_CODE};
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

/// Ring 3's code.
pub struct User {
    pub bytes: Vec<u8>,
    /// Where it goes on after its general-protection fault.
    pub after_fault: u32,
}

/// System calls (see [`crate::traps::Traps::syscall`]).
const ANSWER: i32 = 1;
const FINISH: i32 = 2;

pub fn assemble() -> Result<User> {
    let mut a = CodeAssembler::new(64)?;
    let (mut finish, mut after_fault) = (a.create_label(), a.create_label());
    privilege(&mut a, finish)?;
    integer(&mut a, finish)?;
    vector(&mut a, finish)?;
    float(&mut a, finish)?;
    calls(&mut a, finish)?;
    wait_for_tick(&mut a)?;
    // 6: an instruction of ring 0 faults; the handler resumes after it.
    a.mov(ebx, 6)?;
    a.cli()?;
    a.jmp(finish)?;
    a.set_label(&mut after_fault)?;
    a.xor(ebx, ebx)?;
    a.set_label(&mut finish)?;
    a.mov(edi, ebx)?;
    a.mov(eax, FINISH)?;
    a.syscall()?;
    a.ud2()?;
    let result =
        a.assemble_options(USER.into(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let after_fault = result.label_ip(&after_fault)? as u32;
    Ok(User { bytes: result.inner.code_buffer, after_fault })
}

/// 1: it is ring 3, with the flags it was given.
fn privilege(a: &mut CodeAssembler, fail: CodeLabel) -> Result {
    a.mov(ebx, 1)?;
    a.mov(eax, cs)?;
    a.cmp(ax, u32::from(USER_CODE))?;
    a.jne(fail)?;
    a.pushfq()?;
    a.pop(rax)?;
    a.test(eax, 1 << 9)?;
    a.jz(fail)
}

/// 2: a million additions, and a checksum by rotation.
fn integer(a: &mut CodeAssembler, fail: CodeLabel) -> Result {
    a.mov(ebx, 2)?;
    let mut again = a.create_label();
    a.xor(eax, eax)?;
    a.mov(ecx, 1_000_000)?;
    a.set_label(&mut again)?;
    a.add(rax, rcx)?;
    a.dec(ecx)?;
    a.jnz(again)?;
    a.mov(rcx, 500_000_500_000_u64)?;
    a.cmp(rax, rcx)?;
    a.jne(fail)?;
    a.mov(r8, 0x0123_4567_89ab_cdef_u64)?;
    a.ror(r8, 20)?;
    a.imul_3(r9, r8, 3)?;
    a.mov(r10, 0xbcde_f012_3456_789a_u64.wrapping_mul(3))?;
    a.cmp(r9, r10)?;
    a.jne(fail)
}

/// 3: SSE2.
fn vector(a: &mut CodeAssembler, fail: CodeLabel) -> Result {
    a.mov(ebx, 3)?;
    a.mov(eax, 7)?;
    a.movd(xmm0, eax)?;
    a.pshufd(xmm0, xmm0, 0)?;
    a.movdqa(xmm1, xmm0)?;
    a.paddd(xmm1, xmm0)?;
    a.pmuludq(xmm1, xmm0)?;
    a.movq(rax, xmm1)?;
    a.cmp(rax, 98)?;
    a.jne(fail)?;
    a.sub(rsp, 32)?;
    a.movdqu(xmmword_ptr(rsp + 3), xmm0)?;
    a.mov(eax, dword_ptr(rsp + 15))?;
    a.add(rsp, 32)?;
    a.cmp(eax, 7)?;
    a.jne(fail)?;
    a.mov(eax, 3)?;
    a.cvtsi2sd(xmm2, eax)?;
    a.divsd(xmm2, xmm2)?;
    a.sqrtsd(xmm3, xmm2)?;
    a.cvttsd2si(eax, xmm3)?;
    a.cmp(eax, 1)?;
    a.jne(fail)
}

/// 4: x87.
fn float(a: &mut CodeAssembler, fail: CodeLabel) -> Result {
    a.mov(ebx, 4)?;
    a.fninit()?;
    a.push(21)?;
    a.fild(dword_ptr(rsp))?;
    a.fld1()?;
    a.fld1()?;
    a.faddp(st1, st0)?;
    a.fmulp(st1, st0)?;
    a.fistp(dword_ptr(rsp))?;
    a.pop(rax)?;
    a.cmp(eax, 42)?;
    a.jne(fail)
}

/// 5: a system call that returns.
fn calls(a: &mut CodeAssembler, fail: CodeLabel) -> Result {
    a.mov(ebx, 5)?;
    a.mov(r12, rsp)?;
    a.mov(eax, ANSWER)?;
    a.mov(edi, 41)?;
    a.syscall()?;
    a.cmp(rax, 42)?;
    a.jne(fail)?;
    a.cmp(rsp, r12)?;
    a.jne(fail)?;
    a.mov(eax, cs)?;
    a.cmp(ax, u32::from(USER_CODE))?;
    a.jne(fail)
}

/// Stays here for many periods of the timer that ring 0 has set; ring 0 looks afterwards whether it
/// came.
fn wait_for_tick(a: &mut CodeAssembler) -> Result {
    let mut again = a.create_label();
    a.rdtsc()?;
    a.mov(r8d, eax)?;
    a.mov(r9d, edx)?;
    a.shl(r9, 32)?;
    a.or(r8, r9)?;
    a.mov(r9d, crate::long::RING3_TICKS)?;
    a.add(r8, r9)?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.cmp(rax, r8)?;
    a.jb(again)
}
