//! Blocks: values, instructions, pass-through instructions, exits, and the builder.

use super::op::{Cond, Op, Width};

/// An SSA value of a block: a dense index, or [`Val::NONE`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Val(pub u16);

impl Val {
    /// No value.
    pub const NONE: Val = Val(u16::MAX);
    /// Whether this names a value.
    #[inline]
    pub const fn is_some(self) -> bool {
        self.0 != u16::MAX
    }
    /// The dense index.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Index of a global in the target's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Global(pub u8);

/// Index of a helper in the target's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Helper(pub u16);

/// `aux` bit of [`Op::Ld`]: sign-extend to 64 bits.
pub const LD_SX64: u8 = 0x40;
/// `aux` bit of [`Op::Ld`]: sign-extend to 32 bits, zero above.
pub const LD_SX32: u8 = 0x80;
/// Access bit of [`Op::Ptr`]: the memory is read.
pub const PTR_READ: u8 = 1;
/// Access bit of [`Op::Ptr`]: the memory is written.
pub const PTR_WRITE: u8 = 2;
/// Access bit of [`Op::NativeMem`] (in [`crate::target::AccessInfo`] too): the address must be a
/// multiple of the size. The runtime's slow path raises the fault; a misaligned address never hits
/// the TLB.
pub const PTR_ALIGNED: u8 = 4;
/// Access bit of [`Op::Ptr`] (in [`crate::target::AccessInfo`] too): the memory is read and written
/// in one atomic step. The runtime's slow path must give a pointer to the memory itself, or see to
/// it that nobody else accesses the memory before [`Op::PtrEnd`].
pub const PTR_LOCKED: u8 = 8;
/// Access bit of [`Op::Ptr`] (in [`crate::target::AccessInfo`] too): the instruction accesses some of
/// the bytes only. If all can be accessed, the TLB answers; else the runtime's slow path finds out
/// which are meant from what the front end has left in `Env`.
pub const PTR_MASKED: u8 = 16;
/// Trap code raised by the division operations.
pub const TRAP_DIVIDE: u32 = 0;

/// Operation of an [`Op::AtomicRmw`] (in `aux`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Rmw {
    Xchg,
    Add,
    And,
    Or,
    Xor,
    Sub,
}

impl Rmw {
    /// The operation with the given encoding.
    pub const fn from_code(code: u8) -> Option<Rmw> {
        Some(match code {
            0 => Rmw::Xchg,
            1 => Rmw::Add,
            2 => Rmw::And,
            3 => Rmw::Or,
            4 => Rmw::Xor,
            5 => Rmw::Sub,
            _ => return None,
        })
    }
}

/// One IR instruction. Which fields mean what is in the [`Op`] table.
#[derive(Clone, Copy, Debug)]
pub struct Inst {
    /// Operation.
    pub op: Op,
    /// Operand width.
    pub w: Width,
    /// Small immediate: shift scale, bit position, sub-operation.
    pub aux: u8,
    /// Condition code, or access bits of `Ptr`.
    pub cond: u8,
    /// First result.
    pub dst: Val,
    /// Second result.
    pub dst2: Val,
    /// Flags result.
    pub fl: Val,
    /// Inputs.
    pub ins: [Val; 4],
    /// Immediate: constant, displacement, global, helper, exit or native index.
    pub imm: u64,
}

impl Inst {
    /// The input slots that the operation has; optional ones may be empty.
    #[inline]
    pub fn inputs(&self) -> &[Val] {
        &self.ins[..self.op.inputs()]
    }
    /// Displacement of the address, for the operations that have one.
    pub const fn disp(&self) -> i64 {
        if let Op::NativeMem = self.op { self.imm as i32 as i64 } else { self.imm as i64 }
    }
    /// Replaces the displacement; it must fit 32 bits, signed.
    pub fn set_disp(&mut self, disp: i32) {
        if self.op == Op::NativeMem {
            self.imm = self.imm & !0xffff_ffff | u64::from(disp as u32);
        } else {
            self.imm = i64::from(disp) as u64;
        }
    }
    /// Index of the pass-through instruction, for [`Op::Native`] and [`Op::NativeMem`].
    pub const fn native_index(&self) -> usize {
        if let Op::NativeMem = self.op { (self.imm >> 32) as usize } else { self.imm as usize }
    }
    /// An instruction without operands.
    #[inline]
    pub const fn new(op: Op, w: Width) -> Inst {
        Inst {
            op,
            w,
            aux: 0,
            cond: 0,
            dst: Val::NONE,
            dst2: Val::NONE,
            fl: Val::NONE,
            ins: [Val::NONE; 4],
            imm: 0,
        }
    }
}

