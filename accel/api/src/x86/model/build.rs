//! From a model and an accelerator's powers to what CPUID answers.

use super::super::cpuid::{CpuidTable, Regs};
use super::super::feature::{self, Feature, FeatureSet, Reg};
use super::xsave::{self, XsaveLayout};
use super::{Base, MODELS, Model, ModelSpec, Topology, cache};
use crate::Error;

/// Frequency of the bus clock that drives the local APIC timer, in Hz. KVM's is this; a local APIC
/// of the machine's own counts with it too, so that a guest cannot tell them apart.
pub const APIC_BUS_HZ: u64 = 1_000_000_000;

/// What a table is built for.
#[derive(Clone, Copy, Debug)]
pub struct Platform<'a> {
    /// The accelerator as messages name it: `KVM`, `TCG`.
    pub accel: &'a str,
    /// What it can give ([`crate::AccelOps::supported_cpuid`]), in the form of CPUID's own answers:
    /// feature words, leaf Dh (XCR0's possible bits, the layout) if it gives XSAVE, address sizes in
    /// 8000_0008h, and its identity (leaf 0, leaf 1 EAX, brand) if it has one. What it lacks counts
    /// as zero.
    pub supported: &'a CpuidTable,
    /// How vCPUs are arranged.
    pub topology: Topology,
    /// TSC frequency of the guest, in Hz.
    pub tsc_hz: u64,
    /// Signature of leaf 4000_0000h ([`super::KVM_SIGNATURE`]); `None`: the guest sees no
    /// hypervisor.
    pub hypervisor: Option<[u8; 12]>,
}

/// Vendors whose conventions we follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    Amd,
    Intel,
}

const AMD: [u8; 12] = *b"AuthenticAMD";
const LATER_AMD: [u8; 12] = *b"HygonGenuine";
/// Bits of leaf 1 EDX that AMD repeats in leaf 8000_0001h EDX (APM vol. 3 §E.4.2).
const AMD_REPEATS: u32 = 0x0183_f3ff;
/// Family 15, model 107, stepping 1: the signature of QEMU's `qemu64`.
const SIGNATURE: u32 = 0x0006_0fb1;
/// Physical address bits of the named models, as QEMU's.
const PHYS_BITS: u32 = 40;

/// The machine's own gifts, independent of what the accelerator states.
const GIVEN_BY_TOPOLOGY: [&str; 3] = ["ht", "cmp-legacy", "topoext"];

/// Builds the table for the vCPU with APIC ID 0; [`CpuidTable::for_apic_id`] makes the others'.
///
/// # Errors
/// Every feature that `spec` demands and the accelerator cannot give, and every contradiction in
/// `spec`, each as one sentence.
pub fn build(spec: &ModelSpec, platform: &Platform<'_>) -> Result<CpuidTable, Vec<Error>> {
    let vendor = spec.vendor.unwrap_or_else(|| vendor_of(platform.supported));
    let family = match vendor {
        AMD | LATER_AMD => Family::Amd,
        _ => Family::Intel,
    };
    let hypervisor = platform.hypervisor.filter(|_| spec.paravirt);
    let features = choose(spec, platform, family, hypervisor.is_some())?;
    let host_like = matches!(spec.model.base, Base::All);
    let mut t = CpuidTable::default();
    let b = Builder { spec, platform, features: &features, vendor, family, host_like };
    b.identity(&mut t);
    b.features(&mut t);
    b.topology(&mut t);
    b.addresses(&mut t);
    b.time(&mut t);
    if let Some(signature) = hypervisor {
        b.hypervisor(&mut t, signature);
    }
    b.maxima(&mut t);
    Ok(t)
}

fn text(bytes: [u8; 12]) -> [u32; 3] {
    let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    [word(0), word(4), word(8)]
}

