//! Drives: images for disks, under QEMU's names of `-drive`.

use super::{Fault, parse};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tandem_accel::suggest::{closest_or, one_of};
use tandem_backends::block::drive::{CacheMode, DetectZeroes, DriveOptions, EngineKind};
use tandem_backends::block::open::{self, OpenSpec};
use tandem_backends::block::throttle::{Limit, Limits};

/// What a drive is plugged into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interface {
    /// A virtio-blk-pci device made for it.
    #[default]
    Virtio,
    /// Nothing: a `--device` names it.
    None,
    /// Flash below 4 GiB: the first has the firmware's code, the second its variables.
    Pflash,
    /// A port of the board's SATA adapter.
    Ide,
}

/// What a drive's image is to its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Media {
    /// A disk.
    #[default]
    Disk,
    /// A CD or DVD, which is only read. A drive without an image is empty.
    Cdrom,
}

/// A drive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drive {
    /// Name for devices; made up if absent.
    pub id: Option<String>,
    /// The image.
    pub file: PathBuf,
    /// Its format; found out if absent.
    pub format: Option<String>,
    /// What it is plugged into.
    pub interface: Interface,
    /// What the image is.
    pub media: Media,
    /// With a port of the SATA adapter: which; the first free one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u8>,
    /// The guest cannot write.
    pub readonly: bool,
    /// What the guest writes is thrown away in the end.
    pub snapshot: bool,
    /// `writeback`, `none`, `writethrough`, `directsync` or `unsafe`; `writeback` if absent.
    pub cache: Option<String>,
    /// Who works on requests: `threads` or `io_uring`; `threads` if absent.
    pub aio: Option<String>,
    /// The guest's discards make holes in the image.
    pub discard: bool,
    /// What is done about writes of zeros: `off`, `on` or `unmap`; `off` if absent.
    pub detect_zeroes: Option<String>,
    /// What stands in the image about another behind it is not followed.
    pub no_backing: bool,
    /// Name of the node that is behind it, whatever stands in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<String>,
    /// Name of the node that is in the drive now, if it is another than the drive was made with.
    #[serde(skip)]
    pub node: Option<String>,
    /// Name of the node below the format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_node: Option<String>,
    /// That node was defined inside this one, and goes with it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub file_inline: bool,
    /// It is a node of a file's bytes, without a format.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub protocol: bool,
    /// Limits.
    #[serde(skip_serializing_if = "Throttling::is_none")]
    pub throttling: Throttling,
}

/// Limits of a drive. Units a second; 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Throttling {
    /// Bytes read or written.
    pub bps_total: Rate,
    /// Bytes read.
    pub bps_read: Rate,
    /// Bytes written.
    pub bps_write: Rate,
    /// Requests.
    pub iops_total: Rate,
    /// Reads.
    pub iops_read: Rate,
    /// Writes.
    pub iops_write: Rate,
    /// Bytes that count as one request.
    pub iops_size: u64,
}

/// A limit and its burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rate {
    /// In the long run.
    pub avg: u64,
    /// In a burst.
    pub max: u64,
    /// Seconds that a burst may last; 0 means 1.
    pub max_length: u64,
}

impl From<Rate> for Limit {
    fn from(r: Rate) -> Limit {
        Limit { avg: r.avg as f64, max: r.max as f64, length: r.max_length.max(1) as f64 }
    }
}

impl Throttling {
    fn is_none(&self) -> bool {
        *self == Throttling::default()
    }

    fn limits(&self) -> Limits {
        Limits {
            bps: self.bps_total.into(),
            bps_rd: self.bps_read.into(),
            bps_wr: self.bps_write.into(),
            iops: self.iops_total.into(),
            iops_rd: self.iops_read.into(),
            iops_wr: self.iops_write.into(),
            iops_size: self.iops_size,
        }
    }

