//! Block nodes that come and go while the machine runs. A node is a drive: of a format on a file, or
//! of the bytes of a file as they are. A format takes over the node of the file below it, and gives
//! it back when it goes.
//!
//! What always holds: the image of a node that stands behind another is the same object there, so
//! that it is open once. A device keeps its drive when it goes on with another node's image
//! ([`Machine::exchange`]): then the names change places, not the drives.

use super::{Machine, drives};
use crate::config::{Device, Drive, Interface};
use crate::qapi::{Error, Result};
use crate::qemu::{Node, NodeKind};
use std::sync::Arc;
use tandem_backends::block::{Image, drive};

fn missing(name: &str) -> Error {
    Error::new(format!("Failed to find node with node-name='{name}'"))
}

/// An error of the block layer, for a client.
pub fn failed(e: tandem_backends::block::Error) -> Error {
    Error::new(e.chain())
}

/// The images of a chain, the frontmost first.
pub fn chain(image: &Arc<dyn Image>) -> Vec<Arc<dyn Image>> {
    let mut all = vec![image.clone()];
    while let Some(behind) = all[all.len() - 1].layered().and_then(|l| l.backing()) {
        all.push(behind);
    }
    all
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
    pub(super) fn shelf(&mut self) -> Result<&mut drives::Shelf> {
        let guest = self.guest.as_mut();
        let guest = guest.ok_or_else(|| Error::new("this machine has no disks"))?;
        Ok(&mut guest.board.peripherals_mut().context_mut().backends.drives)
    }

    pub(super) fn node(&self, name: &str) -> Option<usize> {
        let mut all = self.config.drives.iter().enumerate();
        all.find(|(i, d)| d.name(*i) == name).map(|(i, _)| i)
    }

    fn node_user(&self, name: &str) -> Option<&Device> {
        // What a CD drive uses is in its tray or not.
        let mut fixed = self.config.devices.iter().filter(|d| d.driver != "ide-cd");
        fixed.find(|d| d.prop("drive") == Some(name))
    }

    /// The drive that a client means by its own name, or by that of the node in it; with the name
    /// under which the machine has it.
    pub fn find_node(&self, name: &str) -> Result<(String, Arc<drive::Drive>)> {
        let mut all = self.config.drives.iter().enumerate();
        let found = all.find(|(i, d)| d.name(*i) == name || d.node.as_deref() == Some(name));
        let key = found.map(|(i, d)| d.name(i));
        let drive = key.and_then(|k| self.drives().remove(&k).map(|drive| (k, drive)));
        drive.ok_or_else(|| {
            Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"))
        })
    }

    /// What uses a node, in words, if something does: another node before it, a device, a job, an
    /// export.
    pub fn user_of(&self, key: &str) -> Option<String> {
        if let Some(d) = self.node_user(key) {
            return Some(format!("a {} uses it", d.driver));
        }
        if self.trays().iter().any(|t| t.medium().as_deref() == Some(key)) {
            return Some("it is in a tray".into());
        }
        let config = self.node(key).map(|i| &self.config.drives[i]);
        if config.is_some_and(|d| !d.is_node()) {
            return Some("it is a drive of the machine".into());
        }
        if let Some(job) = self.jobs.user_of(key) {
            return Some(format!("block device is in use by block job: {job}"));
        }
        let drives = self.drives();
        let mine = drives.get(key)?;
        if let Some(export) = self.exports.user_of(mine) {
            return Some(format!("export '{export}' uses it"));
        }
        let image = mine.image();
        let in_front = drives.iter().find(|(name, d)| {
            *name != key && chain(&d.image()).iter().skip(1).any(|i| Arc::ptr_eq(i, &image))
        });
        in_front.map(|(name, _)| format!("node is used as backing hd of '{name}'"))
    }

    /// Fails if something uses a node.
    pub fn must_be_free(&self, key: &str) -> Result<()> {
        match self.user_of(key) {
            Some(why) => Err(Error::new(format!("Node '{key}' is busy: {why}"))),
            None => Ok(()),
        }
    }

    /// The name of the node whose image this is; one is made up for an image that has none.
    pub fn name_image(&mut self, image: &Arc<dyn Image>) -> Result<String> {
        let drives = self.drives();
        if let Some((key, _)) = drives.iter().find(|(_, d)| Arc::ptr_eq(&d.image(), image)) {
            return Ok(key.clone());
        }
        let (name, below) = (self.made_up_name(), self.made_up_name());
        let d = Drive {
            id: Some(name.clone()),
            file: image.path().into(),
            format: Some(image.describe().format.into()),
            interface: Interface::None,
            file_node: Some(below),
            file_inline: true,
            ..Drive::default()
        };
        let made = drive::Drive::new(image.clone(), d.options());
        self.shelf()?.insert(name.clone(), made);
        self.config.drives.push(d);
        Ok(name)
    }

    /// A name that no client can give.
    pub(super) fn made_up_name(&mut self) -> String {
        self.made_up += 1;
        format!("#block{}", self.made_up)
    }

    /// Lets whoever uses `key` go on with the image of the node `other`; `other` is then the node
    /// of the image that was there. Both drives stand still during `before`, which may still refuse.
    pub fn exchange(
        &mut self,
        key: &str,
        other: &str,
        before: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let lost = |n: &str| missing(n);
        let (a, b) = {
            let drives = self.drives();
            let find = |n: &str| drives.get(n).cloned().ok_or_else(|| lost(n));
            (find(key)?, find(other)?)
        };
        let (i, j) = (self.node(key), self.node(other));
        let (Some(i), Some(j)) = (i, j) else { return Err(lost(key)) };
        let resized = a.size() != b.size();
        {
            let (first, second) = (a.still(), b.still());
            before()?;
            let new = b.image();
            second.exchange(first.exchange(new));
        }
        if self.config.drives[i].is_node() {
            let shelf = self.shelf()?;
            shelf.insert(other.into(), a.clone());
            shelf.insert(key.into(), b);
            for d in &mut self.config.devices {
                let named = d.props.iter_mut().filter(|(k, v)| k == "drive" && v == key);
                named.for_each(|(_, v)| *v = other.into());
            }
            self.jobs.rename(key, other);
        } else {
            self.settle_in(i, j);
        }
        if resized {
            a.tell_resized();
        }
        Ok(())
    }

    /// Drive `i`, which has a name apart from its nodes', has the node of `j` in it from now on.
    fn settle_in(&mut self, i: usize, j: usize) {
        let other = self.config.drives[j].name(j);
        let known = self.config.drives[i].node.take();
        let mut moved = self.config.drives[j].clone();
        let mine = &mut self.config.drives[i];
        for (a, b) in [
            (&mut mine.format, &mut moved.format),
            (&mut mine.file_node, &mut moved.file_node),
            (&mut mine.backing, &mut moved.backing),
        ] {
            std::mem::swap(a, b);
        }
        std::mem::swap(&mut mine.file, &mut moved.file);
        // It stays a drive: a node below it has no name of its own any more.
        mine.file_node = None;
        mine.node = Some(other.clone());
        self.config.drives.remove(j);
        let file_node = Some(self.made_up_name());
        let Ok(shelf) = self.shelf() else { return };
        let image = shelf.remove(&other);
        // What was in it before keeps its name, if it had one.
        if let (Some(name), Some(image)) = (known, image) {
            shelf.insert(name.clone(), image);
            let moved = Drive { id: Some(name), file_node, file_inline: true, ..moved };
            self.config.drives.push(moved);
        }
    }

    /// Lets go of nodes with made-up names that nobody uses; in a chain, images need no names.
    pub(super) fn sweep_nodes(&mut self) {
        let drives = self.drives();
        let unused = |d: &Drive| {
            let Some(name) = d.id.as_deref().filter(|n| n.starts_with('#') && d.is_node()) else {
                return false;
            };
            let exported = || drives.get(name).and_then(|d| self.exports.user_of(d)).is_some();
            self.node_user(name).is_none() && self.jobs.user_of(name).is_none() && !exported()
        };
        let gone: Vec<usize> =
            (0..self.config.drives.len()).filter(|i| unused(&self.config.drives[*i])).collect();
        for i in gone.into_iter().rev() {
            if let Err(e) = self.take_from_shelf(i) {
                log::warn!("a block node is not let go of: {e}");
            }
        }
    }

    fn put_on_shelf(&mut self, d: Drive) -> Result<()> {
        let name = d.name(0);
        let opened = drives::open(&d, self.shelf()?).map_err(Error::from)?;
        self.shelf()?.insert(name, opened);
        self.config.drives.push(d);
        Ok(())
    }

    pub(super) fn take_from_shelf(&mut self, index: usize) -> Result<Drive> {
        // The others keep their names, which may come from their places.
        for (i, d) in self.config.drives.iter_mut().enumerate() {
            d.id = Some(d.name(i));
        }
        let name = self.config.drives[index].name(index);
        self.shelf()?.remove(&name);
        Ok(self.config.drives.remove(index))
    }

    fn must_be_new(&self, name: &str) -> Result<()> {
        let taken =
            |d: &Drive| d.file_node.as_deref() == Some(name) || d.node.as_deref() == Some(name);
        match self.node(name).is_some() || self.config.drives.iter().any(taken) {
            true => Err(Error::new(format!("Duplicate nodes with node-name='{name}'"))),
            false => Ok(()),
        }
    }

    /// Adds the node of a format together with the file below it.
    pub(super) fn add_whole_node(&mut self, d: Drive) -> Result<()> {
        self.must_be_new(&d.name(0))?;
        self.put_on_shelf(d)
    }

    /// Adds a node.
    pub fn add_node(&mut self, node: Node) -> Result<()> {
        let Node { name, kind } = node;
        self.must_be_new(&name)?;
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
        if let Some(why) = self.user_of(name) {
            return Err(Error::new(format!("Node {name} is in use: {why}")));
        }
        let gone = self.take_from_shelf(index)?;
        if let Some(file) = gone.file_node.clone().filter(|_| !gone.file_inline) {
            self.put_on_shelf(gone.below(&file))?;
        }
        Ok(())
    }
}
