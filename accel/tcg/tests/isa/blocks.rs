//! Blocks that run on through jumps: where they end does not show.

use super::every_form::USER;
use super::machine::{End, Machine};
use super::memory::{Arena, DATA, DATA_LEN};
use super::native::{Regs, START};

/// More jumps than a block has room for pieces of code; whatever lies between them is not run.
fn jump_after_jump(mut m: Machine) {
    for jumps in [1, 7, 8, 9, 20, 70] {
        // jmp over a ud2, again and again; mov eax, 7.
        let mut code = [0xeb, 2, 0x0f, 0x0b].repeat(jumps);
        code.extend([0xb8, 7, 0, 0, 0]);
        let out = m.run(&code, START, USER, &Regs::default());
        assert_eq!((out.end, out.regs.gpr[0]), (End::Done, 7), "{jumps} jumps");
    }
}

/// Loops of which a block holds several rounds: however many rounds are run, and wherever one faults,
/// registers and flags are as if they came one by one.
fn rounds(mut m: Machine) {
    let _data = Arena::lock();
    let end = DATA + DATA_LEN as u64;
    for n in 1..=13u64 {
        // again: mov [rdi], al; add rdi, 4; dec ecx; jne again
        let code = [0x88, 0x07, 0x48, 0x83, 0xc7, 4, 0xff, 0xc9, 0x75, 0xf6];
        let mut regs = Regs { flags: 2, ..Regs::default() };
        (regs.gpr[7], regs.gpr[1]) = (DATA, n);
        let out = m.run(&code, START, USER, &regs);
        assert_eq!(out.end, End::Done);
        assert_eq!((out.regs.gpr[7], out.regs.gpr[1]), (DATA + 4 * n, 0), "{n} rounds");
        // ZF and PF of the DEC to 0; CF of the ADD.
        assert_eq!(out.regs.flags & 0x8d5, 0x44, "{n} rounds");

        // The round that begins behind the end faults, with the flags of the round before.
        regs.gpr[7] = end - 4 * n;
        regs.gpr[1] = 0x7000_0000 + n;
        regs.flags = 0x8d7;
        let out = m.run(&code, START, USER, &regs);
        let End::Fault(e) = out.end else { panic!("{n} rounds: {:?}", out.end) };
        assert_eq!((e.vector, out.regs.gpr[7], out.regs.gpr[1]), (14, end, 0x7000_0000));
        assert_eq!(out.regs.flags & 0x8d5, 4, "{n} rounds");

        // again: adc rax, rax; adox rbx, rbx; lea ecx, [rcx-1]; jrcxz out; jmp again. Two chains of
        // carries run through all rounds.
        let code = [
            0x48, 0x11, 0xc0, 0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xdb, 0x8d, 0x49, 0xff, 0xe3, 2, 0xeb,
            0xf0,
        ];
        let mut regs = Regs { flags: 2, ..Regs::default() };
        (regs.gpr[0], regs.gpr[3], regs.gpr[1]) = (0xc000_0000_0000_0001, 1 << 63, n);
        let out = m.run(&code, START, USER, &regs);
        let (mut a, mut b, mut cf, mut of) = (regs.gpr[0], regs.gpr[3], 0, 0);
        for _ in 0..n {
            let old = a;
            (a, cf) = (a << 1 | cf, a >> 63);
            // ADC sets OF as well.
            of = (old ^ a) >> 63;
            (b, of) = (b << 1 | of, b >> 63);
        }
        assert_eq!(out.end, End::Done);
        assert_eq!((out.regs.gpr[0], out.regs.gpr[3]), (a, b), "{n} rounds");
        assert_eq!(out.regs.flags & 0x801, cf | of << 11, "{n} rounds");
    }
}

#[test]
fn interpreter() {
    jump_after_jump(Machine::interp(false));
    rounds(Machine::interp(false));
}

#[test]
fn jit_after_passes() {
    jump_after_jump(Machine::jit(true));
    rounds(Machine::jit(true));
}
