//! How fast code is translated: `cargo test --release --test isa speed -- --ignored --nocapture`.

use super::every_form::USER;
use super::machine;
use tandem_jit::code::Backend;
use tandem_jit::ir::{Block, Exit, ExitKind};
use tandem_jit::opt::Passes;
use tandem_tcg::softmmu::PAGE_SIZE;
use tandem_tcg::x86::exception::Exception;
use tandem_tcg::x86::translate::{CodeFetch, FrontEnd, Limits, TbKey};

/// The test program's own code.
fn own_code() -> (&'static [u8], u64) {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    let exe = std::env::current_exe().expect("a path");
    let line = maps
        .lines()
        .filter(|l| l.contains("r-xp") && l.ends_with(&*exe.to_string_lossy()))
        .max_by_key(|l| l.len())
        .expect("own text");
    let (from, to) = line.split(' ').next().and_then(|r| r.split_once('-')).expect("a range");
    let at = |s| u64::from_str_radix(s, 16).expect("hexadecimal");
    let (from, to) = (at(from), at(to));
    // SAFETY: readable and mapped for as long as the program runs.
    (unsafe { std::slice::from_raw_parts(from as *const u8, (to - from) as usize) }, from)
}

/// Processor time of this thread: the machine may be busy.
fn cpu_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

struct Text {
    code: &'static [u8],
    at: u64,
}

impl CodeFetch for Text {
    fn fetch(&mut self, linear: u64, buf: &mut [u8]) -> Result<usize, Exception> {
        let from = linear.wrapping_sub(self.at) as usize;
        let bytes = self.code.get(from..).filter(|b| !b.is_empty()).ok_or(Exception::gp(0))?;
        let room = (PAGE_SIZE - linear % PAGE_SIZE) as usize;
        let n = bytes.len().min(buf.len()).min(room);
        buf[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let (code, at) = own_code();
    let mut text = Text { code, at };
    let target = std::sync::Arc::new(machine::target());
    let backend = tandem_jit::x86_64::X64Backend::new(target.clone(), 64 << 20).expect("an arena");
    for stage in ["decode and translate", "and passes", "and x86-64 code"] {
        let mut compiler = backend.compiler();
        let mut block = Block::default();
        let mut front = FrontEnd::default();
        let mut passes = Passes::default();
        let (mut insns, mut blocks, mut ops, mut left) = (0u64, 0u64, 0u64, 0u64);
        let (mut gotos, mut dead) = (0u64, 0u64);

        let start = cpu_seconds();
        let mut pc = at + 0x1000;
        while pc < at + code.len() as u64 - 64 && insns < 4_000_000 {
            let key = TbKey { rip: pc, cs_base: 0, mode: USER };
            let Ok(end) = front.translate(&mut text, key, Limits::default(), &mut block) else {
                break;
            };
            ops += block.insts.len() as u64;
            if stage != "decode and translate" {
                passes.run(&mut block, &target);
                left += block.insts.len() as u64;
            }
            if stage == "and x86-64 code" && compiler.compile(&block, 1).is_err() {
                backend.reset();
            }
            let direct = |e: &&Exit| matches!(e.kind, ExitKind::Goto { .. });
            gotos += block.exits.iter().filter(direct).count() as u64;
            dead += block.exits.iter().filter(|e| e.dead != 0).count() as u64;
            insns += u64::from(end.insns);
            blocks += 1;
            // On behind the block's first piece: what follows a jump is another block.
            pc += u64::from(end.ranges()[0].len.max(1));
        }
        let s = cpu_seconds() - start;
        eprintln!(
            "{stage}: {:.2} M instructions/s ({insns} in {blocks} blocks, {:.2} IR operations per \
             instruction, {:.2} after passes; {:.0} % of {gotos} direct exits without flags)",
            insns as f64 / s / 1e6,
            ops as f64 / insns as f64,
            left as f64 / insns as f64,
            100.0 * dead as f64 / gotos as f64,
        );
    }
}
