//! The machine's drives, opened, and the devices that `if=` makes for them.

use super::Failure;
use crate::config::{self, Device, Fault, Interface, Media, VmConfig};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tandem_accel::suggest::one_of;
use tandem_backends::block::drive::Drive;
use tandem_backends::block::open;

/// Opens all drives. Every one that does not open is reported.
pub fn open_all(config: &VmConfig) -> Result<Shelf, Failure> {
    let (mut drives, mut faults) = (Shelf::new(), Vec::new());
    for (i, d) in config.drives.iter().enumerate().filter(|(_, d)| !d.is_empty()) {
        match open(d, &drives) {
            Ok(drive) => drop(drives.insert(d.name(i), drive)),
            Err(f) => faults.push(f),
        }
    }
    if faults.is_empty() { Ok(drives) } else { Err(Failure::Usage(faults)) }
}

/// Names of the drives without a disc.
pub fn empty(config: &VmConfig) -> BTreeSet<String> {
    let all = config.drives.iter().enumerate();
    all.filter(|(_, d)| d.is_empty()).map(|(i, d)| d.name(i)).collect()
}

/// Drives by name.
pub type Shelf = BTreeMap<String, Arc<Drive>>;

/// Opens one. A node behind it is among `others`.
pub fn open(d: &config::Drive, others: &Shelf) -> Result<Arc<Drive>, Fault> {
    let mut options = d.options();
    let behind = d.backing.as_deref().map(|name| {
        let found = others.get(name).map(|drive| drive.image());
        found.ok_or_else(|| {
            let what = format!("block node '{name}', to be behind another, is not there");
            Fault::new(what, "define it first")
        })
    });
    let behind = behind.transpose()?;
    let mut image = open::open(&d.open_spec());
    if let (Ok(image), Some(behind)) = (&image, behind) {
        match image.layered() {
            Some(l) => l.set_backing(Some(behind)),
            None => {
                let what = format!("drive image '{}' can have nothing behind it", d.file.display());
                return Err(Fault::new(what, "leave backing out"));
            }
        }
    }
    if d.snapshot {
        image = image.and_then(open::throw_away);
        // Nobody reads it after a crash.
        options.cache.no_flush = true;
    }
    image.map(|i| Drive::new(i, options)).map_err(|e| d.fault(&e))
}

/// The devices of drives that are not left to a `--device`.
pub fn devices(config: &VmConfig) -> Vec<Device> {
    let mut devices = Vec::new();
    for (i, d) in config.drives.iter().enumerate() {
        let mut props = vec![];
        if !d.is_empty() || d.media == Media::Cdrom {
            props.push(("drive".to_string(), d.name(i)));
        }
        let driver = match (d.interface, d.media) {
            (Interface::Virtio, _) => "virtio-blk-pci",
            (Interface::Ide, Media::Disk) => "ide-hd",
            (Interface::Ide, Media::Cdrom) => "ide-cd",
            (Interface::None | Interface::Pflash, _) => continue,
        };
        if let Some(port) = d.index {
            props.push(("bus".into(), format!("{}.{port}", tandem_devices::ahci::BUILT_IN_ID)));
        }
        devices.push(Device { driver: driver.into(), props });
    }
    // Those with a port of their own come first, so that others do not take it.
    devices.sort_by_key(|d| !d.props.iter().any(|(k, _)| k == "bus"));
    devices
}

/// What is wrong with the drives and the devices' use of them.
pub fn judge(config: &VmConfig, faults: &mut Vec<Fault>) {
    let names: Vec<String> = config.drives.iter().enumerate().map(|(i, d)| d.name(i)).collect();
    for (i, d) in config.drives.iter().enumerate() {
        d.validate(faults);
        if names[..i].contains(&names[i]) {
            let what = format!("two drives are called '{}'", names[i]);
            faults.push(Fault::new(what, "give each an id of its own"));
        }
        let writes = |d: &crate::config::Drive| !d.readonly && !d.snapshot;
        let both = |o: &crate::config::Drive| o.file == d.file && !d.is_empty();
        if config.drives[..i].iter().any(|o| both(o) && (writes(o) || writes(d))) {
            let what = format!("two drives use '{}'", d.file.display());
            faults.push(Fault::new(what, "make both readonly=on or snapshot=on"));
        }
    }
    let known: Vec<&str> = names.iter().map(String::as_str).collect();
    for device in &config.devices {
        for (_, id) in device.props.iter().filter(|(k, v)| k == "drive" && !known.contains(&&**v)) {
            let remedy = match known[..] {
                [] => format!("add --drive id={id},if=none,file=PATH"),
                _ => one_of(id, &known),
            };
            let what = format!("device '{}' names drive '{id}', which is not there", device.driver);
            faults.push(Fault::new(what, remedy));
        }
    }
}
