//! Device types and devices.

use crate::qapi::{Error, Result};
use tandem_devices::registry::{self, PropertyKind};

crate::object! {
    /// A property of an object or a type.
    pub struct ObjectPropertyInfo {
        /// Name.
        name: String,
        /// Type; `child<T>` and `link<T>` are other objects.
        r#type: String,
        /// What it means.
        description: Option<String>,
        /// Value if none is given.
        default_value: Option<serde_json::Value>,
    }
}

/// QEMU's name of a property's type.
pub fn type_name(kind: PropertyKind) -> &'static str {
    match kind {
        PropertyKind::Bool => "bool",
        PropertyKind::Uint { max, .. } if max <= u8::MAX.into() => "uint8",
        PropertyKind::Uint { max, .. } if max <= u16::MAX.into() => "uint16",
        PropertyKind::Uint { max, .. } if max <= u32::MAX.into() => "uint32",
        PropertyKind::Uint { .. } => "uint64",
        PropertyKind::Size => "size",
        PropertyKind::Text | PropertyKind::Choice(_) => "str",
        PropertyKind::PciAddress | PropertyKind::Mac => "str",
    }
}

/// Properties of the device type `name`.
fn list_properties(name: &str) -> Result<Vec<ObjectPropertyInfo>> {
    let unknown = || Error::no_device(format!("Device '{name}' not found"));
    let ty = registry::types().into_iter().find(|t| t.name == name).ok_or_else(unknown)?;
    let all = ty.properties().map(|p| ObjectPropertyInfo {
        name: p.name.into(),
        r#type: type_name(p.kind).into(),
        description: Some(p.description.into()),
        default_value: None,
    });
    Ok(all.collect())
}

crate::commands! {
    /// Lists the properties of a device type.
    fn "device-list-properties"(_cx, {
        /// Name of the type.
        typename: String,
    }) -> Vec<ObjectPropertyInfo> { list_properties(&typename) }
}
