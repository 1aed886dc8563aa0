//! Objects: the tree of what the machine is made of, and the types of which there can be objects.

use super::cpu;
use super::devices::{ObjectPropertyInfo, type_name};
use crate::config::validate::MACHINES;
use crate::config::{Device, Object};
use crate::machine::Machine;
use crate::machine::objects;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Members, Result};
use serde_json::Value;
use tandem_accel::x86::model::models;
use tandem_devices::registry::{self, BusKind, NON_TRANSITIONAL, PropertyKind};

crate::object! {
    /// A type of object.
    pub struct ObjectTypeInfo {
        /// Name.
        name: String,
        /// It has no objects of its own.
        r#abstract as "abstract": Option<bool>,
        /// The type that it extends.
        parent: Option<String>,
    }
}

fn ty(name: impl Into<String>, parent: &str) -> ObjectTypeInfo {
    ObjectTypeInfo { name: name.into(), r#abstract: None, parent: Some(parent.into()) }
}

/// All types.
fn types() -> Vec<ObjectTypeInfo> {
    let mut all = Vec::new();
    for (accel, built) in [("tcg", cfg!(feature = "tcg")), ("kvm", cfg!(feature = "kvm"))] {
        all.extend(built.then(|| ty(format!("{accel}-accel"), "accel")));
    }
    // Clients take it that every machine knows memory in files, even one that has none.
    for parent in ["accel", "machine", "device", "cpu", "memory-backend-file"] {
        all.push(ObjectTypeInfo {
            name: parent.into(),
            r#abstract: Some(true),
            parent: Some("object".into()),
        });
    }
    all.extend(MACHINES.iter().map(|m| ty(format!("{m}-machine"), "machine")));
    all.extend(models().iter().map(|m| ty(cpu::type_name(m.name), "cpu")));
    for t in registry::types() {
        all.push(ty(t.name, "device"));
        if t.bus == BusKind::Pci && t.name.starts_with("virtio-") {
            all.push(ty(format!("{}{NON_TRANSITIONAL}", t.name), t.name));
        }
    }
    all.extend(objects::TYPES.iter().map(|t| ty(t.name, "object")));
    all
}

fn list_types(implements: Option<String>, with_abstract: Option<bool>) -> Vec<ObjectTypeInfo> {
    let all = types();
    let parent = |n: &str| all.iter().find(|t| t.name == n).and_then(|t| t.parent.clone());
    let is_a = |t: &ObjectTypeInfo, what: &str| {
        let mut at = Some(t.name.clone());
        while let Some(n) = at {
            if n == what {
                return true;
            }
            at = parent(&n);
        }
        false
    };
    let shown = |t: &&ObjectTypeInfo| {
        (with_abstract == Some(true) || t.r#abstract != Some(true))
            && implements.as_deref().is_none_or(|i| is_a(t, i))
    };
    all.iter().filter(shown).cloned().collect()
}

fn property(name: &str, ty: &str) -> ObjectPropertyInfo {
    ObjectPropertyInfo {
        name: name.into(),
        r#type: ty.into(),
        description: None,
        default_value: None,
    }
}

/// Properties of the type `name`.
fn type_properties(name: &str) -> Result<Vec<ObjectPropertyInfo>> {
    if let Some(t) = objects::TYPES.iter().find(|t| t.name == name) {
        let own = t.properties.iter().map(|(n, ty)| property(n, ty));
        return Ok(own.chain([property("type", "string")]).collect());
    }
    if let Ok(t) = registry::find(name) {
        return Ok(t.properties().map(|p| property(p.name, type_name(p.kind))).collect());
    }
    match types().iter().any(|t| t.name == name) {
        true => Ok(vec![property("type", "string")]),
        false => Err(Error::no_device(format!("Class '{name}' not found"))),
    }
}

/// An object of the tree.
enum Node<'a> {
    Root,
    Machine,
    Peripherals,
    Unattached,
    Objects,
    Device(&'a Device),
    Object(&'a Object),
    Cpu,
}

fn id_of(d: &Device) -> Option<&str> {
    d.props.iter().find(|(k, _)| k == "id").map(|(_, v)| v.as_str())
}

/// The object at `path`: absolute, or the name of a device or object.
fn find<'a>(vm: &'a Machine, path: &str) -> Result<Node<'a>> {
    let config = vm.config();
    let missing = || Error::no_device(format!("Device '{path}' not found"));
    let device = |id: &str| config.devices.iter().find(|d| id_of(d) == Some(id));
    let object = |id: &str| config.objects.iter().find(|o| o.id == id);
    let path = path.strip_suffix('/').filter(|p| !p.is_empty()).unwrap_or(path);
    match path {
        "/" => return Ok(Node::Root),
        "/machine" => return Ok(Node::Machine),
        "/machine/peripheral" => return Ok(Node::Peripherals),
        "/machine/unattached" => return Ok(Node::Unattached),
        "/objects" => return Ok(Node::Objects),
        _ => {}
    }
    if let Some(id) = path.strip_prefix("/objects/") {
        return object(id).map(Node::Object).ok_or_else(missing);
    }
    if let Some(rest) = path.strip_prefix("/machine/unattached/device[") {
        let index = rest.strip_suffix(']').and_then(|n| n.parse().ok());
        return index
            .filter(|i: &usize| *i < vm.vcpus().count())
            .map(|_| Node::Cpu)
            .ok_or_else(missing);
    }
    let id = path.strip_prefix("/machine/peripheral/").unwrap_or(path);
    let found = device(id).map(Node::Device).or_else(|| object(id).map(Node::Object));
    found.ok_or_else(missing)
}

/// The properties of an object with their values.
fn values(vm: &Machine, node: &Node<'_>) -> Vec<(ObjectPropertyInfo, Value)> {
    let config = vm.config();
    let text = |name: &str, v: &str| (property(name, "string"), Value::from(v));
    let child = |name: &str, ty: &str, path: &str| {
        (property(name, &format!("child<{ty}>")), Value::from(path))
    };
    match node {
        Node::Root => vec![
            text("type", "container"),
            child("machine", &format!("{}-machine", config.machine), "/machine"),
            child("objects", "container", "/objects"),
        ],
        Node::Machine => vec![
            text("type", &format!("{}-machine", config.machine)),
            text("accel", vm.accel().name()),
            child("peripheral", "container", "/machine/peripheral"),
            child("unattached", "container", "/machine/unattached"),
        ],
        Node::Peripherals => {
            let mut all = vec![text("type", "container")];
            for d in &config.devices {
                if let Some(id) = id_of(d) {
                    all.push(child(id, &d.driver, &format!("/machine/peripheral/{id}")));
                }
            }
            all
        }
        Node::Unattached => {
            let mut all = vec![text("type", "container")];
            for i in 0..vm.vcpus().count() {
                all.push(child(&format!("device[{i}]"), &cpu_type(vm), &cpu::path(i)));
            }
            all
        }
        Node::Objects => {
            let mut all = vec![text("type", "container")];
            for o in &config.objects {
                all.push(child(&o.id, &o.qom_type, &format!("/objects/{}", o.id)));
            }
            all
        }
        Node::Device(d) => device_values(d),
        Node::Object(o) => {
            let mut all = vec![text("type", &o.qom_type)];
            // A secret is not told.
            let shown = o.props.iter().filter(|(k, _)| k != "data");
            all.extend(shown.map(|(k, v)| text(k, v)));
            all
        }
        Node::Cpu => {
            vec![text("type", &cpu_type(vm)), (property("hotpluggable", "bool"), false.into())]
        }
    }
}

fn cpu_type(vm: &Machine) -> String {
    cpu::type_name(vm.config().cpu.split(',').next().unwrap_or_default())
}

fn device_values(d: &Device) -> Vec<(ObjectPropertyInfo, Value)> {
    let mut all = vec![(property("type", "string"), Value::from(d.driver.as_str()))];
    let Ok((ty, props)) = registry::check(&d.driver, &d.props) else { return all };
    for p in ty.properties() {
        let value = match props.get(p.name) {
            Some(registry::Value::Bool(b)) => Value::from(*b),
            Some(registry::Value::Uint(n)) => Value::from(*n),
            Some(registry::Value::Text(t)) => Value::from(t.as_str()),
            Some(other) => match d.props.iter().find(|(k, _)| k == p.name) {
                Some((_, text)) => Value::from(text.as_str()),
                None => Value::from(format!("{other:?}")),
            },
            None if matches!(p.kind, PropertyKind::Bool) => Value::from(false),
            None => Value::from(""),
        };
        all.push((property(p.name, type_name(p.kind)), value));
    }
    all
}

fn get(vm: &Machine, path: &str, name: &str) -> Result<Value> {
    let all = values(vm, &find(vm, path)?);
    all.into_iter()
        .find(|(p, _)| p.name == name)
        .map(|(_, v)| v)
        .ok_or_else(|| no_property(path, name))
}

fn no_property(path: &str, name: &str) -> Error {
    Error::new(format!("Property '{path}.{name}' not found"))
}

fn set(vm: &Machine, path: &str, name: &str) -> Result<Nothing> {
    get(vm, path, name)?;
    Err(Error::new(format!(
        "Property '{path}.{name}' cannot be changed while the machine is there"
    )))
}

fn object_add(vm: &mut Machine, mut members: Members) -> Result<Nothing> {
    let at = crate::qapi::Path::ROOT;
    let qom_type: String = crate::qapi::field(&mut members, "qom-type", &at)?;
    let id: String = crate::qapi::field(&mut members, "id", &at)?;
    let text = |v: Value| match v {
        Value::String(s) => s,
        Value::Bool(b) => if b { "on" } else { "off" }.into(),
        other => other.to_string(),
    };
    let props = members.into_iter().map(|(k, v)| (k, text(v))).collect();
    let o = Object { qom_type, id, props };
    let faults = objects::judge(&o);
    if !faults.is_empty() {
        return Err(crate::qapi::faults(faults));
    }
    if o.qom_type == "memory-backend-ram" {
        return Err(Error::new("memory cannot be plugged in"));
    }
    vm.add_object(o)?;
    Ok(Nothing {})
}

crate::choice! {
    /// Types of objects.
    pub enum ObjectType {
        /// Entropy from a file.
        RngRandom = "rng-random",
        /// Entropy from the host's generator.
        RngBuiltin = "rng-builtin",
        /// A secret.
        Secret = "secret",
        /// Guest memory; only on the command line.
        MemoryBackendRam = "memory-backend-ram",
    }
}

crate::object! {
    /// What all objects have.
    struct ObjectBase {
        /// Type.
        qom_type: ObjectType,
        /// Name.
        id: String,
        /// Of `rng-random`: the file.
        filename: Option<String>,
        /// Of `secret`: the secret itself.
        data: Option<String>,
        /// Of `secret`: the file that holds it.
        file: Option<String>,
        /// Of `secret`: how it is written.
        format: Option<String>,
        /// Of `memory-backend-ram`: bytes.
        size: Option<u64>,
    }
}

crate::commands! {
    /// Lists the types of objects.
    fn "qom-list-types"(_cx, {
        /// Only types that are this type or extend it.
        implements: Option<String>,
        /// Abstract types, too.
        r#abstract as "abstract": Option<bool>,
    }) -> Vec<ObjectTypeInfo> { Ok(list_types(implements, r#abstract)) }

    /// Lists the properties of a type.
    fn "qom-list-properties"(_cx, {
        /// The type.
        typename: String,
    }) -> Vec<ObjectPropertyInfo> { type_properties(&typename) }

    /// Lists the properties of an object, among them its children.
    fn "qom-list"(cx, {
        /// Path of the object.
        path: String,
    }) -> Vec<ObjectPropertyInfo> {
        let vm = &*cx.vm;
        Ok(values(vm, &find(vm, &path)?).into_iter().map(|(p, _)| p).collect())
    }

    /// Gets a property of an object.
    fn "qom-get"(cx, {
        /// Path of the object.
        path: String,
        /// The property.
        property: String,
    }) -> Value { get(cx.vm, &path, &property) }

    /// Sets a property of an object.
    fn "qom-set"(cx, {
        /// Path of the object.
        path: String,
        /// The property.
        property: String,
        /// Its new value.
        value: Value,
    }) -> Nothing {
        let _ = value;
        set(cx.vm, &path, &property)
    }

    /// Makes an object that devices can use.
    fn "object-add"(cx, [ options: ObjectBase ]) -> Nothing {
        let Value::Object(members) = crate::qapi::Type::write(options) else {
            return Err(Error::new("no object"));
        };
        object_add(cx.vm, members)
    }

    /// Removes an object that nobody uses.
    fn "object-del"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { cx.vm.remove_object(&id).map(|()| Nothing {}) }
}
