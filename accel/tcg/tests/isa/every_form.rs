//! Each form of each instruction by itself, on random operands.

use super::forms::{self, Want};
use super::machine::{self, End, Machine};
use super::memory::{Arena, DATA_LEN, data, set_data};
use super::native::{self, Regs, START};
use super::rng::Rng;
use iced_x86::{Code, Formatter, Instruction, Mnemonic, NasmFormatter, OpKind, RflagsBits};
use tandem_tcg::x86::mode::Mode;

/// The mode of a user program in 64-bit code.
pub const USER: Mode = Mode::CPL0
    .union(Mode::CPL1)
    .union(Mode::CODE64)
    .union(Mode::SS32)
    .union(Mode::PE)
    .union(Mode::LMA);

/// The mode of a 32-bit user program under a 64-bit kernel.
pub const USER32: Mode = Mode::CPL0
    .union(Mode::CPL1)
    .union(Mode::CODE32)
    .union(Mode::SS32)
    .union(Mode::PE)
    .union(Mode::LMA);

const REPEATS: usize = 24;

/// The mode of a 16-bit program with segments, under a 64-bit kernel.
pub const USER16: Mode =
    Mode::CPL0.union(Mode::CPL1).union(Mode::PE).union(Mode::LMA).union(Mode::SEGMENTED);

/// The flags image of iced's flag bits.
pub fn image(bits: u32) -> u64 {
    let map = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
        (RflagsBits::DF, 0x400),
    ];
    map.iter().filter(|(b, _)| bits & b != 0).fold(0, |m, (_, f)| m | f)
}

/// The flags image of what `insn` leaves undefined.
pub fn undefined_flags(insn: &Instruction) -> u64 {
    let known = image(insn.rflags_undefined());
    // OF is defined for rotations by a masked count of 1 (SDM vol. 2, RCL/RCR/ROL/ROR). A count of
    // the operand's width and carry rotates back to where it began, yet processors differ in OF.
    let counted = matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
        && insn.op1_kind() == OpKind::Immediate8
        && insn.immediate8() & 31 > 1;
    if counted { known | image(RflagsBits::OF) } else { known }
}

pub fn text(insn: &Instruction) -> String {
    let mut s = String::new();
    NasmFormatter::new().format(insn, &mut s);
    s
}

/// Whether the division `insn` raises #DE with these operands.
fn divides_badly(insn: &Instruction, regs: &Regs, data: &[u8]) -> bool {
    let signed = insn.mnemonic() == Mnemonic::Idiv;
    let (bits, divisor) = if insn.op0_kind() == OpKind::Memory {
        let part = |r: iced_x86::Register| match r {
            iced_x86::Register::None => 0,
            r => regs.gpr[r.full_register().number()],
        };
        let index = part(insn.memory_index()) * u64::from(insn.memory_index_scale());
        let at = part(insn.memory_base()) + index + insn.memory_displacement64();
        // Offsets from the data's start in 16-bit code.
        let at = at.checked_sub(super::memory::DATA).unwrap_or(at);
        let mut v = [0; 8];
        let n = insn.memory_size().size();
        v[..n].copy_from_slice(&data[at as usize..at as usize + n]);
        (8 * n as u32, u64::from_le_bytes(v))
    } else {
        let r = insn.op0_register();
        let v = regs.gpr[r.full_register().number()];
        let high = matches!(
            r,
            iced_x86::Register::AH
                | iced_x86::Register::CH
                | iced_x86::Register::DH
                | iced_x86::Register::BH
        );
        let v = if high { regs.gpr[r.number() & 3] >> 8 } else { v };
        (8 * r.size() as u32, v)
    };
    let mask = u64::MAX >> (64 - bits);
    let (lo, hi) = if bits == 8 {
        (regs.gpr[0] & 0xff, regs.gpr[0] >> 8 & 0xff)
    } else {
        (regs.gpr[0] & mask, regs.gpr[2] & mask)
    };
    let divisor = divisor & mask;
    if divisor == 0 {
        return true;
    }
    let n = u128::from(hi) << bits | u128::from(lo);
    if !signed {
        return n / u128::from(divisor) > u128::from(mask);
    }
    let up = 128 - 2 * bits;
    let n = (n << up) as i128 >> up;
    let d = (divisor << (64 - bits)) as i64 >> (64 - bits);
    match n.checked_div(i128::from(d)) {
        None => true,
        Some(q) => {
            let top = 1i128 << (bits - 1);
            q >= top || q < -top
        }
    }
}

