//! Drivers that mean harm, for tests of every device: random descriptors, loops, tables in tables,
//! addresses out of memory, rings over buffers, registers written in any order. A case follows from
//! its number alone. What must hold whatever they do: no panic, no hang, and after a reset the device
//! works again.

use super::mmio::VirtioMmio;
use super::queue::{QueueConfig, VirtQueue};
use super::testing::Rig;
use super::{Activation, Signaller, VirtioDevice};
use crate::registry::Device;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::{GuestMap, RegionKind};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 0x20_0000;
/// How long a case may take before it counts as a hang.
const PATIENCE: Duration = Duration::from_secs(120);

/// xorshift64*: cases repeat exactly.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Hears what a device says.
#[derive(Default)]
struct Ear(AtomicU32);

impl Signaller for Ear {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// The start of a request that the device would understand, so that cases get past its first look.
pub type Header = fn(&mut Random) -> Vec<u8>;

/// Ends the test with the case's number if one hangs.
struct Watchdog {
    case: Arc<AtomicU64>,
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    fn new() -> Watchdog {
        let (alive, over) = mpsc::channel::<()>();
        let case = Arc::new(AtomicU64::new(0));
        let seen = case.clone();
        std::thread::spawn(move || {
            let mut last = u64::MAX;
            while let Err(mpsc::RecvTimeoutError::Timeout) = over.recv_timeout(PATIENCE) {
                let now = seen.load(Ordering::Relaxed);
                if now == last {
                    eprintln!("case {now} hangs");
                    std::process::abort();
                }
                last = now;
            }
        });
        Watchdog { case, _alive: alive }
    }
}

/// One queue that a hostile driver fills.
struct Field<'a> {
    r: &'a mut Random,
    map: &'a GuestMap,
    config: QueueConfig,
    header: Header,
}

impl Field<'_> {
    fn address(&mut self) -> u64 {
        match self.r.below(12) {
            0 => RAM - self.r.below(64),
            1 => RAM + self.r.below(1 << 20),
            2 => u64::MAX - self.r.below(8192),
            3 => self.config.desc + self.r.below(4096),
            4 => self.config.used + self.r.below(64),
            _ => self.r.below(RAM),
        }
    }

    fn length(&mut self) -> u32 {
        let any = self.r.next() as u32;
        self.r.pick(&[0, 1, 4, 12, 16, 17, 512, 513, 4096, 65536, u32::MAX, any & 0xfffff, any])
    }

    /// A table of `n` descriptors at `at`; some are right.
    fn table(&mut self, at: u64, n: u16, depth: u32) {
        for i in 0..n {
            let (mut addr, mut len) = (self.address(), self.length());
            let mut flags = self.r.pick(&[0u16, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 0xffff]);
            let mut next = self.r.pick(&[i.wrapping_add(1), i, 0, self.r.0 as u16]);
            if self.r.below(2) == 0 {
                // A request as drivers make it: header, data, status.
                let place = self.r.below(RAM - 0x1_0000);
                let header = (self.header)(self.r);
                let _ = self.map.ram().write_slice(&header, GuestAddress(place));
                (addr, len, flags, next) = (place, header.len() as u32, 1, i.wrapping_add(1));
            }
            if flags & 4 != 0 && depth < 2 && self.r.below(2) == 0 {
                let entries = self.r.pick(&[1u16, 2, 7, 64]);
                addr = self.r.below((RAM - 0x1000) / 16) * 16;
                len = u32::from(entries) * 16 + self.r.pick(&[0, 0, 0, 1, 15]);
                self.table(addr, entries, depth + 1);
            }
            self.descriptor(at + 16 * u64::from(i), addr, len, flags, next);
        }
    }

    fn descriptor(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut b = addr.to_le_bytes().to_vec();
        b.extend(len.to_le_bytes());
        b.extend(flags.to_le_bytes());
        b.extend(next.to_le_bytes());
        // Tables may lie where there is no memory.
        let _ = self.map.ram().write_slice(&b, GuestAddress(at));
    }

    /// Makes up to a queue of heads available, seldom more.
    fn offer(&mut self, next: u16) -> u16 {
        let size = self.config.size;
        let n = match self.r.below(50) {
            0 => self.r.next() as u16,
            _ => self.r.below(u64::from(size) + 1) as u16,
        };
        let ram = self.map.ram();
        for i in 0..n.min(size) {
            let head = match self.r.below(100) {
                0 => self.r.next() as u16,
                _ => self.r.below(size.into()) as u16,
            };
            let slot = u64::from(next.wrapping_add(i) % size);
            let _ = ram.write_obj(head.to_le(), GuestAddress(self.config.avail + 4 + 2 * slot));
        }
        let end = next.wrapping_add(n);
        let _ = ram.write_obj(self.r.pick(&[0u16, 1]), GuestAddress(self.config.avail));
        let _ = ram.write_obj(end.to_le(), GuestAddress(self.config.avail + 2));
        end
    }
}

