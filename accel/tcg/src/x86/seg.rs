//! Segment registers: descriptors, checks and loads (SDM vol. 3 chapters 3 and 5), and what else
//! looks at descriptors (LAR, LSL, VERR, VERW, LLDT, LTR).
//!
//! What always holds:
//!
//! * A function that returns an error has changed no processor state.
//! * The cached privilege level lives in SS.DPL, so an unusable SS (null, in 64-bit mode) keeps the
//!   DPL bits in its attributes.
//! * [`Cpu::set_seg`] is the only writer of a segment register; it keeps `seg_base` in step.

use super::bits::{cr0, cr4, efer, rflags};
use super::exception::{Exception, vector};
use super::mode::{MMU_KERNEL, MMU_KERNEL_SMAP, MMU_USER, Mode};
use super::{Cpu, Env};
use tandem_accel::x86::{
    ATTR_DB, ATTR_G, ATTR_L, ATTR_P, ATTR_S, ATTR_UNUSABLE, Segment, TableReg, seg,
};

/// System descriptor types (SDM vol. 3 table 3-2).
#[allow(missing_docs)]
pub mod ty {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT16: u32 = 6;
    pub const TRAP16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 0xb;
    pub const CALL: u32 = 0xc;
    pub const INT: u32 = 0xe;
    pub const TRAP: u32 = 0xf;
    /// Of a code or data segment: it is code.
    pub const CODE: u32 = 8;
    /// Of code: conforming. Of data: expand-down.
    pub const CONFORMING: u32 = 4;
    /// Of data: writable. Of code: readable.
    pub const WRITABLE: u32 = 2;
}

/// Attributes of a present accessed flat code segment, and data segment, without DPL.
const FLAT_CODE: u32 = ATTR_P | ATTR_S | ATTR_G | 0xb;
const FLAT_DATA: u32 = ATTR_P | ATTR_S | ATTR_G | ATTR_DB | 0x3;

/// A descriptor in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// The eight bytes.
    pub raw: u64,
    /// Its linear address.
    pub at: u64,
}

impl Descriptor {
    /// Attributes in the form of [`Segment::attr`].
    pub fn attr(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf0ff
    }
    /// Type field.
    pub fn ty(&self) -> u32 {
        (self.raw >> 40) as u32 & 0xf
    }
    /// Code or data, not a system descriptor.
    pub fn is_segment(&self) -> bool {
        self.attr() & ATTR_S != 0
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.is_segment() && self.ty() & ty::CODE != 0
    }
    /// A writable data segment.
    pub fn is_writable_data(&self) -> bool {
        self.is_segment() && self.ty() & (ty::CODE | ty::WRITABLE) == ty::WRITABLE
    }
    /// A conforming code segment.
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.ty() & ty::CONFORMING != 0
    }
    /// Data, or readable code.
    pub fn is_readable(&self) -> bool {
        self.is_segment() && (self.ty() & ty::CODE == 0 || self.ty() & ty::WRITABLE != 0)
    }
    /// Present.
    pub fn present(&self) -> bool {
        self.attr() & ATTR_P != 0
    }
    /// Privilege level.
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    /// A system descriptor of this type.
    pub fn is_system(&self, t: u32) -> bool {
        !self.is_segment() && self.ty() == t
    }
    /// The low 32 bits of the base.
    pub fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 56) << 24
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let l = (self.raw & 0xffff) as u32 | (self.raw >> 32) as u32 & 0xf_0000;
        if self.attr() & ATTR_G != 0 { l << 12 | 0xfff } else { l }
    }
    /// The segment register that this descriptor makes, marked accessed if code or data.
    pub fn segment(&self, selector: u16) -> Segment {
        let accessed = if self.is_segment() { 1 } else { 0 };
        Segment { selector, base: self.base(), limit: self.limit(), attr: self.attr() | accessed }
    }
    /// 64-bit code (L set); D must be clear with it.
    pub fn is_long(&self) -> bool {
        self.attr() & ATTR_L != 0
    }
    /// L and D both set: reserved in IA-32e mode.
    pub fn is_long_and_big(&self) -> bool {
        self.attr() & (ATTR_L | ATTR_DB) == ATTR_L | ATTR_DB
    }
}

