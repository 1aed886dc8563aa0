//! What the threads of the program share.

use super::memory::Memory;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;
use tandem_tcg::user::Process;

/// The program.
pub struct Program {
    /// Translator and memory map.
    pub process: Arc<Process>,
    /// Calls about memory.
    pub memory: Memory,
    /// What /proc/self/exe leads to.
    pub exe: PathBuf,
    /// Its arguments, as /proc/self/cmdline shows them.
    pub args: Vec<OsString>,
    /// Its auxiliary vector, as /proc/self/auxv shows it.
    pub auxv: Vec<u8>,
    /// Our own options, for the programs that it executes.
    pub options: Vec<OsString>,
    /// System calls are said.
    pub strace: bool,
}

impl Program {
    /// Its name, for messages.
    pub fn name(&self) -> String {
        let name = self.exe.file_name().unwrap_or(OsStr::new("program"));
        name.to_string_lossy().into_owned()
    }
}
