//! `-d` logs: what the translator sees and makes.
//!
//! Off means free: generated code is the same, and each hook is one relaxed load.

use crate::exec::Vcpu;
use crate::softmmu::{PAGE_MASK, phys};
use crate::tb::{Found, Range, TbCache, TbKey};
use crate::x86::Env;
use crate::x86::exception::Exception;
use crate::x86::mode::Mode;
use bitflags::bitflags;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};
use std::fmt::Write as _;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use tandem_accel::{Error, Result};
use tandem_jit::code::Compiled;
use tandem_jit::ir::Block;
use tandem_jit::target::Target;

bitflags! {
    /// What is logged.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Items: u32 {
        /// Guest code of each translation.
        const IN_ASM = 1;
        /// IR of each translation.
        const OP = 2;
        /// IR after the passes.
        const OP_OPT = 4;
        /// Host code of each translation.
        const OUT_ASM = 8;
        /// Registers before each block that is entered.
        const CPU = 16;
        /// A line for each block that is entered.
        const EXEC = 32;
        /// Interrupts and exceptions.
        const INT = 64;
        /// Page faults in detail.
        const MMU = 128;
        /// No block jumps to another directly.
        const NOCHAIN = 256;
        /// What each vCPU has counted, when it ends.
        const COUNTERS = 512;
    }
}

/// The items by name, with what `-d help` says.
pub const NAMES: &[(&str, Items, &str)] = &[
    ("in_asm", Items::IN_ASM, "guest code of each translated block"),
    ("op", Items::OP, "IR of each translated block"),
    ("op_opt", Items::OP_OPT, "IR after optimisation"),
    ("out_asm", Items::OUT_ASM, "host code of each translated block"),
    ("cpu", Items::CPU, "registers before each executed block"),
    ("exec", Items::EXEC, "a line for each executed block"),
    ("int", Items::INT, "interrupts and exceptions"),
    ("mmu", Items::MMU, "page faults"),
    ("nochain", Items::NOCHAIN, "do not jump from block to block directly"),
    ("counters", Items::COUNTERS, "what each vCPU has counted, when it ends"),
];

/// Logging options.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What.
    pub items: Items,
    /// Where; standard error if none.
    pub file: Option<PathBuf>,
    /// Only blocks whose pc lies in one of these; all if empty.
    pub filter: Vec<RangeInclusive<u64>>,
}

impl Options {
    /// Whether each executed block must pass through the loop.
    pub fn needs_every_block(&self) -> bool {
        self.items.intersects(Items::CPU | Items::EXEC | Items::NOCHAIN)
    }
}

static ITEMS: AtomicU32 = AtomicU32::new(0);
static HOLD: AtomicBool = AtomicBool::new(false);
static SINK: OnceLock<Mutex<Box<dyn Write + Send>>> = OnceLock::new();
static FILTER: OnceLock<Vec<RangeInclusive<u64>>> = OnceLock::new();

/// Opens the log. Process-wide; the first call with items counts.
pub fn init(o: &Options) -> Result<()> {
    if o.items.is_empty() {
        return Ok(());
    }
    let sink: Box<dyn Write + Send> = match &o.file {
        None => Box::new(std::io::stderr()),
        Some(p) => Box::new(std::io::BufWriter::new(std::fs::File::create(p).map_err(|e| {
            Error::new(format!("cannot write the log file {}", p.display()))
                .caused_by(e)
                .remedy("choose another file with -D")
        })?)),
    };
    let _ = SINK.set(Mutex::new(sink));
    let _ = FILTER.set(o.filter.clone());
    ITEMS.store(o.items.bits(), Ordering::Release);
    Ok(())
}

/// Writes out what is buffered.
pub fn flush() {
    if let Some(s) = SINK.get() {
        let _ = s.lock().unwrap().flush();
    }
}

/// Whether any of these items is logged.
pub fn on(items: Items) -> bool {
    ITEMS.load(Ordering::Relaxed) & items.bits() != 0
}

fn filtered(pc: u64) -> bool {
    let passes = FILTER.get().is_none_or(|f| f.is_empty() || f.iter().any(|r| r.contains(&pc)));
    HOLD.store(!passes, Ordering::Relaxed);
    passes
}

fn write(text: &str) {
    if let Some(s) = SINK.get() {
        // A log that cannot be written must not stop the guest.
        let _ = s.lock().unwrap().write_all(text.as_bytes());
    }
}

/// Adds a line if one of `items` is on.
pub fn line(items: Items, text: impl FnOnce() -> String) {
    if on(items) {
        write(&format!("{}\n", text()));
    }
}

