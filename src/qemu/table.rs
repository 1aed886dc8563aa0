//! The options, one row each. `-help`, the reference page and `query-command-line-options` are made
//! from this table.

use super::Builder;
use crate::config::{Drive, Fault};

/// What is done about an option.
#[derive(Clone, Copy)]
pub enum Action {
    /// It is done.
    Do(DoIt),
    /// It means nothing here.
    Accept,
    /// It is refused; this is what to do instead.
    Refuse(&'static str),
}

type DoIt = fn(&mut Builder, &str) -> Result<(), Fault>;

/// An option.
pub struct Opt {
    /// Name without the dash.
    pub name: &'static str,
    /// Its argument as the help shows it; empty if it has none.
    pub argument: &'static str,
    /// What it does.
    pub about: &'static str,
    /// What is done about it.
    pub action: Action,
    /// Its keys that programs look for (`query-command-line-options`).
    pub keys: &'static [&'static str],
}

const fn opt(name: &'static str, arg: &'static str, about: &'static str, f: DoIt) -> Opt {
    Opt { name, argument: arg, about, action: Action::Do(f), keys: &[] }
}

const fn keys(opt: Opt, keys: &'static [&'static str]) -> Opt {
    Opt { keys, ..opt }
}

const fn accept(name: &'static str, arg: &'static str, why: &'static str) -> Opt {
    Opt { name, argument: arg, about: why, action: Action::Accept, keys: &[] }
}

const fn refuse(name: &'static str, arg: &'static str, instead: &'static str) -> Opt {
    Opt { name, argument: arg, about: instead, action: Action::Refuse(instead), keys: &[] }
}

/// The option called `name`.
pub fn find(name: &str) -> Option<&'static Opt> {
    OPTIONS.iter().find(|o| o.name == name)
}

/// What `-help` prints.
pub fn help() -> String {
    let mut s = String::from("usage: tandem qemu [options] [disk_image]\n\nOptions:\n");
    let line = |o: &Opt, s: &mut String| {
        let head = format!("-{} {}", o.name, o.argument);
        *s += &format!("  {head:<42} {}\n", o.about);
    };
    for o in OPTIONS.iter().filter(|o| matches!(o.action, Action::Do(_))) {
        line(o, &mut s);
    }
    s += "\nAccepted, as they mean nothing here:\n";
    for o in OPTIONS.iter().filter(|o| matches!(o.action, Action::Accept)) {
        line(o, &mut s);
    }
    s += "\nRefused, with what to do instead:\n";
    for o in OPTIONS.iter().filter(|o| matches!(o.action, Action::Refuse(_))) {
        line(o, &mut s);
    }
    s
}

const NO_DISPLAY: &str = "there is no display; use -nographic or -display none";
const NO_AUDIO: &str = "there is no sound; remove it";
const NO_MIGRATION: &str = "there is no migration yet; remove it";
const NO_USB: &str = "there is no USB; remove it";

