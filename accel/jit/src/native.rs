//! Encoding of pass-through instructions ([`Native`]): fields and operand registers in, bytes out.
//!
//! The bytes are x86-64 machine code (SDM vol. 2 chapter 2), but building them needs no x86 host;
//! the x86-64 back end and the interpreter's thunks share this one encoder. What always holds: the
//! result is at most [`MAX_LEN`] bytes, addresses memory only through the given base register, and
//! a description that has no encoding (a vector register above 15 without EVEX, say) is refused
//! rather than bent.

use crate::ir::{Encoding, Native, NativeReg};

/// Longest x86 instruction, in bytes (SDM vol. 2 §2.3.11).
pub const MAX_LEN: usize = 15;

/// The host registers (hardware numbers 0–15) that stand in for the operands of a [`Native`]. A
/// field that the instruction does not name is not looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NativeRegs {
    /// Holds input `b`.
    pub b: u8,
    /// Holds input `c`.
    pub c: u8,
    /// Receives `dst`; holds input `d` before if the instruction has `dst_in`.
    pub dst: u8,
    /// Receives `dst2`.
    pub dst2: u8,
    /// Base register of the memory operand.
    pub mem: u8,
    /// Index register of the memory operand, not RSP; [`NO_INDEX`] for none.
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    /// Displacement of the memory operand, in bytes.
    pub disp: i32,
}

/// No index register.
pub const NO_INDEX: u8 = 0xff;

impl Default for NativeRegs {
    fn default() -> NativeRegs {
        NativeRegs { b: 0, c: 0, dst: 0, dst2: 0, mem: 0, index: NO_INDEX, scale: 0, disp: 0 }
    }
}

/// The bytes of one instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NativeBytes {
    bytes: [u8; MAX_LEN],
    len: u8,
}

impl NativeBytes {
    fn new() -> NativeBytes {
        NativeBytes { bytes: [0; MAX_LEN], len: 0 }
    }
    fn push(&mut self, byte: u8) {
        // The longest form, EVEX with SIB, 32-bit displacement and immediate, has 12 bytes.
        self.bytes[self.len as usize] = byte;
        self.len += 1;
    }
    /// The instruction.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }
}

/// A register field resolved to a number of up to five bits.
#[derive(Clone, Copy)]
struct Field {
    num: u8,
    gpr: bool,
}

fn field(reg: NativeReg, regs: &NativeRegs, evex: bool) -> Option<Field> {
    let (num, gpr, limit) = match reg {
        NativeReg::Fixed(n) => (n, false, if evex { 31 } else { 15 }),
        NativeReg::Vec(n) => (n, false, if evex { 31 } else { 15 }),
        NativeReg::Mask(n) => (n, false, 7),
        NativeReg::GprB => (regs.b, true, 15),
        NativeReg::GprC => (regs.c, true, 15),
        NativeReg::GprDst => (regs.dst, true, 15),
        NativeReg::GprDst2 => (regs.dst2, true, 15),
        NativeReg::Mem => return None,
    };
    (num <= limit).then_some(Field { num, gpr })
}

/// The two-bit `pp` field that VEX and EVEX have instead of a mandatory prefix.
fn pp(prefix: u8) -> Option<u8> {
    match prefix {
        0 => Some(0),
        0x66 => Some(1),
        0xf3 => Some(2),
        0xf2 => Some(3),
        _ => None,
    }
}

