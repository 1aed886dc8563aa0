//! QEMU's command line (`tandem qemu …`, or called as `qemu-system-x86_64`), read into the same
//! configuration as every other front end.
//!
//! ```text
//!   words ──► table (one row for each option) ──► Builder ──► settle ──► VmConfig, Process
//! ```
//!
//! What always holds:
//!
//! * Every option that QEMU has is in the table: done, accepted because it means nothing here (with
//!   the reason), or refused with the alternative. Nothing is ignored in silence.
//! * All faults of a command line come at once.

pub mod answer;
mod block;
mod character;
mod device;
pub mod keyval;
mod machine;
mod numa;
mod settle;
pub mod table;

pub use device::network_words;

use crate::config::monitor::{Endpoint, Mode};
use crate::config::{Drive, Fault, VmConfig};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What concerns the process rather than the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Goes on in the background when the machine is built.
    pub daemonize: bool,
    /// Gets the process's id.
    pub pidfile: Option<PathBuf>,
}

/// A question that is answered instead of running a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// `-version`.
    Version,
    /// `-help`.
    Help,
    /// `-machine help`.
    Machines,
    /// `-accel help`.
    Accelerators,
    /// What `tandem run` would be asked with the same words.
    Other(crate::cli::run::Question),
}

/// What a command line comes to.
pub enum Parsed {
    /// A machine.
    Machine(Box<VmConfig>, Process),
    /// A question.
    Question(Question),
}

/// A character device of the command line.
#[derive(Clone, Debug, PartialEq)]
struct Char {
    id: String,
    to: CharTo,
}

/// Where a character device leads: to what a serial port can be connected to, or a monitor, or both.
#[derive(Clone, Debug, PartialEq)]
struct CharTo {
    serial: Result<crate::config::Serial, Fault>,
    monitor: Result<Endpoint, Fault>,
}

/// A monitor of the command line.
struct Mon {
    mode: Mode,
    pretty: bool,
    /// Where it is: by itself, or a character device's id.
    at: Result<Endpoint, String>,
}

/// A block node of the command line.
pub struct Node {
    /// Its name.
    pub name: String,
    /// An image file, or a format on another node.
    pub kind: NodeKind,
}

/// What a block node is.
pub enum NodeKind {
    /// A file.
    File(Box<Drive>),
    /// A format on the node `file`.
    Format {
        /// The format.
        drive: Box<Drive>,
        /// Name of the node below it.
        file: String,
        /// What stands in the image about another behind it is not followed.
        no_backing: bool,
        /// The node below it was defined inside it.
        inline: bool,
    },
}

/// What has been read so far.
#[derive(Default)]
pub struct Builder {
    config: VmConfig,
    process: Process,
    question: Option<Question>,
    accels: Vec<String>,
    chardevs: Vec<Char>,
    serials: Vec<CharTo>,
    /// `isa-serial` devices: index if given, and what they lead to.
    isa_serials: Vec<(Option<usize>, String)>,
    monitors: Vec<Mon>,
    nodes: Vec<Node>,
    /// Nodes that are flash: code, variables.
    flash: [Option<String>; 2],
    memory_backends: BTreeMap<String, u64>,
    memory_backend: Option<String>,
    numa: Vec<String>,
    nodefaults: bool,
    nographic: bool,
    headless: bool,
    /// A VGA without `-device`.
    vga: bool,
    snapshot: bool,
    faults: Vec<Fault>,
}

/// The block nodes that the value of `-blockdev` defines, each after those that it lies on.
pub fn block_nodes(value: &str) -> Result<Vec<Node>, Vec<Fault>> {
    let mut b = Builder::default();
    let fault = b.blockdev(value).err();
    b.faults.extend(fault);
    if b.faults.is_empty() { Ok(b.nodes) } else { Err(b.faults) }
}

/// Reads a command line, without the program's name.
pub fn parse(words: &[String]) -> Result<Parsed, Vec<Fault>> {
    let mut b = Builder::default();
    b.config.serials.clear();
    b.config.cpu = "qemu64".into();
    b.config.memory = crate::config::Size::mib(128);
    b.words(words);
    if let Some(q) = b.question {
        return Ok(Parsed::Question(q));
    }
    b.settle();
    match b.faults.is_empty() {
        true => Ok(Parsed::Machine(Box::new(b.config), b.process)),
        false => Err(b.faults),
    }
}

impl Builder {
    fn words(&mut self, words: &[String]) {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix('-').filter(|n| !n.is_empty()) else {
                self.disk_image(word);
                continue;
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            let Some(option) = table::find(name) else {
                let names: Vec<&str> = table::OPTIONS.iter().map(|o| o.name).collect();
                let what = format!("there is no option '{word}'");
                let remedy = tandem_accel::suggest::closest_or(name, &names, || {
                    "list the options with -help".into()
                });
                self.faults.push(Fault::new(what, remedy));
                continue;
            };
            let value = match option.argument.is_empty() {
                true => "",
                false => match words.next() {
                    Some(v) => v.as_str(),
                    None => {
                        let what = format!("option '{word}' needs an argument");
                        self.faults.push(Fault::new(what, format!("write {}", option.argument)));
                        continue;
                    }
                },
            };
            self.option(option, value);
        }
    }

    fn option(&mut self, option: &table::Opt, value: &str) {
        match option.action {
            table::Action::Do(f) => {
                if let Err(f) = f(self, value) {
                    self.faults.push(f);
                }
            }
            table::Action::Accept => {}
            table::Action::Refuse(instead) => {
                let what = format!("-{} is not supported", option.name);
                self.faults.push(Fault::new(what, instead));
            }
        }
    }

    /// A word without an option is the image of the first disk.
    fn disk_image(&mut self, word: &str) {
        self.config.drives.push(Drive { file: word.into(), ..Drive::default() });
    }

    fn leftovers(&mut self, pairs: keyval::Pairs, known: &[&str]) {
        self.faults.extend(pairs.leftovers(known));
    }
}
