//! The keyboard controller, ports 60h and 64h, with a minimal AT keyboard (IBM PS/2 hardware
//! interface reference, keyboard and auxiliary device controller; ICH9 knows no own).
//!
//! The keyboard answers every command and has no keys yet. There is no mouse: the auxiliary port's
//! tests say so at once, so that nobody waits for a time-out. Each byte in the output buffer raises
//! the interrupt anew.

use crate::power::{PowerRequest, PowerSink, ResetCause};
use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_accel::bus::BusDevice;
use tandem_accel::irq::IrqLine;

/// The data port.
pub const DATA_PORT: u16 = 0x60;
/// The status and command port.
pub const COMMAND_PORT: u16 = 0x64;
/// Bytes that may wait to be read.
const QUEUE: usize = 32;

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const STATUS_COMMAND: u8 = 8;
/// The keyboard is not locked.
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;
const CTR_KBD_INT: u8 = 1;
const CTR_AUX_INT: u8 = 2;
const CTR_SYSTEM: u8 = 4;
const CTR_KBD_OFF: u8 = 0x10;
const CTR_AUX_OFF: u8 = 0x20;
const CTR_TRANSLATE: u8 = 0x40;
/// Output port: reset (low-active), address line 20.
const OUT_RESET: u8 = 1;
const OUT_A20: u8 = 2;
const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// Who put a byte into the output buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Source {
    /// Keyboard, or the controller itself.
    Keyboard,
    /// Auxiliary device.
    Aux,
}

/// State of the controller and its keyboard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte ("CTR").
    pub ctr: u8,
    /// Output port.
    pub output_port: u8,
    /// The last write was to the command port.
    pub last_was_command: bool,
    /// Command that waits for its parameter on the data port.
    pub command: Option<u8>,
    /// Keyboard command that waits for its parameter.
    pub keyboard_command: Option<u8>,
    /// Scan code set of the keyboard.
    pub scan_set: u8,
    /// Bytes that wait to be read.
    pub queue: Vec<(Source, u8)>,
}

impl Default for I8042State {
    fn default() -> I8042State {
        I8042State {
            ctr: CTR_KBD_INT | CTR_SYSTEM | CTR_TRANSLATE | CTR_AUX_OFF,
            output_port: OUT_RESET | OUT_A20,
            last_was_command: false,
            command: None,
            keyboard_command: None,
            scan_set: 2,
            queue: Vec::new(),
        }
    }
}

struct Inner {
    s: I8042State,
    queue: VecDeque<(Source, u8)>,
}

/// The keyboard controller.
pub struct I8042 {
    inner: Mutex<Inner>,
    keyboard_irq: IrqLine,
    aux_irq: IrqLine,
    power: Arc<dyn PowerSink>,
}

/// One of the two ports.
struct Port(Arc<I8042>, bool);

impl I8042 {
    /// A controller with interrupts 1 and 12 on these lines.
    pub fn new(keyboard_irq: IrqLine, aux_irq: IrqLine, power: Arc<dyn PowerSink>) -> Arc<I8042> {
        let inner = Inner { s: I8042State::default(), queue: VecDeque::new() };
        Arc::new(I8042 { inner: Mutex::new(inner), keyboard_irq, aux_irq, power })
    }

    /// The two ports for the I/O bus, one port each.
    pub fn ports(self: &Arc<Self>) -> [(u16, Arc<dyn BusDevice>); 2] {
        [
            (DATA_PORT, Arc::new(Port(self.clone(), false))),
            (COMMAND_PORT, Arc::new(Port(self.clone(), true))),
        ]
    }

