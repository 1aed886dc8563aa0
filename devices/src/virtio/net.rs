//! Network card (Virtio 1.3 §5.1).
//!
//! ```text
//!   notify ─► Network::kick ─► (network's thread) Front::transmit ─► the network
//!                                                 Front::receive  ◄──────┘
//!   control queue: answered on the vCPU's thread                      (control)
//! ```
//!
//! What always holds:
//!
//! * vCPU threads only kick; the network's thread alone moves frames.
//! * A frame that makes no sense is dropped and its buffers given back; the card lives on.
//! * Checksums and segmentation are left undone where both sides agreed ([`Offloads`]); the network
//!   says what it can take, the driver what it can.
//! * Queue 2n receives, 2n+1 transmits, the last is for control. Frames of one conversation go to
//!   one receive queue.
//! * Lock order: a queue's lock is a leaf but for the signaller.

mod control;
mod properties;
pub(super) mod transport;

use super::queue::VirtQueue;
use super::{Activation, VirtioDevice, feature};
use control::{Control, Filter};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use tandem_backends::block::pieces::Src;
use tandem_backends::net::{
    Card, Delivery, MacAddr, Network, Offloads, Taken, VNET_HEADER, VnetHeader,
};
use transport::{Parts, Rx, chain_pieces};

/// Virtio device type.
pub const DEVICE_ID: u16 = 1;

/// Feature bits (§5.1.3).
mod bit {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// Status field of the configuration space: the link is up; the driver is to announce itself.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// What a card shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: MacAddr,
    /// Pairs of queues, 1 to [`NetConfig::MAX_PAIRS`].
    pub pairs: u16,
    /// Length of receive and transmit queues: powers of two.
    pub rx_size: u16,
    /// As above.
    pub tx_size: u16,
    /// What the driver is told of the MTU; nothing if 0.
    pub mtu: u16,
    /// What may be left undone, where the network agrees.
    pub offloads: Offloads,
    /// Whether frames may span receive buffers.
    pub mergeable: bool,
    /// Whether there is a control queue.
    pub control: bool,
}

impl NetConfig {
    /// Most pairs of queues.
    pub const MAX_PAIRS: u16 = 16;
}

impl Default for NetConfig {
    fn default() -> NetConfig {
        NetConfig {
            mac: MacAddr([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]),
            pairs: 1,
            rx_size: 256,
            tx_size: 256,
            mtu: 0,
            offloads: Offloads::ALL,
            mergeable: true,
            control: true,
        }
    }
}

/// What the network's thread sees.
struct Front {
    rx: Vec<Mutex<Rx>>,
    tx: Vec<Mutex<Option<VirtQueue>>>,
    /// Pairs in use.
    active: AtomicU16,
    features: AtomicU64,
    /// What the driver accepts now, as [`bit`]s.
    guest_offloads: AtomicU64,
    filter: RwLock<Filter>,
}

impl Front {
    fn has(&self, bits: u64) -> bool {
        self.features.load(Ordering::Acquire) & bits == bits
    }

    fn active(&self) -> usize {
        usize::from(self.active.load(Ordering::Acquire)).min(self.rx.len())
    }
}

impl Card for Front {
    fn offloads(&self) -> Offloads {
        let o = self.guest_offloads.load(Ordering::Acquire);
        Offloads {
            csum: o & bit::GUEST_CSUM != 0,
            tso4: o & bit::GUEST_TSO4 != 0,
            tso6: o & bit::GUEST_TSO6 != 0,
        }
    }

    fn transmit(&self, take: &mut dyn FnMut(&VnetHeader, &Src<'_>) -> Taken) -> bool {
        let mut more = false;
        for slot in &self.tx[..self.active()] {
            let mut slot = slot.lock().unwrap();
            let Some(queue) = slot.as_mut() else { continue };
            let memory = queue.ram();
            let ram = &*memory;
            let (mut done, mut enough) = (0, false);
            queue.disable_notifications(ram);
            // One queue length at a time: whoever waits for a turn must get it.
            while !enough && done < queue.size() {
                let Some(chain) = queue.pop(ram) else {
                    if queue.enable_notifications(ram) && queue.has_more(ram) {
                        queue.disable_notifications(ram);
                        continue;
                    }
                    break;
                };
                let head = chain.head_index();
                match chain_pieces::<VNET_HEADER>(ram, chain) {
                    Some((header, frame)) => {
                        let header = VnetHeader::from_bytes(header);
                        enough = take(&header, &frame) == Taken::Enough;
                    }
                    None => log::debug!("virtio-net: a frame that makes no sense is dropped"),
                }
                queue.push(ram, head, 0);
                done += 1;
            }
            if done > 0 {
                queue.signal(ram);
            }
            if enough || done >= queue.size() {
                more |= queue.has_more(ram) || !enough;
            }
            if enough {
                break;
            }
        }
        more
    }

    fn receive(&self, header: &VnetHeader, parts: &[&[u8]], flow: u32) -> Delivery {
        let mut head = [0; 18];
        let mut source = Parts::new(parts);
        let mut have = 0;
        while have < head.len() {
            let part = source.take(head.len() - have);
            if part.is_empty() {
                break;
            }
            head[have..have + part.len()].copy_from_slice(part);
            have += part.len();
        }
        if !self.filter.read().unwrap().wants(&head[..have]) {
            return Delivery::Done;
        }
        let merge = self.has(bit::MRG_RXBUF);
        let n = self.active().max(1);
        let mut rx = self.rx[flow as usize % n].lock().unwrap();
        rx.receive(Some(header), parts, merge)
    }

    fn commit(&self) {
        for rx in &self.rx[..self.active()] {
            rx.lock().unwrap().commit();
        }
    }
}

/// A network card.
pub struct VirtioNet {
    front: Arc<Front>,
    network: Arc<Network>,
    config: NetConfig,
    sizes: Vec<u16>,
    control: Mutex<Control>,
}

impl VirtioNet {
    /// A card on `network`.
    pub fn new(network: Arc<Network>, config: NetConfig) -> VirtioNet {
        let pairs = config.pairs.clamp(1, NetConfig::MAX_PAIRS);
        let mut sizes: Vec<u16> =
            (0..pairs).flat_map(|_| [config.rx_size, config.tx_size]).collect();
        if config.control {
            sizes.push(64);
        }
        let front = Arc::new(Front {
            rx: (0..pairs).map(|_| Mutex::default()).collect(),
            tx: (0..pairs).map(|_| Mutex::default()).collect(),
            active: AtomicU16::new(1),
            features: AtomicU64::new(0),
            guest_offloads: AtomicU64::new(0),
            filter: RwLock::new(Filter::new(config.mac)),
        });
        let control = Mutex::new(Control::default());
        VirtioNet { front, network, config, sizes, control }
    }

