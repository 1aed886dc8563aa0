//! Messages to the user: one line each on standard error, with the program's name in front.

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        m.target().starts_with("tandem")
    }
    fn log(&self, r: &Record<'_>) {
        if self.enabled(r.metadata()) {
            match r.level() {
                Level::Error => error(r.args()),
                Level::Warn => eprintln!("tandem: warning: {}", r.args()),
                level => eprintln!("tandem: {}: {}", level.as_str().to_lowercase(), r.args()),
            }
        }
    }
    fn flush(&self) {}
}

/// Shows warnings; with `verbose` 1 also what is going on, with 2 and more every detail.
pub fn install(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}

/// Says what is wrong.
pub fn error(what: &dyn std::fmt::Display) {
    eprintln!("tandem: error: {what}");
}

/// Says something the user should know.
pub fn note(what: &dyn std::fmt::Display) {
    eprintln!("tandem: {what}");
}
