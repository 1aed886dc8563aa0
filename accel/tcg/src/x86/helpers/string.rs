//! String instructions: a bounded number of elements per call, page by page.
//!
//! A helper returns 1 if a repetition is not finished; generated code then leaves with RIP still at
//! the instruction, so that interrupts are taken, and comes back. After each element RCX, RSI and
//! RDI are as the architecture says (SDM vol. 2, REP), so that a fault is precise. Elements go
//! through host pointers where both pages are plain RAM, else one by one through the slow path.

use super::fault::misaligned;
use super::{raise, segment};
use crate::x86::Env;
use crate::x86::cpu::CcState;
use crate::x86::exception::Exception;
use crate::x86::flags::{self, CcKind};
use crate::x86::paging::Access;
use tandem_accel::x86::{gpr, seg};
use tandem_jit::ir::{PTR_READ, PTR_WRITE, Width};

const PAGE: u64 = 4096;
/// Most bytes that a call handles through host pointers.
const BULK: u64 = 256 << 10;
/// What an element on the slow path counts for in that budget.
const SLOW: u64 = 128;

/// What a string instruction's translation knows, packed into the helper's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Element width.
    pub width: Width,
    /// Address size.
    pub address: Width,
    /// Number of the source segment.
    pub source: u8,
    /// MMU index of the accesses.
    pub mmu_idx: u8,
    /// In 64-bit code.
    pub code64: bool,
    /// Accesses need segment checks.
    pub segmented: bool,
    /// RCX counts.
    pub repeat: bool,
    /// REPNE: SCAS and CMPS stop at the first equal pair, not the first different one.
    pub until_equal: bool,
    /// Alignment is checked.
    pub checked: bool,
    /// Something looks at the processor after each element: a single step, or watched data.
    pub single: bool,
}

fn width(code: u64) -> Width {
    match code & 3 {
        0 => Width::W8,
        1 => Width::W16,
        2 => Width::W32,
        _ => Width::W64,
    }
}

impl Info {
    /// As a helper argument.
    pub fn pack(self) -> u64 {
        self.width as u64
            | (self.address as u64) << 2
            | u64::from(self.source & 7) << 4
            | u64::from(self.mmu_idx & 15) << 8
            | u64::from(self.code64) << 12
            | u64::from(self.segmented) << 13
            | u64::from(self.repeat) << 14
            | u64::from(self.until_equal) << 15
            | u64::from(self.checked) << 16
            | u64::from(self.single) << 17
    }

    fn unpack(v: u64) -> Info {
        Info {
            width: width(v),
            address: width(v >> 2),
            source: (v >> 4 & 7).min(5) as u8,
            mmu_idx: (v >> 8 & 15) as u8,
            code64: v >> 12 & 1 != 0,
            segmented: v >> 13 & 1 != 0,
            repeat: v >> 14 & 1 != 0,
            until_equal: v >> 15 & 1 != 0,
            checked: v >> 16 & 1 != 0,
            single: v >> 17 & 1 != 0,
        }
    }
}

/// A string instruction under way.
struct Run<'a> {
    env: &'a mut Env,
    i: Info,
    size: u64,
    budget: u64,
}