    /// The rate that a key of `-drive` such as `bps-total` or `iops_rd_max` means, and which part
    /// of it.
    fn slot(&mut self, key: &str) -> Option<&mut u64> {
        let key = key.strip_prefix("throttling.").unwrap_or(key).replace('_', "-");
        if key == "iops-size" {
            return Some(&mut self.iops_size);
        }
        let (name, part) = match key.strip_suffix("-max-length") {
            Some(n) => (n, 2),
            None => key.strip_suffix("-max").map_or((&*key, 0), |n| (n, 1)),
        };
        let rate = match name {
            "bps-total" | "bps" => &mut self.bps_total,
            "bps-read" | "bps-rd" => &mut self.bps_read,
            "bps-write" | "bps-wr" => &mut self.bps_write,
            "iops-total" | "iops" => &mut self.iops_total,
            "iops-read" | "iops-rd" => &mut self.iops_read,
            "iops-write" | "iops-wr" => &mut self.iops_write,
            _ => return None,
        };
        Some(match part {
            0 => &mut rate.avg,
            1 => &mut rate.max,
            _ => &mut rate.max_length,
        })
    }
}

/// Keys of `--drive`, limits apart.
const KEYS: [&str; 12] = [
    "file",
    "format",
    "if",
    "media",
    "index",
    "id",
    "readonly",
    "snapshot",
    "cache",
    "aio",
    "discard",
    "detect-zeroes",
];
const AIO: [&str; 2] = ["threads", "io_uring"];
const DISCARD: [&str; 2] = ["ignore", "unmap"];
const DETECT: [&str; 3] = ["off", "on", "unmap"];

fn on_off(key: &str, value: &str) -> Result<bool, Fault> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(Fault::new(format!("--drive {key} cannot be '{value}'"), "write on or off")),
    }
}

/// `value` if it is one of `names`.
fn word(key: &str, value: &str, names: &[&str]) -> Result<String, Fault> {
    match names.contains(&value) {
        true => Ok(value.to_string()),
        false => {
            let what = format!("--drive {key} cannot be '{value}'");
            Err(Fault::new(what, one_of(value, names)))
        }
    }
}

impl Drive {
    /// Reads `file=…,format=…,if=…`; every fault is reported.
    pub fn parse(s: &str, faults: &mut Vec<Fault>) -> Option<Drive> {
        let mut d = Drive::default();
        let before = faults.len();
        let words = parse::split_commas(s);
        // A CD is in a CD drive unless said otherwise, whatever comes first.
        if words.iter().any(|w| w == "media=cdrom") {
            d.interface = Interface::Ide;
        }
        for w in words {
            let (key, value) = w.split_once('=').unwrap_or((&w, "on"));
            faults.extend(d.set(key, value).err());
        }
        if d.is_empty() && d.media == Media::Disk {
            let what = format!("--drive {s} names no image");
            faults.push(Fault::new(what, "write --drive file=PATH"));
        }
        (faults.len() == before).then_some(d)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), Fault> {
        match key {
            "file" => self.file = value.into(),
            "format" => self.format = Some(word(key, value, &open::FORMATS)?),
            "id" => self.id = Some(value.into()),
            "if" => {
                let names = ["virtio", "ide", "none", "pflash"];
                self.interface = match word(key, value, &names)?.as_str() {
                    "none" => Interface::None,
                    "pflash" => Interface::Pflash,
                    "ide" => Interface::Ide,
                    _ => Interface::Virtio,
                }
            }
            "media" => {
                if word(key, value, &["disk", "cdrom"])? == "cdrom" {
                    (self.media, self.readonly) = (Media::Cdrom, true);
                }
            }
            "index" => {
                let fault = || {
                    let what = format!("--drive {key} cannot be '{value}'");
                    Fault::new(what, "write the number of a port, 0 to 5")
                };
                self.index = Some(value.parse().map_err(|_| fault())?);
            }
            "readonly" | "read-only" => self.readonly = on_off(key, value)?,
            "snapshot" => self.snapshot = on_off(key, value)?,
            "cache" => self.cache = Some(word(key, value, &CacheMode::NAMES.map(|(n, _)| n))?),
            "aio" => self.aio = Some(word(key, value, &AIO)?),
            "discard" => {
                let value = match value {
                    "on" => "unmap",
                    "off" => "ignore",
                    v => v,
                };
                self.discard = word(key, value, &DISCARD)? == "unmap";
            }
            "detect-zeroes" => self.detect_zeroes = Some(word(key, value, &DETECT)?),
            _ => match self.throttling.slot(key) {
                Some(slot) => {
                    *slot = value.parse().map_err(|_| {
                        let what = format!("--drive {key} cannot be '{value}'");
                        Fault::new(what, "write a number of units a second")
                    })?;
                }
                None => {
                    let all = || format!("use {}, or throttling.…", KEYS.join(", "));
                    let remedy = closest_or(key, &KEYS, all);
                    return Err(Fault::new(format!("--drive has no key '{key}'"), remedy));
                }
            },
        }
        Ok(())
    }

