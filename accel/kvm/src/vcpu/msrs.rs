//! Model-specific registers.

use super::Vcpu;
use crate::error::failed;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use std::collections::BTreeMap;
use tandem_accel::Result;

const TSC: u32 = 0x10;
const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;
const EFER: u32 = 0xc000_0080;

/// MSRs that have a field of their own in the architectural state.
const IN_STATE: [u32; 2] = [APIC_BASE, EFER];

/// State that the kernel keeps but does not list: variable- and fixed-range MTRRs and their default
/// type (SDM vol. 3 §12.11), and the deadline timer.
fn unlisted() -> impl Iterator<Item = u32> {
    (0x200..0x210).chain([0x250, 0x258, 0x259]).chain(0x268..0x270).chain([0x2ff, TSC_DEADLINE])
}

/// How many MSRs one call takes; the kernel's own limit is 256.
const BATCH: usize = 128;

/// The MSRs that make up a vCPU's state, as this kernel lists them.
pub(crate) fn list(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm
        .get_msr_index_list()
        .map_err(|e| failed("list the model-specific registers", "KVM_GET_MSR_INDEX_LIST", e))?;
    let mut v: Vec<_> = list.as_slice().iter().copied().filter(|i| !IN_STATE.contains(i)).collect();
    v.extend(unlisted());
    v.sort_unstable();
    v.dedup();
    Ok(v)
}

/// The order of writing: the TSC before what depends on it, the deadline timer last.
fn rank(index: u32) -> (u8, u32) {
    match index {
        TSC => (0, index),
        TSC_DEADLINE => (2, index),
        _ => (1, index),
    }
}

/// What to write: the RESET values, but of the TSC, overlaid with `wanted`.
fn plan(reset: &[(u32, u64)], wanted: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let mut all: BTreeMap<u32, u64> = reset.iter().copied().filter(|(i, _)| *i != TSC).collect();
    all.extend(wanted.iter().copied().filter(|(i, _)| !IN_STATE.contains(i)));
    let mut v: Vec<_> = all.into_iter().collect();
    v.sort_by_key(|(i, _)| rank(*i));
    v
}

fn entries(msrs: &[(u32, u64)]) -> Option<Msrs> {
    let v: Vec<_> = msrs
        .iter()
        .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    Msrs::from_entries(&v).ok()
}

impl Vcpu {
    /// Reads those of `indices` that the kernel gives; it may list registers that this processor
    /// lacks.
    pub(super) fn read_msrs(&self, indices: &[u32]) -> Vec<(u32, u64)> {
        let mut out = Vec::with_capacity(indices.len());
        let mut left = indices;
        while !left.is_empty() {
            let batch: Vec<_> = left.iter().take(BATCH).map(|&i| (i, 0)).collect();
            let Some(mut msrs) = entries(&batch) else { break };
            // The kernel stops at the first that it refuses and says how many it did.
            let done = self.fd.get_msrs(&mut msrs).unwrap_or(0).min(batch.len());
            out.extend(msrs.as_slice()[..done].iter().map(|e| (e.index, e.data)));
            let skip = usize::from(done < batch.len());
            if skip == 1 {
                log::debug!("vCPU {}: no MSR {:#x}", self.index, batch[done].0);
            }
            left = &left[done + skip..];
        }
        out
    }

    /// Writes `wanted` over `reset`. A register that the kernel refuses is skipped: it does not
    /// exist in this guest, or is read-only.
    pub(super) fn write_msrs(&self, reset: &[(u32, u64)], wanted: &[(u32, u64)]) {
        let all = plan(reset, wanted);
        let mut left = &all[..];
        while !left.is_empty() {
            let batch = &left[..left.len().min(BATCH)];
            let Some(msrs) = entries(batch) else { break };
            let done = self.fd.set_msrs(&msrs).unwrap_or(0).min(batch.len());
            let skip = usize::from(done < batch.len());
            if skip == 1 {
                let (index, value) = batch[done];
                log::debug!("vCPU {}: KVM refuses MSR {index:#x} = {value:#x}", self.index);
            }
            left = &left[done + skip..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_values_fill_the_gaps_and_order_holds() {
        let v =
            plan(&[(TSC, 9), (0x174, 1), (TSC_DEADLINE, 0)], &[(0x175, 7), (EFER, 5), (0x174, 2)]);
        assert_eq!(v, [(0x174, 2), (0x175, 7), (TSC_DEADLINE, 0)]);
        let v = plan(&[], &[(TSC_DEADLINE, 3), (0x11, 1), (TSC, 2)]);
        assert_eq!(v.iter().map(|m| m.0).collect::<Vec<_>>(), [TSC, 0x11, TSC_DEADLINE]);
    }
}
