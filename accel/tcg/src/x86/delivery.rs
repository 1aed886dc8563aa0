//! Delivery of one event through the IVT or the IDT (SDM vol. 3 §6.10–6.14, §21.3, vol. 2 INT n).

use super::bits::{cr4, rflags};
use super::exception::{Exception, vector};
use super::interrupt::{Event, Software};
use super::mode::Mode;
use super::seg::{self as segment, Descriptor, code, is_null, ty};
use super::stack::Stack;
use super::{Env, task};
use tandem_accel::x86::{Segment, gpr, seg};

/// An event as its delivery sees it.
struct Delivery {
    vector: u8,
    error: Option<u32>,
    /// INT n, INT3 and INTO: the gate's DPL counts.
    checked: bool,
    /// RIP to return to.
    rip: u64,
    /// RFLAGS to save.
    flags: u64,
    /// EXT bit of the error code of a fault during delivery.
    ext: u32,
}

/// Whether the saved image of RFLAGS has RF set (SDM vol. 3 §18.3.1.1): faults, but not debug
/// exceptions.
fn saves_rf(v: u8) -> bool {
    matches!(
        v,
        vector::DE
            | vector::BR
            | vector::UD
            | vector::NM
            | vector::TS
            | vector::NP
            | vector::SS
            | vector::GP
            | vector::PF
            | vector::MF
            | vector::AC
            | vector::XM
    )
}

/// Delivers `event`.
///
/// # Errors
/// The exception that delivery itself raised, with its EXT bit set as the event demands.
pub fn deliver(env: &mut Env, event: Event) -> Result<(), Exception> {
    let mut flags = env.eflags();
    if !Mode::from_bits_retain(env.core.mode).contains(Mode::BREAKPOINTS) {
        // Every instruction clears RF when it completes. Where no breakpoint can tell the
        // difference, that is left until somebody looks.
        flags &= !rflags::RF;
    }
    // Between two repetitions the string instruction has not completed.
    let mid_rep = std::mem::take(&mut env.cpu.mid_rep);
    let trap = matches!(event, Event::Exception(Exception { vector: vector::DB, .. }));
    if mid_rep && (trap || matches!(event, Event::Interrupt(_) | Event::Nmi)) {
        flags |= rflags::RF;
    }
    let mut d =
        Delivery { vector: 0, error: None, checked: false, rip: env.cpu.rip, flags, ext: 1 };
    match event {
        Event::Exception(e) => {
            d.vector = e.vector;
            d.error = e.error;
            if saves_rf(e.vector) {
                d.flags |= rflags::RF;
                // The instruction has not completed; it will hit its breakpoints again.
                env.cpu.pending_debug = 0;
            }
        }
        Event::Interrupt(v) => d.vector = v,
        Event::Nmi => d.vector = vector::NMI,
        Event::Software { vector, kind, next_rip } => {
            d.vector = vector;
            d.rip = next_rip;
            d.flags &= !rflags::RF;
            if kind == Software::Int1 {
                // One #DB tells of all.
                env.cpu.dr6 |= std::mem::take(&mut env.cpu.pending_debug);
            } else {
                d.checked = true;
                d.ext = 0;
            }
        }
    }
    let done = if env.cpu.real_mode() {
        real(env, &d)
    } else if env.cpu.long_mode() {
        long(env, &d)
    } else {
        match event {
            Event::Software { kind: Software::Int, .. } if env.cpu.vm86() => vm86_int(env, &d),
            _ => protected(env, &d),
        }
    };
    match done {
        Ok(()) => {
            if event == Event::Nmi {
                env.cpu.nmi_masked = true;
            }
            env.cpu.interrupt_shadow = false;
            env.cpu.halted = false;
            env.update_mode();
            Ok(())
        }
        Err(mut e) => {
            if let (vector::TS | vector::NP | vector::SS | vector::GP, Some(c)) =
                (e.vector, &mut e.error)
            {
                *c |= d.ext;
            }
            Err(e)
        }
    }
}

/// The error code that names an IDT entry.
fn idt_code(v: u8) -> u32 {
    u32::from(v) << 3 | 2
}

