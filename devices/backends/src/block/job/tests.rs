//! Jobs under a load of changes on other threads.

use super::backup::{self, Backup};
use super::mirror::{End, Extent, Mirror};
use super::stream::Stream;
use super::*;
use crate::block::drive::{Drive, DriveOptions, Op, Witness};
use crate::block::file::HostFile;
use crate::block::qcow2::{CreateOptions, Options, Qcow2};
use crate::block::{Image, Src};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 8 << 20;

fn image(behind: Option<&Arc<dyn Image>>) -> Arc<dyn Image> {
    let file = Arc::new(HostFile::temporary(Path::new("/var/tmp")).unwrap());
    let options = CreateOptions { size: SIZE, cluster_size: 16384, ..CreateOptions::default() };
    options.create(&file).unwrap();
    let image = Arc::new(Qcow2::open(file, Options::default()).unwrap());
    image.layered().unwrap().set_backing(behind.cloned());
    image
}

fn contents(image: &Arc<dyn Image>) -> Vec<u8> {
    let mut all = vec![0; image.size() as usize];
    image.read_bytes(0, &mut all).unwrap();
    all
}

fn random(seed: &mut u64, below: u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    (*seed >> 8) % below
}

fn scribble(drive: &Drive, seed: &mut u64) {
    let at = random(seed, SIZE / 512 - 64) * 512;
    let data = vec![random(seed, 255) as u8 + 1; 512 * (1 + random(seed, 60) as usize)];
    let op = match random(seed, 8) {
        0 => {
            Op::WriteZeroes(vec![(at, data.len() as u64, true), (at / 2 / 512 * 512, 4096, false)])
        }
        1 => Op::Discard(vec![(at / 65536 * 65536, 65536)]),
        _ => {
            let iov =
                libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
            // SAFETY: the data lives until execute returns.
            Op::Write(at, unsafe { Src::from_raw(vec![iov]) })
        }
    };
    drive.execute(&op).unwrap();
}

fn filled(behind: Option<&Arc<dyn Image>>, seed: &mut u64) -> Arc<Drive> {
    let options = DriveOptions { discard: true, ..DriveOptions::default() };
    let drive = Drive::new(image(behind), options);
    (0..60).for_each(|_| scribble(&drive, seed));
    drive
}

fn control() -> Arc<Control> {
    Arc::new(Control::new(0, OnError::Report, OnError::Report, Box::new(|_| ())))
}

/// Runs `work` while two threads change the drive; returns its result.
fn under_load<T: Send>(drive: &Drive, work: impl FnOnce() -> T + Send) -> T {
    let (over, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        for mut seed in [77, 99] {
            let (over, changes) = (&over, &changes);
            s.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    scribble(drive, &mut seed);
                    changes.fetch_add(1, Ordering::AcqRel);
                }
            });
        }
        while changes.load(Ordering::Acquire) < 20 {
            std::thread::yield_now();
        }
        let result = work();
        over.store(true, Ordering::Release);
        result
    })
}

#[test]
fn a_backup_is_the_disk_at_its_beginning() {
    for extent in [backup::Extent::Full, backup::Extent::None] {
        let mut seed = 4711;
        let drive = filled(None, &mut seed);
        let before = contents(&drive.image());
        let behind = (extent == backup::Extent::None).then(|| {
            let b = filled(None, &mut 1);
            b.image().writable().unwrap().write_bytes(0, &before).unwrap();
            b.image()
        });
        let target = image(behind.as_ref());
        let control = control();
        let b = Backup::new(drive.image(), target.clone(), extent, control.clone());
        b.prepare();
        let witness: Arc<dyn Witness> = b.clone();
        drive.still().admit(witness.clone());
        under_load(&drive, || {
            if extent == backup::Extent::None {
                std::thread::sleep(std::time::Duration::from_millis(200));
                control.cancel(false);
            }
            let end = ending(b.run()).unwrap();
            assert_eq!(end == Ending::Done, extent == backup::Extent::Full);
        });
        drive.still().dismiss(&witness);
        assert!(contents(&drive.image()) != before);
        assert!(contents(&target) == before);
    }
}

