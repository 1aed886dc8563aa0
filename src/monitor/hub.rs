//! The hub: all sessions that there are, so that events reach every one.

use super::session::Session;
use crate::qapi::{Event, Members, Object};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};
use vmm_sys_util::eventfd::EventFd;

/// All sessions.
pub struct Hub {
    sessions: Mutex<Vec<Weak<Session>>>,
    /// Wakes the server's thread.
    bell: EventFd,
}

impl Hub {
    /// A hub without sessions.
    pub fn new() -> std::io::Result<Arc<Hub>> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Hub { sessions: Mutex::default(), bell }))
    }

    /// Readable when the server shall look at its sessions.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Wakes the server's thread.
    pub fn ring(&self) {
        // Fails only if the counter is full, and then the thread is awake already.
        let _ = self.bell.write(1);
    }

    /// Adds a session.
    pub fn add(&self, session: &Arc<Session>) {
        let mut all = self.lock();
        all.retain(|s| s.strong_count() > 0);
        all.push(Arc::downgrade(session));
    }

    /// Sends an event to all sessions that want events. Never blocks; callable from any thread.
    pub fn emit<E: Event>(&self, event: E) {
        let mut data = Members::new();
        Object::give(event, &mut data);
        let line = super::session::line(&event_json(E::EVENT, data));
        for session in self.lock().iter().filter_map(Weak::upgrade) {
            session.send_event(&line);
        }
        self.ring();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn event_json(name: &str, data: Members) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "event": name,
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
    });
    if !data.is_empty() {
        event["data"] = Value::Object(data);
    }
    event
}
