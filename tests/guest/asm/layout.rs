//! Where everything lies, and the tables that processors read: descriptors, gates, page tables.
//!
//! ```text
//!    7c00  first bytes, multiboot header      7c40  multiboot entry (run at 1 MiB + 40h)
//!    7d00  real mode      8000  protected mode      9000  long mode
//!    b000  interrupt handlers     c000  ring 3     d000  data, d800 GDT, d900 TSS
//!    e000  IDT     f000  PML4, PDPT, two page directories, a page table    14000  end of the image
//!   14000  kernel stack   16000 interrupt stack   18000 ring 3's stack   1a000  read-only page
//! ```

use crate::traps::Traps;

pub const START: u32 = 0x7c00;
pub const MULTIBOOT_ENTRY: u32 = 0x7c40;
pub const REAL: u32 = 0x7d00;
pub const PROTECTED: u32 = 0x8000;
pub const LONG: u32 = 0x9000;
pub const TRAPS: u32 = 0xb000;
pub const USER: u32 = 0xc000;
pub const DATA: u32 = 0xd000;
pub const GDT: u32 = 0xd800;
pub const TSS: u32 = 0xd900;
pub const IDT: u32 = 0xe000;
pub const PML4: u32 = 0xf000;
const PDPT: u32 = PML4 + 0x1000;
const PD_LOW: u32 = PML4 + 0x2000;
const PD_HIGH: u32 = PML4 + 0x3000;
const PT_LOW: u32 = PML4 + 0x4000;
pub const END: u32 = 0x1_4000;
/// Bytes of the image.
pub const SIZE: u32 = END - START;

/// Top of the stack in real mode.
pub const REAL_STACK: u32 = 0x7c00;
/// Top of ring 0's stack.
pub const STACK: u32 = 0x1_6000;
/// Top of the stack that interrupts from ring 3 use.
pub const TRAP_STACK: u32 = 0x1_8000;
/// Top of ring 3's stack, and the start of its page.
pub const USER_STACK: u32 = 0x1_9000;
const USER_STACK_PAGE: u32 = 0x1_8000;
/// A page that may be read only.
pub const READ_ONLY: u32 = 0x1_a000;
/// An address in the mapped half that is not present.
pub const NOT_PRESENT: u32 = 0x3fe0_0000;
/// Where the lower half appears again.
pub const ALIAS: u64 = 0xffff_8000_0000_0000;

/// Where a multiboot loader puts the image.
pub const LOAD: u32 = 0x10_0000;

// Selectors. SYSCALL and SYSRET dictate the order of 10–33h (SDM vol. 3 §5.8.8). The numbers are
// Linux's, because ring 3 on a KVM without hardware runs with the host's.
pub const CODE64: u16 = 0x10;
pub const DATA_FLAT: u16 = 0x18;
/// What SYSRET adds 8 and 16 to.
pub const SYSRET_BASE: u16 = 0x20 | 3;
pub const USER_DATA: u16 = 0x28 | 3;
pub const USER_CODE: u16 = 0x30 | 3;
pub const TASK: u16 = 0x40;
pub const CODE32: u16 = 0x50;
pub const CODE16: u16 = 0x58;
pub const DATA16: u16 = 0x60;
/// A data segment whose base is [`DATA`] and whose limit is 64 KiB.
pub const DATA_BASED: u16 = 0x68;

/// Bytes of memory, from [`START`].
pub struct Image {
    pub bytes: Vec<u8>,
    taken: Vec<(u32, u32)>,
}

impl Image {
    pub fn new() -> Image {
        Image { bytes: vec![0; SIZE as usize], taken: Vec::new() }
    }
    /// Places `part` at `at`; two parts must not overlap.
    pub fn put(&mut self, at: u32, part: &[u8]) {
        let end = at + part.len() as u32;
        assert!(at >= START && end <= END, "part at {at:#x} leaves the image");
        for &(start, stop) in &self.taken {
            assert!(end <= start || at >= stop, "part {at:#x}–{end:#x} overlaps {start:#x}");
        }
        self.taken.push((at, end));
        let i = (at - START) as usize;
        self.bytes[i..i + part.len()].copy_from_slice(part);
    }
}

/// The cells at the start of the data page.
pub mod cell {
    use super::DATA;
    /// u32: address of the running stage's name.
    pub const STAGE: u32 = DATA;
    /// u32: number of the running check.
    pub const CHECK: u32 = DATA + 4;
    /// u64: vector that is expected; anything above 255: none.
    pub const EXPECTED: u32 = DATA + 8;
    /// u64: where to go on after the expected exception.
    pub const RESUME: u32 = DATA + 0x10;
    /// u64: error code, CS and CR2 of the last expected exception.
    pub const SEEN_ERROR: u32 = DATA + 0x18;
    pub const SEEN_CS: u32 = DATA + 0x20;
    pub const SEEN_CR2: u32 = DATA + 0x28;
    /// u64: timer interrupts.
    pub const TICKS: u32 = DATA + 0x30;
    /// u64: CS that the last timer interrupt came upon.
    pub const TICK_CS: u32 = DATA + 0x38;
    /// u64: serial interrupts, and the last one's identification.
    pub const SERIALS: u32 = DATA + 0x40;
    pub const SERIAL_ID: u32 = DATA + 0x48;
    /// u64: ring 3's stack pointer during a system call.
    pub const USER_RSP: u32 = DATA + 0x50;
    /// u64: system calls that arrived as faults (see `traps`).
    pub const SYSCALL_FAULTS: u32 = DATA + 0x58;
    /// 32 bytes to play with.
    pub const SCRATCH: u32 = DATA + 0x60;
    /// 6- and 10-byte operands of LGDT and LIDT.
    pub const GDTR: u32 = DATA + 0x80;
    pub const IDTR: u32 = DATA + 0x90;
    pub const REAL_IDTR: u32 = DATA + 0xa0;
    /// u64: where ring 0 goes on when ring 3 has ended.
    pub const BACK: u32 = DATA + 0xb0;
    /// First byte after the cells.
    pub const END: u32 = DATA + 0x100;
}

