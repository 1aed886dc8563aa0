//! SYSCALL, SYSRET, SYSENTER and SYSEXIT, and SWAPGS (SDM vol. 2; APM vol. 3 where AMD differs).

use super::bits::{efer, rflags};
use super::exception::Exception;
use super::seg::{flat_code, flat_data};
use super::{Cpu, Env};
use tandem_accel::x86::{gpr, seg};

/// RFLAGS bits that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = rflags::ARITH
    | rflags::TF
    | rflags::IF
    | rflags::DF
    | rflags::IOPL
    | rflags::NT
    | rflags::AC
    | rflags::VIF
    | rflags::VIP
    | rflags::ID;

fn enter(cpu: &mut Cpu, cs: u16, long: bool) {
    cpu.set_seg(seg::CS, flat_code(cs & !3, 0, long));
    cpu.set_seg(seg::SS, flat_data((cs & !3).wrapping_add(8), 0));
}

/// SYSCALL. AMD processors know it outside 64-bit mode too.
pub fn syscall(env: &mut Env, next_rip: u64) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let code64 = cpu.code64();
    if cpu.efer & efer::SCE == 0 || (!code64 && !cpu.feat.amd) || cpu.real_mode() {
        return Err(Exception::UD);
    }
    let star = cpu.msrs.star;
    let cs = (star >> 32) as u16;
    if cpu.long_mode() {
        let flags = env.eflags() & !rflags::RF;
        let cpu = &mut env.cpu;
        cpu.gpr[gpr::RCX] = next_rip;
        cpu.gpr[11] = flags;
        cpu.rip = if code64 { cpu.msrs.lstar } else { cpu.msrs.cstar };
        enter(cpu, cs, true);
        let mask = cpu.msrs.fmask | rflags::RF;
        env.set_eflags(0, mask & rflags::ALL);
    } else {
        let cpu = &mut env.cpu;
        cpu.gpr[gpr::RCX] = next_rip & 0xffff_ffff;
        cpu.rip = star & 0xffff_ffff;
        enter(cpu, cs, false);
        cpu.eflags &= !(rflags::VM | rflags::IF | rflags::RF);
    }
    env.update_mode();
    Ok(())
}

/// SYSRET with operand size `size` (8: to 64-bit code, 4: to 32-bit code).
pub fn sysret(env: &mut Env, size: u8) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let long = cpu.long_mode();
    if cpu.efer & efer::SCE == 0 || cpu.real_mode() || (!cpu.code64() && !cpu.feat.amd) {
        return Err(Exception::UD);
    }
    let rcx = cpu.gpr[gpr::RCX];
    let to64 = long && size == 8;
    // Intel processors fault here, with the kernel's stack; AMD's at the fetch.
    if cpu.cpl() != 0 || (to64 && !cpu.feat.amd && !env.canonical(rcx)) {
        return Err(Exception::gp(0));
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let flags = cpu.gpr[11];
    if long {
        env.set_eflags(flags, SYSRET_FLAGS);
        env.cpu.eflags &= !rflags::RF;
    } else {
        env.cpu.eflags |= rflags::IF;
    }
    let cpu = &mut env.cpu;
    cpu.rip = if to64 { rcx } else { rcx & 0xffff_ffff };
    let cs = if to64 { base.wrapping_add(16) } else { base } | 3;
    cpu.set_seg(seg::CS, flat_code(cs, 3, to64));
    cpu.set_seg(seg::SS, flat_data(base.wrapping_add(8) | 3, 3));
    env.update_mode();
    env.interrupts_may_come();
    Ok(())
}

/// SYSENTER. AMD processors lack it in IA-32e mode.
pub fn sysenter(env: &mut Env) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let long = cpu.long_mode();
    if long && cpu.feat.amd {
        return Err(Exception::UD);
    }
    let cs = cpu.msrs.sysenter_cs as u16;
    if cpu.real_mode() || cs & !3 == 0 {
        return Err(Exception::gp(0));
    }
    let cpu = &mut env.cpu;
    cpu.eflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[gpr::RSP] = cpu.msrs.sysenter_esp & mask;
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    enter(cpu, cs, long);
    env.update_mode();
    Ok(())
}

/// SYSEXIT with operand size `size` (8: to 64-bit code).
pub fn sysexit(env: &mut Env, size: u8) -> Result<(), Exception> {
    let cpu = &env.cpu;
    let long = cpu.long_mode();
    if long && cpu.feat.amd {
        return Err(Exception::UD);
    }
    let cs = cpu.msrs.sysenter_cs as u16;
    if cpu.real_mode() || cs & !3 == 0 || cpu.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    let (rcx, rdx) = (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX]);
    let to64 = long && size == 8;
    if to64 && !(env.canonical(rcx) && env.canonical(rdx)) {
        return Err(Exception::gp(0));
    }
    let (mask, first) = if to64 { (u64::MAX, 32u16) } else { (0xffff_ffff, 16) };
    let cpu = &mut env.cpu;
    cpu.gpr[gpr::RSP] = rcx & mask;
    cpu.rip = rdx & mask;
    let cs = (cs & !3).wrapping_add(first) | 3;
    cpu.set_seg(seg::CS, flat_code(cs, 3, to64));
    cpu.set_seg(seg::SS, flat_data(cs.wrapping_add(8) | 3, 3));
    env.update_mode();
    Ok(())
}

/// SWAPGS.
pub fn swapgs(cpu: &mut Cpu) -> Result<(), Exception> {
    if !cpu.code64() {
        return Err(Exception::UD);
    }
    if cpu.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    std::mem::swap(&mut cpu.seg_base[seg::GS], &mut cpu.msrs.kernel_gs_base);
    cpu.seg[seg::GS].base = cpu.seg_base[seg::GS];
    Ok(())
}