impl<'a> Run<'a> {
    /// # Safety
    /// `env` is the `Env` that generated code passed to the helper that is running.
    unsafe fn new(env: *mut Env, info: u64) -> Run<'a> {
        let i = Info::unpack(info);
        // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
        let env = unsafe { &mut *env };
        let size = i.width.bytes().into();
        Run { env, i, size, budget: if i.single { size } else { BULK } }
    }

    fn get(&self, r: usize) -> u64 {
        self.env.cpu.gpr[r] & self.i.address.mask()
    }

    /// Writes a register at the address size.
    fn set(&mut self, r: usize, v: u64) {
        let m = self.i.address.mask();
        let g = &mut self.env.cpu.gpr[r];
        *g = if m == 0xffff { *g & !m | v & m } else { v & m };
    }

    /// Elements to do.
    fn count(&self) -> u64 {
        if self.i.repeat { self.get(gpr::RCX) } else { 1 }
    }

    fn forward(&self) -> bool {
        self.env.cpu.df as i64 >= 0
    }

    /// Linear address of the element at register `r` in segment `segment`.
    fn linear(&mut self, segment: usize, r: usize, access: u8) -> Result<u64, Exception> {
        let linear = self.linear_unaligned(segment, r, access)?;
        if self.i.checked && linear & (self.size - 1) != 0 {
            let write = access & PTR_WRITE != 0;
            return Err(misaligned(self.env, linear, self.size, write, self.i.mmu_idx));
        }
        Ok(linear)
    }

    fn linear_unaligned(&mut self, segment: usize, r: usize, access: u8) -> Result<u64, Exception> {
        let offset = self.get(r);
        if self.i.segmented {
            return segment::check(self.env, segment, access, offset, self.size);
        }
        if self.i.code64 {
            let based = segment == seg::FS || segment == seg::GS;
            let base = if based { self.env.cpu.seg_base[segment] } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        let base = self.env.cpu.seg_base[segment];
        Ok(base.wrapping_add(offset) & u64::from(u32::MAX))
    }

    /// Moves register `r` on by `n` elements.
    fn advance(&mut self, r: usize, n: u64) {
        let by = n.wrapping_mul(self.size);
        let v = self.env.cpu.gpr[r];
        self.set(r, if self.forward() { v.wrapping_add(by) } else { v.wrapping_sub(by) });
    }

    /// Counts `n` elements as done.
    fn done(&mut self, n: u64) {
        if self.i.repeat {
            let left = self.get(gpr::RCX).wrapping_sub(n);
            self.set(gpr::RCX, left);
        }
    }

    /// How many elements from `linear` on lie wholly in its page, in the direction of DF.
    fn in_page(&self, linear: u64) -> u64 {
        let at = linear % PAGE;
        if at + self.size > PAGE {
            0
        } else if self.forward() {
            (PAGE - at) / self.size
        } else {
            at / self.size + 1
        }
    }

    /// How many elements can be done from register `r` before its offset wraps.
    fn before_wrap(&self, r: usize) -> u64 {
        let at = self.get(r);
        if self.forward() {
            ((self.i.address.mask() - at) / self.size).saturating_add(1)
        } else {
            at / self.size + 1
        }
    }

    /// Elements that host pointers to the pages of these addresses can serve now. Segment limits
    /// are checked element by element.
    fn batch(&self, operands: &[(usize, u64)]) -> u64 {
        let most = if self.i.segmented { 1 } else { self.budget / self.size };
        operands
            .iter()
            .map(|&(r, linear)| self.in_page(linear).min(self.before_wrap(r)))
            .fold(most.min(self.count()), u64::min)
    }

    /// Host pointer for `access` at `linear`, if the page is plain RAM.
    fn host(&mut self, linear: u64, access: Access) -> Result<Option<*mut u8>, Exception> {
        self.env.host_page(linear, access, self.i.mmu_idx)
    }

    fn read(&mut self, linear: u64) -> Result<u64, Exception> {
        self.env.read(linear, self.size as usize, self.i.mmu_idx)
    }

    fn write(&mut self, linear: u64, v: u64) -> Result<(), Exception> {
        self.env.write(linear, v, self.size as usize, self.i.mmu_idx)
    }

    fn spend(&mut self, cost: u64) {
        self.budget = self.budget.saturating_sub(cost);
    }

    /// Whether to go on in this call.
    fn more(&self) -> bool {
        self.budget >= self.size && self.count() != 0
    }

    /// Runs `step` until the count or the budget is used up. `step` does some elements and says
    /// whether the repetition goes on.
    fn run(&mut self, mut step: impl FnMut(&mut Run) -> Result<bool, Exception>) -> u64 {
        self.env.cpu.mid_rep = false;
        while self.more() {
            match step(self) {
                Ok(true) if self.i.repeat => {}
                Ok(_) => return 0,
                Err(e) => return raise(self.env, e),
            }
        }
        self.env.cpu.mid_rep = self.i.repeat && self.count() != 0;
        u64::from(self.env.cpu.mid_rep)
    }

    /// The step from element to element on the host, in bytes.
    fn stride(&self) -> isize {
        if self.forward() { self.size as isize } else { -(self.size as isize) }
    }

    fn acc(&self) -> u64 {
        self.env.cpu.gpr[gpr::RAX] & self.i.width.mask()
    }

    fn set_compare(&mut self, a: u64, b: u64) {
        let op = flags::op(CcKind::Cmp, self.i.width);
        self.env.cpu.cc = CcState { op, dst: a, src: b, ..CcState::default() };
    }
}

