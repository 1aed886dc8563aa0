//! The virtual clock and its timers.
//!
//! [`Clock`] counts nanoseconds of guest time: it runs while the VM runs and stands still while it
//! is paused. All guest-visible time (PIT, HPET, PM timer, RTC, LAPIC, TSC under translation)
//! derives from it.
//!
//! On a host that gives the VM no processor, guest time does not run away: it stops [`SLACK`] behind
//! the first timer that nobody has fired, and behind the first call of a vCPU that has not been heard
//! ([`Clock::wait_for`]), until that is done. What time that costs, guest time stays behind.
//!
//! [`Timer`]s fire on whatever thread calls [`Clock::run_expired`]: the machine's main loop, or, where
//! guest time is made from executed instructions ([`TimeSource`]), the vCPUs' thread. Callbacks run
//! without the clock's lock, so they may arm timers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds per second.
pub const NANOS_PER_SEC: u64 = 1_000_000_000;

type Callback = Arc<dyn Fn() + Send + Sync>;
type Waker = Box<dyn Fn(Option<u64>) + Send + Sync>;
type Observer = Arc<dyn Fn(bool) + Send + Sync>;

struct Queue {
    /// (deadline, id) → callback.
    armed: BTreeMap<(u64, u64), Callback>,
    /// The first of them when it was last looked.
    first: Option<(u64, u64)>,
    next_id: u64,
    waker: Option<Waker>,
}

impl Queue {
    fn note_first(&mut self, clock: &Clock) {
        let first = self.armed.keys().next().copied();
        if first != self.first {
            self.first = first;
            // A deadline in the past is due from now on.
            let since = first.map_or(NEVER, |(deadline, _)| deadline.max(clock.now()));
            clock.due_since.store(since, Ordering::Release);
        }
    }
}

/// What guest time is made from instead of host time.
pub trait TimeSource: Send + Sync {
    /// Nanoseconds that have passed; never goes back.
    fn now(&self) -> u64;
    /// The earliest deadline may have changed: from any thread, perhaps from inside [`Timer::arm`].
    /// It must not touch the clock or its timers.
    fn deadline_changed(&self);
}

/// How far guest time runs ahead of timers that have not fired and of vCPUs that have not been heard.
/// Guests take what lasts some twenty times as long for a hang.
pub const SLACK: u64 = NANOS_PER_SEC;
/// How often it is looked for them. New ones come with the present time, so none is overtaken.
const LOOK: u64 = SLACK / 8;
/// No time.
const NEVER: u64 = u64::MAX;

/// Says since when (guest time) the first vCPU has been called that has not been heard; `u64::MAX`:
/// there is none.
type Oldest = Box<dyn Fn() -> u64 + Send + Sync>;

/// Marks [`Clock::standing`] while time runs.
const RUNNING: u64 = u64::MAX;

/// The virtual clock.
pub struct Clock {
    /// What host time is counted from.
    origin: Instant,
    /// Guest time while it stands still, else [`RUNNING`].
    standing: AtomicU64,
    /// While time runs, guest time is host nanoseconds since `origin` plus this (wrapping). Written
    /// before `standing` says so; so a reader needs no lock.
    offset: AtomicU64,
    /// Since when the first timer is due, or will be; or [`NEVER`]. Written under the queue's lock.
    due_since: AtomicU64,
    /// Guest time from which on time may have run too far.
    next_look: AtomicU64,
    oldest_call: OnceLock<Oldest>,
    /// Takes the place of host time.
    source: OnceLock<Arc<dyn TimeSource>>,
    /// UTC at guest time 0, in nanoseconds since 1970.
    epoch: AtomicU64,
    /// Held by whoever starts, stops or sets time.
    change: Mutex<()>,
    queue: Mutex<Queue>,
    observers: Mutex<Vec<Observer>>,
}

