//! How fast guest code is translated: `cargo bench -p tandem-tcg --bench translate -- FILE…`
//!
//! The code of ELF files (a kernel, a library, a program) is put into the memory of
//! a guest in long mode, each with page tables of its own: what lies in the upper half of the
//! address space runs at ring 0, all else at ring 3. Blocks all over the text are then asked for
//! just as generated code asks for a block that it jumps to and that does not exist yet: page walk,
//! look-up, decoding, IR, passes, host code, entry into the block table and the jump cache. Every
//! run begins with a new machine, so that the first touch of code memory and tables counts too.
//!
//! Time is this thread's processor time; of several runs the median counts. The stages are measured
//! one behind the other on the same blocks.

use std::sync::Arc;
use tandem_accel::AccelOps;
use tandem_accel::bus::IoBus;
use tandem_accel::clock::Clock;
use tandem_accel::memory::{GuestMap, RegionKind};
use tandem_accel::vcpu::{StopReason, VcpuEvents, VcpuSpec};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, Segment as SegmentRegister, X86State, seg,
};
use tandem_jit::code::ExitRef;
use tandem_jit::ir::Block;
use tandem_jit::opt::Passes;
use tandem_tcg::exec::{Runner, lookup_from_code};
use tandem_tcg::softmmu::PAGE_SIZE;
use tandem_tcg::x86::cpuid;
use tandem_tcg::x86::exception::Exception;
use tandem_tcg::x86::mode::Mode;
use tandem_tcg::x86::translate::{CodeFetch, FrontEnd, Gate, Limits, TbKey};
use tandem_tcg::{TcgAccel, TcgOptions};

/// Measured runs of each stage; the median counts.
const RUNS: usize = 5;
/// About this many instructions are translated of each file.
const INSNS: u64 = 200_000;
/// Pages at a time that blocks are taken from.
const STRETCH: u64 = 16 * PAGE_SIZE;
/// Size of the pages that text is mapped with.
const BIG_PAGE: u64 = 2 << 20;
/// INT3.
const INT3: u8 = 0xcc;
/// Where text is in guest memory; its page tables are below.
const TEXT: u64 = BIG_PAGE;
/// Where position-independent text is in the address space.
const BIAS: u64 = 0x7f12_3460_0000;

/// Text of a file.
struct Text {
    name: String,
    bytes: Vec<u8>,
    /// Linear address.
    at: u64,
}

impl Text {
    /// The code of an ELF file (ELF-64 object file format, version 1.5).
    fn load(path: &str) -> Result<Text, String> {
        let elf = std::fs::read(path).map_err(|e| format!("cannot read {path}: {e}"))?;
        let (at, bytes) = text_section(&elf)
            .or_else(|| executable_segment(&elf))
            .ok_or(format!("{path} is no 64-bit ELF file with code"))?;
        // What has no address of its own gets one like Linux's.
        let at = if at < BIG_PAGE { at + BIAS } else { at };
        let name = path.rsplit('/').next().unwrap_or(path).to_string();
        Ok(Text { name, bytes: bytes.to_vec(), at })
    }

    fn is_kernel(&self) -> bool {
        self.at >> 63 != 0
    }
}

fn word(elf: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?))
}

fn half(elf: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?).into())
}

/// The largest section with instructions: a segment may hold read-only data too, as a kernel's does,
/// which is no code that anybody jumps to.
fn text_section(elf: &[u8]) -> Option<(u64, &[u8])> {
    elf.strip_prefix(b"\x7fELF\x02\x01")?;
    let (table, size) = (word(elf, 0x28)? as usize, half(elf, 0x3a)?);
    (0..half(elf, 0x3c)?)
        .filter_map(|i| {
            let header = table + i * size;
            // SHT_PROGBITS with SHF_EXECINSTR.
            let kind = word(elf, header)? >> 32;
            if kind != 1 || word(elf, header + 0x8)? & 4 == 0 {
                return None;
            }
            let (offset, len) = (word(elf, header + 0x18)?, word(elf, header + 0x20)?);
            let bytes = elf.get(offset as usize..)?.get(..len as usize)?;
            Some((word(elf, header + 0x10)?, bytes))
        })
        .max_by_key(|(_, bytes)| bytes.len())
}

/// The first segment that is executable, for files without sections.
fn executable_segment(elf: &[u8]) -> Option<(u64, &[u8])> {
    elf.strip_prefix(b"\x7fELF\x02\x01")?;
    let (table, size) = (word(elf, 0x20)? as usize, half(elf, 0x36)?);
    for header in (0..half(elf, 0x38)?).map(|i| table + i * size) {
        // PT_LOAD with PF_X.
        let kind = word(elf, header)?;
        if kind as u32 == 1 && kind >> 32 & 1 != 0 {
            let (offset, len) = (word(elf, header + 0x8)?, word(elf, header + 0x20)?);
            let bytes = elf.get(offset as usize..)?.get(..len as usize)?;
            return Some((word(elf, header + 0x10)?, bytes));
        }
    }
    None
}

