//! A driver of the controller: queues in memory, registers through the BAR.

use super::*;
use crate::pci::assign::{Ranges, assign};
use crate::virtio::testing::Rig;
use std::cell::RefCell;
use std::path::Path;
use tandem_backends::block::Image;
use tandem_backends::block::drive::{Drive, DriveOptions};
use tandem_backends::block::file::HostFile;
use tandem_backends::block::raw::Raw;
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 8 << 20;
/// Queues: submission and completion of pair `n`.
const QUEUES: u64 = 0x10_0000;
const DATA: u64 = 0x12_0000;
const LIST: u64 = 0x11_0000;
const ENTRIES: u16 = 8;

struct Ring {
    tail: u16,
    head: u16,
    phase: u16,
}

struct Machine {
    rig: Rig,
    image: Arc<dyn Image>,
    ctx: DeviceContext,
    device: Arc<dyn Device>,
    base: u64,
    rings: RefCell<Vec<Ring>>,
}

#[derive(Clone, Copy, Default)]
struct Ask {
    opcode: u8,
    flags: u8,
    namespace: u32,
    prp: [u64; 2],
    words: [u32; 6],
}

fn props(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn at(devfn: &str) -> crate::pci::Devfn {
    devfn.parse().unwrap()
}

impl Machine {
    fn new() -> Machine {
        let rig = Rig::new();
        let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
        file.set_len(SIZE).unwrap();
        let image: Arc<dyn Image> = Arc::new(Raw::new(file).unwrap());
        let mut ctx = rig.context();
        let options = DriveOptions { discard: true, ..DriveOptions::default() };
        ctx.backends.drives.insert("d".into(), Drive::new(image.clone(), options));
        let list = props(&[("drive", "d"), ("serial", "abc"), ("addr", "3"), ("bootindex", "4")]);
        let device = crate::registry::create(&ctx, "nvme", &list).unwrap();
        assert_eq!(ctx.boot_order.file(false), b"/pci@i0cf8/pci1b36,10@3/namespace@1,0\0");
        let ranges = Ranges { io: 0..0, mem32: 0xc000_0000..0xd000_0000, mem64: 0..0 };
        assign(&rig.pci.bus, ranges).unwrap();
        rig.pci.bus.config_write(0, at("3"), 4, &[6, 0]);
        let mut bar = [0; 4];
        rig.pci.bus.config_read(0, at("3"), 0x10, &mut bar);
        let base = u64::from(u32::from_le_bytes(bar) & !0xf);
        let m = Machine { rig, image, ctx, device, base, rings: RefCell::default() };
        m.start();
        m
    }

    fn start(&self) {
        self.rings.borrow_mut().clear();
        self.put(QUEUES, &[0; 0x8000]);
        self.set(0x24, u32::from(ENTRIES - 1) * 0x1_0001);
        self.set(0x28, QUEUES as u32);
        self.set(0x30, QUEUES as u32 + 0x1000);
        self.set(0x14, 0x46_0001);
        assert_eq!(self.get(0x1c), 1);
        self.ring();
    }
    fn ring(&self) {
        self.rings.borrow_mut().push(Ring { tail: 0, head: 0, phase: 1 });
    }
    fn get(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        self.rig.pci.io.mmio_read(self.base + at, &mut b);
        u32::from_le_bytes(b)
    }
    fn set(&self, at: u64, value: u32) {
        self.rig.pci.io.mmio_write(self.base + at, &value.to_le_bytes());
    }
    fn put(&self, at: u64, bytes: &[u8]) {
        self.rig.map.ram().write_slice(bytes, GuestAddress(at)).unwrap();
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.rig.map.ram().read_slice(&mut b, GuestAddress(at)).unwrap();
        b
    }

    fn submit(&self, queue: u64, id: u16, a: &Ask) {
        let mut e = vec![a.opcode, a.flags];
        e.extend(id.to_le_bytes());
        e.extend(a.namespace.to_le_bytes());
        e.extend([0; 16]);
        a.prp.iter().for_each(|p| e.extend(p.to_le_bytes()));
        a.words.iter().for_each(|w| e.extend(w.to_le_bytes()));
        let mut rings = self.rings.borrow_mut();
        let r = &mut rings[queue as usize];
        self.put(QUEUES + queue * 0x2000 + u64::from(r.tail) * 64, &e);
        r.tail = (r.tail + 1) % ENTRIES;
        self.set(0x1000 + queue * 8, r.tail.into());
    }

    /// Waits for the next completion: name, status, result.
    fn reap(&self, queue: u64) -> (u16, u16, u32) {
        let mut rings = self.rings.borrow_mut();
        let r = &mut rings[queue as usize];
        let at = QUEUES + queue * 0x2000 + 0x1000 + u64::from(r.head) * 16;
        let e = loop {
            let e = self.bytes(at, 16);
            if u16::from(e[14] & 1) == r.phase {
                break e;
            }
            std::thread::yield_now();
        };
        r.head += 1;
        if r.head == ENTRIES {
            (r.head, r.phase) = (0, 1 - r.phase);
        }
        self.set(0x1004 + queue * 8, r.head.into());
        let half = |at: usize| u16::from_le_bytes([e[at], e[at + 1]]);
        assert_eq!(u64::from(half(10)), queue);
        (half(12), half(14) >> 1, u32::from_le_bytes([e[0], e[1], e[2], e[3]]))
    }

    fn run(&self, queue: u64, a: Ask) -> (u16, u32) {
        self.submit(queue, 77, &a);
        let (id, status, result) = self.reap(queue);
        assert_eq!(id, 77);
        (status, result)
    }

    fn admin(&self, opcode: u8, prp: u64, words: [u32; 2]) -> (u16, u32) {
        let words = [words[0], words[1], 0, 0, 0, 0];
        self.run(0, Ask { opcode, prp: [prp, 0], words, ..Ask::default() })
    }

    /// Makes pair 1 with interrupts.
    fn pair(&self) {
        let size = u32::from(ENTRIES - 1) << 16 | 1;
        assert_eq!(self.admin(5, QUEUES + 0x3000, [size, 1 << 16 | 3]).0, 0);
        assert_eq!(self.admin(1, QUEUES + 0x2000, [size, 1 << 16 | 1]).0, 0);
        self.ring();
    }
}

/// A read or write of `blocks` blocks from `first` on.
fn io(opcode: u8, first: u64, blocks: u32, prp: [u64; 2]) -> Ask {
    let words = [first as u32, (first >> 32) as u32, blocks - 1, 0, 0, 0];
    Ask { opcode, namespace: 1, prp, words, ..Ask::default() }
}

const READ: u8 = 2;
const WRITE: u8 = 1;
/// Do not retry.
const DNR: u16 = 0x4000;

#[test]
fn controller_and_namespace_say_what_they_are() {
    let m = Machine::new();
    assert_eq!((m.get(8), m.get(0) & 0xffff, m.get(4)), (0x1_0400, 1023, 0x20));
    assert_eq!(m.admin(6, DATA, [1, 0]).0, 0);
    let b = m.bytes(DATA, 4096);
    assert_eq!((&b[4..8], b[77], b[512], b[520]), (&b"abc "[..], 7, 0x66, 0xc));
    let namespace = Ask { opcode: 6, namespace: 1, prp: [DATA, 0], ..Ask::default() };
    assert_eq!(m.run(0, namespace).0, 0);
    let b = m.bytes(DATA, 4096);
    assert_eq!((u64::from_le_bytes(b[..8].try_into().unwrap()), b[130]), (SIZE / 512, 9));
    assert_eq!(m.run(0, Ask { namespace: 2, ..namespace }).0, DNR | 0xb);
    // Over the end of a page.
    assert_eq!(m.run(0, Ask { prp: [DATA + 4092, DATA + 8192], ..namespace }).0, 0);
    assert_eq!(m.bytes(DATA + 4092, 4), b[..4]);
    assert_eq!(m.bytes(DATA + 8192, 4), b[4..8]);
    assert_eq!(m.run(0, Ask { prp: [DATA + 4092, 4], ..namespace }).0, DNR | 0x13);
    for cns in [2, 3] {
        let words = [cns, 0, 0, 0, 0, 0];
        let a = Ask { words, namespace: cns - 2, ..namespace };
        assert_eq!(m.run(0, a).0, 0);
    }
    assert_eq!(m.admin(6, DATA, [9, 0]).0, DNR | 2);
    assert_eq!(m.admin(9, 0, [7, 0]), (0, 63 | 63 << 16));
    assert_eq!(m.admin(0x0a, 0, [6, 0]), (0, 1));
    assert_eq!(m.admin(9, 0, [6, 0]).0, 0);
    assert_eq!(m.admin(0x0a, 0, [6, 0]), (0, 0));
    assert_eq!(m.admin(2, DATA, [127 << 16 | 2, 0]).0, 0);
    assert_eq!(m.bytes(DATA, 4), [0, 67, 1, 100]);
    assert_eq!(m.admin(0x55, 0, [0, 0]).0, DNR | 1);
}

#[test]
fn blocks_come_and_go() {
    let m = Machine::new();
    m.pair();
    let data: Vec<u8> = (0..512 * 1024u32).map(|i| (i / 3 + i / 70000) as u8).collect();
    m.put(DATA, &data);
    // 512 KiB by a list of 127 pages behind the first, which continues in a second one.
    let page = |i: u64| DATA + i * 4096;
    let first = LIST + 4096 - 64;
    for i in 0..7 {
        m.put(first + i * 8, &page(i + 1).to_le_bytes());
    }
    m.put(first + 56, &(LIST + 4096).to_le_bytes());
    for i in 8..128 {
        m.put(LIST + 4096 + (i - 8) * 8, &page(i).to_le_bytes());
    }
    assert_eq!(m.run(1, io(WRITE, 100, 1024, [DATA, first])).0, 0);
    let mut back = vec![0; data.len()];
    m.image.read_bytes(51200, &mut back).unwrap();
    assert!(back == data);
    m.put(DATA, &vec![0; data.len()]);
    assert_eq!(m.run(1, io(READ, 100, 1024, [DATA, first])).0, 0);
    assert!(m.bytes(DATA, data.len()) == data);
    // Two pages, from within the first.
    assert_eq!(m.run(1, io(READ, 100, 8, [DATA + 1024, DATA + 0x10000])).0, 0);
    assert!(m.bytes(DATA + 1024, 3072) == data[..3072]);
    assert!(m.bytes(DATA + 0x10000, 1024) == data[3072..4096]);
    // Durable; flushes; zeros; giving up.
    let mut durable = io(WRITE, 0, 1, [DATA, 0]);
    durable.words[2] |= 1 << 30;
    assert_eq!(m.run(1, durable).0, 0);
    assert_eq!(m.run(1, Ask { namespace: u32::MAX, ..Ask::default() }).0, 0);
    assert_eq!(m.run(1, io(8, 100, 8, [0, 0])).0, 0);
    let range = [0u32, 8, 108, 0].map(u32::to_le_bytes).concat();
    m.put(DATA, &range);
    let mut trim = io(9, 0, 1, [DATA, 0]);
    trim.words[1] = 4;
    assert_eq!(m.run(1, trim).0, 0);
    m.image.read_bytes(51200, &mut back).unwrap();
    assert!(back[..8192].iter().all(|b| *b == 0) && back[8192..] == data[8192..]);
}

#[test]
fn what_makes_no_sense_fails() {
    let m = Machine::new();
    let blocks = SIZE / 512;
    let size = u32::from(ENTRIES - 1) << 16;
    for (opcode, words, status) in [
        (1, [size | 1, 1 << 16 | 1], 0x100),
        (5, [size, 1], 0x101),
        (5, [size | 65, 1], 0x101),
        (5, [1, 1], 0x102),
        (5, [1 | 2000 << 16, 1], 0x102),
        (5, [size | 1, 2], 0x02),
        (5, [size | 1, 65 << 16 | 1], 0x108),
        (0, [0, 0], 0x101),
        (0, [3, 0], 0x101),
        (4, [0, 0], 0x101),
        (2, [0x70, 0], 0x109),
        (9, [7, 0xffff], 2),
        (9, [0x8000_0006, 0], 0x10d),
    ] {
        let prp = QUEUES + 0x3000;
        assert_eq!(m.admin(opcode, prp, words).0, DNR | status, "{opcode} {words:x?}");
    }
    assert_eq!(m.admin(5, QUEUES + 1, [size | 1, 1]).0, DNR | 0x13);
    m.pair();
    assert_eq!(m.admin(4, 0, [1, 0]).0, DNR | 0x10c);
    let bad = [DATA, 0];
    let mut other = io(READ, 0, 1, bad);
    other.namespace = 2;
    assert_eq!(m.run(1, other).0, DNR | 0xb);
    assert_eq!(m.run(1, io(READ, blocks, 1, bad)).0, DNR | 0x80);
    assert_eq!(m.run(1, io(READ, u64::MAX, 2, bad)).0, DNR | 0x80);
    assert_eq!(m.run(1, io(READ, 0, 2000, bad)).0, DNR | 2);
    assert_eq!(m.run(1, Ask { flags: 0x40, ..io(READ, 0, 1, bad) }).0, DNR | 2);
    assert_eq!(m.run(1, io(READ, 0, 1, [DATA + 1, 0])).0, DNR | 0x13);
    assert_eq!(m.run(1, io(READ, 0, 1, [1 << 40, 0])).0, 4);
    assert_eq!(m.run(1, io(READ, 0, 1024, [DATA, 1 << 40])).0, 4);
    assert_eq!(m.run(1, io(READ, 0, 1024, [DATA, LIST + 4])).0, DNR | 0x13);
    // A list that leads to itself.
    m.put(LIST + 4088, &(LIST + 4088).to_le_bytes());
    assert_eq!(m.run(1, io(READ, 0, 1024, [DATA, LIST + 4088])).0, DNR | 0x13);
    assert_eq!(m.run(1, io(0x77, 0, 1, bad)).0, DNR | 1);
    assert_eq!(m.run(1, io(READ, 0, 1, bad)).0, 0);
    // Queues go, the submission queue first.
    assert_eq!(m.admin(0, 0, [1, 0]).0, 0);
    assert_eq!(m.admin(4, 0, [1, 0]).0, 0);
}

#[test]
fn completions_wait_for_room_and_interrupt() {
    let m = Machine::new();
    m.pair();
    m.rig.sink.levels();
    // Seven commands fill the queue; the pin stays up until the last has been seen.
    for id in 0..7 {
        m.submit(1, id, &io(READ, id.into(), 1, [DATA + u64::from(id) * 512, 0]));
    }
    let mut seen: Vec<u16> = (0..7).map(|_| m.reap(1).0).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..7).collect::<Vec<_>>());
    let levels = m.rig.sink.levels();
    assert_eq!(levels.last().map(|l| l.1), Some(false), "{levels:?}");
    // Masked by INTMS.
    m.set(0xc, u32::MAX);
    m.run(1, io(READ, 0, 1, [DATA, 0]));
    assert!(m.rig.sink.levels().iter().all(|l| !l.1));
    m.set(0x10, u32::MAX);
    // Requests for events wait, as many as there is room for.
    for _ in 0..4 {
        m.submit(0, 9, &Ask { opcode: 0xc, ..Ask::default() });
    }
    assert_eq!(m.admin(0xc, 0, [0, 0]).0, DNR | 0x105);
}

