//! Each form of each vector instruction by itself, on random operands, with all vector state
//! compared: registers, opmasks, MXCSR, general registers, flags, memory.

use super::every_form::{USER, text, undefined_flags};
use super::machine::{End, Machine};
use super::memory::{Arena, CODE, CONTEXT, DATA, DATA_LEN, data, poke, set_data};
use super::native::{Regs, START};
use super::rng::Rng;
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeInfo,
    OpCodeOperandKind, OpKind, Register, RoundingControl,
};
use tandem_jit::target::VecState;
use tandem_tcg::x86::exception::Exception;
use tandem_tcg::x86::mode::Mode;
use tandem_tcg::x86::translate::host_has;

const REPEATS: usize = 12;
/// Where RBX points.
const BASE: u64 = DATA + 0x1000;

/// Vector state.
#[derive(Clone, PartialEq, Eq)]
pub struct Vectors {
    /// ZMM0–31.
    pub zmm: [[u8; 64]; 32],
    /// k0–k7.
    pub k: [u64; 8],
    mxcsr: u32,
    /// MMX registers.
    mm: [u64; 8],
}

// Offsets in the context page of the native runner.
const GPR_IN: u64 = 0;
const FLAGS: u64 = 0x80;
const HOST_SP: u64 = 0x88;
const MXCSR: u64 = 0x90;
const HOST_MXCSR: u64 = 0x98;
const K: u64 = 0xa0;
const GPR_OUT: u64 = 0x100;
const MM: u64 = 0x180;
const ZMM: u64 = 0x400;

pub fn width() -> VecState {
    if is_x86_feature_detected!("avx512bw") {
        VecState::Zmm
    } else if is_x86_feature_detected!("avx") {
        VecState::Ymm
    } else {
        VecState::Xmm
    }
}

/// Assembles `insns` with absolute context addresses.
fn assemble(insns: &[Instruction], at: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for i in insns {
        let mut e = Encoder::new(64);
        e.encode(i, at + out.len() as u64).expect("encodes");
        out.extend(e.take_buffer());
    }
    out
}

/// `code reg, [context + at]`, or the other way round.
fn context(code: Code, reg: Register, at: u64, store: bool) -> Instruction {
    use iced_x86::MemoryOperand;
    let m = MemoryOperand::with_displ(CONTEXT + at, 4);
    let r = if store { Instruction::with2(code, m, reg) } else { Instruction::with2(code, reg, m) };
    r.expect("a valid instruction")
}

fn vector_moves(store: bool) -> Vec<Instruction> {
    let mut v = Vec::new();
    for i in 0..8usize {
        let code = if store { Code::Movq_mmm64_mm } else { Code::Movq_mm_mmm64 };
        v.push(context(code, Register::MM0 + i as u32, MM + 8 * i as u64, store));
    }
    let (n, load_code, store_code, first) = match width() {
        VecState::Zmm => (
            32,
            Code::EVEX_Vmovups_zmm_k1z_zmmm512,
            Code::EVEX_Vmovups_zmmm512_k1z_zmm,
            Register::ZMM0,
        ),
        VecState::Ymm => {
            (16, Code::VEX_Vmovups_ymm_ymmm256, Code::VEX_Vmovups_ymmm256_ymm, Register::YMM0)
        }
        VecState::Xmm => (16, Code::Movups_xmm_xmmm128, Code::Movups_xmmm128_xmm, Register::XMM0),
    };
    for i in 0..n {
        let code = if store { store_code } else { load_code };
        v.push(context(code, first + i, ZMM + 64 * i as u64, store));
    }
    if width() == VecState::Zmm {
        for i in 0..8usize {
            let code = if store { Code::VEX_Kmovq_m64_kr } else { Code::VEX_Kmovq_kr_km64 };
            v.push(context(code, Register::K0 + i as u32, K + 8 * i as u64, store));
        }
    }
    v
}

