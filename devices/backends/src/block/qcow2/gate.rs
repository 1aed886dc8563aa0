//! Keeps those who use clusters apart from those who free them.

use std::sync::{Condvar, Mutex};

/// Counts requests in flight. Requests enter together; whoever frees clusters waits until none is
/// in flight, so that no request still reads or writes what is handed out anew.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    inside: usize,
    /// Somebody is alone inside, or waits to be.
    closed: bool,
}

/// Being inside with others.
pub struct Shared<'a>(&'a Gate);
/// Being inside alone.
pub struct Alone<'a>(&'a Gate);

impl Gate {
    /// Enters with others.
    pub fn enter(&self) -> Shared<'_> {
        let s = self.state.lock().unwrap();
        let mut s = self.changed.wait_while(s, |s| s.closed).unwrap();
        s.inside += 1;
        Shared(self)
    }

    /// Enters alone, after everybody has left.
    pub fn alone(&self) -> Alone<'_> {
        let s = self.state.lock().unwrap();
        let mut s = self.changed.wait_while(s, |s| s.closed).unwrap();
        s.closed = true;
        let _s = self.changed.wait_while(s, |s| s.inside > 0).unwrap();
        Alone(self)
    }

    /// Enters alone if nobody is inside.
    pub fn try_alone(&self) -> Option<Alone<'_>> {
        let mut s = self.state.lock().unwrap();
        if s.closed || s.inside > 0 {
            return None;
        }
        s.closed = true;
        Some(Alone(self))
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let mut s = self.0.state.lock().unwrap();
        s.inside -= 1;
        if s.inside == 0 && s.closed {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().closed = false;
        self.0.changed.notify_all();
    }
}
