//! How the machine starts: with a kernel, for which tables are put into memory as firmware would
//! have done, or with firmware, which finds ROM or flash, its shadow and the configuration device.

use super::Failure;
use super::cpu::Processors;
use super::memmap::{E820Kind, ECAM, FOUR_GIB, IOAPIC, MemoryMap, PCI64, PCI64_SIZE};
use super::nodes::nodes;
use crate::boot;
use crate::config::{Device, Fault, VmConfig, parse};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use tandem_accel::Error;
use tandem_accel::bus::IoBus;
use tandem_accel::memory::{GuestMap, GuestRam, Region, RegionKind};
use tandem_backends::block::drive::Drive;
use tandem_backends::chardev::Chardev;
use tandem_devices::acpi;
use tandem_devices::acpi::board::{PciRoot, SerialPort, SmiCommand};
use tandem_devices::firmware::bootorder::BootOrder;
use tandem_devices::firmware::flash::Flash;
use tandem_devices::firmware::fw_cfg::{self, FwCfg, Items, key};
use tandem_devices::firmware::shadow::{self, Shadow};
use tandem_devices::firmware::smbios;
use tandem_devices::legacy::acpi_pm::{ACPI_DISABLE, ACPI_ENABLE, APM_PORT};
use tandem_devices::legacy::debug::{DebugCon, FIRMWARE_DEBUG_PORT};
use tandem_devices::legacy::serial::COM;
use tandem_devices::pci::function::BarKind;
use tandem_devices::pci::mch::Mch;
use tandem_devices::pci::{Bus, host};
use tandem_devices::pvpanic;
use tandem_devices::timer::rtc::Rtc;
use vm_memory::{Bytes, GuestAddress};

/// Where the SMBIOS tables of a machine without firmware are; the ACPI tables end there.
const SMBIOS: u64 = 0xf_8000;
/// CMOS bytes that firmware reads: number of processors less one; boot devices, first in the low
/// half of the first byte, third in the high half of the second.
const CMOS_CPUS: u8 = 0x5f;
const CMOS_BOOT: [u8; 2] = [0x3d, 0x38];

/// Tells a BIOS which kinds of devices to try.
pub fn set_boot_order(rtc: &Rtc, order: [u8; 2]) {
    for (at, v) in CMOS_BOOT.into_iter().zip(order) {
        rtc.set_byte(at, v);
    }
}

/// A machine's firmware, in place.
pub struct Firmware {
    flash: Vec<Arc<Flash>>,
    shadow: Arc<Shadow>,
    /// Made once all devices are there.
    fw_cfg: Option<Arc<FwCfg>>,
}

fn host_fault(e: Error) -> Failure {
    Failure::Host(e)
}

impl Firmware {
    /// Puts ROM or flash below 4 GiB, and its end below 1 MiB.
    pub fn place(
        config: &VmConfig,
        memory: &Arc<GuestMap>,
        bus: &Arc<IoBus>,
        drives: &BTreeMap<String, Arc<Drive>>,
    ) -> Result<Firmware, Failure> {
        let mut flash = Vec::new();
        let mut end = FOUR_GIB;
        for (name, _) in config.flash() {
            let Some(drive) = drives.get(&name) else { continue };
            let names = ["firmware code", "firmware variables"];
            let device = Flash::attach(names[flash.len().min(1)], end, drive.clone(), memory, bus)
                .map_err(host_fault)?;
            end -= drive.size();
            flash.push(device);
        }
        let tail = match (flash.first(), config.rom().map_err(Failure::Usage)?) {
            (Some(code), _) => code.tail(shadow::END - shadow::ROM),
            (None, Some(path)) => rom(&path, memory).map_err(host_fault)?,
            (None, None) => Vec::new(),
        };
        let shadow = Shadow::new(memory.clone(), bus.clone(), &tail).map_err(host_fault)?;
        if let Some(path) = &config.firmware.debug {
            let chardev = Chardev::file(path, false).map_err(|e| {
                let what = format!("cannot write the firmware's log '{}'", path.display());
                Failure::Host(Error::new(what).caused_by(e))
            })?;
            bus.pio
                .insert(
                    "firmware's debug console",
                    FIRMWARE_DEBUG_PORT.into(),
                    1,
                    DebugCon::new(Arc::new(chardev)),
                )
                .map_err(super::backbone::cannot("the firmware's debug console"))?;
        }
        Ok(Firmware { flash, shadow, fw_cfg: None })
    }