/// Runs `code` at [`START`] on the host with all this state.
fn native(code: &[u8], regs: &Regs, vectors: &mut Vectors) -> Regs {
    let mem1 = |c: Code, at: u64| {
        use iced_x86::MemoryOperand;
        Instruction::with1(c, MemoryOperand::with_displ(CONTEXT + at, 4)).expect("valid")
    };
    let gpr = |n: usize| Register::RAX + n as u32;
    let saved =
        [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
    let mut pre: Vec<_> =
        saved.iter().map(|&r| Instruction::with1(Code::Push_r64, r).expect("valid")).collect();
    pre.push(context(Code::Mov_rm64_r64, Register::RSP, HOST_SP, true));
    pre.push(mem1(Code::Stmxcsr_m32, HOST_MXCSR));
    pre.push(mem1(Code::Ldmxcsr_m32, MXCSR));
    pre.extend(vector_moves(false));
    pre.push(mem1(Code::Push_rm64, FLAGS));
    pre.push(Instruction::with(Code::Popfq));
    for n in 0..16 {
        pre.push(context(Code::Mov_r64_rm64, gpr(n), GPR_IN + 8 * n as u64, false));
    }
    let mut bytes = assemble(&pre, CODE);
    // The prologue does not fit before START.
    let entry = CODE + 0x800;
    bytes = {
        let b = assemble(&pre, entry);
        assert_eq!(b.len(), bytes.len());
        b
    };
    let jump = Instruction::with_branch(Code::Jmp_rel32_64, START).expect("valid");
    let tail = assemble(&[jump], entry + bytes.len() as u64);
    bytes.extend(tail);
    assert!(bytes.len() < 0x700);
    poke(entry, &bytes);
    poke(START, code);
    let mut post = Vec::new();
    for n in 0..16 {
        post.push(context(Code::Mov_rm64_r64, gpr(n), GPR_OUT + 8 * n as u64, true));
    }
    post.push(context(Code::Mov_r64_rm64, Register::RSP, HOST_SP, false));
    post.push(Instruction::with(Code::Pushfq));
    post.push(mem1(Code::Pop_rm64, FLAGS));
    post.extend(vector_moves(true));
    post.push(mem1(Code::Stmxcsr_m32, MXCSR));
    post.push(mem1(Code::Ldmxcsr_m32, HOST_MXCSR));
    post.push(Instruction::with(Code::Emms));
    post.push(Instruction::with(Code::Cld));
    for &r in saved.iter().rev() {
        post.push(Instruction::with1(Code::Pop_r64, r).expect("valid"));
    }
    post.push(Instruction::with(Code::Retnq));
    let at = START + code.len() as u64;
    let post = assemble(&post, at);
    assert!(at + post.len() as u64 <= entry);
    poke(at, &post);

    for (i, v) in regs.gpr.iter().enumerate() {
        poke(CONTEXT + GPR_IN + 8 * i as u64, &v.to_le_bytes());
    }
    poke(CONTEXT + FLAGS, &(regs.flags | 0x202).to_le_bytes());
    poke(CONTEXT + MXCSR, &vectors.mxcsr.to_le_bytes());
    for i in 0..8usize {
        poke(CONTEXT + K + 8 * i as u64, &vectors.k[i].to_le_bytes());
        poke(CONTEXT + MM + 8 * i as u64, &vectors.mm[i].to_le_bytes());
    }
    for i in 0..32 {
        poke(CONTEXT + ZMM + 64 * i as u64, &vectors.zmm[i]);
    }
    // SAFETY: the prologue saves every register that the ABI wants kept, the host's stack pointer
    // and MXCSR; the epilogue restores them; the code between is one instruction that touches no
    // memory but the data.
    unsafe {
        let f: extern "C" fn() = std::mem::transmute(entry as *const ());
        f();
    }
    let read = |at: u64| super::memory::peek(CONTEXT + at);
    let mut out = Regs { flags: read(FLAGS), ..Regs::default() };
    for n in 0..16 {
        out.gpr[n] = read(GPR_OUT + 8 * n as u64);
    }
    vectors.mxcsr = read(MXCSR) as u32;
    for i in 0..8usize {
        vectors.k[i] = read(K + 8 * i as u64);
        vectors.mm[i] = read(MM + 8 * i as u64);
    }
    for i in 0..32 {
        for q in 0..8 {
            let v = read(ZMM + 64 * i as u64 + 8 * q as u64);
            vectors.zmm[i][8 * q..8 * q + 8].copy_from_slice(&v.to_le_bytes());
        }
    }
    out
}

fn put_vectors(m: &mut Machine, v: &Vectors) {
    let env = m.env();
    env.core.vec = v.zmm;
    env.core.opmask = v.k;
    env.core.mxcsr = v.mxcsr;
    env.core.vec_live = 0;
    for i in 0..8usize {
        env.cpu.fpr[i][..8].copy_from_slice(&v.mm[i].to_le_bytes());
    }
    env.cpu.fcw = 0x37f;
    env.cpu.fsw = 0;
    env.cpu.cr4 |= 1 << 10;
}

fn get_vectors(m: &mut Machine) -> Vectors {
    let env = m.env();
    let mut mm = [0; 8];
    for (to, from) in mm.iter_mut().zip(&env.cpu.fpr) {
        let mut b = [0; 8];
        b.copy_from_slice(&from[..8]);
        *to = u64::from_le_bytes(b);
    }
    Vectors { zmm: env.core.vec, k: env.core.opmask, mxcsr: env.core.mxcsr, mm }
}

/// Whether the form is one under test on this host.
pub fn is_vector(code: Code) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    if !op.is_instruction() || !op.mode64() {
        return false;
    }
    // What the translator takes for a vector instruction: it names a vector, mask or MMX register.
    let names = op.op_kinds().iter().any(|k| is_vec(*k) || is_mask(*k) || is_mm(*k));
    let control = matches!(code.mnemonic(), M::Vzeroupper | M::Vzeroall);
    let host = code.cpuid_features().iter().all(|&f| host_has(f));
    (names || control)
        && host
        && !matches!(op.encoding(), EncodingKind::XOP | EncodingKind::D3NOW)
        && !is_vsib(op)
}

