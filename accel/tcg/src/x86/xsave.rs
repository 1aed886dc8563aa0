//! FXSAVE, XSAVE and their relatives: extended state to and from memory (SDM vol. 1 §10.5, §13).
//!
//! The legacy region (x87, MXCSR, XMM) is the same for all of them; the XSAVE family adds a header
//! and the components beyond, in the standard or the compacted format. An area is probed as a whole
//! before the first byte is stored, so that a fault stores nothing.

use super::bits::{cr4, efer};
use super::exception::Exception;
use super::helpers::vector::MXCSR_MASK;
use super::mode::Mode;
use super::{Env, x87};

/// Component bits of XCR0.
const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const OPMASK: u64 = 1 << 5;
const ZMM_HI256: u64 = 1 << 6;
const HI16_ZMM: u64 = 1 << 7;
const PKRU: u64 = 1 << 9;

/// Size of the legacy region.
const LEGACY: usize = 512;
/// Legacy region and header.
const FIRST: u32 = 576;
/// XCOMP_BV bit 63: compacted format.
const COMPACTED: u64 = 1 << 63;

/// The components beyond the legacy region: bit and size.
const COMPONENTS: [(u32, u32); 5] = [(2, 256), (5, 64), (6, 512), (7, 1024), (9, 8)];

/// Which instruction saves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Save {
    /// XSAVE.
    Plain,
    /// XSAVEOPT.
    Optimised,
    /// XSAVEC.
    Compacted,
    /// XSAVES.
    Supervisor,
}

impl Env {
    fn mode_word(&self) -> Mode {
        Mode::from_bits_retain(self.core.mode)
    }

    /// Vector registers that the current mode can name.
    fn xmm_count(&self) -> usize {
        if self.mode_word().contains(Mode::CODE64) { 16 } else { 8 }
    }

    /// Offset of component `bit` in the standard format.
    fn standard_offset(&self, bit: u32) -> u32 {
        self.cpu.feat.xsave_offsets[bit as usize]
    }

    /// The first 32 bytes and the x87 registers of the legacy region. `wide`: 64-bit pointers.
    fn legacy_x87(&self, area: &mut [u8; LEGACY], wide: bool) {
        let c = &self.cpu;
        area[0..2].copy_from_slice(&c.fcw.to_le_bytes());
        area[2..4].copy_from_slice(&x87::status(c).to_le_bytes());
        area[4] = !c.ftag_empty;
        area[6..8].copy_from_slice(&c.fop.to_le_bytes());
        let width = if wide { 8 } else { 4 };
        area[8..8 + width].copy_from_slice(&c.fip.to_le_bytes()[..width]);
        area[16..16 + width].copy_from_slice(&c.fdp.to_le_bytes()[..width]);
        if !wide {
            area[12..14].copy_from_slice(&c.fcs.to_le_bytes());
            area[20..22].copy_from_slice(&c.fds.to_le_bytes());
        }
        for (i, to) in area[32..160].chunks_exact_mut(16).enumerate() {
            to[..10].copy_from_slice(&c.fpr[x87::physical(c, i)][..10]);
        }
    }

