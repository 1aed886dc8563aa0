//! Tests of the chips together: local APICs, I/O APIC, PIC, IPIs, timer.

use super::super::*;
use crate::state::Stateful;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tandem_accel::bus::BusDevice;
use tandem_accel::clock::Clock;
use tandem_accel::irq::{CpuEvent, CpuIntc, IrqSink, Kick, MsiMessage, MsiSink};

#[derive(Default)]
struct Kicks(AtomicU32);
impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    clock: Arc<Clock>,
    chips: IrqChips,
    kicks: Vec<Arc<Kicks>>,
}

fn rig(n: u32) -> Rig {
    let clock = Clock::new();
    let config =
        ApicConfig { tsc_hz: 2_000_000_000, x2apic: true, tsc_deadline: true, phys_bits: 40 };
    let ids: Vec<u32> = (0..n).collect();
    let chips = IrqChips::new(&ids, config, &clock);
    let kicks: Vec<_> = (0..n).map(|_| Arc::new(Kicks::default())).collect();
    for (l, k) in chips.bus.lapics().iter().zip(&kicks) {
        l.attach(k.clone());
    }
    Rig { clock, chips, kicks }
}

impl Rig {
    fn cpu(&self, n: usize) -> &Lapic {
        &self.chips.bus.lapics()[n]
    }
    fn wr(&self, n: usize, reg: u64, v: u32) {
        self.cpu(n).write_mmio(reg, &v.to_le_bytes());
    }
    fn rd(&self, n: usize, reg: u64) -> u32 {
        let mut b = [0; 4];
        self.cpu(n).read_mmio(reg, &mut b);
        u32::from_le_bytes(b)
    }
    fn io(&self, reg: u32, v: u32) {
        self.chips.ioapic.write(0, &[reg as u8]);
        self.chips.ioapic.write(0x10, &v.to_le_bytes());
    }
    fn io_rd(&self, reg: u32) -> u32 {
        self.chips.ioapic.write(0, &[reg as u8]);
        let mut b = [0; 4];
        self.chips.ioapic.read(0x10, &mut b);
        u32::from_le_bytes(b)
    }
    fn entry(&self, pin: u32, low: u32, dest: u32) {
        self.io(0x11 + 2 * pin, dest << 24);
        self.io(0x10 + 2 * pin, low);
    }
    fn enable(&self) {
        for n in 0..self.kicks.len() {
            self.wr(n, 0xf0, 0x1ff);
        }
    }
    /// Sets the (paused) clock and runs what is due.
    fn at(&self, ns: u64) {
        self.clock.run_to(ns);
    }
}

#[test]
fn reset_state_is_the_documented_one() {
    let r = rig(2);
    assert_eq!(r.rd(0, 0x30), 0x0005_0014);
    assert_eq!(r.rd(1, 0x20), 1 << 24);
    assert_eq!(r.rd(0, 0xf0), 0xff);
    assert_eq!(r.rd(0, 0x350), 0x700);
    assert_eq!(r.rd(1, 0x350), 0x10000);
    assert_eq!(r.cpu(0).apic_base(), 0xfee0_0900);
    assert_eq!(r.cpu(1).apic_base(), 0xfee0_0800);
    assert_eq!(r.io_rd(1), 0x0017_0020);
    assert_eq!(r.io_rd(0x10), 0x10000);
}

#[test]
fn msi_priorities_ppr_and_eoi() {
    let r = rig(1);
    r.enable();
    let send = |v| r.chips.router.send(MsiMessage { addr: 0xfee0_0000, data: v });
    send(0x41);
    assert_eq!(r.kicks[0].0.load(Ordering::Relaxed), 1);
    send(0x52);
    assert_eq!(r.kicks[0].0.load(Ordering::Relaxed), 1, "it knows already");
    assert_eq!(r.cpu(0).acknowledge(), Some(0x52));
    assert!(!r.cpu(0).pending());
    assert_eq!(r.rd(0, 0xa0), 0x50);
    r.wr(0, 0xb0, 0);
    assert!(r.cpu(0).pending());
    r.cpu(0).set_cr8(4);
    assert!(!r.cpu(0).pending());
    r.cpu(0).set_cr8(3);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x41));
    send(0x03);
    r.wr(0, 0x280, 0);
    assert_eq!(r.rd(0, 0x280), 1 << 6, "illegal vector received");
    r.wr(0, 0xf0, 0xff);
    send(0x61);
    r.enable();
    r.wr(0, 0xb0, 0);
    assert!(!r.cpu(0).pending(), "refused while disabled");
}

