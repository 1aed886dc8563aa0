//! Discs: trays and media.

use crate::machine::media::{Opened, locked};
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use std::path::PathBuf;

crate::choice! {
    /// Whether a medium can be written.
    pub enum BlockdevChangeReadOnlyMode {
        /// As the medium before it: discs cannot.
        Retain = "retain",
        /// It cannot.
        ReadOnly = "read-only",
        /// It can.
        ReadWrite = "read-write",
    }
}

fn done(result: Result<()>) -> Result<Nothing> {
    result.map(|()| Nothing {})
}

crate::commands! {
    /// Opens a tray and takes out what is in it.
    fn "eject"(cx, {
        /// Name of the drive.
        device: Option<String>,
        /// Id of the device.
        id: Option<String>,
        /// Also if the guest has locked the tray.
        force: Option<bool>,
    }) -> Nothing {
        let tray = cx.vm.tray(device.as_deref(), id.as_deref())?;
        match cx.vm.open_tray(&tray, force == Some(true)) {
            Opened::Open => done(cx.vm.remove_medium(&tray)),
            Opened::Asked => Err(locked(&tray)),
        }
    }

    /// Opens a tray. If the guest has locked it and `force` is off, the guest is asked to.
    fn "blockdev-open-tray"(cx, {
        /// Name of the drive.
        device: Option<String>,
        /// Id of the device.
        id: Option<String>,
        /// Also if the guest has locked the tray.
        force: Option<bool>,
    }) -> Nothing {
        let tray = cx.vm.tray(device.as_deref(), id.as_deref())?;
        cx.vm.open_tray(&tray, force == Some(true));
        Ok(Nothing {})
    }

    /// Closes a tray.
    fn "blockdev-close-tray"(cx, {
        /// Name of the drive.
        device: Option<String>,
        /// Id of the device.
        id: Option<String>,
    }) -> Nothing {
        let tray = cx.vm.tray(device.as_deref(), id.as_deref())?;
        cx.vm.close_tray(&tray);
        Ok(Nothing {})
    }

    /// Takes out what is in an open tray.
    fn "blockdev-remove-medium"(cx, {
        /// Id of the device.
        id: String,
    }) -> Nothing {
        let tray = cx.vm.tray(None, Some(&id))?;
        done(cx.vm.remove_medium(&tray))
    }

    /// Puts a block node into an open, empty tray.
    fn "blockdev-insert-medium"(cx, {
        /// Id of the device.
        id: String,
        /// Name of the node.
        node_name: String,
    }) -> Nothing {
        let tray = cx.vm.tray(None, Some(&id))?;
        done(cx.vm.insert_medium(&tray, &node_name))
    }

    /// Opens an image and puts it into a tray, in the place of what is there.
    fn "blockdev-change-medium"(cx, {
        /// Name of the drive.
        device: Option<String>,
        /// Id of the device.
        id: Option<String>,
        /// Path of the image.
        filename: PathBuf,
        /// Its format; found out if absent.
        format: Option<String>,
        /// Also if the guest has locked the tray.
        force: Option<bool>,
        /// Whether it can be written: a disc cannot.
        read_only_mode: Option<BlockdevChangeReadOnlyMode>,
    }) -> Nothing {
        if read_only_mode == Some(BlockdevChangeReadOnlyMode::ReadWrite) {
            return Err(Error::new("a disc is only read; use 'read-only-mode': 'read-only'"));
        }
        let tray = cx.vm.tray(device.as_deref(), id.as_deref())?;
        done(cx.vm.change_medium(&tray, &filename, format, force == Some(true)))
    }
}
