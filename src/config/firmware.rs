//! Firmware that starts the machine: a ROM (`--bios`), or flash with code and variables, which is
//! drives with `if=pflash` (`--firmware`, `--pflash`).

use super::boot_order::BootOrder;
use super::{Drive, Fault, Interface, VmConfig, parse};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tandem_accel::suggest::one_of;

/// Where SeaBIOS may be.
const SEABIOS: [&str; 2] = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"];
/// Where OVMF may be: code and a template of its variables.
const OVMF: [(&str, &str); 2] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
];
/// ROMs are mapped in units of this.
const ROM_UNIT: u64 = 64 << 10;
/// Room below 4 GiB.
const ROM_MAX: u64 = 16 << 20;

/// Firmware in ROM, and what concerns firmware of either kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Firmware {
    /// Image of the ROM. If absent, and there is neither flash nor a kernel, it is SeaBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bios: Option<PathBuf>,
    /// File for what firmware writes to its debug port, 402h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug: Option<PathBuf>,
    /// What it is told about booting.
    #[serde(skip_serializing_if = "BootOrder::is_none")]
    pub boot: BootOrder,
    /// The BIOS's text shows on COM1 as well when there is a VGA; without one it always does.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub serial_console: bool,
    /// What firmware and guest find in the configuration device (fw_cfg) besides the machine's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Item>,
}

/// A file of the configuration device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Item {
    /// Its name: `opt/` and at most 51 further characters.
    pub name: String,
    /// Its contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub string: Option<String>,
    /// The file of the host with its contents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl Item {
    /// Longest name, as the device has room for 56 bytes with a NUL.
    const MAX_NAME: usize = 55;
    /// Longest contents.
    const MAX_LEN: u64 = 64 << 20;

    /// The contents.
    pub fn bytes(&self) -> Result<Vec<u8>, Fault> {
        let Some(path) = &self.file else {
            return Ok(self.string.clone().unwrap_or_default().into_bytes());
        };
        std::fs::read(path).map_err(|e| {
            let what = format!("fw_cfg file '{}' cannot be read: {e}", path.display());
            Fault::new(what, "check the path")
        })
    }

    fn judge(&self, faults: &mut Vec<Fault>) {
        let name = &self.name;
        let printable = name.bytes().all(|b| (b' '..0x7f).contains(&b));
        if !name.starts_with("opt/") || name.len() > Item::MAX_NAME || !printable {
            let what = format!("fw_cfg item '{name}' cannot be added");
            faults.push(Fault::new(what, "name it opt/…, in at most 55 characters"));
        }
        if self.string.is_some() == self.file.is_some() {
            let what = format!("fw_cfg item '{name}' needs contents");
            faults.push(Fault::new(what, "give one of string= and file="));
        }
        if let Some(path) = &self.file {
            match std::fs::metadata(path) {
                Ok(m) if m.is_file() && m.len() <= Item::MAX_LEN => {}
                Ok(_) => faults.push(Fault::new(
                    format!("fw_cfg file '{}' is no file of at most 64 MiB", path.display()),
                    "name another",
                )),
                Err(_) => faults.extend(self.bytes().err()),
            }
        }
    }
}

/// `uefi`, `bios`, or `code=FILE[,vars=FILE]`: a ROM, or drives to be added.
pub fn parse(s: &str, faults: &mut Vec<Fault>) -> (Option<PathBuf>, Vec<Drive>) {
    let (mut code, mut vars, mut template) = (None, None, None);
    for (i, word) in parse::split_commas(s).iter().enumerate() {
        match word.split_once('=') {
            Some(("code", p)) => code = Some(PathBuf::from(p)),
            Some(("vars", p)) => vars = Some(PathBuf::from(p)),
            None if i == 0 && word == "bios" => return (find_bios(faults), Vec::new()),
            None if i == 0 && word == "uefi" => {
                let there = |(c, _): &&(&str, &str)| Path::new(c).exists();
                let Some((c, v)) = OVMF.iter().find(there) else {
                    let what = "there is no UEFI firmware on this host";
                    let remedy = "install the package ovmf, or name it with --firmware code=FILE";
                    faults.push(Fault::new(what, remedy));
                    continue;
                };
                (code, template) = (Some(c.into()), Some(PathBuf::from(v)));
            }
            other => {
                let key = other.map_or(word.as_str(), |(k, _)| k);
                let remedy = one_of(key, &["bios", "uefi", "code=FILE", "vars=FILE"]);
                faults.push(Fault::new(format!("--firmware has no '{key}'"), remedy));
            }
        }
    }
    let Some(code) = code else {
        if faults.is_empty() {
            let what = format!("--firmware {s} names no code");
            faults
                .push(Fault::new(what, "write --firmware uefi or --firmware code=FILE,vars=FILE"));
        }
        return (None, Vec::new());
    };
    let mut drives = vec![Drive { readonly: true, ..flash(code) }];
    match (vars, template) {
        (Some(v), _) => drives.push(flash(v)),
        // Nobody else's template may be written; what the guest stores lasts as long as the machine.
        (None, Some(t)) => drives.push(Drive { snapshot: true, ..flash(t) }),
        (None, None) => {}
    }
    (None, drives)
}

/// A flash device with the image `file`.
pub fn flash(file: impl Into<PathBuf>) -> Drive {
    let format = Some("raw".into());
    Drive { file: file.into(), format, interface: Interface::Pflash, ..Drive::default() }
}

