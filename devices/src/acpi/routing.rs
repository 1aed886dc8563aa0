//! Interrupt routing in the name space: which PIRQ each slot's pins reach, the PIRQs as link
//! devices on the chipset's routing registers (for systems on the PIC), and as fixed GSIs (for
//! systems on the IOAPIC). It mirrors [`crate::pci::pirq`].

use super::description::{Raw, resources};
use acpi_tables::aml::{
    self, And, Arg, BufferData, CreateDWordField, Device, EISAName, Else, Equal, If, Local, Method,
    Name, Or, PackageBuilder, Path, Return, Store,
};
use acpi_tables::{Aml, AmlSink};

/// First GSI of the PIRQs.
const PIRQ_GSI: u32 = 16;
/// ISA IRQs that a PIRQ may take.
const CHOICES: [u32; 3] = [5, 10, 11];

/// Extended interrupt descriptor (§6.4.3.6): level, active high, shared.
struct Irqs<'a> {
    numbers: &'a [u32],
}

impl Aml for Irqs<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x89);
        sink.word(2 + 4 * self.numbers.len() as u16);
        // Consumer, level, active high, shared.
        sink.byte(0b1001);
        sink.byte(self.numbers.len() as u8);
        self.numbers.iter().for_each(|n| sink.dword(*n));
    }
}

fn letter(pirq: usize) -> char {
    char::from(b'A' + (pirq as u8 & 7))
}

/// The PIRQ that `pin` (0–3) of `slot` reaches with the chipset's registers as reset leaves them.
fn pirq(slot: u32, pin: u32) -> usize {
    (match slot {
        0..=24 => (slot + pin) % 4 + 4,
        30 => pin + 4,
        _ => pin,
    }) as usize
}

/// `_PIC`, by which a system says that it uses the IOAPIC.
pub(super) fn interrupt_model(put: &mut dyn FnMut(&dyn Aml)) {
    put(&Name::new("\\PICF".into(), &0u8));
    put(&Method::new("\\_PIC".into(), 1, false, vec![&Store::new(&Path::new("\\PICF"), &Arg(0))]));
}

/// The routing tables and `_PRT`, for the host bridge.
pub(super) fn routes() -> Vec<Raw> {
    let table = |name: &str, prefix: &str| {
        let mut all = PackageBuilder::new();
        for (slot, pin) in (0..32u32).flat_map(|s| (0..4u32).map(move |p| (s, p))) {
            let source = Path::new(&format!("\\_SB_.{prefix}{}", letter(pirq(slot, pin))));
            let mut entry = PackageBuilder::new();
            entry.add_element(&(slot << 16 | 0xffff));
            entry.add_element(&pin);
            entry.add_element(&source);
            entry.add_element(&0u8);
            all.add_element(&entry);
        }
        Raw::of(&Name::new(name.into(), &all))
    };
    let prt = Raw::of(&Method::new(
        "_PRT".into(),
        0,
        false,
        vec![
            &If::new(
                &Equal::new(&Path::new("\\PICF"), &0u8),
                vec![&Return::new(&Path::new("PRTP"))],
            ),
            &Else::new(vec![&Return::new(&Path::new("PRTA"))]),
        ],
    ));
    vec![table("PRTP", "LNK"), table("PRTA", "GSI"), prt]
}

/// The PIRQs as devices: LNKA–H over the routing registers, GSIA–H fixed.
pub(super) fn links() -> Vec<Raw> {
    (0..8).flat_map(|n| [link(n), fixed(n)]).collect()
}

fn link(n: usize) -> Raw {
    // The routing registers are fields of the LPC bridge.
    let register = Path::new(&format!("\\_SB_.PCI0.LPC_.PRQ{}", letter(n)));
    let field = Path::new("IRQN");
    let possible = resources(&[Raw::of(&Irqs { numbers: &CHOICES })]);
    // A template whose interrupt number, at byte 5, is filled in.
    let current = Raw::of(&BufferData::new(template_bytes()));
    let off =
        Raw::of(&If::new(&And::new(&aml::ZERO, &register, &0x80u8), vec![&Return::new(&0x09u8)]));
    Raw::of(&Device::new(
        Path::new(&format!("LNK{}", letter(n))),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0F")),
            &Name::new("_UID".into(), &(n as u8)),
            &Name::new("_PRS".into(), &possible),
            &Method::new("_STA".into(), 0, false, vec![&off, &Return::new(&0x0bu8)]),
            &Method::new("_DIS".into(), 0, false, vec![&Or::new(&register, &register, &0x80u8)]),
            &Method::new(
                "_CRS".into(),
                0,
                true,
                vec![
                    &Store::new(&Local(0), &current),
                    &CreateDWordField::new(&field, &Local(0), &5u8),
                    &And::new(&field, &register, &0x0fu8),
                    &If::new(
                        &And::new(&aml::ZERO, &register, &0x80u8),
                        vec![&Store::new(&field, &0u8)],
                    ),
                    &Return::new(&Local(0)),
                ],
            ),
            &Method::new(
                "_SRS".into(),
                1,
                true,
                vec![&CreateDWordField::new(&field, &Arg(0), &5u8), &Store::new(&register, &field)],
            ),
        ],
    ))
}

/// One interrupt descriptor with number 0, and the end tag.
fn template_bytes() -> Vec<u8> {
    let mut b = Raw::of(&Irqs { numbers: &[0] }).0;
    b.extend([0x79, 0]);
    b
}

fn fixed(n: usize) -> Raw {
    let irqs = [PIRQ_GSI + n as u32];
    let this = resources(&[Raw::of(&Irqs { numbers: &irqs })]);
    Raw::of(&Device::new(
        Path::new(&format!("GSI{}", letter(n))),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0F")),
            &Name::new("_UID".into(), &(n as u8 + 16)),
            &Name::new("_PRS".into(), &this),
            &Name::new("_CRS".into(), &this),
            // Fixed: nothing to set.
            &Method::new("_SRS".into(), 1, false, vec![]),
        ],
    ))
}
