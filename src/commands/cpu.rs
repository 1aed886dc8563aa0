//! Processors: those of the machine, and CPU models.

use super::machine::SysEmuTarget;
use crate::machine::Machine;
use crate::qapi::{Error, Members, Result};
use serde_json::Value;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::x86::feature::{self, FeatureSet};
use tandem_accel::x86::model::{
    KVM_SIGNATURE, Model, ModelSpec, Platform, Topology, build, models,
};

crate::object! {
    /// Where a processor sits.
    pub struct CpuInstanceProperties {
        /// Socket.
        socket_id: Option<i64>,
        /// Core in its socket.
        core_id: Option<i64>,
        /// Thread in its core.
        thread_id: Option<i64>,
    }
    /// A processor.
    pub struct CpuInfoFast {
        /// Its number, from 0.
        cpu_index: i64,
        /// Its place among objects.
        qom_path: String,
        /// The host's id of its thread.
        thread_id: i64,
        /// Where it sits.
        props: Option<CpuInstanceProperties>,
        /// Its architecture.
        target: SysEmuTarget,
    }
    /// A place for a processor.
    pub struct HotpluggableCPU {
        /// Type of processor that fits.
        r#type: String,
        /// Processors that it holds.
        vcpus_count: i64,
        /// Where it is.
        props: CpuInstanceProperties,
        /// The processor that sits there.
        qom_path: Option<String>,
    }
    /// A CPU model.
    pub struct CpuDefinitionInfo {
        /// Name.
        name: String,
        /// Whether it can be moved between hosts.
        migration_safe: Option<bool>,
        /// Whether it is the same everywhere.
        r#static: bool,
        /// Features that it has and that the accelerator cannot give here.
        unavailable_features: Option<Vec<String>>,
        /// Name of its type.
        typename: String,
        /// Whether it should not be used any more.
        deprecated: bool,
    }
    /// A CPU model with changes.
    pub struct CpuModelInfo {
        /// Name of the model.
        name: String,
        /// Features and properties that differ from the model's.
        props: Option<Value>,
    }
    /// A CPU model in other words.
    pub struct CpuModelExpansionInfo {
        /// The model.
        model: CpuModelInfo,
    }
}

crate::choice! {
    /// How a CPU model is put in other words.
    pub enum CpuModelExpansionType {
        /// As changes to a model that never changes.
        Static = "static",
        /// With every property.
        Full = "full",
    }
}

/// Name of the type of a model's processors.
pub fn type_name(model: &str) -> String {
    format!("{model}-x86_64-cpu")
}

/// Place of processor `index` among objects.
pub fn path(index: usize) -> String {
    format!("/machine/unattached/device[{index}]")
}

fn props(vm: &Machine, index: i64) -> CpuInstanceProperties {
    let smp = vm.config().smp;
    let (cores, threads) = (i64::from(smp.cores.max(1)), i64::from(smp.threads.max(1)));
    CpuInstanceProperties {
        socket_id: Some(index / (cores * threads)),
        core_id: Some(index / threads % cores),
        thread_id: Some(index % threads),
    }
}

fn cpus(vm: &Machine) -> Vec<CpuInfoFast> {
    let one = |(i, (_, thread)): (usize, (_, i32))| CpuInfoFast {
        cpu_index: i as i64,
        qom_path: path(i),
        thread_id: thread.into(),
        props: Some(props(vm, i as i64)),
        target: SysEmuTarget::X86_64,
    };
    vm.vcpus().enumerate().map(one).collect()
}

/// Every place, the last first, as QEMU lists them.
fn places(vm: &Machine) -> Result<Vec<HotpluggableCPU>> {
    if vm.config().is_none() {
        return Err(Error::new("this machine has no processors"));
    }
    let model = vm.config().cpu.split(',').next().unwrap_or_default();
    let one = |i: usize| HotpluggableCPU {
        r#type: type_name(model),
        vcpus_count: 1,
        props: props(vm, i as i64),
        qom_path: Some(path(i)),
    };
    Ok((0..vm.vcpus().count()).rev().map(one).collect())
}