impl CodeFetch for &Text {
    fn fetch(&mut self, linear: u64, buf: &mut [u8]) -> Result<usize, Exception> {
        let from = linear.wrapping_sub(self.at) as usize;
        let bytes = self.bytes.get(from..).filter(|b| !b.is_empty()).ok_or(Exception::gp(0))?;
        let n = bytes.len().min(buf.len()).min((PAGE_SIZE - linear % PAGE_SIZE) as usize);
        buf[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }
}

struct NoEvents;
impl VcpuEvents for NoEvents {
    fn stopped(&self, _: u32, _: StopReason) {}
}

/// A processor with a text in its memory.
struct Machine {
    accel: Arc<TcgAccel>,
    runner: Runner,
    _map: Arc<GuestMap>,
}

impl Machine {
    fn new(text: &Text) -> Machine {
        let offset = text.at % BIG_PAGE;
        let size = (TEXT + offset + text.bytes.len() as u64).next_multiple_of(BIG_PAGE);
        let map = GuestMap::new();
        let ram = map.add("ram", RegionKind::Ram, 0, size).expect("guest memory");
        assert!(ram.load(TEXT + offset, &text.bytes));
        // PML4, PDPT and page directory, at one, two and three pages.
        let mut entries = vec![(0x1000, 39, 0x2000 | 7), (0x2000, 30, 0x3000 | 7)];
        let pages = (size - TEXT) / BIG_PAGE;
        // A page directory must do: texts are smaller than what is left of their gigabyte.
        let user = if text.is_kernel() { 0 } else { 4 };
        entries
            .extend((0..pages).map(|i| (0x3000 + 8 * i, 21, (TEXT + i * BIG_PAGE) | 0x83 | user)));
        for (table, shift, entry) in entries {
            let index = text.at >> shift & 511;
            assert!(ram.load(table + 8 * index, &u64::to_le_bytes(entry)));
        }
        let clock = Clock::new();
        let accel = TcgAccel::new(TcgOptions::default(), clock).expect("an accelerator");
        accel.attach_memory(&map).expect("guest memory");
        let spec = VcpuSpec {
            index: 0,
            apic_id: 0,
            cpuid: Arc::new(cpuid::supported()),
            tsc_hz: accel.tsc_hz(),
            bus: Arc::new(IoBus::default()),
            intc: None,
            state: Box::new(long_mode(text.is_kernel())),
            events: Arc::new(NoEvents),
        };
        let (runner, _) = accel.runner(&spec).expect("a vCPU");
        Machine { accel, runner, _map: map }
    }
}

/// 64-bit mode at ring 0 or 3 as Linux sets it up, page tables at 1000h.
fn long_mode(kernel: bool) -> X86State {
    let dpl = if kernel { 0 } else { 3 };
    let code = ATTR_P | ATTR_S | 0xb | ATTR_G | ATTR_L | dpl << 5;
    let data = ATTR_P | ATTR_S | 0x3 | ATTR_G | ATTR_DB | dpl << 5;
    let mut s = X86State {
        // PE, MP, ET, NE, WP, AM, PG; PAE, MCE, PGE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE; SCE, LME,
        // LMA, NX.
        cr0: 0x8005_0033,
        cr4: 0x5_06e0,
        efer: 0xd01,
        cr3: 0x1000,
        xcr0: 7,
        rflags: 0x202,
        ..X86State::default()
    };
    s.seg[..6].fill(SegmentRegister::flat(0x18 | dpl as u16, data));
    s.seg[seg::CS] = SegmentRegister::flat(0x10 | dpl as u16, code);
    s
}

/// Blocks in stretches all over the text, and how many instructions they have.
fn find_blocks(text: &Text) -> (Vec<TbKey>, u64) {
    let mut machine = Machine::new(text);
    let env = machine.runner.env();
    let mode = Mode::from_bits_retain(env.core.mode);
    let mut front = FrontEnd::new(Gate::of(&env.vcpu().cpuid));
    let (mut fetch, mut block) = (text, Block::default());
    let (mut blocks, mut insns) = (Vec::new(), 0);
    let len = text.bytes.len() as u64;
    // An instruction has some four bytes.
    let step = STRETCH * (len / (4 * INSNS)).max(1);
    for stretch in (0..len.saturating_sub(STRETCH)).step_by(step as usize) {
        let mut rip = text.at + stretch;
        // Not up to the end, so that all can be fetched.
        let end = rip + STRETCH - PAGE_SIZE;
        while rip < end {
            if text.bytes[(rip - text.at) as usize] == INT3 {
                // Padding between functions.
                rip += 1;
                continue;
            }
            let key = TbKey { rip, cs_base: 0, mode };
            let made = front.translate(&mut fetch, key, Limits::default(), &mut block);
            let made = made.expect("inside the text");
            blocks.push(key);
            insns += u64::from(made.insns);
            // On behind the block's first piece: what follows a jump is another block.
            rip += u64::from(made.ranges()[0].len.max(1));
        }
    }
    (blocks, insns)
}

/// Processor time of this thread: the machine may be busy.
fn cpu_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// How far blocks are translated.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Stage {
    FrontEnd,
    Passes,
    Code,
    Whole,
}

