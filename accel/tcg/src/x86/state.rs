//! The processor's state from and to its architectural form, and what INIT does.

use super::bits::{cr0, cr4, dr6, dr7, efer, rflags};
use super::exception::Exception;
use super::features::Features;
use super::interrupt::Event;
use super::msr::{self, Msrs};
use super::{Env, cr};
use tandem_accel::x86::{FpuState, MpState, PendingEvents, TableReg, X86State, gpr};
use tandem_accel::{Error, Result};

/// An event that a loaded state brought along, to be delivered before anything else. All zeroes is
/// "none".
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct Injected {
    kind: u8,
    vector: u8,
    has_error: bool,
    error: u32,
}

impl Injected {
    const EXCEPTION: u8 = 1;
    const INTERRUPT: u8 = 2;

    fn of(e: &PendingEvents) -> Injected {
        if let Some((vector, error)) = e.exception {
            let (has_error, error) = (error.is_some(), error.unwrap_or(0));
            Injected { kind: Self::EXCEPTION, vector, has_error, error }
        } else if let Some(vector) = e.interrupt {
            Injected { kind: Self::INTERRUPT, vector, ..Injected::default() }
        } else {
            Injected::default()
        }
    }
    /// Takes the event out.
    pub fn take(&mut self) -> Option<Event> {
        let e = std::mem::take(self);
        let error = e.has_error.then_some(e.error);
        match e.kind {
            Self::EXCEPTION => {
                Some(Event::Exception(Exception { error, ..Exception::plain(e.vector) }))
            }
            Self::INTERRUPT => Some(Event::Interrupt(e.vector)),
            _ => None,
        }
    }
    fn save(&self, to: &mut PendingEvents) {
        match self.kind {
            Self::EXCEPTION => {
                to.exception = Some((self.vector, self.has_error.then_some(self.error)));
            }
            Self::INTERRUPT => to.interrupt = Some(self.vector),
            _ => {}
        }
    }
}

/// Loads `s`: everything the guest can see of its processor. The interrupt controller's own state
/// is the machine's to restore; it is told CR8, the APIC base and the TSC's offset.
///
/// # Errors
/// A state that no processor can be in; nothing has changed.
pub fn load(env: &mut Env, s: &X86State) -> Result<()> {
    env.cpu.feat = Features::of(&env.vcpu().cpuid);
    check(s, &env.cpu.feat)?;
    let cpu = &mut env.cpu;
    cpu.gpr = s.gpr;
    cpu.mid_rep = false;
    cpu.rip = s.rip;
    cpu.cr0 = s.cr0 | cr0::ET;
    cpu.cr2 = s.cr2;
    cpu.cr3 = s.cr3;
    cpu.cr4 = s.cr4;
    cpu.cr8 = (s.cr8 & 15) as u8;
    cpu.efer = s.efer;
    cpu.xcr0 = s.xcr0;
    cpu.pkru = s.pkru;
    cpu.dr = s.dr;
    cpu.dr6 = s.dr6 & dr6::ALL;
    cpu.dr7 = s.dr7 & dr7::ALL | dr7::FIXED;
    cpu.gdtr = s.gdtr;
    cpu.idtr = s.idtr;
    for (i, &segment) in s.seg.iter().enumerate() {
        cpu.set_seg(i, segment);
    }
    cpu.pdpte_valid = false;
    cpu.halted = s.mp == MpState::Halted;
    cpu.wait_sipi = s.mp == MpState::WaitForSipi;
    cpu.shutdown = false;
    cpu.interrupt_shadow = s.events.interrupt_shadow;
    cpu.nmi_masked = s.events.nmi_masked;
    cpu.nmi_pending = s.events.nmi_pending;
    cpu.injected = Injected::of(&s.events);
    cpu.tsc_offset = 0;
    cpu.msrs = Msrs::reset();
    load_fpu(env, &s.fpu);
    env.set_eflags(s.rflags | rflags::ONE, rflags::ALL);
    for &(index, value) in &s.msrs {
        if !msr::restore(env, index, value) {
            log::debug!("MSR {index:#x} = {value:#x} of a saved state is not known here");
        }
    }
    if let Some(i) = env.vcpu().intc.clone() {
        i.set_tsc_offset(env.cpu.tsc_offset);
        i.set_cr8((s.cr8 & 15) as u8);
        // A state of another machine's bootstrap processor keeps this one's role.
        let role = 1 << 8;
        let base = s.apic_base & !role | i.apic_base() & role;
        if base != i.apic_base() && !i.set_apic_base(base) {
            log::debug!("IA32_APIC_BASE {base:#x} of a saved state was refused");
        }
    }
    env.vcpu().locate_apic();
    env.flush_everything();
    env.core.fault = 0;
    env.update_mode();
    env.core.request_exit();
    Ok(())
}

