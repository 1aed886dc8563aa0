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

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, sel};
    use super::*;

    fn frame32(b: &Bench, words: &[u32]) {
        for (i, w) in words.iter().enumerate() {
            b.poke32(0x8000 + 4 * i as u64, *w);
        }
    }
    fn frame64(b: &Bench, words: &[u64]) {
        for (i, w) in words.iter().enumerate() {
            b.poke64(0x8000 + 8 * i as u64, *w);
        }
    }

    #[test]
    fn real_mode_pops_three_words() {
        let mut b = Bench::new();
        b.poke64(0x8000, 0x7302_0600_1234);
        b.load(|_| {});
        iret(b.env(), 2, 0).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.seg_base[seg::CS], cpu.gpr[gpr::RSP]), (0x1234, 0x6000, 0x8006));
        assert_eq!(cpu.eflags, 0x7302);
    }

    #[test]
    fn to_ring_3_and_flags_by_privilege() {
        let mut b = Bench::new();
        frame32(&b, &[0x4000, sel::CODE3.into(), 0x3202, 0x9000, sel::DATA3.into()]);
        b.protected(0);
        b.env().cpu.nmi_masked = true;
        iret(b.env(), 4, 0).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[gpr::RSP]), (3, 0x4000, 0x9000));
        assert_eq!((cpu.eflags, cpu.nmi_masked), (0x3202, false));
        assert_eq!(cpu.seg[seg::DS].selector, 0);
        // In ring 3 with IOPL 0 neither IF nor IOPL moves.
        frame32(&b, &[0x4000, sel::CODE3.into(), 0x3246]);
        b.protected(3);
        iret(b.env(), 4, 0).unwrap();
        assert_eq!(b.env().eflags(), 0x46);
    }

    // SDM vol. 2, IRET: IA-32e mode.
    #[test]
    fn long_mode_always_pops_the_stack() {
        let mut b = Bench::new();
        frame64(&b, &[0x4000, sel::LONG0.into(), 0x202, 0x9008, 0]);
        b.long(0);
        iret(b.env(), 8, 0).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[gpr::RSP]), (0, 0x4000, 0x9008));
        // To compatibility mode.
        frame64(&b, &[0x4000, sel::CODE3.into(), 0x202, 0x1_0000_9008, sel::DATA3.into()]);
        b.long(0);
        iret(b.env(), 8, 0).unwrap();
        assert_eq!((b.env().cpu.code64(), b.env().cpu.gpr[gpr::RSP]), (false, 0x9008));
        // A null SS for ring 3; a RIP that is not canonical; NT.
        frame64(&b, &[0x4000, sel::LONG3.into(), 0x202, 0x9008, 3]);
        b.long(0);
        assert_eq!(iret(b.env(), 8, 0), Err(Exception::gp(0)));
        frame64(&b, &[1 << 47, sel::LONG3.into(), 0x202, 0x9008, sel::DATA3.into()]);
        assert_eq!(iret(b.env(), 8, 0), Err(Exception::gp(0)));
        assert_eq!((b.env().cpu.rip, b.env().cpu.gpr[gpr::RSP]), (0x7000, 0x8000));
        b.env().cpu.eflags |= rflags::NT;
        assert_eq!(iret(b.env(), 8, 0), Err(Exception::gp(0)));
    }

    #[test]
    fn thread_pointers_survive_the_way_out() {
        let mut b = Bench::new();
        frame64(&b, &[0x4000, sel::LONG3.into(), 0x202, 0x9008, sel::DATA3.into()]);
        b.long(0);
        segment::load_seg(b.env(), seg::FS, 0).unwrap();
        super::super::msr::write(b.env(), super::super::msr::index::FS_BASE, 0x1234).unwrap();
        iret(b.env(), 8, 0).unwrap();
        assert_eq!(b.env().cpu.seg_base[seg::FS], 0x1234);
        assert_eq!(b.env().cpu.seg[seg::DS].selector, 0);
    }

    #[test]
    fn into_virtual_8086_mode() {
        let mut b = Bench::new();
        frame32(&b, &[0x10, 0x700, 0x2_3202, 0x100, 0x20, 0x30, 0x40, 0x50, 0x60]);
        b.protected(0);
        iret(b.env(), 4, 0).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.cpl(), cpu.vm86(), cpu.rip), (3, true, 0x10));
        assert_eq!(cpu.seg_base, [0x300, 0x7000, 0x200, 0x400, 0x500, 0x600]);
        assert_eq!((cpu.gpr[gpr::RSP], cpu.seg[seg::SS].limit), (0x100, 0xffff));
    }

    #[test]
    fn v86_iret_needs_iopl_3_or_vme() {
        let mut b = Bench::new();
        b.poke64(0x8000, 0x0202_0600_1234);
        b.vm86(0);
        assert_eq!(iret(b.env(), 2, 0), Err(Exception::gp(0)));
        b.env().cpu.cr4 |= cr4::VME;
        iret(b.env(), 2, 0).unwrap();
        assert_eq!(b.env().cpu.eflags & (rflags::IF | rflags::VIF), rflags::VIF);
        b.vm86(3);
        iret(b.env(), 2, 0).unwrap();
        assert_eq!(b.env().cpu.eflags & (rflags::IF | rflags::IOPL), rflags::IF | rflags::IOPL);
    }

    #[test]
    fn setting_if_asks_for_waiting_interrupts() {
        let mut b = Bench::new();
        frame32(&b, &[0x4000, sel::CODE0.into(), 0x202]);
        b.protected(0);
        b.env().core.exit_request.store(0, std::sync::atomic::Ordering::Relaxed);
        *b.intc.irq.lock().unwrap() = Some(0x30);
        iret(b.env(), 4, 0).unwrap();
        assert_eq!(b.env().core.exit_request.load(std::sync::atomic::Ordering::Relaxed), 1);
    }
}
