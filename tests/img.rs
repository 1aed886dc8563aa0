//! `tandem img` side by side with qemu-img, on images made at random.
//!
//! `TANDEM_IMAGES=N` makes N images in each direction instead of a few (scripts/soak-block).

mod images;

use images::{Dir, Random, format_options, has_qemu, noise, rounds};
use serde_json::Value;
use std::process::Command;

/// Where the parts lie must be the same. Whether data is known to be zeros need not: qemu-img asks
/// the host about holes only where it guesses that there are many.
fn same_map(dir: &Dir, name: &str) {
    let merged = |v: Value| {
        let mut all: Vec<(u64, u64, Value)> = Vec::new();
        for mut e in v.as_array().unwrap().clone() {
            let (start, len) = (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap());
            let offset = e["offset"].as_u64();
            let o = e.as_object_mut().unwrap();
            for k in ["start", "length", "offset"] {
                o.remove(k);
            }
            if o["data"] == true {
                o.remove("zero");
            }
            // Where it would lie if the run had begun at the disk's start.
            e["shift"] = offset.map(|h| h.wrapping_sub(start)).into();
            match all.last_mut() {
                Some((s, l, last)) if *last == e && *s + *l == start => *l += len,
                _ => all.push((start, len, e)),
            }
        }
        all
    };
    let map = format!("map --output=json {name}");
    let (a, b) = (dir.json(dir.ours(&map)), dir.json(dir.theirs(&map)));
    assert_eq!(merged(a), merged(b), "map of {name}");
}

/// What both say of an image must be the same, apart from what depends on the file system.
fn same_report(dir: &Dir, name: &str) {
    let strip = |mut v: Value| {
        for key in ["children", "actual-size", "full-backing-filename"] {
            v.as_object_mut().unwrap().remove(key);
        }
        v
    };
    let info = format!("info --output=json {name}");
    assert_eq!(strip(dir.json(dir.ours(&info))), strip(dir.json(dir.theirs(&info))), "{name}");
    let (a, b) = (dir.ours(&format!("info {name}")), dir.theirs(&format!("info {name}")));
    assert_eq!(a.1, b.1, "{name}");
    same_map(dir, name);
    let check = format!("check --output=json {name}");
    let (a, b) = (dir.ours(&check), dir.theirs(&check));
    assert_eq!(a.0, b.0, "{name}: {a:?} {b:?}");
    if a.0 == 0 {
        assert_eq!(dir.json(a), dir.json(b), "check of {name}");
    }
}

#[test]
fn conversions_agree_in_both_directions() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("convert");
    for seed in 1..=rounds(40) {
        let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let data = {
            let size = (1 + r.below(6 * 2048)) * 512;
            noise(&mut r, size)
        };
        dir.write("raw", &data);
        let (o, c) = (format_options(&mut r), r.pick(&["", "-c"]));
        let words = format!("convert -q -f raw -O qcow2 {c} -o {o} raw img");
        let ours_first = seed % 2 == 0;
        dir.ok(if ours_first { dir.ours(&words) } else { dir.theirs(&words) });
        same_report(&dir, "img");
        let back = "convert -f qcow2 -O raw img back";
        for theirs in [false, true] {
            dir.ok(if theirs { dir.theirs(back) } else { dir.ours(back) });
            assert!(dir.read("back") == data, "{words}");
            std::fs::remove_file(dir.path("back")).unwrap();
        }
        for tool in ["raw img", "img raw"] {
            let words = format!("compare {tool}");
            assert_eq!(dir.ours(&words), dir.theirs(&words));
        }
        let mut other = data.clone();
        let at = r.below(other.len() as u64) as usize;
        other[at] ^= 1;
        dir.write("other", &other);
        let (a, b) = (dir.ours("compare img other"), dir.theirs("compare img other"));
        assert_eq!(a, b);
        assert_eq!(a.0, 1);
        // From qcow2 to qcow2.
        let o = format_options(&mut r);
        let words = format!("convert -q -O qcow2 -o {o} img second");
        dir.ok(dir.ours(&words));
        same_report(&dir, "second");
        dir.ok(dir.theirs("compare second raw"));
        for name in ["img", "second"] {
            std::fs::remove_file(dir.path(name)).unwrap();
        }
    }
}

