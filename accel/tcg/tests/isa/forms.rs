//! Every encodable form of the instructions under test, with random operands.
//!
//! Register conventions of the cases: RBX points into the data, R12 is a small index, RSI and RDI
//! point at strings, RSP at the stack. Instructions of a form may overwrite them; sequences keep
//! them by choosing other destinations.

use super::memory::DATA;
use super::native::Regs;
use super::rng::Rng;
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, MemorySize, Mnemonic,
    OpCodeOperandKind, OpKind, Register,
};

/// Where RBX points.
pub const BASE: u64 = DATA + 0x1000;

const R8: [Register; 20] = {
    use Register::*;
    [
        AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L, R9L, R10L, R11L, R12L, R13L, R14L,
        R15L,
    ]
};

fn sized(n: usize, bytes: usize) -> Register {
    let first = match bytes {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + n as u32
}

/// Numbers of the registers that sequences may overwrite.
const FREE: [usize; 10] = [0, 1, 2, 5, 8, 9, 10, 11, 14, 15];

/// What to build.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Want {
    /// Memory operand where the form allows a choice.
    pub memory: bool,
    /// LOCK prefix, where allowed.
    pub lock: bool,
    /// Only registers that sequences may overwrite.
    pub sequence: bool,
    /// Code size: 32 or 64.
    pub bits: u32,
}

fn register(rng: &mut Rng, bytes: usize, want: Want, rex: &mut Option<bool>) -> Register {
    if want.bits < 64 {
        let mut n = rng.below(8) as usize;
        if want.sequence {
            // Numbers 4 to 6 are the upper bytes of 0 to 2.
            n = if bytes == 1 { rng.pick(&[0, 1, 2, 4, 5, 6]) } else { rng.pick(&[0, 1, 2]) };
        }
        if want.bits == 16 && bytes > 1 && n == 4 {
            // The upper half of the stack pointer is the host's.
            n = 0;
        }
        return if bytes == 1 { R8[n] } else { sized(n, bytes) };
    }
    if want.sequence {
        let n = rng.pick(&FREE);
        return if bytes == 1 { R8[if n < 4 { n } else { n + 4 }] } else { sized(n, bytes) };
    }
    if bytes == 1 {
        loop {
            let r = rng.pick(&R8);
            let high = matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
            let needs_rex = r as u32 >= Register::SPL as u32;
            // AH and the like cannot be encoded together with a REX prefix.
            match *rex {
                Some(true) if high => continue,
                Some(false) if needs_rex => continue,
                _ => {}
            }
            if high {
                *rex = Some(false);
            } else if needs_rex {
                *rex = Some(true);
            }
            return r;
        }
    }
    loop {
        let n = rng.below(16) as usize;
        if *rex == Some(false) && (n >= 8 || bytes == 8) {
            if bytes == 8 {
                return sized(n & 7, bytes);
            }
            continue;
        }
        if n >= 8 || bytes == 8 {
            *rex = Some(true);
        }
        return sized(n, bytes);
    }
}

fn set_memory(insn: &mut Instruction, i: u32, rng: &mut Rng, want: Want, aligned: bool) {
    if want.bits == 16 && rng.one_in(2) {
        return set_memory16(insn, i, rng);
    }
    let (base, index) = match want.bits {
        64 => (Register::RBX, Register::R12),
        _ => (Register::EBX, Register::EBP),
    };
    insn.set_op_kind(i, OpKind::Memory);
    insn.set_memory_base(base);
    if !aligned && rng.one_in(2) {
        insn.set_memory_index(index);
        insn.set_memory_index_scale(rng.pick(&[1, 2, 4, 8]));
    }
    let disp = if aligned { rng.below(8) * 16 } else { rng.below(0x100) };
    insn.set_memory_displacement64(disp);
    insn.set_memory_displ_size(u32::from(disp != 0));
}

