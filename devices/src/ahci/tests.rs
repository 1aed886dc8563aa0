//! A driver of the adapter: command lists in memory, registers through the BAR.

use super::*;
use crate::pci::assign::{Ranges, assign};
use crate::virtio::testing::Rig;
use std::path::Path;
use tandem_accel::irq::MsiMessage;
use tandem_backends::block::drive::DriveOptions;
use tandem_backends::block::file::HostFile;
use tandem_backends::block::raw::Raw;
use tandem_backends::block::{Image, SECTOR};
use vm_memory::{Bytes, GuestAddress};

const LIST: u64 = 0x10_0000;
const FRAMES: u64 = 0x10_1000;
const TABLES: u64 = 0x10_2000;
const DATA: u64 = 0x11_0000;
const SIZE: u64 = 4 << 20;

const IS: u64 = 0x10;
const IE: u64 = 0x14;
const CMD: u64 = 0x18;
const TFD: u64 = 0x20;
const SIG: u64 = 0x24;
const SSTS: u64 = 0x28;
const SCTL: u64 = 0x2c;
const SERR: u64 = 0x30;
const SACT: u64 = 0x34;
const CI: u64 = 0x38;

const HR: u32 = 1;
const ENABLE: u32 = 1 << 1;

/// A machine with an adapter, a disk on port 0 and a CD drive on port 2.
struct Machine {
    rig: Rig,
    ahci: Arc<Ahci>,
    image: Arc<dyn Image>,
    base: u64,
}

fn image(len: u64) -> Arc<dyn Image> {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    file.set_len(len).unwrap();
    Arc::new(Raw::new(file).unwrap())
}

fn drive(image: &Arc<dyn Image>) -> Arc<Drive> {
    Drive::new(image.clone(), DriveOptions { discard: true, ..DriveOptions::default() })
}

/// A command: code, features, address, count, device; regions of data; whether it is a packet.
#[derive(Clone, Default)]
struct Ask {
    code: u8,
    features: u16,
    lba: u64,
    count: u16,
    device: u8,
    cdb: Option<[u8; 12]>,
    regions: Vec<(u64, u32)>,
}

fn ask(code: u8, lba: u64, count: u16, regions: &[(u64, u32)]) -> Ask {
    Ask { code, lba, count, device: 0x40, regions: regions.to_vec(), ..Ask::default() }
}

fn packet(cdb: &[u8], room: u32) -> Ask {
    let mut all = [0; 12];
    all[..cdb.len()].copy_from_slice(cdb);
    Ask { code: 0xa0, features: 1, cdb: Some(all), regions: vec![(DATA, room)], ..Ask::default() }
}

impl Machine {
    fn new() -> Machine {
        let rig = Rig::new();
        let image = image(SIZE);
        let mut ctx = rig.context();
        ctx.backends.drives.insert("disk".into(), drive(&image));
        let disc = super::tests::image(64 * 2048);
        for block in 0..64u64 {
            disc.writable().unwrap().write_bytes(block * 2048, &[block as u8; 2048]).unwrap();
        }
        ctx.backends.drives.insert("cd".into(), drive(&disc));
        let ahci = Ahci::built_in(&ctx).unwrap();
        let make = |name, props: &[(&str, &str)]| {
            let props: Vec<_> = props.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            crate::registry::create(&ctx, name, &props)
        };
        let disk = [("drive", "disk"), ("bus", "ide.0"), ("serial", "S1"), ("bootindex", "1")];
        make("ide-hd", &disk).unwrap();
        make("ide-cd", &[("drive", "cd"), ("bus", "ide.2")]).unwrap();
        make("ide-cd", &[("bus", "ide.3")]).unwrap();
        assert_eq!(ctx.boot_order.file(false), b"/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0\0");
        let ranges = Ranges { io: 0..0, mem32: 0xc000_0000..0xd000_0000, mem64: 0..0 };
        assign(&rig.pci.bus, ranges).unwrap();
        ahci.function.write(4, &[6, 0]);
        let base = ahci.function.bar_address(ABAR).unwrap();
        let m = Machine { rig, ahci, image, base };
        m.set(4, ENABLE);
        for port in [0, 2, 3] {
            m.start(port);
        }
        m
    }

