//! Blocks that run on through jumps: where they end does not show.

use super::every_form::USER;
use super::machine::{End, Machine};
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

#[test]
fn interpreter() {
    jump_after_jump(Machine::interp(false));
}

#[test]
fn jit_after_passes() {
    jump_after_jump(Machine::jit(true));
}
