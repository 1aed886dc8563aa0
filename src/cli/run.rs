//! `tandem run`: flags to configuration.

use super::exit;
use crate::config::accel::{Icount, TcgOptions};
use crate::config::monitor::{Endpoint, Mode, Monitor};
use crate::config::{
    Accel, Chardev, Device, Drive, Fault, LOG_ITEMS, Netdev, Rtc, Serial, Size, VmConfig, firmware,
    parse,
};
use crate::ctl::runtime;
use clap::Args;
use std::path::PathBuf;
use tandem_accel::suggest::one_of;

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
    /// Firmware: uefi, bios, or code=FILE[,vars=FILE] (flash images; vars is written). uefi without
    /// vars forgets its variables in the end. Without a kernel, disks start through SeaBIOS
    #[arg(long, value_name = "FIRMWARE", help_heading = "Boot")]
    firmware: Option<String>,
    /// Image of the firmware's ROM
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    bios: Option<PathBuf>,
    /// Image of a flash device: the firmware's code, given again its variables
    #[arg(long = "pflash", value_name = "FILE", help_heading = "Boot")]
    pflash: Vec<PathBuf>,
    /// File for what the firmware writes to its debug port
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    debugcon: Option<PathBuf>,
    /// What firmware is told: order=LETTERS (c disk, d CD-ROM, n network), once=LETTERS, menu=on,
    /// splash-time=MS, reboot-timeout=MS, strict=on
    #[arg(long, value_name = "ORDER", help_heading = "Boot")]
    boot: Vec<String>,
    /// A reset by the guest ends the machine instead of restarting it
    #[arg(long, help_heading = "Boot")]
    no_reboot: bool,

    /// Guest memory, for example 512M or 4G; a plain number counts MiB
    #[arg(short, long, value_name = "SIZE", default_value = "512M", help_heading = "Machine")]
    memory: String,
    /// Processors: N, or cpus=N,sockets=S,cores=C,threads=T
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Machine")]
    smp: String,
    /// Node of processors and memory: node,cpus=A-B,mem=SIZE, in the order of their numbers; or how
    /// far one is from another: dist,src=A,dst=B,val=V; repeatable
    #[arg(long, value_name = "NODE", help_heading = "Machine")]
    numa: Vec<String>,
    /// CPU model with features added or removed, for example x86-64-v3,+aes,-avx2
    #[arg(long, value_name = "MODEL", default_value = "max", help_heading = "Machine")]
    cpu: String,
    /// Accelerators in order of preference, separated by ':'. auto is KVM where it works, else TCG;
    /// kvm; tcg with options: backend=jit|interp, thread=multi|single, one-insn-per-tb=on|off,
    /// tb-size=MIB
    #[arg(long, value_name = "LIST", default_value = "auto", help_heading = "Machine")]
    accel: String,
    /// Battery-backed clock: base=utc|localtime|DATE (such as 2026-11-20T13:45:59) is what it shows at
    /// the start; driftfix=slew makes up for periodic ticks that came too late
    #[arg(long, value_name = "WORDS", help_heading = "Machine")]
    rtc: Option<String>,
    /// Machine type
    #[arg(long, value_name = "TYPE", default_value = "q35", help_heading = "Machine")]
    machine: String,
    /// Where a serial port leads: stdio, file:PATH, pty, unix:PATH (tandem listens) or null;
    /// repeatable for COM1 to COM4 [default: stdio]
    #[arg(long = "serial", value_name = "WHERE", help_heading = "Machine")]
    serials: Vec<String>,
    /// Disk image: file=PATH[,format=raw|qcow2][,if=virtio|ide|none|pflash][,media=disk|cdrom]
    /// [,index=PORT][,id=ID][,readonly=on][,snapshot=on][,cache=writeback|none|writethrough|directsync|unsafe][,aio=threads|io_uring]
    /// [,discard=unmap][,detect-zeroes=on|unmap][,throttling.bps-total=N…]; repeatable
    #[arg(long = "drive", value_name = "DRIVE", help_heading = "Machine")]
    drives: Vec<String>,
    /// CD-ROM image, in a SATA drive: --drive file=FILE,media=cdrom
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    cdrom: Option<PathBuf>,
    /// Network with a virtio card: user[,hostfwd=tcp::2222-:22][,mac=…], or any --netdev; repeatable
    #[arg(long = "net", value_name = "NETWORK", help_heading = "Machine")]
    nets: Vec<String>,
    /// Network for a card that --device makes (netdev=ID): user,id=ID[,net=ADDR/BITS][,host=ADDR]
    /// [,dns=ADDR][,dhcpstart=ADDR][,restrict=on][,hostname=NAME][,hostfwd=tcp|udp:[ADDR]:PORT-[ADDR]:PORT…]
    /// [,guestfwd=tcp:ADDR:PORT-cmd:COMMAND…]; tap,id=ID[,ifname=NAME|fd=N]; stream,id=ID[,server=on]
    /// ,addr.type=unix|inet|fd,addr.path=PATH…[,reconnect-ms=N] (passt); dgram,id=ID,local.type=…
    /// ,remote.type=…; repeatable
    #[arg(long = "netdev", value_name = "NETWORK", help_heading = "Machine")]
    netdevs: Vec<String>,
    /// Character device for a device (chardev=ID): socket,id=ID,path=PATH|host=HOST,port=PORT
    /// [,server=on][,reconnect=SECONDS]; pty|stdio|null,id=ID; file,id=ID,path=PATH;
    /// ringbuf,id=ID[,size=N]; repeatable
    #[arg(long = "chardev", value_name = "CHARDEV", help_heading = "Machine")]
    chardevs: Vec<String>,
    /// Graphics card: std, the same as --device VGA, or none. Firmware, GRUB and Linux then write to
    /// it instead of the serial port; screendump shows it
    #[arg(long, value_name = "CARD", default_value = "none", help_heading = "Machine")]
    vga: String,
    /// Device NAME[,property=value…]; repeatable; "help" lists the names, "NAME,help" the properties
    #[arg(long = "device", value_name = "DEVICE", help_heading = "Machine")]
    devices: Vec<String>,

    /// Manage the machine by QMP at unix:PATH, tcp:HOST:PORT, pty or stdio; a socket is listened on
    /// [,server=on|off][,wait=on: do not start before somebody has connected]; repeatable; "help"
    /// prints the reference of all commands and events
    #[arg(long = "qmp", value_name = "WHERE", help_heading = "Management")]
    qmp: Vec<String>,
    /// Monitor for people at unix:PATH, tcp:HOST:PORT, pty or stdio; repeatable
    #[arg(long = "monitor", value_name = "WHERE", help_heading = "Management")]
    monitor: Vec<String>,
    /// Name of the machine; tandem ctl finds it by this name
    #[arg(long, value_name = "NAME", help_heading = "Management")]
    name: Option<String>,
    /// Go on in the background when the machine is built; its serial port is at tandem ctl NAME
    /// console
    #[arg(long, help_heading = "Management")]
    pub detach: bool,
    /// Read the machine from a TOML file, as --print-config writes it
    #[arg(long, value_name = "FILE", help_heading = "Management")]
    config: Option<PathBuf>,
    /// Write the machine as TOML instead of running it
    #[arg(long, help_heading = "Management")]
    pub print_config: bool,
    /// Do not start the guest before a monitor says cont
    #[arg(long, short = 'S', help_heading = "Management")]
    paused: bool,
    /// Keep a machine that has shut down, stopped, so that it can be looked at or reset
    #[arg(long, help_heading = "Management")]
    no_shutdown: bool,

    /// What comes of misfortunes: panic=pause|shutdown|exit-failure|none (told through pvpanic),
    /// watchdog=reset|shutdown|poweroff|pause|debug|none
    #[arg(long, value_name = "WHAT", help_heading = "Management")]
    action: Vec<String>,

    /// Log execution: comma-separated items, "help" lists them
    #[arg(short = 'd', value_name = "ITEMS", help_heading = "Seeing inside")]
    log: Option<String>,
    /// File for the log of -d [default: standard error]
    #[arg(short = 'D', value_name = "FILE", help_heading = "Seeing inside")]
    log_file: Option<PathBuf>,
    /// Restrict the log to guest addresses START..END, START+LEN or START-LEN (comma-separated)
    #[arg(long, value_name = "RANGES", help_heading = "Seeing inside")]
    dfilter: Option<String>,
    /// Make guest time from executed instructions, 2^N ns each (0-10), so that the same input gives
    /// the same run; or auto: as near to host time as it gets. Idle time passes as in the host, or
    /// with ,sleep=off at once. All processors take turns on one thread (tcg only)
    #[arg(long, value_name = "N|auto[,sleep=off]", help_heading = "Machine")]
    icount: Option<String>,
    /// Translate one guest instruction per block (same as the tcg option)
    #[arg(long, help_heading = "Seeing inside")]
    one_insn_per_tb: bool,
    /// Write a map of translated code for perf to /tmp/perf-PID.map (same as the tcg option)
    #[arg(long, help_heading = "Seeing inside")]
    perfmap: bool,
}

