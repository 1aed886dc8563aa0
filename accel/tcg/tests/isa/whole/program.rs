//! A program: instructions with their jumps, where it starts, and what it starts with.

use super::layout::{CODE, CODE_LEN, Memory};
use super::state::State;
use crate::every_form::{image, undefined_flags};
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, Mnemonic, OpKind,
};
use tandem_tcg::x86::bits::rflags::{ARITH, DF};

/// An instruction of a program.
#[derive(Clone, Copy)]
pub struct Item {
    /// The instruction; its branch target or RIP-relative address is filled in from `target`.
    pub insn: Instruction,
    /// Number of the item that it refers to; one past the last is the program's end.
    pub target: Option<usize>,
    /// Where an indirect jump goes.
    pub flow: Option<usize>,
    /// Its result is hidden by the next instruction: nothing may be looked at in between.
    pub hidden: bool,
}

/// A program with its input.
#[derive(Clone)]
pub struct Program {
    /// Code size: 16, 32 or 64.
    pub bits: u32,
    /// Offset of the first instruction in the code pages.
    pub offset: u64,
    /// The instructions.
    pub items: Vec<Item>,
    /// Registers; RIP follows from the rest.
    pub state: State,
    /// Data; the code follows from the rest.
    pub memory: Memory,
}

/// A program as bytes.
pub struct Assembled {
    /// All instructions.
    pub bytes: Vec<u8>,
    /// Offsets of the items in `bytes`, and its length.
    pub starts: Vec<usize>,
}

impl Program {
    /// What addresses in the code segment are relative to.
    fn code_base(&self) -> u64 {
        if self.bits == 16 { CODE } else { 0 }
    }

    /// Instruction pointer of the first instruction.
    pub fn start(&self) -> u64 {
        CODE + self.offset - self.code_base()
    }

    /// The bytes; `None` if something has no encoding or is out of reach.
    pub fn encode(&self) -> Option<Assembled> {
        let at = self.start();
        let mut e = Encoder::new(self.bits);
        let mut starts = Vec::with_capacity(self.items.len() + 1);
        let mut bytes = Vec::new();
        // Lengths do not depend on targets, so a first pass finds all addresses.
        for pass in 0..2 {
            bytes.clear();
            let known = std::mem::take(&mut starts);
            for item in &self.items {
                let here = at + bytes.len() as u64;
                starts.push(bytes.len());
                let mut insn = item.insn;
                if let Some(t) = item.target {
                    let to = if pass == 0 { here } else { at + known[t] as u64 };
                    match insn.op0_kind() {
                        OpKind::NearBranch16 => insn.set_near_branch16(to as u16),
                        OpKind::NearBranch32 => insn.set_near_branch32(to as u32),
                        OpKind::NearBranch64 => insn.set_near_branch64(to),
                        _ if insn.op1_kind() == OpKind::Memory => {
                            insn.set_memory_displacement64(to);
                        }
                        _ => insn.set_immediate32(to as u32),
                    }
                }
                e.encode(&insn, here).ok()?;
                bytes.extend(e.take_buffer());
            }
            starts.push(bytes.len());
        }
        (self.offset as usize + bytes.len() < CODE_LEN).then_some(Assembled { bytes, starts })
    }

    /// Encodes the program into its memory and sets RIP.
    pub fn assemble(&mut self) -> Option<Assembled> {
        let code = self.encode()?;
        self.memory.code.fill(super::layout::END);
        self.memory.code[self.offset as usize..][..code.bytes.len()].copy_from_slice(&code.bytes);
        self.state.rip = self.start();
        Some(code)
    }