/// Real mode: the interrupt vector table (SDM vol. 3 §21.1.4).
fn real(env: &mut Env, d: &Delivery) -> Result<(), Exception> {
    let at = u32::from(d.vector) * 4;
    if at + 3 > u32::from(env.cpu.idtr.limit) {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    let at = env.cpu.linear(env.cpu.idtr.base.wrapping_add(at.into()));
    let mmu = env.cpu.system_mmu();
    let entry = env.read_u32(at, mmu)?;
    through_ivt(env, d, entry, d.flags)?;
    env.cpu.eflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    Ok(())
}

/// Pushes FLAGS, CS, IP and goes to the handler in 8086 manner.
fn through_ivt(env: &mut Env, d: &Delivery, entry: u32, flags: u64) -> Result<(), Exception> {
    let mut s = Stack::current(&env.cpu);
    s.push(env, flags & 0xffff, 2)?;
    s.push(env, env.cpu.seg[seg::CS].selector.into(), 2)?;
    s.push(env, d.rip & 0xffff, 2)?;
    let cs = segment::real_segment(&env.cpu, seg::CS, (entry >> 16) as u16);
    let ip = u64::from(entry & 0xffff);
    if ip > cs.limit.into() {
        return Err(Exception::gp(0));
    }
    s.commit(&mut env.cpu);
    env.cpu.set_seg(seg::CS, cs);
    env.cpu.rip = ip;
    Ok(())
}

/// INT n in virtual-8086 mode (SDM vol. 3 table 21-2).
fn vm86_int(env: &mut Env, d: &Delivery) -> Result<(), Exception> {
    let iopl3 = env.cpu.eflags & rflags::IOPL == rflags::IOPL;
    if env.cpu.cr4 & cr4::VME != 0 && !redirected(env, d.vector)? {
        let mmu = super::mode::MMU_USER;
        let entry = env.read_u32(u64::from(d.vector) * 4, mmu)?;
        let mut image = d.flags;
        if !iopl3 {
            // The 8086 program sees VIF in the place of IF, and IOPL 3.
            let vif = image & rflags::VIF != 0;
            image = (image & !rflags::IF) | rflags::IOPL | if vif { rflags::IF } else { 0 };
        }
        through_ivt(env, d, entry, image)?;
        let clear = if iopl3 { rflags::IF } else { rflags::VIF };
        env.cpu.eflags &= !(clear | rflags::TF | rflags::RF);
        return Ok(());
    }
    if !iopl3 {
        return Err(Exception::gp(0));
    }
    protected(env, d)
}

/// The software interrupt redirection bit of vector `v` in the TSS: set, or missing, means the
/// protected-mode handler.
fn redirected(env: &mut Env, v: u8) -> Result<bool, Exception> {
    let tr = env.cpu.seg[seg::TR];
    if tr.limit < 103 {
        return Err(Exception::gp(0));
    }
    let mmu = env.cpu.system_mmu();
    let map = env.read_u16(env.cpu.linear(tr.base.wrapping_add(102)), mmu)?;
    let at = u32::from(map).wrapping_sub(32).wrapping_add(u32::from(v / 8));
    if u32::from(map) < 32 || at > tr.limit {
        return Err(Exception::gp(0));
    }
    let byte = env.read_u8(env.cpu.linear(tr.base.wrapping_add(at.into())), mmu)?;
    Ok(byte >> (v % 8) & 1 != 0)
}

/// Checks that a gate may be used, after its type has been found valid.
fn check_gate(env: &Env, d: &Delivery, gate: &Descriptor) -> Result<(), Exception> {
    if d.checked && gate.dpl() < env.cpu.cpl() {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    if !gate.present() {
        return Err(Exception::with_error(vector::NP, idt_code(d.vector)));
    }
    Ok(())
}

/// Fetches the handler's code segment; gives its descriptor and the privilege level it runs at.
fn handler_segment(env: &mut Env, selector: u16) -> Result<(Descriptor, u8), Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let d = env.descriptor(selector, vector::GP)?;
    let cpl = env.cpu.cpl();
    if !d.is_code() || d.dpl() > cpl {
        return Err(Exception::gp(code(selector)));
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    Ok((d, if d.is_conforming() { cpl } else { d.dpl() }))
}

/// Protected mode and virtual-8086 mode outside IA-32e mode: the IDT's 8-byte gates.
fn protected(env: &mut Env, d: &Delivery) -> Result<(), Exception> {
    let at = u32::from(d.vector) * 8;
    if at + 7 > u32::from(env.cpu.idtr.limit) {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    let at = env.cpu.linear(env.cpu.idtr.base.wrapping_add(at.into()));
    let mmu = env.cpu.system_mmu();
    let gate = Descriptor { raw: env.read_u64(at, mmu)?, at };
    let known = [ty::TASK_GATE, ty::INT16, ty::TRAP16, ty::INT, ty::TRAP];
    if gate.is_segment() || !known.contains(&gate.ty()) {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    check_gate(env, d, &gate)?;
    let selector = (gate.raw >> 16) as u16;
    if gate.ty() == ty::TASK_GATE {
        return match task::switch(env, selector, task::Cause::Interrupt(d.error), d.rip, d.flags)? {
            Some(late) => Err(late),
            None => Ok(()),
        };
    }
    let size = if gate.ty() & 8 != 0 { 4 } else { 2 };
    let mut offset = gate.raw & 0xffff;
    if size == 4 {
        offset |= gate.raw >> 48 << 16;
    }
    let (target, cpl) = handler_segment(env, selector)?;
    let vm86 = env.cpu.vm86();
    if vm86 && cpl != 0 {
        return Err(Exception::gp(code(selector)));
    }
    let inner = cpl < env.cpu.cpl();
    let (mut s, ss) = if inner {
        let (ss, esp) = inner_stack(env, cpl)?;
        (Stack::new(&env.cpu, ss, esp, false, cpl, code(ss.selector)), Some(ss))
    } else {
        (Stack::current(&env.cpu), None)
    };
    if offset > u64::from(target.limit()) {
        return Err(Exception::gp(0));
    }
    let selectors = env.cpu.seg.map(|s| u64::from(s.selector));
    if vm86 {
        for i in [seg::GS, seg::FS, seg::DS, seg::ES] {
            s.push(env, selectors[i], size)?;
        }
    }
    if inner {
        s.push(env, selectors[seg::SS], size)?;
        s.push(env, env.cpu.gpr[gpr::RSP], size)?;
    }
    s.push(env, d.flags, size)?;
    s.push(env, selectors[seg::CS], size)?;
    s.push(env, d.rip, size)?;
    if let Some(e) = d.error {
        s.push(env, e.into(), size)?;
    }
    env.mark_accessed(&target)?;
    let cpu = &mut env.cpu;
    if let Some(ss) = ss {
        cpu.set_seg(seg::SS, ss);
    }
    enter(cpu, &target, selector, cpl, offset, gate.ty() & 1 == 0);
    if vm86 {
        for i in [seg::GS, seg::FS, seg::DS, seg::ES] {
            cpu.set_seg(i, segment::unusable(0));
        }
    }
    s.commit(cpu);
    Ok(())
}

/// Goes to the handler: CS:RIP and flags.
fn enter(
    cpu: &mut super::Cpu,
    target: &Descriptor,
    selector: u16,
    cpl: u8,
    rip: u64,
    mask_interrupts: bool,
) {
    cpu.eflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if mask_interrupts {
        cpu.eflags &= !rflags::IF;
    }
    cpu.set_seg(seg::CS, target.segment(selector & !3 | u16::from(cpl)));
    cpu.rip = rip;
}

/// The stack for privilege level `cpl` from a 16- or 32-bit TSS, checked (SDM vol. 3 §5.8.5).
pub fn inner_stack(env: &mut Env, cpl: u8) -> Result<(Segment, u64), Exception> {
    let tr = env.cpu.seg[seg::TR];
    let wide = tr.attr & 8 != 0;
    let (at, len) = if wide { (4 + 8 * u32::from(cpl), 8) } else { (2 + 4 * u32::from(cpl), 4) };
    if at + len - 1 > tr.limit {
        return Err(Exception::with_error(vector::TS, code(tr.selector)));
    }
    let mmu = env.cpu.system_mmu();
    let at = env.cpu.linear(tr.base.wrapping_add(at.into()));
    let (sp, ss) = if wide {
        let v = env.read_u64(at, mmu)?;
        (v & 0xffff_ffff, (v >> 32) as u16)
    } else {
        let v = env.read_u32(at, mmu)?;
        (u64::from(v & 0xffff), (v >> 16) as u16)
    };
    Ok((segment::stack_segment(env, ss, cpl, vector::TS, vector::SS)?, sp))
}

/// A stack pointer from the 64-bit TSS at byte `offset` (SDM vol. 3 figure 7-11).
pub fn tss_rsp(env: &mut Env, offset: u32) -> Result<u64, Exception> {
    let tr = env.cpu.seg[seg::TR];
    if offset.saturating_add(7) > tr.limit {
        return Err(Exception::with_error(vector::TS, code(tr.selector)));
    }
    let mmu = env.cpu.system_mmu();
    let rsp = env.read_u64(tr.base.wrapping_add(offset.into()), mmu)?;
    if env.canonical(rsp) { Ok(rsp) } else { Err(Exception::with_error(vector::SS, 0)) }
}

/// IA-32e mode: the IDT's 16-byte gates (SDM vol. 3 §6.14).
fn long(env: &mut Env, d: &Delivery) -> Result<(), Exception> {
    let at = u32::from(d.vector) * 16;
    if at + 15 > u32::from(env.cpu.idtr.limit) {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    let at = env.cpu.idtr.base.wrapping_add(at.into());
    let mmu = env.cpu.system_mmu();
    let gate = Descriptor { raw: env.read_u64(at, mmu)?, at };
    let high = env.read_u64(at.wrapping_add(8), mmu)?;
    let valid = gate.is_system(ty::INT) || gate.is_system(ty::TRAP);
    if !valid || high >> 40 & 0x1f != 0 {
        return Err(Exception::gp(idt_code(d.vector)));
    }
    check_gate(env, d, &gate)?;
    let selector = (gate.raw >> 16) as u16;
    let rip = gate.raw & 0xffff | gate.raw >> 48 << 16 | high << 32;
    let (target, cpl) = handler_segment(env, selector)?;
    if !target.is_long() || target.is_long_and_big() {
        return Err(Exception::gp(code(selector)));
    }
    let inner = cpl < env.cpu.cpl();
    let ist = (gate.raw >> 32 & 7) as u32;
    let rsp = if ist != 0 {
        tss_rsp(env, 0x24 + 8 * (ist - 1))?
    } else if inner {
        tss_rsp(env, 4 + 8 * u32::from(cpl))?
    } else {
        env.cpu.gpr[gpr::RSP]
    } & !15;
    if !env.canonical(rip) {
        return Err(Exception::gp(0));
    }
    let words = [
        u64::from(d.error.unwrap_or(0)),
        d.rip,
        u64::from(env.cpu.seg[seg::CS].selector),
        d.flags,
        env.cpu.gpr[gpr::RSP],
        u64::from(env.cpu.seg[seg::SS].selector),
    ];
    let mut frame = [0; 48];
    for (b, w) in frame.chunks_exact_mut(8).zip(words) {
        b.copy_from_slice(&w.to_le_bytes());
    }
    let frame = if d.error.is_some() { &frame[..] } else { &frame[8..] };
    let sp = rsp.wrapping_sub(frame.len() as u64);
    if !env.canonical(sp) || !env.canonical(rsp.wrapping_sub(1)) {
        return Err(Exception::with_error(vector::SS, 0));
    }
    let mmu = env.cpu.mmu_at(cpl);
    env.write_bytes(sp, frame, mmu)?;
    env.mark_accessed(&target)?;
    let cpu = &mut env.cpu;
    enter(cpu, &target, selector, cpl, rip, gate.ty() == ty::INT);
    cpu.gpr[gpr::RSP] = sp;
    if inner {
        cpu.set_seg(seg::SS, segment::null_stack(cpl.into(), cpl));
    }
    Ok(())
}
