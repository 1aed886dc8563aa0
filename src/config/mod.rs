//! A virtual machine as plain data: what every front end parses into, and what the machine is built
//! from.
//!
//! What always holds:
//!
//! * A [`VmConfig`] names no accelerator object, file handle or device object; it can be written
//!   down and read back ([serde]).
//! * [`VmConfig::validate`] is the one place that judges it. It returns every fault at once, each a
//!   sentence that names the thing and the remedy, and it changes nothing on the host.
//! * Text becomes data in [`parse`]; the pieces have the same spelling in every front end.

pub mod accel;
pub mod action;
pub mod boot_order;
pub mod chardev;
pub mod drive;
mod fault;
pub mod file;
pub mod firmware;
pub mod monitor;
pub mod net;
pub mod numa;
pub mod parse;
pub mod rtc;
mod size;
pub mod validate;

pub use accel::{Accel, TcgOptions};
pub use drive::{Drive, Interface, Media};
pub use fault::Fault;
pub use firmware::Firmware;
pub use net::Netdev;
pub use numa::Numa;
pub use rtc::Rtc;
pub use size::Size;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmConfig {
    /// Name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// UUID, 8-4-4-4-12 hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Machine type: `q35`, `microvm`, or `none` for one without processors and memory, which only answers
    /// questions.
    pub machine: String,
    /// Guest RAM.
    pub memory: Size,
    /// Processors and how they are arranged.
    pub smp: Smp,
    /// Nodes that processors and memory are in.
    pub numa: Numa,
    /// The battery-backed clock.
    pub rtc: Rtc,
    /// CPU model, with `+feature` and `-feature` appended by commas.
    pub cpu: String,
    /// Accelerators in order of preference.
    pub accel: Vec<Accel>,
    /// What to boot.
    pub boot: Boot,
    /// What starts the machine before that.
    pub firmware: Firmware,
    /// Character devices with names.
    pub chardevs: Vec<Chardev>,
    /// Objects that devices use.
    pub objects: Vec<Object>,
    /// What COM1… lead to, in order; at most four.
    pub serials: Vec<Serial>,
    /// Images for disks.
    pub drives: Vec<Drive>,
    /// Networks for cards.
    pub networks: Vec<Netdev>,
    /// Devices beyond the machine's own.
    pub devices: Vec<Device>,
    /// Where programs and people manage the machine.
    pub monitors: Vec<monitor::Monitor>,
    /// The guest is not started before somebody says so.
    pub paused: bool,
    /// A guest's reset ends the machine instead of restarting it.
    pub no_reboot: bool,
    /// A machine that has shut down is kept, stopped.
    pub no_shutdown: bool,
    /// What comes of a guest's panic and of a watchdog that is not fed.
    #[serde(skip_serializing_if = "action::Actions::usual")]
    pub actions: action::Actions,
    /// What is logged about the guest's execution.
    pub log: Log,
}

impl Default for VmConfig {
    fn default() -> VmConfig {
        VmConfig {
            name: None,
            uuid: None,
            machine: "q35".into(),
            memory: Size::mib(512),
            smp: Smp::default(),
            numa: Numa::default(),
            rtc: Rtc::default(),
            cpu: "max".into(),
            accel: vec![Accel::Auto],
            boot: Boot::default(),
            firmware: Firmware::default(),
            chardevs: Vec::new(),
            objects: Vec::new(),
            serials: vec![Serial::Stdio],
            drives: Vec::new(),
            networks: Vec::new(),
            devices: Vec::new(),
            monitors: Vec::new(),
            paused: false,
            no_reboot: false,
            no_shutdown: false,
            actions: Default::default(),
            log: Log::default(),
        }
    }
}

/// Number and arrangement of processors: `cpus = sockets × cores × threads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Smp {
    /// Processors, 1–255.
    pub cpus: u32,
    /// Sockets.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

impl Default for Smp {
    fn default() -> Smp {
        Smp { cpus: 1, sockets: 1, cores: 1, threads: 1 }
    }
}

/// How the kernel file is to be understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFormat {
    /// Recognised by its contents: bzImage, ELF with a PVH note, multiboot 1.
    #[default]
    Auto,
    /// Linux bzImage, entered at its 64-bit entry point.
    Bzimage,
    /// ELF with a PVH entry note, entered in 32-bit protected mode.
    Pvh,
    /// Multiboot 1.
    Multiboot,
    /// Raw bytes at 7c00h, entered there in real mode as a BIOS enters a boot sector (but with no
    /// BIOS behind it and up to 480 KiB long).
    Flat,
}

