//! Random well-formed programs whose outcome is fully defined, so that any two ways of running one
//! must agree.
//!
//! What x86 leaves undefined (flags after multiplications and long shifts, the bits above a narrow
//! result) is kept out of anything that a test compares: each flags value carries the mask of flags
//! that are defined, narrow results are extended or inserted before use.

use super::{GLOBALS, MMIO, PC, RAM, READ_ONLY, scratch};
use tandem_jit::ir::eval::{AF, CF, FLAGS, OF};
use tandem_jit::ir::*;

/// xorshift64*: small, fast, reproducible.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) as usize * n) >> 32
    }
    pub fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// A value that is often an edge of some width.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4) as u64,
            1 => (self.below(4) as u64).wrapping_neg(),
            2 => 1u64 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.next() as u32 as u64,
            5 => self.next() as i8 as u64,
            6 => self.next() as i32 as u64,
            _ => self.next(),
        }
    }
}

/// Makes one block.
pub struct Gen<'a> {
    pub rng: &'a mut Rng,
    pub block: Block,
    /// Values of which all 64 bits are defined.
    vals: Vec<Val>,
    /// Flags values with their defined flags.
    flags: Vec<(Val, u64)>,
    pc: u64,
    /// pcs of blocks that this one may go to.
    next: &'a [u64],
    /// With vector instructions.
    vector: bool,
    /// Where memory was accessed last.
    near: Option<Addr>,
}

impl<'a> Gen<'a> {
    /// A block at `pc` of about `len` operations.
    pub fn block(rng: &'a mut Rng, pc: u64, next: &'a [u64], len: usize, vector: bool) -> Block {
        let mut block = Block::default();
        block.clear(pc, 0);
        let mut g = Gen { rng, block, vals: vec![], flags: vec![], pc, next, vector, near: None };
        g.insn();
        for _ in 0..2 {
            let k = g.rng.value();
            let v = g.block.iconst(k);
            g.vals.push(v);
        }
        let v = g.any_get();
        g.vals.push(v);
        let f = g.block.flags_of(Op::Sub, Width::W64, [v, g.vals[0], Val::NONE, Val::NONE]);
        g.flags.push((f, FLAGS));
        for _ in 0..len {
            g.op();
        }
        g.end();
        g.block
    }

    fn insn(&mut self) {
        let len = 1 + self.rng.below(15) as u8;
        self.block.insn_start(self.pc, len);
        self.pc += u64::from(len);
    }

    fn val(&mut self) -> Val {
        // Recent values more often, for chains.
        let n = self.vals.len();
        let i =
            if self.rng.chance(2) { self.rng.below(n) } else { n - 1 - self.rng.below(n.min(4)) };
        self.vals[i]
    }

    fn width(&mut self) -> Width {
        self.rng.pick(&[Width::W8, Width::W16, Width::W32, Width::W64])
    }

    fn global(&mut self) -> Global {
        loop {
            let g = self.rng.below(GLOBALS.len());
            if g != PC {
                return Global(g as u8);
            }
        }
    }

    fn any_get(&mut self) -> Val {
        let g = self.global();
        self.block.get(g)
    }

    /// Makes a result of width `w` fit for general use.
    fn result(&mut self, w: Width, v: Val) {
        let v = if w >= Width::W32 {
            v
        } else {
            match self.rng.below(3) {
                0 => self.block.un(Op::Zext, w, v),
                1 => self.block.un(Op::Sext, w, v),
                _ => {
                    let a = self.val();
                    let at = self.rng.pick(&[0, 0, 8, 16]);
                    self.block.deposit(w, a, v, at)
                }
            }
        };
        self.vals.push(v);
    }

    /// A flags value of which at least `bits` are defined.
    fn flags_with(&mut self, bits: u64) -> (Val, u64) {
        let n = self.flags.len();
        for _ in 0..4 {
            let i = n - 1 - self.rng.below(n.min(6));
            if self.flags[i].1 & bits == bits {
                return self.flags[i];
            }
        }
        // The first is a comparison: everything is defined.
        self.flags[0]
    }

