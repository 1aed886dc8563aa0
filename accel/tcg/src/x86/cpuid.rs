//! CPUID: the answers that depend on the processor's state, and what translation can give.

use super::Env;
use super::bits::cr4;
use tandem_accel::x86::cpuid::{CpuidTable, Regs};
use tandem_accel::x86::feature::{self, Feature, FeatureSet, Reg};
use tandem_accel::x86::gpr;
use tandem_accel::x86::model::XsaveLayout;

/// What CPUID answers now for this leaf and subleaf.
pub fn query(env: &Env, leaf: u32, sub: u32) -> Regs {
    let table: &CpuidTable = &env.vcpu().cpuid;
    let mut r = table.query(leaf, sub);
    let cpu = &env.cpu;
    match (leaf, sub) {
        (1, _) => {
            // OSXSAVE; and APIC, which follows the enable bit of IA32_APIC_BASE.
            r.ecx &= !(1 << 27);
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                r.ecx |= 1 << 27;
            }
            if env.vcpu().intc.as_ref().is_some_and(|i| i.apic_base() & 1 << 11 == 0) {
                r.edx &= !(1 << 9);
            }
        }
        (7, 0) => {
            r.ecx &= !(1 << 4);
            if cpu.cr4 & cr4::PKE != 0 {
                r.ecx |= 1 << 4;
            }
        }
        // Sizes of the areas that the current XCR0 asks for.
        (0xd, 0) if r.eax != 0 => r.ebx = XsaveLayout::of(table).standard_size(cpu.xcr0),
        (0xd, 1) if r.eax & 0b1010 != 0 => {
            r.ebx = XsaveLayout::of(table).compacted_size(cpu.xcr0);
        }
        _ => {}
    }
    r
}

/// The CPUID instruction.
pub fn cpuid(env: &mut Env) {
    let (leaf, sub) = (env.cpu.gpr[gpr::RAX] as u32, env.cpu.gpr[gpr::RCX] as u32);
    let r = query(env, leaf, sub);
    let g = &mut env.cpu.gpr;
    g[gpr::RAX] = r.eax.into();
    g[gpr::RBX] = r.ebx.into();
    g[gpr::RCX] = r.ecx.into();
    g[gpr::RDX] = r.edx.into();
}

/// What the translator gives on any host: system behaviour and integer instructions.
///
/// LA57 works too, but is left out: a guest kernel that finds it uses it, and walks five levels
/// where four would do. AutoIBRS, SRSO_NO, TSA_*_NO and SSB_NO are stated because a guest can do nothing
/// about the host's predictors and buffers; without them it would pay for thunks and flushes that
/// protect nothing here, and warn of what it cannot flush.
const OWN: &[&str] = &[
    "fpu",
    "vme",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "cmov",
    "pat",
    "pse36",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "cx16",
    "pcid",
    "x2apic",
    "movbe",
    "popcnt",
    "tsc-deadline",
    "arat",
    "fsgsbase",
    "tsc-adjust",
    "smep",
    "erms",
    "invpcid",
    "smap",
    "umip",
    "pku",
    "rdpid",
    "fsrm",
    "clflushopt",
    "clwb",
    "lahf-lm",
    "abm",
    "3dnowprefetch",
    "syscall",
    "nx",
    "pdpe1gb",
    "rdtscp",
    "lm",
    "invtsc",
    "xsaveerptr",
    "wbnoinvd",
    "lfence-always-serializing",
    "null-sel-clr-base",
    "auto-ibrs",
    "srso-no",
    "tsa-sq-no",
    "tsa-l1-no",
    "amd-no-ssb",
    "kvmclock-legacy",
    "kvm-nopiodelay",
    "kvmclock",
    "kvmclock-stable-bit",
    "kvm-pv-unhalt",
];

/// What is passed through to the host's processor, and so given where the host has it.
const PASSED_THROUGH: &[&str] = &[
    "pni",
    "pclmulqdq",
    "ssse3",
    "fma",
    "sse4.1",
    "sse4.2",
    "aes",
    "xsave",
    "avx",
    "f16c",
    "rdrand",
    "bmi1",
    "avx2",
    "bmi2",
    "rdseed",
    "adx",
    "sha-ni",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
];

