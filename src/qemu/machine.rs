//! Options about the machine as a whole.

use super::keyval::Pairs;
use super::{Builder, Question};
use crate::cli::run;
use crate::config::action::{PanicAction, WatchdogAction};
use crate::config::{Accel, Fault, Size, parse};
use std::path::PathBuf;
use tandem_accel::suggest::one_of;

type Done = Result<(), Fault>;

impl Builder {
    pub(super) fn ask(&mut self, q: Question) -> Done {
        self.question.get_or_insert(q);
        Ok(())
    }

    pub(super) fn path(
        &mut self,
        value: &str,
        put: fn(&mut crate::config::VmConfig, PathBuf),
    ) -> Done {
        put(&mut self.config, value.into());
        Ok(())
    }

    pub(super) fn machine(&mut self, value: &str) -> Done {
        if value == "help" || value == "?" {
            return self.ask(Question::Machines);
        }
        let mut p = Pairs::parse("machine", value, Some("type"))?;
        if let Some(name) = p.take("type") {
            self.config.machine = name;
        }
        if let Some(list) = p.take("accel") {
            self.accels.extend(list.split(':').map(str::to_string));
        }
        self.memory_backend = p.take("memory-backend").or(self.memory_backend.take());
        for (i, key) in ["pflash0", "pflash1"].iter().enumerate() {
            self.flash[i] = p.take(key).or(self.flash[i].take());
        }
        // What is not there cannot be on; what is always there cannot be off.
        for (key, only) in [
            ("usb", false),
            ("vmport", false),
            ("smm", false),
            ("graphics", false),
            ("mem-merge", false),
            ("dump-guest-core", false),
            ("acpi", true),
            ("hpet", true),
            ("pit", true),
            ("pic", true),
            ("sata", false),
            ("smbus", false),
            ("i8042", true),
        ] {
            match p.flag(key)? {
                Some(v) if v != only && !self.harmless(key) => {
                    let word = |on| if on { "on" } else { "off" };
                    let what = format!("-machine {key}={} is not supported", word(v));
                    self.faults.push(Fault::new(what, format!("use {key}={}", word(only))));
                }
                _ => {}
            }
        }
        if let Some(v) = p.take("kernel_irqchip").or_else(|| p.take("kernel-irqchip"))
            && v != "on"
        {
            let what = format!("-machine kernel_irqchip={v} is not supported");
            self.faults.push(Fault::new(what, "leave it out"));
        }
        self.leftovers(p, &["type", "accel", "memory-backend", "pflash0", "pflash1"]);
        Ok(())
    }

    /// Keys whose other value changes nothing that a guest or a user could see.
    fn harmless(&self, key: &str) -> bool {
        matches!(key, "mem-merge" | "dump-guest-core" | "graphics")
    }

    pub(super) fn accel(&mut self, value: &str) -> Done {
        if value == "help" || value == "?" {
            return self.ask(Question::Accelerators);
        }
        self.accels.push(value.into());
        Ok(())
    }

    /// Accelerators in order of preference, as given by -accel and -machine accel=.
    pub(super) fn settle_accel(&mut self) {
        if self.accels.is_empty() {
            // QEMU's default is TCG; a user who says nothing is better served by what works best.
            self.config.accel = vec![Accel::Auto];
            return;
        }
        let list = self.accels.join(":");
        self.config.accel = Accel::parse_list(&list, &mut self.faults);
        let accels = &mut self.config.accel;
        let mut seen = Vec::new();
        accels.retain(|a| {
            let new = !seen.contains(&a.name());
            seen.push(a.name());
            new
        });
    }

    pub(super) fn cpu(&mut self, value: &str) -> Done {
        if value == "help" || value == "?" {
            return self.ask(Question::Other(run::Question::CpuModels));
        }
        // `migratable` chooses which features `host` has; ours can all be migrated.
        let words = value.split(',').filter(|w| !w.starts_with("migratable="));
        let words: Vec<String> = words
            .map(|w| match w.split_once('=') {
                Some((f, "on" | "true" | "yes")) => format!("+{f}"),
                Some((f, "off" | "false" | "no")) => format!("-{f}"),
                _ => w.to_string(),
            })
            .collect();
        self.config.cpu = words.join(",");
        Ok(())
    }

    pub(super) fn memory(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("m", value, Some("size"))?;
        if let Some(size) = p.take("size") {
            self.config.memory = Size::parse(&size)?;
        }
        for key in ["slots", "maxmem"] {
            if let Some(v) = p.take(key) {
                let what = format!("-m {key}={v} is not supported");
                self.faults.push(Fault::new(what, "memory cannot be plugged in; leave it out"));
            }
        }
        self.leftovers(p, &["size"]);
        Ok(())
    }

    pub(super) fn smp(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("smp", value, Some("cpus"))?;
        let max: Option<u32> = p.number("maxcpus")?;
        for key in ["dies", "clusters", "modules", "drawers", "books"] {
            if let Some(n) = p.number::<u32>(key)?.filter(|n| *n != 1) {
                let what = format!("-smp {key}={n} is not supported");
                self.faults.push(Fault::new(what, "use sockets, cores and threads"));
            }
        }
        let cpus: Option<u32> = p.number("cpus")?;
        if let (Some(max), Some(cpus)) = (max, cpus)
            && max != cpus
        {
            return Err(Fault::new(
                format!("-smp {cpus},maxcpus={max} is not supported"),
                "processors cannot be plugged in; make maxcpus the same",
            ));
        }
        let mut words: Vec<String> =
            cpus.or(max).map(|n| format!("cpus={n}")).into_iter().collect();
        words.extend(p.rest().into_iter().map(|(k, v)| format!("{k}={v}")));
        if let Some(smp) = parse::smp(&words.join(","), &mut self.faults) {
            self.config.smp = smp;
        }
        Ok(())
    }

