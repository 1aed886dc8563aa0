//! The controller: registers, queues, and the commands on their way (NVM Express Base 1.4 §3, §7).
//!
//! What always holds:
//!
//! * Commands are taken off the queues, worked on and given back by the engine of the drive; a
//!   doorbell only wakes it. A command is taken only if there is room for its completion.
//! * After CC.EN is cleared, CSTS.RDY stays until nothing is in flight: the host's memory is its own
//!   again when the controller says that it has stopped.
//! * A doorbell that makes no sense is dropped; queues that do not lie in memory are a fatal status.
//! * Lock order: the state's lock → interrupts.

use super::admin;
use super::command::{Command, PAGE, Status};
use super::identify::{Facts, MAX_TRANSFER, VERSION};
use super::queue::{Completion, End, Submission};
use crate::pci::{Intx, Msix};
use crate::spans::Spans;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use tandem_accel::memory::{GuestMap, GuestRam};
use tandem_backends::block::Error;
use tandem_backends::block::drive::{Drive, Op};
use tandem_backends::block::engine::{Request, Requester};

/// Most entries of a queue.
pub const MAX_ENTRIES: u16 = 1024;
/// Where doorbells start.
const DOORBELLS: u64 = 0x1000;
/// Requests in flight, at most.
const MAX_FLIGHTS: usize = 4096;
/// The tag of the flush that a shutdown asks for.
const SHUTDOWN: u64 = u64::MAX;

/// Registers (§3.1).
mod reg {
    pub const CAP: u64 = 0x00;
    pub const CAP_HIGH: u64 = 0x04;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ASQ_HIGH: u64 = 0x2c;
    pub const ACQ: u64 = 0x30;
    pub const ACQ_HIGH: u64 = 0x34;
}

const ENABLE: u32 = 1;
/// CC: the fields that software may set.
const CC_BITS: u32 = 0x00ff_fff1;
/// CC: a shutdown is asked for.
const CC_SHUTDOWN: u32 = 3 << 14;
const READY: u32 = 1;
const FATAL: u32 = 1 << 1;
/// CSTS: shutdown is going on, is complete.
const SHUTTING_DOWN: u32 = 1 << 2;
const SHUT_DOWN: u32 = 2 << 2;

/// Commands of a namespace (NVM Command Set 1.4 §6).
mod op {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// A request that the engine works on.
struct Flight {
    epoch: u32,
    queue: u16,
    id: u16,
    ram: Arc<GuestRam>,
    into: Spans,
    durable: bool,
}

/// Queues and registers.
#[derive(Default)]
pub struct State {
    cc: u32,
    status: u32,
    mask: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Submission queues by number; 0 is the admin queue.
    pub submissions: Vec<Option<Submission>>,
    /// Completion queues by number.
    pub completions: Vec<Option<Completion>>,
    /// What Set Features has set.
    pub features: admin::Features,
    /// Requests for events that wait.
    pub events: Vec<u16>,
    turn: usize,
    shutdown: bool,
    epoch: u32,
    next_tag: u64,
    flights: HashMap<u64, Flight>,
    stale: usize,
}

/// The controller.
pub struct Controller {
    /// What it says of itself.
    pub facts: Facts,
    /// Pairs of queues besides the admin queues.
    pub pairs: u16,
    /// Interrupt vectors.
    pub msix: Arc<Msix>,
    intx: Arc<Intx>,
    drive: Arc<Drive>,
    writeback: bool,
    memory: Arc<GuestMap>,
    state: Mutex<State>,
    quiet: Condvar,
    hurried: AtomicBool,
}

/// What became of a command.
enum Issued {
    /// It is done.
    Done(End),
    /// It is kept; nothing is told of it now.
    Kept,
    /// The drive has to do this; data is read into these spans; it must be durable.
    Work(Op, Spans, bool),
    /// It waits for others of its queue's.
    Waits,
}

impl From<Status> for Issued {
    fn from(s: Status) -> Issued {
        Issued::Done(s.into())
    }
}

impl Controller {
    /// A controller of `drive`, off.
    pub fn new(
        facts: Facts,
        pairs: u16,
        drive: Arc<Drive>,
        memory: Arc<GuestMap>,
        (msix, intx): (Arc<Msix>, Arc<Intx>),
    ) -> Controller {
        Controller {
            facts,
            pairs,
            msix,
            intx,
            writeback: drive.writeback(),
            drive,
            memory,
            state: Mutex::default(),
            quiet: Condvar::new(),
            hurried: AtomicBool::new(false),
        }
    }

