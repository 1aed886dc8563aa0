//! The operation table: every IR operation, its operands and its effects, in one place.
//!
//! Builder, printer, parser, verifier, passes, interpreter and back ends all use this table.

use std::fmt;

/// Operand width of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum Width {
    /// 8 bits.
    W8,
    /// 16 bits.
    W16,
    /// 32 bits.
    W32,
    /// 64 bits.
    W64,
}

impl Width {
    /// Width in bits: 8, 16, 32 or 64.
    #[inline]
    pub const fn bits(self) -> u32 {
        8 << self as u32
    }
    /// Width in bytes: 1, 2, 4 or 8.
    #[inline]
    pub const fn bytes(self) -> u32 {
        1 << self as u32
    }
    /// All ones in the low [`Width::bits`] bits.
    #[inline]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }
    /// The width of `n` bytes (1, 2, 4, 8).
    #[inline]
    pub const fn from_bytes(n: u32) -> Option<Width> {
        match n {
            1 => Some(Width::W8),
            2 => Some(Width::W16),
            4 => Some(Width::W32),
            8 => Some(Width::W64),
            _ => None,
        }
    }
}

/// Condition over a flags value; the encoding is that of the x86 condition field (SDM vol. 2
/// appendix B, table B-8), so that bit 0 negates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Cond {
    O,
    No,
    /// Below: unsigned less than, carry set.
    B,
    /// Above or equal: unsigned, carry clear.
    Ae,
    E,
    Ne,
    Be,
    A,
    S,
    Ns,
    P,
    Np,
    L,
    Ge,
    Le,
    G,
}

impl Cond {
    /// The condition with encoding `code & 15`.
    #[inline]
    pub const fn from_code(code: u8) -> Cond {
        const ALL: [Cond; 16] = [
            Cond::O,
            Cond::No,
            Cond::B,
            Cond::Ae,
            Cond::E,
            Cond::Ne,
            Cond::Be,
            Cond::A,
            Cond::S,
            Cond::Ns,
            Cond::P,
            Cond::Np,
            Cond::L,
            Cond::Ge,
            Cond::Le,
            Cond::G,
        ];
        ALL[(code & 15) as usize]
    }
    /// The opposite condition.
    #[inline]
    pub const fn negate(self) -> Cond {
        Cond::from_code(self as u8 ^ 1)
    }
    /// Whether the condition holds for a flags image.
    pub const fn holds(self, img: u64) -> bool {
        let (cf, pf, zf, sf, of) =
            (img & 1 != 0, img & 4 != 0, img & 0x40 != 0, img & 0x80 != 0, img & 0x800 != 0);
        let base = match self as u8 >> 1 {
            0 => of,
            1 => cf,
            2 => zf,
            3 => cf || zf,
            4 => sf,
            5 => pf,
            6 => sf != of,
            _ => zf || sf != of,
        };
        base != (self as u8 & 1 != 0)
    }
    /// The flags image bits that the condition looks at.
    #[inline]
    pub const fn reads(self) -> u64 {
        match self as u8 >> 1 {
            0 => 0x800,
            1 => 1,
            2 => 0x40,
            3 => 0x41,
            4 => 0x80,
            5 => 4,
            6 => 0x880,
            _ => 0x8c0,
        }
    }
}

/// Effects of an operation, beyond defining its results.
pub mod effect {
    /// No effect: removable when no result is used, and movable.
    pub const NONE: u8 = 0;
    /// May raise a guest fault; carries a snapshot.
    pub const FAULT: u8 = 1;
    /// Has an effect that must not be removed or reordered.
    pub const SIDE: u8 = 2;
    /// Leaves the block, always.
    pub const TERM: u8 = 4;
    /// Leaves the block, sometimes; carries the deferred globals like a terminator.
    pub const SIDE_EXIT: u8 = 8;
}

/// What an operand slot of an instruction holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    /// Not used; must be [`super::Val::NONE`].
    None,
    /// A value.
    Val,
    /// A value, or none.
    OptVal,
    /// A flags value.
    Flags,
    /// A flags value, or none.
    OptFlags,
}

/// One row of the operation table.
#[derive(Debug)]
pub struct OpInfo {
    /// Name in the text form.
    pub name: &'static str,
    /// First result.
    pub dst: Slot,
    /// Second result.
    pub dst2: Slot,
    /// Flags result.
    pub fl: Slot,
    /// Inputs a, b, c, d.
    pub ins: [Slot; 4],
    /// Union of [`effect`] bits.
    pub effects: u8,
}