/// Refuses what the control registers could never hold together.
fn check(s: &X86State, f: &Features) -> Result<()> {
    let fail = |what: String| Err(Error::new(format!("cannot load processor state: {what}")));
    let paging = s.cr0 & cr0::PG != 0;
    if paging && s.cr0 & cr0::PE == 0 {
        return fail(format!("CR0 {:#x} has paging without protection", s.cr0));
    }
    let long = paging && s.efer & efer::LME != 0;
    if long != (s.efer & efer::LMA != 0) || (long && s.cr4 & cr4::PAE == 0) {
        let (cr0, cr4, efer) = (s.cr0, s.cr4, s.efer);
        return fail(format!(
            "CR0 {cr0:#x}, CR4 {cr4:#x} and EFER {efer:#x} disagree on long mode"
        ));
    }
    if s.cr4 & !f.cr4 != 0 {
        return fail(format!("CR4 {:#x} uses what this CPU model lacks", s.cr4));
    }
    if s.efer & !(f.efer | efer::LMA) != 0 {
        return fail(format!("EFER {:#x} uses what this CPU model lacks", s.efer));
    }
    if s.xcr0 & !(f.xcr0 | 1) != 0 || s.xcr0 & 1 == 0 {
        return fail(format!("XCR0 {:#x} uses what this CPU model lacks", s.xcr0));
    }
    Ok(())
}

/// The state as architecture describes it.
pub fn save(env: &Env) -> X86State {
    let cpu = &env.cpu;
    let mut segments = cpu.seg;
    for (s, &base) in segments.iter_mut().zip(&cpu.seg_base) {
        s.base = base;
    }
    let mut events = PendingEvents {
        nmi_pending: cpu.nmi_pending,
        nmi_masked: cpu.nmi_masked,
        interrupt_shadow: cpu.interrupt_shadow,
        ..PendingEvents::default()
    };
    cpu.injected.save(&mut events);
    let intc = env.vcpu().intc.as_ref();
    let mut msrs: Vec<(u32, u64)> = msr::saved(&cpu.feat)
        .into_iter()
        .filter_map(|i| msr::read(env, i).ok().map(|v| (i, v)))
        .collect();
    msrs.push((msr::index::TSC, super::tsc::read(env)));
    msrs.push((msr::index::TSC_ADJUST, cpu.msrs.tsc_adjust));
    msrs.sort_unstable();
    X86State {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: env.eflags(),
        seg: segments,
        gdtr: cpu.gdtr,
        idtr: cpu.idtr,
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8: cr::cr8(env).into(),
        efer: cpu.efer,
        xcr0: cpu.xcr0,
        pkru: cpu.pkru,
        dr: cpu.dr,
        dr6: cpu.dr6 & dr6::ALL | dr6::FIXED,
        dr7: cpu.dr7 | dr7::FIXED,
        apic_base: intc.map_or(0, |i| i.apic_base()),
        fpu: save_fpu(env),
        msrs,
        mp: if cpu.wait_sipi {
            MpState::WaitForSipi
        } else if cpu.halted && !env.vcpu().bell.is_unhalted() {
            MpState::Halted
        } else {
            MpState::Runnable
        },
        events,
    }
}

/// x87 and vector state. `st` is in stack order, `fpr` by physical number.
fn load_fpu(env: &mut Env, f: &FpuState) {
    env.core.x87_saved = 0;
    let cpu = &mut env.cpu;
    let top = (f.fsw >> 11 & 7) as usize;
    cpu.fcw = f.fcw;
    cpu.fsw = f.fsw & !(7 << 11);
    cpu.ftop = top as u32;
    cpu.ftag_empty = !f.ftw;
    cpu.fop = f.fop;
    cpu.fip = f.fip;
    cpu.fdp = f.fdp;
    (cpu.fcs, cpu.fds) = (0, 0);
    for (i, st) in f.st.iter().enumerate() {
        cpu.fpr[(top + i) & 7][..10].copy_from_slice(st);
    }
    env.core.mxcsr = f.mxcsr;
    env.core.vec = f.zmm;
    env.core.opmask = f.opmask;
}

/// To be called after [`Env::x87_sync`].
fn save_fpu(env: &Env) -> FpuState {
    let cpu = &env.cpu;
    let top = cpu.ftop as usize;
    let mut st = [[0; 10]; 8];
    for (i, to) in st.iter_mut().enumerate() {
        to.copy_from_slice(&cpu.fpr[top.wrapping_add(i) & 7][..10]);
    }
    FpuState {
        fcw: cpu.fcw,
        fsw: cpu.fsw & !(7 << 11) | (cpu.ftop as u16 & 7) << 11,
        ftw: !cpu.ftag_empty,
        fop: cpu.fop,
        fip: cpu.fip,
        fdp: cpu.fdp,
        st,
        mxcsr: env.core.mxcsr,
        zmm: env.core.vec,
        opmask: env.core.opmask,
    }
}

