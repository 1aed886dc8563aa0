//! Which instructions exist: each belongs to CPUID features, and raises #UD on a processor without them.

use iced_x86::{Code, CpuidFeature, Instruction};
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::x86::feature::FeatureSet;

/// The name of the feature that stands for `f` in CPUID; `None` if no bit does, or none that decides
/// whether anything raises #UD here.
pub fn feature_of(f: CpuidFeature) -> Option<&'static str> {
    use CpuidFeature as F;
    Some(match f {
        F::FPU => "fpu",
        F::MMX => "mmx",
        F::CMOV => "cmov",
        F::CX8 => "cx8",
        F::CMPXCHG16B => "cx16",
        F::TSC => "tsc",
        F::MSR => "msr",
        F::SEP => "sep",
        F::SYSCALL => "syscall",
        F::RDTSCP => "rdtscp",
        F::CLFSH => "clflush",
        F::FXSR => "fxsr",
        F::SSE => "sse",
        F::SSE2 => "sse2",
        F::SSE3 => "pni",
        F::SSSE3 => "ssse3",
        F::SSE4_1 => "sse4.1",
        F::SSE4_2 => "sse4.2",
        F::POPCNT => "popcnt",
        F::LZCNT => "abm",
        F::MOVBE => "movbe",
        F::BMI1 => "bmi1",
        F::BMI2 => "bmi2",
        F::ADX => "adx",
        F::AES => "aes",
        F::PCLMULQDQ => "pclmulqdq",
        F::SHA => "sha-ni",
        F::GFNI => "gfni",
        F::RDRAND => "rdrand",
        F::RDSEED => "rdseed",
        F::FSGSBASE => "fsgsbase",
        F::RDPID => "rdpid",
        F::CLFLUSHOPT => "clflushopt",
        F::CLWB => "clwb",
        F::INVPCID => "invpcid",
        F::SMAP => "smap",
        F::PKU => "pku",
        F::XSAVE => "xsave",
        F::XSAVEOPT => "xsaveopt",
        F::XSAVEC => "xsavec",
        F::AVX => "avx",
        F::AVX2 => "avx2",
        F::F16C => "f16c",
        F::FMA => "fma",
        F::VAES => "vaes",
        F::VPCLMULQDQ => "vpclmulqdq",
        F::AVX512F => "avx512f",
        F::AVX512VL => "avx512vl",
        F::AVX512BW => "avx512bw",
        F::AVX512DQ => "avx512dq",
        F::AVX512CD => "avx512cd",
        F::AVX512_IFMA => "avx512ifma",
        F::AVX512_VBMI => "avx512vbmi",
        F::AVX512_VBMI2 => "avx512vbmi2",
        F::AVX512_VNNI => "avx512vnni",
        F::AVX512_BITALG => "avx512bitalg",
        F::AVX512_VPOPCNTDQ => "avx512-vpopcntdq",
        F::AVX512_BF16 => "avx512-bf16",
        _ => return None,
    })
}

/// The instructions of a processor.
pub struct Gate {
    /// Bit n: code n exists.
    codes: Vec<u64>,
}

impl Gate {
    /// Those of the processor that `table` describes.
    pub fn of(table: &CpuidTable) -> Gate {
        let set = FeatureSet::of(table);
        let has = |f: &CpuidFeature| feature_of(*f).is_none_or(|name| set.has_name(name));
        let mut codes = vec![0; Code::values().len().div_ceil(64)];
        for code in Code::values() {
            // In 64-bit code these two came late.
            let lahf = !matches!(code, Code::Lahf | Code::Sahf) || set.has_name("lahf-lm");
            if lahf && code.cpuid_features().iter().all(has) {
                codes[code as usize / 64] |= 1 << (code as usize % 64);
            }
        }
        Gate { codes }
    }

    fn allows(&self, code: Code) -> bool {
        self.codes[code as usize / 64] >> (code as usize % 64) & 1 != 0
    }

    /// What `insn` is on this processor, in 64-bit code or not; `None` if it raises #UD.
    pub(super) fn meaning(&self, insn: &Instruction, code64: bool) -> Option<Instruction> {
        let code = insn.code();
        if self.allows(code) || !code64 && matches!(code, Code::Lahf | Code::Sahf) {
            return Some(*insn);
        }
        // Older processors ignore the prefix that makes these what they are.
        let older = match code {
            Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
            Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
            Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
            Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
            Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
            Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
            _ => return None,
        };
        let mut insn = *insn;
        insn.set_code(older);
        Some(insn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};
    use tandem_accel::x86::feature;
    use tandem_accel::x86::model::{ModelSpec, Platform, Topology, build};

    fn gate(model: &str) -> Gate {
        let supported = crate::x86::cpuid::supported();
        let platform = Platform {
            accel: "TCG",
            supported: &supported,
            topology: Topology::cores(1).unwrap(),
            tsc_hz: 1_000_000_000,
            hypervisor: None,
        };
        Gate::of(&build(&ModelSpec::parse(model).unwrap(), &platform).unwrap())
    }

    fn meaning(g: &Gate, bytes: &[u8]) -> Option<Code> {
        let insn = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        g.meaning(&insn, true).map(|i| i.code())
    }

    #[test]
    fn names_are_features() {
        for f in CpuidFeature::values().filter_map(feature_of) {
            assert!(feature::find(f).is_some(), "{f}");
        }
    }

    #[test]
    fn what_a_model_lacks_raises_ud() {
        let old = gate("qemu64,-cx16");
        // popcnt, andn, adcx, movbe, rdtscp, cmpxchg16b, rdrand, vaddps, crc32, pshufb
        for bytes in [
            &[0xf3, 0x0f, 0xb8, 0xc1][..],
            &[0xc4, 0xe2, 0x78, 0xf2, 0xc1],
            &[0x66, 0x0f, 0x38, 0xf6, 0xc1],
            &[0x0f, 0x38, 0xf0, 0x03],
            &[0x0f, 0x01, 0xf9],
            &[0x48, 0x0f, 0xc7, 0x0b],
            &[0x0f, 0xc7, 0xf0],
            &[0xc5, 0xf4, 0x58, 0xc2],
            &[0xf2, 0x0f, 0x38, 0xf0, 0xc1],
            &[0x66, 0x0f, 0x38, 0x00, 0xc1],
        ] {
            assert_eq!(meaning(&old, bytes), None, "{bytes:02x?}");
        }
        // addps and mov are everywhere.
        assert!(meaning(&old, &[0x0f, 0x58, 0xc1]).is_some());
        assert!(meaning(&old, &[0x89, 0xc1]).is_some());
        assert!(meaning(&gate("max"), &[0xf3, 0x0f, 0xb8, 0xc1]).is_some());
    }

    #[test]
    fn counts_of_zeros_are_scans_on_older_processors() {
        let old = gate("qemu64");
        assert_eq!(meaning(&old, &[0xf3, 0x0f, 0xbd, 0xc1]), Some(Code::Bsr_r32_rm32));
        assert_eq!(meaning(&old, &[0xf3, 0x48, 0x0f, 0xbc, 0xc1]), Some(Code::Bsf_r64_rm64));
        let new = gate("max");
        assert_eq!(meaning(&new, &[0xf3, 0x0f, 0xbd, 0xc1]), Some(Code::Lzcnt_r32_rm32));
    }
}
