//! The CPU mode word: what a translation depends on besides the code bytes.
//!
//! Blocks are found by (physical address, RIP, CS base, mode). Code in a block may take every bit
//! of its mode word as a constant. [`Mode::of`] recomputes it after any change of the state it
//! summarises.

use super::Cpu;
use bitflags::bitflags;
use tandem_accel::x86::{ATTR_DB, ATTR_L, seg};

bitflags! {
    /// The mode word.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Mode: u32 {
        /// CPL, low bit.
        const CPL0 = 1;
        /// CPL, high bit.
        const CPL1 = 2;
        /// 64-bit code (EFER.LMA and CS.L).
        const CODE64 = 1 << 2;
        /// Default operand and address size is 32 (CS.D), outside 64-bit code.
        const CODE32 = 1 << 3;
        /// Stack pointer is ESP (SS.B); in 64-bit code RSP is used anyway.
        const SS32 = 1 << 4;
        /// CR0.PE.
        const PE = 1 << 5;
        /// EFLAGS.VM.
        const VM86 = 1 << 6;
        /// EFLAGS.TF: one instruction per block, then #DB.
        const TF = 1 << 7;
        /// Some of ES, CS, SS, DS has a base other than 0, or a limit other than 4 GiB - 1, or is
        /// not an ordinary present read-write (CS: readable) segment: accesses need segmentation.
        /// Never set in 64-bit code.
        const SEGMENTED = 1 << 8;
        /// CR0.EM or CR0.TS: x87 instructions raise #NM.
        const X87_NM = 1 << 9;
        /// CR0.EM: SSE instructions raise #UD. Also set if CR4.OSFXSR is clear.
        const SSE_UD = 1 << 10;
        /// CR0.TS: SSE and AVX instructions raise #NM.
        const SSE_NM = 1 << 11;
        /// AVX is enabled (CR4.OSXSAVE and XCR0 bits 1 and 2).
        const AVX = 1 << 12;
        /// AVX-512 is enabled (XCR0 bits 5–7 as well).
        const AVX512 = 1 << 13;
        /// Supervisor accesses to user pages fault (CR4.SMAP, CPL < 3, EFLAGS.AC clear).
        const SMAP = 1 << 14;
        /// Alignment checks are on (CR0.AM, EFLAGS.AC, CPL 3).
        const ALIGN_CHECK = 1 << 15;
        /// EFER.LMA.
        const LMA = 1 << 16;
        /// EFER.SCE.
        const SCE = 1 << 17;
        /// CR0.MP and CR0.TS: WAIT/FWAIT raises #NM.
        const WAIT_NM = 1 << 18;
        /// IOPL >= CPL outside V86 mode (or CPL 0): CLI, STI, IN, OUT need no further check.
        const IOPL_OK = 1 << 19;
        /// CR4.OSXSAVE.
        const OSXSAVE = 1 << 20;
        /// CR4.FSGSBASE.
        const FSGSBASE = 1 << 21;
        /// CR4.TSD and CPL > 0: RDTSC faults.
        const TSC_GP = 1 << 22;
        /// CR4.UMIP and CPL > 0: SGDT and friends fault.
        const UMIP = 1 << 23;
        /// An instruction breakpoint in DR7 is enabled: blocks check at each instruction.
        const BREAKPOINTS = 1 << 24;
        /// A data or I/O breakpoint in DR7 is enabled: one instruction per block, then a look at
        /// what it hit.
        const WATCH = 1 << 25;
        /// x87 exceptions are unmasked or pending: x87 instructions need helpers.
        const X87_CARE = 1 << 26;
        /// FS is not an ordinary present read-write segment of 4 GiB: accesses through it need checks
        /// where those through other segments need none. Never set in 64-bit code.
        const FS_LIMITED = 1 << 27;
        /// The same of GS.
        const GS_LIMITED = 1 << 28;
        /// CS has a base other than 0: code at the same RIP need not be the same code, so the jump cache
        /// does not know it. Never set in 64-bit code.
        const CS_BASED = 1 << 29;
        /// One guest instruction per block (a debugging option, not guest state).
        const ONE_INSN = 1 << 31;
    }
}

