//! Random bytes executed in every mode and ring on a whole translated processor: `scripts/fuzz-garbage`
//! runs this. Whatever they do, the processor must neither panic nor touch what is not the guest's, and
//! must stop when it is told to.
//!
//! Exceptions and interrupts lead into the random bytes too, page tables, descriptor tables and task
//! state are there for them to break, and ports and addresses without RAM have nothing behind them.

use super::fuzz::{mark, variable, watch_over};
use crate::processor::{CODE_TYPE, DATA_TYPE, Processor, RAM, descriptor};
use crate::rng::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tandem_accel::vcpu::{StopReason, VcpuExit, VcpuRunner};
use tandem_accel::x86::{ATTR_DB, ATTR_G, ATTR_L, ATTR_P, Segment, TableReg, X86State, seg};
use tandem_tcg::BackendKind;
use tandem_tcg::x86::features::Features;

// Guest physical addresses; below 0x40000 is what a round starts from each time.
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x4000;
/// PML4, PDPT and page directory; a page directory and table of 32-bit paging.
const TABLES: u64 = 0x1_0000;
const TABLES32: u64 = 0x1_4000;
const LOW: usize = 0x1_8000;
/// Where a HLT is for the exceptions of rounds that end with the first.
const HALT: u64 = 0x3000;
/// Starts in one set of random bytes.
const STARTS_PER_ROUND: u64 = 256;
const CODE: u64 = 0x4_0000;
const CODE_LEN: usize = 0x4000;
/// Microseconds after which a start is told to stop.
const LONGEST: i64 = 50;
/// Seconds in which it must have stopped, however busy the host is.
const UNSTOPPABLE: u64 = 120;

/// What a kick sets, for the signal handler of the timer.
static EXIT_REQUEST: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static KICKED: AtomicPtr<AtomicBool> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_timer(_: libc::c_int) {
    let (kicked, request) = (KICKED.load(Ordering::Relaxed), EXIT_REQUEST.load(Ordering::Relaxed));
    // SAFETY: both point into the machine of the test, which lives to its end; they are atomics.
    unsafe {
        (*kicked).store(true, Ordering::Release);
        (*request).store(1, Ordering::Release);
    }
}

/// Makes a kick come after this many microseconds, or none.
fn set_timer(microseconds: i64) {
    let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let t = libc::itimerval {
        it_interval: none,
        it_value: libc::timeval { tv_usec: microseconds, ..none },
    };
    // SAFETY: `t` is what the call wants.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &t, std::ptr::null_mut()) };
}

const USER: u32 = 3 << 5;

fn put(low: &mut [u8], at: u64, v: u64) {
    low[at as usize..at as usize + 8].copy_from_slice(&v.to_le_bytes());
}

/// Flat descriptors by selector: ring 0 and 3, 16, 32 and 64 bits.
const FLAT: [(u16, u32); 8] = [
    (0x08, CODE_TYPE | ATTR_G | ATTR_DB),
    (0x10, DATA_TYPE | ATTR_G | ATTR_DB),
    (0x1b, CODE_TYPE | ATTR_G | ATTR_DB | USER),
    (0x23, DATA_TYPE | ATTR_G | ATTR_DB | USER),
    (0x28, CODE_TYPE | ATTR_G | ATTR_L),
    (0x33, CODE_TYPE | ATTR_G | ATTR_L | USER),
    (0x38, CODE_TYPE | ATTR_G),
    (0x43, CODE_TYPE | ATTR_G | USER),
];

/// How a round starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Start {
    Real,
    V86,
    /// Code size 16 or 32, with or without paging.
    Protected(u32, bool),
    Long,
    Compatibility,
}

const STARTS: [Start; 8] = [
    Start::Real,
    Start::V86,
    Start::Protected(16, false),
    Start::Protected(32, false),
    Start::Protected(32, true),
    Start::Long,
    Start::Long,
    Start::Compatibility,
];

