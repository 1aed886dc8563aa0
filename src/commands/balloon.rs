//! The guest's memory balloon.

use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use std::sync::Arc;
use tandem_devices::virtio::balloon::VirtioBalloon;

crate::object! {
    /// The balloon.
    pub struct BalloonInfo {
        /// Bytes that the guest has left itself.
        actual: i64,
    }
}

fn balloon(vm: &crate::machine::Machine) -> Result<Arc<VirtioBalloon>> {
    vm.balloon().ok_or_else(|| {
        Error::new("No balloon device has been activated; add --device virtio-balloon-pci")
    })
}

crate::commands! {
    /// Asks the guest to leave itself so much memory.
    fn "balloon"(cx, {
        /// Bytes.
        value: i64,
    }) -> Nothing {
        let balloon = balloon(cx.vm)?;
        match u64::try_from(value) {
            Ok(bytes) if bytes > 0 => {
                balloon.set_guest_memory(bytes);
                Ok(Nothing {})
            }
            _ => Err(Error::new("Parameter 'value' expects a size above zero")),
        }
    }

    /// Tells how much memory the guest has left itself.
    fn "query-balloon"(cx) -> BalloonInfo {
        let actual = balloon(cx.vm)?.guest_memory();
        Ok(BalloonInfo { actual: i64::try_from(actual).unwrap_or(i64::MAX) })
    }
}
