//! Random programs: every back end, with and without the passes, must agree on everything that can
//! be observed.
//!
//! `TANDEM_IR_SEED` and `TANDEM_IR_PROGRAMS` (numbers) choose where to start and how many to run.

mod harness;

use harness::random::{Gen, Rng};
use harness::{Machine, RAM, backends, target};
use std::sync::Arc;
use tandem_jit::code::Backend;
use tandem_jit::ir::{Block, ExitKind, Inst, Op, Verifier, Width};
use tandem_jit::opt::Passes;
use tandem_jit::target::*;

/// All that the outside can see after a run.
#[derive(PartialEq, Debug)]
struct Outcome {
    leave: u32,
    globals: [u64; 22],
    scratch: [u64; 4],
    fault: u32,
    fault_addr: u64,
    exit_ref: u64,
    mxcsr: u32,
    vec: Vec<[u8; 64]>,
    opmask: [u64; 8],
    mmio: Vec<(u64, u8)>,
    ram: Vec<u8>,
}

struct Program {
    blocks: Vec<Block>,
    seed: u64,
}

fn program(seed: u64, vector: bool) -> Program {
    let mut rng = Rng::new(seed);
    let n = 1 + rng.below(4);
    let pcs: Vec<u64> = (0..n).map(|i| 0x40_0000 + 0x100 * i as u64).collect();
    let blocks = (0..n)
        .map(|i| {
            let len = 1 + rng.below(60);
            Gen::block(&mut rng, pcs[i], &pcs[i + 1..], len, vector)
        })
        .collect();
    Program { blocks, seed }
}

fn run(p: &Program, backend: &Arc<dyn Backend>, link: bool) -> Outcome {
    let mut m = Machine::new(backend.clone());
    let mut rng = Rng::new(p.seed ^ 0x5eed);
    for g in 0..22 {
        m.env().globals[g] = rng.value();
    }
    for v in 0..32 {
        let live = match host_vec_bytes() {
            (n, bytes) if v < n => bytes,
            _ => 0,
        };
        for i in 0..live {
            m.env().vec[v][i] = rng.value() as u8;
        }
    }
    for s in 0..4 {
        m.env().scratch[s] = rng.value();
    }
    for b in m.world().ram.iter_mut() {
        *b = rng.next() as u8;
    }
    m.env().mxcsr = if rng.chance(4) { 0x1f80 & !(0x80 << rng.below(6)) } else { 0x1f80 };
    let compiled: Vec<_> = p.blocks.iter().map(|b| m.add(b)).collect();
    if link {
        for (b, c) in p.blocks.iter().zip(&compiled) {
            for (exit, site) in b.exits.iter().zip(&c.exits) {
                let ExitKind::Goto { pc, same_page } = exit.kind else { continue };
                let to = p.blocks.iter().position(|b| b.pc == pc);
                if let (Some(site), Some(to)) = (site, to) {
                    let to = &compiled[to];
                    backend.link(*site, if same_page { to.linked } else { to.checked });
                }
            }
        }
    }
    for page in RAM.step_by(4096) {
        // Which pages are in the TLB cannot be seen, but it decides between the fast paths.
        if !rng.chance(3) {
            m.warm(page);
        }
    }
    let leave = m.run(compiled[0].checked);
    let env = m.env();
    let mut o = Outcome {
        leave,
        globals: env.globals,
        scratch: env.scratch,
        fault: env.fault,
        fault_addr: env.fault_addr,
        exit_ref: if leave == LEAVE_CHAIN { env.exit_ref } else { 0 },
        mxcsr: env.mxcsr,
        vec: env.vec.to_vec(),
        opmask: env.opmask,
        mmio: vec![],
        ram: vec![],
    };
    if leave == LEAVE_TRAP {
        // Once an unmasked exception is found before the computation, the processor does not look
        // for overflow, underflow and inexactness any more (SDM vol. 1 §11.5.2.3); the interpreter,
        // which computes first with everything masked, has them all.
        o.mxcsr &= !0x38;
    }
    o.mmio = std::mem::take(&mut m.world().mmio_log);
    o.ram = m.world().ram.to_vec();
    o
}

