//! The table of x86 CPU features: name, and the CPUID bit that says it is there.
//!
//! Names are QEMU's; Linux's spelling (`/proc/cpuinfo`) is accepted where it differs. Comparison
//! ignores case and takes `-`, `_` and `.` as the same character, so `sse4.1`, `sse4_1` and
//! `SSE4-1` name one feature.
//!
//! What is not in the table is never given to a guest: it names state that
//! [`X86State`](super::X86State) does not hold (MPX, AMX, CET, PT, FRED), or counts events of the
//! host (PMU). Bits that follow from something else are not in it either: OSXSAVE and OSPKE mirror
//! CR4 and belong to the accelerator.
//!
//! Sources: SDM vol. 2A (CPUID); AMD64 APM vol. 3 appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst` for leaf 4000_0001h.

use super::cpuid::{CpuidTable, Regs};
use std::collections::BTreeMap;
use std::fmt;

/// A register of a CPUID answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs)]
pub enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One 32-bit word of feature bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Word {
    /// CPUID leaf (EAX).
    pub leaf: u32,
    /// Subleaf (ECX); 0 for a leaf that ignores ECX.
    pub sub: u32,
    /// The register.
    pub reg: Reg,
}

impl Word {
    const fn new(leaf: u32, sub: u32, reg: Reg) -> Word {
        Word { leaf, sub, reg }
    }
    /// Whether the leaf depends on ECX.
    pub fn indexed(self) -> bool {
        matches!(self.leaf, 7 | 0xd)
    }
    /// Its value in `table`; 0 if the table lacks the leaf.
    pub fn of(self, table: &CpuidTable) -> u32 {
        self.pick(&table.query(self.leaf, self.sub))
    }
    fn pick(self, r: &Regs) -> u32 {
        match self.reg {
            Reg::Eax => r.eax,
            Reg::Ebx => r.ebx,
            Reg::Ecx => r.ecx,
            Reg::Edx => r.edx,
        }
    }
}

/// A feature: one bit of one word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Feature {
    /// Its word.
    pub word: Word,
    /// Its bit, 0–31.
    pub bit: u8,
    /// QEMU's name.
    pub name: &'static str,
}

impl Feature {
    /// The bit as a mask.
    pub const fn mask(self) -> u32 {
        1 << self.bit
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

type Names = &'static [(u8, &'static str)];

