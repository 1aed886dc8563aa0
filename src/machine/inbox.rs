//! What happens to a machine from outside its main loop: guests' power requests, vCPUs that stopped,
//! the user's wish to end. Anybody may post from any thread; the main loop alone takes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tandem_accel::vcpu::{StopReason, VcpuEvents};
use tandem_devices::power::{PowerRequest, PowerSink};
use vmm_sys_util::eventfd::EventFd;

/// Something that the governor decides about.
#[derive(Debug)]
pub enum Event {
    /// The guest asked for power off, reset or an exit.
    Power(PowerRequest),
    /// A vCPU stopped by itself.
    Stopped(u32, StopReason),
    /// The user wants to quit.
    Quit,
}

/// The queue of events.
pub struct Inbox {
    events: Mutex<VecDeque<Event>>,
    bell: EventFd,
}

impl Inbox {
    /// An empty queue.
    pub fn new() -> std::io::Result<Arc<Inbox>> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Inbox { events: Mutex::default(), bell }))
    }

    /// Adds an event and wakes the main loop. Never blocks.
    pub fn post(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        // Fails only if the counter is full, and then the loop is awake already.
        let _ = self.bell.write(1);
    }

    /// Takes the oldest event.
    pub fn take(&self) -> Option<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Readable while events may be waiting.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }
}

impl PowerSink for Inbox {
    fn request(&self, request: PowerRequest) {
        self.post(Event::Power(request));
    }
}

impl VcpuEvents for Inbox {
    fn stopped(&self, index: u32, reason: StopReason) {
        self.post(Event::Stopped(index, reason));
    }
}
