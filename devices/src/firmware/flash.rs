//! Parallel NOR flash with the Intel command set, one byte wide (JEDEC JESD68.01 CFI; Intel
//! StrataFlash J3 datasheet §11): the firmware's code and its variables, directly below 4 GiB.
//!
//! ```text
//!                 ┌── ff ────────────────────────────────────────────┐
//!                 ▼                                                  │
//!   Array ── 70 ─► Status ◄─ data ── Program ◄── 10, 40 ── any       │
//!     │             ▲  ▲ ◄─ d0 ──── Erase   ◄── 20                   │
//!     │             │  └─ d0 ─ Confirm ◄─ n+1 bytes ─ Fill ◄─ n ─ Count ◄─ e8
//!     ├── 90 ─► Identifier ────────────────────────────────────────► │
//!     └── 98 ─► Query ─────────────────────────────────────────────► ┘
//! ```
//!
//! While the array is readable it is a ROM region of guest memory, so that code runs from it at
//! full speed; in any other mode the region is gone and reads come here. Writes always do. What the
//! guest has programmed or erased is in the image when the array is readable again.

use crate::state::{RestoreError, Stateful};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard};
use tandem_accel::bus::{BusDevice, IoBus};
use tandem_accel::memory::{GuestMap, Region, RegionKind};
use tandem_accel::{Error, Result};
use tandem_backends::block::drive::{Drive, Op};
use tandem_backends::block::{SECTOR, Src};

/// Bytes of an erase block.
pub const BLOCK: u64 = 4096;
/// Bytes of the write buffer.
const BUFFER: usize = 32;
/// What erased flash reads as.
const ERASED: u8 = 0xff;

/// Bits of the status register.
mod status {
    pub const READY: u8 = 0x80;
    pub const ERASE_ERROR: u8 = 0x20;
    pub const PROGRAM_ERROR: u8 = 0x10;
    pub const LOCKED: u8 = 0x02;
}

/// What the next access means.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Mode {
    /// Reads give the array, writes are commands.
    #[default]
    Array,
    /// Reads give the status register.
    Status,
    /// Reads give manufacturer, device and lock bits.
    Identifier,
    /// Reads give the common flash interface table.
    Query,
    /// The next write is data.
    Program,
    /// The next write confirms the erasure of its block.
    Erase,
    /// The next write is a lock command.
    Lock,
    /// The next write is the number of bytes less one.
    Count,
    /// The next writes are data for the buffer.
    Fill,
    /// The next write confirms the buffer.
    Confirm,
}

/// State of a flash device besides its contents, which are guest memory.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FlashState {
    /// Mode.
    pub mode: Mode,
    /// Status register.
    pub status: u8,
    /// Buffered bytes that are expected.
    pub expected: u8,
    /// Buffered bytes: offset, value.
    pub buffer: Vec<(u64, u8)>,
}

struct Live {
    state: FlashState,
    /// Sectors that differ from the image: first and last byte.
    dirty: Option<(u64, u64)>,
}

/// A flash device.
pub struct Flash {
    memory: Arc<GuestMap>,
    array: Region,
    drive: Arc<Drive>,
    live: Mutex<Live>,
}

impl Flash {
    /// A device of the size of `drive`'s image that ends at `end`.
    pub fn attach(
        name: &'static str,
        end: u64,
        drive: Arc<Drive>,
        memory: &Arc<GuestMap>,
        bus: &IoBus,
    ) -> Result<Arc<Flash>> {
        let path = drive.image().path().display().to_string();
        let len = drive.size();
        if len == 0 || !len.is_multiple_of(BLOCK) || len > end {
            let what = format!("'{path}' cannot be flash: it has {len} bytes");
            return Err(Error::new(what).remedy("give an image of a multiple of 4096 bytes"));
        }
        let array = Region::new(name, RegionKind::Rom, end - len, len)?;
        let cannot = |e| Error::new(format!("cannot read '{path}'")).caused_by(e);
        let mut block = vec![0; BLOCK as usize];
        for at in (0..len).step_by(BLOCK as usize) {
            drive.image().read_bytes(at, &mut block).map_err(cannot)?;
            array.load(at, &block);
        }
        memory.insert(&array)?;
        let live = Mutex::new(Live { state: Self::initial(), dirty: None });
        let flash = Arc::new(Flash { memory: memory.clone(), array, drive, live });
        bus.mmio
            .insert(name, flash.array.gpa, len, flash.clone())
            .map_err(|e| Error::new(format!("cannot place flash '{path}'")).caused_by(e))?;
        Ok(flash)
    }