/// Lets hostile drivers at the queues of a device, `cases` times with any of `features`.
pub fn torment_queues(
    make: impl Fn() -> Arc<dyn VirtioDevice>,
    features: &[u64],
    header: Header,
    cases: u64,
) {
    let dog = Watchdog::new();
    let map = GuestMap::new();
    map.add("ram", RegionKind::Ram, 0, RAM).unwrap();
    let device = make();
    for case in 1..=cases {
        dog.case.store(case, Ordering::Relaxed);
        let mut r = Random::new(case);
        let ear = Arc::new(Ear::default());
        let features = r.pick(features);
        let (mut queues, mut configs) = (Vec::new(), Vec::new());
        for (i, max) in device.queue_sizes().iter().enumerate() {
            let size = (1u16 << r.below(9)).min(*max);
            let place = |r: &mut Random| 0x10_0000 + r.below(0x8000) * 16;
            let config = QueueConfig {
                size,
                desc: place(&mut r),
                avail: place(&mut r),
                used: place(&mut r),
                enabled: true,
            };
            let q = VirtQueue::new(i as u16, &config, *max, features, map.clone(), ear.clone());
            configs.push(config);
            queues.push(q);
        }
        let mut next = vec![0u16; configs.len()];
        // What the rings hold is what the last case left there.
        for c in &configs {
            let _ = map.ram().write_obj(0u32, GuestAddress(c.avail));
        }
        device.activate(Activation { features, queues, signaller: ear.clone() });
        for _ in 0..1 + r.below(4) {
            let i = r.below(configs.len() as u64) as usize;
            let mut field = Field { config: configs[i], r: &mut r, map: &map, header };
            field.table(configs[i].desc, configs[i].size, 0);
            next[i] = field.offer(next[i]);
            device.notify(i as u16);
            let mut config = vec![r.next() as u8; r.below(9) as usize];
            let at = r.pick(&[0, 1, 8, 32, 59, 60, 200, u64::MAX - 3]);
            device.read_config(at, &mut config);
            device.write_config(at, &config);
            if r.below(8) == 0 {
                device.reset_queue(i as u16);
                let max = device.queue_sizes()[i];
                let ear = ear.clone();
                let q = VirtQueue::new(i as u16, &configs[i], max, features, map.clone(), ear);
                let _ = map.ram().write_obj(0u32, GuestAddress(configs[i].avail));
                next[i] = 0;
                if let Some(q) = q {
                    device.enable_queue(q);
                }
            }
        }
        device.reset();
    }
}

/// Reads and writes the registers of a device at random, over both transports.
pub fn torment_registers(make: impl Fn() -> Arc<dyn VirtioDevice>, steps: u64) {
    let dog = Watchdog::new();
    let rig = Rig::new();
    let mmio = VirtioMmio::new(make(), rig.map.clone(), rig.context().irqs.line(5));
    let pci = rig.attach(make());
    let mut r = Random::new(steps);
    for step in 0..steps {
        dog.case.store(step, Ordering::Relaxed);
        let near = r.below(0x48);
        let at = r.pick(&[near, near, near * 4, r.0 % 0x200, r.0 % 0x4000]);
        let (value, word) = (r.next(), r.below(0x20_0000));
        let value = r.pick(&[0, 1, 2, 4, 8, 15, 64, value, word, u64::MAX]);
        let data = &value.to_le_bytes()[..r.pick(&[1, 2, 4, 4, 4, 8])];
        mmio.write(at % 0x200, data);
        match data.len() {
            1 => pci.write8(at, value as u8),
            2 => pci.write16(at, value as u16),
            _ => pci.write32(at, value as u32),
        }
        let mut read = data.to_vec();
        mmio.read(at % 0x200, &mut read);
        pci.read32(at);
        if r.below(64) == 0 {
            // Otherwise most of it would happen to a device that waits for a reset.
            Device::reset(&*mmio);
            pci.write8(0x14, 0);
            let _ = pci.negotiate(super::feature::VERSION_1);
        }
    }
    Device::reset(&*mmio);
    pci.write8(0x14, 0);
}