fn disassemble(out: &mut String, bitness: u32, ip: u64, bytes: &[u8]) {
    let mut f = NasmFormatter::new();
    let mut d = Decoder::with_ip(bitness, bytes, ip, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while d.can_decode() {
        d.decode_out(&mut insn);
        let at = (insn.ip() - ip) as usize;
        let mut text = String::new();
        f.format(&insn, &mut text);
        let _ = write!(out, "0x{:08x}:  ", insn.ip());
        let raw = &bytes[at..(at + insn.len()).min(bytes.len())];
        let hex: Vec<String> = raw.iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(out, "{:<30} {text}", hex.join(" "));
    }
}

/// Whether the next [`optimised`] block is logged.
pub fn wants_optimised() -> bool {
    on(Items::OP_OPT) && !HOLD.load(Ordering::Relaxed)
}

/// A block has been translated; `vpage_of` gives the virtual page of a physical one.
pub fn translated(
    env: &Env,
    key: TbKey,
    vpage_of: impl Fn(u64) -> u64,
    ranges: &[Range],
    block: &Block,
) {
    if !on(Items::IN_ASM | Items::OP | Items::OP_OPT | Items::OUT_ASM) || !filtered(key.rip) {
        return;
    }
    let mut out = String::new();
    if on(Items::IN_ASM) {
        let mode = Mode::from_bits_retain(key.mode);
        let bitness = match () {
            () if mode.contains(Mode::CODE64) => 64,
            () if mode.contains(Mode::CODE32) => 32,
            () => 16,
        };
        let _ = writeln!(out, "----------------\nIN: cs_base={:#x} {mode:?}", key.cs_base);
        for r in ranges {
            let vpage = vpage_of(r.gpa & !PAGE_MASK);
            let ip = (vpage | r.gpa & PAGE_MASK).wrapping_sub(key.cs_base);
            let mut bytes = vec![0; r.len as usize];
            if let Some(m) = phys::find(&env.vcpu().ram(), r.gpa) {
                let p = (m.host as u64 + (r.gpa - m.gpa)) as *const u8;
                // SAFETY: the range lies inside one page of the region.
                unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), bytes.len()) };
            }
            disassemble(&mut out, bitness, ip, &bytes);
        }
    }
    if on(Items::OP) {
        let _ = writeln!(out, "OP:\n{}", block.listing(Some(&env.vcpu().target)));
    }
    write(&out);
}

/// A block has been optimised.
pub fn optimised(block: &Block, target: &Target) {
    if wants_optimised() {
        write(&format!("OP after optimisation:\n{}\n", block.listing(Some(target))));
    }
}

/// A block has been compiled.
pub fn compiled(tbs: &TbCache, c: &Compiled) {
    if !on(Items::OUT_ASM) || HOLD.load(Ordering::Relaxed) {
        return;
    }
    let bytes = tbs.backend.code_bytes(c.range.clone());
    let mut out = format!("OUT: [size={}]\n", bytes.len());
    disassemble(&mut out, 64, c.range.start, &bytes);
    write(&out);
}

/// A block is about to be entered from the loop.
pub fn enter(env: &Env, found: &Found) {
    if !on(Items::CPU | Items::EXEC) || !filtered(env.cpu.rip) {
        return;
    }
    if on(Items::EXEC) {
        write(&format!(
            "Trace {}: {:#x} [{:016x}/{:08x}]\n",
            env.vcpu().index,
            found.checked.0,
            env.cpu.rip,
            env.core.mode
        ));
    }
    if on(Items::CPU) {
        write(&registers(env));
    }
}

/// A vCPU ends.
pub fn ended(vcpu: &Vcpu) {
    line(Items::COUNTERS, || {
        let mut text = format!("vCPU {} counted:", vcpu.index);
        for (name, n) in vcpu.counters.list() {
            let _ = write!(text, "\n  {n:>12} {name}");
        }
        let c = &vcpu.tbs.counters;
        for (name, n) in [("translations", &c.translations), ("insns", &c.insns)] {
            let _ = write!(text, "\n  {:>12} {name}", n.load(Ordering::Relaxed));
        }
        text
    });
    flush();
}

/// An exception is about to be delivered.
pub fn exception(env: &Env, e: &Exception) {
    line(Items::INT, || {
        format!(
            "v={:02x} e={:04x} cpl={} IP={:04x}:{:016x} SP={:04x}:{:016x} CR2={:016x}",
            e.vector,
            e.error.unwrap_or(0),
            env.cpu.cpl(),
            env.cpu.seg[1].selector,
            env.cpu.rip,
            env.cpu.seg[2].selector,
            env.cpu.gpr[4],
            e.addr.unwrap_or(env.cpu.cr2),
        )
    });
}

/// The registers as text.
pub fn registers(env: &Env) -> String {
    const GPR: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12",
        "R13", "R14", "R15",
    ];
    const SEG: [&str; 8] = ["ES ", "CS ", "SS ", "DS ", "FS ", "GS ", "LDT", "TR "];
    let c = &env.cpu;
    let mut s = String::new();
    for (i, name) in GPR.iter().enumerate() {
        let _ = write!(s, "{name}={:016x}{}", c.gpr[i], if i % 4 == 3 { '\n' } else { ' ' });
    }
    let _ = writeln!(
        s,
        "RIP={:016x} RFL={:08x} CPL={} HLT={}",
        c.rip,
        env.eflags(),
        c.cpl(),
        u8::from(c.halted)
    );
    for (i, name) in SEG.iter().enumerate() {
        let g = &c.seg[i];
        let base = if i < 6 { c.seg_base[i] } else { g.base };
        let _ =
            writeln!(s, "{name} ={:04x} {base:016x} {:08x} {:05x}", g.selector, g.limit, g.attr);
    }
    let _ = writeln!(s, "GDT=     {:016x} {:04x}", c.gdtr.base, c.gdtr.limit);
    let _ = writeln!(s, "IDT=     {:016x} {:04x}", c.idtr.base, c.idtr.limit);
    let _ = writeln!(
        s,
        "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x} EFER={:016x}",
        c.cr0, c.cr2, c.cr3, c.cr4, c.efer
    );
    s
}
