//! SYSCALL, SYSRET, SYSENTER and SYSEXIT, and SWAPGS (SDM vol. 2; APM vol. 3 where AMD differs).

use super::bits::{efer, rflags};
use super::exception::Exception;
use super::seg::{flat_code, flat_data};
use super::{Cpu, Env};
use crate::user::UserEvent;
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
    if env.vcpu().space.is_some() {
        let flags = env.eflags() & !rflags::RF;
        let cpu = &mut env.cpu;
        (cpu.gpr[gpr::RCX], cpu.gpr[11], cpu.rip) = (next_rip, flags, next_rip);
        env.user_event(UserEvent::Syscall);
        return Ok(());
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

#[cfg(test)]
mod tests {
    use super::super::testing::Bench;
    use super::*;

    fn bench(cpl: u8) -> Bench {
        let mut b = Bench::new();
        b.long(cpl);
        let m = &mut b.env().cpu.msrs;
        m.star = 0x0023_0010_0000_0000;
        m.lstar = 0xffff_8000_0000_1000;
        m.fmask = 0x4_7700;
        b
    }

    // SDM vol. 2, SYSCALL and SYSRET.
    #[test]
    fn there_and_back() {
        let mut b = bench(3);
        b.env().cpu.eflags |= rflags::IF | rflags::AC;
        syscall(b.env(), 0x7002).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[1]), (0, 0xffff_8000_0000_1000, 0x7002));
        assert_eq!((cpu.gpr[11], cpu.eflags), (0x4_0202, 2));
        assert_eq!((cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector), (0x10, 0x18));
        assert!(cpu.code64());
        sysret(b.env(), 8).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.eflags), (3, 0x7002, 0x4_0202));
        assert_eq!((cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector), (0x33, 0x2b));
    }

    #[test]
    fn to_compatibility_mode() {
        let mut b = bench(0);
        b.env().cpu.gpr[gpr::RCX] = 0x1_0000_7002;
        sysret(b.env(), 4).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.code64(), cpu.cpl()), (0x7002, false, 3));
        assert_eq!(cpu.seg[seg::CS].selector, 0x23);
        // SYSCALL from there: AMD processors use CSTAR.
        b.env().cpu.msrs.cstar = 0x9000;
        syscall(b.env(), 0x7004).unwrap();
        assert_eq!((b.env().cpu.rip, b.env().cpu.code64()), (0x9000, true));
        sysret(b.env(), 4).unwrap();
        b.env().cpu.feat.amd = false;
        assert_eq!(syscall(b.env(), 0), Err(Exception::UD));
    }

    #[test]
    fn refusals() {
        let mut b = bench(3);
        assert_eq!(sysret(b.env(), 8), Err(Exception::gp(0)));
        b.env().cpu.efer &= !efer::SCE;
        assert_eq!(syscall(b.env(), 0), Err(Exception::UD));
        let mut b = bench(0);
        b.env().cpu.gpr[gpr::RCX] = 1 << 47;
        b.env().cpu.feat.amd = false;
        assert_eq!(sysret(b.env(), 8), Err(Exception::gp(0)));
        assert_eq!(b.env().cpu.cpl(), 0);
    }

    // SDM vol. 2, SYSENTER and SYSEXIT.
    #[test]
    fn sysenter_and_sysexit() {
        let mut b = Bench::new();
        b.protected(3);
        let env = b.env();
        assert_eq!(sysenter(env), Err(Exception::gp(0)));
        env.cpu.msrs.sysenter_cs = 0x11;
        env.cpu.msrs.sysenter_esp = 0x9000;
        env.cpu.msrs.sysenter_eip = 0x4000;
        env.cpu.eflags |= rflags::IF;
        sysenter(env).unwrap();
        let cpu = &env.cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[gpr::RSP]), (0, 0x4000, 0x9000));
        assert_eq!((cpu.seg[seg::CS].selector, cpu.eflags & rflags::IF), (0x10, 0));
        env.cpu.gpr[gpr::RCX] = 0x8000;
        env.cpu.gpr[gpr::RDX] = 0x7002;
        sysexit(env, 4).unwrap();
        let cpu = &env.cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[gpr::RSP]), (3, 0x7002, 0x8000));
        assert_eq!((cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector), (0x23, 0x2b));
        // AMD processors lack both in IA-32e mode.
        b.long(0);
        assert_eq!(sysenter(b.env()), Err(Exception::UD));
    }

    #[test]
    fn swapgs_exchanges_bases() {
        let mut b = Bench::new();
        b.long(0);
        b.env().cpu.msrs.kernel_gs_base = 5;
        swapgs(&mut b.env().cpu).unwrap();
        assert_eq!((b.env().cpu.seg_base[seg::GS], b.env().cpu.msrs.kernel_gs_base), (5, 0));
        b.long(3);
        assert_eq!(swapgs(&mut b.env().cpu), Err(Exception::gp(0)));
        b.protected(0);
        assert_eq!(swapgs(&mut b.env().cpu), Err(Exception::UD));
    }
}
