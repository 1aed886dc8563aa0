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
