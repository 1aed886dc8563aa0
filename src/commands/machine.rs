//! The machine as a whole: version, target, accelerator, types, name.

use crate::config::VmConfig;
use crate::config::validate::{MACHINES, MAX_CPUS};
use crate::qapi::{Error, Result};
use crate::qemu::table;

crate::object! {
    /// A version in three parts.
    pub struct VersionTriple {
        /// Major version.
        major: i64,
        /// Minor version.
        minor: i64,
        /// Micro version.
        micro: i64,
    }
    /// The version of the interface and of the program behind it.
    pub struct VersionInfo {
        /// The QEMU version whose interface this is.
        qemu: VersionTriple,
        /// The program behind it.
        package: String,
    }
    /// What the guest's processors are.
    pub struct TargetInfo {
        /// Architecture.
        arch: SysEmuTarget,
    }
    /// KVM on this host.
    pub struct KvmInfo {
        /// This machine runs on it.
        enabled: bool,
        /// It is there.
        present: bool,
    }
    /// The machine's identity.
    pub struct UuidInfo {
        /// UUID; all zeros if it has none.
        uuid as "UUID": String,
    }
    /// A machine type.
    pub struct MachineInfo {
        /// Name.
        name: String,
        /// Whether it is taken if none is named.
        is_default: Option<bool>,
        /// Most processors.
        cpu_max: i64,
        /// Whether processors can be plugged in.
        hotpluggable_cpus: bool,
        /// Whether NUMA nodes can be given memory by size.
        numa_mem_supported: bool,
        /// Whether it should not be used any more.
        deprecated: bool,
        /// CPU model if none is named.
        default_cpu_type: Option<String>,
        /// Whether it has ACPI.
        acpi: bool,
    }
    /// A key of an option.
    pub struct CommandLineParameterInfo {
        /// Its name.
        name: String,
        /// Type of its value.
        r#type: CommandLineParameterType,
    }
    /// An option of QEMU's command line.
    pub struct CommandLineOptionInfo {
        /// Its name.
        option: String,
        /// Its keys.
        parameters: Vec<CommandLineParameterInfo>,
    }
    /// The machine's name.
    pub struct NameInfo {
        /// Name, if it has one.
        name: Option<String>,
    }
}

crate::choice! {
    /// An architecture.
    pub enum SysEmuTarget {
        /// x86 with 64 bits.
        X86_64 = "x86_64",
    }
}

crate::choice! {
    /// Type of a key's value.
    pub enum CommandLineParameterType {
        /// Text.
        String = "string",
    }
}

fn machines() -> Vec<MachineInfo> {
    let one = |name: &&str| {
        let none = *name == VmConfig::NO_MACHINE;
        MachineInfo {
            name: name.to_string(),
            is_default: (!none).then_some(true),
            cpu_max: if none { 1 } else { MAX_CPUS.into() },
            hotpluggable_cpus: false,
            numa_mem_supported: false,
            deprecated: false,
            default_cpu_type: (!none).then(|| super::cpu::type_name("qemu64")),
            acpi: !none,
        }
    };
    MACHINES.iter().map(one).collect()
}

/// The options that are done, with the keys that programs look for.
fn options(name: Option<String>) -> Result<Vec<CommandLineOptionInfo>> {
    let done = table::OPTIONS.iter().filter(|o| matches!(o.action, table::Action::Do(_)));
    let one = |o: &table::Opt| CommandLineOptionInfo {
        option: o.name.into(),
        parameters: o
            .keys
            .iter()
            .map(|k| CommandLineParameterInfo {
                name: k.to_string(),
                r#type: CommandLineParameterType::String,
            })
            .collect(),
    };
    let all: Vec<_> =
        done.filter(|o| name.as_deref().is_none_or(|n| n == o.name)).map(one).collect();
    match name {
        Some(n) if all.is_empty() => Err(Error::new(format!("invalid option name: {n}"))),
        _ => Ok(all),
    }
}

/// The version of the interface. It is that of the QEMU release whose commands and machine types
/// this follows; clients choose what they ask and how by it.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 2 },
        package: concat!("tandem-", env!("CARGO_PKG_VERSION")).into(),
    }
}

crate::commands! {
    /// Tells the version.
    fn "query-version"(_cx) -> VersionInfo { Ok(version()) }

    /// Tells what the guest's processors are.
    fn "query-target"(_cx) -> TargetInfo { Ok(TargetInfo { arch: SysEmuTarget::X86_64 }) }

    /// Tells whether the machine runs on KVM.
    fn "query-kvm"(cx) -> KvmInfo {
        let enabled = cx.vm.accel().name() == "kvm";
        Ok(KvmInfo { enabled, present: enabled || crate::accel::kvm_is_present() })
    }

    /// Lists the machine types.
    fn "query-machines"(_cx) -> Vec<MachineInfo> { Ok(machines()) }

    /// Lists the options of QEMU's command line.
    fn "query-command-line-options"(_cx, {
        /// Only this one.
        option: Option<String>,
    }) -> Vec<CommandLineOptionInfo> { options(option) }

    /// Tells the machine's UUID.
    fn "query-uuid"(cx) -> UuidInfo {
        let none = || "00000000-0000-0000-0000-000000000000".into();
        Ok(UuidInfo { uuid: cx.vm.config().uuid.clone().unwrap_or_else(none) })
    }

    /// Tells the machine's name.
    fn "query-name"(cx) -> NameInfo { Ok(NameInfo { name: cx.vm.config().name.clone() }) }
}