#[test]
fn new_images_are_alike() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("create");
    let mut r = Random(4711);
    for _ in 0..rounds(40) {
        let mut o = format_options(&mut r);
        o += r.pick(&[
            "",
            "",
            ",preallocation=metadata",
            ",preallocation=falloc",
            ",preallocation=full",
        ]);
        let size = r.pick(&["512", "1M", "3000k", "64M", "0"]);
        let words = |name: &str| format!("create -f qcow2 -o {o} {name} {size}");
        let (a, b) = (dir.ours(&words("a")), dir.theirs(&words("a")));
        assert_eq!((a.0, &a.1), (b.0, &b.1), "{o}");
        dir.ok(dir.ours(&words("a")));
        let (code, _, said) = dir.theirs("check a");
        assert_eq!(code, 0, "{o}: {said}");
        dir.ok(dir.theirs(&words("b")));
        let (code, _, said) = dir.ours("check b");
        assert_eq!(code, 0, "{o}: {said}");
        dir.ok(dir.theirs("compare a b"));
        same_report(&dir, "a");
        same_report(&dir, "b");
        std::fs::remove_file(dir.path("a")).unwrap();
        std::fs::remove_file(dir.path("b")).unwrap();
    }
    for bad in [
        "create -f qcow2 x",
        "create -f qcow2 -o cluster_size=1000 x 1M",
        "create -f qcow3 x 1M",
        "create -f qcow2 -b nowhere -F raw x",
        "create -f raw -o cluster_size=512 x 1M",
        "create -f qcow2 -o nonsense=1 x 1M",
        "info nowhere",
        "resize nowhere +1M",
        "check nowhere",
        "convert nowhere x",
    ] {
        let (a, b) = (dir.ours(bad), dir.theirs(bad));
        assert_eq!((a.0, b.0), (1, 1), "{bad}: {a:?}");
        assert!(a.2.starts_with("tandem: error: "), "{bad}: {a:?}");
    }
    dir.write("junk", &[1; 4096]);
    assert_eq!(dir.ours("check -f raw junk").0, 63);
    assert_eq!(dir.theirs("check -f raw junk").0, 63);
    assert_eq!(dir.ours("compare junk nowhere").0, dir.theirs("compare junk nowhere").0);
}

/// A chain base ← mid ← top with random contents; returns what top shows.
fn chain(dir: &Dir, r: &mut Random) -> Vec<u8> {
    let size = (8 + r.below(4 * 2048)) * 512;
    let data = noise(r, size);
    dir.write("raw", &data);
    dir.ok(dir.theirs("convert -f raw -O qcow2 raw base"));
    let mut shown = data;
    for (name, behind) in [("mid", "base"), ("top", "mid")] {
        let o = format_options(r);
        dir.ok(dir.ours(&format!("create -q -f qcow2 -o {o} -b {behind} -F qcow2 {name}")));
        for _ in 0..r.below(8) {
            let at = r.below(size / 512) * 512;
            let len = (512 * (1 + r.below(200))).min(size - at);
            let (byte, zero) = (r.next() as u8, r.below(4) == 0);
            let command = match zero {
                true => format!("write -z {at} {len}"),
                false => format!("write -P {byte} {at} {len}"),
            };
            let out = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", &command, name])
                .current_dir(dir.here())
                .output()
                .unwrap();
            assert!(out.status.success(), "{out:?}");
            shown[at as usize..(at + len) as usize].fill(if zero { 0 } else { byte });
        }
    }
    shown
}

fn shows(dir: &Dir, name: &str, data: &[u8], what: &str) {
    dir.ok(dir.theirs(&format!("convert -O raw {name} flat")));
    assert!(dir.read("flat") == data, "{what}");
    std::fs::remove_file(dir.path("flat")).unwrap();
    let (code, out, err) = dir.theirs(&format!("check {name}"));
    assert_eq!(code, 0, "{what}: {out}{err}");
}

