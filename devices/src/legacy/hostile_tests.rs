//! A guest that writes anything anywhere, at any time: no chip may panic, hang, or keep the timer
//! thread busy.

use super::acpi_pm::AcpiPm;
use super::debug::{DebugCon, PostCode};
use super::i8042::I8042;
use super::reset::{PortA, ResetControl};
use super::serial::Serial;
use super::testdev::TestDev;
use crate::gsi::IrqInputs;
use crate::irqchip::{ApicConfig, IOAPIC_BASE, IrqChips};
use crate::power::testing::Recorder;
use crate::state::Stateful;
use crate::timer::hpet::{HPET_BASE, Hpet};
use crate::timer::pit::Pit;
use crate::timer::pm_timer::PmTimerWidth;
use crate::timer::rtc::{LostTicks, Rtc};
use std::sync::Arc;
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::clock::Clock;
use tandem_accel::irq::CpuIntc;
use tandem_backends::chardev::NullSink;

/// xorshift64*: plain, repeatable.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

#[test]
fn all_chips_survive_a_hostile_guest() {
    let clock = Clock::new();
    let config =
        ApicConfig { tsc_hz: 2_000_000_000, x2apic: true, tsc_deadline: true, phys_bits: 46 };
    let chips = IrqChips::new(&[0, 1], config, &clock);
    let inputs = IrqInputs::new(chips.router.clone());
    let power = Arc::new(Recorder::default());
    let io = IoBus::default();
    let pio = |start: u16, len: u64, dev: Arc<dyn BusDevice>| {
        io.pio.insert("chip", start.into(), len, dev).unwrap();
    };
    chips.pic.ports().into_iter().for_each(|(p, n, d)| pio(p, n, d));
    let pit = Pit::new(&clock, inputs.line(0));
    pio(0x40, 4, pit.clone());
    pio(0x61, 1, pit.port_b());
    let rtc = Rtc::new(&clock, inputs.line(8), 0, LostTicks::Slew);
    pio(0x70, 2, rtc.clone());
    let serial = Serial::new(inputs.line(4), Arc::new(NullSink));
    pio(0x3f8, 8, serial.clone());
    let i8042 = I8042::new(inputs.line(1), inputs.line(12), power.clone());
    i8042.ports().into_iter().for_each(|(p, d)| pio(p, 1, d));
    let pm = AcpiPm::new(&clock, inputs.line(9), power.clone(), PmTimerWidth::Bits24, false);
    pio(0x600, 128, pm.clone());
    pio(0xb2, 2, pm.apm());
    pio(0x92, 1, PortA::new(power.clone()));
    pio(0xcf9, 1, ResetControl::new(power.clone()));
    pio(0x80, 1, Arc::new(PostCode::default()));
    pio(0x402, 1, DebugCon::new(Arc::new(NullSink)));
    TestDev::new(&inputs).map(&io).unwrap();
    let hpet = Hpet::new(&clock, &inputs);
    io.mmio.insert("hpet", HPET_BASE, 0x400, hpet.clone()).unwrap();
    io.mmio.insert("ioapic", IOAPIC_BASE, 0x1000, chips.ioapic.clone()).unwrap();

    let ports: Vec<_> = io.pio.ranges();
    let mut rnd = Random(0x1234_5678_9abc_def1);
    let mut time = 0u64;
    for round in 0..400_000u64 {
        let (a, b) = (rnd.next(), rnd.next());
        let size = 1usize << (a & 3).min(2);
        let data = b.to_le_bytes();
        let mut into = [0; 8];
        let (start, len, _) = &ports[(a >> 8) as usize % ports.len()];
        let port = (start + (a >> 40) % len) as u16;
        match a >> 60 {
            0..=5 => io.pio_write(port, &data[..size]),
            6..=8 => io.pio_read(port, &mut into[..size]),
            9 | 10 => io.mmio_write(HPET_BASE + (b >> 48) % 0x170, &data[..size]),
            11 => io.mmio_read(HPET_BASE + (b >> 48) % 0x3f8, &mut into),
            12 => io.mmio_write(IOAPIC_BASE + (b >> 58 << 4 & 0x50), &data[..size]),
            13 => {
                let lapic = &chips.bus.lapics()[(a & 1) as usize];
                lapic.write_mmio(a >> 20 & 0x3f0, &data[..4]);
                lapic.acknowledge();
                lapic.take_event();
            }
            14 => {
                serial.receive(&data);
                pm.press_power_button();
            }
            _ => {
                time += match b & 7 {
                    0 => b >> 20,
                    1 => b >> 34,
                    _ => b >> 48,
                };
                clock.set(time);
                clock.resume();
                clock.run_expired();
                clock.pause();
                clock.set(time.max(clock.now()));
            }
        }
        if round % 50_000 == 0 {
            pit.restore(&pit.state()).unwrap();
            rtc.restore(&rtc.state()).unwrap();
            serial.restore(&serial.state()).unwrap();
            i8042.restore(&i8042.state()).unwrap();
            pm.restore(&pm.state()).unwrap();
            hpet.restore(&hpet.state()).unwrap();
            power.0.lock().unwrap().clear();
        }
    }
}
