//! Monitors: the doors through which programs and people manage a machine.
//!
//! ```text
//!   sockets, terminals ──► server (its own thread) ──► session: frames, requests ──► the inbox
//!          ▲                                                                            │
//!          └── each session's outbox ◄── replies ◄── qapi commands ◄── the main loop ◄──┘
//!                       ▲
//!                       └── events, from any thread (Hub::emit)
//! ```
//!
//! What always holds:
//!
//! * All commands run on the main loop's thread, one after another; replies of a session come in the
//!   order of its requests. What a command causes is told as events before the command's reply.
//! * No client can disturb the machine or other clients: input is read no faster than requests are
//!   answered ([`session::MAX_PENDING`]), a message has a limited size and depth, and a client that
//!   does not read is hung up on when [`session::MAX_OUTPUT`] bytes wait for it.

pub mod endpoint;
pub mod framer;
pub mod hub;
pub mod human;
pub mod server;
pub mod session;

pub use hub::Hub;
pub use server::Server;
