//! The devices that hostile drivers are let at.

use super::Choices;
use crate::virtio::{VirtioDevice, balloon, blk, console, net, p9, rng, testing, vsock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_backends::block::drive::{Drive, DriveOptions};
use tandem_backends::block::file::HostFile;
use tandem_backends::block::raw::Raw;
use tandem_backends::chardev::Chardev;
use tandem_backends::entropy::HostEntropy;
use tandem_backends::net::Network;
use tandem_backends::net::user::{UserConfig, UserNet};
use tandem_backends::net::vsock::Vsock;
use tandem_backends::p9::Server;

/// The start of a request that the device would understand, so that cases get past its first look.
pub type Header = fn(&mut Choices) -> Vec<u8>;

/// A device that hostile drivers are let at.
pub struct Subject {
    /// Its name in tests and in reports.
    pub name: &'static str,
    /// A new one.
    pub make: fn() -> Arc<dyn VirtioDevice>,
    /// How its requests begin.
    pub header: Header,
}

/// Every virtio device.
pub const SUBJECTS: [Subject; 7] = [
    Subject { name: "rng", make: entropy, header: anything },
    Subject { name: "blk", make: disk, header: disk_request },
    Subject { name: "net", make: network, header: frame },
    Subject { name: "console", make: ports, header: control_message },
    Subject { name: "balloon", make: memory, header: anything },
    Subject { name: "9p", make: directory, header: p9_message },
    Subject { name: "vsock", make: sockets, header: packet },
];

fn anything(c: &mut Choices) -> Vec<u8> {
    let len = c.below(64);
    (0..len).map(|_| c.below(256) as u8).collect()
}

fn entropy() -> Arc<dyn VirtioDevice> {
    Arc::new(rng::VirtioRng::new(Arc::new(HostEntropy)))
}

const DISK_SECTORS: u64 = 2048;

fn disk() -> Arc<dyn VirtioDevice> {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    file.set_len(DISK_SECTORS * 512).unwrap();
    let options = DriveOptions { discard: true, ..DriveOptions::default() };
    let drive = Drive::new(Arc::new(Raw::new(file).unwrap()), options);
    Arc::new(blk::VirtioBlk::new(drive, blk::BlkConfig { queues: 2, ..Default::default() }))
}

/// Virtio 1.3 §5.2.6: type, reserved, sector; segments behind those of discard and write zeroes.
pub fn disk_request(c: &mut Choices) -> Vec<u8> {
    let kind: u32 = c.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 77]);
    let sector = c.below(DISK_SECTORS);
    let sector = c.pick(&[0, sector, sector, u64::MAX]);
    let mut h = [kind.to_le_bytes(), [0; 4]].concat();
    h.extend(sector.to_le_bytes());
    if c.below(3) == 0 {
        for _ in 0..c.below(40) {
            let (n, flags) = (c.below(9) as u32, c.below(3) as u32);
            h.extend(c.below(2 * DISK_SECTORS).to_le_bytes());
            h.extend(c.pick(&[n, n, u32::MAX]).to_le_bytes());
            h.extend(flags.to_le_bytes());
        }
    }
    h
}

fn network() -> Arc<dyn VirtioDevice> {
    // Nothing leaves the virtual network.
    let config = UserConfig { restrict: true, ..UserConfig::default() };
    let network = Network::start("hostile", Box::new(UserNet::new(config).unwrap())).unwrap();
    Arc::new(net::VirtioNet::new(network, net::NetConfig { pairs: 2, ..Default::default() }))
}

/// A header with offloads (Virtio 1.3 §5.1.6), an Ethernet frame for anybody.
fn frame(c: &mut Choices) -> Vec<u8> {
    let mut f: Vec<u8> = vec![c.below(4) as u8, c.pick(&[0, 1, 3, 4, 5, 0x81])];
    for _ in 0..5 {
        let any = c.below(1 << 16) as u16;
        f.extend(c.pick(&[0, 20, 34, 54, 1460, any]).to_le_bytes());
    }
    f.extend(c.pick(&[[0xff; 6], [0x52, 0x55, 10, 0, 2, 2]]));
    f.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    f.extend(c.pick(&[[8u8, 0], [8, 6], [0x86, 0xdd]]));
    f.extend([0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, c.pick(&[1, 6, 17]), 0, 0]);
    f.extend([10, 0, 2, 15, 10, 0, 2, c.pick(&[2, 3, 4])]);
    f.extend(anything(c));
    f
}

