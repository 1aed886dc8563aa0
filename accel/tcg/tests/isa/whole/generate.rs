//! Random programs: every form of every instruction under test, with jumps, loops and calls among
//! them, operands in registers, in memory at all kinds of places, and edges of every format.
//!
//! Most instructions leave the registers alone that point at memory, so that programs run on for
//! long; some do not, and some are there for the exception that they raise.

use super::layout::{CODE, DATA, DATA_LEN, FS_OFFSET, GS_OFFSET, Memory, READ_ONLY_LEN};
use super::program::{Item, Program};
use super::start;
use super::state::{FLAGS, State};
use crate::forms::{self, BASE};
use crate::rng::Rng;
use crate::sequences::COMMON;
use crate::{vector, x87};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, MemoryOperand, Mnemonic, OpKind, Register,
};
use std::arch::x86_64::__cpuid_count;
use tandem_tcg::x86::bits::rflags;

/// What always raises an exception in a user program, or usually. (Not INT1: after it virtual hosts
/// are known to report the address of the instruction itself.)
const RAISING: [Code; 24] = [
    Code::Ud2,
    Code::Int3,
    Code::Int_imm8,
    Code::Hlt,
    Code::Cli,
    Code::Sti,
    Code::In_AL_DX,
    Code::In_EAX_imm8,
    Code::Out_DX_EAX,
    Code::Out_imm8_AL,
    Code::Insb_m8_DX,
    Code::Outsd_DX_m32,
    Code::Clts,
    Code::Invd,
    Code::Wbinvd,
    Code::Rdmsr,
    Code::Wrmsr,
    Code::Mov_r64_cr,
    Code::Mov_r32_cr,
    Code::Mov_dr_r64,
    Code::Into,
    Code::Bound_r32_m3232,
    Code::Swapgs,
    Code::Sysretq,
];

/// What is neither integer arithmetic nor on vectors.
const OTHER: [Code; 33] = [
    Code::Ldmxcsr_m32,
    Code::Stmxcsr_m32,
    Code::VEX_Vldmxcsr_m32,
    Code::VEX_Vstmxcsr_m32,
    Code::Emms,
    Code::Wait,
    Code::Fxsave_m512byte,
    Code::Fxsave64_m512byte,
    Code::Fxrstor_m512byte,
    Code::Pushfq,
    Code::Pushfd,
    Code::Pushfw,
    Code::Popfq,
    Code::Popfd,
    Code::Popfw,
    Code::Std,
    Code::Pause,
    Code::Lfence,
    Code::Mfence,
    Code::Sfence,
    Code::Prefetcht0_m8,
    Code::Prefetchw_m8,
    Code::Clflush_m8,
    Code::Clflushopt_m8,
    Code::Clwb_m8,
    Code::Enterq_imm16_imm8,
    Code::Enterd_imm16_imm8,
    Code::Enterw_imm16_imm8,
    Code::Mov_r32m16_Sreg,
    Code::Mov_r64m16_Sreg,
    Code::Rdfsbase_r64,
    Code::Rdgsbase_r32,
    Code::Movdiri_m64_r64,
];

/// The forms to choose from in code of one size.
pub struct Pools {
    bits: u32,
    integer: Vec<Code>,
    vector: Vec<Code>,
    indexed: Vec<Code>,
    x87: Vec<Code>,
    other: Vec<Code>,
    raising: Vec<Code>,
}

/// Whether code of size `bits` can have the form.
pub fn there(code: Code, bits: u32) -> bool {
    let op = code.op_code();
    op.is_instruction()
        && match bits {
            64 => op.mode64(),
            32 => op.mode32(),
            _ => op.mode16(),
        }
}

/// Integer forms whose result depends on what is undefined.
fn is_undefined(code: Code) -> bool {
    matches!(
        code,
        Code::Shld_rm16_r16_CL
            | Code::Shrd_rm16_r16_CL
            | Code::Shld_rm16_r16_imm8
            | Code::Shrd_rm16_r16_imm8
            | Code::Bswap_r16
            // AMD's processors read 32 bits.
            | Code::Movsxd_r16_rm16
    )
}

