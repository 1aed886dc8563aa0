//! `e1000e`: the Gigabit Ethernet card 82574L, which guests without virtio know (Intel 82574 GbE
//! Controller Family datasheet, revision 3.4).
//!
//! ```text
//!   BAR 0, BAR 2 ─► state::State ──kick──► the network's thread ─► tx, frame ─► the network
//!                        │ causes                               ◄─ rx ◄────────────┘
//!                        ▼
//!                 INTx, MSI, or MSI-X in BAR 3
//! ```
//!
//! One queue each way; checksums and segments of long frames are made here, so that any network will
//! do. Interrupts are not delayed: the throttling registers only keep what is written.
//!
//! What always holds: registers and descriptors are the guest's, and each value is bounded where it
//! is used; what does not lie in memory is not written, and the card lives on. Only the network's
//! thread walks the rings. Lock order: what is on its way out → the state → interrupts; nothing is
//! handed to the network under the state's lock.

mod frame;
mod parts;
mod reg;
mod ring;
mod rx;
mod state;
mod tx;

use crate::firmware::bootorder;
use crate::pci::capability::{Express, ExpressType, PowerManagement};
use crate::pci::function::BarKind;
use crate::pci::rom::option_rom;
use crate::pci::{Bar, Function, FunctionSpec, Identity, Intx, Msi, Msix, PciDevice, Pin};
use crate::registry::{
    BusKind, Device, DeviceContext, DeviceFault, DeviceType, Properties, Property, PropertyKind,
};
use crate::state::{RestoreError, Stateful};
use frame::Outgoing;
use state::State;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::GuestMap;
use tandem_backends::block::pieces::Src;
use tandem_backends::net::{Card, Delivery, MacAddr, Network, Offloads, Taken, VnetHeader};
use tx::Fetched;

const INTEL: u16 = 0x8086;
const I82574L: u16 = 0x10d3;
const CLASS_ETHERNET: u32 = 0x02_0000;
const REGISTERS_BAR: u8 = 0;
const FLASH_BAR: u8 = 1;
const PORTS_BAR: u8 = 2;
const MSIX_BAR: u8 = 3;
const VECTORS: u16 = 5;
/// Frames that are taken in one turn.
const TURN: usize = 256;

/// The card's side of its bus and its interrupts.
struct Wires {
    intx: Arc<Intx>,
    msi: Arc<Msi>,
    msix: Arc<Msix>,
}

/// The card.
struct Adapter {
    state: Mutex<State>,
    /// The frame of which segments are still to be sent.
    outgoing: Mutex<Option<Outgoing>>,
    /// What the port that chooses a register says.
    chosen: Mutex<u32>,
    eeprom: [u16; 64],
    mac: MacAddr,
    memory: Arc<GuestMap>,
    network: Arc<Network>,
    wires: Wires,
}

impl Adapter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises what is pending, and lets interrupts follow.
    fn follow(&self, s: &mut State) {
        s.raise();
        if self.wires.msix.enabled() {
            for v in s.due().into_iter().flatten() {
                self.wires.msix.notify(v);
            }
            return;
        }
        let before = self.wires.intx.pending();
        let now = s.unmasked() != 0;
        self.wires.intx.set(now);
        if now && !before && self.wires.msi.enabled() {
            self.wires.msi.notify(0);
        }
    }

    fn read_word(&self, at: u64) -> u32 {
        let mut s = self.lock();
        let value = s.read(at);
        self.follow(&mut s);
        value
    }

    fn write_word(&self, at: u64, value: u32) {
        let asked = {
            let mut s = self.lock();
            let asked = s.write(at, value, &self.eeprom, self.mac);
            self.follow(&mut s);
            asked
        };
        if asked.network {
            self.network.kick();
        }
    }

    fn reset(&self) {
        let mut s = self.lock();
        *s = State::new(self.mac);
        self.follow(&mut s);
    }
}

impl Card for Adapter {
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn transmit(&self, take: &mut dyn FnMut(&VnetHeader, &Src<'_>) -> Taken) -> bool {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let ram = self.memory.ram();
        let (mut sent, mut enough, mut more) = (0, false, true);
        while !enough && sent < TURN {
            if let Some(bytes) = outgoing.as_mut().and_then(Outgoing::next) {
                enough = take(&VnetHeader::default(), &Src::new(&bytes)) == Taken::Enough;
                self.lock().count(reg::GPTC, reg::GOTC, bytes.len() + 4);
                sent += 1;
                continue;
            }
            *outgoing = None;
            match tx::fetch(&mut self.lock(), &ram) {
                Fetched::Frame(frame) => *outgoing = Some(frame),
                Fetched::Dropped => sent += 1,
                Fetched::Nothing => {
                    more = false;
                    break;
                }
            }
        }
        self.follow(&mut self.lock());
        more
    }

    fn receive(&self, _: &VnetHeader, parts: &[&[u8]], _: u32) -> Delivery {
        let ram = self.memory.ram();
        rx::receive(&mut self.lock(), &ram, parts.concat())
    }

    fn commit(&self) {
        self.follow(&mut self.lock());
    }
}

impl Stateful for Adapter {
    type State = State;
    const KIND: &'static str = "e1000e";
    const VERSION: u32 = 1;

