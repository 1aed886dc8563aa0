//! Driving the built `tandem` from the outside.
#![allow(dead_code)] // each test binary uses its part

pub mod flat;
pub mod pty;
pub mod qmp;
pub mod shell;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The built binary.
pub fn tandem() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tandem"))
}

/// `tandem run` with these words.
pub fn run(words: &[&str]) -> Command {
    let mut c = tandem();
    c.arg("run").args(words).stdin(Stdio::null());
    c
}

/// Says why a test does nothing here; `scripts/test` lists it.
pub fn skip(why: &str) {
    println!("skipped: {why}");
}

/// A directory of this test's own, removed at the end.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        let dir = std::env::temp_dir().join(format!("tandem-e2e-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        Dir(dir)
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    /// Writes a file; returns its path as text.
    pub fn file(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).expect("a temporary file");
        self.path(name).display().to_string()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where `scripts/fetch-guests` puts its files; `None` if this one is not there.
pub fn guest_file(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("tandem/guests").join(name)).filter(|p| p.exists())
}

/// Why an accelerator does not work here; found out once per test binary.
pub fn unusable(accel: &str) -> Option<String> {
    static KNOWN: Mutex<BTreeMap<String, Option<String>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap();
    if let Some(answer) = known.get(accel) {
        return answer.clone();
    }
    let dir = Dir::new(&format!("probe-{}", accel.replace(',', "-")));
    // A guest that ends by a triple fault, status 4, as soon as it runs.
    let image = dir.file("guest", &flat::Flat::default().triple_fault().0);
    let words = ["--accel", accel, "--kernel", &image, "--kernel-format", "flat", "-m", "16M"];
    let out = finish(&mut run(&words), Duration::from_secs(60));
    let answer = match out.status.code() {
        Some(4) => None,
        _ => Some(text(&out.stderr).trim().to_string()),
    };
    known.insert(accel.into(), answer.clone());
    answer
}

/// An accelerator that works here; says so if there is none.
pub fn any_accelerator() -> Option<&'static str> {
    let found = ["tcg", "kvm"].into_iter().find(|a| unusable(a).is_none());
    if found.is_none() {
        skip("no accelerator works here");
    }
    found
}

/// Waits for the end, at most `limit`; a child that is still there then is killed and the test
/// fails with what it has written.
pub fn wait(mut child: Child, limit: Duration) -> Output {
    // Pipes are emptied by threads of their own, so that a talkative child cannot block.
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            if let Some(mut p) = pipe {
                let _ = p.read_to_end(&mut all);
            }
            all
        })
    };
    let out = drain(child.stdout.take().map(|p| Box::new(p) as _));
    let err = drain(child.stderr.take().map(|p| Box::new(p) as _));
    let start = Instant::now();
    let status: Option<ExitStatus> = loop {
        match child.try_wait().expect("a child to wait for") {
            Some(s) => break Some(s),
            None if start.elapsed() > limit => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let (stdout, stderr) = (out.join().unwrap(), err.join().unwrap());
    match status {
        Some(status) => Output { status, stdout, stderr },
        None => panic!(
            "still running after {limit:?}; it wrote:\n{}\n{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        ),
    }
}

/// Runs `command` to its end.
pub fn finish(command: &mut Command, limit: Duration) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    wait(child.expect("the built binary"), limit)
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