fn ports() -> Arc<dyn VirtioDevice> {
    let device = console::VirtioConsole::new();
    for name in ["one", "two"] {
        let chardev = Arc::new(Chardev::ring(4096).unwrap());
        device.add_port(None, name, false, chardev).unwrap();
    }
    device
}

/// Virtio 1.3 §5.3.6.2: port, event, value.
fn control_message(c: &mut Choices) -> Vec<u8> {
    let mut m = (c.pick(&[0u32, 1, 2, 31, u32::MAX])).to_le_bytes().to_vec();
    m.extend((c.below(9) as u16).to_le_bytes());
    m.extend((c.below(3) as u16).to_le_bytes());
    m
}

fn memory() -> Arc<dyn VirtioDevice> {
    let map = GuestMap::new();
    map.add("ram", RegionKind::Ram, 0, testing::RAM).unwrap();
    Arc::new(balloon::VirtioBalloon::new(map, true, true))
}

/// A directory for what subjects need of the host's file system.
fn scratch() -> PathBuf {
    let dir = std::env::temp_dir().join("tandem-hostile");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn directory() -> Arc<dyn VirtioDevice> {
    let shared = scratch().join("shared");
    std::fs::create_dir_all(&shared).unwrap();
    std::fs::write(shared.join("file"), "contents").unwrap();
    // Read-only, so that what a case writes is written nowhere.
    Arc::new(p9::Virtio9p::new("t", Server::new(&shared, true).unwrap()).unwrap())
}

/// 9P2000.L: size, type, tag, then words that may be fids and lengths.
fn p9_message(c: &mut Choices) -> Vec<u8> {
    let kind = c.pick(&[100u8, 104, 110, 12, 24, 40, 116, 118, 120, 8, 22, 30, 50, 108, 0]);
    let mut m = vec![0; 4];
    m.push(kind);
    m.extend((c.below(4) as u16).to_le_bytes());
    if kind == 100 {
        m.extend(8192u32.to_le_bytes());
        m.extend(8u16.to_le_bytes());
        m.extend(b"9P2000.L");
    }
    for _ in 0..c.below(8) {
        let any = c.below(1 << 32) as u32;
        m.extend(c.pick(&[0, 1, 2, 16, any]).to_le_bytes());
    }
    let claimed = m.len() as u32;
    let wrong = c.below(1 << 16) as u32;
    m[..4].copy_from_slice(&c.pick(&[claimed, claimed, claimed, wrong]).to_le_bytes());
    m
}

const CID: u64 = 3;

fn sockets() -> Arc<dyn VirtioDevice> {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let n = MADE.fetch_add(1, Ordering::Relaxed);
    let path = scratch().join(format!("{}-{n}.vsock", std::process::id()));
    let sockets = Vsock::new(&path, CID).unwrap();
    let network = Network::start("hostile", Box::new(sockets)).unwrap();
    Arc::new(vsock::VirtioVsock::new(network, CID))
}

/// Virtio 1.3 §5.10.6: the packet header.
fn packet(c: &mut Choices) -> Vec<u8> {
    let mut p = c.pick(&[CID, 2, 0]).to_le_bytes().to_vec();
    p.extend(c.pick(&[2, CID, 1]).to_le_bytes());
    p.extend((c.below(4) as u32).to_le_bytes());
    p.extend((c.below(4) as u32).to_le_bytes());
    let len = c.below(1 << 32) as u32;
    p.extend(c.pick(&[0, 1, 64, len]).to_le_bytes());
    p.extend(c.pick(&[1u16, 1, 2]).to_le_bytes());
    p.extend((c.below(9) as u16).to_le_bytes());
    p.extend((c.below(4) as u32).to_le_bytes());
    p.extend(c.pick(&[0, 4096, u32::MAX]).to_le_bytes());
    p.extend((c.below(1 << 32) as u32).to_le_bytes());
    p
}
