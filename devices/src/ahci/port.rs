//! A port: its registers, and the commands that its device works on (Serial ATA AHCI 1.3.1 §3.3,
//! §5).
//!
//! What always holds:
//!
//! * Commands are taken off the list, worked on and given back by the engine of the drive; a vCPU
//!   that issues one only wakes it. A device without a drive answers at once.
//! * One command at a time, or up to 32 queued ones. After an error none is taken until software
//!   stops and starts the list, as the specification says.
//! * Nothing is written to guest memory for a command that software has given up, once a register
//!   says that the list has stopped (CMD.CR, GHC.HR), or that the device is ready again after a
//!   reset: these wait for requests in flight.
//! * Lock order: a port's lock → the adapter's interrupt.

use super::fis::{Frame, Header, Received};
use super::irq::Irq;
use super::target::{
    self, ABRT, Action, BSY, Command, DRDY, DRQ, DSC, Protocol, Registers, Target,
};
use crate::spans::Spans;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use tandem_accel::memory::{GuestMap, GuestRam};
use tandem_backends::block::Error;
use tandem_backends::block::drive::Op;
use tandem_backends::block::engine::{Request, Requester};

/// Slots of a command list.
pub const SLOTS: u8 = 32;
/// Most bytes that a command may want from the host before it is worked on.
const MAX_WANTED: u32 = 64 << 10;

/// Offsets of a port's registers (§3.3).
pub mod reg {
    /// Command list base.
    pub const CLB: u64 = 0x00;
    /// Its upper half.
    pub const CLBU: u64 = 0x04;
    /// Area of received frames.
    pub const FB: u64 = 0x08;
    /// Its upper half.
    pub const FBU: u64 = 0x0c;
    /// Interrupt status.
    pub const IS: u64 = 0x10;
    /// Interrupt enable.
    pub const IE: u64 = 0x14;
    /// Command and status.
    pub const CMD: u64 = 0x18;
    /// Status and error of the device.
    pub const TFD: u64 = 0x20;
    /// Signature.
    pub const SIG: u64 = 0x24;
    /// State of the link.
    pub const SSTS: u64 = 0x28;
    /// Control of the link.
    pub const SCTL: u64 = 0x2c;
    /// Errors of the link.
    pub const SERR: u64 = 0x30;
    /// Queued commands that are not done.
    pub const SACT: u64 = 0x34;
    /// Commands that are not done.
    pub const CI: u64 = 0x38;
}

/// Bits of CMD.
pub mod cmd {
    /// The list is worked on.
    pub const ST: u32 = 1;
    /// Frames are received.
    pub const FRE: u32 = 1 << 4;
    pub(super) const SPIN_UP: u32 = 1 << 1;
    pub(super) const POWER: u32 = 1 << 2;
    pub(super) const CLEAR_BUSY: u32 = 1 << 3;
    /// Frames are being received.
    pub const FR: u32 = 1 << 14;
    /// The list is being worked on.
    pub const CR: u32 = 1 << 15;
    /// Is a packet device; software writes it for itself.
    pub(super) const ATAPI: u32 = 1 << 24 | 1 << 25;
}

/// Bits of IS and IE.
pub mod irq {
    /// A device-to-host frame.
    pub const DHRS: u32 = 1;
    /// A PIO set-up frame.
    pub const PSS: u32 = 1 << 1;
    /// A set-device-bits frame.
    pub const SDBS: u32 = 1 << 3;
    pub(super) const DPS: u32 = 1 << 5;
    /// The device came or went.
    pub const PCS: u32 = 1 << 6;
    /// More data than regions for it.
    pub const OFS: u32 = 1 << 24;
    /// Something does not lie in memory.
    pub const HBFS: u32 = 1 << 29;
    /// The device told of an error.
    pub const TFES: u32 = 1 << 30;
    /// All that software may clear, and all that it may enable.
    pub(super) const CLEARED: u32 = 0xfd80_00af;
    pub(super) const ENABLED: u32 = 0xfdc0_00ff;
}