    /// Old flags for an operation that may keep them, or none (then they are zero).
    fn old_flags(&mut self) -> (Val, u64) {
        if self.rng.chance(3) { (Val::NONE, FLAGS) } else { self.flags_with(0) }
    }

    fn emit(&mut self, op: Op, w: Width, ins: [Val; 4], defined: u64) {
        let want_fl = self.rng.chance(2);
        if want_fl {
            if op != Op::Bt && !self.rng.chance(4) {
                let (v, f) = self.block.alu(op, w, ins);
                self.flags.push((f, defined));
                self.result(w, v);
            } else {
                let f = self.block.flags_of(op, w, ins);
                self.flags.push((f, defined));
            }
        } else if op != Op::Bt {
            let v = self.block.new_val();
            self.block.push(Inst { dst: v, ins, ..Inst::new(op, w) });
            self.result(w, v);
        }
    }

    fn op(&mut self) {
        const N: Val = Val::NONE;
        if self.rng.chance(6) {
            self.insn();
        }
        let w = self.width();
        let (a, b) = (self.val(), self.val());
        match self.rng.below(if self.vector { 35 } else { 33 }) {
            33.. => self.native(),
            31 => self.guest_op(),
            32 => self.guest_narrow_op(),
            0 => {
                let k = self.rng.value();
                let v = self.block.iconst(k);
                self.vals.push(v);
            }
            1 | 2 => {
                let v = self.any_get();
                self.vals.push(v);
            }
            3..=5 => {
                let g = self.global();
                self.block.put(g, a);
            }
            6 => {
                let op = self.rng.pick(&[Op::Zext, Op::Sext]);
                let v = self.block.un(op, w, a);
                self.vals.push(v);
            }
            7 => {
                let at = self.rng.below((64 - w.bits()) as usize + 1) as u8;
                let v = if self.rng.chance(2) {
                    self.block.deposit(w, a, b, at)
                } else {
                    self.block.extract(w, a, at)
                };
                self.vals.push(v);
            }
            8..=10 => {
                let op = self.rng.pick(&[Op::Add, Op::Sub, Op::And, Op::Or, Op::Xor]);
                let b = if self.rng.chance(8) { a } else { b };
                let undefined = if matches!(op, Op::Add | Op::Sub) { 0 } else { AF };
                self.emit(op, w, [a, b, N, N], FLAGS & !undefined);
            }
            11 => {
                let op = self.rng.pick(&[Op::Adc, Op::Sbb]);
                let (c, _) = self.flags_with(CF);
                self.emit(op, w, [a, b, c, N], FLAGS);
            }
            12 => {
                let op = self.rng.pick(&[Op::Inc, Op::Dec]);
                let (c, known) = self.old_flags();
                self.emit(op, w, [a, N, c, N], FLAGS & !CF | known & CF);
            }
            13 => self.emit(Op::Neg, w, [a, N, N, N], FLAGS),
            14 => {
                let op = self.rng.pick(&[Op::Not, Op::Andn]);
                let v = if op == Op::Not {
                    self.block.un(op, w, a)
                } else {
                    self.block.bin(op, w, a, b)
                };
                self.result(w, v);
            }
            15 | 16 => self.shift(w, a),
            17 => self.double_shift(w, a, b),
            18 => {
                let w = w.max(Width::W16);
                self.emit(Op::Mul, w, [a, b, N, N], CF | OF);
            }
            19 => self.wide_mul(w, a, b),
            20 => self.divide(w),
            21 => self.bit_op(w, a, b),
            22 => {
                let w = w.max(Width::W32);
                let base = if self.rng.chance(4) { N } else { a };
                let index = if self.rng.chance(2) { N } else { b };
                let scale = self.rng.below(4) as u8;
                let disp = self.rng.value() as i32;
                let v = self.block.lea(w, Addr { base, index, scale, disp });
                self.vals.push(v);
            }
            23 => self.flags_op(w, a, b),
            24..=26 => self.memory(w),
            27 => self.pointer(w),
            28 => self.call(),
            29 => {
                let off = scratch(self.rng.below(4));
                if self.rng.chance(2) {
                    self.block.stenv(w, off, a);
                } else {
                    let v = self.block.ldenv(w, off);
                    self.vals.push(v);
                }
            }
            _ => self.side_exit(),
        }
    }

