//! The accelerator: one VM.

use crate::caps::Caps;
use crate::chips::{self, ResetState};
use crate::diagnose::{self, NODE};
use crate::error::failed;
use crate::irq::{self, Delivery};
use crate::memory::Memslots;
use crate::{tsc, vcpu};
use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_clock_data, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use tandem_accel::clock::Clock;
use tandem_accel::memory::GuestMap;
use tandem_accel::vcpu::{VcpuHandle, VcpuSpec};
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::{AccelOps, Error, IrqChip, Result};

/// Three pages that VMX needs for a guest in real mode (a TSS) and a fourth for its identity map;
/// below the firmware, where a PC has no memory and no device.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: u64 = IDENTITY_MAP + 0x1000;

/// What the accelerator and its vCPU threads share.
pub(crate) struct Vm {
    pub fd: Arc<VmFd>,
    pub caps: Caps,
    /// What KVM_GET_SUPPORTED_CPUID answers; also the layout of the XSAVE area.
    pub supported: CpuidTable,
    /// MSRs that the kernel lists as state.
    pub msrs: Vec<u32>,
    /// The guest memory map, once attached.
    pub map: OnceLock<Arc<GuestMap>>,
    /// Counts RESETs; a vCPU that has seen fewer resets its local APIC before it runs.
    pub resets: AtomicU64,
    /// Counts resumptions; a vCPU that has seen fewer tells its guest that it was paused.
    pub resumes: AtomicU64,
    reset_state: ResetState,
    /// The kernel's guest clock when the VM was paused.
    stopped_clock: Mutex<Option<u64>>,
}

impl Vm {
    /// Follows the machine's clock: kvmclock stands still while that does.
    fn run_changed(&self, running: bool) {
        if running {
            if let Some(clock) = self.stopped_clock.lock().unwrap().take() {
                let data = kvm_clock_data { clock, ..Default::default() };
                if let Err(e) = self.fd.set_clock(&data) {
                    log::warn!("{}", failed("set the guest's clock", "KVM_SET_CLOCK", e));
                }
            }
            self.resumes.fetch_add(1, Ordering::Release);
        } else if self.caps.adjust_clock {
            match self.fd.get_clock() {
                Ok(data) => *self.stopped_clock.lock().unwrap() = Some(data.clock),
                Err(e) => {
                    log::warn!("{}", failed("read the guest's clock", "KVM_GET_CLOCK", e));
                }
            }
        }
    }
}

/// KVM, set up for one VM.
pub struct KvmAccel {
    vm: Arc<Vm>,
    clock: Arc<Clock>,
    slots: Arc<Memslots>,
    delivery: Arc<Delivery>,
    tsc_hz: u64,
}

impl KvmAccel {
    /// Opens KVM and creates a VM with interrupt chips and timer.
    ///
    /// # Errors
    /// What stands in the way and how to remove it (see [`crate::probe`]), or which step failed.
    pub fn new() -> Result<Arc<KvmAccel>> {
        let kvm = diagnose::open(Path::new(NODE))?;
        let caps = Caps::read(&kvm);
        let fd = Arc::new(diagnose::create_vm(&kvm)?);
        let tsc_hz = match tsc::of_vm(&fd) {
            Some(hz) => hz,
            None => {
                // A VM of its own: vCPUs cannot be removed from the real one.
                let scratch = diagnose::create_vm(&kvm)?;
                tsc::frequency(scratch.create_vcpu(0).ok().as_ref())
            }
        };
        fd.set_identity_map_address(IDENTITY_MAP).map_err(|e| {
            failed("place the real-mode identity map", "KVM_SET_IDENTITY_MAP_ADDR", e)
        })?;
        fd.set_tss_address(TSS as usize)
            .map_err(|e| failed("place the real-mode task state", "KVM_SET_TSS_ADDR", e))?;
        if caps.x2apic_api {
            let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
            cap.args[0] = flags.into();
            fd.enable_cap(&cap)
                .map_err(|e| failed("enable 32-bit APIC IDs", "KVM_CAP_X2APIC_API", e))?;
        }
        let reset_state = chips::create(&fd)?;
        irq::set_routing(&fd)?;
        let supported = vcpu::cpuid::supported(&kvm, &caps)?;
        let msrs = vcpu::msrs::list(&kvm)?;
        let slots = Arc::new(Memslots::new(fd.clone(), caps.memslots));
        let delivery = Arc::new(Delivery::new(fd.clone()));
        let vm = Arc::new(Vm {
            fd,
            caps,
            supported,
            msrs,
            map: OnceLock::new(),
            resets: AtomicU64::new(0),
            resumes: AtomicU64::new(0),
            reset_state,
            stopped_clock: Mutex::new(None),
        });
        let clock = Clock::new();
        let observer = vm.clone();
        clock.observe(move |running| observer.run_changed(running));
        Ok(Arc::new(KvmAccel { vm, clock, slots, delivery, tsc_hz }))
    }

    /// Makes the kernel log writes by vCPUs to those regions whose page bits log
    /// ([`tandem_accel::memory::PageBits::set_logging`]). Call after turning logging on or off.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn follow_logging(&self) -> Result<()> {
        self.slots.follow_logging()
    }

    /// Marks the pages that vCPUs have written since the last call in the regions' page bits.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn collect_dirty(&self) -> Result<()> {
        self.slots.collect_dirty()
    }
}

impl AccelOps for KvmAccel {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn attach_memory(&self, map: &Arc<GuestMap>) -> Result<()> {
        if self.vm.map.set(map.clone()).is_err() {
            return Err(Error::new("guest memory is attached to this VM already"));
        }
        map.subscribe(self.slots.clone());
        self.slots.take_failure()
    }

    fn irqchip(&self) -> IrqChip {
        IrqChip::InKernel { lines: self.delivery.clone(), msi: self.delivery.clone() }
    }

    fn supported_cpuid(&self) -> Result<CpuidTable> {
        Ok(self.vm.supported.clone())
    }

    fn create_vcpu_thread(&self, spec: VcpuSpec) -> Result<VcpuHandle> {
        vcpu::spawn(self.vm.clone(), spec)
    }

    fn clock(&self) -> Arc<Clock> {
        self.clock.clone()
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    fn reset(&self) -> Result<()> {
        self.vm.reset_state.restore(&self.vm.fd)?;
        self.vm.resets.fetch_add(1, Ordering::Release);
        Ok(())
    }
}