/// SERR: the device came or went.
const EXCHANGED: u32 = 1 << 26;
/// SSTS: a device is there, at 3 Gbit/s, active.
const LINK_UP: u32 = 0x123;
/// SCTL: what software may set; its field for the link; a reset of the device.
const SCTL_BITS: u32 = 0xfff;
const DET: u32 = 0xf;
const COMRESET: u32 = 1;
/// TFD and SIG where there is no device.
const NOTHING: u8 = 0x7f;

/// A request that the engine works on.
struct Flight {
    /// Of which start of the list it is.
    epoch: u32,
    slot: u8,
    command: Command,
    protocol: Protocol,
    header: Header,
    ram: Arc<GuestRam>,
    /// Where data is read to.
    into: Spans,
    bytes: u64,
    durable: bool,
}

#[derive(Default)]
struct State {
    list: u64,
    frames: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    sctl: u32,
    serr: u32,
    sact: u32,
    ci: u32,
    current: u8,
    registers: Registers,
    signature: u32,
    /// The first frame after a reset waits until frames are received.
    greeting: bool,
    /// An error has stopped the list.
    halted: bool,
    /// A command that is not queued is being worked on.
    busy: bool,
    /// The control register's software reset bit.
    software_reset: bool,
    epoch: u32,
    next_tag: u64,
    flights: HashMap<u64, Flight>,
    /// Flights of earlier epochs.
    stale: usize,
    /// The device gets ready when those are back.
    arriving: bool,
}

/// A port.
pub struct Port {
    index: u8,
    state: Mutex<State>,
    /// A stale flight came back.
    quiet: Condvar,
    hurried: AtomicBool,
    target: Mutex<Option<Arc<dyn Target>>>,
    memory: Arc<GuestMap>,
    irq: Arc<Irq>,
}

impl Port {
    /// Port `index` (0–31) with nothing on it.
    pub fn new(index: u8, memory: Arc<GuestMap>, irq: Arc<Irq>) -> Port {
        let port = Port {
            index,
            state: Mutex::default(),
            quiet: Condvar::new(),
            hurried: AtomicBool::new(false),
            target: Mutex::new(None),
            memory,
            irq,
        };
        port.arrive(&mut port.state.lock().unwrap());
        port
    }

    /// Puts `target` here; false if there is one already.
    pub fn plug(&self, target: Arc<dyn Target>) -> bool {
        {
            let mut t = self.target.lock().unwrap();
            if t.is_some() {
                return false;
            }
            *t = Some(target);
        }
        self.arrive(&mut self.state.lock().unwrap());
        true
    }

    /// Whether nothing is plugged in.
    pub fn is_free(&self) -> bool {
        self.target.lock().unwrap().is_none()
    }

    fn target(&self) -> Option<Arc<dyn Target>> {
        self.target.lock().unwrap().clone()
    }

    /// The device is there, as after power-on.
    fn arrive(&self, s: &mut State) {
        s.arriving = false;
        match self.target() {
            Some(t) => {
                t.reset();
                s.registers = t.after_reset();
                s.signature = t.signature();
                s.greeting = true;
                self.greet(s);
            }
            None => {
                s.registers = Registers { status: NOTHING, ..Registers::default() };
                s.signature = u32::MAX;
            }
        }
    }

    /// Sends the first frame after a reset, if frames are received.
    fn greet(&self, s: &mut State) {
        if s.greeting && s.cmd & cmd::FRE != 0 {
            s.greeting = false;
            Self::received(s, &self.memory.ram()).device_to_host(false, &s.registers);
        }
    }