    /// The configuration space (§5.1.4).
    fn space(&self) -> [u8; 17] {
        let mut b = [0; 17];
        let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
        let announce = self.control.lock().unwrap().announcing();
        put(0, &self.front.filter.read().unwrap().mac().0);
        put(6, &(LINK_UP | if announce { ANNOUNCE } else { 0 }).to_le_bytes());
        put(8, &self.config.pairs.to_le_bytes());
        put(10, &self.config.mtu.to_le_bytes());
        // Speed unknown, duplex unknown.
        put(12, &u32::MAX.to_le_bytes());
        put(16, &[0xff]);
        b
    }

    /// Asks the driver to make itself known to the network, as after a migration.
    pub fn announce(&self) {
        if self.front.has(bit::GUEST_ANNOUNCE | bit::CTRL_VQ) {
            self.control.lock().unwrap().announce();
        }
    }

    fn is_control(&self, queue: u16) -> bool {
        self.config.control && usize::from(queue) + 1 == self.sizes.len()
    }

    fn put(&self, index: u16, queue: Option<VirtQueue>) {
        if self.is_control(index) {
            self.control.lock().unwrap().set_queue(queue);
            return;
        }
        let pair = usize::from(index / 2);
        if index.is_multiple_of(2) {
            if let Some(rx) = self.front.rx.get(pair) {
                rx.lock().unwrap().set_queue(queue);
            }
        } else if let Some(tx) = self.front.tx.get(pair) {
            *tx.lock().unwrap() = queue;
        }
    }

    /// What the driver negotiated about frames it receives.
    fn guest_offloads(features: u64) -> u64 {
        features & (bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::GUEST_TSO6)
    }
}

impl VirtioDevice for VirtioNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        let c = &self.config;
        let network = self.network.offloads();
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        let csum = c.offloads.csum && network.csum;
        let tso4 = csum && c.offloads.tso4 && network.tso4;
        let tso6 = csum && c.offloads.tso6 && network.tso6;
        bit::MAC
            | bit::STATUS
            | bit::SPEED_DUPLEX
            | when(c.mtu != 0, bit::MTU)
            | when(c.mergeable, bit::MRG_RXBUF)
            | when(csum, bit::CSUM | bit::GUEST_CSUM)
            | when(tso4, bit::HOST_TSO4 | bit::GUEST_TSO4)
            | when(tso6, bit::HOST_TSO6 | bit::GUEST_TSO6)
            | when(
                c.control,
                bit::CTRL_VQ
                    | bit::CTRL_RX
                    | bit::CTRL_RX_EXTRA
                    | bit::CTRL_VLAN
                    | bit::CTRL_MAC_ADDR
                    | bit::GUEST_ANNOUNCE,
            )
            | when(c.control && csum, bit::CTRL_GUEST_OFFLOADS)
            | when(c.control && c.pairs > 1, bit::MQ)
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.space();
        let tail = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn activate(&self, activation: Activation) {
        let f = activation.features;
        self.front.features.store(f, Ordering::Release);
        self.front.guest_offloads.store(Self::guest_offloads(f), Ordering::Release);
        self.front.active.store(1, Ordering::Release);
        self.control.lock().unwrap().activate(activation.signaller);
        for (queue, i) in activation.queues.into_iter().zip(0..) {
            self.put(i, queue);
        }
        self.network.attach(self.front.clone());
        // Commands may be waiting already.
        self.control.lock().unwrap().run(&self.front);
    }
    fn notify(&self, queue: u16) {
        if self.is_control(queue) {
            let changed = self.control.lock().unwrap().run(&self.front);
            if changed {
                // The network asks for offloads when a card comes.
                self.network.attach(self.front.clone());
            }
        } else {
            self.network.kick();
        }
    }
    fn reset(&self) {
        self.network.detach();
        for i in 0..self.sizes.len() as u16 {
            self.put(i, None);
        }
        *self.front.filter.write().unwrap() = Filter::new(self.config.mac);
        *self.control.lock().unwrap() = Control::default();
        self.front.features.store(0, Ordering::Release);
    }
    fn reset_queue(&self, queue: u16) {
        self.put(queue, None);
    }
    fn enable_queue(&self, queue: VirtQueue) {
        self.put(queue.index(), Some(queue));
        self.network.kick();
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        self.reset();
        self.network.give_back();
    }
}

#[cfg(test)]
mod tests;
