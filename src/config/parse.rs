//! Text of the command line to data. Each function reports what is wrong as faults and goes on, so
//! that a user sees all of it at once.

use super::{Device, Fault, KernelFormat, LOG_ITEMS, Module, Serial, Smp};
use std::path::PathBuf;
use tandem_accel::suggest::one_of;

/// `4` or `cpus=4,sockets=1,cores=2,threads=2`; what is left out is derived (cores first).
pub fn smp(s: &str, faults: &mut Vec<Fault>) -> Option<Smp> {
    let (mut cpus, mut sockets, mut cores, mut threads) = (None, None, None, None);
    let before = faults.len();
    for (i, word) in s.split(',').enumerate() {
        let (key, value) = match word.split_once('=') {
            Some(kv) => kv,
            None if i == 0 => ("cpus", word),
            None => (word, ""),
        };
        let slot = match key {
            "cpus" => &mut cpus,
            "sockets" => &mut sockets,
            "cores" => &mut cores,
            "threads" => &mut threads,
            _ => {
                let names = ["cpus", "sockets", "cores", "threads"];
                faults.push(Fault::new(format!("--smp has no key '{key}'"), one_of(key, &names)));
                continue;
            }
        };
        match value.parse::<u32>() {
            Ok(0) => faults.push(Fault::new(
                format!("--smp {s} asks for no {key}"),
                "a machine has at least one of each; use 1 or more",
            )),
            Ok(n) => *slot = Some(n),
            Err(_) => faults.push(Fault::new(
                format!("--smp {key} '{value}' is not a number"),
                "write for example --smp 2 or --smp cpus=4,cores=2,threads=2",
            )),
        }
    }
    if faults.len() > before {
        return None;
    }
    let given = |v: Option<u32>| u64::from(v.unwrap_or(1));
    let product = given(sockets) * given(cores) * given(threads);
    let cpus = match cpus {
        Some(n) => n,
        None => u32::try_from(product).unwrap_or(u32::MAX),
    };
    // Whatever has not been said is made of cores: one socket with the remaining cores, or, where
    // the cores are given, as many sockets as needed.
    let (sockets, cores) = match (sockets, cores) {
        (s, None) => (s.unwrap_or(1), per(cpus, s.unwrap_or(1), threads.unwrap_or(1))),
        (None, Some(c)) => (per(cpus, c, threads.unwrap_or(1)), c),
        (Some(s), Some(c)) => (s, c),
    };
    let threads = threads.unwrap_or_else(|| per(cpus, sockets, cores));
    Some(Smp { cpus, sockets, cores, threads })
}

fn per(total: u32, a: u32, b: u32) -> u32 {
    total.checked_div(a.saturating_mul(b)).unwrap_or(1).max(1)
}

/// `stdio`, `file:P`, `pty`, `unix:P`, `null` (or `none`).
pub fn serial(s: &str) -> Result<Serial, Fault> {
    let names = ["stdio", "file:PATH", "pty", "unix:PATH", "null"];
    match s.split_once(':') {
        Some(("file" | "unix", "")) => Err(Fault::new(
            format!("--serial {s} names no path"),
            format!("write {s}PATH with the path to use"),
        )),
        Some(("file", p)) => Ok(Serial::File(p.into())),
        Some(("unix", p)) => Ok(Serial::Unix(p.into())),
        None if s == "stdio" => Ok(Serial::Stdio),
        None if s == "pty" => Ok(Serial::Pty),
        None if s == "null" || s == "none" => Ok(Serial::Null),
        _ => Err(Fault::new(format!("--serial '{s}' leads nowhere we know"), one_of(s, &names))),
    }
}

/// `NAME,prop=value,…`; a property without a value is `on`.
pub fn device(s: &str) -> Result<Device, Fault> {
    let mut words = split_commas(s).into_iter();
    let driver = words.next().unwrap_or_default();
    if driver.is_empty() || driver.contains('=') {
        return Err(Fault::new(
            format!("--device '{s}' does not start with a device name"),
            "write --device NAME,prop=value or list the names with --device help",
        ));
    }
    let props = words
        .map(|w| match w.split_once('=') {
            Some((k, v)) => (k.to_string(), v.to_string()),
            None => (w, "on".to_string()),
        })
        .collect();
    Ok(Device { driver, props })
}

/// Splits at commas; a doubled comma stands for one.
pub fn split_commas(s: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = s.chars().peekable();
    while let Some(c) = chars.next() {
        let last = words.last_mut().expect("never empty");
        if c != ',' {
            last.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            last.push(',');
        } else {
            words.push(String::new());
        }
    }
    words
}

