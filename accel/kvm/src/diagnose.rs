//! Why KVM does or does not work here, in words.

use std::fmt;

/// A working KVM.
#[derive(Clone, Debug)]
pub struct Info {
    /// KVM's API version; always 12.
    pub api_version: i32,
    /// vCPUs that a VM may have at most.
    pub max_vcpus: usize,
    /// Frequency of a guest's TSC in Hz.
    pub tsc_hz: u64,
    /// Whether this processor has VMX or SVM. A KVM that works without them emulates privileged
    /// code, slowly and with gaps.
    pub hardware: bool,
    /// Optional capabilities that this kernel lacks, by name.
    pub lacking: Vec<&'static str>,
}

/// What kind of obstacle it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The device node does not exist.
    NoNode,
    /// The device node may not be opened.
    NoPermission,
    /// Another hypervisor holds the hardware.
    Busy,
    /// No virtualisation hardware, or it is switched off.
    NoHardware,
    /// Another API version than 12.
    WrongApi,
    /// The kernel lacks something required.
    MissingCapabilities,
    /// Anything else.
    Other,
}

/// Why KVM cannot be used, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Diagnosis {
    /// The kind of obstacle.
    pub cause: Cause,
    /// What is the matter, one clause.
    pub what: String,
    /// How to fix it, one clause.
    pub remedy: String,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

impl std::error::Error for Diagnosis {}

impl From<Diagnosis> for tandem_accel::Error {
    fn from(d: Diagnosis) -> Self {
        tandem_accel::Error::new(d.what).remedy(d.remedy)
    }
}

impl Diagnosis {
    fn new(cause: Cause, what: impl Into<String>, remedy: impl Into<String>) -> Diagnosis {
        Diagnosis { cause, what: what.into(), remedy: remedy.into() }
    }
}

/// Looks whether KVM works: opens the device, checks version and capabilities, makes a VM with one
/// vCPU and drops it.
///
/// # Errors
/// What stands in the way.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn probe() -> Result<Info, Diagnosis> {
    Err(Diagnosis::new(
        Cause::NoHardware,
        "KVM runs x86 guests on x86-64 Linux hosts only",
        "use --accel tcg",
    ))
}

