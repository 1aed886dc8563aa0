//! Helpers of vector instructions whose memory accesses depend on data.

use super::raise;
use super::segment::seg_check;
use crate::env::MASKED;
use crate::x86::exception::{Exception, vector};
use crate::x86::mode::Mode;
use crate::x86::paging::Access;
use crate::x86::{Cpu, Env};
use tandem_jit::ir::{PTR_READ, PTR_WRITE};

/// MXCSR bits that exist (SDM vol. 1 §10.2.3).
pub const MXCSR_MASK: u32 = 0xffff;

/// Quadword `what >> 8` (0 or 1) of vector register `what & 0xff`.
pub extern "C" fn get_xmm(env: *mut Env, what: u64) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &*env };
    let at = 8 * (what >> 8 & 1) as usize;
    u64::from_le_bytes(array(&env.core.vec[(what & 31) as usize][at..]))
}

/// Sets vector register `reg` to `v`, zero up to bit 127; the rest stays.
pub extern "C" fn set_xmm_low(env: *mut Env, reg: u64, v: u64) -> u64 {
    // SAFETY: as in `get_xmm`.
    let env = unsafe { &mut *env };
    env.core.vec[(reg & 31) as usize][..16].copy_from_slice(&u128::from(v).to_le_bytes());
    0
}

/// A memory operand of which only some elements are accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Masked {
    /// log2 of the operand's size in bytes, at most 6.
    pub log2: u8,
    /// log2 of an element's size in bytes.
    pub elem_log2: u8,
    /// It is written, not read.
    pub write: bool,
    /// Its elements are repeated: each is accessed if any of its copies is active.
    pub repeated: bool,
    /// The first elements are accessed, as many as are active.
    pub compressed: bool,
    /// If any element is active, an address that is not a multiple of the operand's size raises
    /// #GP(0).
    pub aligned: bool,
    /// Elements are checked for alignment (#AC).
    pub checked: bool,
    /// MMU index.
    pub mmu_idx: u8,
}

impl Masked {
    /// As one word for a helper's argument.
    pub fn pack(self) -> u64 {
        u64::from(self.log2)
            | u64::from(self.elem_log2) << 8
            | u64::from(self.mmu_idx) << 16
            | u64::from(self.write) << 24
            | u64::from(self.repeated) << 25
            | u64::from(self.compressed) << 26
            | u64::from(self.aligned) << 27
            | u64::from(self.checked) << 28
    }

    fn unpack(w: u64) -> Masked {
        Masked {
            log2: (w as u8).min(6),
            elem_log2: ((w >> 8) as u8).min(6),
            mmu_idx: (w >> 16) as u8,
            write: w >> 24 & 1 != 0,
            repeated: w >> 25 & 1 != 0,
            compressed: w >> 26 & 1 != 0,
            aligned: w >> 27 & 1 != 0,
            checked: w >> 28 & 1 != 0,
        }
    }

    /// Bit n: memory element n is accessed under the mask `bits`.
    fn active(self, bits: u64) -> u64 {
        let n = 1u32 << self.log2.saturating_sub(self.elem_log2);
        let all = u64::MAX >> (64 - n.min(64));
        if self.repeated {
            (0..64).step_by(n as usize).fold(0, |a, i| a | bits >> i) & all
        } else if self.compressed {
            let ones = (bits & all).count_ones();
            if ones == 0 { 0 } else { u64::MAX >> (64 - ones) }
        } else {
            bits & all
        }
    }
}

/// Where the active elements of the masked operand that is noted in `cpu` begin, from its address, and how
/// many bytes they reach over; `None` if there are none.
pub(super) fn active_span(cpu: &Cpu) -> Option<(u64, u64)> {
    let m = Masked::unpack(cpu.masked_what);
    let active = m.active(cpu.masked_bits);
    let (first, end) = (u64::from(active.trailing_zeros()), 64 - u64::from(active.leading_zeros()));
    (active != 0).then(|| (first << m.elem_log2, (end - first) << m.elem_log2))
}

