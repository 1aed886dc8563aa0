//! Displays: `VGA`, a graphics card that software of any age knows, and `bochs-display`, which has
//! linear modes only. What they show can be taken as a picture ([`Adapter::picture`]).
//!
//! ```text
//!   3b4-3da ─► vga::Registers ─┐             BAR 0 ─► memory, reached by the guest without a stop
//!   1ce-1d1 ─► dispi::Dispi ───┤                          ▲
//!   a0000   ─► window ─────────┼──────────────────────────┤
//!   BAR 2   ─► registers again ┘      picture, text ──────┘
//! ```
//!
//! What always holds: every access to the card's memory is bounded by its region; what registers say
//! is judged when it is used, so that any values may stand in them. Nobody keeps track of what
//! changes: whoever wants a picture reads all of it.
//!
//! Lock order: the state's lock → the dirty bits of the memory.

pub mod dispi;
mod edid;
pub mod picture;
pub mod text;
pub mod vga;
mod window;

use crate::pci::capability::{Express, ExpressType};
use crate::pci::decode::Direct;
use crate::pci::function::BarKind;
use crate::pci::rom::option_rom;
use crate::pci::{Bar, Function, FunctionSpec, Identity, PciDevice};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use crate::state::{RestoreError, Stateful};
use dispi::Dispi;
use picture::Picture;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::memory::{Region, RegionKind};
use vga::{Registers, port};

/// The card that Bochs and QEMU have.
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x1111;
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);
const CLASS_VGA: u32 = 0x03_0000;
const CLASS_OTHER: u32 = 0x03_8000;

const MEMORY_BAR: u8 = 0;
const REGISTER_BAR: u8 = 2;
const REGISTER_LEN: u64 = 0x1000;

/// Ports of the linear modes: index, then data, which software finds at two places.
const DISPI_PORT: u64 = 0x1ce;
const DISPI_PORTS: u64 = 4;

/// Parts of the register BAR.
mod part {
    /// What the monitor says of itself.
    pub const EDID: std::ops::Range<u64> = 0..0x400;
    /// Ports 3C0h to 3DFh.
    pub const VGA: std::ops::Range<u64> = 0x400..0x420;
    /// Registers of the linear modes.
    pub const DISPI: std::ops::Range<u64> = 0x500..0x516;
    /// Length of this part, then the order of bytes in pixels.
    pub const EXTENSION: std::ops::Range<u64> = 0x600..0x608;
}
/// Pixels are little-endian.
const LITTLE_ENDIAN: u32 = 0x1e1e_1e1e;

/// Saved state: registers, and the card's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    vga: Option<Registers>,
    dispi: Dispi,
    memory: Vec<u8>,
}

/// What a card consists of besides its place on the bus.
pub struct Adapter {
    vram: Region,
    edid: Vec<u8>,
    /// Registers of the VGA, if it is one, and of the linear modes.
    state: Mutex<(Option<Registers>, Dispi)>,
}

