//! Architectural state of one processor.

/// Number of general registers.
pub const GPRS: usize = 16;

/// Index of a general register, in encoding order.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Index of a segment register, in encoding order; LDTR and TR follow.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDTR: usize = 6;
    pub const TR: usize = 7;
}

/// A segment register with its hidden part (SDM vol. 3 §3.4.3). `attr` holds the descriptor's access
/// rights as VMX does (SDM vol. 3 §25.4.1): bits 0–3 type, 4 S, 5–6 DPL, 7 P, 12 AVL, 13 L, 14 D/B,
/// 15 G, 16 unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Access rights.
    pub attr: u32,
}

/// Segment attribute: system/code-data (1 = code or data).
pub const ATTR_S: u32 = 1 << 4;
/// Segment attribute: present.
pub const ATTR_P: u32 = 1 << 7;
/// Segment attribute: 64-bit code.
pub const ATTR_L: u32 = 1 << 13;
/// Segment attribute: default operation size / big.
pub const ATTR_DB: u32 = 1 << 14;
/// Segment attribute: limit in 4 KiB units.
pub const ATTR_G: u32 = 1 << 15;
/// Segment attribute: unusable (null selector loaded).
pub const ATTR_UNUSABLE: u32 = 1 << 16;

impl Segment {
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> 5 & 3) as u8
    }
    /// A flat code or data segment for direct boot: base 0, limit 4 GiB - 1.
    pub fn flat(selector: u16, attr: u32) -> Segment {
        Segment { selector, base: 0, limit: u32::MAX, attr }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableReg {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// x87, SSE, AVX and AVX-512 state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FpuState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word (TOP in bits 11–13).
    pub fsw: u16,
    /// x87 tag word, abridged: bit n set = physical register n is not empty.
    pub ftw: u8,
    /// Last x87 opcode.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// ST(0)–ST(7), 80-bit.
    pub st: [[u8; 10]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// ZMM0–31; XMM and YMM are their low parts.
    pub zmm: [[u8; 64]; 32],
    /// k0–k7.
    pub opmask: [u64; 8],
}

impl Default for FpuState {
    /// The state after RESET (SDM vol. 3 table 10-1).
    fn default() -> FpuState {
        FpuState {
            fcw: 0x40,
            fsw: 0,
            ftw: 0xff,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            zmm: [[0; 64]; 32],
            opmask: [0; 8],
        }
    }
}

/// Multi-processing state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MpState {
    /// Runs instructions.
    #[default]
    Runnable,
    /// In HLT.
    Halted,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
}

/// An event that was being delivered or is held back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PendingEvents {
    /// An exception that has been raised and not yet delivered: vector, error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// A maskable interrupt acknowledged but not yet delivered.
    pub interrupt: Option<u8>,
    /// NMI pending.
    pub nmi_pending: bool,
    /// NMIs blocked until IRET.
    pub nmi_masked: bool,
    /// Interrupts blocked for one instruction (STI or MOV SS).
    pub interrupt_shadow: bool,
}

/// Architectural state of one x86 processor. Names no accelerator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct X86State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15.
    pub gpr: [u64; GPRS],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS, bit 1 set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR (see [`seg`]).
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
    /// CR8 (task priority).
    pub cr8: u64,
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
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Floating-point and vector state.
    pub fpu: FpuState,
    /// Other MSRs: (index, value), in index order. When state is written, an MSR that is not listed
    /// takes its RESET value; but the TSC, not listed, counts on.
    pub msrs: Vec<(u32, u64)>,
    /// Multi-processing state.
    pub mp: MpState,
    /// Pending events.
    pub events: PendingEvents,
}

impl Default for X86State {
    /// The state after RESET (SDM vol. 3 §10.1.1), for the bootstrap processor.
    fn default() -> X86State {
        let data = Segment { selector: 0, base: 0, limit: 0xffff, attr: ATTR_P | ATTR_S | 3 };
        let mut s = [data; 8];
        s[seg::CS] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            attr: ATTR_P | ATTR_S | 0xb,
        };
        s[seg::LDTR] = Segment { selector: 0, base: 0, limit: 0xffff, attr: ATTR_P | 2 };
        s[seg::TR] = Segment { selector: 0, base: 0, limit: 0xffff, attr: ATTR_P | 0xb };
        X86State {
            gpr: [0; GPRS],
            rip: 0xfff0,
            rflags: 2,
            seg: s,
            gdtr: TableReg { base: 0, limit: 0xffff },
            idtr: TableReg { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            xcr0: 1,
            pkru: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            apic_base: 0xfee0_0900,
            fpu: FpuState::default(),
            msrs: Vec::new(),
            mp: MpState::Runnable,
            events: PendingEvents::default(),
        }
    }
}
