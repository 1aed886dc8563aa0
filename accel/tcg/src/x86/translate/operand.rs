//! Operands: general registers, immediates, memory.

use super::Translator;
use crate::x86::cpu::{Cpu, global};
use crate::x86::exception::vector;
use crate::x86::helpers;
use crate::x86::mode::Mode;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_accel::x86::{Segment, seg};
use tandem_jit::ir::{
    Addr, Cond, Exit, ExitHint, ExitKind, Global, Op, PTR_LOCKED, PTR_READ, PTR_WRITE, Val, Width,
};

/// A general register as an operand names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gpr {
    /// Number 0–15.
    pub num: u8,
    /// Width of the part that is named.
    pub w: Width,
    /// It is AH, CH, DH or BH.
    pub high: bool,
}

impl Gpr {
    /// The register that iced calls `reg`; `None` if that is no general register.
    pub fn of(reg: Register) -> Option<Gpr> {
        let n = reg as u32;
        let at = |first: Register| (n.wrapping_sub(first as u32)) as u8;
        let low = |num, w| Some(Gpr { num, w, high: false });
        match n {
            _ if n < Register::AL as u32 || n > Register::R15 as u32 => None,
            _ if n >= Register::RAX as u32 => low(at(Register::RAX), Width::W64),
            _ if n >= Register::EAX as u32 => low(at(Register::EAX), Width::W32),
            _ if n >= Register::AX as u32 => low(at(Register::AX), Width::W16),
            _ if n >= Register::SPL as u32 => low(at(Register::SPL) + 4, Width::W8),
            _ if n >= Register::AH as u32 => {
                Some(Gpr { num: at(Register::AH), w: Width::W8, high: true })
            }
            _ => low(at(Register::AL), Width::W8),
        }
    }

    /// Its global.
    pub fn global(self) -> Global {
        Global(self.num & 15)
    }
}

/// The number of a segment register (ES, CS, SS, DS, FS, GS = 0–5), if it is one.
pub fn seg_num(reg: Register) -> Option<usize> {
    let n = (reg as usize).wrapping_sub(Register::ES as usize);
    (n < 6).then_some(n)
}

/// An offset within a segment: parts that are none are zero.
#[derive(Clone, Copy, Debug)]
pub struct Offset {
    /// Base.
    pub base: Val,
    /// Index.
    pub index: Val,
    /// log2 of the index's factor.
    pub scale: u8,
    /// Displacement.
    pub disp: i64,
    /// Address size: W16, W32 or W64.
    pub size: Width,
}

impl Offset {
    /// The value `v`, at address size `size`.
    pub fn value(v: Val, size: Width) -> Offset {
        Offset { base: v, index: Val::NONE, scale: 0, disp: 0, size }
    }
}

/// Whether the instruction's change of memory is atomic; XCHG's is in any case (SDM vol. 3 §9.1.2).
fn is_locked(insn: &Instruction) -> bool {
    insn.has_lock_prefix() || insn.mnemonic() == Mnemonic::Xchg
}

/// To what an access of `size` bytes should be aligned (SDM vol. 3 table 6-7); vectors to 16 bytes, as
/// AMD's processors have it.
fn natural_alignment(size: u32) -> u32 {
    match size {
        10 => 8,
        n if n.is_power_of_two() => n.min(16),
        _ => 1,
    }
}