impl Clock {
    /// A clock that stands still at 0.
    pub fn new() -> Arc<Clock> {
        Arc::new(Clock {
            origin: Instant::now(),
            standing: AtomicU64::new(0),
            offset: AtomicU64::new(0),
            due_since: AtomicU64::new(NEVER),
            next_look: AtomicU64::new(0),
            oldest_call: OnceLock::new(),
            source: OnceLock::new(),
            epoch: AtomicU64::new(
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64,
            ),
            change: Mutex::default(),
            queue: Mutex::new(Queue {
                armed: BTreeMap::new(),
                first: None,
                next_id: 0,
                waker: None,
            }),
            observers: Mutex::default(),
        })
    }

    fn host(&self) -> u64 {
        match self.source.get() {
            Some(s) => s.now(),
            None => self.origin.elapsed().as_nanos() as u64,
        }
    }

    /// Makes guest time from `source` from now on: whoever drives it calls [`Clock::run_expired`],
    /// and the waker is left alone. Before time first runs; only the first call counts.
    pub fn drive(&self, source: Arc<dyn TimeSource>) {
        let _ = self.source.set(source);
    }

    /// UTC at guest time 0, in nanoseconds since 1970: when the clock was made, unless set. Every
    /// clock that tells the date counts from here.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Sets [`Clock::epoch`], before anybody has asked.
    pub fn set_epoch(&self, ns: u64) {
        self.epoch.store(ns, Ordering::Relaxed);
    }

    /// Guest time in nanoseconds.
    pub fn now(&self) -> u64 {
        match self.standing.load(Ordering::Acquire) {
            RUNNING => {
                let t = self.host().wrapping_add(self.offset.load(Ordering::Acquire));
                if t < self.next_look.load(Ordering::Acquire) { t } else { self.look() }
            }
            t => t,
        }
    }

    /// Guest time does not run far ahead of vCPUs that `oldest` knows of: see [`SLACK`]. Only the first
    /// call counts.
    pub fn wait_for(&self, oldest: impl Fn() -> u64 + Send + Sync + 'static) {
        let _ = self.oldest_call.set(Box::new(oldest));
    }

    /// Guest time, after a look whether it has run too far.
    fn look(&self) -> u64 {
        let change = self.change.lock().unwrap();
        match self.standing.load(Ordering::Acquire) {
            RUNNING => self.checked(&change),
            t => t,
        }
    }

    /// The same while nobody starts, stops or sets time, and it runs.
    fn checked(&self, _: &MutexGuard<'_, ()>) -> u64 {
        let t = self.host().wrapping_add(self.offset.load(Ordering::Acquire));
        let Some(oldest) = self.oldest_call.get().filter(|_| self.source.get().is_none()) else {
            self.next_look.store(NEVER, Ordering::Release);
            return t;
        };
        let due = self.due_since.load(Ordering::Acquire);
        let limit = oldest().min(due).saturating_add(SLACK);
        let read = self.next_look.load(Ordering::Acquire);
        if t <= limit {
            self.next_look.store(limit.min(t + LOOK), Ordering::Release);
            return t;
        }
        // Nobody has read more than that.
        let limit = limit.max(read.min(t));
        self.next_look.store(limit, Ordering::Release);
        self.offset.fetch_sub(t - limit, Ordering::AcqRel);
        limit
    }

    fn run_from(&self, t: u64) {
        self.next_look.store(t, Ordering::Release);
        self.offset.store(t.wrapping_sub(self.host()), Ordering::Release);
        self.standing.store(RUNNING, Ordering::Release);
    }

    /// Lets time run (no effect if it does).
    pub fn resume(&self) {
        let was_paused = {
            let _change = self.change.lock().unwrap();
            let t = self.standing.load(Ordering::Acquire);
            if t != RUNNING {
                self.run_from(t);
            }
            t != RUNNING
        };
        if was_paused {
            self.tell(true);
        }
        self.wake(&self.queue.lock().unwrap());
    }

