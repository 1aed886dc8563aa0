use super::*;
use crate::virtio::testing::{Driver, DriverQueue, Rig};
use crate::virtio::{feature, status};
use std::path::Path;
use tandem_backends::block::Image;
use tandem_backends::block::drive::{CacheMode, DriveOptions, EngineKind};
use tandem_backends::block::file::{HostFile, OpenMode};
use tandem_backends::block::lock::Access;
use tandem_backends::block::qcow2::{CreateOptions, Options, Qcow2};
use tandem_backends::block::raw::Raw;
use tandem_backends::block::throttle::{Limit, Limits};

const SIZE: u64 = 1 << 20;
const BASE: u64 = feature::VERSION_1 | feature::RING_INDIRECT_DESC;

fn image() -> Arc<dyn Image> {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    CreateOptions { size: SIZE, ..CreateOptions::default() }.create(&file).unwrap();
    Arc::new(Qcow2::open(file, Options::default()).unwrap())
}

fn raw() -> Arc<dyn Image> {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    file.set_len(SIZE).unwrap();
    Arc::new(Raw::new(file).unwrap())
}

fn drive(image: Arc<dyn Image>) -> Arc<Drive> {
    Drive::new(image, DriveOptions { discard: true, ..DriveOptions::default() })
}

fn live(rig: &Rig, device: VirtioBlk, features: u64) -> (Driver, DriverQueue) {
    let d = rig.attach(Arc::new(device));
    d.negotiate(BASE | features).unwrap();
    let q = d.queue(0, 16);
    d.driver_ok();
    (d, q)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut h = kind.to_le_bytes().to_vec();
    h.extend([0; 4]);
    h.extend(sector.to_le_bytes());
    h
}

fn write(q: &mut DriverQueue, sector: u64, data: &[u8]) -> u8 {
    q.request(&[&header(kind::OUT, sector), data], &[1])[0]
}

fn read(q: &mut DriverQueue, sector: u64, len: u32) -> (Vec<u8>, u8) {
    let mut out = q.request(&[&header(kind::IN, sector)], &[len, 1]);
    let status = out.pop().unwrap();
    (out, status)
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut s = sector.to_le_bytes().to_vec();
    s.extend(sectors.to_le_bytes());
    s.extend(flags.to_le_bytes());
    s
}

fn exercise(image: Arc<dyn Image>, engine: EngineKind) {
    let rig = Rig::new();
    let options = DriveOptions { discard: true, engine, ..DriveOptions::default() };
    let config = BlkConfig { serial: "S123".into(), ..BlkConfig::default() };
    let device = VirtioBlk::new(Drive::new(image, options), config);
    let (_d, mut q) = live(&rig, device, bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES);
    assert_eq!(write(&mut q, 3, &[7; 1024]), OK);
    assert_eq!(q.last_len(), 1);
    assert_eq!(read(&mut q, 3, 1024), (vec![7; 1024], OK));
    assert_eq!(q.last_len(), 1025);
    assert_eq!(read(&mut q, 5, 512), (vec![0; 512], OK));
    assert_eq!(q.request(&[&header(kind::FLUSH, 0)], &[1]), [OK]);
    // Header and status may be cut up anyhow.
    let h = header(kind::OUT, 9);
    assert_eq!(q.request(&[&h[..3], &h[3..], &[5; 100], &[6; 412]], &[1]), [OK]);
    let (got, ok) = read(&mut q, 9, 512);
    assert_eq!((got[99], got[100], ok), (5, 6, OK));
    let id = q.request(&[&header(kind::GET_ID, 0)], &[20, 1]);
    assert_eq!(&id[..5], b"S123\0");
    let s = segment(3, 1, 0);
    assert_eq!(q.request(&[&header(kind::WRITE_ZEROES, 0), &s], &[1]), [OK]);
    assert_eq!(read(&mut q, 3, 1024).0, [vec![0; 512], vec![7; 512]].concat());
    let two = [segment(0, 256, 0), segment(256, 256, 0)].concat();
    assert_eq!(q.request(&[&header(kind::DISCARD, 0), &two], &[1]), [OK]);
    assert_eq!(read(&mut q, 4, 512), (vec![0; 512], OK));
}

