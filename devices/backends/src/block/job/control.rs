//! What a job is told while it works, and what it tells.

use super::Halt;
use crate::block::error::{Error, Result};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Which image an error came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that is read.
    Source,
    /// The one that is written.
    Target,
}

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// What cannot be copied is left out.
    Ignore,
    /// The job pauses, and tries again when it is resumed.
    Stop,
    /// Stop if there is no room, else report.
    Enospc,
}

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses.
    Stop,
}

/// What a job tells, on its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It stands still, as it was told to.
    Paused,
    /// It goes on.
    Resumed,
    /// The target holds what the source does, and follows it.
    Ready,
    /// An image could not be read or written.
    Error(Side, Action),
}

/// How far a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub offset: u64,
    /// Bytes to do in all; may change.
    pub len: u64,
    /// Bytes a second, at most; 0: no limit.
    pub speed: u64,
    /// Somebody paused it.
    pub paused: bool,
    /// The target follows the source.
    pub ready: bool,
    /// It stopped at an error; whether that was for want of room.
    pub stopped: Option<bool>,
}

#[derive(Default)]
struct State {
    progress: Progress,
    /// It stands still and has said so.
    parked: bool,
    /// Somebody cancelled it; whether also if it is ready.
    cancel: Option<bool>,
    /// Somebody wants it to end with what it is for.
    complete: bool,
    /// Somebody has work for it.
    poked: bool,
    /// When the speed allows the next piece.
    next: Option<Instant>,
}

type Tell = Box<dyn Fn(Notice) + Send + Sync>;

/// The lines between a job and whoever governs it.
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
    policy: [OnError; 2],
    tell: Tell,
}

