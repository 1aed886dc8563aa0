//! Images made at random, and the programs that work on them.

// Each test program uses its own part.
#![allow(dead_code)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A directory for images that vanishes with it.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let base = PathBuf::from("/dev/shm");
        let base = if base.is_dir() { base } else { std::env::temp_dir() };
        let dir = base.join(format!("tandem-img-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// xorshift64*: tests repeat exactly.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
    pub fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Status, standard output, standard error.
pub type Said = (i32, String, String);

impl Dir {
    pub fn run(&self, program: &str, words: &str) -> Said {
        let mut c = Command::new(program);
        if program != "qemu-img" && program != "qemu-io" {
            c.arg("img");
        }
        let out = c.args(split(words)).current_dir(&self.0).output().unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (out.status.code().unwrap_or(-1), text(&out.stdout), text(&out.stderr))
    }
    pub fn ours(&self, words: &str) -> Said {
        self.run(env!("CARGO_BIN_EXE_tandem"), words)
    }
    pub fn theirs(&self, words: &str) -> Said {
        self.run("qemu-img", words)
    }
    pub fn ok(&self, said: Said) -> String {
        assert_eq!(said.0, 0, "{said:?}");
        said.1
    }
    pub fn json(&self, said: Said) -> Value {
        serde_json::from_str(&self.ok(said)).unwrap()
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub fn here(&self) -> &Path {
        &self.0
    }
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }
    pub fn write(&self, name: &str, data: &[u8]) {
        std::fs::write(self.0.join(name), data).unwrap();
    }
}

/// Splits at blanks; '' is an empty word.
pub fn split(words: &str) -> Vec<String> {
    words.split_whitespace().map(|w| if w == "''" { String::new() } else { w.into() }).collect()
}

pub fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: qemu-img is not installed");
    }
    there
}

/// Random bytes with long runs of zeros.
pub fn noise(r: &mut Random, size: u64) -> Vec<u8> {
    let mut v = vec![0; size as usize];
    for _ in 0..r.below(25) {
        let at = (r.below(size / 512) * 512) as usize;
        let end = (at + 512 * (1 + r.below(300) as usize)).min(v.len());
        let byte = r.next() as u8;
        let plain = r.below(2) == 0;
        for (i, b) in v[at..end].iter_mut().enumerate() {
            *b = if plain { byte } else { r.0 as u8 ^ (i / 5) as u8 };
        }
    }
    v
}

pub fn format_options(r: &mut Random) -> String {
    let cluster = 512u64 << r.below(12);
    let v3 = r.below(4) > 0;
    let mut o = format!("cluster_size={cluster},compat={}", if v3 { "1.1" } else { "0.10" });
    if v3 {
        o += &format!(",refcount_bits={}", 1 << r.below(7));
        o += r.pick(&["", ",lazy_refcounts=on"]);
        o += r.pick(&["", ",compression_type=zstd"]);
    }
    o
}

/// How many random images a test makes: `few`, or as TANDEM_IMAGES says.
pub fn rounds(few: u64) -> u64 {
    std::env::var("TANDEM_IMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(few)
}