    /// Stops time (no effect if it stands).
    pub fn pause(&self) {
        {
            let change = self.change.lock().unwrap();
            if self.is_paused() {
                return;
            }
            self.standing.store(self.checked(&change), Ordering::Release);
        }
        self.tell(false);
    }

    /// Calls `f` whenever time starts (`true`) or stops (`false`) running, on the thread that does
    /// it, before [`Clock::resume`] or [`Clock::pause`] returns. For whoever keeps a clock of its
    /// own that must stand still too.
    pub fn observe(&self, f: impl Fn(bool) + Send + Sync + 'static) {
        self.observers.lock().unwrap().push(Arc::new(f));
    }

    fn tell(&self, running: bool) {
        let observers = self.observers.lock().unwrap().clone();
        for f in observers {
            f(running);
        }
    }

    /// Whether time stands still.
    pub fn is_paused(&self) -> bool {
        self.standing.load(Ordering::Acquire) != RUNNING
    }

    /// Sets guest time; for restoring a snapshot, while paused.
    pub fn set(&self, ns: u64) {
        let _change = self.change.lock().unwrap();
        match self.is_paused() {
            true => self.standing.store(ns, Ordering::Release),
            false => self.run_from(ns),
        }
    }

    /// Sets guest time, while paused, and calls the callbacks of the timers that are due then; those that
    /// they arm for no later time, too. For machines that make time by themselves, and for tests: no
    /// host time passes.
    pub fn run_to(&self, ns: u64) {
        self.set(ns);
        while let Some(cb) = self.next_due(ns) {
            cb();
        }
    }

    /// Takes the first timer that is due at `now` out of the queue.
    fn next_due(&self, now: u64) -> Option<Callback> {
        let mut q = self.queue.lock().unwrap();
        let first = q.armed.first_entry().filter(|e| e.key().0 <= now)?.remove();
        q.note_first(self);
        Some(first)
    }

    /// Installs what is called when the earliest deadline may have changed: from any thread, with
    /// the nanoseconds of host time until [`Clock::run_expired`] must be called (`None`: not until
    /// the next such call). It must not touch the clock or its timers.
    pub fn set_waker(&self, waker: impl Fn(Option<u64>) + Send + Sync + 'static) {
        let mut q = self.queue.lock().unwrap();
        q.waker = Some(Box::new(waker));
        self.wake(&q);
    }

    fn wake(&self, q: &Queue) {
        if let Some(s) = self.source.get() {
            s.deadline_changed();
        } else if let Some(w) = &q.waker {
            let first = q.armed.keys().next().filter(|_| !self.is_paused());
            w(first.map(|(deadline, _)| deadline.saturating_sub(self.now())));
        }
    }

    /// The earliest deadline of an armed timer, in guest time.
    pub fn next_deadline(&self) -> Option<u64> {
        self.queue.lock().unwrap().armed.keys().next().map(|k| k.0)
    }

    /// Calls the callbacks of all timers whose deadline has passed, in deadline order, and then the
    /// waker.
    pub fn run_expired(&self) {
        let now = self.now();
        while !self.is_paused()
            && let Some(cb) = self.next_due(now)
        {
            cb();
        }
        self.wake(&self.queue.lock().unwrap());
    }

    /// A disarmed timer that calls `f` when it fires.
    pub fn timer(self: &Arc<Self>, f: impl Fn() + Send + Sync + 'static) -> Timer {
        let mut q = self.queue.lock().unwrap();
        let id = q.next_id;
        q.next_id += 1;
        Timer { clock: Arc::downgrade(self), id, callback: Arc::new(f), deadline: Mutex::new(None) }
    }
}

/// A one-shot timer on a [`Clock`]; dropping it disarms it.
pub struct Timer {
    clock: Weak<Clock>,
    id: u64,
    callback: Callback,
    deadline: Mutex<Option<u64>>,
}