fn definitions(vm: &Machine) -> Result<Vec<CpuDefinitionInfo>> {
    let supported = FeatureSet::of(&vm.accel().supported_cpuid()?);
    let one = |m: &Model| {
        let missing = m.needs().into_iter().filter(|f| !supported.has(*f));
        let follows = matches!(m.name, "max" | "host");
        CpuDefinitionInfo {
            name: m.name.into(),
            migration_safe: Some(!follows),
            r#static: false,
            unavailable_features: Some(missing.map(|f| f.name.to_string()).collect()),
            typename: type_name(m.name),
            deprecated: false,
        }
    };
    Ok(models().iter().map(one).collect())
}

/// The model as a command line writes it.
fn spelled(model: &CpuModelInfo) -> Result<String> {
    let mut text = model.name.clone();
    let props = match &model.props {
        None => return Ok(text),
        Some(Value::Object(props)) => props,
        Some(_) => {
            return Err(Error::new("Invalid parameter type for 'model.props', expected: object"));
        }
    };
    for (name, value) in props {
        match value {
            // Says which features `host` has; ours can all be moved.
            Value::Bool(_) if name == "migratable" => {}
            Value::Bool(true) => text += &format!(",+{name}"),
            Value::Bool(false) => text += &format!(",-{name}"),
            Value::String(s) => text += &format!(",{name}={s}"),
            other => text += &format!(",{name}={other}"),
        }
    }
    Ok(text)
}

fn expand(vm: &Machine, ty: CpuModelExpansionType, model: &CpuModelInfo) -> Result<CpuModelInfo> {
    let name = model.name.trim_end_matches("-x86_64-cpu").to_string();
    let model = CpuModelInfo { name, props: model.props.clone() };
    if !models().iter().any(|m| m.name == model.name) {
        return Err(Error::new(format!("The CPU model '{}' is not known", model.name)));
    }
    let spec = ModelSpec::parse(&spelled(&model)?).map_err(crate::qapi::faults)?;
    let accel = vm.accel();
    let supported = accel.supported_cpuid()?;
    let platform = Platform {
        accel: &accel.name().to_uppercase(),
        supported: &supported,
        topology: Topology::new(1, 1, 1)?,
        tsc_hz: accel.tsc_hz(),
        hypervisor: Some(KVM_SIGNATURE),
    };
    let table = build(&spec, &platform).map_err(crate::qapi::faults)?;
    let name = match ty {
        CpuModelExpansionType::Static => "base".into(),
        CpuModelExpansionType::Full => model.name,
    };
    Ok(CpuModelInfo { name, props: Some(Value::Object(properties(&table))) })
}

/// Everything that a CPUID table says, in names.
fn properties(table: &CpuidTable) -> Members {
    let has = FeatureSet::of(table);
    let mut all: Members =
        feature::all().map(|f| (f.name.to_string(), has.has(f).into())).collect();
    let text = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string()
    };
    let id = table.query(0, 0);
    let signature = table.query(1, 0).eax;
    let (base, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
    let family = if base == 0xf { base + extended } else { base };
    let brand: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .map(|leaf| table.query(leaf, 0))
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .collect();
    all.insert("vendor".into(), text(&[id.ebx, id.edx, id.ecx]).into());
    all.insert("family".into(), family.into());
    all.insert("model".into(), (signature >> 4 & 0xf | signature >> 12 & 0xf0).into());
    all.insert("stepping".into(), (signature & 0xf).into());
    all.insert("model-id".into(), text(&brand).into());
    all.insert("min-level".into(), id.eax.into());
    all.insert("min-xlevel".into(), table.query(0x8000_0000, 0).eax.into());
    all
}

crate::commands! {
    /// Lists the machine's processors.
    fn "query-cpus-fast"(cx) -> Vec<CpuInfoFast> { Ok(cpus(cx.vm)) }

    /// Lists the places for processors. All are taken.
    fn "query-hotpluggable-cpus"(cx) -> Vec<HotpluggableCPU> { places(cx.vm) }

    /// Lists CPU models and what of them the accelerator cannot give.
    fn "query-cpu-definitions"(cx) -> Vec<CpuDefinitionInfo> { definitions(cx.vm) }

    /// Says what a CPU model means on this accelerator.
    fn "query-cpu-model-expansion"(cx, {
        /// In which words.
        r#type: CpuModelExpansionType,
        /// The model.
        model: CpuModelInfo,
    }) -> CpuModelExpansionInfo {
        expand(cx.vm, r#type, &model).map(|model| CpuModelExpansionInfo { model })
    }
}