/// How a pass-through instruction is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Encoding {
    /// Legacy: optional 66/F2/F3 prefix, REX, opcode map escape.
    Legacy,
    /// VEX, two or three bytes, whichever fits.
    Vex,
    /// EVEX; `aaa` mask register, `z` zeroing, `b` broadcast/rounding bit.
    Evex {
        /// Opmask register 0–7.
        aaa: u8,
        /// Zeroing-masking.
        z: bool,
        /// Broadcast, rounding or SAE bit.
        b: bool,
    },
}

/// What a register field of a pass-through instruction names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum NativeReg {
    /// The field is an opcode extension or fixed number, emitted as is.
    Fixed(u8),
    /// A vector register (XMM/YMM/ZMM 0–31, or MM 0–7 with `mmx`), mapped one to one.
    Vec(u8),
    /// An opmask register k0–k7, mapped one to one.
    Mask(u8),
    /// A general register that the instruction only reads: the value in input `b`.
    GprB,
    /// A general register that the instruction only reads: the value in input `c`.
    GprC,
    /// A general register that the instruction writes: result `dst`. If `Native::dst_in` is set the
    /// register holds input `d` before.
    GprDst,
    /// A second general register that the instruction writes: result `dst2`.
    GprDst2,
    /// Memory at host pointer `a` (only in `rm`).
    Mem,
}

/// A guest instruction that the host executes itself, described by its encoding fields so that
/// registers and the memory operand can be replaced (SDM vol. 2 chapter 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Native {
    /// Encoding form.
    pub enc: Encoding,
    /// Mandatory prefix: 0, 0x66, 0xf2 or 0xf3.
    pub prefix: u8,
    /// Opcode map: 0 = one-byte, 1 = 0F, 2 = 0F38, 3 = 0F3A (EVEX also 5, 6).
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// REX.W / VEX.W / EVEX.W.
    pub w: bool,
    /// Vector length: 0 = 128 (or scalar), 1 = 256, 2 = 512.
    pub l: u8,
    /// ModRM.reg field.
    pub reg: NativeReg,
    /// ModRM.rm field.
    pub rm: NativeReg,
    /// VEX/EVEX.vvvv field (`Fixed(0)` when unused: emitted as 1111b).
    pub vvvv: NativeReg,
    /// Trailing immediate byte, if any (also the is4 register byte).
    pub imm8: Option<u8>,
    /// `GprDst` is also an input: before the instruction it holds input `d`.
    pub dst_in: bool,
    /// The instruction writes the arithmetic flags (they are its `fl` result, or lost).
    pub sets_flags: bool,
    /// The instruction touches vector, opmask or MXCSR state.
    pub vector: bool,
    /// A floating-point instruction that may raise a SIMD exception (host SIGFPE) when unmasked.
    pub fp: bool,
    /// The instruction works on the x87 unit, which holds the guest's state while it executes (see
    /// [`crate::target::EnvLayout::x87_live`]). All exceptions are masked.
    pub x87: bool,
}

/// Size code of an 80-bit memory operand.
pub const SIZE_80: u8 = 7;

/// Bytes of a pointer access by its size code: `1 << code` for 0 to 6, ten for [`SIZE_80`].
pub const fn access_bytes(code: u8) -> u32 {
    match code {
        0..=6 => 1 << code,
        _ => 10,
    }
}

/// Where an exit goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitKind {
    /// To the block at guest pc `pc`, in the same CPU mode. Chainable: patched to a direct jump.
    Goto {
        /// Value of the pc global.
        pc: u64,
        /// The target is on the same guest page as this block's first byte, so that a chained jump
        /// may skip the target's page check.
        same_page: bool,
    },
    /// To the block at the pc in input `a` of the [`Op::Exit`] (low 64 bits, already wrapped to the
    /// mode's width), in the same CPU mode: looked up in the jump cache.
    Indirect,
    /// Back to the execution loop with `code`; the pc global becomes `pc` if given, else it has
    /// been `Put` or written by a helper.
    Leave {
        /// Reason, handed to the caller of the block.
        code: u32,
        /// Value of the pc global.
        pc: Option<u64>,
    },
}

