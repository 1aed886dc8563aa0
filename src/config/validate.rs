//! The judgement of a configuration. Changes nothing on the host.

use super::{Accel, Fault, LOG_ITEMS, Serial, VmConfig};
use crate::boot;
use crate::machine::memmap::{MAX_RAM, MIN_RAM, MemoryMap};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use tandem_accel::suggest::one_of;
use tandem_accel::x86::model::{ModelSpec, Topology, models};
use tandem_backends::fdset;
use tandem_devices::registry;

/// Machine types.
pub const MACHINES: [&str; 3] = ["q35", crate::machine::microvm::NAME, VmConfig::NO_MACHINE];
/// Serial ports of a PC.
const MAX_SERIALS: usize = 4;
/// Processors with an 8-bit local APIC ID; FFh is the broadcast ID.
pub const MAX_CPUS: u32 = 255;
/// `sun_path` with its terminating NUL.
const MAX_SOCKET_PATH: usize = 107;

impl VmConfig {
    /// Every fault of this configuration: none means that a machine can be built from it, unless
    /// the host refuses something (memory, a thread, an accelerator).
    pub fn validate(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if !MACHINES.contains(&self.machine.as_str()) {
            let what = format!("there is no machine type '{}'", self.machine);
            faults.push(Fault::new(what, one_of(&self.machine, &MACHINES)));
        }
        self.accelerators(&mut faults);
        self.identity(&mut faults);
        if self.is_none() {
            return faults;
        }
        let memory_is_good = self.memory(&mut faults);
        self.processors(&mut faults);
        faults.extend(self.numa.place(self.smp, self.memory).err().into_iter().flatten());
        // With bad memory, files are judged as if there were plenty: what does not fit would only
        // repeat that fault.
        let memory = if memory_is_good { self.memory } else { MAX_RAM };
        if self.starts_with_firmware() {
            self.firmware(&mut faults);
        } else {
            if self.firmware.bios.is_some() || self.flash().next().is_some() {
                let what = format!("machine '{}' has no place for firmware", self.machine);
                faults.push(Fault::new(what, "remove --bios, --firmware and --pflash"));
            }
            if !self.firmware.items.is_empty() {
                let what = "there is no fw_cfg device where a kernel starts without firmware";
                faults.push(Fault::new(what, "add -bios, or remove -fw_cfg"));
            }
            let plan = boot::Plan::new(&self.boot, &MemoryMap::new(memory));
            faults.extend(plan.err().into_iter().flatten());
        }
        if let Some(p) = &self.firmware.debug {
            faults.extend(creatable(p, "firmware log"));
        }
        self.serial_ports(&mut faults);
        self.firmware.boot.judge(&mut faults);
        crate::machine::drives::judge(self, &mut faults);
        crate::machine::networks::judge(self, &mut faults);
        for d in &self.devices {
            let found = registry::check(&d.driver, &d.props).err();
            faults.extend(found.into_iter().flatten().map(Fault::from));
        }
        self.logging(&mut faults);
        faults
    }

    fn identity(&self, faults: &mut Vec<Fault>) {
        let good = |u: &str| {
            let parts: Vec<&str> = u.split('-').collect();
            parts.iter().map(|p| p.len()).eq([8, 4, 4, 4, 12])
                && parts.iter().all(|p| p.bytes().all(|b| b.is_ascii_hexdigit()))
        };
        if let Some(u) = self.uuid.as_ref().filter(|u| !good(u)) {
            let what = format!("'{u}' is no UUID");
            faults.push(Fault::new(what, "write 8-4-4-4-12 hexadecimal digits"));
        }
        for (i, c) in self.chardevs.iter().enumerate() {
            if self.chardevs[..i].iter().any(|d| d.id == c.id) {
                let what = format!("two character devices are called '{}'", c.id);
                faults.push(Fault::new(what, "give each an id of its own"));
            }
        }
        for s in &self.serials {
            if let Serial::Chardev(id) = s
                && !self.chardevs.iter().any(|c| c.id == *id)
            {
                let what =
                    format!("a serial port names character device '{id}', which is not there");
                faults.push(Fault::new(what, "define it"));
            }
        }
        for d in &self.devices {
            for (_, id) in d.props.iter().filter(|(k, _)| k == "rng") {
                if !self.objects.iter().any(|o| o.id == *id && o.is_rng()) {
                    let what =
                        format!("device '{}' names rng '{id}', which is not there", d.driver);
                    faults.push(Fault::new(what, format!("add -object rng-random,id={id}")));
                }
            }
        }
        for (i, o) in self.objects.iter().enumerate() {
            faults.extend(crate::machine::objects::judge(o));
            if self.objects[..i].iter().any(|p| p.id == o.id) {
                let what = format!("two objects are called '{}'", o.id);
                faults.push(Fault::new(what, "give each an id of its own"));
            }
        }
    }

