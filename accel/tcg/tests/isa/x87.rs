//! Each form of each x87 instruction by itself, on random register stacks, tags, control words
//! (exceptions unmasked too) and operands; the whole unit is compared in the form FXSAVE gives it,
//! apart from the instruction and data pointers.

use super::every_form::{USER, text};
use super::machine::{End, Machine};
use super::memory::{Arena, CODE, CONTEXT, DATA, DATA_LEN, STACK, data, peek, poke, set_data};
use super::native::{Regs, START};
use super::rng::Rng;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction, MemoryOperand, Mnemonic,
    OpCodeOperandKind, OpKind, Register,
};
use tandem_tcg::x86::x87;

const REPEATS: usize = 60;
const BASE: u64 = DATA + 0x1000;

/// What FXSAVE stores of the unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    /// Control word.
    pub cw: u16,
    /// Status word.
    pub sw: u16,
    /// Bit n set: physical register n is in use.
    pub tags: u8,
    /// ST(0)–ST(7).
    pub st: [[u8; 10]; 8],
}

const GPR_IN: u64 = 0;
const FLAGS: u64 = 0x80;
const HOST_SP: u64 = 0x88;
const GPR_OUT: u64 = 0x100;
const AREA: u64 = 0x400;

fn assemble(insns: &[Instruction], at: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for i in insns {
        let mut e = Encoder::new(64);
        e.encode(i, at + out.len() as u64).expect("encodes");
        out.extend(e.take_buffer());
    }
    out
}

fn slot(at: u64) -> MemoryOperand {
    MemoryOperand::with_displ(CONTEXT + at, 8)
}

fn native(code: &[u8], regs: &Regs, unit: &mut Unit) -> Regs {
    let valid = |r: Result<Instruction, _>| -> Instruction {
        r.map_err(|e: iced_x86::IcedError| e.to_string()).expect("a valid instruction")
    };
    let gpr = |n: usize| Register::RAX + n as u32;
    let saved = [3, 5, 12, 13, 14, 15].map(gpr);
    let mut pre: Vec<_> =
        saved.iter().map(|&r| valid(Instruction::with1(Code::Push_r64, r))).collect();
    pre.push(valid(Instruction::with2(Code::Mov_rm64_r64, slot(HOST_SP), Register::RSP)));
    pre.push(valid(Instruction::with1(Code::Fxrstor_m512byte, slot(AREA))));
    pre.push(valid(Instruction::with1(Code::Push_rm64, slot(FLAGS))));
    pre.push(Instruction::with(Code::Popfq));
    for n in 0..16 {
        pre.push(valid(Instruction::with2(
            Code::Mov_r64_rm64,
            gpr(n),
            slot(GPR_IN + 8 * n as u64),
        )));
    }
    let entry = CODE + 0x800;
    pre.push(valid(Instruction::with_branch(Code::Jmp_rel32_64, START)));
    poke(entry, &assemble(&pre, entry));
    poke(START, code);
    let mut post = Vec::new();
    for n in 0..16 {
        post.push(valid(Instruction::with2(
            Code::Mov_rm64_r64,
            slot(GPR_OUT + 8 * n as u64),
            gpr(n),
        )));
    }
    post.push(valid(Instruction::with2(Code::Mov_r64_rm64, Register::RSP, slot(HOST_SP))));
    post.push(Instruction::with(Code::Pushfq));
    post.push(valid(Instruction::with1(Code::Pop_rm64, slot(FLAGS))));
    // Neither waits for a pending exception.
    post.push(valid(Instruction::with1(Code::Fxsave_m512byte, slot(AREA))));
    post.push(Instruction::with(Code::Fninit));
    post.extend(saved.iter().rev().map(|&r| valid(Instruction::with1(Code::Pop_r64, r))));
    post.push(Instruction::with(Code::Retnq));
    poke(START + code.len() as u64, &assemble(&post, START + code.len() as u64));

    for (i, v) in regs.gpr.iter().enumerate() {
        poke(CONTEXT + GPR_IN + 8 * i as u64, &v.to_le_bytes());
    }
    poke(CONTEXT + FLAGS, &(regs.flags | 0x202).to_le_bytes());
    let mut area = [0u8; 512];
    area[0..2].copy_from_slice(&unit.cw.to_le_bytes());
    area[2..4].copy_from_slice(&unit.sw.to_le_bytes());
    area[4] = unit.tags;
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for (i, st) in unit.st.iter().enumerate() {
        area[32 + 16 * i..][..10].copy_from_slice(st);
    }
    poke(CONTEXT + AREA, &area);
    // SAFETY: as in `native::run`: what the ABI wants kept is kept, FNINIT leaves the unit as the
    // host wants it, and the code between is one instruction.
    unsafe {
        let f: extern "C" fn() = std::mem::transmute(entry as *const ());
        f();
    }
    for i in 0..64 {
        area[8 * i..][..8].copy_from_slice(&peek(CONTEXT + AREA + 8 * i as u64).to_le_bytes());
    }
    unit.cw = u16::from_le_bytes([area[0], area[1]]);
    unit.sw = u16::from_le_bytes([area[2], area[3]]);
    unit.tags = area[4];
    for (i, st) in unit.st.iter_mut().enumerate() {
        st.copy_from_slice(&area[32 + 16 * i..][..10]);
    }
    let mut out = Regs { flags: peek(CONTEXT + FLAGS), ..Regs::default() };
    for n in 0..16 {
        out.gpr[n] = peek(CONTEXT + GPR_OUT + 8 * n as u64);
    }
    out
}