/// Low memory: descriptor tables, gates into the random bytes, task state, page tables.
fn low_memory(rng: &mut Rng, start: Start, halts: bool) -> Vec<u8> {
    let mut low = vec![0; LOW];
    low[HALT as usize] = 0xf4;
    let somewhere = |rng: &mut Rng| CODE + rng.below(CODE_LEN as u64);
    for (s, attr) in FLAT {
        put(&mut low, GDT + u64::from(s & !7), descriptor(0, 0xf_ffff, attr));
    }
    let tss = 0x2fff | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
    put(&mut low, GDT + 0x48, tss);
    let long = matches!(start, Start::Long | Start::Compatibility);
    for v in 0..256 {
        let to = if halts { HALT } else { somewhere(rng) };
        let ring = if rng.one_in(2) { 0xe0 } else { 0x80 };
        if start == Start::Real {
            let to = (to & 0xf) | (to >> 4) << 16;
            low[4 * v as usize..4 * v as usize + 4].copy_from_slice(&(to as u32).to_le_bytes());
        } else if long {
            put(
                &mut low,
                IDT + 16 * v,
                to & 0xffff | 0x28 << 16 | (0xe | ring) << 40 | to >> 16 << 48,
            );
        } else {
            let kind = rng.pick(&[0xe, 0xf, 0xe, 6, 5]);
            put(
                &mut low,
                IDT + 8 * v,
                to & 0xffff | 8 << 16 | (kind | ring) << 40 | to >> 16 << 48,
            );
        }
    }
    // Stack pointers of ring 0, with SS0 where the format has it.
    put(&mut low, TSS + 4, if long { 0x3f000 } else { 0x10 << 32 | 0x3f000 });
    put(&mut low, TABLES, (TABLES + 0x1000) | 7);
    put(&mut low, TABLES + 0x1000, (TABLES + 0x2000) | 7);
    put(&mut low, TABLES + 0x2000, 0x87);
    let page32 = |low: &mut Vec<u8>, at: u64, v: u64| {
        low[at as usize..at as usize + 4].copy_from_slice(&(v as u32).to_le_bytes());
    };
    page32(&mut low, TABLES32, (TABLES32 + 0x1000) | 7);
    for i in 0..256 {
        page32(&mut low, TABLES32 + 0x1000 + 4 * i, i << 12 | 7);
    }
    low
}

fn state(rng: &mut Rng, start: Start, features: &Features) -> X86State {
    let mut s = X86State::default();
    for r in &mut s.gpr {
        *r = match rng.below(3) {
            0 => rng.value(),
            1 => rng.below(RAM),
            _ => CODE + rng.below(CODE_LEN as u64),
        };
    }
    s.gpr[4] = 0x3_8000 + rng.below(0x1000);
    s.rip = CODE + rng.below(CODE_LEN as u64);
    // Not single-stepping from the start.
    s.rflags = rng.bits() & 0x24_7ed5 | 2;
    s.gdtr = TableReg { base: GDT, limit: 0x4f };
    s.fpu.fcw = 0x37f;
    if start == Start::Real {
        s.idtr = TableReg { base: 0, limit: 0x3ff };
        s.seg[seg::CS] = Segment { selector: 0x4000, base: CODE, limit: 0xffff, attr: CODE_TYPE };
        s.rip &= 0x3fff;
        s.seg[seg::SS].selector = 0x3000;
        s.seg[seg::SS].base = 0x3_0000;
        s.cr4 = if rng.one_in(2) { 0x600 } else { 0 };
        return s;
    }
    let user = rng.one_in(2) || start == Start::V86;
    s.idtr = TableReg { base: IDT, limit: 0xfff };
    s.cr0 = 0x11 | if rng.one_in(4) { rng.bits() & 0x5_002e } else { 0x2 };
    s.cr4 = 0x600 | rng.bits() & features.cr4 & !(1 << 5 | 1 << 17);
    s.xcr0 = if s.cr4 & 1 << 18 != 0 && !rng.one_in(4) { features.xcr0 } else { 1 };
    let (data, dpl) = if user { (0x23, USER) } else { (0x10, 0) };
    for i in 0..6 {
        s.seg[i] = Segment::flat(data, DATA_TYPE | ATTR_G | ATTR_DB | dpl);
    }
    s.seg[seg::TR] = Segment { selector: 0x48, base: TSS, limit: 0x2fff, attr: ATTR_P | 0xb };
    let (code, attr) = match (start, user) {
        (Start::Long, false) => (0x28, ATTR_L),
        (Start::Long, true) => (0x33, ATTR_L),
        (Start::Protected(16, _), false) => (0x38, 0),
        (Start::Protected(16, _), true) => (0x43, 0),
        (_, false) => (0x08, ATTR_DB),
        (_, true) => (0x1b, ATTR_DB),
    };
    s.seg[seg::CS] = Segment::flat(code, CODE_TYPE | ATTR_G | attr | dpl);
    match start {
        Start::Protected(_, true) => {
            s.cr0 |= 1 << 31;
            s.cr3 = TABLES32;
        }
        Start::Long | Start::Compatibility => {
            s.cr0 |= 1 << 31;
            s.cr4 |= 1 << 5;
            s.cr3 = TABLES;
            s.efer = 0xd01;
        }
        Start::V86 => {
            s.rflags |= 1 << 17;
            for i in 0..6 {
                let selector = if i == seg::CS { 0x4000 } else { 0x3000 };
                let base = u64::from(selector) << 4;
                s.seg[i] = Segment { selector, base, limit: 0xffff, attr: 0xf3 };
            }
            s.rip &= 0x3fff;
        }
        _ => {}
    }
    s
}