/// MMU index of user-mode accesses.
pub const MMU_USER: u8 = 0;
/// MMU index of supervisor accesses that may touch user pages (SMAP off, or AC set).
pub const MMU_KERNEL: u8 = 1;
/// MMU index of supervisor accesses under SMAP.
pub const MMU_KERNEL_SMAP: u8 = 2;

impl Mode {
    /// Current privilege level.
    pub fn cpl(self) -> u8 {
        (self.bits() & 3) as u8
    }
    /// The MMU index of explicit data accesses.
    pub fn mmu_idx(self) -> u8 {
        if self.cpl() == 3 {
            MMU_USER
        } else if self.contains(Mode::SMAP) {
            MMU_KERNEL_SMAP
        } else {
            MMU_KERNEL
        }
    }
    /// The mode word of this processor state.
    pub fn of(cpu: &Cpu) -> Mode {
        let mut m = Mode::empty();
        let (cr0, cr4) = (cpu.cr0, cpu.cr4);
        let vm86 = cpu.eflags & 1 << 17 != 0;
        let cpl = cpu.cpl();
        m |= Mode::from_bits_retain(cpl.into());
        let lma = cpu.efer & 1 << 10 != 0;
        m.set(Mode::LMA, lma);
        m.set(Mode::SCE, cpu.efer & 1 != 0);
        let cs = cpu.seg[seg::CS].attr;
        let code64 = lma && cs & ATTR_L != 0;
        m.set(Mode::CODE64, code64);
        m.set(Mode::CS_BASED, !code64 && cpu.seg_base[seg::CS] != 0);
        m.set(Mode::CODE32, !code64 && cs & ATTR_DB != 0);
        m.set(Mode::SS32, code64 || cpu.seg[seg::SS].attr & ATTR_DB != 0);
        m.set(Mode::FS_LIMITED, !code64 && cpu.limited(seg::FS));
        m.set(Mode::GS_LIMITED, !code64 && cpu.limited(seg::GS));
        m.set(Mode::PE, cr0 & 1 != 0);
        m.set(Mode::VM86, vm86);
        m.set(Mode::TF, cpu.eflags & 1 << 8 != 0);
        m.set(Mode::SEGMENTED, !code64 && cpu.segmented());
        m.set(Mode::X87_NM, cr0 & 0b1100 != 0);
        m.set(Mode::SSE_UD, cr0 & 0b0100 != 0 || cr4 & 1 << 9 == 0);
        m.set(Mode::SSE_NM, cr0 & 0b1000 != 0);
        m.set(Mode::WAIT_NM, cr0 & 0b1010 == 0b1010);
        let osxsave = cr4 & 1 << 18 != 0;
        m.set(Mode::OSXSAVE, osxsave);
        m.set(Mode::AVX, osxsave && cpu.xcr0 & 6 == 6);
        m.set(Mode::AVX512, osxsave && cpu.xcr0 & 0xe6 == 0xe6);
        let ac = cpu.eflags & 1 << 18 != 0;
        m.set(Mode::SMAP, cr4 & 1 << 21 != 0 && cpl < 3 && !ac && cr0 >> 31 & 1 != 0);
        m.set(Mode::ALIGN_CHECK, cr0 & 1 << 18 != 0 && ac && cpl == 3);
        let iopl = (cpu.eflags >> 12 & 3) as u8;
        m.set(Mode::IOPL_OK, cr0 & 1 == 0 || (!vm86 && cpl <= iopl));
        m.set(Mode::FSGSBASE, cr4 & 1 << 16 != 0);
        m.set(Mode::TSC_GP, cr4 & 4 != 0 && cpl > 0);
        m.set(Mode::UMIP, cr4 & 1 << 11 != 0 && cpl > 0);
        m.set(Mode::BREAKPOINTS, cpu.breakpoints(super::debug::Kind::Execute).next().is_some());
        m.set(Mode::WATCH, cpu.watches());
        m.set(Mode::X87_CARE, super::x87::image::needs_care(cpu));
        m
    }
}
