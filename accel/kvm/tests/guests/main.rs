//! Hand-assembled guests on the kernel's KVM. Where /dev/kvm does not work, each test prints why and
//! counts as passed.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod interrupts;
mod machine;
mod modes;
mod running;
mod small;
mod states;
