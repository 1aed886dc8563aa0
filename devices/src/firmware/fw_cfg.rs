//! The firmware configuration device: numbered items and named files that firmware reads by port or
//! by DMA (behaviour: QEMU's specification `docs/specs/fw_cfg`).
//!
//! ```text
//!   510h  selector: write the number of an item (16 bits)
//!   511h  data: reads the item byte by byte; zeros after its end
//!   514h  address of a DMA descriptor, 8 bytes big-endian; writing the lower half starts it
//! ```
//!
//! Nothing can be written to the machine through it: a DMA write fails.

use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_accel::bus::BusDevice;
use tandem_accel::memory::{GuestMap, GuestRam};
use vm_memory::{Bytes, GuestAddress};

/// First port.
pub const PORT: u16 = 0x510;
/// Number of ports.
pub const PORTS: u64 = 12;

/// Numbers of items.
pub mod key {
    /// "QEMU", by which the device is known.
    pub const SIGNATURE: u16 = 0x00;
    /// What the device can do: bit 0 the ports, bit 1 DMA.
    pub const ID: u16 = 0x01;
    /// UUID of the machine, 16 bytes.
    pub const UUID: u16 = 0x02;
    /// Bytes of RAM below 4 GiB, 64 bits.
    pub const RAM_SIZE: u16 = 0x03;
    /// Whether there is no display, 16 bits.
    pub const NO_GRAPHIC: u16 = 0x04;
    /// Processors at start, 16 bits.
    pub const CPUS: u16 = 0x05;
    /// Where the kernel goes, 32 bits.
    pub const KERNEL_ADDR: u16 = 0x07;
    /// Bytes of the kernel without its set-up part, 32 bits.
    pub const KERNEL_SIZE: u16 = 0x08;
    /// Where the RAM disk goes, 32 bits.
    pub const INITRD_ADDR: u16 = 0x0a;
    /// Bytes of the RAM disk, 32 bits.
    pub const INITRD_SIZE: u16 = 0x0b;
    /// Whether to offer a boot menu, 16 bits.
    pub const BOOT_MENU: u16 = 0x0e;
    /// Largest number of processors, 16 bits.
    pub const MAX_CPUS: u16 = 0x0f;
    /// The kernel without its set-up part.
    pub const KERNEL_DATA: u16 = 0x11;
    /// The RAM disk.
    pub const INITRD_DATA: u16 = 0x12;
    /// Where the command line goes, 32 bits.
    pub const CMDLINE_ADDR: u16 = 0x13;
    /// Bytes of the command line with its NUL, 32 bits.
    pub const CMDLINE_SIZE: u16 = 0x14;
    /// The command line.
    pub const CMDLINE_DATA: u16 = 0x15;
    /// Where the kernel's set-up part goes, 32 bits.
    pub const SETUP_ADDR: u16 = 0x16;
    /// Its bytes, 32 bits.
    pub const SETUP_SIZE: u16 = 0x17;
    /// The set-up part.
    pub const SETUP_DATA: u16 = 0x18;
    /// The list of files.
    pub const FILE_DIR: u16 = 0x19;
    /// First number of a file.
    pub const FILES: u16 = 0x20;
    /// Bit of a number: the data will be written. Reading does not mind.
    pub const WRITE_CHANNEL: u16 = 0x4000;
    /// Whether ISA IRQ 0 reaches GSI 2, 1 byte.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// Most bytes of a file's name, without its NUL.
pub const MAX_NAME: usize = 55;

const ID_PORTS: u32 = 1;
const ID_DMA: u32 = 2;
/// What the DMA address register reads as, from its most significant byte on.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of a DMA descriptor's control word; the upper half is the item to select.
mod control {
    pub const ERROR: u32 = 1 << 0;
    pub const READ: u32 = 1 << 1;
    pub const SKIP: u32 = 1 << 2;
    pub const SELECT: u32 = 1 << 3;
    pub const WRITE: u32 = 1 << 4;
}

/// What an item holds.
enum Content {
    Fixed(Arc<[u8]>),
    /// Made anew at each selection, always of the same length.
    Made(Box<dyn Fn() -> Vec<u8> + Send + Sync>, usize),
}

impl Content {
    fn len(&self) -> usize {
        match self {
            Content::Fixed(b) => b.len(),
            Content::Made(_, len) => *len,
        }
    }
    fn bytes(&self) -> Arc<[u8]> {
        match self {
            Content::Fixed(b) => b.clone(),
            Content::Made(make, len) => {
                let mut bytes = make();
                bytes.resize(*len, 0);
                bytes.into()
            }
        }
    }
}

/// Items and files to be offered.
#[derive(Default)]
pub struct Items {
    numbered: BTreeMap<u16, Content>,
    files: BTreeMap<String, Content>,
}

impl Items {
    /// Adds an item.
    pub fn item(&mut self, key: u16, bytes: impl Into<Arc<[u8]>>) {
        self.numbered.insert(key, Content::Fixed(bytes.into()));
    }

