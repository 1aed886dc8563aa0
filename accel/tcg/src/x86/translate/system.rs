//! System instructions: privilege checks that the mode decides, then a helper.

use super::Translator;
use super::mov::selector;
use super::operand::{Gpr, seg_num};
use crate::x86::bits::rflags::{self, ZF};
use crate::x86::cpu::{Cpu, global};
use crate::x86::helpers;
use crate::x86::mode::Mode;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;
use tandem_accel::x86::{Segment, seg};
use tandem_jit::ir::{Addr, Cond, ExitHint, Op, PTR_READ, PTR_WRITE, Val, Width};

const N: Val = Val::NONE;

impl Translator<'_> {
    /// Raises #GP(0) unless CPL is 0; true if it did.
    fn not_cpl0(&mut self) -> bool {
        let bad = self.cpl() != 0;
        if bad {
            self.gp0();
        }
        bad
    }

    /// Ends the block at the next instruction: the mode or what lies behind it has changed.
    pub(super) fn next_block(&mut self) {
        let next = self.b.iconst(self.next);
        self.jump(next, ExitHint::Jump);
    }

    /// Ends the block with interrupts held back for one more instruction. A load of SS, unlike STI,
    /// holds back the single-step trap as well (`traps` says it does not).
    pub(super) fn shadow_and_leave(&mut self, traps: bool) {
        let one = self.b.iconst(1);
        let at = super::cpu_field(offset_of!(Cpu, interrupt_shadow));
        self.b.stenv(Width::W8, at, one);
        if traps {
            self.leave_next(crate::exec::leave::LOOP);
        } else {
            self.leave(crate::exec::leave::LOOP, Some(self.next));
        }
    }
}

/// MOV to and from control and debug registers.
pub(super) fn mov_control(t: &mut Translator, insn: &Instruction) {
    if t.not_cpl0() {
        return;
    }
    let (dst, src) = (insn.op0_register(), insn.op1_register());
    let number = |r: Register| r.number() as u64;
    if let Some(to) = Gpr::of(dst) {
        let n = t.b.iconst(number(src));
        let helper = if src.is_cr() { helpers::READ_CR } else { helpers::READ_DR };
        let v = t.b.call(helper, &[n]);
        let v = t.zero_upper(to.w, v);
        t.set_gpr(to, v);
        return;
    }
    let Some(from) = Gpr::of(src) else { return t.ud() };
    let v = t.gpr(from);
    let v = t.zero_upper(from.w, v);
    let n = t.b.iconst(number(dst));
    let helper = if dst.is_cr() { helpers::WRITE_CR } else { helpers::WRITE_DR };
    t.b.call_void(helper, &[n, v]);
    t.leave_next(crate::exec::leave::LOOP);
}

/// Instructions with a fixed form: no operand of their own to translate. False if `insn` is none.
pub(super) fn simple(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    let leave = crate::exec::leave::LOOP;
    match insn.mnemonic() {
        Hlt => {
            if !t.not_cpl0() {
                t.b.call_void(helpers::HLT, &[]);
                t.leave_next(crate::exec::leave::HALT);
            }
        }
        Cli => cli(t),
        Sti => {
            t.b.call_void(helpers::STI, &[]);
        }
        Clts => {
            if !t.not_cpl0() {
                t.b.call_void(helpers::CLTS, &[]);
                t.next_block();
            }
        }
        Rdmsr => {
            if !t.not_cpl0() {
                t.b.call_void(helpers::RDMSR, &[]);
            }
        }
        Wrmsr => {
            if !t.not_cpl0() {
                t.b.call_void(helpers::WRMSR, &[]);
                t.leave_next(leave);
            }
        }
        Rdpmc => {
            let v = t.b.call(helpers::RDPMC, &[]);
            set_edx_eax(t, v);
        }
        Cpuid => {
            t.b.call_void(helpers::CPUID, &[]);
        }
        Rdtsc | Rdtscp => rdtsc(t, insn.mnemonic() == Rdtscp),
        Swapgs => {
            if !t.code64() {
                t.ud();
            } else if !t.not_cpl0() {
                swapgs(t);
            }
        }
        _ => return fast_call(t, insn) || extended(t, insn),
    }
    true
}

