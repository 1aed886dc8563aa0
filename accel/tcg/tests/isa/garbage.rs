//! Random bytes in every mode: translation must neither panic nor make malformed IR, and both
//! passes and compiler must take what it makes.

use super::machine::{self, Bytes};
use super::rng::Rng;
use iced_x86::Code;
use tandem_jit::code::{Backend, CompileError};
use tandem_jit::ir::{Block, Verifier};
use tandem_jit::opt::Passes;
use tandem_tcg::x86::mode::Mode;
use tandem_tcg::x86::translate::{FrontEnd, Limits, TbKey};

struct Bench {
    target: std::sync::Arc<tandem_jit::target::Target>,
    backend: std::sync::Arc<tandem_jit::x86_64::X64Backend>,
    front: FrontEnd,
    block: Block,
    verifier: Verifier,
    passes: Passes,
}

impl Bench {
    fn new() -> Bench {
        let target = std::sync::Arc::new(machine::target());
        let backend = tandem_jit::x86_64::X64Backend::new(target.clone(), 16 << 20);
        Bench {
            target,
            backend: backend.expect("an arena"),
            front: FrontEnd::default(),
            block: Block::default(),
            verifier: Verifier::default(),
            passes: Passes::default(),
        }
    }

    fn try_one(&mut self, code: &[u8], rip: u64, mode: Mode) {
        let key = TbKey { rip, cs_base: 0, mode };
        let mut bytes = Bytes { code, at: rip };
        if self.front.translate(&mut bytes, key, Limits::default(), &mut self.block).is_err() {
            return;
        }
        for stage in ["the front end", "the passes"] {
            if let Err(e) = self.verifier.check(&self.block, &self.target) {
                let listing = self.block.listing(Some(&self.target)).to_string();
                panic!("{stage}: {e} for {code:02x?} in {mode:?}\n{listing}");
            }
            self.passes.run(&mut self.block, &self.target);
        }
        match self.backend.compiler().compile(&self.block, 1) {
            Ok(_) => {}
            Err(CompileError::ArenaFull) => self.backend.reset(),
            Err(e) => panic!("{e} for {code:02x?} in {mode:?}"),
        }
    }
}

/// A mode word with random bits, the code size among 16, 32 and 64.
fn mode(rng: &mut Rng) -> Mode {
    let mut m = Mode::from_bits_retain(rng.bits() as u32 & 0x01ff_ffff & !(Mode::TF.bits()));
    if !rng.one_in(4) {
        m.remove(Mode::SSE_UD | Mode::SSE_NM | Mode::X87_NM | Mode::BREAKPOINTS);
    }
    m.set(Mode::TF, rng.one_in(16));
    m.set(Mode::CODE64, rng.one_in(2));
    if m.contains(Mode::CODE64) {
        m.remove(Mode::CODE32 | Mode::SEGMENTED | Mode::VM86);
        m.insert(Mode::SS32 | Mode::PE | Mode::LMA);
    }
    m
}

fn rounds(default: usize) -> usize {
    std::env::var("ISA_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn bytes() {
    let mut rng = Rng::new(11);
    let mut bench = Bench::new();
    for _ in 0..rounds(20_000) {
        let mode = mode(&mut rng);
        let mut code = vec![0; 24];
        code.iter_mut().for_each(|b| *b = rng.bits() as u8);
        // Escapes to the larger opcode maps would be rare otherwise.
        match rng.below(8) {
            0 => code[0] = 0x0f,
            1 => code[..2].copy_from_slice(&[0x0f, 0x38]),
            2 => code[..2].copy_from_slice(&[0x0f, 0x3a]),
            3 => code[0] = 0x62,
            4 => code[0] = rng.pick(&[0xc4, 0xc5]),
            5 => code[..2].copy_from_slice(&[rng.pick(&[0x66, 0xf2, 0xf3]), 0x0f]),
            _ => {}
        }
        let rip = if mode.contains(Mode::CODE64) { rng.bits() } else { rng.bits() & 0xffff };
        bench.try_one(&code, rip & !0xff0 | 0x7f0, mode);
    }
}

/// Every form that iced can encode, in every code size, with whatever operands its decoder finds
/// behind the opcode bytes.
#[test]
fn every_opcode() {
    let mut rng = Rng::new(12);
    let mut bench = Bench::new();
    for code in Code::values() {
        for bits in [16, 32, 64] {
            let op = code.op_code();
            let there = match bits {
                16 => op.mode16(),
                32 => op.mode32(),
                _ => op.mode64(),
            };
            if !there {
                continue;
            }
            let Some(start) = opcode_bytes(code, bits) else { continue };
            for _ in 0..3 {
                let mut bytes = start.clone();
                bytes.extend((0..16).map(|_| rng.bits() as u8));
                let mut mode = mode(&mut rng);
                mode.set(Mode::CODE64, bits == 64);
                mode.set(Mode::CODE32, bits == 32);
                if bits == 64 {
                    mode.remove(Mode::SEGMENTED | Mode::VM86);
                }
                bench.try_one(&bytes, 0x7000, mode);
            }
        }
    }
}

/// The bytes of a legacy `code` up to its opcode, or to its ModRM byte if that has part of it.
fn opcode_bytes(code: Code, bits: u32) -> Option<Vec<u8>> {
    let op = code.op_code();
    let table: &[u8] = match op.table() {
        iced_x86::OpCodeTableKind::Normal => &[],
        iced_x86::OpCodeTableKind::T0F => &[0x0f],
        iced_x86::OpCodeTableKind::T0F38 => &[0x0f, 0x38],
        iced_x86::OpCodeTableKind::T0F3A => &[0x0f, 0x3a],
        _ => return None,
    };
    if op.encoding() != iced_x86::EncodingKind::Legacy {
        return None;
    }
    let mut v = Vec::new();
    let other = if bits == 16 { 32 } else { 16 };
    if op.operand_size() == other {
        v.push(0x66);
    }
    if op.address_size() != 0 && op.address_size() != bits {
        v.push(0x67);
    }
    match op.mandatory_prefix() {
        iced_x86::MandatoryPrefix::P66 => v.push(0x66),
        iced_x86::MandatoryPrefix::PF2 => v.push(0xf2),
        iced_x86::MandatoryPrefix::PF3 => v.push(0xf3),
        _ => {}
    }
    if op.operand_size() == 64 && bits == 64 {
        v.push(0x48);
    }
    v.extend(table);
    let opcode = op.op_code();
    if op.op_code_len() == 2 {
        v.push((opcode >> 8) as u8);
    }
    v.push(opcode as u8);
    if op.is_group() {
        v.push(0x05 | (op.group_index() as u8) << 3);
    }
    Some(v)
}
