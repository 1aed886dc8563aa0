//! Disks that network clients use while the guest runs: the machine's NBD server.

use super::Machine;
use crate::commands::exports::BlockExportDeleted;
use crate::qapi::{Error, Result};
use std::sync::Arc;
use tandem_backends::block::drive::Drive;
use tandem_backends::nbd::{Export, Listener, Server};

/// An export with its names.
pub struct Exported {
    /// Name for commands.
    pub id: String,
    /// Name for clients.
    pub name: String,
    /// The node.
    pub node: String,
    drive: Arc<Drive>,
}

/// The server and what it serves.
#[derive(Default)]
pub struct Exports {
    server: Option<Server>,
    all: Vec<Exported>,
}

/// What a client of a command wants exported.
pub struct Wanted {
    /// Name for commands.
    pub id: String,
    /// Name for clients.
    pub name: String,
    /// Words for people.
    pub description: String,
    /// The node.
    pub node: String,
    /// Clients may write.
    pub writable: bool,
    /// Clients may ask for `qemu:allocation-depth`.
    pub allocation_depth: bool,
}

impl Exports {
    /// All, oldest first.
    pub fn all(&self) -> &[Exported] {
        &self.all
    }

    /// The export that uses a drive.
    pub fn user_of(&self, drive: &Arc<Drive>) -> Option<&str> {
        self.all.iter().find(|e| Arc::ptr_eq(&e.drive, drive)).map(|e| e.id.as_str())
    }

    /// Hangs up on everybody; the machine is at its end.
    pub fn end(&mut self) {
        self.server = None;
        self.all.clear();
    }

    fn running(&self) -> Result<&Server> {
        self.server.as_ref().ok_or_else(|| Error::new("NBD server not running"))
    }
}

impl Machine {
    /// Exports.
    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Listens for clients, at most so many at once.
    pub fn start_exports(
        &mut self,
        listen: impl FnOnce() -> std::io::Result<Listener>,
        most: usize,
    ) -> Result<()> {
        if self.exports.server.is_some() {
            return Err(Error::new("NBD server already running"));
        }
        let most = if most == 0 { usize::MAX } else { most };
        let server = listen().and_then(|l| Server::start(l, most, [], Box::new(|| ())));
        let server =
            server.map_err(|e| Error::new(format!("cannot listen for NBD clients: {e}")))?;
        self.exports.server = Some(server);
        Ok(())
    }

    /// Hangs up on everybody, and listens no more.
    pub fn stop_exports(&mut self) -> Result<()> {
        self.exports.running()?;
        self.exports.server = None;
        for e in std::mem::take(&mut self.exports.all) {
            self.hub.emit(BlockExportDeleted { id: e.id });
        }
        Ok(())
    }

    /// Adds an export.
    pub fn add_export(&mut self, w: Wanted) -> Result<()> {
        if self.exports.all.iter().any(|e| e.id == w.id) {
            return Err(Error::new(format!("Block export id '{}' is already in use", w.id)));
        }
        let server = self.exports.running()?;
        let (key, drive) = self.find_node(&w.node)?;
        if w.writable {
            if drive.read_only() {
                return Err(Error::new(format!("Block node '{key}' is read-only")));
            }
            if let Some(why) = self.user_of(&key) {
                let text = format!("Node '{key}' cannot be written by clients: {why}");
                return Err(Error::new(text));
            }
        }
        let taken = || Error::new(format!("NBD server already has export named '{}'", w.name));
        let export = Export {
            name: w.name.clone(),
            description: w.description,
            read_only: !w.writable,
            multi_conn: true,
            allocation_depth: w.allocation_depth,
            ..Export::whole(drive.clone())
        };
        if !server.add(export) {
            return Err(taken());
        }
        self.exports.all.push(Exported { id: w.id, name: w.name, node: key, drive });
        Ok(())
    }

    /// Removes an export; by force also one that clients use.
    pub fn remove_export(&mut self, id: &str, hard: bool) -> Result<()> {
        let found = self.exports.all.iter().position(|e| e.id == id);
        let index = found.ok_or_else(|| Error::new(format!("Export '{id}' is not found")))?;
        let server = self.exports.running()?;
        let name = self.exports.all[index].name.clone();
        if !hard && server.users(&name) > 0 {
            return Err(Error::new(format!(
                "export '{id}' still in use; use mode='hard' to force client disconnect"
            )));
        }
        server.remove(&name, hard);
        let gone = self.exports.all.remove(index);
        self.hub.emit(BlockExportDeleted { id: gone.id });
        Ok(())
    }
}