    /// An operation on a guest register as a front end translates it: read, compute, write.
    fn guest_op(&mut self) {
        const N: Val = Val::NONE;
        let (g, h) = (self.global(), self.global());
        let w = self.rng.pick(&[Width::W32, Width::W64]);
        let (a, b) = (self.block.get(g), self.block.get(h));
        let (v, f) = match self.rng.below(6) {
            0 => {
                let addr = self.address();
                (self.block.ld(w, addr, 0), N)
            }
            1 => self.block.alu(Op::Neg, w, [a, N, N, N]),
            2 => (self.block.bin(Op::Mul, w, b, a), N),
            3 => self.block.alu(Op::Sub, w, [b, a, N, N]),
            n => self.block.alu(if n == 4 { Op::Sub } else { Op::Add }, w, [a, b, N, N]),
        };
        if f.is_some() {
            self.flags.push((f, FLAGS));
        }
        self.block.put(g, v);
        if self.rng.chance(2) {
            let other = self.global();
            self.block.put(other, v);
        }
        let keep = self.rng.pick(&[v, a, b]);
        self.vals.push(keep);
    }

    /// The same on the low part of a register: the result is inserted into the old content.
    fn guest_narrow_op(&mut self) {
        const N: Val = Val::NONE;
        let (g, h) = (self.global(), self.global());
        let w = self.rng.pick(&[Width::W8, Width::W16]);
        let (a, b) = (self.block.get(g), self.block.get(h));
        let (v, f) = match self.rng.below(9) {
            0 => {
                let addr = self.address();
                (self.block.ld(w, addr, 0), N)
            }
            1 => {
                let cond = Cond::from_code(self.rng.below(16) as u8);
                let (f, _) = self.flags_with(cond.reads());
                (self.block.setcc(cond, f), N)
            }
            2 => {
                let n = self.rng.below(9) as u64;
                let n = self.block.iconst(n);
                let op = self.rng.pick(&[Op::Shl, Op::Shr, Op::Sar, Op::Rol]);
                (self.block.bin(op, w, a, n), N)
            }
            3 => self.block.alu(Op::Neg, w, [a, N, N, N]),
            4 => (self.block.un(Op::Not, w, a), N),
            5 => (self.block.bin(Op::Mul, w, a, b), N),
            6 => self.block.alu(Op::Sub, w, [b, a, N, N]),
            n => self.block.alu(if n == 7 { Op::Sub } else { Op::Add }, w, [a, b, N, N]),
        };
        if f.is_some() {
            self.flags.push((f, FLAGS));
        }
        let d = self.block.deposit(w, a, v, 0);
        if self.rng.chance(3) {
            let z = self.block.un(Op::Zext, w, v);
            let other = self.global();
            self.block.put(other, z);
        }
        self.block.put(g, d);
        let keep = self.rng.pick(&[d, a, b]);
        self.vals.push(keep);
    }

    /// A count: constant or not, with what the flags of a shift by it are sure of.
    fn count(&mut self) -> (Val, Option<u64>) {
        if self.rng.chance(2) {
            let n = self.rng.below(70) as u64;
            (self.block.iconst(n), Some(n))
        } else {
            (self.val(), None)
        }
    }

    fn shift(&mut self, w: Width, a: Val) {
        const N: Val = Val::NONE;
        let op = self.rng.pick(&[Op::Shl, Op::Shr, Op::Sar, Op::Rol, Op::Ror, Op::Rcl, Op::Rcr]);
        let (n, k) = self.count();
        let k = k.map(|k| k & if w == Width::W64 { 63 } else { 31 });
        let once = if k == Some(1) { OF } else { 0 };
        let zero = k == Some(0);
        match op {
            Op::Rcl | Op::Rcr => {
                let (c, known) = self.flags_with(CF);
                let defined = if zero { known } else { known & !OF | known & once };
                self.emit(op, w, [a, n, c, N], defined);
            }
            Op::Rol | Op::Ror => {
                let (d, known) = self.old_flags();
                let cf = if k.is_some() && !zero { CF } else { known & CF };
                let of = if zero { known & OF } else { once };
                self.emit(op, w, [a, n, N, d], known & !(CF | OF) | cf | of);
            }
            _ => {
                let (d, known) = self.old_flags();
                let carry = if w >= Width::W32 || op == Op::Sar || k.is_some_and(|k| k <= 8) {
                    CF
                } else {
                    0
                };
                let set = FLAGS & !(AF | OF | CF) | carry | once;
                let defined = match k {
                    Some(0) => known,
                    Some(_) => set,
                    None => set & known,
                };
                self.emit(op, w, [a, n, N, d], defined);
            }
        }
    }