    /// What the memory controller tells of shadowing.
    pub fn shadow(&self) -> Arc<Shadow> {
        self.shadow.clone()
    }

    /// Offers `items` to the firmware.
    pub fn offer(
        &mut self,
        items: Items,
        memory: &Arc<GuestMap>,
        bus: &IoBus,
    ) -> Result<(), Failure> {
        let device = FwCfg::new(items, memory.clone());
        bus.pio
            .insert("fw_cfg", fw_cfg::PORT.into(), fw_cfg::PORTS, device.clone())
            .map_err(super::backbone::cannot("fw_cfg"))?;
        self.fw_cfg = Some(device);
        Ok(())
    }

    /// RESET.
    pub fn reset(&self) {
        self.flash.iter().for_each(|f| f.reset());
        self.fw_cfg.iter().for_each(|f| f.reset());
    }
}

/// Puts the image at `path` into ROM that ends at 4 GiB; returns it.
fn rom(path: &Path, memory: &GuestMap) -> Result<Vec<u8>, Error> {
    let bytes = std::fs::read(path).map_err(|e| {
        Error::new(format!("cannot read firmware '{}'", path.display())).caused_by(e)
    })?;
    let len = bytes.len() as u64;
    let region = Region::new("firmware ROM", RegionKind::Rom, FOUR_GIB - len, len)?;
    region.load(0, &bytes);
    memory.insert(&region)?;
    Ok(bytes)
}

/// What a machine is, for its tables.
pub struct Facts<'a> {
    /// The configuration.
    pub config: &'a VmConfig,
    /// Processors.
    pub processors: &'a Processors,
    /// Number of serial ports.
    pub serials: usize,
    /// Those that devices add.
    pub more_serials: Vec<SerialPort>,
    /// Memory.
    pub map: MemoryMap,
}