    /// Adds a file. A name of more than [`MAX_NAME`] bytes, which no firmware could ask for, is
    /// cut off.
    pub fn file(&mut self, name: &str, bytes: impl Into<Arc<[u8]>>) {
        self.files.insert(cut(name), Content::Fixed(bytes.into()));
    }

    /// Adds a file of `len` bytes that is made whenever it is selected.
    pub fn made_file(
        &mut self,
        name: &str,
        len: usize,
        make: impl Fn() -> Vec<u8> + Send + Sync + 'static,
    ) {
        self.files.insert(cut(name), Content::Made(Box::new(make), len));
    }

    /// All by number: files follow in the order of their names, and the list of them.
    fn numbered(mut self) -> BTreeMap<u16, Content> {
        self.item(key::SIGNATURE, *b"QEMU");
        self.item(key::ID, (ID_PORTS | ID_DMA).to_le_bytes());
        let mut dir = (self.files.len() as u32).to_be_bytes().to_vec();
        for (n, (name, content)) in (key::FILES..).zip(self.files) {
            dir.extend((content.len() as u32).to_be_bytes());
            dir.extend(n.to_be_bytes());
            dir.extend([0; 2]);
            let mut field = [0; MAX_NAME + 1];
            field[..name.len()].copy_from_slice(name.as_bytes());
            dir.extend(field);
            self.numbered.insert(n, content);
        }
        self.numbered.insert(key::FILE_DIR, Content::Fixed(dir.into()));
        self.numbered
    }
}

fn cut(name: &str) -> String {
    let end = (0..=name.len().min(MAX_NAME)).rev().find(|n| name.is_char_boundary(*n));
    name[..end.unwrap_or(0)].into()
}

/// State of the device. The items belong to the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FwCfgState {
    /// The selected item.
    pub selected: u16,
    /// Next byte of it.
    pub offset: u32,
    /// DMA address as far as it has been written.
    pub dma_address: u64,
}

struct Live {
    state: FwCfgState,
    current: Arc<[u8]>,
}

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Content>,
    memory: Arc<GuestMap>,
    live: Mutex<Live>,
}

impl FwCfg {
    /// A device that offers `items`, with DMA to `memory`.
    pub fn new(items: Items, memory: Arc<GuestMap>) -> Arc<FwCfg> {
        let live = Mutex::new(Live { state: FwCfgState::default(), current: Arc::default() });
        let f = FwCfg { items: items.numbered(), memory, live };
        f.reset();
        Arc::new(f)
    }