/// `FILE ARGS…`.
pub fn module(s: &str) -> Module {
    let (path, args) = s.split_once(' ').unwrap_or((s, ""));
    Module { path: PathBuf::from(path), args: args.trim().to_string() }
}

/// `auto`, `bzimage`, …
pub fn kernel_format(s: &str) -> Result<KernelFormat, Fault> {
    let names = KernelFormat::NAMES.map(|(n, _)| n);
    KernelFormat::NAMES
        .iter()
        .find(|(n, _)| *n == s)
        .map(|(_, f)| *f)
        .ok_or_else(|| Fault::new(format!("there is no kernel format '{s}'"), one_of(s, &names)))
}

/// `in_asm,int,…`.
pub fn log_items(s: &str, faults: &mut Vec<Fault>) -> Vec<String> {
    let names = LOG_ITEMS.map(|(n, _)| n);
    let mut items = Vec::new();
    for word in s.split(',').filter(|w| !w.is_empty()) {
        if names.contains(&word) {
            items.push(word.to_string());
        } else {
            let what = format!("there is no log item '{word}'");
            faults.push(Fault::new(what, one_of(word, &names)));
        }
    }
    items
}

/// `START..END` (END included), `START+LEN` or `START-LEN` (LEN bytes up to and including START),
/// several separated by commas; numbers are hexadecimal with 0x, else decimal.
pub fn log_filter(s: &str, faults: &mut Vec<Fault>) -> Vec<(u64, u64)> {
    s.split(',')
        .filter_map(|word| {
            let range = range(word).filter(|(_, len)| *len > 0);
            if range.is_none() {
                faults.push(Fault::new(
                    format!("--dfilter '{word}' is not a range of addresses"),
                    "write for example 0x1000..0x1fff or 0x1000+0x200",
                ));
            }
            range
        })
        .collect()
}

fn range(s: &str) -> Option<(u64, u64)> {
    if let Some((a, b)) = s.split_once("..") {
        let (a, b) = (number(a)?, number(b)?);
        return (a <= b).then(|| (a, (b - a).saturating_add(1)));
    }
    if let Some((a, n)) = s.split_once('+') {
        return Some((number(a)?, number(n)?));
    }
    let (a, n) = s.split_once('-')?;
    let (a, n) = (number(a)?, number(n)?);
    Some((a.checked_sub(n.checked_sub(1)?)?, n))
}

pub fn number(s: &str) -> Option<u64> {
    match s.strip_prefix("0x") {
        Some(h) => u64::from_str_radix(h, 16).ok(),
        None => s.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smp_ok(s: &str) -> (u32, u32, u32, u32) {
        let mut f = vec![];
        let t = smp(s, &mut f).unwrap_or_else(|| panic!("{s}: {f:?}"));
        (t.cpus, t.sockets, t.cores, t.threads)
    }

    #[test]
    fn topologies_are_completed() {
        assert_eq!(smp_ok("1"), (1, 1, 1, 1));
        assert_eq!(smp_ok("4"), (4, 1, 4, 1));
        assert_eq!(smp_ok("4,threads=2"), (4, 1, 2, 2));
        assert_eq!(smp_ok("cores=2,threads=2"), (4, 1, 2, 2));
        assert_eq!(smp_ok("cpus=8,cores=2"), (8, 4, 2, 1));
        assert_eq!(smp_ok("8,sockets=2"), (8, 2, 4, 1));
    }

    #[test]
    fn bad_topologies_are_told_at_once() {
        let mut f = vec![];
        assert!(smp("0,core=2,threads=x", &mut f).is_none());
        assert_eq!(f.len(), 3, "{f:?}");
    }

    #[test]
    fn serials_devices_filters() {
        assert_eq!(serial("file:/tmp/x").unwrap(), Serial::File("/tmp/x".into()));
        assert!(serial("stdin").unwrap_err().to_string().contains("did you mean 'stdio'"));
        assert!(serial("file:").is_err());
        let d = device("isa-debug-exit,iobase=0xf4,name=a,,b,flag").unwrap();
        assert_eq!(d.driver, "isa-debug-exit");
        assert_eq!(d.props[0], ("iobase".into(), "0xf4".into()));
        assert_eq!(d.props[1].1, "a,b");
        assert_eq!(d.props[2], ("flag".into(), "on".into()));
        assert!(device("a=b").is_err());
        let mut f = vec![];
        assert_eq!(
            log_filter("0x1000..0x1fff,0x2000+16,31-16", &mut f),
            [(0x1000, 0x1000), (0x2000, 16), (16, 16)]
        );
        log_filter("5..4,zz", &mut f);
        assert_eq!(f.len(), 2);
    }
}