    fn get(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        self.rig.pci.io.mmio_read(self.base + at, &mut b);
        u32::from_le_bytes(b)
    }
    fn set(&self, at: u64, value: u32) {
        self.rig.pci.io.mmio_write(self.base + at, &value.to_le_bytes());
    }
    fn port(&self, n: u64, at: u64) -> u32 {
        self.get(0x100 + n * 0x80 + at)
    }
    fn set_port(&self, n: u64, at: u64, value: u32) {
        self.set(0x100 + n * 0x80 + at, value);
    }
    fn ram(&self) -> Arc<tandem_accel::memory::GuestRam> {
        self.rig.map.ram()
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.ram().read_slice(&mut b, GuestAddress(at)).unwrap();
        b
    }
    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn start(&self, n: u64) {
        self.set_port(n, 0, LIST as u32);
        self.set_port(n, 8, FRAMES as u32);
        self.set_port(n, IE, u32::MAX);
        self.set_port(n, CMD, 0x10);
        self.set_port(n, CMD, 0x11);
    }
    fn stop(&self, n: u64) {
        self.set_port(n, CMD, 0x10);
        self.wait(|| self.port(n, CMD) & 0x8000 == 0);
    }

    fn wait(&self, done: impl Fn() -> bool) {
        while !done() {
            std::thread::yield_now();
        }
    }

    /// Writes a command into `slot`.
    fn prepare(&self, slot: u64, a: &Ask) {
        let table = TABLES + slot * 0x400;
        let (l, f, c) = (a.lba.to_le_bytes(), a.features.to_le_bytes(), a.count.to_le_bytes());
        let mut t = vec![0x27, 0x80, a.code, f[0], l[0], l[1], l[2], a.device];
        t.extend([l[3], l[4], l[5], f[1], c[0], c[1], 0, 0]);
        t.resize(0x40, 0);
        t.extend(a.cdb.unwrap_or_default());
        t.resize(0x80, 0);
        for (addr, len) in &a.regions {
            t.extend(addr.to_le_bytes());
            t.extend(0u32.to_le_bytes());
            t.extend((len - 1).to_le_bytes());
        }
        self.put(table, &t);
        let flags = 5 | if a.cdb.is_some() { 0x20 } else { 0 } | (a.regions.len() as u32) << 16;
        let mut h = flags.to_le_bytes().to_vec();
        h.extend(0u32.to_le_bytes());
        h.extend(table.to_le_bytes());
        self.put(LIST + slot * 32, &h);
    }

    /// Runs a command to its end; returns its interrupt status and TFD.
    fn run(&self, n: u64, a: &Ask) -> (u32, u32) {
        self.prepare(0, a);
        self.set_port(n, CI, 1);
        self.wait(|| self.port(n, IS) & 0x6100_0003 != 0);
        let is = self.port(n, IS);
        self.set_port(n, IS, is);
        self.set(8, 1 << n);
        let tfd = self.port(n, TFD);
        if is & 1 << 30 != 0 {
            assert_eq!(self.port(n, CI), 1, "a command that fails stays on the list");
            self.stop(n);
            self.start(n);
        }
        assert_eq!(self.port(n, CI), 0);
        (is, tfd)
    }
}

#[test]
fn ports_say_what_is_on_them() {
    let m = Machine::new();
    assert_eq!(m.get(0) & 0x1f, 5);
    assert_eq!(m.get(0xc), 0x3f);
    let seen: Vec<_> = [0, 1, 2].map(|n| (m.port(n, SSTS) & 0xf, m.port(n, SIG))).into();
    assert_eq!(seen, [(3, 0x101), (0, u32::MAX), (3, 0xeb14_0101)]);
    assert_eq!([0, 1, 2].map(|n| m.port(n, TFD) & 0xff), [0x50, 0x7f, 0]);
    // The first frame came when frames were received: of the disc, the last that was started.
    assert_eq!(m.bytes(FRAMES + 0x40, 1), [0x34]);
    let d = m.ahci.function.u32(0);
    assert_eq!((d, m.ahci.function.u32(8) >> 8), (0x2922_8086, CLASS_AHCI));
}

