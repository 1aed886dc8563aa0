//! Accelerators and their options, as data.

use super::Fault;
use serde::{Deserialize, Serialize};
use std::fmt;
use tandem_accel::suggest::one_of;

/// One entry of the accelerator list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where it works, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// Translation.
    Tcg(TcgOptions),
}

/// Options of translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct TcgOptions {
    /// What executes the intermediate representation.
    pub backend: TcgBackend,
    /// How vCPUs are spread over host threads.
    pub thread: TcgThreads,
    /// Guest time from executed instructions; implies one thread.
    pub icount: Option<Icount>,
    /// Each block holds one guest instruction.
    pub one_insn_per_tb: bool,
    /// A map of translated code for `perf` is written to `/tmp/perf-PID.map`.
    pub perfmap: bool,
    /// Size of the code cache in MiB; the accelerator's own choice if absent.
    pub tb_size: Option<u32>,
}

/// What executes the intermediate representation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcgBackend {
    /// Generated host code where this host has a back end, else the interpreter.
    #[default]
    Jit,
    /// The interpreter.
    Interp,
}

/// How guest time follows from executed instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Icount {
    /// An instruction takes `1 << shift` nanoseconds, 0–10; found from host time if absent.
    #[serde(default)]
    pub shift: Option<u8>,
    /// Idle time passes as in the host, else at once.
    pub sleep: bool,
}

impl Icount {
    /// Reads `N` or `auto`, with `,sleep=on|off`.
    ///
    /// # Errors
    /// What is wrong with the word.
    pub fn parse(word: &str) -> Result<Icount, Fault> {
        let mut words = word.split(',');
        let shift = words.next().unwrap_or("");
        let shift = match (shift, shift.parse()) {
            ("auto", _) => None,
            (_, Ok(n @ 0..=10)) => Some(n),
            _ => {
                let what = format!("icount '{shift}' is neither auto nor a shift");
                return Err(Fault::new(what, "use auto or 0 to 10: 2^N ns for an instruction"));
            }
        };
        let mut icount = Icount { shift, sleep: true };
        for w in words {
            icount.sleep = match w {
                "sleep=on" => true,
                "sleep=off" => false,
                _ => {
                    let what = format!("icount has no option '{w}'");
                    return Err(Fault::new(what, "use sleep=on or sleep=off"));
                }
            };
        }
        Ok(icount)
    }
}

impl fmt::Display for Icount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shift {
            Some(n) => write!(f, "{n}")?,
            None => f.write_str("auto")?,
        }
        f.write_str(if self.sleep { "" } else { ",sleep=off" })
    }
}

/// How vCPUs are spread over host threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcgThreads {
    /// A thread for each vCPU.
    #[default]
    Multi,
    /// All vCPUs in turn on one thread.
    Single,
}

const NAMES: [&str; 3] = ["auto", "kvm", "tcg"];
const TCG_OPTIONS: [&str; 7] =
    ["backend", "thread", "icount", "sleep", "one-insn-per-tb", "perfmap", "tb-size"];

impl Accel {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Tcg(_) => "tcg",
        }
    }

    /// Reads a list such as `kvm:tcg,backend=interp`; every fault is reported.
    pub fn parse_list(s: &str, faults: &mut Vec<Fault>) -> Vec<Accel> {
        s.split(':').filter_map(|entry| Accel::parse(entry, faults)).collect()
    }

    fn parse(entry: &str, faults: &mut Vec<Fault>) -> Option<Accel> {
        let mut words = entry.split(',');
        let name = words.next().unwrap_or("");
        let accel = match name {
            "auto" => Accel::Auto,
            "kvm" => Accel::Kvm,
            "tcg" => {
                let mut options = TcgOptions::default();
                words.for_each(|w| options.set(w, faults));
                return Some(Accel::Tcg(options));
            }
            _ => {
                let what = format!("there is no accelerator '{name}'");
                faults.push(Fault::new(what, one_of(name, &NAMES)));
                return None;
            }
        };
        for w in words {
            let what = format!("accelerator {name} has no option '{w}'");
            faults.push(Fault::new(what, "remove it"));
        }
        Some(accel)
    }
}