    /// RESET.
    pub fn reset(&self) {
        let mut i = self.lock();
        *i = Inner { s: I8042State::default(), queue: VecDeque::new() };
        self.update(&i);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn update(&self, i: &Inner) {
        let head = i.queue.front().map(|(s, _)| *s);
        let on = |bit| i.s.ctr & bit != 0;
        self.keyboard_irq.set(head == Some(Source::Keyboard) && on(CTR_KBD_INT));
        self.aux_irq.set(head == Some(Source::Aux) && on(CTR_AUX_INT));
    }

    fn read_data(&self) -> u8 {
        let mut i = self.lock();
        let (_, v) = i.queue.pop_front().unwrap_or((Source::Keyboard, 0));
        // The next byte makes a new edge.
        self.keyboard_irq.deassert();
        self.aux_irq.deassert();
        self.update(&i);
        v
    }

    fn status(&self) -> u8 {
        let i = self.lock();
        let full = match i.queue.front() {
            Some((Source::Aux, _)) => STATUS_OUTPUT_FULL | STATUS_AUX,
            Some((Source::Keyboard, _)) => STATUS_OUTPUT_FULL,
            None => 0,
        };
        let command = if i.s.last_was_command { STATUS_COMMAND } else { 0 };
        full | command | STATUS_UNLOCKED | i.s.ctr & STATUS_SYSTEM
    }

    fn command(&self, v: u8) {
        let mut i = self.lock();
        i.s.last_was_command = true;
        i.s.command = None;
        match v {
            0x20 => {
                let ctr = i.s.ctr;
                i.put(ctr);
            }
            0x60 | 0xd1..=0xd4 => i.s.command = Some(v),
            0xa7 => i.s.ctr |= CTR_AUX_OFF,
            0xa8 => i.s.ctr &= !CTR_AUX_OFF,
            // Auxiliary interface test: the clock line is stuck low, as nothing is plugged in.
            0xa9 => i.put(1),
            0xaa => {
                i.s.ctr |= CTR_SYSTEM;
                i.put(0x55);
            }
            0xab => i.put(0),
            0xad => i.s.ctr |= CTR_KBD_OFF,
            0xae => i.s.ctr &= !CTR_KBD_OFF,
            // Input port: keyboard not inhibited, no manufacturing mode.
            0xc0 => i.put(0x80),
            0xd0 => {
                let v = i.s.output_port;
                i.put(v);
            }
            // Pulse output lines low: only line 0, reset, does anything.
            0xf0..=0xff if v & OUT_RESET == 0 => self.reset_cpu(),
            _ => {}
        }
        self.update(&i);
    }

    fn data(&self, v: u8) {
        let mut i = self.lock();
        i.s.last_was_command = false;
        match i.s.command.take() {
            Some(0x60) => i.s.ctr = v & !0x80,
            Some(0xd1) => {
                i.s.output_port = v;
                if v & OUT_RESET == 0 {
                    self.reset_cpu();
                }
            }
            // Write as if from a device; without the auxiliary one both come from the keyboard.
            Some(0xd2 | 0xd3) => i.put(v),
            Some(0xd4) => i.queue_byte(Source::Aux, RESEND),
            _ => {
                // Sending to the keyboard enables its interface.
                i.s.ctr &= !CTR_KBD_OFF;
                i.keyboard(v);
            }
        }
        self.update(&i);
    }

    fn reset_cpu(&self) {
        self.power.request(PowerRequest::Reset(ResetCause::KeyboardController));
    }
}

impl Inner {
    fn queue_byte(&mut self, source: Source, v: u8) {
        if self.queue.len() < QUEUE {
            self.queue.push_back((source, v));
        }
    }

    /// From the controller.
    fn put(&mut self, v: u8) {
        self.queue_byte(Source::Keyboard, v);
    }

    /// The keyboard takes a byte.
    fn keyboard(&mut self, v: u8) {
        if let Some(command) = self.s.keyboard_command.take() {
            match (command, v) {
                (0xf0, 0) => {
                    self.put(ACK);
                    // The controller's translation applies to the answer as to scan codes.
                    let translate = self.s.ctr & CTR_TRANSLATE != 0;
                    let set = self.s.scan_set;
                    self.put(match (translate, set) {
                        (true, 1) => 0x43,
                        (true, 2) => 0x41,
                        (true, _) => 0x3f,
                        (false, n) => n,
                    });
                }
                (0xf0, 1..=3) => {
                    self.s.scan_set = v;
                    self.put(ACK);
                }
                (0xf0, _) => self.put(RESEND),
                _ => self.put(ACK),
            }
            return;
        }
        match v {
            0xee => self.put(0xee),
            // LEDs, scan code set, typematic rate take a parameter.
            0xed | 0xf0 | 0xf3 => {
                self.s.keyboard_command = Some(v);
                self.put(ACK);
            }
            0xf2 => {
                let id = if self.s.ctr & CTR_TRANSLATE != 0 { 0x41 } else { 0x83 };
                [ACK, 0xab, id].into_iter().for_each(|b| self.put(b));
            }
            0xf4..=0xf6 => {
                if v == 0xf6 {
                    self.s.scan_set = 2;
                }
                self.put(ACK);
            }
            0xff => {
                self.s.scan_set = 2;
                // Acknowledged, then the self-test passes.
                self.put(ACK);
                self.put(0xaa);
            }
            _ => self.put(RESEND),
        }
    }
}

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(if self.1 { self.0.status() } else { self.0.read_data() });
    }
    fn write(&self, _: u64, data: &[u8]) {
        let Some(&v) = data.first() else { return };
        if self.1 { self.0.command(v) } else { self.0.data(v) }
    }
}

