//! Migration and snapshots of machines, of which there are none yet: clients learn that by asking.

use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};

crate::choice! {
    /// What migration can do.
    pub enum MigrationCapability {
        /// Progress is told by events.
        Events = "events",
    }
}

crate::object! {
    /// Whether a capability is on.
    pub struct MigrationCapabilityStatus {
        /// The capability.
        capability: MigrationCapability,
        /// Whether it is on.
        state: bool,
    }
    /// A migration.
    pub struct MigrationInfo {
        /// How far it is; absent if there has been none.
        status: Option<String>,
    }
}

fn none<T>() -> Result<T> {
    Err(Error::new("this program cannot migrate machines yet"))
}

crate::commands! {
    /// Tells what migration can do.
    fn "query-migrate-capabilities"(_cx) -> Vec<MigrationCapabilityStatus> {
        Ok(vec![MigrationCapabilityStatus { capability: MigrationCapability::Events, state: true }])
    }

    /// Turns capabilities of migration on or off. Events are always on.
    fn "migrate-set-capabilities"(_cx, {
        /// The capabilities.
        capabilities: Vec<MigrationCapabilityStatus>,
    }) -> Nothing {
        let _ = capabilities;
        Ok(Nothing {})
    }

    /// Tells about the migration that runs or ran: there is none.
    fn "query-migrate"(_cx) -> MigrationInfo { Ok(MigrationInfo { status: None }) }

    /// Sends the machine elsewhere. Always fails so far.
    fn "migrate"(_cx, {
        /// Where to.
        uri: Option<String>,
        /// Return before it is done.
        detach: Option<bool>,
        /// Go on with one that was interrupted.
        resume: Option<bool>,
    }) -> Nothing {
        let _ = (uri, detach, resume);
        none()
    }
}
