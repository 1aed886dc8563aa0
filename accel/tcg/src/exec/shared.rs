//! What the vCPUs of one machine share besides the block table: who they are, how to get their
//! attention, and how to keep them out of generated code for a moment.

use crate::env::Core;
use crate::softmmu::phys::{self, PhysMap};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use tandem_accel::irq::Kick;
use tandem_accel::vcpu::VcpuControl;

/// A note to a vCPU: writes to this physical page must (or need no longer) be noticed.
#[derive(Clone, Copy, Debug)]
pub struct WatchNote {
    /// Guest physical page address.
    pub ppage: u64,
    /// Start or stop.
    pub on: bool,
}

/// How to reach a vCPU from other threads; outlives its `Env`.
pub struct Doorbell {
    /// `Core::exit_request` of the vCPU's `Env`, while it exists.
    exit_request: Mutex<Option<NonNull<AtomicU32>>>,
    /// A kick since the execution loop last looked.
    pub kicked: AtomicBool,
    mail: Mutex<Vec<WatchNote>>,
    control: Arc<VcpuControl>,
}

// SAFETY: the pointer is only followed under the mutex, and the owner of the Env takes it out under
// the same mutex before freeing; what it points to is an atomic.
unsafe impl Send for Doorbell {}
// SAFETY: as above.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// For the vCPU with this control.
    pub fn new(control: Arc<VcpuControl>) -> Arc<Doorbell> {
        Arc::new(Doorbell {
            exit_request: Mutex::new(None),
            kicked: AtomicBool::new(false),
            mail: Mutex::default(),
            control,
        })
    }
    /// Connects it to an `Env`, until [`Doorbell::disconnect`].
    pub fn connect(&self, core: &Core) {
        *self.exit_request.lock().unwrap() = Some(NonNull::from(&core.exit_request));
    }
    /// Must be called before the `Env` is freed.
    pub fn disconnect(&self) {
        *self.exit_request.lock().unwrap() = None;
    }
    /// Makes the vCPU leave generated code soon.
    pub fn request_exit(&self) {
        if let Some(p) = *self.exit_request.lock().unwrap() {
            // SAFETY: connected, so the Env is alive, and stays so while we hold the lock.
            unsafe { p.as_ref() }.store(1, Ordering::Release);
        }
    }
    /// Takes the notes that have arrived.
    pub fn take_mail(&self) -> Vec<WatchNote> {
        std::mem::take(&mut *self.mail.lock().unwrap())
    }
}

impl Kick for Doorbell {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        self.request_exit();
        self.control.wake();
    }
}

/// Shared by the vCPUs of a machine.
#[derive(Default)]
pub struct Shared {
    /// Guest physical memory.
    pub phys: Arc<PhysMap>,
    vcpus: RwLock<Vec<Arc<Doorbell>>>,
    /// Read: inside generated code. Write: nobody is.
    gate: RwLock<()>,
    /// Increases with every flush of all code.
    flushes: AtomicU64,
}

/// Held while a vCPU is (or is about to be) in generated code.
pub struct Running<'a>(#[allow(dead_code)] RwLockReadGuard<'a, ()>);

impl Shared {
    /// Adds a vCPU.
    pub fn add(&self, bell: Arc<Doorbell>) {
        self.vcpus.write().unwrap().push(bell);
    }
    /// Enters; waits while somebody has the code for himself.
    pub fn running(&self) -> Running<'_> {
        Running(self.gate.read().unwrap())
    }
    /// Number of flushes of all code so far.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Acquire)
    }
    /// Runs `f` with no vCPU inside generated code. The caller must not hold [`Running`].
    pub fn exclusive(&self, f: impl FnOnce()) {
        for v in self.vcpus.read().unwrap().iter() {
            v.request_exit();
        }
        let _gate = self.gate.write().unwrap();
        f();
    }
    /// As [`Shared::exclusive`], for dropping all code.
    pub fn flush_code(&self, f: impl FnOnce()) {
        self.exclusive(|| {
            f();
            self.flushes.fetch_add(1, Ordering::AcqRel);
        });
    }
    /// Sets whether writes to a physical page must be noticed, and tells all vCPUs.
    pub fn watch(&self, ppage: u64, on: bool) {
        let (ram, _) = self.phys.snapshot();
        if let Some(r) = phys::find(&ram, ppage) {
            r.bits.watch((ppage - r.gpa) as usize, on);
        }
        for v in self.vcpus.read().unwrap().iter() {
            v.mail.lock().unwrap().push(WatchNote { ppage, on });
            v.request_exit();
        }
    }
}
