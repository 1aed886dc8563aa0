//! The frame that a signal handler of the program finds on its stack (Linux `arch/x86`:
//! `uapi/asm/sigcontext.h`, `asm/sigframe.h`).
//!
//! ```text
//!   sp ─► return address  │ 8
//!         ucontext        │ 304: flags, link, stack, registers (256), mask
//!         siginfo         │ 128
//!         … up to a multiple of 64
//!         XSAVE area and its second magic number
//! ```

use super::signals::{Action, SigInfo};
use tandem_accel::x86::{gpr, seg};
use tandem_tcg::user::Thread;
use tandem_tcg::x86::exception::Exception;

/// `sizeof(struct rt_sigframe)`.
const FRAME: u64 = 8 + 304 + 128;
const UCONTEXT: u64 = 8;
const INFO: u64 = UCONTEXT + 304;
/// `uc_mcontext` in the ucontext.
const REGISTERS: u64 = 40;
/// `uc_sigmask` in the ucontext.
const MASK: u64 = 296;
/// `uc_flags`: FP state by XSAVE, SS is kept, and SS is to be restored.
const UC_FLAGS: u64 = 1 | 2 | 4;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// Where the legacy area says what is behind it.
const SW_RESERVED: u64 = 464;
/// What the System V ABI leaves to the function below its stack pointer.
const RED_ZONE: u64 = 128;
const MMU: u8 = tandem_tcg::x86::mode::MMU_USER;
/// Flags that a handler's return may change.
const RETURNED_FLAGS: u64 = 0x4_0dd5 | 1 << 16;

/// General registers in the order of `struct sigcontext`: R8–R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX,
/// RSP.
const ORDER: [usize; 16] = [
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    gpr::RDI,
    gpr::RSI,
    gpr::RBP,
    gpr::RBX,
    gpr::RDX,
    gpr::RAX,
    gpr::RCX,
    gpr::RSP,
];

/// sigaltstack(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AltStack {
    /// Lowest address.
    pub sp: u64,
    /// `SS_…`.
    pub flags: u32,
    /// Bytes; 0: there is none.
    pub size: u64,
}

/// `SS_DISABLE`.
pub const SS_DISABLE: u32 = 2;
/// `SS_ONSTACK`.
pub const SS_ONSTACK: u32 = 1;
/// `SS_AUTODISARM`.
pub const SS_AUTODISARM: u32 = 1 << 31;

impl AltStack {
    /// Whether `sp` is on it.
    pub fn holds(&self, sp: u64) -> bool {
        sp > self.sp && sp - self.sp <= self.size
    }
}

/// What the fault was, for the frame's registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trap {
    /// Vector.
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// CR2.
    pub address: u64,
}

/// What a handler's frame gives back.
pub struct Returned {
    /// What is blocked from now on.
    pub mask: u64,
    /// The alternate stack.
    pub stack: AltStack,
}

/// Size of the standard XSAVE area for what the processor has.
fn xsave_size(thread: &mut Thread) -> u64 {
    let xcr0 = thread.cpu().xcr0;
    let ends = [(2, 256), (5, 64), (6, 512), (7, 1024), (9, 8)]
        .iter()
        .filter(|(bit, _)| xcr0 >> bit & 1 != 0)
        .map(|&(bit, size)| u64::from(thread.cpu().feat.xsave_offsets[bit]) + size);
    ends.max().unwrap_or(576).max(576)
}