    fn double_shift(&mut self, w: Width, a: Val, b: Val) {
        let w = w.max(Width::W16);
        let op = self.rng.pick(&[Op::Shld, Op::Shrd]);
        let (n, k) = if w == Width::W16 {
            let k = self.rng.below(17) as u64;
            (self.block.iconst(k), Some(k))
        } else {
            self.count()
        };
        let k = k.map(|k| k & if w == Width::W64 { 63 } else { 31 });
        let (d, known) = self.old_flags();
        let set = FLAGS & !(AF | OF) | if k == Some(1) { OF } else { 0 };
        let defined = match k {
            Some(0) => known,
            Some(_) => set,
            None => set & known,
        };
        self.emit(op, w, [a, b, n, d], defined);
    }

    fn wide_mul(&mut self, w: Width, a: Val, b: Val) {
        let op = self.rng.pick(&[Op::MulU2, Op::MulS2]);
        let mut inst = Inst { ins: [a, b, Val::NONE, Val::NONE], ..Inst::new(op, w) };
        let mut results = vec![];
        if self.rng.chance(2) {
            inst.dst = self.block.new_val();
            results.push(inst.dst);
        }
        if self.rng.chance(2) {
            inst.dst2 = self.block.new_val();
            results.push(inst.dst2);
        }
        if self.rng.chance(3) || results.is_empty() {
            inst.fl = self.block.new_val();
            self.flags.push((inst.fl, CF | OF));
        }
        self.block.push(inst);
        for v in results {
            self.result(w, v);
        }
    }

    /// A division that works out most of the time.
    fn divide(&mut self, w: Width) {
        let signed = self.rng.chance(2);
        let lo = self.val();
        let by = self.val();
        let one = self.block.iconst(3);
        let by = self.block.bin(Op::Or, Width::W64, by, one);
        let by = if self.rng.chance(6) { self.val() } else { by };
        let hi = if self.rng.chance(6) {
            self.val()
        } else if signed {
            let wide = self.block.un(Op::Sext, w, lo);
            let n = self.block.iconst(63);
            self.block.bin(Op::Sar, Width::W64, wide, n)
        } else {
            self.block.iconst(0)
        };
        let op = if signed { Op::DivS2 } else { Op::DivU2 };
        let ins = [hi, lo, by, Val::NONE];
        let mut inst = Inst { ins, ..Inst::new(op, w) };
        if !self.rng.chance(4) {
            inst.dst = self.block.new_val();
        }
        if !self.rng.chance(4) {
            inst.dst2 = self.block.new_val();
        }
        self.block.push(inst);
        for v in [inst.dst, inst.dst2] {
            if v.is_some() {
                self.result(w, v);
            }
        }
    }

    fn bit_op(&mut self, w: Width, a: Val, b: Val) {
        let op = self.rng.pick(&[Op::Clz, Op::Ctz, Op::Popcnt, Op::Bswap, Op::Pext, Op::Pdep]);
        match op {
            Op::Pext | Op::Pdep => {
                let w = w.max(Width::W32);
                let v = self.block.bin(op, w, a, b);
                self.result(w, v);
            }
            _ => {
                let w = w.max(Width::W16);
                let v = self.block.un(op, w, a);
                self.result(w, v);
            }
        }
    }

