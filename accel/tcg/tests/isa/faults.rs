//! Precise faults: an instruction whose memory operand is not there changes nothing.

use super::every_form::{USER, USER32, text};
use super::forms::{self, Want};
use super::machine::{End, Machine};
use super::memory::{Arena, DATA_LEN, data, set_data};
use super::native::START;
use super::rng::Rng;
use iced_x86::{Code, Decoder, Mnemonic};
use tandem_tcg::x86::exception::vector;
use tandem_tcg::x86::mode::Mode;

/// An address with nothing behind it.
const NOWHERE: u64 = 0x3000_0000;

fn every_access(m: &mut Machine, mode: Mode) -> usize {
    let guard = Arena::lock();
    let bits = if mode.contains(Mode::CODE64) { 64 } else { 32 };
    let mut rng = Rng::new(3);
    let mut tried = 0;
    let memory: Vec<u8> = (0..DATA_LEN).map(|_| rng.bits() as u8).collect();
    set_data(&memory);
    for code in Code::values().filter(|&c| forms::is_integer(c, bits)) {
        for lock in [false, true] {
            if lock && !code.op_code().can_use_lock_prefix() {
                continue;
            }
            for _ in 0..4 {
                let want = Want { memory: true, lock, sequence: false, bits };
                let Some(mut insn) = forms::build(code, want, &mut rng) else { break };
                let mut regs = if bits == 64 {
                    forms::registers(&mut rng)
                } else {
                    forms::registers32(&mut rng)
                };
                forms::settle(&mut insn, &mut regs, &mut rng);
                let stack = insn.stack_pointer_increment() != 0;
                let string = insn.is_string_instruction();
                if stack {
                    regs.gpr[4] = NOWHERE + 0x800;
                    regs.gpr[5] = NOWHERE + 0x800;
                }
                // RBX is the operand's base; of strings, one of the two may be there.
                regs.gpr[3] = NOWHERE;
                if string {
                    let one = rng.one_in(2) && insn.op_count() == 2;
                    for r in [6, 7] {
                        regs.gpr[r] = NOWHERE;
                    }
                    let both = matches!(insn.mnemonic(), Mnemonic::Movsb | Mnemonic::Cmpsb);
                    if one && both {
                        regs.gpr[6] = forms::BASE;
                    }
                }
                if bits == 32 {
                    regs.gpr.iter_mut().for_each(|v| *v &= u64::from(u32::MAX));
                }
                let Some(bytes) = forms::encode(&insn, START, bits) else { continue };
                let insn = Decoder::with_ip(bits, &bytes, START, 0).decode();
                let touches = string
                    || stack
                    || (insn.memory_base() != iced_x86::Register::None
                        && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop));
                if insn.is_invalid() || !touches {
                    break;
                }
                let got = m.run(&bytes, START, mode, &regs);
                let fault = matches!(got.end, End::Fault(e) if e.vector == vector::PF);
                let same = got.regs.gpr == regs.gpr && (got.regs.flags ^ regs.flags) & 0xcd5 == 0;
                assert!(
                    fault && same && got.rip == START,
                    "{} {bytes:02x?}\nbefore {regs:x?}\ngot    {got:x?}\n{}",
                    text(&insn),
                    m.listing()
                );
                tried += 1;
            }
        }
    }
    assert!(data() == memory, "a faulting instruction wrote to memory");
    drop(guard);
    tried
}

#[test]
fn interpreter() {
    let n = every_access(&mut Machine::interp(false), USER);
    assert!(n > 1000, "only {n} cases");
}

#[test]
fn jit() {
    every_access(&mut Machine::jit(true), USER);
}

#[test]
fn jit_32() {
    every_access(&mut Machine::jit(true), USER32);
}
