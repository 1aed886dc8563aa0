//! Hardware task switches through 16- and 32-bit TSSs (SDM vol. 3 chapter 7). IA-32e mode has
//! none.
//!
//! A switch has a point of no return. What is wrong before it is a fault of the old task; what is
//! wrong with the new task's segments afterwards is a fault that the new task takes at its first
//! instruction, given back as `Ok(Some(_))`.

use super::bits::{cr0, cr4, dr6, dr7, rflags};
use super::exception::{Exception, vector};
use super::seg::{self as segment, Descriptor, code, is_null, rpl, ty};
use super::stack::Stack;
use super::{Env, paging};
use tandem_accel::x86::{ATTR_DB, ATTR_UNUSABLE, Segment, seg};

/// What switches tasks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// IRET with NT set.
    Return,
    /// An exception or interrupt through a task gate, with its error code.
    Interrupt(Option<u32>),
}

impl Cause {
    /// The new task returns to the old one.
    fn nests(self) -> bool {
        matches!(self, Cause::Call | Cause::Interrupt(_))
    }
}

/// Where things are in a TSS (SDM vol. 3 figures 7-2 and 7-10).
struct Format {
    /// Bytes per slot of a register.
    word: usize,
    /// Least limit.
    limit: u32,
    cr3: Option<usize>,
    ip: usize,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI from here.
    gprs: usize,
    /// ES, CS, SS, DS (FS, GS) from here.
    segs: usize,
    nsegs: usize,
    ldt: usize,
    /// Offset and bit of the debug trap flag.
    trap: Option<usize>,
}

const TSS16: Format = Format {
    word: 2,
    limit: 0x2b,
    cr3: None,
    ip: 0xe,
    gprs: 0x12,
    segs: 0x22,
    nsegs: 4,
    ldt: 0x2a,
    trap: None,
};
const TSS32: Format = Format {
    word: 4,
    limit: 0x67,
    cr3: Some(0x1c),
    ip: 0x20,
    gprs: 0x28,
    segs: 0x48,
    nsegs: 6,
    ldt: 0x60,
    trap: Some(0x64),
};

impl Format {
    fn of(ty_bits: u32) -> &'static Format {
        if ty_bits & 8 != 0 { &TSS32 } else { &TSS16 }
    }
    fn word(&self, image: &[u8; 104], at: usize) -> u64 {
        let mut v = 0;
        for (i, b) in image.iter().skip(at).take(self.word).enumerate() {
            v |= u64::from(*b) << (8 * i);
        }
        v
    }
    fn selector(&self, image: &[u8; 104], index: usize) -> u16 {
        self.word(image, self.segs + index * self.word) as u16
    }
}

/// The TSS descriptor that `selector` names, checked for a switch because of `cause`.
fn find_tss(env: &mut Env, selector: u16, cause: Cause) -> Result<Descriptor, Exception> {
    let back = cause == Cause::Return;
    let bad = if back { vector::TS } else { vector::GP };
    let fault = Exception::with_error(bad, code(selector));
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault);
    }
    let d = env.descriptor(selector, bad)?;
    let types = if back { [ty::TSS_BUSY, ty::TSS16_BUSY] } else { [ty::TSS, ty::TSS16] };
    if d.is_segment() || !types.contains(&d.ty()) {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    if d.limit() < Format::of(d.ty()).limit {
        return Err(Exception::with_error(vector::TS, code(selector)));
    }
    Ok(d)
}