    fn flags_op(&mut self, w: Width, a: Val, b: Val) {
        let cond = Cond::from_code(self.rng.below(16) as u8);
        let (f, known) = self.flags_with(cond.reads());
        match self.rng.below(5) {
            0 => {
                let v = self.block.setcc(cond, f);
                self.vals.push(v);
            }
            1 => {
                let w = w.max(Width::W16);
                let v = self.block.selcc(w, cond, f, a, b);
                self.result(w, v);
            }
            2 => {
                let img = self.block.un(Op::FlagsImg, Width::W64, f);
                let m = self.block.iconst(known);
                let v = self.block.bin(Op::And, Width::W64, img, m);
                self.vals.push(v);
            }
            3 => {
                let f = self.block.flags_of(
                    Op::ImgFlags,
                    Width::W64,
                    [a, Val::NONE, Val::NONE, Val::NONE],
                );
                self.flags.push((f, FLAGS));
            }
            _ => {
                let w = w.max(Width::W16);
                let (c, known) = self.old_flags();
                self.emit(Op::Bt, w, [a, b, c, Val::NONE], known | CF);
            }
        }
    }

    /// An address: mostly plain memory, often at a page's end.
    fn address(&mut self) -> Addr {
        let page = RAM.start + 4096 * self.rng.below(16) as u64;
        let at = match self.rng.below(24) {
            0 => MMIO + self.rng.below(4090) as u64,
            1 => RAM.end - self.rng.below(8) as u64,
            2 => READ_ONLY + self.rng.below(4090) as u64,
            3 => self.rng.value(),
            4..=7 => page.max(RAM.start + 4096) - self.rng.below(9) as u64,
            _ => page + self.rng.below(4000) as u64,
        };
        let disp = if self.rng.chance(2) { 0 } else { self.rng.next() as i16 as i32 };
        let base = self.block.iconst(at.wrapping_sub(disp as i64 as u64));
        // Through a register, so that the address is not a constant to the passes.
        let base = if self.rng.chance(2) {
            let g = self.global();
            let r = self.block.get(g);
            let x = self.block.bin(Op::Xor, Width::W64, base, r);
            self.block.bin(Op::Xor, Width::W64, x, r)
        } else {
            base
        };
        let (index, scale) = if self.rng.chance(3) {
            (self.block.setcc(Cond::O, self.flags[0].0), self.rng.below(4) as u8)
        } else {
            (Val::NONE, 0)
        };
        Addr { base, index, scale, disp }
    }

    /// Accesses, often several off the same base with other things between them.
    fn memory(&mut self, w: Width) {
        let addr = match self.near {
            Some(addr) if !self.rng.chance(4) => addr,
            _ => self.address(),
        };
        self.near = addr.base.is_some().then_some(addr);
        for _ in 0..1 + self.rng.below(3) {
            self.memory_at(w, addr);
            if addr.index.is_some() {
                break;
            }
            let step = self.rng.below(80) as i32 - 40;
            let w = self.width();
            self.memory_at(w, Addr { disp: addr.disp + step, ..addr });
        }
    }

    fn memory_at(&mut self, w: Width, addr: Addr) {
        if self.rng.chance(2) {
            let v = self.val();
            self.block.st(w, addr, v);
        } else {
            let ext = if w < Width::W64 { self.rng.pick(&[0, LD_SX64, LD_SX32]) } else { 0 };
            let ext = if w == Width::W32 && ext == LD_SX32 { 0 } else { ext };
            let v = self.block.ld(w, addr, ext);
            self.vals.push(v);
        }
    }