/// Builds the frame for `action` and makes the thread begin with its handler.
///
/// # Errors
/// There is no room on the stack.
pub fn push(
    thread: &mut Thread,
    action: &Action,
    info: &SigInfo,
    trap: Trap,
    mask: u64,
    alt: AltStack,
) -> Result<(), Exception> {
    let sp = thread.cpu().gpr[gpr::RSP];
    let wants = action.flags & libc::SA_ONSTACK as u64 != 0 && alt.size > 0;
    let top = if wants && !alt.holds(sp) { alt.sp + alt.size } else { sp.wrapping_sub(RED_ZONE) };
    let xsave = xsave_size(thread);
    let fp = top.wrapping_sub(xsave + 4) & !63;
    // As behind a CALL: a multiple of 16 above the return address.
    let frame = (fp.wrapping_sub(FRAME) & !15).wrapping_sub(8);
    let xcr0 = thread.cpu().xcr0;
    let flags = thread.flags();
    let mut b = Vec::with_capacity(FRAME as usize);
    let mut word = |v: u64| b.extend_from_slice(&v.to_le_bytes());
    word(action.restorer);
    word(UC_FLAGS);
    word(0);
    word(alt.sp);
    word(if alt.size == 0 { SS_DISABLE.into() } else { u64::from(alt.flags) });
    word(alt.size);
    let cpu = thread.cpu();
    for r in ORDER {
        word(cpu.gpr[r]);
    }
    word(cpu.rip);
    word(flags);
    let selector = |s: usize| u64::from(cpu.seg[s].selector);
    word(selector(seg::CS) | selector(seg::SS) << 48);
    word(trap.error);
    word(trap.vector);
    word(mask);
    word(trap.address);
    word(fp);
    (0..8).for_each(|_| word(0));
    word(mask);
    b.extend_from_slice(&info.0);
    thread.save_vectors(fp, xcr0)?;
    let env = thread.env();
    let mut sw = [0; 48];
    sw[..4].copy_from_slice(&MAGIC1.to_le_bytes());
    sw[4..8].copy_from_slice(&(xsave as u32 + 4).to_le_bytes());
    sw[8..16].copy_from_slice(&xcr0.to_le_bytes());
    sw[16..20].copy_from_slice(&(xsave as u32).to_le_bytes());
    env.write_bytes(fp + SW_RESERVED, &sw, MMU)?;
    env.write_u32(fp + xsave, MAGIC2, MMU)?;
    env.write_bytes(frame, &b, MMU)?;
    let cpu = thread.cpu();
    cpu.gpr[gpr::RDI] = info.signal() as u64;
    cpu.gpr[gpr::RSI] = frame + INFO;
    cpu.gpr[gpr::RDX] = frame + UCONTEXT;
    cpu.gpr[gpr::RAX] = 0;
    cpu.gpr[gpr::RSP] = frame;
    cpu.rip = action.handler;
    // DF, TF and RF.
    thread.set_flags(flags & !(1 << 10 | 1 << 8 | 1 << 16));
    Ok(())
}

/// rt_sigreturn(2): the state of before the handler, with what it has changed in its frame.
///
/// # Errors
/// The frame is not there, or makes no sense.
pub fn pop(thread: &mut Thread) -> Result<Returned, Exception> {
    // The handler's RET has taken the return address.
    let frame = thread.cpu().gpr[gpr::RSP].wrapping_sub(8);
    let mut b = [0; 312];
    thread.env().read_bytes(frame, &mut b, MMU)?;
    let word = |at: u64| {
        let at = at as usize;
        u64::from_le_bytes(b[at..at + 8].try_into().unwrap_or_default())
    };
    let registers = UCONTEXT + REGISTERS;
    let fp = word(registers + 8 * 23);
    if fp != 0 {
        let sw_at = fp.wrapping_add(SW_RESERVED);
        let magic = thread.env().read_u32(sw_at, MMU)?;
        let asked = thread.env().read_u64(sw_at.wrapping_add(8), MMU)?;
        let what = if magic == MAGIC1 { asked } else { 3 };
        thread.load_vectors(fp, what, magic == MAGIC1)?;
    }
    let flags = thread.flags() & !RETURNED_FLAGS | word(registers + 8 * 17) & RETURNED_FLAGS;
    let cpu = thread.cpu();
    for (i, r) in ORDER.into_iter().enumerate() {
        cpu.gpr[r] = word(registers + 8 * i as u64);
    }
    cpu.rip = word(registers + 8 * 16);
    thread.set_flags(flags);
    let stack = UCONTEXT + 16;
    Ok(Returned {
        mask: word(UCONTEXT + MASK),
        stack: AltStack { sp: word(stack), flags: word(stack + 8) as u32, size: word(stack + 16) },
    })
}
