//! Command lines of the monitor for people, from programs.

use crate::monitor::human;
use crate::qapi::{Error, Result};

fn run(vm: &mut crate::machine::Machine, line: &str, cpu: Option<i64>) -> Result<String> {
    match cpu {
        None | Some(0) => Ok(human::execute(vm, line)),
        Some(n) => Err(Error::new(format!("processor {n} cannot be chosen; leave cpu-index out"))),
    }
}

crate::commands! {
    /// Runs a command line of the monitor for people; returns its output.
    fn "human-monitor-command"(cx, {
        /// The line.
        command_line: String,
        /// The processor that it is about; the first only.
        cpu_index: Option<i64>,
    }) -> String { run(cx.vm, &command_line, cpu_index) }
}
