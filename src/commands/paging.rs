//! The guest's page tables, walked for somebody who looks at its memory (SDM vol. 3 chapter 5).
//! Nothing is marked as accessed.

use tandem_accel::x86::X86State;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Address bits of a table entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The physical address behind linear address `at`; `read` gives an entry of so many bytes at a
/// physical address. `None`: nothing is mapped there.
pub fn translate(
    state: &X86State,
    at: u64,
    read: impl Fn(u64, usize) -> Option<u64>,
) -> Option<u64> {
    if state.cr0 & CR0_PG == 0 {
        return Some(at & 0xffff_ffff);
    }
    if state.cr4 & CR4_PAE == 0 {
        return legacy(state, at & 0xffff_ffff, read);
    }
    let long = state.efer & EFER_LMA != 0;
    let levels = match long {
        true if state.cr4 & CR4_LA57 != 0 => 5,
        true => 4,
        false => 3,
    };
    let at = if long { at } else { at & 0xffff_ffff };
    let mut table = if long { state.cr3 & ADDRESS } else { state.cr3 & 0xffff_ffe0 };
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let bits = if !long && level == 3 { 3 } else { 0x1ff };
        let entry = read(table + (at >> shift & bits) * 8, 8).filter(|e| e & PRESENT != 0)?;
        let leaf = level == 1 || entry & LARGE != 0 && (level == 2 || level == 3 && long);
        if leaf {
            let offset = (1u64 << shift) - 1;
            return Some(entry & ADDRESS & !offset | at & offset);
        }
        table = entry & ADDRESS;
    }
    None
}

/// 32-bit paging.
fn legacy(state: &X86State, at: u64, read: impl Fn(u64, usize) -> Option<u64>) -> Option<u64> {
    let present = |e: &u64| e & PRESENT != 0;
    let directory = state.cr3 & 0xffff_f000;
    let entry = read(directory + (at >> 22) * 4, 4).filter(present)?;
    if entry & LARGE != 0 && state.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 13–20 are address bits 32–39.
        return Some(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32 | at & 0x3f_ffff);
    }
    let entry = read((entry & 0xffff_f000) + (at >> 12 & 0x3ff) * 4, 4).filter(present)?;
    Some(entry & 0xffff_f000 | at & 0xfff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn four_levels_with_large_pages() {
        let s = X86State {
            cr0: CR0_PG | 1,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LMA,
            ..X86State::default()
        };
        let entries: BTreeMap<u64, u64> = [
            (0x1000 + 511 * 8, 0x2003),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000, 0x4000_0083),
            (0x3008, 0x5003),
            (0x5000 + 8, 0x8000_0000_0000_7003),
        ]
        .into();
        let walk = |at| translate(&s, at, |p, _| entries.get(&p).copied());
        assert_eq!(walk(0xffff_ffff_8000_1234), Some(0x4000_1234));
        assert_eq!(walk(0xffff_ffff_8020_1fff), Some(0x7fff));
        assert_eq!(walk(0xffff_ffff_8020_2000), None);
        assert_eq!(walk(0), None);
    }

    #[test]
    fn no_paging_and_32_bit_paging() {
        let flat = X86State { cr0: 1, ..X86State::default() };
        assert_eq!(translate(&flat, 0x1_0000_0010, |_, _| None), Some(0x10));
        let s = X86State { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PSE, ..X86State::default() };
        let entries: BTreeMap<u64, u64> =
            [(0x1004, 0x2003), (0x2008, 0x9003), (0x1008, 0xc0_0000 | 0x2000 | 0x83)].into();
        let walk = |at| translate(&s, at, |p, _| entries.get(&p).copied());
        assert_eq!(walk(0x40_2123), Some(0x9123));
        assert_eq!(walk(0x80_0042), Some(0x1_00c0_0042));
        assert_eq!(walk(0), None);
    }
}
