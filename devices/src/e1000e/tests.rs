use super::*;
use crate::pci::testing::{Rig, rig};
use crate::testing::{Random, context};
use reg::cause;
use std::time::Duration;
use tandem_accel::memory::GuestRam;
use tandem_backends::net::Link;
use tandem_backends::net::poller::{Poller, Ready};
use vm_memory::{Bytes, GuestAddress};

/// A network that does nothing by itself.
struct Quiet;

impl Link for Quiet {
    fn start(&mut self, _: &Poller) -> std::io::Result<()> {
        Ok(())
    }
    fn turn(&mut self, _: &dyn Card, _: &Poller, _: &[Ready]) -> Option<Duration> {
        None
    }
}

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);

struct Bench {
    rig: Rig,
    adapter: Arc<Adapter>,
    ram: Arc<GuestRam>,
}

fn bench() -> Bench {
    let rig = rig();
    let ctx = context(&rig);
    let slot = rig.bus.slot(None).unwrap();
    let adapter = Adapter {
        state: Mutex::new(State::new(MAC)),
        outgoing: Mutex::default(),
        chosen: Mutex::default(),
        eeprom: parts::eeprom(MAC),
        mac: MAC,
        memory: ctx.memory.clone(),
        network: Network::start("quiet", Box::new(Quiet)).unwrap(),
        wires: Wires {
            intx: slot.intx(Pin::A),
            msi: Msi::new(slot.msi(), 0),
            msix: Msix::new(slot.msi(), VECTORS, MSIX_BAR),
        },
    };
    Bench { rig, adapter: Arc::new(adapter), ram: ctx.memory.ram() }
}

const TX_RING: u64 = 0x1000;
const RX_RING: u64 = 0x2000;
const DATA: u64 = 0x4000;

impl Bench {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0; len];
        self.ram.read_slice(&mut b, GuestAddress(at)).unwrap();
        b
    }
    fn w(&self, at: u64, value: u32) {
        Registers(self.adapter.clone()).write(at, &value.to_le_bytes());
    }
    fn r(&self, at: u64) -> u32 {
        self.adapter.read_word(at)
    }
    /// Puts descriptors on the ring and takes what comes out.
    fn send(&self, descriptors: &[(u64, u64)]) -> Vec<Vec<u8>> {
        self.w(reg::TDBAL, TX_RING as u32);
        self.w(reg::TDLEN, 512);
        self.w(reg::TCTL, reg::TCTL_ON);
        let mut at = self.r(reg::TDT);
        for (low, high) in descriptors {
            self.put(
                TX_RING + u64::from(at) * 16,
                &[low.to_le_bytes(), high.to_le_bytes()].concat(),
            );
            at = (at + 1) % 32;
        }
        self.w(reg::TDT, at);
        let mut out = Vec::new();
        let more = self.adapter.transmit(&mut |_, frame| {
            let mut bytes = vec![0; frame.len() as usize];
            frame.copy_to(&mut bytes);
            out.push(bytes);
            Taken::More
        });
        assert!(!more);
        assert_eq!(self.r(reg::TDH), at);
        out
    }
    fn receive_on(&self, rctl: u32, buffers: u16) {
        self.w(reg::RDBAL, RX_RING as u32);
        self.w(reg::RDLEN, 128);
        for n in 0..8u64 {
            let desc = [(DATA + n * 0x800).to_le_bytes(), [0xff; 8]].concat();
            self.put(RX_RING + n * 16, &desc);
        }
        self.w(reg::RDT, buffers.into());
        self.w(reg::RCTL, reg::RCTL_ON | rctl);
    }
}

/// An Ethernet frame with IPv4 and TCP to `to`, `payload` long; its checksums are right if `sums`.
fn tcp(to: MacAddr, payload: usize, sums: bool) -> Vec<u8> {
    let mut f = [&to.0[..], &[2, 0, 0, 0, 0, 9], &[8, 0]].concat();
    let mut ip = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2];
    ip[2..4].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
    f.extend(ip);
    // Sequence 0x10000, FIN, PSH and ACK.
    f.extend([0, 80, 0x1f, 0x90, 0, 1, 0, 0, 0, 0, 0, 1, 0x50, 0x19, 1, 0, 0, 0, 0, 0]);
    f.extend((0..payload).map(|i| i as u8));
    if sums {
        frame::Checksum { start: 14, at: 24, last: 33 }.insert(&mut f, 0);
        let addresses = frame::sum(&f[26..34], 6 + 20 + payload as u32);
        frame::Checksum { start: 34, at: 50, last: 0 }.insert(&mut f, addresses);
    }
    f
}

