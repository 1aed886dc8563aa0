//! The management interface as definitions: every command, event and type is written down once, and
//! that one definition is its parser, its validator, its entry in `query-qmp-schema` and its
//! documentation.
//!
//! What always holds:
//!
//! * What a client sends is judged by [`Type::read`] alone, which names the parameter at fault by its
//!   path (`backend.data.path`). A command's code sees typed values only.
//! * A type that [`schema`] tells about is the type that is read and written: both come from the
//!   macros in [`define`].
//! * Commands and events register themselves where they are written; no file lists them all.
//!
//! The wire format is QEMU's (docs/interop/qmp-spec, QAPI schema introspection).

pub mod define;
mod primitive;
pub mod reference;
pub mod schema;

use schema::Schema;
use serde_json::{Map, Value};
use std::fmt;

/// Members of a JSON object.
pub type Members = Map<String, Value>;

/// Error classes of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// There is no such command, or not now.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// Nothing goes on there that the command could be about.
    DeviceNotActive,
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Class.
    pub class: ErrorClass,
    /// What is wrong, for people.
    pub text: String,
}

/// Result of a command.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error without a class of its own.
    pub fn new(text: impl Into<String>) -> Error {
        Error { class: ErrorClass::GenericError, text: text.into() }
    }

    /// There is no such device.
    pub fn no_device(text: impl Into<String>) -> Error {
        Error { class: ErrorClass::DeviceNotFound, text: text.into() }
    }

    /// There is no such command.
    pub fn no_command(text: impl Into<String>) -> Error {
        Error { class: ErrorClass::CommandNotFound, text: text.into() }
    }

    /// Nothing goes on there.
    pub fn not_active(text: impl Into<String>) -> Error {
        Error { class: ErrorClass::DeviceNotActive, text: text.into() }
    }

    /// As the protocol writes it.
    pub fn to_json(&self) -> Value {
        serde_json::json!({ "class": format!("{:?}", self.class), "desc": self.text })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<tandem_accel::Error> for Error {
    fn from(e: tandem_accel::Error) -> Error {
        Error::new(e.to_string())
    }
}

impl From<crate::config::Fault> for Error {
    fn from(f: crate::config::Fault) -> Error {
        Error::new(f.to_string())
    }
}

/// Several faults as one error.
pub fn faults<F: fmt::Display>(all: impl IntoIterator<Item = F>) -> Error {
    let all: Vec<String> = all.into_iter().map(|f| f.to_string()).collect();
    Error::new(all.join("; and "))
}

/// Whether a name can name an object: a letter first, then letters, digits, `-`, `.` and `_`.
pub fn is_well_formed_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// Where a value stands in what a client sent: the names on the way to it.
#[derive(Clone, Copy)]
pub struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Root,
    Member(&'a str),
    Index(usize),
}

impl<'a> Path<'a> {
    /// A command's arguments as a whole.
    pub const ROOT: Path<'static> = Path { parent: None, step: Step::Root };

    /// A member of what stands here.
    pub fn member(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), step: Step::Member(name) }
    }

    /// An element of what stands here.
    pub fn index(&'a self, i: usize) -> Path<'a> {
        Path { parent: Some(self), step: Step::Index(i) }
    }

    /// The error of a value that is not what is `expected`.
    pub fn expected(&self, expected: &str) -> Error {
        Error::new(format!("Invalid parameter type for '{self}', expected: {expected}"))
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.parent.filter(|p| !matches!(p.step, Step::Root));
        if let Some(p) = inner {
            p.fmt(f)?;
        }
        match self.step {
            Step::Root => f.write_str("arguments"),
            Step::Member(name) if inner.is_some() => write!(f, ".{name}"),
            Step::Member(name) => f.write_str(name),
            Step::Index(i) => write!(f, "[{i}]"),
        }
    }
}

