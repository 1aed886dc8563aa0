//! Discs that are changed while the machine runs: trays are opened and closed, media taken out and
//! put in. A medium is a drive that the tray's device uses; one of `-drive` goes when it is taken
//! out, a block node stays.

use super::{Machine, drives};
use crate::commands::events;
use crate::config::{Drive, Interface, Media};
use crate::qapi::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tandem_devices::ahci::tray::Tray;

/// What became of a wish to open a tray.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// It is open.
    Open,
    /// The guest keeps it locked, and has been asked.
    Asked,
}

impl Machine {
    /// All trays.
    pub fn trays(&self) -> Vec<Arc<Tray>> {
        let guest = self.guest.as_ref();
        guest.map(|g| g.board.peripherals().context().directory.all()).unwrap_or_default()
    }

    /// The tray that a client means by a drive's name or a device's id.
    pub fn tray(&self, device: Option<&str>, id: Option<&str>) -> Result<Arc<Tray>> {
        let plain = |id: &str| id.rsplit('/').next().unwrap_or(id).to_string();
        let (wanted, found) = match (device, id) {
            (Some(d), None) => (d, self.trays().into_iter().find(|t| !d.is_empty() && t.slot == d)),
            (None, Some(i)) => {
                (i, self.trays().into_iter().find(|t| !i.is_empty() && t.id == plain(i)))
            }
            _ => return Err(Error::new("Need exactly one of 'device' and 'id'")),
        };
        found.ok_or_else(|| {
            let drive = self.node(wanted).is_some();
            let device = self.config.devices.iter().any(|d| d.prop("id") == Some(&plain(wanted)));
            match drive || device {
                true => Error::new(format!("Device '{wanted}' is not removable")),
                false => Error::no_device(format!("Device '{wanted}' not found")),
            }
        })
    }

    fn tell_tray(&self, tray: &Tray, open: bool) {
        let (device, id) = (tray.slot.clone(), tray.id.clone());
        self.hub.emit(events::DeviceTrayMoved { device, id, tray_open: open });
    }

    /// Opens a tray; by force also one that the guest has locked.
    pub fn open_tray(&self, tray: &Tray, force: bool) -> Opened {
        if tray.is_locked() && !tray.is_open() {
            tray.request_eject();
            if !force {
                return Opened::Asked;
            }
        }
        if tray.shift(true) {
            self.tell_tray(tray, true);
        }
        Opened::Open
    }

    /// Closes a tray.
    pub fn close_tray(&self, tray: &Tray) {
        if tray.shift(false) {
            self.tell_tray(tray, false);
        }
    }

    /// Takes out what is in an open tray.
    pub fn remove_medium(&mut self, tray: &Tray) -> Result<()> {
        if !tray.is_open() {
            return Err(Error::new(format!("Tray of device '{}' is not open", name(tray))));
        }
        let Some(medium) = tray.remove() else { return Ok(()) };
        let Some(index) = self.node(&medium) else { return Ok(()) };
        if self.config.drives[index].is_node() {
            return Ok(());
        }
        self.shelf()?.remove(&medium);
        if medium == tray.slot {
            // The drive stays, without a disc.
            let d = &mut self.config.drives[index];
            (d.id, d.file, d.format) = (Some(medium), Default::default(), None);
        } else {
            self.take_from_shelf(index)?;
        }
        Ok(())
    }

    /// Puts the block node `node` into an open, empty tray.
    pub fn insert_medium(&mut self, tray: &Tray, node: &str) -> Result<()> {
        let drive = self.shelf()?.get(node).cloned();
        let drive = drive
            .ok_or_else(|| Error::new(format!("Cannot find device='' nor node-name='{node}'")))?;
        if !tray.is_open() {
            return Err(Error::new(format!("Tray of device '{}' is not open", name(tray))));
        }
        if tray.medium().is_some() {
            let what = format!("There already is a medium in device '{}'", name(tray));
            return Err(Error::new(what));
        }
        match tray.insert(node, &drive) {
            true => Ok(()),
            false => Err(Error::new(format!("Node '{node}' is already in use"))),
        }
    }

    /// Puts the image at `file` into the tray in the place of what is there.
    pub fn change_medium(
        &mut self,
        tray: &Tray,
        file: &Path,
        format: Option<String>,
        force: bool,
    ) -> Result<()> {
        let slot = self.node(&tray.slot).filter(|i| !self.config.drives[*i].is_node());
        let id = match slot {
            Some(_) => tray.slot.clone(),
            None => self.made_up_name(),
        };
        let medium = Drive {
            id: Some(id.clone()),
            file: file.into(),
            format,
            interface: Interface::None,
            media: Media::Cdrom,
            readonly: true,
            ..Drive::default()
        };
        // First, so that an image that does not open changes nothing.
        let opened = drives::open(&medium, self.shelf()?).map_err(Error::from)?;
        if self.open_tray(tray, force) == Opened::Asked {
            return Err(locked(tray));
        }
        self.remove_medium(tray)?;
        match slot {
            Some(i) => {
                let d = &mut self.config.drives[i];
                (d.id, d.file, d.format) = (medium.id, medium.file, medium.format);
            }
            None => self.config.drives.push(medium),
        }
        self.shelf()?.insert(id.clone(), opened);
        self.insert_medium(tray, &id)?;
        self.close_tray(tray);
        Ok(())
    }
}

/// What a client calls a tray.
pub fn name(tray: &Tray) -> &str {
    if tray.id.is_empty() { &tray.slot } else { &tray.id }
}

/// The guest keeps a tray locked.
pub fn locked(tray: &Tray) -> Error {
    Error::new(format!(
        "Device '{}' is locked and force was not specified, wait for tray to open and try again",
        name(tray)
    ))
}
