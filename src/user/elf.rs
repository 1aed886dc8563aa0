//! ELF programs (System V ABI, chapters 4 and 5): what the headers say, and the segments into memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tandem_tcg::user::{Process, Prot};
use thiserror::Error;

const PAGE: u64 = 4096;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_PHDR: u32 = 6;
const PT_GNU_STACK: u32 = 0x6474_e551;
/// Most program headers that are read.
const MOST_HEADERS: u16 = 128;
/// Where programs without an address of their own begin.
const PIE_BASE: u64 = 0x4000_0000_0000;

/// Why a file is not run.
#[derive(Debug, Error)]
pub enum ElfError {
    /// No ELF file.
    #[error("it is not an ELF program")]
    NotElf,
    /// For another processor or system.
    #[error("it is a program for another processor (ELF machine {0}); only x86-64 is translated")]
    Machine(u16),
    /// Its headers make no sense.
    #[error("its ELF headers are damaged: {0}")]
    Damaged(&'static str),
    /// The host refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A program header.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    prot: Prot,
    offset: u64,
    vaddr: u64,
    filesz: u64,
    memsz: u64,
}

/// A program file.
#[derive(Debug)]
pub struct Elf {
    file: File,
    kind: u16,
    entry: u64,
    phoff: u64,
    phnum: u16,
    segments: Vec<Segment>,
    /// The program interpreter that it asks for.
    pub interpreter: Option<PathBuf>,
    /// The stack must be executable.
    pub exec_stack: bool,
}

/// A program in memory.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Added to all of its addresses.
    pub bias: u64,
    /// Where it begins to run.
    pub entry: u64,
    /// Its program headers.
    pub phdr: u64,
    /// Number of them.
    pub phnum: u16,
    /// First address behind its last segment, rounded up to pages.
    pub end: u64,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}
fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16_at(b, at)) | u32::from(u16_at(b, at + 2)) << 16
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

