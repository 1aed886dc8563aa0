//! The stack frame below `Env` while guest code runs, and the fixed roles of host registers.
//!
//! RSP is `Env - FRAME`, so that frame and `Env` are addressed from one register:
//!
//! ```text
//!   rsp ─► ARGS   arguments of a slow path or helper call
//!          RES    result of a call; leave code; entry address
//!          SPILL  spill slots
//!          SAVE   one word per host register, filled by call thunks
//!   env ─► Env
//! ```
//!
//! Below RSP is the stack that helpers and signal handlers use.

use super::asm::*;
use crate::target::{GlobalClass, Target};

/// Offset of the call arguments.
pub(super) const ARGS: i32 = 0;
/// Offset of the result word.
pub(super) const RES: i32 = 0x20;
/// Offset of the spill slots.
pub(super) const SPILL: i32 = 0x30;
/// Number of spill slots.
pub(super) const NSPILL: usize = 240;
/// Offset of the save area.
pub(super) const SAVE: i32 = SPILL + 8 * NSPILL as i32;
/// Value of `vec_live` while vector registers 0–15 are in host registers.
pub(super) const VEC_LOW: i32 = 1;
/// Value of `vec_live` while all vector state is; the same as [`VEC_LOW`] below 512-bit vectors.
pub(super) const VEC_ALL: i32 = 2;
/// Size of the frame.
pub(super) const FRAME: i32 = SAVE + 16 * 8;
/// Bytes of stack below `Env`.
pub(super) const STACK: usize = 1 << 20;

const _: () = assert!(FRAME % 16 == 0);

/// A frame word.
pub(super) const fn frame(off: i32) -> Mem {
    Mem::new(RSP, off)
}
/// A field of `Env`.
pub(super) const fn env(off: u32) -> Mem {
    Mem::new(RSP, FRAME + off as i32)
}

/// Registers that the System V ABI lets a callee change.
pub(super) const CALLER_SAVED: u16 =
    1 << RAX | 1 << RCX | 1 << RDX | 1 << RSI | 1 << RDI | 1 << R8 | 1 << R9 | 1 << R10 | 1 << R11;

/// Which register holds which global.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    /// By host register: global, or `NONE`.
    pub global: [u8; 16],
    /// By global: host register, or [`NOREG`].
    pub reg: Vec<Reg>,
    /// Registers without a global, RSP excepted.
    pub scratch: u16,
    /// (register, `Env` offset) of each pinned global.
    pub list: Vec<(Reg, u32)>,
}

/// Most globals that get a register.
const MAX_PINS: usize = 12;
/// Order in which registers are given to globals without a hint. R11, R14 and R15 stay scratch.
const ORDER: [Reg; 12] = [R10, R12, R13, RBP, RBX, R9, R8, RSI, RDI, RAX, RDX, RCX];

impl Pins {
    /// Assigns registers by priority; hints first, so that no other global takes a hinted register.
    pub(super) fn new(target: &Target) -> Pins {
        let mut wish: Vec<(u8, usize)> = Vec::new();
        for (i, g) in target.globals.iter().enumerate() {
            if let GlobalClass::Pinned(priority) = g.class {
                wish.push((priority, i));
            }
        }
        wish.sort();
        wish.truncate(MAX_PINS);
        let mut pins = Pins {
            global: [crate::liveness::NONE; 16],
            reg: vec![NOREG; target.globals.len()],
            scratch: !(1 << RSP),
            list: Vec::new(),
        };
        let give = |pins: &mut Pins, g: usize, r: Reg| {
            pins.global[r as usize] = g as u8;
            pins.reg[g] = r;
            pins.scratch &= !(1 << r);
            pins.list.push((r, target.globals[g].offset));
        };
        for &(_, g) in &wish {
            if let Some(r) = target.globals[g].x86_hint
                && ORDER.contains(&r)
                && pins.scratch >> r & 1 != 0
            {
                give(&mut pins, g, r);
            }
        }
        for &(_, g) in &wish {
            if pins.reg[g] == NOREG
                && let Some(&r) = ORDER.iter().find(|&&r| pins.scratch >> r & 1 != 0)
            {
                give(&mut pins, g, r);
            }
        }
        pins
    }
}
