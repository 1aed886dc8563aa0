//! The tables of fixed form: RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG, HPET.

use super::board::{Board, Trigger};
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::{Aml, facs::FACS};

pub(super) const OEM_ID: [u8; 6] = *b"TANDEM";
pub(super) const OEM_TABLE: [u8; 8] = *b"TANDEMPC";
pub(super) const OEM_REVISION: u32 = 1;

pub(super) fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut t = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE, OEM_REVISION);
    t.append_slice(body);
    t.as_slice().to_vec()
}

/// Root system description pointer, revision 2 (§5.2.5.3).
pub fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    let mut b = Vec::with_capacity(36);
    b.extend(b"RSD PTR \0");
    b.extend(OEM_ID);
    b.push(2);
    b.extend((rsdt as u32).to_le_bytes());
    b.extend(36u32.to_le_bytes());
    b.extend(xsdt.to_le_bytes());
    b.extend([0; 4]);
    let sum = |b: &[u8]| b.iter().fold(0u8, |a, x| a.wrapping_sub(*x));
    b[8] = sum(&b[..20]);
    b[32] = sum(&b);
    b
}

/// Root system description table (§5.2.7); the addresses lie below 4 GiB.
pub fn rsdt(tables: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|a| (*a as u32).to_le_bytes()).collect();
    table(*b"RSDT", 1, &body)
}

/// Extended system description table (§5.2.8).
pub fn xsdt(tables: &[u64]) -> Vec<u8> {
    let body: Vec<u8> = tables.iter().flat_map(|a| a.to_le_bytes()).collect();
    table(*b"XSDT", 1, &body)
}

/// Firmware ACPI control structure (§5.2.10).
pub fn facs() -> Vec<u8> {
    let mut b = Vec::new();
    FACS::new().to_aml_bytes(&mut b);
    b
}

/// Feature flags of the FADT (§5.2.9, table 5.10).
fn feature_flags(board: &Board) -> u32 {
    const WBINVD: u32 = 1 << 0;
    const PROC_C1: u32 = 1 << 2;
    // "There is no fixed sleep button" and "RTC wake status is not a fixed register".
    const SLP_BUTTON: u32 = 1 << 5;
    const FIX_RTC: u32 = 1 << 6;
    const TMR_VAL_EXT: u32 = 1 << 8;
    const RESET_REG_SUP: u32 = 1 << 10;
    let mut flags = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC;
    if board.pm.timer_32bit {
        flags |= TMR_VAL_EXT;
    }
    if board.reset.is_some() {
        flags |= RESET_REG_SUP;
    }
    flags
}

/// IA-PC boot architecture flags (§5.2.9.3).
fn boot_flags(board: &Board) -> u16 {
    const LEGACY_DEVICES: u16 = 1 << 0;
    const I8042: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_RTC: u16 = 1 << 5;
    let mut flags = 0;
    for (on, bit) in [
        (!board.serial.is_empty() || board.i8042, LEGACY_DEVICES),
        (board.i8042, I8042),
        (!board.vga, NO_VGA),
        (!board.rtc, NO_RTC),
    ] {
        flags |= if on { bit } else { 0 };
    }
    flags
}

/// Fixed ACPI description table, revision 6 (§5.2.9).
pub fn fadt(board: &Board, facs: u64, dsdt: u64) -> Vec<u8> {
    let pm = &board.pm;
    let port = |port: u16, bits: u8| {
        let mut g = GenericAddress::io_port_address::<u8>(port);
        g.register_bit_width = bits;
        g.access_size = 0;
        g
    };
    let mut t = Sdt::new(*b"FACP", 276, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    t.write_u32(36, facs as u32);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, pm.sci);
    if let Some(smi) = &pm.smi {
        t.write_u32(48, smi.port.into());
        t.write_bytes(52, &[smi.enable, smi.disable]);
    }
    t.write_u32(56, pm.event.into());
    t.write_u32(64, pm.control.into());
    t.write_u32(76, pm.timer.into());
    t.write_u32(80, pm.gpe0.into());
    // Lengths of event, control, PM2, timer, GPE0.
    t.write_bytes(88, &[4, 2, 0, 4, pm.gpe0_len]);
    // C2 and C3 latencies that mean "not there".
    t.write_u16(96, 0xfff);
    t.write_u16(98, 0xfff);
    if board.rtc {
        t.write_u8(108, 0x32);
    }
    t.write_u16(109, boot_flags(board));
    t.write_u32(112, feature_flags(board));
    if let Some(r) = &board.reset {
        t.write(116, port(r.port, 8));
        t.write_u8(128, r.value);
    }
    t.write_u64(140, dsdt);
    t.write(148, port(pm.event, 32));
    t.write(172, port(pm.control, 16));
    t.write(208, port(pm.timer, 32));
    t.write(220, port(pm.gpe0, pm.gpe0_len.saturating_mul(8)));
    t.as_slice().to_vec()
}

/// Multiple APIC description table, revision 4 (§5.2.12).
pub fn madt(board: &Board) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut b = Vec::new();
    b.extend(board.local_apic.to_le_bytes());
    b.extend(PCAT_COMPAT.to_le_bytes());
    for cpu in &board.cpus {
        match (u8::try_from(cpu.uid), u8::try_from(cpu.apic_id)) {
            (Ok(uid), Ok(id)) if id < 255 && uid < 255 => {
                b.extend([0, 8, uid, id]);
                b.extend(ENABLED.to_le_bytes());
            }
            _ => {
                b.extend([9, 16, 0, 0]);
                b.extend(cpu.apic_id.to_le_bytes());
                b.extend(ENABLED.to_le_bytes());
                b.extend(cpu.uid.to_le_bytes());
            }
        }
    }
    let io = &board.io_apic;
    b.extend([1, 12, io.id, 0]);
    b.extend(io.address.to_le_bytes());
    b.extend(io.gsi_base.to_le_bytes());
    for o in &board.overrides {
        let flags: u16 = match o.trigger {
            Trigger::Conforming => 0,
            Trigger::LevelHigh => 0b1101,
            Trigger::LevelLow => 0b1111,
        };
        b.extend([2, 10, 0, o.irq]);
        b.extend(o.gsi.to_le_bytes());
        b.extend(flags.to_le_bytes());
    }
    // LINT1 is the NMI of every processor.
    b.extend([4, 6, 0xff, 0, 0, 1]);
    if board.cpus.iter().any(|c| c.apic_id >= 255 || c.uid >= 255) {
        b.extend([0x0a, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    table(*b"APIC", 4, &b)
}

/// Memory-mapped configuration space (PCI Firmware 3.3 §4.1.2).
pub fn mcfg(board: &Board) -> Option<Vec<u8>> {
    let pci = board.pci.as_ref()?;
    let mut b = vec![0; 8];
    b.extend(pci.ecam.to_le_bytes());
    b.extend([0, 0, 0, pci.last_bus, 0, 0, 0, 0]);
    Some(table(*b"MCFG", 1, &b))
}

/// High precision event timer (IA-PC HPET 1.0a §3.2.4).
pub fn hpet(board: &Board) -> Option<Vec<u8>> {
    let base = board.hpet?;
    let mut b = Vec::new();
    // Intel, legacy replacement, 64-bit counter, three comparators, revision 1.
    b.extend(0x8086_a201u32.to_le_bytes());
    // A memory address.
    b.extend([0, 64, 0, 0]);
    b.extend(base.to_le_bytes());
    // Number 0, minimum tick for periodic mode, no page protection.
    b.extend([0, 0x64, 0, 0]);
    Some(table(*b"HPET", 1, &b))
}
