//! What passes ask of an operation, in a few bits: the operation table, digested.

use super::eval::is_pure;
use super::op::{OPS, Op, Slot, effect};

/// Inputs a–d are flags: bits 0–3.
pub(crate) const FLAGS_IN: u8 = 0xf;
/// Has results that may be absent.
pub(crate) const OPTIONAL: u8 = 1 << 4;
/// No effects: goes if no result is used.
pub(crate) const REMOVABLE: u8 = 1 << 5;
/// Can be looked at from outside, depending on more than the operation.
pub(crate) const MAY_OBSERVE: u8 = 1 << 6;
/// Computes its results from its inputs alone.
pub(crate) const PURE: u8 = 1 << 7;

static TRAITS: [u8; Op::ALL.len()] = {
    let mut t = [0; Op::ALL.len()];
    let mut i = 0;
    while i < t.len() {
        let (op, info) = (Op::ALL[i], &OPS[i]);
        let mut k = 0;
        while k < 4 {
            if matches!(info.ins[k], Slot::Flags | Slot::OptFlags) {
                t[i] |= 1 << k;
            }
            k += 1;
        }
        if matches!(info.dst, Slot::OptVal)
            || matches!(info.dst2, Slot::OptVal)
            || matches!(info.fl, Slot::OptFlags)
        {
            t[i] |= OPTIONAL;
        }
        if info.effects == effect::NONE {
            t[i] |= REMOVABLE;
        } else if !matches!(op, Op::InsnStart | Op::StEnv | Op::Fence) {
            t[i] |= MAY_OBSERVE;
        }
        if is_pure(op) {
            t[i] |= PURE;
        }
        i += 1;
    }
    t
};

impl Op {
    /// The operation's bits.
    #[inline]
    pub(crate) fn traits(self) -> u8 {
        TRAITS[self as usize]
    }
}