    fn initial() -> FlashState {
        FlashState { status: status::READY, ..FlashState::default() }
    }

    /// The last `len` bytes, or all.
    pub fn tail(&self, len: u64) -> Vec<u8> {
        let len = len.min(self.array.len());
        let mut bytes = vec![0; len as usize];
        self.array.read(self.array.len() - len, &mut bytes);
        bytes
    }

    /// RESET: back to the array.
    pub fn reset(&self) {
        let mut live = self.lock();
        self.enter(&mut live, Mode::Array);
        live.state = Self::initial();
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn enter(&self, live: &mut Live, mode: Mode) {
        let before = std::mem::replace(&mut live.state.mode, mode);
        match (before == Mode::Array, mode == Mode::Array) {
            (true, false) => drop(self.memory.remove(self.array.gpa)),
            (false, true) => {
                self.save(live);
                if let Err(e) = self.memory.insert(&self.array) {
                    log::error!("flash cannot be read: {e}");
                }
            }
            _ => {}
        }
    }

    /// An operation is over.
    fn finish(&self, live: &mut Live) {
        live.state.status |= status::READY;
        self.enter(live, Mode::Status);
    }

    /// Writes what has changed to the image.
    fn save(&self, live: &mut Live) {
        let Some((first, last)) = live.dirty.take() else { return };
        let start = first - first % SECTOR;
        let len = (last + 1).next_multiple_of(SECTOR) - start;
        let mut bytes = vec![0; len as usize];
        self.array.read(start, &mut bytes);
        if let Err(e) = self.drive.image().writable().map_or(Ok(()), |w| {
            w.write(start, &Src::new(&bytes))?;
            self.drive.execute(&Op::Flush)
        }) {
            let path = self.drive.image().path().display().to_string();
            log::error!("firmware variables cannot be saved to '{path}': {}", e.chain());
        }
    }

    fn touched(live: &mut Live, first: u64, last: u64) {
        let (a, b) = live.dirty.unwrap_or((first, last));
        live.dirty = Some((a.min(first), b.max(last)));
    }

    /// Programs bytes: bits can only be cleared.
    fn program(&self, live: &mut Live, bytes: &[(u64, u8)]) {
        if self.drive.read_only() {
            live.state.status |= status::PROGRAM_ERROR | status::LOCKED;
            return;
        }
        for &(at, v) in bytes {
            let mut old = [0];
            if self.array.read(at, &mut old) && self.array.load(at, &[old[0] & v]) {
                Self::touched(live, at, at);
            }
        }
    }

    fn erase(&self, live: &mut Live, at: u64) {
        if self.drive.read_only() {
            live.state.status |= status::ERASE_ERROR | status::LOCKED;
            return;
        }
        let start = at - at % BLOCK;
        if self.array.load(start, &[ERASED; BLOCK as usize]) {
            Self::touched(live, start, start + BLOCK - 1);
        }
    }

    fn command(&self, live: &mut Live, v: u8) {
        let mode = match v {
            0x10 | 0x40 => Mode::Program,
            0x20 => Mode::Erase,
            0x50 => {
                // Not even "ready" stays, unlike in hardware: by that UEFI firmware for virtual
                // machines knows flash.
                live.state.status = 0;
                Mode::Array
            }
            0x60 => Mode::Lock,
            0x70 => Mode::Status,
            0x90 => Mode::Identifier,
            0x98 => Mode::Query,
            0xe8 => Mode::Count,
            _ => Mode::Array,
        };
        self.enter(live, mode);
    }

    fn write_byte(&self, live: &mut Live, at: u64, v: u8) {
        match live.state.mode {
            Mode::Array | Mode::Status | Mode::Identifier | Mode::Query => self.command(live, v),
            Mode::Program => self.program(live, &[(at, v)]),
            Mode::Erase => {
                match v {
                    0xd0 => self.erase(live, at),
                    _ => live.state.status |= status::ERASE_ERROR | status::PROGRAM_ERROR,
                }
                self.finish(live);
            }
            // Blocks are never locked one by one; the commands have no effect.
            Mode::Lock => self.finish(live),
            Mode::Count => {
                live.state.buffer.clear();
                if usize::from(v) < BUFFER {
                    live.state.expected = v + 1;
                    self.enter(live, Mode::Fill);
                } else {
                    live.state.status |= status::PROGRAM_ERROR;
                    self.finish(live);
                }
            }
            Mode::Fill => {
                live.state.buffer.push((at, v));
                if live.state.buffer.len() >= live.state.expected.into() {
                    self.enter(live, Mode::Confirm);
                }
            }
            Mode::Confirm => {
                let buffer = std::mem::take(&mut live.state.buffer);
                match v {
                    0xd0 => self.program(live, &buffer),
                    _ => live.state.status |= status::PROGRAM_ERROR,
                }
                self.finish(live);
            }
        }
    }

    fn read_byte(&self, live: &Live, at: u64) -> u8 {
        match live.state.mode {
            Mode::Array => {
                let mut b = [ERASED];
                self.array.read(at, &mut b);
                b[0]
            }
            // Manufacturer Intel, device, and for each block: not locked.
            Mode::Identifier => match at % BLOCK {
                0 => 0x89,
                1 => 0x18,
                _ => 0,
            },
            Mode::Query => query(self.array.len(), at % BLOCK),
            // A new block's buffer is available at once.
            _ => live.state.status,
        }
    }
}

/// The common flash interface table of a device of `len` bytes (JESD68.01 §4.2; Intel §3).
fn query(len: u64, at: u64) -> u8 {
    let blocks = (len / BLOCK - 1) as u16;
    let block = (BLOCK / 256) as u16;
    match at {
        0x10..=0x12 => b"QRY"[at as usize - 0x10],
        // Intel extended command set, whose table is at 31h.
        0x13 => 0x01,
        0x15 => 0x31,
        // 4.5 to 5.5 V; typical and greatest times as powers of two.
        0x1b => 0x45,
        0x1c => 0x55,
        0x1f | 0x20 => 0x07,
        0x21 => 0x0a,
        0x23 | 0x24 => 0x04,
        0x25 => 0x04,
        // Size, interface x8, write buffer, one erase region of equal blocks.
        0x27 => len.ilog2() as u8,
        0x2a => BUFFER.ilog2() as u8,
        0x2c => 1,
        0x2d => blocks as u8,
        0x2e => (blocks >> 8) as u8,
        0x2f => block as u8,
        0x30 => (block >> 8) as u8,
        0x31..=0x33 => b"PRI"[at as usize - 0x31],
        0x34 => b'1',
        0x35 => b'0',
        _ => 0,
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let live = self.lock();
        for (at, b) in (offset..).zip(data) {
            *b = self.read_byte(&live, at);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut live = self.lock();
        // The device is one byte wide: a command takes one byte however wide the access, data takes
        // all of them.
        match live.state.mode {
            Mode::Program => {
                let bytes: Vec<(u64, u8)> = (offset..).zip(data.iter().copied()).collect();
                self.program(&mut live, &bytes);
                self.finish(&mut live);
            }
            Mode::Fill => {
                (offset..).zip(data).for_each(|(at, v)| self.write_byte(&mut live, at, *v));
            }
            _ => data.iter().take(1).for_each(|v| self.write_byte(&mut live, offset, *v)),
        }
    }
}

impl Stateful for Flash {
    type State = FlashState;
    const KIND: &'static str = "flash";
    const VERSION: u32 = 1;

    fn state(&self) -> FlashState {
        self.lock().state.clone()
    }

    fn restore(&self, state: &FlashState) -> std::result::Result<(), RestoreError> {
        if state.buffer.len() > BUFFER || state.expected as usize > BUFFER {
            let why = format!("a write buffer holds {BUFFER} bytes");
            return Err(RestoreError { kind: Self::KIND, why });
        }
        let mut live = self.lock();
        self.enter(&mut live, state.mode);
        live.state = state.clone();
        Ok(())
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        let mut live = self.lock();
        self.save(&mut live);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_backends::block::drive::DriveOptions;
    use tandem_backends::block::open::{OpenSpec, open};

    struct Rig {
        map: Arc<GuestMap>,
        bus: Arc<IoBus>,
        flash: Arc<Flash>,
        path: std::path::PathBuf,
    }
    const BASE: u64 = (1 << 32) - 0x4000;

    fn rig(name: &str, read_only: bool) -> Rig {
        let path = std::env::temp_dir().join(format!("tandem-flash-{}-{name}", std::process::id()));
        let mut image = vec![0xff; 0x4000];
        image[0x3fff] = 0x5a;
        std::fs::write(&path, image).unwrap();
        let spec =
            OpenSpec { format: Some("raw".into()), write: !read_only, ..OpenSpec::read(&path) };
        let drive = Drive::new(open(&spec).unwrap(), DriveOptions::default());
        let (map, bus) = (GuestMap::new(), Arc::new(IoBus::default()));
        let flash = Flash::attach("flash", 1 << 32, drive, &map, &bus).unwrap();
        Rig { map, bus, flash, path }
    }
    impl Rig {
        fn w(&self, at: u64, v: u8) {
            self.bus.mmio_write(BASE + at, &[v]);
        }
        fn r(&self, at: u64) -> u8 {
            let mut b = [0];
            match self.map.find(BASE + at) {
                Some(r) => assert!(r.read(at, &mut b)),
                None => {
                    self.bus.mmio_read(BASE + at, &mut b);
                }
            }
            b[0]
        }
        fn image(&self, at: usize) -> u8 {
            std::fs::read(&self.path).unwrap()[at]
        }
    }
    impl Drop for Rig {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    #[test]
    fn the_array_is_memory_except_while_commands_run() {
        let r = rig("modes", false);
        assert_eq!(r.map.find(BASE).unwrap().kind, RegionKind::Rom);
        assert_eq!(r.r(0x3fff), 0x5a);
        r.w(0, 0x70);
        assert!(r.map.find(BASE).is_none());
        assert_eq!(r.r(0x3fff), 0x80);
        r.w(0, 0x90);
        assert_eq!((r.r(0), r.r(1)), (0x89, 0x18));
        r.w(0, 0x98);
        assert_eq!(
            (r.r(0x10), r.r(0x11), r.r(0x12), r.r(0x27), r.r(0x2d)),
            (0x51, 0x52, 0x59, 14, 3)
        );
        r.w(0, 0xff);
        assert_eq!(r.r(0x3fff), 0x5a);
        r.w(0, 0x98);
        r.flash.reset();
        assert_eq!(r.r(0x3fff), 0x5a);
    }

    #[test]
    fn bytes_are_programmed_blocks_erased_and_both_saved() {
        let r = rig("program", false);
        for (at, v) in [(0x1234, 0x3c), (0x1234, 0xf0), (0x1235, 0x01)] {
            r.w(at, 0x10);
            r.w(at, v);
        }
        assert_eq!(r.r(0), 0x80);
        r.w(0, 0xff);
        assert_eq!((r.r(0x1234), r.image(0x1234), r.image(0x1235)), (0x30, 0x30, 0x01));
        // The buffer: two bytes.
        for (at, v) in [(0x2000, 0xe8), (0x2000, 1), (0x2000, 0xaa), (0x2001, 0xbb), (0x2000, 0xd0)]
        {
            r.w(at, v);
        }
        r.w(0x1000, 0x20);
        r.w(0x1000, 0xd0);
        r.w(0, 0xff);
        assert_eq!((r.r(0x1234), r.r(0x2000), r.r(0x2001)), (0xff, 0xaa, 0xbb));
        assert_eq!((r.image(0x1234), r.image(0x2001)), (0xff, 0xbb));
        // An erasure that is not confirmed.
        r.w(0x2000, 0x20);
        r.w(0x2000, 0x12);
        assert_eq!(r.r(0), 0xb0);
        r.w(0, 0x50);
        assert_eq!(r.r(0x2000), 0xaa);
        r.w(0, 0x70);
        assert_eq!(r.r(0), 0);
    }

    #[test]
    fn code_cannot_be_changed() {
        let r = rig("locked", true);
        r.w(0x3fff, 0x40);
        r.w(0x3fff, 0);
        assert_eq!(r.r(0), 0x92);
        r.w(0, 0x20);
        r.w(0, 0xd0);
        assert_eq!(r.r(0), 0xb2);
        r.w(0, 0xff);
        assert_eq!(r.r(0x3fff), 0x5a);
    }

    #[test]
    fn state_goes_over() {
        let (a, b) = (rig("from", false), rig("to", false));
        for v in [0xe8, 3, 9] {
            a.w(0, v);
        }
        let s = a.flash.state();
        b.flash.restore(&s).unwrap();
        assert_eq!(b.flash.state(), s);
        assert!(b.map.find(BASE).is_none());
        let bad = FlashState { buffer: vec![(0, 0); 100], ..s };
        assert!(b.flash.restore(&bad).is_err());
    }
}
