//! Keeps those who use something apart from those who change it: requests from the freeing of
//! clusters, and from a drive's change of image.

use std::sync::{Arc, Condvar, Mutex};

/// Counts requests in flight. Requests enter together; whoever changes what they use waits until
/// none is in flight, so that none still reads or writes what is not there any more.
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
/// Being inside with others, for those who outlive a call.
pub struct Pass(Arc<Gate>);

impl Gate {
    /// Enters with others.
    pub fn enter(&self) -> Shared<'_> {
        let s = self.state.lock().unwrap();
        let mut s = self.changed.wait_while(s, |s| s.closed).unwrap();
        s.inside += 1;
        Shared(self)
    }

    /// Enters with others, unless somebody is alone inside or waits to be.
    pub fn try_pass(self: &Arc<Gate>) -> Option<Pass> {
        let mut s = self.state.lock().unwrap();
        if s.closed {
            return None;
        }
        s.inside += 1;
        Some(Pass(self.clone()))
    }

    fn leave(&self) {
        let mut s = self.state.lock().unwrap();
        s.inside -= 1;
        if s.inside == 0 && s.closed {
            self.changed.notify_all();
        }
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
        self.0.leave();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().closed = false;
        self.0.changed.notify_all();
    }
}
