//! The control queue (Virtio 1.3 §5.1.6.5) and what it decides: which frames the driver wants.

use super::super::device::Signaller;
use super::super::queue::{Chain, VirtQueue};
use super::{Front, VirtioNet, bit};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tandem_accel::memory::GuestRam;
use tandem_backends::net::MacAddr;

const OK: u8 = 0;
const ERR: u8 = 1;
/// Longest command that is read.
const MAX_COMMAND: usize = 8192;
/// Addresses of one kind in the filter; with more, all of the kind are let through.
const MAX_MACS: usize = 64;
const VLANS: usize = 4096;

/// Classes and commands.
mod class {
    pub const RX: u8 = 0;
    pub const MAC: u8 = 1;
    pub const VLAN: u8 = 2;
    pub const ANNOUNCE: u8 = 3;
    pub const MQ: u8 = 4;
    pub const GUEST_OFFLOADS: u8 = 5;
}

/// Which frames the driver wants.
pub struct Filter {
    mac: MacAddr,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Vec<MacAddr>,
    multicast: Vec<MacAddr>,
    /// Bits of the VLANs that are wanted; empty until one was named: then none is filtered.
    vlans: Vec<u64>,
}

impl Filter {
    /// As after a reset: until the driver says otherwise it gets everything (§5.1.6.5.1).
    pub fn new(mac: MacAddr) -> Filter {
        Filter {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: Vec::new(),
        }
    }

    /// The card's address.
    pub fn mac(&self) -> MacAddr {
        self.mac
    }

    /// Whether the driver wants the frame that starts with `head`.
    pub fn wants(&self, head: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(to) = head.first_chunk::<6>().map(|m| MacAddr(*m)) else { return false };
        if head.get(12..14) == Some(&[0x81, 0]) && !self.vlans.is_empty() {
            let id = head.get(14..16).map_or(0, |t| u16::from_be_bytes([t[0], t[1]]) & 0xfff);
            if self.vlans[usize::from(id) / 64] & 1 << (id % 64) == 0 {
                return false;
            }
        }
        if to == MacAddr::BROADCAST {
            !self.no_broadcast
        } else if to.is_multicast() {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(&to))
        } else {
            let known = to == self.mac || self.all_unicast || self.unicast.contains(&to);
            !self.no_unicast && known
        }
    }

    fn rx(&mut self, command: u8, on: bool) -> bool {
        let flag = match command {
            0 => &mut self.promiscuous,
            1 => &mut self.all_multicast,
            2 => &mut self.all_unicast,
            3 => &mut self.no_multicast,
            4 => &mut self.no_unicast,
            5 => &mut self.no_broadcast,
            _ => return false,
        };
        *flag = on;
        true
    }

    /// Two tables, each a 32-bit count and so many addresses.
    fn set_tables(&mut self, data: &[u8]) -> bool {
        let mut rest = data;
        let mut table = || {
            let (count, tail) = rest.split_first_chunk::<4>()?;
            let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
            let (macs, tail) = tail.split_at_checked(len)?;
            rest = tail;
            Some(macs.as_chunks::<6>().0.iter().map(|m| MacAddr(*m)).collect::<Vec<_>>())
        };
        let (Some(unicast), Some(multicast)) = (table(), table()) else { return false };
        self.all_unicast = unicast.len() > MAX_MACS;
        self.all_multicast |= multicast.len() > MAX_MACS;
        self.unicast = unicast.into_iter().take(MAX_MACS).collect();
        self.multicast = multicast.into_iter().take(MAX_MACS).collect();
        true
    }

    fn set_vlan(&mut self, id: u16, on: bool) -> bool {
        if usize::from(id) >= VLANS {
            return false;
        }
        if self.vlans.is_empty() {
            self.vlans = vec![0; VLANS / 64];
        }
        let (word, bit) = (&mut self.vlans[usize::from(id) / 64], 1 << (id % 64));
        *word = if on { *word | bit } else { *word & !bit };
        true
    }
}

/// The control queue.
#[derive(Default)]
pub struct Control {
    queue: Option<VirtQueue>,
    signaller: Option<Arc<dyn Signaller>>,
    announcing: bool,
}

impl Control {
    /// The driver is ready.
    pub fn activate(&mut self, signaller: Arc<dyn Signaller>) {
        self.signaller = Some(signaller);
    }

    /// Sets or takes the queue.
    pub fn set_queue(&mut self, queue: Option<VirtQueue>) {
        self.queue = queue;
    }

    /// Whether the driver is to announce itself.
    pub fn announcing(&self) -> bool {
        self.announcing
    }

    /// Asks the driver to announce itself.
    pub fn announce(&mut self) {
        self.announcing = true;
        if let Some(s) = &self.signaller {
            s.config_changed();
        }
    }

    /// Carries waiting commands out. Returns whether what the driver accepts has changed.
    pub fn run(&mut self, front: &Front) -> bool {
        let Control { queue: Some(queue), announcing, .. } = self else { return false };
        let mut changed = false;
        // Late commands have a notification of their own: suppression is never on for long.
        queue.drain(|ram, chain| {
            let (answer, offloads) = command(ram, &chain, front, announcing);
            changed |= offloads;
            let Ok(mut writer) = chain.writer(ram) else { return 0 };
            writer.write(&[answer]).map_or(0, |n| n as u32)
        });
        changed
    }
}

/// Carries one command out; returns the answer, and whether what the driver accepts has changed.
fn command(ram: &GuestRam, chain: &Chain<'_>, front: &Front, announcing: &mut bool) -> (u8, bool) {
    let mut bytes = Vec::new();
    let Ok(reader) = chain.clone().reader(ram) else { return (ERR, false) };
    if reader.take(MAX_COMMAND as u64).read_to_end(&mut bytes).is_err() {
        return (ERR, false);
    }
    let Some(([class, command], data)) = bytes.split_first_chunk::<2>() else {
        return (ERR, false);
    };
    let word = data.first_chunk::<2>().map(|w| u16::from_le_bytes(*w));
    let mut filter = front.filter.write().unwrap();
    let mut changed = false;
    let done = match (*class, *command) {
        (class::RX, c) if front.has(bit::CTRL_RX) => match data.first() {
            Some(on) => filter.rx(c, *on != 0),
            None => false,
        },
        (class::MAC, 0) => filter.set_tables(data),
        (class::MAC, 1) if front.has(bit::CTRL_MAC_ADDR) => match data.first_chunk::<6>() {
            Some(m) => {
                filter.mac = MacAddr(*m);
                true
            }
            None => false,
        },
        (class::VLAN, c @ 0..=1) if front.has(bit::CTRL_VLAN) => {
            word.is_some_and(|id| filter.set_vlan(id, c == 0))
        }
        (class::ANNOUNCE, 0) => {
            *announcing = false;
            true
        }
        (class::MQ, 0) if front.has(bit::MQ) => {
            let good = word.filter(|n| (1..=front.rx.len()).contains(&usize::from(*n)));
            if let Some(n) = good {
                front.active.store(n, Ordering::Release);
            }
            good.is_some()
        }
        (class::GUEST_OFFLOADS, 0) if front.has(bit::CTRL_GUEST_OFFLOADS) => {
            let wanted = data.first_chunk::<8>().map(|w| u64::from_le_bytes(*w));
            let most = VirtioNet::guest_offloads(front.features.load(Ordering::Acquire));
            let good = wanted.filter(|w| w & !most == 0);
            if let Some(w) = good {
                changed = front.guest_offloads.swap(w, Ordering::AcqRel) != w;
            }
            good.is_some()
        }
        _ => false,
    };
    (if done { OK } else { ERR }, changed)
}