    fn legacy_mxcsr(&self, area: &mut [u8; LEGACY]) {
        area[24..28].copy_from_slice(&self.core.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }

    fn legacy_xmm(&self, area: &mut [u8; LEGACY]) {
        for (i, to) in area[160..160 + 16 * self.xmm_count()].chunks_exact_mut(16).enumerate() {
            to.copy_from_slice(&self.core.vec[i][..16]);
        }
    }

    fn load_x87(&mut self, area: &[u8; LEGACY], wide: bool) {
        let c = &mut self.cpu;
        let u16_at = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let pointer = |at: usize| {
            let v = u64_at(area, at);
            if wide { v } else { v & u64::from(u32::MAX) }
        };
        c.fcw = u16_at(0) & x87::CW_MASK | x87::CW_FIXED;
        x87::set_status(c, u16_at(2));
        c.ftag_empty = !area[4];
        c.fop = u16_at(6) & 0x7ff;
        c.fip = pointer(8);
        c.fdp = pointer(16);
        (c.fcs, c.fds) = if wide { (0, 0) } else { (u16_at(12), u16_at(20)) };
        for (i, from) in area[32..160].chunks_exact(16).enumerate() {
            let p = x87::physical(c, i);
            c.fpr[p] = [0; 16];
            c.fpr[p][..10].copy_from_slice(&from[..10]);
        }
    }

    fn load_xmm(&mut self, area: &[u8; LEGACY]) {
        let n = self.xmm_count();
        for (i, from) in area[160..160 + 16 * n].chunks_exact(16).enumerate() {
            self.core.vec[i][..16].copy_from_slice(from);
        }
    }

    /// The components that are not in their initial state.
    fn in_use(&self) -> u64 {
        let (c, core) = (&self.cpu, &self.core);
        let nonzero = |regs: &[[u8; 64]], from: usize, to: usize| {
            regs.iter().any(|r| r[from..to].iter().any(|&b| b != 0))
        };
        let n = self.xmm_count();
        let mut m = 0;
        let x87_initial = c.fcw == x87::CW_INIT
            && x87::status(c) == 0
            && c.ftag_empty == 0xff
            && (c.fip, c.fdp, c.fop) == (0, 0, 0)
            && c.fpr.iter().all(|r| r[..10] == [0; 10]);
        for (used, bits) in [
            (!x87_initial, X87),
            (nonzero(&core.vec[..n], 0, 16), SSE),
            (nonzero(&core.vec[..n], 16, 32), AVX),
            (core.opmask != [0; 8], OPMASK),
            (nonzero(&core.vec[..n], 32, 64), ZMM_HI256),
            (n == 16 && nonzero(&core.vec[16..], 0, 64), HI16_ZMM),
            (c.pkru != 0, PKRU),
        ] {
            if used {
                m |= bits;
            }
        }
        m
    }

    /// The bytes of component `bit`.
    fn component(&self, bit: u32, out: &mut [u8]) {
        let n = self.xmm_count();
        let vec = &self.core.vec;
        match bit {
            2 => (0..n).for_each(|i| out[16 * i..][..16].copy_from_slice(&vec[i][16..32])),
            5 => (0..8).for_each(|i| {
                out[8 * i..][..8].copy_from_slice(&self.core.opmask[i].to_le_bytes());
            }),
            6 => (0..n).for_each(|i| out[32 * i..][..32].copy_from_slice(&vec[i][32..])),
            7 if n == 16 => (0..16).for_each(|i| out[64 * i..][..64].copy_from_slice(&vec[16 + i])),
            9 => out[..4].copy_from_slice(&self.cpu.pkru.to_le_bytes()),
            _ => {}
        }
    }

    /// Sets component `bit` from its bytes (all zero: the initial state).
    fn set_component(&mut self, bit: u32, data: &[u8]) {
        let n = self.xmm_count();
        let vec = &mut self.core.vec;
        match bit {
            2 => (0..n).for_each(|i| vec[i][16..32].copy_from_slice(&data[16 * i..][..16])),
            5 => (0..8).for_each(|i| self.core.opmask[i] = u64_at(data, 8 * i)),
            6 => (0..n).for_each(|i| vec[i][32..].copy_from_slice(&data[32 * i..][..32])),
            7 if n == 16 => {
                (0..16).for_each(|i| vec[16 + i].copy_from_slice(&data[64 * i..][..64]))
            }
            9 => super::cr::set_pkru(self, u64_at(data, 0) as u32),
            _ => {}
        }
    }
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&data[at..at + 8]);
    u64::from_le_bytes(b)
}

/// FXSAVE; `wide` with REX.W.
pub fn fxsave(env: &mut Env, addr: u64, wide: bool) -> Result<(), Exception> {
    if addr & 15 != 0 {
        return Err(Exception::gp(0));
    }
    let mmu = env.mode_word().mmu_idx();
    let mut area = [0; LEGACY];
    env.legacy_x87(&mut area, wide);
    env.legacy_mxcsr(&mut area);
    let mut len = 160;
    if !fast_fxsr(env) {
        env.legacy_xmm(&mut area);
        len += 16 * env.xmm_count();
    }
    env.probe_write(addr, LEGACY as u64, mmu)?;
    env.write_bytes(addr, &area[..len], mmu)
}

/// AMD's fast FXSAVE leaves the XMM registers out in 64-bit code of the system.
fn fast_fxsr(env: &Env) -> bool {
    let mode = env.mode_word();
    env.cpu.efer & efer::FFXSR != 0 && mode.contains(Mode::CODE64) && mode.cpl() == 0
}