/// The data page: cells, then strings.
pub struct Data {
    strings: Vec<u8>,
}

impl Data {
    pub fn new() -> Data {
        Data { strings: Vec::new() }
    }
    /// Stores a string with its NUL; returns its address.
    pub fn text(&mut self, s: &str) -> u32 {
        let at = cell::END + self.strings.len() as u32;
        self.strings.extend_from_slice(s.as_bytes());
        self.strings.push(0);
        at
    }
    /// The address of a string that many use; stored once.
    pub fn shared(&mut self, s: &str) -> u32 {
        let bytes = [s.as_bytes(), &[0]].concat();
        match self.strings.windows(bytes.len()).position(|w| w == bytes) {
            Some(i) => cell::END + i as u32,
            None => self.text(s),
        }
    }
    pub fn bytes(&self) -> Vec<u8> {
        let mut page = vec![0; (cell::END - DATA) as usize];
        let mut set = |at: u32, bytes: &[u8]| {
            let i = (at - DATA) as usize;
            page[i..i + bytes.len()].copy_from_slice(bytes);
        };
        set(cell::EXPECTED, &u64::MAX.to_le_bytes());
        for (at, limit, base) in
            [(cell::GDTR, 0x6f_u16, GDT), (cell::IDTR, 0xfff, IDT), (cell::REAL_IDTR, 0x3ff, 0)]
        {
            set(at, &limit.to_le_bytes());
            set(at + 2, &u64::from(base).to_le_bytes());
        }
        page.extend_from_slice(&self.strings);
        page
    }
}

/// An 8-byte descriptor; `access` holds bits 8–15 of its upper half, `flags` bits 20–23 (SDM vol. 3
/// figure 3-8).
fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(flags) << 52
        | (base >> 24) << 56
}

fn words(v: &[u64]) -> Vec<u8> {
    v.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub fn gdt() -> Vec<u8> {
    // Access: present, DPL, code or data, type, accessed. Flags: G, D/B, L.
    const CODE: u8 = 0x9b;
    const RW: u8 = 0x93;
    const DPL3: u8 = 0x60;
    words(&[
        0,
        0,
        descriptor(0, 0xf_ffff, CODE, 0xa),
        descriptor(0, 0xf_ffff, RW, 0xc),
        0,
        descriptor(0, 0xf_ffff, RW | DPL3, 0xc),
        descriptor(0, 0xf_ffff, CODE | DPL3, 0xa),
        0,
        descriptor(TSS, 0x67, 0x89, 0),
        0,
        descriptor(0, 0xf_ffff, CODE, 0xc),
        descriptor(0, 0xffff, CODE, 0),
        descriptor(0, 0xffff, RW, 0),
        descriptor(DATA, 0xffff, RW, 4),
    ])
}

/// A 64-bit TSS with RSP0, and no I/O bitmap.
pub fn tss() -> Vec<u8> {
    let mut t = vec![0; 0x68];
    t[4..12].copy_from_slice(&u64::from(TRAP_STACK).to_le_bytes());
    t[0x66..0x68].copy_from_slice(&0x68u16.to_le_bytes());
    t
}

/// 256 interrupt gates of ring 0.
pub fn idt(traps: &Traps) -> Vec<u8> {
    let mut v = Vec::new();
    for vector in 0..=255u8 {
        let at = u64::from(traps.handler(vector));
        v.push(at & 0xffff | u64::from(CODE64) << 16 | 0x8e << 40 | (at >> 16 & 0xffff) << 48);
        v.push(at >> 32);
    }
    words(&v)
}

/// The lower half maps 32 MiB and the last GiB below 4 GiB one to one, the first 2 MiB by 4 KiB
/// pages, of which ring 3 may use its own two; the upper half shows the same again.
pub fn page_tables() -> Vec<u8> {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    const USER: u64 = 4;
    const UNCACHED: u64 = 0x18;
    const LARGE: u64 = 0x80;
    let mut tables = vec![0u64; 5 * 512];
    let mut set = |table: u32, index: usize, entry: u64| {
        tables[((table - PML4) / 8) as usize + index] = entry;
    };
    let branch = PRESENT | WRITE | USER;
    set(PML4, 0, u64::from(PDPT) | branch);
    set(PML4, 256, u64::from(PDPT) | branch);
    set(PDPT, 0, u64::from(PD_LOW) | branch);
    set(PDPT, 3, u64::from(PD_HIGH) | branch);
    set(PD_LOW, 0, u64::from(PT_LOW) | branch);
    for i in 1..16u64 {
        set(PD_LOW, i as usize, i << 21 | PRESENT | WRITE | LARGE);
    }
    for i in 0..512u64 {
        set(PD_HIGH, i as usize, 3 << 30 | i << 21 | PRESENT | WRITE | UNCACHED | LARGE);
        let at = i << 12;
        let rights = match at as u32 {
            self::USER => USER,
            USER_STACK_PAGE => USER | WRITE,
            READ_ONLY => 0,
            _ => WRITE,
        };
        set(PT_LOW, i as usize, at | PRESENT | rights);
    }
    words(&tables)
}
