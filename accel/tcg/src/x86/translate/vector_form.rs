//! The table of vector instructions: for each code that iced knows, how to emit it again with other
//! operands.
//!
//! Built once, from iced's own description of every code, so that the hundreds of SSE, AVX and
//! AVX-512 instructions need no line each here: a [`Form`] says which operand sits in which field of
//! the encoding, and the few things that the description lacks (alignment, floating-point exceptions,
//! instructions whose memory accesses depend on data) are filled in by mnemonic. A code whose CPU
//! features the host lacks has no form: the guest gets #UD, not the host a SIGILL.

use super::gate::feature_of;
use crate::x86::cpuid;
use iced_x86::{
    Code, CpuidFeature, EncodingKind, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind,
    OpCodeTableKind,
};
use std::sync::OnceLock;
use tandem_accel::x86::feature::FeatureSet;
use tandem_jit::ir::{Encoding, Native, NativeReg};

/// No operand.
pub const NO_OP: u8 = 0xff;

/// How an instruction is translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Kind {
    /// Not a vector instruction of this host.
    #[default]
    None,
    /// Passed through as it is.
    Plain,
    /// Touches MMX registers.
    Mmx,
    /// VMASKMOVPS and its like: memory access under a vector mask.
    MaskMov,
    /// Gathers: vector of addresses.
    Gather,
    /// Scatters.
    Scatter,
    /// PCMPESTRI and its like: implicit general registers.
    Strings,
    /// MASKMOVDQU: byte-masked store to DS:rDI.
    MaskMovDqu,
    /// LDMXCSR.
    LoadMxcsr,
    /// STMXCSR.
    StoreMxcsr,
}

/// How one code is encoded, and what to watch for.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// How to translate it.
    pub kind: Kind,
    /// The encoding, with operand fields still to be filled in.
    pub native: Native,
    /// Operand in ModRM.reg, or [`NO_OP`].
    pub reg: u8,
    /// Operand in ModRM.rm.
    pub rm: u8,
    /// Operand in VEX.vvvv.
    pub vvvv: u8,
    /// Operand in the upper half of the immediate byte.
    pub is4: u8,
    /// There is an immediate byte.
    pub imm: bool,
    /// A memory operand must be aligned to its size.
    pub aligned: bool,
    /// The memory operand is read whatever the mask says: its elements do not correspond to those of
    /// the destination one to one.
    pub whole: bool,
    /// A masked memory access touches consecutive elements, as many as the mask has ones.
    pub compressed: bool,
}

const NOT_VECTOR: Form = Form {
    kind: Kind::None,
    native: Native {
        enc: Encoding::Legacy,
        prefix: 0,
        map: 0,
        opcode: 0,
        w: false,
        l: 0,
        reg: NativeReg::Fixed(0),
        rm: NativeReg::Fixed(0),
        vvvv: NativeReg::Fixed(0),
        imm8: None,
        dst_in: false,
        sets_flags: false,
        vector: true,
        fp: false,
        x87: false,
    },
    reg: NO_OP,
    rm: NO_OP,
    vvvv: NO_OP,
    is4: NO_OP,
    imm: false,
    aligned: false,
    whole: false,
    compressed: false,
};

/// The form of `code`.
pub fn form(code: Code) -> &'static Form {
    static FORMS: OnceLock<Vec<Form>> = OnceLock::new();
    let forms =
        FORMS.get_or_init(|| Code::values().map(|c| make(c).unwrap_or(NOT_VECTOR)).collect());
    &forms[code as usize]
}