fn is_vec(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        k,
        K::xmm_reg
            | K::xmm_rm
            | K::xmm_vvvv
            | K::xmm_is4
            | K::xmm_or_mem
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_vvvv
            | K::ymm_is4
            | K::ymm_or_mem
            | K::zmm_reg
            | K::zmm_rm
            | K::zmm_vvvv
            | K::zmm_or_mem
    )
}

fn is_mask(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(k, K::k_reg | K::kp1_reg | K::k_rm | K::k_or_mem | K::k_vvvv)
}

fn is_mm(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(k, K::mm_reg | K::mm_rm | K::mm_or_mem)
}

fn is_vsib(op: &OpCodeInfo) -> bool {
    use OpCodeOperandKind as K;
    op.op_kinds().iter().any(|k| {
        matches!(
            k,
            K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::mem_vsib32z
                | K::mem_vsib64z
        )
    })
}

/// What to build: memory operand, and (EVEX) mask, zeroing, broadcast, rounding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Want {
    memory: bool,
    mask: bool,
    broadcast: bool,
    rounding: bool,
}

fn set_memory(insn: &mut Instruction, i: u32, rng: &mut Rng, size: usize) {
    insn.set_op_kind(i, OpKind::Memory);
    insn.set_memory_base(Register::RBX);
    insn.set_memory_displ_size(8);
    // Aligned for the sake of the forms that want it; now and then not, where that is allowed.
    let align = size.max(1) as u64;
    let mut disp = rng.below(0x100) * align % 0x800;
    // Across a page boundary.
    if rng.one_in(4) {
        disp = 0x1000 - align;
    }
    let name = format!("{:?}", insn.code()).to_ascii_lowercase();
    let legacy = insn.code().op_code().encoding() == EncodingKind::Legacy && size == 16;
    let needs = legacy || ["movnt", "movdqa", "movap"].iter().any(|m| name.contains(m));
    if !needs && rng.one_in(2) {
        disp += rng.below(align);
    }
    insn.set_memory_displacement64(disp);
}