/// All features, by word.
static WORDS: &[(Word, Names)] = &[
    (
        Word::new(1, 0, Reg::Edx),
        &[
            (0, "fpu"),
            (1, "vme"),
            (2, "de"),
            (3, "pse"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (7, "mce"),
            (8, "cx8"),
            (9, "apic"),
            (11, "sep"),
            (12, "mtrr"),
            (13, "pge"),
            (14, "mca"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
            (27, "ss"),
            (28, "ht"),
        ],
    ),
    (
        Word::new(1, 0, Reg::Ecx),
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (5, "vmx"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4.1"),
            (20, "sse4.2"),
            (21, "x2apic"),
            (22, "movbe"),
            (23, "popcnt"),
            (24, "tsc-deadline"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
            (31, "hypervisor"),
        ],
    ),
    (Word::new(6, 0, Reg::Eax), &[(2, "arat")]),
    (
        Word::new(7, 0, Reg::Ebx),
        &[
            (0, "fsgsbase"),
            (1, "tsc-adjust"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (6, "fdp-excptn-only"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (11, "rtm"),
            (13, "zero-fcs-fds"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha-ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (
        Word::new(7, 0, Reg::Ecx),
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512vnni"),
            (12, "avx512bitalg"),
            (14, "avx512-vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (24, "bus-lock-detect"),
            (25, "cldemote"),
            (27, "movdiri"),
            (28, "movdir64b"),
        ],
    ),
    (
        Word::new(7, 0, Reg::Edx),
        &[
            (4, "fsrm"),
            (8, "avx512-vp2intersect"),
            (10, "md-clear"),
            (14, "serialize"),
            (16, "tsx-ldtrk"),
            (23, "avx512-fp16"),
            (26, "spec-ctrl"),
            (27, "stibp"),
            (28, "flush-l1d"),
            (29, "arch-capabilities"),
            (31, "ssbd"),
        ],
    ),
    (
        Word::new(7, 1, Reg::Eax),
        &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (4, "avx-vnni"),
            (5, "avx512-bf16"),
            (7, "cmpccxadd"),
            (10, "fzrm"),
            (11, "fsrs"),
            (12, "fsrc"),
            (23, "avx-ifma"),
            (26, "lam"),
        ],
    ),
    (
        Word::new(7, 1, Reg::Edx),
        &[(4, "avx-vnni-int8"), (5, "avx-ne-convert"), (10, "avx-vnni-int16"), (14, "prefetchiti")],
    ),
    (
        Word::new(7, 2, Reg::Edx),
        &[
            (0, "intel-psfd"),
            (1, "ipred-ctrl"),
            (2, "rrsba-ctrl"),
            (3, "ddpd-u"),
            (4, "bhi-ctrl"),
            (5, "mcdt-no"),
        ],
    ),
    (Word::new(0xd, 1, Reg::Eax), &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")]),
    (
        Word::new(0x8000_0001, 0, Reg::Ecx),
        &[
            (0, "lahf-lm"),
            (1, "cmp-legacy"),
            (2, "svm"),
            (4, "cr8legacy"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (9, "osvw"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
            (22, "topoext"),
        ],
    ),
    (
        Word::new(0x8000_0001, 0, Reg::Edx),
        &[
            (11, "syscall"),
            (20, "nx"),
            (22, "mmxext"),
            (25, "fxsr-opt"),
            (26, "pdpe1gb"),
            (27, "rdtscp"),
            (29, "lm"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    ),
    (Word::new(0x8000_0007, 0, Reg::Edx), &[(8, "invtsc")]),
    (
        Word::new(0x8000_0008, 0, Reg::Ebx),
        &[
            (0, "clzero"),
            (2, "xsaveerptr"),
            (9, "wbnoinvd"),
            (12, "ibpb"),
            (14, "ibrs"),
            (15, "amd-stibp"),
            (17, "stibp-always-on"),
            (24, "amd-ssbd"),
            (25, "virt-ssbd"),
            (26, "amd-no-ssb"),
            (28, "amd-psfd"),
        ],
    ),
    (
        Word::new(0x8000_0021, 0, Reg::Eax),
        &[
            (0, "no-nested-data-bp"),
            (2, "lfence-always-serializing"),
            (6, "null-sel-clr-base"),
            (8, "auto-ibrs"),
            (27, "sbpb"),
            (28, "ibpb-brtype"),
            (29, "srso-no"),
        ],
    ),
    (Word::new(0x8000_0021, 0, Reg::Ecx), &[(1, "tsa-sq-no"), (2, "tsa-l1-no")]),
    (
        Word::new(0x4000_0001, 0, Reg::Eax),
        &[
            (0, "kvmclock-legacy"),
            (1, "kvm-nopiodelay"),
            (3, "kvmclock"),
            (4, "kvm-asyncpf"),
            (5, "kvm-steal-time"),
            (6, "kvm-pv-eoi"),
            (7, "kvm-pv-unhalt"),
            (9, "kvm-pv-tlb-flush"),
            (11, "kvm-pv-ipi"),
            (12, "kvm-poll-control"),
            (13, "kvm-pv-sched-yield"),
            (14, "kvm-asyncpf-int"),
            (24, "kvmclock-stable-bit"),
        ],
    ),
];

/// Other spellings.
static ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("pclmuldq", "pclmulqdq"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("lzcnt", "abm"),
    ("sha", "sha-ni"),
    ("xd", "nx"),
    ("i64", "lm"),
    ("ffxsr", "fxsr-opt"),
    ("nonstop-tsc", "invtsc"),
    ("constant-tsc", "invtsc"),
    ("avx512vpopcntdq", "avx512-vpopcntdq"),
    ("avx512-vbmi2", "avx512vbmi2"),
    ("avx512-vnni", "avx512vnni"),
    ("avx512-bitalg", "avx512bitalg"),
    ("cmp16b", "cx16"),
    ("prefetchi", "prefetchiti"),
    ("selfsnoop", "ss"),
    ("autoibrs", "auto-ibrs"),
];

/// Features that `max` and `host` give only when asked by name: their state is not part of
/// [`X86State`](super::X86State) (nested virtualisation), or the instruction would hold the host's
/// processor.
static ON_REQUEST: &[&str] = &["vmx", "svm", "monitor"];

/// (feature, what it needs). Taking the needed one away takes the feature away.
static NEEDS: &[(&str, &str)] = &[
    ("x2apic", "apic"),
    ("tsc-deadline", "apic"),
    ("sse", "fxsr"),
    ("sse2", "sse"),
    ("pni", "sse2"),
    ("ssse3", "pni"),
    ("sse4.1", "ssse3"),
    ("sse4.2", "sse4.1"),
    ("sse4a", "pni"),
    ("misalignsse", "sse2"),
    ("aes", "sse2"),
    ("pclmulqdq", "sse2"),
    ("gfni", "sse2"),
    ("sha-ni", "sse2"),
    ("mmxext", "mmx"),
    ("3dnow", "mmx"),
    ("3dnowext", "3dnow"),
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsavec"),
    ("xsaveerptr", "xsave"),
    ("pku", "xsave"),
    ("avx", "xsave"),
    ("avx", "sse4.2"),
    ("avx2", "avx"),
    ("fma", "avx"),
    ("f16c", "avx"),
    ("fma4", "avx"),
    ("xop", "avx"),
    ("vaes", "avx"),
    ("vpclmulqdq", "avx"),
    ("avx-vnni", "avx2"),
    ("avx-ifma", "avx2"),
    ("avx-vnni-int8", "avx2"),
    ("avx-vnni-int16", "avx2"),
    ("avx-ne-convert", "avx2"),
    ("sha512", "avx2"),
    ("sm3", "avx"),
    ("sm4", "avx2"),
    ("avx512f", "avx2"),
    ("avx512f", "fma"),
    ("avx512f", "f16c"),
    ("avx512dq", "avx512f"),
    ("avx512ifma", "avx512f"),
    ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"),
    ("avx512vl", "avx512f"),
    ("avx512vbmi", "avx512bw"),
    ("avx512vbmi2", "avx512bw"),
    ("avx512vnni", "avx512f"),
    ("avx512bitalg", "avx512bw"),
    ("avx512-vpopcntdq", "avx512f"),
    ("avx512-vp2intersect", "avx512f"),
    ("avx512-fp16", "avx512bw"),
    ("avx512-bf16", "avx512bw"),
    ("pae", "pse"),
    ("lm", "pae"),
    ("nx", "pae"),
    ("lahf-lm", "lm"),
    ("pdpe1gb", "lm"),
    ("cx16", "lm"),
    ("pcid", "lm"),
    ("invpcid", "pcid"),
    ("la57", "lm"),
    ("lam", "lm"),
    ("fsgsbase", "lm"),
    ("kvmclock-legacy", "kvmclock"),
    ("kvmclock-stable-bit", "kvmclock"),
    ("kvm-asyncpf-int", "kvm-asyncpf"),
];

/// Every feature in the table.
pub fn all() -> impl Iterator<Item = Feature> {
    WORDS.iter().flat_map(|&(word, names)| {
        names.iter().map(move |&(bit, name)| Feature { word, bit, name })
    })
}

fn same_name(a: &str, b: &str) -> bool {
    let norm = |c: u8| match c {
        b'_' | b'.' => b'-',
        c => c.to_ascii_lowercase(),
    };
    a.bytes().map(norm).eq(b.bytes().map(norm))
}

/// The feature of this name, in QEMU's or Linux's spelling.
pub fn find(name: &str) -> Option<Feature> {
    let name = ALIASES.iter().find(|(a, _)| same_name(a, name)).map_or(name, |&(_, n)| n);
    all().find(|f| same_name(f.name, name))
}

/// A name from this file's or the model table.
pub(super) fn known(name: &'static str) -> Feature {
    find(name).unwrap_or_else(|| unreachable!("{name} is not in the feature table"))
}

/// Whether `max` and `host` give it without being asked.
pub(super) fn is_automatic(f: Feature) -> bool {
    !ON_REQUEST.contains(&f.name)
}

/// What `f` needs directly.
pub(super) fn needs(f: Feature) -> impl Iterator<Item = Feature> {
    NEEDS.iter().filter(move |(name, _)| *name == f.name).map(|&(_, n)| known(n))
}

/// A set of features.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FeatureSet(BTreeMap<Word, u32>);

impl FeatureSet {
    /// The features whose bits are set in `table`.
    pub fn of(table: &CpuidTable) -> FeatureSet {
        all().filter(|f| f.word.of(table) & f.mask() != 0).collect()
    }
    /// Whether `f` is in it.
    pub fn has(&self, f: Feature) -> bool {
        self.word(f.word) & f.mask() != 0
    }
    /// Whether the feature of this name is in it; `false` for an unknown name.
    pub fn has_name(&self, name: &str) -> bool {
        find(name).is_some_and(|f| self.has(f))
    }
    /// Adds or takes away `f`.
    pub fn set(&mut self, f: Feature, on: bool) {
        let w = self.0.entry(f.word).or_default();
        if on {
            *w |= f.mask();
        } else {
            *w &= !f.mask();
        }
    }
    /// All bits of one word.
    pub fn word(&self, word: Word) -> u32 {
        self.0.get(&word).copied().unwrap_or(0)
    }
    /// All bits of a register.
    pub(super) fn reg(&self, leaf: u32, sub: u32, reg: Reg) -> u32 {
        self.word(Word { leaf, sub, reg })
    }
    /// Its features, by word and bit.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        all().filter(|f| self.has(*f))
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(iter: I) -> FeatureSet {
        let mut s = FeatureSet::default();
        for f in iter {
            s.set(f, true);
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_meet() {
        let f = find("sse4.1").unwrap();
        assert_eq!(find("sse4_1"), Some(f));
        assert_eq!(find("SSE4-1"), Some(f));
        assert_eq!(find("sse3").unwrap().name, "pni");
        assert_eq!(find("lzcnt").unwrap().name, "abm");
        assert_eq!(find("avx512_vnni"), find("avx512vnni"));
        assert!(find("nonsense").is_none());
    }

    #[test]
    fn the_table_is_consistent() {
        let v: Vec<_> = all().collect();
        for (i, a) in v.iter().enumerate() {
            assert!(a.bit < 32);
            for b in &v[i + 1..] {
                assert!(!same_name(a.name, b.name), "{} twice", a.name);
                assert!(a.word != b.word || a.bit != b.bit, "{} and {}", a.name, b.name);
            }
        }
        for (a, n) in ALIASES {
            assert!(all().any(|f| f.name == *n), "{n}");
            assert!(!all().any(|f| same_name(f.name, a)), "{a} is a name already");
        }
        for (a, b) in NEEDS {
            assert!(find(a).is_some() && find(b).is_some(), "{a} {b}");
        }
        for n in ON_REQUEST {
            assert!(find(n).is_some());
        }
    }

    #[test]
    fn bits_agree_with_the_manuals() {
        // A sample from SDM vol. 2A table 3-8 and APM vol. 3 appendix E.
        for (name, leaf, reg, bit) in [
            ("popcnt", 1, Reg::Ecx, 23),
            ("avx2", 7, Reg::Ebx, 5),
            ("avx512vl", 7, Reg::Ebx, 31),
            ("pku", 7, Reg::Ecx, 3),
            ("abm", 0x8000_0001, Reg::Ecx, 5),
            ("pdpe1gb", 0x8000_0001, Reg::Edx, 26),
        ] {
            let f = find(name).unwrap();
            assert_eq!((f.word.leaf, f.word.reg, f.bit), (leaf, reg, bit), "{name}");
        }
    }
}