#[test]
fn the_eeprom_adds_up_and_the_phy_is_an_82574_s() {
    let b = bench();
    let word = |n: u32| {
        b.w(reg::EERD, n << 2 | 1);
        (b.r(reg::EERD) >> 16) as u16
    };
    let all: Vec<u16> = (0..64).map(word).collect();
    assert_eq!(all.iter().fold(0u16, |s, w| s.wrapping_add(*w)), 0xbaba);
    assert_eq!(all[..3], [0x5452, 0x0100, 0x0302]);
    let phy = |n: u32| {
        b.w(reg::MDIC, n << 16 | 1 << 21 | 2 << 26);
        let v = b.r(reg::MDIC);
        assert!(v & 1 << 28 != 0);
        v as u16
    };
    assert_eq!((phy(2), phy(3), phy(1) & 4), (0x0141, 0x0cb1, 4));
    b.w(reg::MDIC, 1 << 16 | 2 << 21 | 2 << 26);
    assert!(b.r(reg::MDIC) & 1 << 30 != 0, "there is one PHY");
    assert_eq!(b.r(reg::STATUS) & 2, 2);
    // Through the ports: RAL of the first address.
    let ports = Ports(b.adapter.clone());
    ports.write(0, &(reg::RA as u32).to_le_bytes());
    let mut d = [0; 4];
    ports.read(4, &mut d);
    assert_eq!(d, [0x52, 0x54, 0, 1]);
}

#[test]
fn legacy_descriptors_carry_frames_out() {
    let b = bench();
    b.put(DATA, &tcp(MAC, 26, false));
    // Two pieces; a checksum over everything from byte 14 on, into byte 24; report.
    let out = b.send(&[(DATA, 30), (DATA + 30, 50 | 24 << 16 | (1 | 4 | 8) << 24 | 14 << 40)]);
    assert_eq!((out.len(), out[0].len()), (1, 80));
    assert_eq!(frame::sum(&out[0][14..], 0), 0xffff);
    assert_eq!(b.bytes(TX_RING + 16 + 12, 1), [1]);
    assert_eq!(b.bytes(TX_RING + 12, 1), [0], "no report was asked for");
    assert_eq!(b.r(reg::GPTC), 1);
    assert_eq!(b.r(reg::GPTC), 0);
    // A tag is put in.
    b.w(reg::CTRL, b.r(reg::CTRL) | reg::CTRL_VLAN);
    let out = b.send(&[(DATA, 60 | (1 | 8 | 64) << 24 | 0x123 << 48)]);
    assert_eq!(out[0][12..18], [0x81, 0, 0x01, 0x23, 8, 0]);
    assert_eq!(out[0].len(), 64);
    // What does not lie in memory is dropped, and the next frame goes out.
    let out = b.send(&[(0xdead_0000, 60 | 1 << 24), (DATA, 60 | 1 << 24)]);
    assert_eq!(out.len(), 1);
}

#[test]
fn long_frames_become_segments_with_right_checksums() {
    let b = bench();
    let mut long = tcp(MAC, 3000, false);
    // As drivers do: no length and no checksum in IP, the sum of the addresses in TCP.
    long[16..18].fill(0);
    let addresses = frame::sum(&long[26..34], 6);
    long[50..52].copy_from_slice(&(addresses as u16).to_be_bytes());
    b.put(DATA, &long);
    let context = (
        14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40,
        3000 | (1 | 2 | 4 | 0x20) << 24 | 54 << 40 | 1400 << 48,
    );
    let len = long.len() as u64;
    let flags = (1 << 20) | (1 | 4 | 8 | 0x20) << 24 | 3 << 40;
    let out = b.send(&[context, (DATA, len | flags)]);
    assert_eq!(out.iter().map(Vec::len).collect::<Vec<_>>(), [1454, 1454, 254]);
    let mut payload: Vec<u8> = Vec::new();
    for (i, f) in out.iter().enumerate() {
        let v = frame::verify(f);
        assert_eq!((v.ip, v.payload), (Some(true), Some(true)), "{i}");
        let sequence = u32::from_be_bytes(f[38..42].try_into().unwrap());
        assert_eq!(sequence, 0x10000 + 1400 * i as u32);
        assert_eq!(u16::from_be_bytes([f[18], f[19]]), 0x1234 + i as u16);
        assert_eq!(f[47] & 9, if i == 2 { 9 } else { 0 });
        payload.extend(&f[54..]);
    }
    assert_eq!(payload, long[54..]);
}