fn put(m: &mut Machine, u: &Unit) {
    let c = &mut m.env().cpu;
    c.fcw = u.cw;
    x87::set_status(c, u.sw);
    c.ftag_empty = !u.tags;
    for (i, st) in u.st.iter().enumerate() {
        let p = x87::physical(c, i);
        c.fpr[p] = [0; 16];
        c.fpr[p][..10].copy_from_slice(st);
    }
}

fn get(m: &mut Machine) -> Unit {
    let c = &m.env().cpu;
    let mut u = Unit { cw: c.fcw, sw: x87::status(c), tags: !c.ftag_empty, st: [[0; 10]; 8] };
    for (i, st) in u.st.iter_mut().enumerate() {
        st.copy_from_slice(&c.fpr[x87::physical(c, i)][..10]);
    }
    u
}

pub fn is_x87(code: Code) -> bool {
    let op = code.op_code();
    let fpu = code
        .cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
        || matches!(
            code.mnemonic(),
            Mnemonic::Fisttp
                | Mnemonic::Fcomi
                | Mnemonic::Fcomip
                | Mnemonic::Fucomi
                | Mnemonic::Fucomip
        )
        || format!("{:?}", code.mnemonic()).starts_with("Fcmov");
    op.is_instruction() && op.mode64() && fpu && !op.fwait() && code.mnemonic() != Mnemonic::Wait
}

pub fn build(code: Code, rng: &mut Rng) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let op = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    for i in 0..op.op_count() {
        match op.op_kind(i) {
            K::st0 => {
                insn.set_op_kind(i, OpKind::Register);
                insn.set_op_register(i, Register::ST0);
            }
            K::sti_opcode => {
                insn.set_op_kind(i, OpKind::Register);
                insn.set_op_register(i, Register::ST0 + rng.below(8) as u32);
            }
            K::ax => {
                insn.set_op_kind(i, OpKind::Register);
                insn.set_op_register(i, Register::AX);
            }
            K::mem => {
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(Register::RBX);
                insn.set_memory_displ_size(8);
                let edge = if rng.one_in(6) { 0xff8 } else { rng.below(0x800) };
                insn.set_memory_displacement64(edge);
            }
            _ => return None,
        }
    }
    Some(insn)
}

