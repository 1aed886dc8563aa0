//! Memory balloon (Virtio 1.3 §5.5): memory that the guest lends back to the host.
//!
//! What always holds:
//!
//! * A page that the guest gives up is the host's at once, and reads as zero from then on; the guest
//!   takes it back by touching it. So inflating and reporting free pages are the same to the host.
//! * Page numbers are the guest's word: what is not RAM is ignored.
//! * Requests are worked on by the vCPU's thread that notifies, at most a queue length at a time.
//! * Statistics are what the guest last said, when asked ([`VirtioBalloon::ask_statistics`]).

use super::pci;
use super::queue::VirtQueue;
use super::{Activation, Signaller, VirtioDevice, feature};
use crate::registry::{BusKind, DeviceType, Property, PropertyKind};
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_accel::memory::GuestMap;

/// Virtio device type.
pub const DEVICE_ID: u16 = 5;
/// Bytes of a page in the balloon, whatever the guest's own pages are (§5.5.6).
const PAGE: u64 = 4096;
/// Page numbers of one request that are read.
const MAX_NUMBERS: usize = 1 << 16;
const QUEUES: [u16; 4] = [128, 128, 8, 128];

/// Feature bits (§5.5.3).
mod bit {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const PAGE_POISON: u64 = 1 << 4;
    pub const REPORTING: u64 = 1 << 5;
}

/// What a guest says about its memory: tags of §5.5.6.3 with QEMU's names. Bytes, or counts.
pub const STATISTICS: [&str; 16] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
];

#[derive(Default)]
struct State {
    features: u64,
    queues: Vec<Option<VirtQueue>>,
    signaller: Option<Arc<dyn Signaller>>,
    /// Pages that the host wants, and that the balloon has.
    target: u32,
    actual: u32,
    /// What freed pages hold; pages that must keep something are not given up.
    poison: u32,
    /// The buffer that statistics come in; given back to ask for new ones.
    stats_head: Option<u16>,
    stats: Vec<(u16, u64)>,
}

/// A balloon.
pub struct VirtioBalloon {
    memory: Arc<GuestMap>,
    deflate_on_oom: bool,
    reporting: bool,
    state: Mutex<State>,
}

/// What a queue is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Report,
}

impl State {
    /// Queues that were not agreed upon are not counted (§5.5.2).
    fn role(&self, queue: u16) -> Option<Role> {
        let stats = self.features & bit::STATS_VQ != 0;
        match (queue, stats) {
            (0, _) => Some(Role::Inflate),
            (1, _) => Some(Role::Deflate),
            (2, true) => Some(Role::Stats),
            (2, false) | (3, true) => Some(Role::Report),
            _ => None,
        }
    }

    fn read_stats(&mut self, index: u16) {
        let State { queues, stats, stats_head, .. } = self;
        let Some(Some(queue)) = queues.get_mut(usize::from(index)) else { return };
        let memory = queue.ram();
        let ram = &*memory;
        // One buffer goes to and fro; a driver that gives more gets the older ones back.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop(ram) else { break };
            if let Some(old) = stats_head.replace(chain.head_index()) {
                queue.push(ram, old, 0);
            }
            let mut bytes = Vec::new();
            let Ok(reader) = chain.reader(ram) else { continue };
            if reader.take(10 * 64).read_to_end(&mut bytes).is_ok() {
                *stats = bytes
                    .chunks_exact(10)
                    .filter_map(|s| {
                        let (tag, value) = s.split_first_chunk::<2>()?;
                        let value = value.first_chunk::<8>()?;
                        Some((u16::from_le_bytes(*tag), u64::from_le_bytes(*value)))
                    })
                    .collect();
            }
        }
    }
}