/// Switches to the task of TSS `selector`. `rip` and `flags` are what the old task resumes with.
///
/// # Errors
/// A fault of the old task: nothing has changed. `Ok(Some(e))`: the switch happened and the new
/// task has to take `e`.
pub fn switch(
    env: &mut Env,
    selector: u16,
    cause: Cause,
    rip: u64,
    flags: u64,
) -> Result<Option<Exception>, Exception> {
    let d = find_tss(env, selector, cause)?;
    let new = Format::of(d.ty());
    let old_tr = env.cpu.seg[seg::TR];
    let old = Format::of(old_tr.attr);
    let mmu = env.cpu.system_mmu();
    let linear = |env: &Env, base: u64, off: usize| env.cpu.linear(base.wrapping_add(off as u64));
    let mut image = [0u8; 104];
    let len = new.limit as usize + 1;
    env.read_bytes(linear(env, d.base(), 0), &mut image[..len], mmu)?;
    // Everything that will be written must be writable before anything is.
    let saved = old.nsegs * old.word + old.segs - old.ip;
    if u64::from(old_tr.limit) + 1 < (old.ip + saved) as u64 {
        return Err(Exception::with_error(vector::TS, code(old_tr.selector)));
    }
    env.probe_write(linear(env, old_tr.base, old.ip), saved as u64, mmu)?;
    if cause.nests() {
        env.probe_write(linear(env, d.base(), 0), 2, mmu)?;
    } else {
        let at = linear(env, env.cpu.gdtr.base, usize::from(old_tr.selector & !7) + 5);
        env.probe_write(at, 1, mmu)?;
    }
    if cause != Cause::Return {
        env.set_type_bits(&d, 2, 0)?;
    }
    save(env, old, &old_tr, rip, if cause == Cause::Return { flags & !rflags::NT } else { flags })?;
    if cause.nests() {
        env.write_u16(linear(env, d.base(), 0), old_tr.selector, mmu)?;
    } else {
        let at = linear(env, env.cpu.gdtr.base, usize::from(old_tr.selector & !7));
        env.set_type_bits(&Descriptor { raw: 0, at }, 0, 2)?;
    }
    let mut tr = d.segment(selector);
    tr.attr |= 2;
    env.cpu.set_seg(seg::TR, tr);
    let late = enter(env, new, &image, cause).err();
    env.update_mode();
    Ok(late)
}

/// Saves the old task. Its TSS has been found writable.
fn save(env: &mut Env, f: &Format, tr: &Segment, rip: u64, flags: u64) -> Result<(), Exception> {
    let mmu = env.cpu.system_mmu();
    let at = |env: &Env, off: usize| env.cpu.linear(tr.base.wrapping_add(off as u64));
    env.write(at(env, f.ip), rip, f.word, mmu)?;
    env.write(at(env, f.ip + f.word), flags, f.word, mmu)?;
    for i in 0..8 {
        env.write(at(env, f.gprs + i * f.word), env.cpu.gpr[i], f.word, mmu)?;
    }
    for i in 0..f.nsegs {
        let v = env.cpu.seg[i].selector;
        env.write_u16(at(env, f.segs + i * f.word), v, mmu)?;
    }
    Ok(())
}

/// Loads the new task; the error is the fault that the new task takes.
fn enter(env: &mut Env, f: &Format, image: &[u8; 104], cause: Cause) -> Result<(), Exception> {
    env.cpu.cr0 |= cr0::TS;
    // Local breakpoints belong to the task (SDM vol. 3 §18.2.4).
    env.cpu.dr7 &= !dr7::LOCAL;
    env.cpu.rip = f.word(image, f.ip);
    let mut flags = f.word(image, f.ip + f.word);
    if cause.nests() {
        flags |= rflags::NT;
    }
    env.set_eflags(flags | rflags::ONE, rflags::ALL);
    for i in 0..8 {
        env.cpu.gpr[i] = f.word(image, f.gprs + i * f.word);
    }
    let vm86 = flags & rflags::VM != 0;
    let cs = f.selector(image, seg::CS);
    let cpl = if vm86 { 3 } else { rpl(cs) };
    for i in 0..6 {
        let s = if i < f.nsegs { f.selector(image, i) } else { 0 };
        env.cpu.set_seg(i, segment::unusable(s));
    }
    let dpl = u32::from(cpl) << 5;
    env.cpu.seg[seg::SS].attr = ATTR_UNUSABLE | dpl;
    env.cpu.seg[seg::CS].attr = ATTR_UNUSABLE | dpl | if f.word == 4 { ATTR_DB } else { 0 };
    let ldt = f.word(image, f.ldt) as u16;
    env.cpu.set_seg(seg::LDTR, segment::unusable(ldt));
    if let Some(at) = f.cr3
        && env.cpu.cr0 & cr0::PG != 0
    {
        load_cr3(env, f.word(image, at))?;
    }
    let s = segment::ldt_segment(env, ldt, vector::TS)?;
    env.cpu.set_seg(seg::LDTR, s);
    if vm86 {
        for i in 0..6 {
            let s = segment::real_segment(&env.cpu, i, f.selector(image, i));
            env.cpu.set_seg(i, s);
        }
    } else {
        load_segments(env, f, image, cpl)?;
    }
    if env.cpu.rip > env.cpu.seg[seg::CS].limit.into() {
        return Err(Exception::gp(0));
    }
    if let Cause::Interrupt(Some(e)) = cause {
        let mut s = Stack::current(&env.cpu);
        s.push(env, e.into(), f.word as u8)?;
        s.commit(&mut env.cpu);
    }
    match f.trap {
        Some(at) if f.word(image, at) & 1 != 0 => {
            Err(Exception { dr6: dr6::BT, ..Exception::plain(vector::DB) })
        }
        _ => Ok(()),
    }
}