fn find_bios(faults: &mut Vec<Fault>) -> Option<PathBuf> {
    let found = SEABIOS.iter().map(PathBuf::from).find(|p| p.exists());
    if found.is_none() {
        let remedy = "install the package seabios, or give --bios FILE";
        faults.push(Fault::new("there is no SeaBIOS on this host", remedy));
    }
    found
}

impl VmConfig {
    /// The drives that are flash devices, with their names: the one with the reset vector first.
    pub fn flash(&self) -> impl Iterator<Item = (String, &Drive)> {
        let all = self.drives.iter().enumerate();
        all.filter(|(_, d)| d.interface == Interface::Pflash).map(|(i, d)| (d.name(i), d))
    }

    /// Whether firmware starts the machine; else it is the kernel itself, or there is nothing.
    pub fn starts_with_firmware(&self) -> bool {
        let disks = self.drives.iter().any(|d| d.interface != Interface::Pflash);
        let given = self.firmware.bios.is_some() || self.flash().next().is_some();
        let possible = self.machine != crate::machine::microvm::NAME && !self.is_none();
        possible && (given || self.boot.kernel.is_none() && disks)
    }

    /// The ROM that starts the machine, if flash does not.
    pub fn rom(&self) -> Result<Option<PathBuf>, Vec<Fault>> {
        if self.flash().next().is_some() {
            return Ok(None);
        }
        let mut faults = Vec::new();
        match self.firmware.bios.clone().or_else(|| find_bios(&mut faults)) {
            Some(path) => Ok(Some(path)),
            None => Err(faults),
        }
    }

    /// What is wrong with the firmware.
    pub(super) fn firmware(&self, faults: &mut Vec<Fault>) {
        let flash = self.flash().count();
        if flash > 2 {
            let what = format!("a machine cannot have {flash} flash devices");
            faults.push(Fault::new(what, "give one for code and one for variables"));
        }
        if let (Some(bios), Some((_, first))) = (&self.firmware.bios, self.flash().next()) {
            let what = format!(
                "firmware cannot be both in ROM '{}' and in flash '{}'",
                bios.display(),
                first.file.display()
            );
            faults.push(Fault::new(what, "give one of --bios and --firmware"));
            return;
        }
        for (i, item) in self.firmware.items.iter().enumerate() {
            item.judge(faults);
            if self.firmware.items[..i].iter().any(|o| o.name == item.name) {
                let what = format!("fw_cfg item '{}' is given twice", item.name);
                faults.push(Fault::new(what, "give it once"));
            }
        }
        match self.rom() {
            Ok(Some(path)) => faults.extend(rom_fault(&path)),
            Ok(None) => {}
            Err(f) => faults.extend(f),
        }
    }
}

/// What is wrong with the image of a ROM.
fn rom_fault(path: &Path) -> Option<Fault> {
    let name = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(m) => m,
        Err(e) => {
            let what = format!("firmware '{name}' cannot be read: {e}");
            return Some(Fault::new(what, "check the path"));
        }
    };
    let len = meta.len();
    (!meta.is_file() || len == 0 || len % ROM_UNIT != 0 || len > ROM_MAX).then(|| {
        let what = format!("'{name}' ({len} bytes) is no firmware image");
        Fault::new(what, "give a multiple of 64 KiB up to 16 MiB, such as SeaBIOS' bios-256k.bin")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_variables_are_drives() {
        let mut faults = Vec::new();
        let (rom, d) = parse("code=/a,,b.fd,vars=/v.fd", &mut faults);
        assert!(rom.is_none() && faults.is_empty(), "{faults:?}");
        assert_eq!((d[0].file.to_str(), d[0].readonly), (Some("/a,b.fd"), true));
        assert_eq!((d[1].file.to_str(), d[1].readonly), (Some("/v.fd"), false));
        assert!(d.iter().all(|d| d.interface == Interface::Pflash));
        for bad in ["vars=/v", "efi", "code=/a,fars=/v"] {
            let mut faults = Vec::new();
            parse(bad, &mut faults);
            assert_eq!(faults.len(), 1, "{bad}: {faults:?}");
        }
    }

    #[test]
    fn faults_of_firmware() {
        let mut c = VmConfig::default();
        c.firmware.bios = Some("/nonexistent.bin".into());
        let said = |c: &VmConfig| {
            let mut f = Vec::new();
            c.firmware(&mut f);
            f.iter().map(|f| f.to_string()).collect::<Vec<_>>()
        };
        assert!(said(&c)[0].contains("/nonexistent.bin"));
        c.firmware.bios = Some("/etc/passwd".into());
        assert!(said(&c)[0].contains("no firmware image"));
        c.drives = vec![flash("/x"), flash("/y"), flash("/z")];
        assert_eq!(said(&c).len(), 2);
        assert!(c.starts_with_firmware());
    }

    #[test]
    fn a_disk_without_a_kernel_starts_with_firmware() {
        let mut c = VmConfig::default();
        assert!(!c.starts_with_firmware());
        c.drives = vec![Drive::default()];
        assert!(c.starts_with_firmware());
        c.boot.kernel = Some("k".into());
        assert!(!c.starts_with_firmware());
        c.drives.push(flash("/x"));
        assert!(c.starts_with_firmware());
    }
}
