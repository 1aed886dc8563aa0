//! Making KVM_RUN return.
//!
//! A kick stores 1 to `kvm_run.immediate_exit` and then sends the vCPU thread a signal:
//!
//! * thread in guest mode: the signal interrupts KVM_RUN (EINTR);
//! * thread about to enter: KVM_RUN sees `immediate_exit` and returns EINTR at once;
//! * thread in a device: the same, at the next entry.
//!
//! Only the thread itself clears the flag, when KVM_RUN has returned EINTR and before it looks at
//! its commands; so a kick that comes later sets the flag again, and none is lost.

use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};
use tandem_accel::irq::Kick;
use tandem_accel::vcpu::VcpuControl;
use tandem_accel::{Error, Result};

/// The signal of kicks. Real-time signals are free for applications to use (signal(7)).
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Does nothing: that the signal was delivered is what ends KVM_RUN.
extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler of the kick signal, once per process.
pub(super) fn install_handler() -> Result<()> {
    static ONCE: Once = Once::new();
    static FAILURE: OnceLock<i32> = OnceLock::new();
    ONCE.call_once(|| {
        // SAFETY: sigaction is plain data for which all zeroes is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        // KVM_RUN returns EINTR in any case; other calls that devices make on this thread go on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing, so it is async-signal-safe; the pointers are valid.
        if unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) } != 0 {
            let _ = FAILURE.set(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
        }
    });
    match FAILURE.get() {
        None => Ok(()),
        Some(&e) => Err(Error::new("cannot install the handler of the vCPU kick signal")
            .caused_by(std::io::Error::from_raw_os_error(e))),
    }
}

struct Target {
    /// `kvm_run.immediate_exit` of a mapped kvm_run.
    immediate_exit: *mut u8,
    /// The vCPU thread, once it runs.
    thread: Option<libc::pthread_t>,
}

// SAFETY: the pointer is used only for atomic access, under the kicker's lock, while the mapping it
// points into exists (the target is removed before).
unsafe impl Send for Target {}

impl Target {
    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the mapping exists while the target does; u8 needs no alignment; the kernel only
        // reads the byte, and everybody here accesses it atomically.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }
}

/// Kicks one vCPU. Holds no vCPU alive: after its end a kick does nothing.
pub(super) struct Kicker {
    target: Mutex<Option<Target>>,
    control: Arc<VcpuControl>,
}

impl Kicker {
    /// A kicker for the vCPU of `fd`. Kicks that come before the thread runs are remembered. The
    /// vCPU must not be dropped before the guard of [`Kicker::attach`], or without any attach while
    /// kicks may come.
    pub fn new(fd: &mut VcpuFd, control: Arc<VcpuControl>) -> Arc<Kicker> {
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        Arc::new(Kicker {
            target: Mutex::new(Some(Target { immediate_exit, thread: None })),
            control,
        })
    }

    /// Called on the vCPU's thread: kicks go to it until the guard is dropped.
    pub fn attach(self: &Arc<Self>) -> Attached {
        // The thread may inherit a mask from a creator that blocks signals.
        // SAFETY: sigset_t is plain data that sigemptyset initialises; all pointers are valid.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        }
        if let Some(t) = self.target.lock().unwrap().as_mut() {
            // SAFETY: no preconditions.
            t.thread = Some(unsafe { libc::pthread_self() });
        }
        Attached(self.clone())
    }

    /// Called on the vCPU's thread when KVM_RUN has returned EINTR.
    pub fn clear(&self) {
        if let Some(t) = self.target.lock().unwrap().as_ref() {
            t.flag().store(0, Ordering::SeqCst);
        }
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        if let Some(t) = self.target.lock().unwrap().as_ref() {
            let pending = t.flag().swap(1, Ordering::SeqCst) != 0;
            if let (false, Some(thread)) = (pending, t.thread) {
                // SAFETY: the thread has not ended: its guard removes the target first, under the
                // lock that we hold.
                unsafe { libc::pthread_kill(thread, signal()) };
            }
        }
        self.control.wake();
    }
}

/// While it lives, the kicker knows the vCPU's thread.
pub(super) struct Attached(Arc<Kicker>);

impl Drop for Attached {
    fn drop(&mut self) {
        *self.0.target.lock().unwrap() = None;
    }
}