/// A type of the interface.
pub trait Type: Sized {
    /// Reads a value that stands at `at`.
    fn read(value: Value, at: &Path<'_>) -> Result<Self>;
    /// Writes it.
    fn write(self) -> Value;
    /// Tells `schema` about the type and those it is made of; returns its name there.
    fn describe(schema: &mut Schema) -> String;

    /// Whether it may be left out.
    const OPTIONAL: bool = false;
    /// What it is when left out.
    fn absent(at: &Path<'_>) -> Result<Self> {
        Err(Error::new(format!("Parameter '{at}' is missing")))
    }
    /// Puts it among an object's members.
    fn put(self, name: &str, into: &mut Members) {
        into.insert(name.to_string(), self.write());
    }
}

/// A type that is an object: its members can stand among others'.
pub trait Object: Type {
    /// Takes its members out of `members`; leaves others.
    fn take(members: &mut Members, at: &Path<'_>) -> Result<Self>;
    /// Adds its members.
    fn give(self, into: &mut Members);
    /// Its members for the schema.
    fn members(schema: &mut Schema) -> Vec<schema::Member>;
    /// Its variants for the schema, if it has: the member that tells them apart, and each value's
    /// type.
    fn variants(_schema: &mut Schema) -> Option<(&'static str, Vec<(&'static str, String)>)> {
        None
    }
}

/// Takes the member `name`.
pub fn field<T: Type>(members: &mut Members, name: &str, at: &Path<'_>) -> Result<T> {
    let here = at.member(name);
    match members.remove(name) {
        Some(v) => T::read(v, &here),
        None => T::absent(&here),
    }
}

/// Reads an object that has no further members.
pub fn read_object<T: Object>(value: Value, at: &Path<'_>) -> Result<T> {
    let Value::Object(mut members) = value else { return Err(at.expected("object")) };
    let read = T::take(&mut members, at)?;
    match members.keys().next() {
        Some(name) => Err(Error::new(format!("Parameter '{}' is unexpected", at.member(name)))),
        None => Ok(read),
    }
}

/// What a command runs in.
pub struct Context<'a> {
    /// The machine.
    pub vm: &'a mut crate::machine::Machine,
    /// The session that asked; absent for a monitor for people.
    pub session: Option<&'a std::sync::Arc<crate::monitor::session::Session>>,
}

/// A command.
pub struct Command {
    /// Name.
    pub name: &'static str,
    /// What it does, by lines.
    pub doc: &'static [&'static str],
    /// Features for the schema.
    pub features: &'static [&'static str],
    /// Describes its arguments.
    pub arguments: fn(&mut Schema) -> String,
    /// Describes what it returns.
    pub returns: fn(&mut Schema) -> String,
    /// Reads its arguments and runs it.
    pub run: fn(&mut Context<'_>, Members) -> Result<Value>,
}

tandem_devices::inventory::collect!(Command);

/// An event.
pub struct EventType {
    /// Name.
    pub name: &'static str,
    /// When it is sent, by lines.
    pub doc: &'static [&'static str],
    /// Describes its data.
    pub data: fn(&mut Schema) -> String,
}

tandem_devices::inventory::collect!(EventType);

/// An event with its data.
pub trait Event: Object {
    /// Its name on the wire.
    const EVENT: &'static str;
}

/// All commands by name.
pub fn commands() -> Vec<&'static Command> {
    let mut all: Vec<_> = tandem_devices::inventory::iter::<Command>.into_iter().collect();
    all.sort_by_key(|c| c.name);
    all
}

/// The command called `name`.
pub fn command(name: &str) -> Result<&'static Command> {
    tandem_devices::inventory::iter::<Command>
        .into_iter()
        .find(|c| c.name == name)
        .ok_or_else(|| Error::no_command(format!("The command {name} has not been found")))
}

/// All events by name.
pub fn events() -> Vec<&'static EventType> {
    let mut all: Vec<_> = tandem_devices::inventory::iter::<EventType>.into_iter().collect();
    all.sort_by_key(|e| e.name);
    all
}
