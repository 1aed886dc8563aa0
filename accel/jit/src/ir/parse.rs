//! Reads blocks in the text form that [`super::print`] documents.
//!
//! The parser checks syntax only; whether the block is well formed is the verifier's question
//! ([`super::Verifier`]). Reading what [`Block::listing`] printed gives the same block, except that
//! exits nobody uses come back as `leave 0`.

use super::block::{
    Block, CodePage, Encoding, Exit, ExitHint, ExitKind, Inst, LD_SX32, LD_SX64, MAX_VALS, Native,
    NativeReg, PTR_ALIGNED, PTR_LOCKED, PTR_MASKED, PTR_READ, PTR_WRITE, Val,
};
use super::op::{Op, Slot, Width};
use super::print::{address_inputs, cond_name, rmw_name};
use crate::target::Target;

/// Why a text is not a block.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ParseError {
    /// Line, counted from 1.
    pub line: usize,
    /// What was wrong there.
    pub message: String,
}

type Result<T> = std::result::Result<T, String>;

/// Parses the text of one block. Names of globals and helpers are looked up in `target`.
pub fn parse(text: &str, target: &Target) -> std::result::Result<Block, ParseError> {
    let mut block = Block::default();
    for (i, line) in text.lines().enumerate() {
        let code = line.split(';').next().unwrap_or("");
        let mut p = Line { rest: code.trim(), target, block: &mut block };
        p.line().map_err(|message| ParseError { line: i + 1, message })?;
    }
    Ok(block)
}

/// One line being read.
struct Line<'a> {
    rest: &'a str,
    target: &'a Target,
    block: &'a mut Block,
}