/// A hint on an exit, for return-address prediction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ExitHint {
    /// An ordinary jump. An indirect one may change the mode.
    #[default]
    Jump,
    /// A call, in the same mode, that will return to this guest pc.
    Call {
        /// Return address.
        ret: u64,
    },
    /// A return, in the same mode.
    Ret,
    /// A jump that seldom leads to the same place twice, like a return from an interrupt.
    Far,
}

/// One exit of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exit {
    /// Destination.
    pub kind: ExitKind,
    /// Prediction hint.
    pub hint: ExitHint,
    /// Globals (bit n: number n, below 64) whose content nobody looks at after this exit: deferred
    /// writes of them may be dropped, and they then hold anything.
    pub dead: u64,
}

impl Exit {
    /// An exit after which every global counts.
    pub const fn new(kind: ExitKind, hint: ExitHint) -> Exit {
        Exit { kind, hint, dead: 0 }
    }
}

/// A guest code page that a block's bytes lie on, for the page check at its checked entry: the
/// 32-bit word `slot` of the vCPU's code map must equal `id`. (A slot just beyond the map checks a
/// word of `Env` that the translator has placed there.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodePage {
    /// Word index in the code map.
    pub slot: u32,
    /// Expected content.
    pub id: u32,
}

/// A straight line of IR with its side tables. Reused between translations: [`Block::clear`] keeps
/// the allocations.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// Guest pc of the first instruction (value of the pc global there).
    pub pc: u64,
    /// MMU table that `Ld`, `St` and `Ptr` use.
    pub mmu_idx: u8,
    /// Instructions.
    pub insts: Vec<Inst>,
    /// Pass-through instructions.
    pub natives: Vec<Native>,
    /// Exits.
    pub exits: Vec<Exit>,
    /// Pages to check at the checked entry (one, or two for a block that crosses a page).
    pub pages: Vec<CodePage>,
    /// Number of values defined.
    pub nvals: u16,
}

/// Most values a block may define; a front end ends the block well before this.
pub const MAX_VALS: u16 = 4000;

impl Block {
    /// Empties the block for reuse.
    pub fn clear(&mut self, pc: u64, mmu_idx: u8) {
        self.pc = pc;
        self.mmu_idx = mmu_idx;
        self.insts.clear();
        self.natives.clear();
        self.exits.clear();
        self.pages.clear();
        self.nvals = 0;
    }

    #[inline]
    fn val(&mut self) -> Val {
        let v = Val(self.nvals);
        self.nvals += 1;
        v
    }

    /// Appends `inst` as it is.
    #[inline]
    pub fn push(&mut self, inst: Inst) {
        self.insts.push(inst);
    }

    /// A fresh value for use in a hand-made [`Inst`].
    pub fn new_val(&mut self) -> Val {
        self.val()
    }