#[test]
fn level_interrupt_through_ioapic_repeats_until_low() {
    let r = rig(1);
    r.enable();
    r.chips.pic.ports()[0].2.write(1, &[0xff]);
    r.entry(9, 0x8039, 0);
    r.chips.router.set_level(9, true);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x39));
    assert_eq!(r.io_rd(0x10 + 18) & 1 << 14, 1 << 14);
    r.chips.router.set_level(9, false);
    r.chips.router.set_level(9, true);
    r.wr(0, 0xb0, 0);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x39));
    r.chips.router.set_level(9, false);
    r.wr(0, 0xb0, 0);
    assert!(!r.cpu(0).pending());
    assert_eq!(r.io_rd(0x10 + 18) & 1 << 14, 0);
    // The EOI register does the same.
    r.chips.router.set_level(9, true);
    r.cpu(0).acknowledge();
    r.chips.router.set_level(9, false);
    r.chips.ioapic.write(0x40, &0x39u32.to_le_bytes());
    assert_eq!(r.io_rd(0x10 + 18) & 1 << 14, 0);
}

#[test]
fn edges_masked_are_lost_and_timer_reaches_pin_two() {
    let r = rig(1);
    r.enable();
    r.chips.pic.ports()[0].2.write(1, &[0xff]);
    r.entry(4, 0x10044, 0);
    r.chips.router.set_level(4, true);
    r.entry(4, 0x44, 0);
    assert!(!r.cpu(0).pending());
    r.chips.router.set_level(4, false);
    r.chips.router.set_level(4, true);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x44));
    r.wr(0, 0xb0, 0);
    r.entry(2, 0x30, 0);
    r.chips.router.set_level(0, true);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x30));
}

fn pic_on(r: &Rig) {
    let ports = r.chips.pic.ports();
    for (p, base) in [(0, 0x30), (1, 0x38)] {
        ports[p].2.write(0, &[0x11]);
        for v in [base, 4, 1, 0] {
            ports[p].2.write(1, &[v]);
        }
    }
}

#[test]
fn pic_through_lint0_only_where_it_is_extint() {
    let r = rig(2);
    pic_on(&r);
    r.chips.router.set_level(1, true);
    assert!(r.cpu(0).pending(), "even while the APIC is software-disabled");
    assert!(!r.cpu(1).pending());
    assert_eq!(r.cpu(0).acknowledge(), Some(0x31));
    assert!(!r.cpu(0).pending());
    r.chips.router.set_level(1, false);
    r.chips.pic.ports()[0].2.write(0, &[0x20]);
    r.wr(0, 0x350, 0x10700);
    r.chips.router.set_level(1, true);
    assert!(!r.cpu(0).pending());
    // Fixed mode on the rising edge, as kernels probe it.
    r.chips.router.set_level(1, false);
    r.enable();
    assert_eq!(r.chips.pic.acknowledge(), 0x31);
    r.chips.pic.ports()[0].2.write(0, &[0x20]);
    r.wr(0, 0x350, 0x44);
    r.chips.router.set_level(1, true);
    assert_eq!(r.cpu(0).acknowledge(), Some(0x44));
    // A globally disabled APIC lets it pass.
    assert!(r.cpu(0).set_apic_base(0xfee0_0100));
    assert_eq!(r.cpu(0).acknowledge(), Some(0x31));
}

