//! Networks: where a network card's frames go to and come from.
//!
//! ```text
//!   device (Card) ◄──────── one thread per network ────────► Link (user, tap, stream, dgram)
//!     frames as pieces of guest memory,                        sockets, timers
//!     headers as virtio knows them
//! ```
//!
//! What always holds:
//!
//! * A [`Network`] lives as long as its machine and has one thread, which alone moves frames. A
//!   device joins it with [`Network::attach`] while its driver is ready, and only wakes it
//!   ([`Network::kick`]) when its guest has made buffers available.
//! * After [`Network::detach`] has returned, nothing touches the card or guest memory.
//! * What a network can do for its card, and a card for its network, is data ([`Offloads`]).
//! * Frames are hostile: a link judges every length, and everything that it keeps is bounded.
//! * Lock order: the network's turn → card → whatever the card signals with.

mod gather;
pub mod mac;
pub mod poller;
pub mod socket;
pub mod tap;
pub mod user;
pub mod vsock;
mod worker;

pub use mac::MacAddr;
pub use worker::Network;

use crate::block::pieces::Src;
use poller::{Poller, Ready};
use std::time::Duration;

/// Longest frame: a segment of 64 KiB with its Ethernet and VLAN headers.
pub const MAX_FRAME: usize = 65535 + 14 + 4;
/// Bytes of a [`VnetHeader`].
pub const VNET_HEADER: usize = 12;

/// Work on frames that one side may leave to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP and UDP checksums may be left to be completed.
    pub csum: bool,
    /// TCP segments over IPv4 may be longer than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 may be longer than the MTU.
    pub tso6: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true };
}

/// What is said about a frame apart from its bytes: `struct virtio_net_hdr_v1` (Virtio 1.3
/// §5.1.6), which Linux's tap devices use too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// [`VnetHeader::NEEDS_CSUM`], [`VnetHeader::DATA_VALID`].
    pub flags: u8,
    /// [`VnetHeader::GSO_TCP4`], [`VnetHeader::GSO_TCP6`] or 0.
    pub gso_type: u8,
    /// Length of all headers; a hint.
    pub hdr_len: u16,
    /// Payload of each segment that a long frame stands for.
    pub gso_size: u16,
    /// Where the checksummed bytes start.
    pub csum_start: u16,
    /// Where the checksum belongs, from there.
    pub csum_offset: u16,
    /// Buffers that the frame takes.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// The checksum is yet to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum is right.
    pub const DATA_VALID: u8 = 2;
    /// TCP over IPv4, to be segmented.
    pub const GSO_TCP4: u8 = 1;
    /// TCP over IPv6, to be segmented.
    pub const GSO_TCP6: u8 = 4;

    /// The bytes of the header.
    pub fn to_bytes(self) -> [u8; VNET_HEADER] {
        let mut b = [0; VNET_HEADER];
        (b[0], b[1]) = (self.flags, self.gso_type);
        let words =
            [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, w) in b[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&w.to_le_bytes());
        }
        b
    }

    /// A header from its bytes.
    pub fn from_bytes(b: [u8; VNET_HEADER]) -> VnetHeader {
        let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        VnetHeader {
            flags: b[0],
            gso_type: b[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The guest has it, or does not want it.
    Done,
    /// There is no room; the card wakes the network when there is.
    Full,
}

/// What a link does with a frame of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The next one, please.
    More,
    /// This one was taken and must be the last for now.
    Enough,
}

/// A network card, as its network sees it. Called by the network's thread.
pub trait Card: Send + Sync {
    /// What the guest lets its network leave undone.
    fn offloads(&self) -> Offloads;
    /// Hands frames that the guest sends to `take`, a bounded number of them. Returns whether there
    /// may be more; if not, the card wakes the network for the next.
    fn transmit(&self, take: &mut dyn FnMut(&VnetHeader, &Src<'_>) -> Taken) -> bool;
    /// Gives the guest a frame, in parts. `flow` is the same for frames of one conversation.
    fn receive(&self, header: &VnetHeader, parts: &[&[u8]], flow: u32) -> Delivery;
    /// Tells the guest of what it was given.
    fn commit(&self);
}

/// A network's far side. Owned by the network's thread.
pub trait Link: Send {
    /// What the guest may leave undone.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    /// Puts its descriptors into the network's set.
    fn start(&mut self, poller: &Poller) -> std::io::Result<()>;
    /// A card has come: what the guest's driver negotiated may have changed.
    fn attached(&mut self, _card: &dyn Card) {}
    /// Moves frames both ways as far as can be done at once; bounded. `ready` says which
    /// descriptors have become ready since the last turn. Returns how long to sleep if nothing
    /// happens: `None` for ever, zero to be called again at once.
    fn turn(&mut self, card: &dyn Card, poller: &Poller, ready: &[Ready]) -> Option<Duration>;
}