impl TcgOptions {
    fn set(&mut self, word: &str, faults: &mut Vec<Fault>) {
        let (key, value) = word.split_once('=').unwrap_or((word, "on"));
        let mut bad = |names: &[&str]| {
            let what = format!("accelerator option {key}={value} has an unknown value");
            faults.push(Fault::new(what, one_of(value, names)));
        };
        match key {
            "backend" => match value {
                "jit" => self.backend = TcgBackend::Jit,
                "interp" => self.backend = TcgBackend::Interp,
                _ => bad(&["jit", "interp"]),
            },
            "thread" => match value {
                "multi" => self.thread = TcgThreads::Multi,
                "single" => self.thread = TcgThreads::Single,
                _ => bad(&["multi", "single"]),
            },
            "icount" => match Icount::parse(value) {
                Ok(i) => self.icount = Some(i),
                Err(f) => faults.push(f),
            },
            "sleep" => match (&mut self.icount, value) {
                (Some(i), "on") => i.sleep = true,
                (Some(i), "off") => i.sleep = false,
                (Some(_), _) => bad(&["on", "off"]),
                (None, _) => faults.push(Fault::new(
                    format!("accelerator option sleep={value} belongs to icount"),
                    "put icount=N or icount=auto before it",
                )),
            },
            "one-insn-per-tb" => match value {
                "on" => self.one_insn_per_tb = true,
                "off" => self.one_insn_per_tb = false,
                _ => bad(&["on", "off"]),
            },
            "perfmap" => match value {
                "on" => self.perfmap = true,
                "off" => self.perfmap = false,
                _ => bad(&["on", "off"]),
            },
            "tb-size" => match value.parse() {
                Ok(n @ 1..=2048) => self.tb_size = Some(n),
                _ => faults.push(Fault::new(
                    format!("accelerator option tb-size={value} is not a number of MiB"),
                    "use 1 to 2048",
                )),
            },
            _ => {
                let what = format!("accelerator tcg has no option '{key}'");
                faults.push(Fault::new(what, one_of(key, &TCG_OPTIONS)));
            }
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Accel::Tcg(o) = self {
            if o.backend == TcgBackend::Interp {
                f.write_str(",backend=interp")?;
            }
            if o.thread == TcgThreads::Single {
                f.write_str(",thread=single")?;
            }
            if let Some(i) = &o.icount {
                write!(f, ",icount={i}")?;
            }
            if o.one_insn_per_tb {
                f.write_str(",one-insn-per-tb=on")?;
            }
            if o.perfmap {
                f.write_str(",perfmap=on")?;
            }
            if let Some(n) = o.tb_size {
                write!(f, ",tb-size={n}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_with_options_read_and_print() {
        for s in [
            "auto",
            "kvm",
            "kvm:tcg",
            "tcg,icount=3,sleep=off",
            "tcg,backend=interp,thread=single,one-insn-per-tb=on",
        ] {
            let mut faults = vec![];
            let list = Accel::parse_list(s, &mut faults);
            assert!(faults.is_empty(), "{s}: {faults:?}");
            let back: Vec<String> = list.iter().map(|a| a.to_string()).collect();
            assert_eq!(back.join(":"), s);
        }
    }

    #[test]
    fn every_fault_of_a_list_is_told() {
        let mut faults = vec![];
        Accel::parse_list("kwm:tcg,backend=fast,threads=single:kvm,x=1", &mut faults);
        let text: Vec<String> = faults.iter().map(|f| f.to_string()).collect();
        assert_eq!(text.len(), 4, "{text:?}");
        assert!(text[0].contains("'kwm'") && text[0].contains("kvm"), "{text:?}");
        assert!(text[2].contains("did you mean 'thread'"), "{text:?}");
    }
}