fn elements(active: u64) -> impl Iterator<Item = u64> {
    let mut rest = active;
    std::iter::from_fn(move || {
        let n = u64::from(rest.trailing_zeros());
        rest &= rest.wrapping_sub(1);
        (n < 64).then_some(n)
    })
}

/// The linear address of the `len` bytes at `at` of the operand at `addr`: outside 64-bit code, beyond
/// 4 GiB, #GP(0) where segments are flat, as that is their limit, and from 0 on where a segment's base
/// leads there.
///
/// # Errors
/// #GP(0), which [`crate::x86::stack_fault`] makes #SS(0) of.
fn element_at(env: &Env, addr: u64, at: u64, len: u64) -> Result<u64, Exception> {
    let mode = Mode::from_bits_retain(env.core.mode);
    let to = addr.wrapping_add(at);
    if mode.contains(Mode::CODE64) {
        return Ok(to);
    }
    if to.saturating_add(len) > 1 << 32 && !mode.contains(Mode::SEGMENTED) {
        return Err(Exception { addr: Some(addr), ..Exception::gp(0) });
    }
    Ok(to & u64::from(u32::MAX))
}

/// A host pointer for the memory operand at `addr` that `masked_what` ([`Masked`]) describes, under
/// the mask `masked_bits`. Faults only for active elements. A store that goes to the bounce buffer
/// leaves [`MASKED`], and [`masked_end`] follows it.
pub fn masked_pointer(env: &mut Env, addr: u64) -> Result<u64, Exception> {
    let (m, bits) = (Masked::unpack(env.cpu.masked_what), env.cpu.masked_bits);
    let active = m.active(bits);
    let access = if m.write { Access::Write } else { Access::Read };
    let size = 1u64 << m.log2;
    if active != 0 && m.aligned && addr & (size - 1) != 0 {
        return Err(Exception::gp(0));
    }
    let elem = 1usize << m.elem_log2;
    let misaligned = m.checked && addr & (elem as u64 - 1) != 0;
    if active != 0 && addr & 0xfff <= 0x1000 - size && !misaligned {
        // On one page: it is accessible or the first active element faults.
        let at = u64::from(active.trailing_zeros()) << m.elem_log2;
        if let Some(p) = env.host_page(addr.wrapping_add(at), access, m.mmu_idx)? {
            return Ok(p.wrapping_sub(at as usize) as u64);
        }
    }
    for n in elements(active) {
        let at = (n as usize) << m.elem_log2;
        let from = element_at(env, addr, at as u64, elem as u64)?;
        if m.write {
            env.probe_write(from, elem as u64, m.mmu_idx)?;
        } else {
            let mut buf = [0; 64];
            env.read_bytes(from, &mut buf[..elem], m.mmu_idx)?;
            env.core.bounce_buf.data[at..at + elem].copy_from_slice(&buf[..elem]);
        }
    }
    if active != 0 && misaligned {
        // A page fault would have come first.
        return Err(Exception::with_error(vector::AC, 0));
    }
    env.core.bounce_buf.addr = addr;
    env.core.bounce = if m.write { MASKED } else { 0 };
    Ok(env.core.bounce_buf.data.as_ptr() as u64)
}

/// Writes a buffered masked store back.
pub fn masked_end(env: &mut Env) -> Result<(), Exception> {
    let (m, bits) = (Masked::unpack(env.cpu.masked_what), env.cpu.masked_bits);
    let addr = env.core.bounce_buf.addr;
    let elem = 1usize << m.elem_log2;
    let data = env.core.bounce_buf.data;
    for n in elements(m.active(bits)) {
        let at = (n as usize) << m.elem_log2;
        let to = element_at(env, addr, at as u64, elem as u64)?;
        env.write_bytes(to, &data[at..at + elem], m.mmu_idx)?;
    }
    Ok(())
}

