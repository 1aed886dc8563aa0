//! Ports for debugging and tests: POST codes, the debug console, and QEMU's `isa-debug-exit`.

use crate::power::{PowerRequest, PowerSink};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use tandem_accel::bus::BusDevice;
use tandem_backends::chardev::CharSink;

/// Port of POST codes, also written as a delay.
pub const POST_PORT: u16 = 0x80;
/// Port of the debug console in Bochs' tradition; it reads as its own number.
pub const DEBUGCON_PORT: u16 = 0xe9;
/// Port of the firmware's debug console.
pub const FIRMWARE_DEBUG_PORT: u16 = 0x402;
/// What a debug console reads as, by which software finds it.
const DEBUGCON_PRESENT: u8 = 0xe9;

/// Keeps the last POST code.
#[derive(Default)]
pub struct PostCode(AtomicU8);

impl PostCode {
    /// The last code written.
    pub fn last(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl BusDevice for PostCode {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.last());
    }
    fn write(&self, _: u64, data: &[u8]) {
        if let Some(v) = data.first() {
            self.0.store(*v, Ordering::Relaxed);
        }
    }
}

/// A one-way console: each byte written goes to a chardev.
pub struct DebugCon(Arc<dyn CharSink>);

impl DebugCon {
    /// A console that writes to `sink`.
    pub fn new(sink: Arc<dyn CharSink>) -> Arc<DebugCon> {
        Arc::new(DebugCon(sink))
    }
}

impl BusDevice for DebugCon {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(DEBUGCON_PRESENT);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.0.write(data);
    }
}

/// `isa-debug-exit`: a write of `v` ends the virtual machine monitor with status `(v << 1) | 1`.
pub struct DebugExit(Arc<dyn PowerSink>);

impl DebugExit {
    /// An exit that asks `power`. QEMU's default place is port 501h, 2 ports.
    pub fn new(power: Arc<dyn PowerSink>) -> Arc<DebugExit> {
        Arc::new(DebugExit(power))
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _: u64, data: &[u8]) {
        let mut v = [0; 4];
        let n = data.len().min(4);
        v[..n].copy_from_slice(&data[..n]);
        self.0.request(PowerRequest::DebugExit(u32::from_le_bytes(v) << 1 | 1));
    }
}

impl Device for DebugCon {
    fn reset(&self) {}
}

impl Device for DebugExit {
    fn reset(&self) {}
}

/// Where a device's ports are.
const fn iobase(default: &'static str) -> Property {
    Property {
        name: "iobase",
        kind: PropertyKind::Uint { min: 0, max: 0xffff },
        default: Some(default),
        description: "first port",
    }
}

/// Maps `dev` at the ports that the properties say, one if they do not say how many.
fn map(
    cx: &DeviceContext,
    props: &Properties,
    name: &str,
    dev: Arc<dyn BusDevice>,
) -> Result<(), DeviceFault> {
    let base = props.uint("iobase").unwrap_or(0);
    let len = props.uint("iosize").unwrap_or(1);
    if base + len > 0x1_0000 {
        let what = format!("ports {base:#x}+{len:#x} of {name} are beyond the last port 0xffff");
        return Err(DeviceFault::new(what, "choose a lower iobase"));
    }
    cx.io
        .pio
        .insert(name, base, len, dev)
        .map_err(|e| DeviceFault::new(e.to_string(), "choose another iobase"))
}

inventory::submit! {
    DeviceType {
        name: "isa-debug-exit",
        bus: BusKind::Isa,
        description: "a write of v ends the process with status (v << 1) | 1",
        properties: &[
            iobase("0x501"),
            Property {
                name: "iosize",
                kind: PropertyKind::Uint { min: 1, max: 8 },
                default: Some("2"),
                description: "number of ports",
            },
        ],
        create: |cx, props| {
            let dev = DebugExit::new(cx.power.clone());
            map(cx, props, "isa-debug-exit", dev.clone())?;
            Ok(dev)
        },
    }
}

inventory::submit! {
    DeviceType {
        name: "isa-debugcon",
        bus: BusKind::Isa,
        description: "each byte written to the port goes to a character device",
        properties: &[
            iobase("0xe9"),
            Property {
                name: "chardev",
                kind: PropertyKind::Text,
                default: None,
                description: "id of the character device",
            },
        ],
        create: |cx, props| {
            let Some(id) = props.text("chardev") else {
                return Err(DeviceFault::new(
                    "isa-debugcon has no character device",
                    "give it one with chardev=ID",
                ));
            };
            let dev = DebugCon::new(cx.backends.chardev(id)?);
            map(cx, props, "isa-debugcon", dev.clone())?;
            Ok(dev)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::testing::Recorder;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Sink(Mutex<Vec<u8>>);
    impl CharSink for Sink {
        fn write(&self, data: &[u8]) {
            self.0.lock().unwrap().extend(data);
        }
    }

    #[test]
    fn consoles_and_exit() {
        let sink = Arc::new(Sink::default());
        let d = DebugCon::new(sink.clone());
        d.write(0, b"hi");
        let mut b = [0];
        d.read(0, &mut b);
        assert_eq!((b[0], sink.0.lock().unwrap().as_slice()), (0xe9, &b"hi"[..]));
        let power = Arc::new(Recorder::default());
        let e = DebugExit::new(power.clone());
        e.write(0, &[0x10]);
        e.write(0, &u32::MAX.to_le_bytes());
        assert_eq!(
            *power.0.lock().unwrap(),
            [PowerRequest::DebugExit(0x21), PowerRequest::DebugExit(u32::MAX)]
        );
        let p = PostCode::default();
        p.write(0, &[0x55]);
        assert_eq!(p.last(), 0x55);
    }
}
