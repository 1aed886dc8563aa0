//! Devices that come and go while the machine runs.

use crate::config::Device;
use crate::qapi::define::Nothing;
use crate::qapi::schema::{Member, Schema};
use crate::qapi::{self, Error, Members, Object, Path, Result, Type};
use serde_json::Value;

/// A device as a client writes it: its type, and properties that only the type knows.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceOptions(Device);

/// The text that a command line would have for a property's value.
fn text(value: Value, at: &Path<'_>) -> Result<String> {
    match value {
        Value::String(s) => Ok(s),
        Value::Bool(b) => Ok(if b { "on" } else { "off" }.into()),
        Value::Number(n) => Ok(n.to_string()),
        _ => Err(at.expected("string, number or boolean")),
    }
}

impl Object for DeviceOptions {
    fn take(members: &mut Members, at: &Path<'_>) -> Result<Self> {
        let driver: String = qapi::field(members, "driver", at)?;
        let mut props = Vec::new();
        for name in ["id", "bus"] {
            let value: Option<String> = qapi::field(members, name, at)?;
            props.extend(value.map(|v| (name.to_string(), v)));
        }
        for (name, value) in std::mem::take(members) {
            let value = text(value, &at.member(&name))?;
            props.push((name, value));
        }
        Ok(DeviceOptions(Device { driver, props }))
    }
    fn give(self, into: &mut Members) {
        into.insert("driver".into(), self.0.driver.into());
        into.extend(self.0.props.into_iter().map(|(k, v)| (k, v.into())));
    }
    fn members(schema: &mut Schema) -> Vec<Member> {
        let needed = <String as Type>::describe(schema);
        let member = |name: &str, doc, optional| Member {
            name: name.into(),
            doc,
            ty: needed.clone(),
            optional,
        };
        vec![
            member("driver", &[" Type of the device; further members are its properties."], false),
            member("bus", &[" The port that it goes behind; a free one if absent."], true),
            member("id", &[" Name, without which it cannot be removed."], true),
        ]
    }
}

crate::object_is_type!(DeviceOptions, " A device with its properties.");

crate::commands! {
    /// Puts a device behind a free PCI Express root port.
    fn "device_add" ["json-cli", "json-cli-hotplug"] (cx, [ device: DeviceOptions ]) -> Nothing {
        let Device { driver, mut props } = device.0;
        // Where a device boots in the order of all was decided when the machine started.
        props.retain(|(k, _)| k != "bootindex");
        cx.vm.plug(Device { driver, props }).map(|()| Nothing {})
    }

    /// Asks the guest to let go of a device. DEVICE_DELETED tells that it is gone,
    /// DEVICE_UNPLUG_GUEST_ERROR that the guest keeps it. A guest that does not listen loses it when
    /// the machine is reset.
    fn "device_del"(cx, {
        /// Its name, or its path in the tree of objects.
        id: String,
    }) -> Nothing {
        match id.is_empty() {
            true => Err(Error::no_device("Device '' not found")),
            false => cx.vm.unplug(&id).map(|()| Nothing {}),
        }
    }
}
