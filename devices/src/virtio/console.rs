//! Console and named serial ports (Virtio 1.3 §5.3).
//!
//! ```text
//!   virtio-serial-pci ── bus ──┬── virtconsole    (port 0 if it is free: a terminal, hvc0)
//!                              └── virtserialport (a named channel, /dev/virtio-ports/NAME)
//!   guest ─ transmit queue ─► chardev          chardev's far end ─ main loop ─► receive queue
//! ```
//!
//! What always holds:
//!
//! * The ports are there before the driver is; the bus takes [`MAX_PORTS`].
//! * Bytes of the guest that the far end does not take stay in the queue: the guest waits. Bytes for
//!   a port that the guest has not opened stay in the chardev.
//! * Control messages that do not fit into the driver's buffers wait; there is at most a bounded
//!   number of them, as each port has a bounded number of things to say.
//! * Lock order: device → chardev; queues are under the device's lock.

use super::pci;
use super::queue::VirtQueue;
use super::{Activation, VirtioDevice, feature};
use crate::registry::{BusKind, Device, DeviceFault, DeviceType, Property, PropertyKind};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tandem_backends::chardev::{CharBackend, CharFront};

/// Virtio device type.
pub const DEVICE_ID: u16 = 3;
/// Most ports.
pub const MAX_PORTS: usize = 31;
/// Length of every queue.
const QUEUE_SIZE: u16 = 128;
/// Control messages that wait for buffers.
const MAX_WAITING: usize = 16 * MAX_PORTS;
/// Longest name of a port.
const MAX_NAME: usize = 128;
/// Bytes that are passed on at a time.
const PIECE: usize = 4096;

/// Feature bits (§5.3.3).
mod bit {
    pub const MULTIPORT: u64 = 1 << 1;
    pub const EMERG_WRITE: u64 = 1 << 2;
}

/// Control events (§5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Offset of the emergency write register.
const EMERG_WR: u64 = 8;

/// The receive queue of port `n`; the transmit queue follows it (§5.3.2).
fn rx_queue(n: usize) -> usize {
    if n == 0 { 0 } else { 2 * n + 2 }
}

/// The port and direction (transmit?) of a queue; `None` for the control queues.
fn port_of(queue: usize) -> Option<(usize, bool)> {
    let n = match queue / 2 {
        0 => 0,
        1 => return None,
        n => n - 1,
    };
    Some((n, queue % 2 == 1))
}

struct Port {
    name: String,
    console: bool,
    chardev: Arc<dyn CharBackend>,
    /// The guest has opened it.
    guest_open: bool,
    host_open: bool,
}

#[derive(Default)]
struct State {
    features: u64,
    ports: Vec<Option<Port>>,
    queues: Vec<Option<VirtQueue>>,
    /// Control messages that wait for buffers.
    waiting: VecDeque<Vec<u8>>,
}

/// A console device with its ports.
pub struct VirtioConsole {
    state: Mutex<State>,
    sizes: Vec<u16>,
}

/// The chardev's way to a port.
struct Front {
    device: Weak<VirtioConsole>,
    port: usize,
}

impl CharFront for Front {
    fn receive(&self, data: &[u8]) -> usize {
        self.device.upgrade().map_or(data.len(), |d| d.lock().receive(self.port, data))
    }
    fn opened(&self, open: bool) {
        if let Some(d) = self.device.upgrade() {
            d.lock().host_opened(self.port, open);
        }
    }
}

fn message(port: usize, event: u16, value: u16) -> Vec<u8> {
    let mut m = (port as u32).to_le_bytes().to_vec();
    m.extend(event.to_le_bytes());
    m.extend(value.to_le_bytes());
    m
}

impl State {
    fn multiport(&self) -> bool {
        self.features & bit::MULTIPORT != 0
    }

    fn port(&mut self, n: usize) -> Option<&mut Port> {
        self.ports.get_mut(n)?.as_mut()
    }

    fn queue(&mut self, n: usize) -> Option<&mut VirtQueue> {
        self.queues.get_mut(n)?.as_mut()
    }

