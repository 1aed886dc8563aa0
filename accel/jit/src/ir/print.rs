//! The text form of blocks: what `-d op` shows and what IR tests are written in.
//!
//! One instruction a line, results on the left. Values are `v7`, flags values `f8` (one numbering
//! for both), an absent operand is `_`. Without a suffix an operation is 64 bits wide.
//!
//! ```text
//! block 0x401000 mmu 1                  ; guest pc, MMU table
//! page 12 = 0x77                        ; code map word 12 must hold 0x77
//! insn 0x401000 3                       ; guest pc and length
//! v0 = get %rax                         ; `%n` by number if the target is not at hand
//! v1 = const 0x10
//! v2, f3 = add.w32 v0, v1               ; first result, flags result
//! v4, v5 = mulu2 v0, v1                 ; both halves (`_, v5` for the high one alone)
//! v6 = deposit.w8 v0, v1 @8             ; bit position
//! v7 = ld.w16.sx32 [v0 + v1<<2 - 0x8]
//! st.w64 [v0], v2
//! v8 = ptr.rw [v0] size 16
//! v9 = rmw.add.w32 v8, v1
//! v10 = selcc.ne.w32 f3, v0, v1
//! v11 = call @name v0, v1               ; `@n` by number
//! native vex.66.0f38.00.w1.l1 reg=v3 rm=mem vvvv=v4 imm=0x12 +vector v8
//! nativemem.ra legacy.66.0f.fe.w0.l0 reg=v1 rm=mem +vector [v0 + 0x10] size 16   ; `a`: aligned
//! brcc.b f3, goto 0x401010 near         ; `near`: same page
//! exit goto 0x401003 call 0x401008      ; or: indirect v2 ret | leave 0x5 pc 0x401003
//! ```
//!
//! Exits are written where they are used; `#n` before one gives its index in the table when the
//! order of use is not the order of the table. [`super::parse`] reads all this back.

use super::block::{
    Block, Encoding, Exit, ExitHint, ExitKind, Inst, LD_SX32, LD_SX64, Native, NativeReg,
    PTR_ALIGNED, PTR_LOCKED, PTR_MASKED, PTR_READ, PTR_WRITE, Rmw, Val,
};
use super::op::{Cond, Op, Slot, Width};
use crate::target::Target;
use std::fmt;

/// A block (or one of its instructions) as text; made by [`Block::listing`].
#[derive(Clone, Copy, Debug)]
pub struct Listing<'a> {
    block: &'a Block,
    target: Option<&'a Target>,
}

impl Block {
    /// The block as text. With the target at hand, globals and helpers appear by name.
    pub fn listing<'a>(&'a self, target: Option<&'a Target>) -> Listing<'a> {
        Listing { block: self, target }
    }
}

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "block {:#x} mmu {}", self.block.pc, self.block.mmu_idx)?;
        for p in &self.block.pages {
            writeln!(f, "page {} = {:#x}", p.slot, p.id)?;
        }
        let mut next_exit = 0;
        for inst in &self.block.insts {
            self.inst(f, inst, &mut next_exit)?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Name of a condition in the text form.
pub(super) fn cond_name(cond: u8) -> &'static str {
    const NAMES: [&str; 16] =
        ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"];
    NAMES[Cond::from_code(cond) as usize]
}

/// Name of an atomic operation in the text form.
pub(super) fn rmw_name(aux: u8) -> Option<&'static str> {
    Some(match Rmw::from_code(aux)? {
        Rmw::Xchg => "xchg",
        Rmw::Add => "add",
        Rmw::And => "and",
        Rmw::Or => "or",
        Rmw::Xor => "xor",
        Rmw::Sub => "sub",
    })
}

/// Whether the operation's text form has an address in brackets, and how many inputs that takes.
pub(super) fn address_inputs(op: Op) -> usize {
    match op {
        Op::Lea | Op::Ld | Op::St | Op::Ptr | Op::NativeMem => 2,
        Op::LdP | Op::StP => 1,
        _ => 0,
    }
}

struct Operand(Slot, Val);

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1.is_some()) {
            (_, false) => f.write_str("_"),
            (Slot::Flags | Slot::OptFlags, true) => write!(f, "f{}", self.1.0),
            _ => write!(f, "v{}", self.1.0),
        }
    }
}