impl Translator<'_> {
    // ---- registers ----

    /// All 64 bits of general register `num`.
    pub fn gpr64(&mut self, num: u8) -> Val {
        self.b.get(Global(num & 15))
    }

    /// Sets all 64 bits of general register `num`.
    pub fn set_gpr64(&mut self, num: u8, v: Val) {
        self.b.put(Global(num & 15), v);
    }

    /// The value of a general register; only the low bits of its width mean anything.
    pub fn gpr(&mut self, r: Gpr) -> Val {
        let v = self.b.get(r.global());
        if r.high { self.b.extract(Width::W8, v, 8) } else { v }
    }

    /// Writes a general register as an instruction of its width does: 64-bit registers whole, 32-bit
    /// ones zero-extended, smaller ones into their place. For W32, `v` must have its upper half
    /// clear, as every W32 result has.
    pub fn set_gpr(&mut self, r: Gpr, v: Val) {
        let new = match r.w {
            Width::W64 | Width::W32 => v,
            w => {
                let old = self.b.get(r.global());
                self.b.deposit(w, old, v, if r.high { 8 } else { 0 })
            }
        };
        self.b.put(r.global(), new);
    }

    // ---- operands of an instruction ----

    /// The width of operand `n`; that of memory operands is the memory size.
    pub fn op_width(&self, insn: &Instruction, n: u32) -> Width {
        let bytes = match insn.op_kind(n) {
            OpKind::Register => insn.op_register(n).size(),
            OpKind::Memory => insn.memory_size().size(),
            _ => return self.op_width_of_immediate(insn),
        };
        Width::from_bytes(bytes as u32).unwrap_or(Width::W64)
    }

    /// Immediates have the width of the first operand.
    fn op_width_of_immediate(&self, insn: &Instruction) -> Width {
        match insn.op0_kind() {
            OpKind::Register | OpKind::Memory => self.op_width(insn, 0),
            _ => Width::W64,
        }
    }

    /// Reads operand `n` at width `w`: a general register, an immediate or memory. Only the low `w`
    /// bits mean anything; memory is zero-extended.
    pub fn read(&mut self, insn: &Instruction, n: u32, w: Width) -> Val {
        match insn.op_kind(n) {
            OpKind::Register => match Gpr::of(insn.op_register(n)) {
                Some(r) => self.gpr(r),
                None => self.b.iconst(0),
            },
            OpKind::Memory => {
                let addr = self.mem_addr(insn, w.bytes(), PTR_READ);
                self.b.ld(w, addr, 0)
            }
            _ => {
                let imm = insn.try_immediate(n).unwrap_or(0);
                self.b.iconst(imm)
            }
        }
    }

    // ---- memory ----

    /// Linear address of the memory operand of `insn`, for an access of `size` bytes ([`PTR_READ`],
    /// [`tandem_jit::ir::PTR_WRITE`]). Emits the segment checks that the mode needs, which can fault.
    pub fn mem_addr(&mut self, insn: &Instruction, size: u32, access: u8) -> Addr {
        let offset = self.mem_offset(insn);
        let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
        self.linear(segment, offset, size, access)
    }

    /// As [`Translator::mem_addr`], with #AC for what is not aligned to `align` bytes, a power of two.
    pub fn mem_addr_aligned(
        &mut self,
        insn: &Instruction,
        size: u32,
        align: u32,
        access: u8,
    ) -> Addr {
        let offset = self.mem_offset(insn);
        let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS);
        self.linear_aligned(segment, offset, size, align, access)
    }

    /// A host pointer to the memory operand of `insn`, `1 << size_log2` bytes.
    pub fn mem_ptr(&mut self, insn: &Instruction, size_log2: u8, access: u8) -> Val {
        let addr = self.mem_addr(insn, 1 << size_log2, access);
        let lock = if is_locked(insn) { PTR_LOCKED } else { 0 };
        self.b.ptr(size_log2, addr, access | lock)
    }

    /// The offset that the memory operand of `insn` names in its segment.
    pub fn mem_offset(&mut self, insn: &Instruction) -> Offset {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64();
        if insn.is_ip_rel_memory_operand() {
            let size = if base == Register::EIP { Width::W32 } else { Width::W64 };
            let v = self.b.iconst(disp);
            return Offset::value(v, size);
        }
        let bytes = if base != Register::None {
            base.size()
        } else if index != Register::None {
            index.size()
        } else {
            insn.memory_displ_size() as usize
        };
        let size = match bytes {
            2 => Width::W16,
            8 => Width::W64,
            _ => Width::W32,
        };
        let disp = match size {
            Width::W64 => disp as i64,
            _ => disp as u32 as i32 as i64,
        };
        let mut part = |r: Register| Gpr::of(r).map_or(Val::NONE, |g| self.b.get(g.global()));
        Offset {
            base: part(base),
            index: part(index),
            scale: insn.memory_index_scale().trailing_zeros() as u8 & 3,
            disp,
            size,
        }
    }

    /// An offset as one value, wrapped to its address size and zero-extended.
    pub fn offset_value(&mut self, o: Offset) -> Val {
        let w = if o.size == Width::W64 { Width::W64 } else { Width::W32 };
        let v = match i32::try_from(o.disp) {
            Ok(0) if o.base.is_some() && !o.index.is_some() && w == Width::W64 => o.base,
            Ok(disp) if o.base.is_some() || o.index.is_some() => {
                self.b.lea(w, Addr { base: o.base, index: o.index, scale: o.scale, disp })
            }
            Ok(_) => {
                let m = w.mask();
                self.b.iconst(o.disp as u64 & m)
            }
            // Only a 64-bit absolute address, which has neither base nor index.
            Err(_) => self.b.iconst(o.disp as u64),
        };
        if o.size == Width::W16 { self.b.un(Op::Zext, Width::W16, v) } else { v }
    }

    /// Linear address of `o` in segment `segment` (its number), for an access of `size` bytes.
    pub fn linear(&mut self, segment: usize, o: Offset, size: u32, access: u8) -> Addr {
        self.linear_aligned(segment, o, size, natural_alignment(size), access)
    }

    /// As [`Translator::linear`], for an access that should be aligned to `align` bytes, a power of
    /// two: #AC says otherwise where alignment is checked.
    pub fn linear_aligned(
        &mut self,
        segment: usize,
        o: Offset,
        size: u32,
        align: u32,
        access: u8,
    ) -> Addr {
        let addr = self.linear_unaligned(segment, o, size, access);
        if self.mode.contains(Mode::ALIGN_CHECK) && align > 1 {
            let v = self.b.lea(Width::W64, addr);
            let mmu = u64::from(self.mode.mmu_idx());
            let what = u64::from(size) | u64::from(access) << 16 | mmu << 24;
            let what = self.b.iconst(what | u64::from(align) << 32);
            self.b.call_void(helpers::ALIGN_CHECK, &[v, what]);
            return Addr::base(v);
        }
        addr
    }

    /// Whether an access through segment `segment` needs a check of limit and type.
    pub fn needs_check(&self, segment: usize, access: u8) -> bool {
        self.mode.contains(Mode::SEGMENTED)
            || match segment {
                // Code is never written to, however flat (SDM vol. 3 §3.4.5.1).
                seg::CS => !self.code64() && self.protected() && access & PTR_WRITE != 0,
                seg::FS => self.mode.contains(Mode::FS_LIMITED),
                seg::GS => self.mode.contains(Mode::GS_LIMITED),
                _ => false,
            }
    }

    fn linear_unaligned(&mut self, segment: usize, o: Offset, size: u32, access: u8) -> Addr {
        if self.needs_check(segment, access) {
            let offset = self.offset_value(o);
            if !self.protected() {
                return self.limit_checked(segment, offset, size);
            }
            let what = self.b.iconst((segment as u64) << 8 | access as u64);
            let size = self.b.iconst(size.into());
            let v = self.b.call(helpers::SEG_CHECK, &[what, offset, size]);
            return Addr::base(v);
        }
        let based = segment == seg::FS || segment == seg::GS;
        if !self.code64() {
            // Flat: ES, CS, SS and DS have base 0. Linear addresses wrap at 4 GiB.
            let mut v = self.offset_value(o);
            if based {
                let base = self.seg_base(segment);
                v = self.b.lea(Width::W32, Addr { base, index: v, scale: 0, disp: 0 });
            }
            return Addr::base(v);
        }
        if !based {
            return self.flat64(o);
        }
        let base = self.seg_base(segment);
        match i32::try_from(o.disp) {
            // base and index in one place: segment base + one scaled register + displacement.
            Ok(disp) if o.size == Width::W64 && !o.index.is_some() => {
                Addr { base, index: o.base, scale: 0, disp }
            }
            Ok(disp) if o.size == Width::W64 && !o.base.is_some() => {
                Addr { base, index: o.index, scale: o.scale, disp }
            }
            _ => {
                let index = self.offset_value(o);
                Addr { base, index, scale: 0, disp: 0 }
            }
        }
    }

    /// The check of real and virtual-8086 mode, where segments have limits but no types.
    fn limit_checked(&mut self, segment: usize, offset: Val, size: u32) -> Addr {
        let n = segment.min(seg::GS);
        let last = Addr::disp(offset, size.saturating_sub(1) as i32);
        let last = self.b.lea(Width::W64, last);
        self.check_limit(n, last);
        let base = self.seg_base(n);
        let addr = Addr { base, index: offset, scale: 0, disp: 0 };
        Addr::base(self.b.lea(Width::W32, addr))
    }

    /// #SS(0) or #GP(0) if offset `last` is beyond the limit of segment `n`.
    fn check_limit(&mut self, n: usize, last: Val) {
        let at = offset_of!(Cpu, seg) + n * size_of::<Segment>() + offset_of!(Segment, limit);
        let limit = self.b.ldenv(Width::W32, super::cpu_field(at));
        let fl = self.b.flags_of(Op::Sub, Width::W64, [limit, last, Val::NONE, Val::NONE]);
        let raised = if n == seg::SS { vector::SS } else { vector::GP };
        let kind = ExitKind::Leave {
            code: super::translator::LEAVE_RAISE | u32::from(raised),
            pc: Some(self.rip),
        };
        self.b.brcc(Cond::B, fl, Exit::new(kind, ExitHint::Jump));
    }

    /// #GP(0) if the instruction of `len` bytes at RIP reaches beyond the code segment's limit.
    pub(super) fn check_code_limit(&mut self, len: usize) {
        let last = self.rip.wrapping_add(len as u64).wrapping_sub(1);
        // Limits of real and virtual-8086 mode are no less than that.
        let inside = !self.protected() && last <= 0xffff;
        if self.mode.contains(Mode::SEGMENTED) && !inside {
            let last = self.b.iconst(last);
            self.check_limit(seg::CS, last);
        }
    }

    /// An offset in a segment whose base is 0, in 64-bit code.
    fn flat64(&mut self, o: Offset) -> Addr {
        match i32::try_from(o.disp) {
            Ok(disp) if o.size == Width::W64 && o.base.is_some() => {
                Addr { base: o.base, index: o.index, scale: o.scale, disp }
            }
            Ok(disp) if o.size == Width::W64 && o.index.is_some() && o.scale == 0 => {
                Addr { base: o.index, index: Val::NONE, scale: 0, disp }
            }
            _ => Addr::base(self.offset_value(o)),
        }
    }

    /// The base of segment `segment` as a value.
    pub fn seg_base(&mut self, segment: usize) -> Val {
        self.b.get(Global(global::ES_BASE.0 + segment.min(5) as u8))
    }
}