/// MASKMOVDQU: stores the bytes of register `what & 0xff` whose mask byte in register
/// `what >> 8 & 0xff` has its top bit set; MMU index in `what >> 16`.
pub extern "C" fn maskmovdqu(env: *mut Env, addr: u64, what: u64) -> u64 {
    // SAFETY: as in `get_xmm`.
    let env = unsafe { &mut *env };
    let data = env.core.vec[(what & 31) as usize];
    let mask = env.core.vec[(what >> 8 & 31) as usize];
    let mmu_idx = (what >> 16) as u8;
    let bits = (0..16).fold(0, |b, i| b | u64::from(mask[i] >> 7) << i);
    let store = |env: &mut Env, really: bool| {
        for n in elements(bits) {
            let to = element_at(env, addr, n, 1)?;
            if really {
                env.write_u8(to, data[n as usize], mmu_idx)?;
            } else {
                env.probe_write(to, 1, mmu_idx)?;
            }
        }
        Ok(())
    };
    match store(env, false).and_then(|()| store(env, true)) {
        Ok(()) => 0,
        Err(e) => raise(env, e),
    }
}

/// A gather or scatter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gather {
    /// Data register.
    pub data: u8,
    /// Index register.
    pub index: u8,
    /// Mask: an opmask register (EVEX), or a vector register.
    pub mask: u8,
    /// EVEX form.
    pub evex: bool,
    /// log2 of a data element's size: 2 or 3.
    pub elem_log2: u8,
    /// log2 of an index's size: 2 or 3.
    pub index_log2: u8,
    /// log2 of the indexes' factor.
    pub scale: u8,
    /// Number of elements.
    pub count: u8,
    /// log2 of the data register's size.
    pub data_log2: u8,
    /// Segment register.
    pub segment: u8,
    /// Addresses are 32 bits wide.
    pub addr32: bool,
    /// MMU index.
    pub mmu_idx: u8,
}

impl Gather {
    /// As one word for a helper's argument.
    pub fn pack(self) -> u64 {
        u64::from(self.data)
            | u64::from(self.index) << 5
            | u64::from(self.mask) << 10
            | u64::from(self.evex) << 15
            | u64::from(self.elem_log2) << 16
            | u64::from(self.index_log2) << 18
            | u64::from(self.scale) << 20
            | u64::from(self.count) << 22
            | u64::from(self.data_log2) << 28
            | u64::from(self.segment) << 32
            | u64::from(self.addr32) << 36
            | u64::from(self.mmu_idx) << 40
    }

    fn unpack(w: u64) -> Gather {
        let field = |at: u32, bits: u32| (w >> at) as u8 & ((1 << bits) - 1) as u8;
        Gather {
            data: field(0, 5),
            index: field(5, 5),
            mask: field(10, 5),
            evex: field(15, 1) != 0,
            elem_log2: field(16, 2).clamp(2, 3),
            index_log2: field(18, 2).clamp(2, 3),
            scale: field(20, 2),
            count: field(22, 6).min(16),
            data_log2: field(28, 4).min(6),
            segment: field(32, 4).min(5),
            addr32: field(36, 1) != 0,
            mmu_idx: field(40, 8),
        }
    }

    fn is_active(self, env: &Env, n: usize) -> bool {
        if self.evex {
            return env.core.opmask[usize::from(self.mask & 7)] >> n & 1 != 0;
        }
        let top = ((n + 1) << self.elem_log2) - 1;
        env.core.vec[usize::from(self.mask)][top] >> 7 != 0
    }

    /// Marks element `n` as done.
    fn done(self, env: &mut Env, n: usize) {
        if self.evex {
            env.core.opmask[usize::from(self.mask & 7)] &= !(1 << n);
        } else {
            let at = n << self.elem_log2;
            env.core.vec[usize::from(self.mask)][at..at + (1 << self.elem_log2)].fill(0);
        }
    }

    /// Clears the whole mask, and the data register above its size, at the end.
    fn finish(self, env: &mut Env, clear_data: bool) {
        if self.evex {
            env.core.opmask[usize::from(self.mask & 7)] = 0;
        } else {
            env.core.vec[usize::from(self.mask)].fill(0);
        }
        if clear_data {
            // A destination narrower than the registers, and one with fewer elements than room.
            let used = (usize::from(self.count) << self.elem_log2).min(1 << self.data_log2);
            env.core.vec[usize::from(self.data)][used..].fill(0);
        }
    }

