//! The 16550A serial port.
//!
//! Data path, divisor latch, loop-back and modem lines are vm-superio's [`vm_superio::Serial`]. What
//! it leaves out is added around it: FIFO control and depth, interrupt identification by priority,
//! the interrupt output as a level, overrun, modem-status deltas, and back-pressure when the host
//! takes no output. Registers: National Semiconductor PC16550D data sheet, §8.
//!
//! OUT2 does not gate the interrupt output: the bare-metal kernels in use do not all set it.

use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use tandem_accel::bus::BusDevice;
use tandem_accel::irq::IrqLine;
use tandem_backends::chardev::CharSink;
use vm_superio::serial::{NoEvents, SerialState as CoreState};
use vm_superio::{Serial as Core, Trigger};

/// Number of ports a serial port takes.
pub const PORTS: u64 = 8;
/// I/O bases and ISA interrupts of COM1–COM4.
pub const COM: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

const FIFO_DEPTH: usize = 16;
/// Depth of vm-superio's receive buffer; ours never uses more than [`FIFO_DEPTH`] of it.
const CORE_DEPTH: usize = 64;

/// Register offsets (DLAB clear).
mod reg {
    pub const DATA: u8 = 0;
    pub const IER: u8 = 1;
    /// Interrupt identification when read, FIFO control when written.
    pub const IIR_FCR: u8 = 2;
    pub const LCR: u8 = 3;
    pub const MCR: u8 = 4;
    pub const LSR: u8 = 5;
    pub const MSR: u8 = 6;
}

/// Interrupt enable bits.
mod ier {
    pub const RECEIVED: u8 = 1;
    pub const THR_EMPTY: u8 = 2;
    pub const LINE_STATUS: u8 = 4;
    pub const MODEM_STATUS: u8 = 8;
    pub const ALL: u8 = 15;
}

/// Interrupt identification values, highest priority first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ident {
    LineStatus = 0b0110,
    Received = 0b0100,
    CharacterTimeout = 0b1100,
    ThrEmpty = 0b0010,
    ModemStatus = 0b0000,
    None = 0b0001,
}

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;
const FCR_TRIGGER: u8 = 0xc0;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_BREAK: u8 = 0x10;
const LSR_THR_EMPTY: u8 = 0x20;
const LSR_IDLE: u8 = 0x40;
const MSR_RING: u8 = 0x40;

/// The core's own interrupt logic is not used.
struct NoTrigger;
impl Trigger for NoTrigger {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct SinkWriter(Arc<dyn CharSink>);
impl io::Write for SinkWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// State of a serial port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Scratch register.
    pub scr: u8,
    /// Delta bits of the modem status register.
    pub msr_delta: u8,
    /// A transmitter-empty interrupt waits to be identified.
    pub thr_empty_pending: bool,
    /// A received byte was lost.
    pub overrun: bool,
    /// A break was received: number of received bytes ahead of its NUL.
    pub break_behind: Option<u8>,
    /// Received bytes, oldest first; at most 16.
    pub received: Vec<u8>,
}

struct Inner {
    core: Core<NoTrigger, NoEvents, SinkWriter>,
    ier: u8,
    fcr: u8,
    msr_delta: u8,
    thr_empty_pending: bool,
    overrun: bool,
    /// A break was received: number of received bytes ahead of its NUL.
    break_behind: Option<u8>,
    /// Input was refused: tell when there is room.
    starved: bool,
}

type Callback = Box<dyn Fn() + Send + Sync>;

/// A 16550A.
pub struct Serial {
    inner: Mutex<Inner>,
    irq: IrqLine,
    sink: Arc<dyn CharSink>,
    room: OnceLock<Callback>,
}