impl Timer {
    /// Arms the timer for guest time `deadline` (ns), replacing an earlier arming. A deadline in
    /// the past fires at once (from the timer thread, never from inside this call).
    pub fn arm(&self, deadline: u64) {
        let Some(clock) = self.clock.upgrade() else { return };
        let mut mine = self.deadline.lock().unwrap();
        let mut q = clock.queue.lock().unwrap();
        if let Some(old) = mine.replace(deadline) {
            q.armed.remove(&(old, self.id));
        }
        q.armed.insert((deadline, self.id), self.callback.clone());
        q.note_first(&clock);
        if q.armed.keys().next() == Some(&(deadline, self.id)) {
            clock.wake(&q);
        }
    }
    /// Disarms the timer. A callback that is already being called is not waited for.
    pub fn disarm(&self) {
        let Some(clock) = self.clock.upgrade() else { return };
        let mut mine = self.deadline.lock().unwrap();
        if let Some(old) = mine.take() {
            let mut q = clock.queue.lock().unwrap();
            q.armed.remove(&(old, self.id));
            q.note_first(&clock);
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn paused_clock_fires_nothing_and_resumed_fires_in_order() {
        let c = Clock::new();
        let hits = Arc::new(Mutex::new(vec![]));
        let mk = |n: u32| {
            let h = hits.clone();
            c.timer(move || h.lock().unwrap().push(n))
        };
        let (a, b, d) = (mk(1), mk(2), mk(3));
        b.arm(20);
        a.arm(10);
        d.arm(5);
        d.disarm();
        c.run_expired();
        assert!(hits.lock().unwrap().is_empty());
        c.set(15);
        c.resume();
        std::thread::sleep(std::time::Duration::from_millis(1));
        c.run_expired();
        assert_eq!(*hits.lock().unwrap(), [1, 2]);
    }

    #[test]
    fn the_waker_knows_how_long_to_sleep() {
        let c = Clock::new();
        let last = Arc::new(Mutex::new(Some(7)));
        let l = last.clone();
        c.set_waker(move |ns| *l.lock().unwrap() = ns);
        assert_eq!(*last.lock().unwrap(), None);
        let (a, b) = (c.timer(|| {}), c.timer(|| {}));
        a.arm(3600 * NANOS_PER_SEC);
        assert_eq!(*last.lock().unwrap(), None, "time stands still");
        c.resume();
        let hour = last.lock().unwrap().unwrap();
        assert!((3500 * NANOS_PER_SEC..=3600 * NANOS_PER_SEC).contains(&hour));
        b.arm(0);
        assert_eq!(*last.lock().unwrap(), Some(0));
        c.run_expired();
        assert!(last.lock().unwrap().unwrap() > 3500 * NANOS_PER_SEC);
        c.pause();
        c.run_expired();
        assert_eq!(*last.lock().unwrap(), None);
    }

    #[test]
    fn time_waits_for_timers_and_vcpus() {
        let later = |c: &Clock, ns: u64| c.offset.fetch_add(ns, Ordering::Relaxed);
        const S: u64 = NANOS_PER_SEC;
        let c = Clock::new();
        let called = Arc::new(AtomicU64::new(NEVER));
        let oldest = called.clone();
        c.wait_for(move || oldest.load(Ordering::Relaxed));
        c.resume();
        // Nobody waits for anything: an hour without a processor is an hour.
        later(&c, 3600 * S);
        let t = c.now();
        assert!(t > 3600 * S);
        let timer = c.timer(|| {});
        timer.arm(t + S);
        later(&c, 3600 * S);
        let stopped = c.now();
        assert_eq!(stopped, t + S + SLACK);
        assert_eq!(c.now(), stopped, "until it has fired");
        c.run_expired();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!((stopped + 1..stopped + S).contains(&c.now()));
        called.store(c.now(), Ordering::Relaxed);
        later(&c, 3600 * S);
        let stopped = c.now();
        assert_eq!(stopped, called.load(Ordering::Relaxed) + SLACK);
        c.pause();
        assert_eq!(c.now(), stopped);
        c.resume();
        called.store(NEVER, Ordering::Relaxed);
        assert!((stopped..stopped + S).contains(&c.now()));
        // Timers that are armed too late cost no time.
        let before = c.now();
        timer.arm(1);
        later(&c, SLACK / 2);
        assert!(c.now() >= before + SLACK / 2);
    }

    #[test]
    fn a_clock_that_nobody_is_heard_of_does_not_wait() {
        let c = Clock::new();
        c.resume();
        c.timer(|| {}).arm(NANOS_PER_SEC);
        let t = c.timer(|| {});
        t.arm(NANOS_PER_SEC);
        c.offset.fetch_add(3600 * NANOS_PER_SEC, Ordering::Relaxed);
        assert!(c.now() > 3600 * NANOS_PER_SEC);
    }

    #[test]
    fn time_goes_on_where_it_stood() {
        let c = Clock::new();
        c.set(5000);
        assert_eq!(c.now(), 5000);
        c.resume();
        assert!((5000..NANOS_PER_SEC).contains(&c.now()));
        c.pause();
        let t = c.now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(c.now(), t);
        c.resume();
        c.set(1 << 60);
        assert!(c.now() >= 1 << 60 && c.now() < (1 << 60) + NANOS_PER_SEC);
    }

    #[test]
    fn observers_hear_of_changes_only() {
        let c = Clock::new();
        let heard = Arc::new(Mutex::new(vec![]));
        let h = heard.clone();
        c.observe(move |on| h.lock().unwrap().push(on));
        c.pause();
        c.resume();
        c.resume();
        c.pause();
        assert_eq!(*heard.lock().unwrap(), [true, false]);
    }

    #[test]
    fn a_source_takes_the_place_of_host_time() {
        struct Steps(AtomicU64, AtomicU32);
        impl TimeSource for Steps {
            fn now(&self) -> u64 {
                self.0.load(Ordering::Relaxed)
            }
            fn deadline_changed(&self) {
                self.1.fetch_add(1, Ordering::Relaxed);
            }
        }
        let steps = Arc::new(Steps(AtomicU64::new(100), AtomicU32::new(0)));
        let c = Clock::new();
        c.drive(steps.clone());
        c.set_waker(|_| panic!("nobody sleeps by host time"));
        c.resume();
        assert_eq!(c.now(), 0);
        let fired = Arc::new(AtomicU32::new(0));
        let f = fired.clone();
        let t = c.timer(move || {
            f.fetch_add(1, Ordering::Relaxed);
        });
        let told = steps.1.load(Ordering::Relaxed);
        t.arm(50);
        assert!(steps.1.load(Ordering::Relaxed) > told);
        steps.0.store(149, Ordering::Relaxed);
        c.run_expired();
        assert_eq!((c.now(), fired.load(Ordering::Relaxed)), (49, 0));
        c.pause();
        steps.0.store(500, Ordering::Relaxed);
        assert_eq!(c.now(), 49);
        c.resume();
        steps.0.store(501, Ordering::Relaxed);
        c.run_expired();
        assert_eq!((c.now(), fired.load(Ordering::Relaxed)), (50, 1));
    }

    #[test]
    fn a_callback_may_rearm() {
        let c = Clock::new();
        let n = Arc::new(AtomicU32::new(0));
        let slot: Arc<Mutex<Option<Timer>>> = Arc::default();
        let (n2, s2, c2) = (n.clone(), slot.clone(), Arc::downgrade(&c));
        let t = c.timer(move || {
            n2.fetch_add(1, Ordering::Relaxed);
            let now = c2.upgrade().unwrap().now();
            s2.lock().unwrap().as_ref().unwrap().arm(now + NANOS_PER_SEC);
        });
        t.arm(0);
        *slot.lock().unwrap() = Some(t);
        c.resume();
        c.run_expired();
        assert_eq!(n.load(Ordering::Relaxed), 1);
        assert!(c.next_deadline().is_some());
    }
}
