//! The whole architectural state, read and written in the order that the kernel requires.

use super::{Vcpu, regs};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SMM, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_debugregs,
    kvm_mp_state, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use tandem_accel::Result;
use tandem_accel::x86::{MpState, PendingEvents, X86State};

/// RFLAGS: interrupts enabled.
const IF: u64 = 1 << 9;

impl Vcpu {
    /// Reads the state. The multi-processing state comes first: asking for it makes the kernel take
    /// a pending INIT or start-up IPI, which changes the registers.
    pub(super) fn read_state(&self) -> Result<X86State> {
        let mut s =
            X86State { mp: self.read_mp()?, events: self.read_events()?, ..X86State::default() };
        let r =
            self.fd.get_regs().map_err(|e| self.failed("read the registers", "KVM_GET_REGS", e))?;
        regs::regs_from_kvm(&r, &mut s);
        let r = self
            .fd
            .get_sregs()
            .map_err(|e| self.failed("read the system registers", "KVM_GET_SREGS", e))?;
        regs::sregs_from_kvm(&r, &mut s);
        if self.vm.caps.xcrs {
            let x = self.fd.get_xcrs().map_err(|e| self.failed("read XCR0", "KVM_GET_XCRS", e))?;
            let n = (x.nr_xcrs as usize).min(x.xcrs.len());
            s.xcr0 = x.xcrs[..n].iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
        }
        self.read_fpu(&mut s)?;
        if self.vm.caps.debugregs {
            let d = self
                .fd
                .get_debug_regs()
                .map_err(|e| self.failed("read the debug registers", "KVM_GET_DEBUGREGS", e))?;
            (s.dr, s.dr6, s.dr7) = (d.db, d.dr6, d.dr7);
        }
        s.msrs = self.read_msrs(&self.vm.msrs);
        Ok(s)
    }

    /// Writes the state; MSRs not in it get their values of `reset_msrs`. The order:
    ///
    /// 1. system registers: the APIC base and EFER decide what later values mean;
    /// 2. general registers, which also cancels pending exceptions;
    /// 3. XCR0, vector state, debug registers;
    /// 4. MSRs, of which TSC-deadline needs the local APIC in its mode;
    /// 5. pending events, which step 2 would have cancelled;
    /// 6. the multi-processing state, which step 1 may change.
    pub(super) fn write_state(&self, s: &X86State, reset_msrs: &[(u32, u64)]) -> Result<()> {
        self.fd
            .set_sregs(&regs::sregs_to_kvm(s))
            .map_err(|e| self.failed("set the system registers", "KVM_SET_SREGS", e))?;
        self.fd
            .set_regs(&regs::regs_to_kvm(s))
            .map_err(|e| self.failed("set the registers", "KVM_SET_REGS", e))?;
        if self.vm.caps.xcrs {
            let mut x = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            x.xcrs[0] = kvm_xcr { xcr: 0, value: s.xcr0, ..Default::default() };
            // A kernel whose processor has no XSAVE refuses the call; then XCR0 is 1 for good.
            match self.fd.set_xcrs(&x) {
                Err(_) if s.xcr0 == 1 => {}
                r => r.map_err(|e| self.failed("set XCR0", "KVM_SET_XCRS", e))?,
            }
        }
        self.write_fpu(s)?;
        if self.vm.caps.debugregs {
            let d = kvm_debugregs { db: s.dr, dr6: s.dr6, dr7: s.dr7, ..Default::default() };
            self.fd
                .set_debug_regs(&d)
                .map_err(|e| self.failed("set the debug registers", "KVM_SET_DEBUGREGS", e))?;
        }
        self.write_msrs(reset_msrs, &s.msrs);
        self.write_events(&s.events, s.rflags)?;
        self.write_mp(s.mp)
    }

    fn read_mp(&self) -> Result<MpState> {
        let mp = self
            .fd
            .get_mp_state()
            .map_err(|e| self.failed("read the run state", "KVM_GET_MP_STATE", e))?;
        Ok(match mp.mp_state {
            KVM_MP_STATE_HALTED => MpState::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => MpState::WaitForSipi,
            _ => MpState::Runnable,
        })
    }

    fn write_mp(&self, mp: MpState) -> Result<()> {
        let mp_state = match mp {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Halted => KVM_MP_STATE_HALTED,
            // Not UNINITIALIZED: that one ignores a start-up IPI without INIT, a processor does not.
            MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        };
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(|e| self.failed("set the run state", "KVM_SET_MP_STATE", e))
    }

    fn read_events(&self) -> Result<PendingEvents> {
        let k = self
            .fd
            .get_vcpu_events()
            .map_err(|e| self.failed("read the pending events", "KVM_GET_VCPU_EVENTS", e))?;
        Ok(events_from_kvm(&k))
    }

    fn write_events(&self, e: &PendingEvents, rflags: u64) -> Result<()> {
        let mut k = events_to_kvm(e, rflags);
        if self.vm.caps.smm {
            // All zero: not in system management mode.
            k.flags |= KVM_VCPUEVENT_VALID_SMM;
        }
        self.fd
            .set_vcpu_events(&k)
            .map_err(|e| self.failed("set the pending events", "KVM_SET_VCPU_EVENTS", e))
    }
}

fn events_from_kvm(k: &kvm_vcpu_events) -> PendingEvents {
    let x = &k.exception;
    PendingEvents {
        exception: (x.injected != 0 || x.pending != 0)
            .then(|| (x.nr, (x.has_error_code != 0).then_some(x.error_code))),
        // A software interrupt is executed again instead.
        interrupt: (k.interrupt.injected != 0 && k.interrupt.soft == 0).then_some(k.interrupt.nr),
        nmi_pending: k.nmi.pending != 0 || k.nmi.injected != 0,
        nmi_masked: k.nmi.masked != 0 && k.nmi.injected == 0,
        interrupt_shadow: k.interrupt.shadow != 0,
    }
}

fn events_to_kvm(e: &PendingEvents, rflags: u64) -> kvm_vcpu_events {
    let mut k = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some((nr, code)) = e.exception {
        k.exception.injected = 1;
        k.exception.nr = nr;
        k.exception.has_error_code = code.is_some().into();
        k.exception.error_code = code.unwrap_or(0);
    }
    if let Some(nr) = e.interrupt {
        k.interrupt.injected = 1;
        k.interrupt.nr = nr;
    }
    k.nmi.pending = e.nmi_pending.into();
    k.nmi.masked = e.nmi_masked.into();
    if e.interrupt_shadow {
        // The architectural state does not say which of the two it was. STI's shadow exists only
        // with interrupts enabled (SDM vol. 3 §27.3.1.5).
        let by = if rflags & IF != 0 { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS };
        k.interrupt.shadow = by as u8;
    }
    k
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_kernels_form() {
        for e in [
            PendingEvents::default(),
            PendingEvents {
                exception: Some((14, Some(2))),
                interrupt: Some(0x31),
                nmi_pending: true,
                nmi_masked: true,
                interrupt_shadow: true,
            },
            PendingEvents { exception: Some((6, None)), ..PendingEvents::default() },
        ] {
            assert_eq!(events_from_kvm(&events_to_kvm(&e, IF)), e);
        }
    }
}