/// 16-bit addressing.
fn set_memory16(insn: &mut Instruction, i: u32, rng: &mut Rng) {
    use Register::{BP, BX, DI, None, SI};
    const FORMS: [(Register, Register); 8] =
        [(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, None), (DI, None), (BP, None), (BX, None)];
    let (base, index) = rng.pick(&FORMS);
    insn.set_op_kind(i, OpKind::Memory);
    insn.set_memory_base(base);
    insn.set_memory_index(index);
    let disp = rng.below(0x100);
    insn.set_memory_displacement64(disp);
    insn.set_memory_displ_size(u32::from(disp != 0));
}

/// Memory operand and accessed size in the operand kinds of `code`, if it has one.
pub fn has_memory(code: Code) -> bool {
    let op = code.op_code();
    (0..op.op_count()).any(|i| {
        use OpCodeOperandKind::*;
        matches!(op.op_kind(i), mem | r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mem_offs)
    })
}

/// Whether the form has a register in the memory operand's place.
pub fn has_register_form(code: Code) -> bool {
    let op = code.op_code();
    !(0..op.op_count()).any(|i| op.op_kind(i) == OpCodeOperandKind::mem)
}

/// An instruction of form `code`; `None` if its operands are of no kind that is known here.
pub fn build(code: Code, want: Want, rng: &mut Rng) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let op = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    // Whether the instruction has a REX prefix, once that is decided. Memory operands may need one.
    let mut rex = None;
    if want.memory || op.operand_size() == 64 {
        rex = Some(true);
    }
    if op.op_count() > 0
        && (0..op.op_count()).any(|i| {
            matches!(op.op_kind(i), K::r64_reg | K::r64_or_mem | K::r64_opcode | K::r64_vvvv)
        })
    {
        rex = Some(true);
    }
    let aligned = matches!(code, Code::Cmpxchg16b_m128);
    for i in 0..op.op_count() {
        let kind = op.op_kind(i);
        let reg_or_mem = |bytes| (bytes, true);
        let (bytes, may_be_memory) = match kind {
            K::r8_or_mem => reg_or_mem(1),
            K::r16_or_mem => reg_or_mem(2),
            K::r32_or_mem => reg_or_mem(4),
            K::r64_or_mem => reg_or_mem(8),
            K::r8_reg | K::r8_opcode => (1, false),
            K::r16_reg | K::r16_rm | K::r16_opcode => (2, false),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => (4, false),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => (8, false),
            _ => (0, false),
        };
        if may_be_memory && want.memory {
            set_memory(&mut insn, i, rng, want, aligned);
            continue;
        }
        if bytes > 0 {
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register(rng, bytes, want, &mut rex));
            continue;
        }
        let fixed = match kind {
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::dx => Register::DX,
            _ => Register::None,
        };
        if fixed != Register::None {
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, fixed);
            continue;
        }
        implied(&mut insn, i, kind, want, aligned, rng)?;
    }
    insn.set_has_lock_prefix(want.lock);
    Some(insn)
}

