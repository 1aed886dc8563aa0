//! What the vCPUs of one machine share besides the block table: who they are, how to get their
//! attention, and how to keep them out of generated code for a moment.
//!
//! All work between vCPUs goes one of two ways:
//!
//! ```text
//!   note     a vCPU learns something at its next block boundary, before it runs on; nobody waits.
//!            Whoever must know that all have learnt it keeps the note's ticket and asks `settled`.
//!   section  no other vCPU is in generated code or in a helper while a closure runs: dropping all
//!            code, accesses that the host cannot make atomic.
//! ```
//! Entering and leaving generated code touches only the vCPU's own words, so that vCPUs do not slow
//! each other down.

use crate::env::Core;
use crate::softmmu::phys::{self, PhysMap};
use crate::tb::CodeWatch;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use tandem_accel::clock::Clock;
use tandem_accel::irq::Kick;
use tandem_accel::vcpu::VcpuControl;

/// A note to a vCPU: writes to this physical page must (or need no longer) be noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchNote {
    /// Guest physical page address.
    pub ppage: u64,
    /// Start or stop.
    pub on: bool,
}

/// Most notes that are kept for a vCPU; with more, it forgets all translations instead.
const MOST_NOTES: usize = 64;
/// No vCPU has been called.
const UNCALLED: u64 = u64::MAX;
/// A vCPU that sleeps has learnt everything: it reads its mail before it runs.
const ASLEEP: u64 = u64::MAX;

/// Notes that a vCPU has not read yet.
#[derive(Default)]
pub struct Mail {
    /// In the order in which they were sent.
    pub notes: Vec<WatchNote>,
    /// There were more notes than are kept.
    pub overflow: bool,
    /// Of the last note.
    ticket: u64,
}

/// How to reach a vCPU from other threads; outlives its `Env`.
pub struct Doorbell {
    /// `Core::exit_request` of the vCPU's `Env`, while it exists.
    exit_request: Mutex<Option<NonNull<AtomicU32>>>,
    /// A kick since the execution loop last looked.
    pub kicked: AtomicBool,
    mail: Mutex<Mail>,
    /// Ticket of the last note that the vCPU has followed, or [`ASLEEP`].
    followed: AtomicU64,
    /// In generated code, or about to be.
    inside: AtomicBool,
    /// Guest time of the first kick since the vCPU last came back to its loop, or [`UNCALLED`].
    called: AtomicU64,
    clock: Arc<Clock>,
    /// Another vCPU has ended this one's halt, or the next one.
    unhalted: AtomicBool,
    apic_id: u32,
    control: Arc<VcpuControl>,
}

// SAFETY: the pointer is only followed under the mutex, and the owner of the Env takes it out under
// the same mutex before freeing; what it points to is an atomic.
unsafe impl Send for Doorbell {}
// SAFETY: as above.
unsafe impl Sync for Doorbell {}