    /// Gives the guest bytes of a port's far end; returns how many.
    fn receive(&mut self, n: usize, data: &[u8]) -> usize {
        let multiport = self.multiport();
        let open = self.port(n).is_some_and(|p| p.guest_open || !multiport);
        let Some(queue) = self.queue(rx_queue(n)).filter(|_| open) else { return 0 };
        let memory = queue.ram();
        let ram = &*memory;
        let mut given = 0;
        while given < data.len() {
            let Some(chain) = queue.pop(ram) else {
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            // A buffer that makes no sense is given back empty.
            let written = match chain.writer(ram) {
                Ok(mut w) => {
                    let n = w.available_bytes().min(data.len() - given);
                    w.write_all(&data[given..given + n]).map_or(0, |()| n)
                }
                Err(_) => 0,
            };
            queue.push(ram, head, written as u32);
            given += written;
        }
        queue.signal(ram);
        given
    }

    /// Passes on what the guest has sent to port `n`.
    fn transmit(&mut self, n: usize) {
        let Some(port) = self.port(n) else { return self.discard(n) };
        let chardev = port.chardev.clone();
        let Some(queue) = self.queue(rx_queue(n) + 1) else { return };
        let memory = queue.ram();
        let ram = &*memory;
        let mut done = 0;
        // At most a queue length at a time; what comes late has its own notification.
        while done < queue.size() && !chardev.congested() {
            let Some(chain) = queue.pop(ram) else {
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            if let Ok(mut reader) = chain.reader(ram) {
                let mut bytes = [0; PIECE];
                // A chain is as long as its descriptors say, which may overlap: 16 MiB are enough.
                for _ in 0..4096 {
                    match reader.read(&mut bytes) {
                        Ok(n) if n > 0 => chardev.write(&bytes[..n]),
                        _ => break,
                    }
                }
            }
            queue.push(ram, head, 0);
            done += 1;
        }
        queue.signal(ram);
    }

    /// Takes what the guest sends to a port that is not there.
    fn discard(&mut self, n: usize) {
        if let Some(queue) = self.queue(rx_queue(n) + 1) {
            queue.drain(|_, _| 0);
        }
    }

    fn say(&mut self, message: Vec<u8>) {
        if self.multiport() && self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(message);
        }
    }

    /// Sends control messages as far as there are buffers.
    fn flush(&mut self) {
        let State { queues, waiting, .. } = self;
        let Some(Some(queue)) = queues.get_mut(2) else { return };
        let memory = queue.ram();
        let ram = &*memory;
        while let Some(m) = waiting.front() {
            let Some(chain) = queue.pop(ram) else {
                if queue.enable_notifications(ram) && queue.has_more(ram) {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = match chain.writer(ram) {
                Ok(mut w) => w.write(m).unwrap_or(0),
                Err(_) => 0,
            };
            queue.push(ram, head, written as u32);
            waiting.pop_front();
        }
        queue.signal(ram);
    }

    fn host_opened(&mut self, n: usize, open: bool) {
        let Some(port) = self.port(n) else { return };
        port.host_open = open;
        let tell = !port.console;
        if tell {
            self.say(message(n, event::PORT_OPEN, open.into()));
            self.flush();
        }
    }

    /// A control message of the driver's. Returns a port that it has opened.
    fn heard(&mut self, m: [u8; 8]) -> Option<usize> {
        let n = u32::from_le_bytes([m[0], m[1], m[2], m[3]]) as usize;
        let (what, value) = (u16::from_le_bytes([m[4], m[5]]), u16::from_le_bytes([m[6], m[7]]));
        match (what, value) {
            (event::DEVICE_READY, 1) => {
                let there: Vec<usize> =
                    (0..self.ports.len()).filter(|n| self.ports[*n].is_some()).collect();
                for n in there {
                    self.say(message(n, event::PORT_ADD, 1));
                }
            }
            (event::PORT_READY, 1) => {
                let port = self.port(n)?;
                let (console, open, name) = (port.console, port.host_open, port.name.clone());
                if console {
                    self.say(message(n, event::CONSOLE_PORT, 1));
                }
                if !name.is_empty() {
                    let mut m = message(n, event::PORT_NAME, 1);
                    m.extend(name.as_bytes());
                    self.say(m);
                }
                if console || open {
                    self.say(message(n, event::PORT_OPEN, 1));
                }
            }
            (event::PORT_OPEN, v) => {
                self.port(n)?.guest_open = v == 1;
                return (v == 1).then_some(n);
            }
            _ => {}
        }
        None
    }

    fn control(&mut self) -> Vec<usize> {
        let mut heard = Vec::new();
        if let Some(queue) = self.queue(3) {
            queue.drain(|ram, chain| {
                let mut m = [0; 8];
                if let Ok(mut r) = chain.reader(ram)
                    && r.read_exact(&mut m).is_ok()
                {
                    heard.push(m);
                }
                0
            });
        }
        let opened = heard.into_iter().filter_map(|m| self.heard(m)).collect();
        self.flush();
        opened
    }
}

impl VirtioConsole {
    /// A device without ports.
    pub fn new() -> Arc<VirtioConsole> {
        let ports = (0..MAX_PORTS).map(|_| None).collect();
        let queues = 2 * (MAX_PORTS + 1);
        Arc::new(VirtioConsole {
            state: Mutex::new(State { ports, ..State::default() }),
            sizes: vec![QUEUE_SIZE; queues],
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a port on `chardev`: number `at`, or the first free one. A terminal's is 0 if it can be;
    /// no other's is by itself, as the driver takes port 0 for one.
    pub fn add_port(
        self: &Arc<Self>,
        at: Option<usize>,
        name: &str,
        console: bool,
        chardev: Arc<dyn CharBackend>,
    ) -> Result<usize, DeviceFault> {
        if name.len() > MAX_NAME {
            let what = format!("the port's name is longer than {MAX_NAME} bytes");
            return Err(DeviceFault::new(what, "shorten it"));
        }
        let n = {
            let mut s = self.lock();
            let twin = |p: &Port| !name.is_empty() && p.name == name;
            if s.ports.iter().flatten().any(twin) {
                let what = format!("there is a port called '{name}' already");
                return Err(DeviceFault::new(what, "give each port a name of its own"));
            }
            let first = usize::from(!console);
            let free = |n: &usize| s.ports[*n].is_none();
            let n = match at {
                Some(n) if n >= MAX_PORTS || s.ports[n].is_some() => {
                    let what = format!("port number {n} is taken or too high");
                    return Err(DeviceFault::new(what, format!("use 0 to {}", MAX_PORTS - 1)));
                }
                Some(n) => n,
                None => (first..MAX_PORTS).find(free).ok_or_else(|| {
                    DeviceFault::new("all ports are taken", "add another virtio-serial-pci")
                })?,
            };
            let host_open = chardev.is_open();
            let name = name.to_string();
            let chardev = chardev.clone();
            s.ports[n] = Some(Port { name, console, chardev, guest_open: false, host_open });
            n
        };
        let front = Arc::new(Front { device: Arc::downgrade(self), port: n });
        if !chardev.attach(front) {
            self.lock().ports[n] = None;
            return Err(DeviceFault::new(
                "its character device is in use",
                "give each device a character device of its own",
            ));
        }
        let device = Arc::downgrade(self);
        chardev.on_drained(Box::new(move || {
            if let Some(d) = device.upgrade() {
                d.lock().transmit(n);
            }
        }));
        Ok(n)
    }

    /// Wakes those whose input the guest may now take.
    fn wake(&self, ports: impl IntoIterator<Item = usize>) {
        let s = self.lock();
        for n in ports {
            if let Some(Some(p)) = s.ports.get(n) {
                p.chardev.room();
            }
        }
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }
    fn features(&self) -> u64 {
        bit::MULTIPORT | bit::EMERG_WRITE
    }
    fn ring_features(&self) -> u64 {
        feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Columns and rows unknown, number of ports, emergency write.
        let mut space = [0; 12];
        space[4..8].copy_from_slice(&(MAX_PORTS as u32).to_le_bytes());
        let tail = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (d, b) in data.iter_mut().zip(tail.unwrap_or_default()) {
            *d = *b;
        }
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let (EMERG_WR, Some(b)) = (offset, data.first()) {
            let mut s = self.lock();
            if let Some(p) = s.port(0) {
                p.chardev.write(&[*b]);
            }
        }
    }
    fn activate(&self, activation: Activation) {
        let mut s = self.lock();
        s.features = activation.features;
        s.queues = activation.queues;
        let multiport = s.multiport();
        drop(s);
        if !multiport {
            self.wake([0]);
        }
    }
    fn notify(&self, queue: u16) {
        let woken = match (queue, port_of(queue.into())) {
            (2, _) => {
                self.lock().flush();
                vec![]
            }
            (3, _) => self.lock().control(),
            (_, Some((n, true))) => {
                self.lock().transmit(n);
                vec![]
            }
            (_, Some((n, false))) => vec![n],
            _ => vec![],
        };
        self.wake(woken);
    }
    fn reset(&self) {
        let mut s = self.lock();
        s.queues.clear();
        s.waiting.clear();
        s.features = 0;
        s.ports.iter_mut().flatten().for_each(|p| p.guest_open = false);
    }
    fn reset_queue(&self, queue: u16) {
        if let Some(q) = self.lock().queues.get_mut(usize::from(queue)) {
            *q = None;
        }
    }
    fn enable_queue(&self, queue: VirtQueue) {
        let n = queue.index();
        if let Some(q) = self.lock().queues.get_mut(usize::from(n)) {
            *q = Some(queue);
        }
        self.notify(n);
    }
}

/// A port in being; it goes with its device.
struct PortDevice;

impl Device for PortDevice {
    fn reset(&self) {}
}

const fn text(name: &'static str, description: &'static str) -> Property {
    Property { name, kind: PropertyKind::Text, default: None, description }
}

const PORT_PROPERTIES: &[Property] = &[
    text("chardev", "ID of the character device (--chardev …,id=…)"),
    text("name", "name that the guest finds it by"),
    text("bus", "ID of the virtio-serial-pci device; the first if absent"),
    Property {
        name: "nr",
        kind: PropertyKind::Uint { min: 0, max: MAX_PORTS as u64 - 1 },
        default: None,
        description: "number; the first free one if absent",
    },
];

fn create_port(
    ctx: &crate::registry::DeviceContext,
    props: &crate::registry::Properties,
    console: bool,
) -> Result<Arc<dyn Device>, DeviceFault> {
    let Some(id) = props.text("chardev") else {
        let remedy = "name one with chardev=ID (--chardev socket,id=ID,path=…)";
        return Err(DeviceFault::new("it has no character device", remedy));
    };
    let chardev = ctx.backends.chardev(id)?;
    let bus = props.text("bus").map(|b| b.strip_suffix(".0").unwrap_or(b));
    let Some(device) = ctx.directory.find::<VirtioConsole>(bus) else {
        let what = match bus {
            Some(b) => format!("there is no virtio-serial-pci device '{b}'"),
            None => "there is no virtio-serial-pci device".to_string(),
        };
        return Err(DeviceFault::new(what, "add --device virtio-serial-pci before it"));
    };
    let at = props.uint("nr").map(|n| n as usize);
    device.add_port(at, props.text("name").unwrap_or_default(), console, chardev)?;
    Ok(Arc::new(PortDevice))
}

inventory::submit! {
    DeviceType {
        name: "virtio-serial-pci",
        bus: BusKind::Pci,
        description: "bus for consoles and named ports",
        properties: &[Property {
            name: "max_ports",
            kind: PropertyKind::Uint { min: 1, max: MAX_PORTS as u64 },
            default: None,
            description: "accepted and ignored: there is room for 31",
        }],
        create: |ctx, props| {
            let device = VirtioConsole::new();
            let card = pci::attach(ctx, props, "virtio-serial-pci", device.clone())?;
            ctx.directory.add(props.text("id").unwrap_or_default(), device);
            Ok(card)
        },
    }
}

inventory::submit! {
    DeviceType {
        name: "virtserialport",
        bus: BusKind::VirtioSerial,
        description: "named channel between guest and host",
        properties: PORT_PROPERTIES,
        create: |ctx, props| create_port(ctx, props, false),
    }
}

inventory::submit! {
    DeviceType {
        name: "virtconsole",
        bus: BusKind::VirtioSerial,
        description: "terminal of the guest (hvc0)",
        properties: PORT_PROPERTIES,
        create: |ctx, props| create_port(ctx, props, true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Rig;
    use tandem_backends::chardev::CharSink;

    /// A far end that the test holds.
    #[derive(Default)]
    struct Far {
        out: Mutex<Vec<u8>>,
        front: Mutex<Option<Arc<dyn CharFront>>>,
        room: std::sync::atomic::AtomicUsize,
    }
    impl CharSink for Far {
        fn write(&self, data: &[u8]) {
            self.out.lock().unwrap().extend(data);
        }
    }
    impl CharBackend for Far {
        fn attach(&self, front: Arc<dyn CharFront>) -> bool {
            let mut mine = self.front.lock().unwrap();
            let free = mine.is_none();
            mine.get_or_insert(front);
            free
        }
        fn room(&self) {
            self.room.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        }
        fn is_open(&self) -> bool {
            false
        }
    }
    impl Far {
        fn front(&self) -> Arc<dyn CharFront> {
            self.front.lock().unwrap().clone().unwrap()
        }
    }

    #[test]
    fn queues_belong_to_ports() {
        for n in 0..MAX_PORTS {
            assert_eq!(port_of(rx_queue(n)), Some((n, false)));
            assert_eq!(port_of(rx_queue(n) + 1), Some((n, true)));
        }
        assert_eq!((port_of(2), port_of(3)), (None, None));
    }

    #[test]
    fn a_named_port_opens_and_carries_bytes() {
        let rig = Rig::new();
        let device = VirtioConsole::new();
        let far = Arc::new(Far::default());
        let name = "org.qemu.guest_agent.0";
        assert_eq!(device.add_port(None, name, false, far.clone()).unwrap(), 1);
        assert!(device.add_port(None, name, false, Arc::new(Far::default())).is_err());
        assert!(device.add_port(None, "x", false, far.clone()).is_err());
        assert!(device.add_port(Some(1), "y", true, Arc::new(Far::default())).is_err());
        let d = rig.attach(device);
        d.negotiate(feature::VERSION_1 | bit::MULTIPORT).unwrap();
        let (mut crx, mut ctx) = (d.queue(2, 8), d.queue(3, 8));
        let (mut rx, mut tx) = (d.queue(4, 8), d.queue(5, 8));
        d.driver_ok();
        assert_eq!(d.read32(0x2004), MAX_PORTS as u32);
        crx.offer(0, 64);
        ctx.request(&[&message(0, event::DEVICE_READY, 1)], &[]);
        assert_eq!(crx.used_bytes(0), message(1, event::PORT_ADD, 1));
        // Without buffers the answers wait.
        ctx.request(&[&message(1, event::PORT_READY, 1)], &[]);
        far.front().opened(true);
        assert_eq!(crx.used_index(), 1);
        crx.offer(1, 64);
        assert_eq!(crx.used_bytes(1), [message(1, event::PORT_NAME, 1), name.into()].concat());
        crx.offer(2, 64);
        assert_eq!(crx.used_bytes(2), message(1, event::PORT_OPEN, 1));
        // Nothing for a port that the guest has not opened.
        rx.offer(0, 4);
        assert_eq!(far.front().receive(b"hello"), 0);
        ctx.request(&[&message(1, event::PORT_OPEN, 1)], &[]);
        assert!(far.room.load(std::sync::atomic::Ordering::Acquire) > 0);
        assert_eq!(far.front().receive(b"hello"), 4);
        assert_eq!(rx.used_bytes(0), b"hell");
        rx.offer(1, 4);
        assert_eq!(far.front().receive(b"o"), 1);
        assert_eq!(rx.used_bytes(1), b"o");
        tx.request(&[b"from ", b"guest"], &[]);
        assert_eq!(*far.out.lock().unwrap(), b"from guest");
        // Nonsense on the control queue.
        for m in [&message(99, event::PORT_OPEN, 1)[..], &message(7, 77, 7), b"x", &[0xff; 8]] {
            ctx.request(&[m], &[]);
        }
        tx.request(&[b"!"], &[]);
        assert!(far.out.lock().unwrap().ends_with(b"guest!"));
    }

    #[test]
    fn a_driver_of_one_port_has_a_console() {
        let rig = Rig::new();
        let device = VirtioConsole::new();
        let far = Arc::new(Far::default());
        assert_eq!(device.add_port(None, "", true, far.clone()).unwrap(), 0);
        let d = rig.attach(device);
        d.negotiate(feature::VERSION_1).unwrap();
        let (mut rx, mut tx) = (d.queue(0, 8), d.queue(1, 8));
        d.driver_ok();
        tx.request(&[b"login: "], &[]);
        rx.offer(0, 16);
        assert_eq!(far.front().receive(b"root"), 4);
        assert_eq!(rx.used_bytes(0), b"root");
        d.write32(0x2008, b'E'.into());
        assert_eq!(*far.out.lock().unwrap(), b"login: E");
    }
}