/// Vector registers of this host and their size in bytes.
fn host_vec_bytes() -> (usize, usize) {
    match harness::host_vec() {
        VecState::Xmm => (16, 16),
        VecState::Ymm => (16, 32),
        VecState::Zmm => (32, 64),
    }
}

fn compare(p: &Program, what: &str, a: &Outcome, b: &Outcome, text: &str) {
    if a == b {
        return;
    }
    let mut diff = String::new();
    for (i, (x, y)) in a.globals.iter().zip(&b.globals).enumerate() {
        if x != y {
            diff += &format!("  %{}: {x:#x} vs {y:#x}\n", harness::GLOBALS[i]);
        }
    }
    for (i, (x, y)) in a.vec.iter().zip(&b.vec).enumerate() {
        if x != y {
            diff += &format!("  vec{i}: {x:02x?} vs {y:02x?}\n");
        }
    }
    for (i, (x, y)) in a.ram.iter().zip(&b.ram).enumerate().filter(|(_, (x, y))| x != y).take(4) {
        diff += &format!("  mem {:#x}: {x:#x} vs {y:#x}\n", RAM.start + i as u64);
    }
    let rest = |o: &Outcome| {
        format!(
            "leave {:#x} scratch {:x?} fault {} at {:#x} exit {:#x} mxcsr {:#x} mmio {:x?}",
            o.leave, o.scratch, o.fault, o.fault_addr, o.exit_ref, o.mxcsr, o.mmio
        )
    };
    panic!("seed {} {what}:\n{diff}  {}\n  {}\n{text}", p.seed, rest(a), rest(b));
}

/// Removes what a disagreement does not need: instructions whose results nobody uses, and the ways
/// values came about (a constant does as well).
fn shrink(p: &Program, target: &Target, differs: impl Fn(&Program) -> bool) -> Program {
    let mut best = Program { blocks: p.blocks.clone(), seed: p.seed };
    let mut verifier = Verifier::default();
    loop {
        let mut progress = false;
        for b in 0..best.blocks.len() {
            for i in (0..best.blocks[b].insts.len()).rev() {
                for step in 0..2 {
                    let mut blocks = best.blocks.clone();
                    let inst = blocks[b].insts[i];
                    if inst.op == Op::InsnStart {
                        continue;
                    }
                    if step == 0 {
                        blocks[b].insts.remove(i);
                    } else if inst.dst.is_some() && inst.op != Op::Const && !inst.fl.is_some() {
                        let imm = 0x123;
                        let konst = Inst { dst: inst.dst, imm, ..Inst::new(Op::Const, Width::W64) };
                        blocks[b].insts[i] = konst;
                    } else {
                        continue;
                    }
                    let next = Program { blocks, seed: p.seed };
                    if verifier.check(&next.blocks[b], target).is_ok() && differs(&next) {
                        best = next;
                        progress = true;
                        break;
                    }
                }
            }
        }
        if !progress {
            return best;
        }
    }
}

