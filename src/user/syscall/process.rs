//! Calls about threads and processes.

use super::{Answer, error, files};
use crate::user::elf::{Elf, ElfError};
use crate::user::host;
use crate::user::thread::{End, Guest};
use crate::user::{script, signals};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use tandem_accel::x86::{gpr, seg};
use tandem_tcg::user::Thread;
use tandem_tcg::x86::mode::MMU_USER;

/// Stack of a host thread that runs one of the program's.
const HOST_STACK: usize = 512 << 10;

/// Longest argument or variable (`MAX_ARG_STRLEN`).
const LONGEST: usize = 32 << 12;

/// arch_prctl(2).
pub fn arch_prctl(guest: &mut Guest, a: [u64; 6]) -> Answer {
    const SET_GS: u64 = 0x1001;
    const SET_FS: u64 = 0x1002;
    const GET_FS: u64 = 0x1003;
    const GET_GS: u64 = 0x1004;
    let which = if matches!(a[0], SET_FS | GET_FS) { seg::FS } else { seg::GS };
    match a[0] {
        SET_GS | SET_FS if a[1] >> 47 != 0 => error(libc::EPERM),
        SET_GS | SET_FS => {
            guest.thread.cpu().seg_base[which] = a[1];
            Answer::Value(0)
        }
        GET_FS | GET_GS => {
            let base = guest.thread.cpu().seg_base[which];
            match guest.thread.env().write_u64(a[1], base, MMU_USER) {
                Ok(()) => Answer::Value(0),
                Err(_) => error(libc::EFAULT),
            }
        }
        _ => error(libc::EINVAL),
    }
}

/// What clone(2) is asked for.
#[derive(Clone, Copy)]
struct Wish {
    flags: u64,
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    tls: u64,
}

impl Wish {
    fn has(&self, flag: i32) -> bool {
        self.flags & flag as u32 as u64 != 0
    }
}

/// clone(2), fork(2) and vfork(2).
pub fn clone(guest: &mut Guest, a: [u64; 6]) -> Answer {
    let w = Wish { flags: a[0], stack: a[1], parent_tid: a[2], child_tid: a[3], tls: a[4] };
    let shares = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    match () {
        () if w.has(libc::CLONE_THREAD) && w.flags & shares as u64 != shares as u64 => {
            error(libc::EINVAL)
        }
        () if w.has(libc::CLONE_THREAD) => new_thread(guest, w),
        () if w.has(libc::CLONE_VM) && w.has(libc::CLONE_VFORK) => borrow(guest, w),
        // Memory without a thread group, and a parent that runs on: nothing uses it.
        () if w.has(libc::CLONE_VM) => error(libc::EINVAL),
        () => fork(guest, w),
    }
}

/// A thread like this one, which has just come back from its call as the child.
fn child_of(guest: &mut Guest, w: Wish) -> Result<Thread, Answer> {
    let mut state = guest.thread.state().map_err(|_| error(libc::ENOMEM))?;
    state.gpr[gpr::RAX] = 0;
    if w.stack != 0 {
        state.gpr[gpr::RSP] = w.stack;
    }
    if w.has(libc::CLONE_SETTLS) {
        state.seg[seg::FS].base = w.tls;
    }
    Thread::new(guest.thread.process(), &state).map_err(|_| error(libc::EAGAIN))
}

fn set_tid(guest: &mut Guest, at: u64, tid: i32) {
    // As in the kernel, a bad address goes unnoticed.
    let _ = guest.thread.env().write_u32(at, tid as u32, MMU_USER);
}

fn new_thread(guest: &mut Guest, w: Wish) -> Answer {
    let thread = match child_of(guest, w) {
        Ok(t) => t,
        Err(e) => return e,
    };
    let mut child = Guest::new(&guest.program, thread, guest.actions.clone(), guest.mask);
    if w.has(libc::CLONE_CHILD_CLEARTID) {
        child.clear_tid = w.child_tid;
    }
    struct Sent(Guest);
    // SAFETY: `Guest` is sent as a whole to the one thread that uses it; nobody else has its inbox.
    unsafe impl Send for Sent {}
    let mut child = Sent(child);
    let (tell, told) = mpsc::channel();
    // The new thread must not take a signal before it has an inbox.
    let before = signals::block(u64::MAX);
    let started = std::thread::Builder::new().stack_size(HOST_STACK).spawn(move || {
        let child = &mut child;
        // SAFETY: gettid cannot fail.
        let tid = unsafe { libc::gettid() };
        // Both before the thread runs: it may end, and clear them, before its parent runs again.
        if w.has(libc::CLONE_PARENT_SETTID) {
            set_tid(&mut child.0, w.parent_tid, tid);
        }
        if w.has(libc::CLONE_CHILD_SETTID) {
            set_tid(&mut child.0, w.child_tid, tid);
        }
        let _ = tell.send(tid);
        child.0.run();
        leave(&mut child.0);
    });
    let tid = started.ok().and_then(|_| told.recv().ok());
    signals::block(before);
    tid.map_or(error(libc::EAGAIN), |tid| Answer::Value(tid.into()))
}