/// Whether a selector is null.
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A selector as an error code.
pub fn code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Requested privilege level of a selector.
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A segment register holding a null selector.
pub fn unusable(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, attr: ATTR_UNUSABLE }
}

/// The flat 64-bit or 32-bit code segment that SYSCALL and its kin load.
pub fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let size = if long { ATTR_L } else { ATTR_DB };
    Segment::flat(selector, FLAT_CODE | u32::from(dpl) << 5 | size)
}

/// The flat stack segment that SYSCALL and its kin load.
pub fn flat_data(selector: u16, dpl: u8) -> Segment {
    Segment::flat(selector, FLAT_DATA | u32::from(dpl) << 5)
}

impl Cpu {
    /// Writes a segment register with its hidden part.
    pub fn set_seg(&mut self, index: usize, s: Segment) {
        self.seg[index] = s;
        if let Some(base) = self.seg_base.get_mut(index) {
            let long = index == seg::CS && self.efer & efer::LMA != 0 && s.attr & ATTR_L != 0;
            *base = if long { 0 } else { s.base };
        }
    }
    /// CR0.PE is clear.
    pub fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }
    /// Virtual-8086 mode.
    pub fn vm86(&self) -> bool {
        self.eflags & rflags::VM != 0
    }
    /// IA-32e mode.
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
    /// 64-bit code is running.
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[seg::CS].attr & ATTR_L != 0
    }
    /// The MMU index of explicit accesses at this privilege level.
    pub fn mmu_at(&self, cpl: u8) -> u8 {
        if cpl == 3 {
            MMU_USER
        } else if self.cr4 & cr4::SMAP != 0 && self.eflags & rflags::AC == 0 {
            MMU_KERNEL_SMAP
        } else {
            MMU_KERNEL
        }
    }
    /// The MMU index of implicit accesses to descriptor tables and the TSS: supervisor's, whatever
    /// CPL and AC say (SDM vol. 3 §4.6).
    pub fn system_mmu(&self) -> u8 {
        if self.cr4 & cr4::SMAP != 0 { MMU_KERNEL_SMAP } else { MMU_KERNEL }
    }
    /// A linear address: 32 bits outside IA-32e mode.
    pub fn linear(&self, addr: u64) -> u64 {
        if self.long_mode() { addr } else { addr & 0xffff_ffff }
    }
}

impl Env {
    /// Recomputes the mode word after a change of what it summarises.
    pub fn update_mode(&mut self) {
        let debug = self.core.mode & Mode::ONE_INSN.bits();
        self.core.mode = Mode::of(&self.cpu).bits() | debug;
    }

    /// Asks for a look at the interrupt controller, after IF or the like has been set.
    pub fn interrupts_may_come(&mut self) {
        let cpu = &self.cpu;
        let open = cpu.eflags & rflags::IF != 0;
        let waiting = (cpu.nmi_pending && !cpu.nmi_masked)
            || (open && self.vcpu().intc.as_ref().is_some_and(|i| i.pending()));
        if waiting {
            self.core.request_exit();
        }
    }

