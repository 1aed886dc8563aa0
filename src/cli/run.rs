//! `tandem run`: flags to configuration.

use super::exit;
use crate::config::{Accel, Drive, Fault, LOG_ITEMS, Serial, Size, VmConfig, parse};
use clap::Args;
use std::path::PathBuf;

/// Flags of `tandem run`.
#[derive(Args, Debug)]
#[command(after_help = exit::HELP)]
pub struct RunArgs {
    /// Kernel: Linux bzImage, ELF with a PVH entry (vmlinux), or multiboot 1
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", help_heading = "Boot", allow_hyphen_values = true)]
    append: Option<String>,
    /// Multiboot module with its arguments; repeatable
    #[arg(long = "module", value_name = "FILE [ARGS]", help_heading = "Boot")]
    modules: Vec<String>,
    /// What the kernel file is: auto, bzimage, pvh, multiboot, or flat (raw real-mode code that is
    /// loaded and entered at 0x7c00)
    #[arg(long, value_name = "FORMAT", default_value = "auto", help_heading = "Boot")]
    kernel_format: String,
    /// A reset by the guest ends the machine instead of restarting it
    #[arg(long, help_heading = "Boot")]
    no_reboot: bool,

    /// Guest memory, for example 512M or 4G; a plain number counts MiB
    #[arg(short, long, value_name = "SIZE", default_value = "512M", help_heading = "Machine")]
    memory: String,
    /// Processors: N, or cpus=N,sockets=S,cores=C,threads=T
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Machine")]
    smp: String,
    /// CPU model with features added or removed, for example x86-64-v3,+aes,-avx2
    #[arg(long, value_name = "MODEL", default_value = "max", help_heading = "Machine")]
    cpu: String,
    /// Accelerators in order of preference, separated by ':'. auto is KVM where it works, else TCG;
    /// kvm; tcg with options: backend=jit|interp, thread=multi|single, one-insn-per-tb=on|off,
    /// tb-size=MIB
    #[arg(long, value_name = "LIST", default_value = "auto", help_heading = "Machine")]
    accel: String,
    /// Machine type
    #[arg(long, value_name = "TYPE", default_value = "q35", help_heading = "Machine")]
    machine: String,
    /// Where a serial port leads: stdio, file:PATH, pty, unix:PATH (tandem listens) or null;
    /// repeatable for COM1 to COM4 [default: stdio]
    #[arg(long = "serial", value_name = "WHERE", help_heading = "Machine")]
    serials: Vec<String>,
    /// Disk image: file=PATH[,format=raw|qcow2][,if=virtio|none][,id=ID][,readonly=on]
    /// [,snapshot=on][,cache=writeback|none|writethrough|directsync|unsafe][,aio=threads|io_uring]
    /// [,discard=unmap][,detect-zeroes=on|unmap][,throttling.bps-total=N…]; repeatable
    #[arg(long = "drive", value_name = "DRIVE", help_heading = "Machine")]
    drives: Vec<String>,
    /// Device NAME[,property=value…]; repeatable; "help" lists the names, "NAME,help" the properties
    #[arg(long = "device", value_name = "DEVICE", help_heading = "Machine")]
    devices: Vec<String>,

    /// Log execution: comma-separated items, "help" lists them
    #[arg(short = 'd', value_name = "ITEMS", help_heading = "Seeing inside")]
    log: Option<String>,
    /// File for the log of -d [default: standard error]
    #[arg(short = 'D', value_name = "FILE", help_heading = "Seeing inside")]
    log_file: Option<PathBuf>,
    /// Restrict the log to guest addresses START..END, START+LEN or START-LEN (comma-separated)
    #[arg(long, value_name = "RANGES", help_heading = "Seeing inside")]
    dfilter: Option<String>,
    /// Translate one guest instruction per block (same as the tcg option)
    #[arg(long, help_heading = "Seeing inside")]
    one_insn_per_tb: bool,
}

/// A question that flags can ask instead of running a machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Question {
    /// `--device help`.
    Devices,
    /// `--device NAME,help`.
    DeviceProperties(String),
    /// `--cpu help`.
    CpuModels,
    /// `-d help`.
    LogItems,
}

impl RunArgs {
    /// The question asked, if any.
    pub fn question(&self) -> Option<Question> {
        if self.cpu == "help" {
            return Some(Question::CpuModels);
        }
        if self.log.as_deref() == Some("help") {
            return Some(Question::LogItems);
        }
        self.devices.iter().find_map(|d| match d.split_once(',') {
            None if d == "help" => Some(Question::Devices),
            Some((name, "help")) => Some(Question::DeviceProperties(name.into())),
            _ => None,
        })
    }