#[test]
fn every_request_works_on_every_engine_and_format() {
    for engine in [EngineKind::Threads, EngineKind::IoUring] {
        exercise(image(), engine);
        exercise(raw(), engine);
    }
}

#[test]
fn bad_requests_fail_and_the_device_lives_on() {
    let rig = Rig::new();
    let (d, mut q) = live(
        &rig,
        VirtioBlk::new(drive(image()), BlkConfig::default()),
        bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES,
    );
    let end = SIZE / SECTOR;
    assert_eq!(read(&mut q, end, 512).1, IOERR);
    assert_eq!(read(&mut q, end - 1, 1024).1, IOERR);
    assert_eq!(read(&mut q, u64::MAX, 512).1, IOERR);
    assert_eq!(read(&mut q, 0, 511).1, IOERR);
    assert_eq!(write(&mut q, u64::MAX / 512, &[0; 512]), IOERR);
    assert_eq!(q.request(&[&header(77, 0)], &[1]), [UNSUPP]);
    assert_eq!(q.request(&[&[1, 2, 3]], &[1]), [IOERR]);
    for (s, status) in [
        (segment(0, 1, 1), UNSUPP),
        (segment(end, 1, 0), IOERR),
        (segment(u64::MAX, u32::MAX, 0), IOERR),
        (vec![0; 15], IOERR),
        (vec![], IOERR),
        (segment(0, 1, 0).repeat(33), IOERR),
    ] {
        assert_eq!(q.request(&[&header(kind::DISCARD, 0), &s], &[1]), [status], "{s:?}");
    }
    // No status: nothing is written.
    q.request(&[&header(kind::FLUSH, 0)], &[]);
    assert_eq!(q.last_len(), 0);
    // Memory that is not there: the data's, then the status's.
    q.raw_descriptor(0, (0x10_4000, 16, 1, 1));
    q.raw_descriptor(1, (0x8000_0000_0000, 512, 3, 2));
    q.raw_descriptor(2, (0x10_5000, 1, 2, 0));
    q.add_head(0);
    q.kick();
    q.wait();
    q.raw_descriptor(1, (u64::MAX - 3, 1, 2, 0));
    q.add_head(0);
    q.kick();
    q.wait();
    assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
    assert_eq!(write(&mut q, 0, &[1; 512]), OK);
}