#[test]
fn a_disk_says_what_it_is() {
    let m = Machine::new();
    let (is, tfd) = m.run(0, &ask(0xec, 0, 0, &[(DATA, 512)]));
    assert_eq!((is, tfd & 0xff), (2, 0x50));
    let b = m.bytes(DATA, 512);
    assert_eq!(b.iter().fold(0u8, |a, x| a.wrapping_add(*x)), 0);
    assert_eq!(&b[20..24], b"1S  ");
    let sectors = u64::from_le_bytes(b[200..208].try_into().unwrap());
    assert_eq!(sectors, SIZE / 512);
    // Bytes moved; the set-up frame with its two statuses.
    assert_eq!(m.bytes(LIST + 4, 4), 512u32.to_le_bytes());
    let f = m.bytes(FRAMES + 0x20, 18);
    assert_eq!((f[0], f[1], f[2], f[15], f[17]), (0x5f, 0x60, 0x58, 0x50, 2));
    assert_eq!(m.run(0, &ask(0xa1, 0, 0, &[(DATA, 512)])).1, 0x451);
}

#[test]
fn sectors_come_and_go() {
    let m = Machine::new();
    let data: Vec<u8> = (0..8192u32).map(|i| (i / 7) as u8).collect();
    m.put(DATA, &data);
    // In two regions of odd shape; 48-bit DMA, and back by 28-bit DMA, PIO, and in old addresses.
    let parts = [(DATA, 1000), (DATA + 1000, 7192)];
    assert_eq!(m.run(0, &ask(0x35, 100, 16, &parts)), (1, 0x50));
    let mut back = vec![0; 8192];
    m.image.read_bytes(100 * 512, &mut back).unwrap();
    assert!(back == data);
    for (code, end) in [(0x25, 1), (0xc8, 1), (0x20, 2), (0x29, 2)] {
        m.put(DATA, &[0; 8192]);
        assert_eq!(m.run(0, &ask(code, 100, 16, &parts)), (end, 0x50), "{code:#x}");
        assert!(m.bytes(DATA, 8192) == data, "{code:#x}");
    }
    // Sector 100 is head 1, sector 38 of cylinder 0.
    let old = Ask { device: 1, ..ask(0x20, 38, 1, &[(DATA, 512)]) };
    m.put(DATA, &[0; 512]);
    m.run(0, &old);
    assert!(m.bytes(DATA, 512) == data[..512]);
    // Flushes, FUA, power, features.
    for (code, features) in [(0xe7, 0), (0xea, 0), (0xe5, 0), (0xef, 2), (0xc6, 0)] {
        let a = Ask { features, ..ask(code, 0, 0, &[]) };
        assert_eq!(m.run(0, &a), (1, 0x50), "{code:#x}");
    }
    assert_eq!(m.run(0, &ask(0x3d, 5, 1, &[(DATA, 512)])), (1, 0x50));
}

#[test]
fn trimmed_sectors_read_as_zeros() {
    let m = Machine::new();
    m.image.writable().unwrap().write_bytes(0, &[7; 8192]).unwrap();
    let mut ranges = (8u64 | 4 << 48).to_le_bytes().to_vec();
    ranges.resize(512, 0);
    m.put(DATA, &ranges);
    let trim = Ask { features: 1, ..ask(6, 0, 1, &[(DATA, 512)]) };
    assert_eq!(m.run(0, &trim), (1, 0x50));
    let mut b = [1; 8192];
    m.image.read_bytes(0, &mut b).unwrap();
    assert!(b[4096..6144].iter().all(|b| *b == 0) && b[4095] == 7 && b[6144] == 7);
    m.put(DATA, &((SIZE / 512) | (1 << 48)).to_le_bytes());
    assert_eq!(m.run(0, &trim).1, 0x1451);
}

#[test]
fn queued_commands_are_done_side_by_side() {
    let m = Machine::new();
    for slot in 0..32u64 {
        m.put(DATA + slot * 512, &[slot as u8 + 1; 512]);
        let write = Ask {
            features: 1,
            count: (slot as u16) << 3,
            ..ask(0x61, slot * 3, 0, &[(DATA + slot * 512, 512)])
        };
        m.prepare(slot, &write);
    }
    m.set_port(0, SACT, u32::MAX);
    m.set_port(0, CI, u32::MAX);
    m.wait(|| m.port(0, SACT) == 0);
    assert_eq!((m.port(0, CI), m.port(0, TFD)), (0, 0x50));
    assert_eq!(m.bytes(FRAMES + 0x58, 2), [0xa1, 0x40]);
    for slot in 0..32u64 {
        let mut b = [0; 512];
        m.image.read_bytes(slot * 3 * 512, &mut b).unwrap();
        assert_eq!(b, [slot as u8 + 1; 512]);
    }
}