    /// A CD drive with the disc `file`, on SATA port 2 as QEMU has it.
    pub fn cdrom(file: impl Into<PathBuf>) -> Drive {
        Drive {
            file: file.into(),
            interface: Interface::Ide,
            media: Media::Cdrom,
            index: Some(2),
            readonly: true,
            ..Drive::default()
        }
    }

    /// Whether there is no image in it.
    pub fn is_empty(&self) -> bool {
        self.file.as_os_str().is_empty()
    }

    /// The name of drive number `index`.
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("drive{index}"))
    }

    /// Whether it is a block node, which has a name among nodes and none among drives.
    pub fn is_node(&self) -> bool {
        self.protocol || self.file_node.is_some()
    }

    /// This format on the file that `below` is, whose node is called `file`; `inline` if that was
    /// defined inside this one.
    pub fn on_file(self, below: &Drive, file: &str, no_backing: bool, inline: bool) -> Drive {
        Drive {
            file: below.file.clone(),
            aio: below.aio.clone(),
            cache: self.cache.clone().or(below.cache.clone()),
            file_node: Some(file.into()),
            file_inline: inline,
            no_backing,
            ..self
        }
    }

    fn cache_mode(&self) -> Option<CacheMode> {
        let Some(name) = &self.cache else { return Some(CacheMode::default()) };
        CacheMode::NAMES.iter().find(|(n, _)| n == name).map(|(_, m)| *m)
    }

    /// How the drive behaves. Words that mean nothing are for [`Drive::validate`].
    pub fn options(&self) -> DriveOptions {
        DriveOptions {
            cache: self.cache_mode().unwrap_or_default(),
            discard: self.discard,
            detect_zeroes: match self.detect_zeroes.as_deref() {
                Some("on") => DetectZeroes::On,
                Some("unmap") => DetectZeroes::Unmap,
                _ => DetectZeroes::Off,
            },
            limits: self.throttling.limits(),
            engine: match self.aio.as_deref() {
                Some("io_uring") => EngineKind::IoUring,
                _ => EngineKind::Threads,
            },
        }
    }

    /// How its image is opened.
    pub fn open_spec(&self) -> OpenSpec {
        let mut spec = OpenSpec::read(&self.file);
        spec.format = self.format.clone();
        spec.write = !self.readonly && !self.snapshot;
        spec.direct = self.options().cache.direct;
        spec.options.unmap = self.discard;
        spec.backing = !self.no_backing && self.backing.is_none();
        spec
    }

    /// What is wrong with it. Looks at the image without taking it.
    pub fn validate(&self, faults: &mut Vec<Fault>) {
        let words: [(&str, &Option<String>, &[&str]); 4] = [
            ("format", &self.format, &open::FORMATS),
            ("cache", &self.cache, &CacheMode::NAMES.map(|(n, _)| n)),
            ("aio", &self.aio, &AIO),
            ("detect-zeroes", &self.detect_zeroes, &DETECT),
        ];
        let before = faults.len();
        for (key, value, names) in words {
            if let Some(v) = value {
                faults.extend(word(key, v, names).err());
            }
        }
        for r in [
            &self.throttling.bps_total,
            &self.throttling.bps_read,
            &self.throttling.bps_write,
            &self.throttling.iops_total,
            &self.throttling.iops_read,
            &self.throttling.iops_write,
        ] {
            if r.max > 0 && r.max < r.avg.max(1) || r.max_length > 0 && r.max == 0 {
                let what =
                    format!("a burst of {} above a limit of {} makes no sense", r.max, r.avg);
                faults.push(Fault::new(what, "give a limit, and a burst that is not below it"));
            }
        }
        if self.media == Media::Cdrom && !matches!(self.interface, Interface::Ide | Interface::None)
        {
            let what = "a CD is in neither a virtio disk nor flash";
            faults.push(Fault::new(what, "use if=ide, or if=none and --device ide-cd,drive=ID"));
        }
        if let Some(index) = self.index.filter(|i| self.interface != Interface::Ide || *i > 5) {
            let what = format!("there is no place {index} for drive '{}'", self.file.display());
            faults.push(Fault::new(what, "use if=ide with index=0 to 5"));
        }
        if faults.len() > before || self.is_empty() {
            return;
        }
        let look = OpenSpec { write: false, force_share: true, ..self.open_spec() };
        if let Err(e) = open::open(&look) {
            faults.push(self.fault(&e));
        } else if self.open_spec().write
            && let Err(e) = std::fs::File::options().write(true).open(&self.file)
        {
            let what = format!("drive image '{}' cannot be written: {e}", self.file.display());
            faults.push(Fault::new(what, "make it writable, or add readonly=on or snapshot=on"));
        }
    }

    /// The fault of an image that does not open.
    pub fn fault(&self, e: &tandem_backends::block::Error) -> Fault {
        let chain = e.chain();
        let what = match chain.contains(&self.file.display().to_string()) {
            true => chain,
            false => format!("drive image '{}': {chain}", self.file.display()),
        };
        match what.split_once("; ") {
            Some((what, remedy)) => Fault::new(what, remedy),
            None => Fault::new(what, "name an image that tandem img info understands"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_in_qemus_words() {
        let mut f = vec![];
        let d = Drive::parse(
            "file=a,,b,format=qcow2,if=none,id=x,readonly=on,snapshot=off,cache=none,aio=io_uring,\
             discard=unmap,detect-zeroes=on,throttling.bps-total=1000,iops_wr_max=9,iops_wr=5",
            &mut f,
        );
        assert!(f.is_empty(), "{f:?}");
        let d = d.unwrap();
        assert_eq!((d.file.to_str(), d.name(3).as_str()), (Some("a,b"), "x"));
        assert!(d.readonly && d.discard && d.interface == Interface::None);
        assert!(d.options().cache.direct && d.options().engine == EngineKind::IoUring);
        assert_eq!(d.throttling.bps_total.avg, 1000);
        assert_eq!((d.throttling.iops_write.avg, d.throttling.iops_write.max), (5, 9));
        let text = toml::to_string(&d).unwrap();
        assert_eq!(toml::from_str::<Drive>(&text).unwrap(), d);
    }

    #[test]
    fn every_fault_is_told() {
        let mut f = vec![];
        assert!(Drive::parse("fil=x,cache=writebak,if=scsi,readonly=2,bps=x", &mut f).is_none());
        let said: Vec<String> = f.iter().map(|f| f.to_string()).collect();
        assert_eq!(said.len(), 6, "{said:?}");
        assert!(said[0].contains("did you mean 'file'") && said[1].contains("'writeback'"));
        let mut f = vec![];
        let cd = Drive::parse("media=cdrom", &mut f).unwrap();
        assert!(f.is_empty() && cd.is_empty() && cd.interface == Interface::Ide && cd.readonly);
        let cd = Drive::parse("file=x,if=virtio,media=cdrom,index=9", &mut f).unwrap();
        cd.validate(&mut f);
        assert_eq!(f.len(), 2, "{f:?}");
        let mut f = vec![];
        let d = Drive { file: "/nonexistent".into(), ..Drive::default() };
        d.validate(&mut f);
        assert!(f[0].to_string().contains("/nonexistent"), "{f:?}");
    }
}