#[test]
fn frames_come_in_by_every_kind_of_descriptor() {
    let b = bench();
    b.w(reg::IMS, cause::RXT);
    b.receive_on(reg::RCTL_STRIP, 7);
    let good = tcp(MAC, 100, true);
    assert_eq!(
        b.adapter.receive(&VnetHeader::default(), &[&good[..20], &good[20..]], 0),
        Delivery::Done
    );
    b.adapter.commit();
    assert!(b.adapter.wires.intx.pending());
    assert_eq!(b.bytes(DATA, good.len()), good);
    let d = b.bytes(RX_RING, 16);
    assert_eq!((u16::from_le_bytes([d[8], d[9]]), d[12], d[13]), (154, 0x63, 0));
    assert_eq!(b.r(reg::ICR) & (cause::RXT | cause::ASSERTED), cause::RXT | cause::ASSERTED);
    assert!(!b.adapter.wires.intx.pending());
    // A wrong checksum is told; short frames get their padding.
    let mut bad = tcp(MAC, 0, true);
    bad[50] ^= 1;
    b.adapter.receive(&VnetHeader::default(), &[&bad], 0);
    let d = b.bytes(RX_RING + 16, 16);
    assert_eq!((u16::from_le_bytes([d[8], d[9]]), d[12], d[13]), (60, 0x63, 0x20));
    // Extended, with the check sequence, over two buffers of 256 bytes.
    b.w(reg::RFCTL, reg::RFCTL_EXTENDED);
    b.receive_on(3 << 16, 7);
    let good = tcp(MAC, 300, true);
    b.adapter.receive(&VnetHeader::default(), &[&good], 0);
    let d = b.bytes(RX_RING + 32, 32);
    assert_eq!((d[8] & 3, u16::from_le_bytes([d[12], d[13]])), (1, 256));
    assert_eq!((d[24], u16::from_le_bytes([d[28], d[29]])), (0x63, 102));
    // Split over buffers of 256, 1024, 1024 and 1024 bytes.
    b.w(reg::RFCTL, reg::RFCTL_EXTENDED);
    b.w(reg::RDH, 0);
    b.w(reg::PSRCTL, 0x0101_0102);
    b.receive_on(reg::RCTL_SPLIT | reg::RCTL_STRIP, 3);
    for i in 0..4u64 {
        b.put(RX_RING + 8 * i, &(DATA + 0x1000 * i).to_le_bytes());
    }
    let good = tcp(MAC, 1400, true);
    b.adapter.receive(&VnetHeader::default(), &[&good], 0);
    let d = b.bytes(RX_RING, 32);
    let word = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
    assert_eq!([12, 18, 20, 22].map(word), [256, 1024, 174, 0]);
    assert_eq!(b.r(reg::RDH), 2, "in units of 16 bytes");
    assert_eq!(b.bytes(DATA + 0x1000, 1024), good[256..1280]);
}

#[test]
fn filters_and_full_rings_hold_frames_back() {
    let b = bench();
    let frame = |to: [u8; 6]| tcp(MacAddr(to), 10, true);
    let came = |to: [u8; 6]| {
        let before = b.r(reg::RDH);
        b.adapter.receive(&VnetHeader::default(), &[&frame(to)], 0);
        b.r(reg::RDH) != before
    };
    assert!(!came(MAC.0), "the receiver is off");
    b.receive_on(reg::RCTL_STRIP, 7);
    assert!(came(MAC.0) && !came([0x52, 0, 0, 0, 0, 1]) && !came([0xff; 6]));
    assert!(!came([1, 0, 0x5e, 0, 0, 0xfb]));
    // The bit of that group in the table: bits 47 to 36 of its address.
    b.w(reg::MTA + (0xfb0 >> 5) * 4, 1 << (0xfb0 & 31));
    assert!(came([1, 0, 0x5e, 0, 0, 0xfb]));
    b.w(reg::RCTL, b.r(reg::RCTL) | reg::RCTL_BROADCAST | reg::RCTL_UNICAST);
    assert!(came([0xff; 6]) && came([0x52, 0, 0, 0, 0, 1]));
    while came(MAC.0) {}
    let full = b.adapter.receive(&VnetHeader::default(), &[&frame(MAC.0)], 0);
    assert_eq!(full, Delivery::Full);
    b.w(reg::CTRL, reg::CTRL_RESET);
    assert_eq!((b.r(reg::RDH), b.r(reg::RCTL)), (0, 0));
}

