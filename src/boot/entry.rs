//! Processor state at a kernel's entry, for each way of entering.

use super::layout::{self, GDT};
use super::{Result, layout::write};
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, Segment, TableReg, X86State, gpr, seg,
};

/// Code segment selector; the number is the Linux boot protocol's __BOOT_CS.
const CODE: u16 = 0x10;
/// Data segment selector, __BOOT_DS.
const DATA: u16 = 0x18;
/// Task segment selector.
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Access rights of an accessed, readable code segment.
const CODE_RIGHTS: u32 = ATTR_P | ATTR_S | ATTR_G | 0xb;
/// Access rights of an accessed, writable data segment.
const DATA_RIGHTS: u32 = ATTR_P | ATTR_S | ATTR_G | ATTR_DB | 3;

/// The 8-byte descriptor of a segment (SDM vol. 3 §3.4.5).
fn descriptor(s: &Segment) -> u64 {
    let limit = u64::from(if s.attr & ATTR_G != 0 { s.limit >> 12 } else { s.limit });
    let attr = u64::from(s.attr);
    (limit & 0xffff)
        | ((s.base & 0xff_ffff) << 16)
        | ((attr & 0xff) << 40)
        | ((limit >> 16 & 0xf) << 48)
        | ((attr >> 12 & 0xf) << 52)
        | ((s.base >> 24 & 0xff) << 56)
}

/// Flat segments with this code segment, and the GDT that holds them.
fn flat_segments(ram: &GuestRam, code_attr: u32) -> Result<X86State> {
    let mut state = X86State::default();
    let code = Segment::flat(CODE, code_attr);
    let data = Segment::flat(DATA, DATA_RIGHTS);
    let task = Segment { selector: TASK, base: 0, limit: 0x67, attr: ATTR_P | 0xb };
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    write(ram, "the GDT", GDT, &bytes)?;
    state.seg[..6].fill(data);
    state.seg[seg::CS] = code;
    state.seg[seg::TR] = task;
    state.gdtr = TableReg { base: GDT, limit: bytes.len() as u16 - 1 };
    state.idtr = TableReg { base: 0, limit: 0 };
    Ok(state)
}

/// 64-bit mode with the first 4 GiB identity-mapped; RSI holds `arg` (Linux boot protocol §1.13).
pub fn long_mode(ram: &GuestRam, rip: u64, arg: u64) -> Result<X86State> {
    let mut state = flat_segments(ram, CODE_RIGHTS | ATTR_L)?;
    state.cr3 = layout::identity_page_tables(ram)?;
    state.cr4 = CR4_PAE;
    state.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    state.efer = EFER_LME | EFER_LMA;
    state.rip = rip;
    state.gpr[gpr::RSI] = arg;
    Ok(state)
}

/// 32-bit protected mode without paging; EAX and EBX as given.
pub fn protected_mode(ram: &GuestRam, eip: u32, eax: u32, ebx: u32) -> Result<X86State> {
    let mut state = flat_segments(ram, CODE_RIGHTS | ATTR_DB)?;
    state.cr0 = CR0_PE | CR0_ET;
    state.rip = eip.into();
    state.gpr[gpr::RAX] = eax.into();
    state.gpr[gpr::RBX] = ebx.into();
    Ok(state)
}

/// Real mode at 0:`ip`, with a stack that grows down from there.
pub fn real_mode(ip: u16) -> X86State {
    let mut state = X86State::default();
    state.seg[seg::CS].selector = 0;
    state.seg[seg::CS].base = 0;
    state.rip = ip.into();
    state.gpr[gpr::RSP] = ip.into();
    state.idtr = TableReg { base: 0, limit: 0x3ff };
    state.cr0 = CR0_ET;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&Segment::flat(0, CODE_RIGHTS | ATTR_L)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&Segment::flat(0, CODE_RIGHTS | ATTR_DB)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&Segment::flat(0, DATA_RIGHTS)), 0x00cf_9300_0000_ffff);
    }
}
