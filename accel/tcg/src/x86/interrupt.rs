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
    if let Some(addr) = e.addr {
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
                if let Some(addr) = second.addr {
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
    if env.cpu.nmi_pending && !env.cpu.nmi_masked {
        env.cpu.nmi_pending = false;
        return finish(env, Event::Nmi);
    }
    if env.cpu.eflags & rflags::IF != 0
        && let Some(v) = acknowledge(env)
    {
        return finish(env, Event::Interrupt(v));
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