/// Loads an element.
///
/// # Safety
/// `p` points to an element of width `w` in guest RAM.
unsafe fn load(p: *const u8, w: Width) -> u64 {
    // SAFETY: the caller's promise; unaligned reads of plain integers.
    unsafe {
        match w {
            Width::W8 => p.read().into(),
            Width::W16 => p.cast::<u16>().read_unaligned().into(),
            Width::W32 => p.cast::<u32>().read_unaligned().into(),
            Width::W64 => p.cast::<u64>().read_unaligned(),
        }
    }
}

/// Stores an element.
///
/// # Safety
/// `p` points to an element of width `w` in guest RAM.
unsafe fn store(p: *mut u8, w: Width, v: u64) {
    // SAFETY: the caller's promise; unaligned writes of plain integers.
    unsafe {
        match w {
            Width::W8 => p.write(v as u8),
            Width::W16 => p.cast::<u16>().write_unaligned(v as u16),
            Width::W32 => p.cast::<u32>().write_unaligned(v as u32),
            Width::W64 => p.cast::<u64>().write_unaligned(v),
        }
    }
}

/// Copies `n` elements on the host exactly as one after the other would be.
///
/// # Safety
/// `n` elements from `from` and `to` on, `stride` bytes apart, are accessible guest RAM.
unsafe fn copy(from: *const u8, to: *mut u8, n: u64, stride: isize, w: Width) {
    let len = n as usize * w.bytes() as usize;
    let ahead = (to as usize).wrapping_sub(from as usize);
    // SAFETY: the caller's promise covers every byte touched.
    unsafe {
        // Forward, and no element is read after it has been written.
        if stride > 0 && ahead >= len {
            std::ptr::copy(from, to, len);
            return;
        }
        for i in 0..n as isize {
            store(to.offset(i * stride), w, load(from.offset(i * stride), w));
        }
    }
}

/// MOVS.
pub extern "C" fn movs(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    let source = run.i.source as usize;
    run.run(|s| {
        let from = s.linear(source, gpr::RSI, PTR_READ)?;
        let to = s.linear(seg::ES, gpr::RDI, PTR_WRITE)?;
        let mut n = s.batch(&[(gpr::RSI, from), (gpr::RDI, to)]);
        let host = match n {
            0 => None,
            _ => match (s.host(from, Access::Read)?, s.host(to, Access::Write)?) {
                (Some(a), Some(b)) => Some((a, b)),
                _ => None,
            },
        };
        if let Some((a, b)) = host {
            // SAFETY: `batch` keeps all elements within the pages of the two host pointers.
            unsafe { copy(a, b, n, s.stride(), s.i.width) };
            s.spend(n * s.size);
        } else {
            n = 1;
            let v = s.read(from)?;
            s.write(to, v)?;
            s.spend(SLOW);
        }
        s.advance(gpr::RSI, n);
        s.advance(gpr::RDI, n);
        s.done(n);
        Ok(true)
    })
}