/// Sets operand `i` of a kind that is neither a register nor a register-or-memory operand.
fn implied(
    insn: &mut Instruction,
    i: u32,
    kind: OpCodeOperandKind,
    want: Want,
    aligned: bool,
    rng: &mut Rng,
) -> Option<()> {
    use OpCodeOperandKind as K;
    let imm = rng.value();
    match kind {
        K::mem_offs => {
            insn.set_op_kind(i, OpKind::Memory);
            let base = if want.bits == 16 { 0 } else { DATA };
            insn.set_memory_displacement64(base + rng.below(0x1000));
            insn.set_memory_displ_size(want.bits / 8);
        }
        K::seg_rBX_al => {
            let base = match want.bits {
                64 => Register::RBX,
                32 => Register::EBX,
                _ => Register::BX,
            };
            insn.set_op_kind(i, OpKind::Memory);
            insn.set_memory_base(base);
            insn.set_memory_index(Register::AL);
        }
        K::mem => set_memory(insn, i, rng, want, aligned),
        K::imm8 => {
            insn.set_op_kind(i, OpKind::Immediate8);
            insn.set_immediate8(imm as u8);
        }
        K::imm8_const_1 => {
            insn.set_op_kind(i, OpKind::Immediate8);
            insn.set_immediate8(1);
        }
        K::imm8sex16 => {
            insn.set_op_kind(i, OpKind::Immediate8to16);
            insn.set_immediate8to16(imm as i8 as i16);
        }
        K::imm8sex32 => {
            insn.set_op_kind(i, OpKind::Immediate8to32);
            insn.set_immediate8to32(imm as i8 as i32);
        }
        K::imm8sex64 => {
            insn.set_op_kind(i, OpKind::Immediate8to64);
            insn.set_immediate8to64(imm as i8 as i64);
        }
        K::imm16 => {
            insn.set_op_kind(i, OpKind::Immediate16);
            insn.set_immediate16(imm as u16);
        }
        K::imm32 => {
            insn.set_op_kind(i, OpKind::Immediate32);
            insn.set_immediate32(imm as u32);
        }
        K::imm32sex64 => {
            insn.set_op_kind(i, OpKind::Immediate32to64);
            insn.set_immediate32to64(imm as i32 as i64);
        }
        K::imm64 => {
            insn.set_op_kind(i, OpKind::Immediate64);
            insn.set_immediate64(imm);
        }
        K::seg_rSI if want.bits == 64 => insn.set_op_kind(i, OpKind::MemorySegRSI),
        K::es_rDI if want.bits == 64 => insn.set_op_kind(i, OpKind::MemoryESRDI),
        K::seg_rSI if want.bits == 32 => insn.set_op_kind(i, OpKind::MemorySegESI),
        K::es_rDI if want.bits == 32 => insn.set_op_kind(i, OpKind::MemoryESEDI),
        K::seg_rSI => insn.set_op_kind(i, OpKind::MemorySegSI),
        K::es_rDI => insn.set_op_kind(i, OpKind::MemoryESDI),
        _ => return None,
    }
    Some(())
}

/// The bytes of `insn` at `rip` in code of size `bits`; `None` if it has no encoding.
pub fn encode(insn: &Instruction, rip: u64, bits: u32) -> Option<Vec<u8>> {
    let mut e = Encoder::new(bits);
    e.encode(insn, rip).ok()?;
    Some(e.take_buffer())
}

/// Cuts registers down to code of size `bits`: 32 bits, and for 16-bit code offsets from the data's
/// start in place of addresses.
pub fn narrow(regs: &mut Regs, bits: u32) {
    for v in &mut regs.gpr {
        if bits == 16 && (DATA..DATA + super::memory::DATA_LEN as u64).contains(v) {
            *v -= DATA;
        }
        if bits < 64 {
            *v &= u64::from(u32::MAX);
        }
    }
}

/// Registers for a case in 32-bit code, random but for the conventions.
pub fn registers32(rng: &mut Rng) -> Regs {
    let mut r = registers(rng);
    r.gpr[5] = r.gpr[12];
    for v in &mut r.gpr[..8] {
        *v &= u64::from(u32::MAX);
    }
    r.gpr[8..].fill(0);
    r
}

/// Registers for a case, random but for the conventions.
pub fn registers(rng: &mut Rng) -> Regs {
    let mut r = Regs::default();
    for v in &mut r.gpr {
        *v = rng.value();
    }
    r.gpr[3] = BASE + rng.below(64);
    r.gpr[4] = super::memory::STACK;
    r.gpr[6] = DATA + 0x2000 + rng.below(64);
    r.gpr[7] = DATA + 0x2800 + rng.below(64);
    r.gpr[12] = rng.below(16);
    r.flags = rng.bits() & 0x8d5;
    r
}