/// INIT (SDM vol. 3 table 10-1): as RESET, but x87 and vector state, MSRs, the TSC and the cache
/// bits of CR0 stay. The bootstrap processor starts at the reset vector, the others wait for a
/// start-up IPI.
pub fn init(env: &mut Env, bsp: bool) {
    let stepping = env.vcpu().cpuid.query(1, 0).eax;
    let reset = X86State::default();
    let cpu = &mut env.cpu;
    cpu.gpr = [0; 16];
    cpu.gpr[gpr::RDX] = stepping.into();
    cpu.rip = reset.rip;
    cpu.cr0 = cpu.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    cpu.cr2 = 0;
    cpu.cr3 = 0;
    cpu.cr4 = 0;
    cpu.cr8 = 0;
    cpu.efer = 0;
    cpu.dr = [0; 4];
    cpu.dr6 = 0;
    cpu.dr7 = dr7::FIXED;
    cpu.gdtr = TableReg { base: 0, limit: 0xffff };
    cpu.idtr = TableReg { base: 0, limit: 0xffff };
    for (i, &s) in reset.seg.iter().enumerate() {
        cpu.set_seg(i, s);
    }
    cpu.halted = false;
    cpu.wait_sipi = !bsp;
    cpu.shutdown = false;
    cpu.interrupt_shadow = false;
    cpu.nmi_masked = false;
    cpu.nmi_pending = false;
    cpu.injected = Injected::default();
    env.set_eflags(rflags::ONE, rflags::ALL);
    env.flush_everything();
    env.update_mode();
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    fn sample() -> X86State {
        let mut s = X86State::default();
        for (i, g) in s.gpr.iter_mut().enumerate() {
            *g = i as u64 * 0x1111_1111_1111;
        }
        s.rip = 0x1234;
        s.rflags = 0x4_0ad7;
        s.fpu.fsw = 5 << 11 | 0x41;
        s.fpu.ftw = 0b1010_0000;
        for (i, r) in s.fpu.st.iter_mut().enumerate() {
            r[0] = i as u8;
        }
        s.fpu.zmm[3][17] = 9;
        s.fpu.mxcsr = 0x1fa0;
        s.dr7 = 0x401;
        s.pkru = 7;
        s.cr8 = 3;
        s.events.exception = Some((13, Some(8)));
        s.events.nmi_masked = true;
        s
    }

    #[test]
    fn round_trip() {
        let mut b = Bench::new();
        b.clock.set(777);
        let mut s = sample();
        load(b.env(), &s).unwrap();
        let got = save(b.env());
        // The state after RESET has no list of MSRs; saving makes one.
        assert!(got.msrs.windows(2).all(|w| w[0].0 < w[1].0));
        assert!(got.msrs.contains(&(0x277, 0x0007_0406_0007_0406)));
        s.msrs = got.msrs.clone();
        assert_eq!(got, s);
        // And the list restores.
        for m in &mut s.msrs {
            match m.0 {
                0x10 => m.1 = 5000,
                0xc000_0082 => m.1 = 0xffff_8000_0000_0000,
                0x401 => m.1 = 1 << 63,
                _ => {}
            }
        }
        load(b.env(), &s).unwrap();
        assert_eq!(save(b.env()), s);
        assert_eq!(b.env().cpu.tsc_offset, 5000 - 777);
        assert_eq!(b.env().cpu.fpr[5][0], 0);
        assert_eq!(b.env().cpu.fpr[0][0], 3);
    }

    #[test]
    fn impossible_states_are_refused() {
        let mut b = Bench::new();
        for f in [
            |s: &mut X86State| s.cr0 = 1 << 31,
            |s: &mut X86State| s.efer = 1 << 10,
            |s: &mut X86State| s.cr4 = 1 << 13,
            |s: &mut X86State| s.xcr0 = 0,
            |s: &mut X86State| s.efer = 1 << 12,
        ] {
            let mut s = sample();
            f(&mut s);
            assert!(load(b.env(), &s).is_err());
        }
    }

    #[test]
    fn a_pending_exception_is_delivered_first() {
        let mut b = Bench::new();
        b.load(|s| {
            s.idtr.base = 0;
            s.events.interrupt = Some(0x21);
        });
        b.poke32(4 * 0x21, 0x0800_0034);
        assert_eq!(super::super::interrupt::poll(b.env()), super::super::interrupt::Poll::Run);
        assert_eq!(b.env().cpu.rip, 0x34);
    }
}
