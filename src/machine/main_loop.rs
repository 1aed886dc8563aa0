//! The main loop: one thread that sleeps until a timer of the virtual clock is due, a character
//! device is ready, a signal asks for an end, or the machine's inbox has an event.

use super::inbox::Inbox;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tandem_accel::clock::Clock;
use tandem_accel::{Error, Result};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

type Subscriber = Box<dyn MutEventSubscriber>;

/// The main loop's sources of events.
pub struct MainLoop {
    manager: EventManager<Subscriber>,
}

impl MainLoop {
    /// A loop that serves `clock`'s timers, and wakes for `inbox` and `signals`.
    pub fn new(
        clock: &Arc<Clock>,
        inbox: &Arc<Inbox>,
        signals: &'static EventFd,
    ) -> Result<MainLoop> {
        let mut manager = EventManager::new()
            .map_err(|e| Error::new("cannot make the main loop").caused_by(e))?;
        let timers = Timers::new(clock)
            .map_err(|e| Error::new("cannot make a timer for the main loop").caused_by(e))?;
        let bell = inbox.bell().try_clone();
        let bell = bell.map_err(|e| Error::new("cannot make the main loop").caused_by(e))?;
        manager.add_subscriber(Box::new(timers) as Subscriber);
        manager.add_subscriber(Box::new(Bell(bell)));
        manager.add_subscriber(Box::new(Signals(signals)));
        Ok(MainLoop { manager })
    }

    /// Serves a serial port, too.
    pub fn add(&mut self, port: impl MutEventSubscriber + 'static) {
        self.manager.add_subscriber(Box::new(port));
    }

    /// Sleeps until something happens and serves it.
    pub fn turn(&mut self) -> Result<()> {
        match self.manager.run() {
            Ok(_) => Ok(()),
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => Ok(()),
            Err(e) => Err(Error::new("the main loop cannot wait for events").caused_by(e)),
        }
    }
}

/// Registers `fd` for reading; without it the machine cannot work, but epoll refuses only when the
/// host is out of memory or watches.
pub(super) fn watch(ops: &mut EventOps, fd: &impl AsRawFd) {
    if let Err(e) = ops.add(Events::new(fd, EventSet::IN)) {
        log::error!("the main loop cannot watch a descriptor: {e}");
    }
}

/// The inbox's bell. The governor looks into the inbox after every turn; here it is only silenced.
struct Bell(EventFd);

impl MutEventSubscriber for Bell {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.0);
    }
}

/// Wakes the loop when a signal has asked for an end; the governor asks [`crate::signals`] which.
struct Signals(&'static EventFd);

impl MutEventSubscriber for Signals {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0);
    }
}

/// The virtual clock's timers on a host timer, which whoever arms one sets directly.
struct Timers {
    clock: Arc<Clock>,
    timer: Arc<Mutex<TimerFd>>,
}

impl Timers {
    fn new(clock: &Arc<Clock>) -> std::io::Result<Timers> {
        let timer = Arc::new(Mutex::new(TimerFd::new()?));
        let host = timer.clone();
        clock.set_waker(move |wait| {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            let set = match wait {
                // Zero would disarm the timer.
                Some(ns) => host.reset(Duration::from_nanos(ns.max(1)), None),
                None => host.clear(),
            };
            if let Err(e) = set {
                log::error!("the main loop cannot set its timer: {e}");
            }
        });
        Ok(Timers { clock: clock.clone(), timer })
    }

    fn fd(&self) -> RawFd {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner).as_raw_fd()
    }
}

impl MutEventSubscriber for Timers {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It ends by setting the timer anew, which takes its expiry.
        self.clock.run_expired();
    }
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.fd());
    }
}
