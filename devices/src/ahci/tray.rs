//! The tray of a CD drive, for whoever changes discs from outside.

use super::atapi::CdDrive;
use super::hba::Hba;
use std::sync::{Arc, Mutex};
use tandem_backends::block::drive::Drive;

/// The tray of a CD drive on a port.
pub struct Tray {
    /// The device's id; empty if it has none.
    pub id: String,
    /// The drive that the device was made for, by name; empty if it was made for none.
    pub slot: String,
    cd: Arc<CdDrive>,
    hba: Arc<Hba>,
    port: usize,
    /// Name of the drive that is in it.
    medium: Mutex<Option<String>>,
}

impl Tray {
    /// The tray of `cd` on `port` of `hba`, in which there is `medium`.
    pub fn new(
        (id, slot): (String, String),
        cd: Arc<CdDrive>,
        (hba, port): (Arc<Hba>, usize),
        medium: Option<String>,
    ) -> Tray {
        Tray { id, slot, cd, hba, port, medium: Mutex::new(medium) }
    }

    /// Name of the drive that is in it.
    pub fn medium(&self) -> Option<String> {
        self.medium.lock().unwrap().clone()
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.cd.tray().0
    }

    /// Whether the guest has locked it.
    pub fn is_locked(&self) -> bool {
        self.cd.tray().1
    }

    /// Opens or closes it, locked or not; returns whether it has moved.
    pub fn shift(&self, open: bool) -> bool {
        self.cd.move_tray(open)
    }

    /// Asks the guest to open it.
    pub fn request_eject(&self) {
        self.cd.request_eject();
    }

    /// Takes the disc out, and waits for what is being read. Returns its name.
    pub fn remove(&self) -> Option<String> {
        let name = self.medium.lock().unwrap().take()?;
        let old = self.cd.exchange(None);
        self.hba.replace(self.port, None);
        if let Some(drive) = old {
            drive.give_back();
        }
        Some(name)
    }

    /// Puts a disc into an empty tray. False if it is not empty, or something else has the drive.
    pub fn insert(&self, name: &str, drive: &Arc<Drive>) -> bool {
        let mut medium = self.medium.lock().unwrap();
        if medium.is_some() || !drive.take() {
            return false;
        }
        self.cd.exchange(Some(drive.clone()));
        self.hba.replace(self.port, Some(drive.clone()));
        *medium = Some(name.into());
        true
    }
}