/// An instruction of form `code` in code of size `bits`, 32 or 64.
pub fn build(code: Code, want: Want, bits: u32, rng: &mut Rng) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let op = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let vecs = vector_registers(op, bits);
    // Not RBX, which points into the data, nor RSP.
    let (gpr32, gpr64, gprs) = match bits {
        64 => (Register::R8D, Register::R8, 8),
        _ => (Register::EAX, Register::RAX, 3),
    };
    let size = if want.broadcast { op.broadcast_memory_size() } else { op.memory_size() };
    let mut used_memory = false;
    for i in 0..op.op_count() {
        let kind = op.op_kind(i);
        let (first, n, or_mem) = match kind {
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv => (Register::XMM0, vecs, false),
            K::xmm_is4 => (Register::XMM0, vecs.min(16), false),
            K::ymm_is4 => (Register::YMM0, vecs.min(16), false),
            K::xmm_or_mem => (Register::XMM0, vecs, true),
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv => (Register::YMM0, vecs, false),
            K::ymm_or_mem => (Register::YMM0, vecs, true),
            K::zmm_reg | K::zmm_rm | K::zmm_vvvv => (Register::ZMM0, vecs, false),
            K::zmm_or_mem => (Register::ZMM0, vecs, true),
            K::k_reg | K::k_rm | K::k_vvvv => (Register::K0, 8, false),
            K::kp1_reg => (Register::K0, 8, false),
            K::k_or_mem => (Register::K0, 8, true),
            K::mm_reg | K::mm_rm => (Register::MM0, 8, false),
            K::mm_or_mem => (Register::MM0, 8, true),
            K::r32_reg | K::r32_rm => (gpr32, gprs, false),
            K::r64_reg | K::r64_rm => (gpr64, gprs, false),
            K::r32_or_mem => (gpr32, gprs, true),
            K::r64_or_mem => (gpr64, gprs, true),
            K::mem => {
                set_memory(&mut insn, i, rng, size.size());
                used_memory = true;
                continue;
            }
            K::imm8 => {
                insn.set_op_kind(i, OpKind::Immediate8);
                insn.set_immediate8(rng.bits() as u8);
                continue;
            }
            K::seg_rDI => {
                let edi = if bits == 64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI };
                insn.set_op_kind(i, edi);
                continue;
            }
            // Implicit XMM0, which iced lists as an operand.
            _ if format!("{kind:?}") == "xmm0" => (Register::XMM0, 1, false),
            _ => return None,
        };
        if or_mem && want.memory {
            set_memory(&mut insn, i, rng, size.size());
            used_memory = true;
            continue;
        }
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, first + rng.below(n) as u32);
    }
    if used_memory != want.memory {
        return None;
    }
    if want.broadcast {
        insn.set_is_broadcast(true);
    }
    if want.rounding {
        let rc = rng.pick(&[
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ]);
        if op.can_use_rounding_control() {
            insn.set_rounding_control(rc);
        } else {
            insn.set_suppress_all_exceptions(true);
        }
    }
    if want.mask || op.require_op_mask_register() {
        insn.set_op_mask(Register::K1 + rng.below(7) as u32);
        insn.set_zeroing_masking(op.can_use_zeroing_masking() && rng.one_in(2));
    }
    if insn.zeroing_masking() && insn.op0_kind() == OpKind::Memory {
        insn.set_zeroing_masking(false);
    }
    if used_memory && bits == 32 {
        insn.set_memory_base(Register::EBX);
        insn.set_memory_displ_size(4);
    }
    Some(insn)
}

/// Number of vector registers that an instruction can name.
fn vector_registers(op: &OpCodeInfo, bits: u32) -> u64 {
    match (op.encoding(), bits) {
        (_, 32) => 8,
        (EncodingKind::EVEX, _) => 32,
        _ => 16,
    }
}

pub fn wants(code: Code) -> Vec<Want> {
    let op = code.op_code();
    let mut all = Vec::new();
    for memory in [false, true] {
        let w = Want { memory, mask: false, broadcast: false, rounding: false };
        all.push(w);
        if op.can_use_op_mask_register() {
            all.push(Want { mask: true, ..w });
        }
        if memory && op.can_broadcast() {
            all.push(Want { broadcast: true, ..w });
            all.push(Want { broadcast: true, mask: true, ..w });
        }
        if !memory && (op.can_use_rounding_control() || op.can_suppress_all_exceptions()) {
            all.push(Want { rounding: true, ..w });
        }
    }
    all
}