/// All options.
pub static OPTIONS: &[Opt] = &[
    opt("h", "", "print this", |b, _| b.ask(super::Question::Help)),
    opt("help", "", "print this", |b, _| b.ask(super::Question::Help)),
    opt("version", "", "print the version", |b, _| b.ask(super::Question::Version)),
    keys(
        opt("machine", "TYPE[,key=value…]", "machine type; help lists them", Builder::machine),
        &["type", "accel", "memory-backend", "usb", "dump-guest-core"],
    ),
    opt("M", "TYPE[,key=value…]", "the same", Builder::machine),
    opt("accel", "NAME[,key=value…]", "accelerator; repeatable", Builder::accel),
    opt("enable-kvm", "", "-accel kvm", |b, _| b.accel("kvm")),
    opt("no-kvm", "", "-accel tcg", |b, _| b.accel("tcg")),
    opt("cpu", "MODEL[,feature…]", "CPU model; help lists them", Builder::cpu),
    keys(opt("m", "SIZE", "guest memory, MiB if without unit", Builder::memory), &["size"]),
    keys(
        opt("smp", "N[,sockets=…]", "processors and how they are arranged", Builder::smp),
        &["cpus", "sockets", "cores", "threads", "maxcpus", "dies"],
    ),
    keys(
        opt("numa", "node,… dist,… cpu,…", "nodes of processors and memory", Builder::numa),
        &["nodeid", "cpus", "mem", "memdev", "src", "dst", "val", "node-id", "socket-id"],
    ),
    opt("bios", "FILE", "firmware in ROM", |b, v| b.path(v, |c, p| c.firmware.bios = Some(p))),
    opt("fw_cfg", "[name=]opt/…,string=…|file=…", "item of fw_cfg", Builder::fw_cfg),
    opt("pflash", "FILE", "flash: the first has code, the second variables", |b, v| {
        b.config.drives.push(crate::config::firmware::flash(v));
        Ok(())
    }),
    opt("kernel", "FILE", "kernel to boot", |b, v| b.path(v, |c, p| c.boot.kernel = Some(p))),
    opt("initrd", "FILE", "initial RAM disk", |b, v| b.path(v, |c, p| c.boot.initrd = Some(p))),
    opt("append", "TEXT", "kernel command line", |b, v| {
        b.config.boot.append = v.into();
        Ok(())
    }),
    keys(
        opt("add-fd", "fd=N,set=N[,opaque=TEXT]", "descriptor for /dev/fdset/N", Builder::add_fd),
        &["fd", "set", "opaque"],
    ),
    opt("hda", "FILE", "SATA disk on port 0", |b, v| b.ide_disk(0, v)),
    opt("hdb", "FILE", "SATA disk on port 1", |b, v| b.ide_disk(1, v)),
    opt("hdc", "FILE", "SATA disk on port 2", |b, v| b.ide_disk(2, v)),
    opt("hdd", "FILE", "SATA disk on port 3", |b, v| b.ide_disk(3, v)),
    opt("cdrom", "FILE", "CD in the SATA drive on port 2", |b, v| {
        b.path(v, |c, p| c.drives.push(Drive::cdrom(p)))
    }),
    opt("drive", "key=value…", "disk", Builder::drive),
    opt("blockdev", "key=value…", "image or format", Builder::blockdev),
    opt("snapshot", "", "disks forget what is written", |b, _| {
        b.snapshot = true;
        Ok(())
    }),
    opt("device", "NAME[,key=value…]", "device; help lists them", Builder::device),
    opt("object", "TYPE,id=ID[,key=value…]", "object for devices", Builder::object),
    opt("chardev", "KIND,id=ID[,key=value…]", "character device", Builder::chardev),
    opt("serial", "WHERE", "where a serial port leads", Builder::serial),
    opt("monitor", "WHERE", "monitor for people", |b, v| b.monitor_at(v, false, false)),
    opt("qmp", "WHERE", "monitor for programs", |b, v| b.monitor_at(v, true, false)),
    opt("qmp-pretty", "WHERE", "the same, indented", |b, v| b.monitor_at(v, true, true)),
    opt("mon", "chardev=ID[,mode=control]", "monitor on a character device", Builder::mon),
    opt("name", "NAME", "name of the machine", Builder::name),
    opt("uuid", "UUID", "UUID of the machine", Builder::uuid),
    opt("rtc", "[base=utc|localtime|DATE][,driftfix=slew]", "battery-backed clock", Builder::rtc),
    opt("boot", "key=value…", "boot order", Builder::boot),
    opt("S", "", "do not start before cont", |b, _| {
        b.config.paused = true;
        Ok(())
    }),
    opt("no-reboot", "", "a guest's reset ends the machine", |b, _| {
        b.config.no_reboot = true;
        Ok(())
    }),
    opt("no-shutdown", "", "a machine that has shut down is kept", |b, _| {
        b.config.no_shutdown = true;
        Ok(())
    }),
    opt("action", "event=action…", "what comes of reboot, shutdown, panic", Builder::action),
    opt("watchdog-action", "ACTION", "what comes of a watchdog that is not fed", |b, v| {
        b.watchdog_action(v)
    }),
    opt("nodefaults", "", "no devices that were not asked for", |b, _| {
        b.nodefaults = true;
        Ok(())
    }),
    opt("nographic", "", "serial port and monitor on this terminal", |b, _| {
        b.nographic = true;
        Ok(())
    }),
    opt("display", "none", "no display", |b, v| match v {
        "none" => {
            b.headless = true;
            Ok(())
        }
        _ => Err(Fault::new(format!("-display {v} is not supported"), NO_DISPLAY)),
    }),
    opt("vga", "std|none", "graphics card; none if not said", |b, v| {
        b.vga = match v {
            "std" => true,
            "none" => false,
            _ => {
                let what = format!("-vga {v} is not supported");
                return Err(Fault::new(what, "use -vga std or -vga none"));
            }
        };
        Ok(())
    }),
    opt("daemonize", "", "go on in the background when the machine is built", |b, _| {
        b.process.daemonize = true;
        Ok(())
    }),
    opt("pidfile", "FILE", "gets the process's id", |b, v| {
        b.process.pidfile = Some(v.into());
        Ok(())
    }),
    opt("sandbox", "off", "system call filter", |_, v| match v.split(',').next() {
        Some("off") => Ok(()),
        _ => Err(Fault::new(
            format!("-sandbox {v} is not supported"),
            "there is no system call filter yet; use -sandbox off",
        )),
    }),
    opt("overcommit", "mem-lock=off", "locking of memory", |_, v| match v {
        "mem-lock=off" | "cpu-pm=off" => Ok(()),
        _ => Err(Fault::new(format!("-overcommit {v} is not supported"), "remove it")),
    }),
    opt("audiodev", "driver=none", "sound", Builder::audiodev),
    opt("audio", "none", "sound", Builder::audiodev),
    opt("parallel", "none", "parallel port", |_, v| match v {
        "none" => Ok(()),
        _ => Err(Fault::new("there is no parallel port", "use -parallel none")),
    }),
    opt("d", "ITEMS", "log execution; help lists the items", Builder::log_items),
    opt("D", "FILE", "file for that log", |b, v| b.path(v, |c, p| c.log.file = Some(p))),
    opt("dfilter", "RANGES", "addresses to which that log is restricted", |b, v| {
        b.config.log.filter = crate::config::parse::log_filter(v, &mut b.faults);
        Ok(())
    }),
    opt("global", "DRIVER.PROP=VALUE", "property of all devices of a type", Builder::global),
    opt("netdev", "KIND,id=ID[,key=value…]", "network for a card", Builder::netdev),
    opt("nic", "none|KIND[,key=value…]", "network with a card", Builder::nic),
    opt("net", "none|nic|KIND[,key=value…]", "network with a card", Builder::nic),
    opt("readconfig", "FILE", "options from a file", Builder::readconfig),
    accept("no-user-config", "", "there are no configuration files that are read unasked"),
    accept("msg", "timestamp=on", "messages are few and have no time stamps"),
    accept("L", "DIR", "no files are looked for in a directory of data"),
    accept("no-fd-bootchk", "", "there is no floppy disk to check"),
    accept("no-hpet", "", "guests choose their clock source themselves"),
    refuse("fda", "FILE", "there is no floppy drive; remove it"),
    refuse("fdb", "FILE", "there is no floppy drive; remove it"),
    refuse("sd", "FILE", "there is no SD card; use -drive file=FILE,if=virtio"),
    refuse("mtdblock", "FILE", "there is no flash disk; use -drive file=FILE,if=virtio"),
    refuse("usb", "", NO_USB),
    refuse("usbdevice", "NAME", NO_USB),
    refuse("vnc", "WHERE", NO_DISPLAY),
    refuse("spice", "WHERE", NO_DISPLAY),
    refuse("full-screen", "", NO_DISPLAY),
    refuse("k", "LAYOUT", NO_DISPLAY),
    refuse("soundhw", "NAME", NO_AUDIO),
    refuse("incoming", "WHERE", NO_MIGRATION),
    refuse("loadvm", "NAME", "there are no snapshots of machines yet; remove it"),
    refuse("only-migratable", "", NO_MIGRATION),
    refuse("no-acpi", "", "the machine always has ACPI; boot with acpi=off on the kernel line"),
    refuse("smbios", "key=value…", "SMBIOS tables cannot be set on this command line; remove it"),
    refuse("acpitable", "key=value…", "ACPI tables cannot be added; remove it"),
    refuse("mem-path", "PATH", "guest memory is anonymous; remove it"),
    refuse("mem-prealloc", "", "guest memory is given as it is used; remove it"),
    refuse("icount", "key=value…", "instructions are not counted; remove it"),
    refuse("gdb", "WHERE", "there is no debugger's port yet; see inside with -d"),
    refuse("s", "", "there is no debugger's port yet; see inside with -d"),
    refuse("watchdog", "MODEL", "use -device i6300esb"),
    refuse("fsdev", "key=value…", "there is no file sharing yet; use a disk image"),
    refuse("virtfs", "key=value…", "there is no file sharing yet; use a disk image"),
    refuse("tpmdev", "key=value…", "there is no TPM; remove it"),
    refuse("virtioconsole", "WHERE", "use -serial"),
    refuse("debugcon", "WHERE", "use -device isa-debugcon"),
    refuse("option-rom", "FILE", "there are no option ROMs; remove it"),
    refuse("dtb", "FILE", "there is no device tree; remove it"),
    refuse("shim", "FILE", "there is no shim; remove it"),
    refuse("plugin", "FILE", "there are no plugins; see inside with -d"),
    refuse("trace", "key=value…", "use -d"),
    refuse("set", "GROUP.ID.ARG=VALUE", "set it where the thing is made"),
    refuse("runas", "USER", "start it as that user: setpriv --reuid USER"),
    refuse("run-with", "key=value…", "start it in that environment"),
    refuse("chroot", "DIR", "start it inside: chroot DIR"),
    refuse("compat", "key=value…", "nothing is deprecated; remove it"),
    refuse("bt", "WHAT", "there is no Bluetooth; remove it"),
    refuse("xen-domid", "N", "there is no Xen; remove it"),
    refuse("semihosting", "", "there is no semihosting; remove it"),
    refuse("old-param", "", "that is for ARM; remove it"),
    refuse("prom-env", "VAR=VALUE", "that is for other machines; remove it"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_unique_and_shown() {
        for (i, o) in OPTIONS.iter().enumerate() {
            assert!(OPTIONS[..i].iter().all(|p| p.name != o.name), "-{}", o.name);
            assert!(help().contains(&format!("-{}", o.name)));
            assert!(!o.about.is_empty(), "-{}", o.name);
        }
    }
}