impl Listing<'_> {
    fn inst(&self, f: &mut fmt::Formatter<'_>, inst: &Inst, next_exit: &mut u64) -> fmt::Result {
        results(f, inst)?;
        f.write_str(inst.op.info().name)?;
        self.suffixes(f, inst)?;
        match inst.op {
            Op::InsnStart => return write!(f, " {:#x} {}", inst.imm, inst.aux),
            Op::Const => return write!(f, " {:#x}", inst.imm),
            Op::Get => return write!(f, " {}", self.global(inst.imm)),
            Op::Put => write!(f, " {},", self.global(inst.imm))?,
            Op::LdEnv | Op::EnvPtr => return write!(f, " [{:#x}]", inst.imm),
            Op::StEnv => write!(f, " [{:#x}],", inst.imm)?,
            Op::Call => write!(f, " {}", self.helper(inst.imm))?,
            Op::Native | Op::NativeMem => match self.block.natives.get(inst.native_index()) {
                Some(n) => write!(f, " {}", NativeText(n))?,
                None => write!(f, " ?{}", inst.native_index())?,
            },
            _ => {}
        }
        self.inputs(f, inst)?;
        match inst.op {
            Op::Deposit | Op::Extract => write!(f, " @{}", inst.aux),
            Op::Ptr | Op::NativeMem => write!(f, " size {}", super::access_bytes(inst.aux >> 2)),
            Op::BrCc | Op::Exit => self.exit(f, inst, next_exit),
            _ => Ok(()),
        }
    }

    fn suffixes(&self, f: &mut fmt::Formatter<'_>, inst: &Inst) -> fmt::Result {
        match inst.op {
            Op::SetCc | Op::SelCc | Op::BrCc => write!(f, ".{}", cond_name(inst.cond))?,
            Op::AtomicRmw => write!(f, ".{}", rmw_name(inst.aux).unwrap_or("?"))?,
            Op::Ptr | Op::NativeMem => {
                f.write_str(".")?;
                if inst.cond & PTR_READ != 0 {
                    f.write_str("r")?;
                }
                if inst.cond & PTR_WRITE != 0 {
                    f.write_str("w")?;
                }
                if inst.cond & PTR_ALIGNED != 0 {
                    f.write_str("a")?;
                }
                if inst.cond & PTR_LOCKED != 0 {
                    f.write_str("l")?;
                }
                if inst.cond & PTR_MASKED != 0 {
                    f.write_str("m")?;
                }
            }
            _ => {}
        }
        match inst.w {
            Width::W64 => {}
            w => write!(f, ".w{}", w.bits())?,
        }
        match inst.op {
            Op::Ld if inst.aux & LD_SX64 != 0 => f.write_str(".sx64"),
            Op::Ld if inst.aux & LD_SX32 != 0 => f.write_str(".sx32"),
            _ => Ok(()),
        }
    }

    fn inputs(&self, f: &mut fmt::Formatter<'_>, inst: &Inst) -> fmt::Result {
        let taken = address_inputs(inst.op);
        if taken != 0 {
            f.write_str(" ")?;
            address(f, inst, taken)?;
        }
        if inst.op == Op::Exit {
            // The target is part of the exit.
            return Ok(());
        }
        let info = inst.op.info();
        let last = inst.ins.iter().rposition(|v| v.is_some()).map_or(0, |i| i + 1);
        for i in taken..last {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma} {}", Operand(info.ins[i], inst.ins[i]))?;
        }
        Ok(())
    }

    fn global(&self, index: u64) -> String {
        match self.target.and_then(|t| t.globals.get(index as usize)) {
            Some(g) => format!("%{}", g.name),
            None => format!("%{index}"),
        }
    }

    fn helper(&self, index: u64) -> String {
        match self.target.and_then(|t| t.helpers.get(index as usize)) {
            Some(h) => format!("@{}", h.name),
            None => format!("@{index}"),
        }
    }

    fn exit(&self, f: &mut fmt::Formatter<'_>, inst: &Inst, next: &mut u64) -> fmt::Result {
        if inst.op == Op::BrCc {
            f.write_str(",")?;
        }
        if inst.imm != *next {
            write!(f, " #{}", inst.imm)?;
        }
        *next = inst.imm.wrapping_add(1);
        match self.block.exits.get(inst.imm as usize) {
            Some(exit) => write!(f, " {}", ExitText(exit, inst.ins[0])),
            None => f.write_str(" ?"),
        }
    }
}