/// STOS.
pub extern "C" fn stos(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    run.run(|s| {
        let to = s.linear(seg::ES, gpr::RDI, PTR_WRITE)?;
        let v = s.acc();
        let mut n = s.batch(&[(gpr::RDI, to)]);
        let host = if n == 0 { None } else { s.host(to, Access::Write)? };
        if let Some(p) = host {
            let stride = s.stride();
            let bytes = v.to_le_bytes();
            let uniform = bytes[..s.size as usize].iter().all(|&b| b == bytes[0]);
            // SAFETY: `batch` keeps all elements within the page of the host pointer.
            unsafe {
                if uniform && stride > 0 {
                    std::ptr::write_bytes(p, bytes[0], (n * s.size) as usize);
                } else {
                    for i in 0..n as isize {
                        store(p.offset(i * stride), s.i.width, v);
                    }
                }
            }
            s.spend(n * s.size);
        } else {
            n = 1;
            s.write(to, v)?;
            s.spend(SLOW);
        }
        s.advance(gpr::RDI, n);
        s.done(n);
        Ok(true)
    })
}

/// LODS.
pub extern "C" fn lods(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    let source = run.i.source as usize;
    run.run(|s| {
        let from = s.linear(source, gpr::RSI, PTR_READ)?;
        let v = s.read(from)?;
        let acc = &mut s.env.cpu.gpr[gpr::RAX];
        let m = s.i.width.mask();
        *acc = if s.i.width == Width::W32 { v } else { *acc & !m | v & m };
        s.spend(s.size.max(16));
        s.advance(gpr::RSI, 1);
        s.done(1);
        Ok(true)
    })
}

/// SCAS.
pub extern "C" fn scas(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    run.run(|s| {
        let at = s.linear(seg::ES, gpr::RDI, PTR_READ)?;
        let a = s.acc();
        let n = s.batch(&[(gpr::RDI, at)]);
        let host = if n == 0 { None } else { s.host(at, Access::Read)? };
        let (b, n) = match host {
            Some(p) => {
                let (stride, w, stop) = (s.stride(), s.i.width, s.i.until_equal);
                let mut i = 0;
                loop {
                    // SAFETY: i < n, and `batch` keeps n elements within the page.
                    let b = unsafe { load(p.offset(i as isize * stride), w) };
                    i += 1;
                    if i == n || (a == b) == stop {
                        break (b, i);
                    }
                }
            }
            None => {
                s.spend(SLOW);
                (s.read(at)?, 1)
            }
        };
        s.spend(n * s.size);
        s.advance(gpr::RDI, n);
        s.done(n);
        s.set_compare(a, b);
        Ok((a == b) != s.i.until_equal)
    })
}

/// CMPS.
pub extern "C" fn cmps(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    let source = run.i.source as usize;
    run.run(|s| {
        let from = s.linear(source, gpr::RSI, PTR_READ)?;
        let at = s.linear(seg::ES, gpr::RDI, PTR_READ)?;
        let n = s.batch(&[(gpr::RSI, from), (gpr::RDI, at)]);
        let host = match n {
            0 => None,
            _ => match (s.host(from, Access::Read)?, s.host(at, Access::Read)?) {
                (Some(p), Some(q)) => Some((p, q)),
                _ => None,
            },
        };
        let (a, b, n) = match host {
            Some((p, q)) => {
                let (stride, w, stop) = (s.stride(), s.i.width, s.i.until_equal);
                let mut i = 0;
                loop {
                    let o = i as isize * stride;
                    // SAFETY: i < n, and `batch` keeps n elements within both pages.
                    let (a, b) = unsafe { (load(p.offset(o), w), load(q.offset(o), w)) };
                    i += 1;
                    if i == n || (a == b) == stop {
                        break (a, b, i);
                    }
                }
            }
            None => {
                s.spend(SLOW);
                let a = s.read(from)?;
                (a, s.read(at)?, 1)
            }
        };
        s.spend(n * s.size);
        s.advance(gpr::RSI, n);
        s.advance(gpr::RDI, n);
        s.done(n);
        s.set_compare(a, b);
        Ok((a == b) != s.i.until_equal)
    })
}