/// Random contents: bits, small integers, floating-point numbers of all kinds.
pub fn random_vectors(rng: &mut Rng) -> Vectors {
    let mut v = Vectors { zmm: [[0; 64]; 32], k: [0; 8], mxcsr: 0x1f80, mm: [0; 8] };
    let (n, bytes) = match width() {
        VecState::Zmm => (32, 64),
        VecState::Ymm => (16, 32),
        VecState::Xmm => (16, 16),
    };
    for reg in &mut v.zmm[..n] {
        fill(rng, &mut reg[..bytes]);
    }
    if width() == VecState::Zmm {
        v.k = std::array::from_fn(|_| rng.bits() & rng.bits());
    }
    v.mm = std::array::from_fn(|_| rng.value());
    // Rounding modes, flush-to-zero, denormals-are-zero; exceptions masked.
    v.mxcsr |= (rng.below(4) as u32) << 13;
    if rng.one_in(4) {
        v.mxcsr |= 0x8000;
    }
    if rng.one_in(4) {
        v.mxcsr |= 0x40;
    }
    v
}

pub fn fill(rng: &mut Rng, bytes: &mut [u8]) {
    let kind = rng.below(4);
    for chunk in bytes.chunks_mut(8) {
        let v = match kind {
            0 => rng.bits(),
            1 => rng.value(),
            2 => {
                let f = |rng: &mut Rng| {
                    let v = [0.0, 1.0, -1.5, 3.25e10, -7e-30, f32::INFINITY, f32::NAN, 1e-41];
                    rng.pick(&v).to_bits()
                };
                u64::from(f(rng)) << 32 | u64::from(f(rng))
            }
            _ => {
                let v =
                    [0.0, -0.0, 1.0, -2.5, 1e300, -3e-300, f64::NEG_INFINITY, 5e-324, 123456.75];
                rng.pick(&v).to_bits()
            }
        };
        chunk.copy_from_slice(&v.to_le_bytes()[..chunk.len()]);
    }
}

fn compare(
    m: &mut Machine,
    insn: &Instruction,
    bytes: &[u8],
    regs: &Regs,
    v: &Vectors,
    mem: &[u8],
) {
    if std::env::var_os("ISA_TRACE").is_some() {
        eprintln!("{} {bytes:02x?}", text(insn));
    }
    set_data(mem);
    let mut want_v = v.clone();
    let want = native(bytes, regs, &mut want_v);
    let want_data = data();
    set_data(mem);
    put_vectors(m, v);
    let mode = USER | Mode::AVX | Mode::AVX512;
    let got = m.run(bytes, START, mode, regs);
    let got_v = get_vectors(m);
    let mask = 0xcd5 & !undefined_flags(insn);
    let flags_ok = (got.regs.flags ^ want.flags) & mask == 0;
    let data_ok = data() == want_data;
    if got.end == End::Done && got.regs.gpr == want.gpr && flags_ok && data_ok && got_v == want_v {
        return;
    }
    let mut diff = String::new();
    for i in 0..32 {
        if got_v.zmm[i] != want_v.zmm[i] {
            diff += &format!(
                "zmm{i}\n  before   {:02x?}\n  expected {:02x?}\n  got      {:02x?}\n",
                v.zmm[i], want_v.zmm[i], got_v.zmm[i]
            );
        }
    }
    for i in 0..8usize {
        if got_v.k[i] != want_v.k[i] || got_v.mm[i] != want_v.mm[i] {
            diff += &format!(
                "k{i} expected {:#x} got {:#x}; mm{i} expected {:#x} got {:#x}\n",
                want_v.k[i], got_v.k[i], want_v.mm[i], got_v.mm[i]
            );
        }
    }
    let at = (0..DATA_LEN).find(|&i| data()[i] != want_data[i]);
    panic!(
        "{} {:?} ({bytes:02x?})\nregisters {regs:x?}\nexpected  {want:x?} mxcsr {:#x}\n\
         got       {got:x?} mxcsr {:#x}\n{diff}first different data byte {at:x?}\n{}",
        text(insn),
        insn.code(),
        want_v.mxcsr,
        got_v.mxcsr,
        m.listing()
    );
}

