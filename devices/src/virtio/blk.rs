//! Block device (Virtio 1.3 §5.2).
//!
//! ```text
//!   notify ─► engine.kick ─► (engine's thread) Front::next ─► parse ─► Request
//!                                              Front::complete ◄─ result ─┘
//! ```
//!
//! What always holds:
//!
//! * vCPU threads only kick. Requests are taken off the queues, worked on and given back by the
//!   engine's threads, several at a time.
//! * A request that makes no sense fails with IOERR, one that the device does not know with UNSUPP;
//!   one without room for a status is given back untouched. The device lives on.
//! * At most a queue's length of its requests are in flight, whatever the driver makes available.
//! * Lock order: a queue's lock is a leaf but for the signaller.

use super::pci;
use super::queue::VirtQueue;
use super::spans::Spans;
use super::{Activation, VirtioDevice, feature, mmio};
use crate::registry::{
    BusKind, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use tandem_accel::memory::GuestRam;
use tandem_backends::block::drive::{Drive, Op};
use tandem_backends::block::engine::{self, Engine, Request, Requester};
use tandem_backends::block::{Error, SECTOR};

/// Virtio device type.
pub const DEVICE_ID: u16 = 2;
/// Bytes of a serial number.
pub const SERIAL_LEN: usize = 20;

/// Feature bits (§5.2.3).
mod bit {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const GEOMETRY: u64 = 1 << 4;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (§5.2.6).
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Request header: type, reserved, sector.
const HEADER: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const SEGMENT: usize = 16;
/// Segments of one discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 32;
/// Flag of a write-zeroes segment.
const UNMAP: u32 = 1;
/// Offset of the writeback field in the configuration space.
const WRITEBACK: u64 = 32;

/// What a block device shows besides its drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// Serial number, at most [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// Number of request queues.
    pub queues: u16,
    /// Length of each: a power of two.
    pub queue_size: u16,
    /// Bytes of a logical block: a power of two from 512.
    pub logical_block: u32,
    /// Bytes of a physical block: a power of two, at least the logical one's.
    pub physical_block: u32,
    /// Least bytes of efficient I/O.
    pub min_io: u32,
    /// Best bytes of I/O.
    pub opt_io: u32,
    /// Unit of discards; the physical block's if 0.
    pub discard_granularity: u32,
    /// Offer discards, where the drive has them.
    pub discard: bool,
    /// Offer writing of zeros.
    pub write_zeroes: bool,
    /// Sectors of one discard segment, at most.
    pub max_discard: u32,
    /// Sectors of one write-zeroes segment, at most.
    pub max_write_zeroes: u32,
    /// The driver may change the cache mode.
    pub config_wce: bool,
}

impl Default for BlkConfig {
    fn default() -> BlkConfig {
        BlkConfig {
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            logical_block: 512,
            physical_block: 512,
            min_io: 0,
            opt_io: 0,
            discard_granularity: 0,
            discard: true,
            write_zeroes: true,
            max_discard: 0x3f_ffff,
            max_write_zeroes: 0x3f_ffff,
            config_wce: true,
        }
    }
}

/// A request in flight.
struct Flight {
    head: u16,
    ram: Arc<GuestRam>,
    /// Where data is read to.
    data: Spans,
    status: Spans,
    /// Used length if it succeeds.
    len: u32,
}

/// One queue and its requests.
#[derive(Default)]
struct QueueState {
    queue: Option<VirtQueue>,
    flights: HashMap<u64, Flight>,
    next_tag: u64,
    /// It is being reset: no request is taken any more.
    closing: bool,
}

/// What the engine's threads see.
struct Front {
    drive: Arc<Drive>,
    config: BlkConfig,
    queues: Vec<Mutex<QueueState>>,
    /// A queue's last request came back.
    quiet: Condvar,
    turn: AtomicUsize,
    hurried: AtomicBool,
}

/// What is to be done with a chain.
enum Parsed {
    Work(Op, Flight),
    /// Done already, with this status and length.
    Done(Flight, u8),
    /// There is nowhere to put a status.
    Mute(u16),
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_le_bytes)
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Front {
    fn parse(&self, ram: &Arc<GuestRam>, head: u16, spans: Option<(Spans, Spans)>) -> Parsed {
        let Some((readable, writable)) = spans else { return Parsed::Mute(head) };
        let Some(room) = writable.len().checked_sub(1) else { return Parsed::Mute(head) };
        let flight = |data: Spans, len: u64| Flight {
            head,
            ram: ram.clone(),
            data,
            status: writable.part(room..room + 1),
            // Longer requests exist only where descriptors overlap; their driver gets what it asked
            // for.
            len: u32::try_from(len + 1).unwrap_or(u32::MAX),
        };
        let fail = |status| Parsed::Done(flight(Spans::default(), 0), status);
        let mut header = [0; HEADER as usize];
        if !readable.read(ram, &mut header) {
            return fail(IOERR);
        }
        let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
        let given = readable.part(HEADER..readable.len());
        let wanted = writable.part(0..room);
        let at = |len: u64| sector.checked_mul(SECTOR).filter(|_| len.is_multiple_of(SECTOR));
        match kind {
            kind::IN => match at(room) {
                // SAFETY: the flight keeps the memory, and complete() notes what was written.
                Some(offset) => match unsafe { wanted.pieces(ram) } {
                    Some(to) => Parsed::Work(Op::Read(offset, to), flight(wanted, room)),
                    None => fail(IOERR),
                },
                None => fail(IOERR),
            },
            kind::OUT if self.drive.read_only() => fail(IOERR),
            kind::OUT => match at(given.len()) {
                // SAFETY: the flight keeps the memory, which is only read.
                Some(offset) => match unsafe { given.pieces(ram) } {
                    Some(from) => {
                        Parsed::Work(Op::Write(offset, from), flight(Spans::default(), 0))
                    }
                    None => fail(IOERR),
                },
                None => fail(IOERR),
            },
            kind::FLUSH => Parsed::Work(Op::Flush, flight(Spans::default(), 0)),
            kind::GET_ID => {
                let mut id = [0; SERIAL_LEN];
                let n = self.config.serial.len().min(SERIAL_LEN);
                id[..n].copy_from_slice(&self.config.serial.as_bytes()[..n]);
                let n = room.min(SERIAL_LEN as u64);
                if !wanted.part(0..n).write(ram, &id[..n as usize]) {
                    return fail(IOERR);
                }
                Parsed::Done(flight(Spans::default(), n), OK)
            }
            kind::DISCARD | kind::WRITE_ZEROES => match self.segments(ram, kind, &given) {
                Ok(op) => Parsed::Work(op, flight(Spans::default(), 0)),
                Err(status) => fail(status),
            },
            _ => fail(UNSUPP),
        }
    }

    /// The ranges of a discard or write-zeroes request (§5.2.6.2).
    fn segments(&self, ram: &GuestRam, kind: u32, given: &Spans) -> Result<Op, u8> {
        let zero = kind == kind::WRITE_ZEROES;
        let (offered, most, flags) = match zero {
            true => (self.config.write_zeroes, self.config.max_write_zeroes, UNMAP),
            false => (self.discards(), self.config.max_discard, 0),
        };
        if !offered {
            return Err(UNSUPP);
        }
        let n = given.len() / SEGMENT as u64;
        if self.drive.read_only()
            || n == 0
            || n > u64::from(MAX_SEGMENTS)
            || !given.len().is_multiple_of(SEGMENT as u64)
        {
            return Err(IOERR);
        }
        let mut raw = vec![0; n as usize * SEGMENT];
        if !given.read(ram, &mut raw) {
            return Err(IOERR);
        }
        let mut ranges = Vec::new();
        for s in raw.chunks_exact(SEGMENT) {
            let (sector, sectors, given) = (u64_at(s, 0), u32_at(s, 8), u32_at(s, 12));
            if given & !flags != 0 {
                return Err(UNSUPP);
            }
            let len = u64::from(sectors) * SECTOR;
            let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
            let end = offset.checked_add(len).ok_or(IOERR)?;
            if sectors > most || end > self.drive.size() {
                return Err(IOERR);
            }
            ranges.push((offset, len, given & UNMAP != 0));
        }
        Ok(match zero {
            true => Op::WriteZeroes(ranges),
            false => Op::Discard(ranges.into_iter().map(|(o, l, _)| (o, l)).collect()),
        })
    }

    fn discards(&self) -> bool {
        self.config.discard && self.drive.discards()
    }

    /// The next request of queue `index`. What can be answered at once is.
    fn take(&self, index: usize) -> Option<Request> {
        let mut state = self.queues.get(index)?.lock().unwrap();
        let QueueState { queue, flights, next_tag, closing } = &mut *state;
        let queue = queue.as_mut().filter(|_| !*closing)?;
        let ram = queue.ram();
        let mut answered = false;
        let request = loop {
            if flights.len() >= usize::from(queue.size()) {
                break None;
            }
            let Some(chain) = queue.pop(&ram) else {
                // Only now does the driver notify again.
                if queue.enable_notifications(&ram) && queue.has_more(&ram) {
                    continue;
                }
                break None;
            };
            let head = chain.head_index();
            match self.parse(&ram, head, Spans::of(chain)) {
                Parsed::Work(op, flight) => {
                    let tag = *next_tag;
                    *next_tag += 1;
                    flights.insert(tag, flight);
                    break Some(Request { op, tag: tag << 16 | index as u64 });
                }
                Parsed::Done(flight, status) => finish(queue, &flight, status),
                Parsed::Mute(head) => {
                    log::warn!("virtio-blk: a request has no room for its status");
                    queue.push(&ram, head, 0);
                }
            }
            answered = true;
        };
        if answered {
            queue.signal(&ram);
        }
        request
    }
}

/// Gives a request back.
fn finish(queue: &mut VirtQueue, flight: &Flight, status: u8) {
    let ram = &*flight.ram;
    if !flight.data.is_empty() {
        // Also after a failure, as a part may have been written.
        flight.data.written(ram);
    }
    if !flight.status.write(ram, &[status]) {
        log::warn!("virtio-blk: the status of a request does not lie in memory");
    }
    queue.push(ram, flight.head, if status == OK { flight.len } else { 1 });
}

impl Requester for Front {
    fn next(&self) -> Option<Request> {
        let n = self.queues.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..n).find_map(|i| self.take(first.wrapping_add(i) % n))
    }

    fn has_more(&self) -> bool {
        self.queues.iter().any(|q| {
            let state = q.lock().unwrap();
            let open = state.queue.as_ref().filter(|_| !state.closing);
            open.is_some_and(|q| q.has_more(&q.ram()))
        })
    }

    fn complete(&self, request: Request, result: Result<(), Error>) {
        let (index, tag) = ((request.tag & 0xffff) as usize, request.tag >> 16);
        let Some(state) = self.queues.get(index) else { return };
        let mut state = state.lock().unwrap();
        let QueueState { queue, flights, .. } = &mut *state;
        let Some(flight) = flights.remove(&tag) else { return };
        let status = match &result {
            Ok(()) => OK,
            Err(e) if e.is_unsupported() => UNSUPP,
            Err(e) => {
                let drive = self.drive.image().path().display().to_string();
                log::warn!("virtio-blk on '{drive}': {}", e.chain());
                IOERR
            }
        };
        if let Some(queue) = queue {
            finish(queue, &flight, status);
            queue.signal(&flight.ram);
        }
        if flights.is_empty() {
            self.quiet.notify_all();
        }
    }

    fn hurried(&self) -> bool {
        self.hurried.load(Ordering::Acquire)
    }
}