impl Serial {
    /// A port whose output goes to `sink` and whose interrupt to `irq`.
    pub fn new(irq: IrqLine, sink: Arc<dyn CharSink>) -> Arc<Serial> {
        let serial = Arc::new(Serial {
            inner: Mutex::new(Inner {
                core: Core::new(NoTrigger, SinkWriter(sink.clone())),
                ier: 0,
                fcr: 0,
                msr_delta: 0,
                thr_empty_pending: false,
                overrun: false,
                break_behind: None,
                starved: false,
            }),
            irq,
            sink: sink.clone(),
            room: OnceLock::new(),
        });
        let me = Arc::downgrade(&serial);
        sink.on_drained(Box::new(move || {
            if let Some(s) = me.upgrade() {
                let mut inner = s.lock();
                inner.thr_emptied();
                s.update(&inner);
            }
        }));
        serial
    }

    /// Installs what is called (from a vCPU thread) when there is room again after
    /// [`Serial::receive`] did not take all. At most once.
    pub fn on_room(&self, f: impl Fn() + Send + Sync + 'static) {
        let _ = self.room.set(Box::new(f));
    }

    /// Pushes input from the line; returns how many bytes were taken. What is left must be pushed
    /// again when the callback of [`Serial::on_room`] says so.
    pub fn receive(&self, data: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = inner.receive(data);
        inner.starved = taken < data.len();
        self.update(&inner);
        taken
    }

    /// A break on the line: a NUL is received with the break indicator (data sheet §8.6.3). Lost if
    /// the receiver is full, or another break waits in it.
    pub fn receive_break(&self) {
        let mut inner = self.lock();
        let ahead = inner.len() as u8;
        if inner.break_behind.is_none() && inner.receive(&[0]) == 1 {
            inner.break_behind = Some(ahead);
        }
        self.update(&inner);
    }

    /// Free places in the receiver.
    pub fn room(&self) -> usize {
        self.lock().room()
    }

