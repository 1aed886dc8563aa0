//! Locked instructions: nothing of what any vCPU does is lost, wherever the operand lies.

use crate::machine::{Machine, SPACE, on_each, program};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, dword_ptr, eax, ebx, ecx, edx, qword_ptr, r8, r9, rax, rbx, rcx, rdx,
    xmmword_ptr,
};

const VCPUS: u32 = 4;

type Step = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// All vCPUs do `step` `n` times with R8 at `at`.
fn all_do(n: u64, at: u64, step: Step, check: impl Fn(&Machine)) {
    let programs: Vec<_> = (0..VCPUS.into())
        .map(|i| {
            program(i, VCPUS, |a| {
                a.mov(r8, at)?;
                a.mov(r9, n)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                step(a)?;
                a.dec(r9)?;
                a.jnz(again)
            })
        })
        .collect();
    on_each(&programs, |_| (), check);
}

/// `LOCK INC`, `LOCK XADD`, `LOCK ADD`, and a loop around `LOCK CMPXCHG`: four increments.
fn four_increments(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.lock().inc(dword_ptr(r8))?;
    a.mov(eax, 1)?;
    a.lock().xadd(dword_ptr(r8), eax)?;
    a.lock().add(dword_ptr(r8), 1)?;
    a.mov(eax, dword_ptr(r8))?;
    let mut retry = a.create_label();
    a.set_label(&mut retry)?;
    a.lea(ecx, eax + 1)?;
    a.lock().cmpxchg(dword_ptr(r8), ecx)?;
    a.jne(retry)
}

#[test]
fn increments_of_an_aligned_word() {
    let n = 20_000;
    let want = 4 * VCPUS * n as u32;
    all_do(n, SPACE, four_increments, |m| assert_eq!(m.u32(SPACE), want));
}

#[test]
fn increments_of_a_word_across_cache_lines() {
    let n = 5_000;
    let want = 4 * VCPUS * n as u32;
    all_do(n, SPACE + 62, four_increments, |m| assert_eq!(m.u32(SPACE + 62), want));
}

#[test]
fn increments_of_a_word_across_pages() {
    let (n, at) = (500, SPACE + 4094);
    let want = 4 * VCPUS * n as u32;
    all_do(n, at, four_increments, |m| assert_eq!(m.u32(at), want));
}

#[test]
fn bits_across_pages() {
    // Each vCPU sets and clears all bits in turn, and counts those that it has changed itself.
    let at = SPACE + 4092;
    let step: Step = |a| {
        for bit in [3, 20, 40, 63] {
            a.mov(ebx, bit)?;
            a.mov(qword_ptr(r8 + 0x2000), 0)?;
            a.lock().bts(qword_ptr(r8), rbx)?;
            a.setnc(iced_x86::code_asm::cl)?;
            a.movzx(ecx, iced_x86::code_asm::cl)?;
            a.lock().add(dword_ptr(r8 + 0x1000), ecx)?;
            a.lock().btr(qword_ptr(r8), rbx)?;
            a.setc(iced_x86::code_asm::cl)?;
            a.movzx(ecx, iced_x86::code_asm::cl)?;
            a.lock().sub(dword_ptr(r8 + 0x1000), ecx)?;
        }
        Ok(())
    };
    // Every change from 0 to 1 has one back.
    all_do(200, at, step, |m| assert_eq!((m.u64(at), m.u32(at + 0x1000)), (0, 0)));
}

#[test]
fn increments_on_a_page_with_code() {
    // The counter lies behind the program of vCPU 0, on its page.
    let at = 0x10_0f00;
    let n = 5_000;
    let want = 4 * VCPUS * n as u32;
    all_do(n, at, four_increments, |m| assert_eq!(m.u32(at), want));
}

#[test]
fn sixteen_bytes_at_once() {
    // The low half counts up, the high half down: no vCPU ever sees one without the other.
    let n = 5_000;
    let step: Step = |a| {
        a.mov(rax, qword_ptr(r8))?;
        a.mov(rdx, qword_ptr(r8 + 8))?;
        let mut retry = a.create_label();
        a.set_label(&mut retry)?;
        a.lea(rbx, rax + 1)?;
        a.lea(rcx, rdx - 1)?;
        a.lock().cmpxchg16b(xmmword_ptr(r8))?;
        a.jne(retry)
    };
    all_do(n, SPACE, step, |m| {
        let sum = u64::from(VCPUS) * n;
        assert_eq!((m.u64(SPACE), m.u64(SPACE + 8)), (sum, sum.wrapping_neg()));
    });
}

#[test]
fn eight_bytes_across_pages() {
    let (n, at) = (500, SPACE + 4093);
    let step: Step = |a| {
        a.mov(eax, dword_ptr(r8))?;
        a.mov(edx, dword_ptr(r8 + 4))?;
        let mut retry = a.create_label();
        a.set_label(&mut retry)?;
        a.lea(ebx, eax + 1)?;
        a.lea(ecx, edx - 1)?;
        a.lock().cmpxchg8b(qword_ptr(r8))?;
        a.jne(retry)
    };
    all_do(n, at, step, |m| {
        let sum = VCPUS * n as u32;
        assert_eq!((m.u32(at), m.u32(at + 4)), (sum, sum.wrapping_neg()));
    });
}