impl Pools {
    /// Whether programs may have the form.
    pub fn contains(&self, code: Code) -> bool {
        [&self.integer, &self.vector, &self.indexed, &self.x87, &self.other, &self.raising]
            .iter()
            .any(|p| p.contains(&code))
    }

    /// Everything for code of size `bits`.
    pub fn new(bits: u32) -> Pools {
        let all = |f: &dyn Fn(Code) -> bool| -> Vec<Code> {
            Code::values().filter(|&c| there(c, bits) && f(c)).collect()
        };
        let listed = |list: &[Code]| -> Vec<Code> {
            list.iter().copied().filter(|&c| there(c, bits)).collect()
        };
        Pools {
            bits,
            integer: all(&|c| forms::is_integer(c, bits) && !is_undefined(c)),
            vector: all(&|c| vector::is_vector(c) && !is_approximate(c)),
            indexed: all(&|c| vector::is_indexed(c)),
            x87: all(&x87::is_x87),
            other: listed(&OTHER).into_iter().filter(|&c| !is_hosts_alone(c)).collect(),
            raising: listed(&RAISING),
        }
    }
}

/// Whether the host has an instruction of [`OTHER`] that is unknown to the translator, which raises #UD.
fn is_hosts_alone(code: Code) -> bool {
    let movdiri = __cpuid_count(7, 0).ecx >> 27 & 1 != 0;
    code == Code::Movdiri_m64_r64 && movdiri
}

/// Results that a program's rounding or the host's generation decides in ways of its own.
fn is_approximate(_: Code) -> bool {
    false
}

/// Builds one program.
pub struct Builder<'a> {
    rng: &'a mut Rng,
    pools: &'a Pools,
    /// What there is so far.
    pub items: Vec<Item>,
    /// Forward jumps that wait for their target: which item, and after which item it is.
    open: Vec<(usize, usize)>,
    /// A loop's body is being made: its counter is taken.
    in_loop: bool,
    /// What the program is mostly about.
    theme: u64,
}

/// A random program.
pub fn program(rng: &mut Rng, pools: &Pools) -> Option<Program> {
    let bits = pools.bits;
    let most = if rng.one_in(4) { 60 } else { 24 };
    let length = 4 + rng.below(most) as usize;
    let theme = rng.below(8);
    let mut b = Builder { rng, pools, items: Vec::new(), open: Vec::new(), in_loop: false, theme };
    while b.items.len() < length {
        b.step();
        b.close(false);
    }
    b.close(true);
    let items = b.items;
    let offset = if rng.one_in(4) { 0x1000 - rng.below(0x80) } else { 0x200 + rng.below(64) };
    let mut p =
        Program { bits, offset, items, state: start::state(rng, bits), memory: start::memory(rng) };
    // Instructions that read undefined flags, or that have no encoding, go.
    let mut i = 0;
    while i < p.items.len() {
        if p.encodes(i) { i += 1 } else { p = p.without(i) }
    }
    while p.undefined_flags().is_none() {
        let i = (0..p.items.len()).find(|&i| p.first(i + 1).undefined_flags().is_none())?;
        p = p.without(i);
    }
    (!p.items.is_empty() && p.assemble().is_some()).then_some(p)
}

impl Program {
    /// Whether item `i` has an encoding by itself, with any target.
    fn encodes(&self, i: usize) -> bool {
        let item = Item { target: self.items[i].target.map(|_| 0), flow: None, ..self.items[i] };
        let p = Program {
            items: vec![item],
            memory: Memory { data: Vec::new(), read_only: Vec::new(), code: Vec::new() },
            state: State::default(),
            ..*self
        };
        let Some(code) = p.encode() else { return false };
        let insns = super::program::decode(&code.bytes, self.bits, p.start());
        // Some forms are shorter spellings of others, and some encodings mean something else.
        insns.len() == 1 && !insns[0].is_invalid() && same(insns[0].code(), item.insn.code())
    }

