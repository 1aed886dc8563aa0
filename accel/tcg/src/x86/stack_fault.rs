//! Which exception an address raises that is not canonical, or beyond a flat segment: #SS(0) through
//! the stack segment, #GP(0) through any other (SDM vol. 3 §6.15).
//!
//! Generated code and the walk of the page tables know addresses only, and their #GP carries it. What
//! segment it was formed in is found when the exception is about to be delivered, by a look at the
//! instruction: where segments matter for nothing else, no access pays for this.

use super::Env;
use super::exception::{Exception, vector};
use super::mode::{MMU_KERNEL, MMU_USER, Mode};
use crate::tb::WRAP_RETRY;
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, Register};
use tandem_accel::x86::seg;

/// Longest instruction.
const LONGEST: usize = 15;

/// The exception to deliver for `e`, raised by the instruction at RIP; or [`WRAP_RETRY`] if it is none.
pub fn refine(env: &mut Env, e: Exception) -> Exception {
    let (vector::GP, Some(addr)) = (e.vector, e.addr) else { return e };
    let plain = Exception { addr: None, ..e };
    let mode = Mode::from_bits_retain(env.core.mode);
    let bits = match mode {
        m if m.contains(Mode::CODE64) => 64,
        m if m.contains(Mode::CODE32) => 32,
        _ => 16,
    };
    let rip = env.cpu.rip;
    let base = if bits == 64 { 0 } else { env.cpu.seg_base[seg::CS] };
    let mmu = if mode.cpl() == 3 { MMU_USER } else { MMU_KERNEL };
    let mut bytes = [0; LONGEST];
    let mut have = 0;
    for b in &mut bytes {
        match env.read_u8(base.wrapping_add(rip).wrapping_add(have as u64), mmu) {
            Ok(v) => *b = v,
            Err(_) => break,
        }
        have += 1;
    }
    let insn = Decoder::with_ip(bits, &bytes[..have], rip, DecoderOptions::NONE).decode();
    if bits != 64 && addr <= u64::from(u32::MAX) && through_based(env, &insn, addr) {
        return Exception::plain(WRAP_RETRY);
    }
    if through_stack(env, &insn, addr) {
        Exception::with_error(vector::SS, plain.error.unwrap_or(0))
    } else {
        plain
    }
}

/// Whether `insn` forms `addr`, from where its access runs over 4 GiB, in a segment that does not start
/// at 0: it goes on at 0 there.
fn through_based(env: &Env, insn: &Instruction, addr: u64) -> bool {
    let mut factory = InstructionInfoFactory::new();
    factory.info(insn).used_memory().iter().any(|m| {
        let base = match m.segment() {
            Register::FS => env.cpu.seg_base[seg::FS],
            Register::GS => env.cpu.seg_base[seg::GS],
            _ => 0,
        };
        let value = |r: Register, _: usize, _: usize| {
            let full = r.full_register();
            let whole = if full.is_gpr() { env.cpu.gpr[full.number() & 15] } else { 0 };
            let bits = 8 * r.size().min(8);
            Some(if bits < 64 { whole & ((1 << bits) - 1) } else { whole })
        };
        let offset = m.virtual_address(0, value).unwrap_or(0);
        let size = m.memory_size().size().max(1) as u64;
        let at = base.wrapping_add(offset) & u64::from(u32::MAX);
        base != 0 && addr.wrapping_sub(at) < size
    })
}

/// Whether `insn` forms `addr` in the stack segment.
fn through_stack(env: &Env, insn: &Instruction, addr: u64) -> bool {
    // The frames that it copies are not listed.
    if insn.mnemonic() == Mnemonic::Enter {
        return true;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    let value = |r: Register, _: usize, _: usize| {
        let full = r.full_register();
        if full.is_gpr() {
            let whole = env.cpu.gpr[full.number() & 15];
            Some(if r.size() == 4 { whole & u64::from(u32::MAX) } else { whole })
        } else {
            Some(0)
        }
    };
    // Of bit strings the offset is in another register, which is not listed either.
    let all = info.used_memory();
    if !all.is_empty() && all.iter().all(|m| m.segment() == Register::SS) {
        return true;
    }
    all.iter().any(|m| {
        let size = m.memory_size().size().max(1) as u64;
        // The address that failed may be that of the second page.
        m.segment() == Register::SS
            && m.virtual_address(0, value).is_some_and(|at| addr.wrapping_sub(at) < size)
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    /// What a fault at `addr` becomes under the instruction `code`.
    fn refined(code: &[u8], addr: u64, set: impl FnOnce(&mut Env)) -> u8 {
        let mut b = Bench::new();
        b.long(3);
        b.poke(0x7000, code);
        set(b.env());
        let e = Exception { addr: Some(addr), ..Exception::gp(0) };
        let e = refine(b.env(), e);
        assert_eq!((e.error, e.addr), (Some(0), None));
        e.vector
    }

    const FAR: u64 = 1 << 60;

    #[test]
    fn by_the_segment_of_the_access() {
        let rsp = |env: &mut Env| env.cpu.gpr[4] = FAR;
        let rbp = |env: &mut Env| env.cpu.gpr[5] = FAR;
        let rax = |env: &mut Env| env.cpu.gpr[0] = FAR;
        // push rcx; mov eax, [rsp+8]; mov eax, [rbp]; mov eax, [rax]; ret
        assert_eq!(refined(&[0x51], FAR - 8, rsp), vector::SS);
        assert_eq!(refined(&[0x8b, 0x44, 0x24, 0x08], FAR + 8, rsp), vector::SS);
        assert_eq!(refined(&[0x8b, 0x45, 0x00], FAR, rbp), vector::SS);
        assert_eq!(refined(&[0x8b, 0x00], FAR, rax), vector::GP);
        assert_eq!(refined(&[0xc3], FAR, rsp), vector::SS);
        // push [rax]: the load; push [rax]: the store.
        assert_eq!(refined(&[0xff, 0x30], FAR, rax), vector::GP);
        assert_eq!(refined(&[0xff, 0x30], FAR - 8, rsp), vector::SS);
        // mov eax, gs:[rbp]
        assert_eq!(refined(&[0x65, 0x8b, 0x45, 0x00], FAR, rbp), vector::GP);
        // bt [rsp], rax
        let bit = |env: &mut Env| (env.cpu.gpr[4], env.cpu.gpr[0]) = (0x8000, FAR << 3);
        assert_eq!(refined(&[0x48, 0x0f, 0xa3, 0x04, 0x24], FAR + 0x8000, bit), vector::SS);
        // enter 8, 2
        assert_eq!(refined(&[0xc8, 8, 0, 2], FAR - 8, rbp), vector::SS);
    }
}