    fn pointer(&mut self, w: Width) {
        let addr = self.address();
        let read_only = self.rng.chance(4);
        let access = if read_only { PTR_READ } else { PTR_READ | PTR_WRITE };
        let p = self.block.ptr(3, addr, access);
        for _ in 0..1 + self.rng.below(2) {
            let v = self.val();
            let disp = self.rng.below((8 - w.bytes()) as usize + 1) as u64;
            match self.rng.below(if read_only { 1 } else { 4 }) {
                0 => {
                    let dst = self.block.new_val();
                    self.block.push(Inst {
                        dst,
                        ins: [p, Val::NONE, Val::NONE, Val::NONE],
                        imm: disp,
                        ..Inst::new(Op::LdP, w)
                    });
                    self.vals.push(dst);
                }
                1 => self.block.push(Inst {
                    ins: [p, v, Val::NONE, Val::NONE],
                    imm: disp,
                    ..Inst::new(Op::StP, w)
                }),
                2 => {
                    let dst = if self.rng.chance(3) { Val::NONE } else { self.block.new_val() };
                    self.block.push(Inst {
                        dst,
                        aux: self.rng.below(6) as u8,
                        ins: [p, v, Val::NONE, Val::NONE],
                        ..Inst::new(Op::AtomicRmw, w)
                    });
                    if dst.is_some() {
                        self.vals.push(dst);
                    }
                }
                _ => {
                    let new = self.val();
                    let (dst, fl) = self.block.alu(Op::AtomicCas, w, [p, v, new, Val::NONE]);
                    self.vals.push(dst);
                    self.flags.push((fl, FLAGS));
                }
            }
        }
        if !read_only {
            self.block.ptr_end(p);
        }
    }

    fn call(&mut self) {
        let args = [self.val(), self.val(), self.val(), self.val()];
        let (helper, n) = self.rng.pick(&[(0, 4), (0, 4), (1, 1), (2, 0), (3, 1), (4, 1), (5, 1)]);
        let mut args = args;
        if matches!(helper, 3 | 5) && !self.rng.chance(4) {
            // Mostly without a fault: an even argument.
            let mask = self.block.iconst(!1);
            args[0] = self.block.bin(Op::And, Width::W64, args[0], mask);
        }
        if self.rng.chance(4) {
            self.block.call_void(Helper(helper), &args[..n]);
        } else {
            let v = self.block.call(Helper(helper), &args[..n]);
            self.vals.push(v);
        }
    }

    fn side_exit(&mut self) {
        let cond = Cond::from_code(self.rng.below(16) as u8);
        let (f, _) = self.flags_with(cond.reads());
        let exit = self.exit_to();
        self.block.brcc(cond, f, exit);
    }

    fn exit_to(&mut self) -> Exit {
        let kind = if self.next.is_empty() || self.rng.chance(3) {
            if self.rng.chance(2) {
                ExitKind::Leave { code: 1 + self.rng.below(9) as u32, pc: Some(self.rng.value()) }
            } else {
                ExitKind::Goto { pc: self.rng.next() >> 16, same_page: false }
            }
        } else {
            ExitKind::Goto { pc: self.rng.pick(self.next), same_page: self.rng.chance(2) }
        };
        Exit::new(kind, ExitHint::Jump)
    }

    fn end(&mut self) {
        if self.rng.chance(3) {
            let pc = if self.next.is_empty() || self.rng.chance(5) {
                self.rng.next() >> 16
            } else {
                self.rng.pick(self.next)
            };
            let v = self.block.iconst(pc);
            let hint = match self.rng.below(3) {
                0 => ExitHint::Jump,
                1 => ExitHint::Ret,
                _ => ExitHint::Call { ret: self.rng.next() >> 16 },
            };
            self.block.exit(Exit::new(ExitKind::Indirect, hint), v);
        } else {
            let exit = self.exit_to();
            self.block.exit(exit, Val::NONE);
        }
    }