#[test]
fn an_error_stops_the_list_and_is_logged() {
    let m = Machine::new();
    let beyond = SIZE / 512;
    assert_eq!(m.run(0, &ask(0x25, beyond - 1, 2, &[(DATA, 1024)])), (1 << 30 | 1, 0x1451));
    assert_eq!(m.run(0, &ask(0xfe, 0, 0, &[])), (1 << 30 | 1, 0x451));
    // Less room than data.
    let (is, _) = m.run(0, &ask(0x25, 0, 2, &[(DATA, 512)]));
    assert_eq!(is & (1 << 24), 1 << 24);
    // A queued command fails: the log tells which.
    m.prepare(5, &Ask { features: 1, count: 5 << 3, ..ask(0x60, beyond, 0, &[(DATA, 512)]) });
    m.set_port(0, SACT, 1 << 5);
    m.set_port(0, CI, 1 << 5);
    m.wait(|| m.port(0, IS) & 1 << 30 != 0);
    assert_eq!(m.port(0, SACT), 1 << 5);
    m.set_port(0, CI, 1);
    assert_eq!(m.port(0, CI), 1, "nothing more is taken");
    m.stop(0);
    assert_eq!((m.port(0, SACT), m.port(0, CI)), (0, 0));
    m.set_port(0, IS, u32::MAX);
    m.start(0);
    assert_eq!(m.run(0, &ask(0x2f, 0x10, 1, &[(DATA, 512)])).0, 2);
    let log = m.bytes(DATA, 512);
    assert_eq!((log[0], log[2], log[3]), (5, 0x51, 0x14));
    assert_eq!(u32::from_le_bytes(log[4..8].try_into().unwrap()) & 0xff_ffff, beyond as u32);
}

#[test]
fn what_lies_nowhere_is_a_bus_error() {
    let m = Machine::new();
    let fatal = |what: &str| {
        m.wait(|| m.port(0, IS) & 1 << 29 != 0);
        m.stop(0);
        m.set_port(0, IS, u32::MAX);
        m.start(0);
        assert_eq!(m.run(0, &ask(0xec, 0, 0, &[(DATA, 512)])).0, 2, "{what}");
    };
    // The list, a table, data, descriptions of data.
    m.set_port(0, 4, 0xffff_ffff);
    m.set_port(0, CI, 1);
    m.wait(|| m.port(0, IS) & 1 << 29 != 0);
    m.set_port(0, 4, 0);
    fatal("list");
    m.prepare(0, &ask(0x25, 0, 1, &[(u64::MAX - 100, 512)]));
    m.set_port(0, CI, 1);
    fatal("data");
    m.prepare(0, &ask(0x35, 0, 1, &[(0x4000_0000, 512)]));
    m.set_port(0, CI, 1);
    fatal("data to write");
    m.put(LIST + 8, &0xffff_ff80u64.to_le_bytes());
    m.set_port(0, CI, 1);
    fatal("table");
    // Frames without a place do no harm.
    m.set_port(0, 8, 0xffff_ff00);
    assert_eq!(m.run(0, &ask(0xec, 0, 0, &[(DATA, 512)])).0, 2);
}