/// Changes the registers so that `insn` touches only data and does not trap.
pub fn settle(insn: &mut Instruction, regs: &mut Regs, rng: &mut Rng) {
    use Mnemonic::*;
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    match insn.mnemonic() {
        // The bit offset reaches far from the operand.
        Bt | Bts | Btr | Btc if memory && insn.op1_kind() == OpKind::Register => {
            let r = insn.op1_register();
            let mut n = r.full_register().number();
            if matches!(n, 3 | 5 | 6 | 7 | 12) {
                n = 1;
                insn.set_op1_register(sized(n, r.size()));
            }
            // BP is small: nothing lies below.
            let low = if insn.memory_base() == Register::BP { 0 } else { 0x1000 };
            regs.gpr[n] = (rng.below(0x2000) as i64 - low) as u64;
        }
        Aam => insn.set_immediate8(insn.immediate8().max(1)),
        Leave => regs.gpr[5] = DATA + 0x3000 + rng.below(64),
        Cmpxchg16b => {
            regs.gpr[3] = BASE;
        }
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd
        | Lodsq | Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq => {
            regs.gpr[1] = rng.below(100);
            if rng.one_in(2) {
                // Overlapping, a small distance apart.
                regs.gpr[7] = regs.gpr[6].wrapping_add(rng.below(9)).wrapping_sub(4);
            }
            if rng.one_in(3) {
                regs.flags |= 0x400;
            }
        }
        // More than the operand's width is undefined.
        Shld | Shrd
            if insn.op0_register().size() == 2 || insn.memory_size() == MemorySize::UInt16 =>
        {
            regs.gpr[1] = regs.gpr[1] & !0x1f | rng.below(17);
            if insn.op2_kind() == OpKind::Immediate8 {
                insn.set_immediate8(rng.below(17) as u8 | 0xe0);
            }
        }
        _ => {}
    }
}

/// The instructions under test, besides CMOVcc and SETcc.
const INTEGER: &[Mnemonic] = {
    use Mnemonic::*;
    &[
        Mov, Movzx, Movsx, Movsxd, Movnti, Lea, Add, Sub, Adc, Sbb, And, Or, Xor, Cmp, Test, Inc,
        Dec, Neg, Not, Push, Pop, Shl, Sal, Shr, Sar, Rol, Ror, Rcl, Rcr, Shld, Shrd, Shlx, Shrx,
        Sarx, Rorx, Imul, Mul, Div, Idiv, Mulx, Xchg, Xadd, Cmpxchg, Cmpxchg8b, Cmpxchg16b, Bswap,
        Movbe, Bt, Bts, Btr, Btc, Bsf, Bsr, Lzcnt, Tzcnt, Popcnt, Andn, Blsi, Blsr, Blsmsk, Bextr,
        Bzhi, Pdep, Pext, Adcx, Adox, Crc32, Cbw, Cwde, Cdqe, Cwd, Cdq, Cqo, Lahf, Sahf, Clc, Stc,
        Cmc, Cld, Xlatb, Nop, Leave, Pusha, Pushad, Popa, Popad, Daa, Das, Aaa, Aas, Aam, Aad,
        Salc, Arpl, Movsb, Movsw, Movsd, Movsq, Stosb, Stosw, Stosd, Stosq, Lodsb, Lodsw, Lodsd,
        Lodsq, Scasb, Scasw, Scasd, Scasq, Cmpsb, Cmpsw, Cmpsd, Cmpsq,
    ]
};

/// Whether `code` is a form of an integer instruction in code of size `bits` that runs in user mode
/// without leaving.
pub fn is_integer(code: Code, bits: u32) -> bool {
    let op = code.op_code();
    if !op.is_instruction()
        || match bits {
            64 => !op.mode64(),
            32 => !op.mode32(),
            // PUSHAD shows the upper half of the stack pointer, which is the host's.
            _ => !op.mode16() || code == Code::Pushad,
        }
    {
        return false;
    }
    let vector = code.cpuid_features().iter().any(|&f| {
        matches!(f, CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 | CpuidFeature::KNC)
    });
    if vector && code.mnemonic() != Mnemonic::Movnti {
        return false;
    }
    // On the oldest 80486 only, and test registers until then.
    let name = format!("{code:?}");
    if name.starts_with("Cmpxchg486") || name.ends_with("_tr") || name.starts_with("Mov_tr") {
        return false;
    }
    if !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return false;
    }
    let system = |k| {
        use OpCodeOperandKind::*;
        matches!(k, seg_reg | cr_reg | dr_reg | es | cs | ss | ds | fs | gs)
    };
    if (0..op.op_count()).any(|i| system(op.op_kind(i))) {
        return false;
    }
    let name = format!("{:?}", code.mnemonic());
    let conditional = name.starts_with("Set") || name.starts_with("Cmov");
    INTEGER.contains(&code.mnemonic())
        || conditional && code.condition_code() != iced_x86::ConditionCode::None
}
