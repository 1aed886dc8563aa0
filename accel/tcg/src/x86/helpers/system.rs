//! System instructions: thin entries from generated code into the system rooms. What each does is
//! documented there.
//!
//! Helpers that change RIP write the global; the block leaves through it. A fault leaves the state
//! as it was before the instruction. Those that push frames or switch tasks end their block, so what
//! they write over code need not restart them (`between_blocks`).

use super::raise;
use crate::user::UserEvent;
use crate::x86::bits::{cr4, rflags};
use crate::x86::cr::privileged;
use crate::x86::exception::Exception;
use crate::x86::interrupt::{self, Event, Software};
use crate::x86::{
    Env, cpuid as cpuid_leaves, cr, debug, delivery, far, io, iret as iret_mod, msr, seg,
    syscall as fast, tsc,
};
use tandem_accel::x86::gpr;

/// The Env of the running block.
fn env<'a>(p: *mut Env) -> &'a mut Env {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    unsafe { &mut *p }
}

/// Turns an error into the pending fault.
fn done(env: &mut Env, r: Result<(), Exception>) -> u64 {
    match r {
        Ok(()) => 0,
        Err(e) => raise(env, e),
    }
}

fn value(env: &mut Env, r: Result<u64, Exception>) -> u64 {
    match r {
        Ok(v) => v,
        Err(e) => raise(env, e),
    }
}

/// ZF of LAR and LSL, in their result.
const FOUND: u64 = 1 << 63;

/// Loads segment register `index` (not CS).
pub extern "C" fn load_seg(p: *mut Env, index: u64, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::load_seg(env, (index & 7) as usize, selector as u16);
    env.cpu.after_ss = r.is_ok() && index == tandem_accel::x86::seg::SS as u64;
    done(env, r)
}

/// Far JMP: selector, offset, operand size in bytes, RIP of the next instruction.
pub extern "C" fn far_jmp(p: *mut Env, selector: u64, offset: u64, size: u64, next: u64) -> u64 {
    let env = env(p);
    let r = env.between_blocks(|env| {
        far::transfer(env, far::Kind::Jump, selector as u16, offset, size as u8, next)
    });
    done(env, r)
}

/// Far CALL.
pub extern "C" fn far_call(p: *mut Env, selector: u64, offset: u64, size: u64, next: u64) -> u64 {
    let env = env(p);
    let r = env.between_blocks(|env| {
        far::transfer(env, far::Kind::Call, selector as u16, offset, size as u8, next)
    });
    done(env, r)
}

/// Far RET: operand size, bytes to drop.
pub extern "C" fn far_ret(p: *mut Env, size: u64, pop: u64) -> u64 {
    let env = env(p);
    let r = far::ret(env, size as u8, pop);
    done(env, r)
}

/// IRET: operand size, RIP of the next instruction (what a nested task resumes at).
pub extern "C" fn iret(p: *mut Env, size: u64, next: u64) -> u64 {
    let env = env(p);
    let r = env.between_blocks(|env| iret_mod::iret(env, size as u8, next));
    done(env, r)
}

/// INT n (kind 0), INT3 (1), INTO (2), INT1 (3).
pub extern "C" fn int_n(p: *mut Env, vector: u64, next_rip: u64, kind: u64) -> u64 {
    let env = env(p);
    let kind = match kind {
        0 => Software::Int,
        1 => Software::Int3,
        2 => Software::Into,
        _ => Software::Int1,
    };
    let event = Event::Software { vector: vector as u8, kind, next_rip };
    if env.vcpu().space.is_some() {
        env.user_event(UserEvent::Raised(event));
        return 0;
    }
    let r = env.between_blocks(|env| delivery::deliver(env, event));
    done(env, r)
}

/// SYSCALL.
pub extern "C" fn syscall(p: *mut Env, next: u64) -> u64 {
    let env = env(p);
    let r = fast::syscall(env, next);
    step_after(env, r)
}

/// SYSCALL and SYSRET are stepped over if TF is set when they have completed: so a program that
/// steps over its SYSCALL traps when the kernel returns to it.
fn step_after(env: &mut Env, r: Result<(), Exception>) -> u64 {
    if r.is_ok() && env.cpu.eflags & rflags::TF != 0 {
        let e = debug::after_step(&mut env.cpu);
        env.between_blocks(|env| interrupt::deliver_late(env, e));
    }
    done(env, r)
}