/// An 80-bit number of any class, often one that meets others of its kind.
pub fn number(rng: &mut Rng) -> [u8; 10] {
    let sign = (rng.below(2) as u16) << 15;
    let (sig, exp) = match rng.below(14) {
        0 => (0, 0),
        1 => (1 << 63, 0x7fff),
        2 => (1 << 63 | 1 << 62 | rng.bits() >> 3, 0x7fff),
        3 => (1 << 63 | 1 | rng.bits() >> 3, 0x7fff),
        4 => (rng.bits() >> 1 | 1, 0),
        5 => (rng.bits() | 1 << 63, 0),
        // An encoding that the unit does not support.
        6 => (rng.bits() >> 1, 0x4000),
        // The ends of the range.
        7 => (rng.bits() | 1 << 63, 0x7ffe),
        8 => (rng.bits() | 1 << 63, 1),
        // Integers and near-integers.
        9 => (1 << 63 | rng.below(16) << 60, 0x3fff + rng.below(8) as u16),
        10 => (rng.bits() | 1 << 63, 0x3fff + rng.below(70) as u16),
        11 => (rng.bits() | 1 << 63, 0x3f80 + rng.below(0xff) as u16),
        _ => (rng.bits() | 1 << 63, 0x3ff0 + rng.below(0x20) as u16),
    };
    let mut r = [0; 10];
    r[..8].copy_from_slice(&sig.to_le_bytes());
    r[8..].copy_from_slice(&(exp | sign).to_le_bytes());
    r
}

pub fn unit(rng: &mut Rng) -> Unit {
    let mut cw = 0x37f;
    if rng.one_in(2) {
        cw = 0x40 | (rng.bits() as u16 & 0xf3f);
        // Precision control 01 is reserved.
        if cw >> 8 & 3 == 1 {
            cw |= 0x300;
        }
    }
    if rng.one_in(2) {
        cw |= 0x3f;
    }
    // Old exceptions only where they are masked: a pending one would be delivered.
    let old = rng.bits() as u16 & cw & 0x3f;
    let sw = (rng.bits() as u16 & 0x7f00) | if rng.one_in(2) { old } else { 0 };
    let tags = match rng.below(3) {
        0 => 0xff,
        1 => rng.bits() as u8,
        _ => rng.bits() as u8 | rng.bits() as u8,
    };
    Unit { cw, sw, tags, st: std::array::from_fn(|_| number(rng)) }
}

/// Bits of the status word that the instruction leaves undefined.
fn undefined_status(m: Mnemonic) -> u16 {
    use Mnemonic as M;
    const C0_C2_C3: u16 = 0x4500;
    match m {
        // Everything is defined, or the host of this test and the translator's host are one.
        M::Fxam | M::Ftst | M::Fcom | M::Fcomp | M::Fcompp | M::Ficom | M::Ficomp => 0,
        M::Fucom | M::Fucomp | M::Fucompp | M::Fprem | M::Fprem1 => 0,
        M::Fsin | M::Fcos | M::Fptan | M::Fsincos => 0x4100,
        _ => C0_C2_C3,
    }
}

/// Where FNSTENV and FNSAVE store pointers: the operand's place in the data, and the bytes in it.
fn pointers(insn: &Instruction) -> Option<(usize, usize, usize)> {
    use Mnemonic as M;
    if !matches!(insn.mnemonic(), M::Fnstenv | M::Fnsave) {
        return None;
    }
    let at = (BASE - DATA + insn.memory_displacement64()) as usize;
    let small = matches!(insn.memory_size().size(), 14 | 94);
    Some(if small { (at, 6, 14) } else { (at, 12, 28) })
}

