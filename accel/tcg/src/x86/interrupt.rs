//! Exceptions and interrupts: what is delivered when, and what a fault during delivery becomes
//! (SDM vol. 3 chapter 6). How a delivery is done is in [`super::delivery`].
//!
//! ```text
//!   helper faults ── Exception ──► deliver_exception ──► delivery::deliver ──► handler's first
//!   CpuIntc, NMI, INIT ── poll ──►        │    ▲                                 instruction
//!                                         └────┘ a fault: serial, #DF, or triple fault
//! ```
//!
//! What always holds: a delivery that faults has changed nothing (except a task switch past its
//! point of no return); CR2 and DR6 are written when their exception is taken up, as hardware does.

use super::bits::{dr6, dr7, rflags};
use super::delivery;
use super::exception::{Exception, vector};
use super::{Env, state};
use crate::user::UserEvent;
use tandem_accel::irq::CpuEvent;
use tandem_accel::x86::seg;

/// Which instruction raised a software interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Software {
    /// INT n.
    Int,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1 (ICEBP).
    Int1,
}

/// What is to be delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An exception. RIP is the instruction to return to: the faulting one, or the next of a trap.
    Exception(Exception),
    /// A maskable external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A software interrupt.
    Software {
        /// Vector.
        vector: u8,
        /// Instruction.
        kind: Software,
        /// RIP after the instruction.
        next_rip: u64,
    },
}

/// How a delivery ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The handler is next.
    Delivered,
    /// The processor shut down.
    TripleFault,
}

/// What the execution loop does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Poll {
    /// Runs guest code.
    Run,
    /// Runs exactly one guest instruction without taking interrupts, and polls again: the
    /// instruction after STI, MOV SS or POP SS.
    RunOne,
    /// Sleeps until a kick: halted, or waiting for a start-up IPI.
    Idle,
    /// Shut down.
    TripleFault,
}

/// Classes of SDM vol. 3 table 6-4.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(v: u8) -> Class {
    match v {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What `second`, raised while `first` was being delivered, makes of both (SDM vol. 3 table 6-5);
/// `None`: shutdown.
fn combine(first: &Event, second: Exception) -> Option<Exception> {
    let first = match first {
        Event::Exception(e) => class(e.vector),
        _ => Class::Benign,
    };
    match (first, class(second.vector)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Exception::with_error(vector::DF, 0))
        }
        _ => Some(second),
    }
}

/// Records what an exception leaves in CR2, DR6 and DR7.
fn take_up(env: &mut Env, e: &Exception) {
    if let Some(addr) = e.addr.filter(|_| e.vector == vector::PF) {
        env.cpu.cr2 = addr;
    }
    if e.vector == vector::DB {
        // B0–B3 tell of this exception only; BD, BS, BT stay until software clears them.
        env.cpu.dr6 = (env.cpu.dr6 & !0xf) | (e.dr6 & dr6::ALL);
        env.cpu.dr7 &= !dr7::GD;
    }
}

/// Delivers `event`, or what faults on the way turn it into.
pub fn deliver_event(env: &mut Env, event: Event) -> Outcome {
    if env.vcpu().space.is_some() {
        env.user_event(UserEvent::Raised(event));
        return Outcome::Delivered;
    }
    let mut event = event;
    // A chain cannot be longer than benign, contributory, page fault, double fault; the bound
    // makes that independent of what delivery may raise.
    for _ in 0..8 {
        if let Event::Exception(e) = &event {
            take_up(env, e);
        }
        match delivery::deliver(env, event) {
            Ok(()) => return Outcome::Delivered,
            Err(second) => {
                // A page fault leaves its address even if it becomes a double or triple fault.
                if let Some(addr) = second.addr.filter(|_| second.vector == vector::PF) {
                    env.cpu.cr2 = addr;
                }
                match combine(&event, second) {
                    Some(e) => event = Event::Exception(e),
                    None => break,
                }
            }
        }
    }
    env.cpu.shutdown = true;
    Outcome::TripleFault
}

/// Delivers an exception.
pub fn deliver_exception(env: &mut Env, e: Exception) -> Outcome {
    deliver_event(env, Event::Exception(e))
}

/// Delivers an exception from inside a helper that has already changed the state past return (a
/// task switch): the loop learns of a triple fault at its next poll.
pub fn deliver_late(env: &mut Env, e: Exception) {
    if deliver_exception(env, e) == Outcome::TripleFault {
        env.core.request_exit();
    }
}

