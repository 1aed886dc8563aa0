//! From errno to a sentence.

use tandem_accel::Error;

/// `attempt` ("set the registers of vCPU 0") by `ioctl` failed with `errno`.
pub(crate) fn failed(attempt: &str, ioctl: &str, errno: kvm_ioctls::Error) -> Error {
    let remedy = match errno.errno() {
        libc::ENOMEM => "free host memory, or raise the cgroup's limit",
        libc::EMFILE | libc::ENFILE => "raise the limit of open files (ulimit -n)",
        libc::EINVAL => {
            "this kernel's KVM does not take these values; try --cpu max or --accel tcg"
        }
        libc::EBUSY => "stop other hypervisors on this host, or use --accel tcg",
        libc::EPERM | libc::EACCES => {
            "run where the kernel and its security policy allow KVM, or use --accel tcg"
        }
        libc::EIO | libc::ENXIO | libc::ENOSYS | libc::ENOTTY => {
            "this kernel's KVM cannot do it; use --accel tcg"
        }
        _ => "see the kernel log (dmesg), or use --accel tcg",
    };
    Error::new(format!("cannot {attempt} ({ioctl})")).caused_by(errno).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_a_sentence() {
        let e = failed("create vCPU 3", "KVM_CREATE_VCPU", kvm_ioctls::Error::new(libc::ENOMEM));
        let s = e.to_string();
        assert!(s.starts_with("cannot create vCPU 3 (KVM_CREATE_VCPU): Cannot allocate"), "{s}");
        assert!(s.ends_with("raise the cgroup's limit"), "{s}");
    }
}