const STAGES: [(Stage, &str); 4] = [
    (Stage::FrontEnd, "decode and IR"),
    (Stage::Passes, "+ passes"),
    (Stage::Code, "+ host code"),
    (Stage::Whole, "whole pipeline"),
];

/// Seconds to translate the blocks up to a stage, in a new machine; and the bytes of code made.
fn measure(text: &Text, blocks: &[TbKey], stage: Stage) -> (f64, usize) {
    let mut machine = Machine::new(text);
    let env = machine.runner.env();
    let tbs = env.vcpu().tbs.clone();
    let start;
    if stage == Stage::Whole {
        start = cpu_seconds();
        for key in blocks {
            assert_ne!(
                lookup_from_code(env, key.rip, ExitRef::NONE),
                0,
                "no block at {:#x}",
                key.rip
            );
        }
    } else {
        let target = env.vcpu().target.clone();
        let mut front = FrontEnd::new(Gate::of(&env.vcpu().cpuid));
        let (mut fetch, mut block) = (text, Block::default());
        let (mut passes, mut compiler) = (Passes::default(), tbs.backend.compiler());
        start = cpu_seconds();
        for &key in blocks {
            let made = front.translate(&mut fetch, key, Limits::default(), &mut block);
            made.expect("inside the text");
            if stage >= Stage::Passes {
                passes.run(&mut block, &target);
            }
            if stage >= Stage::Code {
                compiler.compile(&block, 1).expect("enough code memory");
            }
        }
    }
    let seconds = cpu_seconds() - start;
    assert!(machine.accel.counters().contains(&("code_flushes", 0)), "code memory was full");
    (seconds, tbs.backend.usage().0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run(paths: &[String], stages: &[(Stage, &str)], runs: usize) -> Result<(), String> {
    let texts = paths.iter().map(|p| Text::load(p)).collect::<Result<Vec<_>, _>>()?;
    let found: Vec<_> = texts.iter().map(find_blocks).collect();
    let mut times = vec![vec![Vec::new(); texts.len()]; stages.len()];
    let mut code = vec![0; texts.len()];
    // Stages and files in turn, so that what else the machine does slows all of them.
    for _ in 0..runs {
        for (s, (stage, _)) in stages.iter().enumerate() {
            for (t, (text, (blocks, _))) in texts.iter().zip(&found).enumerate() {
                let (seconds, bytes) = measure(text, blocks, *stage);
                times[s][t].push(seconds);
                code[t] = bytes;
            }
        }
    }
    print!("{:32}", "million instructions a second");
    texts.iter().for_each(|t| print!("{:>16}", t.name));
    println!("{:>16}", "all");
    for (s, (_, name)) in stages.iter().enumerate() {
        print!("{name:32}");
        let medians: Vec<f64> = times[s].drain(..).map(median).collect();
        for (seconds, (_, insns)) in medians.iter().zip(&found) {
            print!("{:16.2}", *insns as f64 / seconds / 1e6);
        }
        let all: u64 = found.iter().map(|f| f.1).sum();
        println!("{:16.2}", all as f64 / medians.iter().sum::<f64>() / 1e6);
    }
    print!("{:32}", "instructions per block");
    found.iter().for_each(|(b, insns)| print!("{:16.1}", *insns as f64 / b.len() as f64));
    print!("\n{:32}", "bytes of code per instruction");
    code.iter().zip(&found).for_each(|(c, (_, n))| print!("{:16.1}", *c as f64 / *n as f64));
    println!();
    Ok(())
}

fn main() {
    // Cargo says --bench.
    let (options, paths): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|a| a.starts_with('-'));
    // For profilers, quick and slow ones.
    let whole = options.iter().any(|o| o == "--whole");
    let runs = if options.iter().any(|o| o == "--once") { 1 } else { RUNS };
    let stages = if whole { &STAGES[3..] } else { &STAGES };
    if paths.is_empty() {
        println!("nothing measured: no files given");
    } else if let Err(e) = run(&paths, stages, runs) {
        eprintln!("{e}");
        std::process::exit(1);
    }
}