/// SYSRET: operand size.
pub extern "C" fn sysret(p: *mut Env, size: u64) -> u64 {
    let env = env(p);
    let r = fast::sysret(env, size as u8);
    step_after(env, r)
}

/// SYSENTER.
pub extern "C" fn sysenter(p: *mut Env) -> u64 {
    let env = env(p);
    let r = fast::sysenter(env);
    done(env, r)
}

/// SYSEXIT: operand size.
pub extern "C" fn sysexit(p: *mut Env, size: u64) -> u64 {
    let env = env(p);
    let r = fast::sysexit(env, size as u8);
    done(env, r)
}

/// LAR: value, with ZF in bit 63.
pub extern "C" fn lar(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::lar(env, selector as u16);
    value(env, r.map(|v| v.map_or(0, |v| u64::from(v) | FOUND)))
}

/// LSL: value, with ZF in bit 63.
pub extern "C" fn lsl(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::lsl(env, selector as u16);
    value(env, r.map(|v| v.map_or(0, |v| u64::from(v) | FOUND)))
}

/// VERR: ZF.
pub extern "C" fn verr(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::verr(env, selector as u16);
    value(env, r.map(u64::from))
}

/// VERW: ZF.
pub extern "C" fn verw(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::verw(env, selector as u16);
    value(env, r.map(u64::from))
}

/// LLDT.
pub extern "C" fn lldt(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::lldt(env, selector as u16);
    done(env, r)
}

/// LTR.
pub extern "C" fn ltr(p: *mut Env, selector: u64) -> u64 {
    let env = env(p);
    let r = seg::ltr(env, selector as u16);
    done(env, r)
}

/// MOV from CR `n`.
pub extern "C" fn read_cr(p: *mut Env, n: u64) -> u64 {
    let env = env(p);
    let r = cr::read(env, n);
    value(env, r)
}

/// MOV to CR `n`.
pub extern "C" fn write_cr(p: *mut Env, n: u64, v: u64) -> u64 {
    let env = env(p);
    let r = cr::write(env, n, v);
    done(env, r)
}

/// CLTS.
pub extern "C" fn clts(p: *mut Env) -> u64 {
    let env = env(p);
    let r = cr::clts(env);
    done(env, r)
}

/// LMSW.
pub extern "C" fn lmsw(p: *mut Env, v: u64) -> u64 {
    let env = env(p);
    let r = cr::lmsw(env, v);
    done(env, r)
}

/// MOV from DR `n`.
pub extern "C" fn read_dr(p: *mut Env, n: u64) -> u64 {
    let env = env(p);
    let r = debug::read(env, n);
    value(env, r)
}

/// MOV to DR `n`.
pub extern "C" fn write_dr(p: *mut Env, n: u64, v: u64) -> u64 {
    let env = env(p);
    let r = debug::write(env, n, v);
    done(env, r)
}

/// LGDT: linear address, operand size (2: 24-bit base; 4; 8: 64-bit base).
pub extern "C" fn lgdt(p: *mut Env, addr: u64, size: u64) -> u64 {
    let env = env(p);
    let r = seg::load_table(env, addr, size as u8).map(|t| env.cpu.gdtr = t);
    done(env, r)
}

/// LIDT.
pub extern "C" fn lidt(p: *mut Env, addr: u64, size: u64) -> u64 {
    let env = env(p);
    let r = seg::load_table(env, addr, size as u8).map(|t| env.cpu.idtr = t);
    done(env, r)
}

/// SGDT: linear address, operand size (8 in 64-bit code, else 4).
pub extern "C" fn sgdt(p: *mut Env, addr: u64, size: u64) -> u64 {
    let env = env(p);
    let r = seg::store_table(env, env.cpu.gdtr, addr, size as u8);
    done(env, r)
}

/// SIDT.
pub extern "C" fn sidt(p: *mut Env, addr: u64, size: u64) -> u64 {
    let env = env(p);
    let r = seg::store_table(env, env.cpu.idtr, addr, size as u8);
    done(env, r)
}

