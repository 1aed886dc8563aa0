//! ELF images, 32 and 64 bit: what a boot loader needs of them.

use super::Result;
use crate::config::Fault;
use std::fs::File;
use std::os::unix::fs::FileExt;
use tandem_accel::Error;
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// Note type of the 32-bit PVH entry point (owner "Xen").
const XEN_PHYS32_ENTRY: u32 = 18;
/// Program headers and notes are small; a file that says otherwise is not a kernel.
const MAX_HEADERS: u16 = 256;
const MAX_NOTES: u64 = 1 << 20;

/// A loadable piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Guest physical address.
    pub paddr: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// Bytes in memory; what the file does not provide is zero.
    pub mem_size: u64,
}

/// The headers of an ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Entry point, a virtual address.
    pub entry: u64,
    /// Loadable pieces.
    pub segments: Vec<Segment>,
    /// 32-bit PVH entry point, a physical address.
    pub pvh_entry: Option<u32>,
}

struct Fields<'a> {
    bytes: &'a [u8],
    wide: bool,
}

impl Fields<'_> {
    fn u16(&self, at: usize) -> u16 {
        self.bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    }
    fn u32(&self, at: usize) -> u32 {
        self.bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()))
    }
    /// An address-sized field: at `narrow` in the 32-bit layout, at `wide` in the 64-bit one.
    fn word(&self, narrow: usize, wide: usize) -> u64 {
        if !self.wide {
            return self.u32(narrow).into();
        }
        self.bytes.get(wide..wide + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()))
    }
}

/// Whether the bytes at the start of a file are an ELF header.
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

impl Elf {
    /// Reads the headers of `file`; `name` is for messages.
    pub fn read(file: &File, name: &str) -> Result<Elf, Fault> {
        let bad = |why: &str| {
            Fault::new(format!("{name} is an ELF file but {why}"), "give an x86 kernel image")
        };
        let mut head = [0u8; 64];
        let n = file.read_at(&mut head, 0).map_err(|e| bad(&format!("cannot be read ({e})")))?;
        let h = Fields { bytes: &head[..n], wide: head[4] == 2 };
        if head[5] != 1 || !matches!(h.u16(18), EM_386 | EM_X86_64) {
            return Err(bad("not for x86"));
        }
        let (count, size) = if h.wide { (h.u16(56), 56) } else { (h.u16(44), 32) };
        if count == 0 || count > MAX_HEADERS {
            return Err(bad("has no usable program headers"));
        }
        let mut table = vec![0u8; usize::from(count) * size];
        file.read_exact_at(&mut table, h.word(28, 32)).map_err(|_| bad("is cut short"))?;
        let mut elf = Elf { entry: h.word(24, 24), segments: Vec::new(), pvh_entry: None };
        for bytes in table.chunks_exact(size) {
            let p = Fields { bytes, wide: h.wide };
            let segment = Segment {
                offset: p.word(4, 8),
                file_size: p.word(16, 32),
                vaddr: p.word(8, 16),
                paddr: p.word(12, 24),
                mem_size: p.word(20, 40),
            };
            match p.u32(0) {
                PT_LOAD if segment.mem_size > 0 => {
                    let end = segment.paddr.checked_add(segment.mem_size);
                    if end.is_none() || segment.file_size > segment.mem_size {
                        return Err(bad("has a segment of impossible size"));
                    }
                    elf.segments.push(segment);
                }
                PT_NOTE => elf.pvh_entry = elf.pvh_entry.or(pvh_note(file, &segment)),
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(bad("has nothing to load"));
        }
        Ok(elf)
    }

    /// First address after the last segment.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.paddr + s.mem_size).max().unwrap_or(0)
    }

    /// The physical address of a virtual one, by the segment that holds it.
    pub fn physical(&self, vaddr: u64) -> Option<u64> {
        let s = self.segments.iter().find(|s| vaddr >= s.vaddr && vaddr - s.vaddr < s.mem_size)?;
        Some(s.paddr + (vaddr - s.vaddr))
    }

    /// Places the segments in guest memory.
    pub fn load(&self, file: &File, name: &str, ram: &GuestRam) -> Result<()> {
        for s in &self.segments {
            load_piece(file, name, ram, s.offset, s.file_size, s.paddr, s.mem_size)?;
        }
        Ok(())
    }
}

