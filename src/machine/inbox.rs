//! What happens to a machine from outside its main loop: guests' power requests, vCPUs that stopped,
//! the user's wish to end. Anybody may post from any thread; the main loop alone takes.

use crate::commands::run_state::ShutdownCause;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tandem_accel::AccelOps;
use tandem_accel::vcpu::{StopReason, VcpuEvents};
use tandem_devices::power::{News, PowerRequest, PowerSink};
use vmm_sys_util::eventfd::EventFd;

/// Work for the main loop's thread, which alone changes the machine.
pub type Job = Box<dyn FnOnce(&mut super::Machine) + Send>;

/// Something that the governor decides about.
pub enum Event {
    /// The guest asked for power off, reset or an exit.
    Power(PowerRequest),
    /// The guest did something that clients are told.
    News(News),
    /// A vCPU stopped by itself.
    Stopped(u32, StopReason),
    /// Somebody wants the machine to end, whatever the guest does.
    Quit(ShutdownCause),
    /// Somebody who manages the machine wants something done.
    Job(Job),
}

/// The queue of events.
pub struct Inbox {
    accel: OnceLock<Arc<dyn AccelOps>>,
    events: Mutex<VecDeque<Event>>,
    bell: EventFd,
}

impl Inbox {
    /// An empty queue.
    pub fn new() -> std::io::Result<Arc<Inbox>> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Inbox { accel: OnceLock::new(), events: Mutex::default(), bell }))
    }

    /// Says what runs the machine whose requests come here; it is told of them first.
    pub fn serve(&self, accel: Arc<dyn AccelOps>) {
        let _ = self.accel.set(accel);
    }

    /// Adds an event and wakes the main loop. Never blocks.
    pub fn post(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        // Fails only if the counter is full, and then the loop is awake already.
        let _ = self.bell.write(1);
    }

    /// Takes all events, oldest first. Those that come later ring the bell again, so that somebody
    /// who posts without end does not keep the main loop from its timers.
    pub fn take(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Readable while events may be waiting.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }
}

impl PowerSink for Inbox {
    fn request(&self, request: PowerRequest) {
        if let Some(accel) = self.accel.get()
            && !matches!(
                request,
                PowerRequest::Refused(_) | PowerRequest::Panicked(_) | PowerRequest::Watchdog
            )
        {
            accel.hold();
        }
        self.post(Event::Power(request));
    }
    fn tell(&self, news: News) {
        self.post(Event::News(news));
    }
}

impl VcpuEvents for Inbox {
    fn stopped(&self, index: u32, reason: StopReason) {
        self.post(Event::Stopped(index, reason));
    }
}