impl Stateful for I8042 {
    type State = I8042State;
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;

    fn state(&self) -> I8042State {
        let i = self.lock();
        I8042State { queue: i.queue.iter().copied().collect(), ..i.s.clone() }
    }

    fn restore(&self, new: &I8042State) -> Result<(), RestoreError> {
        if new.queue.len() > QUEUE {
            let why = format!("{} bytes wait, at most {QUEUE} fit", new.queue.len());
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let mut i = self.lock();
        i.queue = new.queue.iter().copied().collect();
        i.s = I8042State { queue: Vec::new(), ..new.clone() };
        let head = i.queue.front().map(|(s, _)| *s);
        let on = |bit| i.s.ctr & bit != 0;
        self.keyboard_irq.import_level(head == Some(Source::Keyboard) && on(CTR_KBD_INT));
        self.aux_irq.import_level(head == Some(Source::Aux) && on(CTR_AUX_INT));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing::Recorder;
    use crate::testing::Levels;

    struct Rig {
        dev: Arc<I8042>,
        irq: Arc<Levels>,
        power: Arc<Recorder>,
    }
    fn rig() -> Rig {
        let irq = Arc::new(Levels::default());
        let power = Arc::new(Recorder::default());
        let line = |n| IrqLine::new(irq.clone(), n);
        Rig { dev: I8042::new(line(1), line(12), power.clone()), irq, power }
    }
    impl Rig {
        fn cmd(&self, v: u8) {
            self.dev.ports()[1].1.write(0, &[v]);
        }
        fn data(&self, v: u8) {
            self.dev.ports()[0].1.write(0, &[v]);
        }
        fn status(&self) -> u8 {
            let mut b = [0];
            self.dev.ports()[1].1.read(0, &mut b);
            b[0]
        }
        fn get(&self) -> Option<u8> {
            (self.status() & 1 != 0).then(|| {
                let mut b = [0];
                self.dev.ports()[0].1.read(0, &mut b);
                b[0]
            })
        }
    }

    #[test]
    fn controller_probe_as_linux_does_it() {
        let r = rig();
        assert_eq!(r.get(), None);
        r.cmd(0xaa);
        assert_eq!(r.get(), Some(0x55));
        r.cmd(0x20);
        let ctr = r.get().unwrap();
        r.cmd(0x60);
        r.data(ctr | CTR_KBD_OFF & !CTR_KBD_INT);
        r.cmd(0xd3);
        r.data(0x5a);
        assert_eq!(r.status() & 0x21, 1, "no auxiliary port");
        r.get();
        r.cmd(0xa9);
        assert_eq!(r.get(), Some(1));
        r.cmd(0xab);
        assert_eq!(r.get(), Some(0));
    }

    #[test]
    fn keyboard_answers_with_an_edge_per_byte() {
        let r = rig();
        r.data(0xff);
        assert_eq!(r.irq.edges(1), 1);
        assert_eq!((r.get(), r.irq.edges(1)), (Some(0xfa), 2));
        assert_eq!((r.get(), r.get()), (Some(0xaa), None));
        assert!(!r.irq.level(1));
        r.data(0xf2);
        assert_eq!([r.get(), r.get(), r.get()], [Some(0xfa), Some(0xab), Some(0x41)]);
        r.data(0xed);
        r.data(7);
        assert_eq!([r.get(), r.get()], [Some(0xfa); 2]);
        for _ in 0..1000 {
            r.data(0xf2);
        }
        assert_eq!(r.dev.state().queue.len(), QUEUE);
        let s = r.dev.state();
        let o = rig();
        o.dev.restore(&s).unwrap();
        assert_eq!(o.dev.state(), s);
    }

    #[test]
    fn reset_pulse_and_output_port() {
        let r = rig();
        r.cmd(0xfe);
        r.cmd(0xd1);
        r.data(0xdf);
        r.cmd(0xd0);
        assert_eq!(r.get(), Some(0xdf));
        r.cmd(0xd1);
        r.data(0xde);
        r.cmd(0xff);
        let want = PowerRequest::Reset(ResetCause::KeyboardController);
        assert_eq!(*r.power.0.lock().unwrap(), [want; 2]);
    }
}