fn every_form(m: &mut Machine, only: impl Fn(Code) -> bool) -> usize {
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    let mut rng = Rng::new(7);
    let mut forms = 0;
    for code in Code::values().filter(|&c| is_vector(c) && only(c)) {
        let mut seen_any = false;
        for want in wants(code) {
            let mut seen = false;
            for _ in 0..REPEATS {
                let Some(insn) = build(code, want, 64, &mut rng) else { break };
                let mut e = Encoder::new(64);
                if let Err(why) = e.encode(&insn, START) {
                    if std::env::var_os("ISA_TRACE").is_some() {
                        eprintln!("{code:?} {want:?}: {why}");
                    }
                    continue;
                }
                let bytes = e.take_buffer();
                let mut d = Decoder::with_ip(64, &bytes, START, DecoderOptions::NONE);
                let insn = d.decode();
                if insn.code() != code {
                    continue;
                }
                let mut regs =
                    Regs { gpr: std::array::from_fn(|_| rng.value()), ..Regs::default() };
                regs.gpr[3] = BASE;
                regs.gpr[4] = super::memory::STACK;
                regs.gpr[7] = BASE + rng.below(0x800);
                // Lengths of PCMPESTRI, often within range.
                if rng.one_in(2) {
                    regs.gpr[0] = rng.below(40).wrapping_sub(20);
                    regs.gpr[2] = rng.below(40).wrapping_sub(20);
                }
                regs.flags = rng.bits() & 0x8d5;
                let vectors = random_vectors(&mut rng);
                let mut mem = vec![0; DATA_LEN];
                fill(&mut rng, &mut mem);
                compare(m, &insn, &bytes, &regs, &vectors, &mem);
                seen = true;
            }
            forms += usize::from(seen);
            seen_any |= seen;
        }
        if !seen_any && std::env::var_os("ISA_TRACE").is_some() {
            eprintln!("not tried: {code:?}");
        }
    }
    forms
}

#[test]
fn interpreter() {
    let n = every_form(&mut Machine::interp(false), |_| true);
    assert!(n > 800, "only {n} forms");
    eprintln!("{n} forms");
}

#[test]
fn jit() {
    every_form(&mut Machine::jit(false), |_| true);
}

#[test]
fn jit_after_passes() {
    every_form(&mut Machine::jit(true), |_| true);
}

/// A gather or scatter, and its vector of indexes.
pub fn build_indexed_insn(code: Code, bits: u32, rng: &mut Rng) -> Option<(Instruction, Register)> {
    use OpCodeOperandKind as K;
    let op = code.op_code();
    let evex = op.encoding() == EncodingKind::EVEX;
    let mut insn = Instruction::default();
    insn.set_code(code);
    let mut free: Vec<u32> = (0..vector_registers(op, bits) as u32).collect();
    let mut take = |rng: &mut Rng| free.swap_remove(rng.below(free.len() as u64) as usize);
    let mut index = Register::None;
    for i in 0..op.op_count() {
        let first = match op.op_kind(i) {
            K::xmm_reg | K::xmm_vvvv => Register::XMM0,
            K::ymm_reg | K::ymm_vvvv => Register::YMM0,
            K::zmm_reg | K::zmm_vvvv => Register::ZMM0,
            k => {
                let bank = match k {
                    K::mem_vsib32x | K::mem_vsib64x => Register::XMM0,
                    K::mem_vsib32y | K::mem_vsib64y => Register::YMM0,
                    K::mem_vsib32z | K::mem_vsib64z => Register::ZMM0,
                    _ => return None,
                };
                index = bank + take(rng);
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(Register::RBX);
                insn.set_memory_index(index);
                insn.set_memory_index_scale(rng.pick(&[1, 2, 4, 8]));
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(rng.below(0x200));
                continue;
            }
        };
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, first + take(rng));
    }
    if evex {
        insn.set_op_mask(Register::K1 + rng.below(7) as u32);
    }
    Some((insn, index))
}

/// A gather or scatter with small indexes, so that all its elements are data.
fn build_indexed(code: Code, rng: &mut Rng) -> Option<(Instruction, Vectors)> {
    use OpCodeOperandKind as K;
    let (insn, index) = build_indexed_insn(code, 64, rng)?;
    let wide = code
        .op_code()
        .op_kinds()
        .iter()
        .any(|k| matches!(k, K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z));
    let mut v = random_vectors(rng);
    let reg = &mut v.zmm[index.number()];
    let live = if width() == VecState::Zmm { 64 } else { 32 };
    for (n, chunk) in reg[..live].chunks_mut(if wide { 8 } else { 4 }).enumerate() {
        let i = rng.below(0x180) as i64 - 0xc0 + n as i64;
        let len = chunk.len();
        chunk.copy_from_slice(&i.to_le_bytes()[..len]);
    }
    Some((insn, v))
}

