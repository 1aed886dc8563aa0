use super::*;
use crate::virtio::testing::{Driver, DriverQueue, Rig};
use crate::virtio::{feature, status};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;
use tandem_backends::net::Link;
use tandem_backends::net::poller::{Poller, Ready};

/// Gives every frame back to its sender.
#[derive(Default)]
struct Mirror(VecDeque<(VnetHeader, Vec<u8>)>);

impl Link for Mirror {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }
    fn start(&mut self, _: &Poller) -> io::Result<()> {
        Ok(())
    }
    fn turn(&mut self, card: &dyn Card, _: &Poller, _: &[Ready]) -> Option<Duration> {
        let more = card.transmit(&mut |header, frame| {
            let mut bytes = vec![0; frame.len() as usize];
            frame.copy_to(&mut bytes);
            self.0.push_back((*header, bytes));
            if self.0.len() < 64 { Taken::More } else { Taken::Enough }
        });
        while let Some((header, frame)) = self.0.front() {
            let (a, b) = frame.split_at(frame.len() / 3);
            if card.receive(header, &[a, b], 0) == Delivery::Full {
                return None;
            }
            self.0.pop_front();
        }
        more.then_some(Duration::ZERO)
    }
}

const MRG: u64 = bit::MRG_RXBUF;
const CTRL: u64 =
    bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_VLAN | bit::CTRL_MAC_ADDR | bit::CTRL_GUEST_OFFLOADS;

fn card(rig: &Rig, pairs: u16) -> Driver {
    let network = Network::start("test", Box::new(Mirror::default())).unwrap();
    let config = NetConfig { pairs, ..NetConfig::default() };
    rig.attach(Arc::new(VirtioNet::new(network, config)))
}

fn ready(d: &Driver, features: u64) -> (DriverQueue, DriverQueue, DriverQueue) {
    d.negotiate(feature::VERSION_1 | features).unwrap();
    let queues = (d.queue(0, 8), d.queue(1, 8), d.queue(2, 8));
    d.driver_ok();
    queues
}

fn header(gso: u8) -> Vec<u8> {
    VnetHeader { gso_type: gso, gso_size: 1000, ..VnetHeader::default() }.to_bytes().to_vec()
}

#[test]
fn frames_come_back_and_span_buffers() {
    let rig = Rig::new();
    let d = card(&rig, 1);
    let (mut rx, mut tx, _) = ready(&d, MRG | CTRL | bit::GUEST_CSUM | bit::GUEST_TSO4);
    for n in 0..3 {
        rx.offer(n, 100);
    }
    let frame: Vec<u8> = (0..150).map(|i| i as u8).collect();
    // Header and frame cut where drivers do not cut them.
    let h = header(VnetHeader::GSO_TCP4);
    let joined = [&h[5..], &frame[..1]].concat();
    tx.request(&[&h[..5], &joined, &frame[1..]], &[]);
    let (first, second) = (rx.used_bytes(0), rx.used_bytes(1));
    assert_eq!((first.len(), second.len()), (100, 62));
    assert_eq!(VnetHeader::from_bytes(*first.first_chunk().unwrap()).num_buffers, 2);
    assert_eq!([&first[12..], &second].concat(), frame);
    // One that does not fit yet waits; it is not lost.
    tx.request(&[&h, &frame], &[]);
    assert_eq!(rx.used_index(), 2);
    rx.offer(0, 100);
    let again = [rx.used_bytes(2), rx.used_bytes(3)].concat();
    assert_eq!(again[12..], frame);
    assert!(rig.sink.messages().iter().any(|m| m.data == 0x40));
    assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
}

#[test]
fn without_merging_a_frame_has_one_chain() {
    let rig = Rig::new();
    let d = card(&rig, 1);
    let (mut rx, mut tx, _) = ready(&d, 0);
    rx.offer(0, 40);
    rx.offer(1, 200);
    tx.request(&[&header(0), &[7; 100]], &[]);
    // The short buffer is given back empty.
    assert_eq!(rx.used_bytes(0).len(), 0);
    tx.request(&[&header(0), &[8; 100]], &[]);
    assert_eq!(rx.used_bytes(1)[12..], [8; 100]);
}

#[test]
fn nonsense_is_dropped_and_the_card_lives_on() {
    let rig = Rig::new();
    let d = card(&rig, 1);
    let (mut rx, mut tx, _) = ready(&d, MRG);
    for n in 0..8 {
        rx.offer(n, 200);
    }
    tx.request(&[&[0; 5]], &[]);
    tx.request(&[&header(0)], &[]);
    tx.request(&[&header(0)], &[20]);
    for desc in [(u64::MAX - 3, 64, 0, 0), (0x10_0000, u32::MAX, 0, 0), (0x9000, 64, 1, 0)] {
        tx.raw_descriptor(0, desc);
        let before = tx.used_index();
        tx.add_head(0);
        tx.kick();
        tx.wait();
        assert_eq!(tx.used_index(), before.wrapping_add(1));
    }
    tx.request(&[&header(0), b"alive, whatever came before"], &[]);
    // The chain that loops was a frame as well, as far as its queue goes.
    assert!((0..8).any(|n| rx.used_bytes(n).ends_with(b"before")));
    assert_eq!(d.status() & status::DEVICE_NEEDS_RESET, 0);
}