impl Control {
    /// For a job of at most `speed` bytes a second. `tell` must not block.
    pub fn new(speed: u64, source: OnError, target: OnError, tell: Tell) -> Control {
        let progress = Progress { speed, ..Progress::default() };
        Control {
            state: Mutex::new(State { progress, ..State::default() }),
            changed: Condvar::new(),
            policy: [source, target],
            tell,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let result = f(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.lock().progress
    }
    /// Makes it stand still; returns whether it was not told so before.
    pub fn pause(&self) -> bool {
        self.change(|s| !std::mem::replace(&mut s.progress.paused, true))
    }
    /// Lets it go on; returns whether it was paused.
    pub fn resume(&self) -> bool {
        self.change(|s| {
            s.progress.stopped = None;
            std::mem::replace(&mut s.progress.paused, false)
        })
    }
    /// Ends it. One that is ready ends with the target as it is then, unless by `force`.
    pub fn cancel(&self, force: bool) {
        self.change(|s| s.cancel = Some(force || s.cancel == Some(true)));
    }
    /// Asks one that is ready to end with what it is for.
    pub fn complete(&self) {
        self.change(|s| s.complete = true);
    }
    /// Limits it to so many bytes a second; 0: no limit.
    pub fn set_speed(&self, speed: u64) {
        self.change(|s| {
            s.progress.speed = speed;
            s.next = None;
        });
    }

    /// There is more to do.
    pub(super) fn poke(&self) {
        let mut s = self.lock();
        if !std::mem::replace(&mut s.poked, true) {
            self.changed.notify_all();
        }
    }
    /// Says how much there is to do in all.
    pub(super) fn expect(&self, len: u64) {
        self.lock().progress.len = len;
    }
    /// Says how much is left.
    pub(super) fn remaining(&self, left: u64) {
        let mut s = self.lock();
        s.progress.len = s.progress.offset + left;
    }
    /// So many bytes are done; `moved` of them count for the speed.
    pub(super) fn advance(&self, bytes: u64, moved: u64) {
        let mut s = self.lock();
        s.progress.offset += bytes;
        if let Some(ns) = moved.saturating_mul(1_000_000_000).checked_div(s.progress.speed) {
            let now = Instant::now();
            let from = s.next.map_or(now, |n| n.max(now));
            s.next = Some(from + Duration::from_nanos(ns));
        }
    }
    /// Bytes to copy at once, at most: a tenth of a second's worth of the speed.
    pub(super) fn piece(&self, most: u64, least: u64) -> u64 {
        match self.progress().speed {
            0 => most,
            speed => (speed / 10).clamp(least, most) / least * least,
        }
    }
    /// The target follows the source from now on; returns whether that is new.
    pub(super) fn get_ready(&self) -> bool {
        let mut s = self.lock();
        let new = !std::mem::replace(&mut s.progress.ready, true);
        if new {
            (self.tell)(Notice::Ready);
        }
        new
    }

    /// Waits as long as the job is to stand still or to go slowly.
    pub(super) fn checkpoint(&self) -> std::result::Result<(), Halt> {
        let mut s = self.lock();
        loop {
            if s.cancelled() {
                return Err(Halt::Cancelled);
            }
            if s.progress.paused {
                if !std::mem::replace(&mut s.parked, true) {
                    (self.tell)(Notice::Paused);
                }
                s = self.changed.wait(s).unwrap();
                continue;
            }
            if std::mem::take(&mut s.parked) {
                (self.tell)(Notice::Resumed);
            }
            let wait = s.next.and_then(|n| n.checked_duration_since(Instant::now()));
            match wait.filter(|w| !w.is_zero()) {
                Some(w) => s = self.changed.wait_timeout(s, w).unwrap().0,
                None => return Ok(()),
            }
        }
    }

    /// Waits until there is more to do, or the job is to end; returns which.
    pub(super) fn idle(&self) -> std::result::Result<Idle, Halt> {
        loop {
            self.checkpoint()?;
            let mut s = self.lock();
            if s.cancel == Some(false) && s.progress.ready {
                return Ok(Idle::Leave);
            }
            if s.complete {
                return Ok(Idle::Complete);
            }
            if std::mem::take(&mut s.poked) {
                return Ok(Idle::Work);
            }
            if !s.progress.paused && !s.cancelled() {
                drop(self.changed.wait(s).unwrap());
            }
        }
    }

    /// Does something with an image, and what the policy says if it fails: nothing, if an error is
    /// to be ignored. Does not wait, as the caller may hold a claim.
    pub(super) fn attempt<T>(
        &self,
        side: Side,
        f: impl FnOnce() -> Result<T>,
    ) -> std::result::Result<Option<T>, Halt> {
        let e = match f() {
            Ok(v) => return Ok(Some(v)),
            Err(e) => e,
        };
        match self.judge(side, &e) {
            Action::Report => Err(Halt::Failed(e)),
            Action::Ignore => Ok(None),
            Action::Stop => Err(Halt::Again),
        }
    }

    /// Goes on after work that is to be tried again.
    pub(super) fn again<T>(
        &self,
        result: std::result::Result<T, Halt>,
    ) -> std::result::Result<Option<T>, Halt> {
        match result {
            Ok(v) => Ok(Some(v)),
            Err(Halt::Again) => self.checkpoint().map(|()| None),
            Err(e) => Err(e),
        }
    }

    fn judge(&self, side: Side, e: &Error) -> Action {
        let action = match self.policy[side as usize] {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if e.is_no_space() => Action::Stop,
            OnError::Enospc => Action::Report,
        };
        let mut s = self.lock();
        (self.tell)(Notice::Error(side, action));
        if action == Action::Stop {
            s.progress.paused = true;
            s.progress.stopped = Some(e.is_no_space());
        }
        action
    }
}

impl State {
    /// Whether it is to end without what it is for.
    fn cancelled(&self) -> bool {
        self.cancel.is_some_and(|force| force || !self.progress.ready)
    }
}

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// There is more to do.
    Work,
    /// It is to end with what it is for.
    Complete,
    /// It is to end with the target as it is.
    Leave,
}