/// Whether the form is a gather or scatter under test on this host.
pub fn is_indexed(code: Code) -> bool {
    let op = code.op_code();
    let prefetch = format!("{code:?}").contains("erpf");
    op.is_instruction()
        && op.mode64()
        && !prefetch
        && is_vsib(op)
        && code.cpuid_features().iter().all(|&f| host_has(f))
}

fn indexed_forms(m: &mut Machine) -> usize {
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    let mut rng = Rng::new(11);
    let mut forms = 0;
    for code in Code::values().filter(|&c| is_indexed(c)) {
        for round in 0..2 * REPEATS {
            let Some((insn, v)) = build_indexed(code, &mut rng) else { break };
            let mut e = Encoder::new(64);
            e.encode(&insn, START).unwrap_or_else(|e| panic!("{code:?}: {e}"));
            let bytes = e.take_buffer();
            let insn = Decoder::with_ip(64, &bytes, START, DecoderOptions::NONE).decode();
            assert_eq!(insn.code(), code);
            let mut regs = Regs { gpr: std::array::from_fn(|_| rng.value()), flags: 0 };
            regs.gpr[3] = BASE;
            regs.gpr[4] = super::memory::STACK;
            let mut mem = vec![0; DATA_LEN];
            fill(&mut rng, &mut mem);
            compare(m, &insn, &bytes, &regs, &v, &mem);
            forms += usize::from(round == 0);
        }
    }
    forms
}

#[test]
fn gathers_and_scatters() {
    let n = indexed_forms(&mut Machine::interp(false));
    assert!(n >= 16 || width() != VecState::Zmm, "only {n} forms");
    indexed_forms(&mut Machine::jit(true));
}

/// MXCSR goes to memory and back; a reserved bit raises #GP(0).
#[test]
fn mxcsr() {
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    // ldmxcsr [rbx]; stmxcsr [rbx+4]
    let bytes = [0x0f, 0xae, 0x13, 0x0f, 0xae, 0x5b, 0x04];
    for mut m in [Machine::interp(false), Machine::jit(true)] {
        for (value, fails) in [(0x9fc0u32, false), (0x1_1f80, true)] {
            let mut mem = vec![0; DATA_LEN];
            mem[0x1000..0x1004].copy_from_slice(&value.to_le_bytes());
            set_data(&mem);
            let mut regs = Regs::default();
            regs.gpr[3] = BASE;
            m.env().core.mxcsr = 0x1f80;
            let got = m.run(&bytes, START, USER, &regs);
            if fails {
                assert_eq!(got.end, End::Left(tandem_tcg::exec::leave::RAISE | 13));
                assert_eq!((got.rip, m.env().core.mxcsr), (START, 0x1f80));
            } else {
                assert_eq!((got.end, m.env().core.mxcsr), (End::Done, value));
                assert_eq!(data()[0x1004..0x1008], value.to_le_bytes());
            }
        }
    }
}

/// A legacy instruction on misaligned memory raises #GP(0); one that does not mind does not.
#[test]
fn misaligned_operands() {
    let mut guard = Arena::lock();
    let _ = guard.as_mut();
    // movaps xmm1, [rbx]; paddd xmm1, [rbx]; movups xmm1, [rbx]; addss xmm1, [rbx]
    let cases: [(&[u8], bool); 4] = [
        (&[0x0f, 0x28, 0x0b], true),
        (&[0x66, 0x0f, 0xfe, 0x0b], true),
        (&[0x0f, 0x10, 0x0b], false),
        (&[0xf3, 0x0f, 0x58, 0x0b], false),
    ];
    for mut m in [Machine::interp(false), Machine::jit(true)] {
        for (bytes, faults) in cases {
            set_data(&vec![0; DATA_LEN]);
            let mut regs = Regs::default();
            regs.gpr[3] = BASE + 4;
            let got = m.run(bytes, START, USER, &regs);
            let want = if faults { End::Fault(Exception::gp(0)) } else { End::Done };
            assert_eq!(got.end, want, "{bytes:02x?}");
            assert_eq!(got.rip, if faults { START } else { START + bytes.len() as u64 });
        }
    }
}