/// The ways into the kernel and back that need no gate. False if `insn` is none.
fn fast_call(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Syscall => {
            let next = t.b.iconst(t.next);
            t.b.call_void(helpers::SYSCALL, &[next]);
            t.jump_rip_unstepped();
        }
        Sysret | Sysretq => {
            let size = t.b.iconst(if insn.mnemonic() == Sysretq { 8 } else { 4 });
            t.b.call_void(helpers::SYSRET, &[size]);
            t.jump_rip_unstepped();
        }
        Sysenter => {
            t.b.call_void(helpers::SYSENTER, &[]);
            t.jump_rip();
        }
        Sysexit | Sysexitq => {
            let size = t.b.iconst(if insn.mnemonic() == Sysexitq { 8 } else { 4 });
            t.b.call_void(helpers::SYSEXIT, &[size]);
            t.jump_rip();
        }
        _ => return false,
    }
    true
}

/// Extended state, protection keys, SMAP, waiting, caches. False if `insn` is none of these.
fn extended(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    let leave = crate::exec::leave::LOOP;
    match insn.mnemonic() {
        Xgetbv => {
            let v = t.b.call(helpers::XGETBV, &[]);
            set_edx_eax(t, v);
        }
        Xsetbv => {
            t.b.call_void(helpers::XSETBV, &[]);
            t.leave_next(leave);
        }
        Rdpkru => {
            let v = t.b.call(helpers::RDPKRU, &[]);
            set_edx_eax(t, v);
        }
        Wrpkru => {
            t.b.call_void(helpers::WRPKRU, &[]);
            t.leave_next(leave);
        }
        Stac | Clac => {
            if t.cpl() != 0 || !t.protected() {
                t.ud();
            } else {
                let helper = if insn.mnemonic() == Stac { helpers::STAC } else { helpers::CLAC };
                t.b.call_void(helper, &[]);
                t.next_block();
            }
        }
        Monitor => {
            t.b.call_void(helpers::MONITOR, &[]);
        }
        Mwait => {
            t.b.call_void(helpers::MWAIT, &[]);
            t.leave_next(crate::exec::leave::HALT);
        }
        Vmcall | Vmmcall => {
            t.b.call_void(helpers::HYPERCALL, &[]);
        }
        Invd | Wbinvd | Wbnoinvd => {
            if !t.not_cpl0() {
                t.b.call_void(helpers::WBINVD, &[]);
            }
        }
        _ => return false,
    }
    true
}

/// CLI.
fn cli(t: &mut Translator) {
    if !t.mode.contains(Mode::IOPL_OK) {
        t.b.call_void(helpers::CLI, &[]);
        return;
    }
    let at = super::cpu_field(offset_of!(Cpu, eflags));
    let v = t.b.ldenv(Width::W64, at);
    let mask = t.b.iconst(!rflags::IF);
    let v = t.b.bin(Op::And, Width::W64, v, mask);
    t.b.stenv(Width::W64, at, v);
}

/// SWAPGS, privilege checked.
fn swapgs(t: &mut Translator) {
    let kernel = offset_of!(Cpu, msrs) + offset_of!(crate::x86::msr::Msrs, kernel_gs_base);
    let kernel = super::cpu_field(kernel);
    let hidden = offset_of!(Cpu, seg) + seg::GS * size_of::<Segment>() + offset_of!(Segment, base);
    let old = t.seg_base(seg::GS);
    let new = t.b.ldenv(Width::W64, kernel);
    t.b.stenv(Width::W64, kernel, old);
    t.b.stenv(Width::W64, super::cpu_field(hidden), new);
    t.b.put(global::GS_BASE, new);
}

/// Splits `v` over EDX:EAX.
fn set_edx_eax(t: &mut Translator, v: Val) {
    let lo = t.b.un(Op::Zext, Width::W32, v);
    let n = t.b.iconst(32);
    let hi = t.b.bin(Op::Shr, Width::W64, v, n);
    t.set_gpr64(0, lo);
    t.set_gpr64(2, hi);
}

/// RDTSC and RDTSCP.
fn rdtsc(t: &mut Translator, aux: bool) {
    if t.mode.contains(Mode::TSC_GP) {
        return t.gp0();
    }
    let v = t.b.call(helpers::RDTSC, &[]);
    let id = aux.then(|| tsc_aux(t));
    set_edx_eax(t, v);
    if let Some(id) = id {
        t.set_gpr64(1, id);
    }
}

