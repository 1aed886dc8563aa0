//! The two cascaded 8259A interrupt controllers of a PC, with the edge/level control registers of
//! the later chip sets (Intel 8259A data sheet; ICH9 data sheet §13.4).
//!
//! Ports: master 20h/21h, slave A0h/A1h, ELCR 4D0h/4D1h. The slave's output is the master's input
//! 2. [`PicState`] has the fields of KVM's `kvm_pic_state`.

use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use tandem_accel::bus::BusDevice;

/// The master's input that the slave drives.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered: not the timer, keyboard, cascade, RTC and FPU ones.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// Where an initialization sequence (ICW1–ICW4) stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum InitStep {
    /// None is going on.
    #[default]
    Done,
    /// ICW2 comes next.
    Icw2,
    /// ICW3 comes next.
    Icw3,
    /// ICW4 comes next.
    Icw4,
}

/// State of one 8259A.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PicState {
    /// Levels of the inputs.
    pub lines: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The input of highest priority, 0–7.
    pub priority_add: u8,
    /// Vector of input 0; a multiple of 8.
    pub irq_base: u8,
    /// Reads give ISR rather than IRR.
    pub read_isr: bool,
    /// The next read polls.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Initialization sequence.
    pub init: InitStep,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotate priorities on automatic end of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// ICW4 is part of the initialization going on.
    pub icw4: bool,
    /// Level-triggered inputs.
    pub elcr: u8,
}

/// State of both.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PicsState {
    /// Inputs 0–7.
    pub master: PicState,
    /// Inputs 8–15.
    pub slave: PicState,
}

impl PicState {
    /// The set bit of highest priority, and that priority (0 is highest).
    fn top(&self, bits: u8) -> Option<(u8, u8)> {
        (0..8).map(|p| (p, (p + self.priority_add) & 7)).find(|(_, n)| bits & 1 << n != 0)
    }

