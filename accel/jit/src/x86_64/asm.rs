//! The emitter: x86-64 machine code (SDM vol. 2) into a byte buffer.
//!
//! What always holds: a call appends exactly one instruction (or what its name says); nothing here
//! looks at values, liveness or flags. Branches inside the buffer are 32-bit and bound later;
//! branches to fixed addresses outside are remembered, so that the buffer can still be moved.

mod vex;

use crate::ir::Width;

/// A host general register, by hardware number.
pub(super) type Reg = u8;

pub(super) const RAX: Reg = 0;
pub(super) const RCX: Reg = 1;
pub(super) const RDX: Reg = 2;
pub(super) const RBX: Reg = 3;
pub(super) const RSP: Reg = 4;
pub(super) const RBP: Reg = 5;
pub(super) const RSI: Reg = 6;
pub(super) const RDI: Reg = 7;
pub(super) const R8: Reg = 8;
pub(super) const R9: Reg = 9;
pub(super) const R10: Reg = 10;
pub(super) const R11: Reg = 11;
pub(super) const R12: Reg = 12;
pub(super) const R13: Reg = 13;
pub(super) const R14: Reg = 14;
pub(super) const R15: Reg = 15;
/// No register.
pub(super) const NOREG: Reg = 0xff;

/// A memory operand `[base + index * 2^scale + disp]`; base and index may be missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mem {
    pub base: Reg,
    pub index: Reg,
    pub scale: u8,
    pub disp: i32,
}

impl Mem {
    pub(super) const fn new(base: Reg, disp: i32) -> Mem {
        Mem { base, index: NOREG, scale: 0, disp }
    }
    pub(super) const fn idx(base: Reg, index: Reg, scale: u8, disp: i32) -> Mem {
        Mem { base, index, scale, disp }
    }
}

/// Register or memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rm {
    R(Reg),
    M(Mem),
}

impl From<Mem> for Rm {
    fn from(m: Mem) -> Rm {
        Rm::M(m)
    }
}

/// The eight operations of the classic ALU group (opcode bits 5–3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// The operations of the shift group (ModRM.reg).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Sh {
    Rol = 0,
    Ror = 1,
    Rcl = 2,
    Rcr = 3,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// A place in the buffer that a branch refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Label(pub u32);

const UNBOUND: u32 = u32::MAX;

/// Last offset that an instruction may start at. Code that grows longer wraps around, harmlessly:
/// its owner looks at [`Asm::pos`] and gives up.
const MASK: usize = (1 << 18) - 1;
/// Room for the instruction that starts last.
const SLACK: usize = 16;

/// Code under construction.
pub(super) struct Asm {
    buf: Box<[u8; MASK + 1 + SLACK]>,
    pos: usize,
    /// Address that the first byte will have.
    base: u64,
    /// Offsets of 32-bit displacements that aim outside the buffer.
    outside: Vec<u32>,
    /// Offset of each label.
    labels: Vec<u32>,
    /// (offset of a 32-bit displacement, label).
    fixups: Vec<(u32, u32)>,
}

/// REX bits R, X, B of the operands.
#[inline]
fn rxb(reg: u8, rm: Rm) -> u8 {
    let r = (reg >> 3 & 1) << 2;
    match rm {
        Rm::R(b) => r | b >> 3 & 1,
        Rm::M(m) => {
            let x = if m.index == NOREG { 0 } else { m.index >> 3 & 1 };
            let b = if m.base == NOREG { 0 } else { m.base >> 3 & 1 };
            r | x << 1 | b
        }
    }
}

/// The first bytes of an instruction, seven at most, gathered from the last to the first.
#[derive(Clone, Copy)]
struct Head {
    bytes: u64,
    len: usize,
}

impl Head {
    /// The opcode `op`, and behind it ModRM if that has no memory operand.
    #[inline]
    fn new(op: u8, reg: u8, rm: Rm) -> Head {
        match rm {
            Rm::R(r) => {
                let modrm = 0xc0 | (reg & 7) << 3 | r & 7;
                Head { bytes: u64::from(modrm) << 8 | u64::from(op), len: 2 }
            }
            Rm::M(_) => Head { bytes: op.into(), len: 1 },
        }
    }
    #[inline]
    fn front(&mut self, byte: u8) {
        self.bytes = self.bytes << 8 | u64::from(byte);
        self.len += 1;
    }
}

impl Default for Asm {
    fn default() -> Asm {
        Asm {
            buf: Box::new([0; MASK + 1 + SLACK]),
            pos: 0,
            base: 0,
            outside: Vec::new(),
            labels: Vec::new(),
            fixups: Vec::new(),
        }
    }
}

