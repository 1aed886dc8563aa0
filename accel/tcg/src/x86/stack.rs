//! A stack that system code pushes to or pops from. The stack pointer is a copy until
//! [`Stack::commit`], so an instruction that faults half-way leaves it untouched.

use super::bits::efer;
use super::exception::{Exception, vector};
use super::seg::in_limit;
use super::{Cpu, Env};
use tandem_accel::x86::{ATTR_DB, ATTR_L, ATTR_UNUSABLE, Segment, gpr, seg};

/// A stack in use.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    seg: Segment,
    /// 64-bit mode: no segmentation.
    flat: bool,
    /// Stack pointer.
    pub sp: u64,
    mmu: u8,
    /// Error code of the #SS that a violation gives.
    error: u32,
}

impl Stack {
    /// The running code's stack.
    pub fn current(cpu: &Cpu) -> Stack {
        let flat = cpu.efer & efer::LMA != 0 && cpu.seg[seg::CS].attr & ATTR_L != 0;
        let mut s = cpu.seg[seg::SS];
        s.base = cpu.seg_base[seg::SS];
        Stack { seg: s, flat, sp: cpu.gpr[gpr::RSP], mmu: cpu.mmu_at(cpu.cpl()), error: 0 }
    }

    /// A stack that a transfer to privilege level `cpl` switches to. `error` is the error code of
    /// a stack fault on it.
    pub fn new(cpu: &Cpu, s: Segment, sp: u64, flat: bool, cpl: u8, error: u32) -> Stack {
        Stack { seg: s, flat, sp, mmu: cpu.mmu_at(cpl), error }
    }

    fn mask(&self) -> u64 {
        if self.flat {
            u64::MAX
        } else if self.seg.attr & ATTR_DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    fn address(&self, env: &Env, sp: u64, size: u64) -> Result<u64, Exception> {
        let fault = Exception::with_error(vector::SS, self.error);
        if self.flat {
            let last = sp.wrapping_add(size - 1);
            return if env.canonical(sp) && env.canonical(last) { Ok(sp) } else { Err(fault) };
        }
        let off = sp & self.mask();
        if self.seg.attr & ATTR_UNUSABLE != 0 || !in_limit(&self.seg, off, size) {
            return Err(fault);
        }
        Ok(env.cpu.linear(self.seg.base.wrapping_add(off)))
    }

    /// Pushes the low `size` (2, 4 or 8) bytes of `v`.
    pub fn push(&mut self, env: &mut Env, v: u64, size: u8) -> Result<(), Exception> {
        let sp = self.sp.wrapping_sub(size.into());
        let at = self.address(env, sp, size.into())?;
        env.write(at, v, size.into(), self.mmu)?;
        self.sp = sp;
        Ok(())
    }

    /// Pops `size` (2, 4 or 8) bytes.
    pub fn pop(&mut self, env: &mut Env, size: u8) -> Result<u64, Exception> {
        let at = self.address(env, self.sp, size.into())?;
        let v = env.read(at, size.into(), self.mmu)?;
        self.sp = self.sp.wrapping_add(size.into());
        Ok(v)
    }

    /// Skips `n` bytes upwards.
    pub fn skip(&mut self, n: u64) {
        self.sp = self.sp.wrapping_add(n);
    }

    /// Writes the stack pointer back: only the part that the stack's size covers.
    pub fn commit(&self, cpu: &mut Cpu) {
        let mask = self.mask();
        let keep = if mask == 0xffff { cpu.gpr[gpr::RSP] & !mask } else { 0 };
        cpu.gpr[gpr::RSP] = keep | self.sp & mask;
    }
}