#[test]
fn chains_are_committed_rebased_and_flattened() {
    if !has_qemu() || Command::new("qemu-io").arg("--version").output().is_err() {
        return;
    }
    let dir = Dir::new("chain");
    for seed in 1..=rounds(24) {
        let mut r = Random(seed.wrapping_mul(0x1357_9bdf_0246_8acf) | 1);
        for name in ["base", "mid", "top", "new", "flat"] {
            let _ = std::fs::remove_file(dir.path(name));
        }
        let shown = chain(&dir, &mut r);
        let what = format!("seed {seed}");
        shows(&dir, "top", &shown, &what);
        for name in ["mid", "top"] {
            same_map(&dir, name);
            let list = format!("info --backing-chain --output=json {name}");
            let (a, b) = (dir.json(dir.ours(&list)), dir.json(dir.theirs(&list)));
            assert_eq!(a.as_array().unwrap().len(), b.as_array().unwrap().len());
        }
        match seed % 4 {
            0 => {
                dir.ok(dir.ours("commit -q top"));
                shows(&dir, "mid", &shown, &what);
                shows(&dir, "top", &shown, &what);
            }
            1 => {
                dir.ok(dir.ours("rebase -b base -F qcow2 top"));
                std::fs::remove_file(dir.path("mid")).unwrap();
                shows(&dir, "top", &shown, &what);
            }
            2 => {
                dir.ok(dir.ours("rebase -b '' top"));
                std::fs::remove_file(dir.path("mid")).unwrap();
                shows(&dir, "top", &shown, &what);
            }
            _ => {
                dir.ok(dir.ours("convert -O qcow2 -B mid -F qcow2 top new"));
                shows(&dir, "new", &shown, &what);
                dir.ok(dir.ours("convert -c -O qcow2 top new"));
                shows(&dir, "new", &shown, &what);
            }
        }
    }
}

#[test]
fn snapshots_and_sizes() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("snapshot");
    let mut r = Random(271_828);
    let data = noise(&mut r, 2 << 20);
    dir.write("raw", &data);
    dir.ok(dir.ours("convert -f raw -O qcow2 raw a"));
    dir.ok(dir.ours("snapshot -c one a"));
    dir.ok(dir.theirs("snapshot -c two a"));
    same_report(&dir, "a");
    assert_eq!(dir.ours("snapshot -l a").1, dir.theirs("snapshot -l a").1);
    let out = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 0 1M", "a"])
        .current_dir(dir.here())
        .output()
        .unwrap();
    assert!(out.status.success());
    assert_eq!(dir.ours("compare a raw").0, 1);
    dir.ok(dir.ours("convert -l one -O raw a then"));
    assert!(dir.read("then") == data);
    dir.ok(dir.ours("snapshot -a two a"));
    assert_eq!(dir.ours("compare a raw").0, 0);
    dir.ok(dir.ours("snapshot -d one a"));
    dir.ok(dir.theirs("check a"));
    dir.ok(dir.theirs("snapshot -d two a"));
    same_report(&dir, "a");
    assert_eq!(dir.ours("resize a 1M").0, dir.theirs("resize a 1M").0);
    dir.ok(dir.ours("resize a +1M"));
    dir.ok(dir.ours("resize --shrink a 1M"));
    assert!(dir.json(dir.theirs("info --output=json a"))["virtual-size"] == 1 << 20);
    dir.ok(dir.theirs("check a"));
    dir.ok(dir.ours("resize --shrink -f raw raw 1M"));
    assert_eq!(dir.ours("compare a raw").0, 0);
}

#[test]
fn damage_has_the_same_exit_status() {
    if !has_qemu() {
        return;
    }
    let dir = Dir::new("damage");
    let mut r = Random(314_159);
    let data = noise(&mut r, 1 << 20);
    dir.write("raw", &data);
    dir.ok(dir.theirs("convert -f raw -O qcow2 raw good"));
    let good = dir.read("good");
    // A leak: a refcount where nothing is.
    let mut leak = good.clone();
    let block = u64::from_be_bytes(good[65536..65544].try_into().unwrap()) as usize;
    let free = good.len().div_ceil(65536) + 1;
    leak.resize((free + 1) * 65536, 0);
    leak[block + 2 * free + 1] = 1;
    dir.write("leak", &leak);
    assert_eq!((dir.ours("check leak").0, dir.theirs("check leak").0), (3, 3));
    // A corruption: a data cluster whose refcount is 0.
    let mut bad = good.clone();
    let last = good.len().div_ceil(65536) - 1;
    bad[block + 2 * last + 1] = 0;
    dir.write("bad", &bad);
    assert_eq!((dir.ours("check bad").0, dir.theirs("check bad").0), (2, 2));
    dir.ok(dir.ours("check -r leaks leak"));
    dir.ok(dir.ours("check -r all bad"));
    for name in ["leak", "bad"] {
        dir.ok(dir.theirs(&format!("check {name}")));
        dir.ok(dir.theirs(&format!("compare {name} raw")));
    }
}

#[test]
fn random_chains_agree_in_both_directions() {
    if !has_qemu() {
        return;
    }
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: python3 is not installed");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/images/compare.py");
    let count = rounds(6).to_string();
    let out = Command::new("python3")
        .args([script, "--count", &count, "--tandem", env!("CARGO_BIN_EXE_tandem")])
        .output()
        .unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
}
