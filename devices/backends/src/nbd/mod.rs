//! Network block devices: a server that exports drives (NBD protocol, fixed newstyle handshake).
//!
//! ```text
//!   listener ──► Server (one thread: accepts, counts) ──► connection thread
//!                  │                                         │ handshake: which export, what extras
//!                  └── exports: name → Export ◄──────────────┤
//!                                                            │ transfer: requests ──► block::Engine
//!                                                            └─────────── replies ◄── its threads
//! ```
//!
//! What always holds:
//!
//! * Clients are hostile. Every length is judged before anything is allocated for it; a client
//!   holds at most [`transfer::MAX_IN_FLIGHT`] requests and [`transfer::MAX_BYTES`] of buffers; one
//!   that does not finish its handshake in [`handshake::PATIENCE`] is sent away.
//! * A request that makes no sense is answered with an error where the stream stays in step, and
//!   ends the connection where it cannot. It never ends the server.
//! * What a flush, or a write with FUA, was answered for is durable as the drive's cache mode says.
//! * An export that is removed stays usable for the clients that have it.

mod handshake;
mod proto;
mod server;
mod stream;
#[cfg(test)]
mod tests;
mod transfer;

pub use server::{Listener, Server};

use crate::block::drive::Drive;
use std::sync::Arc;

/// A drive, or a part of one, that clients may use.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its name; clients that name none ask for the empty name. At most 4096 bytes.
    pub name: String,
    /// Words about it for people. At most 4096 bytes.
    pub description: String,
    /// What is exported.
    pub drive: Arc<Drive>,
    /// First byte of the drive that clients see.
    pub offset: u64,
    /// Bytes that clients see.
    pub size: u64,
    /// Clients cannot write, whatever the drive allows.
    pub read_only: bool,
    /// Several clients may use it at once and see each other's flushed writes.
    pub multi_conn: bool,
    /// Clients may ask how many images lie in front of the one that data comes from
    /// (`qemu:allocation-depth`).
    pub allocation_depth: bool,
}

impl Export {
    /// All of `drive`, under the empty name.
    pub fn whole(drive: Arc<Drive>) -> Export {
        Export {
            name: String::new(),
            description: String::new(),
            offset: 0,
            size: drive.size(),
            read_only: drive.read_only(),
            drive,
            multi_conn: false,
            allocation_depth: false,
        }
    }
}
