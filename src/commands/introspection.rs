//! What the interface offers: negotiation, commands, events, schema.

use crate::qapi::define::Nothing;
use crate::qapi::schema::Schema;
use crate::qapi::{self, Error};
use serde_json::Value;

crate::object! {
    /// A command that can be called.
    pub struct CommandInfo {
        /// Name.
        name: String,
    }
    /// An event that can be sent.
    pub struct EventInfo {
        /// Name.
        name: String,
    }
}

crate::choice! {
    /// A capability that a client may enable.
    pub enum QmpCapability {
        /// Out-of-band execution of commands that allow it; no command does so far.
        Oob = "oob",
    }
}

crate::commands! {
    /// Ends the negotiation of capabilities. The first command of a session.
    fn "qmp_capabilities"(cx, {
        /// Capabilities to enable, of those that the greeting lists.
        enable: Option<Vec<QmpCapability>>,
    }) -> Nothing {
        let _ = cx;
        match enable.unwrap_or_default().first() {
            Some(c) => Err(Error::new(format!("Capability '{}' is not available", c.word()))),
            None => Ok(Nothing {}),
        }
    }

    /// Lists all commands.
    fn "query-commands"(_cx) -> Vec<CommandInfo> {
        Ok(qapi::commands().iter().map(|c| CommandInfo { name: c.name.into() }).collect())
    }

    /// Lists all events.
    fn "query-events"(_cx) -> Vec<EventInfo> {
        Ok(qapi::events().iter().map(|e| EventInfo { name: e.name.into() }).collect())
    }

    /// Describes all commands, events and their types.
    fn "query-qmp-schema"(_cx) -> Vec<Value> {
        Ok(Schema::whole().to_json())
    }
}