/// Takes what the interrupt controller holds for this processor, if it may be taken now.
pub fn poll(env: &mut Env) -> Poll {
    if env.cpu.shutdown {
        return Poll::TripleFault;
    }
    while let Some(event) = env.vcpu().intc.as_ref().and_then(|i| i.take_event()) {
        match event {
            CpuEvent::Nmi => env.cpu.nmi_pending = true,
            CpuEvent::Init => {
                let bsp = env.vcpu().intc.as_ref().is_some_and(|i| i.apic_base() & 1 << 8 != 0);
                state::init(env, bsp);
            }
            CpuEvent::Sipi(v) => start(env, v),
        }
    }
    if env.cpu.wait_sipi {
        return Poll::Idle;
    }
    if let Some(event) = env.cpu.injected.take() {
        return finish(env, event);
    }
    if env.cpu.interrupt_shadow {
        env.cpu.interrupt_shadow = false;
        return Poll::RunOne;
    }
    if let Some(e) = env.cpu.take_pending_debug() {
        return finish(env, Event::Exception(e));
    }
    if env.cpu.nmi_pending && !env.cpu.nmi_masked {
        env.cpu.nmi_pending = false;
        return finish(env, Event::Nmi);
    }
    if env.cpu.eflags & rflags::IF != 0
        && let Some(v) = acknowledge(env)
    {
        env.vcpu().counters.interrupts.hit();
        return finish(env, Event::Interrupt(v));
    }
    if env.cpu.halted && env.vcpu().bell.take_unhalt() {
        env.cpu.halted = false;
    }
    if env.cpu.halted { Poll::Idle } else { Poll::Run }
}

/// The vector of the deliverable interrupt of highest priority, if there is one.
fn acknowledge(env: &Env) -> Option<u8> {
    let intc = env.vcpu().intc.as_ref()?;
    if intc.pending() { intc.acknowledge() } else { None }
}

fn finish(env: &mut Env, event: Event) -> Poll {
    env.cpu.halted = false;
    match deliver_event(env, event) {
        Outcome::Delivered => Poll::Run,
        Outcome::TripleFault => Poll::TripleFault,
    }
}

