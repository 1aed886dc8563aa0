//! Which instruction forms are compared with the host, and why the others are not: every form that iced
//! knows, of the features that the translator states on this host, in each code size.

use super::generate::{Pools, there};
use crate::{forms, vector, x87};
use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Mnemonic};
use std::collections::BTreeMap;
use tandem_tcg::x86::translate::{feature_of, supports};

/// Whether processors of our kind have the form at all.
fn exists(code: Code, bits: u32) -> bool {
    use CpuidFeature as F;
    let op = code.op_code();
    let known = |f: &F| match f {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::PAUSE
        | F::MULTIBYTENOP
        | F::CPUID
        | F::SMM
        | F::MONITOR
        | F::PREFETCHW
        | F::WBNOINVD => true,
        f => feature_of(*f).is_some_and(supports),
    };
    there(code, bits)
        && code.cpuid_features().iter().all(known)
        && !matches!(op.encoding(), EncodingKind::XOP | EncodingKind::D3NOW)
}

/// By what tests a form is compared with the host.
fn compared(code: Code, bits: u32, pools: &Pools) -> Option<&'static str> {
    if forms::is_integer(code, bits) {
        return Some("integer forms");
    }
    if bits == 64 && (vector::is_vector(code) || vector::is_indexed(code)) {
        return Some("vector forms");
    }
    if x87::is_x87(code) && bits == 64 {
        return Some("x87 forms");
    }
    if pools.contains(code) {
        return Some("whole programs");
    }
    let control = matches!(
        code.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
    );
    if control && code.op_code().op_count() == 1 && !is_far(code) {
        return Some("whole programs: jumps and calls");
    }
    None
}

fn is_far(code: Code) -> bool {
    let name = format!("{code:?}");
    name.contains("ptr16") || name.contains("m16")
}

/// Why a form is not compared with the host.
fn excuse(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let name = format!("{code:?}");
    let op = code.op_code();
    Some(match code.mnemonic() {
        M::Syscall | M::Sysenter | M::Sysexit | M::Sysret | M::Sysretq | M::Sysexitq => {
            "leaves the program: unit tests of x86::syscall, by the SDM"
        }
        M::Int | M::Int3 | M::Int1 | M::Into | M::Iret | M::Iretd | M::Iretq | M::Retf => {
            "interrupts and far returns: unit tests of x86::{interrupt, iret, far}, by the SDM"
        }
        M::Jmp | M::Call if is_far(code) => "far transfers: unit tests of x86::far, by the SDM",
        M::Jmp | M::Call | M::Ret => "near transfers with other operand sizes: programs.txt",
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => "programs.txt",
        M::Rdtsc | M::Rdtscp | M::Cpuid | M::Rdpid | M::Rdrand | M::Rdseed | M::Rdpmc => {
            "gives each processor's own answer"
        }
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64
        | M::Xgetbv
        | M::Xsetbv => "shows which components are in use: unit tests of x86::xsave, by the SDM",
        M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Sgdt
        | M::Sidt => {
            "depends on the kernel's descriptor tables: unit tests of x86::seg, by the SDM"
        }
        M::Rdfsbase | M::Wrfsbase | M::Rdgsbase | M::Wrgsbase => {
            "the trampoline needs the bases; reads are in whole programs"
        }
        M::Rdpkru | M::Wrpkru | M::Clac | M::Stac => "not enabled for programs on this host",
        M::Endbr32
        | M::Endbr64
        | M::Nop
        | M::Reservednop
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Ud0
        | M::Ud1
        | M::Ud2
        | M::Cldemote
        | M::Pause => {
            "does nothing, or always raises #UD: one form of each kind is in whole programs"
        }
        M::Bswap | M::Movsxd | M::Shld | M::Shrd | M::Cmpxchg | M::Pushad | M::Salc => {
            "undefined, or host artefact (see generate.rs)"
        }
        M::Fstcw | M::Fstsw | M::Fclex | M::Finit | M::Fstenv | M::Fsave => {
            "FWAIT and another instruction, each of which is compared"
        }
        M::Feni
        | M::Fdisi
        | M::Fsetpm
        | M::Fneni
        | M::Fndisi
        | M::Fnsetpm
        | M::Frstpm
        | M::Fstdw
        | M::Fstsg
        | M::Fnstdw
        | M::Fnstsg => "of coprocessors before the 80387",
        M::Movdiri | M::Movdir64b | M::Umov | M::Ibts | M::Xbts | M::Loadall => {
            "not on this processor: #UD"
        }
        _ if op.must_be_cpl0() || is_privileged(code.mnemonic()) => {
            "of the system: unit tests of accel/tcg, by the SDM"
        }
        _ if name.contains("_cr") || name.contains("_dr") || name.contains("_tr") => {
            "of the system: unit tests of x86::{cr, debug}, by the SDM"
        }
        M::Mov | M::Push | M::Pop => "segment registers: unit tests of x86::seg, by the SDM",
        M::Ldmxcsr
        | M::Stmxcsr
        | M::Vldmxcsr
        | M::Vstmxcsr
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Enter
        | M::Lfence
        | M::Mfence
        | M::Sfence
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Wait
        | M::Std => "another operand or address size of a form in whole programs",
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd | M::In | M::Out => {
            "ports: refused to programs (in whole programs); unit tests of x86::io"
        }
        M::Bound => "another operand size of a form in whole programs",
        M::Monitor | M::Mwait | M::Rsm => "not stated in CPUID: #UD",
        _ => return None,
    })
}

fn is_privileged(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Hlt
            | M::Cli
            | M::Sti
            | M::Clts
            | M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
            | M::Lmsw
            | M::Invd
            | M::Wbinvd
            | M::Wbnoinvd
            | M::Invlpg
            | M::Invpcid
            | M::Rdmsr
            | M::Wrmsr
            | M::Swapgs
    )
}

/// No form is forgotten: each is compared with the host or has a reason why not. `--nocapture` shows how
/// many, and the reasons.
#[test]
fn every_form_is_compared_or_has_a_reason() {
    let mut forgotten = Vec::new();
    for bits in [16, 32, 64] {
        let pools = Pools::new(bits);
        let (mut total, mut by) = (0, BTreeMap::<&str, usize>::new());
        let mut reasons = BTreeMap::<&str, Vec<String>>::new();
        for code in Code::values().filter(|&c| exists(c, bits)) {
            total += 1;
            if let Some(how) = compared(code, bits, &pools) {
                *by.entry(how).or_default() += 1;
            } else if let Some(why) = excuse(code) {
                reasons.entry(why).or_default().push(format!("{code:?}"));
            } else {
                forgotten.push(format!("{code:?} in {bits}-bit code"));
            }
        }
        eprintln!("{bits}-bit code: {total} forms");
        for (how, n) in by {
            eprintln!("  {n:5} compared by {how}");
        }
        for (why, which) in reasons {
            eprintln!("  {:5} not: {why}: {}", which.len(), which.join(" "));
        }
    }
    assert!(forgotten.is_empty(), "neither compared nor excused:\n{}", forgotten.join("\n"));
}
