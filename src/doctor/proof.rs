//! The proof: runs the small guest on an accelerator.
//!
//! The guest runs in a child process, so that whatever goes wrong there (a crash, a hang) is a line
//! of the report and not its end.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the guest may take. It needs a fraction of a second, and some seconds where KVM is
/// itself an emulation.
const LIMIT: Duration = Duration::from_secs(60);

/// What came of a run.
pub struct Proof {
    /// The guest's verdict, or why there is none.
    pub verdict: Result<(), String>,
    /// How long it took.
    pub took: Duration,
}

/// Runs the guest with `--accel accel`.
pub fn run(accel: &str) -> Proof {
    let start = Instant::now();
    let verdict = match attempt(accel) {
        Err(e) => Err(e.to_string()),
        Ok((None, ..)) => Err(format!("the guest did not finish in {} s", LIMIT.as_secs())),
        Ok((Some(status), serial, said)) => {
            tandem_guest::judge(status.code(), &serial).map_err(|why| {
                let last = said.lines().last().unwrap_or_default();
                if last.is_empty() { why } else { format!("{why}; {last}") }
            })
        }
    };
    Proof { verdict, took: start.elapsed() }
}

/// Runs the child; returns its status (none if it took too long), what the guest wrote to its
/// serial port, and what tandem said.
fn attempt(accel: &str) -> io::Result<(Option<ExitStatus>, String, String)> {
    let kernel = memory_file(tandem_guest::IMAGE)?;
    let mut output = memory_file(b"")?;
    // The files have no name; the child opens ours through /proc.
    let path = |f: &File| format!("/proc/{}/fd/{}", std::process::id(), f.as_raw_fd());
    let mut child = Command::new(std::env::current_exe()?)
        .args(["run", "--accel", accel, "-m", "32M", "--no-reboot"])
        .args(["--kernel", &path(&kernel)])
        .args(["--serial", &format!("file:{}", path(&output))])
        .args(tandem_guest::DEVICES.iter().flat_map(|d| ["--device", d]))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let status = wait(&mut child)?;
    let (mut serial, mut said) = (Vec::new(), Vec::new());
    output.seek(SeekFrom::Start(0))?;
    output.read_to_end(&mut serial)?;
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_end(&mut said)?;
    }
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Ok((status, text(serial), text(said)))
}

fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An unnamed file in memory with these contents.
fn memory_file(contents: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(c"tandem-guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(contents)?;
    Ok(file)
}