    fn received<'a>(s: &State, ram: &'a GuestRam) -> Received<'a> {
        Received { ram, area: (s.cmd & cmd::FRE != 0).then_some(s.frames) }
    }

    /// Gives up what is in flight.
    fn abandon(&self, s: &mut State) {
        s.epoch = s.epoch.wrapping_add(1);
        s.stale = s.flights.len();
        (s.ci, s.sact, s.busy, s.halted) = (0, 0, false, false);
        self.hurried.store(s.stale > 0, Ordering::Release);
    }

    fn interrupt(&self, s: &mut State, bits: u32) {
        s.is |= bits;
        self.follow(s);
    }

    fn shown(s: &State) -> u32 {
        s.is | if s.serr & EXCHANGED != 0 { irq::PCS } else { 0 }
    }

    fn follow(&self, s: &State) {
        if Self::shown(s) & s.ie != 0 {
            self.irq.raise(self.index);
        }
    }

    /// Raises the adapter's interrupt again if this port still wants one.
    pub fn refresh(&self) {
        self.follow(&self.state.lock().unwrap());
    }

    /// Reads a register.
    pub fn read(&self, at: u64) -> u32 {
        let s = self.state.lock().unwrap();
        let there = !self.is_free();
        match at {
            reg::CLB => s.list as u32,
            reg::CLBU => (s.list >> 32) as u32,
            reg::FB => s.frames as u32,
            reg::FBU => (s.frames >> 32) as u32,
            reg::IS => Self::shown(&s),
            reg::IE => s.ie,
            reg::CMD => {
                let on = |on: bool, bit: u32| if on { bit } else { 0 };
                let running = s.cmd & cmd::ST != 0 || s.stale > 0;
                s.cmd
                    | cmd::SPIN_UP
                    | cmd::POWER
                    | u32::from(s.current) << 8
                    | on(s.cmd & cmd::FRE != 0, cmd::FR)
                    | on(running, cmd::CR)
            }
            reg::TFD => u32::from(s.registers.status) | u32::from(s.registers.error) << 8,
            reg::SIG => s.signature,
            reg::SSTS if there && s.sctl & DET == 0 => LINK_UP,
            reg::SSTS if s.sctl & DET == 4 => 4,
            reg::SCTL => s.sctl,
            reg::SERR => s.serr,
            reg::SACT => s.sact,
            reg::CI => s.ci,
            _ => 0,
        }
    }

    /// Writes a register. Returns whether there may be a command to be worked on.
    pub fn write(&self, at: u64, value: u32) -> bool {
        let mut s = self.state.lock().unwrap();
        let low = |old: u64, align: u32| old >> 32 << 32 | u64::from(value & !(align - 1));
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            reg::CLB => s.list = low(s.list, 1024),
            reg::CLBU => s.list = high(s.list),
            reg::FB => s.frames = low(s.frames, 256),
            reg::FBU => s.frames = high(s.frames),
            reg::IS => s.is &= !(value & irq::CLEARED),
            reg::IE => {
                s.ie = value & irq::ENABLED;
                self.follow(&s);
            }
            reg::CMD => return self.command(&mut s, value),
            reg::SCTL => self.link(&mut s, value & SCTL_BITS),
            reg::SERR => s.serr &= !value,
            // Only while the list is worked on (§3.3.13, §3.3.14).
            reg::SACT if s.cmd & cmd::ST != 0 => s.sact |= value,
            reg::CI if s.cmd & cmd::ST != 0 => {
                s.ci |= value;
                return true;
            }
            _ => {}
        }
        false
    }

    fn command(&self, s: &mut State, value: u32) -> bool {
        let old = s.cmd;
        s.cmd = value & (cmd::ST | cmd::FRE | cmd::ATAPI);
        if value & cmd::CLEAR_BUSY != 0 {
            s.registers.status &= !(BSY | DRQ);
        }
        self.greet(s);
        if old & !s.cmd & cmd::ST != 0 {
            self.abandon(s);
            s.current = 0;
        }
        s.cmd & !old & cmd::ST != 0
    }

    /// Software resets the device, or turns the link off.
    fn link(&self, s: &mut State, value: u32) {
        let old = s.sctl & DET;
        s.sctl = value;
        if value & DET == COMRESET && old != COMRESET {
            self.abandon(s);
            s.registers = Registers { status: BSY, ..Registers::default() };
            s.greeting = false;
        } else if value & DET == 0 && old != 0 {
            s.arriving = true;
            if !self.is_free() {
                s.serr |= EXCHANGED;
                self.follow(s);
            }
            self.settle(s);
        }
    }

    /// Lets the device arrive if nothing is in flight any more.
    fn settle(&self, s: &mut State) {
        if s.arriving && s.stale == 0 {
            self.arrive(s);
        }
    }

    /// Whether requests that software has given up are still in flight.
    pub fn is_stale(&self) -> bool {
        self.state.lock().unwrap().stale > 0
    }

    /// A reset of the adapter, or of the machine. Requests in flight are given up.
    pub fn reset(&self) {
        let mut s = self.state.lock().unwrap();
        self.abandon(&mut s);
        let kept = std::mem::take(&mut *s);
        *s = State {
            epoch: kept.epoch,
            next_tag: kept.next_tag,
            flights: kept.flights,
            stale: kept.stale,
            arriving: true,
            registers: Registers { status: BSY, ..Registers::default() },
            ..State::default()
        };
        self.settle(&mut s);
    }

    /// Waits until no request is in flight.
    pub fn drain(&self) {
        let s = self.state.lock().unwrap();
        drop(self.quiet.wait_while(s, |s| s.stale > 0).unwrap());
    }

    /// Whether the list is worked on.
    fn runs(s: &State) -> bool {
        s.cmd & cmd::ST != 0 && !s.halted && s.stale == 0 && !s.arriving
    }

    /// The next slot in turn that has a command.
    fn slot(s: &State) -> Option<u8> {
        let after = (s.current + 1) % SLOTS;
        let turned = s.ci.rotate_right(after.into());
        (turned != 0).then(|| (after + turned.trailing_zeros() as u8) % SLOTS)
    }

    /// A structure is not in memory: the list stops.
    fn fatal(&self, s: &mut State) {
        s.halted = true;
        self.interrupt(s, irq::HBFS);
    }

    /// The end of a command that came to registers `r` after moving `bytes`.
    fn finish(
        &self,
        s: &mut State,
        ram: &GuestRam,
        (slot, protocol): (u8, Protocol),
        header: &Header,
        (r, bytes): (Registers, u64),
    ) {
        s.registers = r;
        let received = Self::received(s, ram);
        let failed = r.is_error();
        let bits = match protocol {
            Protocol::Queued(tag) => {
                let done = if failed { 0 } else { 1 << tag };
                s.sact &= !done;
                received.set_bits(r.status, r.error, done);
                irq::SDBS
            }
            Protocol::PioIn if !failed => {
                header.moved(ram, bytes as u32);
                let moving = Registers { status: DRDY | DSC | DRQ, ..r };
                received.pio_setup(true, true, &moving, r.status, bytes);
                irq::PSS
            }
            _ => {
                header.moved(ram, bytes as u32);
                received.device_to_host(true, &r);
                irq::DHRS
            }
        };
        if failed {
            s.halted = true;
        } else {
            s.ci &= !(1 << slot);
        }
        self.interrupt(s, if failed { bits | irq::TFES } else { bits });
    }

    /// Looks at the command in `slot`. Returns a request if the drive is needed.
    fn issue(&self, s: &mut State, slot: u8) -> Issued {
        let ram = self.memory.ram();
        let Some(target) = self.target() else { return Issued::Waits };
        let header = Header::read(&ram, s.list, slot);
        let Some((header, frame)) = header.and_then(|h| Some((h, h.frame(&ram)?))) else {
            self.fatal(s);
            return Issued::Answered;
        };
        let command = match frame {
            Frame::Command(c) => c,
            Frame::Control(reset) => {
                if !s.flights.is_empty() {
                    return Issued::Waits;
                }
                s.ci &= !(1 << slot);
                s.current = slot;
                let done = std::mem::replace(&mut s.software_reset, reset) && !reset;
                if done {
                    self.arrive(s);
                }
                return Issued::Answered;
            }
            Frame::Unknown => {
                log::debug!("ahci: a frame of unknown type on port {}", self.index);
                self.fatal(s);
                return Issued::Answered;
            }
        };
        let queued = target.queued(&command);
        // Queued commands and others do not mix (ATA8-ACS §4.16).
        let room = s.flights.len() < usize::from(SLOTS);
        if s.busy || !room || !queued && !s.flights.is_empty() {
            return Issued::Waits;
        }
        s.current = slot;
        let (protocol, mut action) = target.start(&command);
        let mut job = Job { slot, command, protocol, header, ram };
        if queued {
            s.ci &= !(1 << slot);
            s.registers.status = target::GOOD;
        }
        if let Action::Wants(n) = action {
            let n = n.min(MAX_WANTED);
            let mut data = vec![0; n as usize];
            let spans = match job.header.data(&job.ram, n.into()) {
                Some((spans, _)) if spans.read(&job.ram, &mut data) => spans,
                Some((spans, _)) if spans.len() < n.into() => return self.overflow(s, job),
                _ => {
                    self.fatal(s);
                    return Issued::Answered;
                }
            };
            action = match target.take(&job.command, &data[..spans.len() as usize]) {
                // It has been given what there is.
                Action::Wants(_) => Action::Done(Registers::failed(&job.command, ABRT)),
                other => other,
            };
        }
        let (moves, into, fua) = match &action {
            Action::Done(r) => {
                let end = (slot, job.protocol);
                self.finish(s, &job.ram, end, &job.header, (*r, 0));
                return Issued::Answered;
            }
            Action::Answer(bytes) => return self.answer(s, &target, job, bytes),
            Action::Read { len, .. } => (*len, true, false),
            Action::Write { len, fua, .. } => (*len, false, *fua),
            Action::Flush | Action::Discard(_) | Action::Wants(_) => (0, false, false),
        };
        let Some((spans, interrupt)) = job.header.data(&job.ram, moves) else {
            self.fatal(s);
            return Issued::Answered;
        };
        if spans.len() < moves {
            return self.overflow(s, job);
        }
        let op = match action {
            // SAFETY: the flight keeps the memory, and complete() notes what was written.
            Action::Read { offset, .. } => match unsafe { spans.pieces(&job.ram) } {
                Some(to) => Op::Read(offset, to),
                None => return self.nowhere(s),
            },
            // SAFETY: the flight keeps the memory, which is only read.
            Action::Write { offset, .. } => match unsafe { spans.pieces(&job.ram) } {
                Some(from) => Op::Write(offset, from),
                None => return self.nowhere(s),
            },
            Action::Discard(ranges) => Op::Discard(ranges),
            _ => Op::Flush,
        };
        if interrupt {
            self.interrupt(s, irq::DPS);
        }
        if !queued {
            s.busy = true;
            s.registers.status = BSY | DRDY;
        }
        if job.protocol == Protocol::PioOut {
            let r = Registers { status: DRDY | DSC | DRQ, ..Registers::good(&job.command) };
            Self::received(s, &job.ram).pio_setup(false, false, &r, BSY | DRDY, moves);
        }
        let tag = s.next_tag;
        s.next_tag = tag.wrapping_add(1);
        job.ram = self.memory.ram();
        s.flights.insert(
            tag,
            Flight {
                epoch: s.epoch,
                slot,
                command: job.command,
                protocol: job.protocol,
                header: job.header,
                ram: job.ram,
                into: if into { spans } else { Spans::default() },
                bytes: moves,
                durable: fua,
            },
        );
        Issued::Work(Request { op, tag })
    }

    /// Copies an answer into the host's memory.
    fn answer(&self, s: &mut State, target: &Arc<dyn Target>, job: Job, bytes: &[u8]) -> Issued {
        let Some((spans, interrupt)) = job.header.data(&job.ram, bytes.len() as u64) else {
            return self.nowhere(s);
        };
        let n = spans.len() as usize;
        if !spans.write(&job.ram, bytes.get(..n).unwrap_or(bytes)) {
            return self.nowhere(s);
        }
        if interrupt {
            self.interrupt(s, irq::DPS);
        }
        let end = (job.slot, job.protocol);
        let r = target.done(&job.command);
        self.finish(s, &job.ram, end, &job.header, (r, n as u64));
        Issued::Answered
    }

    fn nowhere(&self, s: &mut State) -> Issued {
        self.fatal(s);
        Issued::Answered
    }

    /// There is less room than data.
    fn overflow(&self, s: &mut State, job: Job) -> Issued {
        self.interrupt(s, irq::OFS);
        let r = Registers::failed(&job.command, ABRT);
        self.finish(s, &job.ram, (job.slot, job.protocol), &job.header, (r, 0));
        Issued::Answered
    }
}