/// Encodes `native` with its operands in `regs`; `None` if it has no encoding.
pub fn encode(native: &Native, regs: &NativeRegs) -> Option<NativeBytes> {
    let evex = matches!(native.enc, Encoding::Evex { .. });
    let reg = field(native.reg, regs, evex)?;
    // `None` is the memory operand.
    let rm = match native.rm {
        NativeReg::Mem if regs.mem > 15 || regs.index == 4 || regs.scale > 3 => return None,
        NativeReg::Mem if regs.index > 15 && regs.index != NO_INDEX => return None,
        NativeReg::Mem => None,
        other => Some(field(other, regs, evex)?),
    };
    let vvvv = field(native.vvvv, regs, evex)?;
    let rm_num = rm.map_or(regs.mem, |f| f.num);
    // Bit 3 of the index register: the X bit of all prefixes.
    let x = if rm.is_none() && regs.index != NO_INDEX { regs.index >> 3 } else { 0 };
    let mut out = NativeBytes::new();
    match native.enc {
        Encoding::Legacy => legacy_prefixes(&mut out, native, reg, rm, rm_num | x << 4)?,
        Encoding::Vex => vex_prefix(&mut out, native, reg.num, rm_num | x << 4, vvvv.num)?,
        Encoding::Evex { aaa, z, b } => {
            if aaa > 7 || native.l > 3 || !matches!(native.map, 1 | 2 | 3 | 5 | 6) {
                return None;
            }
            let bit = |n: u8, at: u8| (!n >> at) & 1;
            out.push(0x62);
            // For a register operand X extends rm to five bits; a base register has four.
            let x = if rm.is_some() { bit(rm_num, 4) } else { 1 - x };
            out.push(
                bit(reg.num, 3) << 7
                    | x << 6
                    | bit(rm_num, 3) << 5
                    | bit(reg.num, 4) << 4
                    | native.map,
            );
            out.push((native.w as u8) << 7 | (!vvvv.num & 15) << 3 | 4 | pp(native.prefix)?);
            out.push((z as u8) << 7 | native.l << 5 | (b as u8) << 4 | bit(vvvv.num, 4) << 3 | aaa);
        }
    }
    out.push(native.opcode);
    if native.enc == Encoding::Vex && native.map == 1 && native.opcode == 0x77 {
        // VZEROUPPER and VZEROALL have no operands and no ModRM byte.
        return Some(out);
    }
    match rm {
        Some(rm) => out.push(0xc0 | (reg.num & 7) << 3 | rm.num & 7),
        None => memory_operand(&mut out, reg.num, regs, evex),
    }
    if let Some(imm) = native.imm8 {
        out.push(imm);
    }
    Some(out)
}

fn legacy_prefixes(
    out: &mut NativeBytes,
    native: &Native,
    reg: Field,
    rm: Option<Field>,
    rm_num: u8,
) -> Option<()> {
    match native.prefix {
        0 => {}
        p @ (0x66 | 0xf2 | 0xf3) => out.push(p),
        _ => return None,
    }
    // An empty REX makes byte registers 4–7 mean SPL–DIL, not AH–BH; it changes nothing else.
    let low_byte = |f: Field| f.gpr && (4..8).contains(&f.num);
    let needed = low_byte(reg) || rm.is_some_and(low_byte);
    let rex = (native.w as u8) << 3 | (reg.num >> 3) << 2 | (rm_num >> 4) << 1 | rm_num >> 3 & 1;
    if rex != 0 || needed {
        out.push(0x40 | rex);
    }
    match native.map {
        0 => {}
        1 => out.push(0x0f),
        2 => [0x0f, 0x38].into_iter().for_each(|b| out.push(b)),
        3 => [0x0f, 0x3a].into_iter().for_each(|b| out.push(b)),
        _ => return None,
    }
    Some(())
}

fn vex_prefix(out: &mut NativeBytes, native: &Native, reg: u8, rm: u8, vvvv: u8) -> Option<()> {
    if native.l > 1 || !(1..=3).contains(&native.map) {
        return None;
    }
    let r = (!reg >> 3) & 1;
    let (b, x) = ((!rm >> 3) & 1, (!rm >> 4) & 1);
    let tail = (!vvvv & 15) << 3 | native.l << 2 | pp(native.prefix)?;
    if native.map == 1 && !native.w && b == 1 && x == 1 {
        out.push(0xc5);
        out.push(r << 7 | tail);
    } else {
        out.push(0xc4);
        out.push(r << 7 | x << 6 | b << 5 | native.map);
        out.push((native.w as u8) << 7 | tail);
    }
    Some(())
}