    /// The descriptor of `selector`; `None` if it lies beyond its table (or the LDT is missing).
    pub fn find_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Exception> {
        let cpu = &self.cpu;
        let (base, limit) = if selector & 4 != 0 {
            let ldt = &cpu.seg[seg::LDTR];
            if ldt.attr & ATTR_UNUSABLE != 0 {
                return Ok(None);
            }
            (ldt.base, ldt.limit)
        } else {
            (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
        };
        if u32::from(selector | 7) > limit {
            return Ok(None);
        }
        let at = cpu.linear(base.wrapping_add(u64::from(selector & !7)));
        let mmu = cpu.system_mmu();
        Ok(Some(Descriptor { raw: self.read_u64(at, mmu)?, at }))
    }

    /// The descriptor of `selector`, or an exception with `vector` that names the selector.
    pub fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Exception> {
        let fault = Exception::with_error(vector, code(selector));
        self.find_descriptor(selector)?.ok_or(fault)
    }

    /// The second half of a 16-byte descriptor (IA-32e mode): bits 63:32 of its base or offset.
    /// Its type field must be zero (SDM vol. 3 figure 5-9).
    pub fn descriptor_high(
        &mut self,
        selector: u16,
        d: &Descriptor,
        vector: u8,
    ) -> Result<u64, Exception> {
        let fault = Exception::with_error(vector, code(selector));
        // The table's limit must cover 16 bytes.
        let next = (selector & !7).checked_add(8).ok_or(fault)? | (selector & 4);
        let high = self.find_descriptor(next)?.ok_or(fault)?;
        debug_assert!(high.at == d.at.wrapping_add(8));
        if high.raw >> 40 & 0x1f != 0 {
            return Err(fault);
        }
        Ok(high.raw & 0xffff_ffff)
    }

    /// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
    pub fn mark_accessed(&mut self, d: &Descriptor) -> Result<(), Exception> {
        if d.raw & 1 << 40 != 0 {
            return Ok(());
        }
        self.set_type_bits(d, 1, 0)
    }

    /// Changes type bits of a descriptor in memory.
    pub fn set_type_bits(&mut self, d: &Descriptor, set: u8, clear: u8) -> Result<(), Exception> {
        let mmu = self.cpu.system_mmu();
        let at = self.cpu.linear(d.at.wrapping_add(5));
        let old = self.read_u8(at, mmu)?;
        self.write_u8(at, old & !clear | set, mmu)
    }
}

/// Loads a segment register other than CS as MOV, POP and LxS do (SDM vol. 2, MOV).
///
/// # Errors
/// #GP, #NP, #SS with the selector, or #GP(0), by the rules of the mode.
pub fn load_seg(env: &mut Env, index: usize, selector: u16) -> Result<(), Exception> {
    let cpu = &mut env.cpu;
    if cpu.real_mode() || cpu.vm86() {
        let s = real_segment(cpu, index, selector);
        cpu.set_seg(index, s);
        env.update_mode();
        return Ok(());
    }
    let s = if index == seg::SS {
        let cpl = cpu.cpl();
        stack_segment(env, selector, cpl, vector::GP, vector::SS)?
    } else {
        data_segment(env, selector)?
    };
    env.cpu.set_seg(index, s);
    env.update_mode();
    Ok(())
}

/// The segment register that real-mode code or V86 code loads: in real mode limit and rights stay
/// as they are ("unreal" mode), in V86 mode they are fixed (SDM vol. 3 §21.2).
pub fn real_segment(cpu: &Cpu, index: usize, selector: u16) -> Segment {
    let base = u64::from(selector) << 4;
    let old = cpu.seg[index];
    if cpu.vm86() {
        Segment { selector, base, limit: 0xffff, attr: ATTR_P | ATTR_S | 3 << 5 | 3 }
    } else if old.attr & ATTR_UNUSABLE != 0 {
        Segment { selector, base, limit: 0xffff, attr: ATTR_P | ATTR_S | 3 }
    } else {
        Segment { selector, base, ..old }
    }
}

/// Checks and fetches a stack segment for privilege level `cpl`. `bad` is the vector for a wrong
/// one (#GP or #TS), `absent` for one that is not present. A null selector is allowed in 64-bit
/// mode below CPL 3.
pub fn stack_segment(
    env: &mut Env,
    selector: u16,
    cpl: u8,
    bad: u8,
    absent: u8,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        if env.cpu.code64() && cpl != 3 && rpl(selector) == cpl {
            return Ok(null_stack(selector, cpl));
        }
        return Err(Exception::with_error(bad, 0));
    }
    let d = env.descriptor(selector, bad)?;
    let fault = Exception::with_error(bad, code(selector));
    if rpl(selector) != cpl || !d.is_writable_data() || d.dpl() != cpl {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::with_error(absent, code(selector)));
    }
    env.mark_accessed(&d)?;
    Ok(d.segment(selector))
}

/// The null SS of 64-bit mode.
pub fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment { attr: ATTR_UNUSABLE | ATTR_DB | u32::from(cpl) << 5, ..unusable(selector) }
}