    /// RESET.
    pub fn reset(&self) {
        let mut inner = self.lock();
        *inner = Inner {
            core: Core::new(NoTrigger, SinkWriter(self.sink.clone())),
            ier: 0,
            fcr: 0,
            msr_delta: 0,
            thr_empty_pending: false,
            overrun: false,
            break_behind: None,
            starved: inner.starved,
        };
        let starved = std::mem::take(&mut inner.starved);
        self.update(&inner);
        drop(inner);
        self.tell_room(starved);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn update(&self, inner: &Inner) {
        self.irq.set(inner.ident() != Ident::None);
    }

    fn tell_room(&self, starved: bool) {
        if let (true, Some(f)) = (starved, self.room.get()) {
            f();
        }
    }

    fn read_reg(&self, r: u8) -> u8 {
        let mut inner = self.lock();
        let v = inner.read(r, self.sink.congested());
        let starved = inner.starved && inner.room() > 0;
        if starved {
            inner.starved = false;
        }
        self.update(&inner);
        drop(inner);
        self.tell_room(starved);
        v
    }

    fn write_reg(&self, r: u8, v: u8) {
        let mut inner = self.lock();
        inner.write(r, v, &*self.sink);
        let starved = inner.starved && inner.room() > 0;
        if starved {
            inner.starved = false;
        }
        self.update(&inner);
        drop(inner);
        self.tell_room(starved);
    }
}

impl Inner {
    fn depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO_DEPTH } else { 1 }
    }

    fn len(&self) -> usize {
        CORE_DEPTH - self.core.fifo_capacity()
    }

    fn room(&mut self) -> usize {
        // In loop-back the receiver is disconnected from the line.
        if self.core.read(reg::MCR) & MCR_LOOP != 0 {
            return 0;
        }
        self.depth().saturating_sub(self.len())
    }

    fn receive(&mut self, data: &[u8]) -> usize {
        let n = data.len().min(self.room());
        if n == 0 {
            return 0;
        }
        self.core.enqueue_raw_bytes(&data[..n]).unwrap_or(0)
    }

    fn dlab(&mut self) -> bool {
        self.core.read(reg::LCR) & LCR_DLAB != 0
    }

    fn trigger_level(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        [1, 4, 8, 14][usize::from((self.fcr & FCR_TRIGGER) >> 6)]
    }

    /// The pending and enabled interrupt of highest priority. The character time-out is immediate:
    /// bytes come in bursts here, and nothing else would announce a burst below the trigger level.
    fn ident(&self) -> Ident {
        let errors = self.overrun || self.break_behind == Some(0);
        if self.ier & ier::LINE_STATUS != 0 && errors {
            Ident::LineStatus
        } else if self.ier & ier::RECEIVED != 0 && self.len() > 0 {
            if self.len() >= self.trigger_level() {
                Ident::Received
            } else {
                Ident::CharacterTimeout
            }
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_empty_pending {
            Ident::ThrEmpty
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr_delta != 0 {
            Ident::ModemStatus
        } else {
            Ident::None
        }
    }

    fn thr_emptied(&mut self) {
        if self.ier & ier::THR_EMPTY != 0 {
            self.thr_empty_pending = true;
        }
    }

    fn read(&mut self, r: u8, congested: bool) -> u8 {
        match r {
            reg::DATA if !self.dlab() => {
                // The byte that the break came with takes its mark along.
                self.break_behind = self.break_behind.and_then(|n| n.checked_sub(1));
                self.core.read(r)
            }
            reg::IER if !self.dlab() => self.ier,
            reg::IIR_FCR => {
                let id = self.ident();
                if id == Ident::ThrEmpty {
                    self.thr_empty_pending = false;
                }
                id as u8 | if self.fcr & FCR_ENABLE != 0 { 0xc0 } else { 0 }
            }
            reg::LSR => {
                let data = if self.len() > 0 { LSR_DATA } else { 0 };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                let broken = if self.break_behind == Some(0) {
                    self.break_behind = None;
                    LSR_BREAK
                } else {
                    0
                };
                let empty = if congested { 0 } else { LSR_THR_EMPTY | LSR_IDLE };
                data | overrun | broken | empty
            }
            reg::MSR => (self.core.read(reg::MSR) & 0xf0) | std::mem::take(&mut self.msr_delta),
            _ => self.core.read(r),
        }
    }

    fn write(&mut self, r: u8, v: u8, sink: &dyn CharSink) {
        match r {
            reg::DATA if !self.dlab() => {
                self.thr_empty_pending = false;
                let looped = self.core.read(reg::MCR) & MCR_LOOP != 0;
                if looped && self.len() >= self.depth() {
                    self.overrun = true;
                } else {
                    // The sink takes everything, and the core's trigger cannot fail.
                    let _ = self.core.write(reg::DATA, v);
                }
                if !sink.congested() {
                    self.thr_emptied();
                }
            }
            reg::IER if !self.dlab() => {
                let newly = v & !self.ier;
                self.ier = v & ier::ALL;
                if v & ier::THR_EMPTY == 0 {
                    self.thr_empty_pending = false;
                } else if newly & ier::THR_EMPTY != 0 && !sink.congested() {
                    self.thr_empty_pending = true;
                }
            }
            reg::IIR_FCR => {
                // Switching the FIFOs on or off clears them (data sheet §8.5).
                if v & FCR_CLEAR_RX != 0 || (v ^ self.fcr) & FCR_ENABLE != 0 {
                    self.clear_receiver();
                }
                self.fcr = if v & FCR_ENABLE != 0 { v & (FCR_TRIGGER | FCR_ENABLE | 8) } else { 0 };
            }
            reg::MCR => {
                let before = self.core.read(reg::MSR);
                let _ = self.core.write(reg::MCR, v & 0x1f);
                let after = self.core.read(reg::MSR);
                let changed = (before ^ after) >> 4;
                // Ring indicator: only its trailing edge counts.
                let ring = if before & !after & MSR_RING != 0 { 4 } else { 0 };
                self.msr_delta |= (changed & 0b1011) | ring;
            }
            reg::LSR | reg::MSR => {}
            _ => {
                let _ = self.core.write(r, v);
            }
        }
    }

    fn clear_receiver(&mut self) {
        self.break_behind = None;
        let lcr = self.core.read(reg::LCR);
        let _ = self.core.write(reg::LCR, lcr & !LCR_DLAB);
        while self.len() > 0 {
            self.core.read(reg::DATA);
        }
        let _ = self.core.write(reg::LCR, lcr);
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            *b = self.read_reg((offset as usize + i) as u8 & 7);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            self.write_reg((offset as usize + i) as u8 & 7, *b);
        }
    }
}

