//! Devices in the name space that no bus enumerates: those behind the LPC bridge, the HPET, and the
//! processors.

use super::board::Board;
use super::description::{Raw, resources};
use acpi_tables::aml::{
    Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    Interrupt, Memory32Fixed, Name, OpRegion, OpRegionSpace, Path,
};
use acpi_tables::{Aml, AmlSink};

/// IRQ descriptor without flags (§6.4.2.1): one edge-triggered, active-high ISA IRQ.
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 0xf));
    }
}

fn ports(base: u16, len: u8) -> Raw {
    Raw::of(&IO::new(base, base, 1, len))
}

fn isa(name: &str, hid: &str, uid: u8, res: &[Raw]) -> Raw {
    Raw::of(&Device::new(
        Path::new(name),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &uid),
            // Present, enabled, shown, working.
            &Name::new("_STA".into(), &0x0fu8),
            &Name::new("_CRS".into(), &resources(res)),
        ],
    ))
}

/// The LPC bridge at 00:1f.0, with its routing registers and the ISA devices.
pub(super) fn lpc(board: &Board) -> Raw {
    let named = |n: &[u8; 4]| FieldEntry::Named(*n, 8);
    let mut c = vec![
        Raw::of(&Name::new("_ADR".into(), &0x001f_0000u32)),
        Raw::of(&OpRegion::new("PIRQ".into(), OpRegionSpace::PCIConfig, &0x60u8, &0x0cu8)),
        Raw::of(&Field::new(
            "PIRQ".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::Preserve,
            vec![
                named(b"PRQA"),
                named(b"PRQB"),
                named(b"PRQC"),
                named(b"PRQD"),
                FieldEntry::Reserved(32),
                named(b"PRQE"),
                named(b"PRQF"),
                named(b"PRQG"),
                named(b"PRQH"),
            ],
        )),
    ];
    c.extend(ports_and_lines(board));
    Raw::of(&Device::new("LPC_".into(), c.iter().map(|r| r as &dyn Aml).collect()))
}

/// The devices at fixed ports with ISA IRQs.
pub(super) fn ports_and_lines(board: &Board) -> Vec<Raw> {
    let mut c = Vec::new();
    if board.rtc {
        c.push(isa("RTC_", "PNP0B00", 0, &[ports(0x70, 2), Raw::of(&IsaIrq(8))]));
    }
    if board.i8042 {
        let keyboard = [ports(0x60, 1), ports(0x64, 1), Raw::of(&IsaIrq(1))];
        c.push(isa("KBD_", "PNP0303", 0, &keyboard));
        c.push(isa("MOU_", "PNP0F13", 0, &[Raw::of(&IsaIrq(12))]));
    }
    for (i, s) in board.serial.iter().take(4).enumerate() {
        let res = [ports(s.port, 8), Raw::of(&IsaIrq(s.irq))];
        c.push(isa(&format!("COM{}", i + 1), "PNP0501", i as u8 + 1, &res));
    }
    if let Some(port) = board.pvpanic {
        c.push(Raw::of(&Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new("_STA".into(), &0x0fu8),
                &Name::new("_CRS".into(), &resources(&[ports(port, 1)])),
            ],
        )));
    }
    c
}

/// Virtio registers in memory (Linux's ID for them).
pub(super) fn virtio_mmio(board: &Board) -> Vec<Raw> {
    let one = |(i, v): (usize, &super::board::VirtioMmio)| {
        let registers = Raw::of(&Memory32Fixed::new(true, v.base, v.len));
        let line = Raw::of(&Interrupt::new(true, false, false, true, v.gsi));
        Raw::of(&Device::new(
            Path::new(&format!("VR{i:02X}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(i as u8)),
                &Name::new("_CRS".into(), &resources(&[registers, line])),
            ],
        ))
    };
    board.virtio_mmio.iter().take(0x100).enumerate().map(one).collect()
}

/// The HPET.
pub(super) fn hpet(board: &Board) -> Option<Raw> {
    let base = u32::try_from(board.hpet?).ok()?;
    let registers = Raw::of(&Memory32Fixed::new(false, base, 0x400));
    Some(isa("HPET", "PNP0103", 0, &[registers]))
}

/// The processors, tied to the interrupt controller table by UID.
pub(super) fn processors(board: &Board) -> Vec<Raw> {
    let one = |(i, cpu): (usize, &super::board::Cpu)| {
        Raw::of(&Device::new(
            Path::new(&format!("C{:03X}", i & 0xfff)),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &cpu.uid)],
        ))
    };
    board.cpus.iter().take(0x1000).enumerate().map(one).collect()
}