impl Facts<'_> {
    /// The board as the tables of a machine that starts without firmware say it.
    pub fn board(&self) -> acpi::Board {
        let mut board = acpi::Board::q35(self.processors.apic_ids.clone());
        board.hpet = Some(tandem_devices::timer::hpet::HPET_BASE);
        board.serial = COM[..self.serials]
            .iter()
            .map(|(port, irq)| acpi::board::SerialPort { port: *port, irq: *irq as u8 })
            .collect();
        board.serial.extend(&self.more_serials);
        board.numa = nodes(self.config);
        board.vga = self.has_vga();
        let pvpanic = self.config.devices.iter().find(|d| d.driver == "pvpanic");
        let port = |d: &Device| match d.prop("ioport") {
            Some(text) => parse::number(text).and_then(|n| u16::try_from(n).ok()),
            None => Some(pvpanic::PORT),
        };
        board.pvpanic = pvpanic.and_then(port);
        if let Some(pci) = &mut board.pci {
            pci.mem64 = vec![PCI64..=PCI64 + PCI64_SIZE - 1];
        }
        board
    }

    fn smbios(&self, firmware: Option<(String, String)>) -> smbios::Tables {
        let smp = self.config.smp;
        let cpu = smbios::Cpu {
            sockets: smp.sockets as u16,
            cores: smp.cores as u16,
            threads: (smp.cores * smp.threads) as u16,
            ..self.processors.smbios()
        };
        smbios::tables(&smbios::Description {
            manufacturer: "tandem".into(),
            product: format!("Standard PC ({})", self.config.machine),
            version: env!("CARGO_PKG_VERSION").into(),
            uuid: [0; 16],
            firmware,
            cpu,
            memory: vec![(0, self.map.low_end), (FOUR_GIB, self.map.high)],
        })
    }

    fn has_vga(&self) -> bool {
        self.config.devices.iter().any(|d| d.driver == "VGA")
    }

    /// Tells the battery-backed memory what firmware looks up there.
    pub fn to_cmos(&self, rtc: &Rtc) {
        rtc.set_byte(CMOS_CPUS, self.config.smp.cpus.saturating_sub(1).min(0xff) as u8);
        set_boot_order(rtc, self.config.firmware.boot.cmos_bytes().0);
    }

    /// What firmware is told.
    pub fn items(
        &self,
        mch: Arc<Mch>,
        root: Arc<Bus>,
        order: &BootOrder,
    ) -> Result<Items, Failure> {
        let mut items = Items::default();
        let cpus = self.config.smp.cpus as u16;
        items.item(key::CPUS, cpus.to_le_bytes());
        items.item(key::MAX_CPUS, cpus.to_le_bytes());
        items.item(key::RAM_SIZE, self.map.low_end.to_le_bytes());
        let on_serial = !self.has_vga() || self.config.firmware.serial_console;
        items.item(key::NO_GRAPHIC, u16::from(on_serial).to_le_bytes());
        let wish = &self.config.firmware.boot;
        items.item(key::BOOT_MENU, u16::from(wish.menu).to_le_bytes());
        if let Some(ms) = wish.splash_time {
            items.file("etc/boot-menu-wait", ms.to_le_bytes());
        }
        if let Some(ms) = wish.reboot_timeout {
            items.file("etc/boot-fail-wait", u32::from(ms).to_le_bytes());
        }
        items.item(key::IRQ0_OVERRIDE, [1]);
        items.item(key::UUID, [0; 16]);
        items.file("etc/e820", self.e820());
        let s = self.smbios(None);
        items.file("etc/smbios/smbios-anchor", s.entry);
        items.file("etc/smbios/smbios-tables", s.structures);
        // S5 with its SLP_TYP; S3 and S4 are not there.
        items.file("etc/system-states", [0, 0, 0, 0, 0, 0x80]);
        items.file("bootorder", order.file(wish.strict));
        if self.serials > 0 && on_serial {
            // The BIOS's text services use COM1.
            items.file("etc/sercon-port", COM[0].0.to_le_bytes());
        }
        for item in &self.config.firmware.items {
            let bytes = item.bytes().map_err(|f| Failure::Usage(vec![f]))?;
            items.file(&item.name, bytes);
        }
        boot::fw_cfg::offer(&self.config.boot, &mut items)
            .map_err(|f: Fault| Failure::Usage(vec![f]))?;
        let board = self.firmware_board();
        let low_end = self.map.low_end;
        let made = acpi::for_firmware(&board);
        let len = made.tables.len();
        items.file(acpi::RSDP_FILE, made.rsdp);
        items.file(acpi::SCRIPT_FILE, made.script);
        items.made_file(acpi::TABLES_FILE, len, move || {
            let mut board = board.clone();
            if let Some(pci) = &mut board.pci {
                follow(pci, &mch, &root, low_end);
            }
            acpi::for_firmware(&board).tables
        });
        Ok(items)
    }

    /// The board as firmware finds it: ACPI mode is off until asked for. It has as many windows as
    /// it will have when firmware has placed everything, so that its tables keep their size.
    fn firmware_board(&self) -> acpi::Board {
        let mut board = self.board();
        let (enable, disable) = (ACPI_ENABLE, ACPI_DISABLE);
        board.pm.smi = Some(SmiCommand { port: APM_PORT, enable, disable });
        if let Some(pci) = &mut board.pci {
            pci.mem32 = mem32(pci, self.map.low_end);
        }
        board
    }

    /// RAM, and what nobody may use, as packed entries of 20 bytes.
    fn e820(&self) -> Vec<u8> {
        let mut ram = vec![(0, self.map.low_end, E820Kind::Ram)];
        if self.map.high > 0 {
            ram.push((FOUR_GIB, self.map.high, E820Kind::Ram));
        }
        let (start, len) = (super::memmap::ACCEL, super::memmap::FLASH - super::memmap::ACCEL);
        ram.push((start, len, E820Kind::Reserved));
        let mut b = Vec::new();
        for (start, len, kind) in ram {
            b.extend(start.to_le_bytes());
            b.extend(len.to_le_bytes());
            b.extend((kind as u32).to_le_bytes());
        }
        b
    }

    /// Tables for a machine that starts without firmware.
    pub fn in_place(&self) -> Result<InPlace, Failure> {
        let room = SMBIOS - acpi::BIOS_AREA;
        let acpi = acpi::layout(&self.board(), acpi::BIOS_AREA, room)
            .map_err(super::backbone::cannot("the ACPI tables"))?;
        let name = ("tandem".to_string(), env!("CARGO_PKG_VERSION").to_string());
        let smbios = self.smbios(Some(name)).placed(SMBIOS as u32);
        Ok(InPlace { acpi, smbios })
    }
}

