//! VMCALL and VMMCALL: what a guest that sees KVM's leaves may ask of its hypervisor (Linux
//! `Documentation/virt/kvm/x86/hypercalls.rst`).

use super::raise;
use crate::x86::Env;
use crate::x86::exception::Exception;
use tandem_accel::x86::gpr;

/// Historical; does nothing.
const VAPIC_POLL_IRQ: u64 = 1;
/// Ends the halt of the vCPU whose local APIC ID is the second argument: with it, a processor that has
/// waited long for a lock halts, and is called by the one that unlocks.
const KICK_CPU: u64 = 5;
/// Bit of leaf 4000_0001h, EAX, that offers [`KICK_CPU`].
const PV_UNHALT: u32 = 1 << 7;

const EPERM: i64 = -1;
const ENOSYS: i64 = -1000;

/// VMCALL and VMMCALL: the call's number in RAX, arguments in RBX, RCX, RDX and RSI, the answer in RAX.
pub extern "C" fn hypercall(p: *mut Env) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &mut *p };
    if env.cpu.feat.kvm == 0 || env.cpu.real_mode() {
        return raise(env, Exception::UD);
    }
    let mask = if env.cpu.code64() { u64::MAX } else { u32::MAX.into() };
    let answer = match env.cpu.gpr[gpr::RAX] & mask {
        _ if env.cpu.cpl() != 0 => EPERM,
        VAPIC_POLL_IRQ => 0,
        KICK_CPU if env.cpu.feat.kvm & PV_UNHALT != 0 => {
            env.vcpu().shared.unhalt(env.cpu.gpr[gpr::RCX] as u32);
            0
        }
        _ => ENOSYS,
    };
    env.cpu.gpr[gpr::RAX] = answer as u64 & mask;
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::interrupt::{Poll, poll};
    use crate::x86::testing::Bench;

    fn call(b: &mut Bench, number: u64, target: u64) -> i64 {
        let env = b.env();
        env.cpu.gpr[gpr::RAX] = number;
        env.cpu.gpr[gpr::RCX] = target;
        hypercall(env);
        env.cpu.gpr[gpr::RAX] as i64
    }

    #[test]
    fn unknown_calls_and_programs_are_refused() {
        let mut b = Bench::new();
        b.long(0);
        assert_eq!(call(&mut b, 77, 0), ENOSYS);
        b.long(3);
        assert_eq!(call(&mut b, 77, 0), EPERM);
        b.env().cpu.feat.kvm = 0;
        call(&mut b, 77, 0);
        assert_eq!(b.env().core.fault, 1);
        assert_eq!(b.env().cpu.exception, Exception::UD);
    }

    #[test]
    fn a_kick_ends_a_halt_with_interrupts_off() {
        let mut b = Bench::new();
        b.long(0);
        b.env().cpu.feat.kvm |= PV_UNHALT;
        b.env().cpu.halted = true;
        assert_eq!(poll(b.env()), Poll::Idle);
        assert_eq!(call(&mut b, KICK_CPU, 99), 0, "there is no such processor");
        assert_eq!(poll(b.env()), Poll::Idle);
        assert_eq!(call(&mut b, KICK_CPU, 0), 0);
        assert_eq!(poll(b.env()), Poll::Run);
        // One that comes before the halt ends it as well.
        assert_eq!(call(&mut b, KICK_CPU, 0), 0);
        b.env().cpu.halted = true;
        assert_eq!(poll(b.env()), Poll::Run);
        b.env().cpu.halted = true;
        assert_eq!(poll(b.env()), Poll::Idle);
        b.env().cpu.feat.kvm &= !PV_UNHALT;
        assert_eq!(call(&mut b, KICK_CPU, 0), ENOSYS);
    }
}