    /// The drive.
    pub fn drive(&self) -> &Arc<Drive> {
        &self.drive
    }

    /// Bytes of the registers: doorbells included, a power of two.
    pub fn len(&self) -> u64 {
        (DOORBELLS + (u64::from(self.pairs) + 1) * 8).next_power_of_two().max(0x4000)
    }

    /// Reads a register.
    pub fn read(&self, at: u64) -> u32 {
        let s = self.state.lock().unwrap();
        match at {
            // Entries of a queue less one; queues are contiguous; 7.5 s to get ready; NVM commands.
            reg::CAP => u32::from(MAX_ENTRIES - 1) | 1 << 16 | 15 << 24,
            reg::CAP_HIGH => 1 << 5,
            reg::VS => VERSION,
            reg::INTMS | reg::INTMC => s.mask,
            reg::CC => s.cc,
            reg::CSTS => s.status | if s.stale > 0 { READY } else { 0 },
            reg::AQA => s.aqa,
            reg::ASQ => s.asq as u32,
            reg::ASQ_HIGH => (s.asq >> 32) as u32,
            reg::ACQ => s.acq as u32,
            reg::ACQ_HIGH => (s.acq >> 32) as u32,
            _ => 0,
        }
    }

    /// Writes a register. Returns whether there may be a command to be worked on.
    pub fn write(&self, at: u64, value: u32) -> bool {
        let mut s = self.state.lock().unwrap();
        let page = u64::from(value & !(PAGE as u32 - 1));
        match at {
            reg::INTMS => {
                s.mask |= value;
                self.follow(&s);
            }
            reg::INTMC => {
                s.mask &= !value;
                self.follow(&s);
            }
            reg::CC => return self.configure(&mut s, value & CC_BITS),
            reg::AQA if s.cc & ENABLE == 0 => s.aqa = value & 0x0fff_0fff,
            reg::ASQ if s.cc & ENABLE == 0 => s.asq = s.asq >> 32 << 32 | page,
            reg::ASQ_HIGH if s.cc & ENABLE == 0 => {
                s.asq = s.asq & 0xffff_ffff | u64::from(value) << 32;
            }
            reg::ACQ if s.cc & ENABLE == 0 => s.acq = s.acq >> 32 << 32 | page,
            reg::ACQ_HIGH if s.cc & ENABLE == 0 => {
                s.acq = s.acq & 0xffff_ffff | u64::from(value) << 32;
            }
            _ if at >= DOORBELLS => return self.doorbell(&mut s, (at - DOORBELLS) / 4, value),
            _ => {}
        }
        false
    }

    fn doorbell(&self, s: &mut State, n: u64, value: u32) -> bool {
        let queue = usize::try_from(n / 2).unwrap_or(usize::MAX);
        let good = if n.is_multiple_of(2) {
            s.submissions.get_mut(queue).and_then(Option::as_mut).map(|q| q.set_tail(value))
        } else {
            s.completions.get_mut(queue).and_then(Option::as_mut).map(|q| q.set_head(value))
        };
        if good != Some(true) {
            log::debug!("nvme: doorbell {n} does not take {value:#x}");
            return false;
        }
        self.follow(s);
        true
    }

    fn configure(&self, s: &mut State, value: u32) -> bool {
        let old = std::mem::replace(&mut s.cc, value);
        if old & ENABLE == 0 && value & ENABLE != 0 {
            self.enable(s);
        } else if old & !value & ENABLE != 0 {
            self.stop(s);
        }
        if value & CC_SHUTDOWN != 0 && old & CC_SHUTDOWN == 0 {
            s.shutdown = true;
            s.status |= SHUTTING_DOWN;
            return true;
        }
        if value & CC_SHUTDOWN == 0 {
            s.status &= !(SHUTTING_DOWN | SHUT_DOWN);
        }
        false
    }

