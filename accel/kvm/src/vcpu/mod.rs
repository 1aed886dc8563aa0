//! vCPUs: creation and the thread.

pub(crate) mod cpuid;
mod kick;
pub(crate) mod msrs;
mod regs;
mod report;
mod run;
mod state;
mod xsave;

use crate::error::failed;
use crate::vm::Vm;
use kick::Kicker;
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use tandem_accel::bus::IoBus;
use tandem_accel::vcpu::{Seat, VcpuControl, VcpuHandle, VcpuSpec, run_loop};
use tandem_accel::x86::model::XsaveLayout;
use tandem_accel::{Error, Result};

/// A vCPU, on its thread.
struct Vcpu {
    fd: VcpuFd,
    index: u32,
    vm: Arc<Vm>,
    bus: Arc<IoBus>,
    kicker: Arc<Kicker>,
    layout: XsaveLayout,
    /// MSRs and their values as the kernel made the vCPU: their RESET values.
    reset_msrs: Vec<(u32, u64)>,
    /// The local APIC as the kernel made it.
    reset_lapic: kvm_lapic_state,
    /// RESETs seen ([`Vm::resets`]).
    resets: u64,
    /// Resumptions seen ([`Vm::resumes`]).
    resumes: u64,
}

/// Relative deviation of TSC frequencies that a guest may see without scaling: 250 ppm, what Linux
/// allows between its measurement and the truth.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Creates the vCPU of `spec` and its thread, paused.
pub(crate) fn spawn(vm: Arc<Vm>, spec: VcpuSpec) -> Result<VcpuHandle> {
    if spec.intc.is_some() {
        return Err(Error::new(format!(
            "vCPU {} was given a local APIC, but under KVM the kernel provides it",
            spec.index
        )));
    }
    kick::install_handler()?;
    let control = VcpuControl::new();
    let mut vcpu = Vcpu::new(vm, &spec, control.clone())?;
    vcpu.initialise(&spec)?;
    let (kicker, handle_kick) = (vcpu.kicker.clone(), vcpu.kicker.clone());
    let (index, events, loop_control) = (spec.index, spec.events.clone(), control.clone());
    let thread = std::thread::Builder::new()
        .name(format!("vcpu{index}/kvm"))
        .spawn(move || {
            // Dropped in reverse order: the kicker lets go of kvm_run before the vCPU unmaps it.
            let mut vcpu = vcpu;
            let _attached = kicker.attach();
            run_loop(Seat::take(index, &mut vcpu, loop_control, events));
        })
        .map_err(|e| {
            Error::new(format!("cannot start the thread of vCPU {index}"))
                .caused_by(e)
                .remedy("raise the limit of processes (ulimit -u)")
        })?;
    Ok(VcpuHandle::new(index, control, handle_kick, Some(thread)))
}

impl Vcpu {
    fn new(vm: Arc<Vm>, spec: &VcpuSpec, control: Arc<VcpuControl>) -> Result<Vcpu> {
        let index = spec.index;
        // The kernel takes the ID of KVM_CREATE_VCPU as the APIC ID.
        let mut fd = vm
            .fd
            .create_vcpu(spec.apic_id.into())
            .map_err(|e| failed(&format!("create vCPU {index}"), "KVM_CREATE_VCPU", e))?;
        let kicker = Kicker::new(&mut fd, control);
        let layout = XsaveLayout::of(&vm.supported);
        Ok(Vcpu {
            fd,
            index,
            bus: spec.bus.clone(),
            kicker,
            layout,
            reset_msrs: Vec::new(),
            reset_lapic: kvm_lapic_state::default(),
            resets: vm.resets.load(std::sync::atomic::Ordering::Acquire),
            resumes: vm.resumes.load(std::sync::atomic::Ordering::Acquire),
            vm,
        })
    }

    /// CPUID first (it decides which state is valid), then the TSC, then the state to start with.
    fn initialise(&mut self, spec: &VcpuSpec) -> Result<()> {
        self.set_cpuid(&spec.cpuid)?;
        self.set_tsc_hz(spec.tsc_hz)?;
        self.reset_msrs = self.read_msrs(&self.vm.msrs);
        self.write_state(&spec.state, &[])?;
        self.reset_lapic = self
            .fd
            .get_lapic()
            .map_err(|e| self.failed("read the local APIC", "KVM_GET_LAPIC", e))?;
        Ok(())
    }

    fn failed(&self, what: &str, ioctl: &str, e: kvm_ioctls::Error) -> Error {
        failed(&format!("{what} of vCPU {}", self.index), ioctl, e)
    }

    fn set_tsc_hz(&self, hz: u64) -> Result<()> {
        let now = crate::tsc::frequency(Some(&self.fd));
        let off = hz.abs_diff(now);
        if hz == 0 || off <= now / 1_000_000 * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        let mhz = |hz: u64| hz as f64 / 1e6;
        if !self.vm.caps.tsc_control {
            return Err(Error::new(format!(
                "cannot give vCPU {} a TSC of {:.3} MHz: this host's runs at {:.3} MHz and its \
                 processor cannot scale it",
                self.index,
                mhz(hz),
                mhz(now)
            ))
            .remedy("leave the TSC frequency to the host"));
        }
        let khz = u32::try_from(hz / 1000).map_err(|_| {
            Error::new(format!("a TSC frequency of {:.3} MHz is out of range", mhz(hz)))
        })?;
        self.fd
            .set_tsc_khz(khz)
            .map_err(|e| self.failed("set the TSC frequency", "KVM_SET_TSC_KHZ", e))
    }
}
