//! The oracle: runs code on the host processor, with all general registers and flags given.

use super::memory::{CODE, CONTEXT, DATA, DATA_LEN, peek, poke};

/// Registers and flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Regs {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
}

/// Where the code under test starts.
pub const START: u64 = CODE + 0x200;

const IN: u32 = CONTEXT as u32;
const OUT: u32 = CONTEXT as u32 + 0x200;
const HOST_SP: u32 = CONTEXT as u32 + 0x100;

/// `op reg, [absolute]` with REX.W.
fn absolute(code: &mut Vec<u8>, opcode: u8, reg: u8, at: u32) {
    code.extend([0x48 | (reg >> 3) << 2, opcode, 0x04 | (reg & 7) << 3, 0x25]);
    code.extend(at.to_le_bytes());
}

/// Far pointers for the ways into and out of 32-bit code.
const ENTER32: u32 = CONTEXT as u32 + 0x108;
/// Linux's selectors: 32-bit user code, user data, 64-bit user code.
const USER32_CS: u16 = 0x23;
const USER_DS: u16 = 0x2b;
const USER_CS: u16 = 0x33;
/// Selectors of the 16-bit segments in the LDT: code at [`CODE`], data and stack at [`DATA`].
const CS16: u16 = 0x07;
const DS16: u16 = 0x0f;

/// Linux's `struct user_desc`.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// Puts the 16-bit segments into the LDT.
fn make_segments() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // Bits: 0 32-bit, 1–2 contents (2 = code), 3 not readable or writable, 4 limit in pages,
        // 5 not present, 6 available to software.
        let code = UserDesc { entry: 0, base: CODE as u32, limit: 0xffff, flags: 2 << 1 | 1 << 6 };
        let limit = DATA_LEN as u32 - 1;
        let data = UserDesc { entry: 1, base: DATA as u32, limit, flags: 1 << 6 };
        for d in [code, data] {
            // SAFETY: modify_ldt reads the descriptor, whose size is given.
            let r = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, &d, size_of::<UserDesc>()) };
            assert_eq!(r, 0, "modify_ldt: {}", std::io::Error::last_os_error());
        }
    });
}

fn prologue(bits: u32) -> Vec<u8> {
    // push rbx, rbp, r12..r15
    let mut c = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
    absolute(&mut c, 0x89, 4, HOST_SP);
    if bits < 64 {
        // mov eax, data; mov ds, eax; mov es, eax: null in 64-bit programs.
        let data = if bits == 16 { DS16 } else { USER_DS };
        c.push(0xb8);
        c.extend(u32::from(data).to_le_bytes());
        c.extend([0x8e, 0xd8, 0x8e, 0xc0]);
    }
    if bits == 16 {
        return enter16(c);
    }
    // push [flags]; popfq
    c.extend([0xff, 0x34, 0x25]);
    c.extend((IN + 0x80).to_le_bytes());
    c.push(0x9d);
    for r in 0..16 {
        absolute(&mut c, 0x8b, r, IN + 8 * u32::from(r));
    }
    if bits == 32 {
        // jmp far [ENTER32]
        c.extend([0xff, 0x2c, 0x25]);
        c.extend(ENTER32.to_le_bytes());
        return c;
    }
    let to = (START - CODE) as i32 - (c.len() as i32 + 5);
    c.push(0xe9);
    c.extend(to.to_le_bytes());
    c
}

/// All registers through an IRETQ frame: SS must change together with the stack pointer.
fn enter16(mut c: Vec<u8>) -> Vec<u8> {
    let push_imm = |c: &mut Vec<u8>, v: u32| {
        c.push(0x68);
        c.extend(v.to_le_bytes());
    };
    let push_mem = |c: &mut Vec<u8>, at: u32| {
        c.extend([0xff, 0x34, 0x25]);
        c.extend(at.to_le_bytes());
    };
    push_imm(&mut c, DS16.into());
    push_mem(&mut c, IN + 8 * 4);
    push_mem(&mut c, IN + 0x80);
    push_imm(&mut c, CS16.into());
    push_imm(&mut c, (START - CODE) as u32);
    for r in (0..16).filter(|&r| r != 4) {
        absolute(&mut c, 0x8b, r, IN + 8 * u32::from(r));
    }
    c.extend([0x48, 0xcf]);
    c
}

fn epilogue(bits: u32, at: u64) -> Vec<u8> {
    let mut c = Vec::new();
    if bits < 64 {
        // jmp far USER_CS:next, with a 32-bit offset
        let prefix: &[u8] = if bits == 16 { &[0x66] } else { &[] };
        c.extend(prefix);
        c.push(0xea);
        c.extend((at as u32 + 7 + prefix.len() as u32).to_le_bytes());
        c.extend(USER_CS.to_le_bytes());
    }
    for r in 0..16 {
        absolute(&mut c, 0x89, r, OUT + 8 * u32::from(r));
    }
    absolute(&mut c, 0x8b, 4, HOST_SP);
    // pushfq; pop [flags]; cld
    c.extend([0x9c, 0x8f, 0x04, 0x25]);
    c.extend((OUT + 0x80).to_le_bytes());
    c.push(0xfc);
    if bits < 64 {
        // xor eax, eax; mov ds, eax; mov es, eax
        c.extend([0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0]);
        // mov eax, USER_DS; mov ss, eax
        c.push(0xb8);
        c.extend(u32::from(USER_DS).to_le_bytes());
        c.extend([0x8e, 0xd0]);
    }
    c.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
    c
}

/// Runs `code` at [`START`] on the host. It must come to its end, and touch no memory but the data.
/// The caller holds the arena.
pub fn run(code: &[u8], regs: &Regs, bits: u32) -> Regs {
    if bits == 16 {
        make_segments();
    }
    let end = START + code.len() as u64;
    poke(CODE, &prologue(bits));
    poke(START, code);
    poke(end, &epilogue(bits, end));
    poke(ENTER32.into(), &(START as u32).to_le_bytes());
    poke(u64::from(ENTER32) + 4, &USER32_CS.to_le_bytes());
    for (i, v) in regs.gpr.iter().enumerate() {
        poke(u64::from(IN) + 8 * i as u64, &v.to_le_bytes());
    }
    poke(u64::from(IN) + 0x80, &(regs.flags | 0x202).to_le_bytes());
    // SAFETY: the prologue saves every register that the ABI wants kept and the host stack pointer,
    // the epilogue restores them; the code between is the caller's, bounded as documented.
    unsafe {
        let f: extern "C" fn() = std::mem::transmute(CODE as *const ());
        f();
    }
    let mut out = Regs { flags: peek(u64::from(OUT) + 0x80), ..Regs::default() };
    for (i, v) in out.gpr.iter_mut().enumerate() {
        *v = peek(u64::from(OUT) + 8 * i as u64);
    }
    if bits == 16 {
        // Nor does the upper half of the stack pointer.
        out.gpr[4] &= 0xffff;
    }
    if bits < 64 {
        // The upper halves mean nothing after 32-bit code.
        out.gpr[8..].fill(0);
        out.gpr.iter_mut().for_each(|v| *v &= u64::from(u32::MAX));
    }
    out
}
