//! Which instructions a block is made of: decoding along the likely path.

use super::{CodeFetch, Limits, TbKey};
use crate::x86::exception::Exception;
use crate::x86::mode::Mode;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// Most instructions in a block.
pub(super) const MAX_INSNS: usize = 64;
/// Most conditional branches that a block runs past.
const MAX_SIDE_EXITS: u32 = 4;
/// Most rounds of a loop in a block that is nothing but that loop, and most instructions of them all.
/// More rounds share what is at the loop's end: the look whether somebody wants the processor, and
/// flags that the next round overwrites need no description.
const ROUNDS: usize = 4;
const MAX_ROUNDS_INSNS: usize = 24;
/// Bytes fetched at a time: an average block.
const WINDOW: usize = 64;
/// Longest instruction.
const LONGEST: usize = 15;
const PAGE: u64 = !0xfff;

/// The decoded instructions of a block; the memory is kept from one translation to the next.
#[derive(Default)]
pub(super) struct Source {
    /// [`MAX_INSNS`] of them, once in use.
    insns: Vec<Instruction>,
    count: usize,
}

/// What follows an instruction in its block.
enum After {
    Next,
    Jump(u64),
    End,
}

/// What the window at hand gave.
enum Step {
    /// An instruction; it runs over the page's end.
    Decoded(bool),
    /// The instruction is cut off; more bytes must be fetched from its start.
    Refill,
    /// Its bytes cannot be had, and it is not the first.
    Stop,
}

impl Source {
    /// The instructions.
    pub(super) fn insns(&self) -> &[Instruction] {
        &self.insns[..self.count]
    }

    /// Decodes the block at `key`.
    pub(super) fn decode(
        &mut self,
        fetch: &mut dyn CodeFetch,
        key: TbKey,
        limits: Limits,
    ) -> Result<(), Exception> {
        let bits = key.code_bits();
        let single =
            key.mode.intersects(Mode::TF | Mode::BREAKPOINTS | Mode::WATCH | Mode::ONE_INSN);
        let max = if single { 1 } else { (limits.max_insns.max(1) as usize).min(MAX_INSNS) };
        let first_page = key.linear(key.rip) & PAGE;
        // What leaves half-way has executed fewer instructions than are counted.
        let side_exits = if limits.count { 0 } else { MAX_SIDE_EXITS };
        let mut path = Path { key, first_page, branches: side_exits, rounds: side_exits > 0 };
        let mut rip = key.rip;
        let mut shadow = false;
        let mut window = [0; WINDOW];
        self.insns.resize(MAX_INSNS, Instruction::default());
        self.count = 0;
        // One turn per window of bytes.
        'window: loop {
            let have = match fetch.fetch(key.linear(rip), &mut window) {
                Ok(n) => n.min(WINDOW),
                Err(e) if self.count == 0 => return Err(e),
                Err(_) => return Ok(()),
            };
            let bytes = &window[..have];
            let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
            loop {
                let left = &bytes[decoder.position()..];
                decoder.decode_out(&mut self.insns[self.count]);
                let crosses = match self.settle(fetch, &path, rip, left, have, &decoder)? {
                    Step::Decoded(crosses) => crosses,
                    Step::Refill => continue 'window,
                    Step::Stop => return Ok(()),
                };
                let insn = self.insns[self.count];
                let after = path.after(&insn, self.insns());
                let was_shadow = std::mem::replace(&mut shadow, makes_shadow(&insn));
                self.count += 1;
                if path.is_round(&insn) && !single && !crosses && !was_shadow {
                    self.repeat(max);
                    return Ok(());
                }
                // The instruction after STI and the like belongs into the same block.
                let room = if shadow && max > 1 { MAX_INSNS } else { max };
                if self.count >= room || crosses || was_shadow {
                    return Ok(());
                }
                let jumps = matches!(after, After::Jump(_));
                rip = match after {
                    After::End => return Ok(()),
                    After::Next => key.wrap(rip.wrapping_add(insn.len() as u64)),
                    After::Jump(target) => target,
                };
                if key.linear(rip) & PAGE != first_page {
                    return Ok(());
                }
                if jumps || !decoder.can_decode() {
                    continue 'window;
                }
            }
        }
    }

    /// The instructions are one round of a loop: adds further ones, if that leaves it short.
    fn repeat(&mut self, max: usize) {
        let round = self.count;
        // To work out what a round has left costs as much as a long round.
        let most = if carries(self.insns()) { MAX_INSNS } else { MAX_ROUNDS_INSNS };
        let rounds = ROUNDS.min(most.min(max) / round);
        for i in round..round * rounds.max(1) {
            self.insns[i] = self.insns[i - round];
            self.count += 1;
        }
    }

    /// Deals with an instruction that the window, of `have` bytes with `left` for it, has cut off.
    fn settle(
        &mut self,
        fetch: &mut dyn CodeFetch,
        path: &Path,
        rip: u64,
        left: &[u8],
        have: usize,
        decoder: &Decoder,
    ) -> Result<Step, Exception> {
        if decoder.last_error() != DecoderError::NoMoreBytes || left.len() >= LONGEST {
            return Ok(Step::Decoded(false));
        }
        let end = path.key.linear(rip.wrapping_add(left.len() as u64));
        if end & !PAGE != 0 {
            // From its own start the window holds an instruction, if the code goes on.
            return Ok(if left.len() < have { Step::Refill } else { Step::Decoded(false) });
        }
        // The page's end has cut it short.
        let mut bytes = [0; LONGEST];
        bytes[..left.len()].copy_from_slice(left);
        let high = match fetch.fetch(end, &mut bytes[left.len()..]) {
            Ok(n) => n.min(LONGEST - left.len()),
            Err(e) if self.count == 0 => return Err(e),
            Err(_) => return Ok(Step::Stop),
        };
        let bytes = &bytes[..left.len() + high];
        Decoder::with_ip(path.key.code_bits(), bytes, rip, DecoderOptions::NONE)
            .decode_out(&mut self.insns[self.count]);
        Ok(Step::Decoded(true))
    }
}