#[test]
fn ipis_by_shorthand_logical_and_physical_destination() {
    let r = rig(4);
    r.enable();
    for n in 0..4 {
        r.wr(n, 0xe0, u32::MAX);
        r.wr(n, 0xd0, 1 << (24 + n));
    }
    let pend = || (0..4).map(|n| r.cpu(n).acknowledge().is_some()).collect::<Vec<_>>();
    let icr = |high: u32, low: u32| {
        r.wr(0, 0x310, high);
        r.wr(0, 0x300, low);
    };
    icr(2 << 24, 0x50);
    assert_eq!(pend(), [false, false, true, false]);
    icr(0b1010 << 24, 0x861);
    assert_eq!(pend(), [false, true, false, true]);
    icr(0, 0xc0072);
    assert_eq!(pend(), [false, true, true, true]);
    icr(0, 0x80083);
    assert_eq!(pend(), [true; 4]);
    icr(0, 0x40094);
    assert_eq!(pend(), [true, false, false, false]);
    // Cluster model: cluster 1, members 0 and 1.
    for n in 0..4 {
        r.wr(n, 0xe0, 0x0fff_ffff);
        r.wr(n, 0xd0, (0x10 | 1 << (n & 3)) << 24);
    }
    icr(0x13 << 24, 0x8a5);
    assert_eq!(pend(), [true, true, false, false]);
    // Lowest priority goes to the one that serves nothing.
    icr(0x1f << 24, 0x9b1);
    assert_eq!(pend(), [false, false, true, false]);
    icr(1 << 24, 0x05);
    r.wr(0, 0x280, 0);
    assert_eq!(r.rd(0, 0x280), 1 << 5);
}

#[test]
fn init_sipi_and_nmi_events() {
    let r = rig(2);
    r.enable();
    r.wr(0, 0x310, 1 << 24);
    r.wr(0, 0x300, 0xc500);
    r.wr(0, 0x300, 0x8500);
    r.wr(0, 0x300, 0x0612);
    r.wr(0, 0x300, 0x0400);
    assert!(r.kicks[1].0.load(Ordering::Relaxed) >= 1);
    assert_eq!(r.cpu(1).take_event(), Some(CpuEvent::Init));
    assert_eq!(r.rd(1, 0xf0), 0xff, "INIT resets the registers");
    assert_eq!(r.cpu(1).take_event(), Some(CpuEvent::Sipi(0x12)));
    assert_eq!(r.cpu(1).take_event(), Some(CpuEvent::Nmi));
    assert_eq!(r.cpu(1).take_event(), None);
}

#[test]
fn x2apic_mode_changes_and_msrs() {
    let r = rig(20);
    let c = r.cpu(17);
    assert_eq!(c.read_msr(0x802), None);
    assert!(!c.set_apic_base(0xfee0_0400));
    assert!(!c.set_apic_base(0xfee0_0801));
    assert!(!c.set_apic_base(1 << 45 | 0x800));
    for n in 0..20 {
        let base = r.cpu(n).apic_base();
        assert!(r.cpu(n).set_apic_base(base | 0x400));
        assert!(r.cpu(n).write_msr(0x80f, 0x1ff));
    }
    assert!(!c.set_apic_base(0xfee0_0800), "x2APIC is left to disabled only");
    assert_eq!(c.read_msr(0x802), Some(17));
    assert_eq!(c.read_msr(0x80d), Some(1 << 16 | 2));
    assert_eq!(c.read_msr(0x80e), None);
    assert!(!c.write_msr(0x80b, 1) && c.write_msr(0x80b, 0));
    assert!(!c.write_msr(0x832, 1 << 20));
    assert!(!c.write_msr(0x802, 0));
    let sender = r.cpu(0);
    assert!(sender.write_msr(0x830, 17 << 32 | 0x66));
    assert_eq!(c.acknowledge(), Some(0x66));
    assert!(c.write_msr(0x80b, 0));
    assert!(sender.write_msr(0x830, 0x1_0002 << 32 | 0x877));
    assert_eq!(c.acknowledge(), Some(0x77));
    assert!(c.write_msr(0x83f, 0x88));
    assert_eq!(c.acknowledge(), Some(0x88));
    let mut b = [0; 4];
    c.read_mmio(0x20, &mut b);
    assert_eq!(b, [0xff; 4]);
    assert!(c.set_apic_base(0xfee0_0000) && !c.set_apic_base(0xfee0_0c00));
}

