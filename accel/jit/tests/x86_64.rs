//! What only a compiling back end has: linking, poisoning, code memory that fills up, host state
//! around runs.

#![cfg(target_arch = "x86_64")]

mod harness;

use harness::{Machine, PC, target};
use std::sync::Arc;
use tandem_jit::code::{Backend, CompileError, Compiled, LinkSite};
use tandem_jit::ir::{Block, Verifier, parse};
use tandem_jit::target::*;
use tandem_jit::x86_64::X64Backend;

fn machine() -> Machine {
    Machine::new(X64Backend::new(target(), 1 << 20).expect("code memory"))
}

fn block(pc: u64, text: &str) -> Block {
    let target = target();
    let mut b = parse(text, &target).unwrap_or_else(|e| panic!("{e}"));
    b.pc = pc;
    Verifier::default().check(&b, &target).unwrap_or_else(|e| panic!("{e}"));
    b
}

/// Adds 1 to RAX while it is not RCX, going back to itself; then on to 0x2000.
fn counter(m: &mut Machine) -> Compiled {
    m.add(&block(
        0x1000,
        "insn 0x1000 3
         v0 = get %rax
         v1 = const 1
         v2 = add v0, v1
         put %rax, v2
         put %cc, v2
         v3 = get %rcx
         f4 = sub v2, v3
         brcc.ne f4, goto 0x1000 near
         exit goto 0x2000",
    ))
}

fn site(c: &Compiled, exit: usize) -> LinkSite {
    c.exits[exit].expect("a linkable exit")
}

#[test]
fn links_are_made_and_undone() {
    let mut m = machine();
    let a = counter(&mut m);
    let b = m.add(&block(0x2000, "insn 0x2000 1\n v0 = const 7\n put %rbx, v0\n exit leave 0x55"));
    m.env().globals[1] = 5;
    assert_eq!(m.run(a.checked), LEAVE_CHAIN);
    assert_eq!((m.env().globals[0], m.env().globals[PC]), (1, 0x1000));
    assert_eq!(m.env().exit_ref & 0xff, 0);
    m.backend.link(site(&a, 0), a.linked);
    assert_eq!(m.run(a.checked), LEAVE_CHAIN);
    assert_eq!((m.env().globals[0], m.env().globals[PC]), (5, 0x2000));
    assert_eq!(m.env().globals[17], 5, "cc is stored at the end");
    m.backend.link(site(&a, 1), b.checked);
    m.env().globals[0] = 0;
    assert_eq!(m.run(a.checked), 0x55);
    assert_eq!((m.env().globals[0], m.env().globals[3]), (5, 7));
    m.backend.unlink(site(&a, 0));
    m.env().globals[0] = 0;
    assert_eq!(m.run(a.checked), LEAVE_CHAIN);
    assert_eq!((m.env().globals[0], m.env().globals[PC]), (1, 0x1000));
}

#[test]
fn requests_and_poison_stop_a_loop() {
    let mut m = machine();
    let a = counter(&mut m);
    m.backend.link(site(&a, 0), a.linked);
    m.env().globals[1] = 1000;
    m.env().exit_request = 1;
    assert_eq!(m.run(a.checked), LEAVE_REQUEST);
    assert_eq!((m.env().globals[0], m.env().globals[PC]), (0, 0x1000));
    m.env().exit_request = 0;
    m.env().globals[PC] = 0;
    m.backend.poison(&a);
    for entry in [a.checked, a.paged, a.linked] {
        assert_eq!(m.run(entry), LEAVE_PAGE);
        assert_eq!((m.env().globals[0], m.env().globals[PC]), (0, 0x1000));
    }
}

#[test]
fn another_thread_can_stop_and_unlink_a_running_loop() {
    let mut m = machine();
    let a = counter(&mut m);
    m.backend.link(site(&a, 0), a.linked);
    m.env().globals[1] = u64::MAX / 2;
    let backend = m.backend.clone();
    let s = site(&a, 0);
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        backend.unlink(s);
    });
    assert_eq!(m.run(a.checked), LEAVE_CHAIN);
    stopper.join().expect("stopper");
    assert!(m.env().globals[0] > 0);
}

