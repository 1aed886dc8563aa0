//! Flat images for tests: raw bytes at 7c00h, entered there in real mode.

use super::layout::{FLAT, FLAT_END};
use super::{Image, Result, entry};
use crate::config::Fault;
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::X86State;

/// Where everything goes.
#[derive(Debug)]
pub struct Plan {
    kernel: Image,
}

impl Plan {
    /// Checks the image's length.
    pub fn new(kernel: Image, initrd: Option<Image>) -> Result<Plan, Fault> {
        let room = FLAT_END - FLAT;
        if kernel.len == 0 || kernel.len > room {
            return Err(Fault::new(
                format!("flat image '{}' is {} bytes long", kernel.name, kernel.len),
                format!("flat images hold 1 to {room} bytes"),
            ));
        }
        if let Some(i) = initrd {
            return Err(Fault::new(
                format!("flat image '{}' takes no initrd '{}'", kernel.name, i.name),
                "remove --initrd",
            ));
        }
        Ok(Plan { kernel })
    }

    /// Loads the image.
    pub fn load(&self, ram: &GuestRam) -> Result<X86State> {
        self.kernel.load(ram, FLAT)?;
        Ok(entry::real_mode(FLAT as u16))
    }
}