impl Asm {
    /// The low `n` bytes of `v`, of eight at most, in one store.
    #[inline]
    fn put(&mut self, v: u64, n: usize) {
        let at = self.pos & MASK;
        self.buf[at..at + 8].copy_from_slice(&v.to_le_bytes());
        self.pos += n;
    }
    #[inline]
    fn b(&mut self, byte: u8) {
        self.buf[self.pos & MASK] = byte;
        self.pos += 1;
    }
    #[inline]
    fn d(&mut self, v: u32) {
        let at = self.pos & MASK;
        self.buf[at..at + 4].copy_from_slice(&v.to_le_bytes());
        self.pos += 4;
    }
    /// The bytes in `head`, and ModRM, SIB, displacement if there is a memory operand.
    #[inline]
    fn modrm(&mut self, head: Head, reg: u8, rm: Rm) {
        self.put(head.bytes, head.len);
        if let Rm::M(m) = rm {
            self.memory((reg & 7) << 3, m);
        }
    }
    /// ModRM (with `reg` in place), SIB, displacement.
    fn memory(&mut self, reg: u8, m: Mem) {
        // No index is index 4.
        let sib = m.scale << 6 | (if m.index == NOREG { 4 } else { m.index & 7 }) << 3;
        let disp = u64::from(m.disp as u32);
        if m.base == NOREG {
            return self.put(u64::from(reg | 4) | u64::from(sib | 5) << 8 | disp << 16, 6);
        }
        let base = m.base & 7;
        let (mode, n) = if m.disp as i8 as i32 != m.disp {
            (0x80, 4)
        } else if m.disp != 0 || base == 5 {
            (0x40, 1)
        } else {
            (0, 0)
        };
        if m.index != NOREG || base == 4 {
            let form = u64::from(mode | reg | 4) | u64::from(sib | base) << 8;
            self.put(form | disp << 16, 2 + n);
        } else {
            self.put(u64::from(mode | reg | base) | disp << 8, 1 + n);
        }
    }
    /// `op reg, [rsp + index * 8 + disp]` (or the other way round) of 64 bits with a one-byte opcode.
    #[inline]
    fn stack_op(&mut self, op: u8, reg: Reg, index: Reg, disp: i32) {
        let rex = 0x48 | reg >> 3 << 2 | index >> 3 << 1;
        let sib = 0xc4 | (index & 7) << 3;
        let head = u32::from_le_bytes([rex, op, 0x84 | (reg & 7) << 3, sib]);
        self.put(u64::from(head) | u64::from(disp as u32) << 32, 8);
    }
    /// `cmp reg, [rsp + index * 8 + disp]`.
    pub(super) fn cmp_stack(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.stack_op(0x3b, reg, index, disp);
    }
    /// `mov reg, [rsp + index * 8 + disp]`.
    pub(super) fn load_stack(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.stack_op(0x8b, reg, index, disp);
    }
    /// `and reg, imm` of 64 bits.
    pub(super) fn and_imm32(&mut self, reg: Reg, imm: i32) {
        let head = u32::from_le_bytes([0x48 | reg >> 3, 0x81, 0xe0 | reg & 7, 0]);
        self.put(u64::from(head) | u64::from(imm as u32) << 24, 7);
    }
    /// `pext reg, a, [rsp + disp]` of 64 bits.
    pub(super) fn pext_stack(&mut self, reg: Reg, a: Reg, disp: i32) {
        let r = (!reg >> 3 & 1) << 7;
        let head = [0xc4, r | 0x62, 0x82 | (!a & 15) << 3, 0xf5, 0x84 | (reg & 7) << 3, 0x24, 0, 0];
        self.put(u64::from_le_bytes(head), 6);
        self.put(u64::from(disp as u32), 4);
    }