fn vendor_of(supported: &CpuidTable) -> [u8; 12] {
    let r = supported.query(0, 0);
    if r.ebx == 0 {
        return AMD;
    }
    let mut v = [0; 12];
    for (i, w) in [r.ebx, r.edx, r.ecx].into_iter().enumerate() {
        v[4 * i..4 * i + 4].copy_from_slice(&w.to_le_bytes());
    }
    v
}

/// XCR0 bits that `f` depends on.
fn xcr0_of(f: Feature) -> u64 {
    match f.name {
        "xsave" => xsave::X87 | xsave::SSE,
        "avx" => xsave::AVX,
        "avx512f" => xsave::AVX512,
        "pku" => xsave::PKRU,
        _ => 0,
    }
}

/// What the accelerator can give: its bits, without those whose register state it cannot hold or
/// whose foundation it lacks, with those that the machine itself gives.
fn available(platform: &Platform<'_>, family: Family, hypervisor: bool) -> FeatureSet {
    let mut set = FeatureSet::of(platform.supported);
    let d = platform.supported.query(0xd, 0);
    let xcr0 = u64::from(d.edx) << 32 | u64::from(d.eax);
    for f in feature::all() {
        if set.has(f) && xcr0_of(f) & !xcr0 != 0 {
            set.set(f, false);
        }
    }
    for name in GIVEN_BY_TOPOLOGY {
        set.set(feature::known(name), family == Family::Amd || name == "ht");
    }
    set.set(feature::known("hypervisor"), hypervisor);
    if !hypervisor {
        for f in feature::all().filter(|f| f.word.leaf == 0x4000_0001) {
            set.set(f, false);
        }
    }
    drop_unfounded(&mut set, |_| true);
    set
}

/// Takes away features whose needs are not met, if `may` says so; repeated until stable.
fn drop_unfounded(set: &mut FeatureSet, may: impl Fn(Feature) -> bool) {
    loop {
        let lost: Vec<_> =
            set.iter().filter(|&f| may(f) && feature::needs(f).any(|n| !set.has(n))).collect();
        if lost.is_empty() {
            return;
        }
        for f in lost {
            set.set(f, false);
        }
    }
}

/// The features a listed model needs.
fn needs_of(model: &Model) -> impl Iterator<Item = Feature> {
    let lists = match model.base {
        Base::Listed { needs, .. } => needs,
        Base::All => &[],
    };
    lists.iter().flat_map(|l| l.iter()).map(|n| feature::known(n))
}

fn choose(
    spec: &ModelSpec,
    platform: &Platform<'_>,
    family: Family,
    hypervisor: bool,
) -> Result<FeatureSet, Vec<Error>> {
    let avail = available(platform, family, hypervisor);
    let mut errors = Vec::new();
    let mut set: FeatureSet = match spec.model.base {
        Base::All => avail.iter().filter(|f| feature::is_automatic(*f)).collect(),
        Base::Listed { wishes, .. } => {
            let wished = wishes.iter().flat_map(|l| l.iter()).map(|n| feature::known(n));
            needs_of(spec.model).chain(wished.filter(|f| avail.has(*f))).collect()
        }
    };
    for name in GIVEN_BY_TOPOLOGY {
        let f = feature::known(name);
        let several = platform.topology.per_socket() > 1;
        set.set(f, avail.has(f) && (several || name == "topoext"));
    }
    set.set(feature::known("hypervisor"), hypervisor);
    for &(f, on) in &spec.features {
        set.set(f, on);
    }
    drop_unfounded(&mut set, |f| spec.explicit(f) != Some(true));
    let (asked, modelled): (Vec<_>, Vec<_>) =
        set.iter().filter(|f| !avail.has(*f)).partition(|f| spec.explicit(*f) == Some(true));
    if !modelled.is_empty() {
        errors.push(
            Error::new(format!(
                "CPU model {} needs {}, which {} on this host cannot give",
                spec.model.name,
                list(&modelled),
                platform.accel
            ))
            .remedy(remedy(&avail, &modelled)),
        );
    }
    for f in asked {
        errors.push(
            Error::new(format!(
                "CPU feature {f} cannot be given by {} on this host",
                platform.accel
            ))
            .remedy(format!("leave out +{f}")),
        );
    }
    for f in set.iter().filter(|f| avail.has(*f)) {
        let lacking: Vec<_> = feature::needs(f).filter(|n| !set.has(*n)).collect();
        if !lacking.is_empty() {
            let names = list(&lacking);
            let add: Vec<_> = lacking.iter().map(|n| format!("+{n}")).collect();
            errors.push(
                Error::new(format!("CPU feature {f} needs {names}, which this model lacks"))
                    .remedy(format!("add {} or leave out {f}", add.join(","))),
            );
        }
    }
    if errors.is_empty() { Ok(set) } else { Err(errors) }
}