impl<'a> Line<'a> {
    /// Takes `token` if it is next; a word only as a whole.
    fn eat(&mut self, token: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(token) else { return false };
        let word = token.ends_with(|c: char| c.is_ascii_alphanumeric());
        if word && rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return false;
        }
        self.rest = rest.trim_start();
        true
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if self.eat(token) { Ok(()) } else { Err(format!("expected {token:?} at {:?}", self.rest)) }
    }

    /// The next run of letters, digits, `_` and `.`.
    fn word(&mut self) -> &'a str {
        let stop = |c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.');
        let end = self.rest.find(stop).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        word
    }

    fn number(&mut self) -> Result<u64> {
        let word = self.word();
        number(word).ok_or_else(|| format!("{word:?} is not a number"))
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Result<T> {
        let n = self.number()?;
        T::try_from(n).map_err(|_| format!("{n:#x} is out of range"))
    }

    fn val(&mut self) -> Result<Val> {
        let word = self.word();
        if word == "_" {
            return Ok(Val::NONE);
        }
        let n = word.strip_prefix(['v', 'f']).and_then(|n| n.parse::<u16>().ok());
        match n {
            Some(n) if n < MAX_VALS => {
                self.block.nvals = self.block.nvals.max(n + 1);
                Ok(Val(n))
            }
            _ => Err(format!("{word:?} is not a value")),
        }
    }

    fn line(&mut self) -> Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        if self.eat("block") {
            self.block.pc = self.number()?;
            if self.eat("mmu") {
                self.block.mmu_idx = self.small()?;
            }
        } else if self.eat("page") {
            let slot = self.small()?;
            self.expect("=")?;
            let id = self.small()?;
            self.block.pages.push(CodePage { slot, id });
        } else {
            let inst = self.inst()?;
            self.block.push(inst);
        }
        if self.rest.is_empty() { Ok(()) } else { Err(format!("unexpected {:?}", self.rest)) }
    }

    fn inst(&mut self) -> Result<Inst> {
        let (mut dst, mut dst2, mut fl) = (Val::NONE, Val::NONE, Val::NONE);
        if self.rest.contains(" = ") {
            let mut place = 0;
            loop {
                let is_flags = self.rest.starts_with('f');
                let v = self.val()?;
                match (is_flags, place) {
                    (true, _) => fl = v,
                    (_, 0) => dst = v,
                    (_, 1) => dst2 = v,
                    _ => return Err("too many results".into()),
                }
                place += 1;
                if !self.eat(",") {
                    break;
                }
            }
            self.expect("=")?;
        }
        let word = self.word();
        let mut parts = word.split('.');
        let name = parts.next().unwrap_or("");
        let op = Op::from_name(name).ok_or_else(|| format!("no operation {name:?}"))?;
        let mut inst = Inst { dst, dst2, fl, ..Inst::new(op, Width::W64) };
        for part in parts {
            suffix(&mut inst, part)?;
        }
        self.operands(&mut inst)?;
        Ok(inst)
    }

    fn operands(&mut self, inst: &mut Inst) -> Result<()> {
        match inst.op {
            Op::InsnStart => {
                inst.imm = self.number()?;
                inst.aux = self.small()?;
            }
            Op::Const => inst.imm = self.number()?,
            Op::Get => inst.imm = self.global()?,
            Op::Put => {
                inst.imm = self.global()?;
                self.expect(",")?;
            }
            Op::LdEnv | Op::EnvPtr | Op::StEnv => {
                self.expect("[")?;
                inst.imm = self.number()?;
                self.expect("]")?;
                if inst.op == Op::StEnv {
                    self.expect(",")?;
                }
            }
            Op::Call => inst.imm = self.helper()?,
            Op::Native => {
                inst.imm = self.block.natives.len() as u64;
                let native = self.native()?;
                self.block.natives.push(native);
            }
            Op::Exit => return self.exit(inst),
            _ => {}
        }
        let native = if inst.op == Op::NativeMem {
            let native = self.native()?;
            self.block.natives.push(native);
            self.block.natives.len() as u64 - 1
        } else {
            0
        };
        let taken = address_inputs(inst.op);
        if taken != 0 {
            self.address(inst)?;
        }
        if inst.op == Op::NativeMem {
            inst.imm = native << 32 | inst.imm & 0xffff_ffff;
        }
        let more = self.rest.starts_with(['v', 'f', '_']) || (taken != 0 && self.eat(","));
        if more {
            let slots = inst.op.info().ins;
            let mut i = taken;
            loop {
                let slot = inst.ins.get_mut(i).ok_or("too many operands")?;
                let class =
                    if matches!(slots[i], Slot::Flags | Slot::OptFlags) { 'f' } else { 'v' };
                if !self.rest.starts_with([class, '_']) {
                    return Err(format!("expected a {class} value at {:?}", self.rest));
                }
                *slot = self.val()?;
                i += 1;
                if !self.eat(",") {
                    break;
                }
                if inst.op == Op::BrCc {
                    return self.exit(inst);
                }
            }
        }
        match inst.op {
            Op::Deposit | Op::Extract => {
                self.expect("@")?;
                inst.aux = self.small()?;
            }
            Op::Ptr | Op::NativeMem => {
                self.expect("size")?;
                let size = self.number()?;
                if !size.is_power_of_two() || size > 64 {
                    return Err(format!("{size} is no pointer size"));
                }
                inst.aux |= (size.trailing_zeros() as u8) << 2;
            }
            _ => {}
        }
        Ok(())
    }

    fn address(&mut self, inst: &mut Inst) -> Result<()> {
        self.expect("[")?;
        inst.ins[0] = self.val()?;
        loop {
            if self.eat("]") {
                return Ok(());
            }
            let negative = self.eat("-");
            if !negative {
                self.expect("+")?;
            }
            if self.rest.starts_with('v') && !negative {
                inst.ins[1] = self.val()?;
                if self.eat("<<") {
                    let scale: u8 = self.small()?;
                    if scale > 3 {
                        return Err(format!("{scale} is no address scale"));
                    }
                    inst.aux |= scale;
                }
            } else {
                let n = self.number()?;
                inst.imm = if negative { n.wrapping_neg() } else { n };
            }
        }
    }

    fn global(&mut self) -> Result<u64> {
        self.expect("%")?;
        let name = self.word();
        let by_name = self.target.globals.iter().position(|g| g.name == name);
        by_name
            .map(|i| i as u64)
            .or_else(|| number(name))
            .ok_or_else(|| format!("no global {name:?}"))
    }

    fn helper(&mut self) -> Result<u64> {
        self.expect("@")?;
        let name = self.word();
        let by_name = self.target.helpers.iter().position(|h| h.name == name);
        by_name
            .map(|i| i as u64)
            .or_else(|| number(name))
            .ok_or_else(|| format!("no helper {name:?}"))
    }

    fn exit(&mut self, inst: &mut Inst) -> Result<()> {
        let index = if self.eat("#") { self.small::<u8>()?.into() } else { self.block.exits.len() };
        let kind = match self.word() {
            "goto" => ExitKind::Goto { pc: self.number()?, same_page: self.eat("near") },
            "indirect" => {
                let v = self.val()?;
                if inst.op == Op::Exit {
                    inst.ins[0] = v;
                }
                ExitKind::Indirect
            }
            "leave" => {
                let code = self.small()?;
                let pc = if self.eat("pc") { Some(self.number()?) } else { None };
                ExitKind::Leave { code, pc }
            }
            other => return Err(format!("{other:?} is no exit")),
        };
        let hint = if self.eat("call") {
            ExitHint::Call { ret: self.number()? }
        } else if self.eat("ret") {
            ExitHint::Ret
        } else if self.eat("far") {
            ExitHint::Far
        } else {
            ExitHint::Jump
        };
        let dead = if self.eat("dead") { self.number()? } else { 0 };
        let exits = &mut self.block.exits;
        if exits.len() <= index {
            let unused = ExitKind::Leave { code: 0, pc: None };
            exits.resize(index + 1, Exit::new(unused, ExitHint::Jump));
        }
        exits[index] = Exit { kind, hint, dead };
        inst.imm = index as u64;
        Ok(())
    }

    fn native(&mut self) -> Result<Native> {
        let word = self.word();
        let mut native = native_form(word).ok_or_else(|| format!("{word:?} is no encoding"))?;
        loop {
            if self.eat("reg=") {
                native.reg = self.native_reg()?;
            } else if self.eat("rm=") {
                native.rm = self.native_reg()?;
            } else if self.eat("vvvv=") {
                native.vvvv = self.native_reg()?;
            } else if self.eat("imm=") {
                native.imm8 = Some(self.small()?);
            } else if self.eat("+") {
                match self.word() {
                    "dst_in" => native.dst_in = true,
                    "flags" => native.sets_flags = true,
                    "vector" => native.vector = true,
                    "fp" => native.fp = true,
                    "x87" => native.x87 = true,
                    other => return Err(format!("{other:?} is no property")),
                }
            } else {
                return Ok(native);
            }
        }
    }

    fn native_reg(&mut self) -> Result<NativeReg> {
        let word = self.word();
        let numbered = |prefix: char| word.strip_prefix(prefix).and_then(|n| n.parse().ok());
        Ok(match word {
            "b" => NativeReg::GprB,
            "c" => NativeReg::GprC,
            "dst" => NativeReg::GprDst,
            "dst2" => NativeReg::GprDst2,
            "mem" => NativeReg::Mem,
            _ => numbered('v')
                .map(NativeReg::Vec)
                .or_else(|| numbered('k').map(NativeReg::Mask))
                .or_else(|| word.parse().ok().map(NativeReg::Fixed))
                .ok_or_else(|| format!("{word:?} is no register field"))?,
        })
    }
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

