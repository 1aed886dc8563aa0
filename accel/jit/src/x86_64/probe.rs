//! The TLB check itself, and the shared code for accesses that miss it in line.
//!
//! An access that misses goes to its cold piece, which computes the guest address in the register
//! that the addend belongs in and calls the shared piece for that register, table, direction and
//! size (see [`super::thunks`]). That looks for this access alone, else asks the runtime. It comes
//! back with an addend for this one access (CF clear), or, the runtime having done the access, with
//! one that leads to the frame's result word (CF set): there a load finds what was read, and a store
//! does no harm. Either way the access proper then takes place.

use super::Features;
use super::asm::*;
use super::frame::*;
use super::mem::Span;
use super::thunks::Builder;
use crate::ir::{PTR_READ, PTR_WRITE, Width};
use crate::target::{AccessInfo, MemModel, TlbLayout};

/// How a TLB is looked at.
#[derive(Clone, Copy)]
pub(super) struct Probe {
    pub tlb: TlbLayout,
    pub page_bits: u8,
    pub features: Features,
    /// Bytes pushed since the frame was made.
    pub bias: i32,
}

impl Probe {
    /// Emits the check of `span` for the address in `addr`: jumps to `miss`, or leaves the addend in
    /// `to`. `i` and `t` are overwritten; `t` and `to` may be `addr`.
    pub(super) fn emit(
        &self,
        a: &mut Asm,
        addr: Reg,
        (i, t, to): (Reg, Reg, Reg),
        span: Span,
        miss: Label,
    ) {
        let (f, tlb) = (self.features, &self.tlb);
        let field = |off: u32| FRAME + self.bias + off as i32;
        if f.fast_pext {
            a.pext_stack(i, addr, field(tlb.pext_mask_off));
        } else {
            if f.bmi2 {
                a.rorx(W64, i, Rm::R(addr), self.page_bits);
            } else {
                a.mov(i, addr);
                a.shift_i(Sh::Shr, W64, Rm::R(i), self.page_bits);
            }
            a.alu_r(Alu::And, W64, i, frame(field(tlb.mask_off)));
        }
        // Alignment is part of the tag: the last byte's address, rounded down to it, has the low
        // bits of the first one's, and is in the last byte's page.
        let low = span.align as i32 - 1;
        match (span.len as i32 - 1) & !low {
            0 => a.mov(t, addr),
            last => a.lea(W64, t, Mem::new(addr, last)),
        }
        a.and_imm32(t, -(1i32 << self.page_bits) | low);
        a.cmp_stack(t, i, field(if span.write { tlb.tag_w } else { tlb.tag_r }));
        a.jcc(CC_NE, miss);
        a.load_stack(to, i, field(tlb.addend));
    }
}

/// Addresses of the shared pieces.
#[derive(Clone, Debug, Default)]
pub(super) struct Missed(Vec<u64>);

impl Missed {
    /// The piece for a scalar access with its address in `r`; `None` if there is no such table.
    pub(super) fn at(&self, r: Reg, info: AccessInfo) -> Option<u64> {
        let write = info.access() & PTR_WRITE != 0;
        self.0.get(index(info.mmu_idx(), write, info.width(), r)).copied()
    }
}

fn index(mmu_idx: u8, write: bool, w: Width, r: Reg) -> usize {
    ((usize::from(mmu_idx) * 2 + usize::from(write)) * 4 + w as usize) * 16 + usize::from(r & 15)
}

/// Bytes between the frame and a shared piece's own: its return address.
const BIAS: i32 = 8;
/// What lies between a runtime call and the return address into the cold piece: the return address
/// into the shared piece, and alignment.
pub(super) const NESTED: i32 = 16;

impl Builder<'_> {
    /// The shared pieces of all tables; `load` and `store` are the runtime's entries, to be called
    /// with [`NESTED`] bytes more on the stack.
    pub(super) fn missed(&mut self, features: Features, load: Label, store: Label) -> Missed {
        let MemModel::Softmmu { page_bits, tables } = &self.t.mem else {
            return Missed::default();
        };
        let runtime: Vec<[Label; 2]> =
            (0..16).map(|r| [load, store].map(|to| self.ask_runtime(r, to))).collect();
        let mut at = Missed(vec![0; tables.len() * 2 * 4 * 16]);
        for (mmu_idx, tlb) in (0u8..).zip(tables) {
            let probe = Probe { tlb: *tlb, page_bits: *page_bits, features, bias: BIAS };
            for (write, w) in
                [false, true].into_iter().flat_map(|write| [W8, W16, W32, W64].map(|w| (write, w)))
            {
                let access = if write { PTR_WRITE } else { PTR_READ };
                let info = AccessInfo::new(w as u8, mmu_idx, access);
                for r in (0..16).filter(|&r| r != RSP) {
                    at.0[index(mmu_idx, write, w, r)] =
                        self.missed_access(&probe, info, r, runtime[r as usize][write as usize]);
                }
            }
        }
        at
    }

    /// One shared piece: address and addend in `r`.
    fn missed_access(&mut self, probe: &Probe, info: AccessInfo, r: Reg, runtime: Label) -> u64 {
        let at = self.a.addr();
        let (args, i, miss) = (ARGS + BIAS, lent(r), self.a.label());
        self.a.store(W64, frame(args), r);
        self.a.store(W64, frame(args + 24), i);
        let span = Span::own(info.size(), info.access());
        probe.emit(self.a, r, (i, r, r), span, miss);
        self.a.load(W64, i, frame(args + 24));
        self.a.clc();
        self.a.ret();
        self.a.bind(miss);
        self.a.load(W64, i, frame(args + 24));
        self.a.store_i(W32, frame(args + 8), info.0 as i32);
        self.a.jmp(runtime);
        at
    }

    /// Has the runtime do the access that the frame describes; leaves in `r` what leads from its
    /// address to the result word.
    fn ask_runtime(&mut self, r: Reg, to: Label) -> Label {
        let at = self.a.here();
        let pad = NESTED - 8;
        self.a.lea(W64, RSP, Mem::new(RSP, -pad));
        self.a.call(to);
        self.a.lea(W64, RSP, Mem::new(RSP, pad));
        self.a.lea(W64, r, frame(RES + BIAS));
        self.a.alu_r(Alu::Sub, W64, r, frame(ARGS + BIAS));
        self.a.stc();
        self.a.ret();
        at
    }
}

/// A register that a piece for `r` borrows.
fn lent(r: Reg) -> Reg {
    if r == R11 { R14 } else { R11 }
}