/// The form of a vector instruction that this host can execute.
fn make(code: Code) -> Option<Form> {
    let info = code.op_code();
    if !info.is_instruction() || !code.cpuid_features().iter().all(|&f| host_has(f)) {
        return None;
    }
    let mut form = NOT_VECTOR;
    form.native.enc = match info.encoding() {
        EncodingKind::Legacy => Encoding::Legacy,
        EncodingKind::VEX => Encoding::Vex,
        EncodingKind::EVEX => Encoding::Evex { aaa: 0, z: false, b: false },
        _ => return None,
    };
    let name = base_name(info.mnemonic());
    let vector = operands(&mut form, info)?;
    form.kind = kind(&name, info, vector)?;
    form.native.prefix = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 0x66,
        MandatoryPrefix::PF2 => 0xf2,
        MandatoryPrefix::PF3 => 0xf3,
        _ => 0,
    };
    form.native.map = match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => return None,
    };
    form.native.opcode = info.op_code() as u8;
    form.native.l = info.l() as u8;
    form.native.w = if info.encoding() == EncodingKind::Legacy {
        info.operand_size() == 64
    } else {
        info.w() != 0
    };
    if info.is_group() {
        form.native.reg = NativeReg::Fixed(info.group_index() as u8);
    }
    form.native.fp = raises_fp_exceptions(&name);
    form.native.sets_flags = sets_flags(&name);
    form.aligned = aligned(info, &name);
    form.whole = reads_whole(&name, form.imm);
    form.compressed = name.starts_with("expand")
        || name.starts_with("pexpand")
        || name.starts_with("compress")
        || name.starts_with("pcompress");
    Some(form)
}

/// The mnemonic in lower case without the V of VEX forms.
fn base_name(mnemonic: Mnemonic) -> String {
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    match name.strip_prefix('v') {
        // VERR, VERW, VMCALL and so on have no vector operands and never get this far.
        Some(rest) => rest.to_string(),
        None => name,
    }
}

/// What kinds of registers an instruction names.
#[derive(Clone, Copy, Default)]
struct Files {
    vector: bool,
    mmx: bool,
}

/// Finds the field of each operand; `None` if one has a place that cannot be passed through.
fn operands(form: &mut Form, info: &OpCodeInfo) -> Option<Files> {
    use OpCodeOperandKind as K;
    let mut files = Files::default();
    for (i, &kind) in info.op_kinds().iter().enumerate() {
        let i = i as u8;
        match kind {
            K::xmm_reg | K::ymm_reg | K::zmm_reg | K::k_reg | K::kp1_reg => {
                form.reg = i;
                files.vector = true;
            }
            K::mm_reg => {
                form.reg = i;
                files.mmx = true;
            }
            K::r32_reg | K::r64_reg => form.reg = i,
            K::xmm_rm | K::ymm_rm | K::zmm_rm | K::k_rm => {
                form.rm = i;
                files.vector = true;
            }
            K::xmm_or_mem | K::ymm_or_mem | K::zmm_or_mem | K::k_or_mem => {
                form.rm = i;
                files.vector = true;
            }
            K::mm_rm | K::mm_or_mem => {
                form.rm = i;
                files.mmx = true;
            }
            K::r32_rm | K::r64_rm | K::r32_or_mem | K::r64_or_mem | K::mem => form.rm = i,
            K::mem_vsib32x
            | K::mem_vsib64x
            | K::mem_vsib32y
            | K::mem_vsib64y
            | K::mem_vsib32z
            | K::mem_vsib64z => form.rm = i,
            K::xmm_vvvv | K::ymm_vvvv | K::zmm_vvvv | K::k_vvvv => {
                form.vvvv = i;
                files.vector = true;
            }
            K::xmm_is4 | K::ymm_is4 => form.is4 = i,
            K::imm8 => form.imm = true,
            // DS:rDI of MASKMOVDQU, XMM0 of the instructions that name it implicitly.
            K::seg_rDI => {}
            K::None => {}
            _ => return None,
        }
    }
    Some(files)
}

fn kind(name: &str, info: &OpCodeInfo, files: Files) -> Option<Kind> {
    use OpCodeOperandKind as K;
    let vsib = info.op_kinds().iter().position(|k| {
        matches!(
            k,
            K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::mem_vsib32z
                | K::mem_vsib64z
        )
    });
    Some(match name {
        "ldmxcsr" => Kind::LoadMxcsr,
        "stmxcsr" => Kind::StoreMxcsr,
        "pcmpestri" | "pcmpestrm" | "pcmpistri" | "pcmpistrm" | "pcmpestri64" | "pcmpestrm64" => {
            Kind::Strings
        }
        "maskmovdqu" => Kind::MaskMovDqu,
        "maskmovps" | "maskmovpd" | "pmaskmovd" | "pmaskmovq" => Kind::MaskMov,
        "zeroupper" | "zeroall" => Kind::Plain,
        _ if name.contains("gatherpf") || name.contains("scatterpf") => return None,
        _ if vsib == Some(0) => Kind::Scatter,
        _ if vsib.is_some() => Kind::Gather,
        _ if files.mmx => Kind::Mmx,
        _ if files.vector => Kind::Plain,
        _ => return None,
    })
}

