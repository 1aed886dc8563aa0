//! What processors do not agree about because the architecture leaves it to them. [`is_open`] finds the
//! runs that cannot be compared at all; [`Sides::reconcile`] makes equal what may differ in the others.
//!
//! Translated processors do as AMD's where there is a choice, so on such a host less is let pass.

use super::layout::{DATA, DATA_LEN, Memory};
use super::program::{Assembled, Program, decode};
use super::state::{Outcome, Trap};
use iced_x86::{Instruction, Mnemonic, OpKind};
use tandem_tcg::x86::bits::rflags::AC;
use tandem_tcg::x86::exception::vector;

/// Whether `t` may be a fault of a memory operand.
pub fn is_memory_fault(t: &Trap) -> bool {
    matches!(t.vector, vector::SS | vector::GP | vector::PF | vector::AC)
}

/// The instruction at which a run ended.
fn last<'a>(p: &'a Program, code: &Assembled, end: &Outcome) -> Option<&'a Instruction> {
    let at = end.state.rip.wrapping_sub(p.start()) as usize;
    code.starts.iter().position(|&s| s == at).and_then(|i| p.items.get(i)).map(|i| &i.insn)
}

/// Whether the two ended differently for a reason that is open; `lenient` if the host does not check wide
/// accesses for alignment.
pub fn is_open(
    p: &Program,
    code: &Assembled,
    want: &Outcome,
    got: &Outcome,
    lenient: bool,
) -> bool {
    lenient && checks_differ(p, code, want, got)
        || faults_instead(p, code, want, got)
        || enters_mmx(p, code, want, got)
        || converts_first(p, code, want, got)
        || reads_tables(p, got)
        || pushes_segment(p, code, want)
        || bounds_apart(p, code, want, got)
        || parts_apart(p, code, want, got)
}