#[test]
fn read_only_drives_say_so() {
    let path = std::env::temp_dir().join(format!("tandem-blk-ro-{}", std::process::id()));
    std::fs::write(&path, vec![9; 4096]).unwrap();
    let mode = OpenMode { access: Access::Unlocked, ..OpenMode::READ };
    let image = Raw::new(Arc::new(HostFile::open(&path, mode).unwrap())).unwrap();
    let rig = Rig::new();
    let device = VirtioBlk::new(drive(Arc::new(image)), BlkConfig::default());
    assert_eq!(device.features() & (bit::RO | bit::DISCARD | bit::WRITE_ZEROES), bit::RO);
    let (_d, mut q) = live(&rig, device, bit::FLUSH | bit::RO);
    assert_eq!(write(&mut q, 0, &[1; 512]), IOERR);
    assert_eq!(read(&mut q, 0, 512), (vec![9; 512], OK));
    assert_eq!(q.request(&[&header(kind::FLUSH, 0)], &[1]), [OK]);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_configuration_describes_the_disk() {
    let config = BlkConfig {
        queues: 4,
        logical_block: 4096,
        physical_block: 16384,
        min_io: 16384,
        ..BlkConfig::default()
    };
    let device = VirtioBlk::new(drive(image()), config);
    let mut b = [0; 60];
    device.read_config(0, &mut b);
    assert_eq!(u64_at(&b, 0), SIZE / 512);
    assert_eq!((u32_at(&b, 20), b[24], b[26], b[32], b[34]), (4096, 2, 4, 1, 4));
    assert!(device.features() & bit::MQ != 0);
    device.write_config(32, &[0]);
    assert!(!device.front.drive.writeback());
    device.write_config(30, &[0, 0, 1, 0]);
    assert!(device.front.drive.writeback());
    device.write_config(u64::MAX, &[0]);
    device.write_config(0, &[0; 32]);
    assert!(device.front.drive.writeback());
    let mut far = [1; 4];
    device.read_config(u64::MAX - 1, &mut far);
    device.read_config(1000, &mut far);
}

#[test]
fn a_driver_without_flushes_gets_write_through() {
    let d = drive(image());
    let rig = Rig::new();
    let (_d, _q) = live(&rig, VirtioBlk::new(d.clone(), BlkConfig::default()), 0);
    assert!(!d.writeback());
}

#[test]
fn several_queues_and_reset_in_the_middle() {
    let limit = Limit { avg: 5.0, ..Limit::default() };
    let options = DriveOptions {
        limits: Limits { iops: limit, ..Limits::default() },
        cache: CacheMode::default(),
        ..DriveOptions::default()
    };
    let config = BlkConfig { queues: 2, ..BlkConfig::default() };
    let rig = Rig::new();
    let d = rig.attach(Arc::new(VirtioBlk::new(Drive::new(raw(), options), config)));
    for _ in 0..2 {
        d.negotiate(BASE | bit::FLUSH | bit::MQ | feature::RING_EVENT_IDX).unwrap();
        let (mut a, mut b) = (d.queue(0, 16), d.queue(1, 16));
        d.driver_ok();
        assert_eq!(write(&mut a, 0, &[3; 512]), OK);
        assert_eq!(read(&mut b, 0, 512), (vec![3; 512], OK));
        // Many requests that the limit holds back, and a reset that does not wait for them.
        for _ in 0..16 {
            a.add_head(0);
        }
        a.kick();
        let start = std::time::Instant::now();
        d.write8(0x14, 0);
        assert!(start.elapsed() < std::time::Duration::from_secs(2));
    }
}

#[test]
fn the_registry_makes_it_and_judges_its_properties() {
    let rig = Rig::new();
    let mut ctx = rig.context();
    ctx.backends.drives.insert("d0".into(), drive(image()));
    let make = |words: &[(&str, &str)]| {
        let props: Vec<_> = words.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        crate::registry::create(&ctx, "virtio-blk-pci", &props).map_err(|f| f[0].to_string())
    };
    let fault = |words: &[(&str, &str)]| make(words).err().unwrap();
    assert!(fault(&[]).contains("drive=ID"));
    assert!(fault(&[("drive", "d1")]).contains("did you mean 'd0'"));
    assert!(fault(&[("drive", "d0"), ("logical_block_size", "1000")]).contains("powers of two"));
    assert!(fault(&[("drive", "d0"), ("serial", "123456789012345678901")]).contains("20 bytes"));
    assert!(fault(&[("drive", "d0"), ("queue-size", "100")]).contains("power of two"));
    let one = make(&[("drive", "d0"), ("serial", "x")]).unwrap();
    assert!(fault(&[("drive", "d0")]).contains("has a device already"));
    one.reset();
}

#[test]
fn hostile_drivers_do_no_harm() {
    use crate::virtio::hostile::{Choices, pci, subjects::disk_request, watchdog::Watchdog};
    let config = BlkConfig { queues: 2, ..BlkConfig::default() };
    for engine in [EngineKind::Threads, EngineKind::IoUring] {
        let image = image();
        let options = DriveOptions { discard: true, engine, ..DriveOptions::default() };
        let drive = Drive::new(image.clone(), options);
        let device = Arc::new(VirtioBlk::new(drive, config.clone()));
        let dog = Watchdog::new("qcow2");
        for case in 1..=150 {
            dog.case(case);
            pci(device.clone(), disk_request, &mut Choices::seeded(case, 30));
        }
        // What is left is an image without flaws.
        let checker = image.checker().unwrap();
        let found = checker.check(tandem_backends::block::Repair::None).unwrap();
        assert_eq!((found.corruptions, found.check_errors), (0, 0), "{found:?}");
    }
}