/// INVLPG: linear address.
pub extern "C" fn invlpg(p: *mut Env, addr: u64) -> u64 {
    let env = env(p);
    let r = cr::invlpg(env, addr);
    done(env, r)
}

/// INVPCID: type, linear address of the descriptor.
pub extern "C" fn invpcid(p: *mut Env, kind: u64, at: u64) -> u64 {
    let env = env(p);
    let r = cr::invpcid(env, kind, at);
    done(env, r)
}

/// RDMSR.
pub extern "C" fn rdmsr(p: *mut Env) -> u64 {
    let env = env(p);
    let r = msr::rdmsr(env);
    done(env, r)
}

/// WRMSR.
pub extern "C" fn wrmsr(p: *mut Env) -> u64 {
    let env = env(p);
    let r = msr::wrmsr(env);
    done(env, r)
}

/// RDTSC: the counter. #GP(0) with CR4.TSD above CPL 0.
pub extern "C" fn rdtsc(p: *mut Env) -> u64 {
    let env = env(p);
    if env.cpu.cr4 & cr4::TSD != 0 && env.cpu.cpl() != 0 {
        return raise(env, Exception::gp(0));
    }
    tsc::read(env)
}

/// RDPMC: this processor has no performance counters.
pub extern "C" fn rdpmc(p: *mut Env) -> u64 {
    raise(env(p), Exception::gp(0))
}

/// CPUID.
pub extern "C" fn cpuid(p: *mut Env) -> u64 {
    cpuid_leaves::cpuid(env(p));
    0
}

/// IN: port, size in bytes. Permission is checked before, by [`check_io`].
pub extern "C" fn pio_in(p: *mut Env, port: u64, size: u64) -> u64 {
    let env = env(p);
    env.cpu.note_io(port as u16, size as u8);
    io::read(env, port as u16, size as u8)
}

/// OUT: port, size in bytes, value.
pub extern "C" fn pio_out(p: *mut Env, port: u64, size: u64, v: u64) -> u64 {
    let env = env(p);
    env.cpu.note_io(port as u16, size as u8);
    io::write(env, port as u16, size as u8, v);
    0
}

/// Checks that the running code may access `size` bytes of ports from `port`.
pub extern "C" fn check_io(p: *mut Env, port: u64, size: u64) -> u64 {
    let env = env(p);
    let r = io::check(env, port as u16, size as u8);
    done(env, r)
}

/// HLT.
pub extern "C" fn hlt(p: *mut Env) -> u64 {
    let env = env(p);
    let r = privileged(&env.cpu).map(|()| env.cpu.halted = true);
    done(env, r)
}

/// What CLI and STI change: IF, or VIF (SDM vol. 2, CLI).
fn interrupt_flag(env: &Env) -> Result<u64, Exception> {
    let cpu = &env.cpu;
    let iopl = (cpu.eflags >> 12 & 3) as u8;
    if cpu.real_mode() || cpu.cpl() <= iopl {
        return Ok(rflags::IF);
    }
    let virt = if cpu.vm86() {
        cpu.cr4 & cr4::VME != 0
    } else {
        cpu.cr4 & cr4::PVI != 0 && cpu.cpl() == 3
    };
    if virt { Ok(rflags::VIF) } else { Err(Exception::gp(0)) }
}

/// CLI.
pub extern "C" fn cli(p: *mut Env) -> u64 {
    let env = env(p);
    let r = interrupt_flag(env).map(|f| env.cpu.eflags &= !f);
    done(env, r)
}

/// STI. The interrupt shadow is the front end's.
pub extern "C" fn sti(p: *mut Env) -> u64 {
    let env = env(p);
    let r = match interrupt_flag(env) {
        Ok(rflags::VIF) if env.cpu.eflags & rflags::VIP != 0 => Err(Exception::gp(0)),
        Ok(f) => {
            env.cpu.eflags |= f;
            env.interrupts_may_come();
            Ok(())
        }
        Err(e) => Err(e),
    };
    done(env, r)
}

