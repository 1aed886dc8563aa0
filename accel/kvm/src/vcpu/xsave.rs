//! Floating-point and vector state ⇄ the XSAVE area in its standard format (SDM vol. 1 §13.4), as
//! KVM_GET_XSAVE and KVM_SET_XSAVE exchange it.

use super::Vcpu;
use kvm_bindings::{Xsave, kvm_fpu};
use tandem_accel::x86::model::XsaveLayout;
use tandem_accel::x86::{FpuState, X86State};
use tandem_accel::{Error, Result};

// Components of XSTATE_BV.
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u32 = 2;
const OPMASK: u32 = 5;
const ZMM_HI256: u32 = 6;
const HI16_ZMM: u32 = 7;
const PKRU: u32 = 9;

/// XSTATE_BV in the header.
const XSTATE_BV: usize = 512;
/// End of the header: an area without extended components.
const FIRST: usize = 576;

/// Value of the x87 control word after FINIT and in the initial configuration.
const FCW_INIT: u16 = 0x37f;
const MXCSR_INIT: u32 = 0x1f80;

fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    area.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = area.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// Reads an area. Components whose XSTATE_BV bit is clear are in their initial configuration.
fn decode(area: &[u8], layout: &XsaveLayout, s: &mut X86State) {
    let bv = u64::from_le_bytes(get(area, XSTATE_BV));
    let mut f = FpuState { fcw: FCW_INIT, fsw: 0, ftw: 0, ..FpuState::default() };
    if bv & X87 != 0 {
        f.fcw = u16::from_le_bytes(get(area, 0));
        f.fsw = u16::from_le_bytes(get(area, 2));
        f.ftw = area[4];
        f.fop = u16::from_le_bytes(get(area, 6));
        f.fip = u64::from_le_bytes(get(area, 8));
        f.fdp = u64::from_le_bytes(get(area, 16));
        for (i, st) in f.st.iter_mut().enumerate() {
            *st = get(area, 32 + 16 * i);
        }
    }
    f.mxcsr =
        if bv & (SSE | 1 << AVX) != 0 { u32::from_le_bytes(get(area, 24)) } else { MXCSR_INIT };
    let part =
        |bit: u32| layout.component(bit).filter(|_| bv >> bit & 1 != 0).map(|c| c.offset as usize);
    let (avx, hi256, hi16) = (part(AVX), part(ZMM_HI256), part(HI16_ZMM));
    for (i, zmm) in f.zmm.iter_mut().enumerate() {
        if i >= 16 {
            if let Some(at) = hi16 {
                *zmm = get(area, at + 64 * (i - 16));
            }
            continue;
        }
        if bv & SSE != 0 {
            zmm[..16].copy_from_slice(&get::<16>(area, 160 + 16 * i));
        }
        if let Some(at) = avx {
            zmm[16..32].copy_from_slice(&get::<16>(area, at + 16 * i));
        }
        if let Some(at) = hi256 {
            zmm[32..].copy_from_slice(&get::<32>(area, at + 32 * i));
        }
    }
    if let Some(at) = part(OPMASK) {
        for (i, k) in f.opmask.iter_mut().enumerate() {
            *k = u64::from_le_bytes(get(area, at + 8 * i));
        }
    }
    s.pkru = part(PKRU).map_or(0, |at| u32::from_le_bytes(get(area, at)));
    s.fpu = f;
}