/// A start-up IPI (SDM vol. 3 §9.4.4): ignored unless the processor waits for one.
fn start(env: &mut Env, v: u8) {
    if !env.cpu.wait_sipi {
        return;
    }
    env.cpu.wait_sipi = false;
    env.cpu.rip = 0;
    let mut cs = env.cpu.seg[seg::CS];
    cs.selector = u16::from(v) << 8;
    cs.base = u64::from(v) << 12;
    env.cpu.set_seg(seg::CS, cs);
    env.update_mode();
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, CODE, TSS, descriptor, dpl, gate, sel};
    use super::*;
    use std::sync::atomic::Ordering;
    use tandem_accel::x86::gpr;

    const INT: u32 = 0xe;
    const TRAP: u32 = 0xf;

    fn soft(vector: u8, kind: Software) -> Event {
        Event::Software { vector, kind, next_rip: 0x7002 }
    }

    // SDM vol. 3 §21.1.4.
    #[test]
    fn real_mode_goes_through_the_vector_table() {
        let mut b = Bench::new();
        b.load(|s| {
            s.idtr.base = 0;
            s.idtr.limit = 0x3ff;
            s.seg[seg::CS].selector = 0x700;
            s.seg[seg::CS].base = 0x7000;
            s.rip = 0x12;
            s.rflags = 0x302;
        });
        b.poke32(4 * 0x21, 0x0800_0034);
        assert_eq!(deliver_event(b.env(), Event::Interrupt(0x21)), Outcome::Delivered);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.seg_base[seg::CS]), (0x34, 0x8000));
        assert_eq!((cpu.gpr[gpr::RSP], cpu.eflags & 0x300), (0x7ffa, 0));
        assert_eq!(b.peek64(0x7ff8) >> 16, 0x0302_0700_0012);
    }

    #[test]
    fn real_mode_without_a_table_shuts_down() {
        let mut b = Bench::new();
        b.load(|s| s.idtr.limit = 0);
        assert_eq!(deliver_exception(b.env(), Exception::UD), Outcome::TripleFault);
        assert_eq!(poll(b.env()), Poll::TripleFault);
    }

    #[test]
    fn protected_mode_same_level_with_error_code() {
        let mut b = Bench::new();
        b.idt(13, gate(sel::CODE0, 0x1234_5678, INT, 0, 0));
        b.protected(0);
        b.env().cpu.eflags |= rflags::IF | rflags::NT;
        assert_eq!(deliver_exception(b.env(), Exception::gp(0x10)), Outcome::Delivered);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (0x1234_5678, 0x7ff0));
        assert_eq!(cpu.eflags & (rflags::IF | rflags::NT), 0);
        assert_eq!((b.peek32(0x7ff0), b.peek32(0x7ff4), b.peek32(0x7ff8)), (0x10, 0x7000, 0x08));
        // A fault saves RF (SDM vol. 3 §18.3.1.1).
        assert_eq!(b.peek32(0x7ffc), 0x1_4202);
    }

    #[test]
    fn protected_mode_changes_stack_to_ring_0() {
        let mut b = Bench::new();
        b.idt(0x80, gate(sel::CODE0, 0x4000, TRAP, 3, 0));
        b.poke32(TSS + 4, 0x9000);
        b.poke32(TSS + 8, sel::DATA0.into());
        b.protected(3);
        b.env().cpu.eflags |= rflags::IF;
        delivery::deliver(b.env(), soft(0x80, Software::Int)).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[gpr::RSP]), (0, 0x4000, 0x9000 - 20));
        assert_eq!(cpu.seg[seg::SS].selector, sel::DATA0);
        assert!(cpu.eflags & rflags::IF != 0);
        let frame: Vec<u32> = (0..5).map(|i| b.peek32(0x9000 - 20 + 4 * i)).collect();
        assert_eq!(frame, [0x7002, 0x1b, 0x202, 0x8000, 0x23]);
    }

    #[test]
    fn software_interrupts_respect_the_gate_and_hardware_does_not() {
        let mut b = Bench::new();
        b.idt(0x40, gate(sel::CODE0, 0x4000, INT, 0, 0));
        b.poke32(TSS + 4, 0x9000);
        b.poke32(TSS + 8, sel::DATA0.into());
        b.protected(3);
        let e = delivery::deliver(b.env(), soft(0x40, Software::Int)).unwrap_err();
        assert_eq!(e, Exception::gp(0x40 * 8 + 2));
        assert_eq!(b.env().cpu.rip, 0x7000);
        assert_eq!(deliver_event(b.env(), Event::Interrupt(0x40)), Outcome::Delivered);
    }

    // SDM vol. 3 §6.13: EXT tells of an event outside the program.
    #[test]
    fn missing_gates_name_the_vector() {
        let mut b = Bench::new();
        b.protected(0);
        let e = delivery::deliver(b.env(), Event::Interrupt(0x40)).unwrap_err();
        assert_eq!(e, Exception::gp(0x40 * 8 + 3));
        b.idt(0x40, gate(sel::CODE0, 0, INT, 0, 0) & !(0x80 << 40));
        let e = delivery::deliver(b.env(), soft(0x40, Software::Int)).unwrap_err();
        assert_eq!((e.vector, e.error), (vector::NP, Some(0x202)));
    }

    // SDM vol. 3 table 6-5.
    #[test]
    fn faults_during_delivery_combine() {
        let e = |v| Event::Exception(Exception::with_error(v, 0));
        let x = |v| Exception::with_error(v, 0);
        let df = Some(x(vector::DF));
        assert_eq!(combine(&e(vector::UD), x(vector::GP)), Some(x(vector::GP)));
        assert_eq!(combine(&e(vector::GP), x(vector::NP)), df);
        assert_eq!(combine(&e(vector::GP), x(vector::PF)), Some(x(vector::PF)));
        assert_eq!(combine(&e(vector::PF), x(vector::PF)), df);
        assert_eq!(combine(&e(vector::PF), x(vector::TS)), df);
        assert_eq!(combine(&e(vector::DF), x(vector::GP)), None);
        assert_eq!(combine(&Event::Interrupt(3), x(vector::GP)), Some(x(vector::GP)));
    }

    #[test]
    fn double_fault_is_delivered() {
        let mut b = Bench::new();
        b.idt64(8, gate(sel::LONG0, 0x4000, INT, 0, 1), 0);
        b.poke64(TSS + 0x24, 0x9000);
        b.long(0);
        assert_eq!(deliver_exception(b.env(), Exception::gp(0)), Outcome::Delivered);
        assert_eq!(b.env().cpu.rip, 0x4000);
        assert_eq!(b.env().cpu.gpr[gpr::RSP], 0x9000 - 48);
        assert_eq!(b.peek64(0x9000 - 48), 0);
    }

    // SDM vol. 3 §6.14.
    #[test]
    fn long_mode_aligns_the_stack_and_pushes_everything() {
        let mut b = Bench::new();
        b.idt64(14, gate(sel::LONG0, 0x8888_4000, INT, 0, 0), 0xffff_ffff);
        b.poke64(TSS + 4, 0x9008);
        b.long(3);
        b.env().cpu.gpr[gpr::RSP] = 0x8123;
        let e = Exception::page_fault(0xdead, 6);
        assert_eq!(deliver_exception(b.env(), e), Outcome::Delivered);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cr2, cpu.rip), (0xdead, 0xffff_ffff_8888_4000));
        assert_eq!((cpu.cpl(), cpu.seg[seg::SS].selector), (0, 0));
        assert_eq!(cpu.gpr[gpr::RSP], 0x9000 - 48);
        let frame: Vec<u64> = (0..6).map(|i| b.peek64(0x9000 - 48 + 8 * i)).collect();
        assert_eq!(frame, [6, 0x7000, 0x33, 0x1_0002, 0x8123, 0x23]);
    }

    #[test]
    fn long_mode_refuses_compatibility_handlers() {
        let mut b = Bench::new();
        b.idt64(3, gate(sel::CODE0, 0x4000, INT, 3, 0), 0);
        b.long(0);
        let e = delivery::deliver(b.env(), soft(3, Software::Int3)).unwrap_err();
        assert_eq!(e, Exception::gp(sel::CODE0.into()));
    }

    // SDM vol. 3 §21.3.
    #[test]
    fn vm86_saves_data_segments_and_nulls_them() {
        let mut b = Bench::new();
        b.idt(0x20, gate(sel::CODE0, 0x4000, INT, 3, 0));
        b.poke32(TSS + 4, 0x9000);
        b.poke32(TSS + 8, sel::DATA0.into());
        b.vm86(3);
        for (i, s) in [(seg::ES, 0x11), (seg::DS, 0x22), (seg::FS, 0x33), (seg::GS, 0x44)] {
            super::super::seg::load_seg(b.env(), i, s).unwrap();
        }
        delivery::deliver(b.env(), soft(0x20, Software::Int)).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.vm86(), cpu.gpr[gpr::RSP]), (0, false, 0x9000 - 36));
        assert_eq!(cpu.seg[seg::DS].selector, 0);
        let frame: Vec<u32> = (0..9).map(|i| b.peek32(0x9000 - 36 + 4 * i)).collect();
        assert_eq!(frame, [0x7002, 0, 0x2_3002, 0x8000, 0, 0x11, 0x22, 0x33, 0x44]);
    }

    // SDM vol. 3 table 21-2: methods 5 and 6 of VME.
    #[test]
    fn vme_redirects_to_the_8086_program() {
        let mut b = Bench::new();
        b.vm86(0);
        let e = delivery::deliver(b.env(), soft(0x10, Software::Int)).unwrap_err();
        assert_eq!(e, Exception::gp(0));
        b.env().cpu.cr4 |= super::super::bits::cr4::VME;
        b.env().cpu.eflags |= rflags::VIF | rflags::IF;
        b.poke16(TSS + 102, 0x100);
        b.poke32(4 * 0x10, 0x0400_0055);
        delivery::deliver(b.env(), soft(0x10, Software::Int)).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.seg_base[seg::CS], cpu.vm86()), (0x55, 0x4000, true));
        assert_eq!(cpu.eflags & (rflags::VIF | rflags::IF), rflags::IF);
        assert_eq!(b.peek16(0x7ffe), 0x3202);
        // A set bit in the map asks for the monitor.
        b.poke(TSS + 0x100 - 32 + 2, &[1]);
        assert!(delivery::deliver(b.env(), soft(0x10, Software::Int)).is_err());
    }

    #[test]
    fn debug_exceptions_write_dr6() {
        let mut b = Bench::new();
        b.idt(1, gate(sel::CODE0, 0x4000, INT, 0, 0));
        b.protected(0);
        b.env().cpu.dr6 = 0x2003;
        b.env().cpu.dr7 = dr7::GD;
        let e = super::super::debug::after_step(&mut b.env().cpu);
        assert_eq!(deliver_exception(b.env(), e), Outcome::Delivered);
        assert_eq!((b.env().cpu.dr6, b.env().cpu.dr7), (0x6000, 0));
        // A trap does not save RF.
        assert_eq!(b.peek32(0x7ffc), 2);
    }

    #[test]
    fn a_load_of_ss_holds_back_data_breakpoints() {
        let mut b = Bench::new();
        b.idt(1, gate(sel::CODE0, 0x4000, INT, 0, 0));
        b.protected(0);
        b.env().cpu.pending_debug = 2;
        b.env().cpu.interrupt_shadow = true;
        assert_eq!(poll(b.env()), Poll::RunOne);
        // INT1 reports them along with itself.
        delivery::deliver(b.env(), soft(1, Software::Int1)).unwrap();
        assert_eq!(b.env().cpu.dr6 & 0xf, 2);
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.gpr[gpr::RSP], 0x8000 - 12);
        // Another instruction would have been followed by them.
        b.env().cpu.pending_debug = 4;
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.gpr[gpr::RSP], 0x8000 - 24);
    }

    #[test]
    fn polling_obeys_if_shadow_and_nmi_blocking() {
        let mut b = Bench::new();
        for v in [2, 0x30] {
            b.idt(v, gate(sel::CODE0, 0x4000 + u32::from(v), INT, 0, 0));
        }
        b.protected(0);
        *b.intc.irq.lock().unwrap() = Some(0x30);
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.rip, 0x7000);
        b.env().cpu.eflags |= rflags::IF;
        b.env().cpu.interrupt_shadow = true;
        b.intc.events.lock().unwrap().push(CpuEvent::Nmi);
        assert_eq!(poll(b.env()), Poll::RunOne);
        assert_eq!(b.env().cpu.rip, 0x7000);
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.rip, 0x4002);
        b.intc.events.lock().unwrap().push(CpuEvent::Nmi);
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.rip, 0x4002);
        // IRET unblocks; the pending NMI comes before the interrupt.
        super::super::iret::iret(b.env(), 4, 0).unwrap();
        assert_eq!(b.env().cpu.rip, 0x7000);
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.rip, 0x4002);
    }

    #[test]
    fn halt_sleeps_until_an_interrupt() {
        let mut b = Bench::new();
        b.idt(0x30, gate(sel::CODE0, 0x4030, INT, 0, 0));
        b.protected(0);
        b.env().cpu.eflags |= rflags::IF;
        b.env().cpu.halted = true;
        assert_eq!(poll(b.env()), Poll::Idle);
        *b.intc.irq.lock().unwrap() = Some(0x30);
        assert_eq!(poll(b.env()), Poll::Run);
        assert!(!b.env().cpu.halted);
        assert_eq!(b.env().cpu.rip, 0x4030);
    }

    // SDM vol. 3 §9.4.
    #[test]
    fn init_then_sipi_starts_an_application_processor() {
        let mut b = Bench::new();
        b.long(0);
        b.intc.base.store(0xfee0_0800, Ordering::Relaxed);
        b.intc.events.lock().unwrap().push(CpuEvent::Init);
        assert_eq!(poll(b.env()), Poll::Idle);
        b.intc.events.lock().unwrap().push(CpuEvent::Sipi(0x9a));
        assert_eq!(poll(b.env()), Poll::Run);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.seg_base[seg::CS]), (0, 0x9_a000));
        assert_eq!(cpu.seg[seg::CS].selector, 0x9a00);
        assert_eq!((cpu.cr0, cpu.efer), (0x10, 0));
        // A SIPI to a running processor is ignored.
        b.intc.events.lock().unwrap().push(CpuEvent::Sipi(1));
        assert_eq!(poll(b.env()), Poll::Run);
        assert_eq!(b.env().cpu.seg[seg::CS].selector, 0x9a00);
    }

    #[test]
    fn conforming_handlers_keep_the_level() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(0, 0xf_ffff, CODE | 4 | 0xc000 | dpl(0)));
        b.idt(0x30, gate(sel::FREE, 0x4000, INT, 3, 0));
        b.protected(3);
        delivery::deliver(b.env(), soft(0x30, Software::Int)).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.seg[seg::CS].selector), (3, sel::FREE | 3));
        assert_eq!(cpu.gpr[gpr::RSP], 0x8000 - 12);
    }
}