/// PUSHF: the image to push (RF and VM clear). `size` is the operand size.
pub extern "C" fn pushf(p: *mut Env, size: u64) -> u64 {
    let env = env(p);
    let flags = env.eflags();
    let image = flags & !(rflags::RF | rflags::VM);
    if env.cpu.vm86() && flags & rflags::IOPL != rflags::IOPL {
        if env.cpu.cr4 & cr4::VME == 0 || size != 2 {
            return raise(env, Exception::gp(0));
        }
        let on = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
        return image & !rflags::IF | rflags::IOPL | on;
    }
    image
}

/// POPF: the popped image, operand size (SDM vol. 2, POPF, table 4-21).
pub extern "C" fn popf(p: *mut Env, v: u64, size: u64) -> u64 {
    let env = env(p);
    let cpu = &env.cpu;
    let mut v = v;
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    let iopl = (cpu.eflags >> 12 & 3) as u8;
    if cpu.real_mode() || (!cpu.vm86() && cpu.cpl() == 0) {
        mask |= rflags::IOPL | rflags::IF;
    } else if cpu.cpl() <= iopl {
        mask |= rflags::IF;
    } else if cpu.vm86() {
        let on = v & rflags::IF != 0;
        let vme = cpu.cr4 & cr4::VME != 0 && size == 2;
        if !vme || v & rflags::TF != 0 || (on && cpu.eflags & rflags::VIP != 0) {
            return raise(env, Exception::gp(0));
        }
        v = v & !rflags::VIF | if on { rflags::VIF } else { 0 };
        mask |= rflags::VIF;
    }
    let opened = v & mask & !env.cpu.eflags & rflags::IF != 0;
    env.set_eflags(v, mask);
    env.cpu.eflags &= !rflags::RF;
    env.update_mode();
    if opened {
        env.interrupts_may_come();
    }
    0
}

fn set_ac(p: *mut Env, on: bool) -> u64 {
    let env = env(p);
    if env.cpu.cr4 & cr4::SMAP == 0 && env.cpu.feat.ebx7 & 1 << 20 == 0 || env.cpu.cpl() != 0 {
        return raise(env, Exception::UD);
    }
    if on {
        env.cpu.eflags |= rflags::AC;
    } else {
        env.cpu.eflags &= !rflags::AC;
    }
    env.update_mode();
    0
}

/// STAC.
pub extern "C" fn stac(p: *mut Env) -> u64 {
    set_ac(p, true)
}

/// CLAC.
pub extern "C" fn clac(p: *mut Env) -> u64 {
    set_ac(p, false)
}

/// SWAPGS.
pub extern "C" fn swapgs(p: *mut Env) -> u64 {
    let env = env(p);
    let r = fast::swapgs(&mut env.cpu);
    done(env, r)
}

/// WRFSBASE, WRGSBASE: segment register, base. #UD without CR4.FSGSBASE; #GP(0) if not canonical.
pub extern "C" fn wrfsgsbase(p: *mut Env, index: u64, v: u64) -> u64 {
    let env = env(p);
    if env.cpu.cr4 & cr4::FSGSBASE == 0 || !env.cpu.code64() {
        return raise(env, Exception::UD);
    }
    if !env.canonical(v) {
        return raise(env, Exception::gp(0));
    }
    let i = if index & 1 == 0 { 4 } else { 5 };
    env.cpu.seg_base[i] = v;
    env.cpu.seg[i].base = v;
    0
}

/// XGETBV: the value for EDX:EAX.
pub extern "C" fn xgetbv(p: *mut Env) -> u64 {
    let env = env(p);
    let r = cr::xgetbv(env);
    value(env, r)
}

/// XSETBV.
pub extern "C" fn xsetbv(p: *mut Env) -> u64 {
    let env = env(p);
    let r = cr::xsetbv(env);
    done(env, r)
}

/// RDPKRU: the value for EAX; EDX becomes 0.
pub extern "C" fn rdpkru(p: *mut Env) -> u64 {
    let env = env(p);
    let r = cr::rdpkru(env);
    value(env, r)
}

/// WRPKRU.
pub extern "C" fn wrpkru(p: *mut Env) -> u64 {
    let env = env(p);
    let r = cr::wrpkru(env);
    done(env, r)
}

