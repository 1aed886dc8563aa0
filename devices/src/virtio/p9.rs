//! 9p transport (Virtio 1.3 §5.12): a directory of the host for the guest.
//!
//! ```text
//!   notify ─► worker (own thread): takes messages, asks the server, gives answers
//! ```
//!
//! What always holds:
//!
//! * vCPU threads only ring; the worker alone touches the queue, as the host's file system may keep
//!   it waiting.
//! * A message that makes no sense is answered with an error where there is room for one, and given
//!   back empty where there is not.
//! * The client is forgotten with its driver.

use super::pci;
use super::queue::{Chain, VirtQueue};
use super::{Activation, VirtioDevice, feature};
use crate::registry::{BusKind, DeviceFault, DeviceType, Property, PropertyKind};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tandem_accel::memory::GuestRam;
use tandem_backends::p9::{MAX_MESSAGE, Server};

/// Virtio device type.
pub const DEVICE_ID: u16 = 9;
/// Feature bit: the configuration space has the mount tag.
const MOUNT_TAG: u64 = 1;
const QUEUE_SIZES: [u16; 1] = [128];

/// What vCPU threads and the worker share.
#[derive(Default)]
struct State {
    queue: Option<VirtQueue>,
    /// The worker has the queue.
    working: bool,
    /// The queue is to be let go.
    closing: bool,
    rung: bool,
    end: bool,
    /// The driver has gone: its client is to be forgotten.
    fresh: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    bell: Condvar,
    quiet: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker's life.
    fn work(&self, mut server: Server) {
        let mut s = self.lock();
        loop {
            while !(s.end || s.rung && s.queue.is_some()) {
                s = self.bell.wait(s).unwrap_or_else(PoisonError::into_inner);
            }
            if s.end {
                return;
            }
            s.rung = false;
            if std::mem::take(&mut s.fresh) {
                server.reset();
            }
            let Some(mut queue) = s.queue.take() else { continue };
            s.working = true;
            drop(s);
            let more = self.serve(&mut queue, &mut server);
            s = self.lock();
            s.working = false;
            s.rung |= more;
            if !s.closing {
                s.queue = Some(queue);
            }
            self.quiet.notify_all();
        }
    }

    /// Answers what is there, as long as the queue may be kept. Returns whether there is more.
    fn serve(&self, queue: &mut VirtQueue, server: &mut Server) -> bool {
        let memory = queue.ram();
        let ram = &*memory;
        for _ in 0..queue.size() {
            if self.lock().closing {
                return false;
            }
            let Some(chain) = queue.pop(ram) else {
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                return false;
            };
            let head = chain.head_index();
            let len = answer(ram, chain, server).unwrap_or(0);
            queue.push(ram, head, len);
            queue.signal(ram);
        }
        true
    }
}

/// Answers one message; returns the length of the answer.
fn answer(ram: &GuestRam, chain: Chain<'_>, server: &mut Server) -> Option<u32> {
    let mut message = Vec::new();
    let reader = chain.clone().reader(ram).ok()?;
    reader.take(MAX_MESSAGE as u64).read_to_end(&mut message).ok()?;
    let mut writer = chain.writer(ram).ok()?;
    let answer = server.answer(&message, writer.available_bytes())?;
    writer.write_all(&answer).ok()?;
    Some(answer.len() as u32)
}

/// A shared directory.
pub struct Virtio9p {
    tag: String,
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

impl Virtio9p {
    /// Longest mount tag.
    pub const MAX_TAG: usize = 255;

    /// Shares what `server` serves under the name `tag`.
    pub fn new(tag: &str, server: Server) -> std::io::Result<Virtio9p> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let worker = std::thread::Builder::new()
            .name(format!("9p {tag}"))
            .spawn(move || theirs.work(server))?;
        Ok(Virtio9p { tag: tag.into(), shared, worker: Some(worker) })
    }