/// Fills an area with all components of `supported` (an XCR0 value). The rest of `area` is kept.
fn encode(s: &X86State, layout: &XsaveLayout, supported: u64, area: &mut [u8]) {
    let f = &s.fpu;
    put(area, 0, &f.fcw.to_le_bytes());
    put(area, 2, &f.fsw.to_le_bytes());
    put(area, 4, &[f.ftw, 0]);
    put(area, 6, &f.fop.to_le_bytes());
    put(area, 8, &f.fip.to_le_bytes());
    put(area, 16, &f.fdp.to_le_bytes());
    put(area, 24, &f.mxcsr.to_le_bytes());
    for (i, st) in f.st.iter().enumerate() {
        put(area, 32 + 16 * i, st);
    }
    for (i, zmm) in f.zmm.iter().take(16).enumerate() {
        put(area, 160 + 16 * i, &zmm[..16]);
    }
    let mut bv = X87 | SSE;
    let mut component = |bit: u32| {
        let c = layout.component(bit).filter(|_| supported >> bit & 1 != 0)?;
        let at = c.offset as usize;
        (at + c.size as usize <= area.len()).then(|| {
            bv |= 1 << bit;
            at
        })
    };
    let parts = [AVX, OPMASK, ZMM_HI256, HI16_ZMM, PKRU].map(&mut component);
    let [avx, opmask, hi256, hi16, pkru] = parts;
    for (i, zmm) in f.zmm.iter().enumerate() {
        if i >= 16 {
            if let Some(at) = hi16 {
                put(area, at + 64 * (i - 16), zmm);
            }
            continue;
        }
        if let Some(at) = avx {
            put(area, at + 16 * i, &zmm[16..32]);
        }
        if let Some(at) = hi256 {
            put(area, at + 32 * i, &zmm[32..]);
        }
    }
    if let Some(at) = opmask {
        for (i, k) in f.opmask.iter().enumerate() {
            put(area, at + 8 * i, &k.to_le_bytes());
        }
    }
    if let Some(at) = pkru {
        put(area, at, &s.pkru.to_le_bytes());
    }
    // XSTATE_BV, and a clear XCOMP_BV: the standard format.
    put(area, XSTATE_BV, &bv.to_le_bytes());
    put(area, XSTATE_BV + 8, &[0; 8]);
}

/// The bytes of a kernel buffer: fixed part, then flexible part.
fn bytes_of(x: &Xsave) -> Vec<u8> {
    let fixed = &x.as_fam_struct_ref().xsave.region;
    fixed.iter().chain(x.as_slice()).flat_map(|w| w.to_le_bytes()).collect()
}

fn fill(x: &mut Xsave, bytes: &[u8]) {
    let word = |i: usize| u32::from_le_bytes(get(bytes, 4 * i));
    // SAFETY: only the region's contents change; the length field, which guards the flexible part,
    // stays as it is.
    let fixed = unsafe { &mut x.as_mut_fam_struct().xsave.region };
    let n = fixed.len();
    for (i, w) in fixed.iter_mut().enumerate() {
        *w = word(i);
    }
    for (i, w) in x.as_mut_slice().iter_mut().enumerate() {
        *w = word(n + i);
    }
}

impl Vcpu {
    fn xcr0_supported(&self) -> u64 {
        let r = self.vm.supported.query(0xd, 0);
        u64::from(r.edx) << 32 | u64::from(r.eax)
    }

    fn xsave_buffer(&self, len: usize) -> Result<Xsave> {
        let extra = len.saturating_sub(4096).div_ceil(4);
        Xsave::new(extra)
            .map_err(|e| Error::new(format!("cannot allocate {len} bytes of vector state: {e:?}")))
    }

    fn get_xsave(&self, len: usize) -> Result<Xsave> {
        let mut x = self.xsave_buffer(len)?;
        if self.vm.caps.xsave2 {
            // SAFETY: the buffer has the length that KVM_CAP_XSAVE2 asks for.
            unsafe { self.fd.get_xsave2(&mut x) }
                .map_err(|e| self.failed("read the vector registers", "KVM_GET_XSAVE2", e))?;
        } else {
            let plain = self
                .fd
                .get_xsave()
                .map_err(|e| self.failed("read the vector registers", "KVM_GET_XSAVE", e))?;
            let bytes: Vec<_> = plain.region.iter().flat_map(|w| w.to_le_bytes()).collect();
            fill(&mut x, &bytes);
        }
        Ok(x)
    }

