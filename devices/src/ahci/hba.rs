//! The host bus adapter: generic registers and ports behind BAR 5 (Serial ATA AHCI 1.3.1 §3).

use super::irq::Irq;
use super::port::{Port, SLOTS};
use super::target::Target;
use std::sync::{Arc, Mutex};
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::GuestMap;
use tandem_backends::block::Error;
use tandem_backends::block::drive::Drive;
use tandem_backends::block::engine::{self, Engine, Requester};

/// Length of the registers.
pub const LEN: u64 = 0x1000;
/// Where ports start, and bytes of one.
const PORTS: u64 = 0x100;
const PORT_LEN: u64 = 0x80;

const CAP: u64 = 0x00;
const GHC: u64 = 0x04;
const IS: u64 = 0x08;
const PI: u64 = 0x0c;
const VS: u64 = 0x10;

/// CAP: 64-bit addresses, command queuing, clearing of BUSY, AHCI only; 3 Gbit/s.
const ABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 18 | 2 << 20;
/// GHC: reset, interrupts, AHCI.
const RESET: u32 = 1;
const INTERRUPTS: u32 = 1 << 1;
const AHCI: u32 = 1 << 31;
const VERSION: u32 = 0x0001_0301;

/// A port and who works on its commands.
struct Place {
    port: Arc<Port>,
    engine: Mutex<Option<Arc<dyn Engine>>>,
}

impl Place {
    /// Has commands worked on by the engine of `drive`.
    fn work_on(&self, drive: Option<Arc<Drive>>) {
        let requester: Arc<dyn Requester> = self.port.clone();
        let engine = drive.map(|d| engine::start(&d, requester));
        let old = std::mem::replace(&mut *self.engine.lock().unwrap(), engine);
        // Without the lock: it waits for what is in flight.
        drop(old);
    }

    /// Has commands worked on: by the drive's engine; without a drive there is nothing to wait for.
    fn kick(&self) {
        let engine = self.engine.lock().unwrap().clone();
        match engine {
            Some(e) => e.kick(),
            None => {
                while let Some(r) = self.port.next() {
                    self.port.complete(r, Err(Error::ReadOnly));
                }
            }
        }
    }
}

/// The adapter.
pub struct Hba {
    places: Vec<Place>,
    irq: Arc<Irq>,
    /// GHC. Its reset bit is shown until nothing is in flight.
    control: Mutex<u32>,
}

impl Hba {
    /// An adapter with `ports` ports (1–32), all free.
    pub fn new(ports: u8, memory: &Arc<GuestMap>, irq: Irq) -> Hba {
        let irq = Arc::new(irq);
        let place = |n| Place {
            port: Arc::new(Port::new(n, memory.clone(), irq.clone())),
            engine: Mutex::new(None),
        };
        let places = (0..ports.clamp(1, 32)).map(place).collect();
        Hba { places, irq, control: Mutex::new(AHCI) }
    }

    /// Number of ports.
    pub fn ports(&self) -> usize {
        self.places.len()
    }

    /// The first port without a device.
    pub fn free_port(&self) -> Option<usize> {
        self.places.iter().position(|p| p.port.is_free())
    }

    /// Puts a device on port `n`; false if there is one, or no such port.
    pub fn plug(&self, n: usize, target: Arc<dyn Target>) -> bool {
        let Some(place) = self.places.get(n) else { return false };
        if !place.port.plug(target.clone()) {
            return false;
        }
        place.work_on(target.drive());
        true
    }

    /// The device on port `n` has another drive, or none. Returns when what was asked of the old one
    /// is done.
    pub fn replace(&self, n: usize, drive: Option<Arc<Drive>>) {
        if let Some(place) = self.places.get(n) {
            place.work_on(drive);
            place.kick();
        }
    }

    /// Back to the state after power-on. Returns when nothing is in flight any more.
    pub fn reset(&self) {
        self.restart();
        self.places.iter().for_each(|p| p.port.drain());
    }

    /// A reset by software: GHC.HR stays until nothing is in flight.
    fn restart(&self) {
        *self.control.lock().unwrap() = AHCI | RESET;
        self.places.iter().for_each(|p| p.port.reset());
        self.irq.reset();
    }

    fn read_register(&self, at: u64) -> u32 {
        let n = self.places.len() as u32;
        match at {
            CAP => ABILITIES | u32::from(SLOTS - 1) << 8 | (n - 1),
            GHC => {
                let mut control = self.control.lock().unwrap();
                if !self.places.iter().any(|p| p.port.is_stale()) {
                    *control &= !RESET;
                }
                *control
            }
            IS => self.irq.ports(),
            PI => u32::MAX >> (32 - n),
            VS => VERSION,
            _ => match self.place(at) {
                Some((p, at)) => p.port.read(at),
                None => 0,
            },
        }
    }

    fn place(&self, at: u64) -> Option<(&Place, u64)> {
        let at = at.checked_sub(PORTS)?;
        let n = usize::try_from(at / PORT_LEN).ok()?;
        Some((self.places.get(n)?, at % PORT_LEN))
    }

    fn write_register(&self, at: u64, value: u32) {
        match at {
            GHC if value & RESET != 0 => self.restart(),
            GHC => {
                *self.control.lock().unwrap() = AHCI | value & INTERRUPTS;
                self.irq.enable(value & INTERRUPTS != 0);
            }
            IS => {
                self.irq.clear(value);
                self.places.iter().for_each(|p| p.port.refresh());
            }
            _ => {
                if let Some((p, at)) = self.place(at)
                    && p.port.write(at, value)
                {
                    p.kick();
                }
            }
        }
    }
}

impl BusDevice for Hba {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut register = (u64::MAX, [0; 4]);
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            if register.0 != at & !3 {
                register = (at & !3, self.read_register(at & !3).to_le_bytes());
            }
            *d = register.1[(at & 3) as usize];
        }
    }

    // Registers are written whole (§3); of a narrower write the other bytes are taken to be 0.
    fn write(&self, offset: u64, data: &[u8]) {
        let mut at = offset & !3;
        let mut bytes = vec![0; (offset & 3) as usize];
        bytes.extend(data);
        for chunk in bytes.chunks(4) {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_register(at, u32::from_le_bytes(word));
            at += 4;
        }
    }
}

impl Drop for Hba {
    fn drop(&mut self) {
        // Engines wait for what is in flight; no more is to follow.
        self.restart();
    }
}
