//! VEX- and EVEX-encoded instructions: BMI, and what moves vector state.

use super::*;

/// A VEX-encoded instruction with general registers (BMI): map 1–3, `pp` 0 none, 1 66, 2 F3, 3 F2.
impl Asm {
    fn vex(&mut self, map: u8, pp: u8, w: bool, op: u8, reg: u8, vvvv: u8, rm: Rm, l: u8) {
        let rxb = rxb(reg, rm);
        let mut head = Head::new(op, reg, rm);
        head.front((w as u8) << 7 | (!vvvv & 15) << 3 | l << 2 | pp);
        head.front((!rxb & 7) << 5 | map);
        head.front(0xc4);
        self.modrm(head, reg, rm);
    }
    /// `rorx reg, rm, n` (BMI2; flags untouched).
    pub(in crate::x86_64) fn rorx(&mut self, w: Width, reg: Reg, rm: impl Into<Rm>, n: u8) {
        self.vex(3, 3, w == Width::W64, 0xf0, reg, 0, rm.into(), 0);
        self.b(n);
    }
    /// `mulx hi, lo, rm`: times RDX (BMI2; flags untouched).
    pub(in crate::x86_64) fn mulx(&mut self, w: Width, hi: Reg, lo: Reg, rm: impl Into<Rm>) {
        self.vex(2, 3, w == Width::W64, 0xf6, hi, lo, rm.into(), 0);
    }
    /// `shlx`/`shrx`/`sarx reg, rm, count` (BMI2; flags untouched).
    pub(in crate::x86_64) fn shiftx(
        &mut self,
        op: Sh,
        w: Width,
        reg: Reg,
        rm: impl Into<Rm>,
        count: Reg,
    ) {
        let pp = match op {
            Sh::Shl => 1,
            Sh::Sar => 2,
            _ => 3,
        };
        self.vex(2, pp, w == Width::W64, 0xf7, reg, count, rm.into(), 0);
    }
    /// `pext reg, a, rm` (`pdep` if `dep`): BMI2, flags untouched.
    pub(in crate::x86_64) fn pext(
        &mut self,
        dep: bool,
        w: Width,
        reg: Reg,
        a: Reg,
        rm: impl Into<Rm>,
    ) {
        let pp = if dep { 3 } else { 2 };
        self.vex(2, pp, w == Width::W64, 0xf5, reg, a, rm.into(), 0);
    }
    /// `andn reg, a, rm`: `reg = !a & rm` (BMI1).
    pub(in crate::x86_64) fn andn(&mut self, w: Width, reg: Reg, a: Reg, rm: impl Into<Rm>) {
        self.vex(2, 0, w == Width::W64, 0xf2, reg, a, rm.into(), 0);
    }
    /// `movups`/`vmovups` of vector register `v` at 16, 32 or (EVEX, registers to 31) 64 bytes.
    pub(in crate::x86_64) fn mov_vec(&mut self, bytes: u32, store: bool, v: u8, m: Mem) {
        let op = 0x10 | store as u8;
        match bytes {
            16 => {
                self.modrm_op(0, false, false, 1, op, v, Rm::M(m));
            }
            32 => {
                self.vex(1, 0, false, op, v, 0, Rm::M(m), 1);
            }
            _ => {
                let rxb = rxb(v & 15, Rm::M(m));
                self.b(0x62);
                self.b((!rxb & 7) << 5 | (!v >> 4 & 1) << 4 | 1);
                self.b(0x7c);
                self.b(0x48);
                self.b(op);
                // EVEX scales 8-bit displacements: always use the 32-bit form.
                self.b(0x80 | (v & 7) << 3 | 4);
                self.b(4 << 3 | m.base & 7);
                self.d(m.disp as u32);
            }
        }
    }
    /// `kmovq k, [m]` or `kmovq [m], k` (AVX512BW).
    pub(in crate::x86_64) fn kmovq(&mut self, store: bool, k: u8, m: Mem) {
        self.vex(1, 0, true, 0x90 | store as u8, k, 0, Rm::M(m), 0);
    }
    /// `vorps v, v, [m]` at 16 or 32 bytes, or `vorps v, v, vector register`.
    pub(in crate::x86_64) fn or_vec(&mut self, bytes: u32, v: u8, rm: impl Into<Rm>) {
        self.vex(1, 0, false, 0x56, v, v, rm.into(), (bytes == 32) as u8);
    }
    /// `vptest ymm v, ymm v`: ZF if it is all zeros.
    pub(in crate::x86_64) fn test_vec(&mut self, v: u8) {
        self.vex(2, 1, false, 0x17, v, 0, Rm::R(v), 1);
    }
    /// `vzeroupper`.
    pub(in crate::x86_64) fn vzeroupper(&mut self) {
        self.raw(&[0xc5, 0xf8, 0x77]);
    }
}