/// FXRSTOR; `wide` with REX.W.
pub fn fxrstor(env: &mut Env, addr: u64, wide: bool) -> Result<(), Exception> {
    if addr & 15 != 0 {
        return Err(Exception::gp(0));
    }
    let mmu = env.mode_word().mmu_idx();
    let mut area = [0; LEGACY];
    env.read_bytes(addr, &mut area, mmu)?;
    let mxcsr = u64_at(&area, 24) as u32;
    let sse = env.cpu.cr4 & cr4::OSFXSR != 0;
    if sse && mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    env.load_x87(&area, wide);
    if sse {
        env.core.mxcsr = mxcsr;
        if !fast_fxsr(env) {
            env.load_xmm(&area);
        }
    }
    Ok(())
}

/// Whether component `bit` starts at a multiple of 64 in the compacted format.
fn aligned(env: &Env, bit: u32) -> bool {
    env.cpu.feat.xsave_aligned >> bit & 1 != 0
}

/// Offsets of the components in `mask` in the compacted format, and the size of the area.
fn compacted(env: &Env, mask: u64) -> ([u32; 5], u32) {
    let mut offsets = [0; 5];
    let mut at = FIRST;
    for (o, (bit, size)) in offsets.iter_mut().zip(COMPONENTS) {
        if mask >> bit & 1 != 0 {
            if aligned(env, bit) {
                at = at.next_multiple_of(64);
            }
            *o = at;
            at += size;
        }
    }
    (offsets, at)
}

/// Offsets of the components in the standard format, and the size of an area for those in `mask`.
fn standard(env: &Env, mask: u64) -> ([u32; 5], u32) {
    let offsets = COMPONENTS.map(|(bit, _)| env.standard_offset(bit));
    let ends = offsets
        .iter()
        .zip(COMPONENTS)
        .filter(|(_, (bit, _))| mask >> bit & 1 != 0)
        .map(|(o, (_, size))| o + size);
    (offsets, ends.max().unwrap_or(FIRST).max(FIRST))
}

/// XSAVE, XSAVEOPT, XSAVEC and XSAVES of the components that `request` (EDX:EAX) asks for.
pub fn xsave(
    env: &mut Env,
    addr: u64,
    request: u64,
    how: Save,
    wide: bool,
) -> Result<(), Exception> {
    if addr & 63 != 0 {
        return Err(Exception::gp(0));
    }
    let mmu = env.mode_word().mmu_idx();
    let mask = request & env.cpu.xcr0;
    let compact = matches!(how, Save::Compacted | Save::Supervisor);
    let in_use = env.in_use();
    // XSAVE stores initial components too; the others leave them to XRSTOR.
    let store = if how == Save::Plain { mask } else { mask & in_use };
    let (offsets, size) = if compact { compacted(env, mask) } else { standard(env, mask) };
    env.probe_write(addr, size.into(), mmu)?;

    let mut area = [0; LEGACY];
    env.legacy_x87(&mut area, wide);
    env.legacy_mxcsr(&mut area);
    env.legacy_xmm(&mut area);
    let put = |env: &mut Env, from: usize, to: usize| {
        env.write_bytes(addr + from as u64, &area[from..to], mmu)
    };
    if store & X87 != 0 {
        put(env, 0, 24)?;
        put(env, 32, 160)?;
    }
    // MXCSR goes with SSE; in the standard format with AVX too.
    let with_mxcsr =
        if compact { mask & SSE & in_use_sse(env, in_use) } else { mask & (SSE | AVX) };
    if with_mxcsr != 0 {
        put(env, 24, 32)?;
    }
    if store & SSE != 0 {
        let end = 160 + 16 * env.xmm_count();
        put(env, 160, end)?;
    }
    let mut data = [0; 1024];
    for (offset, (bit, size)) in offsets.into_iter().zip(COMPONENTS) {
        if store >> bit & 1 != 0 {
            let data = &mut data[..size as usize];
            data.fill(0);
            env.component(bit, data);
            env.write_bytes(addr + u64::from(offset), data, mmu)?;
        }
    }
    if compact {
        let used = mask & (in_use | in_use_sse(env, in_use));
        env.write_u64(addr + 512, used, mmu)?;
        env.write_u64(addr + 520, mask | COMPACTED, mmu)
    } else {
        let old = env.read_u64(addr + 512, mmu)?;
        env.write_u64(addr + 512, old & !mask | mask & in_use, mmu)
    }
}

/// The SSE bit if, as the compacted forms see it, SSE state is in use: XMM registers or MXCSR.
fn in_use_sse(env: &Env, in_use: u64) -> u64 {
    if in_use & SSE != 0 || env.core.mxcsr != 0x1f80 { SSE } else { 0 }
}