/// A block device.
pub struct VirtioBlk {
    front: Arc<Front>,
    engine: Mutex<Option<Arc<dyn Engine>>>,
    sizes: Vec<u16>,
    /// The cache mode of the drive when no driver has changed it.
    writeback: bool,
}

impl VirtioBlk {
    /// A device on `drive`.
    pub fn new(drive: Arc<Drive>, config: BlkConfig) -> VirtioBlk {
        let sizes = vec![config.queue_size; usize::from(config.queues.max(1))];
        let writeback = drive.writeback();
        let front = Arc::new(Front {
            queues: sizes.iter().map(|_| Mutex::default()).collect(),
            drive,
            config,
            quiet: Condvar::new(),
            turn: AtomicUsize::new(0),
            hurried: AtomicBool::new(false),
        });
        VirtioBlk { front, engine: Mutex::new(None), sizes, writeback }
    }

    /// The configuration space (§5.2.4).
    fn config(&self) -> [u8; 60] {
        let (f, c) = (&self.front, &self.front.config);
        let mut b = [0; 60];
        let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
        let sectors = f.drive.size() / SECTOR;
        put(0, &sectors.to_le_bytes());
        put(12, &u32::from(c.queue_size.max(3) - 2).to_le_bytes());
        // Cylinders, heads and sectors that software of old expects.
        put(16, &((sectors / (16 * 63)).min(16383) as u16).to_le_bytes());
        put(18, &[16, 63]);
        put(20, &c.logical_block.to_le_bytes());
        put(24, &[(c.physical_block / c.logical_block).trailing_zeros() as u8, 0]);
        put(26, &((c.min_io / c.logical_block) as u16).to_le_bytes());
        put(28, &(c.opt_io / c.logical_block).to_le_bytes());
        put(32, &[f.drive.writeback().into()]);
        put(34, &c.queues.to_le_bytes());
        put(36, &c.max_discard.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        let granularity = match c.discard_granularity {
            0 => c.physical_block,
            n => n,
        };
        put(44, &(granularity / SECTOR as u32).to_le_bytes());
        put(48, &c.max_write_zeroes.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        b
    }

    /// Takes queue `index` away after its last request has come back.
    fn close(&self, index: usize) {
        let Some(state) = self.front.queues.get(index) else { return };
        let mut state = state.lock().unwrap();
        state.closing = true;
        let mut state = self.front.quiet.wait_while(state, |s| !s.flights.is_empty()).unwrap();
        state.queue = None;
        state.closing = false;
    }

    fn open(&self, queue: VirtQueue) {
        if let Some(state) = self.front.queues.get(usize::from(queue.index())) {
            state.lock().unwrap().queue = Some(queue);
        }
    }

    fn kick(&self) {
        if let Some(engine) = &*self.engine.lock().unwrap() {
            engine.kick();
        }
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        let (f, c) = (&self.front, &self.front.config);
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        bit::SEG_MAX
            | bit::GEOMETRY
            | bit::BLK_SIZE
            | bit::TOPOLOGY
            | bit::FLUSH
            | when(f.drive.read_only(), bit::RO)
            | when(c.config_wce, bit::CONFIG_WCE)
            | when(c.queues > 1, bit::MQ)
            | when(f.discards(), bit::DISCARD)
            | when(c.write_zeroes && !f.drive.read_only(), bit::WRITE_ZEROES)
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let tail = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        // The only field that drivers write.
        let at = WRITEBACK.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        if let (true, Some(b)) = (self.front.config.config_wce, at.and_then(|at| data.get(at))) {
            self.front.drive.set_writeback(b & 1 != 0);
        }
    }
    fn activate(&self, activation: Activation) {
        // A driver that cannot flush must not be left with a volatile cache (§5.2.6.2).
        let knows_cache = activation.features & (bit::FLUSH | bit::CONFIG_WCE) != 0;
        if !knows_cache {
            self.front.drive.set_writeback(false);
        }
        let signaller = activation.signaller.clone();
        self.front.drive.on_resized(move || signaller.config_changed());
        let requester: Arc<dyn Requester> = self.front.clone();
        *self.engine.lock().unwrap() = Some(engine::start(&self.front.drive, requester));
        for queue in activation.queues.into_iter().flatten() {
            self.open(queue);
        }
        // Buffers may be waiting already.
        self.kick();
    }
    fn notify(&self, _queue: u16) {
        self.kick();
    }
    fn reset(&self) {
        self.front.drive.on_resized(|| {});
        self.front.hurried.store(true, Ordering::Release);
        for index in 0..self.sizes.len() {
            self.close(index);
        }
        let engine = self.engine.lock().unwrap().take();
        drop(engine);
        self.front.hurried.store(false, Ordering::Release);
        self.front.drive.set_writeback(self.writeback);
    }
    fn reset_queue(&self, queue: u16) {
        self.close(queue.into());
    }
    fn enable_queue(&self, queue: VirtQueue) {
        self.open(queue);
        self.kick();
    }
}

impl Drop for VirtioBlk {
    fn drop(&mut self) {
        self.reset();
        self.front.drive.give_back();
    }
}

const fn property(
    name: &'static str,
    kind: PropertyKind,
    default: Option<&'static str>,
    description: &'static str,
) -> Property {
    Property { name, kind, default, description }
}

const SECTORS: PropertyKind = PropertyKind::Uint { min: 1, max: 0x3f_ffff };

/// Properties, under QEMU's names.
const PROPERTIES: &[Property] = &[
    property("drive", PropertyKind::Text, None, "ID of the drive (--drive id=…)"),
    property("serial", PropertyKind::Text, None, "serial number, at most 20 bytes"),
    property("num-queues", PropertyKind::Uint { min: 1, max: 64 }, Some("1"), "request queues"),
    property("queue-size", PropertyKind::Uint { min: 2, max: 1024 }, Some("256"), "their length"),
    property("logical_block_size", PropertyKind::Size, Some("512"), "bytes of a logical block"),
    property("physical_block_size", PropertyKind::Size, Some("512"), "bytes of a physical block"),
    property("min_io_size", PropertyKind::Size, Some("0"), "least bytes of efficient I/O"),
    property("opt_io_size", PropertyKind::Size, Some("0"), "best bytes of I/O"),
    property("discard_granularity", PropertyKind::Size, None, "unit of discards"),
    property("discard", PropertyKind::Bool, Some("on"), "offer discards if the drive has them"),
    property("write-zeroes", PropertyKind::Bool, Some("on"), "offer writing of zeros"),
    property("max-discard-sectors", SECTORS, Some("0x3fffff"), "of one discard"),
    property("max-write-zeroes-sectors", SECTORS, Some("0x3fffff"), "of one write of zeros"),
    property("config-wce", PropertyKind::Bool, Some("on"), "the driver may change the cache mode"),
    property(
        "write-cache",
        PropertyKind::Choice(&["auto", "on", "off"]),
        Some("auto"),
        "whether writes are cached until a flush; auto as the drive's cache mode says",
    ),
    crate::firmware::bootorder::PROPERTY,
];

impl BlkConfig {
    /// Reads the properties and judges how they fit together.
    fn from_properties(p: &Properties) -> Result<BlkConfig, DeviceFault> {
        let n = |name: &str| p.uint(name).unwrap_or(0);
        let (logical, physical) = (n("logical_block_size"), n("physical_block_size"));
        let is_block = |b: u64| b.is_power_of_two() && (512..=2 << 20).contains(&b);
        if !is_block(logical) || !is_block(physical) || physical < logical {
            return Err(DeviceFault::new(
                format!("block sizes {logical} (logical) and {physical} (physical) do not fit"),
                "use powers of two from 512 to 2M, the physical one no smaller",
            ));
        }
        let (min_io, opt_io) = (n("min_io_size"), n("opt_io_size"));
        if min_io % logical != 0
            || opt_io % logical != 0
            || min_io / logical > 0xffff
            || opt_io >> 32 != 0
        {
            return Err(DeviceFault::new(
                format!("I/O sizes {min_io} and {opt_io} do not fit"),
                "use multiples of the logical block size",
            ));
        }
        let granularity = n("discard_granularity");
        if granularity % logical != 0 || granularity >> 32 != 0 {
            return Err(DeviceFault::new(
                format!("a discard granularity of {granularity} does not fit"),
                "use a multiple of the logical block size",
            ));
        }
        let serial = p.text("serial").unwrap_or_default().to_string();
        if serial.len() > SERIAL_LEN {
            return Err(DeviceFault::new(
                format!("serial number '{serial}' is longer than {SERIAL_LEN} bytes"),
                "shorten it",
            ));
        }
        let queue_size = n("queue-size") as u16;
        if !queue_size.is_power_of_two() {
            return Err(DeviceFault::new(
                format!("queue-size {queue_size} is no power of two"),
                "use for example 256",
            ));
        }
        Ok(BlkConfig {
            serial,
            queues: n("num-queues") as u16,
            queue_size,
            logical_block: logical as u32,
            physical_block: physical as u32,
            min_io: min_io as u32,
            opt_io: opt_io as u32,
            discard_granularity: granularity as u32,
            discard: p.bool("discard"),
            write_zeroes: p.bool("write-zeroes"),
            max_discard: n("max-discard-sectors") as u32,
            max_write_zeroes: n("max-write-zeroes-sectors") as u32,
            config_wce: p.bool("config-wce"),
        })
    }
}

/// Makes a disk of the drive that `props` name.
fn make(ctx: &DeviceContext, props: &Properties) -> Result<Arc<VirtioBlk>, DeviceFault> {
    let config = BlkConfig::from_properties(props)?;
    let Some(id) = props.text("drive") else {
        return Err(DeviceFault::new("it has no drive", "name one with drive=ID"));
    };
    let drive = ctx.backends.drive(id)?;
    if drive.size() % u64::from(config.logical_block) != 0 {
        return Err(DeviceFault::new(
            format!("drive '{id}' is not a whole number of logical blocks"),
            "use a smaller logical_block_size",
        ));
    }
    match props.text("write-cache") {
        Some("on") => drive.set_writeback(true),
        Some("off") => drive.set_writeback(false),
        _ => {}
    }
    if !drive.take() {
        return Err(DeviceFault::new(
            format!("drive '{id}' has a device already"),
            "give each device a drive of its own",
        ));
    }
    Ok(Arc::new(VirtioBlk::new(drive, config)))
}

inventory::submit! {
    DeviceType {
        name: "virtio-blk-pci",
        bus: BusKind::Pci,
        description: "disk",
        properties: PROPERTIES,
        create: |ctx, props| pci::attach(ctx, props, "virtio-blk-pci", make(ctx, props)?),
    }
}

inventory::submit! {
    DeviceType {
        name: "virtio-blk-device",
        bus: BusKind::VirtioMmio,
        description: "disk",
        properties: PROPERTIES,
        create: |ctx, props| mmio::attach(ctx, make(ctx, props)?),
    }
}

#[cfg(test)]
mod tests;
