//! The small guest (tests/guest) on KVM, with devices just good enough for it.

use crate::machine::*;
use crate::need_kvm;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::irq::{IrqLine, IrqSink};
use tandem_accel::x86::X86State;
use tandem_accel::{AccelOps, IrqChip};
use tandem_kvm::KvmAccel;

/// A transmitter that is always empty.
struct Uart {
    text: Arc<Mutex<String>>,
    line: IrqLine,
    enabled: AtomicU8,
    divisor_access: AtomicU8,
}

impl BusDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            2 => {
                let pending = self.line.level();
                self.line.deassert();
                data[0] = if pending { 0xc2 } else { 0xc1 };
            }
            5 => data[0] = 0x60,
            _ => {}
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, self.divisor_access.load(Ordering::Relaxed) & 0x80) {
            (0, 0) => {
                self.text.lock().unwrap().push(data[0].into());
                self.line.set(self.enabled.load(Ordering::Relaxed) & 2 != 0);
            }
            (1, 0) => {
                self.enabled.store(data[0], Ordering::Relaxed);
                self.line.set(data[0] & 2 != 0);
            }
            (3, _) => self.divisor_access.store(data[0], Ordering::Relaxed),
            _ => {}
        }
    }
}

struct Ram(Mutex<Vec<u8>>);
impl BusDevice for Ram {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        data.copy_from_slice(&self.0.lock().unwrap()[at..at + data.len()]);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
    }
}

struct Exit(Mutex<Sender<u8>>);
impl BusDevice for Exit {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, data: &[u8]) {
        let _ = self.0.lock().unwrap().send(data[0]);
    }
}

fn run(state: X86State, load: u64) {
    let accel = KvmAccel::new().unwrap();
    let IrqChip::InKernel { lines, .. } = accel.irqchip() else { panic!() };
    let lines: Arc<dyn IrqSink> = lines;
    let text = Arc::new(Mutex::new(String::new()));
    let uart = Uart {
        text: text.clone(),
        line: IrqLine::new(lines, 4),
        enabled: AtomicU8::new(0),
        divisor_access: AtomicU8::new(0),
    };
    let (tx, done) = channel();
    let bus = Arc::new(IoBus::default());
    let ram = |len| Arc::new(Ram(Mutex::new(vec![0; len])));
    bus.pio.insert("uart", 0x3f8, 8, Arc::new(uart)).unwrap();
    bus.pio.insert("exit", 0xf4, 1, Arc::new(Exit(Mutex::new(tx)))).unwrap();
    bus.pio.insert("latch", 0xe0, 4, ram(4)).unwrap();
    bus.mmio.insert("ram", MMIO, 0x1_0000, ram(0x1_0000)).unwrap();
    let m = Machine::with_bus(accel, bus, vec![state], Arc::default(), done);
    m.write(load, tandem_guest::IMAGE);
    m.resume();
    let code = m.done.recv_timeout(PATIENCE);
    let said = text.lock().unwrap().clone();
    println!("{said}");
    if code.is_err() {
        panic!("no exit; {:?}; {:x?}", m.stops.try_recv(), m.vcpus[0].state());
    }
    let status = code.ok().map(|c| i32::from(c) << 1 | 1);
    assert_eq!(tandem_guest::judge(status, &said), Ok(()));
}

#[test]
fn entered_in_real_mode() {
    need_kvm!();
    let mut s = real_mode();
    s.rip = 0x7c00;
    run(s, 0x7c00);
}

#[test]
fn entered_as_a_multiboot_kernel() {
    need_kvm!();
    let mut s = protected_mode();
    s.rip = 0x10_0040;
    run(s, 0x10_0000);
}
