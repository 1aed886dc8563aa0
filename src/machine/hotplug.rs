//! Devices that come and go while the machine runs: behind PCI Express root ports.
//!
//! ```text
//!   device_add ─► made on the port's bus ─► the slot tells the guest
//!   device_del ─► the slot asks the guest ─► (a vCPU's thread) gone from the bus ─► inbox
//!                                            (main loop) released, DEVICE_DELETED
//! ```

use super::Machine;
use super::inbox::{Event, Inbox};
use crate::commands::events::{DeviceDeleted, DeviceUnplugGuestError};
use crate::config::{Device, Object};
use crate::qapi::{self, Error, Result};
use std::sync::Arc;
use tandem_devices::pci::hotplug::{Outcome, Unwilling};
use tandem_devices::pci::root_port::RootPort;
use tandem_devices::registry::{self, BusKind, Buses};

impl Device {
    /// The value of a property.
    pub fn prop(&self, name: &str) -> Option<&str> {
        self.props.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Its name.
    pub fn id(&self) -> Option<&str> {
        self.prop("id")
    }

    /// Whether it is behind the device `id`, directly.
    fn hangs_on(&self, id: &str) -> bool {
        let bus = self.prop("bus").and_then(|b| b.strip_prefix(id));
        bus.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// The path of a device in the tree of objects.
fn path(id: &str) -> String {
    format!("/machine/peripheral/{id}")
}

fn no_hotplug(bus: &str) -> Error {
    Error::new(format!(
        "Bus '{bus}' does not support hotplugging; name a free pcie-root-port with bus=ID"
    ))
}

impl Machine {
    fn devices(&self) -> &[Device] {
        &self.config.devices
    }

    fn port(&self, bus: &str) -> Option<Arc<RootPort>> {
        let context = self.guest.as_ref()?.board.peripherals().context();
        context.directory.find(Some(bus))
    }

    /// The port that a new device goes behind.
    fn port_for(&self, d: &Device) -> Result<(String, Arc<RootPort>)> {
        let free = |p: &RootPort| p.hotplug() && p.behind().devices().is_empty();
        match d.prop("bus") {
            Some(bus) => match self.port(bus) {
                Some(p) if p.hotplug() => Ok((bus.into(), p)),
                Some(_) => Err(no_hotplug(bus)),
                None if bus == Buses::ROOT => Err(no_hotplug(bus)),
                None => Err(Error::new(format!("Bus '{bus}' not found"))),
            },
            None => {
                let names = self.devices().iter().filter_map(Device::id);
                let mut ports = names.filter_map(|n| Some((n.to_string(), self.port(n)?)));
                ports.find(|(_, p)| free(p)).ok_or_else(|| no_hotplug(Buses::ROOT))
            }
        }
    }

    /// Puts a device into the running machine.
    pub fn plug(&mut self, mut d: Device) -> Result<()> {
        let ty = registry::find(&d.driver).map_err(|f| Error::new(f.to_string()))?;
        if ty.bus != BusKind::Pci {
            let what = format!("Device '{}' does not support hotplugging", d.driver);
            return Err(Error::new(what));
        }
        if let Some(id) = d.id() {
            if !qapi::is_well_formed_id(id) {
                return Err(Error::new("Parameter 'id' expects an identifier"));
            }
            if self.devices().iter().any(|o| o.id() == Some(id)) {
                return Err(Error::new(format!("Duplicate device ID '{id}'")));
            }
        }
        if let Some(rng) = d.prop("rng") {
            let is_it = |o: &Object| o.id == rng && o.is_rng();
            if !self.config.objects.iter().any(is_it) {
                return Err(Error::new(format!("there is no rng object '{rng}'")));
            }
        }
        let (bus, port) = self.port_for(&d)?;
        let board = &mut self.guest.as_mut().ok_or_else(|| no_hotplug(&bus))?.board;
        let shown = |p: &RootPort| p.behind().devices().iter().any(|(at, _)| at.function() == 0);
        if shown(&port) {
            let what = format!("the port '{bus}' has a device already; choose another");
            return Err(Error::new(what));
        }
        if d.prop("bus").is_none() {
            d.props.push(("bus".into(), bus));
        }
        board.peripherals_mut().install(&d).map_err(qapi::faults)?;
        self.config.devices.push(d);
        // The guest looks at function 0 first; the others are to be there by then.
        if shown(&port) {
            port.inserted();
        }
        Ok(())
    }

    /// Asks the guest to let go of a device. What becomes of it is an event.
    pub fn unplug(&mut self, id: &str) -> Result<()> {
        let id = id.strip_prefix("/machine/peripheral/").unwrap_or(id);
        let Some(d) = self.devices().iter().find(|d| d.id() == Some(id)) else {
            return Err(Error::no_device(format!("Device '{id}' not found")));
        };
        if let Some(child) = self.devices().iter().find(|c| c.hangs_on(id)) {
            let what = format!("device '{id}' has others on it: a {}", child.driver);
            return Err(Error::new(what));
        }
        let bus = d.prop("bus").unwrap_or(Buses::ROOT).to_string();
        let port = self.port(&bus).filter(|p| p.hotplug()).ok_or_else(|| no_hotplug(&bus))?;
        let (inbox, asked) = (self.inbox.clone(), id.to_string());
        let answer = move |outcome| tell(&inbox, bus, asked, outcome);
        port.request_removal(Box::new(answer)).map_err(|e| match e {
            Unwilling::Pending => {
                Error::new(format!("Device {id} is already in the process of unplug"))
            }
            Unwilling::Busy => {
                Error::new("Hot-unplug failed: guest is busy (power indicator blinking)")
            }
        })
    }

    /// All that was behind the port `bus` has left it.
    fn unplugged(&mut self, bus: &str) {
        let Some(guest) = &mut self.guest else { return };
        let (gone, kept) = std::mem::take(&mut self.config.devices)
            .into_iter()
            .partition::<Vec<_>, _>(|d| d.prop("bus") == Some(bus));
        self.config.devices = kept;
        guest.board.peripherals_mut().remove_behind(bus);
        for d in &gone {
            let Some(id) = d.id() else { continue };
            if d.driver.starts_with("virtio-") {
                // The device apart from its PCI function is an object of its own.
                let path = format!("{}/virtio-backend", path(id));
                self.hub.emit(DeviceDeleted { device: None, path });
            }
            self.hub.emit(DeviceDeleted { device: Some(id.into()), path: path(id) });
        }
    }
}

/// Tells the main loop what became of a removal.
fn tell(inbox: &Inbox, bus: String, id: String, outcome: Outcome) {
    inbox.post(Event::Job(Box::new(move |vm: &mut Machine| match outcome {
        Outcome::Removed => vm.unplugged(&bus),
        Outcome::Refused => {
            let path = path(&id);
            vm.hub.emit(DeviceUnplugGuestError { device: Some(id), path });
        }
    })));
}
