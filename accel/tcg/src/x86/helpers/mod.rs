//! Functions that generated code calls, one file per subject, and their table.
//!
//! A helper is an `extern "C" fn(env: *mut Env, …u64) -> u64`. It declares its effects in the table;
//! system code proper returns `Result<_, Exception>` and the thin helper turns an error into a
//! pending fault ([`raise`]).
//!
//! To add a helper, write the function in the file of its subject and one line in the table below;
//! the line makes the constant that the front end calls it by.

mod bcd;
mod fault;
mod flags;
mod hypercall;
mod misc;
pub(crate) mod mmx;
pub(crate) mod pcmpstr;
mod segment;
pub(crate) mod string;
mod system;
pub(crate) mod vector;
pub(crate) mod x87;

use super::Env;
use super::exception::Exception;
use tandem_jit::ir::Helper;
use tandem_jit::target::{HelperDesc, HelperEffects};

/// Makes `e` the pending fault of the helper that is running and returns 0. Generated code sees it
/// when the helper returns.
pub fn raise(env: &mut Env, e: Exception) -> u64 {
    env.cpu.exception = e;
    env.core.fault = 1;
    0
}

/// Effect sets by name, for the table.
#[allow(dead_code)]
mod effects {
    use super::HelperEffects;

    const fn new(
        reads_globals: bool,
        writes_globals: bool,
        may_fault: bool,
        vector: bool,
    ) -> HelperEffects {
        HelperEffects { reads_globals, writes_globals, may_fault, vector }
    }
    /// A function of its arguments and of state that is not a global.
    pub const PURE: HelperEffects = new(false, false, false, false);
    /// The same, and may raise a fault.
    pub const FAULT: HelperEffects = new(false, false, true, false);
    /// Reads globals in `Env`.
    pub const READ: HelperEffects = new(true, false, false, false);
    /// Reads and writes globals in `Env`.
    pub const STATE: HelperEffects = new(true, true, false, false);
    /// Reads globals and may raise a fault.
    pub const READ_FAULT: HelperEffects = new(true, false, true, false);
    /// Reads and writes globals and may raise a fault: system instructions, string instructions.
    pub const SYSTEM: HelperEffects = new(true, true, true, false);
    /// Touches vector state.
    pub const VECTOR: HelperEffects = new(false, false, false, true);
    /// Touches vector state and may raise a fault.
    pub const VECTOR_FAULT: HelperEffects = new(false, false, true, true);
    /// Touches vector state and reads globals.
    pub const VECTOR_READ: HelperEffects = new(true, false, false, true);
    /// The same, and may raise a fault.
    pub const VECTOR_FAULT_READ: HelperEffects = new(true, false, true, true);
    /// Touches everything.
    pub const ALL: HelperEffects = new(true, true, true, true);
}

macro_rules! helpers {
    ($( $name:ident = $function:path, $effects:ident; )*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        #[repr(u16)]
        enum Number { $( $name, )* }
        $(
            #[doc = concat!("Calls [`", stringify!($function), "`].")]
            pub const $name: Helper = Helper(Number::$name as u16);
        )*
        /// The table of helpers for the compiler; the constants of this module index it.
        pub fn table() -> Vec<HelperDesc> {
            vec![ $( HelperDesc {
                name: stringify!($function),
                addr: $function as *const () as usize,
                effects: effects::$effects,
            }, )* ]
        }
    };
}