/// Applies one `.suffix` of an operation's name.
fn suffix(inst: &mut Inst, part: &str) -> Result<()> {
    match part {
        "w8" => inst.w = Width::W8,
        "w16" => inst.w = Width::W16,
        "w32" => inst.w = Width::W32,
        "w64" => inst.w = Width::W64,
        "sx64" if inst.op == Op::Ld => inst.aux |= LD_SX64,
        "sx32" if inst.op == Op::Ld => inst.aux |= LD_SX32,
        "r" if inst.op == Op::Ptr => inst.cond = PTR_READ,
        "w" if inst.op == Op::Ptr => inst.cond = PTR_WRITE,
        "rw" if inst.op == Op::Ptr => inst.cond = PTR_READ | PTR_WRITE,
        "rwl" if inst.op == Op::Ptr => inst.cond = PTR_READ | PTR_WRITE | PTR_LOCKED,
        "rm" if inst.op == Op::Ptr => inst.cond = PTR_READ | PTR_MASKED,
        "wm" if inst.op == Op::Ptr => inst.cond = PTR_WRITE | PTR_MASKED,
        "ram" if inst.op == Op::Ptr => inst.cond = PTR_READ | PTR_ALIGNED | PTR_MASKED,
        "wam" if inst.op == Op::Ptr => inst.cond = PTR_WRITE | PTR_ALIGNED | PTR_MASKED,
        "r" if inst.op == Op::NativeMem => inst.cond = PTR_READ,
        "w" if inst.op == Op::NativeMem => inst.cond = PTR_WRITE,
        "ra" if inst.op == Op::NativeMem => inst.cond = PTR_READ | PTR_ALIGNED,
        "wa" if inst.op == Op::NativeMem => inst.cond = PTR_WRITE | PTR_ALIGNED,
        _ => {
            let found = match inst.op {
                Op::SetCc | Op::SelCc | Op::BrCc => {
                    (0..16).find(|&c| cond_name(c) == part).map(|c| inst.cond = c)
                }
                Op::AtomicRmw => (0..8).find(|&c| rmw_name(c) == Some(part)).map(|c| inst.aux = c),
                _ => None,
            };
            return found.ok_or_else(|| format!("no suffix {part:?} on {}", inst.op));
        }
    }
    Ok(())
}

/// `enc.prefix.map.opcode.wN.lN[.kN][.z][.b]`, without operands.
fn native_form(word: &str) -> Option<Native> {
    let mut parts = word.split('.');
    let mut enc = match parts.next()? {
        "legacy" => Encoding::Legacy,
        "vex" => Encoding::Vex,
        "evex" => Encoding::Evex { aaa: 0, z: false, b: false },
        _ => return None,
    };
    let hex = |s: &str| u8::from_str_radix(s, 16).ok();
    let prefix = hex(parts.next()?)?;
    let map = match parts.next()? {
        "00" => 0,
        "0f" => 1,
        "0f38" => 2,
        "0f3a" => 3,
        n => n.parse().ok()?,
    };
    let opcode = hex(parts.next()?)?;
    let (mut w, mut l) = (false, 0);
    for part in parts {
        match (part, &mut enc) {
            ("w0", _) => w = false,
            ("w1", _) => w = true,
            ("z", Encoding::Evex { z, .. }) => *z = true,
            ("b", Encoding::Evex { b, .. }) => *b = true,
            (k, Encoding::Evex { aaa, .. }) if k.starts_with('k') => *aaa = k[1..].parse().ok()?,
            (n, _) => l = n.strip_prefix('l')?.parse().ok()?,
        }
    }
    Some(Native {
        enc,
        prefix,
        map,
        opcode,
        w,
        l,
        reg: NativeReg::Fixed(0),
        rm: NativeReg::Fixed(0),
        vvvv: NativeReg::Fixed(0),
        imm8: None,
        dst_in: false,
        sets_flags: false,
        vector: false,
        fp: false,
        x87: false,
    })
}
