//! What a board has, as plain data, for the tables to say.

use std::ops::RangeInclusive;

/// A processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpu {
    /// ACPI processor UID, unique.
    pub uid: u32,
    /// Local APIC ID.
    pub apic_id: u32,
}

/// An IOAPIC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoApic {
    /// APIC ID.
    pub id: u8,
    /// Address of its registers.
    pub address: u32,
    /// First GSI.
    pub gsi_base: u32,
}

/// How an interrupt input is driven.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trigger {
    /// As the bus says: ISA, edge and active high.
    Conforming,
    /// Level, active high.
    LevelHigh,
    /// Level, active low.
    LevelLow,
}

/// An ISA IRQ that is not the GSI of the same number, or not an edge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IrqOverride {
    /// ISA IRQ.
    pub irq: u8,
    /// GSI it reaches.
    pub gsi: u32,
    /// How it is driven.
    pub trigger: Trigger,
}

/// How software turns ACPI mode on, where firmware owns the machine first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SmiCommand {
    /// Port.
    pub port: u16,
    /// Value that enables ACPI mode.
    pub enable: u8,
    /// Value that disables it.
    pub disable: u8,
}

/// The ACPI registers, by port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pm {
    /// PM1a event block, 4 bytes.
    pub event: u16,
    /// PM1a control block, 2 bytes.
    pub control: u16,
    /// PM timer, 4 bytes.
    pub timer: u16,
    /// Whether the timer has 32 bits rather than 24.
    pub timer_32bit: bool,
    /// GPE0 block.
    pub gpe0: u16,
    /// Length of the GPE0 block in bytes, status and enable together.
    pub gpe0_len: u8,
    /// Interrupt of ACPI, an ISA IRQ or a GSI.
    pub sci: u16,
    /// How to turn ACPI mode on; `None`: it is on.
    pub smi: Option<SmiCommand>,
    /// SLP_TYP of S5.
    pub s5: u8,
}

/// The reset register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResetRegister {
    /// Port.
    pub port: u16,
    /// Value that resets.
    pub value: u8,
}

/// The PCI root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PciRoot {
    /// Base of memory-mapped configuration space.
    pub ecam: u64,
    /// Last bus number; ECAM has 1 MiB per bus.
    pub last_bus: u8,
    /// Ports for devices; 0xcf8–0xcff is reserved apart.
    pub io: Vec<RangeInclusive<u16>>,
    /// Memory below 4 GiB for devices.
    pub mem32: Vec<RangeInclusive<u32>>,
    /// Memory above 4 GiB for devices.
    pub mem64: Vec<RangeInclusive<u64>>,
}

/// A 16550 at ISA resources.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SerialPort {
    /// First of 8 ports.
    pub port: u16,
    /// ISA IRQ, 0–15.
    pub irq: u8,
}

/// Virtio registers in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VirtioMmio {
    /// Address of the registers.
    pub base: u32,
    /// Their length in bytes.
    pub len: u32,
    /// GSI, level-triggered and active high.
    pub gsi: u32,
}

/// A part of RAM, and its node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryRange {
    /// Its node.
    pub node: u32,
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Nodes of processors and memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numa {
    /// Node of each processor, in the board's order.
    pub cpus: Vec<u32>,
    /// RAM.
    pub memory: Vec<MemoryRange>,
    /// Distances, a row for each node: 10 to itself, 255 for unreachable.
    pub distances: Vec<Vec<u8>>,
}

/// A board.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Board {
    /// Processors, the bootstrap processor first.
    pub cpus: Vec<Cpu>,
    /// Address of the local APICs.
    pub local_apic: u32,
    /// The IOAPIC.
    pub io_apic: IoApic,
    /// Exceptions to ISA IRQ = GSI.
    pub overrides: Vec<IrqOverride>,
    /// ACPI registers.
    pub pm: Pm,
    /// Reset register.
    pub reset: Option<ResetRegister>,
    /// PCI.
    pub pci: Option<PciRoot>,
    /// Address of the HPET.
    pub hpet: Option<u64>,
    /// Serial ports, COM1 first.
    pub serial: Vec<SerialPort>,
    /// A keyboard controller with keyboard and mouse.
    pub i8042: bool,
    /// A CMOS real-time clock at ports 70h and 71h.
    pub rtc: bool,
    /// The port by which the guest tells of a panic.
    pub pvpanic: Option<u16>,
    /// A VGA that may be probed.
    pub vga: bool,
    /// Virtio devices that are not on PCI.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// Nodes, if it has any.
    pub numa: Option<Numa>,
}

impl Board {
    /// The q35 board with these APIC ids, ACPI mode on, COM1, a clock, no keyboard, no VGA, no
    /// HPET, and device memory from 0xc0000000 to the IOAPIC.
    pub fn q35(apic_ids: Vec<u32>) -> Board {
        let level = |irq: u8| IrqOverride { irq, gsi: irq.into(), trigger: Trigger::LevelHigh };
        let timer = IrqOverride { irq: 0, gsi: 2, trigger: Trigger::Conforming };
        let cpu = |(uid, apic_id): (usize, u32)| Cpu { uid: uid as u32, apic_id };
        Board {
            cpus: apic_ids.into_iter().enumerate().map(cpu).collect(),
            local_apic: 0xfee0_0000,
            io_apic: IoApic { id: 0, address: 0xfec0_0000, gsi_base: 0 },
            overrides: vec![timer, level(5), level(9), level(10), level(11)],
            pm: Pm {
                event: 0x600,
                control: 0x604,
                timer: 0x608,
                timer_32bit: false,
                gpe0: 0x620,
                gpe0_len: 16,
                sci: 9,
                smi: None,
                s5: 0,
            },
            reset: Some(ResetRegister { port: 0xcf9, value: 0x0f }),
            pci: Some(PciRoot {
                ecam: crate::pci::mch::ECAM_BASE,
                last_bus: 255,
                io: vec![0..=0xcf7, 0xd00..=0xffff],
                mem32: vec![0xa_0000..=0xb_ffff, 0xc000_0000..=0xfebf_ffff],
                mem64: Vec::new(),
            }),
            hpet: None,
            serial: vec![SerialPort { port: 0x3f8, irq: 4 }],
            i8042: false,
            rtc: true,
            pvpanic: None,
            vga: false,
            virtio_mmio: Vec::new(),
            numa: None,
        }
    }

    /// The same without PCI, with virtio registers at these places.
    pub fn microvm(apic_ids: Vec<u32>, virtio_mmio: Vec<VirtioMmio>) -> Board {
        let mut board = Board { pci: None, virtio_mmio, ..Board::q35(apic_ids) };
        // ISA IRQs would be edges.
        for v in board.virtio_mmio.iter().filter(|v| v.gsi < 16) {
            let irq = v.gsi as u8;
            if board.overrides.iter().all(|o| o.irq != irq) {
                board.overrides.push(IrqOverride { irq, gsi: v.gsi, trigger: Trigger::LevelHigh });
            }
        }
        board
    }
}
