//! Random straight-line code with short jumps: flags that live from one instruction to another,
//! values kept in registers across writes, blocks that join.

use super::every_form::{USER, image, text, undefined_flags};
use super::forms::{self, BASE, Want};
use super::machine::{End, Machine};
use super::memory::{Arena, DATA_LEN, data, set_data};
use super::native::{self, START};
use super::rng::Rng;
use iced_x86::{Code, Decoder, Instruction, Mnemonic, OpKind};

/// Forms that may stand in a sequence.
fn pool() -> Vec<Code> {
    use Mnemonic::*;
    Code::values()
        .filter(|&c| forms::is_integer(c, 64))
        .filter(|c| {
            !matches!(
                c.mnemonic(),
                Div | Idiv
                    | Leave
                    | Bt
                    | Bts
                    | Btr
                    | Btc
                    | Movsb
                    | Movsw
                    | Movsd
                    | Movsq
                    | Stosb
                    | Stosw
                    | Stosd
                    | Stosq
                    | Cmpxchg16b
            ) || matches!(
                c,
                Code::Bt_rm32_imm8
                    | Code::Bts_rm64_imm8
                    | Code::Btr_rm16_imm8
                    | Code::Btc_rm32_imm8
                    | Code::Movsb_m8_m8
                    | Code::Stosd_m32_EAX
                    | Code::Cmpxchg16b_m128
            )
        })
        // A count above 16 in CL makes these undefined.
        .filter(|c| {
            !matches!(c, Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL)
                && !matches!(c, Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8)
        })
        .collect()
}

/// Instructions common in real code, to make their combinations likely.
pub const COMMON: [Code; 24] = [
    Code::Add_r32_rm32,
    Code::Add_rm64_r64,
    Code::Sub_r64_rm64,
    Code::Cmp_rm32_r32,
    Code::Cmp_rm8_imm8,
    Code::Test_rm32_r32,
    Code::And_r32_rm32,
    Code::Xor_r32_rm32,
    Code::Inc_rm32,
    Code::Dec_rm64,
    Code::Inc_rm8,
    Code::Adc_rm32_r32,
    Code::Sbb_rm64_r64,
    Code::Shl_rm32_CL,
    Code::Shr_rm64_imm8,
    Code::Rol_rm32_imm8,
    Code::Ror_rm16_CL,
    Code::Bt_rm32_imm8,
    Code::Rcl_rm32_1,
    Code::Mov_r32_rm32,
    Code::Mov_r64_rm64,
    Code::Lea_r64_m,
    Code::Imul_r32_rm32,
    Code::Stc,
];

/// An address with nothing behind it.
const NOWHERE: u64 = 0x3000_0000;
/// mov eax, [NOWHERE]
const FAULTING: [u8; 7] = [0x8b, 0x04, 0x25, 0, 0, 0, 0x30];

/// A program, and which flags are defined after it.
struct Program {
    bytes: Vec<u8>,
    undefined: u64,
}