impl Adapter {
    fn new(vga: bool, vram: Region, edid: Vec<u8>) -> Adapter {
        let state = (vga.then(Registers::default), Dispi::default());
        Adapter { vram, edid, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, (Option<Registers>, Dispi)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it shows now. The guest may go on meanwhile; what it draws then is there or not.
    pub fn picture(&self) -> Picture {
        let state = self.lock().clone();
        picture::take(state.0.as_ref(), &state.1, &self.vram)
    }

    /// What is written on the screen; `None` unless a text mode is on.
    pub fn text(&self) -> Option<text::Screen> {
        let state = self.lock();
        let r = state.0.as_ref().filter(|r| r.graphics[6] & 1 == 0 && !state.1.enabled())?;
        Some(text::screen(r, &self.vram))
    }

    fn set_dispi(&self, index: u16, value: u16) {
        let clear = self.lock().1.write(index, value, self.vram.len());
        // Memory is cleared in pieces, outside the lock: it may be long.
        let mut at = 0;
        while let Some(left) = clear.map(|n| n.min(self.vram.len()) - at).filter(|n| *n > 0) {
            let n = left.min(ZEROS.len() as u64);
            self.vram.load(at, &ZEROS[..n as usize]);
            at += n;
        }
    }

    fn dispi(&self, index: u16) -> u16 {
        self.lock().1.read(index, self.vram.len())
    }

    fn reset(&self) {
        let mut state = self.lock();
        let vga = state.0.is_some();
        *state = (vga.then(Registers::default), Dispi::default());
    }
}

static ZEROS: [u8; 0x1000] = [0; 0x1000];

impl Stateful for Adapter {
    type State = State;
    const KIND: &'static str = "display";
    const VERSION: u32 = 1;

    fn state(&self) -> State {
        let mut memory = vec![0; self.vram.len() as usize];
        self.vram.read(0, &mut memory);
        let (vga, dispi) = self.lock().clone();
        State { vga, dispi, memory }
    }

    fn restore(&self, s: &State) -> Result<(), RestoreError> {
        let mut state = self.lock();
        let fits = s.vga.is_some() == state.0.is_some()
            && s.vga.as_ref().is_none_or(Registers::sound)
            && s.memory.len() as u64 == self.vram.len();
        if !fits {
            let why = "it is another card's".into();
            return Err(RestoreError { kind: Self::KIND, why });
        }
        *state = (s.vga.clone(), s.dispi.clone());
        self.vram.load(0, &s.memory);
        Ok(())
    }
}

/// The ports of the VGA from `first` on.
struct VgaPorts {
    adapter: Arc<Adapter>,
    first: u16,
}

impl BusDevice for VgaPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.adapter.lock();
        let Some(r) = &mut state.0 else { return data.fill(0xff) };
        for (i, d) in data.iter_mut().enumerate() {
            *d = r.read(self.first.wrapping_add(offset as u16).wrapping_add(i as u16));
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.adapter.lock();
        let Some(r) = &mut state.0 else { return };
        for (i, d) in data.iter().enumerate() {
            r.write(self.first.wrapping_add(offset as u16).wrapping_add(i as u16), *d);
        }
    }
}

/// A word of an access of two bytes; other sizes have none.
fn word(data: &[u8]) -> Option<u16> {
    data.try_into().ok().map(u16::from_le_bytes)
}

/// The ports of the linear modes.
struct DispiPorts(Arc<Adapter>);

impl BusDevice for DispiPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let selected = self.0.lock().1.selected();
        let value = if offset == 0 { selected } else { self.0.dispi(selected) };
        data.fill(0xff);
        for (d, v) in data.iter_mut().zip(value.to_le_bytes()) {
            *d = v;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = word(data) else { return };
        if offset == 0 {
            self.0.lock().1.select(value);
        } else {
            let selected = self.0.lock().1.selected();
            self.0.set_dispi(selected, value);
        }
    }
}

/// The window at A0000h.
struct Window(Arc<Adapter>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = &mut *self.0.lock();
        let Some(r) = &mut state.0 else { return data.fill(0xff) };
        for (i, d) in data.iter_mut().enumerate() {
            *d = window::read(r, &state.1, &self.0.vram, offset + i as u64);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let state = self.0.lock();
        let Some(r) = &state.0 else { return };
        for (i, d) in data.iter().enumerate() {
            window::write(r, &state.1, &self.0.vram, offset + i as u64, *d);
        }
    }
}

/// The register BAR.
struct RegisterBar(Arc<Adapter>);

impl RegisterBar {
    fn ports(&self) -> VgaPorts {
        VgaPorts { adapter: self.0.clone(), first: port::ATTRIBUTE }
    }
}

