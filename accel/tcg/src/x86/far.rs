//! Far JMP, CALL and RET, in all modes and through gates (SDM vol. 3 §5.8, vol. 2 JMP, CALL, RET).

use super::delivery::{inner_stack, tss_rsp};
use super::exception::{Exception, vector};
use super::interrupt;
use super::seg::{self as segment, Descriptor, code, is_null, rpl, ty};
use super::stack::Stack;
use super::task::{self, Cause};
use super::{Cpu, Env};
use tandem_accel::x86::{ATTR_DB, ATTR_L, Segment, gpr, seg};

/// JMP or CALL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// JMP.
    Jump,
    /// CALL.
    Call,
}

/// Keeps the low `size` bytes (2, 4 or 8).
pub fn truncate(v: u64, size: u8) -> u64 {
    match size {
        2 => v & 0xffff,
        4 => v & 0xffff_ffff,
        _ => v,
    }
}

/// Checks that `rip` lies in the code segment about to be loaded.
pub fn check_rip(env: &Env, cs: &Segment, rip: u64) -> Result<(), Exception> {
    let long = env.cpu.long_mode() && cs.attr & ATTR_L != 0;
    let ok = if long { env.canonical(rip) } else { rip <= cs.limit.into() };
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

/// In IA-32e mode L and D of a code segment may not both be set.
pub fn check_long(cpu: &Cpu, d: &Descriptor, selector: u16) -> Result<(), Exception> {
    if cpu.long_mode() && d.is_long_and_big() {
        return Err(Exception::gp(code(selector)));
    }
    Ok(())
}

/// Far JMP or CALL to `selector:offset`. `size` is the operand size in bytes; `next_rip` the
/// instruction after.
pub fn transfer(
    env: &mut Env,
    kind: Kind,
    selector: u16,
    offset: u64,
    size: u8,
    next_rip: u64,
) -> Result<(), Exception> {
    let offset = truncate(offset, size);
    if env.cpu.real_mode() || env.cpu.vm86() {
        let cs = segment::real_segment(&env.cpu, seg::CS, selector);
        return go(env, kind, cs, offset, size, next_rip);
    }
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let d = env.descriptor(selector, vector::GP)?;
    if !d.is_segment() {
        return through_system(env, kind, selector, &d, next_rip);
    }
    let cpl = env.cpu.cpl();
    let allowed =
        if d.is_conforming() { d.dpl() <= cpl } else { rpl(selector) <= cpl && d.dpl() == cpl };
    if !d.is_code() || !allowed {
        return Err(Exception::gp(code(selector)));
    }
    check_long(&env.cpu, &d, selector)?;
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    env.mark_accessed(&d)?;
    let cs = d.segment(selector & !3 | u16::from(cpl));
    go(env, kind, cs, offset, size, next_rip)
}

/// A transfer at the same privilege level: CALL pushes the return address on the current stack.
fn go(
    env: &mut Env,
    kind: Kind,
    cs: Segment,
    rip: u64,
    size: u8,
    next_rip: u64,
) -> Result<(), Exception> {
    check_rip(env, &cs, rip)?;
    if kind == Kind::Call {
        let mut s = Stack::current(&env.cpu);
        s.push(env, env.cpu.seg[seg::CS].selector.into(), size)?;
        s.push(env, next_rip, size)?;
        s.commit(&mut env.cpu);
    }
    env.cpu.set_seg(seg::CS, cs);
    env.cpu.rip = rip;
    env.update_mode();
    Ok(())
}

/// A far transfer that names a gate or a TSS.
fn through_system(
    env: &mut Env,
    kind: Kind,
    selector: u16,
    d: &Descriptor,
    next_rip: u64,
) -> Result<(), Exception> {
    let long = env.cpu.long_mode();
    let known = match d.ty() {
        ty::CALL => true,
        ty::CALL16 | ty::TASK_GATE | ty::TSS16 | ty::TSS => !long,
        _ => false,
    };
    if !known || d.dpl() < env.cpu.cpl().max(rpl(selector)) {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    match d.ty() {
        ty::CALL | ty::CALL16 => call_gate(env, kind, selector, d, next_rip),
        ty::TASK_GATE => switch(env, kind, (d.raw >> 16) as u16, next_rip),
        _ => switch(env, kind, selector, next_rip),
    }
}

fn switch(env: &mut Env, kind: Kind, tss: u16, next_rip: u64) -> Result<(), Exception> {
    let cause = if kind == Kind::Call { Cause::Call } else { Cause::Jump };
    let flags = env.eflags();
    if let Some(late) = task::switch(env, tss, cause, next_rip, flags)? {
        interrupt::deliver_late(env, late);
    }
    Ok(())
}

/// Through a call gate (SDM vol. 3 §5.8.3 to 5.8.5).
fn call_gate(
    env: &mut Env,
    kind: Kind,
    gate_selector: u16,
    gate: &Descriptor,
    next_rip: u64,
) -> Result<(), Exception> {
    let long = env.cpu.long_mode();
    let size: u8 = match (long, gate.ty()) {
        (true, _) => 8,
        (false, ty::CALL) => 4,
        _ => 2,
    };
    let mut rip = gate.raw & 0xffff;
    if size >= 4 {
        rip |= gate.raw >> 48 << 16;
    }
    if long {
        rip |= env.descriptor_high(gate_selector, gate, vector::GP)? << 32;
    }
    let selector = (gate.raw >> 16) as u16;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let d = env.descriptor(selector, vector::GP)?;
    let cpl = env.cpu.cpl();
    let fault = Exception::gp(code(selector));
    let same_level_only = kind == Kind::Jump && !d.is_conforming();
    if !d.is_code() || d.dpl() > cpl || (same_level_only && d.dpl() != cpl) {
        return Err(fault);
    }
    if long && (!d.is_long() || d.is_long_and_big()) {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    env.mark_accessed(&d)?;
    if kind == Kind::Call && !d.is_conforming() && d.dpl() < cpl {
        let params = if long { 0 } else { (gate.raw >> 32 & 0x1f) as u8 };
        return call_inner(env, selector, &d, rip, size, params, next_rip);
    }
    let cs = d.segment(selector & !3 | u16::from(cpl));
    go(env, kind, cs, rip, size, next_rip)
}

/// CALL to an inner privilege level: the stack comes from the TSS, parameters are copied.
fn call_inner(
    env: &mut Env,
    selector: u16,
    d: &Descriptor,
    rip: u64,
    size: u8,
    params: u8,
    next_rip: u64,
) -> Result<(), Exception> {
    let cpl = d.dpl();
    let (ss, sp) = if size == 8 {
        let sp = tss_rsp(env, 4 + 8 * u32::from(cpl))?;
        (segment::null_stack(cpl.into(), cpl), sp)
    } else {
        inner_stack(env, cpl)?
    };
    let cs = d.segment(selector & !3 | u16::from(cpl));
    check_rip(env, &cs, rip)?;
    let mut old = Stack::current(&env.cpu);
    let mut s = Stack::new(&env.cpu, ss, sp, size == 8, cpl, code(ss.selector));
    s.push(env, env.cpu.seg[seg::SS].selector.into(), size)?;
    s.push(env, env.cpu.gpr[gpr::RSP], size)?;
    let mut words = [0u64; 31];
    let words = &mut words[..usize::from(params).min(31)];
    for w in words.iter_mut() {
        *w = old.pop(env, size)?;
    }
    for &w in words.iter().rev() {
        s.push(env, w, size)?;
    }
    s.push(env, env.cpu.seg[seg::CS].selector.into(), size)?;
    s.push(env, next_rip, size)?;
    let cpu = &mut env.cpu;
    cpu.set_seg(seg::SS, ss);
    cpu.set_seg(seg::CS, cs);
    cpu.rip = rip;
    s.commit(cpu);
    env.update_mode();
    Ok(())
}

/// Far RET: pops the return address with operand size `size`, then drops `pop` bytes.
pub fn ret(env: &mut Env, size: u8, pop: u64) -> Result<(), Exception> {
    let mut s = Stack::current(&env.cpu);
    let rip = s.pop(env, size)?;
    let selector = s.pop(env, size)? as u16;
    s.skip(pop);
    if env.cpu.real_mode() || env.cpu.vm86() {
        let cs = segment::real_segment(&env.cpu, seg::CS, selector);
        check_rip(env, &cs, rip)?;
        env.cpu.set_seg(seg::CS, cs);
        env.cpu.rip = rip;
        s.commit(&mut env.cpu);
        env.update_mode();
        return Ok(());
    }
    let cs = return_segment(env, selector)?;
    check_rip(env, &cs, rip)?;
    let outer = rpl(selector) > env.cpu.cpl();
    if outer {
        let sp = s.pop(env, size)?;
        let ss = s.pop(env, size)? as u16;
        let ss = return_stack(env, ss, &cs)?;
        let to = return_to(&env.cpu, &cs, ss, sp.wrapping_add(pop), rip);
        finish_outer(env, to);
        return Ok(());
    }
    env.cpu.set_seg(seg::CS, cs);
    env.cpu.rip = rip;
    s.commit(&mut env.cpu);
    env.update_mode();
    Ok(())
}

/// The code segment that RET or IRET returns to, checked.
pub fn return_segment(env: &mut Env, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    let d = env.descriptor(selector, vector::GP)?;
    let level = rpl(selector);
    let level_ok = if d.is_conforming() { d.dpl() <= level } else { d.dpl() == level };
    if level < env.cpu.cpl() || !d.is_code() || !level_ok {
        return Err(fault);
    }
    check_long(&env.cpu, &d, selector)?;
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    env.mark_accessed(&d)?;
    Ok(d.segment(selector))
}

/// The stack segment that RET or IRET returns to along with `cs`: null is allowed when returning
/// to 64-bit code below CPL 3.
pub fn return_stack(env: &mut Env, selector: u16, cs: &Segment) -> Result<Segment, Exception> {
    let cpl = rpl(cs.selector);
    if is_null(selector) {
        let long = env.cpu.long_mode() && cs.attr & ATTR_L != 0;
        if long && cpl != 3 && rpl(selector) == cpl {
            return Ok(segment::null_stack(selector, cpl));
        }
        return Err(Exception::gp(0));
    }
    let d = env.descriptor(selector, vector::GP)?;
    if rpl(selector) != cpl || !d.is_writable_data() || d.dpl() != cpl {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::with_error(vector::SS, code(selector)));
    }
    env.mark_accessed(&d)?;
    Ok(d.segment(selector))
}

/// Where a return to another stack goes.
pub struct ReturnTo {
    cs: Segment,
    ss: Segment,
    rsp: u64,
    rip: u64,
}

/// A destination whose stack pointer covers what its stack size says.
pub fn return_to(cpu: &Cpu, cs: &Segment, ss: Segment, sp: u64, rip: u64) -> ReturnTo {
    let long = cpu.long_mode() && cs.attr & ATTR_L != 0;
    let rsp = if long {
        sp
    } else if ss.attr & ATTR_DB != 0 {
        sp & 0xffff_ffff
    } else {
        cpu.gpr[gpr::RSP] & !0xffff | sp & 0xffff
    };
    ReturnTo { cs: *cs, ss, rsp, rip }
}

/// Commits a return that also loaded a stack; drops data segments that the new level may not use.
pub fn finish_outer(env: &mut Env, to: ReturnTo) {
    let cpu = &mut env.cpu;
    let outer = rpl(to.cs.selector) > cpu.cpl();
    cpu.set_seg(seg::CS, to.cs);
    cpu.set_seg(seg::SS, to.ss);
    cpu.gpr[gpr::RSP] = to.rsp;
    cpu.rip = to.rip;
    if outer {
        segment::drop_inner_segments(cpu);
    }
    env.update_mode();
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BIG, Bench, CODE, DATA, LONG, TSS, descriptor, dpl, gate, sel};
    use super::*;

    fn jump(b: &mut Bench, selector: u16, offset: u64) -> Result<(), Exception> {
        transfer(b.env(), Kind::Jump, selector, offset, 4, 0x7005)
    }
    fn call(b: &mut Bench, selector: u16, offset: u64, size: u8) -> Result<(), Exception> {
        transfer(b.env(), Kind::Call, selector, offset, size, 0x7005)
    }
    fn at(b: &mut Bench) -> (u16, u64, u64, u8) {
        let c = &b.env().cpu;
        (c.seg[seg::CS].selector, c.rip, c.gpr[gpr::RSP], c.cpl())
    }

    #[test]
    fn real_mode_call_and_return() {
        let mut b = Bench::new();
        b.load(|s| {
            s.seg[seg::CS].base = 0x7000;
            s.seg[seg::CS].selector = 0x700;
        });
        call(&mut b, 0x800, 0x1_0010, 2).unwrap();
        assert_eq!(at(&mut b), (0x800, 0x10, 0x7ffc, 0));
        assert_eq!(b.env().cpu.seg_base[seg::CS], 0x8000);
        ret(b.env(), 2, 2).unwrap();
        assert_eq!(at(&mut b), (0x700, 0x7005, 0x8002, 0));
        // Beyond the limit.
        assert_eq!(transfer(b.env(), Kind::Jump, 0, 0x1_0000, 4, 0), Err(Exception::gp(0)));
    }

    #[test]
    fn entering_protected_and_long_mode_by_jump() {
        let mut b = Bench::new();
        b.long(0);
        jump(&mut b, sel::CODE0, 0x6000).unwrap();
        assert!(!b.env().cpu.code64());
        jump(&mut b, sel::LONG0, 0x6100).unwrap();
        assert!(b.env().cpu.code64());
        // L and D together are reserved.
        b.gdt(sel::FREE, descriptor(0, 0xf_ffff, CODE | LONG | ATTR_DB));
        assert_eq!(jump(&mut b, sel::FREE, 0), Err(Exception::gp(code(sel::FREE))));
        let r = transfer(b.env(), Kind::Jump, sel::LONG0, 1 << 47, 8, 0);
        assert_eq!(r, Err(Exception::gp(0)));
    }

    #[test]
    fn direct_transfers_check_privilege() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(0, 0xf_ffff, CODE | 4 | BIG));
        b.protected(3);
        assert_eq!(jump(&mut b, sel::CODE0, 0), Err(Exception::gp(8)));
        assert_eq!(jump(&mut b, sel::DATA3, 0), Err(Exception::gp(0x20)));
        assert_eq!(jump(&mut b, 0, 0), Err(Exception::gp(0)));
        jump(&mut b, sel::FREE, 0x5000).unwrap();
        assert_eq!(at(&mut b), (sel::FREE | 3, 0x5000, 0x8000, 3));
    }

    // SDM vol. 3 §5.8.5.
    #[test]
    fn call_gate_32_copies_parameters_and_returns() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, gate(sel::CODE0, 0x4000, ty::CALL, 3, 2));
        b.poke32(TSS + 4, 0x9000);
        b.poke32(TSS + 8, sel::DATA0.into());
        b.poke64(0x8000, 0x2222_2222_1111_1111);
        b.protected(3);
        call(&mut b, sel::FREE | 3, 0xdead, 4).unwrap();
        assert_eq!(at(&mut b), (sel::CODE0, 0x4000, 0x9000 - 24, 0));
        let frame: Vec<u32> = (0..6).map(|i| b.peek32(0x9000 - 24 + 4 * i)).collect();
        assert_eq!(frame, [0x7005, 0x1b, 0x1111_1111, 0x2222_2222, 0x8000, 0x23]);
        // DS of ring 0 does not survive the way out.
        segment::load_seg(b.env(), seg::DS, sel::DATA0).unwrap();
        ret(b.env(), 4, 8).unwrap();
        assert_eq!(at(&mut b), (sel::CODE3, 0x7005, 0x8008, 3));
        assert_eq!(b.env().cpu.seg[seg::DS].selector, 0);
        assert_eq!(b.env().cpu.seg[seg::ES].selector, sel::DATA3);
        // JMP through the gate may not change level.
        assert_eq!(jump(&mut b, sel::FREE | 3, 0), Err(Exception::gp(8)));
        b.gdt(sel::FREE, gate(sel::CODE0, 0x4000, ty::CALL, 0, 0));
        assert_eq!(call(&mut b, sel::FREE | 3, 0, 4), Err(Exception::gp(code(sel::FREE))));
    }

    #[test]
    fn call_gate_16() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, gate(sel::CODE0, 0xffff_4000, ty::CALL16, 0, 0));
        b.protected(0);
        call(&mut b, sel::FREE, 0, 4).unwrap();
        assert_eq!(at(&mut b), (sel::CODE0, 0x4000, 0x7ffc, 0));
        assert_eq!(b.peek32(0x7ffc), 0x0008_7005);
    }

    #[test]
    fn call_gate_64_switches_to_a_null_stack_segment() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, gate(sel::LONG0, 0x1234_4000, ty::CALL, 3, 0));
        b.gdt(sel::FREE + 8, 0x5);
        b.poke64(TSS + 4, 0x9000);
        b.long(3);
        call(&mut b, sel::FREE | 3, 0, 8).unwrap();
        assert_eq!(at(&mut b), (sel::LONG0, 0x5_1234_4000, 0x9000 - 32, 0));
        assert_eq!(b.env().cpu.seg[seg::SS].selector, 0);
        let frame: Vec<u64> = (0..4).map(|i| b.peek64(0x9000 - 32 + 8 * i)).collect();
        assert_eq!(frame, [0x7005, 0x33, 0x8000, 0x23]);
        ret(b.env(), 8, 0).unwrap();
        assert_eq!(at(&mut b), (sel::LONG3, 0x7005, 0x8000, 3));
    }

    #[test]
    fn a_faulting_call_changes_nothing() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, gate(sel::CODE0, 0x4000, ty::CALL, 3, 0));
        b.poke32(TSS + 4, 0x9000);
        b.poke32(TSS + 8, sel::DATA3.into());
        b.protected(3);
        let before = at(&mut b);
        let e = call(&mut b, sel::FREE | 3, 0, 4).unwrap_err();
        assert_eq!((e.vector, e.error), (vector::TS, Some(0x20)));
        assert_eq!(at(&mut b), before);
        // A stack segment that is too small.
        b.gdt(sel::FREE + 8, descriptor(0, 0x10, DATA | ATTR_DB | dpl(0)));
        b.poke32(TSS + 8, (sel::FREE + 8).into());
        let e = call(&mut b, sel::FREE | 3, 0, 4).unwrap_err();
        assert_eq!((e.vector, e.error), (vector::SS, Some(code(sel::FREE + 8))));
        assert_eq!(at(&mut b), before);
    }

    #[test]
    fn returns_never_go_inwards() {
        let mut b = Bench::new();
        b.protected(3);
        b.poke32(0x8000, 0x4000);
        b.poke32(0x8004, sel::CODE0.into());
        assert_eq!(ret(b.env(), 4, 0), Err(Exception::gp(8)));
    }
}