    /// RESET: the signature is selected.
    pub fn reset(&self) {
        let current = self.bytes(key::SIGNATURE);
        *self.lock() = Live { state: FwCfgState::default(), current };
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn bytes(&self, number: u16) -> Arc<[u8]> {
        let content = self.items.get(&(number & !key::WRITE_CHANNEL));
        content.map_or_else(Arc::default, Content::bytes)
    }

    fn select(&self, number: u16) {
        // Made without the lock, as it may look at other devices.
        let current = self.bytes(number);
        let mut live = self.lock();
        live.state.selected = number;
        live.state.offset = 0;
        live.current = current;
    }

    /// Starts the transfer that the descriptor at `at` asks for.
    fn dma(&self, at: u64) {
        let ram = self.memory.ram();
        let mut d = [0; 16];
        if ram.read_slice(&mut d, GuestAddress(at)).is_err() {
            log::debug!("fw_cfg: no DMA descriptor at {at:#x}");
            return;
        }
        let word = |i: usize| u32::from_be_bytes([d[i], d[i + 1], d[i + 2], d[i + 3]]);
        let command = word(0);
        let address = u64::from(word(8)) << 32 | u64::from(word(12));
        if command & control::SELECT != 0 {
            self.select((command >> 16) as u16);
        }
        let done = self.transfer(&ram, command, word(4), address);
        let status: u32 = if done { 0 } else { control::ERROR };
        if ram.write_slice(&status.to_be_bytes(), GuestAddress(at)).is_err() {
            log::debug!("fw_cfg: the DMA descriptor at {at:#x} cannot be written");
        }
    }

    fn transfer(&self, ram: &GuestRam, command: u32, len: u32, address: u64) -> bool {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut live = self.lock();
        let from = (live.state.offset as usize).min(live.current.len());
        let advance = |live: &mut Live| {
            live.state.offset = live.state.offset.saturating_add(len);
            true
        };
        if command & control::READ != 0 {
            let end = live.current.len().min(from.saturating_add(len as usize));
            let there = &live.current[from..end];
            if ram.write_slice(there, GuestAddress(address)).is_err() {
                return false;
            }
            // Beyond the item's end are zeros.
            let (mut at, mut left) = (address.wrapping_add(there.len() as u64), len as usize);
            left -= there.len();
            while left > 0 {
                let n = left.min(ZEROS.len());
                if ram.write_slice(&ZEROS[..n], GuestAddress(at)).is_err() {
                    return false;
                }
                at = at.wrapping_add(n as u64);
                left -= n;
            }
            return advance(&mut live);
        }
        match command & (control::SKIP | control::WRITE) {
            0 => true,
            control::SKIP => advance(&mut live),
            // Nothing is writable.
            _ => false,
        }
    }

    fn data(&self) -> u8 {
        let mut live = self.lock();
        let b = live.current.get(live.state.offset as usize).copied().unwrap_or(0);
        live.state.offset = live.state.offset.saturating_add(1);
        b
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, b) in (offset..).zip(data) {
            *b = match at {
                1 => self.data(),
                4..12 => DMA_SIGNATURE[at as usize - 4],
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [low, high]) => self.select(u16::from_le_bytes([*low, *high])),
            (4 | 8, [a, b, c, d]) => {
                let v = u32::from_be_bytes([*a, *b, *c, *d]);
                let mut live = self.lock();
                if offset == 4 {
                    live.state.dma_address = u64::from(v) << 32;
                    return;
                }
                let at = std::mem::take(&mut live.state.dma_address) | u64::from(v);
                drop(live);
                self.dma(at);
            }
            _ => log::debug!("fw_cfg: write of {} bytes at offset {offset}", data.len()),
        }
    }
}

impl Stateful for FwCfg {
    type State = FwCfgState;
    const KIND: &'static str = "fw-cfg";
    const VERSION: u32 = 1;

    fn state(&self) -> FwCfgState {
        self.lock().state
    }