impl BusDevice for RegisterBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if part::EDID.contains(&offset) {
            for (i, d) in data.iter_mut().enumerate() {
                *d = self.0.edid.get(offset as usize + i).copied().unwrap_or(0);
            }
        } else if part::VGA.contains(&offset) {
            self.ports().read(offset - part::VGA.start, data);
        } else if part::DISPI.contains(&offset) {
            for (i, d) in data.iter_mut().enumerate() {
                let at = offset - part::DISPI.start + i as u64;
                *d = self.0.dispi((at / 2) as u16).to_le_bytes()[(at & 1) as usize];
            }
        } else if part::EXTENSION.contains(&offset) {
            let all =
                u64::from(LITTLE_ENDIAN) << 32 | (part::EXTENSION.end - part::EXTENSION.start);
            let bytes = all.to_le_bytes();
            for (d, v) in data.iter_mut().zip(&bytes[(offset - part::EXTENSION.start) as usize..]) {
                *d = *v;
            }
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if part::VGA.contains(&offset) {
            self.ports().write(offset - part::VGA.start, data);
        } else if part::DISPI.contains(&offset)
            && offset.is_multiple_of(2)
            && let Some(value) = word(data)
        {
            self.0.set_dispi(((offset - part::DISPI.start) / 2) as u16, value);
        }
    }
}

/// A card on PCI.
struct Card {
    function: Function,
    adapter: Arc<Adapter>,
    /// What is mapped at fixed ports and addresses, to be given up with the card.
    fixed: Option<Fixed>,
}

/// The fixed ports and addresses of a VGA.
struct Fixed {
    io: Arc<IoBus>,
    ports: Vec<u64>,
    window: bool,
}

impl Fixed {
    fn map(io: &Arc<IoBus>, adapter: &Arc<Adapter>) -> Result<Fixed, DeviceFault> {
        let mut fixed = Fixed { io: io.clone(), ports: Vec::new(), window: false };
        let taken = |_| DeviceFault::new("there is a VGA already", "use --device bochs-display");
        for (first, len) in [
            (port::MONO_CRTC, 2),
            (port::MONO_STATUS, 1),
            (port::ATTRIBUTE, 16),
            (port::CRTC, 2),
            (port::STATUS, 1),
        ] {
            let dev = Arc::new(VgaPorts { adapter: adapter.clone(), first });
            io.pio.insert("VGA", first.into(), len, dev).map_err(taken)?;
            fixed.ports.push(first.into());
        }
        let dispi = Arc::new(DispiPorts(adapter.clone()));
        io.pio.insert("VGA linear modes", DISPI_PORT, DISPI_PORTS, dispi).map_err(taken)?;
        fixed.ports.push(DISPI_PORT);
        let memory = Arc::new(Window(adapter.clone()));
        io.mmio.insert("VGA window", window::START, window::LEN, memory).map_err(taken)?;
        fixed.window = true;
        Ok(fixed)
    }
}

impl Drop for Fixed {
    fn drop(&mut self) {
        self.ports.iter().for_each(|p| self.io.pio.remove(*p));
        if self.window {
            self.io.mmio.remove(window::START);
        }
    }
}

