//! What is wrong with a configuration.

use std::fmt;

/// One fault: what is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    what: String,
    remedy: String,
}

impl Fault {
    /// `what` names the thing and what is wrong with it; `remedy` says what to do. Both are clauses
    /// without a final period.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remedy.as_str() {
            "" => f.write_str(&self.what),
            remedy => write!(f, "{}; {remedy}", self.what),
        }
    }
}

impl From<tandem_devices::registry::DeviceFault> for Fault {
    fn from(f: tandem_devices::registry::DeviceFault) -> Fault {
        Fault { what: f.what, remedy: f.remedy }
    }
}

/// A sentence of the treaty already holds its remedy.
impl From<tandem_accel::Error> for Fault {
    fn from(e: tandem_accel::Error) -> Fault {
        Fault { what: e.to_string(), remedy: String::new() }
    }
}