    fn enable(&self, s: &mut State) {
        let entries = |n: u32| (n & 0xfff) as u16 + 1;
        let (submission, completion) = (entries(s.aqa), entries(s.aqa >> 16));
        // NVM commands, pages of 4 KiB, entries of 64 and 16 bytes once there are other queues.
        let fits = s.cc >> 4 & 7 == 0 && s.cc >> 7 & 0xf == 0;
        if !fits || submission < 2 || completion < 2 {
            log::debug!("nvme: cannot start with CC {:#x} and AQA {:#x}", s.cc, s.aqa);
            s.status |= FATAL;
            return;
        }
        let room = usize::from(self.pairs) + 1;
        s.submissions = (0..room).map(|_| None).collect();
        s.completions = (0..room).map(|_| None).collect();
        s.submissions[0] = Some(Submission::new(s.asq, submission, 0));
        let mut c = Completion::new(s.acq, completion, Some(0));
        c.users = 1;
        s.completions[0] = Some(c);
        s.features = admin::Features::default();
        s.status |= READY;
    }

    /// Gives up everything that is on its way.
    fn stop(&self, s: &mut State) {
        s.epoch = s.epoch.wrapping_add(1);
        s.stale = s.flights.len();
        (s.status, s.mask, s.shutdown) = (0, 0, false);
        s.submissions.clear();
        s.completions.clear();
        s.events.clear();
        self.hurried.store(s.stale > 0, Ordering::Release);
        self.follow(s);
    }

    /// Back to the state after power-on. Returns when nothing is in flight any more.
    pub fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        self.stop(&mut s);
        let mut s = self.quiet.wait_while(s, |s| s.stale > 0).unwrap();
        *s = State { epoch: s.epoch, next_tag: s.next_tag, ..State::default() };
        drop(s);
        self.drive.set_writeback(self.writeback);
    }

    /// The pin: asserted while a completion waits, where there are no messages (§7.5.1).
    fn follow(&self, s: &State) {
        let waits = |c: &Completion| {
            let v = c.vector.filter(|_| c.is_pending());
            v.is_some_and(|v| s.mask & 1u32.checked_shl(v.into()).unwrap_or(0) == 0)
        };
        let on = !self.msix.enabled() && s.completions.iter().flatten().any(waits);
        self.intx.set(on);
    }

    /// Posts the end of command `id` of queue `queue`.
    fn post(&self, s: &mut State, ram: &GuestRam, (queue, id): (u16, u16), end: End) {
        let from = s.submissions.get(usize::from(queue)).and_then(Option::as_ref);
        let Some((head, completion)) = from.map(|q| (q.head(), q.completion)) else { return };
        let to = s.completions.get_mut(usize::from(completion)).and_then(Option::as_mut);
        let Some(c) = to else { return };
        let (done, vector) = (c.post(ram, (queue, head), id, end), c.vector);
        if !done {
            log::debug!("nvme: completion queue {completion} is not in memory");
            s.status |= FATAL;
        }
        match vector {
            Some(v) if self.msix.enabled() => self.msix.notify(v),
            _ => self.follow(s),
        }
    }

    /// Whether commands of queue `n` are still with the drive.
    fn is_busy(s: &State, n: u16) -> bool {
        s.flights.values().any(|f| f.queue == n && f.epoch == s.epoch)
    }