    /// Starts a new piece of code at address `base`.
    pub(super) fn start(&mut self, base: u64) {
        self.pos = 0;
        self.outside.clear();
        self.labels.clear();
        self.fixups.clear();
        self.base = base;
    }
    /// Number of bytes so far.
    pub(super) fn pos(&self) -> u32 {
        self.pos as u32
    }
    /// Address of the next byte.
    pub(super) fn addr(&self) -> u64 {
        self.base + self.pos as u64
    }
    /// The bytes so far.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buf[..self.pos.min(MASK + 1)]
    }
    /// Declares a label.
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() as u32 - 1)
    }
    /// Puts a label here.
    pub(super) fn bind(&mut self, l: Label) {
        self.labels[l.0 as usize] = self.pos();
    }
    /// Declares a label and puts it here.
    pub(super) fn here(&mut self) -> Label {
        let l = self.label();
        self.bind(l);
        l
    }
    /// Offset of a bound label.
    pub(super) fn offset(&self, l: Label) -> u32 {
        self.labels[l.0 as usize]
    }
    /// Resolves the branches to labels, all of which must be bound.
    pub(super) fn finish(&mut self) {
        for i in 0..self.fixups.len() {
            let (at, l) = self.fixups[i];
            let to = self.labels[l as usize];
            debug_assert_ne!(to, UNBOUND);
            self.patch32(at, to.wrapping_sub(at + 4));
        }
        self.fixups.clear();
    }
    /// Moves finished code to another base address.
    pub(super) fn rebase(&mut self, base: u64) {
        let delta = self.base.wrapping_sub(base) as u32;
        for i in 0..self.outside.len() {
            let at = self.outside[i] as usize & MASK;
            let old = u32::from_le_bytes(self.buf[at..at + 4].try_into().unwrap_or_default());
            self.patch32(at as u32, old.wrapping_add(delta));
        }
        self.base = base;
    }
    /// Overwrites four bytes at `at`.
    pub(super) fn patch32(&mut self, at: u32, v: u32) {
        let at = at as usize & MASK;
        self.buf[at..at + 4].copy_from_slice(&v.to_le_bytes());
    }
    /// Raw bytes.
    #[inline]
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.put(u64::from_le_bytes(word), piece.len());
        }
    }
    /// Pads with multi-byte NOPs until `(pos + bias) % align == 0` (`align` a power of two).
    pub(super) fn align(&mut self, align: u32, bias: u32) {
        const NOPS: [u64; 9] = [
            0,
            0x90,
            0x9066,
            0x00_1f0f,
            0x0040_1f0f,
            0x00_0044_1f0f,
            0x0000_441f_0f66,
            0x00_0000_0080_1f0f,
            0x0000_0000_0084_1f0f,
        ];
        let mut n = (align - (self.pos() + bias) % align) % align;
        while n > 0 {
            let k = n.min(8) as usize;
            self.put(NOPS[k], k);
            n -= k as u32;
        }
    }

    /// Pads so that the 32-bit displacement `ahead` bytes from here lies within an aligned 8-byte
    /// word, which makes it patchable.
    pub(super) fn keep_in_word(&mut self, ahead: u32) {
        let at = (self.pos() + ahead) % 8;
        if at > 4 {
            self.align(8, ahead);
        }
    }

    /// An instruction with ModRM: `prefix` 0/66/F2/F3, map 0/1/2/3 (none, 0F, 0F38, 0F3A).
    fn modrm_op(
        &mut self,
        prefix: u8,
        rexw: bool,
        force_rex: bool,
        map: u8,
        op: u8,
        reg: u8,
        rm: Rm,
    ) {
        let mut head = Head::new(op, reg, rm);
        if map > 1 {
            head.front(if map == 2 { 0x38 } else { 0x3a });
        }
        if map != 0 {
            head.front(0x0f);
        }
        let rex = (rexw as u8) << 3 | rxb(reg, rm);
        if rex != 0 || force_rex {
            head.front(0x40 | rex);
        }
        if prefix != 0 {
            head.front(prefix);
        }
        self.modrm(head, reg, rm);
    }
    /// A general instruction whose opcode bit 0 distinguishes byte from word/dword/qword operands.
    /// `reg_is_gpr` says that the ModRM.reg field is a register of width `w`, not an extension.
    #[inline]
    fn sized(&mut self, w: Width, map: u8, op: u8, reg: u8, reg_is_gpr: bool, rm: Rm) {
        let low = |r: u8| (4..8).contains(&r);
        match w {
            Width::W8 => {
                let force = reg_is_gpr && low(reg) || matches!(rm, Rm::R(r) if low(r));
                self.modrm_op(0, false, force, map, op & !1, reg, rm)
            }
            Width::W16 => self.modrm_op(0x66, false, false, map, op | 1, reg, rm),
            Width::W32 => self.modrm_op(0, false, false, map, op | 1, reg, rm),
            Width::W64 => self.modrm_op(0, true, false, map, op | 1, reg, rm),
        }
    }
    #[inline]
    fn imm(&mut self, w: Width, imm: i32) {
        self.put(u64::from(imm as u32), (w.bytes() as usize).min(4));
    }

    /// `op reg, rm`.
    pub(super) fn alu_r(&mut self, op: Alu, w: Width, reg: Reg, rm: impl Into<Rm>) {
        self.sized(w, 0, (op as u8) << 3 | 3, reg, true, rm.into());
    }
    /// `op rm, reg`.
    pub(super) fn alu_m(&mut self, op: Alu, w: Width, rm: impl Into<Rm>, reg: Reg) {
        self.sized(w, 0, (op as u8) << 3 | 1, reg, true, rm.into());
    }
    /// `op rm, imm` (sign-extended to `w`).
    pub(super) fn alu_i(&mut self, op: Alu, w: Width, rm: impl Into<Rm>, imm: i32) {
        if w == Width::W8 {
            self.sized(w, 0, 0x80, op as u8, false, rm.into());
            self.imm(w, imm);
        } else if imm as i8 as i32 == imm {
            self.sized(w, 0, 0x83, op as u8, false, rm.into());
            self.imm(Width::W8, imm);
        } else {
            self.sized(w, 0, 0x81, op as u8, false, rm.into());
            self.imm(w, imm);
        }
    }
    /// `cmp dword [m], imm` with a full 32-bit immediate and displacement.
    pub(super) fn cmp_d_imm32(&mut self, m: Mem, imm: u32) {
        self.sized(Width::W32, 0, 0x81, 7, false, Rm::M(m));
        self.d(imm);
    }
    /// `test rm, reg`.
    pub(super) fn test(&mut self, w: Width, rm: impl Into<Rm>, reg: Reg) {
        self.sized(w, 0, 0x85, reg, true, rm.into());
    }
    /// `test rm, imm`.
    pub(super) fn test_i(&mut self, w: Width, rm: impl Into<Rm>, imm: i32) {
        self.sized(w, 0, 0xf7, 0, false, rm.into());
        self.imm(w, imm);
    }
    /// `mov reg, reg` of 64 bits (nothing if they are the same).
    pub(super) fn mov(&mut self, dst: Reg, src: Reg) {
        if dst != src {
            let rex = 0x48 | dst >> 3 << 2 | src >> 3;
            let bytes = u32::from_le_bytes([rex, 0x8b, 0xc0 | (dst & 7) << 3 | src & 7, 0]);
            self.put(bytes.into(), 3);
        }
    }
    /// `mov reg, rm` at width `w` (W8 and W16 merge into `reg`).
    pub(super) fn load(&mut self, w: Width, reg: Reg, rm: impl Into<Rm>) {
        match rm.into() {
            Rm::M(Mem { base: RSP, index: NOREG, disp, .. }) if w == Width::W64 => {
                self.stack_word(0x8b, reg, disp);
            }
            rm => self.sized(w, 0, 0x8b, reg, true, rm),
        }
    }
    /// `mov reg, [rsp + disp]` (8B) or the other way round (89), of 64 bits.
    #[inline]
    fn stack_word(&mut self, op: u8, reg: Reg, disp: i32) {
        let (mode, n) = if disp as i8 as i32 == disp { (0x44, 5) } else { (0x84, 8) };
        let head = [0x48 | reg >> 3 << 2, op, mode | (reg & 7) << 3, 0x24];
        let head = u64::from(u32::from_le_bytes(head));
        self.put(head | u64::from(disp as u32) << 32, n);
    }
    /// `mov rm, reg` at width `w`.
    pub(super) fn store(&mut self, w: Width, rm: impl Into<Rm>, reg: Reg) {
        match rm.into() {
            Rm::M(Mem { base: RSP, index: NOREG, disp, .. }) if w == Width::W64 => {
                self.stack_word(0x89, reg, disp);
            }
            rm => self.sized(w, 0, 0x89, reg, true, rm),
        }
    }
    /// `mov rm, imm` at width `w` (sign-extended for W64).
    pub(super) fn store_i(&mut self, w: Width, rm: impl Into<Rm>, imm: i32) {
        self.sized(w, 0, 0xc7, 0, false, rm.into());
        self.imm(w, imm);
    }
    /// Shortest `mov reg, imm` that leaves the flags alone.
    pub(super) fn mov_i(&mut self, reg: Reg, imm: u64) {
        if imm <= u32::MAX as u64 {
            let op = u64::from(0xb8 | reg & 7) | imm << 8;
            if reg >= 8 {
                self.put(op << 8 | 0x41, 6);
            } else {
                self.put(op, 5);
            }
        } else if imm as i32 as i64 as u64 == imm {
            self.store_i(Width::W64, Rm::R(reg), imm as i32);
        } else {
            self.put(u64::from(0x48 | reg >> 3) | u64::from(0xb8 | reg & 7) << 8, 2);
            self.put(imm, 8);
        }
    }
    /// Zero-extending move from the low `w` bits.
    pub(super) fn movzx(&mut self, w: Width, reg: Reg, rm: impl Into<Rm>) {
        let rm = rm.into();
        match w {
            Width::W8 => {
                let force = matches!(rm, Rm::R(r) if (4..8).contains(&r));
                self.modrm_op(0, false, force, 1, 0xb6, reg, rm);
            }
            Width::W16 => {
                self.modrm_op(0, false, false, 1, 0xb7, reg, rm);
            }
            w => self.load(w, reg, rm),
        }
    }
    /// `movzx reg32, ah` and its kin: bits 8–15 of `src` (RAX–RBX) into `reg` (below R8).
    pub(super) fn movzx_high(&mut self, reg: Reg, src: Reg) {
        self.raw(&[0x0f, 0xb6, 0xc0 | reg << 3 | (src + 4)]);
    }
    /// `mov ah, reg8` and its kin; both RAX–RBX.
    pub(super) fn mov_high(&mut self, dst: Reg, src: Reg) {
        self.raw(&[0x88, 0xc0 | src << 3 | (dst + 4)]);
    }
    /// `mov ah, imm8` and its kin.
    pub(super) fn mov_high_i(&mut self, dst: Reg, imm: u8) {
        self.raw(&[0xb0 | (dst + 4), imm]);
    }
    /// Sign-extending move from the low `w` bits to 64 (`to64`) or 32 bits.
    pub(super) fn movsx(&mut self, w: Width, to64: bool, reg: Reg, rm: impl Into<Rm>) {
        let rm = rm.into();
        match w {
            Width::W8 => {
                let force = matches!(rm, Rm::R(r) if (4..8).contains(&r));
                self.modrm_op(0, to64, force, 1, 0xbe, reg, rm)
            }
            Width::W16 => self.modrm_op(0, to64, false, 1, 0xbf, reg, rm),
            Width::W32 if to64 => self.modrm_op(0, true, false, 0, 0x63, reg, rm),
            w => self.load(w, reg, rm),
        }
    }
    /// `lea reg, [m]`, 64 bits, or 32 bits and zero-extended.
    pub(super) fn lea(&mut self, w: Width, reg: Reg, m: Mem) {
        self.modrm_op(0, w == Width::W64, false, 0, 0x8d, reg, Rm::M(m));
    }
    /// F6/F7 group: 2 NOT, 3 NEG, 4 MUL, 5 IMUL, 6 DIV, 7 IDIV.
    pub(super) fn group3(&mut self, w: Width, ext: u8, rm: impl Into<Rm>) {
        self.sized(w, 0, 0xf7, ext, false, rm.into());
    }
    /// `inc rm` (`dec` if `dec`).
    pub(super) fn inc_dec(&mut self, w: Width, dec: bool, rm: impl Into<Rm>) {
        self.sized(w, 0, 0xff, dec as u8, false, rm.into());
    }
    /// Shift or rotate by CL.
    pub(super) fn shift_cl(&mut self, op: Sh, w: Width, rm: impl Into<Rm>) {
        self.sized(w, 0, 0xd3, op as u8, false, rm.into());
    }
    /// Shift or rotate by an immediate.
    pub(super) fn shift_i(&mut self, op: Sh, w: Width, rm: impl Into<Rm>, n: u8) {
        if n == 1 {
            self.sized(w, 0, 0xd1, op as u8, false, rm.into());
        } else {
            self.sized(w, 0, 0xc1, op as u8, false, rm.into());
            self.b(n);
        }
    }
    /// `shld`/`shrd rm, reg, cl`.
    pub(super) fn shiftd_cl(&mut self, right: bool, w: Width, rm: impl Into<Rm>, reg: Reg) {
        let op = if right { 0xad } else { 0xa5 };
        self.sized(w, 1, op, reg, true, rm.into());
    }
    /// `shld`/`shrd rm, reg, imm`.
    pub(super) fn shiftd_i(&mut self, right: bool, w: Width, rm: impl Into<Rm>, reg: Reg, n: u8) {
        let op = if right { 0xac } else { 0xa4 };
        let p = if w == Width::W16 { 0x66 } else { 0 };
        self.modrm_op(p, w == Width::W64, false, 1, op, reg, rm.into());
        self.b(n);
    }
    /// `imul reg, rm` (W16 and up).
    pub(super) fn imul(&mut self, w: Width, reg: Reg, rm: impl Into<Rm>) {
        self.sized(w, 1, 0xaf, reg, true, rm.into());
    }
    /// `imul reg, rm, imm` (W16 and up).
    pub(super) fn imul_i(&mut self, w: Width, reg: Reg, rm: impl Into<Rm>, imm: i32) {
        if imm as i8 as i32 == imm {
            self.sized(w, 0, 0x6b, reg, true, rm.into());
            self.imm(Width::W8, imm);
        } else {
            self.sized(w, 0, 0x69, reg, true, rm.into());
            self.imm(w, imm);
        }
    }
    /// `bswap reg`, W32 or W64.
    pub(super) fn bswap(&mut self, w: Width, reg: Reg) {
        let rex = ((w == Width::W64) as u8) << 3 | reg >> 3;
        if rex != 0 {
            self.raw(&[0x40 | rex, 0x0f, 0xc8 | reg & 7]);
        } else {
            self.raw(&[0x0f, 0xc8 | reg & 7]);
        }
    }
    /// A two-operand instruction of map 0F with mandatory prefix (POPCNT F3 B8, LZCNT F3 BD,
    /// TZCNT F3 BC, BSF BC, BSR BD), W16 and up.
    pub(super) fn op0f(&mut self, prefix: u8, w: Width, op: u8, reg: Reg, rm: impl Into<Rm>) {
        if w == Width::W16 {
            self.raw(&[0x66]);
        }
        self.modrm_op(prefix, w == Width::W64, false, 1, op, reg, rm.into());
    }
    /// `setcc rm8`.
    pub(super) fn setcc(&mut self, cc: u8, rm: impl Into<Rm>) {
        let rm = rm.into();
        let force = matches!(rm, Rm::R(r) if (4..8).contains(&r));
        self.modrm_op(0, false, force, 1, 0x90 | cc, 0, rm);
    }
    /// `cmovcc reg, rm`.
    pub(super) fn cmov(&mut self, cc: u8, w: Width, reg: Reg, rm: impl Into<Rm>) {
        self.modrm_op(0, w == Width::W64, false, 1, 0x40 | cc, reg, rm.into());
    }
    /// `bt rm, imm`: CF = the bit. W16 and up.
    pub(super) fn bt_i(&mut self, w: Width, rm: impl Into<Rm>, bit: u8) {
        let p = if w == Width::W16 { 0x66 } else { 0 };
        self.modrm_op(p, w == Width::W64, false, 1, 0xba, 4, rm.into());
        self.b(bit);
    }
    /// `bt reg, reg`.
    pub(super) fn bt(&mut self, w: Width, a: Reg, b: Reg) {
        let p = if w == Width::W16 { 0x66 } else { 0 };
        self.modrm_op(p, w == Width::W64, false, 1, 0xa3, b, Rm::R(a));
    }
    /// `xchg rm, reg` (locked if memory).
    pub(super) fn xchg(&mut self, w: Width, rm: impl Into<Rm>, reg: Reg) {
        self.sized(w, 0, 0x87, reg, true, rm.into());
    }
    /// `lock xadd [m], reg`.
    pub(super) fn lock_xadd(&mut self, w: Width, m: Mem, reg: Reg) {
        self.raw(&[0xf0]);
        self.sized(w, 1, 0xc1, reg, true, Rm::M(m));
    }
    /// `lock cmpxchg [m], reg`.
    pub(super) fn lock_cmpxchg(&mut self, w: Width, m: Mem, reg: Reg) {
        self.raw(&[0xf0]);
        self.sized(w, 1, 0xb1, reg, true, Rm::M(m));
    }
    /// `lock op [m], reg`.
    pub(super) fn lock_alu(&mut self, op: Alu, w: Width, m: Mem, reg: Reg) {
        self.raw(&[0xf0]);
        self.alu_m(op, w, m, reg);
    }
    /// `mfence`.
    pub(super) fn mfence(&mut self) {
        self.raw(&[0x0f, 0xae, 0xf0]);
    }
    /// `clc`.
    pub(super) fn clc(&mut self) {
        self.raw(&[0xf8]);
    }
    /// `stc`.
    pub(super) fn stc(&mut self) {
        self.raw(&[0xf9]);
    }
    /// `pushfq`.
    pub(super) fn pushfq(&mut self) {
        self.raw(&[0x9c]);
    }
    /// `popfq`.
    pub(super) fn popfq(&mut self) {
        self.raw(&[0x9d]);
    }
    /// `push reg`.
    pub(super) fn push(&mut self, reg: Reg) {
        if reg >= 8 {
            self.raw(&[0x41, 0x50 | reg & 7]);
        } else {
            self.raw(&[0x50 | reg]);
        }
    }
    /// `pop reg`.
    pub(super) fn pop(&mut self, reg: Reg) {
        if reg >= 8 {
            self.raw(&[0x41, 0x58 | reg & 7]);
        } else {
            self.raw(&[0x58 | reg]);
        }
    }
    /// `push [m]`.
    pub(super) fn push_m(&mut self, m: Mem) {
        self.modrm_op(0, false, false, 0, 0xff, 6, Rm::M(m));
    }
    /// `pop [m]` (an address based on RSP is computed after RSP was incremented).
    pub(super) fn pop_m(&mut self, m: Mem) {
        self.modrm_op(0, false, false, 0, 0x8f, 0, Rm::M(m));
    }
    /// `ret`.
    pub(super) fn ret(&mut self) {
        self.raw(&[0xc3]);
    }
    /// `ldmxcsr [m]`.
    pub(super) fn ldmxcsr(&mut self, m: Mem) {
        self.modrm_op(0, false, false, 1, 0xae, 2, Rm::M(m));
    }
    /// `stmxcsr [m]`.
    pub(super) fn stmxcsr(&mut self, m: Mem) {
        self.modrm_op(0, false, false, 1, 0xae, 3, Rm::M(m));
    }
    /// `frstor [m]` or `fnsave [m]`.
    pub(super) fn x87_state(&mut self, store: bool, m: Mem) {
        self.modrm_op(0, false, false, 0, 0xdd, if store { 6 } else { 4 }, Rm::M(m));
    }
    /// `jmp rm`.
    pub(super) fn jmp_rm(&mut self, rm: impl Into<Rm>) {
        self.modrm_op(0, false, false, 0, 0xff, 4, rm.into());
    }
    /// `call rm`.
    pub(super) fn call_rm(&mut self, rm: impl Into<Rm>) {
        self.modrm_op(0, false, false, 0, 0xff, 2, rm.into());
    }
    /// A 32-bit displacement to a label behind the opcode `op` of `n` bytes.
    #[inline]
    fn rel_label(&mut self, op: u64, n: usize, l: Label) {
        self.put(op, n + 4);
        self.fixups.push((self.pos() - 4, l.0));
    }
    /// A 32-bit displacement to an address outside the buffer behind the opcode `op`.
    #[inline]
    fn rel_outside(&mut self, op: u8, to: u64) {
        let next = self.addr() + 5;
        self.put(u64::from(op) | u64::from(to.wrapping_sub(next) as u32) << 8, 5);
        self.outside.push(self.pos() - 4);
    }
    /// `jcc label`.
    pub(super) fn jcc(&mut self, cc: u8, l: Label) {
        self.rel_label(0x0f | u64::from(0x80 | cc) << 8, 2, l);
    }
    /// `jcc` to a label that is bound already; short if it can be.
    pub(super) fn jcc_back(&mut self, cc: u8, l: Label) {
        let rel = self.offset(l) as i64 - (self.pos as i64 + 2);
        match i8::try_from(rel) {
            Ok(rel) => self.raw(&[0x70 | cc, rel as u8]),
            Err(_) => self.jcc(cc, l),
        }
    }
    /// Eight bytes of data.
    pub(super) fn data64(&mut self, v: u64) {
        self.put(v, 8);
    }
    /// `jmp label`.
    pub(super) fn jmp(&mut self, l: Label) {
        self.rel_label(0xe9, 1, l);
    }
    /// `jmp` to an address outside the buffer.
    pub(super) fn jmp_to(&mut self, to: u64) {
        self.rel_outside(0xe9, to);
    }
    /// `call` an address outside the buffer.
    pub(super) fn call_to(&mut self, to: u64) {
        self.rel_outside(0xe8, to);
    }
    /// `call label`.
    pub(super) fn call(&mut self, l: Label) {
        self.rel_label(0xe8, 1, l);
    }
}