/// ModRM, SIB and displacement of `[mem + disp]`.
fn memory_operand(out: &mut NativeBytes, reg: u8, regs: &NativeRegs, evex: bool) {
    let base = regs.mem & 7;
    // Base 5 (RBP, R13) without displacement means RIP-relative. EVEX scales 8-bit displacements by
    // the operand size, so only zero is the same under both readings.
    let disp8 = i8::try_from(regs.disp).ok().filter(|&d| d == 0 || !evex);
    let mode = match disp8 {
        Some(0) if base != 5 => 0,
        Some(_) => 1,
        None => 2,
    };
    if regs.index != NO_INDEX {
        out.push(mode << 6 | (reg & 7) << 3 | 4);
        out.push(regs.scale << 6 | (regs.index & 7) << 3 | base);
    } else {
        out.push(mode << 6 | (reg & 7) << 3 | base);
        if base == 4 {
            // Base 4 (RSP, R12) needs a SIB byte: no index, this base.
            out.push(0x24);
        }
    }
    match (mode, disp8) {
        (0, _) => {}
        (1, Some(d)) => out.push(d as u8),
        _ => regs.disp.to_le_bytes().into_iter().for_each(|b| out.push(b)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

    fn text(native: &Native, regs: &NativeRegs) -> String {
        let bytes = encode(native, regs).expect("encodable");
        let mut d = Decoder::new(64, bytes.as_slice(), DecoderOptions::NONE);
        let insn = d.decode();
        assert!(!insn.is_invalid(), "{:02x?}", bytes.as_slice());
        assert_eq!(insn.len(), bytes.as_slice().len());
        let mut s = String::new();
        NasmFormatter::new().format(&insn, &mut s);
        s
    }

    fn base() -> Native {
        Native {
            enc: Encoding::Legacy,
            prefix: 0,
            map: 1,
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
        }
    }

    #[test]
    fn legacy_forms() {
        use NativeReg::*;
        let r = NativeRegs { b: 9, c: 3, dst: 6, dst2: 1, mem: 12, ..NativeRegs::default() };
        let paddd =
            Native { prefix: 0x66, map: 1, opcode: 0xfe, reg: Vec(3), rm: Vec(12), ..base() };
        assert_eq!(text(&paddd, &r), "paddd xmm3,xmm12");
        assert_eq!(text(&Native { rm: Mem, ..paddd }, &r), "paddd xmm3,[r12]");
        let at = |mem, disp| NativeRegs { mem, disp, ..r };
        let load = Native { rm: Mem, ..paddd };
        assert_eq!(text(&load, &at(5, 0)), "paddd xmm3,[rbp]");
        assert_eq!(text(&load, &at(13, 0)), "paddd xmm3,[r13]");
        assert_eq!(text(&load, &at(4, 0x10)), "paddd xmm3,[rsp+10h]");
        assert_eq!(text(&load, &at(15, -0x1000)), "paddd xmm3,[r15-1000h]");
        let movq = Native { prefix: 0x66, opcode: 0x6e, w: true, reg: Vec(9), rm: GprB, ..base() };
        assert_eq!(text(&movq, &r), "movq xmm9,r9");
        let crc = Native { prefix: 0xf2, map: 2, opcode: 0xf0, reg: GprDst, rm: GprB, ..base() };
        assert_eq!(text(&crc, &NativeRegs { b: 6, dst: 0, ..r }), "crc32 eax,sil");
        let pextr = Native {
            prefix: 0x66,
            map: 3,
            opcode: 0x16,
            w: true,
            reg: Vec(1),
            rm: GprDst,
            imm8: Some(1),
            ..base()
        };
        assert_eq!(text(&pextr, &r), "pextrq rsi,xmm1,1");
    }

    #[test]
    fn vex_forms() {
        use NativeReg::*;
        let r =
            NativeRegs { b: 9, c: 3, dst: 6, dst2: 1, mem: 8, disp: 0x40, ..NativeRegs::default() };
        let vaddps = Native {
            enc: Encoding::Vex,
            opcode: 0x58,
            l: 1,
            reg: Vec(8),
            rm: Vec(2),
            vvvv: Vec(15),
            ..base()
        };
        assert_eq!(text(&vaddps, &r), "vaddps ymm8,ymm15,ymm2");
        assert_eq!(encode(&vaddps, &r).unwrap().as_slice().len(), 4);
        assert_eq!(text(&Native { rm: Vec(10), ..vaddps }, &r), "vaddps ymm8,ymm15,ymm10");
        assert_eq!(text(&Native { rm: Mem, ..vaddps }, &r), "vaddps ymm8,ymm15,[r8+40h]");
        let bextr = Native {
            enc: Encoding::Vex,
            map: 2,
            opcode: 0xf7,
            w: true,
            reg: GprDst,
            rm: GprB,
            vvvv: GprC,
            ..base()
        };
        assert_eq!(text(&bextr, &r), "bextr rsi,r9,rbx");
        let blendv = Native {
            enc: Encoding::Vex,
            prefix: 0x66,
            map: 3,
            opcode: 0x4a,
            reg: Vec(1),
            vvvv: Vec(2),
            rm: Vec(3),
            imm8: Some(0xb0),
            ..base()
        };
        assert_eq!(text(&blendv, &r), "vblendvps xmm1,xmm2,xmm3,xmm11");
    }

    #[test]
    fn evex_forms() {
        use NativeReg::*;
        let r = NativeRegs { b: 9, mem: 5, disp: 0x40, ..NativeRegs::default() };
        let evex = |aaa, z, b| Encoding::Evex { aaa, z, b };
        let vaddpd = Native {
            enc: evex(3, true, false),
            prefix: 0x66,
            opcode: 0x58,
            w: true,
            l: 2,
            reg: Vec(17),
            vvvv: Vec(30),
            rm: Vec(25),
            ..base()
        };
        assert_eq!(text(&vaddpd, &r), "vaddpd zmm17{k3}{z},zmm30,zmm25");
        let mem = Native { rm: Mem, ..vaddpd };
        assert_eq!(text(&mem, &r), "vaddpd zmm17{k3}{z},zmm30,[rbp+40h]");
        let bcst = Native { enc: evex(0, false, true), ..mem };
        assert_eq!(text(&bcst, &r), "vaddpd zmm17,zmm30,[rbp+40h]{1to8}");
        let cmp = Native {
            enc: evex(1, false, false),
            opcode: 0xc2,
            l: 2,
            reg: Mask(5),
            vvvv: Vec(9),
            rm: Vec(14),
            imm8: Some(1),
            ..base()
        };
        assert_eq!(text(&cmp, &r), "vcmpltps k5{k1},zmm9,zmm14");
        let bcast = Native {
            enc: evex(0, false, false),
            prefix: 0x66,
            map: 2,
            opcode: 0x7c,
            w: true,
            l: 2,
            reg: Vec(31),
            rm: GprB,
            ..base()
        };
        assert_eq!(text(&bcast, &r), "vpbroadcastq zmm31,r9");
    }

    #[test]
    fn index_registers() {
        use NativeReg::*;
        let at = |mem, index, scale, disp| NativeRegs {
            mem,
            index,
            scale,
            disp,
            ..NativeRegs::default()
        };
        let paddd = Native { prefix: 0x66, opcode: 0xfe, reg: Vec(9), rm: Mem, ..base() };
        assert_eq!(text(&paddd, &at(0, 11, 0, 0)), "paddd xmm9,[rax+r11]");
        assert_eq!(text(&paddd, &at(13, 1, 3, 0)), "paddd xmm9,[r13+rcx*8]");
        assert_eq!(text(&paddd, &at(4, 5, 0, -8)), "paddd xmm9,[rsp+rbp-8]");
        assert_eq!(text(&paddd, &at(12, 15, 2, 0x1000)), "paddd xmm9,[r12+r15*4+1000h]");
        let vex = Native { enc: Encoding::Vex, l: 1, vvvv: Vec(3), ..paddd };
        assert_eq!(text(&vex, &at(2, 14, 0, 0x20)), "vpaddd ymm9,ymm3,[rdx+r14+20h]");
        assert_eq!(text(&vex, &at(10, 6, 1, 0)), "vpaddd ymm9,ymm3,[r10+rsi*2]");
        let evex = Native {
            enc: Encoding::Evex { aaa: 1, z: false, b: false },
            l: 2,
            reg: Vec(20),
            vvvv: Vec(3),
            ..paddd
        };
        assert_eq!(text(&evex, &at(8, 9, 3, 0x40)), "vpaddd zmm20{k1},zmm3,[r8+r9*8+40h]");
        assert_eq!(text(&evex, &at(0, 3, 0, 0)), "vpaddd zmm20{k1},zmm3,[rax+rbx]");
        assert_eq!(encode(&paddd, &at(0, 4, 0, 0)), None);
    }

    #[test]
    fn refuses_what_has_no_encoding() {
        use NativeReg::*;
        let r = NativeRegs::default();
        assert_eq!(encode(&Native { reg: Vec(16), ..base() }, &r), None);
        assert_eq!(encode(&Native { reg: Mem, ..base() }, &r), None);
        assert_eq!(encode(&Native { prefix: 0x2e, ..base() }, &r), None);
        assert_eq!(encode(&Native { enc: Encoding::Vex, map: 0, ..base() }, &r), None);
        assert_eq!(encode(&Native { enc: Encoding::Vex, l: 2, ..base() }, &r), None);
        assert_eq!(encode(&Native { rm: GprB, ..base() }, &NativeRegs { b: 16, ..r }), None);
    }
}