    /// The first `n` items; jumps beyond go to the end.
    fn first(&self, n: usize) -> Program {
        let cut = |t: Option<usize>| t.map(|t| t.min(n));
        let short = |i: &Item| Item { target: cut(i.target), flow: cut(i.flow), ..*i };
        Program {
            items: self.items[..n].iter().map(short).collect(),
            memory: Memory { data: Vec::new(), read_only: Vec::new(), code: Vec::new() },
            state: State::default(),
            ..*self
        }
    }
}

fn same(a: Code, b: Code) -> bool {
    a == b || a.mnemonic() == b.mnemonic()
}

impl Builder<'_> {
    /// Adds an instruction.
    pub fn push(&mut self, insn: Instruction) {
        self.items.push(Item { insn, target: None, flow: None, hidden: false });
    }

    /// Adds an instruction made by one of iced's constructors.
    pub fn add(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        self.push(insn.unwrap_or_else(|e| panic!("{e}")));
    }

    fn branch(&mut self, code: Code, target: usize) {
        let insn = Instruction::with_branch(code, 0).unwrap_or_else(|e| panic!("{e}"));
        self.items.push(Item { insn, target: Some(target), flow: None, hidden: false });
    }

    /// Gives the forward jumps whose time has come their target.
    fn close(&mut self, all: bool) {
        let here = self.items.len();
        let items = &mut self.items;
        self.open.retain(|&(jump, at)| {
            if all || at <= here {
                items[jump].target = Some(here);
            }
            !(all || at <= here)
        });
    }

    /// Size of the code.
    pub fn bits(&self) -> u32 {
        self.pools.bits
    }

    /// A general register of the code's natural size.
    fn natural(&self, n: u32) -> Register {
        match self.bits() {
            64 => Register::RAX + n,
            32 => Register::EAX + n,
            _ => Register::AX + n,
        }
    }

    /// One of a form per code size.
    fn sized<T: Copy>(&self, forms: [T; 3]) -> T {
        match self.bits() {
            16 => forms[0],
            32 => forms[1],
            _ => forms[2],
        }
    }

    /// `mov register, value`, for small values.
    fn set(&mut self, n: u32, value: i32) {
        let code = self.sized([Code::Mov_rm16_imm16, Code::Mov_rm32_imm32, Code::Mov_rm64_imm32]);
        let r = self.natural(n);
        let value = if self.bits() == 16 { i32::from(value as i16) } else { value };
        self.add(Instruction::with2(code, r, value));
    }

    fn step(&mut self) {
        match self.rng.below(64) {
            0..5 => self.jump_over(),
            5 => self.call(),
            6 if !self.in_loop => self.repeat(),
            7 => self.indirect(),
            8 if self.rng.one_in(6) => self.raising(),
            9..12 => self.other(),
            12 if self.rng.one_in(2) => self.flags(),
            _ => self.plain(),
        }
    }

    fn jump_over(&mut self) {
        let n = 1 + self.rng.below(5) as usize;
        let code = match self.rng.below(18) {
            16 => self.sized([Code::Jmp_rel8_16, Code::Jmp_rel8_32, Code::Jmp_rel8_64]),
            17 => self.sized([Code::Jcxz_rel8_16, Code::Jecxz_rel8_32, Code::Jrcxz_rel8_64]),
            cc => jcc(cc, self.rng.one_in(2), self.bits()),
        };
        let at = self.items.len();
        self.branch(code, at + 1);
        self.open.push((at, at + 1 + n));
    }

    /// A call of a piece of code that returns.
    fn call(&mut self) {
        let a = self.items.len();
        self.branch(
            self.sized([Code::Call_rel16, Code::Call_rel32_32, Code::Call_rel32_64]),
            a + 2,
        );
        self.branch(self.sized([Code::Jmp_rel16, Code::Jmp_rel32_32, Code::Jmp_rel32_64]), a + 3);
        for _ in 0..1 + self.rng.below(3) {
            self.plain();
        }
        self.push(Instruction::with(self.sized([Code::Retnw, Code::Retnd, Code::Retnq])));
        self.items[a + 1].target = Some(self.items.len());
    }

    /// A loop of a few rounds. Its counter is a register that nothing else writes.
    fn repeat(&mut self) {
        self.in_loop = true;
        let n = 2 + self.rng.below(6) as i32;
        let counter = if self.bits() == 64 { 13 } else { 5 };
        self.set(counter, n);
        let head = self.items.len();
        let r = self.natural(counter);
        // All flags are defined at the head.
        let code = self.sized([Code::Cmp_rm16_imm8, Code::Cmp_rm32_imm8, Code::Cmp_rm64_imm8]);
        self.add(Instruction::with2(code, r, 3));
        for _ in 0..1 + self.rng.below(6) {
            self.plain();
        }
        let code = self.sized([Code::Dec_rm16, Code::Dec_rm32, Code::Dec_rm64]);
        self.add(Instruction::with1(code, r));
        self.branch(self.sized([Code::Jne_rel16, Code::Jne_rel32_32, Code::Jne_rel32_64]), head);
        self.in_loop = false;
    }

    /// An indirect jump, by register, by the stack or by memory.
    fn indirect(&mut self) {
        if self.bits() != 64 {
            return self.jump_over();
        }
        let at = self.items.len();
        let r = Register::RAX + self.rng.pick(&[0, 1, 2, 8, 9, 10, 11]);
        let here = MemoryOperand::with_base_displ(Register::RIP, CODE as i64);
        self.add(Instruction::with2(Code::Lea_r64_m, r, here));
        match self.rng.below(4) {
            0 => self.add(Instruction::with1(Code::Jmp_rm64, r)),
            1 => self.add(Instruction::with1(Code::Call_rm64, r)),
            2 => {
                self.add(Instruction::with1(Code::Push_r64, r));
                self.push(Instruction::with(Code::Retnq));
            }
            _ => {
                self.add(Instruction::with1(Code::Push_r64, r));
                let m = MemoryOperand::with_base(Register::RSP);
                self.add(Instruction::with1(Code::Jmp_rm64, m));
            }
        }
        let jump = self.items.len() - 1;
        for _ in 0..self.rng.below(3) {
            self.plain();
        }
        let to = self.items.len();
        self.items[at].target = Some(to);
        self.items[jump].flow = Some(to);
    }

    fn raising(&mut self) {
        let code = self.rng.pick(&self.pools.raising);
        let mut insn = Instruction::default();
        insn.set_code(code);
        for i in 0..code.op_code().op_count() {
            use iced_x86::OpCodeOperandKind as K;
            let register = match code.op_code().op_kind(i) {
                K::al => Register::AL,
                K::eax => Register::EAX,
                K::dx => Register::DX,
                K::cr_reg => Register::CR0,
                K::dr_reg => Register::DR7,
                K::r64_reg => Register::RCX,
                K::r32_reg => Register::ECX,
                K::imm8 => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    // System calls are not the processor's business.
                    insn.set_immediate8((self.rng.bits() as u8) & 0x7f);
                    continue;
                }
                K::mem => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_base(if self.bits() == 64 {
                        Register::RBX
                    } else {
                        Register::EBX
                    });
                    continue;
                }
                K::es_rDI => {
                    insn.set_op_kind(i, self.sized(ES_DI));
                    continue;
                }
                K::seg_rSI => {
                    insn.set_op_kind(i, self.sized(SEG_SI));
                    continue;
                }
                _ => return,
            };
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
        }
        self.push(insn);
    }

    /// POPF with flags of all kinds.
    fn flags(&mut self) {
        let mut v = self.rng.bits() & (FLAGS & !rflags::TF);
        if !self.rng.one_in(8) {
            v &= !(rflags::AC | rflags::NT);
        }
        if self.rng.one_in(24) {
            v |= rflags::TF;
        }
        if self.bits() == 16 {
            v &= 0xffff;
        }
        let (push, pop) = self.sized([
            (Code::Push_imm16, Code::Popfw),
            (Code::Pushd_imm32, Code::Popfd),
            (Code::Pushq_imm32, Code::Popfq),
        ]);
        self.add(Instruction::with1(push, v as i32));
        self.push(Instruction::with(pop));
    }

    fn other(&mut self) {
        let code = self.rng.pick(&self.pools.other);
        if code == Code::Enterd_imm16_imm8 && self.bits() == 16 {
            // EBP would show the upper half of the host's stack pointer.
            return;
        }
        let mut insn = Instruction::default();
        insn.set_code(code);
        match code.mnemonic() {
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq if !self.rng.one_in(8) => {
                return self.flags();
            }
            Mnemonic::Enter => {
                insn.set_op0_kind(OpKind::Immediate16);
                insn.set_immediate16(self.rng.below(64) as u16);
                insn.set_op1_kind(OpKind::Immediate8_2nd);
                let level = if self.rng.one_in(2) { 0 } else { self.rng.below(6) };
                insn.set_immediate8_2nd(level as u8);
                return self.push(insn);
            }
            Mnemonic::Mov => {
                insn.set_op0_kind(OpKind::Register);
                let r = if code == Code::Mov_r64m16_Sreg { Register::RAX } else { Register::EAX };
                insn.set_op0_register(r);
                insn.set_op1_kind(OpKind::Register);
                insn.set_op1_register(Register::ES + self.rng.below(6) as u32);
                return self.push(insn);
            }
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => {
                insn.set_op0_kind(OpKind::Register);
                let wide = code == Code::Rdfsbase_r64;
                insn.set_op0_register(if wide { Register::RDX } else { Register::EDX });
                return self.push(insn);
            }
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr if !self.rng.one_in(8) => {
                return self.load_mxcsr(code);
            }
            _ => {}
        }
        if code.op_code().op_count() > 0 {
            insn.set_op_kind(0, OpKind::Memory);
            if code.op_code().op_count() > 1 {
                insn.set_op1_kind(OpKind::Register);
                insn.set_op1_register(Register::RDX);
            }
            self.place(&mut insn);
        }
        self.push(insn);
        self.hide_pointers(&insn);
    }

    /// LDMXCSR of a valid value.
    fn load_mxcsr(&mut self, code: Code) {
        let (r, size) = if self.bits() == 64 { (Register::RBX, 8) } else { (Register::EBX, 4) };
        if self.bits() == 16 {
            return;
        }
        let m = MemoryOperand::with_base_displ_size(r, 0x40, size);
        let v = start::mxcsr(self.rng) as i32;
        self.add(Instruction::with2(Code::Mov_rm32_imm32, m, v));
        self.add(Instruction::with1(code, m));
    }

    fn plain(&mut self) {
        let pools = self.pools;
        let kind = self.rng.below(16);
        // A theme makes half of the program.
        let kind =
            if self.rng.one_in(2) { kind } else { [0, 0, 0, 6, 6, 12, 12, 4][self.theme as usize] };
        match kind {
            0..4 => {
                let common = COMMON.map(Some).map(|c| c.filter(|&c| there(c, pools.bits)));
                if let Some(code) = self.rng.pick(&common) {
                    self.integer(code);
                }
            }
            4..6 => {
                let code = self.rng.pick(&pools.integer);
                self.integer(code);
            }
            6..11 if !pools.vector.is_empty() => self.vector(),
            11 if !pools.indexed.is_empty() && self.rng.one_in(2) => self.indexed(),
            11..15 if !pools.x87.is_empty() => self.x87(),
            _ => {
                let code = self.rng.pick(&pools.integer);
                self.integer(code);
            }
        }
    }

    fn integer(&mut self, code: Code) {
        use Mnemonic as M;
        let memory =
            forms::has_memory(code) && (self.rng.one_in(3) || !forms::has_register_form(code));
        let lock = memory && code.op_code().can_use_lock_prefix() && self.rng.one_in(3);
        // Now and then anything may be overwritten.
        let sequence = self.in_loop || !self.rng.one_in(60);
        let want = forms::Want { memory, lock, sequence, bits: self.bits() };
        let Some(mut insn) = forms::build(code, want, self.rng) else { return };
        let far = memory && insn.op_count() > 1 && insn.op1_kind() == OpKind::Register;
        match insn.mnemonic() {
            M::Div | M::Idiv if !self.rng.one_in(8) => {
                // A quotient that probably fits.
                if self.rng.one_in(2) || insn.mnemonic() == M::Div {
                    self.set(2, 0);
                } else {
                    let code = self.sized([Code::Cwd, Code::Cdq, Code::Cqo]);
                    self.push(Instruction::with(code));
                }
                if insn.op0_kind() == OpKind::Register {
                    let r = insn.op0_register();
                    if r.size() > 1 && !matches!(r.full_register(), Register::RAX | Register::RDX) {
                        let code = [Code::Or_rm16_imm8, Code::Or_rm32_imm8, Code::Or_rm64_imm8]
                            [r.size().trailing_zeros() as usize - 1];
                        self.add(Instruction::with2(code, r, 1));
                    }
                }
            }
            // The bit offset reaches far from the operand.
            M::Bt | M::Bts | M::Btr | M::Btc if far && !self.rng.one_in(12) => {
                let r = insn.op1_register();
                let n = self.rng.below(0x2000) as i32 - 0x1000;
                if self.bits() == 16 || r.size() == 2 {
                    let n = if self.bits() == 16 { n & 0x7ff } else { n };
                    self.add(Instruction::with2(Code::Mov_rm16_imm16, r, n & 0xffff));
                } else if r.size() == 4 {
                    self.add(Instruction::with2(Code::Mov_rm32_imm32, r, n));
                } else {
                    self.add(Instruction::with2(Code::Mov_rm64_imm32, r, n));
                }
            }
            M::Aam if !self.rng.one_in(8) => insn.set_immediate8(insn.immediate8().max(1)),
            M::Leave => {
                if self.in_loop && self.bits() != 64 {
                    return;
                }
                let n = self.rng.below(0x80) as i32;
                let base = if self.bits() == 16 { 0 } else { DATA as i32 };
                self.set(5, base + 0x3000 + n);
            }
            M::Popa | M::Popad | M::Arpl if self.in_loop => return,
            _ if insn.is_string_instruction() => self.string(&mut insn),
            _ => {}
        }
        let explicit = insn.op0_kind() == OpKind::Memory || insn.op1_kind() == OpKind::Memory;
        if explicit && !matches!(insn.mnemonic(), M::Xlatb) && self.rng.one_in(2) {
            let offset = (0..insn.op_count())
                .any(|i| code.op_code().op_kind(i) == iced_x86::OpCodeOperandKind::mem_offs);
            if !offset {
                self.place(&mut insn);
            }
        }
        self.push(insn);
    }

    /// Pointers and a count for a string instruction, most of the time.
    fn string(&mut self, insn: &mut Instruction) {
        let base = if self.bits() == 16 { 0 } else { DATA as i32 };
        if !self.rng.one_in(3) {
            let at = 0x1800 + self.rng.below(0x1000) as i32;
            self.set(6, base + at);
            let near = self.rng.one_in(2);
            let to = if near { at + self.rng.below(20) as i32 - 10 } else { 0x2800 };
            let more = self.rng.below(64) as i32;
            self.set(7, base + to + more);
        }
        match self.rng.below(3) {
            0 => return,
            1 if insn.code().op_code().can_use_repne_prefix() => insn.set_has_repne_prefix(true),
            _ if insn.code().op_code().can_use_rep_prefix() => insn.set_has_rep_prefix(true),
            _ => return,
        }
        let n = if self.rng.one_in(16) { 0x500 } else { self.rng.below(40) as i32 };
        self.set(1, n);
    }

    fn vector(&mut self) {
        let code = self.rng.pick(&self.pools.vector);
        let wants = vector::wants(code);
        let want = wants[self.rng.below(wants.len() as u64) as usize];
        let Some(mut insn) = vector::build(code, want, self.bits(), self.rng) else { return };
        // Not the index register, nor the counter of loops.
        for i in 0..insn.op_count() {
            let r = insn.op_register(i);
            if r.is_gpr() && matches!(r.full_register(), Register::R12 | Register::R13) {
                insn.set_op_register(i, r + 2);
            }
        }
        if insn.mnemonic() == Mnemonic::Maskmovdqu || insn.mnemonic() == Mnemonic::Maskmovq {
            let more = self.rng.below(64) as i32;
            self.set(7, DATA as i32 + 0x2800 + more);
        }
        if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
            if self.rng.one_in(2) || insn.cpuid_features().contains(&CpuidFeature::SHA) {
                let needs = insn.memory_base();
                self.place(&mut insn);
                // Most unaligned operands of legacy forms raise #GP; AMD's processors let those of
                // SHA instructions pass, against SDM vol. 2 (exception type 4).
                let legacy = insn.op_code().encoding() == EncodingKind::Legacy;
                let sha = insn.cpuid_features().contains(&CpuidFeature::SHA);
                if sha || legacy && !self.rng.one_in(10) {
                    insn.set_memory_base(if sha { Register::None } else { needs });
                    let from = if sha { DATA } else { 0 };
                    insn.set_memory_index(Register::None);
                    insn.set_memory_displacement64(from + (insn.memory_displacement64() & 0xff0));
                }
            }
            if self.bits() == 32 && insn.memory_base() == Register::RBX {
                insn.set_memory_base(Register::EBX);
            }
        }
        self.push(insn);
    }

    fn indexed(&mut self) {
        let code = self.rng.pick(&self.pools.indexed);
        let Some((mut insn, index)) = vector::build_indexed_insn(code, self.bits(), self.rng)
        else {
            return;
        };
        if self.bits() == 32 {
            insn.set_memory_base(Register::EBX);
            insn.set_memory_displ_size(4);
        }
        if !self.rng.one_in(10) {
            // Small indexes: zero is one.
            let code = match index {
                r if r.is_zmm() => Code::EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32,
                r if r.is_ymm() && r.number() >= 16 => Code::EVEX_Vpxord_ymm_k1z_ymm_ymmm256b32,
                r if r.is_xmm() && r.number() >= 16 => Code::EVEX_Vpxord_xmm_k1z_xmm_xmmm128b32,
                r if r.is_ymm() => Code::VEX_Vpxor_ymm_ymm_ymmm256,
                _ => Code::VEX_Vpxor_xmm_xmm_xmmm128,
            };
            self.add(Instruction::with3(code, index, index, index));
        }
        self.push(insn);
    }

    fn x87(&mut self) {
        let code = self.rng.pick(&self.pools.x87);
        let Some(mut insn) = x87::build(code, self.rng) else { return };
        if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
            if self.bits() == 32 {
                insn.set_memory_base(Register::EBX);
                insn.set_memory_displ_size(4);
            }
            if self.rng.one_in(3) {
                self.place(&mut insn);
            }
        }
        self.push(insn);
        self.hide_pointers(&insn);
    }

    /// Gives the memory operand another address: by any base, at any distance from a page's end.
    fn place(&mut self, insn: &mut Instruction) {
        let size = insn.memory_size().size().max(1) as u64;
        let rng = &mut *self.rng;
        // Offset from the data's start.
        let offset = match rng.below(16) {
            0..9 => rng.below(0x3000) & !(size.next_power_of_two().min(64) - 1),
            9..12 => rng.below(0x3000),
            // Across a page boundary.
            12..14 => 0x1000 * (1 + rng.below(2)) - rng.below(size) - 1,
            // Around the end of what can be written, and of all data.
            14 if rng.one_in(6) => DATA_LEN as u64 - rng.below(2 * size),
            15 if rng.one_in(6) => (DATA_LEN + READ_ONLY_LEN) as u64 - rng.below(2 * size),
            _ => 0x2000 + rng.below(0x800) * 2,
        };
        let base_offset = BASE - DATA;
        insn.set_segment_prefix(Register::None);
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        let set = |insn: &mut Instruction, base, displ: u64, size| {
            insn.set_memory_base(base);
            insn.set_memory_displacement64(displ);
            insn.set_memory_displ_size(size);
        };
        if self.pools.bits == 16 {
            let at = if rng.one_in(30) { rng.bits() & 0xffff } else { offset };
            set(insn, Register::None, at, 2);
            match rng.below(4) {
                0 => insn.set_segment_prefix(Register::CS),
                1 => insn.set_segment_prefix(Register::ES),
                _ => {}
            }
            return;
        }
        let wide = self.pools.bits == 64;
        let n = if wide { 8 } else { 4 };
        let reg = |r: u32| if wide { Register::RAX + r } else { Register::EAX + r };
        match rng.below(20) {
            0..8 => set(insn, reg(3), offset.wrapping_sub(base_offset), n),
            8..10 => {
                set(insn, reg(3), offset.wrapping_sub(base_offset), n);
                insn.set_memory_index(if wide { Register::R12 } else { Register::EBP });
                insn.set_memory_index_scale(rng.pick(&[1, 2, 4, 8]));
            }
            10..12 => set(insn, reg(4), rng.below(0x200) & !7, n),
            12 => set(insn, reg(6), rng.below(0x100), n),
            13 => set(insn, reg(7), rng.below(0x100), n),
            14 => set(insn, Register::None, DATA + offset, n),
            15 if wide => set(insn, Register::RIP, DATA + offset, 8),
            16 if wide => {
                set(insn, Register::None, offset.wrapping_sub(GS_OFFSET) & 0x7fff_ffff, 8);
                insn.set_segment_prefix(Register::GS);
            }
            17 if wide => {
                set(insn, reg(12), offset.wrapping_sub(FS_OFFSET) & 0x7fff_ffff, 8);
                insn.set_segment_prefix(Register::FS);
            }
            // 32-bit addressing.
            18 if wide => set(insn, Register::EBX, offset.wrapping_sub(base_offset), 4),
            // Code, which cannot be written to, or no segment at all.
            15 if rng.one_in(12) => {
                set(insn, reg(3), offset.wrapping_sub(base_offset), n);
                insn.set_segment_prefix(rng.pick(&[Register::CS, Register::FS, Register::GS]));
            }
            // Nothing there, or not even an address.
            19 if rng.one_in(12) => set(insn, reg(rng.below(3) as u32), rng.bits() & 0xff, n),
            _ => set(insn, reg(3), offset.wrapping_sub(base_offset), n),
        }
        if insn.memory_base() == Register::RIP {
            return;
        }
        // Displacements are signed 32-bit numbers.
        let d = insn.memory_displacement64() as i32;
        insn.set_memory_displacement64(if insn.memory_displ_size() == 8 {
            i64::from(d) as u64
        } else {
            u64::from(d as u32)
        });
    }
}

const ES_DI: [OpKind; 3] = [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI];
const SEG_SI: [OpKind; 3] = [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI];

/// The conditional jump with condition `cc`: iced lists them by condition, then by size.
fn jcc(cc: u64, near: bool, bits: u32) -> Code {
    let first = if near { Code::Jo_rel8_16 } else { Code::Jo_rel16 };
    let n = first as usize + 3 * cc as usize + bits.trailing_zeros() as usize - 4;
    Code::try_from(n).unwrap_or(Code::INVALID)
}