/// IA32_TSC_AUX, 32 bits of it.
fn tsc_aux(t: &mut Translator) -> Val {
    let at = offset_of!(Cpu, msrs) + offset_of!(crate::x86::msr::Msrs, tsc_aux);
    t.b.ldenv(Width::W32, super::cpu_field(at))
}

/// Instructions with operands. False if `insn` is none.
pub(super) fn with_operands(t: &mut Translator, insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Lgdt | Lidt => load_table(t, insn),
        Sgdt | Sidt => store_table(t, insn),
        Lldt | Ltr => load_system(t, insn),
        Sldt | Str => store_system(t, insn),
        Smsw => {
            if umip(t) {
                return true;
            }
            let v = t.b.ldenv(Width::W64, super::cpu_field(offset_of!(Cpu, cr0)));
            match Gpr::of(insn.op0_register()) {
                Some(r) => {
                    let v = t.zero_upper(r.w, v);
                    t.set_gpr(r, v);
                }
                None => t.write(insn, 0, Width::W16, v),
            }
        }
        Lmsw => {
            if !t.not_cpl0() {
                let v = t.read(insn, 0, Width::W16);
                let v = t.b.un(Op::Zext, Width::W16, v);
                t.b.call_void(helpers::LMSW, &[v]);
                t.leave_next(crate::exec::leave::LOOP);
            }
        }
        Lar | Lsl => access_rights(t, insn),
        Verr | Verw => verify(t, insn),
        Arpl => arpl(t, insn),
        Invlpg => {
            if !t.not_cpl0() {
                let o = t.mem_offset(insn);
                let segment = super::operand::seg_num(insn.memory_segment()).unwrap_or(seg::DS);
                let base = t.seg_base(segment);
                let flat = t.code64() && segment < seg::FS;
                let v = t.offset_value(o);
                let v = if flat { v } else { t.b.bin(Op::Add, Width::W64, v, base) };
                t.b.call_void(helpers::INVLPG, &[v]);
                t.leave_next(crate::exec::leave::LOOP);
            }
        }
        Invpcid => {
            if !t.not_cpl0() {
                let Some(kind) = Gpr::of(insn.op0_register()) else { return false };
                let addr = t.mem_addr(insn, 16, PTR_READ);
                let addr = t.b.lea(Width::W64, addr);
                let kind = t.gpr(kind);
                t.b.call_void(helpers::INVPCID, &[kind, addr]);
                t.leave_next(crate::exec::leave::LOOP);
            }
        }
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => fs_gs_base(t, insn),
        Rdpid => {
            let v = tsc_aux(t);
            if let Some(r) = Gpr::of(insn.op0_register()) {
                t.set_gpr(r, v);
            }
        }
        In => input(t, insn),
        Out => output(t, insn),
        Rdrand | Rdseed => random(t, insn),
        Lds | Les | Lfs | Lgs | Lss => load_far_pointer(t, insn),
        _ => return false,
    }
    true
}

/// Raises #GP(0) where UMIP forbids looking at system state; true if it did.
fn umip(t: &mut Translator) -> bool {
    let bad = t.mode.contains(Mode::UMIP);
    if bad {
        t.gp0();
    }
    bad
}

/// Operand size of LGDT and the like, in bytes: it decides how much of the base counts.
fn table_size(t: &Translator, insn: &Instruction) -> u64 {
    use iced_x86::Code::*;
    match insn.code() {
        Lgdt_m1632_16 | Lidt_m1632_16 | Sgdt_m1632_16 | Sidt_m1632_16 => 2,
        _ if t.code64() => 8,
        _ => 4,
    }
}

fn load_table(t: &mut Translator, insn: &Instruction) {
    if t.not_cpl0() {
        return;
    }
    let size = table_size(t, insn);
    let addr = t.mem_addr(insn, if size == 8 { 10 } else { 6 }, PTR_READ);
    let addr = t.b.lea(Width::W64, addr);
    let size = t.b.iconst(size);
    let helper = if insn.mnemonic() == Mnemonic::Lgdt { helpers::LGDT } else { helpers::LIDT };
    t.b.call_void(helper, &[addr, size]);
}

