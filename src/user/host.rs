//! System calls of the host, by number and as they are; and one kind that a signal can keep from
//! beginning.

use std::arch::global_asm;
use std::sync::atomic::AtomicBool;

/// The answer of [`interruptible`] when a signal was there before the call began: nothing has been
/// done. Kernels never show this value to programs.
pub const NOT_BEGUN: i64 = -512;

// interruptible(pending, nr, args): in [start, end) the call has not begun, so that the signal handler
// may send the thread to `interrupted` instead.
global_asm!(
    ".globl tandem_user_syscall",
    "tandem_user_syscall:",
    "push rbp",
    "mov rbp, rdi",
    "mov rax, rsi",
    "mov r11, rdx",
    "mov rdi, [r11]",
    "mov rsi, [r11 + 8]",
    "mov rdx, [r11 + 16]",
    "mov r10, [r11 + 24]",
    "mov r8, [r11 + 32]",
    "mov r9, [r11 + 40]",
    ".globl tandem_user_syscall_start",
    "tandem_user_syscall_start:",
    "cmp byte ptr [rbp], 0",
    "jne 2f",
    "syscall",
    ".globl tandem_user_syscall_end",
    "tandem_user_syscall_end:",
    "pop rbp",
    "ret",
    ".globl tandem_user_syscall_interrupted",
    "tandem_user_syscall_interrupted:",
    "2:",
    "mov rax, -512",
    "pop rbp",
    "ret",
    ".globl tandem_user_restorer",
    "tandem_user_restorer:",
    "mov eax, 15",
    "syscall",
    "ud2",
);

unsafe extern "C" {
    fn tandem_user_syscall(pending: *const AtomicBool, nr: u64, args: *const [u64; 6]) -> i64;
    fn tandem_user_syscall_start();
    fn tandem_user_syscall_end();
    fn tandem_user_syscall_interrupted();
    fn tandem_user_restorer();
}

/// Where signal handlers of this process return to.
pub fn restorer() -> usize {
    tandem_user_restorer as *const () as usize
}

/// Where a thread that a signal has met at `pc` goes on instead, if it was about to begin a call of
/// [`interruptible`].
pub fn instead_of(pc: u64) -> Option<u64> {
    let begin = tandem_user_syscall_start as *const () as u64;
    // The last byte of SYSCALL is not behind it.
    let end = tandem_user_syscall_end as *const () as u64;
    (begin..end).contains(&pc).then_some(tandem_user_syscall_interrupted as *const () as u64)
}

/// A system call: its result, or minus an error number. Does not begin if `pending`.
///
/// # Safety
/// The call must be one that does no harm to this process's own memory, files and threads.
pub unsafe fn interruptible(pending: &AtomicBool, nr: u64, args: [u64; 6]) -> i64 {
    // SAFETY: the caller's promise; `args` lives across the call.
    unsafe { tandem_user_syscall(pending, nr, &args) }
}

/// A system call that is not put off.
///
/// # Safety
/// As for [`interruptible`].
pub unsafe fn syscall(nr: i64, args: [u64; 6]) -> i64 {
    static NEVER: AtomicBool = AtomicBool::new(false);
    // SAFETY: the caller's promise.
    unsafe { interruptible(&NEVER, nr as u64, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_begin_unless_a_signal_waits() {
        let waits = AtomicBool::new(false);
        let pid = u64::from(std::process::id());
        let args = [0; 6];
        // SAFETY: getpid and write to no file do nothing.
        unsafe {
            assert_eq!(interruptible(&waits, libc::SYS_getpid as u64, args), pid as i64);
            let bad = interruptible(&waits, libc::SYS_write as u64, [u64::MAX, 0, 0, 0, 0, 0]);
            assert_eq!(bad, -i64::from(libc::EBADF));
            waits.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(interruptible(&waits, libc::SYS_getpid as u64, args), NOT_BEGUN);
        }
        let begin = tandem_user_syscall_start as *const () as u64;
        assert!(instead_of(begin).is_some() && instead_of(begin + 6).is_some());
        assert!(instead_of(tandem_user_syscall_end as *const () as u64).is_none());
    }
}
