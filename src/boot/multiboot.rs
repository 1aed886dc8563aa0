//! Multiboot 1 (Multiboot Specification 0.6.96): ELF kernels, or raw ones that give addresses in
//! their header; 32-bit protected mode, EAX = magic, EBX = information structure.

use super::elf::{self, Elf};
use super::layout::{self, START_INFO, Strings};
use super::{Board, Image, Result, does_not_fit, entry, pvh};
use crate::config::Fault;
use crate::machine::memmap::{E820Kind, EBDA, MemoryMap, ONE_MIB};
use tandem_accel::memory::GuestRam;
use tandem_accel::x86::X86State;

/// The header lies in this many bytes at the start of the image (§3.1).
pub const SEARCH: usize = 8192;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;

/// Header flags (§3.1.1): modules page-aligned, memory information wanted, video mode wanted;
/// addresses in the header are valid.
const PAGE_ALIGN: u32 = 1 << 0;
const MEMORY_INFO: u32 = 1 << 1;
const VIDEO_MODE: u32 = 1 << 2;
const ADDRESSES: u32 = 1 << 16;
/// Bits 0–15 are requirements: a loader that does not know one must refuse.
const KNOWN_REQUIREMENTS: u32 = PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE;

/// Flags of the information structure (§3.3).
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: usize = 116;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Offset of the header in the bytes at the start of a file.
pub fn find_header(head: &[u8]) -> Option<usize> {
    (0..head.len().min(SEARCH).saturating_sub(11)).step_by(4).find(|&at| {
        let sum = u32_at(head, at).wrapping_add(u32_at(head, at + 4));
        u32_at(head, at) == HEADER_MAGIC && sum.wrapping_add(u32_at(head, at + 8)) == 0
    })
}

/// How the image's bytes get into memory.
#[derive(Debug)]
enum Load {
    Elf(Elf),
    Raw { offset: u64, at: u64, file_size: u64, mem_size: u64 },
}

/// Where everything goes.
#[derive(Debug)]
pub struct Plan {
    kernel: Image,
    load: Load,
    entry: u32,
    modules: Vec<(Image, u64, String)>,
    cmdline: String,
    low_end: u64,
}

impl Plan {
    /// Checks the kernel and places its modules after it.
    pub fn new(
        kernel: Image,
        modules: Vec<(Image, &str)>,
        cmdline: &str,
        map: &MemoryMap,
    ) -> Result<Plan, Fault> {
        let head = kernel.head(SEARCH);
        let Some(at) = find_header(&head) else {
            return Err(Fault::new(
                format!("kernel '{}' has no multiboot header", kernel.name),
                "give a multiboot 1 kernel",
            ));
        };
        let flags = u32_at(&head, at + 4);
        if flags & 0xffff & !KNOWN_REQUIREMENTS != 0 {
            return Err(Fault::new(
                format!("multiboot kernel '{}' requires features {flags:#x}", kernel.name),
                "only page alignment and memory information can be had",
            ));
        }
        let (load, entry, end) = if flags & ADDRESSES != 0 {
            raw(&kernel, &head, at, map)?
        } else {
            let elf = Elf::read(&kernel.file, &format!("kernel '{}'", kernel.name))?;
            pvh::check_fits(&kernel, &elf, map)?;
            // The entry point is physical where the image is linked so, else it lies in a segment.
            let entry = elf.physical(elf.entry).unwrap_or(elf.entry);
            let end = elf.end();
            (Load::Elf(elf), entry as u32, end)
        };
        let mut next = end.next_multiple_of(0x1000);
        let mut placed = Vec::new();
        for (image, args) in modules {
            if image.len > map.low_end.saturating_sub(next) {
                let room = map.low_end.saturating_sub(next);
                return Err(does_not_fit("module", &image, room));
            }
            let at = next;
            next = (at + image.len).next_multiple_of(0x1000);
            let string = format!("{} {args}", image.name).trim_end().to_string();
            placed.push((image, at, string));
        }
        let cmdline = format!("{} {cmdline}", kernel.name).trim_end().to_string();
        Ok(Plan { kernel, load, entry, modules: placed, cmdline, low_end: map.low_end })
    }