/// Whether `insn` stores some elements of a vector only, or loads them.
fn is_masked(insn: &Instruction) -> bool {
    use Mnemonic as M;
    insn.has_op_mask()
        || matches!(insn.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// Whether one of two runs ended with #AC where processors need not agree: accesses of 16 bytes and more,
/// masked ones, and those that convert half precision (exception type 11: never). SDM vol. 2A 2.4 (exception types 2 to 6) checks accesses of 2, 4 and 8 bytes; vol. 3A
/// 6.15 leaves it to the implementation for MOVUPS and its like. AMD's processors check vectors to 16
/// bytes (APM vol. 2, 8.2.18) and masked ones not at all, and so do translated ones.
fn checks_differ(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    use Mnemonic as M;
    let open = |end: &Outcome| {
        end.trap.vector == vector::AC
            && last(p, code, end).is_some_and(|i| {
                i.memory_size().size() >= 16
                    || is_masked(i)
                    || matches!(i.mnemonic(), M::Vcvtph2ps | M::Vcvtps2ph)
            })
    };
    let end = |o: &Outcome| (o.trap.vector, o.state.rip);
    // In a loop both may end at the same place, in different rounds.
    let apart = end(want) != end(got) || want.state.gpr != got.state.gpr;
    (open(want) || open(got)) && apart
}

/// Whether `got` ended with a fault of a store that an unmasked x87 exception may keep from being done on
/// the host: whether a processor looks at the destination first is its own business.
fn faults_instead(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    use Mnemonic as M;
    const MASKS: u16 = 0x3f;
    last(p, code, got).is_some_and(|i| {
        i.op0_kind() == OpKind::Memory
            && matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
    }) && is_memory_fault(&got.trap)
        && got.state.cw & MASKS != MASKS
        // In a loop it may come to the same place again.
        && (want.state.rip != got.state.rip
            || want.trap.vector == vector::MF
            || (want.state.cw, want.state.sw) != (got.state.cw, got.state.sw))
}

/// Whether the host has reset TOP for an MMX instruction whose memory operand then faulted: Intel's
/// processors do, which nobody sees who starts the instruction again.
fn enters_mmx(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    const TOP: u16 = 7 << 11;
    is_memory_fault(&want.trap)
        && is_memory_fault(&got.trap)
        && want.state.rip == got.state.rip
        && want.state.sw & TOP == 0
        && got.state.sw & TOP != 0
        && last(p, code, want).is_some_and(|i| (0..i.op_count()).any(|n| i.op_register(n).is_mm()))
}

/// Whether VCVTPS2PH raised #XM on one side and a fault of its destination on the other: either may come
/// first.
fn converts_first(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    let both = |a: &Trap, b: &Trap| a.vector == vector::XM && is_memory_fault(b);
    want.state.rip == got.state.rip
        && (both(&want.trap, &got.trap) || both(&got.trap, &want.trap))
        && last(p, code, want).is_some_and(|i| i.mnemonic() == Mnemonic::Vcvtps2ph)
}

/// Whether both ended with different faults of an 80-bit operand: processors access it in two parts, and
/// may check all of the first before the limit of the second (SDM vol. 3A 6.9 leaves the order of faults
/// of one class to the implementation).
fn parts_apart(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    let (a, b) = (&want.trap, &got.trap);
    want.state.rip == got.state.rip
        && a.vector != b.vector
        && [a, b].iter().all(|t| is_memory_fault(t))
        && last(p, code, want).is_some_and(|i| i.memory_size().size() == 10)
}

/// Whether BOUND raised #BR on one side and a fault of its operand on the other, or different ones: the
/// upper bound may be read before the lower one is looked at, or after.
fn bounds_apart(p: &Program, code: &Assembled, want: &Outcome, got: &Outcome) -> bool {
    let (a, b) = (&want.trap, &got.trap);
    want.state.rip == got.state.rip
        && a.vector != b.vector
        && [a, b].iter().all(|t| is_memory_fault(t) || t.vector == vector::BR)
        && last(p, code, want).is_some_and(|i| i.mnemonic() == Mnemonic::Bound)
}

/// Whether the host ended in the midst of an instruction and may have pushed a segment register shortly
/// before: what that leaves in the upper half of a wide stack slot is open (SDM vol. 2B, PUSH). Programs
/// have no such instruction but where they jump into another.
fn pushes_segment(p: &Program, code: &Assembled, want: &Outcome) -> bool {
    const NEAR: usize = 32;
    let offset = want.state.rip.wrapping_sub(p.start()) as usize;
    let Some(end) = offset.checked_add(p.offset as usize) else { return false };
    if code.starts.contains(&offset) || end > p.memory.code.len() {
        return false;
    }
    (end.saturating_sub(NEAR)..end).any(|at| {
        decode(&p.memory.code[at..end], p.bits, at as u64).first().is_some_and(|i| {
            i.mnemonic() == Mnemonic::Push && i.op0_register().is_segment_register()
        })
    })
}

/// Whether `got` ended with #GP at an instruction that UMIP forbids: the host may know no UMIP, and if it
/// does, its kernel carries the instruction out with an answer of its own. (Programs have these where they
/// jump into the midst of an instruction.)
fn reads_tables(p: &Program, got: &Outcome) -> bool {
    use Mnemonic as M;
    let at = got.state.rip.wrapping_sub(p.start()).wrapping_add(p.offset);
    let bytes = usize::try_from(at).ok().and_then(|at| p.memory.code.get(at..));
    let insn =
        bytes.and_then(|b| decode(&b[..b.len().min(15)], p.bits, got.state.rip).first().copied());
    got.trap.vector == vector::GP
        && insn
            .is_some_and(|i| matches!(i.mnemonic(), M::Sldt | M::Str | M::Smsw | M::Sgdt | M::Sidt))
}

/// What a program left on the host and on a translated processor.
pub struct Sides<'a> {
    /// The host's end.
    pub want: &'a Outcome,
    /// The host's memory.
    pub want_memory: &'a Memory,
    /// The translated processor's end.
    pub got: &'a mut Outcome,
    /// The translated processor's memory.
    pub got_memory: &'a mut Memory,
}

impl Sides<'_> {
    /// Makes equal what may differ after `insn`, at which the program ended in code of size `bits`;
    /// `late` are MXCSR's flags and masks before and after.
    pub fn reconcile(mut self, insn: Option<Instruction>, bits: u32, interpreted: bool, late: u32) {
        let raised = self.want.trap.vector == vector::XM;
        if interpreted && raised && late & 0x18 != 0 {
            // It does not tell whether an unmasked overflow or underflow is inexact (see its thunks).
            self.same_mxcsr(0x20);
        }
        if bits == 32 {
            self.wrap();
        }
        let Some(insn) = insn else { return };
        let insn = &insn;
        use Mnemonic as M;
        self.far_jump(insn);
        self.gather(insn);
        if interpreted
            && raised
            && matches!(insn.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd)
        {
            // Dot products round several times: an early exception of a late step does not hide late ones
            // of an early step, which the interpreter cannot tell.
            self.same_mxcsr(!0);
        }
        if self.want.state.rip == self.got.state.rip
            && is_memory_fault(&self.want.trap)
            && is_memory_fault(&self.got.trap)
        {
            self.faults(insn);
        }
    }

    fn same_mxcsr(&mut self, bits: u32) {
        let (want, got) = (self.want.state.mxcsr, &mut self.got.state.mxcsr);
        *got = *got & !bits | want & bits;
    }

    /// Processors raise #GP(0) for a target that is not canonical in the jump; here it is raised at the
    /// target: the jump would pay for a look that no program needs.
    fn far_jump(&mut self, insn: &Instruction) {
        use Mnemonic as M;
        let far = |v: u64| (v as i64) << 16 >> 16 != v as i64;
        let gp = |o: &Outcome| o.trap.vector == vector::GP && o.trap.error == 0;
        let jump = matches!(insn.mnemonic(), M::Ret | M::Jmp | M::Call);
        if jump && gp(self.want) && gp(self.got) && far(self.got.state.rip) {
            self.got.state.rip = self.want.state.rip;
            self.got.state.gpr[4] = self.want.state.gpr[4];
        }
    }

    /// Whether accesses beyond 4 GiB through a flat segment raise anything is left open, and where they go
    /// (SDM vol. 3A, Limit Checking): on Intel's processors they wrap, and neither end is mapped.
    fn wrap(&mut self) {
        let (want, got) = (self.want, &mut *self.got);
        let near = (want.trap.addr as u32).wrapping_add(64) < 128;
        let wraps = want.trap.vector == vector::PF && near || want.trap.vector == vector::AC;
        let beyond = matches!(got.trap.vector, vector::GP | vector::SS) && got.trap.error == 0;
        if want.state.rip == got.state.rip && wraps && beyond {
            got.trap = want.trap;
        }
    }

    /// A gather that faults may or may not have cleared what lies above its destination. Of the mask that
    /// it leaves in a vector register only the sign bits mean anything: a processor may spread them over
    /// their elements before it starts (SDM vol. 2, VGATHERDPS, Operation), or leave elements alone that it
    /// has not come to, and clear what lies above the elements first or last.
    fn gather(&mut self, insn: &Instruction) {
        use Mnemonic as M;
        if !insn.is_vsib() || insn.op0_kind() != OpKind::Register {
            return;
        }
        let (want, got) = (&self.want.state, &mut self.got.state);
        let (n, from) = (insn.op0_register().number(), insn.op0_register().size());
        got.zmm[n][from..].copy_from_slice(&want.zmm[n][from..]);
        if insn.op2_kind() != OpKind::Register {
            return;
        }
        let n = insn.op2_register().number();
        let size = insn.memory_size().size().max(4);
        let by_quadwords = matches!(
            insn.mnemonic(),
            M::Vgatherqps | M::Vgatherqpd | M::Vpgatherqd | M::Vpgatherqq
        );
        let index = if by_quadwords { 8 } else { 4 };
        let elements = (insn.op0_register().size() / size).min(insn.memory_index().size() / index);
        let signs = |z: &[u8; 64]| -> Vec<u8> {
            z.chunks(size).take(elements).map(|e| e[size - 1] >> 7).collect()
        };
        if signs(&want.zmm[n]) == signs(&got.zmm[n]) {
            got.zmm[n] = want.zmm[n];
        }
    }

    /// Both ended with a fault of a memory operand of `insn`.
    fn faults(&mut self, insn: &Instruction) {
        use Mnemonic as M;
        let (want, got) = (self.want.trap, self.got.trap);
        let pages = want.vector == vector::PF && got.vector == vector::PF;
        let apart = want.addr.abs_diff(got.addr);
        let area = matches!(
            insn.mnemonic(),
            M::Fxsave
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Fnsave
                | M::Frstor
                | M::Fnstenv
                | M::Fldenv
        );
        // Which byte of an area a processor touches first is its own business, and which of two faults of
        // one class comes first.
        let first = |t: Trap| match t.vector {
            vector::PF | vector::AC => area || self.want.state.flags & AC != 0,
            vector::GP | vector::SS => area,
            _ => false,
        };
        let same = area && pages && apart < 512
            || want.vector != got.vector && first(want) && first(got)
            // An address within what a masked store may write.
            || is_masked(insn) && pages && apart < 64 && want.addr >> 12 == got.addr >> 12
            // The Operation section of CMPS reads one operand after the other; which fault comes first is
            // left open where there are two.
            || matches!(insn.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
                && (want.vector != got.vector || apart >= 8)
            // A bit string reaches anywhere from its operand: through the stack segment, or not.
            || matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
                && insn.op1_kind() == OpKind::Register
                && want.vector.min(got.vector) == vector::SS
                && want.vector.max(got.vector) == vector::GP;
        if same {
            self.got.trap = want;
        }
        if insn.op0_kind() == OpKind::Memory && insn.mnemonic() == M::Vcvtps2ph {
            // It may set its flags before it stores: they stay set when it starts again.
            self.same_mxcsr(0x3f);
        }
        if matches!(insn.mnemonic(), M::Fstp | M::Fbstp) && want.vector == vector::PF {
            // A store of ten bytes is two stores.
            let at = want.addr.wrapping_sub(DATA) as usize;
            if let Some(front) = at.checked_sub(10).filter(|_| at <= DATA_LEN) {
                self.got_memory.data[front..at].copy_from_slice(&self.want_memory.data[front..at]);
            }
        }
    }
}