impl VirtioBalloon {
    /// An empty balloon in `memory`.
    pub fn new(memory: Arc<GuestMap>, deflate_on_oom: bool, reporting: bool) -> VirtioBalloon {
        VirtioBalloon { memory, deflate_on_oom, reporting, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to leave itself `bytes` of memory, rounded to pages; no less than 0 and no
    /// more than it has.
    pub fn set_guest_memory(&self, bytes: u64) {
        let lend = self.memory.ram_size().saturating_sub(bytes) / PAGE;
        let signaller = {
            let mut s = self.lock();
            s.target = u32::try_from(lend).unwrap_or(u32::MAX);
            s.signaller.clone()
        };
        if let Some(s) = signaller {
            s.config_changed();
        }
    }

    /// Bytes that the guest has left itself.
    pub fn guest_memory(&self) -> u64 {
        self.memory.ram_size().saturating_sub(u64::from(self.lock().actual) * PAGE)
    }

    /// What the guest last said about its memory: tag (an index into [`STATISTICS`]) and value.
    pub fn statistics(&self) -> Vec<(u16, u64)> {
        self.lock().stats.clone()
    }

    /// Asks the guest for new statistics. Returns whether it will answer.
    pub fn ask_statistics(&self) -> bool {
        let mut s = self.lock();
        let State { queues, stats_head, features, .. } = &mut *s;
        if *features & bit::STATS_VQ == 0 {
            return false;
        }
        let (Some(Some(queue)), Some(head)) = (queues.get_mut(2), stats_head.take()) else {
            return false;
        };
        let ram = queue.ram();
        queue.push(&ram, head, 0);
        queue.signal(&ram);
        true
    }

    /// Gives up the pages that requests of queue `index` name by number.
    fn inflate(&self, s: &mut State, index: u16) {
        let keep = s.poison != 0;
        let Some(Some(queue)) = s.queues.get_mut(usize::from(index)) else { return };
        queue.drain(|ram, chain| {
            let mut bytes = Vec::new();
            let Ok(reader) = chain.reader(ram) else { return 0 };
            if reader.take(4 * MAX_NUMBERS as u64).read_to_end(&mut bytes).is_err() || keep {
                return 0;
            }
            // Neighbours are given up together, whichever way they are listed.
            let mut run: Option<(u64, u64)> = None;
            for number in bytes.chunks_exact(4) {
                let at =
                    u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
                run = Some(match run {
                    Some((from, to)) if at == to => (from, to + 1),
                    Some((from, to)) if at + 1 == from => (at, to),
                    other => {
                        self.give_up(other);
                        (at, at + 1)
                    }
                });
            }
            self.give_up(run);
            0
        });
    }

    fn give_up(&self, pages: Option<(u64, u64)>) {
        if let Some((from, to)) = pages {
            self.memory.discard(from * PAGE, (to - from) * PAGE);
        }
    }

    /// Gives up the memory that requests of queue `index` consist of.
    fn report(&self, s: &mut State, index: u16) {
        let keep = s.poison != 0;
        let Some(Some(queue)) = s.queues.get_mut(usize::from(index)) else { return };
        queue.drain(|_, chain| {
            for d in chain {
                if d.is_write_only() && !keep {
                    self.memory.discard(d.addr().0, d.len().into());
                }
            }
            0
        });
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        bit::STATS_VQ
            | when(self.deflate_on_oom, bit::DEFLATE_ON_OOM)
            | when(self.reporting, bit::REPORTING | bit::PAGE_POISON)
    }
    fn queue_sizes(&self) -> &[u16] {
        if self.reporting { &QUEUES } else { &QUEUES[..3] }
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let s = self.lock();
        let words = [s.target, s.actual, 0, s.poison];
        let space: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let tail = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        let Some(word) = data.first_chunk::<4>().map(|w| u32::from_le_bytes(*w)) else { return };
        let mut s = self.lock();
        match offset {
            4 => s.actual = word,
            12 => s.poison = word,
            _ => {}
        }
    }
    fn activate(&self, activation: Activation) {
        let mut s = self.lock();
        s.features = activation.features;
        s.queues = activation.queues;
        s.signaller = Some(activation.signaller);
        drop(s);
        // The driver fills the statistics' buffer before it is ready.
        (0..QUEUES.len() as u16).for_each(|q| self.notify(q));
    }
    fn notify(&self, queue: u16) {
        let mut s = self.lock();
        match s.role(queue) {
            Some(Role::Inflate) => self.inflate(&mut s, queue),
            Some(Role::Deflate) => {
                // The guest takes pages back by touching them.
                if let Some(Some(q)) = s.queues.get_mut(usize::from(queue)) {
                    q.drain(|_, _| 0);
                }
            }
            Some(Role::Stats) => s.read_stats(queue),
            Some(Role::Report) => self.report(&mut s, queue),
            None => {}
        }
    }
    fn reset(&self) {
        let mut s = self.lock();
        let target = s.target;
        *s = State { target, ..State::default() };
    }
    fn reset_queue(&self, queue: u16) {
        let mut s = self.lock();
        if s.role(queue) == Some(Role::Stats) {
            s.stats_head = None;
        }
        if let Some(q) = s.queues.get_mut(usize::from(queue)) {
            *q = None;
        }
    }
    fn enable_queue(&self, queue: VirtQueue) {
        let n = queue.index();
        if let Some(q) = self.lock().queues.get_mut(usize::from(n)) {
            *q = Some(queue);
        }
        self.notify(n);
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-balloon-pci",
        bus: BusKind::Pci,
        description: "memory that the guest lends back",
        properties: &[
            Property {
                name: "deflate-on-oom",
                kind: PropertyKind::Bool,
                default: Some("off"),
                description: "the guest may take memory back when it has none left",
            },
            Property {
                name: "free-page-reporting",
                kind: PropertyKind::Bool,
                default: Some("off"),
                description: "the guest lends what is free, all the time",
            },
        ],
        create: |ctx, props| {
            let (oom, report) = (props.bool("deflate-on-oom"), props.bool("free-page-reporting"));
            let device = Arc::new(VirtioBalloon::new(ctx.memory.clone(), oom, report));
            let card = pci::attach(ctx, props, "virtio-balloon-pci", device.clone())?;
            ctx.directory.add(props.text("id").unwrap_or_default(), device);
            Ok(card)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, Rig};
    use vm_memory::{Bytes, GuestAddress};

    fn balloon(rig: &Rig) -> (Arc<VirtioBalloon>, Driver) {
        let device = Arc::new(VirtioBalloon::new(rig.map.clone(), true, true));
        let d = rig.attach(device.clone());
        (device, d)
    }

    const ALL: u64 = feature::VERSION_1
        | bit::STATS_VQ
        | bit::DEFLATE_ON_OOM
        | bit::REPORTING
        | bit::PAGE_POISON;

    #[test]
    fn pages_given_up_read_as_zero() {
        let rig = Rig::new();
        let (device, d) = balloon(&rig);
        d.negotiate(ALL).unwrap();
        let (mut inflate, mut deflate, mut report) = (d.queue(0, 8), d.queue(1, 8), d.queue(3, 8));
        d.driver_ok();
        device.set_guest_memory(rig.map.ram_size() - 3 * PAGE - 1);
        assert_eq!(d.read32(0x2000), 3);
        assert!(rig.sink.messages().iter().any(|m| m.data == 0x4f));
        let ram = rig.map.ram();
        let fill = |page: u64| {
            ram.write_slice(&[7; PAGE as usize], GuestAddress(page * PAGE)).unwrap();
        };
        let byte = |page: u64| ram.read_obj::<u8>(GuestAddress(page * PAGE + 9)).unwrap();
        (0..32).for_each(fill);
        // Up, down, alone, and where there is no memory.
        let numbers = [3u32, 4, 5, 9, 8, 20, 0xffff_ffff, 0x200, 0x1ff + 0x1000];
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        inflate.request(&[&bytes], &[]);
        for page in 0..32 {
            assert_eq!(byte(page) == 0, [3, 4, 5, 8, 9, 20].contains(&page), "{page}");
        }
        deflate.request(&[&bytes], &[]);
        d.write32(0x2004, 3);
        assert_eq!(device.guest_memory(), rig.map.ram_size() - 3 * PAGE);
        report.raw_descriptor(0, (12 * PAGE, 2 * PAGE as u32, 2, 0));
        report.add_head(0);
        report.kick();
        assert_eq!((byte(11), byte(12), byte(13), byte(14)), (7, 0, 0, 7));
        // A guest that counts on what freed pages hold keeps them.
        d.write32(0x200c, 0xaaaa_aaaa);
        inflate.request(&[&30u32.to_le_bytes()], &[]);
        assert_eq!(byte(30), 7);
    }

    #[test]
    fn statistics_are_asked_for() {
        let rig = Rig::new();
        let (device, d) = balloon(&rig);
        assert!(!device.ask_statistics());
        d.negotiate(ALL).unwrap();
        let mut stats = d.queue(2, 8);
        d.driver_ok();
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let said = [entry(4, 1 << 20), entry(5, 2 << 20), vec![1, 2, 3]].concat();
        stats.raw_descriptor(0, (0x8000, said.len() as u32, 0, 0));
        rig.map.ram().write_slice(&said, GuestAddress(0x8000)).unwrap();
        stats.add_head(0);
        stats.kick();
        assert_eq!(device.statistics(), [(4, 1 << 20), (5, 2 << 20)]);
        assert_eq!(stats.used_index(), 0);
        assert!(device.ask_statistics());
        assert_eq!(stats.used_index(), 1);
        assert!(!device.ask_statistics());
    }
}
