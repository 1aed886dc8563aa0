//! `-strace`: a line for every system call, on standard error.

use super::syscall::Answer;
use std::fmt::Write;
use syscalls::x86_64::Sysno;

/// The line of a call that is being served.
pub struct Line {
    text: String,
}

/// A call's name.
pub fn name(nr: u64) -> String {
    match usize::try_from(nr).ok().and_then(Sysno::new) {
        Some(s) => s.name().into(),
        None => format!("syscall_{nr}"),
    }
}

impl Line {
    /// Says the call with its arguments; one that does not come back must have been said before.
    pub fn begin(nr: u64, args: [u64; 6]) -> Line {
        // SAFETY: gettid cannot fail.
        let tid = unsafe { libc::gettid() };
        let mut text = format!("{tid} {}(", name(nr));
        for (i, a) in args.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let _ = match *a as i64 {
                small @ -4096..=9999 => write!(text, "{comma}{small}"),
                _ => write!(text, "{comma}{a:#x}"),
            };
        }
        text.push(')');
        let ends = [libc::SYS_exit, libc::SYS_exit_group, libc::SYS_execve, libc::SYS_execveat];
        if ends.contains(&(nr as i64)) {
            eprintln!("{text}");
        }
        Line { text }
    }

    /// Says what came of it.
    pub fn end(self, answer: &Answer) {
        let what = match answer {
            Answer::Value(v @ -4095..=-1) => {
                let e = std::io::Error::from_raw_os_error(-*v as i32);
                format!("-1 errno={} ({e})", -v)
            }
            Answer::Value(v) if (0..10_000).contains(v) => v.to_string(),
            Answer::Value(v) => format!("{v:#x}"),
            Answer::Interrupted { begun: true } => "interrupted".into(),
            Answer::Interrupted { begun: false } => return,
            Answer::None => "?".into(),
            Answer::End(_) => return,
        };
        eprintln!("{} = {what}", self.text);
    }
}