/// A command on its way.
struct Job {
    slot: u8,
    command: Command,
    protocol: Protocol,
    header: Header,
    ram: Arc<GuestRam>,
}

/// What became of a command.
enum Issued {
    /// It is done, or has failed.
    Answered,
    /// The drive has to do this.
    Work(Request),
    /// It waits for others.
    Waits,
}

impl Requester for Port {
    fn next(&self) -> Option<Request> {
        let mut s: MutexGuard<'_, State> = self.state.lock().unwrap();
        loop {
            if !Self::runs(&s) {
                return None;
            }
            let slot = Self::slot(&s)?;
            match self.issue(&mut s, slot) {
                Issued::Answered => {}
                Issued::Work(request) => return Some(request),
                Issued::Waits => return None,
            }
        }
    }

    fn has_more(&self) -> bool {
        let s = self.state.lock().unwrap();
        Self::runs(&s) && s.ci != 0 && !s.busy
    }

    fn complete(&self, request: Request, mut result: Result<(), Error>) {
        let target = self.target();
        let durable =
            self.state.lock().unwrap().flights.get(&request.tag).is_some_and(|f| f.durable);
        if durable
            && result.is_ok()
            && let Some(drive) = target.as_ref().and_then(|t| t.drive())
        {
            result = drive.execute(&Op::Flush);
        }
        let mut s = self.state.lock().unwrap();
        let Some(flight) = s.flights.remove(&request.tag) else { return };
        // Also after a failure, as a part may have been written.
        flight.into.written(&flight.ram);
        if flight.epoch != s.epoch {
            s.stale = s.stale.saturating_sub(1);
            if s.stale == 0 {
                self.hurried.store(false, Ordering::Release);
                self.settle(&mut s);
                self.quiet.notify_all();
            }
            return;
        }
        let outcome = match (&result, target) {
            (Ok(()), Some(t)) => (t.done(&flight.command), flight.bytes),
            (Err(e), Some(t)) => {
                log::warn!("{}: {}", t.name(), e.chain());
                (t.failed(&flight.command, e), 0)
            }
            (_, None) => (Registers::failed(&flight.command, ABRT), 0),
        };
        if !matches!(flight.protocol, Protocol::Queued(_)) {
            s.busy = false;
        }
        if s.halted {
            // Another queued command has failed; software asks again for what is not told done.
            return;
        }
        let end = (flight.slot, flight.protocol);
        self.finish(&mut s, &flight.ram, end, &flight.header, outcome);
    }

    fn hurried(&self) -> bool {
        self.hurried.load(Ordering::Acquire)
    }
}