    fn memory(&self, faults: &mut Vec<Fault>) -> bool {
        let before = faults.len();
        if self.memory < MIN_RAM {
            faults.push(Fault::new(
                format!("{} of guest memory is too little", self.memory),
                format!("give at least {MIN_RAM} with -m (a Linux guest needs about 128M)"),
            ));
        } else if self.memory > MAX_RAM {
            faults.push(Fault::new(
                format!("{} of guest memory is more than the machine can address", self.memory),
                format!("give at most {MAX_RAM} with -m"),
            ));
        } else if !self.memory.bytes().is_multiple_of(1 << 20) {
            faults.push(Fault::new(
                format!("{} of guest memory is not a whole number of MiB", self.memory),
                "round it to MiB",
            ));
        }
        faults.len() == before
    }

    fn processors(&self, faults: &mut Vec<Fault>) {
        let s = &self.smp;
        let before = faults.len();
        if s.cpus == 0 || s.cpus > MAX_CPUS {
            faults.push(Fault::new(
                format!("a machine cannot have {} processors", s.cpus),
                format!("give 1 to {MAX_CPUS} with --smp"),
            ));
        }
        let product = u64::from(s.sockets) * u64::from(s.cores) * u64::from(s.threads);
        if product != u64::from(s.cpus) {
            faults.push(Fault::new(
                format!(
                    "{} processors cannot be arranged as {} sockets of {} cores of {} threads",
                    s.cpus, s.sockets, s.cores, s.threads
                ),
                format!("make the product {}, or give only --smp {}", s.cpus, s.cpus),
            ));
        }
        if faults.len() == before {
            faults.extend(Topology::new(s.sockets, s.cores, s.threads).err().map(Fault::from));
        }
        self.cpu_model(faults);
    }

    fn cpu_model(&self, faults: &mut Vec<Fault>) {
        let name = self.cpu.split(',').next().unwrap_or_default();
        let names: Vec<&str> = models().iter().map(|m| m.name).collect();
        if names.iter().any(|n| n.eq_ignore_ascii_case(name)) {
            let errors = ModelSpec::parse(&self.cpu).err();
            faults.extend(errors.into_iter().flatten().map(Fault::from));
        } else {
            let what = format!("there is no CPU model '{name}'");
            faults
                .push(Fault::new(what, format!("{} (--cpu help lists all)", one_of(name, &names))));
        }
    }

    fn accelerators(&self, faults: &mut Vec<Fault>) {
        if self.accel.is_empty() {
            faults.push(Fault::new("the list of accelerators is empty", "use auto, kvm or tcg"));
        }
        for (i, a) in self.accel.iter().enumerate() {
            let built_in = match a {
                Accel::Auto => cfg!(feature = "kvm") || cfg!(feature = "tcg"),
                Accel::Kvm => cfg!(feature = "kvm"),
                Accel::Tcg(_) => cfg!(feature = "tcg"),
            };
            if !built_in {
                faults.push(Fault::new(
                    format!("this tandem was built without accelerator {}", a.name()),
                    format!("build it with --features {}, or use another", a.name()),
                ));
            }
            if self.accel[..i].iter().any(|b| b.name() == a.name()) {
                faults.push(Fault::new(
                    format!("accelerator {} is listed twice", a.name()),
                    "list it once",
                ));
            }
        }
    }

    fn serial_ports(&self, faults: &mut Vec<Fault>) {
        if self.serials.len() > MAX_SERIALS {
            faults.push(Fault::new(
                format!("a machine cannot have {} serial ports", self.serials.len()),
                format!("give --serial at most {MAX_SERIALS} times"),
            ));
        }
        let ends: Vec<&Serial> =
            (0..self.serials.len()).filter_map(|i| self.serial(i)).map(|(_, s)| s).collect();
        if ends.iter().filter(|s| ***s == Serial::Stdio).count() > 1 {
            faults.push(Fault::new(
                "two serial ports cannot share the terminal",
                "use --serial stdio once and pty, file:PATH or unix:PATH for the others",
            ));
        }
        for (i, s) in ends.iter().enumerate() {
            let twin = matches!(s, Serial::File(_) | Serial::Append(_) | Serial::Unix(_))
                && ends[..i].iter().any(|o| o == s);
            match s {
                Serial::File(p) | Serial::Append(p) | Serial::Unix(p) if twin => {
                    faults.push(Fault::new(
                        format!("two serial ports lead to '{}'", p.display()),
                        "give each a path of its own",
                    ))
                }
                Serial::File(p) | Serial::Append(p) => {
                    faults.extend(creatable(p, "serial output file"));
                }
                Serial::Unix(p) => faults.extend(socket(p)),
                Serial::Chardev(_) => faults.push(Fault::new(
                    "a character device leads to another",
                    "name the other instead",
                )),
                _ => {}
            }
        }
        for c in self.free_chardevs() {
            match &c.to {
                Serial::File(p) | Serial::Append(p) => {
                    faults.extend(creatable(p, "character device's file"));
                }
                Serial::Unix(p) => faults.extend(socket(p)),
                _ => {}
            }
        }
    }

    fn logging(&self, faults: &mut Vec<Fault>) {
        let names = LOG_ITEMS.map(|(n, _)| n);
        for item in self.log.items.iter().filter(|i| !names.contains(&i.as_str())) {
            let what = format!("there is no log item '{item}'");
            faults.push(Fault::new(what, one_of(item, &names)));
        }
        if let Some(p) = &self.log.file {
            faults.extend(creatable(p, "log file"));
        }
    }
}

