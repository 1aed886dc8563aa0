//! Block nodes that come and go while the machine runs. A node is a drive: of a format on a file, or
//! of the bytes of a file as they are. A format takes over the node of the file below it, and gives
//! it back when it goes.

use super::{Machine, drives};
use crate::config::{Device, Drive, Interface};
use crate::qapi::{Error, Result};
use crate::qemu::{Node, NodeKind};
use std::collections::BTreeMap;
use std::sync::Arc;
use tandem_backends::block::drive;

fn missing(name: &str) -> Error {
    Error::new(format!("Failed to find node with node-name='{name}'"))
}

impl Drive {
    /// A drive of the bytes of the file below a format.
    fn below(&self, name: &str) -> Drive {
        Drive {
            id: Some(name.into()),
            file: self.file.clone(),
            format: Some("raw".into()),
            interface: Interface::None,
            readonly: self.readonly,
            cache: self.cache.clone(),
            aio: self.aio.clone(),
            discard: self.discard,
            protocol: true,
            ..Drive::default()
        }
    }
}

impl Machine {
    /// The drives that devices can be made of.
    fn shelf(&mut self) -> Result<&mut BTreeMap<String, Arc<drive::Drive>>> {
        let guest = self.guest.as_mut();
        let guest = guest.ok_or_else(|| Error::new("this machine has no disks"))?;
        Ok(&mut guest.board.peripherals_mut().context_mut().backends.drives)
    }

    fn node(&self, name: &str) -> Option<usize> {
        let mut all = self.config.drives.iter().enumerate();
        all.find(|(i, d)| d.name(*i) == name).map(|(i, _)| i)
    }

    fn node_user(&self, name: &str) -> Option<&Device> {
        self.config.devices.iter().find(|d| d.prop("drive") == Some(name))
    }

    fn put_on_shelf(&mut self, d: Drive) -> Result<()> {
        let name = d.name(0);
        let opened = drives::open(&d).map_err(Error::from)?;
        self.shelf()?.insert(name, opened);
        self.config.drives.push(d);
        Ok(())
    }

    fn take_from_shelf(&mut self, index: usize) -> Result<Drive> {
        // The others keep their names, which may come from their places.
        for (i, d) in self.config.drives.iter_mut().enumerate() {
            d.id = Some(d.name(i));
        }
        let name = self.config.drives[index].name(index);
        self.shelf()?.remove(&name);
        Ok(self.config.drives.remove(index))
    }

    /// Adds a node.
    pub fn add_node(&mut self, node: Node) -> Result<()> {
        let Node { name, kind } = node;
        let below = |d: &Drive| d.file_node.as_deref() == Some(&name);
        if self.node(&name).is_some() || self.config.drives.iter().any(below) {
            return Err(Error::new(format!("Duplicate nodes with node-name='{name}'")));
        }
        match kind {
            NodeKind::File(d) => {
                let d = Drive { format: Some("raw".into()), protocol: true, ..*d };
                self.put_on_shelf(d)
            }
            NodeKind::Format { drive, file, no_backing, inline } => {
                let index = self.node(&file).filter(|i| self.config.drives[*i].protocol);
                let Some(index) = index else {
                    let what = format!("Cannot find device='' nor node-name='{file}'");
                    return Err(Error::new(what));
                };
                if let Some(d) = self.node_user(&file) {
                    let what = format!("Node '{file}' is busy: a {} uses it", d.driver);
                    return Err(Error::new(what));
                }
                let old = self.take_from_shelf(index)?;
                let new = drive.on_file(&old, &file, no_backing, inline);
                self.put_on_shelf(new).inspect_err(|_| {
                    if let Err(e) = self.put_on_shelf(old) {
                        log::warn!("block node '{file}' is lost: {e}");
                    }
                })
            }
        }
    }

    /// Removes a node that nobody uses.
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        if self.config.drives.iter().any(|d| d.file_node.as_deref() == Some(name)) {
            return Err(Error::new(format!("Node '{name}' is busy: node is used by a format")));
        }
        let index = self.node(name).ok_or_else(|| missing(name))?;
        if !self.config.drives[index].is_node() {
            return Err(Error::new(format!("Node {name} is not owned by the monitor")));
        }
        if let Some(d) = self.node_user(name) {
            return Err(Error::new(format!("Node {name} is in use by a {}", d.driver)));
        }
        let gone = self.take_from_shelf(index)?;
        if let Some(file) = gone.file_node.clone().filter(|_| !gone.file_inline) {
            self.put_on_shelf(gone.below(&file))?;
        }
        Ok(())
    }
}