/// Checks and fetches a segment for DS, ES, FS or GS.
pub fn data_segment(env: &mut Env, selector: u16) -> Result<Segment, Exception> {
    data_segment_as(env, selector, vector::GP)
}

/// As [`data_segment`], with the vector of a wrong segment (#GP or #TS).
pub fn data_segment_as(env: &mut Env, selector: u16, bad: u8) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(unusable(selector));
    }
    let d = env.descriptor(selector, bad)?;
    let private = !d.is_conforming() && d.dpl() < rpl(selector).max(env.cpu.cpl());
    if !d.is_readable() || private {
        return Err(Exception::with_error(bad, code(selector)));
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    env.mark_accessed(&d)?;
    Ok(d.segment(selector))
}

/// After a return to an outer privilege level: data segment registers that the new level may not
/// use become null (SDM vol. 2, RET). Those that are null already keep the base that WRMSR or
/// WRFSBASE gave them.
pub fn drop_inner_segments(cpu: &mut Cpu) {
    let cpl = cpu.cpl();
    for i in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = cpu.seg[i];
        let conforming =
            s.attr & (ATTR_S | ty::CODE | ty::CONFORMING) == ATTR_S | ty::CODE | ty::CONFORMING;
        if s.attr & ATTR_UNUSABLE == 0 && s.dpl() < cpl && !conforming {
            cpu.set_seg(i, unusable(0));
        }
    }
}

/// Whether bytes `[offset, offset + size)` lie inside a segment (SDM vol. 3 §5.3). `size` > 0.
pub fn in_limit(s: &Segment, offset: u64, size: u64) -> bool {
    let last = offset.wrapping_add(size - 1);
    let expand_down = s.attr & (ATTR_S | ty::CODE | ty::CONFORMING) == ATTR_S | ty::CONFORMING;
    let limit = u64::from(s.limit);
    if expand_down {
        let top = if s.attr & ATTR_DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top && last >= offset
    } else {
        // A 4 GiB segment has no edge: an access there wraps.
        limit == 0xffff_ffff || (last <= limit && last >= offset)
    }
}

/// LAR's idea of a descriptor that may be inspected at CPL and RPL.
fn inspect(
    env: &mut Env,
    selector: u16,
    system_types: &[u32],
) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = env.find_descriptor(selector)? else { return Ok(None) };
    if !d.is_segment() && !system_types.contains(&d.ty()) {
        return Ok(None);
    }
    let visible = d.is_conforming() || rpl(selector).max(env.cpu.cpl()) <= d.dpl();
    Ok(visible.then_some(d))
}

/// LAR: the access rights (bits 8–23 of the descriptor's upper half), or `None` (ZF clear).
pub fn lar(env: &mut Env, selector: u16) -> Result<Option<u32>, Exception> {
    let types: &[u32] = if env.cpu.long_mode() {
        &[ty::LDT, ty::TSS, ty::TSS_BUSY, ty::CALL]
    } else {
        &[
            ty::TSS16,
            ty::LDT,
            ty::TSS16_BUSY,
            ty::CALL16,
            ty::TASK_GATE,
            ty::TSS,
            ty::TSS_BUSY,
            ty::CALL,
        ]
    };
    let d = inspect(env, selector, types)?;
    Ok(d.map(|d| (d.raw >> 32) as u32 & 0x00f0_ff00))
}

/// LSL: the limit in bytes, or `None` (ZF clear).
pub fn lsl(env: &mut Env, selector: u16) -> Result<Option<u32>, Exception> {
    let types: &[u32] = if env.cpu.long_mode() {
        &[ty::LDT, ty::TSS, ty::TSS_BUSY]
    } else {
        &[ty::TSS16, ty::LDT, ty::TSS16_BUSY, ty::TSS, ty::TSS_BUSY]
    };
    Ok(inspect(env, selector, types)?.map(|d| d.limit()))
}

/// VERR: whether the segment can be read from here.
pub fn verr(env: &mut Env, selector: u16) -> Result<bool, Exception> {
    Ok(inspect(env, selector, &[])?.is_some_and(|d| d.is_readable()))
}

