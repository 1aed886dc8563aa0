//! Disks for network clients: the NBD server of the machine.

use crate::machine::Machine;
use crate::machine::exports::Wanted;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use tandem_backends::nbd::Listener;

crate::object! {
    /// A socket in the file system.
    pub struct UnixSocketAddress {
        /// Its path.
        path: std::path::PathBuf,
    }
    /// A TCP port.
    pub struct InetSocketAddress {
        /// Host name or address to listen at.
        host: String,
        /// The port.
        port: String,
    }
    /// Data of a unix socket's address.
    pub struct UnixSocketAddressWrapper {
        /// It.
        data: UnixSocketAddress,
    }
    /// Data of a TCP port's address.
    pub struct InetSocketAddressWrapper {
        /// It.
        data: InetSocketAddress,
    }
    /// An export.
    pub struct BlockExportInfo {
        /// Its name for commands.
        id: String,
        /// Kind.
        r#type: BlockExportType,
        /// The node.
        node_name: String,
        /// It is going.
        shutting_down: bool,
    }
    /// An export of the NBD server.
    pub struct BlockExportOptionsNbd {
        /// Its name for commands.
        id: String,
        /// The node.
        node_name: String,
        /// Clients may write.
        writable: Option<bool>,
        /// Accepted: a flush follows each write in the drive's own cache mode.
        writethrough: Option<bool>,
        /// Its name for clients; the node's if absent.
        name: Option<String>,
        /// Words about it for people.
        description: Option<String>,
        /// Clients may ask which image of a chain data comes from.
        allocation_depth: Option<bool>,
    }
}

crate::variants! {
    /// Where to listen.
    pub enum SocketAddressLegacy by "type" {
        /// A socket in the file system.
        Unix(UnixSocketAddressWrapper) = "unix",
        /// A TCP port.
        Inet(InetSocketAddressWrapper) = "inet",
    }
    /// An export.
    pub enum BlockExportOptions by "type" {
        /// For NBD clients.
        Nbd(BlockExportOptionsNbd) = "nbd",
    }
}

crate::choice! {
    /// How disks are exported.
    pub enum BlockExportType {
        /// To NBD clients.
        Nbd = "nbd",
    }
    /// What becomes of clients.
    pub enum BlockExportRemoveMode {
        /// They keep the export from going.
        Safe = "safe",
        /// They are disconnected.
        Hard = "hard",
    }
}

crate::events! {
    /// An export is gone.
    BlockExportDeleted = "BLOCK_EXPORT_DELETED" {
        /// Its name for commands.
        id: String,
    }
}

fn listen(at: SocketAddressLegacy) -> std::io::Result<Listener> {
    match at {
        SocketAddressLegacy::Unix(a) => Listener::unix(&a.data.path),
        SocketAddressLegacy::Inet(a) => {
            let port = a.data.port.parse().map_err(|_| {
                std::io::Error::other(format!("'{}' is no number of a port", a.data.port))
            })?;
            Listener::tcp((a.data.host.as_str(), port))
        }
    }
}

fn add(vm: &mut Machine, options: BlockExportOptions) -> Result<Nothing> {
    let BlockExportOptions::Nbd(o) = options;
    let name = o.name.unwrap_or_else(|| o.node_name.clone());
    vm.add_export(Wanted {
        id: o.id,
        name,
        description: o.description.unwrap_or_default(),
        node: o.node_name,
        writable: o.writable.unwrap_or(false),
        allocation_depth: o.allocation_depth.unwrap_or(false),
    })?;
    Ok(Nothing {})
}

fn list(vm: &Machine) -> Vec<BlockExportInfo> {
    let one = |e: &crate::machine::exports::Exported| BlockExportInfo {
        id: e.id.clone(),
        r#type: BlockExportType::Nbd,
        node_name: e.node.clone(),
        shutting_down: false,
    };
    vm.exports().all().iter().map(one).collect()
}

crate::commands! {
    /// Listens for NBD clients.
    fn "nbd-server-start"(cx, {
        /// Where.
        addr: SocketAddressLegacy,
        /// Clients at once, at most; 0: no limit. 100 if absent.
        max_connections: Option<u32>,
    }) -> Nothing {
        let most = max_connections.unwrap_or(100) as usize;
        cx.vm.start_exports(|| listen(addr), most).map(|()| Nothing {})
    }

    /// Exports a node or a disk to NBD clients.
    fn "nbd-server-add"(cx, {
        /// Name of the drive or node.
        device: String,
        /// Name for clients; the same if absent.
        name: Option<String>,
        /// Words about it for people.
        description: Option<String>,
        /// Clients may write.
        writable: Option<bool>,
    }) -> Nothing {
        let id = name.unwrap_or_else(|| device.clone());
        cx.vm.add_export(Wanted {
            name: id.clone(),
            id,
            description: description.unwrap_or_default(),
            node: device,
            writable: writable.unwrap_or(false),
            allocation_depth: false,
        }).map(|()| Nothing {})
    }

    /// Ends an export.
    fn "nbd-server-remove"(cx, {
        /// Its name for clients.
        name: String,
        /// What becomes of those who use it.
        mode: Option<BlockExportRemoveMode>,
    }) -> Nothing {
        let found = cx.vm.exports().all().iter().find(|e| e.name == name).map(|e| e.id.clone());
        let hard = mode == Some(BlockExportRemoveMode::Hard);
        match found {
            Some(id) => cx.vm.remove_export(&id, hard).map(|()| Nothing {}),
            None => Err(Error::new(format!("Export '{name}' is not found"))),
        }
    }

    /// Listens for NBD clients no more, and disconnects those that there are.
    fn "nbd-server-stop"(cx) -> Nothing { cx.vm.stop_exports().map(|()| Nothing {}) }

    /// Exports a node.
    fn "block-export-add"(cx, [ options: BlockExportOptions ]) -> Nothing { add(cx.vm, options) }

    /// Ends an export.
    fn "block-export-del"(cx, {
        /// Its name for commands.
        id: String,
        /// What becomes of those who use it.
        mode: Option<BlockExportRemoveMode>,
    }) -> Nothing {
        let hard = mode == Some(BlockExportRemoveMode::Hard);
        cx.vm.remove_export(&id, hard).map(|()| Nothing {})
    }

    /// Lists the exports.
    fn "query-block-exports"(cx) -> Vec<BlockExportInfo> { Ok(list(cx.vm)) }
}
