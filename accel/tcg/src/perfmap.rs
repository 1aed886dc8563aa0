//! The perf map: a file that tells `perf` the names of translated code.
//!
//! Format (Linux, tools/perf/Documentation/jit-interface.txt): lines of start and size in
//! hexadecimal and a name, in `/tmp/perf-PID.map`. A block is named by the guest address it begins
//! at. Addresses are those of the executable mapping. After a flush of all code an address gets a
//! second line; perf takes the last.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Mutex;
use tandem_accel::{Error, Result};

/// An open perf map.
#[derive(Debug)]
pub struct PerfMap(Mutex<File>);

impl PerfMap {
    /// Where perf looks for the map of this process.
    pub fn path() -> PathBuf {
        format!("/tmp/perf-{}.map", std::process::id()).into()
    }
    /// Creates the map of this process.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create() -> Result<PerfMap> {
        let path = PerfMap::path();
        let file = File::create(&path).map_err(|e| {
            Error::new(format!("cannot write the perf map {}", path.display()))
                .caused_by(e)
                .remedy("run without --perfmap")
        })?;
        Ok(PerfMap(Mutex::new(file)))
    }
    /// Names `code` after the guest address `pc` and the privilege level it runs at.
    pub fn block(&self, code: &Range<u64>, pc: u64, cpl: u8) {
        self.line(code, &format!("guest{cpl}_{pc:x}"));
    }
    /// Names `code`.
    pub fn line(&self, code: &Range<u64>, name: &str) {
        let size = code.end.saturating_sub(code.start);
        // A line in one write, so that the file is good at any time. A map that cannot be written
        // must not stop the guest.
        let line = format!("{:x} {size:x} {name}\n", code.start);
        let _ = self.0.lock().unwrap().write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_perf_wants_them() {
        let map = PerfMap::create().unwrap();
        map.block(&(0x1000..0x1040), 0xffff_ffff_8100_0000, 0);
        map.line(&(0x2000..0x2010), "leave");
        let text = std::fs::read_to_string(PerfMap::path()).unwrap();
        let _ = std::fs::remove_file(PerfMap::path());
        assert_eq!(text, "1000 40 guest0_ffffffff81000000\n2000 10 leave\n");
    }
}