impl Doorbell {
    /// For the vCPU with this local APIC ID and this control, in a machine with this clock.
    pub fn new(apic_id: u32, control: Arc<VcpuControl>, clock: &Arc<Clock>) -> Arc<Doorbell> {
        Arc::new(Doorbell {
            exit_request: Mutex::new(None),
            kicked: AtomicBool::new(false),
            mail: Mutex::default(),
            followed: AtomicU64::new(ASLEEP),
            inside: AtomicBool::new(false),
            called: AtomicU64::new(UNCALLED),
            clock: clock.clone(),
            unhalted: AtomicBool::new(false),
            apic_id,
            control,
        })
    }
    /// The vCPU has come back to its loop: it has heard all kicks so far.
    pub fn heard(&self) {
        self.called.store(UNCALLED, Ordering::Relaxed);
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
    /// The vCPU begins to run, and will read its mail before it touches guest memory.
    pub fn wake_up(&self) {
        // Before the mail is looked at: whoever posts a note after that look sees us awake.
        self.followed.store(0, Ordering::SeqCst);
    }
    /// The vCPU does not touch guest memory until it wakes up again.
    pub fn fall_asleep(&self) {
        self.followed.store(ASLEEP, Ordering::SeqCst);
    }
    /// Calls `follow` with the notes that have arrived; afterwards they count as followed.
    pub fn read_mail(&self, follow: impl FnOnce(&Mail)) {
        let mail = {
            let mut m = self.mail.lock().unwrap();
            let ticket = m.ticket;
            std::mem::replace(&mut *m, Mail { ticket, ..Mail::default() })
        };
        if !mail.notes.is_empty() || mail.overflow {
            follow(&mail);
        }
        // Stores to guest memory made so far are visible to whoever reads this.
        self.followed.store(mail.ticket, Ordering::Release);
    }
    /// Whether a halt ends that nothing else ends: [`Shared::unhalt`] since the last look.
    pub fn take_unhalt(&self) -> bool {
        self.unhalted.load(Ordering::Relaxed) && self.unhalted.swap(false, Ordering::Acquire)
    }
    /// Whether [`Doorbell::take_unhalt`] would say so.
    pub fn is_unhalted(&self) -> bool {
        self.unhalted.load(Ordering::Relaxed)
    }
    fn post(&self, note: WatchNote, ticket: u64) {
        let mut m = self.mail.lock().unwrap();
        m.ticket = ticket;
        if m.overflow || m.notes.len() == MOST_NOTES {
            m.overflow = true;
            m.notes.clear();
        } else {
            m.notes.push(note);
        }
    }
}

impl Kick for Doorbell {
    fn kick(&self) {
        if self.called.load(Ordering::Relaxed) == UNCALLED {
            self.called.store(self.clock.now(), Ordering::Relaxed);
        }
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
    tickets: AtomicU64,
    /// Held by whoever has a section.
    section: Mutex<()>,
    /// Somebody wants or has a section: vCPUs stay outside.
    closed: AtomicBool,
    /// With `moved`: for waiting until a vCPU has left, or the section has ended.
    gate: Mutex<()>,
    moved: Condvar,
    /// Increases with every flush of all code.
    flushes: AtomicU64,
}

/// Held while a vCPU is (or is about to be) in generated code.
pub struct Running<'a> {
    shared: &'a Shared,
    bell: &'a Doorbell,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.shared.leave(self.bell);
    }
}

impl Shared {
    /// Adds a vCPU.
    pub fn add(&self, bell: Arc<Doorbell>) {
        self.vcpus.write().unwrap().push(bell);
    }
    /// Guest time since when a vCPU has not heard that it was called; `u64::MAX`: all have.
    pub fn oldest_call(&self) -> u64 {
        let vcpus = self.vcpus.read().unwrap();
        vcpus.iter().map(|v| v.called.load(Ordering::Relaxed)).min().unwrap_or(UNCALLED)
    }
    /// All vCPUs but this one are no more: their threads are not in this process.
    pub fn retain(&self, bell: &Arc<Doorbell>) {
        self.vcpus.write().unwrap().retain(|v| Arc::ptr_eq(v, bell));
    }
    /// A vCPU is no more.
    pub fn remove(&self, bell: &Arc<Doorbell>) {
        self.vcpus.write().unwrap().retain(|v| !Arc::ptr_eq(v, bell));
    }
    /// Ends the halt of the vCPU with this local APIC ID, or the next if it does not halt now; as an
    /// interrupt would, but whether it takes interrupts or not. Nothing happens if there is none.
    pub fn unhalt(&self, apic_id: u32) {
        let vcpu = self.vcpus.read().unwrap().iter().find(|v| v.apic_id == apic_id).cloned();
        if let Some(bell) = vcpu {
            bell.unhalted.store(true, Ordering::Release);
            bell.kick();
        }
    }
    /// The vCPU of `bell` enters; waits while somebody else has a section.
    pub fn running<'a>(&'a self, bell: &'a Doorbell) -> Running<'a> {
        loop {
            // Either we see the section closed, or its owner sees us inside.
            bell.inside.store(true, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) {
                return Running { shared: self, bell };
            }
            self.leave(bell);
            let mut gate = self.gate.lock().unwrap();
            while self.closed.load(Ordering::SeqCst) {
                gate = self.moved.wait(gate).unwrap();
            }
        }
    }
    fn leave(&self, bell: &Doorbell) {
        bell.inside.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            // Under the lock, so that the owner is either before its look at us or asleep.
            let _gate = self.gate.lock().unwrap();
            self.moved.notify_all();
        }
    }
    /// Makes all vCPUs follow a change of the memory map when they leave the code they are in.
    pub fn memory_changed(&self) {
        for v in self.vcpus.read().unwrap().iter() {
            v.request_exit();
        }
    }
    /// Number of flushes of all code so far.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Acquire)
    }
    /// Runs `f` for the vCPU of `bell` with no vCPU inside generated code. The caller must not hold
    /// [`Running`], nor call this from `f`.
    pub fn exclusive<R>(&self, bell: &Doorbell, f: impl FnOnce() -> R) -> R {
        let _section = self.section.lock().unwrap();
        let vcpus = self.vcpus.read().unwrap().clone();
        self.closed.store(true, Ordering::SeqCst);
        // Opens again even if `f` panics: other threads' ends may depend on it.
        let _open = Open(self);
        for v in vcpus.iter().filter(|v| !std::ptr::eq(&***v, bell)) {
            v.request_exit();
        }
        {
            let mut gate = self.gate.lock().unwrap();
            while vcpus.iter().any(|v| v.inside.load(Ordering::SeqCst)) {
                gate = self.moved.wait(gate).unwrap();
            }
        }
        f()
    }
    /// Runs `f`, which drops all code, while nobody is inside generated code; the caller has seen to
    /// that.
    pub fn flush_in_section(&self, f: impl FnOnce()) {
        f();
        self.flushes.fetch_add(1, Ordering::AcqRel);
    }
}

