//! What CPUID promises the guest, in the form that system code asks for it on its hot paths.

use super::bits::{cr4, efer};
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::x86::model::XsaveLayout;

/// Bits of a page-table entry that may hold an address (SDM vol. 3 §4.5.4).
const ENTRY_ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Digest of a [`CpuidTable`].
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Features {
    /// Physical address bits that this processor lacks: reserved in page-table entries and CR3.
    pub phys_reserved: u64,
    /// CR4 bits that may be set.
    pub cr4: u64,
    /// EFER bits that may be set.
    pub efer: u64,
    /// XCR0 bits that may be set.
    pub xcr0: u64,
    /// CPUID.1:ECX.
    pub ecx1: u32,
    /// CPUID.1:EDX.
    pub edx1: u32,
    /// CPUID.7.0:EBX.
    pub ebx7: u32,
    /// CPUID.7.0:ECX.
    pub ecx7: u32,
    /// CPUID.7.0:EDX.
    pub edx7: u32,
    /// CPUID.8000_0001h:EDX.
    pub ext_edx: u32,
    /// CPUID.8000_0001h:ECX.
    pub ext_ecx: u32,
    /// CPUID.8000_0008h:EBX.
    pub ext8_ebx: u32,
    /// CPUID.0Dh.1:EAX.
    pub xsave: u32,
    /// Offsets of extended state components in the standard XSAVE format, by XCR0 bit.
    pub xsave_offsets: [u32; 10],
    /// Bit n: component n is aligned to 64 bytes in the compacted format.
    pub xsave_aligned: u32,
    /// CPUID.4000_0001h:EAX if leaf 4000_0000h carries KVM's signature, else 0.
    pub kvm: u32,
    /// Physical address width in bits.
    pub phys_bits: u8,
    /// The vendor is AMD (or Hygon): SYSCALL outside 64-bit mode, no SYSENTER in long mode, AMD's
    /// MSRs.
    pub amd: bool,
}

const fn has(word: u32, bit: u32) -> bool {
    word >> bit & 1 != 0
}

impl Features {
    /// The digest of `table`.
    pub fn of(table: &CpuidTable) -> Features {
        let r1 = table.query(1, 0);
        let r7 = table.query(7, 0);
        let e1 = table.query(0x8000_0001, 0);
        let e8 = table.query(0x8000_0008, 0);
        let xd0 = table.query(0xd, 0);
        let vendor = table.query(0, 0);
        // "Auth" and "Hygo" in EBX.
        let amd = matches!(vendor.ebx, 0x6874_7541 | 0x6f67_7948);
        let hv = table.query(0x4000_0000, 0);
        // "KVMKVMKVM\0\0\0".
        let kvm_here = (hv.ebx, hv.ecx, hv.edx) == (0x4b4d_564b, 0x564b_4d56, 0x4d);
        let phys_bits = match (e8.eax & 0xff) as u8 {
            0 => 36,
            n => n.clamp(32, 52),
        };
        let mut f = Features {
            phys_reserved: ENTRY_ADDR & !((1 << phys_bits) - 1),
            xcr0: u64::from(xd0.eax) | u64::from(xd0.edx) << 32,
            ecx1: r1.ecx,
            edx1: r1.edx,
            ebx7: r7.ebx,
            ecx7: r7.ecx,
            edx7: r7.edx,
            ext_edx: e1.edx,
            ext_ecx: e1.ecx,
            ext8_ebx: e8.ebx,
            xsave: table.query(0xd, 1).eax,
            kvm: if kvm_here { table.query(0x4000_0001, 0).eax } else { 0 },
            phys_bits,
            amd,
            ..Features::default()
        };
        let layout = XsaveLayout::of(table);
        for bit in 2..10 {
            if let Some(c) = layout.component(bit) {
                f.xsave_offsets[bit as usize] = c.offset;
                f.xsave_aligned |= u32::from(c.align) << bit;
            }
        }
        f.cr4 = f.cr4_allowed();
        f.efer = f.efer_allowed(has(table.query(0x8000_0021, 0).eax, 8));
        f
    }

    fn cr4_allowed(&self) -> u64 {
        let mut m = cr4::TSD | cr4::PCE;
        let mut add = |on: bool, bits: u64| {
            if on {
                m |= bits;
            }
        };
        add(has(self.edx1, 1), cr4::VME | cr4::PVI);
        add(has(self.edx1, 2), cr4::DE);
        add(has(self.edx1, 3), cr4::PSE);
        add(has(self.edx1, 6), cr4::PAE);
        add(has(self.edx1, 7), cr4::MCE);
        add(has(self.edx1, 13), cr4::PGE);
        add(has(self.edx1, 24), cr4::OSFXSR);
        add(has(self.edx1, 25), cr4::OSXMMEXCPT);
        add(has(self.ecx7, 2), cr4::UMIP);
        add(has(self.ecx7, 16), cr4::LA57);
        add(has(self.ebx7, 0), cr4::FSGSBASE);
        add(has(self.ecx1, 17), cr4::PCIDE);
        add(has(self.ecx1, 26), cr4::OSXSAVE);
        add(has(self.ebx7, 7), cr4::SMEP);
        add(has(self.ebx7, 20), cr4::SMAP);
        add(has(self.ecx7, 3), cr4::PKE);
        m
    }

    fn efer_allowed(&self, auto_ibrs: bool) -> u64 {
        let mut m = 0;
        for (on, bit) in [
            (has(self.ext_edx, 11), efer::SCE),
            (has(self.ext_edx, 29), efer::LME | efer::LMA),
            (has(self.ext_edx, 20), efer::NXE),
            (has(self.ext_edx, 25), efer::FFXSR),
            (auto_ibrs, efer::AUTOIBRS),
        ] {
            if on {
                m |= bit;
            }
        }
        m
    }

    /// 4 MiB pages reach beyond 4 GiB (PSE-36).
    pub fn pse36(&self) -> bool {
        has(self.edx1, 17)
    }
    /// 1 GiB pages.
    pub fn gbpages(&self) -> bool {
        has(self.ext_edx, 26)
    }
    /// Long mode.
    pub fn lm(&self) -> bool {
        has(self.ext_edx, 29)
    }
    /// x2APIC.
    pub fn x2apic(&self) -> bool {
        has(self.ecx1, 21)
    }
    /// TSC-deadline timer.
    pub fn tsc_deadline(&self) -> bool {
        has(self.ecx1, 24)
    }
    /// IA32_TSC_ADJUST.
    pub fn tsc_adjust(&self) -> bool {
        has(self.ebx7, 1)
    }
    /// IA32_TSC_AUX (RDTSCP or RDPID).
    pub fn tsc_aux(&self) -> bool {
        has(self.ext_edx, 27) || has(self.ecx7, 22)
    }
    /// A local APIC.
    pub fn apic(&self) -> bool {
        has(self.edx1, 9)
    }
}