impl Elf {
    /// Reads the headers.
    ///
    /// # Errors
    /// It is not a program for x86-64 Linux, or cannot be read.
    pub fn open(path: &Path) -> Result<Elf, ElfError> {
        let file = File::open(path)?;
        let mut head = [0; 64];
        let n = file.read_at(&mut head, 0)?;
        if n < 64 || head[..4] != *b"\x7fELF" {
            return Err(ElfError::NotElf);
        }
        let (class, order) = (head[4], head[5]);
        let machine = u16_at(&head, 18);
        if class != 2 || order != 1 || machine != EM_X86_64 {
            return Err(ElfError::Machine(machine));
        }
        let kind = u16_at(&head, 16);
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(ElfError::Damaged("it is neither executable nor position-independent"));
        }
        let (phoff, phentsize, phnum) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56));
        if phentsize != 56 || phnum == 0 || phnum > MOST_HEADERS {
            return Err(ElfError::Damaged("the table of program headers"));
        }
        let mut table = vec![0; usize::from(phnum) * 56];
        file.read_exact_at(&mut table, phoff)?;
        let segments: Vec<Segment> = table
            .chunks_exact(56)
            .map(|h| {
                let flags = u32_at(h, 4);
                let prot = [(4, Prot::READ), (2, Prot::WRITE), (1, Prot::EXEC)];
                Segment {
                    kind: u32_at(h, 0),
                    prot: prot.iter().filter(|(b, _)| flags & b != 0).map(|(_, p)| *p).collect(),
                    offset: u64_at(h, 8),
                    vaddr: u64_at(h, 16),
                    filesz: u64_at(h, 32),
                    memsz: u64_at(h, 40),
                }
            })
            .collect();
        for s in segments.iter().filter(|s| s.kind == PT_LOAD) {
            let end = s.vaddr.checked_add(s.memsz).filter(|e| *e < 1 << 47);
            if end.is_none() || s.filesz > s.memsz || (s.vaddr ^ s.offset) % PAGE != 0 {
                return Err(ElfError::Damaged("a segment's addresses"));
            }
        }
        let interpreter = match segments.iter().find(|s| s.kind == PT_INTERP) {
            Some(s) if s.filesz < PAGE => {
                let mut name = vec![0; s.filesz as usize];
                file.read_exact_at(&mut name, s.offset)?;
                let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
                let name = std::str::from_utf8(&name[..end]);
                Some(name.map_err(|_| ElfError::Damaged("the interpreter's name"))?.into())
            }
            Some(_) => return Err(ElfError::Damaged("the interpreter's name")),
            None => None,
        };
        let stack = segments.iter().find(|s| s.kind == PT_GNU_STACK);
        let exec_stack = stack.is_some_and(|s| s.prot.contains(Prot::EXEC));
        let entry = u64_at(&head, 24);
        Ok(Elf { file, kind, entry, phoff, phnum, segments, interpreter, exec_stack })
    }

    fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memsz > 0)
    }

    /// Maps the segments. `main`: as the program itself, not its interpreter.
    ///
    /// # Errors
    /// The host has no memory there, or refuses the file.
    pub fn load(&self, process: &Process, main: bool) -> Result<Loaded, ElfError> {
        let first = self.loads().map(|s| s.vaddr & !(PAGE - 1)).min();
        let first = first.ok_or(ElfError::Damaged("nothing is to be loaded"))?;
        let end =
            self.loads().map(|s| (s.vaddr + s.memsz).next_multiple_of(PAGE)).max().unwrap_or(0);
        // All of it at once first, so that nothing comes between the segments.
        let (hint, flags) = match (self.kind, main) {
            (ET_EXEC, _) => (first, libc::MAP_FIXED_NOREPLACE),
            (_, true) => (PIE_BASE, 0),
            _ => (0, 0),
        };
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = map(hint, end - first, libc::PROT_NONE, flags, -1, 0)?;
        process.mapped(at, end - first, Some(Prot::empty()));
        let bias = at.wrapping_sub(first);
        for s in self.loads() {
            self.load_segment(process, s, bias)?;
        }
        // The headers lie in the segment that has the file's beginning, unless they say where.
        let phdr = self.segments.iter().find(|s| s.kind == PT_PHDR).map(|s| s.vaddr);
        let found = self
            .loads()
            .find(|s| s.offset <= self.phoff && self.phoff < s.offset + s.filesz)
            .map(|s| s.vaddr + (self.phoff - s.offset));
        Ok(Loaded {
            bias,
            entry: self.entry.wrapping_add(bias),
            phdr: phdr.or(found).unwrap_or(0).wrapping_add(bias),
            phnum: self.phnum,
            end: end.wrapping_add(bias),
        })
    }

    fn load_segment(&self, process: &Process, s: &Segment, bias: u64) -> Result<(), ElfError> {
        let start = s.vaddr.wrapping_add(bias) & !(PAGE - 1);
        let lead = s.vaddr % PAGE;
        let file_end = s.vaddr.wrapping_add(bias) + s.filesz;
        let mem_end = (s.vaddr.wrapping_add(bias) + s.memsz).next_multiple_of(PAGE);
        let prot = s.prot.host_bits();
        let fixed = libc::MAP_PRIVATE | libc::MAP_FIXED;
        if s.filesz > 0 {
            let fd = self.file.as_raw_fd();
            map(start, lead + s.filesz, prot, fixed, fd, s.offset - lead)?;
        }
        let zero_from = if s.filesz > 0 { file_end.next_multiple_of(PAGE) } else { start };
        if mem_end > zero_from {
            map(zero_from, mem_end - zero_from, prot, fixed | libc::MAP_ANONYMOUS, -1, 0)?;
        }
        if s.memsz > s.filesz && file_end < zero_from && s.prot.contains(Prot::WRITE) {
            // SAFETY: the rest of the segment's last file page, which was just mapped writable for
            // the guest and which nobody uses yet.
            unsafe {
                std::ptr::write_bytes(file_end as *mut u8, 0, (zero_from - file_end) as usize);
            }
        }
        process.mapped(start, mem_end - start, Some(s.prot));
        Ok(())
    }
}

/// mmap(2).
fn map(addr: u64, len: u64, prot: i32, flags: i32, fd: i32, offset: u64) -> io::Result<u64> {
    // SAFETY: a fixed address lies in what was reserved for this program, or must be free
    // (MAP_FIXED_NOREPLACE); any other is the kernel's choice.
    let p = unsafe {
        libc::mmap(addr as *mut libc::c_void, len as usize, prot, flags, fd, offset as i64)
    };
    match p {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        p => Ok(p as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_for_x86_64_are_opened() {
        assert!(matches!(Elf::open(Path::new("/etc/passwd")), Err(ElfError::NotElf)));
        let me = Elf::open(&std::env::current_exe().unwrap()).unwrap();
        assert!(me.interpreter.is_some() && me.loads().count() > 1 && !me.exec_stack);
        let dir = std::env::temp_dir().join(format!("tandem-elf-{}", std::process::id()));
        let mut image = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        image.truncate(4096);
        image[18] = 243;
        std::fs::write(&dir, &image).unwrap();
        assert!(matches!(Elf::open(&dir), Err(ElfError::Machine(243))));
        image[18] = 62;
        image[32 + 7] = 0x7f;
        std::fs::write(&dir, &image).unwrap();
        assert!(Elf::open(&dir).is_err());
        std::fs::remove_file(&dir).unwrap();
    }
}
