//! CPUID tables ⇄ the kernel's.

use super::Vcpu;
use crate::caps::Caps;
use crate::error::failed;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;
use tandem_accel::x86::cpuid::{CpuidTable, Regs};
use tandem_accel::x86::feature;
use tandem_accel::{Error, Result};

fn to_table(cpuid: &CpuId) -> CpuidTable {
    let mut t = CpuidTable::default();
    for e in cpuid.as_slice() {
        let regs = Regs { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx };
        if e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 {
            t.set_sub(e.function, e.index, regs);
        } else {
            t.set(e.function, regs);
        }
    }
    t
}

fn from_table(t: &CpuidTable) -> Vec<kvm_cpuid_entry2> {
    t.iter()
        .map(|(function, index, indexed, r)| kvm_cpuid_entry2 {
            function,
            index,
            flags: if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: r.eax,
            ebx: r.ebx,
            ecx: r.ecx,
            edx: r.edx,
            ..Default::default()
        })
        .collect()
}

/// What the kernel can give a guest: KVM_GET_SUPPORTED_CPUID, with what it says elsewhere or leaves
/// to us.
pub(crate) fn supported(kvm: &Kvm, caps: &Caps) -> Result<CpuidTable> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| failed("read the supported CPU features", "KVM_GET_SUPPORTED_CPUID", e))?;
    let mut t = to_table(&cpuid);
    // The in-kernel local APIC has both; the call does not say so on every kernel.
    let mut own = vec!["x2apic"];
    if caps.tsc_deadline {
        own.push("tsc-deadline");
    }
    for f in own.into_iter().filter_map(feature::find) {
        if let Some(r) = t.get_mut(f.word.leaf, 0) {
            r.ecx |= f.mask();
        }
    }
    // The brand string is the host's, whether or not the kernel repeats it.
    for leaf in 0x8000_0002..=0x8000_0004 {
        if t.query(leaf, 0) == Regs::default() {
            let r = std::arch::x86_64::__cpuid(leaf);
            t.set(leaf, Regs { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx });
        }
    }
    Ok(t)
}

impl Vcpu {
    /// Tells the kernel what CPUID answers; before anything else, because it decides which register
    /// bits are valid.
    pub(super) fn set_cpuid(&self, t: &CpuidTable) -> Result<()> {
        let entries = from_table(t);
        let cpuid = CpuId::from_entries(&entries).map_err(|_| {
            Error::new(format!(
                "the CPU model of vCPU {} has {} CPUID entries, more than the kernel takes",
                self.index,
                entries.len()
            ))
        })?;
        self.fd
            .set_cpuid2(&cpuid)
            .map_err(|e| self.failed("set the CPU model", "KVM_SET_CPUID2", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_survive_the_kernels_form() {
        let mut t = CpuidTable::default();
        t.set(1, Regs { eax: 1, ebx: 2, ecx: 3, edx: 4 });
        t.set_sub(4, 0, Regs { eax: 5, ..Regs::default() });
        t.set_sub(4, 3, Regs { edx: 6, ..Regs::default() });
        let back = to_table(&CpuId::from_entries(&from_table(&t)).unwrap());
        assert_eq!(back, t);
    }
}
