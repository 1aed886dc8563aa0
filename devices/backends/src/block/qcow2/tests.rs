//! Images against a model in memory, and against QEMU's tools where they are installed.

use super::*;
use crate::block::open::{OpenSpec, open};
use crate::block::{Preallocation, Src};
use std::path::PathBuf;
use std::process::Command;

/// A directory that is removed in the end.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        // Memory, where there is some: the tests flush a great deal.
        let base = PathBuf::from("/dev/shm");
        let base = if base.is_dir() { base } else { std::env::temp_dir() };
        let dir = base.join(format!("tandem-qcow2-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// xorshift64*: tests repeat exactly.
pub struct Random(u64);

impl Random {
    pub fn seeded(seed: u64, salt: u64) -> Random {
        Random(seed.wrapping_mul(salt) | 1)
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
}

fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: qemu-img is not installed");
    }
    there
}

fn run(program: &str, args: &[&str]) -> (i32, String) {
    let out = Command::new(program).args(args).output().unwrap();
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

fn create(dir: &Dir, name: &str, o: &CreateOptions) -> PathBuf {
    let path = dir.path(name);
    let _ = std::fs::remove_file(&path);
    o.create(&HostFile::create(&path).unwrap()).unwrap();
    path
}

fn contents(image: &dyn Image) -> Vec<u8> {
    let mut all = vec![0; image.size() as usize];
    for (i, part) in all.chunks_mut(1 << 20).enumerate() {
        image.read_bytes((i as u64) << 20, part).unwrap();
    }
    all
}

/// Changes `image` and `model` alike.
fn scribble(r: &mut Random, image: &dyn Image, model: &mut [u8], steps: usize, layered: bool) {
    let w = image.writable().unwrap();
    let size = model.len() as u64;
    for _ in 0..steps {
        let at = r.below(size / 512) * 512;
        let most = if r.below(4) == 0 { 512 * 1024 } else { 16 * 1024 };
        let len = ((r.below(most) + 512) & !511).min(size - at);
        let range = at as usize..(at + len) as usize;
        match r.below(10) {
            0..=5 => {
                let byte = r.next() as u8;
                let data: Vec<u8> = (0..len).map(|i| byte ^ (i / 512) as u8).collect();
                w.write(at, &Src::new(&data)).unwrap();
                model[range].copy_from_slice(&data);
            }
            6 => {
                w.write_zeroes(at, len, r.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            7 => {
                w.discard(at, len).unwrap();
                let mut now = vec![0; len as usize];
                w.read_bytes(at, &mut now).unwrap();
                // Discarded clusters are zeros or what they were.
                for (n, m) in now.chunks(512).zip(model[range.clone()].chunks(512)) {
                    assert!(n == m || n.iter().all(|b| *b == 0), "layered: {layered}");
                }
                model[range].copy_from_slice(&now);
            }
            8 => w.flush().unwrap(),
            _ => {
                let mut now = vec![0; len as usize];
                w.read_bytes(at, &mut now).unwrap();
                assert!(now == model[range], "at {at:#x}+{len:#x}");
            }
        }
    }
}

fn options(r: &mut Random, size: u64) -> CreateOptions {
    let version = if r.below(4) == 0 { 2 } else { 3 };
    CreateOptions {
        size,
        cluster_size: 512 << r.below(9),
        version,
        refcount_bits: if version == 2 { 16 } else { 1 << r.below(7) },
        lazy_refcounts: version == 3 && r.below(3) == 0,
        compression: if version == 3 && r.below(2) == 0 {
            Compression::Zstd
        } else {
            Compression::Zlib
        },
        ..CreateOptions::default()
    }
}

fn check_with_qemu(path: &std::path::Path, model: &[u8], what: &str) {
    let p = path.to_str().unwrap();
    let (code, text) = run("qemu-img", &["check", "-f", "qcow2", p]);
    assert_eq!(code, 0, "{what}: {text}");
    let raw = format!("{p}.raw");
    let (code, text) = run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", p, &raw]);
    assert_eq!(code, 0, "{what}: {text}");
    assert!(std::fs::read(&raw).unwrap() == model, "{what}: qemu-img reads something else");
}

fn sound(image: &dyn Image, what: &str) {
    let report = image.checker().unwrap().check(Repair::None).unwrap();
    let bad = report.corruptions + report.leaks + report.check_errors;
    assert_eq!(bad, 0, "{what}: {:?}", report.findings);
}

#[test]
fn random_images_agree_with_the_model_and_with_qemu() {
    let qemu = has_qemu();
    let dir = Dir::new("random");
    for seed in 1..=40u64 {
        let mut r = Random::seeded(seed, 0x9e37_79b9_7f4a_7c15);
        let size = (1 + r.below(6 * 2048)) * 512;
        let o = options(&mut r, size);
        let what = format!("seed {seed}, {o:?}");
        let path = create(&dir, "a", &o);
        let mut model = vec![0; size as usize];
        for _ in 0..3 {
            let image = open(&OpenSpec::write(&path)).unwrap();
            assert!(contents(&*image) == model, "{what}");
            scribble(&mut r, &*image, &mut model, 60, false);
            drop(image);
            sound(&*open(&OpenSpec::read(&path)).unwrap(), &what);
        }
        if qemu {
            check_with_qemu(&path, &model, &what);
        }
    }
}

#[test]
fn chains_agree_with_the_model_and_with_qemu() {
    let qemu = has_qemu();
    let dir = Dir::new("chain");
    for seed in 1..=16u64 {
        let mut r = Random::seeded(seed, 0x1234_5678_9abc_def1);
        let size = (1 + r.below(4 * 2048)) * 512;
        let mut model = vec![0; size as usize];
        let mut path = PathBuf::new();
        for level in 0..3 {
            // Each layer may be larger or smaller than the one behind it.
            let size = (1 + r.below(4 * 2048)) * 512;
            let old = model.len().min(size as usize);
            model.resize(size as usize, 0);
            model[old..].fill(0);
            let behind = (level > 0).then(|| format!("l{}", level - 1));
            let format = behind.as_ref().map(|_| "qcow2".to_string());
            let o = CreateOptions {
                backing_file: behind,
                backing_format: format,
                ..options(&mut r, size)
            };
            path = create(&dir, &format!("l{level}"), &o);
            let image = open(&OpenSpec::write(&path)).unwrap();
            assert!(contents(&*image) == model, "seed {seed} level {level} {o:?}");
            scribble(&mut r, &*image, &mut model, 60, true);
            sound(&*image, &format!("seed {seed}"));
        }
        if qemu {
            check_with_qemu(&path, &model, &format!("seed {seed}"));
        }
    }
}

#[test]
fn compressed_images_agree_with_qemu() {
    let qemu = has_qemu();
    let dir = Dir::new("compressed");
    for seed in 1..=16u64 {
        let mut r = Random::seeded(seed, 0xdead_beef_1234_5671);
        let size = (1 + r.below(3 * 2048)) * 512;
        let o = options(&mut r, size);
        let what = format!("seed {seed} {o:?}");
        let path = create(&dir, "c", &o);
        let mut model: Vec<u8> = vec![0; size as usize];
        for chunk in model.chunks_mut(4096) {
            match r.below(3) {
                0 => chunk.iter_mut().for_each(|b| *b = r.next() as u8),
                1 => chunk.fill(r.next() as u8),
                _ => {}
            }
        }
        let image = open(&OpenSpec::write(&path)).unwrap();
        let c = image.compressor().unwrap();
        for (i, part) in model.chunks(o.cluster_size as usize).enumerate() {
            c.write_compressed(i as u64 * o.cluster_size, part).unwrap();
        }
        assert!(contents(&*image) == model, "{what}");
        sound(&*image, &what);
        drop(image);
        if qemu {
            check_with_qemu(&path, &model, &what);
        }
        // Writing over compressed clusters.
        let image = open(&OpenSpec::write(&path)).unwrap();
        scribble(&mut r, &*image, &mut model, 80, false);
        drop(image);
        if qemu {
            check_with_qemu(&path, &model, &what);
        }
        sound(&*open(&OpenSpec::read(&path)).unwrap(), &what);
    }
}

#[test]
fn images_of_qemu_are_read_and_written() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("theirs");
    for seed in 1..=24u64 {
        let mut r = Random::seeded(seed, 0x0bad_cafe_0000_1117);
        let size = (1 + r.below(4 * 2048)) * 512;
        let mut model = vec![0; size as usize];
        for _ in 0..20 {
            let at = r.below(size / 512) as usize * 512;
            let end = (at + 512 * (1 + r.below(200) as usize)).min(model.len());
            let byte = r.next() as u8;
            model[at..end].iter_mut().enumerate().for_each(|(i, b)| *b = byte ^ (i / 97) as u8);
        }
        let (raw, path) = (dir.path("raw"), dir.path("q"));
        std::fs::write(&raw, &model).unwrap();
        let bits = 512u64 << r.below(10);
        let v3 = r.below(4) > 0;
        let mut o = format!("cluster_size={bits},compat={}", if v3 { "1.1" } else { "0.10" });
        if v3 {
            o += &format!(
                ",refcount_bits={},lazy_refcounts={}",
                1 << r.below(7),
                ["on", "off"][r.below(2) as usize]
            );
            o += ["", ",compression_type=zstd"][r.below(2) as usize];
        }
        let (raw, p) = (raw.to_str().unwrap(), path.to_str().unwrap());
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &o, raw, p];
        if r.below(2) == 0 {
            args.insert(1, "-c");
        }
        let (code, text) = run("qemu-img", &args);
        assert_eq!(code, 0, "{o}: {text}");
        let what = format!("seed {seed} {args:?}");
        let image = open(&OpenSpec::write(&path)).unwrap();
        assert!(contents(&*image) == model, "{what}");
        sound(&*image, &what);
        scribble(&mut r, &*image, &mut model, 60, false);
        drop(image);
        check_with_qemu(&path, &model, &what);
    }
}

#[test]
fn snapshots_come_and_go() {
    let qemu = has_qemu();
    let dir = Dir::new("snapshots");
    for seed in 1..=12u64 {
        let mut r = Random::seeded(seed, 0x5eed_0000_1111_2223);
        let size = (64 + r.below(2 * 2048)) * 512;
        let o = CreateOptions { refcount_bits: 16, ..options(&mut r, size) };
        let path = create(&dir, "s", &o);
        let mut model = vec![0; size as usize];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        let what = format!("seed {seed} {o:?}");
        let image = open(&OpenSpec::write(&path)).unwrap();
        let s = image.snapshots().unwrap();
        for step in 0..12 {
            scribble(&mut r, &*image, &mut model, 15, false);
            match r.below(5) {
                // Only version 3 knows how large the disk was.
                4 if o.version == 3 => {
                    let size = (64 + r.below(2 * 2048)) * 512;
                    image.resizable().unwrap().resize(size, Preallocation::Off).unwrap();
                    model.resize(size as usize, 0);
                }
                0 | 1 => {
                    s.create(&format!("n{step}")).unwrap();
                    kept.push((format!("n{step}"), model.clone()));
                }
                2 if !kept.is_empty() => {
                    let i = r.below(kept.len() as u64) as usize;
                    s.apply(&kept[i].0).unwrap();
                    model.clone_from(&kept[i].1);
                }
                _ if !kept.is_empty() => {
                    let (name, _) = kept.remove(r.below(kept.len() as u64) as usize);
                    s.delete(&name).unwrap();
                }
                _ => {}
            }
            assert!(contents(&*image) == model, "{what} step {step}");
            sound(&*image, &format!("{what} step {step}"));
            let names: Vec<String> = s.list().into_iter().map(|s| s.name).collect();
            assert_eq!(names, kept.iter().map(|k| k.0.clone()).collect::<Vec<_>>());
        }
        assert!(s.delete("nobody").is_err());
        drop(image);
        if qemu {
            check_with_qemu(&path, &model, &what);
            for (name, then) in &kept {
                let (p, raw) = (path.to_str().unwrap(), dir.path("then"));
                let raw = raw.to_str().unwrap();
                let (code, text) = run("qemu-img", &["convert", "-l", name, "-O", "raw", p, raw]);
                assert_eq!(code, 0, "{what}: {text}");
                // qemu-img gives it the size that the disk has now.
                let found = std::fs::read(raw).unwrap();
                let n = found.len().min(then.len());
                assert!(found[..n] == then[..n], "{what}: snapshot {name}");
            }
        }
    }
}

#[test]
fn only_what_lies_in_one_piece_has_a_place() {
    let dir = Dir::new("place");
    let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let path = create(&dir, "p", &o);
    let image = open(&OpenSpec::write(&path)).unwrap();
    let w = image.writable().unwrap();
    assert!(image.place(0, 4096, false).is_none());
    w.write_bytes(0, &[7; 8192]).unwrap();
    w.write_bytes(65536, &[8; 4096]).unwrap();
    let there = image.place(512, 7680, false).unwrap();
    let mut byte = [0];
    there.file.read_bytes(there.offset, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert!(image.place(0, 12288, false).is_none() && image.place(1 << 20, 512, false).is_none());
    assert!(image.place(0, 4096, true).is_some());
    drop(there);
    // What a snapshot has, too, is read where it is and written elsewhere.
    image.snapshots().unwrap().create("s").unwrap();
    assert!(image.place(0, 4096, false).is_some() && image.place(0, 4096, true).is_none());
    // Whoever wants to be alone waits for whoever has a place.
    let kept = image.place(0, 4096, false);
    std::thread::scope(|s| {
        let discard = s.spawn(|| w.discard(0, 8192).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!discard.is_finished());
        drop(kept);
        discard.join().unwrap();
    });
    assert!(image.place(0, 4096, false).is_none());
}

#[test]
fn sizes_change() {
    let qemu = has_qemu();
    let dir = Dir::new("resize");
    for seed in 1..=16u64 {
        let mut r = Random::seeded(seed, 0x7777_1234_0000_9991);
        let size = (1 + r.below(2048)) * 512;
        let o = options(&mut r, size);
        let path = create(&dir, "r", &o);
        let what = format!("seed {seed} {o:?}");
        let mut model = vec![0; size as usize];
        let image = open(&OpenSpec::write(&path)).unwrap();
        for _ in 0..6 {
            scribble(&mut r, &*image, &mut model, 20, false);
            let size = (1 + r.below(6 * 2048)) * 512;
            let how = Preallocation::NAMES[r.below(4) as usize].1;
            image.resizable().unwrap().resize(size, how).unwrap();
            model.resize(size as usize, 0);
            assert!(contents(&*image) == model, "{what} {how:?}");
            sound(&*image, &what);
        }
        drop(image);
        if qemu {
            check_with_qemu(&path, &model, &what);
        }
    }
}

#[test]
fn preallocated_images_are_sound() {
    let qemu = has_qemu();
    let dir = Dir::new("preallocated");
    for (name, how) in Preallocation::NAMES {
        for cluster_size in [512, 4096, 65536] {
            let o = CreateOptions {
                size: 3 << 20,
                cluster_size,
                preallocation: how,
                ..CreateOptions::default()
            };
            let path = create(&dir, "p", &o);
            let image = open(&OpenSpec::write(&path)).unwrap();
            sound(&*image, name);
            let mut model = vec![0; 3 << 20];
            scribble(&mut Random(99), &*image, &mut model, 50, false);
            drop(image);
            if qemu {
                check_with_qemu(&path, &model, name);
            }
        }
    }
}

#[test]
fn what_a_crash_leaves_leaks_at_most() {
    let dir = Dir::new("crash");
    for seed in 1..=20u64 {
        let mut r = Random::seeded(seed, 0xabcd_0001_0203_0407);
        let o = options(&mut r, 2 << 20);
        let path = create(&dir, "x", &o);
        let mut model = vec![0; 2 << 20];
        {
            let image = open(&OpenSpec::write(&path)).unwrap();
            scribble(&mut r, &*image, &mut model, 100, false);
            image.writable().unwrap().flush().unwrap();
            // What follows is in memory only, or partly on disk.
            let w = image.writable().unwrap();
            for _ in 0..30 {
                let at = r.below(4096) * 512;
                // The same bytes again, so that the model holds whether or not they arrive.
                let data = model[at as usize..][..512].to_vec();
                w.write(at, &Src::new(&data)).unwrap();
            }
            // A process that is killed closes nothing.
            std::mem::forget(image);
        }
        // (The forgotten image's lock is still there.)
        let spec = OpenSpec {
            options: Options { repair: false, unmap: true },
            force_share: true,
            ..OpenSpec::read(&path)
        };
        let image = open(&spec).unwrap();
        assert!(contents(&*image) == model, "seed {seed} {o:?}");
        let report = image.checker().unwrap().check(Repair::None).unwrap();
        if !o.lazy_refcounts {
            assert_eq!(report.corruptions, 0, "seed {seed} {o:?}: {:?}", report.findings);
        }
        let copy = dir.path("copy");
        std::fs::copy(&path, &copy).unwrap();
        let image = open(&OpenSpec {
            options: Options { repair: false, unmap: true },
            ..OpenSpec::write(&copy)
        })
        .unwrap();
        image.checker().unwrap().check(Repair::All).unwrap();
        sound(&*image, "after repair");
        assert!(contents(&*image) == model, "seed {seed}: after repair");
    }
}

#[test]
fn threads_write_side_by_side() {
    let dir = Dir::new("threads");
    let o = CreateOptions { size: 16 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let path = create(&dir, "t", &o);
    let image = open(&OpenSpec::write(&path)).unwrap();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let image = &image;
            s.spawn(move || {
                let mut r = Random(t + 77);
                let w = image.writable().unwrap();
                for _ in 0..400 {
                    // Sectors of one's own in clusters that all share.
                    let at = (r.below(1024) * 4 + t) * 1024;
                    w.write(at, &Src::new(&[t as u8 + 1; 1024])).unwrap();
                    if r.below(20) == 0 {
                        w.discard(12 << 20, 4 << 20).unwrap();
                        w.flush().unwrap();
                    }
                }
            });
        }
    });
    sound(&*image, "after threads");
    let all = contents(&*image);
    for (i, part) in all.chunks(1024).enumerate() {
        let own = (i % 4) as u8 + 1;
        assert!(part.iter().all(|b| *b == part[0]) && (part[0] == own || part[0] == 0));
    }
}

#[test]
fn hostile_images_fail_in_words() {
    let dir = Dir::new("hostile");
    let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() };
    let path = create(&dir, "h", &o);
    {
        let image = open(&OpenSpec::write(&path)).unwrap();
        let mut model = vec![0; 1 << 20];
        scribble(&mut Random(5), &*image, &mut model, 100, false);
        image.snapshots().unwrap().create("s").unwrap();
    }
    let good = std::fs::read(&path).unwrap();
    let bad = dir.path("bad");
    for seed in 1..=150u64 {
        let mut r = Random::seeded(seed, 0x1111_2222_3333_4445);
        let mut bytes = good.clone();
        for _ in 0..1 + r.below(6) {
            let n = if r.below(2) == 0 { 120 } else { bytes.len() as u64 };
            let at = r.below(n) as usize;
            bytes[at] = r.next() as u8;
        }
        if r.below(8) == 0 {
            bytes.truncate(r.below(bytes.len() as u64) as usize);
        }
        std::fs::write(&bad, &bytes).unwrap();
        let spec =
            OpenSpec { backing: false, format: Some("qcow2".into()), ..OpenSpec::write(&bad) };
        let Ok(image) = open(&spec) else { continue };
        let mut buf = vec![0; 1 << 16];
        let size = image.size();
        for i in 0..20 {
            let at = (r.below(size.min(1 << 21) / 512 + 1) * 512).min(size.saturating_sub(1 << 16));
            if size < 1 << 16 {
                break;
            }
            let _ = image.read_bytes(at, &mut buf);
            if let Some(w) = image.writable() {
                let _ = w.write(at, &Src::new(&buf[..4096]));
                let _ = w.discard(at, 1 << 16);
                if i % 5 == 0 {
                    let _ = w.flush();
                }
            }
        }
        let _ = image.checker().map(|c| c.check(Repair::None));
        let _ = image.checker().map(|c| c.check(Repair::All));
        let _ = image.snapshots().map(|s| s.apply("s").and_then(|()| s.delete("s")));
    }
}