/// Tables in memory, as firmware leaves them.
pub struct InPlace {
    acpi: acpi::Image,
    smbios: Vec<u8>,
}

impl InPlace {
    /// Address of the ACPI root pointer.
    pub fn rsdp(&self) -> u64 {
        self.acpi.rsdp
    }

    /// Writes them.
    pub fn write(&self, ram: &GuestRam) -> Result<(), Error> {
        for (what, at, bytes) in
            [("ACPI", self.acpi.base, &self.acpi.bytes), ("SMBIOS", SMBIOS, &self.smbios)]
        {
            ram.write_slice(bytes, GuestAddress(at))
                .map_err(|e| Error::new(format!("cannot place the {what} tables")).caused_by(e))?;
        }
        Ok(())
    }
}

/// Where devices may be below 4 GiB: the VGA window, and what RAM, ECAM and the chips leave. Always
/// three windows.
fn mem32(pci: &PciRoot, low_end: u64) -> Vec<RangeInclusive<u32>> {
    let vga = 0xa_0000..=0xb_ffff;
    let ecam_end = pci.ecam + (u64::from(pci.last_bus) + 1) * host::ECAM_PER_BUS;
    let last = (IOAPIC - 1) as u32;
    let (ecam, end) = match (u32::try_from(pci.ecam), u32::try_from(ecam_end)) {
        (Ok(e), Ok(end)) if u64::from(e) > low_end && end < last => (e, end),
        // ECAM is elsewhere: halve the window, as tables must keep their size.
        _ => (PCI32_HALF, PCI32_HALF),
    };
    vec![vga, low_end as u32..=ecam - 1, end..=last]
}

const PCI32_HALF: u32 = 0xd000_0000;

/// Makes the PCI root follow what firmware has programmed.
fn follow(pci: &mut PciRoot, mch: &Mch, root: &Bus, low_end: u64) {
    if let Some((base, len)) = mch.ecam() {
        pci.ecam = base;
        pci.last_bus = (len / host::ECAM_PER_BUS - 1).min(255) as u8;
    } else {
        pci.ecam = ECAM;
    }
    pci.mem32 = mem32(pci, low_end);
    let high = root.devices().into_iter().flat_map(|(_, d)| {
        let f = d.function();
        let wide = f.bars().into_iter().filter(|b| b.1 == BarKind::Mem64);
        wide.map(|(at, ..)| f.u64(at) & !0xf).filter(|a| *a >= FOUR_GIB).collect::<Vec<_>>()
    });
    if let Some(lowest) = high.min().filter(|a| !(PCI64..PCI64 + PCI64_SIZE).contains(a)) {
        let start = lowest & !((1 << 30) - 1);
        pci.mem64 = vec![start..=start + PCI64_SIZE - 1];
    }
}