    /// For each item and the end, which flags are architecturally undefined before it; `None` if an
    /// instruction reads one of them, so that what it does is undefined too.
    pub fn undefined_flags(&self) -> Option<Vec<u64>> {
        let n = self.items.len();
        let mut before = vec![0u64; n + 1];
        // A return goes behind any call: one may jump into what another has called.
        let is_call = |i: &Item| {
            matches!(i.insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
        };
        let calls = self.items.iter().enumerate().filter(|(_, item)| is_call(item));
        let returns: Vec<usize> = calls.map(|(i, _)| i + 1).collect();
        let mut changed = true;
        while changed {
            changed = false;
            for (i, item) in self.items.iter().enumerate() {
                let after = undefined_after(&item.insn, before[i])?;
                let mut flow = |to: usize| {
                    let v = before[to] | after;
                    changed |= v != before[to] && to <= i;
                    before[to] = v;
                };
                let kind = item.insn.flow_control();
                if !matches!(kind, FlowControl::UnconditionalBranch | FlowControl::IndirectBranch) {
                    flow(i + 1);
                }
                let branch = kind != FlowControl::Next;
                if let Some(t) = item.target.filter(|_| branch).or(item.flow) {
                    flow(t);
                }
                if kind == FlowControl::Return {
                    returns.iter().for_each(|&to| flow(to));
                }
            }
        }
        Some(before)
    }

    /// Whether instructions are missing that hide what an FXSAVE, FXRSTOR, FNSAVE or FNSTENV shows of the
    /// host (see `hide.rs`).
    pub fn shows_save_area(&self) -> bool {
        (0..self.items.len()).any(|i| {
            let hides = match self.items[i].insn.mnemonic() {
                Mnemonic::Fxsave | Mnemonic::Fxsave64 => 6,
                Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => 1,
                Mnemonic::Fnsave | Mnemonic::Fnstenv => {
                    environment_words(&self.items[i].insn).len()
                }
                _ => 0,
            };
            hides > 0 && (i..i + hides).any(|n| self.items.get(n).is_none_or(|n| !n.hidden))
        })
    }

    /// The program without item `i`.
    pub fn without(&self, i: usize) -> Program {
        let mut p = self.clone();
        p.items.remove(i);
        for item in &mut p.items {
            for t in [&mut item.target, &mut item.flow].into_iter().flatten() {
                if *t > i {
                    *t -= 1;
                }
            }
        }
        p
    }
}

/// Flags whose value after `insn` is undefined, given those before it; `None` if it reads one.
fn undefined_after(insn: &Instruction, before: u64) -> Option<u64> {
    let mut read = image(insn.rflags_read());
    if matches!(insn.code(), Code::Pushfw | Code::Pushfd | Code::Pushfq) {
        read |= ARITH | DF;
    }
    if read & before != 0 {
        return None;
    }
    let undefined = undefined_flags(insn);
    let defined = image(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
    // A count of 0 leaves all flags as they are, and a repeated comparison may do nothing.
    use Mnemonic as M;
    let keeps = match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => {
            insn.op1_kind() == OpKind::Register || insn.op1_kind() == OpKind::Immediate8
        }
        M::Shld | M::Shrd => true,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            insn.has_rep_prefix() || insn.has_repne_prefix()
        }
        _ => false,
    };
    Some(if keeps { before | undefined } else { before & !defined | undefined })
}

/// Offset and size in bytes of the words of an x87 environment about which processors do not agree: some
/// know no FCS and FDS any more (CPUID.7.0:EBX[13]), set FDP only by exceptions (CPUID.7.0:EBX[6]), and
/// FOP too (SDM vol. 1, 8.1.9.1).
pub fn environment_words(save: &Instruction) -> &'static [(u64, u8)] {
    use iced_x86::MemorySize as S;
    match save.memory_size() {
        S::FpuEnv14 | S::FpuState94 => &[(8, 4), (12, 2)],
        _ => &[(16, 4), (20, 4), (24, 4)],
    }
}

/// The instructions of `code` in code of size `bits` at `ip`.
pub fn decode(code: &[u8], bits: u32, ip: u64) -> Vec<Instruction> {
    Decoder::with_ip(bits, code, ip, DecoderOptions::NONE).iter().collect()
}