fn load_cr3(env: &mut Env, cr3: u64) -> Result<(), Exception> {
    if env.cpu.cr4 & cr4::PAE != 0 {
        let pdpte = paging::load_pdptes(env, cr3)?;
        env.cpu.pdpte = pdpte;
        env.cpu.pdpte_valid = true;
    }
    env.cpu.cr3 = cr3;
    env.tlb_flush_local();
    Ok(())
}

fn load_segments(env: &mut Env, f: &Format, image: &[u8; 104], cpl: u8) -> Result<(), Exception> {
    let cs = f.selector(image, seg::CS);
    let fault = Exception::with_error(vector::TS, code(cs));
    if is_null(cs) {
        return Err(fault);
    }
    let d = env.descriptor(cs, vector::TS)?;
    let level_ok = if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
    if !d.is_code() || !level_ok {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(cs)));
    }
    env.mark_accessed(&d)?;
    env.cpu.set_seg(seg::CS, d.segment(cs));
    let ss = f.selector(image, seg::SS);
    let s = segment::stack_segment(env, ss, cpl, vector::TS, vector::SS)?;
    env.cpu.set_seg(seg::SS, s);
    for i in [seg::ES, seg::DS, seg::FS, seg::GS].into_iter().filter(|&i| i < f.nsegs) {
        let s = segment::data_segment_as(env, f.selector(image, i), vector::TS)?;
        env.cpu.set_seg(i, s);
    }
    Ok(())
}

