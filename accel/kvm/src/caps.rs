//! What we need of the kernel's KVM and what we use if it is there.

use kvm_ioctls::{Cap, Kvm};

/// Capabilities without which a PC cannot be run. All are in mainline since Linux 4.13.
const REQUIRED: [(Cap, &str); 15] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Hlt, "KVM_CAP_HLT"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Capabilities that make a VM better.
const WANTED: [(Cap, &str); 9] = [
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xsave2, "KVM_CAP_XSAVE2"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::InternalErrorData, "KVM_CAP_INTERNAL_ERROR_DATA"),
];

fn absent(kvm: &Kvm, list: &[(Cap, &'static str)]) -> Vec<&'static str> {
    list.iter().filter(|(c, _)| !kvm.check_extension(*c)).map(|&(_, n)| n).collect()
}

/// Names of required capabilities that the kernel lacks.
pub(crate) fn missing(kvm: &Kvm) -> Vec<&'static str> {
    absent(kvm, &REQUIRED)
}

/// Names of wanted capabilities that the kernel lacks.
pub(crate) fn unavailable(kvm: &Kvm) -> Vec<&'static str> {
    absent(kvm, &WANTED)
}

/// The optional powers of this kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    pub x2apic_api: bool,
    pub tsc_deadline: bool,
    pub tsc_control: bool,
    pub xcrs: bool,
    pub debugregs: bool,
    pub adjust_clock: bool,
    pub kvmclock_ctrl: bool,
    pub smm: bool,
    /// Bytes of the XSAVE area that KVM_GET_XSAVE(2) fills; `None`: only KVM_GET_FPU is there.
    pub xsave_len: Option<usize>,
    /// Whether to use KVM_GET_XSAVE2.
    pub xsave2: bool,
    /// Memslots per VM.
    pub memslots: u32,
}

impl Caps {
    pub fn read(kvm: &Kvm) -> Caps {
        let has = |c| kvm.check_extension(c);
        // The fixed size of struct kvm_xsave without its flexible part.
        const XSAVE1: usize = 4096;
        let xsave2 = kvm.check_extension_int(Cap::Xsave2);
        let xsave_len = has(Cap::Xsave).then_some(usize::try_from(xsave2).unwrap_or(0).max(XSAVE1));
        Caps {
            x2apic_api: has(Cap::X2ApicApi),
            tsc_deadline: has(Cap::TscDeadlineTimer),
            tsc_control: has(Cap::TscControl),
            xcrs: has(Cap::Xcrs),
            debugregs: has(Cap::Debugregs),
            adjust_clock: has(Cap::AdjustClock),
            kvmclock_ctrl: has(Cap::KvmclockCtrl),
            smm: has(Cap::X86Smm),
            xsave_len,
            xsave2: xsave2 > 0,
            memslots: kvm.get_nr_memslots() as u32,
        }
    }
}
