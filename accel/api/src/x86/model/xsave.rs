//! The layout of the XSAVE area (SDM vol. 1 §13.4): which component lies where, in the standard
//! and in the compacted format.
//!
//! Offsets in the standard format differ between vendors, and XSAVE executed by silicon uses the
//! silicon's; so a layout is always read from an accelerator's CPUID leaf Dh, and falls back to
//! Intel's for an accelerator that states none.

use super::super::cpuid::{CpuidTable, Regs};

/// Legacy region and header.
const FIRST: u32 = 512 + 64;

/// A component of extended state beyond x87 and SSE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct XsaveComponent {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Size in bytes.
    pub size: u32,
    /// Offset from the area's start in the standard format.
    pub offset: u32,
    /// Whether it is aligned to 64 bytes in the compacted format.
    pub align: bool,
}

/// XCR0: x87.
pub(super) const X87: u64 = 1 << 0;
/// XCR0: SSE.
pub(super) const SSE: u64 = 1 << 1;
/// XCR0: AVX (upper halves of YMM).
pub(super) const AVX: u64 = 1 << 2;
/// XCR0: opmask, upper halves of ZMM0–15, ZMM16–31.
pub(super) const AVX512: u64 = 7 << 5;
/// XCR0: PKRU.
pub(super) const PKRU: u64 = 1 << 9;

const fn component(bit: u32, size: u32, offset: u32, align: bool) -> XsaveComponent {
    XsaveComponent { bit, size, offset, align }
}

/// Intel's layout (SDM vol. 1 §13.5; offsets as of Skylake-SP).
const DEFAULT: [XsaveComponent; 5] = [
    component(2, 256, 576, false),
    component(5, 64, 1088, false),
    component(6, 512, 1152, false),
    component(7, 1024, 1664, false),
    component(9, 8, 2688, false),
];

/// Where the components of extended state lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct XsaveLayout {
    components: Vec<XsaveComponent>,
}

impl XsaveLayout {
    /// The layout that leaf Dh of `table` describes. Components it does not describe are placed as
    /// Intel does.
    pub fn of(table: &CpuidTable) -> XsaveLayout {
        let components = DEFAULT
            .iter()
            .map(|d| match table.get(0xd, d.bit) {
                Some(r) if r.eax == d.size && r.ebx >= FIRST && r.ebx < 0x1_0000 => {
                    component(d.bit, r.eax, r.ebx, r.ecx & 2 != 0)
                }
                _ => *d,
            })
            .collect();
        XsaveLayout { components }
    }

    /// The component of this XCR0 bit (2, 5, 6, 7 or 9).
    pub fn component(&self, bit: u32) -> Option<XsaveComponent> {
        self.components.iter().find(|c| c.bit == bit).copied()
    }

    fn selected(&self, mask: u64) -> impl Iterator<Item = &XsaveComponent> {
        self.components.iter().filter(move |c| mask >> c.bit & 1 != 0)
    }

    /// Bytes of an area in the standard format for the components in `mask` (an XCR0 value).
    pub fn standard_size(&self, mask: u64) -> u32 {
        self.selected(mask).map(|c| c.offset + c.size).max().unwrap_or(FIRST).max(FIRST)
    }

    /// Offset of component `bit` in the compacted format for the components in `mask`, which is
    /// the low part of XCOMP_BV. With a `bit` beyond all components, the area's size.
    fn compacted_end(&self, mask: u64, bit: u32) -> u32 {
        let mut at = FIRST;
        for c in self.selected(mask) {
            if c.align {
                at = at.next_multiple_of(64);
            }
            if c.bit >= bit {
                break;
            }
            at += c.size;
        }
        at
    }

    /// Bytes of an area in the compacted format for the components in `mask` (XCR0 | IA32_XSS).
    pub fn compacted_size(&self, mask: u64) -> u32 {
        self.compacted_end(mask, u32::MAX)
    }

    /// Offset of component `bit` in the compacted format; `None` if `mask` lacks it.
    pub fn compacted_offset(&self, mask: u64, bit: u32) -> Option<u32> {
        self.component(bit).filter(|_| mask >> bit & 1 != 0)?;
        Some(self.compacted_end(mask, bit))
    }

    /// Leaf Dh for a guest that may set `xcr0`, with `eax1` as the feature bits of subleaf 1. EBX of
    /// subleaves 0 and 1 depends on the current XCR0 and IA32_XSS; here they are those of RESET,
    /// and the accelerator keeps them current.
    pub(super) fn leaves(&self, t: &mut CpuidTable, xcr0: u64, eax1: u32) {
        let size = self.standard_size(xcr0);
        t.set_sub(
            0xd,
            0,
            Regs { eax: xcr0 as u32, ebx: FIRST, ecx: size, edx: (xcr0 >> 32) as u32 },
        );
        t.set_sub(0xd, 1, Regs { eax: eax1, ebx: FIRST, ecx: 0, edx: 0 });
        for c in self.selected(xcr0) {
            let ecx = if c.align { 2 } else { 0 };
            t.set_sub(0xd, c.bit, Regs { eax: c.size, ebx: c.offset, ecx, edx: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_both_formats() {
        let l = XsaveLayout::of(&CpuidTable::default());
        assert_eq!(l.standard_size(X87 | SSE), 576);
        assert_eq!(l.standard_size(X87 | SSE | AVX), 832);
        assert_eq!(l.standard_size(X87 | SSE | AVX | AVX512 | PKRU), 2696);
        assert_eq!(l.compacted_size(X87 | SSE | AVX | AVX512), 576 + 256 + 64 + 512 + 1024);
        assert_eq!(l.compacted_offset(X87 | SSE | PKRU, 9), Some(576));
        assert_eq!(l.compacted_offset(X87 | SSE | AVX | AVX512, 6), Some(576 + 256 + 64));
        assert_eq!(l.compacted_offset(X87, 2), None);
    }

    #[test]
    fn the_accelerators_offsets_win() {
        let mut t = CpuidTable::default();
        t.set_sub(0xd, 9, Regs { eax: 8, ebx: 2432, ecx: 2, edx: 0 });
        let l = XsaveLayout::of(&t);
        assert_eq!(l.component(9).unwrap().offset, 2432);
        assert_eq!(l.compacted_offset(AVX512 | PKRU, 9), Some(576 + 1600));
    }
}
