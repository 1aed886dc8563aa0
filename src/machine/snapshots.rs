//! Images that come in front of a disk's while the guest goes on.

use super::Machine;
use super::block_nodes::failed;
use super::run_state::RunState;
use crate::config::{Drive, Interface};
use crate::qapi::{Error, Result};
use crate::qemu::{Node, NodeKind};
use std::path::Path;
use std::sync::Arc;
use tandem_accel::vcpu::VcpuHandle;
use tandem_backends::block::file::HostFile;
use tandem_backends::block::qcow2::CreateOptions;

impl Machine {
    /// The node called `name`, if it can come in front of another.
    pub fn overlay(&self, name: &str) -> Result<String> {
        let (key, drive) = self.find_node(name)?;
        if self.user_of(&key).is_some() {
            return Err(Error::new("The overlay is already in use"));
        }
        let image = drive.image();
        let layers = image.layered();
        let layers =
            layers.ok_or_else(|| Error::new("The overlay does not support backing images"))?;
        if layers.backing().is_some() {
            return Err(Error::new("The overlay already has a backing image"));
        }
        if drive.read_only() {
            return Err(Error::new(format!("Block node '{key}' is read-only")));
        }
        Ok(key)
    }

    /// Makes, unless it is there, and opens an image that is to come in front of `key`'s.
    pub fn new_overlay(
        &mut self,
        key: &str,
        path: &Path,
        name: Option<String>,
        make: bool,
    ) -> Result<String> {
        let (_, drive) = self.find_node(key)?;
        let image = drive.image();
        if make {
            let file = HostFile::create(path).map_err(failed)?;
            let options = CreateOptions {
                size: image.size(),
                backing_file: Some(image.path().display().to_string()),
                backing_format: Some(image.describe().format.into()),
                ..CreateOptions::default()
            };
            options.create(&file).map_err(failed)?;
        }
        let name = match name {
            Some(name) => name,
            None => self.made_up_name(),
        };
        let like = self.config.drives.iter().find(|d| d.id.as_deref() == Some(key));
        let d = Drive {
            id: Some(name.clone()),
            file: path.into(),
            format: Some("qcow2".into()),
            interface: Interface::None,
            no_backing: true,
            cache: like.and_then(|d| d.cache.clone()),
            discard: like.is_some_and(|d| d.discard),
            file_node: Some(self.made_up_name()),
            file_inline: true,
            ..Drive::default()
        };
        self.add_whole_node(d)?;
        Ok(name)
    }

    /// Lets the guest go on in `overlay`, in front of what `key` has.
    pub fn put_in_front(&mut self, key: &str, overlay: &str) -> Result<()> {
        let ((_, below), (_, above)) = (self.find_node(key)?, self.find_node(overlay)?);
        let (old, new) = (below.image(), above.image());
        self.exchange(key, overlay, || {
            if old.writable().is_some() {
                old.set_writable(false).map_err(failed)?;
            }
            let layers = new.layered();
            let layers = layers.ok_or_else(|| Error::new("The overlay has no layers"))?;
            layers.set_backing(Some(old.clone()));
            Ok(())
        })?;
        self.sweep_nodes();
        Ok(())
    }

    /// Does something while the guest stands still, which nobody is told.
    pub fn at_once<T>(&mut self, f: impl FnOnce(&mut Machine) -> T) -> T {
        let runs = self.run_state() == RunState::Running;
        if runs {
            self.pause_vcpus();
        }
        let result = f(self);
        if runs {
            self.vcpus.iter().for_each(VcpuHandle::resume);
        }
        result
    }

    /// Gives a node other options: whether it can be written, and what is behind it.
    pub fn reopen_node(&mut self, node: Node) -> Result<()> {
        let missing = || Error::new(format!("Failed to find node with node-name='{}'", node.name));
        let (key, drive) = self.find_node(&node.name).map_err(|_| missing())?;
        let (wanted, backing) = match &node.kind {
            NodeKind::File(d) => (d, None),
            NodeKind::Format { drive, no_backing, .. } => (drive, Some(*no_backing)),
        };
        let image = drive.image();
        let behind = match (&wanted.backing, backing) {
            (Some(name), _) => Some(Some(self.find_node(name)?.1.image())),
            (None, Some(true)) => Some(None),
            _ => None,
        };
        if wanted.format.as_deref().is_some_and(|f| f != image.describe().format) {
            return Err(Error::new(format!("Cannot change the option 'driver' of '{key}'")));
        }
        let still = drive.still();
        if image.writable().is_some() == wanted.readonly {
            image.set_writable(!wanted.readonly).map_err(failed)?;
        }
        if let (Some(behind), Some(layers)) = (behind, image.layered()) {
            let loops = |b: &Arc<dyn tandem_backends::block::Image>| {
                super::block_nodes::chain(b).iter().any(|i| Arc::ptr_eq(i, &image))
            };
            if behind.as_ref().is_some_and(loops) {
                return Err(Error::new(format!(
                    "Making that a backing file of '{key}' would create a cycle"
                )));
            }
            layers.set_backing(behind);
        }
        drop(still);
        if let Some(d) = self.config.drives.iter_mut().find(|d| d.id.as_deref() == Some(&*key)) {
            (d.readonly, d.backing) = (wanted.readonly, wanted.backing.clone());
        }
        Ok(())
    }
}