/// VERW: whether the segment can be written from here.
pub fn verw(env: &mut Env, selector: u16) -> Result<bool, Exception> {
    Ok(inspect(env, selector, &[])?.is_some_and(|d| d.is_writable_data()))
}

/// Fails with #UD in real and V86 mode, with #GP(0) above CPL 0.
fn privileged_protected(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.real_mode() || cpu.vm86() {
        return Err(Exception::UD);
    }
    if cpu.cpl() != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// The base of an LDT or TSS descriptor, 64 bits in IA-32e mode.
fn system_base(env: &mut Env, selector: u16, d: &Descriptor) -> Result<u64, Exception> {
    if !env.cpu.long_mode() {
        return Ok(d.base());
    }
    let base = d.base() | env.descriptor_high(selector, d, vector::GP)? << 32;
    if env.canonical(base) { Ok(base) } else { Err(Exception::gp(code(selector))) }
}

/// LLDT.
pub fn lldt(env: &mut Env, selector: u16) -> Result<(), Exception> {
    privileged_protected(&env.cpu)?;
    let s = ldt_segment(env, selector, vector::GP)?;
    env.cpu.set_seg(seg::LDTR, s);
    Ok(())
}

/// Checks and fetches an LDT; `bad` is the vector of a wrong one (#GP or #TS).
pub fn ldt_segment(env: &mut Env, selector: u16, bad: u8) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(unusable(selector));
    }
    let fault = Exception::with_error(bad, code(selector));
    if selector & 4 != 0 {
        return Err(fault);
    }
    let d = env.descriptor(selector, bad)?;
    if !d.is_system(ty::LDT) {
        return Err(fault);
    }
    if !d.present() {
        let v = if bad == vector::TS { vector::TS } else { vector::NP };
        return Err(Exception::with_error(v, code(selector)));
    }
    let base = system_base(env, selector, &d)?;
    Ok(Segment { base, ..d.segment(selector) })
}

/// LTR.
pub fn ltr(env: &mut Env, selector: u16) -> Result<(), Exception> {
    privileged_protected(&env.cpu)?;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let fault = Exception::gp(code(selector));
    if selector & 4 != 0 {
        return Err(fault);
    }
    let d = env.descriptor(selector, vector::GP)?;
    let fits = d.is_system(ty::TSS) || (d.is_system(ty::TSS16) && !env.cpu.long_mode());
    if !fits {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::with_error(vector::NP, code(selector)));
    }
    let base = system_base(env, selector, &d)?;
    env.set_type_bits(&d, 2, 0)?;
    let mut s = d.segment(selector);
    s.base = base;
    s.attr |= 2;
    env.cpu.set_seg(seg::TR, s);
    Ok(())
}

/// What LGDT and LIDT read at linear address `at`: operand size 2 takes 24 bits of the base.
///
/// # Errors
/// #GP(0) above CPL 0, or for a base that is not canonical; faults of the read.
pub fn load_table(env: &mut Env, at: u64, size: u8) -> Result<TableReg, Exception> {
    if env.cpu.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    let mmu = env.cpu.mmu_at(0);
    let limit = env.read_u16(at, mmu)?;
    let next = env.cpu.linear(at.wrapping_add(2));
    let base = match size {
        8 => env.read_u64(next, mmu)?,
        4 => env.read_u32(next, mmu)?.into(),
        _ => u64::from(env.read_u32(next, mmu)?) & 0xff_ffff,
    };
    if size == 8 && !env.canonical(base) {
        return Err(Exception::gp(0));
    }
    Ok(TableReg { base, limit })
}