    /// The next request: of the admin queue first, then of the others in turn.
    fn take(&self, s: &mut State) -> Option<Request> {
        if s.shutdown {
            s.shutdown = false;
            return Some(Request { op: Op::Flush, tag: SHUTDOWN });
        }
        let ram = self.memory.ram();
        loop {
            if s.status & READY == 0 || s.status & FATAL != 0 || s.stale > 0 {
                return None;
            }
            let n = s.submissions.len();
            let io = (0..n.saturating_sub(1)).map(|i| 1 + (s.turn + i) % (n - 1));
            let ready = |i: &usize| {
                let Some(q) = s.submissions.get(*i).and_then(Option::as_ref) else { return false };
                let c = s.completions.get(usize::from(q.completion)).and_then(Option::as_ref);
                q.has_more() && c.is_some_and(Completion::has_room)
            };
            let mut found = None;
            for queue in std::iter::once(0).chain(io).filter(ready).collect::<Vec<_>>() {
                match self.issue(s, queue, &ram) {
                    Some(Issued::Waits) => continue,
                    other => {
                        found = Some((queue as u16, other));
                        break;
                    }
                }
            }
            let (queue, issued) = found?;
            s.turn = usize::from(queue);
            match issued {
                Some(Issued::Work(op, into, durable)) => {
                    let tag = s.next_tag;
                    s.next_tag = tag.wrapping_add(1) & (u64::MAX >> 1);
                    let id = self.expect(s, queue, &ram)?;
                    let (epoch, ram) = (s.epoch, self.memory.ram());
                    s.flights.insert(tag, Flight { epoch, queue, id, ram, into, durable });
                    return Some(Request { op, tag });
                }
                Some(Issued::Done(end)) => {
                    let id = self.pass(s, queue, &ram)?;
                    self.post(s, &ram, (queue, id), end);
                }
                Some(Issued::Kept) => {
                    self.pass(s, queue, &ram)?;
                }
                Some(Issued::Waits) => return None,
                None => {
                    log::debug!("nvme: submission queue {queue} is not in memory");
                    s.status |= FATAL;
                }
            }
        }
    }

    /// Takes the next command off `queue`; returns its name.
    fn pass(&self, s: &mut State, queue: u16, ram: &GuestRam) -> Option<u16> {
        let q = s.submissions.get_mut(usize::from(queue))?.as_mut()?;
        let id = q.peek(ram)?.id;
        q.advance();
        Some(id)
    }

    /// The same, and its completion is to come.
    fn expect(&self, s: &mut State, queue: u16, ram: &GuestRam) -> Option<u16> {
        let id = self.pass(s, queue, ram)?;
        let completion = s.submissions.get(usize::from(queue))?.as_ref()?.completion;
        s.completions.get_mut(usize::from(completion))?.as_mut()?.expected += 1;
        Some(id)
    }

    /// Looks at the next command of queue `n`; `None` if it is not in memory.
    fn issue(&self, s: &mut State, n: usize, ram: &Arc<GuestRam>) -> Option<Issued> {
        let c = s.submissions.get(n)?.as_ref()?.peek(ram)?;
        // Fused commands and scatter lists are not offered.
        if c.flags != 0 {
            return Some(Status::FIELD.into());
        }
        if n == 0 {
            return Some(match admin::execute(self, s, &c, ram, Self::is_busy) {
                admin::Reply::Done(end) => Issued::Done(end),
                admin::Reply::Kept => Issued::Kept,
                admin::Reply::Waits => Issued::Waits,
            });
        }
        if s.flights.len() >= MAX_FLIGHTS {
            return Some(Issued::Waits);
        }
        Some(self.io(&c, ram).unwrap_or_else(Issued::from))
    }

    /// A range of blocks as offset and length in bytes.
    fn range(&self, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
        let end = first.checked_add(blocks).ok_or(Status::LBA_RANGE)?;
        if end > self.facts.blocks {
            return Err(Status::LBA_RANGE);
        }
        Ok((first << self.facts.block_shift, blocks << self.facts.block_shift))
    }