/// Ends a section.
struct Open<'a>(&'a Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
        let _gate = self.0.gate.lock();
        self.0.moved.notify_all();
    }
}

impl CodeWatch for Shared {
    fn watch(&self, ppage: u64, on: bool) -> u64 {
        let (ram, _) = self.phys.snapshot();
        if let Some(r) = phys::find(&ram, ppage) {
            r.bits.watch((ppage - r.gpa) as usize, on);
        }
        let ticket = self.tickets.fetch_add(1, Ordering::SeqCst) + 1;
        for v in self.vcpus.read().unwrap().iter() {
            v.post(WatchNote { ppage, on }, ticket);
            // That a page is no longer watched can wait.
            if on && v.followed.load(Ordering::SeqCst) != ASLEEP {
                v.request_exit();
            }
        }
        ticket
    }

    fn settled(&self, ticket: u64) -> bool {
        self.vcpus.read().unwrap().iter().all(|v| v.followed.load(Ordering::SeqCst) >= ticket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpus(shared: &Shared, n: usize) -> Vec<Arc<Doorbell>> {
        let bells: Vec<_> =
            (0..n as u32).map(|id| Doorbell::new(id, VcpuControl::new(), &Clock::new())).collect();
        bells.iter().for_each(|b| shared.add(b.clone()));
        bells
    }

    #[test]
    fn a_note_is_settled_when_all_who_are_awake_have_read_it() {
        let shared = Shared::default();
        let bells = vcpus(&shared, 3);
        bells[0].wake_up();
        bells[1].wake_up();
        let ticket = shared.watch(0x5000, true);
        bells[0].read_mail(|m| assert_eq!(m.notes, [WatchNote { ppage: 0x5000, on: true }]));
        assert!(!shared.settled(ticket));
        bells[1].read_mail(|m| assert_eq!(m.notes.len(), 1));
        assert!(shared.settled(ticket), "the third sleeps");
        bells[2].wake_up();
        assert!(!shared.settled(ticket), "it has not read its mail");
        bells[2].read_mail(|m| assert_eq!(m.notes.len(), 1));
        assert!(shared.settled(ticket));
        // No mail, nothing to follow.
        bells[2].read_mail(|_| panic!("there is none"));
    }

    #[test]
    fn a_vcpu_that_sleeps_long_forgets_everything_instead() {
        let shared = Shared::default();
        let bells = vcpus(&shared, 1);
        for page in 0..10 * MOST_NOTES as u64 {
            shared.watch(page << 12, true);
        }
        bells[0].read_mail(|m| assert!(m.overflow && m.notes.is_empty()));
        shared.watch(0, true);
        bells[0].read_mail(|m| assert!(!m.overflow && m.notes.len() == 1));
    }

    #[test]
    fn sections_exclude_vcpus_and_each_other() {
        let shared = Shared::default();
        let bells = vcpus(&shared, 4);
        // Incremented without atomicity: lost updates would show.
        let count = AtomicU64::new(0);
        let bump = || count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let inside = AtomicU64::new(0);
        std::thread::scope(|s| {
            for b in &bells {
                s.spawn(|| {
                    for n in 0..2000 {
                        {
                            let _running = shared.running(b);
                            inside.fetch_add(1, Ordering::SeqCst);
                            std::hint::spin_loop();
                            inside.fetch_sub(1, Ordering::SeqCst);
                        }
                        if n % 10 == 0 {
                            shared.exclusive(b, || {
                                assert_eq!(inside.load(Ordering::SeqCst), 0);
                                bump();
                            });
                        }
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 4 * 200);
    }
}
