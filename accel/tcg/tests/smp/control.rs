//! Other threads pause, resume, inspect, change and stop vCPUs at any time.

use crate::machine::{Machine, SPACE, program};
use iced_x86::code_asm::{dword_ptr, eax, r8, r9};
use tandem_accel::vcpu::{RunState, VcpuHandle};
use tandem_accel::x86::gpr;
use tandem_tcg::TcgOptions;

const VCPUS: u32 = 4;

/// vCPUs that run for ever: each counts in memory of its own and in a shared word across pages, and
/// changes code that it runs.
fn busy() -> Machine {
    let programs: Vec<_> = (0..u64::from(VCPUS))
        .map(|i| {
            program(i, VCPUS, |a| {
                let own = SPACE + 0x1_0000 * (i + 1);
                a.mov(r8, own)?;
                a.mov(r9, SPACE + 4095)?;
                a.mov(iced_x86::code_asm::byte_ptr(r8), 0xb8)?;
                a.mov(iced_x86::code_asm::byte_ptr(r8 + 5), 0xc3)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.inc(dword_ptr(r8 + 0x1000))?;
                a.mov(eax, dword_ptr(r8 + 0x1000))?;
                a.mov(dword_ptr(r8 + 1), eax)?;
                a.call(r8)?;
                a.lock().inc(dword_ptr(r9))?;
                a.jmp(again)
            })
        })
        .collect();
    Machine::new(&programs, TcgOptions::default())
}

fn count(m: &Machine, vcpu: u64) -> u32 {
    m.u32(SPACE + 0x1_0000 * (vcpu + 1) + 0x1000)
}

#[test]
fn many_hands_at_once() {
    let m = busy();
    m.resume();
    let vcpus: &[VcpuHandle] = &m.vcpus;
    std::thread::scope(|s| {
        for hand in 0..3usize {
            s.spawn(move || {
                let mut x = 0x9e37_79b9u32 ^ hand as u32;
                for _ in 0..150 {
                    x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let v = &vcpus[(x >> 24) as usize % vcpus.len()];
                    match x >> 16 & 7 {
                        0 | 1 => v.pause(),
                        2 | 3 => v.resume(),
                        4 => v.kick(),
                        5 => assert!(v.state().unwrap().rip < SPACE + 0x10_0000),
                        _ => {
                            let changed = v.with_runner(|r| {
                                let mut s = r.state()?;
                                s.gpr[gpr::RDI] = 1;
                                r.set_state(&s)
                            });
                            changed.unwrap().unwrap();
                        }
                    }
                }
            });
        }
    });
    // All of them still run.
    m.resume();
    for v in 0..u64::from(VCPUS) {
        let before = count(&m, v);
        while count(&m, v) == before {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    // The loops' own counts tell of no lost or doubled round.
    m.vcpus.iter().for_each(VcpuHandle::pause);
    m.vcpus.iter().for_each(VcpuHandle::wait_not_running);
    let rounds: u32 = (0..u64::from(VCPUS)).map(|v| count(&m, v)).sum();
    let shared = m.u32(SPACE + 4095);
    assert!(shared <= rounds && rounds - shared <= VCPUS, "{rounds} rounds, {shared} counted");
}

#[test]
fn paused_vcpus_stand_still() {
    let m = busy();
    m.resume();
    for round in 0..20 {
        m.vcpus.iter().for_each(VcpuHandle::pause);
        m.vcpus.iter().for_each(VcpuHandle::wait_not_running);
        assert!(m.vcpus.iter().all(|v| v.run_state() == RunState::Paused), "round {round}");
        let counts: Vec<_> = (0..4).map(|v| count(&m, v)).collect();
        let rips: Vec<_> = m.vcpus.iter().map(|v| v.state().unwrap().rip).collect();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(counts, (0..4).map(|v| count(&m, v)).collect::<Vec<_>>());
        let after: Vec<_> = m.vcpus.iter().map(|v| v.state().unwrap().rip).collect();
        assert_eq!(rips, after);
        m.resume();
    }
}

#[test]
fn stopped_while_others_run_alone() {
    // Dropping the machine stops all vCPUs, one after the other, while the rest need each other's
    // attention for their split locks.
    for _ in 0..5 {
        let m = busy();
        m.resume();
        std::thread::sleep(std::time::Duration::from_millis(20));
        drop(m);
    }
}