/// What the kernel does for others when a thread ends.
fn leave(guest: &mut Guest) {
    let at = guest.clear_tid;
    if at != 0 && guest.thread.env().write_u32(at, 0, MMU_USER).is_ok() {
        let wake = [at, libc::FUTEX_WAKE as u64, i32::MAX as u64, 0, 0, 0];
        // SAFETY: wakes whoever waits at an address of the program's.
        unsafe { host::syscall(libc::SYS_futex, wake) };
    }
}

/// exit(2).
pub fn exit_thread(guest: &mut Guest, status: i32) -> Answer {
    // SAFETY: neither can fail.
    let main = unsafe { libc::gettid() == libc::getpid() };
    if guest.borrowed {
        exit_process(status);
    }
    if main {
        leave(guest);
        signals::block(u64::MAX);
        // The process goes on while it has other threads, and ends with this status after the last.
        // SAFETY: nothing of this thread is used by others.
        unsafe { host::syscall(libc::SYS_exit, [status as u64, 0, 0, 0, 0, 0]) };
    }
    Answer::End(End::Thread(status))
}

/// exit_group(2).
pub fn exit_process(status: i32) -> ! {
    // SAFETY: ends the process, as the program wants.
    unsafe { libc::_exit(status) }
}

/// A process that shares this one's memory until it executes another program or ends; this thread
/// waits for that.
fn borrow(guest: &mut Guest, w: Wish) -> Answer {
    let thread = match child_of(guest, w) {
        Ok(t) => t,
        Err(e) => return e,
    };
    let actions = Arc::new(guest.actions.copied());
    let mut child = Guest::new(&guest.program, thread, actions, guest.mask);
    (child.alt, child.borrowed) = (guest.alt, true);
    let mut stack = vec![0u64; HOST_STACK / 8];
    let before = signals::block(u64::MAX);
    extern "C" fn run(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the parent's `child`, which nobody else uses while the parent waits.
        let child = unsafe { &mut *child.cast::<Guest>() };
        match child.run() {
            End::Thread(status) => exit_process(status),
        }
    }
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | (w.flags & 0xff) as i32;
    let top = stack.as_mut_ptr_range().end;
    // SAFETY: the new process runs `run` on a stack of its own, and this thread, whose thread-local
    // storage it shares, waits until it is gone. `run` does not return.
    let pid = unsafe { libc::clone(run, top.cast(), flags, (&raw mut child).cast()) };
    let failed = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN);
    guest.enter();
    signals::block(before);
    if pid < 0 {
        return error(failed);
    }
    if w.has(libc::CLONE_PARENT_SETTID) {
        set_tid(guest, w.parent_tid, pid);
    }
    Answer::Value(pid.into())
}

fn fork(guest: &mut Guest, w: Wish) -> Answer {
    let plain = libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_SETTID
        | libc::CLONE_CHILD_CLEARTID
        | libc::CLONE_SETTLS
        | 0xff;
    let program = guest.program.clone();
    let before = signals::block(u64::MAX);
    let actions = guest.actions.clone();
    let forked = guest.thread.fork(|| {
        program.memory.still(|| {
            actions.still(|| {
                if w.flags & !(plain as u64) == 0 && w.flags & 0xff == libc::SIGCHLD as u64 {
                    // SAFETY: no other thread is in the translator or changes memory or actions; the
                    // C library takes care of its own locks.
                    return unsafe { libc::fork() }.into();
                }
                // Name spaces and such.
                let flags = w.flags & !(plain as u64 & !0xff) & !(libc::CLONE_VFORK as u64);
                // SAFETY: a child without shared memory, on a copy of this stack.
                unsafe { host::syscall(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]) }
            })
        })
    });
    let pid = match forked {
        Ok(-1) => {
            -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN))
        }
        Ok(pid) => pid,
        Err(_) => -i64::from(libc::ENOMEM),
    };
    if pid == 0 {
        // SAFETY: gettid cannot fail.
        let tid = unsafe { libc::gettid() };
        if w.has(libc::CLONE_CHILD_SETTID) {
            set_tid(guest, w.child_tid, tid);
        }
        guest.clear_tid = if w.has(libc::CLONE_CHILD_CLEARTID) { w.child_tid } else { 0 };
        if w.stack != 0 {
            guest.thread.cpu().gpr[gpr::RSP] = w.stack;
        }
        if w.has(libc::CLONE_SETTLS) {
            guest.thread.cpu().seg_base[seg::FS] = w.tls;
        }
    } else if pid > 0 && w.has(libc::CLONE_PARENT_SETTID) {
        set_tid(guest, w.parent_tid, pid as i32);
    }
    signals::block(before);
    Answer::Value(pid)
}