/// Whether a legacy or explicitly aligned form faults on a misaligned memory operand (SDM vol. 2
/// §2.4 and table 2-17: exception classes 1, 2 and 4).
fn aligned(info: &OpCodeInfo, name: &str) -> bool {
    let always = matches!(
        name,
        "movaps"
            | "movapd"
            | "movdqa"
            | "movdqa32"
            | "movdqa64"
            | "movntps"
            | "movntpd"
            | "movntdq"
            | "movntdqa"
    );
    let never = matches!(name, "movups" | "movupd" | "movdqu" | "lddqu");
    // Smaller memory operands of legacy instructions need no alignment.
    let legacy = info.encoding() == EncodingKind::Legacy && info.memory_size().size() == 16;
    always || (legacy && !never)
}

/// Whether the instruction can raise a SIMD floating-point exception.
fn raises_fp_exceptions(name: &str) -> bool {
    const FAMILIES: [&str; 27] = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comi", "ucomi", "comx", "ucomx",
        "round", "dpp", "hadd", "hsub", "addsub", "fmadd", "fmsub", "fnmadd", "fnmsub", "getexp",
        "getmant", "fixupimm", "range", "reduce", "rndscale",
    ];
    const SUFFIXES: [&str; 8] = ["ps", "pd", "ss", "sd", "ph", "sh", "bf16", "bh"];
    let float = SUFFIXES.iter().any(|s| name.ends_with(s));
    name.starts_with("cvt")
        || name.starts_with("scalef")
        || (float && FAMILIES.iter().any(|f| name.starts_with(f)))
}

/// Whether an EVEX form reads its whole memory operand under any mask (SDM vol. 2 §2.8.8: the
/// exception classes with "NF", no fault suppression).
fn reads_whole(name: &str, imm: bool) -> bool {
    const FAMILIES: [&str; 26] = [
        "cvtne2ps2bf16",
        "extract",
        "pconflict",
        "movddup",
        "movsldup",
        "movshdup",
        "unpck",
        "punpck",
        "perm",
        "pshuf",
        "shuf",
        "align",
        "palignr",
        "pack",
        "dbpsadbw",
        "psadbw",
        "psll",
        "psra",
        "psrl",
        "pmultishift",
        "pmaddwd",
        "pmaddubsw",
        "gf2p8affine",
        "insert",
        "movhlps",
        "movlhps",
    ];
    // Shifts by a vector of counts, or of a vector in memory by an immediate one, work element by
    // element.
    let shift = ["psll", "psra", "psrl"].iter().any(|s| name.starts_with(s));
    let by_element = shift && (imm && !name.ends_with("dq") || name[4..].starts_with('v'));
    // Each of its results is of an element of its own.
    let bits = name == "pshufbitqmb";
    FAMILIES.iter().any(|f| name.starts_with(f)) && !by_element && !bits
}

fn sets_flags(name: &str) -> bool {
    name.starts_with("comi")
        || name.starts_with("ucomi")
        || name.starts_with("kortest")
        || name.starts_with("ktest")
        // Not VPTESTMB and its like, which write a mask register.
        || matches!(name, "ptest" | "testps" | "testpd")
}

/// Whether this host can execute the instructions of `f` for us: what the translator states in CPUID
/// that is not its own.
pub fn host_has(f: CpuidFeature) -> bool {
    if !cfg!(target_arch = "x86_64") {
        return false;
    }
    f == CpuidFeature::X64 || feature_of(f).is_some_and(supports)
}

