//! Objects that devices use by name (QEMU's user-creatable objects).

use crate::config::{Fault, Object};
use std::path::Path;
use tandem_accel::suggest::one_of;

/// A type of object with its properties.
pub struct ObjectType {
    /// Name.
    pub name: &'static str,
    /// Its properties: name, and type as the interface names it.
    pub properties: &'static [(&'static str, &'static str)],
}

/// The types of which a user can make objects.
pub const TYPES: [ObjectType; 4] = [
    ObjectType { name: "rng-random", properties: &[("filename", "string")] },
    ObjectType { name: "rng-builtin", properties: &[] },
    ObjectType {
        name: "secret",
        properties: &[("data", "string"), ("file", "string"), ("format", "QCryptoSecretFormat")],
    },
    ObjectType {
        name: "memory-backend-ram",
        properties: &[("size", "int"), ("share", "bool"), ("merge", "bool"), ("dump", "bool")],
    },
];

/// Where entropy may come from: the host's generator, whatever it is called.
const ENTROPY: [&str; 2] = ["/dev/urandom", "/dev/random"];

/// What is wrong with an object.
pub fn judge(o: &Object) -> Vec<Fault> {
    let Some(ty) = TYPES.iter().find(|t| t.name == o.qom_type) else {
        let names = TYPES.map(|t| t.name);
        let what = format!("there is no object type '{}'", o.qom_type);
        return vec![Fault::new(what, one_of(&o.qom_type, &names))];
    };
    let mut faults = Vec::new();
    for (key, value) in &o.props {
        let known: Vec<&str> = ty.properties.iter().map(|(n, _)| *n).collect();
        if !known.contains(&key.as_str()) {
            let what = format!("object '{}' has no property '{key}'", o.id);
            faults.push(Fault::new(what, one_of(key, &known)));
        }
        if o.qom_type == "rng-random" && key == "filename" && !ENTROPY.contains(&value.as_str()) {
            let what = format!("entropy cannot come from '{value}'");
            faults.push(Fault::new(what, "use /dev/urandom"));
        }
        if o.qom_type == "secret" && key == "file" && !Path::new(value).exists() {
            let what = format!("secret file '{value}' is not there");
            faults.push(Fault::new(what, "name a file that can be read"));
        }
    }
    faults
}

impl Object {
    /// Whether devices can take entropy from it.
    pub fn is_rng(&self) -> bool {
        self.qom_type.starts_with("rng-")
    }
}
