//! Where direct boot puts its structures in the guest's low memory, and their writing.
//!
//! ```text
//!    400 ── BIOS data area: what a kernel looks for even without a BIOS
//!    500 ── GDT
//!   1000 ── start information (PVH or multiboot), boot_params
//!   9000 ── page tables: PML4, PDPT, four page directories
//!   f000 ── (first free)
//!  10000 ── strings and tables of the protocol: command line, module list, memory map
//!  9fc00 ── extended BIOS data area
//! ```

use super::Result;
use tandem_accel::Error;
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// GDT of direct boot.
pub const GDT: u64 = 0x500;
/// hvm_start_info or multiboot information.
pub const START_INFO: u64 = 0x1000;
/// Linux boot_params.
pub const BOOT_PARAMS: u64 = 0x2000;
/// Page tables, six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Strings and tables of variable length.
pub const STRINGS: u64 = 0x1_0000;
/// Their end.
pub const STRINGS_END: u64 = 0x2_0000;
/// Where flat images are loaded and entered.
pub const FLAT: u64 = 0x7c00;
/// Where flat images must end.
pub const FLAT_END: u64 = 0x8_0000;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const HUGE: u64 = 1 << 7;

/// Writes guest memory; the reader sees what could not be placed.
pub fn write(ram: &GuestRam, what: &str, at: u64, bytes: &[u8]) -> Result<()> {
    ram.write_slice(bytes, GuestAddress(at)).map_err(|e| {
        Error::new(format!("cannot place {what} at {at:#x} in guest memory")).caused_by(e)
    })
}

/// Identity-maps the first 4 GiB with 2 MiB pages; returns CR3.
pub fn identity_page_tables(ram: &GuestRam) -> Result<u64> {
    let table = |n: u64| PAGE_TABLES + n * 0x1000;
    let mut tables = vec![0u8; 6 * 0x1000];
    let mut set = |page: u64, index: u64, entry: u64| {
        let at = (page * 0x1000 + index * 8) as usize;
        tables[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    set(0, 0, table(1) | PRESENT | WRITABLE);
    for gib in 0..4 {
        set(1, gib, table(2 + gib) | PRESENT | WRITABLE);
        for i in 0..512 {
            set(2 + gib, i, (gib << 30) | (i << 21) | PRESENT | WRITABLE | HUGE);
        }
    }
    write(ram, "page tables", PAGE_TABLES, &tables)?;
    Ok(PAGE_TABLES)
}

/// Writes the fields of the BIOS data area that kernels read without asking a BIOS: I/O ports of
/// the serial ports, segment of the extended BIOS data area, KiB of conventional memory.
pub fn bios_data_area(ram: &GuestRam) -> Result<()> {
    let mut bda = [0u8; 0x100];
    for (i, port) in [0x3f8u16, 0x2f8, 0x3e8, 0x2e8].iter().enumerate() {
        bda[2 * i..2 * i + 2].copy_from_slice(&port.to_le_bytes());
    }
    let ebda = crate::machine::memmap::EBDA;
    bda[0xe..0x10].copy_from_slice(&((ebda >> 4) as u16).to_le_bytes());
    bda[0x13..0x15].copy_from_slice(&((ebda >> 10) as u16).to_le_bytes());
    write(ram, "the BIOS data area", 0x400, &bda)
}

/// Hands out the strings area piece by piece.
pub struct Strings<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl<'a> Strings<'a> {
    /// An empty area.
    pub fn new(ram: &'a GuestRam) -> Strings<'a> {
        Strings { ram, next: STRINGS }
    }

    /// Writes bytes, 8-byte aligned; returns their address.
    pub fn bytes(&mut self, what: &str, bytes: &[u8]) -> Result<u64> {
        let at = self.next.next_multiple_of(8);
        if at + bytes.len() as u64 > STRINGS_END {
            return Err(Error::new(format!("{what} is too long for the boot protocol's tables"))
                .remedy("shorten the command line or give fewer modules"));
        }
        write(self.ram, what, at, bytes)?;
        self.next = at + bytes.len() as u64;
        Ok(at)
    }

    /// Writes a string with its terminating NUL; returns its address.
    pub fn string(&mut self, what: &str, s: &str) -> Result<u64> {
        let mut bytes = s.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(what, &bytes)
    }
}