impl PciDevice for Card {
    fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for Card {
    fn reset(&self) {
        self.adapter.reset();
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        drop(self.fixed.take());
    }
}

const fn property(
    name: &'static str,
    kind: PropertyKind,
    default: Option<&'static str>,
    description: &'static str,
) -> Property {
    Property { name, kind, default, description }
}

const PIXELS: PropertyKind = PropertyKind::Uint { min: 320, max: 4095 };
const EDID: Property =
    property("edid", PropertyKind::Bool, Some("on"), "there is a monitor's EDID");
const XRES: Property = property("xres", PIXELS, Some("1280"), "width that the monitor prefers");
const YRES: Property = property("yres", PIXELS, Some("800"), "height that the monitor prefers");
const ROM_HELP: &str =
    "file of its ROM, empty for none; the default is left out if it is not there";

inventory::submit! {
    DeviceType {
        name: "VGA",
        bus: BusKind::Pci,
        description: "graphics card: VGA and linear modes (Bochs VBE)",
        properties: &[
            property(
                "vgamem_mb",
                PropertyKind::Uint { min: 1, max: 256 },
                Some("16"),
                "MiB of memory, a power of two",
            ),
            property("romfile", PropertyKind::Text, Some("vgabios-stdvga.bin"), ROM_HELP),
            EDID,
            XRES,
            YRES,
        ],
        create: |ctx, p| {
            let bytes = p.uint("vgamem_mb").unwrap_or(16) << 20;
            create(ctx, p, true, bytes)
        },
    }
}

inventory::submit! {
    DeviceType {
        name: "bochs-display",
        bus: BusKind::Pci,
        description: "graphics card with linear modes only",
        properties: &[
            property("vgamem", PropertyKind::Size, Some("16M"), "bytes of memory, a power of two"),
            property("romfile", PropertyKind::Text, Some("vgabios-bochs-display.bin"), ROM_HELP),
            EDID,
            XRES,
            YRES,
        ],
        create: |ctx, p| create(ctx, p, false, p.uint("vgamem").unwrap_or(16 << 20)),
    }
}

fn create(
    ctx: &DeviceContext,
    p: &Properties,
    vga: bool,
    bytes: u64,
) -> Result<Arc<dyn Device>, DeviceFault> {
    if !bytes.is_power_of_two() || !(1 << 20..=256 << 20).contains(&bytes) {
        let what = format!("memory of {bytes} bytes does not fit");
        return Err(DeviceFault::new(what, "use a power of two from 1 MiB to 256 MiB"));
    }
    let bus = ctx.pci()?;
    if vga && !bus.is_root() {
        let what = "a VGA behind a root port would not be found at its fixed addresses";
        return Err(DeviceFault::new(what, "put it on pcie.0, or use bochs-display"));
    }
    let slot = bus.slot(p.pci_address("addr"))?;
    let vram = Region::new("VGA memory", RegionKind::Device, 0, bytes);
    let vram = vram.map_err(|e| DeviceFault::new(e.to_string(), "make its memory smaller"))?;
    let edid = match p.bool("edid") {
        true => {
            let size = |name, or| p.uint(name).unwrap_or(or) as u32;
            edid::block(size("xres", 1280), size("yres", 800)).to_vec()
        }
        false => Vec::new(),
    };
    let adapter = Arc::new(Adapter::new(vga, vram.clone(), edid));
    let id = p.text("id").unwrap_or(if vga { "VGA" } else { "bochs-display" });
    let mut spec = FunctionSpec::new(
        id,
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision: 2,
            class: if vga { CLASS_VGA } else { CLASS_OTHER },
            subsystem_vendor: SUBSYSTEM.0,
            subsystem: SUBSYSTEM.1,
        },
    );
    let memory = Arc::new(Direct { map: ctx.memory.clone(), region: vram });
    spec.memory_bar(MEMORY_BAR, BarKind::Mem32, memory)?;
    let registers = Arc::new(RegisterBar(adapter.clone()));
    let bar = Bar { kind: BarKind::Mem32, len: REGISTER_LEN, device: registers };
    spec.bar(REGISTER_BAR, bar)?;
    if let Some(rom) = option_rom(p, &ctx.memory)? {
        spec.rom(rom)?;
    }
    if !vga {
        let kind = match bus.is_root() {
            true => ExpressType::RootComplexEndpoint,
            false => ExpressType::Endpoint,
        };
        spec.capability(&Express { kind })?;
    }
    let fixed = vga.then(|| Fixed::map(&ctx.io, &adapter)).transpose()?;
    let card = Card { function: spec.build(slot.decoder()), adapter: adapter.clone(), fixed };
    let card = Arc::new(card);
    slot.attach(card.clone());
    ctx.directory.add(p.text("id").unwrap_or_default(), adapter);
    Ok(card)
}

#[cfg(test)]
mod tests;
