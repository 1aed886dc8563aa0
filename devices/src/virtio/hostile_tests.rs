//! Drivers that write anything into their queues: descriptors that loop, point anywhere and are as
//! long as they like, tables within tables, heads and indices of any value, at any time. No device
//! may panic or hang, and each must serve the next driver.
//!
//! Deterministic: the same walk in every run. `TANDEM_HOSTILE_ROUNDS` makes it longer.

use super::testing::Rig;
use super::{VirtioDevice, balloon, blk, console, feature, net, p9, rng, status};
use std::path::Path;
use std::sync::Arc;
use tandem_accel::memory::GuestRam;
use tandem_backends::block::drive::{Drive, DriveOptions};
use tandem_backends::block::file::HostFile;
use tandem_backends::block::raw::Raw;
use tandem_backends::chardev::Chardev;
use tandem_backends::entropy::HostEntropy;
use tandem_backends::net::Network;
use tandem_backends::net::user::{UserConfig, UserNet};
use tandem_backends::p9::Server;
use vm_memory::{Bytes, GuestAddress};

const QUEUE: u16 = 8;
/// Things written before the device is reset.
const STEPS: usize = 60;

fn rounds() -> usize {
    let given = std::env::var("TANDEM_HOSTILE_ROUNDS").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(60)
}

/// xorshift64*: plain, repeatable.
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
    /// Mostly addresses in RAM, also at its edges and far outside.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => 0x20_0000 - self.below(64),
            2 => u64::MAX - self.below(64),
            // Among the queues themselves.
            3 => 0x10_0000 + self.below(0x8_0000),
            _ => self.below(0x10_0000),
        }
    }
    fn len(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => u32::MAX - self.below(16) as u32,
            2 => self.below(1 << 20) as u32,
            3 => 16 * self.below(300) as u32,
            _ => self.below(2000) as u32,
        }
    }
    fn flags(&mut self) -> u16 {
        match self.below(6) {
            0 => self.next() as u16,
            1 => 4,
            n => (n as u16) & 3,
        }
    }
}

/// Fills part of memory with words that look like descriptors and like requests.
fn litter(ram: &GuestRam, random: &mut Random) {
    let at = random.below(0x10_0000) & !15;
    for n in 0..random.below(40) {
        let to = GuestAddress(at + 16 * n);
        let _ = ram.write_obj(random.address(), to);
        let rest = u64::from(random.len())
            | u64::from(random.flags()) << 32
            | random.below(u64::from(QUEUE)) << 48;
        let _ = ram.write_obj(rest, GuestAddress(to.0 + 8));
    }
    for _ in 0..20 {
        let kind = random.below(140);
        let _ = ram.write_obj(kind as u32, GuestAddress(random.below(0x10_0000) & !3));
    }
}

fn torment(device: Arc<dyn VirtioDevice>, seed: u64) {
    let rig = Rig::new();
    let n = device.queue_sizes().len().min(8) as u16;
    let d = rig.attach(device);
    let ram = rig.map.ram();
    let mut random = Random(seed);
    for _ in 0..rounds() {
        let offered = d.negotiate(u64::MAX).unwrap_err();
        // What was not offered is refused; of the rest, anything goes.
        let features = offered & random.next() | feature::VERSION_1;
        let agreed = d.negotiate(features).is_ok();
        let mut queues: Vec<_> = (0..n).map(|i| d.queue(i, QUEUE)).collect();
        d.driver_ok();
        for _ in 0..STEPS {
            let q = &mut queues[random.below(u64::from(n)) as usize];
            match random.below(12) {
                0 => litter(&ram, &mut random),
                1 => q.set_avail_flags(random.next() as u16),
                2 if random.below(20) == 0 => q.set_avail_index(random.next() as u16),
                3 => q.add_head(random.below(u64::from(QUEUE) + 1) as u16),
                4 => {
                    let at = 0x2000 + random.below(80);
                    match random.below(2) {
                        0 => d.write32(at, random.next() as u32),
                        _ => drop(d.read32(at)),
                    }
                }
                5 if random.below(10) == 0 => {
                    d.write16(0x16, random.below(10) as u16);
                    d.write16(0x3a, 1);
                }
                _ => {
                    for i in 0..QUEUE {
                        let next = random.below(u64::from(QUEUE) + 2) as u16;
                        let words = (random.address(), random.len(), random.flags(), next);
                        q.raw_descriptor(i, words);
                    }
                    q.add_head(random.below(u64::from(QUEUE)) as u16);
                    q.kick();
                }
            }
        }
        assert!(agreed || d.status() & status::DRIVER_OK == 0);
    }
    d.negotiate(feature::VERSION_1).unwrap();
    drop(d.queue(0, QUEUE));
    d.driver_ok();
    assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
}

#[test]
fn entropy() {
    torment(Arc::new(rng::VirtioRng::new(Arc::new(HostEntropy))), 1);
}

#[test]
fn disk() {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    file.set_len(1 << 20).unwrap();
    let options = DriveOptions { discard: true, ..DriveOptions::default() };
    let drive = Drive::new(Arc::new(Raw::new(file).unwrap()), options);
    let config = blk::BlkConfig { queues: 2, ..blk::BlkConfig::default() };
    torment(Arc::new(blk::VirtioBlk::new(drive, config)), 2);
}

#[test]
fn network() {
    // Nothing leaves the virtual network.
    let config = UserConfig { restrict: true, ..UserConfig::default() };
    let network = Network::start("hostile", Box::new(UserNet::new(config).unwrap())).unwrap();
    let config = net::NetConfig { pairs: 2, ..net::NetConfig::default() };
    torment(Arc::new(net::VirtioNet::new(network, config)), 3);
}

#[test]
fn console_ports() {
    let device = console::VirtioConsole::new();
    for name in ["one", "two"] {
        let chardev = Arc::new(Chardev::ring(4096).unwrap());
        device.add_port(None, name, false, chardev).unwrap();
    }
    torment(device, 4);
}

#[test]
fn memory_balloon() {
    let map = tandem_accel::memory::GuestMap::new();
    let kind = tandem_accel::memory::RegionKind::Ram;
    map.add("ram", kind, 0, 0x20_0000).unwrap();
    torment(Arc::new(balloon::VirtioBalloon::new(map, true, true)), 5);
}

#[test]
fn shared_directory() {
    let dir = std::env::temp_dir().join(format!("tandem-hostile-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let server = Server::new(&dir, true).unwrap();
    torment(Arc::new(p9::Virtio9p::new("t", server).unwrap()), 6);
    std::fs::remove_dir_all(&dir).unwrap();
}