#[test]
fn a_mirror_follows_until_it_replaces() {
    for (blocking, pivots) in [(false, true), (true, true), (false, false)] {
        let mut seed = 42;
        let base = filled(None, &mut seed).image();
        let drive = filled(Some(&base), &mut seed);
        // What the target held before does not matter.
        let target = filled(None, &mut 5).image();
        let ready = Arc::new(AtomicBool::new(false));
        let mine = ready.clone();
        let tell = move |n| {
            mine.store(n == Notice::Ready || mine.load(Ordering::Acquire), Ordering::Release)
        };
        let c = Arc::new(Control::new(0, OnError::Report, OnError::Report, Box::new(tell)));
        let m =
            Mirror::new(drive.image(), target.clone(), Extent::Depth(u32::MAX), 65536, c.clone());
        let m = Arc::new(m);
        m.block_writes(blocking);
        let witness: Arc<dyn Witness> = m.clone();
        drive.still().admit(witness.clone());
        under_load(&drive, || {
            let worker = std::thread::scope(|s| {
                let run = s.spawn(|| m.run());
                while !ready.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                if pivots {
                    c.complete()
                } else {
                    c.cancel(false)
                }
                run.join().unwrap()
            });
            assert_eq!(worker.unwrap(), if pivots { End::Replace } else { End::Leave });
            let still = drive.still();
            m.settle().unwrap();
            still.dismiss(&witness);
            assert!(contents(&drive.image()) == contents(&target));
            if pivots {
                still.exchange(target.clone());
            }
        });
        assert_eq!(Arc::ptr_eq(&drive.image(), &target), pivots);
    }
}

#[test]
fn a_commit_and_a_stream_change_nothing_that_is_seen() {
    let mut seed = 8;
    let base = filled(None, &mut seed).image();
    let mid = filled(Some(&base), &mut seed).image();
    let drive = filled(Some(&mid), &mut seed);
    let top = drive.image();
    let shown = contents(&top);
    // The middle into the base, which then is right behind the top.
    commit::run(&mid, &base, &control()).unwrap();
    top.layered().unwrap().set_backing(Some(base.clone()));
    assert!(contents(&top) == shown);
    // Then the base into the top, under load; where the load has not been the same is shown.
    let s = Stream::new(top.clone(), depth_above(&top, None), control());
    let witness: Arc<dyn Witness> = s.clone();
    drive.still().admit(witness.clone());
    under_load(&drive, || s.run().unwrap());
    let still = drive.still();
    still.dismiss(&witness);
    let before = contents(&top);
    top.layered().unwrap().set_backing(None);
    assert!(contents(&top) == before);
}

#[test]
fn a_job_pauses_hurries_and_is_cancelled() {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let mine = notices.clone();
    let c = Control::new(
        1,
        OnError::Stop,
        OnError::Report,
        Box::new(move |n| mine.lock().unwrap().push(n)),
    );
    c.advance(1, 3_000_000);
    std::thread::scope(|s| {
        let wait = s.spawn(|| c.checkpoint());
        assert!(c.pause() && !c.pause());
        while notices.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        // The speed would make it wait for a month.
        c.set_speed(0);
        assert!(c.resume() && !c.resume());
        wait.join().unwrap().unwrap();
    });
    assert_eq!(*notices.lock().unwrap(), [Notice::Paused, Notice::Resumed]);
    let failed: std::result::Result<Option<()>, _> =
        c.attempt(Side::Source, || Err(Error::ReadOnly));
    assert!(matches!(failed, Err(Halt::Again)));
    assert_eq!(c.progress().stopped, Some(false));
    c.cancel(false);
    assert!(matches!(c.checkpoint(), Err(Halt::Cancelled)));
}

#[test]
fn what_an_image_in_between_is_too_short_for_is_zeros() {
    let mut seed = 3;
    let base = filled(None, &mut seed).image();
    base.writable().unwrap().write_bytes(SIZE - 4096, &[7; 4096]).unwrap();
    let mid = image(Some(&base));
    mid.resizable().unwrap().resize(SIZE / 2, crate::block::Preallocation::Off).unwrap();
    let top = image(Some(&mid));
    let shown = contents(&top);
    let depth = depth_above(&top, Some(&base));
    assert_eq!(depth, 1);
    Stream::new(top.clone(), depth, control()).run().unwrap();
    top.layered().unwrap().set_backing(Some(base));
    assert!(contents(&top) == shown);
}
