//! What random programs start with: registers and memory full of edges of every format.

use super::layout::{DATA, FS_OFFSET, GS_OFFSET, Memory};
use super::state::State;
use crate::rng::Rng;
use crate::{forms, vector, x87};
use tandem_tcg::x86::bits::rflags;

/// A valid MXCSR.
pub fn mxcsr(rng: &mut Rng) -> u32 {
    // Rounding, flush-to-zero, denormals-are-zero, old status flags.
    let mut v = 0x1f80 | rng.bits() as u32 & 0x6000;
    if rng.one_in(4) {
        v |= rng.bits() as u32 & 0x803f | 0x40;
    }
    if rng.one_in(8) {
        v &= !(rng.bits() as u32 & 0x1f80);
    }
    v
}

/// Registers to start from, in code of size `bits`.
pub fn state(rng: &mut Rng, bits: u32) -> State {
    let mut regs = if bits == 64 { forms::registers(rng) } else { forms::registers32(rng) };
    forms::narrow(&mut regs, bits);
    let mut s = State { gpr: regs.gpr, flags: regs.flags, ..State::default() };
    if !rng.one_in(4) {
        s.gpr[3] &= !63;
    }
    if bits < 64 {
        s.gpr[8..].fill(0);
    }
    for (bit, n) in
        [(rflags::DF, 8), (rflags::AC, 16), (rflags::ID, 4), (rflags::NT, 16), (rflags::TF, 100)]
    {
        if rng.one_in(n) {
            s.flags |= bit;
        }
    }
    if bits == 64 {
        s.fs_gs = [DATA + FS_OFFSET, DATA + GS_OFFSET];
    }
    let v = vector::random_vectors(rng);
    s.zmm = v.zmm;
    s.k = v.k;
    s.mxcsr = mxcsr(rng);
    if bits < 64 {
        s.zmm[8..].fill([0; 64]);
    }
    let unit = x87::unit(rng);
    (s.cw, s.sw, s.tags, s.st) = (unit.cw, unit.sw, unit.tags, unit.st);
    if rng.one_in(3) {
        // As MMX code has it.
        s.sw &= !0x3800;
        s.cw |= 0x3f;
        for st in &mut s.st {
            st[..8].copy_from_slice(&rng.value().to_le_bytes());
        }
    }
    if rng.one_in(24) {
        // An exception is pending.
        s.sw |= rng.bits() as u16 & 0x3f;
        if s.sw & !s.cw & 0x3f != 0 {
            s.sw |= 0x8080;
        }
    }
    s
}

/// Data to start from.
pub fn memory(rng: &mut Rng) -> Memory {
    let mut m = Memory::default();
    for chunk in m.data.chunks_mut(64).chain(m.read_only.chunks_mut(64)) {
        vector::fill(rng, chunk);
        if rng.one_in(4) {
            for c in chunk.chunks_mut(16) {
                c[..10].copy_from_slice(&x87::number(rng));
            }
        }
    }
    m
}