fn store_table(t: &mut Translator, insn: &Instruction) {
    if umip(t) {
        return;
    }
    let size = table_size(t, insn);
    let addr = t.mem_addr(insn, if size == 8 { 10 } else { 6 }, PTR_WRITE);
    let addr = t.b.lea(Width::W64, addr);
    let size = t.b.iconst(size);
    let helper = if insn.mnemonic() == Mnemonic::Sgdt { helpers::SGDT } else { helpers::SIDT };
    t.b.call_void(helper, &[addr, size]);
}

fn load_system(t: &mut Translator, insn: &Instruction) {
    if !t.protected() {
        return t.ud();
    }
    if t.not_cpl0() {
        return;
    }
    let v = t.read(insn, 0, Width::W16);
    let v = t.b.un(Op::Zext, Width::W16, v);
    let helper = if insn.mnemonic() == Mnemonic::Lldt { helpers::LLDT } else { helpers::LTR };
    t.b.call_void(helper, &[v]);
}

fn store_system(t: &mut Translator, insn: &Instruction) {
    if !t.protected() {
        return t.ud();
    }
    if umip(t) {
        return;
    }
    let n = if insn.mnemonic() == Mnemonic::Sldt { seg::LDTR } else { seg::TR };
    let v = selector(t, n);
    match Gpr::of(insn.op0_register()) {
        Some(r) => t.set_gpr(r, v),
        None => t.write(insn, 0, Width::W16, v),
    }
}

/// LAR and LSL: the helper gives the value, and ZF in bit 63; without ZF the destination stays.
fn access_rights(t: &mut Translator, insn: &Instruction) {
    if !t.protected() {
        return t.ud();
    }
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let sel = t.read(insn, 1, Width::W16);
    let sel = t.b.un(Op::Zext, Width::W16, sel);
    let helper = if insn.mnemonic() == Mnemonic::Lar { helpers::LAR } else { helpers::LSL };
    let v = t.b.call(helper, &[sel]);
    let n = t.b.iconst(63);
    let zf = t.b.bin(Op::Shr, Width::W64, v, n);
    let fl = t.b.flags_of(Op::And, Width::W32, [zf, zf, N, N]);
    let image = zf_image(t, zf);
    let whole = t.gpr64(r.num);
    let v = t.b.un(Op::Zext, Width::W32, v);
    let new = t.merged(r, whole, v);
    let v = t.b.selcc(Width::W64, Cond::Ne, fl, new, whole);
    t.set_gpr64(r.num, v);
    t.set_flags_image(image);
}

/// The flags' image with ZF replaced by the value `zf`, 0 or 1.
fn zf_image(t: &mut Translator, zf: Val) -> Val {
    let image = t.flags_image();
    let keep = t.b.iconst(!ZF);
    let image = t.b.bin(Op::And, Width::W32, image, keep);
    let six = t.b.iconst(6);
    let bit = t.b.bin(Op::Shl, Width::W32, zf, six);
    t.b.bin(Op::Or, Width::W32, image, bit)
}

fn verify(t: &mut Translator, insn: &Instruction) {
    if !t.protected() {
        return t.ud();
    }
    let sel = t.read(insn, 0, Width::W16);
    let sel = t.b.un(Op::Zext, Width::W16, sel);
    let helper = if insn.mnemonic() == Mnemonic::Verr { helpers::VERR } else { helpers::VERW };
    let zf = t.b.call(helper, &[sel]);
    let image = zf_image(t, zf);
    t.set_flags_image(image);
}