    /// `const`.
    pub fn iconst(&mut self, imm: u64) -> Val {
        let dst = self.val();
        self.push(Inst { dst, imm, ..Inst::new(Op::Const, Width::W64) });
        dst
    }
    /// `insn`: start of a guest instruction at `pc`, `len` bytes long.
    pub fn insn_start(&mut self, pc: u64, len: u8) {
        self.push(Inst { aux: len, imm: pc, ..Inst::new(Op::InsnStart, Width::W64) });
    }
    /// `get`.
    pub fn get(&mut self, g: Global) -> Val {
        let dst = self.val();
        self.push(Inst { dst, imm: g.0.into(), ..Inst::new(Op::Get, Width::W64) });
        dst
    }
    /// `put`.
    pub fn put(&mut self, g: Global, v: Val) {
        self.push(Inst {
            ins: [v, Val::NONE, Val::NONE, Val::NONE],
            imm: g.0.into(),
            ..Inst::new(Op::Put, Width::W64)
        });
    }
    /// `ldenv`.
    pub fn ldenv(&mut self, w: Width, off: u32) -> Val {
        let dst = self.val();
        self.push(Inst { dst, imm: off.into(), ..Inst::new(Op::LdEnv, w) });
        dst
    }
    /// `stenv`.
    pub fn stenv(&mut self, w: Width, off: u32, v: Val) {
        self.push(Inst {
            ins: [v, Val::NONE, Val::NONE, Val::NONE],
            imm: off.into(),
            ..Inst::new(Op::StEnv, w)
        });
    }
    /// A one-input operation with one result and no flags.
    pub fn un(&mut self, op: Op, w: Width, a: Val) -> Val {
        let dst = self.val();
        self.push(Inst { dst, ins: [a, Val::NONE, Val::NONE, Val::NONE], ..Inst::new(op, w) });
        dst
    }
    /// A two-input operation with one result and no flags.
    pub fn bin(&mut self, op: Op, w: Width, a: Val, b: Val) -> Val {
        let dst = self.val();
        self.push(Inst { dst, ins: [a, b, Val::NONE, Val::NONE], ..Inst::new(op, w) });
        dst
    }
    /// An operation with one result and a flags result: `(dst, fl)`.
    pub fn alu(&mut self, op: Op, w: Width, ins: [Val; 4]) -> (Val, Val) {
        let dst = self.val();
        let fl = self.val();
        self.push(Inst { dst, fl, ins, ..Inst::new(op, w) });
        (dst, fl)
    }
    /// An operation of which only the flags are wanted.
    pub fn flags_of(&mut self, op: Op, w: Width, ins: [Val; 4]) -> Val {
        let fl = self.val();
        self.push(Inst { fl, ins, ..Inst::new(op, w) });
        fl
    }
    /// `deposit` of the low `w` bits of `b` into `a` at bit `pos`.
    pub fn deposit(&mut self, w: Width, a: Val, b: Val, pos: u8) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            aux: pos,
            ins: [a, b, Val::NONE, Val::NONE],
            ..Inst::new(Op::Deposit, w)
        });
        dst
    }
    /// `extract` of `w` bits of `a` at bit `pos`.
    pub fn extract(&mut self, w: Width, a: Val, pos: u8) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            aux: pos,
            ins: [a, Val::NONE, Val::NONE, Val::NONE],
            ..Inst::new(Op::Extract, w)
        });
        dst
    }
    /// `lea`.
    pub fn lea(&mut self, w: Width, addr: Addr) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            aux: addr.scale,
            ins: [addr.base, addr.index, Val::NONE, Val::NONE],
            imm: addr.disp as i64 as u64,
            ..Inst::new(Op::Lea, w)
        });
        dst
    }
    /// `ld`; `ext` is 0, [`LD_SX64`] or [`LD_SX32`].
    pub fn ld(&mut self, w: Width, addr: Addr, ext: u8) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            aux: addr.scale | ext,
            ins: [addr.base, addr.index, Val::NONE, Val::NONE],
            imm: addr.disp as i64 as u64,
            ..Inst::new(Op::Ld, w)
        });
        dst
    }
    /// `st`.
    pub fn st(&mut self, w: Width, addr: Addr, v: Val) {
        self.push(Inst {
            aux: addr.scale,
            ins: [addr.base, addr.index, v, Val::NONE],
            imm: addr.disp as i64 as u64,
            ..Inst::new(Op::St, w)
        });
    }
    /// `envptr`.
    pub fn env_ptr(&mut self, off: u32) -> Val {
        let dst = self.val();
        self.push(Inst { dst, imm: off.into(), ..Inst::new(Op::EnvPtr, Width::W64) });
        dst
    }
    /// `ptr` to [`access_bytes`]`(size)` bytes; `access` is [`PTR_READ`] | [`PTR_WRITE`], with
    /// [`PTR_LOCKED`] or [`PTR_MASKED`] (and then [`PTR_ALIGNED`]) if wanted.
    pub fn ptr(&mut self, size: u8, addr: Addr, access: u8) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            aux: addr.scale | size << 2,
            cond: access,
            ins: [addr.base, addr.index, Val::NONE, Val::NONE],
            imm: addr.disp as i64 as u64,
            ..Inst::new(Op::Ptr, Width::W64)
        });
        dst
    }
    /// `ptrend`.
    pub fn ptr_end(&mut self, p: Val) {
        self.push(Inst {
            ins: [p, Val::NONE, Val::NONE, Val::NONE],
            ..Inst::new(Op::PtrEnd, Width::W64)
        });
    }
    /// `setcc`.
    pub fn setcc(&mut self, cond: Cond, fl: Val) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            cond: cond as u8,
            ins: [fl, Val::NONE, Val::NONE, Val::NONE],
            ..Inst::new(Op::SetCc, Width::W64)
        });
        dst
    }
    /// `selcc`.
    pub fn selcc(&mut self, w: Width, cond: Cond, fl: Val, t: Val, e: Val) -> Val {
        let dst = self.val();
        self.push(Inst {
            dst,
            cond: cond as u8,
            ins: [fl, t, e, Val::NONE],
            ..Inst::new(Op::SelCc, w)
        });
        dst
    }
    /// `call` with a result.
    pub fn call(&mut self, h: Helper, args: &[Val]) -> Val {
        let dst = self.val();
        self.call_inst(h, args, dst);
        dst
    }
    /// `call` without a result.
    pub fn call_void(&mut self, h: Helper, args: &[Val]) {
        self.call_inst(h, args, Val::NONE);
    }
    fn call_inst(&mut self, h: Helper, args: &[Val], dst: Val) {
        let mut ins = [Val::NONE; 4];
        ins[..args.len()].copy_from_slice(args);
        self.push(Inst { dst, ins, imm: h.0.into(), ..Inst::new(Op::Call, Width::W64) });
    }
    /// Appends `native` to the side table and an [`Op::Native`] with these operands.
    pub fn native(&mut self, native: Native, dst: Val, dst2: Val, fl: Val, ins: [Val; 4]) {
        let imm = self.natives.len() as u64;
        self.natives.push(native);
        self.push(Inst { dst, dst2, fl, ins, imm, ..Inst::new(Op::Native, Width::W64) });
    }
    /// Appends `native` to the side table and an [`Op::NativeMem`] of it with [`access_bytes`]`(size)` bytes
    /// at `addr`; `access` is [`PTR_READ`], [`PTR_WRITE`], with [`PTR_ALIGNED`] if wanted.
    pub fn native_mem(
        &mut self,
        native: Native,
        size: u8,
        addr: Addr,
        access: u8,
        dst: Val,
        fl: Val,
    ) {
        let index = self.natives.len() as u64;
        self.natives.push(native);
        self.push(Inst {
            dst,
            fl,
            aux: addr.scale | size << 2,
            cond: access,
            ins: [addr.base, addr.index, Val::NONE, Val::NONE],
            imm: index << 32 | u64::from(addr.disp as u32),
            ..Inst::new(Op::NativeMem, Width::W64)
        });
    }
    /// `brcc` to a new exit.
    pub fn brcc(&mut self, cond: Cond, fl: Val, exit: Exit) {
        let imm = self.exits.len() as u64;
        self.exits.push(exit);
        self.push(Inst {
            cond: cond as u8,
            ins: [fl, Val::NONE, Val::NONE, Val::NONE],
            imm,
            ..Inst::new(Op::BrCc, Width::W64)
        });
    }
    /// The terminator. `target` is the pc value of an [`ExitKind::Indirect`], else `Val::NONE`.
    pub fn exit(&mut self, exit: Exit, target: Val) {
        let imm = self.exits.len() as u64;
        self.exits.push(exit);
        self.push(Inst {
            ins: [target, Val::NONE, Val::NONE, Val::NONE],
            imm,
            ..Inst::new(Op::Exit, Width::W64)
        });
    }
}

/// A guest virtual address expression: `base + (index << scale) + disp`.
#[derive(Clone, Copy, Debug)]
pub struct Addr {
    /// Base value.
    pub base: Val,
    /// Index value, or none.
    pub index: Val,
    /// Shift of the index, 0–3.
    pub scale: u8,
    /// Displacement.
    pub disp: i32,
}

impl Addr {
    /// Just a base.
    pub const fn base(base: Val) -> Addr {
        Addr { base, index: Val::NONE, scale: 0, disp: 0 }
    }
    /// Base plus displacement.
    pub const fn disp(base: Val, disp: i32) -> Addr {
        Addr { base, index: Val::NONE, scale: 0, disp }
    }
}