/// Shrinks a disagreement with the first back end and prints what is left (`TANDEM_IR_SHRINK=1`;
/// a shrunk program may look at bits that are not defined).
fn explain(p: &Program, backend: &Arc<dyn Backend>, reference: &Arc<dyn Backend>, link: bool) {
    if number("TANDEM_IR_SHRINK", 0) == 0 {
        return;
    }
    let target = target();
    let differs = |p: &Program| {
        backend.reset();
        reference.reset();
        run(p, reference, link) != run(p, backend, link)
    };
    let small = shrink(p, &target, differs);
    backend.reset();
    for block in &small.blocks {
        println!("{}", block.listing(Some(&target)));
    }
    let (a, b) = (run(&small, reference, link), run(&small, backend, link));
    compare(&small, "shrunk", &a, &b, "");
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

#[test]
fn everyone_agrees() {
    let target = target();
    let (first, count) = (number("TANDEM_IR_SEED", 1), number("TANDEM_IR_PROGRAMS", 3000));
    let mut passes = Passes::default();
    let mut verifier = Verifier::default();
    let vector = cfg!(target_arch = "x86_64");
    for seed in first..first + count {
        let plain = program(seed, vector);
        let mut better = Program { blocks: plain.blocks.clone(), seed };
        let mut text = String::new();
        for (old, new) in plain.blocks.iter().zip(&mut better.blocks) {
            if let Err(e) = verifier.check(old, &target) {
                panic!("seed {seed}: the generator made a bad block: {e}\n{}", old.listing(None));
            }
            passes.run(new, &target);
            // Blocks of both kinds are run.
            if seed % 2 == 0 {
                passes.tidy(new, &target);
            }
            text += &format!(
                "---- before\n{}---- after\n{}",
                old.listing(Some(&target)),
                new.listing(Some(&target))
            );
            if let Err(e) = verifier.check(new, &target) {
                panic!("seed {seed}: the passes made a bad block: {e}\n{text}");
            }
            let bare = old.listing(None).to_string();
            let again = tandem_jit::ir::parse(&bare, &target).expect("the text form parses");
            assert_eq!(bare, again.listing(None).to_string(), "seed {seed}: round trip");
        }
        let mut reference = None;
        for backend in backends(&target) {
            for (name, p) in [("plain", &plain), ("optimised", &better)] {
                for link in [false, true] {
                    let o = run(p, &backend, link);
                    let what = format!("{name}, {}, links {link}", backend.name());
                    match (&mut reference, link) {
                        (Some((_, Some(r))), true) | (Some((Some(r), _)), false) => {
                            if *r != o {
                                explain(p, &backend, &backends(&target)[0], link);
                            }
                            compare(&plain, &what, r, &o, &text);
                        }
                        (slot, _) => {
                            let (unlinked, linked) = slot.get_or_insert((None, None));
                            *(if link { linked } else { unlinked }) = Some(o);
                        }
                    }
                }
            }
            backend.reset();
        }
    }
}

/// Prints the passes' cost; run by hand: `cargo test --release -- --ignored --nocapture speed`.
#[test]
#[ignore = "a measurement"]
fn passes_speed() {
    let target = target();
    let blocks: Vec<Block> = (1..400)
        .flat_map(|seed| program(seed, true).blocks)
        .filter(|b| b.insts.len() > 30)
        .collect();
    let insts: usize = blocks.iter().map(|b| b.insts.len()).sum();
    let mut passes = Passes::default();
    let mut work = Block::default();
    let mut best = f64::MAX;
    for _ in 0..50 {
        let mut spent = std::time::Duration::ZERO;
        for b in &blocks {
            work.clone_from(b);
            let start = std::time::Instant::now();
            passes.run(&mut work, &target);
            spent += start.elapsed();
        }
        best = best.min(spent.as_nanos() as f64 / insts as f64);
    }
    println!("{} blocks, {insts} instructions: {best:.1} ns per instruction", blocks.len());
}

/// Prints the compiler's cost; run by hand as `passes_speed`.
#[test]
#[ignore = "a measurement"]
fn compile_speed() {
    let target = target();
    let mut passes = Passes::default();
    let mut blocks: Vec<Block> = (1..400)
        .flat_map(|seed| program(seed, false).blocks)
        .filter(|b| b.insts.len() > 30)
        .collect();
    blocks.iter_mut().for_each(|b| passes.run(b, &target));
    let insts: usize = blocks.iter().map(|b| b.insts.len()).sum();
    for backend in backends(&target) {
        let mut compiler = backend.compiler();
        let (mut best, mut bytes) = (f64::MAX, 0);
        for _ in 0..50 {
            backend.reset();
            bytes = 0;
            let start = std::time::Instant::now();
            for b in &blocks {
                let Ok(c) = compiler.compile(b, 1) else { break };
                bytes += c.range.end - c.range.start;
            }
            best = best.min(start.elapsed().as_nanos() as f64 / insts as f64);
        }
        println!(
            "{}: {} blocks, {insts} instructions: {best:.1} ns and {:.1} bytes per instruction",
            backend.name(),
            blocks.len(),
            bytes as f64 / insts as f64
        );
    }
}