/// Fails unless the processor has MONITOR and the code runs at CPL 0.
fn monitor_allowed(env: &Env) -> Result<(), Exception> {
    if env.cpu.feat.ecx1 & 1 << 3 == 0 || env.cpu.cpl() != 0 {
        return Err(Exception::UD);
    }
    Ok(())
}

/// MONITOR: linear address. ECX must be 0. The address is touched as a read does.
pub extern "C" fn monitor(p: *mut Env, addr: u64) -> u64 {
    let env = env(p);
    let r = monitor_allowed(env).and_then(|()| {
        if env.cpu.gpr[gpr::RCX] as u32 != 0 {
            return Err(Exception::gp(0));
        }
        let mmu = env.cpu.mmu_at(0);
        env.read_u8(addr, mmu).map(|_| ())
    });
    done(env, r)
}

/// PAUSE in a loop means that somebody else has to get on first, and on a host that has fewer cores
/// than there are vCPUs that may be one that waits for this very core: every so often the turn is
/// given away, as hardware does with pause-loop exiting (SDM vol. 3 §26.1.3).
pub extern "C" fn pause(p: *mut Env) -> u64 {
    /// Some microseconds of nothing but pauses.
    const WINDOW: u32 = 64;
    let core = &mut env(p).core;
    core.pauses = core.pauses.wrapping_add(1);
    if core.pauses.is_multiple_of(WINDOW) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
    0
}

/// MWAIT: a store to the monitored line is not watched, so it returns at once, as it may for any
/// reason (SDM vol. 2).
pub extern "C" fn mwait(p: *mut Env) -> u64 {
    let env = env(p);
    let r = monitor_allowed(env).and_then(|()| {
        let ok = env.cpu.gpr[gpr::RCX] as u32 & !1 == 0;
        if ok { Ok(()) } else { Err(Exception::gp(0)) }
    });
    if r.is_ok() {
        std::thread::yield_now();
    }
    done(env, r)
}

/// INVD, WBINVD, WBNOINVD: there is no cache to write back; only the privilege check is left.
pub extern "C" fn wbinvd(p: *mut Env) -> u64 {
    let env = env(p);
    let r = privileged(&env.cpu);
    done(env, r)
}

