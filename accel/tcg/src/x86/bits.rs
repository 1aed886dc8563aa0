//! Names of the bits of control registers, RFLAGS, EFER and debug registers (SDM vol. 3 §2).
#![allow(missing_docs)]

/// CR0.
pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// The bits that exist.
    pub const ALL: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

/// CR4.
pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// IA32_EFER.
pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const FFXSR: u64 = 1 << 14;
    pub const AUTOIBRS: u64 = 1 << 21;
}

/// RFLAGS.
pub mod rflags {
    pub const CF: u64 = 1;
    pub const ONE: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The status flags and DF: what any program may change.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
    /// The bits that exist and can be written.
    pub const ALL: u64 = ARITH | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// DR6.
pub mod dr6 {
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that read as 1.
    pub const FIXED: u64 = 0xffff_0ff0;
    /// Bits that can be written.
    pub const ALL: u64 = 0xf | BD | BS | BT;
}

/// DR7.
pub mod dr7 {
    /// Local enable bits.
    pub const LOCAL: u64 = 0x155;
    pub const GD: u64 = 1 << 13;
    /// Bits that read as 1.
    pub const FIXED: u64 = 1 << 10;
    /// Bits that can be written.
    pub const ALL: u64 = 0xffff_0000 | GD | 0x3ff;
}