/// The same for AVX-512, which needs both of the first two: opmasks are 64 bits wide only with BW.
const PASSED_THROUGH_512: &[&str] = &[
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512cd",
    "avx512ifma",
    "avx512vbmi",
    "avx512vbmi2",
    "avx512vnni",
    "avx512bitalg",
    "avx512-vpopcntdq",
    "avx512-bf16",
];

/// XCR0 bits that the translator keeps: x87, SSE, PKRU.
const XCR0: u64 = 0b10_0000_0011;
/// XCR0 bit of AVX.
const XCR0_AVX: u64 = 1 << 2;
/// XCR0 bits of AVX-512.
const XCR0_AVX512: u64 = 7 << 5;

/// AuthenticAMD: page-table isolation and other work-arounds for Intel's silicon have no use here.
const VENDOR: Regs = Regs { eax: 0xd, ebx: 0x6874_7541, ecx: 0x444d_4163, edx: 0x6974_6e65 };

/// Family 25, model 17, stepping 1 (Zen 4): a kernel expects of older ones errata and work-arounds that
/// mean nothing here.
const SIGNATURE: u32 = 0x00a1_0f11;

/// One bit of the host's CPUID.
#[cfg(target_arch = "x86_64")]
fn host_has(f: Feature) -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let w = f.word;
    let max = __cpuid(w.leaf & 0x8000_0000).eax;
    if w.leaf > max {
        return false;
    }
    let r = __cpuid_count(w.leaf, w.sub);
    let v = match w.reg {
        Reg::Eax => r.eax,
        Reg::Ebx => r.ebx,
        Reg::Ecx => r.ecx,
        Reg::Edx => r.edx,
    };
    v & f.mask() != 0
}

/// Other hosts pass nothing through.
#[cfg(not(target_arch = "x86_64"))]
fn host_has(_: Feature) -> bool {
    false
}

/// What translation can give on this host, for [`tandem_accel::AccelOps::supported_cpuid`].
pub fn supported() -> CpuidTable {
    let mut t = CpuidTable::default();
    t.set(0, VENDOR);
    t.set(1, Regs { eax: SIGNATURE, ..Regs::default() });
    // 48 physical and 48 linear address bits.
    t.set(0x8000_0008, Regs { eax: 48 << 8 | 48, ..Regs::default() });
    let named = |names: &'static [&'static str]| names.iter().filter_map(|n| feature::find(n));
    let wide = named(&PASSED_THROUGH_512[..2]).all(host_has);
    let wide: &[_] = if wide { PASSED_THROUGH_512 } else { &[] };
    let passed = named(PASSED_THROUGH).chain(named(wide)).filter(|&f| host_has(f));
    for f in named(OWN).chain(passed) {
        let w = f.word;
        let mut r = t.query(w.leaf, w.sub);
        match w.reg {
            Reg::Eax => r.eax |= f.mask(),
            Reg::Ebx => r.ebx |= f.mask(),
            Reg::Ecx => r.ecx |= f.mask(),
            Reg::Edx => r.edx |= f.mask(),
        }
        match w.leaf {
            7 | 0xd => t.set_sub(w.leaf, w.sub, r),
            _ => t.set(w.leaf, r),
        }
    }
    let set = FeatureSet::of(&t);
    let mut xcr0 = XCR0;
    for (name, bits) in [("avx", XCR0_AVX), ("avx512f", XCR0_AVX512)] {
        if set.has_name(name) {
            xcr0 |= bits;
        }
    }
    t.set_sub(0xd, 0, Regs { eax: xcr0 as u32, ..Regs::default() });
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_feature() {
        for n in OWN.iter().chain(PASSED_THROUGH).chain(PASSED_THROUGH_512) {
            assert!(feature::find(n).is_some(), "{n}");
        }
        let t = supported();
        let s = FeatureSet::of(&t);
        assert!(OWN.iter().all(|n| s.has_name(n)));
        assert_eq!(t.query(0xd, 0).eax & 3, 3);
    }
}