/// Instruction breakpoints at a linear address, before the instruction there.
pub extern "C" fn insn_breakpoint(p: *mut Env, addr: u64) -> u64 {
    let env = env(p);
    match debug::instruction_breakpoint(&mut env.cpu, addr) {
        Some(e) => raise(env, e),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::exception::vector;
    use crate::x86::testing::Bench;

    /// The pending fault, taken.
    fn fault(b: &mut Bench) -> Option<Exception> {
        let env = b.env();
        let raised = std::mem::take(&mut env.core.fault) != 0;
        raised.then_some(env.cpu.exception)
    }

    // SDM vol. 2, CLI and STI, tables 3-7 ff.
    #[test]
    fn cli_and_sti_by_privilege() {
        let mut b = Bench::new();
        b.protected(3);
        cli(b.env());
        assert_eq!(fault(&mut b), Some(Exception::gp(0)));
        b.env().cpu.cr4 |= cr4::PVI;
        sti(b.env());
        assert_eq!(b.env().cpu.eflags & (rflags::IF | rflags::VIF), rflags::VIF);
        b.env().cpu.eflags |= rflags::VIP;
        sti(b.env());
        assert_eq!(fault(&mut b), Some(Exception::gp(0)));
        b.protected(0);
        sti(b.env());
        assert_eq!(b.env().cpu.eflags & rflags::IF, rflags::IF);
    }

    // SDM vol. 2, POPF, table 4-21.
    #[test]
    fn popf_by_privilege() {
        let mut b = Bench::new();
        b.protected(3);
        popf(b.env(), 0x24_7fd7, 4);
        assert_eq!(b.env().eflags(), 0x24_4dd7);
        b.protected(0);
        popf(b.env(), u64::MAX, 2);
        assert_eq!(b.env().eflags(), 0x7fd7);
        b.vm86(0);
        popf(b.env(), 0x202, 2);
        assert_eq!(fault(&mut b), Some(Exception::gp(0)));
        b.env().cpu.cr4 |= cr4::VME;
        popf(b.env(), 0x202, 2);
        assert_eq!(b.env().cpu.eflags & (rflags::IF | rflags::VIF), rflags::VIF);
        assert_eq!(pushf(b.env(), 2), 0x8_3202);
        popf(b.env(), 0x202, 4);
        assert!(fault(&mut b).is_some());
    }

    #[test]
    fn segment_bases() {
        let mut b = Bench::new();
        b.long(3);
        wrfsgsbase(b.env(), 4, 5);
        assert_eq!(fault(&mut b), Some(Exception::UD));
        b.env().cpu.cr4 |= cr4::FSGSBASE;
        wrfsgsbase(b.env(), 5, 1 << 47);
        assert_eq!(fault(&mut b), Some(Exception::gp(0)));
        wrfsgsbase(b.env(), 5, 0x1234);
        assert_eq!(b.env().cpu.seg_base[5], 0x1234);
    }

    #[test]
    fn int_n_faults_leave_the_instruction() {
        let mut b = Bench::new();
        b.protected(0);
        int_n(b.env(), 0x80, 0x7002, 0);
        assert_eq!(fault(&mut b), Some(Exception::gp(0x80 * 8 + 2)));
        assert_eq!(b.env().cpu.rip, 0x7000);
    }

    #[test]
    fn cpuid_mirrors_cr4_and_xcr0() {
        let mut b = Bench::new();
        b.protected(0);
        let leaf = |b: &mut Bench, leaf, sub| cpuid_leaves::query(b.env(), leaf, sub);
        assert_eq!(leaf(&mut b, 1, 0).ecx >> 27 & 1, 0);
        assert_eq!(leaf(&mut b, 7, 0).ecx >> 4 & 1, 0);
        b.env().cpu.cr4 |= cr4::OSXSAVE | cr4::PKE;
        assert_eq!(leaf(&mut b, 1, 0).ecx >> 27 & 1, 1);
        assert_eq!(leaf(&mut b, 7, 0).ecx >> 4 & 1, 1);
        b.env().cpu.xcr0 = 7;
        assert_eq!(leaf(&mut b, 0xd, 0).ebx, 832);
        b.env().cpu.gpr[gpr::RAX] = 0xffff_ffff_0000_0000;
        cpuid(b.env());
        assert_eq!(b.env().cpu.gpr[gpr::RBX], 0x6874_7541);
    }

    #[test]
    fn time_stamp_counter_can_be_denied() {
        let mut b = Bench::new();
        b.protected(3);
        b.clock.set(42);
        assert_eq!(rdtsc(b.env()), 42);
        b.env().cpu.cr4 |= cr4::TSD;
        rdtsc(b.env());
        assert_eq!(fault(&mut b).unwrap().vector, vector::GP);
    }

    #[test]
    fn system_calls_step_where_they_arrive() {
        let mut b = Bench::new();
        b.idt64(1, crate::x86::testing::gate(0x28, 0x4000, 0xe, 0, 0), 0);
        b.poke64(crate::x86::testing::TSS + 4, 0x9000);
        b.long(3);
        let m = &mut b.env().cpu.msrs;
        (m.star, m.lstar, m.fmask) = (0x0020_0028_0000_0000, 0x5000, rflags::TF);
        b.env().cpu.eflags |= rflags::TF;
        syscall(b.env(), 0x7002);
        assert_eq!((b.env().cpu.rip, b.env().cpu.eflags & rflags::TF), (0x5000, 0));
        // Back in the program, which was stepping over its system call.
        sysret(b.env(), 8);
        assert_eq!((b.env().cpu.rip, b.env().cpu.cpl()), (0x4000, 0));
        assert_eq!(b.env().cpu.dr6 & crate::x86::bits::dr6::BS, crate::x86::bits::dr6::BS);
        assert_eq!(b.peek64(0x9000 - 40), 0x7002);
    }

    #[test]
    fn halting_is_for_ring_0() {
        let mut b = Bench::new();
        b.protected(3);
        hlt(b.env());
        assert!(fault(&mut b).is_some() && !b.env().cpu.halted);
        b.protected(0);
        hlt(b.env());
        assert!(b.env().cpu.halted);
        monitor(b.env(), 0);
        assert_eq!(fault(&mut b), Some(Exception::UD));
    }
}