macro_rules! ops {
    ($( $(#[$doc:meta])* $op:ident $name:literal ($dst:ident $dst2:ident $fl:ident) ($a:ident $b:ident $c:ident $d:ident) $eff:expr; )*) => {
        /// An IR operation. The variant docs give the semantics; the [`OpInfo`] table gives the
        /// operands.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum Op { $( $(#[$doc])* $op, )* }

        /// The table, indexed by `Op as usize`.
        pub static OPS: &[OpInfo] = &[ $( OpInfo {
            name: $name,
            dst: slot!($dst), dst2: slot!($dst2), fl: slot!($fl),
            ins: [slot!($a), slot!($b), slot!($c), slot!($d)],
            effects: $eff,
        }, )* ];

        impl Op {
            /// All operations, in table order.
            pub const ALL: &'static [Op] = &[ $( Op::$op, )* ];
        }
    };
}

macro_rules! slot {
    (n) => {
        Slot::None
    };
    (v) => {
        Slot::Val
    };
    (o) => {
        Slot::OptVal
    };
    (f) => {
        Slot::Flags
    };
    (g) => {
        Slot::OptFlags
    };
}

use effect::*;

// Columns: results (dst dst2 fl), inputs (a b c d); n = none, v = value, o = optional value,
// f = flags, g = optional flags.
ops! {
    // ---- structure ----
    /// Marks the start of a guest instruction. `imm` is the value the pc global has while this
    /// instruction executes; `aux` is the instruction's length in bytes.
    InsnStart "insn" (n n n) (n n n n) SIDE;

    // ---- constants and globals ----
    /// `dst = imm`.
    Const "const" (v n n) (n n n n) NONE;
    /// `dst = global[imm]`, all 64 bits.
    Get "get" (v n n) (n n n n) NONE;
    /// `global[imm] = a`, all 64 bits.
    Put "put" (n n n) (v n n n) SIDE;
    /// `dst = zero-extend Env[imm .. imm+w]` (a state field that is not a global).
    LdEnv "ldenv" (v n n) (n n n n) NONE;
    /// `dst = address of Env[imm]`, for pass-through instructions that have their operand there.
    EnvPtr "envptr" (v n n) (n n n n) NONE;
    /// `Env[imm .. imm+w] = a`.
    StEnv "stenv" (n n n) (v n n n) SIDE;

    // ---- moves between widths ----
    /// `dst = zero-extend low w bits of a`.
    Zext "zext" (v n n) (v n n n) NONE;
    /// `dst = sign-extend low w bits of a` to 64 bits.
    Sext "sext" (v n n) (v n n n) NONE;
    /// `dst = a` with bits `[aux, aux+w)` replaced by the low `w` bits of `b`. All 64 bits defined.
    Deposit "deposit" (v n n) (v v n n) NONE;
    /// `dst = zero-extend bits [aux, aux+w) of a`.
    Extract "extract" (v n n) (v n n n) NONE;

    // ---- integer arithmetic; `fl`, where present, as the x86 instruction of the same name ----
    /// `dst = a + b`.
    Add "add" (o n g) (v v n n) NONE;
    /// `dst = a - b`. Without `dst` it is a comparison.
    Sub "sub" (o n g) (v v n n) NONE;
    /// `dst = a + b + CF(c)`.
    Adc "adc" (o n g) (v v f n) NONE;
    /// `dst = a - b - CF(c)`.
    Sbb "sbb" (o n g) (v v f n) NONE;
    /// `dst = a & b`. Without `dst` it is a test.
    And "and" (o n g) (v v n n) NONE;
    /// `dst = a | b`.
    Or "or" (o n g) (v v n n) NONE;
    /// `dst = a ^ b`.
    Xor "xor" (o n g) (v v n n) NONE;
    /// `dst = a & !b`.
    Andn "andn" (o n n) (v v n n) NONE;
    /// `dst = -a`.
    Neg "neg" (o n g) (v n n n) NONE;
    /// `dst = !a`; no flags.
    Not "not" (o n n) (v n n n) NONE;
    /// `dst = a + 1`; flags as ADD but CF is taken from `c` (from nowhere, i.e. 0, if none).
    Inc "inc" (o n g) (v n g n) NONE;
    /// `dst = a - 1`; flags as SUB but CF is taken from `c`.
    Dec "dec" (o n g) (v n g n) NONE;
    /// `dst = a << n`, where `n = b mod 64` for W64 and `b mod 32` for all other widths (so a W8
    /// shift by 20 gives 0). `fl` as SHL; when `n` is 0 the flags are those of `d` (or 0).
    Shl "shl" (o n g) (v v n g) NONE;
    /// Logical right shift; count and flags as `Shl`.
    Shr "shr" (o n g) (v v n g) NONE;
    /// Arithmetic right shift; count and flags as `Shl`.
    Sar "sar" (o n g) (v v n g) NONE;
    /// Rotate left; count masked as `Shl`, then modulo the width. `fl` as ROL: CF and OF as the
    /// rotation sets them, the others from `d` (or 0); all from `d` when the masked count is 0.
    Rol "rol" (o n g) (v v n g) NONE;
    /// Rotate right; as `Rol`.
    Ror "ror" (o n g) (v v n g) NONE;
    /// Rotate left through carry, 1 + w bits wide; carry in and other flags from `c`.
    Rcl "rcl" (o n g) (v v f n) NONE;
    /// Rotate right through carry; as `Rcl`.
    Rcr "rcr" (o n g) (v v f n) NONE;
    /// Double shift left: `a` shifted left by `c`, filled from the top of `b` (SHLD). Count masked
    /// as `Shl`. Flags as SHLD; from `d` if the count is 0. W16 with a count over 16: undefined
    /// result, but no fault.
    Shld "shld" (o n g) (v v v g) NONE;
    /// Double shift right (SHRD); as `Shld`.
    Shrd "shrd" (o n g) (v v v g) NONE;
    /// `dst = low w bits of a * b`. `fl` as the two-operand IMUL: CF = OF = "signed overflow".
    Mul "mul" (o n g) (v v n n) NONE;
    /// `dst = low, dst2 = high` half of the unsigned product. `fl` as MUL.
    MulU2 "mulu2" (o o g) (v v n n) NONE;
    /// `dst = low, dst2 = high` half of the signed product. `fl` as one-operand IMUL.
    MulS2 "muls2" (o o g) (v v n n) NONE;
    /// `dst = quotient, dst2 = remainder` of `(a:b) / c`, unsigned; `a` is the high half. Raises
    /// trap [`super::TRAP_DIVIDE`] if `c` is 0 or the quotient does not fit.
    DivU2 "divu2" (o o n) (v v v n) FAULT;
    /// Signed, truncating; traps as `DivU2`.
    DivS2 "divs2" (o o n) (v v v n) FAULT;
    /// Number of leading zero bits; `w` for 0.
    Clz "clz" (v n n) (v n n n) NONE;
    /// Number of trailing zero bits; `w` for 0.
    Ctz "ctz" (v n n) (v n n n) NONE;
    /// Number of one bits.
    Popcnt "popcnt" (v n n) (v n n n) NONE;
    /// Byte order reversed (W16, W32, W64).
    Bswap "bswap" (v n n) (v n n n) NONE;
    /// Bit gather (PEXT): bits of `a` under mask `b`. W32, W64.
    Pext "pext" (v n n) (v v n n) NONE;
    /// Bit scatter (PDEP): low bits of `a` to the places of mask `b`. W32, W64.
    Pdep "pdep" (v n n) (v v n n) NONE;
    /// `dst = a + (b << (aux & 3)) + sign-extended imm` (32-bit range), at width W32 or W64.
    Lea "lea" (v n n) (o o n n) NONE;

    // ---- flags ----
    /// `dst = cond(a) ? 1 : 0`, all 64 bits defined. Condition in `cond`.
    SetCc "setcc" (v n n) (f n n n) NONE;
    /// `dst = cond(a) ? b : c` at width w (W32: zero-extended; W16: upper bits unspecified).
    SelCc "selcc" (v n n) (f v v n) NONE;
    /// `dst = image of flags a` (see the module docs for the layout), zero-extended.
    FlagsImg "flagsimg" (v n n) (f n n n) NONE;
    /// `fl = flags whose image is a & 0x8d5`.
    ImgFlags "imgflags" (n n f) (v n n n) NONE;
    /// `fl.CF = bit (b mod w) of a`; the other flags from `c` (or 0).
    Bt "bt" (n n f) (v v g n) NONE;

    // ---- guest memory (virtual addresses) ----
    // Address = a + (b << (aux & 3)) + sign-extended imm, modulo 2^64.
    /// `dst = w bits at the address`, zero-extended to 64 bits; with `aux & LD_SX64` sign-extended
    /// to 64 bits; with `aux & LD_SX32` sign-extended to 32 bits and zero-extended from there.
    Ld "ld" (v n n) (v o n n) FAULT;
    /// Store the low `w` bits of `c` at the address.
    St "st" (n n n) (v o v n) FAULT | SIDE;
    /// `dst = host pointer` through which [`super::access_bytes`]`(aux >> 2)` bytes at the address can be
    /// accessed; `cond` holds [`super::PTR_READ`] | [`super::PTR_WRITE`] and more. Memory that
    /// cannot be
    /// accessed directly (MMIO, a page crossing, a page with code) is bounced: the pointer then
    /// aims at a buffer, and `PtrEnd` writes it back. Only `LdP`, `StP`, atomics and `Native` may
    /// use the pointer, and at most one pointer is alive at a time.
    Ptr "ptr" (v n n) (v o n n) FAULT | SIDE;
    /// Ends the use of host pointer `a` that was made for writing. Required exactly when
    /// `PTR_WRITE` was given.
    PtrEnd "ptrend" (n n n) (v n n n) FAULT | SIDE;
    /// `dst = zero-extend w bits at host pointer a + imm`.
    LdP "ldp" (v n n) (v n n n) SIDE;
    /// Store the low `w` bits of `b` at host pointer `a + imm`.
    StP "stp" (n n n) (v v n n) SIDE;
    /// Atomic read-modify-write at host pointer `a` with operand `b`; `dst` = old value,
    /// zero-extended. The operation is the [`super::Rmw`] in `aux`. Sequentially consistent.
    AtomicRmw "rmw" (o n n) (v v n n) SIDE;
    /// Atomic compare-and-swap at host pointer `a`: if the old value equals `b`, store `c`.
    /// `dst` = old value, zero-extended; `fl` = flags of comparing `b` with the old value
    /// (`b - old`, as CMPXCHG does).
    AtomicCas "cas" (o n g) (v v v n) SIDE;
    /// Full memory barrier.
    Fence "fence" (n n n) (n n n n) SIDE;

    // ---- calls and pass-through ----
    /// Call helper `imm`; `dst` = its return value. What it may do is in its
    /// [`crate::target::HelperDesc`]. Arguments a, b, c, d are full 64-bit containers.
    Call "call" (o n n) (o o o o) FAULT | SIDE;
    /// Execute pass-through instruction number `imm` of the block's `natives` table. `a` = memory
    /// operand as a host pointer, `b` and `c` = general-register inputs (as its `Native` says),
    /// `dst` = general-register result, `fl` = flags result.
    Native "native" (o o g) (o o o o) FAULT | SIDE;
    /// `Ptr`, `Native` and, for a store, `PtrEnd` in one: executes a pass-through instruction on
    /// [`super::access_bytes`]`(aux >> 2)` bytes of guest memory at a + (b << (aux & 3)) + displacement; `cond` holds
    /// [`super::PTR_READ`] or [`super::PTR_WRITE`], and [`super::PTR_ALIGNED`]. The upper half of
    /// `imm` is the number in the block's `natives` table, the lower the displacement. The instruction
    /// has no general-register input.
    NativeMem "nativemem" (o n g) (v o n n) FAULT | SIDE;
    /// `dst = MXCSR` of the guest (see [`crate::target::EnvLayout::mxcsr`]), zero-extended.
    GetMxcsr "getmxcsr" (v n n) (n n n n) SIDE;
    /// `MXCSR = low 32 bits of a`. Reserved bits must be clear: the front end has checked.
    SetMxcsr "setmxcsr" (n n n) (v n n n) SIDE;

    // ---- control ----
    /// If `cond(a)`: leave through exit `imm` of the block's `exits` table.
    BrCc "brcc" (n n n) (f n n n) SIDE_EXIT | SIDE;
    /// Leave through exit `imm`. The only terminator; indirect targets are in the exit.
    Exit "exit" (n n n) (o n n n) TERM | SIDE;
}

/// By operation: how many of the input slots a, b, c, d it may use, which are the first ones.
static INPUTS: [u8; Op::ALL.len()] = {
    let mut n = [0; Op::ALL.len()];
    let mut i = 0;
    while i < n.len() {
        let mut k = 0;
        while k < 4 {
            if !matches!(OPS[i].ins[k], Slot::None) {
                n[i] = k as u8 + 1;
            }
            k += 1;
        }
        i += 1;
    }
    n
};

impl Op {
    /// How many input slots an instruction with this operation has, at most 4: the first ones.
    #[inline]
    pub fn inputs(self) -> usize {
        usize::from(INPUTS[self as usize]).min(4)
    }
    /// The row of this operation.
    #[inline]
    pub fn info(self) -> &'static OpInfo {
        &OPS[self as usize]
    }
    /// Looks an operation up by its text name.
    pub fn from_name(name: &str) -> Option<Op> {
        Op::ALL.iter().copied().find(|o| o.info().name == name)
    }
    /// Whether the operation has the given [`effect`] bit.
    #[inline]
    pub fn has(self, bits: u8) -> bool {
        self.info().effects & bits != 0
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info().name)
    }
}