    pub(super) fn name(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("name", value, Some("guest"))?;
        self.config.name = p.take("guest");
        // Threads always have names.
        let _ = (p.take("debug-threads"), p.take("process"));
        self.leftovers(p, &["guest"]);
        Ok(())
    }

    pub(super) fn uuid(&mut self, value: &str) -> Done {
        self.config.uuid = Some(value.into());
        Ok(())
    }

    pub(super) fn rtc(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("rtc", value, None)?;
        for key in ["base", "clock", "driftfix"] {
            if let Some(value) = p.take(key)
                && let Some(Err(f)) = self.config.rtc.set(key, &value)
            {
                self.faults.push(f);
            }
        }
        self.leftovers(p, &["base", "clock", "driftfix"]);
        Ok(())
    }

    pub(super) fn boot(&mut self, value: &str) -> Done {
        let words = parse::split_commas(value);
        // A picture would be shown by a BIOS that nobody looks at.
        let words: Vec<&str> =
            words.iter().map(String::as_str).filter(|w| !w.starts_with("splash=")).collect();
        if !words.is_empty() {
            self.config.firmware.boot.parse("-boot", &words.join(","), &mut self.faults);
        }
        Ok(())
    }

    pub(super) fn action(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("action", value, None)?;
        let refused = |key: &str, v: &str, use_: &str| {
            Fault::new(format!("-action {key}={v} is not supported"), format!("use {use_}"))
        };
        match p.take("reboot").as_deref() {
            None => {}
            Some("reset") => self.config.no_reboot = false,
            Some("shutdown") => self.config.no_reboot = true,
            Some(v) => self.faults.push(refused("reboot", v, "reset or shutdown")),
        }
        match p.take("shutdown").as_deref() {
            None => {}
            Some("poweroff") => self.config.no_shutdown = false,
            Some("pause") => self.config.no_shutdown = true,
            Some(v) => self.faults.push(refused("shutdown", v, "poweroff or pause")),
        }
        if let Some(v) = p.take("panic") {
            match PanicAction::NAMES.iter().find(|(n, _)| *n == v) {
                Some((_, a)) => self.config.actions.panic = *a,
                None => {
                    let names = PanicAction::NAMES.map(|(n, _)| n).join(", ");
                    self.faults.push(refused("panic", &v, &names));
                }
            }
        }
        if let Some(v) = p.take("watchdog") {
            self.watchdog_action(&v)?;
        }
        self.leftovers(p, &["reboot", "shutdown", "panic", "watchdog"]);
        Ok(())
    }

    pub(super) fn watchdog_action(&mut self, value: &str) -> Done {
        match WatchdogAction::NAMES.iter().find(|(n, _)| *n == value) {
            Some((_, a)) => {
                self.config.actions.watchdog = *a;
                Ok(())
            }
            None => Err(Fault::new(
                format!("watchdog action '{value}' is not supported"),
                one_of(value, &WatchdogAction::NAMES.map(|(n, _)| n)),
            )),
        }
    }

    pub(super) fn log_items(&mut self, value: &str) -> Done {
        if value == "help" || value == "?" {
            return self.ask(Question::Other(run::Question::LogItems));
        }
        self.config.log.items = parse::log_items(value, &mut self.faults);
        Ok(())
    }

    pub(super) fn audiodev(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("audiodev", value, Some("driver"))?;
        match p.take("driver").as_deref() {
            Some("none") => Ok(()),
            _ => Err(Fault::new("there is no sound", "use -audiodev none,id=…")),
        }
    }

    /// Properties that say what holds anyway are accepted.
    pub(super) fn global(&mut self, value: &str) -> Done {
        const HOLDS: [&str; 4] = [
            "ICH9-LPC.disable_s3=1",
            "ICH9-LPC.disable_s4=1",
            "kvm-pit.lost_tick_policy=discard",
            "kvm-pit.lost_tick_policy=delay",
        ];
        if HOLDS.contains(&value) {
            return Ok(());
        }
        Err(Fault::new(
            format!("-global {value} is not supported"),
            "give the property with the -device that it concerns",
        ))
    }

    /// An INI file: `[option "id"]`, then `key = "value"` lines.
    pub(super) fn readconfig(&mut self, value: &str) -> Done {
        let cannot = |why: String| Fault::new(format!("-readconfig {value}: {why}"), "correct it");
        let text = std::fs::read_to_string(value).map_err(|e| cannot(e.to_string()))?;
        let mut words: Vec<String> = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = || cannot(format!("line {} is not understood", i + 1));
            if let Some(group) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                let (option, id) = group.split_once(' ').unwrap_or((group, ""));
                let id = id.trim().trim_matches('"').replace(',', ",,");
                words.push(format!("-{}", option.trim()));
                words.push(if id.is_empty() { String::new() } else { format!("id={id}") });
                continue;
            }
            let (key, v) = line.split_once('=').ok_or_else(bad)?;
            let v = v.trim().trim_matches('"').replace(',', ",,");
            let last = words.last_mut().ok_or_else(bad)?;
            if !last.is_empty() {
                last.push(',');
            }
            // The device's name and others stand in front without their key.
            *last += &format!("{}={v}", key.trim());
        }
        self.words(&words);
        Ok(())
    }
}