    fn io(&self, c: &Command, ram: &Arc<GuestRam>) -> Result<Issued, Status> {
        let blocks = u64::from(c.words[2] & 0xffff) + 1;
        let fua = c.words[2] & 1 << 30 != 0;
        let all = c.opcode == op::FLUSH && c.namespace == u32::MAX;
        if c.namespace != 1 && !all {
            return Err(Status::NAMESPACE);
        }
        let writes = matches!(c.opcode, op::WRITE | op::WRITE_ZEROES | op::DATASET_MANAGEMENT);
        if writes && self.facts.read_only {
            return Err(Status::READ_ONLY);
        }
        let work = |op| Ok(Issued::Work(op, Spans::default(), fua));
        match c.opcode {
            op::FLUSH => Ok(Issued::Work(Op::Flush, Spans::default(), false)),
            op::READ | op::WRITE => {
                let (offset, len) = self.range(c.wide(), blocks)?;
                if len > PAGE << MAX_TRANSFER {
                    return Err(Status::FIELD);
                }
                let spans = c.data(ram, len)?;
                if c.opcode == op::WRITE {
                    // SAFETY: the flight keeps the memory, which is only read.
                    let from = unsafe { spans.pieces(ram) }.ok_or(Status::TRANSFER)?;
                    return work(Op::Write(offset, from));
                }
                // SAFETY: the flight keeps the memory, and complete() notes what was written.
                let to = unsafe { spans.pieces(ram) }.ok_or(Status::TRANSFER)?;
                Ok(Issued::Work(Op::Read(offset, to), spans, false))
            }
            op::WRITE_ZEROES => {
                let (offset, len) = self.range(c.wide(), blocks)?;
                let unmap = c.words[2] & 1 << 25 != 0;
                work(Op::WriteZeroes(vec![(offset, len, unmap)]))
            }
            op::DATASET_MANAGEMENT if self.facts.discard => {
                let n = (c.words[0] & 0xff) + 1;
                let spans = c.data(ram, u64::from(n) * 16)?;
                let mut raw = vec![0; n as usize * 16];
                if !spans.read(ram, &mut raw) {
                    return Err(Status::TRANSFER);
                }
                let mut ranges = Vec::new();
                for r in raw.chunks_exact(16) {
                    let at = |i: usize| u32::from_le_bytes([r[i], r[i + 1], r[i + 2], r[i + 3]]);
                    let first = u64::from(at(8)) | u64::from(at(12)) << 32;
                    ranges.push(self.range(first, at(4).into())?);
                }
                // Only giving up does anything; the rest is advice.
                match c.words[1] & 4 != 0 {
                    true => Ok(Issued::Work(Op::Discard(ranges), Spans::default(), false)),
                    false => Err(Status::OK),
                }
            }
            _ => Err(Status::OPCODE),
        }
    }
}

impl Requester for Controller {
    fn next(&self) -> Option<Request> {
        let mut s: MutexGuard<'_, State> = self.state.lock().unwrap();
        self.take(&mut s)
    }

    fn has_more(&self) -> bool {
        let s = self.state.lock().unwrap();
        s.shutdown || s.stale == 0 && s.submissions.iter().flatten().any(Submission::has_more)
    }

    fn complete(&self, request: Request, mut result: Result<(), Error>) {
        let durable =
            self.state.lock().unwrap().flights.get(&request.tag).is_some_and(|f| f.durable);
        if durable && result.is_ok() {
            result = self.drive.execute(&Op::Flush);
        }
        let mut s = self.state.lock().unwrap();
        if request.tag == SHUTDOWN {
            if s.cc & CC_SHUTDOWN != 0 {
                s.status = s.status & !SHUTTING_DOWN | SHUT_DOWN;
            }
            return;
        }
        let Some(flight) = s.flights.remove(&request.tag) else { return };
        // Also after a failure, as a part may have been written.
        flight.into.written(&flight.ram);
        if flight.epoch != s.epoch {
            s.stale = s.stale.saturating_sub(1);
            if s.stale == 0 {
                self.hurried.store(false, Ordering::Release);
                self.quiet.notify_all();
            }
            return;
        }
        let status = match (&result, &request.op) {
            (Ok(()), _) => Status::OK,
            (Err(e), op) => {
                log::warn!("nvme on '{}': {}", self.drive.image().path().display(), e.chain());
                if matches!(op, Op::Read(..)) { Status::READ_ERROR } else { Status::WRITE_FAULT }
            }
        };
        let from = s.submissions.get(usize::from(flight.queue)).and_then(Option::as_ref);
        if let Some(to) = from.map(|q| usize::from(q.completion))
            && let Some(c) = s.completions.get_mut(to).and_then(Option::as_mut)
        {
            c.expected = c.expected.saturating_sub(1);
        }
        self.post(&mut s, &flight.ram, (flight.queue, flight.id), status.into());
    }

    fn hurried(&self) -> bool {
        self.hurried.load(Ordering::Acquire)
    }
}