#[test]
fn messages_are_sent_once_and_clear_their_causes() {
    let b = bench();
    // Everything on, table at its place: vectors 0, 1, 2 for receive, transmit, the rest.
    b.adapter.wires.msix.set_bus_master(true);
    b.adapter.wires.msix.set_control(0x8000);
    for n in 0..3u64 {
        b.adapter.wires.msix.write(n * 16, &0xfee0_0000u32.to_le_bytes());
        b.adapter.wires.msix.write(n * 16 + 8, &(0x40 + n as u32).to_le_bytes());
        b.adapter.wires.msix.write(n * 16 + 12, &[0; 4]);
    }
    b.w(reg::IVAR, 8 | 9 << 8 | 10 << 16);
    b.w(reg::EIAC, cause::RXQ0 | cause::TXQ0);
    b.w(reg::IMS, cause::RXQ0 | cause::TXQ0 | cause::OTHER | cause::LSC);
    b.w(reg::ICS, cause::RXQ0);
    b.w(reg::ICS, cause::RXQ0);
    b.w(reg::ICS, cause::LSC | cause::OTHER);
    b.w(reg::ICS, cause::LSC | cause::OTHER);
    let sent: Vec<u32> = b.rig.sink.messages().iter().map(|m| m.data).collect();
    assert_eq!(sent, [0x40, 0x40, 0x42]);
    assert_eq!(b.r(reg::ICR) & (cause::RXQ0 | cause::LSC), cause::LSC);
    let state = b.adapter.state();
    b.adapter.reset();
    b.adapter.restore(&state).unwrap();
    assert_eq!(b.r(reg::IVAR), 8 | 9 << 8 | 10 << 16);
}

#[test]
fn a_hostile_guest_ends_nothing() {
    let b = bench();
    let mut r = Random::default();
    let known = [
        reg::CTRL,
        reg::RCTL,
        reg::TCTL,
        reg::RDBAL,
        reg::RDLEN,
        reg::RDH,
        reg::RDT,
        reg::TDBAL,
        reg::TDLEN,
        reg::TDH,
        reg::TDT,
        reg::RFCTL,
        reg::PSRCTL,
        reg::IMS,
        reg::IVAR,
        reg::EERD,
        reg::MDIC,
        reg::ICS,
        reg::VET,
        reg::RXCSUM,
        reg::TDBAH,
        reg::EIAC,
    ];
    let registers = Registers(b.adapter.clone());
    let mut frame = [0; 2000];
    for round in 0..60_000u64 {
        let (a, v) = (r.next(), r.word());
        let at = match a & 3 {
            0 => a >> 8 & (reg::LEN - 1) & !7,
            _ => known[(a >> 8) as usize % known.len()],
        };
        let mut value = v.to_le_bytes();
        match a >> 60 {
            0..=7 => registers.write(at, &value[..4]),
            8 => registers.read(at, &mut value),
            9 => registers.write(at + (a >> 40 & 3), &value[..1 << (a & 3)]),
            10 => b.put(a >> 20 & 0xfff8, &value),
            11 => Ports(b.adapter.clone()).write(a & 0x1c, &value[..4]),
            12 => {
                frame[(a >> 8) as usize % 60] = v as u8;
                let len = (a >> 24) as usize % frame.len();
                b.adapter.receive(&VnetHeader::default(), &[&frame[..len]], 0);
            }
            13 => {
                // Rings that lie in memory, with what is there.
                b.w(reg::TDBAL, (a >> 16) as u32 & 0xfff0);
                b.w(reg::TDBAH, 0);
                b.w(reg::TCTL, reg::TCTL_ON);
                b.w(reg::TDLEN, 256);
                b.w(reg::TDH, 0);
                b.w(reg::TDT, 15);
            }
            _ => {
                let mut n = 0;
                b.adapter.transmit(&mut |_, f| {
                    assert!(f.len() <= 256 << 10);
                    n += 1;
                    if n % 7 == 0 { Taken::Enough } else { Taken::More }
                });
            }
        }
        if round % 1000 == 0 {
            b.adapter.commit();
            b.adapter.restore(&b.adapter.state()).unwrap();
        }
        if round % 5000 == 0 {
            b.adapter.reset();
        }
    }
}