impl KernelFormat {
    /// All formats with their names.
    pub const NAMES: [(&'static str, KernelFormat); 5] = [
        ("auto", KernelFormat::Auto),
        ("bzimage", KernelFormat::Bzimage),
        ("pvh", KernelFormat::Pvh),
        ("multiboot", KernelFormat::Multiboot),
        ("flat", KernelFormat::Flat),
    ];
}

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Boot {
    /// Kernel file.
    pub kernel: Option<PathBuf>,
    /// How to understand it.
    pub format: KernelFormat,
    /// Initial RAM disk; for multiboot the first module.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub append: String,
    /// Multiboot modules.
    pub modules: Vec<Module>,
}

/// A multiboot module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    /// File.
    pub path: PathBuf,
    /// The module's string, without the file name.
    #[serde(default)]
    pub args: String,
}

/// What a serial port leads to on the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Serial {
    /// This terminal (raw mode; Ctrl-A is the escape key).
    Stdio,
    /// A file that is created or overwritten; nothing is read.
    File(PathBuf),
    /// A file that output is added to; nothing is read.
    Append(PathBuf),
    /// A new pseudo-terminal whose name is printed.
    Pty,
    /// A unix socket that tandem listens on.
    Unix(PathBuf),
    /// Nowhere.
    Null,
    /// A TCP socket, `HOST:PORT`, that tandem listens on.
    Listen(String),
    /// A server that tandem connects to.
    Connect {
        /// `unix:PATH` or `inet:HOST:PORT`.
        to: String,
        /// Milliseconds until a broken connection is made again.
        #[serde(default)]
        reconnect_ms: Option<u64>,
    },
    /// Memory that keeps the newest bytes.
    Ring(Size),
    /// The named character device.
    Chardev(String),
}

/// A character device with a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chardev {
    /// Its name.
    pub id: String,
    /// Where it leads.
    pub to: Serial,
}

/// An object that devices use: a source of entropy, a secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its type.
    pub qom_type: String,
    /// Its name.
    pub id: String,
    /// Properties in the order given.
    #[serde(default)]
    pub props: Vec<(String, String)>,
}

impl VmConfig {
    /// The machine type without anything in it.
    pub const NO_MACHINE: &str = "none";

    /// Whether there is no machine, only somebody who answers questions.
    pub fn is_none(&self) -> bool {
        self.machine == VmConfig::NO_MACHINE
    }

    /// The character devices that no serial port has: those for devices.
    pub fn free_chardevs(&self) -> impl Iterator<Item = &Chardev> {
        let used = |c: &Chardev| self.serials.iter().any(|s| *s == Serial::Chardev(c.id.clone()));
        self.chardevs.iter().filter(move |c| !used(c))
    }

    /// Where serial port `index` leads, and under which name.
    pub fn serial(&self, index: usize) -> Option<(String, &Serial)> {
        match self.serials.get(index)? {
            Serial::Chardev(id) => {
                let named = self.chardevs.iter().find(|c| c.id == *id)?;
                Some((id.clone(), &named.to))
            }
            other => Some((format!("serial{index}"), other)),
        }
    }
}

/// A device: the name of its type and its properties.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Type name, as `--device help` lists it.
    pub driver: String,
    /// Properties in the order given.
    #[serde(default)]
    pub props: Vec<(String, String)>,
}

/// Execution log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Items, from [`LOG_ITEMS`].
    pub items: Vec<String>,
    /// Where it goes; standard error if absent.
    pub file: Option<PathBuf>,
    /// Guest addresses to which translation items are restricted: start and length.
    pub filter: Vec<(u64, u64)>,
}

/// The items of `-d` with their meanings.
pub const LOG_ITEMS: [(&str, &str); 10] = [
    ("in_asm", "guest code as it is translated"),
    ("op", "intermediate representation as translated"),
    ("op_opt", "intermediate representation after optimisation"),
    ("out_asm", "generated host code"),
    ("cpu", "registers before each block"),
    ("exec", "address of each block before it runs"),
    ("int", "interrupts and exceptions"),
    ("mmu", "TLB misses and page faults"),
    ("nochain", "do not chain blocks, so that exec and cpu show all of them"),
    ("counters", "what each vCPU has counted, when it ends"),
];