/// INS. Permission has been checked.
pub extern "C" fn ins(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    run.run(|s| {
        let to = s.linear(seg::ES, gpr::RDI, PTR_WRITE)?;
        // The port must not be read if the store then faults.
        s.env.probe_write(to, s.size, s.i.mmu_idx)?;
        let mut data = [0; 8];
        let port = s.env.cpu.gpr[gpr::RDX] as u16;
        s.env.vcpu().pio_read(port, &mut data[..s.size as usize]);
        s.write(to, u64::from_le_bytes(data))?;
        s.spend(SLOW);
        s.advance(gpr::RDI, 1);
        s.done(1);
        Ok(true)
    })
}

/// OUTS. Permission has been checked.
pub extern "C" fn outs(env: *mut Env, info: u64) -> u64 {
    // SAFETY: `env` is generated code's.
    let mut run = unsafe { Run::new(env, info) };
    let source = run.i.source as usize;
    run.run(|s| {
        let from = s.linear(source, gpr::RSI, PTR_READ)?;
        let v = s.read(from)?;
        let port = s.env.cpu.gpr[gpr::RDX] as u16;
        s.env.vcpu().pio_write(port, &v.to_le_bytes()[..s.size as usize]);
        s.env.follow_memory_map();
        s.spend(SLOW);
        s.advance(gpr::RSI, 1);
        s.done(1);
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::vector;
    use crate::x86::testing::{Bench, RAM};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tandem_accel::bus::BusDevice;

    const INFO: Info = Info {
        width: Width::W8,
        address: Width::W64,
        source: seg::DS as u8,
        mmu_idx: 0,
        code64: true,
        segmented: false,
        repeat: true,
        until_equal: false,
        checked: false,
        single: false,
    };

    /// A bench in 64-bit mode with these RCX, RSI and RDI.
    fn bench(rcx: u64, rsi: u64, rdi: u64) -> Bench {
        let mut b = Bench::new();
        b.long(3);
        let g = &mut b.env().cpu.gpr;
        (g[gpr::RCX], g[gpr::RSI], g[gpr::RDI]) = (rcx, rsi, rdi);
        b
    }

    fn registers(b: &mut Bench) -> (u64, u64, u64) {
        let g = &b.env().cpu.gpr;
        (g[gpr::RCX], g[gpr::RSI], g[gpr::RDI])
    }

    #[test]
    fn a_fault_shows_how_far_it_came() {
        // The destination runs out of mapped memory after 100 bytes.
        let mut b = bench(200, 0x10_0000, RAM - 100);
        b.poke(0x10_0000, &[7; 200]);
        assert_eq!(movs(b.env(), INFO.pack()), 0);
        assert_eq!(b.env().core.fault, 1);
        let e = b.env().cpu.exception;
        assert_eq!((e.vector, e.addr), (vector::PF, Some(RAM)));
        assert_eq!(registers(&mut b), (100, 0x10_0064, RAM));
        assert_eq!(b.peek32(RAM - 4), 0x0707_0707);
    }

    #[test]
    fn an_element_over_the_edge_writes_nothing() {
        let mut b = bench(3, 0x10_0000, RAM - 12);
        b.poke(0x10_0000, &[7; 24]);
        let info = Info { width: Width::W64, ..INFO };
        movs(b.env(), info.pack());
        assert_eq!(b.env().core.fault, 1);
        assert_eq!(registers(&mut b), (2, 0x10_0008, RAM - 4));
        assert_eq!(b.peek32(RAM - 4), 0);
    }

    #[test]
    fn long_repetitions_come_back_in_between() {
        let mut b = bench(1 << 20, 0x10_0000, 0x20_0000);
        b.poke(0x10_0000, &[9; 1 << 20]);
        let mut calls = 0;
        while movs(b.env(), INFO.pack()) == 1 {
            calls += 1;
            let (rcx, rsi, _) = registers(&mut b);
            assert_eq!(rcx + rsi, 0x20_0000);
            assert!(calls < 100);
        }
        assert!(calls > 1);
        assert_eq!(registers(&mut b), (0, 0x20_0000, 0x30_0000));
        assert_eq!(b.peek64(0x2f_fff8), 0x0909_0909_0909_0909);
    }

    #[test]
    fn elements_cross_pages_in_both_directions() {
        let data: Vec<u8> = (0..=255).collect();
        for down in [false, true] {
            let mut b = bench(32, 0x10_0f81, 0x20_0fc3);
            b.poke(0x10_0f81, &data);
            if down {
                b.env().cpu.df = u64::MAX;
                let g = &mut b.env().cpu.gpr;
                g[gpr::RSI] += 31 * 8;
                g[gpr::RDI] += 31 * 8;
            }
            let info = Info { width: Width::W64, ..INFO };
            assert_eq!(movs(b.env(), info.pack()), 0);
            assert_eq!(b.env().core.fault, 0);
            for i in 0..32 {
                let expect = u64::from_le_bytes(data[8 * i..8 * i + 8].try_into().unwrap());
                assert_eq!(b.peek64(0x20_0fc3 + 8 * i as u64), expect, "element {i}");
            }
        }
    }

    #[test]
    fn offsets_wrap_at_the_address_size() {
        let mut b = bench(0xabcd_0020, 0, 0x1234_fff0);
        b.env().cpu.gpr[gpr::RAX] = 0x55;
        let info = Info { address: Width::W16, ..INFO };
        assert_eq!(stos(b.env(), info.pack()), 0);
        // Only the low 16 bits of the registers count and change.
        assert_eq!(registers(&mut b), (0xabcd_0000, 0, 0x1234_0010));
        assert_eq!(b.peek32(0xfffc), 0x5555_5555);
        assert_eq!(b.peek32(0x000c), 0x5555_5555);
        assert_eq!(b.peek32(0x0010), 0);
    }

    #[test]
    fn an_overlap_repeats_the_pattern() {
        let mut b = bench(100, 0x10_0000, 0x10_0003);
        b.poke(0x10_0000, b"abc");
        movs(b.env(), INFO.pack());
        assert_eq!(b.peek32(0x10_0063).to_le_bytes(), *b"abca");
    }

    #[test]
    fn scans_stop_where_they_should() {
        let mut b = bench(500, 0, 0x10_0f00);
        b.poke(0x10_1010, &[0x42]);
        b.env().cpu.gpr[gpr::RAX] = 0x42;
        let info = Info { until_equal: true, ..INFO };
        assert_eq!(scas(b.env(), info.pack()), 0);
        assert_eq!(registers(&mut b), (500 - 0x111, 0, 0x10_1011));
        assert_ne!(b.env().eflags() & crate::x86::bits::rflags::ZF, 0);
    }

    /// Counts its reads.
    struct Counter(AtomicU32);
    impl BusDevice for Counter {
        fn read(&self, _: u64, data: &mut [u8]) {
            self.0.fetch_add(1, Ordering::Relaxed);
            data.fill(0xee);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn a_port_is_not_read_for_a_store_that_faults() {
        let mut b = bench(8, 0, RAM - 4);
        let device = Arc::new(Counter(AtomicU32::new(0)));
        b.bus.pio.insert("counter", 0x70, 1, device.clone()).unwrap();
        b.env().cpu.gpr[gpr::RDX] = 0x70;
        ins(b.env(), INFO.pack());
        assert_eq!(b.env().core.fault, 1);
        assert_eq!(device.0.load(Ordering::Relaxed), 4);
        assert_eq!(registers(&mut b), (4, 0, RAM));
        assert_eq!(b.peek32(RAM - 4), 0xeeee_eeee);
    }
}
