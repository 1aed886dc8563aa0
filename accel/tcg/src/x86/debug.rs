//! Debug registers and the #DB exceptions they cause (SDM vol. 3 §18.2, §18.3).

use super::bits::{cr4, dr6, dr7, rflags};
use super::cr::privileged;
use super::exception::{Exception, vector};
use super::{Cpu, Env};

fn debug(bits: u64) -> Exception {
    Exception { dr6: bits, ..Exception::plain(vector::DB) }
}

/// Checks a MOV of DR `n` and gives the register it really means.
fn select(cpu: &Cpu, n: u64) -> Result<u64, Exception> {
    let n = match n {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(Exception::UD),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(Exception::UD),
    };
    privileged(cpu)?;
    if cpu.dr7 & dr7::GD != 0 { Err(debug(dr6::BD)) } else { Ok(n) }
}

/// MOV from DR `n`.
///
/// # Errors
/// #UD for DR4 and DR5 with CR4.DE, #GP(0) above CPL 0, #DB with DR7.GD.
pub fn read(env: &Env, n: u64) -> Result<u64, Exception> {
    let cpu = &env.cpu;
    Ok(match select(cpu, n)? {
        6 => cpu.dr6 & dr6::ALL | dr6::FIXED,
        7 => cpu.dr7 | dr7::FIXED,
        n => cpu.dr[(n & 3) as usize],
    })
}

/// MOV to DR `n`.
///
/// # Errors
/// As [`read`], and #GP(0) if the upper half of DR6 or DR7 is not zero.
pub fn write(env: &mut Env, n: u64, v: u64) -> Result<(), Exception> {
    let n = select(&env.cpu, n)?;
    if n >= 6 && v >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    let cpu = &mut env.cpu;
    match n {
        6 => cpu.dr6 = v & dr6::ALL,
        7 => cpu.dr7 = v & dr7::ALL | dr7::FIXED,
        n => cpu.dr[(n & 3) as usize] = v,
    }
    env.update_mode();
    Ok(())
}

/// The trap after an instruction that ran with TF set.
pub fn single_step() -> Exception {
    debug(dr6::BS)
}

/// Instruction breakpoints at linear address `addr`, before the instruction there: `None` if none
/// matches. RFLAGS.RF holds them back for one instruction.
pub fn instruction_breakpoint(cpu: &mut Cpu, addr: u64) -> Option<Exception> {
    if cpu.eflags & rflags::RF != 0 {
        cpu.eflags &= !rflags::RF;
        return None;
    }
    let mut hit = 0;
    let mut enabled = false;
    for i in 0..4 {
        // R/W 00: instruction execution.
        if cpu.dr[i] == addr && cpu.dr7 >> (16 + 4 * i) & 3 == 0 {
            hit |= 1 << i;
            enabled |= cpu.dr7 >> (2 * i) & 3 != 0;
        }
    }
    enabled.then(|| debug(hit))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    #[test]
    fn reserved_bits_and_aliases() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 7, 0xffff_ffff & !dr7::GD).unwrap();
        assert_eq!(read(env, 7), Ok(0xffff_07ff));
        write(env, 4, 0xffff_ffff).unwrap();
        assert_eq!(read(env, 6), Ok(0xffff_eff0 | 0xf));
        assert_eq!(write(env, 6, 1 << 32), Err(Exception::gp(0)));
        env.cpu.cr4 |= cr4::DE;
        assert_eq!(read(env, 5), Err(Exception::UD));
        b.protected(3);
        assert_eq!(read(b.env(), 0), Err(Exception::gp(0)));
    }

    // SDM vol. 3 §18.2.4.
    #[test]
    fn general_detect() {
        let mut b = Bench::new();
        b.protected(0);
        write(b.env(), 7, dr7::GD).unwrap();
        let e = read(b.env(), 0).unwrap_err();
        assert_eq!((e.vector, e.dr6), (vector::DB, dr6::BD));
    }

    #[test]
    fn instruction_breakpoints() {
        let mut b = Bench::new();
        b.protected(0);
        let env = b.env();
        write(env, 0, 0x7000).unwrap();
        write(env, 2, 0x7000).unwrap();
        write(env, 1, 0x7000).unwrap();
        // DR0 enabled for execution, DR1 watches writes, DR2 matches but is off.
        write(env, 7, 0x0010_0005 & !4 | 4).unwrap();
        let e = instruction_breakpoint(&mut env.cpu, 0x7000).unwrap();
        assert_eq!(e.dr6, 0b101);
        env.cpu.eflags |= rflags::RF;
        assert_eq!(instruction_breakpoint(&mut env.cpu, 0x7000), None);
        assert_eq!(env.cpu.eflags & rflags::RF, 0);
        assert_eq!(instruction_breakpoint(&mut env.cpu, 0x7001), None);
    }
}
