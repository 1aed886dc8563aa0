//! `tandem-backends`: what only the host sees. Buffers in, buffers out: nothing here knows a guest
//! address or a device register.

pub mod block;
pub mod chardev;
pub mod crc32;
pub mod entropy;
pub mod fdset;
pub mod nbd;
pub mod net;
pub mod p9;
pub mod picture;
pub mod rom;