impl Stateful for Serial {
    type State = SerialState;
    const KIND: &'static str = "serial";
    const VERSION: u32 = 1;

    fn state(&self) -> SerialState {
        let inner = self.lock();
        let core = inner.core.state();
        SerialState {
            divisor: u16::from_le_bytes([core.baud_divisor_low, core.baud_divisor_high]),
            ier: inner.ier,
            fcr: inner.fcr,
            lcr: core.line_control,
            mcr: core.modem_control,
            scr: core.scratch,
            msr_delta: inner.msr_delta,
            thr_empty_pending: inner.thr_empty_pending,
            overrun: inner.overrun,
            break_behind: inner.break_behind,
            received: core.in_buffer,
        }
    }

    fn restore(&self, s: &SerialState) -> Result<(), RestoreError> {
        let fail = |why: String| RestoreError { kind: Self::KIND, why };
        if s.received.len() > FIFO_DEPTH {
            return Err(fail(format!("{} received bytes, at most 16 fit", s.received.len())));
        }
        let [low, high] = s.divisor.to_le_bytes();
        let core = CoreState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            line_control: s.lcr,
            modem_control: s.mcr & 0x1f,
            scratch: s.scr,
            in_buffer: s.received.clone(),
            ..CoreState::default()
        };
        let core = Core::from_state(&core, NoTrigger, NoEvents, SinkWriter(self.sink.clone()))
            .map_err(|e| fail(e.to_string()))?;
        let mut inner = self.lock();
        *inner = Inner {
            core,
            ier: s.ier & ier::ALL,
            fcr: s.fcr,
            msr_delta: s.msr_delta & 0xf,
            thr_empty_pending: s.thr_empty_pending,
            overrun: s.overrun,
            break_behind: s.break_behind.filter(|n| usize::from(*n) < s.received.len()),
            starved: inner.starved,
        };
        self.irq.import_level(inner.ident() != Ident::None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Levels;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    #[derive(Default)]
    struct Sink {
        got: Mutex<Vec<u8>>,
        slow: AtomicBool,
        drained: OnceLock<Callback>,
    }
    impl CharSink for Sink {
        fn write(&self, data: &[u8]) {
            self.got.lock().unwrap().extend(data);
        }
        fn congested(&self) -> bool {
            self.slow.load(Ordering::Relaxed)
        }
        fn on_drained(&self, f: Callback) {
            let _ = self.drained.set(f);
        }
    }

    fn port() -> (Arc<Serial>, Arc<Sink>, Arc<Levels>) {
        let sink = Arc::new(Sink::default());
        let levels = Arc::new(Levels::default());
        (Serial::new(IrqLine::new(levels.clone(), 4), sink.clone()), sink, levels)
    }
    fn get(s: &Serial, r: u64) -> u8 {
        let mut d = [0];
        s.read(r, &mut d);
        d[0]
    }

    #[test]
    fn thr_empty_interrupt_as_the_8250_driver_tests_it() {
        let (s, sink, irq) = port();
        s.write(1, &[2]);
        assert!(irq.level(4));
        assert_eq!(get(&s, 2), 0x02);
        assert!(!irq.level(4), "reading IIR takes it back");
        assert_eq!(get(&s, 2), 0x01);
        s.write(1, &[0]);
        s.write(1, &[2]);
        assert_eq!(get(&s, 2), 0x02, "enabling again asserts again");
        s.write(0, b"x");
        assert!(irq.level(4));
        assert_eq!(*sink.got.lock().unwrap(), b"x");
        s.write(1, &[0]);
        assert!(!irq.level(4));
    }

    #[test]
    fn received_data_is_a_level_until_the_fifo_is_empty() {
        let (s, _, irq) = port();
        s.write(2, &[0x81]);
        s.write(1, &[1]);
        assert_eq!(s.receive(&[7; 20]), 16);
        assert!(irq.level(4));
        assert_eq!(get(&s, 2), 0xc4);
        for _ in 0..9 {
            assert_eq!(get(&s, 0), 7);
        }
        assert_eq!(get(&s, 2), 0xcc, "below the trigger level");
        assert!(irq.level(4), "reading IIR does not take it back");
        for _ in 0..7 {
            get(&s, 0);
        }
        assert!(!irq.level(4));
        assert_eq!(get(&s, 5), 0x60);
    }

    #[test]
    fn a_break_is_marked_on_its_own_byte() {
        let (s, _, irq) = port();
        s.write(2, &[1]);
        s.write(1, &[4]);
        s.receive(b"a");
        s.receive_break();
        assert!(!irq.level(4));
        assert_eq!((get(&s, 5) & 0x1f, get(&s, 0)), (0x01, b'a'));
        assert!(irq.level(4));
        assert_eq!(get(&s, 2) & 0xf, 0x06);
        assert_eq!(get(&s, 5) & 0x1f, 0x11);
        assert!(!irq.level(4), "reading LSR takes it back");
        assert_eq!((get(&s, 0), get(&s, 5) & 0x1f), (0, 0));
        s.receive_break();
        s.write(2, &[3]);
        assert_eq!(get(&s, 5) & 0x1f, 0);
    }

    #[test]
    fn refused_input_is_announced_when_there_is_room() {
        let (s, _, _) = port();
        let told = Arc::new(AtomicU32::new(0));
        let t = told.clone();
        s.on_room(move || {
            t.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(s.receive(b"ab"), 1);
        assert_eq!(get(&s, 0), b'a');
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert_eq!(s.receive(b"b"), 1);
        get(&s, 0);
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn loop_back_and_detection_as_drivers_probe() {
        let (s, sink, _) = port();
        s.write(4, &[0x1a]);
        assert_eq!(get(&s, 6) & 0xf0, 0x90);
        s.write(0, b"L");
        assert_eq!(get(&s, 5) & 1, 1);
        assert_eq!(get(&s, 0), b'L');
        assert!(sink.got.lock().unwrap().is_empty());
        s.write(4, &[0x0b]);
        assert_eq!(get(&s, 6) & 0xf0, 0xb0);
        assert_eq!(get(&s, 6) & 0x0f, 0, "reading took the deltas");
        s.write(7, &[0x5a]);
        assert_eq!(get(&s, 7), 0x5a);
        assert_eq!(get(&s, 2) & 0xc0, 0);
        s.write(2, &[1]);
        assert_eq!(get(&s, 2) & 0xc0, 0xc0);
        s.write(3, &[0x83]);
        s.write(0, &[1]);
        s.write(1, &[0]);
        assert_eq!(get(&s, 0), 1);
        s.write(3, &[3]);
        assert_eq!(get(&s, 1), 0);
    }

    #[test]
    fn a_congested_host_holds_the_guest_back() {
        let (s, sink, irq) = port();
        s.write(1, &[2]);
        get(&s, 2);
        sink.slow.store(true, Ordering::Relaxed);
        s.write(0, b"y");
        assert_eq!(get(&s, 5), 0);
        assert!(!irq.level(4));
        sink.slow.store(false, Ordering::Relaxed);
        sink.drained.get().unwrap()();
        assert!(irq.level(4));
        assert_eq!(get(&s, 5), 0x60);
    }

    #[test]
    fn state_comes_back() {
        let (a, _, _) = port();
        a.write(2, &[0xc1]);
        a.write(1, &[3]);
        a.receive(b"abc");
        let st = a.state();
        let (b, _, irq) = port();
        b.restore(&st).unwrap();
        assert_eq!(b.state(), st);
        assert!(b.irq.level() && !irq.level(4), "no edge on restore");
        assert_eq!(get(&b, 0), b'a');
        assert!(b.restore(&SerialState { received: vec![0; 17], ..st }).is_err());
    }
}
