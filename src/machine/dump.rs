//! Dumps of guest memory: ELF core files of a 64-bit system, which crash and gdb read, with a
//! segment for each region of RAM at its physical address and two notes for each processor.
//!
//! ```text
//!   ELF header │ program headers │ notes: CORE NT_PRSTATUS, QEMU for each processor │ RAM …
//! ```
//!
//! The notes are Linux's `struct elf_prstatus`, and QEMU's own, from which crash takes the control
//! registers to find out where the kernel lies.

use super::{Event, Machine, RunState};
use crate::commands::dump::{DumpQueryResult, DumpStatus};
use crate::commands::events::DumpCompleted;
use crate::qapi::{Error, Result};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tandem_accel::memory::{Region, RegionKind};
use tandem_accel::x86::{Segment, X86State, gpr, seg};

/// Bytes written at once.
const PIECE: usize = 1 << 20;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Memory begins at a multiple of this.
const ALIGN: usize = 4096;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// Size of `struct elf_prstatus`, and where in it the process's id and the registers are.
const PRSTATUS: usize = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;
/// Size of the other note, which stands in it.
const QEMU_STATE: u32 = 440;
/// Read and write, execute.
const RWX: u32 = 7;

fn note(name: &str, kind: u32, body: &[u8], into: &mut Vec<u8>) {
    let name = [name.as_bytes(), &[0]].concat();
    for n in [name.len() as u32, body.len() as u32, kind] {
        into.extend(n.to_le_bytes());
    }
    for part in [&name[..], body] {
        into.extend(part);
        into.resize(into.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus` of processor `index`, whose process's id is one more.
fn prstatus(s: &X86State, index: u32) -> Vec<u8> {
    use gpr::*;
    let (g, base) = (|i: usize| s.gpr[i], |i: usize| s.seg[i].base);
    let sel = |i: usize| u64::from(s.seg[i].selector);
    let registers = [
        g(15),
        g(14),
        g(13),
        g(12),
        g(RBP),
        g(RBX),
        g(11),
        g(10),
        g(9),
        g(8),
        g(RAX),
        g(RCX),
        g(RDX),
        g(RSI),
        g(RDI),
        // What a system call was asked with: none is under way.
        u64::MAX,
        s.rip,
        sel(seg::CS),
        s.rflags,
        g(RSP),
        sel(seg::SS),
        base(seg::FS),
        base(seg::GS),
        sel(seg::DS),
        sel(seg::ES),
        sel(seg::FS),
        sel(seg::GS),
    ];
    let mut b = vec![0; PRSTATUS];
    b[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(index + 1).to_le_bytes());
    for (to, r) in b[PRSTATUS_REGISTERS..].chunks_exact_mut(8).zip(registers) {
        to.copy_from_slice(&r.to_le_bytes());
    }
    b
}

/// QEMU's `QEMUCPUState`, version 1.
fn qemu_state(s: &X86State) -> Vec<u8> {
    use gpr::*;
    let mut b = Vec::with_capacity(QEMU_STATE as usize);
    b.extend(1u32.to_le_bytes());
    b.extend(QEMU_STATE.to_le_bytes());
    for i in [RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, 8, 9, 10, 11, 12, 13, 14, 15] {
        b.extend(s.gpr[i].to_le_bytes());
    }
    b.extend(s.rip.to_le_bytes());
    b.extend(s.rflags.to_le_bytes());
    let table = |base, limit: u16| Segment { selector: 0, base, limit: limit.into(), attr: 0 };
    let tables = [table(s.gdtr.base, s.gdtr.limit), table(s.idtr.base, s.idtr.limit)];
    let all = [seg::CS, seg::DS, seg::ES, seg::FS, seg::GS, seg::SS, seg::LDTR, seg::TR];
    for x in all.into_iter().map(|i| s.seg[i]).chain(tables) {
        // Flags are the descriptor's second half.
        for n in [u32::from(x.selector), x.limit, (x.attr & 0xffff) << 8, 0] {
            b.extend(n.to_le_bytes());
        }
        b.extend(x.base.to_le_bytes());
    }
    for cr in [s.cr0, 0, s.cr2, s.cr3, s.cr4] {
        b.extend(cr.to_le_bytes());
    }
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    let kernel_gs = s.msrs.iter().find(|(n, _)| *n == KERNEL_GS_BASE).map_or(0, |(_, v)| *v);
    b.extend(kernel_gs.to_le_bytes());
    b
}

fn program_header(kind: u32, offset: usize, physical: u64, len: u64) -> Vec<u8> {
    let mut h = Vec::with_capacity(PROGRAM_HEADER);
    let flags = if kind == PT_LOAD { RWX } else { 0 };
    h.extend(kind.to_le_bytes());
    h.extend(flags.to_le_bytes());
    for n in [offset as u64, 0, physical, len, len, 0] {
        h.extend(n.to_le_bytes());
    }
    h
}

/// A core file that is not written yet.
struct Core {
    head: Vec<u8>,
    regions: Vec<Region>,
}

impl Core {
    fn new(processors: &[X86State], regions: Vec<Region>) -> Core {
        let mut notes = Vec::new();
        for (s, i) in processors.iter().zip(0..) {
            note("CORE", NT_PRSTATUS, &prstatus(s, i), &mut notes);
        }
        for s in processors {
            note("QEMU", 0, &qemu_state(s), &mut notes);
        }
        let headers = 1 + regions.len();
        let notes_at = ELF_HEADER + headers * PROGRAM_HEADER;
        let mut at = (notes_at + notes.len()).next_multiple_of(ALIGN);
        // 64-bit, little-endian; a core file of x86-64.
        let mut head = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        head.extend([4, 0, 62, 0, 1, 0, 0, 0]);
        for n in [0, ELF_HEADER as u64, 0] {
            head.extend(n.to_le_bytes());
        }
        head.extend(0u32.to_le_bytes());
        for n in [ELF_HEADER, PROGRAM_HEADER, headers, 0, 0, 0] {
            head.extend((n as u16).to_le_bytes());
        }
        head.extend(program_header(PT_NOTE, notes_at, 0, notes.len() as u64));
        let first = at;
        for r in &regions {
            head.extend(program_header(PT_LOAD, at, r.gpa, r.len()));
            at += r.len() as usize;
        }
        head.extend(notes);
        head.resize(first, 0);
        Core { head, regions }
    }

    fn memory(&self) -> u64 {
        self.regions.iter().map(Region::len).sum()
    }

    fn write(&self, to: &mut dyn Write, done: &AtomicU64) -> io::Result<()> {
        to.write_all(&self.head)?;
        let mut buf = vec![0; PIECE];
        for r in &self.regions {
            let mut at = 0;
            while at < r.len() {
                let n = (r.len() - at).min(PIECE as u64) as usize;
                if !r.read(at, &mut buf[..n]) {
                    return Err(io::Error::other("guest memory cannot be read"));
                }
                to.write_all(&buf[..n])?;
                at += n as u64;
                done.fetch_add(n as u64, Ordering::Relaxed);
            }
        }
        to.flush()
    }
}

/// The last dump.
#[derive(Clone)]
pub struct Dump {
    status: DumpStatus,
    done: Arc<AtomicU64>,
    total: u64,
    /// The guest goes on afterwards.
    resume: bool,
}

impl Machine {
    /// How the last dump fares.
    pub fn dump_progress(&self) -> DumpQueryResult {
        let Some(d) = &self.dump else {
            return DumpQueryResult { status: DumpStatus::None, completed: 0, total: 0 };
        };
        let completed = d.done.load(Ordering::Relaxed);
        DumpQueryResult { status: d.status, completed, total: d.total }
    }

    /// Writes guest memory and the processors' registers to `to`, while the guest stands still.
    /// `detach`: on a thread of its own; an event tells of the end in any case.
    pub fn start_dump(&mut self, mut to: File, detach: bool) -> Result<()> {
        if self.dump.as_ref().is_some_and(|d| d.status == DumpStatus::Active) {
            return Err(Error::new("There is a dump in process, please wait"));
        }
        let resume = self.run_state() == RunState::Running;
        self.stop(RunState::Paused);
        let states: std::result::Result<Vec<_>, _> = self.vcpus().map(|(v, _)| v.state()).collect();
        let regions = self.memory().regions();
        let regions = regions.into_iter().filter(|r| r.kind == RegionKind::Ram).collect();
        let core = match states {
            Ok(states) => Core::new(&states, regions),
            Err(e) => {
                if resume {
                    self.start();
                }
                return Err(e.into());
            }
        };
        let done = Arc::new(AtomicU64::new(0));
        let (status, total) = (DumpStatus::Active, core.memory());
        self.dump = Some(Dump { status, done: done.clone(), total, resume });
        if !detach {
            let result = core.write(&mut to, &done);
            return self.end_dump(result);
        }
        let inbox = self.inbox().clone();
        let work = move || {
            let result = core.write(&mut to, &done);
            drop(to);
            inbox.post(Event::Job(Box::new(move |vm: &mut Machine| drop(vm.end_dump(result)))));
        };
        match std::thread::Builder::new().name("dump".into()).spawn(work) {
            Ok(_) => Ok(()),
            Err(e) => self.end_dump(Err(e)),
        }
    }

    fn end_dump(&mut self, result: io::Result<()>) -> Result<()> {
        let Some(d) = &mut self.dump else { return Ok(()) };
        d.status = if result.is_ok() { DumpStatus::Completed } else { DumpStatus::Failed };
        let resume = d.resume;
        let result = result.map_err(|e| format!("the dump cannot be written: {e}"));
        let error = result.as_ref().err().cloned();
        self.hub.emit(DumpCompleted { result: self.dump_progress(), error });
        if resume && self.run_state() == RunState::Paused {
            self.start();
        }
        result.map_err(Error::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_file_holds_registers_and_memory() {
        let region = Region::new("x", RegionKind::Ram, 0x10_0000, 0x3000).unwrap();
        assert!(region.load(0x1000, b"guest"));
        let mut s = X86State { rip: 0x1234, ..X86State::default() };
        s.gpr[gpr::RSP] = 0x5678;
        let core = Core::new(&[s.clone(), s], vec![region]);
        let (mut out, done) = (Vec::new(), AtomicU64::new(0));
        core.write(&mut out, &done).unwrap();
        assert_eq!(done.into_inner(), 0x3000);
        let n = |at: usize| u64::from_le_bytes(out[at..at + 8].try_into().unwrap()) as usize;
        let load = 64 + 56;
        let (offset, len) = (n(load + 8), n(load + 32));
        assert_eq!((n(load + 24), len, out.len()), (0x10_0000, 0x3000, offset + len));
        assert_eq!(&out[offset + 0x1000..offset + 0x1005], b"guest");
        let notes = n(64 + 8);
        let registers = notes + 12 + 8 + PRSTATUS_REGISTERS;
        assert_eq!((n(registers + 16 * 8), n(registers + 19 * 8)), (0x1234, 0x5678));
        assert_eq!(n(64 + 32), 2 * (12 + 8 + PRSTATUS) + 2 * (12 + 8 + QEMU_STATE as usize));
        assert_eq!(qemu_state(&X86State::default()).len(), QEMU_STATE as usize);
    }
}