/// The way a block takes.
struct Path {
    key: TbKey,
    first_page: u64,
    /// Conditional branches that the block may still run past.
    branches: u32,
    /// The block may run past branches at all.
    rounds: bool,
}

impl Path {
    /// What follows `insn`, after `before`, in the block.
    fn after(&mut self, insn: &Instruction, before: &[Instruction]) -> After {
        match insn.flow_control() {
            FlowControl::Next if !ends_block(insn) => After::Next,
            FlowControl::ConditionalBranch if self.branches > 0 => {
                self.branches -= 1;
                After::Next
            }
            FlowControl::UnconditionalBranch if is_near_jump(insn.code()) => {
                let target = self.key.wrap(insn.near_branch_target());
                let seen = target == insn.ip() || before.iter().any(|i| i.ip() == target);
                if seen || self.key.linear(target) & PAGE != self.first_page {
                    After::End
                } else {
                    After::Jump(target)
                }
            }
            _ => After::End,
        }
    }
}

impl Path {
    /// Whether `insn` jumps back to the block's start, and the block may run past branches.
    fn is_round(&self, insn: &Instruction) -> bool {
        let jumps = match insn.flow_control() {
            FlowControl::ConditionalBranch => true,
            FlowControl::UnconditionalBranch => is_near_jump(insn.code()),
            _ => false,
        };
        jumps && self.rounds && self.key.wrap(insn.near_branch_target()) == self.key.rip
    }
}

/// Whether a round of a loop reads flags of the round before.
fn carries(round: &[Instruction]) -> bool {
    let touches = |i: &&Instruction| i.rflags_read() | i.rflags_modified() != 0;
    round.iter().find(touches).is_some_and(|i| i.rflags_read() != 0)
}

/// A direct jump whose target is not cut to 16 bits.
fn is_near_jump(code: Code) -> bool {
    matches!(code, Code::Jmp_rel8_32 | Code::Jmp_rel8_64 | Code::Jmp_rel32_32 | Code::Jmp_rel32_64)
}

/// Instructions after which interrupts are held back for one more (SDM vol. 3 §6.8.3).
pub(super) fn makes_shadow(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Sti => true,
        Mnemonic::Mov | Mnemonic::Pop => insn.op0_register() == iced_x86::Register::SS,
        _ => false,
    }
}

/// Instructions after which the block ends because the mode may have changed or the processor
/// must be seen by the execution loop.
fn ends_block(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Lmsw | Clts
            | Wrmsr
            | Invlpg
            | Invpcid
            | Popf
            | Popfd
            | Popfq
            | Stac
            | Clac
            | Hlt
            | Mwait
            | Xsetbv
            | Wrpkru
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Lgdt
            | Lidt
            | Lldt
            | Ltr
    ) || insn.mnemonic() == Mov && writes_control(insn)
}

/// MOV to CR, DR or, outside 64-bit code, to a segment register.
fn writes_control(insn: &Instruction) -> bool {
    let r = insn.op0_register();
    r.is_cr() || r.is_dr()
}
