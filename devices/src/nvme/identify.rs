//! What the controller says of itself, of its namespace, and in its logs (NVM Express Base 1.4
//! §5.14, §5.15).

/// Bytes of an Identify structure.
pub const LEN: usize = 4096;
/// log2 of the most pages of one command: 512 KiB.
pub const MAX_TRANSFER: u8 = 7;
/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Requests for events that may wait, less one.
pub const MAX_EVENTS: u8 = 3;

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Serial number, at most 20 bytes.
    pub serial: String,
    /// Model, at most 40 bytes.
    pub model: String,
    /// Blocks of the namespace.
    pub blocks: u64,
    /// log2 of the bytes of a block.
    pub block_shift: u8,
    /// Ranges can be given up.
    pub discard: bool,
    /// Nothing can be written.
    pub read_only: bool,
    /// PCI vendor.
    pub vendor: u16,
    /// PCI subsystem vendor.
    pub subsystem: u16,
}

struct Page(Vec<u8>);

impl Page {
    fn new() -> Page {
        Page(vec![0; LEN])
    }
    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Page {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
    fn text(&mut self, at: usize, len: usize, text: &str) -> &mut Page {
        self.0[at..at + len].copy_from_slice(&padded(text, len));
        self
    }
}

fn padded(text: &str, len: usize) -> Vec<u8> {
    let graphic = |b: u8| if (0x20..0x7f).contains(&b) { b } else { b'?' };
    text.bytes().map(graphic).chain(std::iter::repeat(b' ')).take(len).collect()
}

impl Facts {
    /// The world-wide name of the namespace, from the serial number: locally administered.
    fn eui64(&self) -> [u8; 8] {
        // FNV-1a.
        let hash =
            self.serial.bytes().chain(self.model.bytes()).fold(0xcbf2_9ce4_8422_2325, |h, b| {
                (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
            });
        let mut id: [u8; 8] = u64::to_be_bytes(hash);
        id[0] = id[0] & 0xfc | 2;
        id
    }

    /// The controller (§5.15.2.2).
    pub fn controller(&self) -> Vec<u8> {
        let mut p = Page::new();
        p.put(0, &self.vendor.to_le_bytes()).put(2, &self.subsystem.to_le_bytes());
        p.text(4, 20, &self.serial).text(24, 40, &self.model).text(64, 8, "1.0");
        // Arbitration burst; largest transfer; version.
        p.put(72, &[6]).put(77, &[MAX_TRANSFER]).put(80, &VERSION.to_le_bytes());
        // Aborts and events at a time; one firmware slot, read-only; log pages.
        p.put(258, &[3, MAX_EVENTS, 3, 0]);
        // Warning and critical temperature, in kelvin.
        p.put(266, &343u16.to_le_bytes()).put(268, &373u16.to_le_bytes());
        // Entries of 64 and 16 bytes; one namespace; commands beyond the mandatory ones.
        let optional = 1 << 3 | if self.discard { 1 << 2 } else { 0 };
        p.put(512, &[0x66, 0x44]).put(516, &1u32.to_le_bytes()).put(520, &[optional, 0]);
        // A volatile write cache.
        p.put(525, &[1]);
        let name = format!("nqn.2014.08.org.nvmexpress:{:04x}{:04x}", self.vendor, self.subsystem);
        p.put(768, name.as_bytes());
        let (serial, model) = (padded(&self.serial, 20), padded(&self.model, 40));
        p.put(768 + name.len(), &[serial, model].concat());
        // Power state 0: 25 W.
        p.put(2048, &2500u16.to_le_bytes());
        p.0
    }

    /// The namespace (§5.15.2.1).
    pub fn namespace(&self) -> Vec<u8> {
        let mut p = Page::new();
        for at in [0, 8, 16] {
            p.put(at, &self.blocks.to_le_bytes());
        }
        p.put(99, &[u8::from(self.read_only)]).put(120, &self.eui64());
        p.put(128, &[0, 0, self.block_shift, 0]);
        p.0
    }

    /// The namespace's names (§5.15.2.3).
    pub fn descriptors(&self) -> Vec<u8> {
        let mut p = Page::new();
        p.put(0, &[1, 8, 0, 0]).put(4, &self.eui64());
        p.0
    }

    /// The list of namespaces above `after`.
    pub fn list(&self, after: u32) -> Vec<u8> {
        let mut p = Page::new();
        p.put(0, &u32::from(after < 1).to_le_bytes());
        p.0
    }
}

/// Log pages (§5.14.1): no errors, health, the one firmware.
pub fn log(page: u8) -> Option<Vec<u8>> {
    match page {
        1 => Some(vec![0; 64]),
        2 => {
            let mut b = vec![0; 512];
            // 323 K; all spare blocks are left, and few are a warning.
            b[1..3].copy_from_slice(&323u16.to_le_bytes());
            (b[3], b[4]) = (100, 10);
            Some(b)
        }
        3 => {
            let mut b = vec![0; 512];
            b[0] = 1;
            b[8..16].copy_from_slice(b"1.0     ");
            Some(b)
        }
        _ => None,
    }
}
