//! The differentiated system description table: the name space of the board.

use super::board::{Board, PciRoot};
use super::system::{OEM_ID, OEM_REVISION, OEM_TABLE};
use super::{devices, routing};
use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else,
    Equal, IO, If, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid,
};
use acpi_tables::sdt::Sdt;

/// AML made elsewhere.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

impl Raw {
    pub(super) fn of(a: &dyn Aml) -> Raw {
        let mut b = Vec::new();
        a.to_aml_bytes(&mut b);
        Raw(b)
    }
}

/// A resource template of these descriptors.
pub(super) fn resources(list: &[Raw]) -> Raw {
    Raw::of(&ResourceTemplate::new(list.iter().map(|r| r as &dyn Aml).collect()))
}

/// The table, revision 2 (§5.2.11.1): 64-bit integers.
pub fn dsdt(board: &Board) -> Vec<u8> {
    let mut body = Vec::new();
    let mut put = |a: &dyn Aml| a.to_aml_bytes(&mut body);
    routing::interrupt_model(&mut put);
    let mut system: Vec<Raw> = Vec::new();
    if let Some(pci) = &board.pci {
        system.push(pci_root(board, pci));
        system.extend(routing::links());
        system.push(reserved_ecam(pci));
    } else {
        system.extend(devices::ports_and_lines(board));
    }
    system.extend(devices::virtio_mmio(board));
    system.extend(devices::hpet(board));
    system.extend(devices::processors(board));
    put(&Scope::new("\\_SB_".into(), system.iter().map(|r| r as &dyn Aml).collect()));
    let s5 = board.pm.s5;
    put(&Name::new("\\_S5_".into(), &Package::new(vec![&s5, &s5, &0u8, &0u8])));
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    t.append_slice(&body);
    t.as_slice().to_vec()
}

/// The host bridge, with what hangs below it.
fn pci_root(board: &Board, pci: &PciRoot) -> Raw {
    let mut c: Vec<Raw> = vec![
        Raw::of(&Name::new("_HID".into(), &EISAName::new("PNP0A08"))),
        Raw::of(&Name::new("_CID".into(), &EISAName::new("PNP0A03"))),
        Raw::of(&Name::new("_UID".into(), &0u8)),
        Raw::of(&Name::new("_SEG".into(), &0u8)),
        Raw::of(&Name::new("_BBN".into(), &0u8)),
        Raw::of(&Name::new("_CRS".into(), &windows(pci))),
        operating_system_capabilities(),
    ];
    c.extend(routing::routes());
    c.push(devices::lpc(board));
    Raw::of(&Device::new("PCI0".into(), c.iter().map(|r| r as &dyn Aml).collect()))
}

/// Bus numbers, ports and memory that devices on PCI may use.
fn windows(pci: &PciRoot) -> Raw {
    let mut r = vec![
        Raw::of(&AddressSpace::new_bus_number(0u16, pci.last_bus.into())),
        Raw::of(&IO::new(0xcf8, 0xcf8, 1, 8)),
    ];
    for w in &pci.io {
        r.push(Raw::of(&AddressSpace::new_io(*w.start(), *w.end(), None)));
    }
    for w in &pci.mem32 {
        // The VGA hole may be cached by nobody's reckoning; Linux takes either.
        let (min, max) = (*w.start(), *w.end());
        let kind = AddressSpaceCacheable::NotCacheable;
        r.push(Raw::of(&AddressSpace::new_memory(kind, true, min, max, None)));
    }
    for w in &pci.mem64 {
        let (min, max) = (*w.start(), *w.end());
        let kind = AddressSpaceCacheable::Cacheable;
        r.push(Raw::of(&AddressSpace::new_memory(kind, true, min, max, None)));
    }
    resources(&r)
}

/// _OSC of a PCI Express root (PCI Firmware 3.3 §4.5.1): the system gets native hot-plug, power
/// management events, error reporting and the capability structure; not SHPC.
fn operating_system_capabilities() -> Raw {
    const GRANTED: u8 = 0x1d;
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let known = Raw::of(&If::new(
        &Equal::new(&Arg(0), &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
        vec![
            &CreateDWordField::new(&control, &Arg(3), &8u8),
            &And::new(&Local(0), &control, &GRANTED),
            &If::new(&NotEqual::new(&Arg(1), &aml::ONE), vec![&Or::new(&status, &status, &0x08u8)]),
            &If::new(
                &NotEqual::new(&control, &Local(0)),
                vec![&Or::new(&status, &status, &0x10u8)],
            ),
            &Store::new(&control, &Local(0)),
        ],
    ));
    Raw::of(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &0u8),
            &known,
            &Else::new(vec![&Or::new(&status, &status, &0x04u8)]),
            &Return::new(&Arg(3)),
        ],
    ))
}

/// Motherboard resources that cover ECAM, which systems demand before they use it.
fn reserved_ecam(pci: &PciRoot) -> Raw {
    let len = (u32::from(pci.last_bus) + 1) << 20;
    let crs = match u32::try_from(pci.ecam) {
        Ok(base) => Raw::of(&Memory32Fixed::new(true, base, len)),
        Err(_) => Raw::of(&AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            pci.ecam,
            pci.ecam.saturating_add(u64::from(len) - 1),
            None,
        )),
    };
    Raw::of(&Device::new(
        "MRES".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &1u8),
            &Name::new("_CRS".into(), &resources(&[crs])),
        ],
    ))
}