/// Whether this process may do `mode` (of access(2)) with `path`.
fn may(path: &Path, mode: libc::c_int) -> Result<(), std::io::Error> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: path is a NUL-terminated string that lives through the call.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The fault of a path at which no file can be created or written.
fn creatable(path: &Path, what: &str) -> Option<Fault> {
    let fault = |why: String, remedy: &str| {
        Some(Fault::new(format!("{what} '{}' cannot be written: {why}", path.display()), remedy))
    };
    if let Some(set) = fdset::named(path) {
        return match fdset::sets().contains_key(&set) {
            true => None,
            false => fault("there is no such set of descriptors".into(), "add it with -add-fd"),
        };
    }
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => fault("it is a directory".into(), "name a file in it"),
        Ok(m) if m.file_type().is_socket() => {
            fault("it is a socket".into(), "name a file, or use unix:PATH")
        }
        Ok(_) => match may(path, libc::W_OK) {
            Ok(()) => None,
            Err(e) => fault(reason(&e), "make it writable or choose another path"),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => parent_writable(path)
            .and_then(|e| fault(reason(&e), "create the directory or choose another path")),
        Err(e) => fault(reason(&e), "choose another path"),
    }
}

/// Why no entry can be created in the directory of `path`.
fn parent_writable(path: &Path) -> Option<std::io::Error> {
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    may(dir, libc::W_OK | libc::X_OK).err()
}

/// The fault of a path at which no socket can be made.
fn socket(path: &Path) -> Option<Fault> {
    let fault = |why: String, remedy: &str| {
        Some(Fault::new(
            format!("serial socket '{}' cannot be made: {why}", path.display()),
            remedy,
        ))
    };
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let why = format!("its path is longer than {MAX_SOCKET_PATH} bytes");
        return fault(why, "choose a shorter path");
    }
    match std::fs::symlink_metadata(path) {
        Ok(m) if !m.file_type().is_socket() => {
            fault("something else is there".into(), "remove it or choose another path")
        }
        Ok(_) => None,
        Err(_) => parent_writable(path)
            .and_then(|e| fault(reason(&e), "create the directory or choose another path")),
    }
}

/// The words of an I/O error without its number.
fn reason(e: &std::io::Error) -> String {
    let text = e.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    text.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::super::{Size, Smp, TcgOptions};
    use super::*;

    fn faults(c: &VmConfig) -> Vec<String> {
        c.validate().iter().map(|f| f.to_string()).collect()
    }

    fn has(c: &VmConfig, words: &[&str]) {
        let all = faults(c);
        assert!(
            all.iter().any(|f| words.iter().all(|w| f.contains(w))),
            "{words:?} not in {all:#?}"
        );
    }

    #[test]
    fn every_fault_is_told_at_once_with_its_remedy() {
        let c = VmConfig {
            machine: "q36".into(),
            cpu: "qemu46".into(),
            memory: Size::mib(3),
            smp: Smp { cpus: 3, sockets: 1, cores: 2, threads: 1 },
            accel: vec![Accel::Tcg(TcgOptions::default()), Accel::Tcg(TcgOptions::default())],
            serials: vec![
                Serial::Stdio,
                Serial::Stdio,
                Serial::File("/nonexistent/x".into()),
                Serial::Unix("/proc/1/x".into()),
                Serial::File("/".into()),
            ],
            ..VmConfig::default()
        };
        has(&c, &["q36", "q35"]);
        has(&c, &["3M", "8M", "-m"]);
        has(&c, &["3 processors", "--smp 3"]);
        has(&c, &["qemu46", "qemu64"]);
        has(&c, &["tcg", "twice"]);
        has(&c, &["share the terminal"]);
        has(&c, &["/nonexistent/x", "create the directory"]);
        has(&c, &["5 serial ports"]);
        has(&c, &["'/'", "is a directory"]);
        for f in faults(&c) {
            assert!(f.contains("; ") && !f.ends_with('.'), "{f}");
        }
    }

    #[test]
    fn boot_faults_are_among_them() {
        let mut c = VmConfig::default();
        has(&c, &["nothing to boot", "--kernel"]);
        c.boot.kernel = Some("/nonexistent".into());
        c.boot.initrd = Some("/nonexistent2".into());
        has(&c, &["/nonexistent'", "no such file"]);
        has(&c, &["/nonexistent2'", "no such file"]);
        c.boot.kernel = Some("/etc/passwd".into());
        c.boot.initrd = None;
        has(&c, &["/etc/passwd", "not a kernel", "flat"]);
    }

    #[test]
    fn configuration_survives_writing_and_reading() {
        let c = VmConfig {
            accel: vec![Accel::Kvm, Accel::Tcg(TcgOptions::default())],
            ..VmConfig::default()
        };
        let text = toml::to_string(&c).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), c, "{text}");
        assert!(toml::from_str::<VmConfig>("memry = 3").is_err());
    }
}