#[test]
fn interrupts_follow_the_registers() {
    let m = Machine::new();
    m.rig.sink.levels();
    // INTA of slot 31 without chipset routes: some GSI, up and down.
    m.run(0, &ask(0xe7, 0, 0, &[]));
    let levels = m.rig.sink.levels();
    assert_eq!(levels.iter().map(|l| l.1).collect::<Vec<_>>(), [true, false], "{levels:?}");
    // By message: one for a port that was quiet, again when one is left.
    let f = &m.ahci.function;
    let cap = u16::from(f.u8(0x34));
    let msi = (0..8).scan(cap, |at, _| {
        let here = *at;
        *at = f.u8(here + 1).into();
        Some(here)
    });
    let msi = msi.into_iter().find(|at| f.u8(*at) == 5).unwrap();
    f.write(msi + 4, &0xfee0_0000u32.to_le_bytes());
    f.write(msi + 12, &[0x41, 0]);
    f.write(msi + 2, &[1, 0]);
    for port in [0, 2] {
        m.prepare(0, &ask(0xe5, 0, 0, &[]));
        m.set_port(port, CI, 1);
        m.wait(|| m.port(port, IS) & 1 != 0);
    }
    m.wait(|| m.get(8) == 5);
    let message = MsiMessage { addr: 0xfee0_0000, data: 0x41 };
    assert_eq!(m.rig.sink.messages(), [message; 2]);
    m.set_port(0, IS, 1);
    m.set(8, 1);
    assert_eq!((m.get(8), m.rig.sink.messages().len()), (4, 3));
    // A port that still wants one keeps its bit.
    m.set(8, 4);
    assert_eq!(m.get(8), 4);
    m.set_port(2, IS, 1);
    m.set(8, 4);
    assert_eq!(m.get(8), 0);
}

#[test]
fn resets_of_device_port_and_adapter() {
    let m = Machine::new();
    // Over the cable.
    m.stop(0);
    m.set_port(0, SERR, u32::MAX);
    m.set_port(0, SCTL, 0x301);
    assert_eq!((m.port(0, SSTS), m.port(0, TFD)), (0, 0x80));
    m.put(FRAMES + 0x40, &[0]);
    m.set_port(0, SCTL, 0x300);
    assert_eq!((m.port(0, SSTS) & 0xf, m.port(0, TFD)), (3, 0x150));
    assert_eq!(m.port(0, IS) & 1 << 6, 1 << 6);
    m.set_port(0, SERR, 1 << 26);
    assert_eq!(m.port(0, IS) & 1 << 6, 0);
    assert_eq!(m.bytes(FRAMES + 0x40, 7), [0x34, 0, 0x50, 1, 1, 0, 0]);
    // By software: two frames that write the control register.
    m.start(0);
    for control in [4u8, 0] {
        m.prepare(0, &ask(0, 0, 0, &[]));
        m.put(TABLES + 1, &[0]);
        m.put(TABLES + 15, &[control]);
        m.set_port(0, CI, 1);
        m.wait(|| m.port(0, CI) == 0);
    }
    assert_eq!((m.port(0, TFD), m.port(0, SIG)), (0x150, 0x101));
    // The adapter.
    m.set(4, ENABLE | HR);
    m.wait(|| m.get(4) & HR == 0);
    assert_eq!((m.get(4), m.port(0, CMD) & 1, m.port(0, IE)), (1 << 31, 0, 0));
    Device::reset(&*m.ahci);
    m.set(4, ENABLE);
    m.start(0);
    assert_eq!(m.run(0, &ask(0xec, 0, 0, &[(DATA, 512)])).0, 2);
}

#[test]
fn a_disc_is_read() {
    let m = Machine::new();
    assert_eq!(m.run(2, &ask(0xec, 0, 0, &[(DATA, 512)])).1, 0x451);
    assert_eq!(m.bytes(FRAMES + 0x45, 2), [0x14, 0xeb]);
    assert_eq!(m.run(2, &ask(0xa1, 0, 0, &[(DATA, 512)])).0, 2);
    assert_eq!(m.bytes(DATA, 2), [0xc0, 0x85]);
    assert_eq!(m.run(2, &packet(&[0x25], 8)), (1, 0x50));
    assert_eq!(m.bytes(DATA, 8), [0, 0, 0, 63, 0, 0, 8, 0]);
    // The reason of the interrupt says that the command is done.
    assert_eq!(m.bytes(FRAMES + 0x40 + 12, 1), [3]);
    assert_eq!(m.run(2, &packet(&[0x28, 0, 0, 0, 0, 9, 0, 0, 2], 4096)), (1, 0x50));
    let b = m.bytes(DATA, 4096);
    assert!(b[..2048] == [9; 2048] && b[2048..] == [10; 2048]);
    assert_eq!(m.bytes(LIST + 4, 4), 4096u32.to_le_bytes());
    // Beyond the disc, with the sense for it.
    assert_eq!(m.run(2, &packet(&[0x28, 0, 0, 0, 0, 63, 0, 0, 2], 4096)), (1 << 30 | 1, 0x5441));
    assert_eq!(m.run(2, &packet(&[3, 0, 0, 0, 18], 18)), (1, 0x50));
    let s = m.bytes(DATA, 18);
    assert_eq!((s[2], s[12]), (5, 0x21));
    // An empty drive.
    assert_eq!(m.run(3, &packet(&[0], 1)), (1 << 30 | 1, 0x2441));
    assert_eq!(m.run(3, &packet(&[0x12, 0, 0, 0, 36], 36)), (1, 0x50));
    assert_eq!(m.bytes(DATA + 8, 6), b"TANDEM");
}