fn compare(m: &mut Machine, insn: &Instruction, bytes: &[u8], regs: &Regs, u: &Unit, mem: &[u8]) {
    if std::env::var_os("ISA_TRACE").is_some() {
        eprintln!("{} {bytes:02x?}", text(insn));
    }
    set_data(mem);
    let mut want_u = *u;
    let want = native(bytes, regs, &mut want_u);
    let want_data = data();
    set_data(mem);
    put(m, u);
    let got = m.run(bytes, START, USER, regs);
    let mut got_u = get(m);
    let ignore = undefined_status(insn.mnemonic());
    got_u.sw = got_u.sw & !ignore | want_u.sw & ignore;
    let flags_ok = (got.regs.flags ^ want.flags) & 0x8d5 == 0;
    let blank = |mut d: Vec<u8>| {
        // Instruction and data pointer, opcode: nobody promises them.
        if let Some((at, from, to)) = pointers(insn) {
            d[at + from..at + to].fill(0);
        }
        d
    };
    let (got_data, want_data) = (blank(data()), blank(want_data));
    let data_ok = got_data == want_data;
    if got.end == End::Done && got.regs.gpr == want.gpr && flags_ok && data_ok && got_u == want_u {
        return;
    }
    let at = (0..DATA_LEN).find(|&i| got_data[i] != want_data[i]);
    let mut diff = String::new();
    for i in 0..8 {
        diff += &format!(
            "st{i} {:02x?} expected {:02x?} got {:02x?}{}\n",
            u.st[i],
            want_u.st[i],
            got_u.st[i],
            if want_u.st[i] == got_u.st[i] { "" } else { " <--" }
        );
    }
    panic!(
        "{} {:?}\nbefore   cw {:#x} sw {:#x} tags {:#x}\nexpected cw {:#x} sw {:#x} tags {:#x} flags {:#x}\n\
         got      cw {:#x} sw {:#x} tags {:#x} flags {:#x} {:?}\n{diff}first different data byte {at:x?}\n{}",
        text(insn),
        insn.code(),
        u.cw,
        u.sw,
        u.tags,
        want_u.cw,
        want_u.sw,
        want_u.tags,
        want.flags,
        got_u.cw,
        got_u.sw,
        got_u.tags,
        got.regs.flags,
        got.end,
        m.listing()
    );
}

fn every_form(m: &mut Machine) -> usize {
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    let mut rng = Rng::new(3);
    let mut forms = 0;
    for code in Code::values().filter(|&c| is_x87(c)) {
        let mut seen = false;
        for _ in 0..REPEATS {
            let Some(insn) = build(code, &mut rng) else { break };
            let mut e = Encoder::new(64);
            if e.encode(&insn, START).is_err() {
                continue;
            }
            let bytes = e.take_buffer();
            let insn = Decoder::with_ip(64, &bytes, START, DecoderOptions::NONE).decode();
            if insn.code() != code {
                continue;
            }
            let mut regs =
                Regs { gpr: std::array::from_fn(|_| rng.value()), flags: rng.bits() & 0x8d5 };
            regs.gpr[3] = BASE;
            regs.gpr[4] = STACK;
            let mut mem = vec![0; DATA_LEN];
            for chunk in mem.chunks_mut(16) {
                let n = match rng.below(5) {
                    0 => rng.value().to_le_bytes().to_vec(),
                    1 => f64::from(rng.bits() as i32 >> 8).to_bits().to_le_bytes().to_vec(),
                    2 => [f32::NAN, 1.5, -0.0, 3e38, 1e-42, f32::INFINITY][rng.below(6) as usize]
                        .to_bits()
                        .to_le_bytes()
                        .repeat(2),
                    // Packed decimal digits.
                    3 => (0..10).map(|_| (rng.below(10) | rng.below(10) << 4) as u8).collect(),
                    _ => number(&mut rng).to_vec(),
                };
                chunk[..n.len().min(16)].copy_from_slice(&n);
            }
            let u = unit(&mut rng);
            compare(m, &insn, &bytes, &regs, &u, &mem);
            seen = true;
        }
        forms += usize::from(seen);
        if !seen {
            eprintln!("not tried: {code:?}");
        }
    }
    forms
}

#[test]
fn interpreter() {
    let n = every_form(&mut Machine::interp(false));
    assert!(n > 120, "only {n} forms");
    eprintln!("{n} forms");
}

#[test]
fn jit_after_passes() {
    every_form(&mut Machine::jit(true));
}