    /// A pass-through instruction.
    fn native(&mut self) {
        const N: Val = Val::NONE;
        let form = |prefix, map, opcode, reg, rm| Native {
            enc: Encoding::Legacy,
            prefix,
            map,
            opcode,
            w: false,
            l: 0,
            reg,
            rm,
            vvvv: NativeReg::Fixed(0),
            imm8: None,
            dst_in: false,
            sets_flags: false,
            vector: true,
            fp: false,
            x87: false,
        };
        let (x, y) =
            (NativeReg::Vec(self.rng.below(16) as u8), NativeReg::Vec(self.rng.below(16) as u8));
        let (a, b) = (self.val(), self.val());
        match self.rng.below(11) {
            // movups load, store; addps, mulps, paddd, comiss, cvttss2si from memory
            8.. => {
                let addr = self.address();
                let store = self.rng.chance(3);
                let fp = |opcode| Native { fp: true, ..form(0, 1, opcode, x, NativeReg::Mem) };
                let (n, log2) = if store {
                    (form(0, 1, 0x11, x, NativeReg::Mem), 4)
                } else {
                    self.rng.pick(&[
                        (form(0, 1, 0x10, x, NativeReg::Mem), 4),
                        (fp(0x58), 4),
                        (fp(0x59), 4),
                        (form(0x66, 1, 0xfe, x, NativeReg::Mem), 4),
                        (Native { sets_flags: true, ..fp(0x2f) }, 2),
                        (
                            Native {
                                fp: true,
                                ..form(0xf3, 1, 0x2c, NativeReg::GprDst, NativeReg::Mem)
                            },
                            2,
                        ),
                    ])
                };
                // Legacy arithmetic demands alignment of the host, and so of the guest.
                let aligned = n.opcode >= 0x50 && log2 == 4 || self.rng.chance(4);
                let access = if store { PTR_WRITE } else { PTR_READ }
                    | if aligned { PTR_ALIGNED } else { 0 };
                let dst = if n.opcode == 0x2c { self.block.new_val() } else { N };
                let fl = if n.sets_flags { self.block.new_val() } else { N };
                self.block.native_mem(n, log2, addr, access, dst, fl);
                if dst.is_some() {
                    self.vals.push(dst);
                }
                if fl.is_some() {
                    self.flags.push((fl, FLAGS));
                }
            }
            // paddd, pshufb, pxor, mulps, divps, sqrtpd between registers
            0 | 1 => {
                let n = self.rng.pick(&[
                    form(0x66, 1, 0xfe, x, y),
                    form(0x66, 2, 0x00, x, y),
                    form(0x66, 1, 0xef, x, y),
                    Native { fp: true, ..form(0, 1, 0x59, x, y) },
                    Native { fp: true, ..form(0, 1, 0x5e, x, y) },
                    Native { fp: true, ..form(0x66, 1, 0x51, x, y) },
                ]);
                self.block.native(n, N, N, N, [N; 4]);
            }
            // movq to and from a general register
            2 => {
                let n = Native { w: true, ..form(0x66, 1, 0x6e, x, NativeReg::GprB) };
                self.block.native(n, N, N, N, [N, a, N, N]);
            }
            3 => {
                let n = Native { w: true, ..form(0x66, 1, 0x7e, x, NativeReg::GprDst) };
                let dst = self.block.new_val();
                self.block.native(n, dst, N, N, [N; 4]);
                self.vals.push(dst);
            }
            // ptest: ZF and CF, the others cleared
            4 => {
                let n = Native { sets_flags: true, ..form(0x66, 2, 0x17, x, y) };
                let fl = self.block.new_val();
                self.block.native(n, N, N, fl, [N; 4]);
                self.flags.push((fl, FLAGS));
            }
            // movups load, store
            5 => {
                let addr = self.address();
                let store = self.rng.chance(2);
                let p = self.block.ptr(4, addr, if store { PTR_WRITE } else { PTR_READ });
                let n = form(0, 1, if store { 0x11 } else { 0x10 }, x, NativeReg::Mem);
                self.block.native(n, N, N, N, [p, N, N, N]);
                if store {
                    self.block.ptr_end(p);
                }
            }
            // crc32 (general registers only)
            6 => {
                let n = Native {
                    w: true,
                    dst_in: true,
                    vector: false,
                    ..form(0xf2, 2, 0xf1, NativeReg::GprDst, NativeReg::GprB)
                };
                let dst = self.block.new_val();
                self.block.native(n, dst, N, N, [N, a, N, b]);
                self.vals.push(dst);
            }
            // bextr: both read-only inputs, flags (CF, OF, ZF defined)
            _ => {
                let n = Native {
                    enc: Encoding::Vex,
                    w: true,
                    vector: false,
                    sets_flags: true,
                    vvvv: NativeReg::GprC,
                    ..form(0, 2, 0xf7, NativeReg::GprDst, NativeReg::GprB)
                };
                let (dst, fl) = (self.block.new_val(), self.block.new_val());
                self.block.native(n, dst, N, fl, [N, a, b, N]);
                self.vals.push(dst);
                self.flags.push((fl, CF | OF | 0x40));
            }
        }
    }
}