fn list(features: &[Feature]) -> String {
    let names: Vec<_> = features.iter().map(|f| f.name).collect();
    match names.split_last() {
        Some((last, [])) => last.to_string(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

fn remedy(avail: &FeatureSet, missing: &[Feature]) -> String {
    let fits =
        |m: &&Model| matches!(m.base, Base::Listed { .. }) && needs_of(m).all(|f| avail.has(f));
    let off: Vec<_> = missing.iter().map(|f| format!("-{f}")).collect();
    match MODELS.iter().rev().find(fits) {
        Some(m) => format!("use --cpu {} or --cpu max, or add {}", m.name, off.join(",")),
        None => "use --cpu max".to_string(),
    }
}

struct Builder<'a> {
    spec: &'a ModelSpec,
    platform: &'a Platform<'a>,
    features: &'a FeatureSet,
    vendor: [u8; 12],
    family: Family,
    host_like: bool,
}

impl Builder<'_> {
    fn has(&self, name: &str) -> bool {
        self.features.has(feature::find(name).unwrap_or_else(|| unreachable!("{name}")))
    }

    /// Family, model, stepping as leaf 1 EAX encodes them (SDM vol. 2A, figure 3-6).
    fn signature(&self) -> u32 {
        let stated = self.platform.supported.query(1, 0).eax;
        let base = if self.host_like && stated != 0 { stated } else { SIGNATURE };
        let old_family = match base >> 8 & 0xf {
            0xf => 0xf + (base >> 20 & 0xff),
            f => f,
        };
        let family = self.spec.family.unwrap_or(old_family);
        let model = self.spec.model_nr.unwrap_or(base >> 12 & 0xf0 | base >> 4 & 0xf);
        let stepping = self.spec.stepping.unwrap_or(base & 0xf);
        let (low, ext) = if family > 0xf { (0xf, family - 0xf) } else { (family, 0) };
        ext << 20 | (model >> 4) << 16 | low << 8 | (model & 0xf) << 4 | stepping
    }

    fn identity(&self, t: &mut CpuidTable) {
        let [ebx, edx, ecx] = text(self.vendor);
        t.set(0, Regs { eax: 0, ebx, ecx, edx });
        let amd = self.family == Family::Amd;
        let ext = if amd { Regs { eax: 0, ebx, ecx, edx } } else { Regs::default() };
        t.set(0x8000_0000, ext);
        let brand = |leaf| self.platform.supported.query(leaf, 0);
        let stated = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(brand);
        if self.host_like && self.spec.brand.is_none() && stated.iter().any(|r| r.eax != 0) {
            for (i, r) in stated.into_iter().enumerate() {
                t.set(0x8000_0002 + i as u32, r);
            }
            return;
        }
        let default = format!("tandem virtual CPU {}", self.spec.name());
        let name = self.spec.brand.as_deref().unwrap_or(&default).as_bytes();
        let mut bytes = [0; 48];
        let n = name.len().min(bytes.len());
        bytes[..n].copy_from_slice(&name[..n]);
        for (i, c) in bytes.chunks_exact(16).enumerate() {
            let word = |k: usize| u32::from_le_bytes([c[k], c[k + 1], c[k + 2], c[k + 3]]);
            let r = Regs { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) };
            t.set(0x8000_0002 + i as u32, r);
        }
    }

    fn features(&self, t: &mut CpuidTable) {
        let f = self.features;
        let signature = self.signature();
        t.set(
            1,
            Regs { eax: signature, ebx: 0, ecx: f.reg(1, 0, Reg::Ecx), edx: f.reg(1, 0, Reg::Edx) },
        );
        if self.has("monitor") {
            t.set(5, self.platform.supported.query(5, 0));
        }
        t.set(6, Regs { eax: f.reg(6, 0, Reg::Eax), ..Regs::default() });
        let seven = |sub| Regs {
            eax: f.reg(7, sub, Reg::Eax),
            ebx: f.reg(7, sub, Reg::Ebx),
            ecx: f.reg(7, sub, Reg::Ecx),
            edx: f.reg(7, sub, Reg::Edx),
        };
        let last = (0..=2).rev().find(|&s| seven(s) != Regs::default()).unwrap_or(0);
        for sub in 0..=last {
            t.set_sub(7, sub, seven(sub));
        }
        if let Some(r) = t.get_mut(7, 0) {
            r.eax = last;
        }
        if self.has("xsave") {
            let xcr0 = self.features.iter().map(xcr0_of).fold(0, |a, b| a | b);
            let eax1 = f.reg(0xd, 1, Reg::Eax);
            XsaveLayout::of(self.platform.supported).leaves(t, xcr0, eax1);
        }
        let amd = self.family == Family::Amd;
        let repeats = if amd { f.reg(1, 0, Reg::Edx) & AMD_REPEATS } else { 0 };
        t.set(
            0x8000_0001,
            Regs {
                eax: if amd { signature } else { 0 },
                ebx: 0,
                ecx: f.reg(0x8000_0001, 0, Reg::Ecx),
                edx: f.reg(0x8000_0001, 0, Reg::Edx) | repeats,
            },
        );
        t.set(0x8000_0007, Regs { edx: f.reg(0x8000_0007, 0, Reg::Edx), ..Regs::default() });
        if self.has("svm") {
            t.set(0x8000_000a, self.platform.supported.query(0x8000_000a, 0));
        }
        let eax = f.reg(0x8000_0021, 0, Reg::Eax);
        let ecx = f.reg(0x8000_0021, 0, Reg::Ecx);
        if amd && (eax, ecx) != (0, 0) {
            t.set(0x8000_0021, Regs { eax, ecx, ..Regs::default() });
        }
    }

    fn topology(&self, t: &mut CpuidTable) {
        let topo = &self.platform.topology;
        let (amd, topoext) = (self.family == Family::Amd, self.has("topoext"));
        if let Some(r) = t.get_mut(1, 0) {
            let clflush = 64 / 8;
            // Intel: the number of IDs reserved in the package; AMD: of logical processors.
            let n = if amd { topo.per_socket() } else { 1 << topo.socket_shift() };
            r.ebx = clflush << 8 | n.min(255) << 16;
        }
        topo.extended(t, 0xb);
        if amd {
            cache::amd(t, topo, topoext);
            if topoext {
                let ebx = (topo.threads() - 1) << 8;
                t.set(0x8000_001e, Regs { ebx, ..Regs::default() });
            }
        } else {
            cache::intel(t, topo);
            if self.host_like && self.platform.supported.query(0, 0).eax >= 0x1f {
                topo.extended(t, 0x1f);
            }
        }
    }

    fn addresses(&self, t: &mut CpuidTable) {
        let stated = match self.platform.supported.query(0x8000_0008, 0).eax & 0xff {
            0 => PHYS_BITS,
            n => n,
        };
        // More would only cost: UEFI firmware builds page tables for all of it, and without 1 GiB
        // pages they do not fit into memory.
        let own = stated.min(PHYS_BITS);
        let phys = self.spec.phys_bits.map_or(own, u32::from);
        let linear = if self.has("la57") { 57 } else { 48 };
        let topo = &self.platform.topology;
        let ecx = match self.family {
            Family::Amd => topo.socket_shift() << 12 | (topo.per_socket() - 1) & 0xff,
            Family::Intel => 0,
        };
        let ebx = self.features.reg(0x8000_0008, 0, Reg::Ebx);
        t.set(0x8000_0008, Regs { eax: linear << 8 | phys, ebx, ecx, edx: 0 });
    }

    /// Leaves 15h and 16h tell Intel guests the TSC's frequency. The crystal is stated as the local
    /// APIC timer's clock, which is what Linux takes it for.
    fn time(&self, t: &mut CpuidTable) {
        if self.family != Family::Intel || self.platform.tsc_hz == 0 {
            return;
        }
        // TSC = crystal × EBX / EAX, in kHz so that both fit.
        let (mut num, mut den) = (self.platform.tsc_hz / 1000, APIC_BUS_HZ / 1000);
        let (mut a, mut b) = (num, den);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        (num, den) = (num / a, den / a);
        if let (Ok(ebx), Ok(eax)) = (u32::try_from(num), u32::try_from(den)) {
            t.set(0x15, Regs { eax, ebx, ecx: APIC_BUS_HZ as u32, edx: 0 });
        }
        let mhz = (self.platform.tsc_hz / 1_000_000).min(0xffff) as u32;
        t.set(0x16, Regs { eax: mhz, ebx: mhz, ecx: 100, edx: 0 });
    }

    /// 4000_0000h signature, 4000_0001h KVM's features, 4000_0010h frequencies in kHz (TSC, bus).
    fn hypervisor(&self, t: &mut CpuidTable, signature: [u8; 12]) {
        let [ebx, ecx, edx] = text(signature);
        t.set(0x4000_0000, Regs { eax: 0x4000_0010, ebx, ecx, edx });
        let eax = self.features.reg(0x4000_0001, 0, Reg::Eax);
        t.set(0x4000_0001, Regs { eax, ..Regs::default() });
        let khz = u32::try_from(self.platform.tsc_hz / 1000).unwrap_or(u32::MAX);
        let bus = (APIC_BUS_HZ / 1000) as u32;
        t.set(0x4000_0010, Regs { eax: khz, ebx: bus, ..Regs::default() });
    }

    /// Highest basic and extended leaf.
    fn maxima(&self, t: &mut CpuidTable) {
        let highest = |t: &CpuidTable, from: u32| {
            t.iter().map(|(l, ..)| l).filter(|l| l & 0xffff_0000 == from).max().unwrap_or(from)
        };
        // Linux wants leaf Dh within reach even where XSAVE is off and the leaf is empty.
        let basic = highest(t, 0).max(0xd);
        let floor = if self.family == Family::Amd { 0x8000_001e } else { 0x8000_0008 };
        let extended = highest(t, 0x8000_0000).max(floor);
        for (leaf, max) in [(0, basic), (0x8000_0000, extended)] {
            if let Some(r) = t.get_mut(leaf, 0) {
                r.eax = max;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::KVM_SIGNATURE;
    use super::*;

    /// An accelerator that gives all but what `without` names.
    fn accelerator(vendor: &[u8; 12], without: &[&str]) -> CpuidTable {
        let mut t = CpuidTable::default();
        let [ebx, edx, ecx] = text(*vendor);
        t.set(0, Regs { eax: 0x1f, ebx, ecx, edx });
        let words: std::collections::BTreeSet<_> = feature::all().map(|f| f.word).collect();
        for w in words {
            let mut r = t.query(w.leaf, w.sub);
            let bits = feature::all()
                .filter(|f| f.word == w && !without.contains(&f.name))
                .fold(0, |a, f| a | f.mask());
            match w.reg {
                Reg::Eax => r.eax = bits,
                Reg::Ebx => r.ebx = bits,
                Reg::Ecx => r.ecx = bits,
                Reg::Edx => r.edx = bits,
            }
            if w.indexed() { t.set_sub(w.leaf, w.sub, r) } else { t.set(w.leaf, r) }
        }
        t.set_sub(0xd, 0, Regs { eax: 0x2e7, ebx: 0x240, ecx: 0xa88, edx: 0 });
        t.set(0x8000_0008, Regs { eax: 0x3030, ..t.query(0x8000_0008, 0) });
        t
    }

    fn try_build(
        arg: &str,
        supported: &CpuidTable,
        topo: Topology,
    ) -> Result<CpuidTable, Vec<String>> {
        let platform = Platform {
            accel: "TCG",
            supported,
            topology: topo,
            tsc_hz: 2_400_000_000,
            hypervisor: Some(KVM_SIGNATURE),
        };
        build(&ModelSpec::parse(arg).unwrap(), &platform)
            .map_err(|v| v.iter().map(|e| e.to_string()).collect())
    }

    fn one(arg: &str, supported: &CpuidTable) -> Result<CpuidTable, Vec<String>> {
        try_build(arg, supported, Topology::cores(1).unwrap())
    }

    #[test]
    fn levels_are_exactly_the_psabis() {
        let acc = accelerator(&AMD, &[]);
        let has = |t: &CpuidTable, n| FeatureSet::of(t).has_name(n);
        let v: Vec<_> = (1..=4).map(|n| one(&format!("x86-64-v{n}"), &acc).unwrap()).collect();
        for (level, names) in [
            (1, &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"][..]),
            (2, super::super::V2),
            (3, super::super::V3),
            (4, super::super::V4),
        ] {
            for n in names {
                assert!(has(&v[level - 1], n), "v{level} lacks {n}");
                assert!(level == 1 || !has(&v[level - 2], n), "{n} is in v{}", level - 1);
            }
        }
        for t in &v {
            for n in ["aes", "pclmulqdq", "sha-ni", "rdrand", "svm", "avx512vbmi"] {
                assert!(!has(t, n), "{n}");
            }
            assert!(has(t, "kvmclock") && has(t, "x2apic") && has(t, "hypervisor"));
        }
    }

    #[test]
    fn what_cannot_be_given_is_named_with_a_way_out() {
        let acc = accelerator(&AMD, &["avx512f", "aes"]);
        let e = one("x86-64-v4,+aes", &acc).unwrap_err();
        assert_eq!(e.len(), 2, "{e:?}");
        assert!(
            e[0].contains("x86-64-v4 needs avx512f, avx512dq, avx512cd, avx512bw and avx512vl"),
            "{}",
            e[0]
        );
        assert!(e[0].contains("TCG") && e[0].contains("--cpu x86-64-v3"), "{}", e[0]);
        assert!(e[1].contains("aes"), "{}", e[1]);
        assert!(one("x86-64-v3", &acc).is_ok());
        assert!(one("max", &acc).is_ok());
        for arg in ["x86-64-v4,-avx512f", "x86-64-v4,-avx2"] {
            let t = one(arg, &acc).unwrap();
            assert!(!FeatureSet::of(&t).has_name("avx512bw"));
        }
    }

    #[test]
    fn a_state_the_accelerator_cannot_hold_takes_its_features_along() {
        let mut acc = accelerator(&AMD, &[]);
        acc.set_sub(0xd, 0, Regs { eax: 7, ebx: 576, ecx: 832, edx: 0 });
        assert!(one("x86-64-v4", &acc).is_err());
        let t = one("max", &acc).unwrap();
        let f = FeatureSet::of(&t);
        assert!(f.has_name("avx2") && !f.has_name("avx512vl") && !f.has_name("pku"));
        assert_eq!(t.query(0xd, 0), Regs { eax: 7, ebx: 576, ecx: 832, edx: 0 });
    }

    #[test]
    fn taking_a_foundation_away_takes_what_stands_on_it() {
        let acc = accelerator(&AMD, &[]);
        let t = one("max,-xsave", &acc).unwrap();
        let f = FeatureSet::of(&t);
        assert!(!f.has_name("avx") && !f.has_name("avx512f") && !f.has_name("xsaveopt"));
        assert_eq!(t.get(0xd, 0), None);
        let e = one("qemu64,+avx2", &acc).unwrap_err();
        assert!(e[0].contains("avx2 needs avx"), "{e:?}");
        let e = one("x86-64-v3,-avx,+avx2", &acc).unwrap_err();
        assert!(e[0].contains("avx2 needs avx"), "{e:?}");
        assert!(one("x86-64-v3,-avx", &acc).is_ok());
    }

    #[test]
    fn vendors_conventions_hold() {
        let amd = one("qemu64", &accelerator(&AMD, &[])).unwrap();
        let intel = one("qemu64", &accelerator(b"GenuineIntel", &[])).unwrap();
        assert_eq!(amd.query(0x8000_0000, 0).ebx, amd.query(0, 0).ebx);
        assert_eq!(intel.query(0x8000_0000, 0).ebx, 0);
        assert_eq!(amd.query(1, 0).eax, SIGNATURE);
        assert_eq!(amd.query(0x8000_0001, 0).edx & 1, 1, "AMD repeats FPU");
        assert_eq!(intel.query(0x8000_0001, 0).edx & 1, 0);
        assert!(amd.get(0x15, 0).is_none() && amd.get(4, 0).is_none());
        let r = intel.query(0x15, 0);
        assert_eq!(u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax), 2_400_000_000);
        assert_eq!(intel.query(0, 0).eax, 0x16);
        assert_eq!(one("host", &accelerator(b"GenuineIntel", &[])).unwrap().query(0, 0).eax, 0x1f);
        let t = one("qemu64,vendor=GenuineIntel,family=6,model=0x3c", &accelerator(&AMD, &[]));
        assert_eq!(t.unwrap().query(1, 0).eax, 0x0003_06c1);
        assert_eq!(amd.query(0x4000_0000, 0).ebx, u32::from_le_bytes(*b"KVMK"));
        assert_eq!(amd.query(0x4000_0010, 0).eax, 2_400_000);
        let plain = one("qemu64,kvm=off", &accelerator(&AMD, &[])).unwrap();
        assert!(plain.get(0x4000_0000, 0).is_none());
        assert!(!FeatureSet::of(&plain).has_name("hypervisor"));
    }

    #[test]
    fn each_vcpu_finds_itself() {
        let topo = Topology::new(2, 2, 2).unwrap();
        let base = try_build("max", &accelerator(&AMD, &[]), topo).unwrap();
        assert!(FeatureSet::of(&base).has_name("ht"));
        let t = base.for_apic_id(topo.apic_id(7));
        assert_eq!(t.query(1, 0).ebx >> 24, 7);
        assert_eq!(t.query(1, 0).ebx >> 16 & 0xff, 4);
        assert_eq!(t.query(0xb, 0).edx, 7);
        assert_eq!((t.query(0xb, 0).eax, t.query(0xb, 1).eax), (1, 2));
        let e = t.query(0x8000_001e, 0);
        assert_eq!((e.eax, e.ebx & 0xff, e.ecx & 0xff), (7, 1, 1));
        assert_eq!(t.query(0x8000_001d, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(t.query(0x8000_0008, 0).ecx, 2 << 12 | 3);
    }

    #[test]
    fn a_poor_accelerator_still_gets_a_processor() {
        let mut acc = CpuidTable::default();
        acc.set(1, Regs { edx: 0x078b_fbff, ecx: 0x0120_2000, ..Regs::default() });
        acc.set(0x8000_0001, Regs { edx: 0x2010_0800, ..Regs::default() });
        let t = one("qemu64", &acc).unwrap();
        assert!(FeatureSet::of(&t).has_name("cx16"));
        let e = one("x86-64-v2", &acc).unwrap_err();
        assert!(e[0].contains("--cpu x86-64-v1"), "{e:?}");
        assert_eq!(t.query(0, 0).eax, 0xd);
        assert_eq!(t.query(0x8000_0008, 0).eax, 48 << 8 | 40);
    }
}