    /// Linear address of element `n`.
    fn address(self, env: &mut Env, base: u64, n: usize, access: u8) -> Result<u64, Exception> {
        let regs = &env.core.vec[usize::from(self.index)];
        let index = if self.index_log2 == 3 {
            u64::from_le_bytes(array(&regs[8 * n..]))
        } else {
            i32::from_le_bytes(array(&regs[4 * n..])) as u64
        };
        let mut offset = base.wrapping_add(index << self.scale);
        if self.addr32 {
            offset &= u64::from(u32::MAX);
        }
        let mode = Mode::from_bits_retain(env.core.mode);
        if mode.contains(Mode::CODE64) {
            let based = self.segment >= 4;
            let segment = if based { env.cpu.seg_base[usize::from(self.segment)] } else { 0 };
            return Ok(segment.wrapping_add(offset));
        }
        let what = u64::from(self.segment) << 8 | u64::from(access);
        let linear = seg_check(env, what, offset, 1 << self.elem_log2);
        if std::mem::take(&mut env.core.fault) != 0 {
            return Err(env.cpu.exception);
        }
        Ok(linear)
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut a = [0; N];
    a.copy_from_slice(&bytes[..N]);
    a
}

/// Gathers: `base` is the addresses' common part, `what` a [`Gather`]. Elements before one that faults
/// are done: loaded if they were active, their mask elements cleared.
pub extern "C" fn gather(env: *mut Env, base: u64, what: u64) -> u64 {
    // SAFETY: as in `get_xmm`.
    let env = unsafe { &mut *env };
    let g = Gather::unpack(what);
    let mut passed = 0u64;
    for n in 0..usize::from(g.count) {
        if !g.is_active(env, n) {
            passed |= 1 << n;
            continue;
        }
        let size = 1usize << g.elem_log2;
        let v = g.address(env, base, n, PTR_READ).and_then(|addr| env.read(addr, size, g.mmu_idx));
        match v {
            Ok(v) => {
                let at = n << g.elem_log2;
                env.core.vec[usize::from(g.data)][at..at + size]
                    .copy_from_slice(&v.to_le_bytes()[..size]);
                g.done(env, n);
            }
            Err(e) => {
                (0..n).filter(|n| passed >> n & 1 != 0).for_each(|n| g.done(env, n));
                return raise(env, e);
            }
        }
    }
    g.finish(env, true);
    0
}

/// Scatters; as [`gather`]. Elements are stored in order.
pub extern "C" fn scatter(env: *mut Env, base: u64, what: u64) -> u64 {
    // SAFETY: as in `get_xmm`.
    let env = unsafe { &mut *env };
    let g = Gather::unpack(what);
    for n in 0..usize::from(g.count) {
        if !g.is_active(env, n) {
            continue;
        }
        let size = 1usize << g.elem_log2;
        let at = n << g.elem_log2;
        let data = &env.core.vec[usize::from(g.data)][at..at + size];
        let mut v = [0; 8];
        v[..size].copy_from_slice(data);
        let done = g
            .address(env, base, n, PTR_WRITE)
            .and_then(|addr| env.write(addr, u64::from_le_bytes(v), size, g.mmu_idx));
        match done {
            Ok(()) => g.done(env, n),
            Err(e) => return raise(env, e),
        }
    }
    g.finish(env, false);
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::Bench;

    #[test]
    fn descriptions_survive_packing() {
        let m = Masked {
            log2: 6,
            elem_log2: 2,
            write: true,
            compressed: true,
            mmu_idx: 2,
            ..Masked::default()
        };
        assert_eq!(Masked::unpack(m.pack()), m);
        let g = Gather {
            data: 31,
            index: 17,
            mask: 7,
            evex: true,
            elem_log2: 3,
            index_log2: 2,
            scale: 3,
            count: 16,
            data_log2: 6,
            segment: 5,
            addr32: true,
            mmu_idx: 1,
        };
        assert_eq!(Gather::unpack(g.pack()), g);
    }

    #[test]
    fn active_elements() {
        let m = Masked { log2: 5, elem_log2: 2, ..Masked::default() };
        assert_eq!(m.active(0xff0f), 0x0f);
        assert_eq!(Masked { compressed: true, ..m }.active(0xa5), 0x0f);
        assert_eq!(Masked { repeated: true, log2: 2, ..m }.active(0x8000), 1);
        assert_eq!(Masked { repeated: true, ..m }.active(0), 0);
        assert_eq!(Masked { repeated: true, log2: 4, ..m }.active(0x120), 0b0011);
        assert_eq!(elements(0x8000_0000_0000_0101).collect::<Vec<_>>(), [0, 8, 63]);
        let bytes = Masked { log2: 6, elem_log2: 0, ..m };
        assert_eq!(bytes.active(u64::MAX), u64::MAX);
    }

    /// The first address that is not mapped in 64-bit mode on the bench.
    const END: u64 = 4 << 20;

    fn run(b: &mut Bench, m: Masked, addr: u64, bits: u64) -> Result<*mut u8, Exception> {
        let env = b.env();
        (env.cpu.masked_what, env.cpu.masked_bits) = (m.pack(), bits);
        env.core.bounce = 0;
        masked_pointer(env, addr).map(|p| p as *mut u8)
    }

    #[test]
    fn masked_off_elements_do_not_fault() {
        let mut b = Bench::new();
        b.long(0);
        b.poke(END - 16, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let m = Masked { log2: 5, elem_log2: 2, mmu_idx: 1, ..Masked::default() };
        // Eight elements, of which the first four exist.
        let p = run(&mut b, m, END - 16, 0b1101).unwrap();
        // SAFETY: the pointer is to 32 bytes, in memory or in the bounce buffer.
        let got = unsafe { std::slice::from_raw_parts(p, 16) };
        assert_eq!(
            (&got[..4], &got[8..]),
            (&[1, 2, 3, 4][..], &[9, 10, 11, 12, 13, 14, 15, 16][..])
        );
        let e = run(&mut b, m, END - 16, 0b10_0001).unwrap_err();
        assert_eq!((e.vector, e.addr), (14, Some(END + 4)));
        // Nothing is accessed under an empty mask.
        assert!(run(&mut b, m, 1 << 40, 0).is_ok());
        assert!(run(&mut b, Masked { write: true, ..m }, 1 << 40, 0).is_ok());
        assert_eq!(b.env().core.bounce, MASKED);
        assert!(masked_end(b.env()).is_ok());
    }

    #[test]
    fn flat_segments_end_at_4_gib_for_elements_too() {
        let mut b = Bench::new();
        b.protected(0);
        let m = Masked { log2: 5, elem_log2: 2, mmu_idx: 1, ..Masked::default() };
        let e = run(&mut b, m, 0xffff_fff0, 0x10).unwrap_err();
        assert_eq!((e.vector, e.addr), (vector::GP, Some(0xffff_fff0)));
        let e = run(&mut b, m, 0xffff_ffed, 0x10).unwrap_err();
        assert_eq!(e.vector, vector::GP);
        assert!(run(&mut b, m, 0xffff_fff0, 0x08).is_ok());
    }

    #[test]
    fn masked_stores_write_active_elements() {
        let mut b = Bench::new();
        b.long(0);
        let m = Masked { log2: 5, elem_log2: 3, write: true, mmu_idx: 1, ..Masked::default() };
        b.poke(END - 16, &[0xee; 16]);
        let p = run(&mut b, m, END - 16, 0b10).unwrap();
        // SAFETY: 32 bytes that the instruction may write.
        unsafe { std::ptr::write_bytes(p, 7, 32) };
        assert_eq!(b.env().core.bounce, MASKED);
        masked_end(b.env()).unwrap();
        assert_eq!(b.peek64(END - 16), 0xeeee_eeee_eeee_eeee);
        assert_eq!(b.peek64(END - 8), 0x0707_0707_0707_0707);
        // A fault comes before anything is written.
        let e = run(&mut b, m, END - 16, 0b111).unwrap_err();
        assert_eq!((e.vector, e.addr), (14, Some(END)));
    }
}
