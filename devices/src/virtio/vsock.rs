//! Virtual sockets (Virtio 1.3 §5.10), joined to unix sockets of the host.
//!
//! The transport of the network card serves here too: packets are frames, whose header is their
//! own. See [`tandem_backends::net::vsock`] for what happens to them.

use super::net::transport::{Rx, chain_pieces};
use super::pci;
use super::queue::VirtQueue;
use super::{Activation, VirtioDevice, feature};
use crate::registry::{BusKind, DeviceFault, DeviceType, Property, PropertyKind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use tandem_backends::block::pieces::Src;
use tandem_backends::net::vsock::Vsock;
use tandem_backends::net::{Card, Delivery, Network, Offloads, Taken, VnetHeader};

/// Virtio device type.
pub const DEVICE_ID: u16 = 19;
/// Receive, transmit, events.
const QUEUES: [u16; 3] = [128, 128, 8];
/// Feature: stream sockets.
const F_STREAM: u64 = 1;

/// What the network's thread sees.
#[derive(Default)]
struct Front {
    rx: Mutex<Rx>,
    tx: Mutex<Option<VirtQueue>>,
}

impl Card for Front {
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn transmit(&self, take: &mut dyn FnMut(&VnetHeader, &Src<'_>) -> Taken) -> bool {
        let mut slot = self.tx.lock().unwrap();
        let Some(queue) = slot.as_mut() else { return false };
        let memory = queue.ram();
        let ram = &*memory;
        let mut done = 0;
        while done < queue.size() {
            let Some(chain) = queue.pop(ram) else {
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let enough = match chain_pieces::<0>(ram, chain) {
                Some((_, packet)) => take(&VnetHeader::default(), &packet) == Taken::Enough,
                None => false,
            };
            queue.push(ram, head, 0);
            done += 1;
            if enough {
                break;
            }
        }
        queue.signal(ram);
        queue.has_more(ram)
    }

    fn receive(&self, _: &VnetHeader, parts: &[&[u8]], _: u32) -> Delivery {
        self.rx.lock().unwrap().receive(None, parts, false)
    }

    fn commit(&self) {
        self.rx.lock().unwrap().commit();
    }
}

/// A device for virtual sockets.
pub struct VirtioVsock {
    front: Arc<Front>,
    network: Arc<Network>,
    cid: u64,
}

impl VirtioVsock {
    /// Sockets of the guest with address `cid`, over `network`.
    pub fn new(network: Arc<Network>, cid: u64) -> VirtioVsock {
        VirtioVsock { front: Arc::default(), network, cid }
    }

    fn put(&self, index: u16, queue: Option<VirtQueue>) {
        match index {
            0 => self.front.rx.lock().unwrap().set_queue(queue),
            1 => *self.front.tx.lock().unwrap() = queue,
            // Events tell of migrations.
            _ => {}
        }
    }
}

impl VirtioDevice for VirtioVsock {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        F_STREAM
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.cid.to_le_bytes();
        let tail = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn activate(&self, activation: Activation) {
        for (queue, i) in activation.queues.into_iter().zip(0..) {
            self.put(i, queue);
        }
        self.network.attach(self.front.clone());
    }
    fn notify(&self, _: u16) {
        self.network.kick();
    }
    fn reset(&self) {
        self.network.detach();
        (0..QUEUES.len() as u16).for_each(|i| self.put(i, None));
    }
    fn reset_queue(&self, queue: u16) {
        self.put(queue, None);
    }
    fn enable_queue(&self, queue: VirtQueue) {
        self.put(queue.index(), Some(queue));
        self.network.kick();
    }
}

impl Drop for VirtioVsock {
    fn drop(&mut self) {
        self.reset();
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-vsock-pci",
        bus: BusKind::Pci,
        description: "sockets between guest and host (AF_VSOCK), as unix sockets on the host",
        properties: &[
            Property {
                name: "guest-cid",
                kind: PropertyKind::Uint { min: 3, max: 0xffff_fffe },
                default: Some("3"),
                description: "address of the guest",
            },
            Property {
                name: "path",
                kind: PropertyKind::Text,
                default: None,
                description: "unix socket of the host for calls to the guest; PATH_N answers port N",
            },
        ],
        create: |ctx, props| {
            let Some(path) = props.text("path") else {
                return Err(DeviceFault::new("it has no socket", "name one with path=PATH"));
            };
            let cid = props.uint("guest-cid").unwrap_or(3);
            let network = Vsock::new(Path::new(path), cid)
                .and_then(|v| Network::start("vsock", Box::new(v)));
            let network = network.map_err(|e| {
                let what = format!("unix socket '{path}' cannot be made: {e}");
                DeviceFault::new(what, "choose a path that is free")
            })?;
            let device = Arc::new(VirtioVsock::new(network, cid));
            pci::attach(ctx, props, "virtio-vsock-pci", device)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Rig;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    const CID: u64 = 5;

    fn packet(ports: (u32, u32), op: u16, data: &[u8]) -> Vec<u8> {
        let mut p = CID.to_le_bytes().to_vec();
        p.extend(2u64.to_le_bytes());
        p.extend(ports.0.to_le_bytes());
        p.extend(ports.1.to_le_bytes());
        p.extend((data.len() as u32).to_le_bytes());
        p.extend(1u16.to_le_bytes());
        p.extend(op.to_le_bytes());
        p.extend([0; 4]);
        p.extend(65536u32.to_le_bytes());
        p.extend([0; 4]);
        p.extend(data);
        p
    }
    fn op(p: &[u8]) -> u16 {
        u16::from_le_bytes([p[30], p[31]])
    }
    fn port(p: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(*p[at..].first_chunk().unwrap())
    }

    #[test]
    fn calls_both_ways() {
        let dir = std::env::temp_dir().join(format!("tandem-vsock-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("v");
        let network = Network::start("t", Box::new(Vsock::new(&path, CID).unwrap())).unwrap();
        let rig = Rig::new();
        let d = rig.attach(Arc::new(VirtioVsock::new(network, CID)));
        d.negotiate(feature::VERSION_1).unwrap();
        let (mut rx, mut tx) = (d.queue(0, 8), d.queue(1, 8));
        d.driver_ok();
        assert_eq!(d.read32(0x2000), 5);
        (0..8).for_each(|n| rx.offer(n, 4000));
        // To a port nobody answers, and to one that somebody does.
        tx.request(&[&packet((1000, 77), 1, &[])], &[]);
        assert_eq!(op(&rx.used_bytes(0)), 3);
        let server = UnixListener::bind(dir.join("v_78")).unwrap();
        tx.request(&[&packet((1000, 78), 1, &[])], &[]);
        let (mut s, _) = server.accept().unwrap();
        assert_eq!(op(&rx.used_bytes(1)), 2);
        tx.request(&[&packet((1000, 78), 5, b"to the host")], &[]);
        let mut b = [0; 11];
        s.read_exact(&mut b).unwrap();
        assert_eq!(&b, b"to the host");
        s.write_all(b"to the guest").unwrap();
        let p = rx.used_bytes(2);
        assert_eq!((op(&p), &p[44..]), (5, &b"to the guest"[..]));
        drop(s);
        assert_eq!(op(&rx.used_bytes(3)), 4);
        // From the host.
        let mut c = UnixStream::connect(&path).unwrap();
        c.write_all(b"CONNECT 52\nearly").unwrap();
        let p = rx.used_bytes(4);
        assert_eq!((op(&p), port(&p, 20)), (1, 52));
        let host = port(&p, 16);
        tx.request(&[&packet((52, host), 2, &[])], &[]);
        let mut answer = vec![0; format!("OK {host}\n").len()];
        c.read_exact(&mut answer).unwrap();
        let p = rx.used_bytes(5);
        assert_eq!((op(&p), &p[44..]), (5, &b"early"[..]));
        // Packets of no sense.
        tx.request(&[&packet((1, 2), 5, b"x")[..43]], &[]);
        tx.request(&[&packet((52, host), 99, &[])], &[]);
        tx.request(&[&packet((52, host), 3, &[])], &[]);
        assert_eq!(c.read(&mut b).unwrap(), 0);
        drop(d);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