/// Random bytes, with the prefixes and escapes of the larger opcode maps more often than by chance.
fn fill(rng: &mut Rng, code: &mut [u8]) {
    const LEADS: [u8; 12] =
        [0x0f, 0x0f, 0x0f, 0x62, 0xc4, 0xc5, 0x66, 0xf2, 0xf3, 0x48, 0xd9, 0xf0];
    for chunk in code.chunks_mut(8) {
        chunk.copy_from_slice(&rng.bits().to_le_bytes()[..chunk.len()]);
        if rng.one_in(3) {
            let at = rng.below(chunk.len() as u64) as usize;
            chunk[at] = rng.pick(&LEADS);
        }
    }
}

struct Machine {
    cpu: Processor,
}

impl Machine {
    /// Runs round `n`.
    fn round(&mut self, seed: u64, n: u64, starts: &AtomicU64) {
        let mut rng =
            Rng::new(seed.wrapping_mul(0x1_0000_0001).wrapping_add(n.wrapping_mul(0x9e37)));
        let start = rng.pick(&STARTS);
        // Most exceptions would lead around in circles.
        let halts = !rng.one_in(6);
        let low = low_memory(&mut rng, start, halts);
        let mut code = vec![0; CODE_LEN];
        fill(&mut rng, &mut code);
        self.cpu.write(CODE, &code);
        self.cpu.written(0, RAM);
        for _ in 0..if halts { STARTS_PER_ROUND } else { 1 } {
            starts.fetch_add(1, Ordering::Relaxed);
            self.cpu.write(0, &low);
            self.start(&mut rng, start);
        }
    }

    fn start(&mut self, rng: &mut Rng, start: Start) {
        let s = state(rng, start, &self.cpu.features);
        if let Err(e) = self.cpu.runner.set_state(&s) {
            panic!("{start:?}: {e}");
        }
        set_timer(LONGEST);
        let exit = self.cpu.runner.run();
        set_timer(0);
        match exit {
            VcpuExit::Kicked | VcpuExit::Halted | VcpuExit::TurnOver => {}
            VcpuExit::Stop(StopReason::TripleFault | StopReason::Debug) => {}
            VcpuExit::Stop(StopReason::AccelError(e)) => panic!("{start:?}: {e}"),
        }
    }
}

/// `GARBAGE_BLOCKS`: how many blocks to translate and run. `FUZZ_SEED`: which bytes. `FUZZ_ONLY`: just
/// this round.
#[test]
#[ignore = "a campaign: scripts/fuzz-garbage"]
fn garbage() {
    let seed = variable("FUZZ_SEED").unwrap_or(1);
    let blocks = variable("GARBAGE_BLOCKS").unwrap_or(100_000);
    let only = variable("FUZZ_ONLY");
    watch_over();
    let mut m = Machine { cpu: Processor::new(BackendKind::Jit, 16) };
    KICKED.store((&raw const m.cpu.bell.kicked).cast_mut(), Ordering::Relaxed);
    let request = &raw const m.cpu.runner.env().core.exit_request;
    EXIT_REQUEST.store(request.cast_mut(), Ordering::Relaxed);
    // SAFETY: the handler keeps to what handlers may do.
    unsafe { libc::signal(libc::SIGALRM, on_timer as *const () as usize) };
    let (starts, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let watchdog = {
        let (starts, done) = (starts.clone(), done.clone());
        std::thread::spawn(move || {
            let mut last = (u64::MAX, Instant::now());
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let this = starts.load(Ordering::Relaxed);
                if this != last.0 {
                    last = (this, Instant::now());
                } else if last.1.elapsed().as_secs() > UNSTOPPABLE {
                    eprintln!("start {this} cannot be stopped");
                    std::process::abort();
                }
            }
        })
    };
    let begin = Instant::now();
    let translated = |m: &Machine| m.cpu.accel.tbs().counters.translations.load(Ordering::Relaxed);
    let (mut n, mut said) = (0, Instant::now());
    while translated(&m) < blocks {
        let this = only.unwrap_or(n);
        n += 1;
        mark(this);
        m.round(seed, this, &starts);
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            eprintln!("{n} rounds, {} blocks", translated(&m));
        }
        if only.is_some() {
            break;
        }
    }
    done.store(true, Ordering::Relaxed);
    watchdog.join().expect("the watchdog ends");
    eprintln!(
        "seed {seed}: {} blocks of random bytes in {n} rounds in {} s; none broke out",
        translated(&m),
        begin.elapsed().as_secs()
    );
}
