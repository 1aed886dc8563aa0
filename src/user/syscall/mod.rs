//! System calls of the program.
//!
//! The program is of the host's own architecture, so numbers, structures and errors are the kernel's
//! own, and most calls go through as they are. What does not: memory (the translator must know),
//! threads and processes, signals, and what would show our own process instead of the program.

mod files;
mod process;
mod signal;

use super::host;
use super::thread::{End, Guest};

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This goes to RAX: a result, or minus an error number.
    Value(i64),
    /// A signal has come: before the call began, or while it waited.
    Interrupted {
        /// It had begun.
        begun: bool,
    },
    /// The registers are as the call leaves them.
    None,
    /// The thread has ended.
    End(End),
}

/// Minus an error number.
pub(super) const fn error(e: i32) -> Answer {
    Answer::Value(-(e as i64))
}

/// Serves call `nr`.
pub fn serve(guest: &mut Guest, nr: u64, a: [u64; 6]) -> Answer {
    let program = guest.program.clone();
    let (process, memory) = (&*program.process, &program.memory);
    let value = Answer::Value;
    match nr as i64 {
        // Memory.
        libc::SYS_mmap => value(memory.map(process, a)),
        libc::SYS_munmap => value(memory.unmap(process, a[0], a[1])),
        n @ (libc::SYS_mprotect | libc::SYS_pkey_mprotect) => value(memory.protect(process, n, a)),
        libc::SYS_mremap => value(memory.remap(process, a)),
        libc::SYS_brk => value(memory.set_break(process, a[0])),
        libc::SYS_madvise => {
            let r = through(guest, nr, a);
            if matches!(a[2] as i32, libc::MADV_DONTNEED | libc::MADV_REMOVE) {
                process.rewritten(a[0], a[1]);
            }
            r
        }
        // Of these there is no translation: programs do without them.
        libc::SYS_rseq
        | SYS_IO_URING_SETUP
        | SYS_IO_URING_ENTER
        | SYS_IO_URING_REGISTER
        | libc::SYS_userfaultfd
        | libc::SYS_modify_ldt
        | libc::SYS_remap_file_pages
        | libc::SYS_shmat
        | libc::SYS_shmdt
        | libc::SYS_uselib
        | libc::SYS_iopl
        | libc::SYS_ioperm
        | SYS_MAP_SHADOW_STACK => error(libc::ENOSYS),
        libc::SYS_pkey_alloc => error(libc::ENOSPC),
        // A filter would be ours too; a tracer would see us.
        libc::SYS_seccomp => error(libc::EINVAL),
        libc::SYS_ptrace => error(libc::EPERM),
        libc::SYS_prctl => match a[0] as i32 {
            libc::PR_SET_SECCOMP | libc::PR_SET_MM | PR_SET_SYSCALL_USER_DISPATCH => {
                error(libc::EINVAL)
            }
            _ => through(guest, nr, a),
        },
        libc::SYS_arch_prctl => process::arch_prctl(guest, a),
        // Processes and threads.
        libc::SYS_clone => process::clone(guest, a),
        libc::SYS_fork => process::clone(guest, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
        libc::SYS_vfork => {
            let flags = libc::CLONE_VFORK | libc::CLONE_VM | libc::SIGCHLD;
            process::clone(guest, [flags as u64, 0, 0, 0, 0, 0])
        }
        // The C libraries fall back to clone(2).
        libc::SYS_clone3 => error(libc::ENOSYS),
        libc::SYS_execve => process::execute(guest, libc::AT_FDCWD, a[0], a[1], a[2], 0),
        libc::SYS_execveat => process::execute(guest, a[0] as i32, a[1], a[2], a[3], a[4]),
        libc::SYS_exit => process::exit_thread(guest, a[0] as i32),
        libc::SYS_exit_group => process::exit_process(a[0] as i32),
        libc::SYS_set_tid_address => {
            guest.clear_tid = a[0];
            // SAFETY: gettid cannot fail.
            value(unsafe { libc::gettid() }.into())
        }
        // Signals.
        libc::SYS_rt_sigaction => signal::action(guest, a),
        libc::SYS_rt_sigprocmask => signal::mask(guest, a),
        libc::SYS_rt_sigreturn => {
            guest.return_from_handler();
            Answer::None
        }
        libc::SYS_sigaltstack => signal::alt_stack(guest, a),
        libc::SYS_rt_sigsuspend => signal::suspend(guest, a),
        libc::SYS_ppoll | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 | libc::SYS_pselect6 => {
            signal::with_mask(guest, nr, a)
        }
        // Files that would show us.
        libc::SYS_open => files::open(guest, nr, a[0], a),
        libc::SYS_openat | libc::SYS_openat2 => files::open(guest, nr, a[1], a),
        libc::SYS_readlink => files::read_link(guest, nr, a[0], [a[1], a[2]], a),
        libc::SYS_readlinkat => files::read_link(guest, nr, a[1], [a[2], a[3]], a),
        _ => through(guest, nr, a),
    }
}

const SYS_IO_URING_SETUP: i64 = 425;
const SYS_IO_URING_ENTER: i64 = 426;
const SYS_IO_URING_REGISTER: i64 = 427;
const SYS_MAP_SHADOW_STACK: i64 = 453;
const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;

/// The call goes to the kernel as it is.
fn through(guest: &Guest, nr: u64, a: [u64; 6]) -> Answer {
    // SAFETY: what the call does, it does for the program, which runs in this process with this
    // process's rights; calls about what is ours have been taken out above.
    let mut r = unsafe { host::interruptible(guest.waits(), nr, a) };
    if r == -i64::from(libc::EFAULT) {
        // The kernel may have met a page that is only protected because code came from it.
        let process = &guest.program.process;
        let opened =
            process.space().protects_any().into_iter().filter(|&p| process.open(p)).count();
        if opened > 0 {
            // SAFETY: as above. A call that fails so has done nothing that matters twice.
            r = unsafe { host::interruptible(guest.waits(), nr, a) };
        }
    }
    match r {
        host::NOT_BEGUN => Answer::Interrupted { begun: false },
        r if r == -i64::from(libc::EINTR)
            && guest.waits().load(std::sync::atomic::Ordering::Acquire) =>
        {
            Answer::Interrupted { begun: true }
        }
        r => Answer::Value(r),
    }
}

/// Whether a call that a signal has ended begins again under SA_RESTART (signal(7)).
pub fn restarts(nr: u64) -> bool {
    matches!(
        nr as i64,
        libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_ioctl
            | libc::SYS_open
            | libc::SYS_openat
            | libc::SYS_openat2
            | libc::SYS_wait4
            | libc::SYS_waitid
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_flock
            | libc::SYS_fcntl
            | libc::SYS_mq_timedreceive
            | libc::SYS_mq_timedsend
            | libc::SYS_futex
            | libc::SYS_getrandom
            | libc::SYS_preadv
            | libc::SYS_pwritev
            | libc::SYS_pread64
            | libc::SYS_pwrite64
            | libc::SYS_splice
            | libc::SYS_tee
            | libc::SYS_copy_file_range
            | libc::SYS_sendfile
    )
}
