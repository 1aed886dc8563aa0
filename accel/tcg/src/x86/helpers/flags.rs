//! Helpers for the arithmetic flags.

use crate::x86::{Env, flags};

/// The image of the six arithmetic flags.
///
/// Called under two names: where the state in `Env` is known to be up to date, and where pending
/// writes must be stored first.
pub extern "C" fn compute_flags(env: *mut Env) -> u64 {
    // SAFETY: generated code passes its own Env, which nothing else uses while the helper runs.
    let env = unsafe { &*env };
    flags::compute(&env.cpu.cc)
}
