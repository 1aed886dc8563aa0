//! What the options mean together, when all of them have been read.

use super::{Builder, CharTo};
use crate::config::monitor::{Endpoint, Monitor};
use crate::config::{Chardev, Device, Drive, Fault, Interface, Serial, Size};

impl Builder {
    pub(super) fn settle(&mut self) {
        self.settle_accel();
        self.settle_memory();
        self.settle_numa();
        self.settle_monitors();
        self.settle_serials();
        self.settle_chardevs();
        self.settle_nodes();
        self.settle_flash();
        if self.vga {
            self.config.devices.insert(0, Device { driver: "VGA".into(), props: Vec::new() });
        }
        // As with QEMU, whoever has but a terminal sees there what firmware says.
        self.config.firmware.serial_console |= self.nographic;
        if self.snapshot {
            let disks = self.config.drives.iter_mut().filter(|d| !d.is_empty());
            disks.for_each(|d| d.snapshot = true);
        }
    }

    fn settle_memory(&mut self) {
        let Some(id) = self.memory_backend.take() else { return };
        match self.memory_backends.get(&id) {
            None => self.faults.push(Fault::new(
                format!("memory backend '{id}' is not there"),
                "add it with -object memory-backend-ram",
            )),
            Some(bytes) if *bytes != self.config.memory.bytes() => self.faults.push(Fault::new(
                format!("memory backend '{id}' has {bytes} bytes, and -m says otherwise"),
                "make them the same",
            )),
            Some(bytes) => self.config.memory = Size(*bytes),
        }
    }

    fn char(&self, id: &str, user: &str) -> Result<CharTo, Fault> {
        let found = self.chardevs.iter().find(|c| c.id == id);
        found.map(|c| c.to.clone()).ok_or_else(|| {
            let what = format!("{user} names character device '{id}', which is not there");
            Fault::new(what, format!("add -chardev …,id={id}"))
        })
    }

    fn settle_monitors(&mut self) {
        for m in std::mem::take(&mut self.monitors) {
            let (at, chardev) = match m.at {
                Ok(at) => (Ok(at), None),
                Err(id) => (self.char(&id, "-mon").and_then(|c| c.monitor), Some(id)),
            };
            match at {
                Ok(at) => self.config.monitors.push(Monitor {
                    mode: m.mode,
                    pretty: m.pretty,
                    chardev,
                    at,
                }),
                Err(f) => self.faults.push(f),
            }
        }
    }

    /// Keeps the character devices that devices name.
    fn settle_chardevs(&mut self) {
        for c in &self.chardevs {
            let named = |d: &Device| d.props.iter().any(|(k, v)| k == "chardev" && *v == c.id);
            if self.config.devices.iter().any(named) {
                match &c.to.serial {
                    Ok(to) => {
                        self.config.chardevs.push(Chardev { id: c.id.clone(), to: to.clone() });
                    }
                    Err(f) => self.faults.push(f.clone()),
                }
            }
        }
    }

    /// Makes flash of the nodes that -machine says, the one with the code first.
    fn settle_flash(&mut self) {
        for name in std::mem::take(&mut self.flash).into_iter().flatten() {
            let drives = &mut self.config.drives;
            match drives.iter().position(|d| d.id.as_ref() == Some(&name)) {
                Some(i) => {
                    let drive = drives.remove(i);
                    drives.push(Drive { interface: Interface::Pflash, ..drive });
                }
                None => self.faults.push(Fault::new(
                    format!("-machine names block node '{name}' as flash, which is not there"),
                    "add it with -blockdev",
                )),
            }
        }
    }

    fn settle_serials(&mut self) {
        let mut ports: Vec<Option<Serial>> = Vec::new();
        for to in std::mem::take(&mut self.serials) {
            match to.serial {
                Ok(s) => ports.push(Some(s)),
                Err(f) => self.faults.push(f),
            }
        }
        for (index, id) in std::mem::take(&mut self.isa_serials) {
            let serial = match self.char(&id, "-device isa-serial").and_then(|c| c.serial) {
                Ok(s) => s,
                Err(f) => {
                    self.faults.push(f);
                    continue;
                }
            };
            let free = || ports.iter().position(Option::is_none).unwrap_or(ports.len());
            let index = index.unwrap_or_else(free);
            if index >= 4 || ports.get(index).is_some_and(Option::is_some) {
                self.faults.push(Fault::new(
                    format!("serial port {index} is taken or does not exist"),
                    "use index 0 to 3, each once",
                ));
                continue;
            }
            ports.resize(ports.len().max(index + 1), None);
            self.config.chardevs.push(Chardev { id: id.clone(), to: serial });
            ports[index] = Some(Serial::Chardev(id));
        }
        if ports.is_empty() && !self.nodefaults {
            // QEMU's first serial port is in a window, or on the terminal if there is none.
            let shares = self.config.monitors.iter().any(|m| m.at == Endpoint::Stdio);
            let visible = self.nographic || !self.headless;
            let stdio = visible && !shares && !self.process.daemonize;
            ports.push(Some(if stdio { Serial::Stdio } else { Serial::Null }));
        }
        self.config.serials = ports.into_iter().map(|p| p.unwrap_or(Serial::Null)).collect();
    }
}