#[test]
fn timer_one_shot_periodic_and_masked() {
    let r = rig(1);
    r.enable();
    r.wr(0, 0x3e0, 0b0011);
    r.wr(0, 0x320, 0xee);
    r.wr(0, 0x380, 1000);
    assert_eq!(r.rd(0, 0x390), 1000);
    r.at(8_000);
    assert_eq!(r.rd(0, 0x390), 500);
    assert!(!r.cpu(0).pending());
    r.at(16_000);
    assert_eq!(r.cpu(0).acknowledge(), Some(0xee));
    r.wr(0, 0xb0, 0);
    assert_eq!(r.rd(0, 0x390), 0);
    r.wr(0, 0x320, 0x200ee);
    r.wr(0, 0x3e0, 0b1011);
    r.wr(0, 0x380, 1_000_000);
    for k in 1..4 {
        r.at(16_000 + k * 1_000_000);
        assert_eq!(r.cpu(0).acknowledge(), Some(0xee), "period {k}");
        r.wr(0, 0xb0, 0);
        assert!(!r.cpu(0).pending());
    }
    r.wr(0, 0x380, 0);
    assert_eq!(r.clock.next_deadline(), None);
}

#[test]
fn tsc_deadline_follows_the_offset() {
    let r = rig(1);
    r.enable();
    assert!(r.cpu(0).write_msr(0x6e0, 1), "ignored in other modes");
    assert_eq!(r.cpu(0).read_msr(0x6e0), Some(0));
    r.wr(0, 0x320, 0x400ec);
    assert!(r.cpu(0).write_msr(0x6e0, 2_000_000));
    assert_eq!(r.clock.next_deadline(), Some(1_000_000));
    r.cpu(0).set_tsc_offset(1_000_000);
    assert_eq!(r.clock.next_deadline(), Some(500_000));
    r.at(499_000);
    assert!(!r.cpu(0).pending() || r.clock.now() >= 500_000);
    r.at(500_000);
    assert_eq!(r.cpu(0).acknowledge(), Some(0xec));
    assert_eq!(r.cpu(0).read_msr(0x6e0), Some(0));
    r.cpu(0).write_msr(0x6e0, u64::MAX);
    r.at(600_000);
    assert!(!r.cpu(0).pending());
    r.cpu(0).write_msr(0x6e0, 0);
    assert_eq!(r.clock.next_deadline(), None);
}

#[test]
fn state_survives_a_page_and_a_restore() {
    let r = rig(1);
    r.enable();
    r.wr(0, 0x320, 0x200ee);
    r.wr(0, 0x380, 77_000);
    r.chips.router.send(MsiMessage { addr: 0xfee0_0000, data: 0x41 });
    let s = r.cpu(0).state();
    let page = s.to_page(1_000);
    assert_eq!(&page[0x390..0x394], &76_500u32.to_le_bytes());
    assert_eq!(LapicState::new(0, true).with_page(&page, 1_000), s);
    let other = rig(1);
    other.cpu(0).restore(&s).unwrap();
    assert_eq!(other.cpu(0).acknowledge(), Some(0x41));
    assert_eq!(other.clock.next_deadline(), Some(154_000));
    let io = r.chips.ioapic.state();
    other.chips.ioapic.restore(&io).unwrap();
    assert_eq!(other.chips.ioapic.state(), io);
}

#[test]
fn guest_garbage_is_harmless() {
    let r = rig(2);
    r.enable();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..200_000 {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (a, v) = (x >> 20 & 0xfff, (x >> 32) as u32);
        match x >> 61 {
            0 | 1 => r.wr((x >> 7 & 1) as usize, a, v),
            2 => r.chips.ioapic.write(a & 0xff, &v.to_le_bytes()[..1 + (v & 3) as usize]),
            3 => r.chips.router.set_level(v & 31, v & 32 != 0),
            4 => {
                r.cpu(0).write_msr(0x800 + (a as u32 & 0xff), x);
            }
            5 => {
                r.cpu(1).set_apic_base(x & 0xff_ffff_ffff);
            }
            6 => r.chips.pic.ports()[(v % 3) as usize].2.write(a & 1, &[v as u8]),
            _ => {
                r.cpu(0).take_event();
                r.cpu(0).acknowledge();
                r.rd(1, a);
            }
        }
    }
}