/// What SGDT and SIDT write at linear address `at`.
///
/// # Errors
/// #GP(0) above CPL 0 with CR4.UMIP; faults of the write.
pub fn store_table(env: &mut Env, t: TableReg, at: u64, size: u8) -> Result<(), Exception> {
    let cpl = env.cpu.cpl();
    if env.cpu.cr4 & cr4::UMIP != 0 && cpl != 0 {
        return Err(Exception::gp(0));
    }
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&t.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&t.base.to_le_bytes());
    let len = if size == 8 { 10 } else { 6 };
    let mmu = env.cpu.mmu_at(cpl);
    env.write_bytes(at, &bytes[..len], mmu)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{BIG, Bench, CODE, DATA, GDT, TSS, descriptor, sel};
    use super::*;

    fn gp(selector: u16) -> Result<(), Exception> {
        Err(Exception::gp(code(selector)))
    }

    #[test]
    fn descriptors_decode() {
        let d = Descriptor { raw: 0x12cf_9a34_5678_ffff, at: 0 };
        assert_eq!((d.base(), d.limit()), (0x1234_5678, u32::MAX));
        assert!(d.is_code() && d.present() && !d.is_conforming() && d.is_readable());
        assert_eq!(d.raw, descriptor(0x1234_5678, 0xf_ffff, 0xc09a));
    }

    #[test]
    fn real_mode_changes_base_only() {
        let mut b = Bench::new();
        b.load(|s| s.seg[seg::DS].limit = u32::MAX);
        load_seg(b.env(), seg::DS, 0x1234).unwrap();
        let s = b.env().cpu.seg[seg::DS];
        assert_eq!(
            (s.base, s.limit, b.env().cpu.seg_base[seg::DS]),
            (0x1_2340, u32::MAX, 0x1_2340)
        );
    }

    // SDM vol. 2, MOV: protected mode exceptions.
    #[test]
    fn protected_loads_are_checked() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(0x1000, 0xfff, DATA & !1 | BIG));
        b.gdt(sel::FREE + 8, descriptor(0, 0, DATA & !ATTR_P));
        b.gdt(sel::FREE + 16, descriptor(0, 0, ATTR_P | ATTR_S | 8));
        b.protected(0);
        let env = b.env();
        load_seg(env, seg::ES, sel::FREE).unwrap();
        assert_eq!((env.cpu.seg[seg::ES].base, env.cpu.seg[seg::ES].limit), (0x1000, 0xff_ffff));
        let np = Exception::with_error(vector::NP, code(sel::FREE + 8));
        assert_eq!(load_seg(env, seg::DS, sel::FREE + 8), Err(np));
        let ss = Exception::with_error(vector::SS, code(sel::FREE + 8));
        assert_eq!(load_seg(env, seg::SS, sel::FREE + 8), Err(ss));
        // Execute-only code; a TSS; beyond the table; a missing LDT.
        assert_eq!(load_seg(env, seg::DS, sel::FREE + 16), gp(sel::FREE + 16));
        assert_eq!(load_seg(env, seg::DS, sel::TSS), gp(sel::TSS));
        assert_eq!(load_seg(env, seg::DS, 0x1008), gp(0x1008));
        assert_eq!(load_seg(env, seg::DS, 0xc), gp(0xc));
        assert_eq!(load_seg(env, seg::SS, 0), gp(0));
        assert_eq!(load_seg(env, seg::SS, sel::DATA3), gp(sel::DATA3));
        load_seg(env, seg::GS, 3).unwrap();
        assert_eq!(env.cpu.seg[seg::GS].attr, ATTR_UNUSABLE);
        // The accessed bit has been set in memory.
        assert_eq!(b.peek64(GDT + u64::from(sel::FREE)) >> 40 & 1, 1);
    }

    #[test]
    fn ring_3_may_not_load_ring_0_data_but_conforming_code() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(0, 0, CODE | ty::CONFORMING));
        b.protected(3);
        let env = b.env();
        assert_eq!(load_seg(env, seg::DS, sel::DATA0), gp(sel::DATA0));
        load_seg(env, seg::DS, sel::FREE | 3).unwrap();
    }

    #[test]
    fn null_stack_in_64_bit_mode_below_ring_3() {
        let mut b = Bench::new();
        b.long(0);
        load_seg(b.env(), seg::SS, 0).unwrap();
        assert_eq!(b.env().cpu.cpl(), 0);
        assert_eq!(load_seg(b.env(), seg::SS, 3), gp(0));
        b.long(3);
        assert_eq!(load_seg(b.env(), seg::SS, 3), gp(0));
    }

    #[test]
    fn limits_up_and_down() {
        let up = Segment { limit: 0xfff, attr: DATA, ..Segment::default() };
        assert!(in_limit(&up, 0xffc, 4) && !in_limit(&up, 0xffd, 4));
        assert!(!in_limit(&up, u64::MAX, 2));
        let down = Segment { limit: 0xfff, attr: DATA | 4, ..Segment::default() };
        assert!(!in_limit(&down, 0xfff, 1) && in_limit(&down, 0x1000, 4));
        assert!(in_limit(&down, 0xfffe, 2) && !in_limit(&down, 0xffff, 2));
    }

    // SDM vol. 2, LAR, LSL, VERR.
    #[test]
    fn inspection() {
        let mut b = Bench::new();
        b.protected(3);
        let env = b.env();
        assert_eq!(lar(env, sel::CODE3), Ok(Some(0x00c0_fb00)));
        assert_eq!(lar(env, sel::CODE0), Ok(None));
        assert_eq!(lsl(env, sel::DATA3), Ok(Some(u32::MAX)));
        assert_eq!(lar(env, 3), Ok(None));
        assert_eq!(lar(env, 0x2003), Ok(None));
        assert_eq!((verr(env, sel::CODE3), verw(env, sel::CODE3)), (Ok(true), Ok(false)));
        assert_eq!(verw(env, sel::DATA3), Ok(true));
        b.protected(0);
        assert_eq!(lar(b.env(), sel::TSS), Ok(Some(0x8b00)));
        assert_eq!(lsl(b.env(), sel::TSS), Ok(Some(0x2fff)));
    }

    #[test]
    fn task_register_and_ldt_of_long_mode_have_64_bit_bases() {
        let mut b = Bench::new();
        b.gdt(sel::FREE, descriptor(TSS, 0x67, ATTR_P | ty::TSS));
        b.gdt(sel::FREE + 8, 0xffff_8000);
        b.gdt(sel::FREE + 16, descriptor(0x5000, 0xff, ATTR_P | ty::LDT));
        b.gdt(sel::FREE + 24, 0);
        b.long(0);
        ltr(b.env(), sel::FREE).unwrap();
        let tr = b.env().cpu.seg[seg::TR];
        assert_eq!((tr.base, tr.attr & 0xf), (0xffff_8000_0000_0000 | TSS, ty::TSS_BUSY));
        // It is busy now.
        assert_eq!(ltr(b.env(), sel::FREE), gp(sel::FREE));
        lldt(b.env(), sel::FREE + 16).unwrap();
        assert_eq!(b.env().cpu.seg[seg::LDTR].base, 0x5000);
        lldt(b.env(), 0).unwrap();
        assert_eq!(b.env().cpu.seg[seg::LDTR].attr, ATTR_UNUSABLE);
        // An address that is not canonical.
        b.gdt(sel::FREE + 24, 0x8000);
        assert_eq!(lldt(b.env(), sel::FREE + 16), gp(sel::FREE + 16));
        b.long(3);
        assert_eq!(ltr(b.env(), sel::FREE), gp(0));
    }

    #[test]
    fn table_registers() {
        let mut b = Bench::new();
        b.poke(0x6000, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12, 0, 0, 0xff, 0xff]);
        b.long(0);
        assert_eq!(load_table(b.env(), 0x6000, 8), Err(Exception::gp(0)));
        b.poke(0x6007, &[0x80]);
        assert_eq!(load_table(b.env(), 0x6000, 8).unwrap().base, 0xffff_8000_1234_5678);
        b.protected(0);
        let t = load_table(b.env(), 0x6000, 2).unwrap();
        assert_eq!((t.base, t.limit), (0x34_5678, 0x1234));
        let t = load_table(b.env(), 0x6000, 4).unwrap();
        assert_eq!(t.base, 0x1234_5678);
        store_table(b.env(), t, 0x6100, 4).unwrap();
        assert_eq!((b.peek32(0x6102), b.peek16(0x6106)), (0x1234_5678, 0));
        b.protected(3);
        b.env().cpu.cr4 |= cr4::UMIP;
        assert!(store_table(b.env(), t, 0x6100, 4).is_err());
        assert!(load_table(b.env(), 0x6000, 4).is_err());
    }
}