/// The strings that an array of pointers leads to.
fn strings(guest: &mut Guest, at: u64) -> Result<Vec<CString>, Answer> {
    let mut all = Vec::new();
    while at != 0 && all.len() < 1 << 20 {
        let p = guest.thread.env().read_u64(at.wrapping_add(8 * all.len() as u64), MMU_USER);
        match p.map_err(|_| error(libc::EFAULT))? {
            0 => break,
            p => all.push(files::string(guest, p, LONGEST, libc::E2BIG)?),
        }
    }
    Ok(all)
}

/// execve(2) and execveat(2): another tandem with the other program, or, if it is none that we
/// translate, the host.
pub fn execute(guest: &mut Guest, dir: i32, path: u64, args: u64, env: u64, flags: u64) -> Answer {
    let mut words = || -> Result<_, Answer> {
        Ok((files::path(guest, path)?, strings(guest, args)?, strings(guest, env)?))
    };
    let (path, args, env) = match words() {
        Ok(w) => w,
        Err(e) => return e,
    };
    // SAFETY: checks rights; the path is a string.
    let allowed = unsafe {
        let a = [dir as u64, path.as_ptr() as u64, libc::X_OK as u64, 0, 0, 0];
        match path.is_empty() && flags & libc::AT_EMPTY_PATH as u64 != 0 {
            true => 0,
            false => host::syscall(libc::SYS_faccessat, a),
        }
    };
    if allowed < 0 {
        return Answer::Value(allowed);
    }
    let file = locate(dir, &path);
    let pointers = |all: &[CString]| -> Vec<*const libc::c_char> {
        all.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let ours = match Elf::open(&file) {
        Ok(_) => true,
        Err(ElfError::NotElf) => script::interpreter(&file).is_some(),
        Err(_) => false,
    };
    let env = pointers(&env);
    let failed = if ours {
        let word = |s: &OsStr| CString::new(s.as_bytes()).unwrap_or_default();
        let mut all = vec![word("tandem".as_ref()), word("user".as_ref())];
        all.extend(guest.program.options.iter().map(|o| word(o)));
        if let Some(first) = args.first() {
            all.extend([word("-0".as_ref()), first.clone()]);
        }
        all.push(word("--".as_ref()));
        all.push(word(file.as_os_str()));
        all.extend(args.iter().skip(1).cloned());
        let args = pointers(&all);
        // SAFETY: arrays of strings that end with a null pointer.
        unsafe { libc::execve(c"/proc/self/exe".as_ptr(), args.as_ptr(), env.as_ptr()) };
        std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOEXEC)
    } else {
        let args = pointers(&args);
        let a =
            [dir as u64, path.as_ptr() as u64, args.as_ptr() as u64, env.as_ptr() as u64, flags, 0];
        // SAFETY: as above.
        -(unsafe { host::syscall(libc::SYS_execveat, a) }) as i32
    };
    error(failed)
}

/// The file that `path` in directory `dir` is.
fn locate(dir: i32, path: &CString) -> PathBuf {
    let name = PathBuf::from(OsStr::from_bytes(path.as_bytes()));
    if name.is_absolute() || (dir == libc::AT_FDCWD && !path.is_empty()) {
        return name;
    }
    let base = PathBuf::from(format!("/proc/self/fd/{dir}"));
    let base = std::fs::read_link(&base).unwrap_or(base);
    if path.is_empty() { base } else { base.join(name) }
}