/// XRSTOR and XRSTORS of the components that `request` (EDX:EAX) asks for.
pub fn xrstor(
    env: &mut Env,
    addr: u64,
    request: u64,
    supervisor: bool,
    wide: bool,
) -> Result<(), Exception> {
    const GP: Exception = Exception::gp(0);
    if addr & 63 != 0 {
        return Err(GP);
    }
    let mmu = env.mode_word().mmu_idx();
    let mut header = [0; 64];
    env.read_bytes(addr + 512, &mut header, mmu)?;
    let (stored, comp) = (u64_at(&header, 0), u64_at(&header, 8));
    let xcr0 = env.cpu.xcr0;
    let compact = comp & COMPACTED != 0;
    let rest_clear = if compact { &header[16..] } else { &header[8..24] };
    let known = if compact { comp & !COMPACTED } else { xcr0 };
    if stored & !known != 0
        || known & !xcr0 != 0
        || rest_clear.iter().any(|&b| b != 0)
        || compact && env.cpu.feat.xsave & 2 == 0
        || supervisor && !compact
    {
        return Err(GP);
    }
    let mask = request & xcr0;
    let load = mask & stored;
    let (offsets, _) = if compact { compacted(env, known) } else { standard(env, xcr0) };

    // All memory is read before any state changes.
    let mut legacy = [0; LEGACY];
    let load_mxcsr = if compact { load & SSE } else { mask & (SSE | AVX) };
    if load & (X87 | SSE) | load_mxcsr != 0 {
        env.read_bytes(addr, &mut legacy, mmu)?;
    }
    let mxcsr = u64_at(&legacy, 24) as u32;
    if load_mxcsr != 0 && mxcsr & !MXCSR_MASK != 0 {
        return Err(GP);
    }
    let mut data = [[0; 1024]; 5];
    for ((buf, offset), (bit, size)) in data.iter_mut().zip(offsets).zip(COMPONENTS) {
        if load >> bit & 1 != 0 {
            env.read_bytes(addr + u64::from(offset), &mut buf[..size as usize], mmu)?;
        }
    }

    if load & X87 != 0 {
        env.load_x87(&legacy, wide);
    } else if mask & X87 != 0 {
        x87::init(&mut env.cpu, true);
    }
    if load_mxcsr != 0 {
        env.core.mxcsr = mxcsr;
    } else if compact && mask & SSE != 0 {
        env.core.mxcsr = 0x1f80;
    }
    if mask & SSE != 0 {
        if load & SSE == 0 {
            legacy = [0; LEGACY];
        }
        env.load_xmm(&legacy);
    }
    for (buf, (bit, size)) in data.iter().zip(COMPONENTS) {
        if mask >> bit & 1 != 0 {
            env.set_component(bit, &buf[..size as usize]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    const AREA: u64 = 0x10_0000;

    /// A bench in 64-bit mode with all of AVX enabled and every register different.
    fn bench() -> Bench {
        let mut b = Bench::new();
        b.long(0);
        let env = b.env();
        env.cpu.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
        env.cpu.xcr0 = X87 | SSE | AVX;
        env.core.mode = Mode::of(&env.cpu).bits();
        for i in 0..16 {
            env.core.vec[i] =
                std::array::from_fn(
                    |n| if n < 32 { ((16 * i + n) as u8).wrapping_add(1) } else { 0 },
                );
        }
        env.core.mxcsr = 0x7f80;
        env.cpu.fcw = 0x27f;
        x87::set_status(&mut env.cpu, 0x3800);
        env.cpu.ftag_empty = 0x7f;
        for i in 0..8 {
            env.cpu.fpr[i][..10].copy_from_slice(&[0x10 + i as u8; 10]);
        }
        b
    }

    /// The state that the areas hold.
    fn snapshot(b: &mut Bench) -> (Vec<u8>, Vec<u8>, u32, u16, u16, u8) {
        let env = b.env();
        (
            env.core.vec[..16].concat(),
            env.cpu.fpr.concat(),
            env.core.mxcsr,
            env.cpu.fcw,
            x87::status(&env.cpu),
            env.cpu.ftag_empty,
        )
    }

    fn wipe(b: &mut Bench) {
        let env = b.env();
        env.core.vec = [[0xaa; 64]; 32];
        for r in &mut env.core.vec {
            r[32..].fill(0);
        }
        env.core.mxcsr = 0x1f80;
        env.cpu.fpr = [[0; 16]; 8];
        x87::init(&mut env.cpu, true);
    }

    #[test]
    fn fxsave_and_back() {
        let mut b = bench();
        let before = snapshot(&mut b);
        fxsave(b.env(), AREA, true).unwrap();
        assert_eq!(b.peek32(AREA), 0x3800 << 16 | 0x27f);
        assert_eq!(b.peek32(AREA + 4) & 0xff, 0x80);
        assert_eq!(b.peek32(AREA + 24), 0x7f80);
        assert_eq!(b.peek32(AREA + 28), MXCSR_MASK);
        // ST(0) is physical register 7.
        assert_eq!(b.peek32(AREA + 32), 0x1717_1717);
        assert_eq!(b.peek32(AREA + 48), 0x1010_1010);
        assert_eq!(b.peek32(AREA + 160 + 16 * 15), 0xf4f3_f2f1);
        wipe(&mut b);
        fxrstor(b.env(), AREA, true).unwrap();
        let after = snapshot(&mut b);
        assert_eq!(before.1[..80], after.1[..80]);
        assert_eq!((before.2, before.3, before.4, before.5), (after.2, after.3, after.4, after.5));
        assert_eq!(
            b.env().core.vec[3][..16],
            [49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64]
        );
        // The upper halves are not part of it.
        assert_eq!(b.env().core.vec[3][16], 0xaa);
        assert_eq!(fxsave(b.env(), AREA + 8, true).unwrap_err().vector, 13);
        b.poke32(AREA + 24, 0x1_0000);
        assert_eq!(fxrstor(b.env(), AREA, true).unwrap_err().vector, 13);
    }

    #[test]
    fn every_xsave_form_and_back() {
        for how in [Save::Plain, Save::Optimised, Save::Compacted] {
            let mut b = bench();
            b.env().cpu.feat.xsave = 0xf;
            let before = snapshot(&mut b);
            for i in 0..128 {
                b.poke64(AREA + 8 * i, 0);
            }
            xsave(b.env(), AREA, u64::MAX, how, true).unwrap();
            assert_eq!(b.peek64(AREA + 512), 7);
            let comp = if how == Save::Compacted { COMPACTED | 7 } else { 0 };
            assert_eq!(b.peek64(AREA + 520), comp);
            wipe(&mut b);
            xrstor(b.env(), AREA, u64::MAX, false, true).unwrap();
            assert_eq!(snapshot(&mut b), before, "{how:?}");
        }
    }

    #[test]
    fn components_in_their_initial_state() {
        let mut b = bench();
        b.env().cpu.feat.xsave = 0xf;
        for r in &mut b.env().core.vec {
            r[16..].fill(0);
        }
        xsave(b.env(), AREA, u64::MAX, Save::Compacted, true).unwrap();
        assert_eq!(b.peek64(AREA + 512), X87 | SSE);
        wipe(&mut b);
        xrstor(b.env(), AREA, u64::MAX, false, true).unwrap();
        assert!(b.env().core.vec.iter().take(16).all(|r| r[16..32] == [0; 16]));
        // A component that is not asked for stays.
        wipe(&mut b);
        xrstor(b.env(), AREA, X87 | SSE, false, true).unwrap();
        assert_eq!(b.env().core.vec[0][16], 0xaa);
        assert_eq!(b.env().core.vec[0][0], 1);
    }

    #[test]
    fn headers_that_make_no_sense() {
        let mut b = bench();
        b.env().cpu.feat.xsave = 0xf;
        let gp = |b: &mut Bench, stored: u64, comp: u64, rest: u64| {
            b.poke64(AREA + 512, stored);
            b.poke64(AREA + 520, comp);
            b.poke64(AREA + 528, rest);
            let r = xrstor(b.env(), AREA, u64::MAX, false, true);
            r.is_err_and(|e| e.vector == 13)
        };
        for i in 0..4 {
            b.poke64(AREA + 528 + 8 * i, 0);
        }
        assert!(gp(&mut b, 1 << 9, 0, 0), "a component that is not enabled");
        assert!(gp(&mut b, 0, 0, 1), "reserved bytes");
        assert!(gp(&mut b, 7, COMPACTED | 3, 0), "a component that the area lacks");
        assert!(gp(&mut b, 0, COMPACTED | 1 << 9, 0), "a component that is not enabled");
        assert!(gp(&mut b, 0, 1, 0), "an offset without the format");
        assert!(!gp(&mut b, 0, COMPACTED | 7, 0));
        assert_eq!(xrstor(b.env(), AREA + 32, 7, false, true).unwrap_err().vector, 13);
    }
}