/// ARPL: the destination's RPL becomes the source's if that is greater; ZF says so.
fn arpl(t: &mut Translator, insn: &Instruction) {
    if !t.protected() {
        return t.ud();
    }
    let src = t.read(insn, 1, Width::W16);
    let image = t.flags_image();
    let zf = match Gpr::of(insn.op0_register()) {
        Some(dst) if insn.op0_kind() == OpKind::Register => {
            let old = t.gpr(dst);
            let three = t.b.iconst(3);
            let a = t.b.bin(Op::And, Width::W32, old, three);
            let b = t.b.bin(Op::And, Width::W32, src, three);
            let fl = t.b.flags_of(Op::Sub, Width::W32, [a, b, N, N]);
            let raised = t.b.bin(Op::Xor, Width::W32, old, a);
            let raised = t.b.bin(Op::Or, Width::W32, raised, b);
            let v = t.b.selcc(Width::W32, Cond::B, fl, raised, old);
            t.set_gpr(dst, v);
            t.b.setcc(Cond::B, fl)
        }
        _ => {
            // Memory is written only if it changes.
            let segment = seg_num(insn.memory_segment()).unwrap_or(seg::DS) as u64;
            let mode = u64::from(t.mode.mmu_idx()) << 8;
            let what = t.b.iconst(segment | mode);
            let offset = t.mem_offset(insn);
            let offset = t.offset_value(offset);
            // Alignment is checked as for any operand.
            let addr = t.mem_addr(insn, 2, PTR_READ);
            t.b.ld(Width::W16, addr, 0);
            t.b.call(helpers::ARPL, &[what, offset, src])
        }
    };
    let keep = t.b.iconst(!ZF);
    let image = t.b.bin(Op::And, Width::W32, image, keep);
    let six = t.b.iconst(6);
    let bit = t.b.bin(Op::Shl, Width::W32, zf, six);
    let image = t.b.bin(Op::Or, Width::W32, image, bit);
    t.set_flags_image(image);
}

fn fs_gs_base(t: &mut Translator, insn: &Instruction) {
    if !t.code64() || !t.mode.contains(Mode::FSGSBASE) {
        return t.ud();
    }
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let n = match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => seg::FS,
        _ => seg::GS,
    };
    let v = if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let v = t.seg_base(n);
        let v = t.zero_upper(r.w, v);
        return t.set_gpr(r, v);
    } else {
        t.gpr(r)
    };
    let v = t.zero_upper(r.w, v);
    let n = t.b.iconst(n as u64);
    t.b.call_void(helpers::WRFSGSBASE, &[n, v]);
}

/// Port number and size of an IN or OUT, checked against the permission bitmap where IOPL does not
/// allow the access.
fn io(t: &mut Translator, insn: &Instruction, port: u32, w: Width) -> (Val, Val) {
    let p = t.read(insn, port, Width::W16);
    let p = t.b.un(
        Op::Zext,
        if insn.op_kind(port) == OpKind::Register { Width::W16 } else { Width::W8 },
        p,
    );
    let size = t.b.iconst(w.bytes().into());
    if !t.mode.contains(Mode::IOPL_OK) {
        t.b.call_void(helpers::CHECK_IO, &[p, size]);
    }
    (p, size)
}

fn input(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let (port, size) = io(t, insn, 1, r.w);
    let v = t.b.call(helpers::PIO_IN, &[port, size]);
    let v = t.zero_upper(r.w, v);
    t.set_gpr(r, v);
}

fn output(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op1_register()) else { return t.ud() };
    let (port, size) = io(t, insn, 0, r.w);
    let v = t.gpr(r);
    t.b.call_void(helpers::PIO_OUT, &[port, size, v]);
}

/// RDRAND and RDSEED: always succeed.
fn random(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let v = t.b.call(helpers::RANDOM, &[]);
    let v = t.zero_upper(r.w, v);
    t.set_gpr(r, v);
    let carry = t.b.iconst(crate::x86::bits::rflags::CF);
    t.set_flags_image(carry);
}

/// LDS, LES, LFS, LGS, LSS.
fn load_far_pointer(t: &mut Translator, insn: &Instruction) {
    let Some(r) = Gpr::of(insn.op0_register()) else { return t.ud() };
    let n = match insn.mnemonic() {
        Mnemonic::Les => seg::ES,
        Mnemonic::Lss => seg::SS,
        Mnemonic::Lds => seg::DS,
        Mnemonic::Lfs => seg::FS,
        _ => seg::GS,
    };
    let addr = t.mem_addr(insn, r.w.bytes() + 2, PTR_READ);
    let offset = t.b.ld(r.w, addr, 0);
    let at = t.b.lea(Width::W64, addr);
    let sel = t.b.ld(Width::W16, Addr::disp(at, r.w.bytes() as i32), 0);
    super::mov::set_segment(t, n, sel);
    t.set_gpr(r, offset);
    // LSS, unlike MOV SS, holds no interrupts back.
    if !t.code64() {
        t.next_block();
    }
}

/// CLD and STD.
pub(super) fn direction(t: &mut Translator, down: bool) {
    let v = t.b.iconst(if down { u64::MAX } else { 1 });
    t.b.put(global::DF, v);
}