/// A question that flags can ask instead of running a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// `--device help`.
    Devices,
    /// `--device NAME,help`.
    DeviceProperties(String),
    /// `--cpu help`.
    CpuModels,
    /// `-d help`.
    LogItems,
    /// `--qmp help`.
    Qmp,
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
        if self.qmp.iter().any(|q| q == "help") {
            return Some(Question::Qmp);
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
        if let Some(path) = &self.config {
            return match crate::config::file::read(path) {
                Ok(c) => (c, faults),
                Err(f) => (VmConfig::default(), f),
            };
        }
        let mut c = VmConfig { machine: self.machine.clone(), ..VmConfig::default() };
        match Size::parse(&self.memory) {
            Ok(size) => c.memory = size,
            Err(f) => faults.push(f),
        }
        if let Some(smp) = parse::smp(&self.smp, &mut faults) {
            c.smp = smp;
        }
        self.numa.iter().for_each(|n| c.numa.add(n, &mut faults));
        if let Some(words) = &self.rtc {
            c.rtc = Rtc::parse(words, &mut faults);
        }
        c.cpu = self.cpu.clone();
        c.accel = Accel::parse_list(&self.accel, &mut faults);
        if c.accel.is_empty() {
            c.accel = vec![Accel::Auto];
        }
        if self.one_insn_per_tb {
            force_tcg("--one-insn-per-tb", &mut c.accel, &mut faults, |o| o.one_insn_per_tb = true);
        }
        if self.perfmap {
            force_tcg("--perfmap", &mut c.accel, &mut faults, |o| o.perfmap = true);
        }
        match self.icount.as_deref().map(Icount::parse) {
            Some(Ok(i)) => {
                force_tcg("--icount", &mut c.accel, &mut faults, |o| o.icount = Some(i));
            }
            Some(Err(f)) => faults.push(f),
            None => {}
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
        c.drives.extend(self.cdrom.iter().map(Drive::cdrom));
        c.chardevs = self.chardevs.iter().filter_map(|d| Chardev::parse(d, &mut faults)).collect();
        let nets = self.nets.iter().filter(|n| *n != "none").map(|n| ("--net", n));
        let all = nets.chain(self.netdevs.iter().map(|n| ("--netdev", n)));
        c.networks = all.filter_map(|(f, n)| Netdev::parse(f, n, &mut faults)).collect();
        self.boot.iter().for_each(|b| c.firmware.boot.parse("--boot", b, &mut faults));
        c.firmware.debug = self.debugcon.clone();
        c.firmware.bios = self.bios.clone();
        if let Some(words) = &self.firmware {
            let (rom, flash) = firmware::parse(words, &mut faults);
            c.firmware.bios = c.firmware.bios.or(rom);
            c.drives.extend(flash);
        }
        c.drives.extend(self.pflash.iter().map(firmware::flash));
        match self.vga.as_str() {
            "std" => c.devices.push(Device { driver: "VGA".into(), props: Vec::new() }),
            "none" => {}
            other => {
                let what = format!("there is no graphics card '{other}'");
                faults.push(Fault::new(what, one_of(other, &["std", "none"])));
            }
        }
        for d in &self.devices {
            match parse::device(d) {
                Ok(d) => c.devices.push(d),
                Err(f) => faults.push(f),
            }
        }
        for place in &self.qmp {
            match Endpoint::parse(place, "--qmp", true, false) {
                Ok(at) => c.monitors.push(Monitor {
                    mode: Mode::Control,
                    pretty: false,
                    chardev: None,
                    at,
                }),
                Err(f) => faults.push(f),
            }
        }
        for place in &self.monitor {
            match Endpoint::parse(place, "--monitor", true, false) {
                Ok(at) => {
                    c.monitors.push(Monitor {
                        mode: Mode::Readline,
                        pretty: false,
                        chardev: None,
                        at,
                    });
                }
                Err(f) => faults.push(f),
            }
        }
        if let Some(name) = &self.name {
            match runtime::place(name) {
                Ok(place) => c.monitors.push(place.monitor()),
                Err(f) => faults.push(f),
            }
            if self.detach && self.serials.is_empty() {
                c.serials = runtime::place(name).map(|p| p.serial()).into_iter().collect();
            }
        } else if self.detach {
            faults.push(Fault::new("a machine in the background needs a name", "add --name NAME"));
        }
        c.name = self.name.clone();
        c.paused = self.paused;
        c.no_reboot = self.no_reboot;
        c.no_shutdown = self.no_shutdown;
        self.action.iter().for_each(|a| c.actions.parse(a, &mut faults));
        if let Some(items) = &self.log {
            c.log.items = parse::log_items(items, &mut faults);
        }
        c.log.file = self.log_file.clone();
        if let Some(ranges) = &self.dfilter {
            c.log.filter = parse::log_filter(ranges, &mut faults);
        }
        (c, faults)
    }
}

/// Sets an option of translation that has a flag of its own, `flag`.
fn force_tcg(
    flag: &str,
    list: &mut Vec<Accel>,
    faults: &mut Vec<Fault>,
    set: impl Fn(&mut TcgOptions),
) {
    if *list == [Accel::Auto] {
        *list = vec![Accel::Tcg(TcgOptions::default())];
    }
    let mut any = false;
    for a in list {
        if let Accel::Tcg(o) = a {
            set(o);
            any = true;
        }
    }
    if !any {
        faults.push(Fault::new(
            format!("{flag} means nothing without translation"),
            "add tcg to --accel or remove the flag",
        ));
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
