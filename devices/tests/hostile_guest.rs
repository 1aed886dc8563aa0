//! A guest that pokes at random: whatever it reads, writes and leaves in memory, the board goes on.

use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::irq::{IrqSink, MsiMessage, MsiSink};
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_devices::gsi::IrqInputs;
use tandem_devices::pci::assign::{Ranges, assign};
use tandem_devices::pci::decode::Decoder;
use tandem_devices::pci::ich9::Ich9Lpc;
use tandem_devices::pci::mch::{ECAM_BASE, Mch};
use tandem_devices::pci::pirq::IrqRouter;
use tandem_devices::pci::{Bus, host};
use tandem_devices::power::{PowerRequest, PowerSink};
use tandem_devices::registry::{Backends, DeviceContext, create};
use vm_memory::{Bytes, GuestAddress};

struct Deaf;
impl IrqSink for Deaf {
    fn set_level(&self, _: u32, _: bool) {}
}
impl MsiSink for Deaf {
    fn send(&self, _: MsiMessage) {}
}
impl PowerSink for Deaf {
    fn request(&self, _: PowerRequest) {}
}

const RAM: u64 = 1 << 20;
const MEM: u64 = 0xc000_0000;

struct Board {
    io: Arc<IoBus>,
    root: Arc<Bus>,
    memory: Arc<GuestMap>,
}

fn board() -> Board {
    let io = Arc::new(IoBus::default());
    let irqs = IrqInputs::new(Arc::new(Deaf));
    let router = IrqRouter::new(&irqs);
    let root = Bus::root(Decoder::new(io.clone()), Arc::new(Deaf), router.clone());
    host::map_ports(&io, &root, None).unwrap();
    Mch::attach(&root, Some(ECAM_BASE), None).unwrap();
    Ich9Lpc::attach(&root, router, None, None).unwrap();
    let memory = GuestMap::new();
    memory.add("ram", RegionKind::Ram, 0, RAM).unwrap();
    let ctx = DeviceContext {
        io: io.clone(),
        irqs,
        msi: Arc::new(Deaf),
        clock: Clock::new(),
        memory: memory.clone(),
        power: Arc::new(Deaf),
        pci: Some(root.clone()),
        buses: Default::default(),
        directory: Default::default(),
        virtio_mmio: None,
        boot_order: Default::default(),
        backends: Backends::default(),
    };
    create(&ctx, "virtio-rng-pci", &[]).unwrap();
    let b = Board { io, root, memory };
    b.firmware();
    b
}

impl Board {
    fn firmware(&self) {
        let ranges = Ranges { io: 0xc000..0xd000, mem32: MEM..MEM + (1 << 28), mem64: 0..0 };
        assign(&self.root, ranges).unwrap();
        self.root.config_write(0, "1".parse().unwrap(), 4, &[7, 0]);
    }
}

/// xorshift64*: the same numbers on every run.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    /// Numbers that find edges more often than chance does.
    fn word(&mut self) -> u64 {
        let random = self.next();
        self.pick(&[0, 1, 2, 8, 0xf, 0x7f, 0x80, 0xffff, 0x8000, 0x1000, u64::MAX, random, MEM])
    }
}

fn access(board: &Board, r: &mut Random) {
    let mut data = r.word().to_le_bytes();
    let len = r.pick(&[1, 2, 4, 8]);
    let write = r.below(2) == 0;
    let functions = [0u64, 1 << 15, 0x1f << 15, 2 << 15];
    let ecam = ECAM_BASE + r.pick(&functions) + r.below(0x110);
    // The virtio BARs: the structures at 0xc0000000, the vectors behind them.
    let bar = MEM + r.pick(&[0, 0x1000, 0x2000, 0x3000, 0x4000]) + r.below(0x50);
    match r.below(8) {
        0 => {
            let port = r.pick(&[0xcf8, 0xcfc, 0xcfd, 0xcff, 0xcf9]);
            let len = len.min(4);
            if write {
                board.io.pio_write(port, &data[..len]);
            } else {
                board.io.pio_read(port, &mut data[..len]);
            }
        }
        1 | 2 if write => board.io.mmio_write(ecam, &data[..len]),
        1 | 2 => board.io.mmio_read(ecam, &mut data[..len]),
        3 => {
            let at = r.below(RAM - 8);
            board.memory.ram().write_slice(&data, GuestAddress(at)).unwrap();
        }
        _ if write => board.io.mmio_write(bar, &data[..len]),
        _ => board.io.mmio_read(bar, &mut data[..len]),
    }
}

/// Brings the device to life with rings full of random descriptors, and notifies.
fn wild_queue(board: &Board, r: &mut Random) {
    let w = |at: u64, v: &[u8]| board.io.mmio_write(MEM + at, v);
    w(0x14, &[0]);
    w(0x14, &[3]);
    w(8, &1u32.to_le_bytes());
    w(0xc, &[1, 0, 0, 0]);
    w(0x14, &[11]);
    w(0x16, &[0, 0]);
    w(0x18, &(1u16 << r.below(5)).to_le_bytes());
    for (at, addr) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
        w(at, &addr.to_le_bytes());
    }
    w(0x1c, &[1, 0]);
    w(0x14, &[15]);
    let ram = board.memory.ram();
    for n in 0..8u64 {
        let desc = [
            r.pick(&[0x8000, RAM - 4, u64::MAX, 0x1000, 0xdead_0000]).to_le_bytes(),
            (r.pick(&[0, 1, 16, 48, 0x1_0000, u64::from(u32::MAX)])
                | r.below(8) << 32
                | r.below(16) << 48)
                .to_le_bytes(),
        ];
        ram.write_slice(&desc.concat(), GuestAddress(0x1000 + 16 * n)).unwrap();
        let head = r.pick(&[0u16, 1, 2, 3, 7, 8, 0xffff]);
        ram.write_obj(head, GuestAddress(0x2004 + 2 * n)).unwrap();
    }
    ram.write_obj(r.pick(&[1u16, 2, 4, 8, 9, 0xffff]), GuestAddress(0x2002)).unwrap();
    w(0x3000, &[0, 0]);
}

#[test]
fn random_accesses_and_queues_end_nothing() {
    let board = board();
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let mut live = 0;
    for _ in 0..2000 {
        for _ in 0..100 {
            access(&board, &mut r);
        }
        board.root.reset();
        board.firmware();
        wild_queue(&board, &mut r);
        let mut status = [0];
        board.io.mmio_read(MEM + 0x14, &mut status);
        live += u32::from(status[0] & 4 != 0);
    }
    // Reset makes the board whole each time, so the device comes up each time.
    assert_eq!(live, 2000);
}