/// Copies `file_size` bytes at `offset` of the file to guest address `at` and zeroes the rest up to
/// `mem_size`.
pub fn load_piece(
    mut file: &File,
    name: &str,
    ram: &GuestRam,
    offset: u64,
    file_size: u64,
    at: u64,
    mem_size: u64,
) -> Result<()> {
    use std::io::{Seek, SeekFrom};
    let fail = |e: &dyn std::fmt::Display| {
        Error::new(format!("cannot load {name} at {at:#x}+{mem_size:#x} of guest memory: {e}"))
            .remedy("check the image and give the guest more memory with -m")
    };
    file.seek(SeekFrom::Start(offset)).map_err(|e| fail(&e))?;
    ram.read_exact_volatile_from(GuestAddress(at), &mut file, file_size as usize)
        .map_err(|e| fail(&e))?;
    static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];
    let (mut from, end) = (at + file_size, at + mem_size);
    while from < end {
        let n = (end - from).min(ZEROES.len() as u64);
        ram.write_slice(&ZEROES[..n as usize], GuestAddress(from)).map_err(|e| fail(&e))?;
        from += n;
    }
    Ok(())
}

/// The PVH entry point, if this note segment holds one.
fn pvh_note(file: &File, segment: &Segment) -> Option<u32> {
    let mut bytes = vec![0u8; segment.file_size.min(MAX_NOTES) as usize];
    file.read_exact_at(&mut bytes, segment.offset).ok()?;
    let f = Fields { bytes: &bytes, wide: false };
    let mut at = 0usize;
    while at + 12 <= bytes.len() {
        let (name_len, desc_len) = (f.u32(at) as usize, f.u32(at + 4) as usize);
        let name_at = at + 12;
        let desc_at = name_at.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let next = desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?;
        let name = bytes.get(name_at..name_at.checked_add(name_len)?)?;
        // The descriptor is address-sized: 4 or 8 bytes, of which the low half counts.
        if f.u32(at + 8) == XEN_PHYS32_ENTRY && name == b"Xen\0" && desc_len >= 4 {
            return bytes.get(desc_at..desc_at + 4).map(|_| f.u32(desc_at));
        }
        at = next;
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;

    /// A minimal 32-bit ELF file with one segment.
    pub fn elf32(paddr: u32, entry: u32, code: &[u8]) -> Vec<u8> {
        let mut b = vec![0u8; 52 + 32];
        b[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
        put(16, &2u16.to_le_bytes());
        put(18, &EM_386.to_le_bytes());
        put(24, &entry.to_le_bytes());
        put(28, &52u32.to_le_bytes());
        put(42, &32u16.to_le_bytes());
        put(44, &1u16.to_le_bytes());
        put(52, &PT_LOAD.to_le_bytes());
        put(56, &84u32.to_le_bytes());
        put(60, &paddr.to_le_bytes());
        put(64, &paddr.to_le_bytes());
        put(68, &(code.len() as u32).to_le_bytes());
        put(72, &(code.len() as u32 + 16).to_le_bytes());
        b.extend_from_slice(code);
        b
    }

    pub fn file(bytes: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!(
            "tandem-test-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        let f = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        f
    }

    #[test]
    fn headers_are_read_and_bad_ones_refused() {
        let image = elf32(0x10_0000, 0x10_0004, &[0x90; 8]);
        let e = Elf::read(&file(&image), "k").unwrap();
        assert_eq!(e.entry, 0x10_0004);
        assert_eq!(e.end(), 0x10_0018);
        assert_eq!(e.physical(0x10_0004), Some(0x10_0004));
        assert_eq!(e.physical(0), None);
        for cut in [6, 40, 60] {
            assert!(Elf::read(&file(&image[..cut]), "k").is_err(), "{cut}");
        }
        let mut other = image.clone();
        other[18] = 0xb7;
        assert!(Elf::read(&file(&other), "k").unwrap_err().to_string().contains("not for x86"));
        let mut huge = image;
        huge[68..72].fill(0xff);
        assert!(Elf::read(&file(&huge), "k").is_err());
    }

    #[test]
    fn notes_with_lying_lengths_end_the_search() {
        let mut note = vec![];
        for v in [4u32, 4, XEN_PHYS32_ENTRY] {
            note.extend_from_slice(&v.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0\x00\x00\x00\x01");
        let seg = |n: usize| Segment {
            offset: 0,
            file_size: n as u64,
            paddr: 0,
            vaddr: 0,
            mem_size: n as u64,
        };
        assert_eq!(pvh_note(&file(&note), &seg(note.len())), Some(0x100_0000));
        assert_eq!(pvh_note(&file(&note), &seg(note.len() - 2)), None);
        note[0..4].fill(0xff);
        assert_eq!(pvh_note(&file(&note), &seg(note.len())), None);
    }
}