    fn state(&self) -> State {
        self.lock().clone()
    }
    fn restore(&self, state: &State) -> Result<(), RestoreError> {
        if !state.sound() {
            let why = "it has another number of registers".into();
            return Err(RestoreError { kind: Self::KIND, why });
        }
        *self.lock() = state.clone();
        self.network.kick();
        Ok(())
    }
}

/// The registers in memory.
struct Registers(Arc<Adapter>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut word = (u64::MAX, [0; 4]);
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            if word.0 != at & !3 {
                word = (at & !3, self.0.read_word(at & !3).to_le_bytes());
            }
            *d = word.1[(at & 3) as usize];
        }
    }

    // Registers are written in whole words (§10.1).
    fn write(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return log::debug!("e1000e: {} bytes are written at {offset:#x}", data.len());
        }
        for (i, w) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes(w.try_into().unwrap_or_default());
            self.0.write_word(offset + 4 * i as u64, value);
        }
    }
}

/// The registers behind two ports: which, and its value (§10.1.1).
struct Ports(Arc<Adapter>);

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let chosen = *self.0.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            0 => chosen,
            4 if u64::from(chosen) < reg::LEN => self.0.read_word(u64::from(chosen & !3)),
            _ => 0,
        };
        for (d, v) in data.iter_mut().zip(value.to_le_bytes()) {
            *d = v;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else { return };
        let mut chosen = self.0.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            0 => *chosen = word,
            4 if u64::from(*chosen) < reg::LEN => {
                let at = u64::from(*chosen & !3);
                drop(chosen);
                self.0.write_word(at, word);
            }
            _ => {}
        }
    }
}

/// The flash, which is empty.
struct Flash;

impl BusDevice for Flash {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// The card on PCI.
struct E1000e {
    function: Function,
    adapter: Arc<Adapter>,
}

impl PciDevice for E1000e {
    fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for E1000e {
    fn reset(&self) {
        self.adapter.reset();
    }
}

impl Drop for E1000e {
    fn drop(&mut self) {
        self.adapter.network.detach();
        self.adapter.network.give_back();
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

inventory::submit! {
    DeviceType {
        name: "e1000e",
        bus: BusKind::Pci,
        description: "Gigabit Ethernet card (Intel 82574L)",
        properties: &[
            property("netdev", PropertyKind::Text, None, "ID of the network (--netdev …,id=…)"),
            property(
                "mac",
                PropertyKind::Mac,
                None,
                "Ethernet address; 52:54:00:12:34:56 and up if absent",
            ),
            property(
                "romfile",
                PropertyKind::Text,
                Some("efi-e1000e.rom"),
                "file of its ROM (iPXE), empty for none; left out if it is not there",
            ),
            bootorder::PROPERTY,
        ],
        create,
    }
}

fn create(ctx: &DeviceContext, p: &Properties) -> Result<Arc<dyn Device>, DeviceFault> {
    let Some(id) = p.text("netdev") else {
        return Err(DeviceFault::new("it has no network", "name one with netdev=ID"));
    };
    let network = ctx.backends.network(id)?;
    let bus = ctx.pci()?;
    let slot = bus.slot(p.pci_address("addr"))?;
    let identity = Identity {
        vendor: INTEL,
        device: I82574L,
        revision: 0,
        class: CLASS_ETHERNET,
        subsystem_vendor: INTEL,
        subsystem: 0,
    };
    let mut spec = FunctionSpec::new(p.text("id").unwrap_or("e1000e"), identity);
    let (intx, msi) = (slot.intx(Pin::A), Msi::new(slot.msi(), 0));
    let msix = Msix::new(slot.msi(), VECTORS, MSIX_BAR);
    let mac = p.mac("mac").unwrap_or_else(MacAddr::next);
    let rom = option_rom(p, &ctx.memory)?;
    if !network.take() {
        let what = format!("network '{id}' has a card already");
        return Err(DeviceFault::new(what, "give each card a network of its own"));
    }
    let wires = Wires { intx: intx.clone(), msi: msi.clone(), msix: msix.clone() };
    let adapter = Arc::new(Adapter {
        state: Mutex::new(State::new(mac)),
        outgoing: Mutex::default(),
        chosen: Mutex::default(),
        eeprom: parts::eeprom(mac),
        mac,
        memory: ctx.memory.clone(),
        network: network.clone(),
        wires,
    });
    spec.intx(intx);
    let registers = Arc::new(Registers(adapter.clone()));
    let mem = |device: Arc<dyn BusDevice>| Bar { kind: BarKind::Mem32, len: reg::LEN, device };
    spec.bar(REGISTERS_BAR, mem(registers))?;
    spec.bar(FLASH_BAR, mem(Arc::new(Flash)))?;
    let ports = Arc::new(Ports(adapter.clone()));
    spec.bar(PORTS_BAR, Bar { kind: BarKind::Io, len: 0x20, device: ports })?;
    spec.msix(msix)?;
    if let Some(rom) = rom {
        spec.rom(rom)?;
    }
    spec.capability(&PowerManagement)?;
    spec.msi(msi)?;
    let kind = match bus.is_root() {
        true => ExpressType::RootComplexEndpoint,
        false => ExpressType::Endpoint,
    };
    spec.capability(&Express { kind })?;
    if let (Some(index), true) = (p.uint("bootindex"), bus.is_root()) {
        let path = bootorder::pci_path(slot.devfn(), "ethernet", "ethernet-phy@0");
        ctx.boot_order.add(index as u32, path);
    }
    let device =
        Arc::new(E1000e { function: spec.build(slot.decoder()), adapter: adapter.clone() });
    slot.attach(device.clone());
    network.attach(adapter);
    Ok(device)
}

#[cfg(test)]
mod tests;
