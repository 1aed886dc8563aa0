//! A vCPU writes where code has been translated.
//!
//! Such a store takes the slow path and comes here first. If it overlaps no block's bytes, it just
//! goes ahead. If it does, the blocks are invalidated; the storing instruction may itself be in one
//! of them, so it is not completed: it is restarted as a block of its own, in which the store is the
//! last thing that happens. So the next instruction is always decoded from what was written.

use crate::x86::Env;
use crate::x86::exception::Exception;

/// Pseudo vector of a pending "fault" that asks the loop to restart the instruction in a block of
/// its own.
pub const SMC_RETRY: u8 = 0xff;

/// Called before a vCPU's store to a watched page. An error restarts the instruction.
pub fn before_write(env: &mut Env, gpa: u64, len: usize) -> Result<(), Exception> {
    env.vcpu().mark_dirty(gpa, len);
    if !env.vcpu().tbs.overlaps(gpa, len) {
        // The watch may just have ended.
        env.process_mail();
        return Ok(());
    }
    env.vcpu().tbs.invalidate(gpa, len);
    if env.core.restarting != 0 { Ok(()) } else { Err(Exception::plain(SMC_RETRY)) }
}