/// Whether this processor has virtualisation hardware that KVM could use.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn has_hardware() -> bool {
    false
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) use linux::{NODE, create_vm, open};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use linux::{has_hardware, probe};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod linux {
    use super::{Cause, Diagnosis, Info};
    use crate::{caps, tsc};
    use kvm_ioctls::{Kvm, VmFd};
    use std::ffi::CString;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::path::Path;

    /// The device node.
    pub(crate) const NODE: &str = "/dev/kvm";

    /// The version that the API document describes; it has not changed since 2007.
    const API_VERSION: i32 = 12;

    /// Looks whether KVM works: opens the device, checks version and capabilities, makes a VM with
    /// one vCPU and drops it.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn probe() -> Result<Info, Diagnosis> {
        let kvm = open(Path::new(NODE))?;
        let vm = create_vm(&kvm)?;
        let vcpu = vm.create_vcpu(0).map_err(|e| {
            Diagnosis::new(
                Cause::Other,
                format!("{NODE} makes no vCPU: {e}"),
                "see the kernel log (dmesg)",
            )
        })?;
        Ok(Info {
            api_version: kvm.get_api_version(),
            max_vcpus: kvm.get_max_vcpus(),
            tsc_hz: tsc::frequency(Some(&vcpu)),
            hardware: has_hardware(),
            lacking: caps::unavailable(&kvm),
        })
    }

    /// Opens the node and checks that the kernel has what we need.
    pub(crate) fn open(node: &Path) -> Result<Kvm, Diagnosis> {
        let shown = node.display();
        let bad_path =
            || Diagnosis::new(Cause::NoNode, format!("{shown} is no path"), "use /dev/kvm");
        let path = CString::new(node.as_os_str().as_encoded_bytes()).map_err(|_| bad_path())?;
        let kvm = Kvm::new_with_path(&path).map_err(|e| explain_open(node, e))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            let (what, remedy) = if version < 0 {
                (format!("{shown} is not a KVM device"), "recreate it: mknod /dev/kvm c 10 232")
            } else {
                (
                    format!("{shown} speaks API version {version}, not {API_VERSION}"),
                    "use a current kernel",
                )
            };
            return Err(Diagnosis::new(Cause::WrongApi, what, remedy));
        }
        let missing = caps::missing(&kvm);
        if !missing.is_empty() {
            return Err(Diagnosis::new(
                Cause::MissingCapabilities,
                format!("this kernel's KVM lacks {}", missing.join(", ")),
                "use Linux 4.13 or newer, or --accel tcg",
            ));
        }
        Ok(kvm)
    }

    /// KVM_CREATE_VM, which a signal may interrupt.
    pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, Diagnosis> {
        loop {
            let e = match kvm.create_vm() {
                Ok(vm) => return Ok(vm),
                Err(e) => e,
            };
            return Err(match e.errno() {
                libc::EINTR => continue,
                libc::EBUSY => Diagnosis::new(
                    Cause::Busy,
                    format!("{NODE} cannot make a VM: the virtualisation hardware is in use"),
                    "stop the other hypervisor (VirtualBox, VMware), or use --accel tcg",
                ),
                libc::EOPNOTSUPP | libc::ENODEV => no_hardware(),
                libc::ENOMEM => Diagnosis::new(
                    Cause::Other,
                    format!("{NODE} cannot make a VM: out of memory"),
                    "free host memory, or raise the cgroup's limit",
                ),
                _ => Diagnosis::new(
                    Cause::Other,
                    format!("{NODE} cannot make a VM: {e}"),
                    "see the kernel log (dmesg), or use --accel tcg",
                ),
            });
        }
    }

    fn no_hardware() -> Diagnosis {
        Diagnosis::new(
            Cause::NoHardware,
            "this processor offers no hardware virtualisation",
            "switch on VT-x or AMD-V in the firmware (on a virtual host: nested virtualisation), or \
             use --accel tcg",
        )
    }

    /// VMX (leaf 1 ECX bit 5) or SVM (leaf 8000_0001h ECX bit 2).
    pub fn has_hardware() -> bool {
        use std::arch::x86_64::__cpuid;
        // CPUID is part of the x86-64 baseline.
        let (basic, extended) = (__cpuid(1), __cpuid(0x8000_0001));
        basic.ecx & 1 << 5 != 0 || extended.ecx & 1 << 2 != 0
    }

    fn explain_open(node: &Path, e: kvm_ioctls::Error) -> Diagnosis {
        let shown = node.display();
        match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO if !has_hardware() => {
                let mut d = no_hardware();
                d.what = format!("{shown}: no such device, and {}", d.what);
                d.cause = if e.errno() == libc::ENOENT { Cause::NoNode } else { Cause::NoHardware };
                d
            }
            libc::ENOENT => Diagnosis::new(
                Cause::NoNode,
                format!("{shown}: no such device"),
                "load the module (modprobe kvm_intel or kvm_amd; in a container, pass --device \
                 /dev/kvm), or use --accel tcg",
            ),
            libc::ENODEV | libc::ENXIO => Diagnosis::new(
                Cause::NoNode,
                format!("{shown} exists but no driver answers it"),
                "load the module (modprobe kvm_intel or kvm_amd), or use --accel tcg",
            ),
            libc::EACCES => denied(node),
            libc::EPERM => Diagnosis::new(
                Cause::NoPermission,
                format!("{shown}: not permitted by a security policy"),
                "allow the device in the container's or the service's device list, or use --accel \
                 tcg",
            ),
            libc::EBUSY => Diagnosis::new(
                Cause::Busy,
                format!("{shown}: busy"),
                "stop the other hypervisor on this host, or use --accel tcg",
            ),
            _ => Diagnosis::new(
                Cause::Other,
                format!("{shown} cannot be opened: {e}"),
                "see the kernel log (dmesg), or use --accel tcg",
            ),
        }
    }

    /// The node is there and may not be opened: whose group would help?
    fn denied(node: &Path) -> Diagnosis {
        let shown = node.display();
        let what = format!("{shown}: permission denied");
        let Ok(meta) = std::fs::metadata(node) else {
            return Diagnosis::new(Cause::NoPermission, what, "run with --accel tcg");
        };
        let group_may = meta.file_type().is_char_device() && meta.mode() & 0o060 == 0o060;
        let remedy = match group_name(meta.gid()) {
            Some(g) if group_may && g != "root" => format!(
                "add yourself to group {g} (sudo usermod -aG {g} $USER, then log in again), or run \
                 with --accel tcg"
            ),
            _ => format!(
                "let your user open it (sudo setfacl -m u:$USER:rw {shown}), or run with --accel tcg"
            ),
        };
        Diagnosis::new(Cause::NoPermission, what, remedy)
    }

    fn group_name(gid: u32) -> Option<String> {
        let groups = std::fs::read_to_string("/etc/group").ok()?;
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, id) = (fields.next()?, fields.nth(1)?);
            (id.parse() == Ok(gid)).then(|| name.to_string())
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_missing_node_says_so_and_what_to_do() {
            let d = open(Path::new("/nonexistent/kvm")).err().unwrap();
            assert_eq!(d.cause, Cause::NoNode);
            let s = d.to_string();
            assert!(
                s.contains("/nonexistent/kvm: no such device") && s.contains("--accel tcg"),
                "{s}"
            );
        }

        #[test]
        fn something_else_is_not_taken_for_kvm() {
            let d = open(Path::new("/dev/null")).err().unwrap();
            assert_eq!(d.cause, Cause::WrongApi);
        }

        #[test]
        fn a_denied_node_names_its_group() {
            assert_eq!(group_name(0).as_deref(), Some("root"));
            let d = denied(Path::new("/dev/null"));
            assert_eq!(d.cause, Cause::NoPermission);
            assert!(d.remedy.contains("setfacl"), "{}", d.remedy);
        }
    }
}
