//! Which translate function is an instruction's.

use super::string::{Kind, string};
use super::{Translator, alu, bcd, bits, control, mov, muldiv, shift, simd, stack, system, x87};
use crate::exec::leave;
use crate::x86::bits::rflags::CF;
use crate::x86::helpers;
use iced_x86::{Instruction, Mnemonic, OpKind};
use tandem_jit::ir::{Cond, Inst, Op, PTR_READ, Val, Width};

/// Translates one instruction. `then` is where the block goes on after it, if it does.
pub(super) fn translate(t: &mut Translator, insn: &Instruction, then: Option<u64>) {
    let done = integer(t, insn)
        || control(t, insn, then)
        || other(t, insn)
        || system::simple(t, insn)
        || system::with_operands(t, insn)
        || simd::translate(t, insn)
        || x87::translate(t, insn);
    if !done {
        control::undefined(t, insn);
    }
}

/// Moves, arithmetic, logic, bits.
fn integer(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Mov | Movnti => mov::mov(t, insn),
        Movzx | Movsx | Movsxd => mov::extend(t, insn),
        Lea => mov::lea(t, insn),
        Add | Sub | Adc | Sbb | And | Or | Xor | Cmp | Test => alu::binary(t, insn),
        Inc | Dec => alu::inc_dec(t, insn),
        Neg | Not => alu::neg_not(t, insn),
        Push => stack::push(t, insn),
        Pop => stack::pop(t, insn),
        Shl | Sal | Shr | Sar => shift::shift(t, insn),
        Rol | Ror => shift::rotate(t, insn),
        Rcl | Rcr => shift::rotate_carry(t, insn),
        Shld | Shrd => shift::double(t, insn),
        Shlx | Shrx | Sarx | Rorx => shift::without_flags(t, insn),
        Imul | Mul => muldiv::mul(t, insn),
        Div | Idiv => muldiv::div(t, insn),
        Mulx => bits::mulx(t, insn),
        Xchg => mov::xchg(t, insn),
        Xadd => alu::xadd(t, insn),
        Cmpxchg => alu::cmpxchg(t, insn),
        Cmpxchg8b | Cmpxchg16b => mov::cmpxchg_wide(t, insn),
        Bswap => mov::bswap(t, insn),
        Movbe => mov::movbe(t, insn),
        Bt | Bts | Btr | Btc => bits::bit_test(t, insn),
        Bsf | Bsr => bits::scan(t, insn),
        Lzcnt | Tzcnt => bits::count_zeros(t, insn),
        Popcnt => bits::popcnt(t, insn),
        Andn => bits::andn(t, insn),
        Blsi | Blsr | Blsmsk => bits::lowest_bit(t, insn),
        Bextr | Bzhi if !is_xop(insn) => bits::extract(t, insn),
        Pdep | Pext => bits::deposit(t, insn),
        Adcx | Adox => bits::add_carry(t, insn),
        Crc32 => bits::crc32(t, insn),
        Cbw => mov::widen(t, Width::W8, Width::W16),
        Cwde => mov::widen(t, Width::W16, Width::W32),
        Cdqe => mov::widen(t, Width::W32, Width::W64),
        Cwd => mov::sign_to_dx(t, Width::W16),
        Cdq => mov::sign_to_dx(t, Width::W32),
        Cqo => mov::sign_to_dx(t, Width::W64),
        Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp
        | Setl | Setge | Setle | Setg => mov::setcc(t, insn),
        Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns
        | Cmovp | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => mov::cmov(t, insn),
        _ => return false,
    }
    true
}

/// AMD's abandoned encoding of BEXTR with an immediate.
fn is_xop(insn: &Instruction) -> bool {
    use iced_x86::Code::*;
    matches!(insn.code(), XOP_Bextr_r32_rm32_imm32 | XOP_Bextr_r64_rm64_imm32)
}

/// Control transfers.
fn control(t: &mut Translator, insn: &Instruction, then: Option<u64>) -> bool {
    use Mnemonic::*;
    let taken = then == Some(t.wrap(insn.near_branch_target()));
    match insn.mnemonic() {
        Jo | Jno | Jb | Jae | Je | Jne | Jbe | Ja | Js | Jns | Jp | Jnp | Jl | Jge | Jle | Jg => {
            control::jcc(t, insn, taken)
        }
        Jcxz | Jecxz | Jrcxz => control::jcxz(t, insn, taken),
        Loop | Loope | Loopne => control::r#loop(t, insn, taken),
        Jmp | Call if is_far(insn) => control::far(t, insn),
        Jmp => control::jmp(t, insn, then.is_some()),
        Call => control::call(t, insn),
        Ret => control::ret(t, insn),
        Retf => control::retf(t, insn),
        Iret | Iretd | Iretq => control::iret(t, insn),
        Int => control::int(t, insn.immediate8(), 0),
        Int3 => control::int(t, 3, 1),
        Int1 => control::int(t, 1, 3),
        Into => control::into(t),
        Bound => control::bound(t, insn),
        _ => return false,
    }
    true
}

