//! The order in which firmware tries devices: Open Firmware device paths, sorted by the devices'
//! `bootindex` (behaviour: QEMU's file `bootorder`).

use crate::pci::Devfn;
use crate::registry::{Property, PropertyKind};
use std::sync::Mutex;

/// What devices have to say about booting. Shared by the machine and its devices.
#[derive(Debug, Default)]
pub struct BootOrder(Mutex<Vec<(u32, String)>>);

impl BootOrder {
    /// A device at `path` is to be tried at place `index`, the lowest first.
    pub fn add(&self, index: u32, path: String) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push((index, path));
    }

    /// The file: a path a line, closed by a NUL. Empty if nobody has said anything. `strict` says
    /// that nothing else is to be tried.
    pub fn file(&self, strict: bool) -> Vec<u8> {
        let mut list = self.0.lock().unwrap_or_else(|e| e.into_inner()).clone();
        list.sort_by_key(|(index, _)| *index);
        if list.is_empty() && !strict {
            return Vec::new();
        }
        let mut lines: Vec<String> = list.into_iter().map(|(_, path)| path).collect();
        lines.extend(strict.then(|| "HALT".to_string()));
        let mut file = lines.join("\n").into_bytes();
        file.push(0);
        file
    }
}

/// The property by which a device says its place.
pub const PROPERTY: Property = Property {
    name: "bootindex",
    kind: PropertyKind::Uint { min: 0, max: i32::MAX as u64 },
    default: None,
    description: "place in the order in which firmware tries devices; the lowest first",
};

/// The path of a function of the root bus: `name` is the node's name by PCI class or identity, as
/// `scsi` or `ethernet`; `below` the rest of the path, as `disk@0,0`.
pub fn pci_path(at: Devfn, name: &str, below: &str) -> String {
    let function = match at.function() {
        0 => String::new(),
        f => format!(",{f:x}"),
    };
    format!("/pci@i0cf8/{name}@{:x}{function}/{below}", at.slot())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_sorted_by_index() {
        let o = BootOrder::default();
        assert!(o.file(false).is_empty());
        assert_eq!(o.file(true), b"HALT\0");
        o.add(7, pci_path(Devfn::new(0x1f, 2).unwrap(), "pci8086,2922", "drive@0/disk@0"));
        o.add(1, pci_path(Devfn::new(3, 0).unwrap(), "scsi", "disk@0,0"));
        let want = b"/pci@i0cf8/scsi@3/disk@0,0\n/pci@i0cf8/pci8086,2922@1f,2/drive@0/disk@0\0";
        assert_eq!(o.file(false), want);
    }
}
