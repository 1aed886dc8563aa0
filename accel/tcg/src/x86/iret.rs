//! IRET in all modes (SDM vol. 2, IRET/IRETD/IRETQ).

use super::bits::{cr4, rflags};
use super::exception::{Exception, vector};
use super::far::{check_rip, finish_outer, return_segment, return_stack, return_to};
use super::interrupt;
use super::seg::{self as segment, rpl};
use super::stack::Stack;
use super::{Env, task};
use tandem_accel::x86::{gpr, seg};

/// The flags that IRET with 16-bit operands restores, before privilege is looked at.
const FLAGS16: u64 = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
/// What 32- and 64-bit operands restore besides.
const FLAGS32: u64 = rflags::RF | rflags::AC | rflags::ID;

/// IRET with operands of `size` bytes (2, 4 or 8).
pub fn iret(env: &mut Env, size: u8, next_rip: u64) -> Result<(), Exception> {
    let cpu = &env.cpu;
    if cpu.real_mode() {
        real(env, size)?;
    } else if cpu.vm86() {
        vm86(env, size)?;
    } else if cpu.eflags & rflags::NT != 0 {
        if cpu.long_mode() {
            return Err(Exception::gp(0));
        }
        if let Some(late) = task::back(env, next_rip)? {
            interrupt::deliver_late(env, late);
        }
    } else {
        protected(env, size)?;
    }
    env.cpu.nmi_masked = false;
    env.update_mode();
    env.interrupts_may_come();
    Ok(())
}

fn real(env: &mut Env, size: u8) -> Result<(), Exception> {
    let mut s = Stack::current(&env.cpu);
    let rip = s.pop(env, size)?;
    let selector = s.pop(env, size)? as u16;
    let flags = s.pop(env, size)?;
    let cs = segment::real_segment(&env.cpu, seg::CS, selector);
    check_rip(env, &cs, rip)?;
    let mut mask = FLAGS16 | rflags::IF | rflags::IOPL;
    if size > 2 {
        mask |= FLAGS32;
    }
    env.set_eflags(flags, mask);
    env.cpu.set_seg(seg::CS, cs);
    env.cpu.rip = rip;
    s.commit(&mut env.cpu);
    Ok(())
}

/// In V86 mode, staying there (SDM vol. 3 §21.2.7; with VME, §21.3.3).
fn vm86(env: &mut Env, size: u8) -> Result<(), Exception> {
    let iopl3 = env.cpu.eflags & rflags::IOPL == rflags::IOPL;
    let vme = env.cpu.cr4 & cr4::VME != 0;
    if !(iopl3 || (vme && size == 2)) {
        return Err(Exception::gp(0));
    }
    let mut s = Stack::current(&env.cpu);
    let rip = s.pop(env, size)?;
    let selector = s.pop(env, size)? as u16;
    let flags = s.pop(env, size)?;
    let cs = segment::real_segment(&env.cpu, seg::CS, selector);
    check_rip(env, &cs, rip)?;
    let (mut flags, mut mask) = (flags, FLAGS16);
    if iopl3 {
        mask |= rflags::IF;
    } else {
        let on = flags & rflags::IF != 0;
        if flags & rflags::TF != 0 || (on && env.cpu.eflags & rflags::VIP != 0) {
            return Err(Exception::gp(0));
        }
        flags = flags & !rflags::VIF | if on { rflags::VIF } else { 0 };
        mask |= rflags::VIF;
    }
    if size > 2 {
        mask |= FLAGS32;
    }
    env.set_eflags(flags, mask);
    env.cpu.set_seg(seg::CS, cs);
    env.cpu.rip = rip;
    s.commit(&mut env.cpu);
    Ok(())
}

fn protected(env: &mut Env, size: u8) -> Result<(), Exception> {
    let mut s = Stack::current(&env.cpu);
    let rip = s.pop(env, size)?;
    let selector = s.pop(env, size)? as u16;
    let flags = s.pop(env, size)?;
    let cpl = env.cpu.cpl();
    let iopl = (env.cpu.eflags >> 12 & 3) as u8;
    if size == 4 && cpl == 0 && flags & rflags::VM != 0 && !env.cpu.long_mode() {
        return to_vm86(env, s, rip, selector, flags);
    }
    let mut mask = FLAGS16;
    if size > 2 {
        mask |= FLAGS32;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
        if size > 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    if cpl <= iopl {
        mask |= rflags::IF;
    }
    let cs = return_segment(env, selector)?;
    check_rip(env, &cs, rip)?;
    let outer = rpl(selector) > cpl;
    if outer || env.cpu.code64() {
        let sp = s.pop(env, size)?;
        let ss = s.pop(env, size)? as u16;
        let ss = return_stack(env, ss, &cs)?;
        let to = return_to(&env.cpu, &cs, ss, sp, rip);
        env.set_eflags(flags, mask);
        finish_outer(env, to);
    } else {
        env.set_eflags(flags, mask);
        env.cpu.set_seg(seg::CS, cs);
        env.cpu.rip = rip;
        s.commit(&mut env.cpu);
    }
    Ok(())
}

/// From CPL 0 to V86 mode.
fn to_vm86(
    env: &mut Env,
    mut s: Stack,
    rip: u64,
    selector: u16,
    flags: u64,
) -> Result<(), Exception> {
    let esp = s.pop(env, 4)?;
    let mut selectors = [0u16; 6];
    for i in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
        selectors[i] = s.pop(env, 4)? as u16;
    }
    selectors[seg::CS] = selector;
    let rip = rip & 0xffff_ffff;
    if rip > 0xffff {
        return Err(Exception::with_error(vector::GP, 0));
    }
    env.set_eflags(flags, rflags::ALL);
    for (i, &selector) in selectors.iter().enumerate() {
        let s = segment::real_segment(&env.cpu, i, selector);
        env.cpu.set_seg(i, s);
    }
    env.cpu.gpr[gpr::RSP] = esp;
    env.cpu.rip = rip;
    Ok(())
}
