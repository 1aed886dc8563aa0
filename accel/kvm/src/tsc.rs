//! The frequency of a guest's TSC.

use kvm_ioctls::{VcpuFd, VmFd};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// The TSC frequency of `vcpu` in Hz (KVM_GET_TSC_KHZ). A kernel that does not tell, because the
/// host's TSC is unstable or the call is unknown to it, is replaced by a measurement.
pub(crate) fn frequency(vcpu: Option<&VcpuFd>) -> u64 {
    // kvm-ioctls reports a failure as Err, but a kernel that knows no frequency answers 0.
    match vcpu.and_then(|v| v.get_tsc_khz().ok()) {
        Some(khz) if khz != 0 => u64::from(khz) * 1000,
        _ => measure(Duration::from_millis(20)),
    }
}

/// KVM_GET_TSC_KHZ, `_IO(KVMIO, 0xa3)`.
const GET_TSC_KHZ: libc::c_ulong = 0xaea3;

/// The TSC frequency in Hz that vCPUs of `vm` will have. Kernels tell it before there are vCPUs since
/// Linux 5.19 (KVM_CAP_VM_TSC_CONTROL).
pub(crate) fn of_vm(vm: &VmFd) -> Option<u64> {
    // SAFETY: the request takes no argument and touches no memory of ours.
    let khz = unsafe { libc::ioctl(vm.as_raw_fd(), GET_TSC_KHZ as _, 0) };
    u64::try_from(khz).ok().filter(|khz| *khz > 0).map(|khz| khz * 1000)
}

fn measure(time: Duration) -> u64 {
    // SAFETY: RDTSC is part of the x86-64 baseline and has no preconditions.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, t0) = (Instant::now(), ticks());
    std::thread::sleep(time);
    let (elapsed, t1) = (start.elapsed(), ticks());
    let hz = u128::from(t1.saturating_sub(t0)) * 1_000_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(hz).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_frequency_is_a_processors() {
        let hz = measure(Duration::from_millis(20));
        assert!((100_000_000..20_000_000_000).contains(&hz), "{hz}");
    }
}
