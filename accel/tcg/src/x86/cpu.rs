//! Processor state of the x86 guest inside `Env`, and its table of globals.

use super::Env;
use super::exception::Exception;
use std::mem::offset_of;
use tandem_accel::x86::{Segment, TableReg};
use tandem_jit::ir::Global;
use tandem_jit::target::{GlobalClass, GlobalDesc};

/// Lazy condition codes: which operation set the arithmetic flags, and with what. How the fields
/// combine is in [`super::flags`], which is the only reader of their meaning.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct CcState {
    /// Operation word: the last operation that set all six flags, and what has been overridden
    /// since.
    pub op: u64,
    /// Its result.
    pub dst: u64,
    /// Its source operand, or a flags image.
    pub src: u64,
    /// Its third value (carry in, count).
    pub src2: u64,
    /// Result of the last INC or DEC after it.
    pub inc: u64,
    /// CF (bit 0) and OF (bit 11), as set by a later operation that touches only those.
    pub over: u64,
    /// OF (bit 0), as set by a later operation that touches only that.
    pub over_of: u64,
}

/// The processor.
#[repr(C)]
pub struct Cpu {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer (not linear: relative to CS base). In 16/32-bit code the upper bits are
    /// zero.
    pub rip: u64,
    /// Lazy condition codes.
    pub cc: CcState,
    /// Direction for string instructions: 1 or -1 (as u64).
    pub df: u64,
    /// Bases of ES, CS, SS, DS, FS, GS. These, not `seg[i].base`, are the truth while running.
    pub seg_base: [u64; 6],
    /// RFLAGS apart from the six arithmetic flags and DF: IF, TF, IOPL, NT, RF, VM, AC, VIF, VIP, ID.
    /// Bit 1 is set.
    pub eflags: u64,
    /// Segment registers ES, CS, SS, DS, FS, GS, LDTR, TR with hidden parts.
    pub seg: [Segment; 8],
    /// GDTR.
    pub gdtr: TableReg,
    /// IDTR.
    pub idtr: TableReg,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// PKRU.
    pub pkru: u32,
    /// DR0–DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// x87 registers by physical number, 80 bits in 16 bytes.
    pub fpr: [[u8; 16]; 8],
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word without TOP.
    pub fsw: u16,
    /// TOP, 0–7.
    pub ftop: u32,
    /// Bit n set: physical x87 register n is empty.
    pub ftag_empty: u8,
    /// x87 instructions go to helpers although no exception is unmasked (see [`super::x87::image`]).
    pub x87_care: bool,
    /// Last x87 opcode, instruction and data pointers.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// Code segment of the last x87 instruction. Like `fds` not part of saved states, where the
    /// pointers have 64 bits.
    pub fcs: u16,
    /// Segment of the last x87 memory operand.
    pub fds: u16,
    /// The masked vector operand being accessed, packed, and its mask bits
    /// ([`super::helpers::vector::Masked`]).
    pub masked_what: u64,
    /// See `masked_what`.
    pub masked_bits: u64,
    /// The fault that a helper raised (valid when `core.fault` is set).
    pub exception: Exception,
    /// In HLT.
    pub halted: bool,
    /// After INIT, waiting for a start-up IPI.
    pub wait_sipi: bool,
    /// Interrupts are held back until the next instruction has completed (a shadow that ran over a
    /// block's end).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// What the guest has added to the TSC (through WRMSR to it or to IA32_TSC_ADJUST).
    pub tsc_offset: u64,
    /// MSRs that only hold their value, and those of system calls.
    pub msrs: super::msr::Msrs,
    /// CR8 where there is no local APIC to hold it.
    pub cr8: u8,
    /// Shut down by a triple fault.
    pub shutdown: bool,
    /// An event of a loaded state that is yet to be delivered.
    pub injected: super::state::Injected,
    /// Digest of what CPUID promises.
    pub feat: super::features::Features,
    /// The PDPTEs of PAE paging (SDM vol. 3 §4.4.1), valid if `pdpte_valid`.
    pub pdpte: [u64; 4],
    /// Cleared when state was loaded from outside: the next walk reads the PDPTEs.
    pub pdpte_valid: bool,
    /// Protection keys of user pages that were translated since all TLBs were last emptied.
    pub pkeys_seen: u16,
    /// DR6 bits of data and I/O breakpoints that the last instruction hit.
    pub pending_debug: u64,
    /// The next instruction follows a load of SS: it triggers no instruction breakpoint.
    pub after_ss: bool,
    /// A repeated string instruction has come back in the middle; it is what RIP points to.
    pub mid_rep: bool,
    /// Where large pages were translated.
    pub large_pages: super::paging::LargePages,
}