/// Flags after `insn` whose value is architecturally undefined, given those before it; `None` if it
/// reads one of them.
fn undefined_after(insn: &Instruction, before: u64) -> Option<u64> {
    if image(insn.rflags_read()) & before != 0 {
        return None;
    }
    let undefined = undefined_flags(insn);
    let defined = image(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
    let counted = (0..insn.op_count()).any(|i| insn.op_register(i) == iced_x86::Register::CL)
        || insn.op_kind(insn.op_count().saturating_sub(1)) == OpKind::Immediate8;
    // A count of 0 leaves all flags as they are.
    let keeps = matches!(
        insn.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Shld
            | Mnemonic::Shrd
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
    );
    Some(if keeps && counted { before | undefined } else { before & !defined | undefined })
}

fn program(rng: &mut Rng, pool: &[Code], length: usize) -> Program {
    let mut p = Program { bytes: Vec::new(), undefined: 0 };
    let mut done = 0;
    while done < length {
        let code = if rng.one_in(2) { rng.pick(&COMMON) } else { rng.pick(pool) };
        let memory = forms::has_memory(code) && (rng.one_in(3) || !forms::has_register_form(code));
        let lock = memory && code.op_code().can_use_lock_prefix() && rng.one_in(3);
        let want = Want { memory, lock, sequence: true, bits: 64 };
        let Some(insn) = forms::build(code, want, rng) else { continue };
        let at = START + p.bytes.len() as u64;
        let Some(bytes) = forms::encode(&insn, at, 64) else { continue };
        let insn = Decoder::with_ip(64, &bytes, at, 0).decode();
        let Some(mut after) = undefined_after(&insn, p.undefined) else { continue };
        if rng.one_in(6) && bytes.len() < 100 {
            // Jump over it on some condition whose flags are defined.
            let cc = rng.below(16) as u8;
            let jump = [0x70 | cc, bytes.len() as u8];
            let jcc = Decoder::with_ip(64, &jump, at, 0).decode();
            if image(jcc.rflags_read()) & p.undefined == 0 {
                let moved = forms::encode(&insn, at + 2, 64);
                if moved.as_ref() == Some(&bytes) {
                    p.bytes.extend(jump);
                    after |= p.undefined;
                }
            }
        }
        p.bytes.extend(&bytes);
        p.undefined = after;
        done += 1;
    }
    p
}

fn listing(bytes: &[u8]) -> String {
    Decoder::with_ip(64, bytes, START, 0)
        .iter()
        .map(|i| format!("{:#x} {}\n", i.ip(), text(&i)))
        .collect()
}

fn run(mut m: Machine, rounds: usize) {
    let guard = Arena::lock();
    let pool = pool();
    let rounds = std::env::var("ISA_ROUNDS").ok().and_then(|v| v.parse().ok()).unwrap_or(rounds);
    let seed = std::env::var("ISA_SEED").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    let mut rng = Rng::new(seed);
    for round in 0..rounds {
        let length = 1 + rng.below(14) as usize;
        let p = program(&mut rng, &pool, length);
        if std::env::var_os("ISA_TRACE").is_some() {
            eprintln!("round {round}\n{}", listing(&p.bytes));
        }
        let mut regs = forms::registers(&mut rng);
        regs.gpr[3] = BASE;
        let memory: Vec<u8> = (0..DATA_LEN).map(|_| rng.bits() as u8).collect();
        set_data(&memory);
        let expect = native::run(&p.bytes, &regs, 64);
        let expect_data = data();
        set_data(&memory);
        // Half of the programs end in a fault, which must show the same state.
        let mut bytes = p.bytes.clone();
        let faults = rng.one_in(2);
        if faults {
            bytes.extend(FAULTING);
        }
        let got = m.run(&bytes, START, USER, &regs);
        let ended = match got.end {
            End::Fault(e) => {
                faults && e.addr == Some(NOWHERE) && got.rip == START + p.bytes.len() as u64
            }
            end => !faults && end == End::Done,
        };
        let got_data = data();
        let mask = 0xcd5 & !p.undefined;
        let same = ended
            && got.regs.gpr == expect.gpr
            && (got.regs.flags ^ expect.flags) & mask == 0
            && got_data == expect_data;
        let at = (0..DATA_LEN).find(|&i| got_data[i] != expect_data[i]);
        assert!(
            same,
            "round {round}, seed {seed}\n{}{:02x?}\nregisters {regs:x?}\nexpected  {expect:x?}\n\
             got       {got:x?}\nflags compared {mask:#x}; first different data byte {at:x?}\n{}",
            listing(&p.bytes),
            p.bytes,
            m.listing()
        );
    }
    drop(guard);
}

#[test]
fn interpreter() {
    run(Machine::interp(false), 4000);
}

#[test]
fn interpreter_after_passes() {
    run(Machine::interp(true), 4000);
}

#[test]
fn jit() {
    run(Machine::jit(false), 4000);
}

#[test]
fn jit_after_passes() {
    run(Machine::jit(true), 4000);
}