fn is_far(insn: &Instruction) -> bool {
    use iced_x86::Code::*;
    matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || matches!(
            insn.code(),
            Jmp_m1616 | Jmp_m1632 | Jmp_m1664 | Call_m1616 | Call_m1632 | Call_m1664
        )
}

/// Strings, flags, stack frames, hints.
fn other(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        // Hints. RDSSP is one while shadow stacks are off.
        Pause if t.counts() => t.leave_next(leave::YIELD),
        Pause => {
            t.b.call_void(helpers::PAUSE, &[]);
        }
        Nop | Endbr64 | Endbr32 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2
        | Prefetchw | Prefetch | Prefetchwt1 | Reservednop | Cldemote | Prefetchit0
        | Prefetchit1 | Rdsspd | Rdsspq => {}
        Lfence | Serialize => {}
        Mfence | Sfence => t.b.push(Inst::new(Op::Fence, Width::W64)),
        // The line must be readable; nothing else happens.
        Clflush | Clflushopt | Clwb => {
            let addr = t.mem_addr(insn, 1, PTR_READ);
            t.b.ld(Width::W8, addr, 0);
        }
        Pusha | Pushad => stack::pusha(t, insn),
        Popa | Popad => stack::popa(t, insn),
        Pushf | Pushfd | Pushfq => stack::pushf(t, insn),
        Popf | Popfd | Popfq => stack::popf(t, insn),
        Enter => stack::enter(t, insn),
        Leave => stack::leave(t, insn),
        Movsb => string(t, insn, Kind::Movs, Width::W8),
        Movsw => string(t, insn, Kind::Movs, Width::W16),
        Movsd if insn.is_string_instruction() => string(t, insn, Kind::Movs, Width::W32),
        Movsq => string(t, insn, Kind::Movs, Width::W64),
        Stosb => string(t, insn, Kind::Stos, Width::W8),
        Stosw => string(t, insn, Kind::Stos, Width::W16),
        Stosd => string(t, insn, Kind::Stos, Width::W32),
        Stosq => string(t, insn, Kind::Stos, Width::W64),
        Lodsb => string(t, insn, Kind::Lods, Width::W8),
        Lodsw => string(t, insn, Kind::Lods, Width::W16),
        Lodsd => string(t, insn, Kind::Lods, Width::W32),
        Lodsq => string(t, insn, Kind::Lods, Width::W64),
        Scasb => string(t, insn, Kind::Scas, Width::W8),
        Scasw => string(t, insn, Kind::Scas, Width::W16),
        Scasd => string(t, insn, Kind::Scas, Width::W32),
        Scasq => string(t, insn, Kind::Scas, Width::W64),
        Cmpsb => string(t, insn, Kind::Cmps, Width::W8),
        Cmpsw => string(t, insn, Kind::Cmps, Width::W16),
        Cmpsd if insn.is_string_instruction() => string(t, insn, Kind::Cmps, Width::W32),
        Cmpsq => string(t, insn, Kind::Cmps, Width::W64),
        Insb => string(t, insn, Kind::Ins, Width::W8),
        Insw => string(t, insn, Kind::Ins, Width::W16),
        Insd => string(t, insn, Kind::Ins, Width::W32),
        Outsb => string(t, insn, Kind::Outs, Width::W8),
        Outsw => string(t, insn, Kind::Outs, Width::W16),
        Outsd => string(t, insn, Kind::Outs, Width::W32),
        Clc => carry(t, Some(false)),
        Stc => carry(t, Some(true)),
        Cmc => carry(t, None),
        Cld => system::direction(t, false),
        Std => system::direction(t, true),
        Lahf => mov::lahf(t),
        Sahf => mov::sahf(t),
        Salc => mov::salc(t),
        Xlatb => mov::xlat(t, insn),
        Daa | Das | Aaa | Aas => bcd::adjust(t, insn),
        Aam => bcd::aam(t, insn),
        Aad => bcd::aad(t, insn),
        _ => return false,
    }
    true
}

/// CLC, STC, and CMC (none).
fn carry(t: &mut Translator, set: Option<bool>) {
    let cf = match set {
        Some(on) => t.b.iconst(on.into()),
        None => {
            let fl = t.flags(CF);
            t.b.setcc(Cond::Ae, fl)
        }
    };
    // 0 - x borrows unless x is 0.
    let fl = t.b.flags_of(Op::Neg, Width::W32, [cf, Val::NONE, Val::NONE, Val::NONE]);
    t.override_flags(fl, CF);
}