/// IRET with NT set: back to the task that the current TSS links to.
///
/// # Errors
/// As [`switch`]; `rip` is the IRET's own successor.
pub fn back(env: &mut Env, next_rip: u64) -> Result<Option<Exception>, Exception> {
    let tr = env.cpu.seg[seg::TR];
    let mmu = env.cpu.system_mmu();
    let link = env.read_u16(env.cpu.linear(tr.base), mmu)?;
    let flags = env.eflags();
    switch(env, link, Cause::Return, next_rip, flags)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, GDT, TSS, descriptor, sel};
    use super::*;
    use tandem_accel::x86::{ATTR_P, gpr};

    const NEW: u64 = 0x6000;

    /// A second task, 32-bit, in ring 0 or 3.
    fn bench(cpl: u16) -> Bench {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(NEW, 0x67, ATTR_P | ty::TSS));
        let (cs, ss) = if cpl == 0 { (sel::CODE0, sel::DATA0) } else { (sel::CODE3, sel::DATA3) };
        b.poke32(NEW + 0x20, 0x4000);
        b.poke32(NEW + 0x24, 0x202);
        b.poke32(NEW + 0x28, 0xaaaa);
        b.poke32(NEW + 0x38, 0x9000);
        for (i, s) in [ss, cs, ss, ss, 0, 0].into_iter().enumerate() {
            b.poke32(NEW + 0x48 + 4 * i as u64, s.into());
        }
        b.poke32(NEW + 0x60, 0);
        b.poke32(NEW + 0x64, 0);
        b.protected(0);
        b
    }
    fn busy(b: &mut Bench, s: u16) -> bool {
        b.peek64(GDT + u64::from(s)) >> 41 & 1 != 0
    }

    #[test]
    fn call_nests_and_iret_comes_back() {
        let mut b = bench(3);
        b.env().cpu.gpr[gpr::RBX] = 0x1234;
        let late = switch(b.env(), sel::FREE, Cause::Call, 0x7007, 2).unwrap();
        assert_eq!(late, None);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.gpr[gpr::RAX]), (0x4000, 0x9000, 0xaaaa));
        assert_eq!((cpu.cpl(), cpu.seg[seg::TR].selector), (3, sel::FREE));
        assert_eq!(cpu.eflags & (rflags::NT | rflags::IF), rflags::NT | rflags::IF);
        assert!(cpu.cr0 & cr0::TS != 0);
        assert_eq!(b.peek16(NEW), sel::TSS);
        assert_eq!((b.peek32(TSS + 0x20), b.peek32(TSS + 0x34)), (0x7007, 0x1234));
        assert!(busy(&mut b, sel::TSS) && busy(&mut b, sel::FREE));
        super::super::iret::iret(b.env(), 4, 0x4001).unwrap();
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.gpr[gpr::RBX], cpu.cpl()), (0x7007, 0x1234, 0));
        assert_eq!(cpu.seg[seg::TR].selector, sel::TSS);
        assert!(busy(&mut b, sel::TSS) && !busy(&mut b, sel::FREE));
        assert_eq!(b.peek32(NEW + 0x20), 0x4001);
        assert_eq!(b.peek32(NEW + 0x24) & 0x4000, 0);
    }

    #[test]
    fn jump_frees_the_old_task() {
        let mut b = bench(0);
        assert_eq!(switch(b.env(), sel::FREE, Cause::Jump, 0x7007, 2), Ok(None));
        assert!(!busy(&mut b, sel::TSS) && busy(&mut b, sel::FREE));
        assert_eq!(b.env().cpu.eflags & rflags::NT, 0);
        // It is busy now.
        let e = switch(b.env(), sel::FREE, Cause::Jump, 0, 2).unwrap_err();
        assert_eq!(e, Exception::gp(code(sel::FREE)));
    }

    #[test]
    fn faults_before_and_after_the_point_of_no_return() {
        let mut b = bench(0);
        b.gdt(sel::FREE, descriptor(NEW, 0x66, ATTR_P | ty::TSS));
        let e = switch(b.env(), sel::FREE, Cause::Jump, 0, 2).unwrap_err();
        assert_eq!((e.vector, e.error), (vector::TS, Some(code(sel::FREE))));
        assert_eq!((b.env().cpu.rip, b.peek32(TSS + 0x20)), (0x7000, 0));
        let mut b = bench(0);
        b.poke32(NEW + 0x50, sel::DATA3.into());
        let late = switch(b.env(), sel::FREE, Cause::Jump, 0, 2).unwrap().unwrap();
        assert_eq!((late.vector, late.error), (vector::TS, Some(0x20)));
        assert_eq!(b.env().cpu.rip, 0x4000);
        // The debug trap flag.
        let mut b = bench(0);
        b.poke32(NEW + 0x64, 1);
        let late = switch(b.env(), sel::FREE, Cause::Jump, 0, 2).unwrap().unwrap();
        assert_eq!((late.vector, late.dr6), (vector::DB, dr6::BT));
    }

    #[test]
    fn exception_through_a_task_gate_pushes_its_code() {
        let mut b = bench(0);
        b.idt(13, u64::from(sel::FREE) << 16 | 0x85 << 40);
        let o = interrupt_outcome(&mut b);
        assert_eq!(o, super::super::interrupt::Outcome::Delivered);
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (0x4000, 0x8ffc));
        assert_eq!(b.peek32(0x8ffc), 0x50);
        assert_eq!(b.peek32(TSS + 0x20), 0x7000);
    }
    fn interrupt_outcome(b: &mut Bench) -> super::super::interrupt::Outcome {
        super::super::interrupt::deliver_exception(b.env(), Exception::gp(0x50))
    }

    #[test]
    fn sixteen_bit_task() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(NEW, 0x2b, ATTR_P | ty::TSS16));
        for (i, w) in [0x4000u16, 0x202].into_iter().enumerate() {
            b.poke16(NEW + 0xe + 2 * i as u64, w);
        }
        b.poke16(NEW + 0x1a, 0x9000);
        for (i, s) in [sel::DATA0, sel::CODE0, sel::DATA0, 0].into_iter().enumerate() {
            b.poke16(NEW + 0x22 + 2 * i as u64, s);
        }
        b.protected(0);
        assert_eq!(switch(b.env(), sel::FREE, Cause::Jump, 0x7007, 2), Ok(None));
        let cpu = &b.env().cpu;
        assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (0x4000, 0x9000));
        assert_eq!(cpu.seg[seg::FS].attr, ATTR_UNUSABLE);
        // And back to a 32-bit one, by a far jump to its descriptor.
        b.gdt(sel::TSS, descriptor(TSS, 0x2fff, ATTR_P | ty::TSS));
        super::super::far::transfer(b.env(), super::super::far::Kind::Jump, sel::TSS, 0, 2, 0x4005)
            .unwrap();
        assert_eq!(b.env().cpu.rip, 0x7007);
        assert_eq!(b.peek16(NEW + 0xe), 0x4005);
    }
}