    fn open(&self, queue: Option<VirtQueue>) {
        let mut s = self.shared.lock();
        s.queue = queue;
        // Messages may be waiting already.
        s.rung = true;
        self.shared.bell.notify_all();
    }

    fn close(&self) {
        let mut s = self.shared.lock();
        s.closing = true;
        while s.working {
            s = self.shared.quiet.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
        s.queue = None;
        s.closing = false;
    }
}

impl VirtioDevice for Virtio9p {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        MOUNT_TAG
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = (self.tag.len() as u16).to_le_bytes().to_vec();
        space.extend(self.tag.as_bytes());
        let tail = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn activate(&self, mut activation: Activation) {
        self.shared.lock().fresh = true;
        self.open(activation.queues.pop().flatten());
    }
    fn notify(&self, _: u16) {
        self.shared.lock().rung = true;
        self.shared.bell.notify_all();
    }
    fn reset(&self) {
        self.close();
    }
    fn reset_queue(&self, _: u16) {
        self.close();
    }
    fn enable_queue(&self, queue: VirtQueue) {
        self.open(Some(queue));
    }
}

impl Drop for Virtio9p {
    fn drop(&mut self) {
        self.close();
        self.shared.lock().end = true;
        self.shared.bell.notify_all();
        if let Some(w) = self.worker.take() {
            let _ = w.join();
        }
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-9p-pci",
        bus: BusKind::Pci,
        description: "directory of the host (mount -t 9p -o trans=virtio TAG /mnt)",
        properties: &[
            Property {
                name: "path",
                kind: PropertyKind::Text,
                default: None,
                description: "the directory",
            },
            Property {
                name: "mount_tag",
                kind: PropertyKind::Text,
                default: None,
                description: "name that the guest mounts it by",
            },
            Property {
                name: "readonly",
                kind: PropertyKind::Bool,
                default: Some("off"),
                description: "the guest cannot write",
            },
        ],
        create: |ctx, props| {
            let missing = |what: &str, remedy: &str| Err(DeviceFault::new(what, remedy));
            let Some(path) = props.text("path") else {
                return missing("it has no directory", "name one with path=DIRECTORY");
            };
            let tag = props.text("mount_tag").unwrap_or_default();
            if tag.is_empty() || tag.len() > Virtio9p::MAX_TAG {
                return missing("it has no mount tag", "name it with mount_tag=TAG");
            }
            let made = Server::new(Path::new(path), props.bool("readonly"))
                .and_then(|s| Virtio9p::new(tag, s));
            let device = Arc::new(made.map_err(|e| {
                let what = format!("directory '{path}' cannot be shared: {e}");
                DeviceFault::new(what, "name a directory that you may read")
            })?);
            pci::attach(ctx, props, "virtio-9p-pci", device)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Rig;

    #[test]
    fn messages_are_answered() {
        let rig = Rig::new();
        let server = Server::new(Path::new("/"), true).unwrap();
        let d = rig.attach(Arc::new(Virtio9p::new("host", server).unwrap()));
        for _ in 0..2 {
            d.negotiate(feature::VERSION_1 | MOUNT_TAG).unwrap();
            let mut q = d.queue(0, 8);
            d.driver_ok();
            assert_eq!((d.read16(0x2000), d.read32(0x2002)), (4, u32::from_le_bytes(*b"host")));
            let mut m = vec![21, 0, 0, 0, 100, 9, 0, 0, 0x20, 0, 0, 8, 0];
            m.extend(b"9P2000.L");
            let a = q.request(&[&m[..6], &m[6..]], &[10, 100]);
            assert_eq!(q.last_len(), 21);
            assert_eq!(a[..7], [21, 0, 0, 0, 101, 9, 0]);
            // No room, or no message.
            q.request(&[&m], &[8]);
            assert_eq!(q.last_len(), 0);
            q.request(&[b"x"], &[100]);
            assert_eq!(q.last_len(), 0);
        }
    }
}
