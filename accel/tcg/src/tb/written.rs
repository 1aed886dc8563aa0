//! A vCPU writes where code has been translated.
//!
//! Such a store takes the slow path and comes here. If it overlaps no block's bytes, it just goes
//! ahead. If it does, the blocks are invalidated; the storing instruction may itself be in one of
//! them, so it is not completed: it is restarted as a block of its own, in which the store is the
//! last thing that happens. So the next instruction is always decoded from what was written.

use crate::x86::Env;
use crate::x86::exception::Exception;

/// Pseudo vector of a pending "fault" that asks the loop to restart the instruction in a block of
/// its own.
pub const SMC_RETRY: u8 = 0xff;
/// Pseudo vector of a pending "fault" that asks the loop to run the instruction while no other vCPU
/// runs.
pub const LOCK_RETRY: u8 = 0xfe;
/// Not an exception: the access through a segment with a base that it may end with is one that runs
/// over 4 GiB, and the execution loop must restart its instruction so that it does.
pub const WRAP_RETRY: u8 = 0xfd;

/// A vCPU's store to a watched page: `store` writes the bytes `[gpa, gpa + len)`. An error restarts
/// the instruction, and nothing has been written.
pub fn write_code(
    env: &mut Env,
    gpa: u64,
    len: usize,
    store: impl FnOnce(),
) -> Result<(), Exception> {
    env.vcpu().counters.code_writes.hit();
    env.vcpu().mark_dirty(gpa, len);
    let restarting = env.core.restarting != 0;
    let hit = env.vcpu().tbs.write(gpa, len, |hit| {
        if !hit || restarting {
            store();
        }
    });
    // The watch may just have ended.
    env.process_mail();
    if hit && !restarting { Err(Exception::plain(SMC_RETRY)) } else { Ok(()) }
}

/// Before an access that writes bytes of a watched page in several steps, or through a pointer:
/// drops the blocks made from them, so that an instruction that must be restarted has not begun.
/// [`code_written`] follows the last step.
pub fn clear_code(env: &mut Env, gpa: u64, len: usize) -> Result<(), Exception> {
    write_code(env, gpa, len, || ())
}

/// After such an access: drops what other vCPUs have translated meanwhile.
pub fn code_written(env: &mut Env, gpa: u64, len: usize) {
    env.vcpu().tbs.write(gpa, len, |_| ());
}