    /// Loads everything.
    pub fn load(&self, ram: &GuestRam, board: &Board) -> Result<X86State> {
        let (file, name) = (&self.kernel.file, &self.kernel.name);
        match &self.load {
            Load::Elf(elf) => elf.load(file, name, ram)?,
            Load::Raw { offset, at, file_size, mem_size } => {
                elf::load_piece(file, name, ram, *offset, *file_size, *at, *mem_size)?
            }
        }
        let mut strings = Strings::new(ram);
        let mut info = [0u8; INFO_SIZE];
        let mut set = |at: usize, v: u32| info[at..at + 4].copy_from_slice(&v.to_le_bytes());
        let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER_NAME;
        set(4, (EBDA >> 10) as u32);
        set(8, ((self.low_end - ONE_MIB) >> 10) as u32);
        set(16, strings.string("the kernel command line", &self.cmdline)? as u32);
        if !self.modules.is_empty() {
            flags |= INFO_MODULES;
            let mut list = Vec::new();
            for (image, at, string) in &self.modules {
                image.load(ram, *at)?;
                let string = strings.string("a module's string", string)?;
                for v in [*at, at + image.len, string, 0] {
                    list.extend_from_slice(&(v as u32).to_le_bytes());
                }
            }
            set(20, self.modules.len() as u32);
            set(24, strings.bytes("the module list", &list)? as u32);
        }
        let mut map = Vec::new();
        for e in &board.e820 {
            map.extend_from_slice(&20u32.to_le_bytes());
            map.extend_from_slice(&e.start.to_le_bytes());
            map.extend_from_slice(&e.len.to_le_bytes());
            let kind = if e.kind == E820Kind::Ram { 1u32 } else { 2 };
            map.extend_from_slice(&kind.to_le_bytes());
        }
        set(44, map.len() as u32);
        set(48, strings.bytes("the memory map", &map)? as u32);
        set(64, strings.string("the loader's name", "tandem")? as u32);
        set(0, flags);
        layout::write(ram, "multiboot information", START_INFO, &info)?;
        entry::protected_mode(ram, self.entry, LOADER_MAGIC, START_INFO as u32)
    }
}

/// The placement that the header's own addresses ask for (§3.1.3): load, entry and end of all.
fn raw(
    kernel: &Image,
    head: &[u8],
    header: usize,
    map: &MemoryMap,
) -> Result<(Load, u32, u64), Fault> {
    let field = |n: usize| u64::from(u32_at(head, header + 12 + 4 * n));
    let (header_addr, load_addr, load_end, bss_end) = (field(0), field(1), field(2), field(3));
    let bad = || {
        Fault::new(
            format!("multiboot kernel '{}' has contradictory addresses in its header", kernel.name),
            "link it again",
        )
    };
    let before = header_addr.checked_sub(load_addr).ok_or_else(bad)?;
    let offset = (header as u64).checked_sub(before).ok_or_else(bad)?;
    let rest = kernel.len.saturating_sub(offset);
    let file_size = match load_end {
        0 => rest,
        end => end.checked_sub(load_addr).filter(|n| *n <= rest).ok_or_else(bad)?,
    };
    let mem_size = match bss_end {
        0 => file_size,
        end => end.checked_sub(load_addr).filter(|n| *n >= file_size).ok_or_else(bad)?,
    };
    let end = load_addr + mem_size;
    if load_addr < ONE_MIB || end > map.low_end {
        return Err(Fault::new(
            format!("kernel '{}' wants memory {load_addr:#x} to {end:#x}", kernel.name),
            "link it at 1 MiB or above and give the guest enough memory with -m",
        ));
    }
    let entry = u32_at(head, header + 28);
    Ok((Load::Raw { offset, at: load_addr, file_size, mem_size }, entry, end))
}