    /// The configuration that the flags describe, and what is wrong with their spelling. A faulty
    /// flag leaves its default, so that the rest can be judged too.
    pub fn config(&self) -> (VmConfig, Vec<Fault>) {
        let mut faults = Vec::new();
        let mut c = VmConfig { machine: self.machine.clone(), ..VmConfig::default() };
        match Size::parse(&self.memory) {
            Ok(size) => c.memory = size,
            Err(f) => faults.push(f),
        }
        if let Some(smp) = parse::smp(&self.smp, &mut faults) {
            c.smp = smp;
        }
        c.cpu = self.cpu.clone();
        c.accel = Accel::parse_list(&self.accel, &mut faults);
        if c.accel.is_empty() {
            c.accel = vec![Accel::Auto];
        }
        if self.one_insn_per_tb {
            self.force_one_insn_per_tb(&mut c.accel, &mut faults);
        }
        c.boot.kernel = self.kernel.clone();
        c.boot.initrd = self.initrd.clone();
        c.boot.append = self.append.clone().unwrap_or_default();
        c.boot.modules = self.modules.iter().map(|m| parse::module(m)).collect();
        match parse::kernel_format(&self.kernel_format) {
            Ok(f) => c.boot.format = f,
            Err(f) => faults.push(f),
        }
        if !self.serials.is_empty() {
            c.serials = self
                .serials
                .iter()
                .map(|s| {
                    parse::serial(s).unwrap_or_else(|f| {
                        faults.push(f);
                        Serial::Null
                    })
                })
                .collect();
        }
        c.drives = self.drives.iter().filter_map(|d| Drive::parse(d, &mut faults)).collect();
        for d in &self.devices {
            match parse::device(d) {
                Ok(d) => c.devices.push(d),
                Err(f) => faults.push(f),
            }
        }
        c.no_reboot = self.no_reboot;
        if let Some(items) = &self.log {
            c.log.items = parse::log_items(items, &mut faults);
        }
        c.log.file = self.log_file.clone();
        if let Some(ranges) = &self.dfilter {
            c.log.filter = parse::log_filter(ranges, &mut faults);
        }
        (c, faults)
    }

    fn force_one_insn_per_tb(&self, list: &mut Vec<Accel>, faults: &mut Vec<Fault>) {
        if *list == [Accel::Auto] {
            *list = vec![Accel::Tcg(Default::default())];
        }
        let mut any = false;
        for a in list {
            if let Accel::Tcg(o) = a {
                o.one_insn_per_tb = true;
                any = true;
            }
        }
        if !any {
            faults.push(Fault::new(
                "--one-insn-per-tb means nothing without translation",
                "add tcg to --accel or remove the flag",
            ));
        }
    }
}

/// Prints the items of `-d`.
pub fn print_log_items() {
    println!("Items of -d:");
    for (name, meaning) in LOG_ITEMS {
        println!("  {name:<10} {meaning}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::{CommandFactory, Parser};

    fn args(line: &str) -> RunArgs {
        let words = ["tandem", "run"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(a) => *a,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_become_configuration() {
        let (c, faults) = args(
            "--kernel k --initrd i --append console=ttyS0 -m 4G --smp 2 --accel kvm:tcg \
             --serial null --serial file:/tmp/x --device isa-debug-exit,iobase=0xf4 -d int,cpu \
             -D log --no-reboot",
        )
        .config();
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(c.memory, Size::mib(4096));
        assert_eq!(c.smp.cpus, 2);
        assert_eq!(c.accel.len(), 2);
        assert_eq!(c.serials, [Serial::Null, Serial::File("/tmp/x".into())]);
        assert_eq!(c.devices[0].driver, "isa-debug-exit");
        assert_eq!(c.log.items, ["int", "cpu"]);
        assert!(c.no_reboot);
    }

    #[test]
    fn all_spelling_faults_come_at_once() {
        let (_, faults) = args(
            "-m 12Q --smp 0 --accel kwm --serial stdoi --device =x -d foo --dfilter 1 \
             --kernel-format zip",
        )
        .config();
        assert_eq!(faults.len(), 8, "{faults:?}");
    }

    #[test]
    fn questions_are_seen() {
        assert_eq!(args("--device help").question(), Some(Question::Devices));
        assert_eq!(
            args("--device x --device pc-testdev,help").question(),
            Some(Question::DeviceProperties("pc-testdev".into()))
        );
        assert_eq!(args("--cpu help").question(), Some(Question::CpuModels));
        assert_eq!(args("-d help").question(), Some(Question::LogItems));
        assert_eq!(args("--kernel k").question(), None);
    }
}