    fn restore(&self, state: &FwCfgState) -> Result<(), RestoreError> {
        let current = self.bytes(state.selected);
        *self.lock() = Live { state: *state, current };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_accel::memory::RegionKind;

    fn rig() -> (Arc<FwCfg>, Arc<GuestMap>) {
        let map = GuestMap::new();
        map.add("ram", RegionKind::Ram, 0, 0x10000).unwrap();
        let mut items = Items::default();
        items.item(key::CPUS, 4u16.to_le_bytes());
        items.file("etc/b", *b"bees");
        items.made_file("etc/a", 3, || vec![7]);
        items.file(&"x".repeat(90), []);
        (FwCfg::new(items, map.clone()), map)
    }
    fn select(f: &FwCfg, n: u16) {
        f.write(0, &n.to_le_bytes());
    }
    fn take(f: &FwCfg, n: usize) -> Vec<u8> {
        (0..n)
            .map(|_| {
                let mut b = [0];
                f.read(1, &mut b);
                b[0]
            })
            .collect()
    }

    #[test]
    fn items_and_files_by_port() {
        let (f, _) = rig();
        assert_eq!(take(&f, 5), b"QEMU\0");
        select(&f, key::ID);
        assert_eq!(take(&f, 4), [3, 0, 0, 0]);
        select(&f, key::CPUS | key::WRITE_CHANNEL);
        assert_eq!(take(&f, 2), [4, 0]);
        select(&f, key::FILE_DIR);
        let dir = take(&f, 4 + 3 * 64);
        assert_eq!(dir[..4], [0, 0, 0, 3]);
        assert_eq!(dir[4..18], *b"\0\0\0\x03\0\x20\0\0etc/a\0");
        assert_eq!(dir[68..82], *b"\0\0\0\x04\0\x21\0\0etc/b\0");
        assert_eq!((dir[4 + 128 + 8 + 54], dir[4 + 128 + 8 + 55]), (b'x', 0));
        select(&f, 0x20);
        assert_eq!(take(&f, 4), [7, 0, 0, 0]);
        select(&f, 0x777);
        assert_eq!(take(&f, 2), [0, 0]);
    }

    fn dma(f: &FwCfg, map: &GuestMap, control: u32, len: u32, to: u64) -> u32 {
        let at = GuestAddress(0x100);
        let mut d = control.to_be_bytes().to_vec();
        d.extend(len.to_be_bytes());
        d.extend(to.to_be_bytes());
        map.ram().write_slice(&d, at).unwrap();
        f.write(4, &[0; 4]);
        f.write(8, &0x100u32.to_be_bytes());
        u32::from_be_bytes(map.ram().read_obj(at).unwrap())
    }

    #[test]
    fn transfers() {
        let (f, map) = rig();
        let mut sign = [0; 4];
        f.read(4, &mut sign);
        assert_eq!(&sign, b"QEMU");
        map.ram().write_slice(&[0xff; 16], GuestAddress(0x200)).unwrap();
        let select = 0x21 << 16 | control::SELECT;
        assert_eq!(dma(&f, &map, select | control::READ, 3, 0x200), 0);
        assert_eq!(dma(&f, &map, control::READ, 3, 0x203), 0);
        let got: [u8; 8] = map.ram().read_obj(GuestAddress(0x200)).unwrap();
        assert_eq!(&got, b"bees\0\0\xff\xff");
        assert_eq!(dma(&f, &map, select | control::SKIP, 2, 0), 0);
        assert_eq!(take(&f, 2), b"es");
        // Writing is refused, and so are reads that leave memory.
        assert_eq!(dma(&f, &map, select | control::WRITE, 2, 0x200), control::ERROR);
        assert_eq!(dma(&f, &map, select | control::READ, u32::MAX, 0x200), control::ERROR);
        assert_eq!(dma(&f, &map, select | control::READ, 8, u64::MAX - 2), control::ERROR);
        // A descriptor in nowhere is ignored.
        f.write(4, &[0xff; 4]);
        f.write(8, &[0xff; 4]);
        assert_eq!(f.state().dma_address, 0);
    }

    #[test]
    fn state_carries_the_selection() {
        let (f, _) = rig();
        select(&f, 0x21);
        take(&f, 2);
        let (g, _) = rig();
        g.restore(&f.state()).unwrap();
        assert_eq!(take(&g, 2), b"es");
        g.reset();
        assert_eq!(take(&g, 4), b"QEMU");
    }
}