#[test]
fn indirect_jumps_go_through_the_cache() {
    let mut m = machine();
    let a = m.add(&block(
        0x1000,
        "insn 0x1000 2\n v0 = get %rdi\n v1 = const 1\n put %cc, v1\n exit indirect v0 far",
    ));
    m.add(&block(0x3000, "insn 0x3000 1\n v0 = get %cc\n put %rdx, v0\n exit leave 0x66"));
    m.env().globals[7] = 0x3000;
    for _ in 0..2 {
        m.env().globals[2] = 0;
        assert_eq!(m.run(a.checked), 0x66);
        assert_eq!(m.env().globals[2], 1);
        // The second time only the cache knows.
        m.world().blocks.clear();
    }
    m.env().globals[7] = 0x4000;
    assert_eq!(m.run(a.checked), LEAVE_LOOKUP);
    assert_eq!(m.env().globals[PC], 0x4000);
}

#[test]
fn indirect_jumps_are_bound_to_one_target() {
    let mut m = machine();
    for (reg, hint) in [("rdi", "ret"), ("r14", "call 0x1005")] {
        let a = m.add(&block(
            0x1000,
            &format!("insn 0x1000 2\n v0 = get %{reg}\n exit indirect v0 {hint}"),
        ));
        let g = if reg == "rdi" { 7 } else { 14 };
        let [b, c, other] = [0x61, 0x62, 0x63].map(|code| {
            m.add(&block(0x3000 + code, &format!("insn 0x3000 1\n exit leave {code:#x}")))
        });
        m.world().blocks.clear();
        m.env().globals[g] = 0x3000;
        assert_eq!(m.run(a.checked), LEAVE_LOOKUP);
        assert_eq!(m.env().globals[PC], 0x3000);
        m.backend.bind(site(&a, 0), 0x3000, b.linked);
        assert_eq!(m.run(a.checked), 0x61);
        m.env().globals[g] = 0x1_0000_3000;
        assert_eq!(m.run(a.checked), LEAVE_LOOKUP, "all 64 bits count");
        m.world().blocks.insert(0x4000, other.checked);
        m.env().globals[g] = 0x4000;
        assert_eq!(m.run(a.checked), 0x63, "others go through the cache");
        m.backend.unlink(site(&a, 0));
        m.env().globals[g] = 0x3000;
        assert_eq!(m.run(a.checked), LEAVE_LOOKUP);
        m.backend.bind(site(&a, 0), 0x3000, c.linked);
        assert_eq!(m.run(a.checked), 0x62);
    }
    let far = m.add(&block(0x1000, "insn 0x1000 2\n v0 = get %rdi\n exit indirect v0 far"));
    assert_eq!(far.exits, [None]);
}

#[test]
fn page_checks_compare_the_code_map() {
    let mut m = machine();
    let mut b = block(0x1000, "insn 0x1000 1\n exit leave 0x77");
    b.pages = vec![
        tandem_jit::ir::CodePage { slot: 3, id: 0x1234_5678 },
        tandem_jit::ir::CodePage { slot: 4, id: 0xffff_ffff },
    ];
    let c = m.add(&b);
    assert_eq!(m.run(c.linked), 0x77);
    assert_eq!(m.run(c.checked), LEAVE_PAGE);
    assert_eq!(m.env().globals[PC], 0x1000);
    m.env().code_map[3] = 0x1234_5678;
    assert_eq!(m.run(c.checked), LEAVE_PAGE);
    m.env().code_map[4] = 0xffff_ffff;
    assert_eq!(m.run(c.checked), 0x77);
}

#[test]
fn the_mode_counts_at_the_checked_entry_only() {
    let mut m = machine();
    let map = target().env;
    let mut b = block(0x1000, "insn 0x1000 1\n exit leave 0x77");
    b.pages = vec![
        tandem_jit::ir::CodePage { slot: 3, id: 5 },
        tandem_jit::ir::CodePage { slot: map.code_map_len, id: 0x1234_5678 },
    ];
    let c = m.add(&b);
    assert_eq!(m.run(c.paged), LEAVE_PAGE);
    m.env().code_map[3] = 5;
    assert_eq!(m.run(c.paged), 0x77);
    assert_eq!(m.run(c.checked), LEAVE_PAGE);
}

