//! Random programs, for as long as asked: `scripts/fuzz-isa` runs this.

use super::compare::{Lab, Verdict};
use super::generate::{self, Pools};
use super::shrink;
use crate::rng::Rng;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A number from the environment.
pub fn variable(name: &str) -> Option<u64> {
    let v = std::env::var(name).ok()?;
    let n = v.strip_prefix("0x").map_or_else(|| v.parse(), |h| u64::from_str_radix(h, 16));
    Some(n.unwrap_or_else(|_| panic!("{name} is not a number: {v}")))
}

/// Seconds of processor time after which a program, or the search for a smaller one, hangs.
const HANGS: libc::time_t = 60;
/// The program that runs.
static NOW: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(sig: libc::c_int) {
    let mut text = *b"program 00000000000000000000 ends with signal 00\n";
    let mut n = NOW.load(Ordering::Relaxed);
    for digit in text[8..28].iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        n /= 10;
    }
    text[46] = b'0' + (sig / 10) as u8;
    text[47] = b'0' + (sig % 10) as u8;
    // SAFETY: all may be called from signal handlers.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::signal(libc::SIGABRT, libc::SIG_DFL);
        libc::abort();
    }
}

/// Says that program `n` runs from now on.
pub fn mark(n: u64) {
    NOW.store(n, Ordering::Relaxed);
}

/// The same; if it does not end for long, the process does.
fn now(n: u64) {
    mark(n);
    // Of processor time: a busy host must not look like a hang.
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let after = libc::timeval { tv_sec: HANGS, tv_usec: 0 };
    let timer = libc::itimerval { it_interval: zero, it_value: after };
    // SAFETY: a timer, whose handler ends the process.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut()) };
}

/// Makes the process say which program it was if a signal ends it: hung (SIGPROF), or broken out.
pub fn watch_over() {
    for sig in [libc::SIGPROF, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGABRT] {
        // SAFETY: the handler keeps to what handlers may do.
        unsafe { libc::signal(sig, on_signal as *const () as usize) };
    }
}

/// Program `n` of the run with this seed.
fn program(seed: u64, n: u64, pools: &[Pools; 4]) -> Option<super::program::Program> {
    let mut rng = Rng::new(seed.wrapping_mul(0x1_0000_0001).wrapping_add(n.wrapping_mul(0x9e37)));
    for _ in 0..4 {
        rng.bits();
    }
    let pools = &pools[rng.below(4) as usize];
    generate::program(&mut rng, pools)
}

/// `FUZZ_SECONDS`: how long. `FUZZ_SEED`: which programs. `FUZZ_ONLY`: just this one. `FUZZ_KEEP`:
/// differences after which to stop (1).
#[test]
#[ignore = "a campaign: scripts/fuzz-isa"]
fn fuzz() {
    let seed = variable("FUZZ_SEED").unwrap_or(1);
    let time = Duration::from_secs(variable("FUZZ_SECONDS").unwrap_or(10));
    let only = variable("FUZZ_ONLY");
    let keep = variable("FUZZ_KEEP").unwrap_or(1);
    // Half of the programs are 64-bit code.
    let pools = [Pools::new(64), Pools::new(64), Pools::new(32), Pools::new(16)];
    watch_over();
    let mut lab = Lab::new();
    let start = Instant::now();
    let (mut n, mut programs, mut instructions, mut differences) = (0u64, 0u64, 0u64, 0u64);
    let mut said = Instant::now();
    while start.elapsed() < time && differences < keep {
        let this = only.unwrap_or(n);
        n += 1;
        let Some(p) = program(seed, this, &pools) else { continue };
        if std::env::var_os("FUZZ_TRACE").is_some() {
            eprintln!("{this}: {}", shrink::line(&p));
        }
        now(this);
        match lab.judge(&p) {
            Verdict::Same(done) => {
                programs += 1;
                instructions += done as u64;
            }
            Verdict::Useless => {}
            Verdict::Different(first) => {
                differences += 1;
                eprintln!("program {this} of seed {seed}: {first}");
                let small = shrink::shrink(&mut lab, p);
                if let Verdict::Different(text) = lab.judge(&small) {
                    eprint!("made small, {text}");
                }
                eprintln!("case: {}", shrink::line(&small));
            }
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            eprintln!(
                "{programs} programs, {instructions} instructions, {differences} differences"
            );
        }
        if only.is_some() {
            break;
        }
    }
    eprintln!(
        "seed {seed}: {instructions} instructions in {programs} programs compared in {} s; {} \
         differences",
        start.elapsed().as_secs(),
        differences
    );
    assert_eq!(differences, 0, "translated code differs from the host");
}
