//! CPU models: what `--cpu MODEL[,+feature][,-feature][,property=value]` means, as data.
//!
//! A model is a list of features, never code. Three steps lead from a command line to what CPUID
//! answers:
//!
//! ```text
//!   "x86-64-v3,-avx2" ── ModelSpec::parse ──► ModelSpec ── build(spec, platform) ──► CpuidTable
//!                                                             │                        │ for_apic_id
//!                         AccelOps::supported_cpuid ──────────┘                        ▼
//!                                                                             one table per vCPU
//! ```
//!
//! What always holds: a feature that a model or the user names and the accelerator cannot give is
//! an error before boot that names it. Only `max`, `host` and a model's *wishes* (system features
//! that user code does not depend on) follow the accelerator.
//!
//! Identity. `max` and `host` take vendor, family, model, stepping and brand from the
//! accelerator's table where it states them. The named models take the accelerator's vendor only
//! (a guest picks its entry paths and mitigations by vendor, which must fit the silicon that runs
//! it) and are otherwise family 15, model 107, stepping 1, as QEMU's `qemu64`. An accelerator that
//! has no vendor of its own should state AuthenticAMD: Linux leaves out page-table isolation and
//! the other Meltdown-era work-arounds there, which makes every system call cheaper.

mod build;
mod cache;
mod parse;
mod topology;
mod xsave;

pub use build::{APIC_BUS_HZ, Platform, build};
pub use topology::Topology;
pub use xsave::{XsaveComponent, XsaveLayout};

use super::feature::Feature;

/// KVM's signature in leaf 4000_0000h.
pub const KVM_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";

/// Where a model's features come from.
#[derive(Clone, Copy, Debug)]
enum Base {
    /// `needs`, lists of features that the accelerator must give; `wishes`, taken where it can.
    Listed { needs: &'static [&'static [&'static str]], wishes: &'static [&'static [&'static str]] },
    /// All that the accelerator gives.
    All,
}

/// A CPU model.
#[derive(Debug)]
pub struct Model {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for listings.
    pub about: &'static str,
    base: Base,
}

/// What every 64-bit PC has; with it the baseline of the x86-64 psABI (CMOV, CX8, FPU, FXSR, MMX,
/// SCE, SSE, SSE2).
const BASELINE: &[&str] = &[
    "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge",
    "mca", "cmov", "pat", "pse36", "clflush", "mmx", "fxsr", "sse", "sse2", "syscall", "nx", "lm",
];
/// psABI x86-64-v2.
const V2: &[&str] = &["cx16", "lahf-lm", "popcnt", "pni", "ssse3", "sse4.1", "sse4.2"];
/// psABI x86-64-v3 (OSXSAVE stands for XSAVE enabled by the system).
const V3: &[&str] = &["xsave", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"];
/// psABI x86-64-v4.
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

/// Timers, interrupt delivery and paravirtual clocks: what the system uses, wherever it can be had.
const PLATFORM_WISHES: &[&str] = &[
    "x2apic",
    "tsc-deadline",
    "tsc-adjust",
    "arat",
    "invtsc",
    "kvmclock",
    "kvmclock-legacy",
    "kvmclock-stable-bit",
    "kvm-nopiodelay",
    "kvm-steal-time",
    "kvm-pv-eoi",
    "kvm-pv-unhalt",
    "kvm-pv-tlb-flush",
    "kvm-pv-ipi",
    "kvm-pv-sched-yield",
    "kvm-poll-control",
    "kvm-asyncpf",
    "kvm-asyncpf-int",
];
/// What a kernel of the level's time turns on for protection or speed.
const SYSTEM_WISHES: &[&str] =
    &["rdtscp", "pdpe1gb", "pcid", "invpcid", "fsgsbase", "smep", "smap", "umip", "erms", "fsrm"];
/// QEMU lists SSE3, CX16 and LAHF for qemu64 but runs without them; so here they are wishes.
const QEMU64_WISHES: &[&str] = &["pni", "cx16", "lahf-lm"];
const XSAVE_WISHES: &[&str] = &["xsaveopt", "xsavec", "xgetbv1"];

impl Model {
    /// The features that it has of need; those that `max` and `host` have follow the accelerator.
    pub fn needs(&self) -> Vec<Feature> {
        match self.base {
            Base::Listed { needs, .. } => {
                needs.iter().flat_map(|l| l.iter()).map(|n| super::feature::known(n)).collect()
            }
            Base::All => Vec::new(),
        }
    }
}

static MODELS: &[Model] = &[
    Model { name: "max", about: "all that the accelerator can give", base: Base::All },
    Model {
        name: "host",
        about: "the host's processor, as far as the accelerator gives it",
        base: Base::All,
    },
    Model {
        name: "qemu64",
        about: "QEMU's plain 64-bit processor",
        base: Base::Listed { needs: &[BASELINE], wishes: &[QEMU64_WISHES, PLATFORM_WISHES] },
    },
    Model {
        name: "x86-64-v1",
        about: "psABI baseline: SSE2",
        base: Base::Listed { needs: &[BASELINE], wishes: &[PLATFORM_WISHES] },
    },
    Model {
        name: "x86-64-v2",
        about: "psABI level 2: SSE4.2, POPCNT, CMPXCHG16B",
        base: Base::Listed { needs: &[BASELINE, V2], wishes: &[PLATFORM_WISHES, SYSTEM_WISHES] },
    },
    Model {
        name: "x86-64-v3",
        about: "psABI level 3: AVX2, FMA, BMI2, MOVBE",
        base: Base::Listed {
            needs: &[BASELINE, V2, V3],
            wishes: &[PLATFORM_WISHES, SYSTEM_WISHES, XSAVE_WISHES],
        },
    },
    Model {
        name: "x86-64-v4",
        about: "psABI level 4: AVX-512 F, BW, CD, DQ, VL",
        base: Base::Listed {
            needs: &[BASELINE, V2, V3, V4],
            wishes: &[PLATFORM_WISHES, SYSTEM_WISHES, XSAVE_WISHES],
        },
    },
];

/// All models, for listings.
pub fn models() -> &'static [Model] {
    MODELS
}

/// A parsed `--cpu` argument. Make one with [`ModelSpec::parse`].
#[derive(Clone, Debug)]
pub struct ModelSpec {
    model: &'static Model,
    /// What the user turned on or off, in the order given; the last word on a feature counts.
    features: Vec<(Feature, bool)>,
    vendor: Option<[u8; 12]>,
    family: Option<u32>,
    model_nr: Option<u32>,
    stepping: Option<u32>,
    brand: Option<String>,
    phys_bits: Option<u8>,
    /// Whether the guest may see the hypervisor's leaves.
    paravirt: bool,
}

impl ModelSpec {
    /// The model's name.
    pub fn name(&self) -> &'static str {
        self.model.name
    }
    /// What the user said last about `f`.
    fn explicit(&self, f: Feature) -> Option<bool> {
        self.features.iter().rev().find(|(g, _)| *g == f).map(|&(_, on)| on)
    }
}