/// Runs one case natively and on `m`; panics with everything one needs if they differ.
fn compare(
    m: &mut Machine,
    mode: Mode,
    insn: &Instruction,
    bytes: &[u8],
    regs: &Regs,
    memory: &[u8],
) {
    let bits = machine::code_bits(mode);
    let traps = matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        && divides_badly(insn, regs, memory);
    if std::env::var_os("ISA_TRACE").is_some() {
        eprintln!("{} {bytes:02x?} {regs:x?}", text(insn));
    }
    set_data(memory);
    let expect = if traps { *regs } else { native::run(bytes, regs, bits) };
    let expect_data = data();
    set_data(memory);
    let got = m.run(bytes, START, mode, regs);
    let end = if traps { End::Divide } else { End::Done };
    let mask = 0xcd5 & !undefined_flags(insn);
    let flags_ok = (got.regs.flags ^ expect.flags) & mask == 0;
    let got_data = data();
    let data_ok = got_data == expect_data;
    if got.end == end && got.regs.gpr == expect.gpr && flags_ok && data_ok {
        return;
    }
    let at = (0..DATA_LEN).find(|&i| got_data[i] != expect_data[i]);
    panic!(
        "{} ({bytes:02x?})\nregisters {regs:x?}\nexpected  {expect:x?} {end:?}\n\
         got       {got:x?}\nflags compared {mask:#x}; first different data byte {at:x?}\n{}",
        text(insn),
        m.listing()
    );
}

fn random_data(rng: &mut Rng) -> Vec<u8> {
    (0..DATA_LEN).map(|_| rng.bits() as u8).collect()
}

fn wants(code: Code, bits: u32) -> Vec<Want> {
    let mut all = Vec::new();
    let op = code.op_code();
    for memory in [false, true] {
        if memory != forms::has_memory(code) && (memory || !forms::has_register_form(code)) {
            continue;
        }
        all.push(Want { memory, lock: false, sequence: false, bits });
        if memory && op.can_use_lock_prefix() {
            all.push(Want { memory, lock: true, sequence: false, bits });
        }
    }
    all
}

fn every_form(m: &mut Machine, mode: Mode) -> usize {
    let bits = machine::code_bits(mode);
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    let mut rng = Rng::new(1);
    let mut forms = 0;
    for code in Code::values().filter(|&c| forms::is_integer(c, bits)) {
        if code.mnemonic() == Mnemonic::Arpl && !mode.contains(Mode::PE) {
            continue;
        }
        for want in wants(code, bits) {
            let mut seen = false;
            for round in 0..REPEATS {
                let Some(mut insn) = forms::build(code, want, &mut rng) else { break };
                let rep = code.op_code().can_use_rep_prefix() && insn.is_string_instruction();
                if rep && round % 3 == 1 {
                    insn.set_has_rep_prefix(true);
                } else if rep && round % 3 == 2 && code.op_code().can_use_repne_prefix() {
                    insn.set_has_repne_prefix(true);
                }
                let mut regs = if bits == 64 {
                    forms::registers(&mut rng)
                } else {
                    forms::registers32(&mut rng)
                };
                forms::settle(&mut insn, &mut regs, &mut rng);
                forms::narrow(&mut regs, bits);
                let Some(bytes) = forms::encode(&insn, START, bits) else { continue };
                let mut d = iced_x86::Decoder::with_ip(bits, &bytes, START, 0);
                let insn = d.decode();
                if insn.is_invalid() {
                    // Only on the oldest processors.
                    break;
                }
                let memory = random_data(&mut rng);
                compare(m, mode, &insn, &bytes, &regs, &memory);
                seen = true;
            }
            forms += usize::from(seen);
            if !seen {
                let insn = forms::build(code, want, &mut rng);
                let why = insn.map(|i| iced_x86::Encoder::new(bits).encode(&i, START));
                eprintln!("not tried: {code:?} {want:?}: {why:?}");
            }
        }
    }
    forms
}

#[test]
fn interpreter() {
    let n = every_form(&mut Machine::interp(false), USER);
    assert!(n > 400, "only {n} forms");
    eprintln!("{n} forms");
}

#[test]
fn interpreter_after_passes() {
    every_form(&mut Machine::interp(true), USER);
}

#[test]
fn jit() {
    every_form(&mut Machine::jit(false), USER);
}

#[test]
fn jit_after_passes() {
    every_form(&mut Machine::jit(true), USER);
}

#[test]
fn interpreter_32() {
    let n = every_form(&mut Machine::interp(false), USER32);
    eprintln!("{n} forms");
}

#[test]
fn jit_32() {
    every_form(&mut Machine::jit(true), USER32);
}

#[test]
fn interpreter_16() {
    every_form(&mut Machine::interp(false), USER16);
}

#[test]
fn jit_16() {
    every_form(&mut Machine::jit(true), USER16);
}

/// Real mode differs from the above in how limits are checked.
#[test]
fn jit_16_real() {
    every_form(&mut Machine::jit(true), Mode::SEGMENTED);
}

/// The same in real mode, whose limit checks are inline, with limits of 4 GiB.
#[test]
fn jit_32_real() {
    every_form(&mut Machine::jit(true), Mode::CODE32 | Mode::SS32 | Mode::SEGMENTED);
}

/// The same through the segment checks, with flat segments.
#[test]
fn jit_32_segmented() {
    every_form(&mut Machine::jit(true), USER32 | Mode::SEGMENTED);
}
