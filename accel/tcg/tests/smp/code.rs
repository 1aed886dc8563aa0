//! One vCPU changes code that another executes (SDM vol. 3 §9.1.3): after the writer has said so and
//! the reader has executed a serialising instruction, the reader runs what was written.

use crate::machine::{Machine, SPACE, done, on_each, program};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, cl, dword_ptr, eax, ebx, ecx, r8, r9, r10, r10d, r11, r11d, rax, rdx, word_ptr,
};

/// Words that the vCPUs tell each other by.
const WRITTEN: u64 = SPACE - 0x1000;
const SEEN: u64 = SPACE - 0x0800;

/// `mov eax, imm32; ret`, one after the other.
const MOV_EAX: u32 = 0xb8;
const RET: u32 = 0xc3;

/// Waits until the word at `at` is at least `n`.
fn wait_for(
    a: &mut CodeAssembler,
    at: u64,
    n: iced_x86::code_asm::AsmRegister32,
) -> Result<(), IcedError> {
    a.mov(rdx, at)?;
    let mut again = a.create_label();
    let mut on = a.create_label();
    a.set_label(&mut again)?;
    a.cmp(dword_ptr(rdx), n)?;
    a.jae(on)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut on)
}

fn say(
    a: &mut CodeAssembler,
    at: u64,
    n: iced_x86::code_asm::AsmRegister32,
) -> Result<(), IcedError> {
    a.mov(rdx, at)?;
    a.mov(dword_ptr(rdx), n)
}

fn serialise(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(r11, rax)?;
    a.xor(eax, eax)?;
    a.cpuid()?;
    a.mov(rax, r11)
}

/// Calls R8 and ends the test unless EAX is `n` then.
fn call_and_check(
    a: &mut CodeAssembler,
    n: iced_x86::code_asm::AsmRegister32,
) -> Result<(), IcedError> {
    let mut good = a.create_label();
    a.call(r8)?;
    a.cmp(eax, n)?;
    a.je(good)?;
    done(a, 1)?;
    a.set_label(&mut good)
}

/// Writes the function at R8 that gives `ecx`.
fn write_function(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(iced_x86::code_asm::byte_ptr(r8), MOV_EAX)?;
    a.mov(dword_ptr(r8 + 1), ecx)?;
    a.mov(iced_x86::code_asm::byte_ptr(r8 + 5), RET)
}

#[test]
fn the_same_function_again_and_again() {
    const ROUNDS: u64 = 3000;
    let writer = program(0, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(r10d, r10d)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(r10)?;
        a.mov(ecx, r10d)?;
        write_function(a)?;
        say(a, WRITTEN, r10d)?;
        wait_for(a, SEEN, r10d)?;
        a.cmp(r10, ROUNDS as i32)?;
        a.jb(again)
    });
    let reader = program(1, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(r10d, r10d)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(r10)?;
        wait_for(a, WRITTEN, r10d)?;
        serialise(a)?;
        call_and_check(a, r10d)?;
        say(a, SEEN, r10d)?;
        a.cmp(r10, ROUNDS as i32)?;
        a.jb(again)
    });
    on_each(&[writer, reader], |_| (), |_| ());
}

/// The writer's page is not known to hold code when the reader translates it, and the writer goes on
/// writing meanwhile.
#[test]
fn a_fresh_page_each_time() {
    const PAGES: u64 = 2000;
    let writer = program(0, 2, |a| {
        a.mov(r8, SPACE)?;
        a.mov(r9, PAGES)?;
        a.xor(r10d, r10d)?;
        let mut page = a.create_label();
        a.set_label(&mut page)?;
        a.xor(ecx, ecx)?;
        write_function(a)?;
        a.inc(r10)?;
        // The reader may run it from here on.
        say(a, WRITTEN, r10d)?;
        for n in 1..=40u32 {
            a.mov(dword_ptr(r8 + 1), n)?;
        }
        a.inc(r10)?;
        say(a, WRITTEN, r10d)?;
        wait_for(a, SEEN, r10d)?;
        a.add(r8, 0x1000)?;
        a.dec(r9)?;
        a.jnz(page)
    });
    let reader = program(1, 2, |a| {
        a.mov(r8, SPACE)?;
        a.mov(r9, PAGES)?;
        a.xor(r10d, r10d)?;
        a.mov(ebx, 40)?;
        let mut page = a.create_label();
        a.set_label(&mut page)?;
        a.inc(r10)?;
        wait_for(a, WRITTEN, r10d)?;
        serialise(a)?;
        // Some version or other.
        for _ in 0..3 {
            a.call(r8)?;
        }
        a.inc(r10)?;
        wait_for(a, WRITTEN, r10d)?;
        serialise(a)?;
        a.mov(ebx, 40)?;
        call_and_check(a, ebx)?;
        call_and_check(a, ebx)?;
        say(a, SEEN, r10d)?;
        a.add(r8, 0x1000)?;
        a.dec(r9)?;
        a.jnz(page)
    });
    on_each(&[writer, reader], |_| (), |_| ());
}

/// What a reader that does not wait sees never goes back in time.
#[test]
fn a_running_loop_sees_new_code() {
    const ROUNDS: u32 = 3000;
    let writer = program(0, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(ecx, ecx)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(ecx)?;
        // One store, so that the instruction is whole at any time.
        a.mov(dword_ptr(r8 + 4), ecx)?;
        a.pause()?;
        a.cmp(ecx, ROUNDS)?;
        a.jb(again)
    });
    let reader = program(1, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(r10d, r10d)?;
        let mut again = a.create_label();
        let mut later = a.create_label();
        a.set_label(&mut again)?;
        a.call(r8)?;
        a.cmp(eax, r10d)?;
        a.jae(later)?;
        done(a, 2)?;
        a.set_label(&mut later)?;
        a.mov(r10d, eax)?;
        a.cmp(eax, ROUNDS)?;
        a.jb(again)
    });
    // nop; nop; nop; mov eax, 0; ret: the immediate is aligned.
    let prepare = |m: &Machine| m.write(SPACE, &[0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3]);
    on_each(&[writer, reader], prepare, |_| ());
}

/// A locked instruction changes code.
#[test]
fn code_changed_by_an_exchange() {
    const ROUNDS: u32 = 1000;
    let writer = program(0, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(r10d, r10d)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(r10d)?;
        a.mov(ecx, r10d)?;
        a.xchg(dword_ptr(r8 + 4), ecx)?;
        // Beside the code, on its page.
        a.lock().inc(dword_ptr(r8 + 0x800))?;
        a.lock().xadd(word_ptr(r8 + 0x900), iced_x86::code_asm::cx)?;
        a.setz(cl)?;
        say(a, WRITTEN, r10d)?;
        wait_for(a, SEEN, r10d)?;
        a.cmp(r10d, ROUNDS)?;
        a.jb(again)
    });
    let reader = program(1, 2, |a| {
        a.mov(r8, SPACE)?;
        a.xor(r10d, r10d)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(r10d)?;
        wait_for(a, WRITTEN, r10d)?;
        serialise(a)?;
        call_and_check(a, r10d)?;
        a.mov(r11d, r10d)?;
        say(a, SEEN, r11d)?;
        a.cmp(r10d, ROUNDS)?;
        a.jb(again)
    });
    let prepare = |m: &Machine| m.write(SPACE, &[0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3]);
    let check = |m: &Machine| assert_eq!(m.u32(SPACE + 0x800), ROUNDS);
    on_each(&[writer, reader], prepare, check);
}