pub(super) const W8: Width = Width::W8;
pub(super) const W16: Width = Width::W16;
pub(super) const W32: Width = Width::W32;
pub(super) const W64: Width = Width::W64;

pub(super) const CC_B: u8 = 2;
pub(super) const CC_AE: u8 = 3;
pub(super) const CC_E: u8 = 4;
pub(super) const CC_NE: u8 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

    fn text(emit: impl FnOnce(&mut Asm)) -> String {
        let mut a = Asm::default();
        a.start(0x1000);
        emit(&mut a);
        a.finish();
        let mut out = Vec::new();
        for insn in Decoder::with_ip(64, a.bytes(), 0x1000, DecoderOptions::NONE).iter() {
            assert!(!insn.is_invalid(), "{:02x?}", a.bytes());
            let mut s = String::new();
            NasmFormatter::new().format(&insn, &mut s);
            out.push(s);
        }
        out.join("; ")
    }

    #[test]
    fn addressing_modes() {
        let cases = [
            (Mem::new(RAX, 0), "[rax]"),
            (Mem::new(RBP, 0), "[rbp]"),
            (Mem::new(R13, 0), "[r13]"),
            (Mem::new(RSP, 0), "[rsp]"),
            (Mem::new(R12, 8), "[r12+8]"),
            (Mem::new(R15, -0x1000), "[r15-1000h]"),
            (Mem::idx(RBX, R14, 3, 127), "[rbx+r14*8+7Fh]"),
            (Mem::idx(R13, R12, 0, 0), "[r13+r12]"),
            (Mem::idx(NOREG, R9, 2, 5), "[r9*4+5]"),
            (Mem::new(NOREG, 0x1234), "[1234h]"),
        ];
        for (m, expected) in cases {
            assert_eq!(text(|a| a.load(W64, R10, m)), format!("mov r10,{expected}"));
            assert_eq!(text(|a| a.lea(W32, RAX, m)), format!("lea eax,{expected}"));
        }
    }

    #[test]
    fn widths_and_low_bytes() {
        assert_eq!(text(|a| a.alu_r(Alu::Add, W8, RSI, Rm::R(RDI))), "add sil,dil");
        assert_eq!(text(|a| a.alu_m(Alu::Xor, W16, Rm::R(R8), RDX)), "xor r8w,dx");
        assert_eq!(text(|a| a.alu_i(Alu::Cmp, W16, Rm::R(RCX), 0x1234)), "cmp cx,1234h");
        assert_eq!(text(|a| a.alu_i(Alu::Sub, W64, Rm::R(RBX), -1)), "sub rbx,0FFFFFFFFFFFFFFFFh");
        assert_eq!(text(|a| a.setcc(CC_E, Rm::R(RBP))), "sete bpl");
        assert_eq!(text(|a| a.movzx(W8, RAX, Rm::R(RSI))), "movzx eax,sil");
        assert_eq!(text(|a| a.movsx(W32, true, RAX, Rm::R(R9))), "movsxd rax,r9d");
        assert_eq!(text(|a| a.movzx_high(RDX, RAX)), "movzx edx,ah");
        assert_eq!(text(|a| a.mov_high(RBX, RCX)), "mov bh,cl");
        assert_eq!(text(|a| a.store_i(W16, Mem::new(RAX, 1), -1)), "mov word [rax+1],0FFFFh");
        assert_eq!(text(|a| a.mov_i(R9, u64::MAX)), "mov r9,0FFFFFFFFFFFFFFFFh");
        assert_eq!(text(|a| a.mov_i(R9, 1 << 40)), "mov r9,10000000000h");
        assert_eq!(text(|a| a.mov_i(RCX, 0xffff_ffff)), "mov ecx,0FFFFFFFFh");
        assert_eq!(text(|a| a.lock_cmpxchg(W8, Mem::new(R14, 0), RSI)), "lock cmpxchg [r14],sil");
    }

    #[test]
    fn vex_and_evex() {
        let m = Mem::new(RSP, 0x100);
        assert_eq!(text(|a| a.rorx(W64, R15, Rm::R(RDI), 12)), "rorx r15,rdi,0Ch");
        assert_eq!(text(|a| a.mulx(W32, R15, RAX, Rm::R(R9))), "mulx r15d,eax,r9d");
        assert_eq!(text(|a| a.pext(false, W64, R11, R10, m)), "pext r11,r10,[rsp+100h]");
        assert_eq!(text(|a| a.shiftx(Sh::Sar, W32, RAX, m, R9)), "sarx eax,[rsp+100h],r9d");
        assert_eq!(text(|a| a.andn(W64, RAX, R8, Rm::R(RCX))), "andn rax,r8,rcx");
        assert_eq!(text(|a| a.mov_vec(16, true, 9, m)), "movups [rsp+100h],xmm9");
        assert_eq!(text(|a| a.mov_vec(32, false, 15, m)), "vmovups ymm15,[rsp+100h]");
        assert_eq!(text(|a| a.mov_vec(64, false, 31, m)), "vmovups zmm31,[rsp+100h]");
        assert_eq!(text(|a| a.kmovq(true, 7, m)), "kmovq [rsp+100h],k7");
        assert_eq!(text(|a| a.or_vec(16, 9, m)), "vorps xmm9,xmm9,[rsp+100h]");
        assert_eq!(text(|a| a.or_vec(32, 0, Rm::R(1))), "vorps ymm0,ymm0,ymm1");
        assert_eq!(text(|a| a.test_vec(1)), "vptest ymm1,ymm1");
    }

    #[test]
    fn branches_and_moving() {
        let branches = text(|a| {
            let (l, back) = (a.label(), a.here());
            a.jcc(CC_NE, l);
            a.jcc_back(CC_E, back);
            a.bind(l);
            a.call_to(0x5000);
        });
        assert_eq!(
            branches,
            "jne near 0000000000001008h; je short 0000000000001000h; call 0000000000005000h"
        );
        let mut a = Asm::default();
        a.start(0x1000);
        a.jmp_to(0x5000);
        a.rebase(0x2000);
        assert_eq!(a.bytes(), [0xe9, 0xfb, 0x2f, 0, 0]);
    }

    #[test]
    fn endless_code_is_harmless() {
        let mut a = Asm::default();
        a.start(0x1000);
        while (a.pos() as usize) < 2 * MASK {
            a.mov_i(R9, 1 << 40);
            a.jmp_to(0x1000);
        }
        a.rebase(0x9000);
        assert!(a.bytes().len() > crate::arena::CHUNK);
    }
}
