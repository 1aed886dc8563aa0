//! Kicks, pauses and the ways a vCPU stops.

use crate::machine::*;
use crate::need_kvm;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tandem_accel::AccelOps;
use tandem_accel::vcpu::{RunState, StopReason};
use tandem_accel::x86::seg;

#[test]
fn a_looping_vcpu_pauses_and_resumes_every_time() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    m.write(
        CODE,
        &assemble(16, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(ebx)?;
            a.jmp(again)
        }),
    );
    let mut last = 0;
    for i in 0..200 {
        m.resume();
        // On a busy host the vCPU thread may wait for its turn.
        if i % 10 == 0 {
            let t = Instant::now();
            loop {
                let count = m.vcpus[0].state().unwrap().gpr[3];
                if count > last {
                    last = count;
                    break;
                }
                assert!(t.elapsed() < PATIENCE, "the guest stands still");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let t = Instant::now();
        m.pause();
        assert!(t.elapsed() < PATIENCE, "pause {i} took {:?}", t.elapsed());
    }
    assert_eq!(m.vcpus[0].run_state(), RunState::Paused);
}

#[test]
fn kicks_from_many_threads_lose_no_command() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    m.write(
        CODE,
        &assemble(16, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.out(0xe0, al)?;
            a.jmp(again)
        }),
    );
    m.resume();
    let kick = m.vcpus[0].kicker();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let s2 = stop.clone();
    let t = std::thread::spawn(move || {
        while !s2.load(std::sync::atomic::Ordering::Relaxed) {
            kick.kick();
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    for _ in 0..100 {
        assert!(m.vcpus[0].with_runner(|r| r.state().is_ok()).unwrap());
        m.log.lock().unwrap().clear();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    t.join().unwrap();
}

#[test]
fn a_halted_vcpu_can_be_stopped() {
    need_kvm!();
    let mut m = Machine::new(vec![real_mode()]);
    m.write(
        CODE,
        &assemble(16, |a| {
            a.out(0xf4, al)?;
            a.cli()?;
            a.hlt()
        }),
    );
    m.finish();
    std::thread::sleep(Duration::from_millis(10));
    let t = Instant::now();
    m.vcpus[0].stop();
    assert!(t.elapsed() < Duration::from_secs(5));
    assert_eq!(m.vcpus[0].run_state(), RunState::Stopped);
}

#[test]
fn a_triple_fault_is_told() {
    need_kvm!();
    let mut s = protected_mode();
    s.idtr.limit = 0;
    s.gdtr.limit = 0;
    let m = Machine::new(vec![s]);
    m.write(CODE, &assemble(32, |a| a.ud2()));
    m.resume();
    let (index, reason) = m.stops.recv_timeout(PATIENCE).expect("no stop");
    assert_eq!(index, 0);
    assert!(matches!(reason, StopReason::TripleFault), "{reason:?}");
    m.vcpus[0].wait_not_running();
    assert_eq!(m.vcpus[0].run_state(), RunState::Parked);
    // The machine may set it going again.
    m.write(CODE, &assemble(16, |a| a.out(0xf4, al)));
    m.accel.reset().unwrap();
    m.vcpus[0].set_state(real_mode()).unwrap();
    m.finish();
}

#[test]
fn what_kvm_cannot_emulate_stops_with_instruction_and_registers() {
    need_kvm!();
    if tandem_kvm::probe().unwrap().hardware {
        println!("skipped: this host's KVM has hardware, which runs everything");
        return;
    }
    let m = Machine::new(vec![long_mode()]);
    long_mode_tables(&m);
    m.write(
        CODE,
        &assemble(64, |a| {
            a.mov(rax, 0x1234_5678_9abc_def0_u64)?;
            a.movbe(rcx, qword_ptr(rax))
        }),
    );
    m.resume();
    let (_, reason) = m.stops.recv_timeout(PATIENCE).expect("no stop");
    match reason {
        StopReason::AccelError(e) => {
            let text = e.to_string();
            println!("{text}");
            assert!(text.contains("internal error 1"), "{text}");
            assert!(text.contains("rax=123456789abcdef0"), "{text}");
            assert!(text.contains("48 0f 38 f0 08"), "{text}");
            assert!(text.contains("--accel tcg"), "{text}");
        }
        // Some kernels raise #UD in the guest instead, which has no IDT here.
        StopReason::TripleFault => println!("the guest got #UD instead"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_guests_clock_stands_still_while_paused() {
    need_kvm!();
    let m = Machine::new(vec![real_mode()]);
    m.write(
        CODE,
        &assemble(16, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.jmp(again)
        }),
    );
    m.resume();
    m.pause();
    let t = m.accel.clock().now();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(m.accel.clock().now(), t);
    m.resume();
    m.pause();
    assert!(m.vcpus[0].state().unwrap().seg[seg::CS].base == 0);
}
