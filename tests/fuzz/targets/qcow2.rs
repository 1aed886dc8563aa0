//! A good qcow2 image with words of it changed: opening, reading, writing, checking and repairing it
//! end with a result.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use tandem_backends::block::file::HostFile;
use tandem_backends::block::qcow2::{CreateOptions, Options, Qcow2};
use tandem_backends::block::{BlockRead, Image, Repair, SECTOR};
use tandem_devices::virtio::hostile::Choices;

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 4096;

fn file(contents: &[u8]) -> Arc<HostFile> {
    let file = HostFile::temporary(Path::new("/dev/shm")).expect("room in memory");
    file.write_bytes(0, contents).expect("room in memory");
    Arc::new(file)
}

/// An image with data, zeros and holes.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let file = file(&[]);
    let how = CreateOptions { size: SIZE, cluster_size: CLUSTER, ..CreateOptions::default() };
    how.create(&file).expect("an image");
    let image = Qcow2::open(file.clone(), Options::default()).expect("an image");
    let w = image.writable().expect("writable");
    for n in 0..16 {
        w.write_bytes(n * 5 * CLUSTER / 2, &[n as u8; 6000]).expect("written");
    }
    w.write_zeroes(64 * CLUSTER, 8 * CLUSTER, false).expect("zeroed");
    image.close().expect("closed");
    let mut all = vec![0; file.len().expect("a length") as usize];
    file.read_bytes(0, &mut all).expect("read");
    all
});

fuzz_target!(|data: &[u8]| {
    let mut c = Choices::bytes(data);
    let mut contents = GOOD.clone();
    for _ in 0..c.below(16) {
        // Most of what matters is in the header and at the start of a table.
        let places = contents.len() as u64 / CLUSTER;
        let at = (c.below(places) * CLUSTER + c.below(128)) as usize;
        let (any, cluster) = (c.word(), c.below(64) * CLUSTER);
        let value = c.pick(&[any, cluster, cluster | 1 << 63, cluster | 1 << 62, cluster | 1, 0]);
        contents[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    let repair = c.below(2) == 0;
    let Ok(image) = Qcow2::open(file(&contents), Options { unmap: true, repair }) else { return };
    // A size that is not refused may be larger than what is behind it.
    let size = image.size();
    let mut buffer = vec![0; 2 * CLUSTER as usize];
    while c.step() {
        let offset = c.below(size.max(SECTOR)) & !(SECTOR - 1);
        let len = c.below(buffer.len() as u64) & !(SECTOR - 1);
        let part = &mut buffer[..len as usize];
        let Some(w) = image.writable() else { return };
        let _ = match c.below(8) {
            0 | 1 => image.read_bytes(offset, part),
            2 | 3 => w.write_bytes(offset, part),
            4 => w.write_zeroes(offset, len, c.below(2) == 0),
            5 => w.discard(offset, len),
            6 => image.extents().extent(offset).map(drop),
            _ => w.flush(),
        };
    }
    if let Some(checker) = image.checker() {
        let how = c.pick(&[Repair::None, Repair::Leaks, Repair::All]);
        let _ = checker.check(how);
    }
});