#[test]
fn it_stops_and_starts() {
    let m = Machine::new();
    m.pair();
    m.run(1, io(WRITE, 3, 1, [DATA, 0]));
    // A shutdown, seen to its end.
    m.set(0x14, 0x46_4001);
    while m.get(0x1c) & 0xc != 8 {
        std::thread::yield_now();
    }
    for _ in 0..3 {
        m.set(0x14, 0);
        while m.get(0x1c) & 1 != 0 {
            std::thread::yield_now();
        }
        m.start();
        m.pair();
        assert_eq!(m.run(1, io(READ, 3, 1, [DATA, 0])).0, 0);
    }
    m.device.reset();
    assert_eq!((m.get(0x14), m.get(0x1c), m.get(0x24)), (0, 0, 0));
    m.start();
    // Queues that are too short, or pages that are not offered.
    m.set(0x14, 0);
    m.set(0x24, 0);
    m.set(0x14, 0x46_0001);
    assert_eq!(m.get(0x1c), 2);
    m.set(0x14, 0);
    assert_eq!(m.get(0x1c), 0);
    let said = |list: &[(&str, &str)]| {
        let made = crate::registry::create(&m.ctx, "nvme", &props(list));
        made.err().unwrap()[0].to_string()
    };
    assert!(said(&[("drive", "d")]).contains("serial"));
    assert!(said(&[("serial", "1")]).contains("drive=ID"));
    assert!(said(&[("drive", "d"), ("serial", "1")]).contains("has a device already"));
    let odd = [("drive", "d"), ("serial", "1"), ("logical_block_size", "1000")];
    assert!(said(&odd).contains("4096"));
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
    for round in 0..300 {
        m.set(0x14, 0);
        while m.get(0x1c) & 1 != 0 {
            std::thread::yield_now();
        }
        m.start();
        for _ in 0..20 {
            let queue = random() % 3;
            let opcode = [0, 1, 2, 4, 5, 6, 8, 9, 0xa, 0xc][random() as usize % 10];
            let mut e =
                vec![opcode, (random() % 64 == 0) as u8, 1, 0, (random() % 3) as u8, 0, 0, 0];
            e.extend([0; 16]);
            for _ in 0..2 {
                let sane = QUEUES + random() % 0x100 * 0x1000;
                let p = if random() % 4 == 0 { random() } else { sane };
                e.extend(p.to_le_bytes());
            }
            for _ in 0..6 {
                let sane = random() as u32 & 0x0007_0003;
                let w = if random() % 4 == 0 { random() as u32 } else { sane };
                e.extend(w.to_le_bytes());
            }
            m.put(QUEUES + queue * 0x2000 + random() % 8 * 64, &e);
            m.set(0x1000 + queue * 8, random() as u32 % 9);
            m.set(0x1004 + queue * 8, random() as u32 % 9);
            if random() % 16 == 0 {
                m.set((random() % 0x1300) & !3, random() as u32);
            }
        }
        if round % 50 == 0 {
            m.device.reset();
        }
    }
    m.device.reset();
    m.start();
    assert_eq!(m.admin(6, DATA, [1, 0]).0, 0);
}