#[test]
fn places_are_checked() {
    let rig = Rig::new();
    let mut ctx = rig.context();
    ctx.backends.drives.insert("d".into(), drive(&image(SIZE)));
    let fault = |name, list: &[(&str, &str)]| {
        let props: Vec<_> = list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        crate::registry::create(&ctx, name, &props).err().map(|f| f[0].to_string())
    };
    let said = |list: &[(&str, &str)]| fault("ide-hd", list).unwrap();
    assert!(said(&[("drive", "d")]).contains("no SATA adapter"));
    assert_eq!(fault("ahci", &[("id", "a")]), None);
    for bad in ["a.6", "b.0", "a", "a.x", "a.99999999999999999999"] {
        assert!(said(&[("drive", "d"), ("bus", bad)]).contains(bad), "{bad}");
    }
    assert!(said(&[("bus", "a.0")]).contains("no drive"));
    assert!(said(&[("drive", "d"), ("serial", "123456789012345678901")]).contains("longer"));
    assert_eq!(fault("ide-hd", &[("drive", "d"), ("bus", "a.0"), ("wwn", "0x5000c5001")]), None);
    assert_eq!(fault("ide-cd", &[("bus", "a.0")]).map(|f| f.contains("is taken")), Some(true));
    assert!(said(&[("drive", "d")]).contains("has a device already"));
    for _ in 0..5 {
        assert_eq!(fault("ide-cd", &[]), None);
    }
    assert!(fault("ide-cd", &[]).unwrap().contains("all ports"));
}

/// A guest that writes what it likes, where it likes.
#[test]
fn a_hostile_guest_gets_nowhere() {
    let m = Machine::new();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    const CODES: [u8; 16] = [
        0x20, 0x25, 0x30, 0x35, 0x60, 0x61, 0xa0, 0xc8, 0xca, 0xec, 0xa1, 0x2f, 0x06, 0xef, 0xe7,
        0x00,
    ];
    for round in 0..3000 {
        let slot = random() % 32;
        let len = if round % 3 == 0 { 1 + random() as u32 % 0x40_0000 } else { 4096 };
        let at = if round % 5 == 0 { random() } else { DATA + random() % 0x8000 };
        let mut a = ask(CODES[random() as usize % 16], random() % 9000, random() as u16, &[]);
        (a.features, a.device) = (random() as u16 % 40, random() as u8);
        a.regions = vec![(at, len); 1 + random() as usize % 3];
        if random() % 2 == 0 {
            let mut cdb = [0; 12];
            cdb.iter_mut().for_each(|b| *b = random() as u8);
            a.cdb = Some(cdb);
        }
        m.prepare(slot, &a);
        if random() % 4 == 0 {
            m.put(TABLES + slot * 0x400 + random() % 0x100, &random().to_le_bytes());
            m.put(LIST + slot * 32 + random() % 32, &random().to_le_bytes());
        }
        let n = [0, 2, 3][random() as usize % 3];
        m.set_port(n, SACT, random() as u32);
        m.set_port(n, CI, random() as u32);
        if random() % 3 == 0 {
            m.set((random() % 0x420) & !3, random() as u32);
        }
        if random() % 8 == 0 {
            m.stop(n);
            m.set_port(n, 4, 0);
            m.set_port(n, 12, 0);
            m.start(n);
        }
    }
    Device::reset(&*m.ahci);
    m.set(4, ENABLE);
    m.start(0);
    m.set_port(0, 4, 0);
    m.set_port(0, 12, 0);
    assert_eq!(m.run(0, &ask(0xec, 0, 0, &[(DATA, 512)])).0, 2);
    assert_eq!(SECTOR, 512);
}