macro_rules! globals {
    ($( $name:ident $text:literal $off:expr, $class:expr, $hint:expr; )*) => {
        /// Numbers of the globals.
        #[allow(missing_docs)]
        pub mod global {
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
            #[repr(u8)]
            enum Number { $( $name, )* }
            $( pub const $name: super::Global = super::Global(Number::$name as u8); )*
        }
        /// The table of globals for the compiler.
        pub fn globals() -> Vec<GlobalDesc> {
            vec![ $( GlobalDesc {
                name: $text,
                offset: (offset_of!(Env, cpu) + $off) as u32,
                class: $class,
                x86_hint: $hint,
            }, )* ]
        }
    };
}

const fn reg(n: usize) -> usize {
    offset_of!(Cpu, gpr) + 8 * n
}
const fn segb(n: usize) -> usize {
    offset_of!(Cpu, seg_base) + 8 * n
}
const fn pin(n: u8) -> GlobalClass {
    GlobalClass::Pinned(n)
}
const M: GlobalClass = GlobalClass::Memory;

// RAX..R15 must stay numbers 0..15. Pin priorities follow how often compilers use a register.
globals! {
    RAX "rax" reg(0), pin(0), Some(0);
    RCX "rcx" reg(1), pin(2), Some(1);
    RDX "rdx" reg(2), pin(1), Some(2);
    RBX "rbx" reg(3), pin(6), Some(3);
    RSP "rsp" reg(4), pin(3), None;
    RBP "rbp" reg(5), pin(7), Some(5);
    RSI "rsi" reg(6), pin(5), Some(6);
    RDI "rdi" reg(7), pin(4), Some(7);
    R8 "r8" reg(8), pin(8), Some(8);
    R9 "r9" reg(9), pin(11), Some(9);
    R10 "r10" reg(10), pin(14), Some(10);
    R11 "r11" reg(11), pin(15), Some(11);
    R12 "r12" reg(12), pin(9), Some(12);
    R13 "r13" reg(13), pin(10), Some(13);
    R14 "r14" reg(14), pin(12), Some(14);
    R15 "r15" reg(15), pin(13), Some(15);
    RIP "rip" offset_of!(Cpu, rip), M, None;
    CC_OP "cc_op" offset_of!(Cpu, cc.op), M, None;
    CC_DST "cc_dst" offset_of!(Cpu, cc.dst), M, None;
    CC_SRC "cc_src" offset_of!(Cpu, cc.src), M, None;
    CC_SRC2 "cc_src2" offset_of!(Cpu, cc.src2), M, None;
    CC_INC "cc_inc" offset_of!(Cpu, cc.inc), M, None;
    CC_OVER "cc_over" offset_of!(Cpu, cc.over), M, None;
    CC_OVER_OF "cc_over_of" offset_of!(Cpu, cc.over_of), M, None;
    DF "df" offset_of!(Cpu, df), M, None;
    ES_BASE "es_base" segb(0), M, None;
    CS_BASE "cs_base" segb(1), M, None;
    SS_BASE "ss_base" segb(2), M, None;
    DS_BASE "ds_base" segb(3), M, None;
    FS_BASE "fs_base" segb(4), M, None;
    GS_BASE "gs_base" segb(5), M, None;
}

impl Cpu {
    /// Current privilege level: CS.DPL's place in the hidden part is SS.DPL (SDM vol. 3 §5.5); 0 in
    /// real mode, 3 in V86 mode.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & 1 == 0 {
            0
        } else if self.eflags & 1 << 17 != 0 {
            3
        } else {
            self.seg[tandem_accel::x86::seg::SS].dpl()
        }
    }

    /// Whether accesses need segmentation (see [`super::mode::Mode::SEGMENTED`]).
    pub fn segmented(&self) -> bool {
        use tandem_accel::x86::seg;
        [seg::ES, seg::CS, seg::SS, seg::DS]
            .iter()
            .any(|&i| self.seg_base[i] != 0 || self.limited(i))
    }

    /// Whether segment `i` is not an ordinary present read-write (CS: readable) segment of 4 GiB,
    /// wherever it starts.
    pub fn limited(&self, i: usize) -> bool {
        use tandem_accel::x86::{ATTR_P, ATTR_S, ATTR_UNUSABLE, seg};
        let s = &self.seg[i];
        // Data: writable, expand up. Code: readable.
        let ty = s.attr & 0xf;
        let plain = if ty & 8 != 0 { ty & 2 != 0 && i == seg::CS } else { ty & 6 == 2 };
        s.limit != u32::MAX
            || s.attr & (ATTR_P | ATTR_S | ATTR_UNUSABLE) != ATTR_P | ATTR_S
            || !plain
    }
}

impl Env {
    /// The vCPU's outside world.
    pub fn vcpu(&self) -> &crate::exec::Vcpu {
        // SAFETY: the execution loop sets the pointer before code or helpers run and keeps the
        // Vcpu alive and unmoved for as long; nobody holds a unique reference meanwhile.
        unsafe { &*self.core.vcpu.cast::<crate::exec::Vcpu>() }
    }
}