#[test]
fn code_memory_fills_up_and_empties() {
    let target = target();
    let backend: Arc<dyn Backend> = X64Backend::new(target, 0).expect("code memory");
    let b =
        block(0x1000, "insn 0x1000 1\n v0 = get %rax\n v1 = ld [v0]\n put %rax, v1\n exit leave 1");
    let mut compiler = backend.compiler();
    let mut n = 0;
    let error = loop {
        match compiler.compile(&b, n) {
            Ok(_) => n += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error, CompileError::ArenaFull);
    assert!(n > 1000, "{n} blocks");
    let (used, total) = backend.usage();
    assert!(used > total * 9 / 10 && used <= total, "{used} of {total}");
    backend.reset();
    assert_eq!(backend.usage().0, 0);
    let mut m = Machine::new(backend.clone());
    let c = compiler.compile(&b, 0).expect("room again");
    m.env().globals[0] = harness::RAM.start;
    assert_eq!(m.run(c.checked), 1);
}

#[test]
fn many_threads_compile_at_once() {
    let backend: Arc<dyn Backend> = X64Backend::new(target(), 8 << 20).expect("code memory");
    let threads: Vec<_> = (0..4u64)
        .map(|t| {
            let backend = backend.clone();
            std::thread::spawn(move || {
                let mut m = Machine::new(backend);
                for i in 0..200 {
                    let pc = 0x1000 * (t + 1) + i;
                    let text = format!(
                        "insn {pc} 1\n v0 = get %rax\n v1 = const {}\n v2 = add v0, v1\n \
                         put %rax, v2\n exit leave 3",
                        pc
                    );
                    let c = m.add(&block(pc, &text));
                    m.env().globals[0] = 1;
                    assert_eq!(m.run(c.checked), 3);
                    assert_eq!(m.env().globals[0], pc + 1);
                }
            })
        })
        .collect();
    for t in threads {
        t.join().expect("thread");
    }
}

#[test]
fn a_division_trap_in_another_register_leaves_the_registers_alone() {
    let mut m = machine();
    // The dividend is not in RAX and RDX, whose guest values must survive the trap.
    let c = m.add(&block(
        0x1000,
        "insn 0x1000 3
         v0 = get %rsi
         v1 = get %rdi
         v2 = get %rax
         put %cc, v2
         v3, v4 = divu2 v0, v1, v2
         put %rbx, v3
         put %rcx, v4
         exit leave 9",
    ));
    let env = m.env();
    for g in 0..16 {
        env.globals[g] = 0x100 + g as u64;
    }
    env.globals[0] = 0;
    let before = env.globals;
    assert_eq!(m.run(c.checked), LEAVE_TRAP);
    let mut expected = before;
    (expected[PC], expected[17]) = (0x1000, 0);
    assert_eq!(m.env().globals, expected);
    m.env().globals[0] = 0x1000;
    m.env().globals[6] = 1;
    assert_eq!(m.run(c.checked), 9);
    let dividend = (1u128 << 64) + 0x107;
    assert_eq!(u128::from(m.env().globals[3]), dividend / 0x1000);
    assert_eq!(u128::from(m.env().globals[1]), dividend % 0x1000);
    assert_eq!((m.env().globals[0], m.env().globals[2]), (0x1000, 0x102));
}

#[test]
fn a_shift_may_replace_its_own_count() {
    let mut m = machine();
    let c = m.add(&block(
        0x1000,
        "insn 0x1000 3
         v0 = get %rax
         v1 = get %rsi
         f2 = sub v0, v1
         v3, f4 = shl v0, v1, _, f2
         put %rsi, v3
         put %cc, v3
         brcc.e f4, leave 5
         exit leave 6",
    ));
    m.env().globals[0] = 3;
    m.env().globals[6] = 5;
    assert_eq!(m.run(c.checked), 6);
    assert_eq!((m.env().globals[0], m.env().globals[6], m.env().globals[17]), (3, 96, 96));
}