    /// Reads floating-point and vector state and PKRU into `s`.
    pub(super) fn read_fpu(&self, s: &mut X86State) -> Result<()> {
        if let Some(len) = self.vm.caps.xsave_len {
            let area = bytes_of(&self.get_xsave(len)?);
            decode(&area, &self.layout, s);
            return Ok(());
        }
        let k = self
            .fd
            .get_fpu()
            .map_err(|e| self.failed("read the floating-point registers", "KVM_GET_FPU", e))?;
        s.fpu = FpuState {
            fcw: k.fcw,
            fsw: k.fsw,
            ftw: k.ftwx,
            fop: k.last_opcode,
            fip: k.last_ip,
            fdp: k.last_dp,
            mxcsr: k.mxcsr,
            ..FpuState::default()
        };
        for (st, k) in s.fpu.st.iter_mut().zip(k.fpr) {
            *st = get(&k, 0);
        }
        for (zmm, k) in s.fpu.zmm.iter_mut().zip(k.xmm) {
            zmm[..16].copy_from_slice(&k);
        }
        Ok(())
    }

    /// Writes them.
    pub(super) fn write_fpu(&self, s: &X86State) -> Result<()> {
        if let Some(len) = self.vm.caps.xsave_len {
            // What the area holds beyond our components stays.
            let mut x = self.get_xsave(len)?;
            let mut area = bytes_of(&x);
            area.resize(area.len().max(FIRST), 0);
            encode(s, &self.layout, self.xcr0_supported(), &mut area);
            fill(&mut x, &area);
            // SAFETY: the buffer has the length that KVM_CAP_XSAVE2 asks for.
            return unsafe { self.fd.set_xsave2(&x) }
                .map_err(|e| self.failed("set the vector registers", "KVM_SET_XSAVE", e));
        }
        let f = &s.fpu;
        let mut k = kvm_fpu {
            fcw: f.fcw,
            fsw: f.fsw,
            ftwx: f.ftw,
            last_opcode: f.fop,
            last_ip: f.fip,
            last_dp: f.fdp,
            mxcsr: f.mxcsr,
            ..Default::default()
        };
        for (st, k) in f.st.iter().zip(&mut k.fpr) {
            k[..10].copy_from_slice(st);
        }
        for (zmm, k) in f.zmm.iter().zip(&mut k.xmm) {
            k.copy_from_slice(&zmm[..16]);
        }
        self.fd
            .set_fpu(&k)
            .map_err(|e| self.failed("set the floating-point registers", "KVM_SET_FPU", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_accel::x86::cpuid::CpuidTable;

    #[test]
    fn vector_state_survives_the_area() {
        let layout = XsaveLayout::of(&CpuidTable::default());
        let mut s = X86State { pkru: 0x5555_5554, ..X86State::default() };
        for (i, z) in s.fpu.zmm.iter_mut().enumerate() {
            for (j, b) in z.iter_mut().enumerate() {
                *b = (i * 67 + j) as u8;
            }
        }
        s.fpu.st[3] = [9; 10];
        s.fpu.opmask[7] = 0xdead;
        (s.fpu.fcw, s.fpu.fsw, s.fpu.ftw, s.fpu.fip) = (0x27f, 0x3800, 8, 0x1234);
        let mut area = vec![0; 4096];
        encode(&s, &layout, 0x2e7, &mut area);
        let mut back = X86State::default();
        decode(&area, &layout, &mut back);
        assert_eq!(back, s);
        // A host without AVX-512 keeps the low halves only.
        let mut area = vec![0; 832];
        encode(&s, &layout, 7, &mut area);
        decode(&area, &layout, &mut back);
        assert_eq!(back.fpu.zmm[5][..32], s.fpu.zmm[5][..32]);
        assert_eq!(back.fpu.zmm[5][32..], [0; 32]);
        assert_eq!(back.pkru, 0);
    }

    #[test]
    fn an_empty_area_is_the_initial_configuration() {
        let mut s = X86State::default();
        decode(&[0; 4096], &XsaveLayout::of(&CpuidTable::default()), &mut s);
        assert_eq!((s.fpu.fcw, s.fpu.ftw, s.fpu.mxcsr), (FCW_INIT, 0, MXCSR_INIT));
    }
}
