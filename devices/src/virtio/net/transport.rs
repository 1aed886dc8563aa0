//! Frames in and out of queues: what the network card shares with other devices whose requests are
//! frames.

use crate::virtio::queue::{Chain, VirtQueue};
use tandem_accel::memory::GuestRam;
use tandem_backends::block::pieces::{Pieces, Src};
use tandem_backends::net::{Delivery, MAX_FRAME, VNET_HEADER, VnetHeader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Descriptors of one frame that are looked at.
const MAX_PIECES: usize = 1024;

/// A receive queue and whether its driver has yet to be told of frames.
#[derive(Default)]
pub struct Rx {
    queue: Option<VirtQueue>,
    told: bool,
    /// Buffers of the frame being received, kept for their room.
    heads: Vec<(u16, u32)>,
}

/// The buffers that the driver has filled: a header of `N` bytes and the rest. `None` if they make
/// no sense. The caller keeps `ram` for as long as the rest is used.
pub fn chain_pieces<const N: usize>(
    ram: &GuestRam,
    chain: Chain<'_>,
) -> Option<([u8; N], Src<'static>)> {
    let mut header = [0; N];
    let mut have = 0;
    let mut total = 0usize;
    let mut iov: Vec<libc::iovec> = Vec::with_capacity(8);
    for d in chain {
        if d.is_write_only() {
            return None;
        }
        let (mut addr, mut len) = (d.addr(), d.len() as usize);
        if have < N {
            let n = len.min(N - have);
            ram.read_slice(&mut header[have..have + n], addr).ok()?;
            have += n;
            addr = GuestAddress(addr.0.checked_add(n as u64)?);
            len -= n;
        }
        total = total.checked_add(len)?;
        if total > MAX_FRAME || iov.len() > MAX_PIECES {
            return None;
        }
        if len > 0 {
            for slice in ram.get_slices(addr, len) {
                let slice = slice.ok()?;
                let guard = slice.ptr_guard_mut();
                iov.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
        }
    }
    if have < N || total == 0 {
        return None;
    }
    // SAFETY: each piece is mapped guest memory, accessed by address only; the caller keeps it.
    Some((header, unsafe { Pieces::from_raw(iov) }))
}

/// Bytes that a chain can be filled with; 0 if it makes no sense.
fn room(chain: Chain<'_>) -> u32 {
    let mut room = 0u32;
    for d in chain {
        if !d.is_write_only() {
            return 0;
        }
        room = room.saturating_add(d.len());
    }
    room
}

/// Bytes to be copied, in parts.
pub struct Parts<'a> {
    parts: &'a [&'a [u8]],
    at: usize,
}

impl<'a> Parts<'a> {
    /// All of `parts`.
    pub fn new(parts: &'a [&'a [u8]]) -> Parts<'a> {
        Parts { parts, at: 0 }
    }

    /// The next bytes that lie together, at most `n`.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        while let Some((first, rest)) = self.parts.split_first() {
            if self.at < first.len() {
                let end = first.len().min(self.at + n);
                let part = &first[self.at..end];
                self.at = end;
                return part;
            }
            (self.parts, self.at) = (rest, 0);
        }
        &[]
    }
}

/// Copies parts into a chain; returns how many bytes, or `None` if a buffer is not in memory.
fn scatter(ram: &GuestRam, chain: Chain<'_>, parts: &mut Parts<'_>) -> Option<u32> {
    let mut written = 0u32;
    for d in chain {
        let (mut at, mut left) = (d.addr(), d.len() as usize);
        while left > 0 {
            let part = parts.take(left);
            if part.is_empty() {
                return Some(written);
            }
            ram.write_slice(part, at).ok()?;
            at = GuestAddress(at.0.wrapping_add(part.len() as u64));
            left -= part.len();
            written += part.len() as u32;
        }
    }
    Some(written)
}

impl Rx {
    /// Sets or takes the queue.
    pub fn set_queue(&mut self, queue: Option<VirtQueue>) {
        (self.queue, self.told) = (queue, true);
    }

    /// Tells the driver of what it was given.
    pub fn commit(&mut self) {
        let Rx { queue: Some(queue), told, .. } = self else { return };
        if !std::mem::replace(told, true) {
            let ram = queue.ram();
            queue.signal(&ram);
        }
    }

    /// Gives the driver a frame, with its header if it is to have one. `merge`: it may span buffers.
    pub fn receive(
        &mut self,
        header: Option<&VnetHeader>,
        parts: &[&[u8]],
        merge: bool,
    ) -> Delivery {
        let Some(queue) = &mut self.queue else { return Delivery::Full };
        let memory = queue.ram();
        let ram = &*memory;
        let before = if header.is_some() { VNET_HEADER } else { 0 };
        let total = before + parts.iter().map(|p| p.len()).sum::<usize>();
        // As many buffers as it takes are found first: the header says how many.
        self.heads.clear();
        let (mut have, mut chains) = (0usize, Vec::with_capacity(4));
        while have < total {
            let Some(chain) = queue.pop(ram) else {
                // The driver tells of the next buffer after those that were seen.
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                queue.unpop(self.heads.len() as u16);
                return Delivery::Full;
            };
            let head = chain.head_index();
            let room = room(chain.clone());
            self.heads.push((head, 0));
            chains.push(chain);
            have = have.saturating_add(room as usize);
            if !merge || chains.len() >= usize::from(queue.size()) {
                break;
            }
        }
        let num_buffers = self.heads.len() as u16;
        let header = header.map(|h| VnetHeader { num_buffers, ..*h }.to_bytes());
        let mut all: Vec<&[u8]> = Vec::with_capacity(1 + parts.len());
        all.extend(header.as_ref().map(|h| &h[..]));
        all.extend(parts);
        let mut source = Parts::new(&all);
        // A frame that does not fit is dropped with the buffers it has seen.
        let fits = have >= total;
        for (chain, (_, len)) in chains.into_iter().zip(&mut self.heads) {
            *len = match fits {
                true => scatter(ram, chain, &mut source).unwrap_or(0),
                false => 0,
            };
        }
        if !fits {
            log::debug!("a frame of {total} bytes does not fit the driver's buffers");
        }
        for (head, len) in &self.heads {
            queue.push(ram, *head, *len);
        }
        self.told = false;
        Delivery::Done
    }
}