    /// The input whose interrupt the chip asks for.
    fn requested(&self, master: bool) -> Option<u8> {
        let (priority, irq) = self.top(self.irr & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        // In special fully nested mode the slave may interrupt its own service in the master.
        if self.special_fully_nested && master {
            serving &= !(1 << CASCADE);
        }
        match self.top(serving) {
            Some((p, _)) if p <= priority => None,
            _ => Some(irq),
        }
    }

    fn set_line(&mut self, irq: u8, high: bool) {
        let bit = 1u8 << (irq & 7);
        let rises = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rises {
            self.irr |= bit;
        }
    }

    fn acknowledge(&mut self, irq: u8) {
        let bit = 1u8 << (irq & 7);
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.priority_add = (irq + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn icw1(&mut self, v: u8) {
        // The edge sense is cleared: an input must rise anew. A level stays.
        *self = PicState {
            lines: self.lines,
            irr: self.lines & self.elcr,
            irq_base: self.irq_base,
            elcr: self.elcr,
            init: InitStep::Icw2,
            icw4: v & 1 != 0,
            ..PicState::default()
        };
    }

    fn ocw2(&mut self, v: u8) {
        let level = v & 7;
        let (rotate, specific, eoi) = (v & 0x80 != 0, v & 0x40 != 0, v & 0x20 != 0);
        match (rotate, specific, eoi) {
            (r, false, false) => self.rotate_on_auto_eoi = r,
            (r, false, true) => {
                if let Some((_, irq)) = self.top(self.isr) {
                    self.isr &= !(1 << irq);
                    if r {
                        self.priority_add = (irq + 1) & 7;
                    }
                }
            }
            (r, true, true) => {
                self.isr &= !(1 << level);
                if r {
                    self.priority_add = (level + 1) & 7;
                }
            }
            (true, true, false) => self.priority_add = (level + 1) & 7,
            (false, true, false) => {}
        }
    }

    fn ocw3(&mut self, v: u8) {
        if v & 4 != 0 {
            self.poll = true;
        }
        if v & 2 != 0 {
            self.read_isr = v & 1 != 0;
        }
        if v & 0x40 != 0 {
            self.special_mask = v & 0x20 != 0;
        }
    }

    fn write_command(&mut self, v: u8) {
        match v {
            _ if v & 0x10 != 0 => self.icw1(v),
            _ if v & 0x08 != 0 => self.ocw3(v),
            _ => self.ocw2(v),
        }
    }

    fn write_data(&mut self, v: u8) {
        match self.init {
            InitStep::Done => self.imr = v,
            InitStep::Icw2 => {
                self.irq_base = v & 0xf8;
                self.init = InitStep::Icw3;
            }
            // The cascade is wired.
            InitStep::Icw3 => {
                self.init = if self.icw4 { InitStep::Icw4 } else { InitStep::Done };
            }
            InitStep::Icw4 => {
                self.special_fully_nested = v & 0x10 != 0;
                self.auto_eoi = v & 2 != 0;
                self.init = InitStep::Done;
            }
        }
    }
}

#[derive(Default)]
struct Pair {
    chips: [PicState; 2],
}

impl Pair {
    /// Lets the slave's output reach the master.
    fn cascade(&mut self) {
        let asks = self.chips[1].requested(false).is_some();
        let m = &mut self.chips[0];
        let bit = 1 << CASCADE;
        if asks {
            m.irr |= bit;
            m.lines |= bit;
        } else {
            m.irr &= !bit;
            m.lines &= !bit;
        }
    }

    fn output(&mut self) -> bool {
        self.cascade();
        self.chips[0].requested(true).is_some()
    }

    /// Both INTA cycles: the vector, which is the spurious one if nothing is requested any more.
    fn acknowledge(&mut self) -> u8 {
        self.cascade();
        let [m, s] = &mut self.chips;
        match m.requested(true) {
            Some(CASCADE) => {
                m.acknowledge(CASCADE);
                match s.requested(false) {
                    Some(irq) => {
                        s.acknowledge(irq);
                        s.irq_base + irq
                    }
                    None => s.irq_base + 7,
                }
            }
            Some(irq) => {
                m.acknowledge(irq);
                m.irq_base + irq
            }
            None => m.irq_base + 7,
        }
    }

    fn poll(&mut self, which: usize) -> u8 {
        let chip = &mut self.chips[which];
        chip.poll = false;
        match chip.requested(which == 0) {
            Some(irq) => {
                chip.acknowledge(irq);
                0x80 | irq
            }
            None => 0,
        }
    }
}

type Callback = Box<dyn Fn() + Send + Sync>;

/// Both 8259As.
pub struct DualPic {
    pair: Mutex<Pair>,
    /// The INTR output, stored under the lock and sampled without it.
    intr: AtomicBool,
    changed: OnceLock<Callback>,
}

/// One byte-wide port of the pair, for the I/O bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PortKind {
    Command,
    Elcr,
}

/// The ports of the master or slave chip, or the two ELCR ports.
struct PicPorts {
    pic: Arc<DualPic>,
    kind: PortKind,
    which: usize,
}

impl DualPic {
    /// Both chips as after power-on.
    pub fn new() -> Arc<DualPic> {
        Arc::new(DualPic {
            pair: Mutex::new(Pair::default()),
            intr: AtomicBool::new(false),
            changed: OnceLock::new(),
        })
    }

    /// Installs what is called, without the chip's lock, after the INTR output changed. At most
    /// once.
    pub fn on_change(&self, f: impl Fn() + Send + Sync + 'static) {
        let _ = self.changed.set(Box::new(f));
    }

    /// The INTR output.
    pub fn output(&self) -> bool {
        self.intr.load(Ordering::Acquire)
    }

    /// Input `irq` (0–15; 2 is the cascade and ignored) has this level.
    pub fn set_level(&self, irq: u32, high: bool) {
        if irq > 15 || irq == u32::from(CASCADE) {
            return;
        }
        self.with(|p| p.chips[(irq >> 3) as usize].set_line(irq as u8 & 7, high));
    }

    /// The interrupt acknowledge cycles: returns the vector.
    pub fn acknowledge(&self) -> u8 {
        self.with(Pair::acknowledge)
    }

    /// Back to power-on; input levels stay.
    pub fn reset(&self) {
        self.with(|p| {
            for c in &mut p.chips {
                *c = PicState { lines: c.lines, ..PicState::default() };
            }
        });
    }

    /// The chips' ports for the I/O bus: first port, number of ports, device.
    pub fn ports(self: &Arc<Self>) -> [(u16, u64, Arc<dyn BusDevice>); 3] {
        let dev = |kind, which| -> Arc<dyn BusDevice> {
            Arc::new(PicPorts { pic: self.clone(), kind, which })
        };
        [
            (0x20, 2, dev(PortKind::Command, 0)),
            (0xa0, 2, dev(PortKind::Command, 1)),
            (0x4d0, 2, dev(PortKind::Elcr, 0)),
        ]
    }

    fn lock(&self) -> MutexGuard<'_, Pair> {
        self.pair.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn with<R>(&self, f: impl FnOnce(&mut Pair) -> R) -> R {
        let (r, changed) = {
            let mut p = self.lock();
            let r = f(&mut p);
            let out = p.output();
            (r, self.intr.swap(out, Ordering::AcqRel) != out)
        };
        if let (true, Some(f)) = (changed, self.changed.get()) {
            f();
        }
        r
    }
}

impl PicPorts {
    fn read_port(&self, offset: u64) -> u8 {
        match self.kind {
            PortKind::Elcr => self.pic.lock().chips[(offset & 1) as usize].elcr,
            PortKind::Command => self.pic.with(|p| {
                if p.chips[self.which].poll {
                    return p.poll(self.which);
                }
                let c = &p.chips[self.which];
                match (offset & 1, c.read_isr) {
                    (1, _) => c.imr,
                    (_, true) => c.isr,
                    (_, false) => c.irr,
                }
            }),
        }
    }

    fn write_port(&self, offset: u64, v: u8) {
        let high = (offset & 1) as usize;
        self.pic.with(|p| match (self.kind, high) {
            (PortKind::Elcr, n) => {
                let c = &mut p.chips[n];
                let elcr = v & ELCR_MASK[n];
                // An input that becomes level-triggered follows its level from now on.
                c.irr = c.irr & !elcr | c.lines & elcr;
                c.elcr = elcr;
            }
            (PortKind::Command, 0) => p.chips[self.which].write_command(v),
            (PortKind::Command, _) => p.chips[self.which].write_data(v),
        });
    }
}

impl BusDevice for PicPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            *b = self.read_port(offset + i as u64);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            self.write_port(offset + i as u64, *b);
        }
    }
}