#[test]
fn the_control_queue_filters() {
    let rig = Rig::new();
    let d = card(&rig, 1);
    let (mut rx, mut tx, mut ctrl) = ready(&d, MRG | CTRL | bit::GUEST_CSUM);
    let mut order =
        |class: u8, command: u8, data: &[u8]| ctrl.request(&[&[class, command], data], &[1])[0];
    // Not promiscuous; one group; VLAN 5.
    assert_eq!(order(0, 0, &[0]), 0);
    let tables = [&0u32.to_le_bytes()[..], &1u32.to_le_bytes(), &[1, 0, 0x5e, 0, 0, 1]].concat();
    assert_eq!(order(1, 0, &tables), 0);
    assert_eq!(order(1, 1, &[2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(order(2, 0, &5u16.to_le_bytes()), 0);
    assert_eq!(order(5, 0, &bit::GUEST_CSUM.to_le_bytes()), 0);
    for (class, command, data) in [
        (1, 0, &u32::MAX.to_le_bytes()[..]),
        (2, 0, &4096u16.to_le_bytes()),
        (4, 0, &1u16.to_le_bytes()),
        (5, 0, &bit::GUEST_TSO4.to_le_bytes()),
        (9, 9, &[]),
        (0, 9, &[1]),
        (0, 0, &[]),
    ] {
        assert_eq!(order(class, command, data), 1, "{class} {command}");
    }
    assert_eq!((d.read16(0x2000), d.read16(0x2006)), (2, LINK_UP));
    rx.offer(0, 200);
    let vlan =
        |id: u8| [&[2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0x81, 0, 0, id][..], &[0; 20]].concat();
    let frame = |to: [u8; 6]| [&to[..], &[0; 40]].concat();
    for unwanted in [frame([2, 0, 0, 0, 0, 8]), frame([1, 0, 0x5e, 0, 0, 2]), vlan(6)] {
        tx.request(&[&header(0), &unwanted], &[]);
    }
    for (n, wanted) in (0u16..).zip([
        frame([0xff; 6]),
        frame([1, 0, 0x5e, 0, 0, 1]),
        frame([2, 0, 0, 0, 0, 9]),
        vlan(5),
    ]) {
        tx.request(&[&header(0), &wanted], &[]);
        assert_eq!(rx.used_bytes(n)[12..], wanted, "{n}");
        rx.offer(0, 200);
    }
}

#[test]
fn pairs_of_queues() {
    let rig = Rig::new();
    let d = card(&rig, 2);
    let all = feature::VERSION_1 | MRG | bit::CTRL_VQ | bit::MQ;
    d.negotiate(all).unwrap();
    assert_eq!(d.read16(0x2008), 2);
    let mut queues: Vec<DriverQueue> = (0..5).map(|i| d.queue(i, 8)).collect();
    d.driver_ok();
    for (pairs, answer) in [(3u16, 1), (0, 1), (2, 0)] {
        let data = pairs.to_le_bytes();
        assert_eq!(queues[4].request(&[&[4, 0], &data], &[1]), [answer]);
    }
    queues[0].offer(0, 200);
    queues[3].request(&[&header(0), b"over the second pair"], &[]);
    assert!(queues[0].used_bytes(0).ends_with(b"second pair"));
    // A reset takes everything back, and a second driver finds a working card.
    d.negotiate(feature::VERSION_1).unwrap();
    let (mut rx, mut tx) = (d.queue(0, 8), d.queue(1, 8));
    d.driver_ok();
    rx.offer(0, 200);
    tx.request(&[&header(0), b"anew"], &[]);
    assert!(rx.used_bytes(0).ends_with(b"anew"));
}

#[test]
fn the_registry_makes_it() {
    let rig = Rig::new();
    let mut context = rig.context();
    let make = |context: &crate::registry::DeviceContext, props: &[(&str, &str)]| {
        let props: Vec<_> = props.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        crate::registry::create(context, "virtio-net-pci", &props).map_err(|f| f[0].to_string())
    };
    let err = |context: &_, props: &[(&str, &str)]| make(context, props).err().unwrap();
    assert!(err(&context, &[]).contains("netdev=ID"));
    assert!(err(&context, &[("netdev", "n0")]).contains("--netdev user,id=n0"));
    let network = Network::start("test", Box::new(Mirror::default())).unwrap();
    context.backends.networks.insert("n0".into(), network);
    let one = [("netdev", "n0"), ("mac", "52:54:00:00:00:07")];
    assert!(err(&context, &[("netdev", "n0"), ("mac", "01:00:00:00:00:00")]).contains("group"));
    assert!(err(&context, &[("netdev", "n0"), ("rx_queue_size", "100")]).contains("power of two"));
    make(&context, &one).unwrap();
    assert!(err(&context, &one).contains("has a card already"));
}