fn results(f: &mut fmt::Formatter<'_>, inst: &Inst) -> fmt::Result {
    let mut any = false;
    let mut item = |f: &mut fmt::Formatter<'_>, o: Operand| {
        let comma = if any { ", " } else { "" };
        any = true;
        write!(f, "{comma}{o}")
    };
    if inst.dst.is_some() {
        item(f, Operand(Slot::Val, inst.dst))?;
    } else if inst.dst2.is_some() {
        item(f, Operand(Slot::None, Val::NONE))?;
    }
    if inst.dst2.is_some() {
        item(f, Operand(Slot::Val, inst.dst2))?;
    }
    if inst.fl.is_some() {
        item(f, Operand(Slot::Flags, inst.fl))?;
    }
    if any { f.write_str(" = ") } else { Ok(()) }
}

fn address(f: &mut fmt::Formatter<'_>, inst: &Inst, inputs: usize) -> fmt::Result {
    write!(f, "[{}", Operand(Slot::Val, inst.ins[0]))?;
    if inputs == 2 && inst.ins[1].is_some() {
        write!(f, " + {}", Operand(Slot::Val, inst.ins[1]))?;
        if inst.aux & 3 != 0 {
            write!(f, "<<{}", inst.aux & 3)?;
        }
    }
    let disp = inst.disp();
    match disp {
        0 => {}
        d if d < 0 => write!(f, " - {:#x}", d.unsigned_abs())?,
        d => write!(f, " + {d:#x}")?,
    }
    f.write_str("]")
}

struct ExitText<'a>(&'a Exit, Val);

impl fmt::Display for ExitText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind {
            ExitKind::Goto { pc, same_page } => {
                write!(f, "goto {pc:#x}{}", if same_page { " near" } else { "" })?;
            }
            ExitKind::Indirect => write!(f, "indirect {}", Operand(Slot::Val, self.1))?,
            ExitKind::Leave { code, pc } => {
                write!(f, "leave {code:#x}")?;
                if let Some(pc) = pc {
                    write!(f, " pc {pc:#x}")?;
                }
            }
        }
        match self.0.hint {
            ExitHint::Jump => {}
            ExitHint::Call { ret } => write!(f, " call {ret:#x}")?,
            ExitHint::Ret => f.write_str(" ret")?,
            ExitHint::Far => f.write_str(" far")?,
        }
        match self.0.dead {
            0 => Ok(()),
            dead => write!(f, " dead {dead:#x}"),
        }
    }
}

struct NativeText<'a>(&'a Native);

impl fmt::Display for NativeText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0;
        let enc = match n.enc {
            Encoding::Legacy => "legacy",
            Encoding::Vex => "vex",
            Encoding::Evex { .. } => "evex",
        };
        let map = ["00", "0f", "0f38", "0f3a", "4", "5", "6", "7"][usize::from(n.map & 7)];
        write!(f, "{enc}.{:02x}.{map}.{:02x}.w{}.l{}", n.prefix, n.opcode, u8::from(n.w), n.l)?;
        if let Encoding::Evex { aaa, z, b } = n.enc {
            write!(f, ".k{aaa}{}{}", if z { ".z" } else { "" }, if b { ".b" } else { "" })?;
        }
        write!(f, " reg={} rm={}", RegText(n.reg), RegText(n.rm))?;
        if n.vvvv != NativeReg::Fixed(0) {
            write!(f, " vvvv={}", RegText(n.vvvv))?;
        }
        if let Some(imm) = n.imm8 {
            write!(f, " imm={imm:#x}")?;
        }
        for (on, name) in [
            (n.dst_in, "dst_in"),
            (n.sets_flags, "flags"),
            (n.vector, "vector"),
            (n.fp, "fp"),
            (n.x87, "x87"),
        ] {
            if on {
                write!(f, " +{name}")?;
            }
        }
        Ok(())
    }
}

struct RegText(NativeReg);

impl fmt::Display for RegText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            NativeReg::Fixed(n) => write!(f, "{n}"),
            NativeReg::Vec(n) => write!(f, "v{n}"),
            NativeReg::Mask(n) => write!(f, "k{n}"),
            NativeReg::GprB => f.write_str("b"),
            NativeReg::GprC => f.write_str("c"),
            NativeReg::GprDst => f.write_str("dst"),
            NativeReg::GprDst2 => f.write_str("dst2"),
            NativeReg::Mem => f.write_str("mem"),
        }
    }
}