// One section per subject, lines sorted by file.
helpers! {
    // ---- integer front end ----
    RAISE_EXCEPTION = fault::raise_exception, FAULT;
    ALIGN_CHECK = fault::align_check, FAULT;
    COMPUTE_FLAGS = flags::compute_flags, PURE;
    COMPUTE_FLAGS_SYNC = flags::compute_flags, READ;
    CHECK_ALIGNED = fault::check_aligned, FAULT;
    DAA = bcd::daa, PURE;
    DAS = bcd::das, PURE;
    AAA = bcd::aaa, PURE;
    AAS = bcd::aas, PURE;
    BOUND = misc::bound, FAULT;
    CMPXCHG16B = misc::cmpxchg16b, STATE;
    RANDOM = misc::random, PURE;
    SET_RIP = misc::set_rip, STATE;
    MOVS = string::movs, SYSTEM;
    STOS = string::stos, SYSTEM;
    LODS = string::lods, SYSTEM;
    SCAS = string::scas, SYSTEM;
    CMPS = string::cmps, SYSTEM;
    INS = string::ins, SYSTEM;
    OUTS = string::outs, SYSTEM;

    // ---- system ----
    SEG_CHECK = segment::seg_check, FAULT;
    MASKED_SEG_CHECK = segment::masked_seg_check, FAULT;
    ARPL = segment::arpl, FAULT;
    LOAD_SEG = system::load_seg, SYSTEM;
    FAR_JMP = system::far_jmp, SYSTEM;
    FAR_CALL = system::far_call, SYSTEM;
    FAR_RET = system::far_ret, SYSTEM;
    IRET = system::iret, SYSTEM;
    INT_N = system::int_n, SYSTEM;
    SYSCALL = system::syscall, SYSTEM;
    SYSRET = system::sysret, SYSTEM;
    SYSENTER = system::sysenter, SYSTEM;
    SYSEXIT = system::sysexit, SYSTEM;
    LAR = system::lar, FAULT;
    LSL = system::lsl, FAULT;
    VERR = system::verr, FAULT;
    VERW = system::verw, FAULT;
    LLDT = system::lldt, FAULT;
    LTR = system::ltr, FAULT;
    READ_CR = system::read_cr, FAULT;
    WRITE_CR = system::write_cr, SYSTEM;
    CLTS = system::clts, FAULT;
    LMSW = system::lmsw, SYSTEM;
    READ_DR = system::read_dr, FAULT;
    WRITE_DR = system::write_dr, SYSTEM;
    LGDT = system::lgdt, FAULT;
    LIDT = system::lidt, FAULT;
    SGDT = system::sgdt, FAULT;
    SIDT = system::sidt, FAULT;
    INVLPG = system::invlpg, SYSTEM;
    INVPCID = system::invpcid, SYSTEM;
    RDMSR = system::rdmsr, SYSTEM;
    WRMSR = system::wrmsr, SYSTEM;
    RDTSC = system::rdtsc, FAULT;
    RDPMC = system::rdpmc, FAULT;
    CPUID = system::cpuid, STATE;
    PIO_IN = system::pio_in, READ;
    PIO_OUT = system::pio_out, READ;
    CHECK_IO = system::check_io, FAULT;
    HLT = system::hlt, FAULT;
    CLI = system::cli, FAULT;
    STI = system::sti, FAULT;
    PUSHF = system::pushf, READ_FAULT;
    POPF = system::popf, SYSTEM;
    STAC = system::stac, FAULT;
    CLAC = system::clac, FAULT;
    SWAPGS = system::swapgs, SYSTEM;
    WRFSGSBASE = system::wrfsgsbase, SYSTEM;
    XGETBV = system::xgetbv, READ_FAULT;
    XSETBV = system::xsetbv, SYSTEM;
    RDPKRU = system::rdpkru, READ_FAULT;
    WRPKRU = system::wrpkru, READ_FAULT;
    PAUSE = system::pause, PURE;
    MONITOR = system::monitor, READ_FAULT;
    MWAIT = system::mwait, READ_FAULT;
    WBINVD = system::wbinvd, FAULT;
    HYPERCALL = hypercall::hypercall, SYSTEM;
    INSN_BREAKPOINT = system::insn_breakpoint, READ_FAULT;

    // ---- vector and x87 ----
    MMX_CONVERT = mmx::mmx_convert, VECTOR_FAULT;
    MMX_MASKMOVQ = mmx::mmx_maskmovq, FAULT;
    MMX_OP = mmx::mmx_op, PURE;
    MMX_PALIGNR = mmx::mmx_palignr, PURE;
    MMX_PMOVMSKB = mmx::mmx_pmovmskb, PURE;
    MMX_PSHUFW = mmx::mmx_pshufw, PURE;
    PCMPSTR = pcmpstr::pcmpstr, VECTOR_READ;
    GATHER = vector::gather, VECTOR_FAULT_READ;
    GET_XMM = vector::get_xmm, VECTOR;
    MASKMOVDQU = vector::maskmovdqu, VECTOR_FAULT;
    SCATTER = vector::scatter, VECTOR_FAULT_READ;
    SET_XMM_LOW = vector::set_xmm_low, VECTOR;
    FLDCW = x87::fldcw, PURE;
    FNCLEX = x87::fnclex, PURE;
    FNINIT = x87::fninit, PURE;
    FNSAVE = x87::fnsave, FAULT;
    FNSTSW = x87::fnstsw, PURE;
    FRSTOR = x87::frstor, FAULT;
    FXRSTOR = x87::fxrstor, VECTOR_FAULT_READ;
    FXSAVE = x87::fxsave, VECTOR_FAULT_READ;
    X87 = x87::x87, PURE;
    X87_SYNC = x87::x87_sync, PURE;
    X87_COMPARE_FLAGS = x87::x87_compare_flags, PURE;
    X87_LOAD_80 = x87::x87_load_80, PURE;
    X87_STORE = x87::x87_store, FAULT;
    XRSTOR = x87::xrstor, VECTOR_FAULT_READ;
    XSAVE = x87::xsave, VECTOR_FAULT_READ;
}