/// Whether the translator gives the feature `name` on this host.
pub fn supports(name: &str) -> bool {
    static SET: OnceLock<FeatureSet> = OnceLock::new();
    SET.get_or_init(|| FeatureSet::of(&cpuid::supported())).has_name(name)
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};
    use tandem_jit::native::{NativeRegs, encode};

    /// Forms that are passed through and encode with arbitrary registers decode to the same code.
    #[test]
    fn every_plain_form_encodes_to_its_own_code() {
        let mut seen = 0;
        for code in Code::values() {
            let f = form(code);
            if f.kind != Kind::Plain {
                continue;
            }
            let info = code.op_code();
            for memory in [false, true] {
                let mut n = f.native;
                let has_mem = has_memory(info, f.rm);
                let only_mem = f.rm != NO_OP && info.op_kind(f.rm.into()) == OpCodeOperandKind::mem;
                if memory && !has_mem || !memory && only_mem {
                    continue;
                }
                let reg = |i: u8, num: u8| match info.op_kind(i.into()) {
                    k if is_gpr(k) && i == 0 => NativeReg::GprDst,
                    k if is_gpr(k) => NativeReg::GprB,
                    k if is_mask(k) => NativeReg::Mask(num & 6),
                    _ => NativeReg::Vec(num),
                };
                if f.reg != NO_OP {
                    n.reg = reg(f.reg, 3);
                }
                if f.vvvv != NO_OP {
                    n.vvvv = reg(f.vvvv, 5);
                }
                if f.rm != NO_OP {
                    n.rm = if memory { NativeReg::Mem } else { reg(f.rm, 7) };
                }
                if f.imm || f.is4 != NO_OP {
                    n.imm8 = Some(0x10);
                }
                if let Encoding::Evex { aaa, .. } = &mut n.enc
                    && info.require_op_mask_register()
                {
                    *aaa = 2;
                }
                let regs = NativeRegs { b: 1, c: 2, dst: 3, mem: 6, ..Default::default() };
                let bytes = encode(&n, &regs).unwrap_or_else(|| panic!("{code:?}: no encoding"));
                let insn = Decoder::new(64, bytes.as_slice(), DecoderOptions::NONE).decode();
                assert_eq!(insn.len(), bytes.as_slice().len(), "{code:?}");
                assert_eq!(insn.code(), code, "{:02x?}", bytes.as_slice());
                seen += 1;
            }
        }
        assert!(seen > 800, "{seen} forms");
    }

    fn has_memory(info: &OpCodeInfo, rm: u8) -> bool {
        use OpCodeOperandKind as K;
        rm != NO_OP
            && matches!(
                info.op_kind(rm.into()),
                K::mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
                    | K::zmm_or_mem
                    | K::k_or_mem
                    | K::r32_or_mem
                    | K::r64_or_mem
            )
    }

    fn is_gpr(k: OpCodeOperandKind) -> bool {
        use OpCodeOperandKind as K;
        matches!(k, K::r32_reg | K::r64_reg | K::r32_rm | K::r64_rm | K::r32_or_mem | K::r64_or_mem)
    }

    fn is_mask(k: OpCodeOperandKind) -> bool {
        use OpCodeOperandKind as K;
        matches!(k, K::k_reg | K::kp1_reg | K::k_rm | K::k_or_mem | K::k_vvvv)
    }

    #[test]
    fn properties() {
        assert_eq!(form(Code::Paddd_xmm_xmmm128).kind, Kind::Plain);
        assert!(form(Code::Paddd_xmm_xmmm128).aligned);
        assert!(!form(Code::Paddd_xmm_xmmm128).native.fp);
        assert!(form(Code::Addss_xmm_xmmm32).native.fp);
        assert!(!form(Code::Addss_xmm_xmmm32).aligned);
        assert!(form(Code::Comisd_xmm_xmmm64).native.sets_flags);
        assert!(!form(Code::Movups_xmm_xmmm128).aligned);
        assert!(form(Code::Movntdq_m128_xmm).aligned);
        assert_eq!(form(Code::Paddd_mm_mmm64).kind, Kind::Mmx);
        assert_eq!(form(Code::Add_rm32_r32).kind, Kind::None);
        assert_eq!(form(Code::Ldmxcsr_m32).kind, Kind::LoadMxcsr);
        assert_eq!(form(Code::Fld_m32fp).kind, Kind::None);
    }
}