impl Stateful for DualPic {
    type State = PicsState;
    const KIND: &'static str = "i8259";
    const VERSION: u32 = 1;

    fn state(&self) -> PicsState {
        let [master, slave] = self.lock().chips;
        PicsState { master, slave }
    }

    fn restore(&self, s: &PicsState) -> Result<(), RestoreError> {
        let mut p = self.lock();
        p.chips = [s.master, s.slave];
        for (c, mask) in p.chips.iter_mut().zip(ELCR_MASK) {
            c.priority_add &= 7;
            c.irq_base &= 0xf8;
            c.elcr &= mask;
        }
        let out = p.output();
        self.intr.store(out, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        pic: Arc<DualPic>,
        ports: [(u16, u64, Arc<dyn BusDevice>); 3],
    }
    impl Rig {
        fn out(&self, port: u16, v: u8) {
            let (base, _, d) = self.find(port);
            d.write(u64::from(port - base), &[v]);
        }
        fn inb(&self, port: u16) -> u8 {
            let (base, _, d) = self.find(port);
            let mut b = [0];
            d.read(u64::from(port - base), &mut b);
            b[0]
        }
        fn find(&self, port: u16) -> &(u16, u64, Arc<dyn BusDevice>) {
            self.ports.iter().find(|p| port >= p.0 && port < p.0 + p.1 as u16).unwrap()
        }
    }

    /// As Linux sets it up: vectors 30h and 38h, all unmasked.
    fn rig(icw4: u8) -> Rig {
        let pic = DualPic::new();
        let ports = pic.ports();
        let r = Rig { pic, ports };
        for (p, base, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            r.out(p, 0x11);
            for v in [base, icw3, icw4] {
                r.out(p + 1, v);
            }
            r.out(p + 1, 0);
        }
        r
    }
    fn pulse(r: &Rig, irq: u32) {
        r.pic.set_level(irq, true);
        r.pic.set_level(irq, false);
    }

    #[test]
    fn priorities_nesting_and_eoi() {
        let r = rig(1);
        pulse(&r, 4);
        pulse(&r, 1);
        assert!(r.pic.output());
        assert_eq!(r.pic.acknowledge(), 0x31);
        assert!(!r.pic.output(), "4 is below 1");
        pulse(&r, 0);
        assert_eq!(r.pic.acknowledge(), 0x30);
        r.out(0x20, 0x0b);
        assert_eq!(r.inb(0x20), 0b11);
        r.out(0x20, 0x20);
        assert_eq!(r.inb(0x20), 0b10);
        r.out(0x20, 0x61);
        assert_eq!(r.inb(0x20), 0);
        assert_eq!(r.pic.acknowledge(), 0x34);
    }

    #[test]
    fn slave_through_cascade_and_its_next_interrupt() {
        let r = rig(1);
        pulse(&r, 12);
        assert_eq!(r.pic.acknowledge(), 0x3c);
        pulse(&r, 8);
        assert!(!r.pic.output(), "the cascade is in service");
        r.out(0x20, 0x20);
        assert_eq!(r.pic.acknowledge(), 0x38);
        r.out(0xa0, 0x20);
        r.out(0x20, 0x20);
        r.out(0xa0, 0x20);
        assert!(!r.pic.output());
        r.out(0xa0, 0x0b);
        assert_eq!(r.inb(0xa0), 0);
    }

    #[test]
    fn level_inputs_repeat_until_low_and_edges_do_not() {
        let r = rig(1);
        r.out(0x4d1, 0xff);
        assert_eq!(r.inb(0x4d1), 0xde);
        r.pic.set_level(11, true);
        assert_eq!(r.pic.acknowledge(), 0x3b);
        r.out(0xa0, 0x20);
        r.out(0x20, 0x20);
        assert!(r.pic.output());
        r.pic.set_level(11, false);
        assert!(!r.pic.output());
        r.pic.set_level(3, true);
        assert_eq!(r.pic.acknowledge(), 0x33);
        r.out(0x20, 0x20);
        assert!(!r.pic.output());
    }

    #[test]
    fn spurious_masked_auto_eoi_and_poll() {
        let r = rig(3);
        assert_eq!(r.pic.acknowledge(), 0x37);
        r.out(0x21, 0xff);
        pulse(&r, 5);
        assert!(!r.pic.output());
        r.out(0x21, 0);
        assert_eq!(r.pic.acknowledge(), 0x35);
        r.out(0x20, 0x0b);
        assert_eq!(r.inb(0x20), 0, "automatic EOI");
        pulse(&r, 6);
        r.out(0x20, 0x0c);
        assert_eq!(r.inb(0x20), 0x86);
        assert!(!r.pic.output());
    }

    #[test]
    fn special_mask_lets_lower_priorities_in() {
        let r = rig(1);
        pulse(&r, 1);
        r.pic.acknowledge();
        pulse(&r, 6);
        assert!(!r.pic.output());
        r.out(0x21, 1 << 1);
        r.out(0x20, 0x68);
        assert_eq!(r.pic.acknowledge(), 0x36);
    }

    #[test]
    fn rotation_moves_the_lowest_priority() {
        let r = rig(1);
        r.out(0x20, 0xc3);
        pulse(&r, 3);
        pulse(&r, 4);
        assert_eq!(r.pic.acknowledge(), 0x34);
        r.out(0x20, 0xa0);
        assert_eq!(r.pic.state().master.priority_add, 5);
        let st = r.pic.state();
        let other = DualPic::new();
        other.restore(&st).unwrap();
        assert!(other.output());
        assert_eq!(other.acknowledge(), 0x33);
    }
}
