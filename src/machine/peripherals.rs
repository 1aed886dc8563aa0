//! The devices that the configuration adds to a board, and what they are made from. They may come
//! and go while the machine runs where the bus allows it ([`super::hotplug`]).

use super::Failure;
use crate::config::{Device, Fault};
use std::sync::Arc;
use tandem_devices::registry::{self, DeviceContext, DeviceFault};

/// A device with its name and the bus that it was given.
struct Installed {
    id: Option<String>,
    bus: Option<String>,
    device: Arc<dyn registry::Device>,
}

/// The configuration's devices, in the order of their making.
pub struct Peripherals {
    context: DeviceContext,
    all: Vec<Installed>,
}

impl Peripherals {
    /// None yet. What devices need of the machine is in `context`.
    pub fn new(context: DeviceContext) -> Peripherals {
        Peripherals { context, all: Vec::new() }
    }

    /// Makes devices; every fault is reported.
    pub fn install_all<'a>(
        &mut self,
        devices: impl IntoIterator<Item = &'a Device>,
    ) -> Result<(), Failure> {
        let mut faults = Vec::new();
        for d in devices {
            let made = self.install(d).err();
            faults.extend(made.into_iter().flatten().map(Fault::from));
        }
        if faults.is_empty() { Ok(()) } else { Err(Failure::Usage(faults)) }
    }

    /// Makes one.
    pub fn install(&mut self, d: &Device) -> Result<(), Vec<DeviceFault>> {
        let device = registry::create(&self.context, &d.driver, &d.props)?;
        let text = |name| d.prop(name).map(str::to_string);
        self.all.push(Installed { id: text("id"), bus: text("bus"), device });
        Ok(())
    }

    /// Lets go of the devices that were on `bus` and have left it.
    pub fn remove_behind(&mut self, bus: &str) {
        let gone = self.all.extract_if(.., |i| i.bus.as_deref() == Some(bus));
        for id in gone.filter_map(|i| i.id) {
            self.context.directory.remove(&id);
        }
    }

    /// What they are made from.
    pub fn context(&self) -> &DeviceContext {
        &self.context
    }

    /// As above; the host-side ends may be changed.
    pub fn context_mut(&mut self) -> &mut DeviceContext {
        &mut self.context
    }

    /// Resets all.
    pub fn reset(&self) {
        self.all.iter().for_each(|i| i.device.reset());
    }
}
