//! Jobs as clients see them: their names, states and what they may be told.
//!
//! ```text
//!   created ─► running ◄─► paused        waiting ─► pending ─► concluded ─► null
//!                 │                         ▲  (finalize)   (dismiss)
//!                 ├─► ready ◄─► standby ────┤
//!                 └─────────────────────────┘      from anywhere: aborting ─► concluded
//! ```
//!
//! The work is done on a thread of the job's own ([`tandem_backends::block::job`]); states change on
//! the main loop alone, and each change is an event. How events follow each other is QEMU's.

use super::Machine;
use super::inbox::{Event, Inbox};
use crate::commands::jobs::events::*;
use crate::commands::jobs::{BlockErrorAction, IoStatus};
use crate::commands::jobs::{IoOperation, JobStatus, JobType, JobVerb};
use crate::qapi::{self, Error, Result};
use std::sync::Arc;
use std::thread::JoinHandle;
use tandem_backends::block;
use tandem_backends::block::job::{Action, Control, Notice, OnError, Progress, Side};

/// What the work of a job came to.
pub enum Outcome {
    /// It is done; the target shall take the source's place, where that is a question.
    Done {
        /// Whether it shall.
        replace: bool,
    },
    /// Somebody cancelled it.
    Cancelled,
}

/// How work fared.
pub type Fared = block::Result<Outcome>;
/// The work of a job, on its thread.
pub type Work = Box<dyn FnOnce() -> Fared + Send>;
/// The end of a job, on the main loop: whether the target shall take the source's place, or `None`
/// after a failure.
pub type Finish = Box<dyn FnOnce(&mut Machine, Option<bool>) -> Result<()> + Send>;

/// What a client says about a job that it starts.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Its name.
    pub id: String,
    /// Kind.
    pub kind: JobType,
    /// It ends without being told to.
    pub auto_finalize: bool,
    /// It vanishes without being told to.
    pub auto_dismiss: bool,
}

/// A job.
pub struct Job {
    /// Tells it from another of the same name.
    serial: u64,
    wish: Wish,
    status: JobStatus,
    control: Arc<Control>,
    /// Names of the nodes that it uses; the first is the one whose disk it is about.
    nodes: Vec<String>,
    work: Option<Work>,
    thread: Option<JoinHandle<()>>,
    finish: Option<Finish>,
    /// Whether the target shall take the source's place.
    replace: bool,
    error: Option<String>,
    blocking: Option<Arc<tandem_backends::block::job::mirror::Mirror>>,
}

impl Job {
    /// What the client said about it.
    pub fn wish(&self) -> &Wish {
        &self.wish
    }
    /// Its state.
    pub fn status(&self) -> JobStatus {
        self.status
    }
    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.control.progress()
    }
    /// Why it failed.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }
    /// Whether it works at this moment.
    pub fn busy(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
            && matches!(self.status, JobStatus::Running)
    }
    /// How its last request fared.
    pub fn io_status(&self) -> IoStatus {
        match self.progress().stopped {
            None => IoStatus::Ok,
            Some(false) => IoStatus::Failed,
            Some(true) => IoStatus::Nospace,
        }
    }
    /// The mirror that does its work, if one does.
    pub fn mirror(&self) -> Option<&Arc<tandem_backends::block::job::mirror::Mirror>> {
        self.blocking.as_ref()
    }
}

/// All jobs.
#[derive(Default)]
pub struct Jobs {
    all: Vec<Job>,
    next: u64,
}

impl Jobs {
    /// All, oldest first.
    pub fn all(&self) -> &[Job] {
        &self.all
    }

    fn get(&mut self, serial: u64) -> Option<&mut Job> {
        self.all.iter_mut().find(|j| j.serial == serial)
    }

    /// Names of the nodes of a copy: source and target.
    pub fn nodes_of(&self, serial: u64) -> Option<(String, String)> {
        let job = self.all.iter().find(|j| j.serial == serial)?;
        Some((job.nodes.first()?.clone(), job.nodes.get(1)?.clone()))
    }

    /// The job that uses a node.
    pub fn user_of(&self, node: &str) -> Option<&'static str> {
        let uses = |j: &&Job| {
            !matches!(j.status, JobStatus::Concluded) && j.nodes.iter().any(|n| n == node)
        };
        self.all.iter().find(uses).map(|j| j.wish.kind.word())
    }

    /// A job other than a backup that is about the disk of a node.
    pub fn changing(&self, node: &str) -> Option<&'static str> {
        let about = |j: &&Job| {
            let first = j.nodes.first().is_some_and(|n| n == node);
            first && j.wish.kind != JobType::Backup && j.status != JobStatus::Concluded
        };
        self.all.iter().find(about).map(|j| j.wish.kind.word())
    }

    /// Two nodes have exchanged their names.
    pub fn rename(&mut self, a: &str, b: &str) {
        for name in self.all.iter_mut().flat_map(|j| &mut j.nodes) {
            match name.as_str() {
                n if n == a => *name = b.into(),
                n if n == b => *name = a.into(),
                _ => {}
            }
        }
    }

    /// Ends all work; the machine is at its end.
    pub fn end(&mut self) {
        self.all.iter().for_each(|j| j.control.cancel(true));
        for thread in self.all.iter_mut().filter_map(|j| j.thread.take()) {
            let _ = thread.join();
        }
        self.all.clear();
    }
}

/// The control of a job whose notices go to the main loop.
fn control(inbox: &Arc<Inbox>, serial: u64, speed: u64, policy: [OnError; 2]) -> Arc<Control> {
    let inbox = inbox.clone();
    let tell = move |notice| {
        let job = move |vm: &mut Machine| vm.job_notice(serial, notice);
        inbox.post(Event::Job(Box::new(job)));
    };
    Arc::new(Control::new(speed, policy[0], policy[1], Box::new(tell)))
}

/// A job being made: its name is good and free.
pub struct Draft {
    /// The number that it will have.
    pub serial: u64,
    wish: Wish,
    /// For the work.
    pub control: Arc<Control>,
}

impl Machine {
    /// All jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Begins to make a job.
    pub fn draft_job(&mut self, wish: Wish, speed: u64, policy: [OnError; 2]) -> Result<Draft> {
        if !qapi::is_well_formed_id(&wish.id) {
            return Err(Error::new(format!("Invalid job ID '{}'", wish.id)));
        }
        if self.jobs.all.iter().any(|j| j.wish.id == wish.id) {
            return Err(Error::new(format!("Job ID '{}' already in use", wish.id)));
        }
        self.jobs.next += 1;
        let serial = self.jobs.next;
        Ok(Draft { serial, control: control(&self.inbox, serial, speed, policy), wish })
    }

    /// Makes the job, which does not work yet; returns its number for [`Machine::run_job`].
    pub fn create_job(
        &mut self,
        draft: Draft,
        nodes: Vec<String>,
        mirror: Option<Arc<tandem_backends::block::job::mirror::Mirror>>,
        work: Work,
        finish: Finish,
    ) -> u64 {
        let serial = draft.serial;
        self.jobs.all.push(Job {
            serial,
            wish: draft.wish,
            status: JobStatus::Undefined,
            control: draft.control,
            nodes,
            work: Some(work),
            thread: None,
            finish: Some(finish),
            replace: false,
            error: None,
            blocking: mirror,
        });
        self.job_status(serial, JobStatus::Created);
        serial
    }

    /// Lets a job work.
    pub fn run_job(&mut self, serial: u64) {
        self.job_status(serial, JobStatus::Running);
        let inbox = self.inbox.clone();
        let Some(job) = self.jobs.get(serial) else { return };
        let Some(work) = job.work.take() else { return };
        let body = move || {
            let fared = work();
            inbox.post(Event::Job(Box::new(move |vm: &mut Machine| vm.job_ended(serial, fared))));
        };
        let name = job.wish.kind.word().to_string();
        match std::thread::Builder::new().name(name).spawn(body) {
            Ok(thread) => job.thread = Some(thread),
            Err(e) => {
                let e = block::Error::io("start a thread for a job", e);
                self.job_ended(serial, Err(e));
            }
        }
    }

    fn job_status(&mut self, serial: u64, status: JobStatus) {
        let Some(job) = self.jobs.get(serial) else { return };
        if std::mem::replace(&mut job.status, status) != status {
            let id = job.wish.id.clone();
            self.hub.emit(JobStatusChange { id, status });
        }
    }

    fn job_notice(&mut self, serial: u64, notice: Notice) {
        use JobStatus::*;
        let Some(job) = self.jobs.get(serial) else { return };
        let (status, p) = (job.status, job.control.progress());
        let (device, r#type) = (job.wish.id.clone(), job.wish.kind);
        match (notice, status) {
            (Notice::Paused, Running) => self.job_status(serial, Paused),
            (Notice::Paused, Ready) => self.job_status(serial, Standby),
            (Notice::Resumed, Paused) => self.job_status(serial, Running),
            (Notice::Resumed, Standby) => self.job_status(serial, Ready),
            (Notice::Ready, _) => {
                self.job_status(serial, Ready);
                let (len, offset, speed) = (p.len, p.offset, p.speed);
                self.hub.emit(BlockJobReady { r#type, device, len, offset, speed });
            }
            (Notice::Error(side, action), _) => self.hub.emit(BlockJobError {
                device,
                operation: match side {
                    Side::Source => IoOperation::Read,
                    Side::Target => IoOperation::Write,
                },
                action: match action {
                    Action::Report => BlockErrorAction::Report,
                    Action::Ignore => BlockErrorAction::Ignore,
                    Action::Stop => BlockErrorAction::Stop,
                },
            }),
            _ => {}
        }
    }

    /// The work of a job has ended.
    fn job_ended(&mut self, serial: u64, fared: Fared) {
        let Some(job) = self.jobs.get(serial) else { return };
        if let Some(thread) = job.thread.take() {
            // It has posted this as its last act.
            let _ = thread.join();
        }
        match fared {
            Ok(Outcome::Done { replace }) => {
                job.replace = replace;
                let (auto, kind, id) = (job.wish.auto_finalize, job.wish.kind, job.wish.id.clone());
                self.job_status(serial, JobStatus::Waiting);
                self.job_status(serial, JobStatus::Pending);
                match auto {
                    true => self.job_finalize(serial),
                    false if kind.is_block() => {
                        self.hub.emit(BlockJobPending { r#type: kind, id });
                    }
                    false => {}
                }
            }
            Ok(Outcome::Cancelled) => self.job_abort(serial, None),
            Err(e) => self.job_abort(serial, Some(e.chain())),
        }
    }

    fn job_finalize(&mut self, serial: u64) {
        let Some(job) = self.jobs.get(serial) else { return };
        let (finish, replace) = (job.finish.take(), job.replace);
        match finish.map_or(Ok(()), |f| f(self, Some(replace))) {
            Ok(()) => self.job_conclude(serial, false),
            Err(e) => self.job_abort(serial, Some(e.text)),
        }
    }

    /// Ends a job without what it is for: after an error, or cancelled.
    pub fn job_abort(&mut self, serial: u64, error: Option<String>) {
        self.job_status(serial, JobStatus::Aborting);
        let Some(job) = self.jobs.get(serial) else { return };
        let cancelled = error.is_none();
        job.error = error;
        if let Some(finish) = job.finish.take()
            && let Err(e) = finish(self, None)
        {
            log::warn!("a job that failed left something behind: {e}");
        }
        self.job_conclude(serial, cancelled);
    }

    fn job_conclude(&mut self, serial: u64, cancelled: bool) {
        let Some(job) = self.jobs.get(serial) else { return };
        let (p, r#type) = (job.control.progress(), job.wish.kind);
        let (device, dismiss) = (job.wish.id.clone(), job.wish.auto_dismiss);
        let (len, offset, speed, error) = (p.len, p.offset, p.speed, job.error.clone());
        if cancelled {
            job.error = Some("Operation canceled".into());
        }
        // One that never ran says nothing of itself.
        let ran = job.work.is_none();
        if r#type.is_block() && ran {
            match cancelled {
                true => self.hub.emit(BlockJobCancelled { r#type, device, len, offset, speed }),
                false => {
                    self.hub.emit(BlockJobCompleted { r#type, device, len, offset, speed, error });
                }
            }
        }
        self.job_status(serial, JobStatus::Concluded);
        self.sweep_nodes();
        if dismiss {
            self.job_dismiss(serial);
        }
    }

    fn job_dismiss(&mut self, serial: u64) {
        self.job_status(serial, JobStatus::Null);
        self.jobs.all.retain(|j| j.serial != serial);
    }

    /// Tells a job to do something.
    pub fn tell_job(&mut self, id: &str, verb: JobVerb) -> Result<()> {
        let found = self.jobs.all.iter().find(|j| j.wish.id == id);
        let job = found.ok_or_else(|| Error::new("Job not found"))?;
        let (serial, status, control) = (job.serial, job.status, job.control.clone());
        if !verb.fits(status) {
            return Err(Error::new(format!(
                "Job '{id}' in state '{}' cannot accept command verb '{}'",
                status.word(),
                verb.word()
            )));
        }
        match verb {
            JobVerb::Pause if !control.pause() => Err(Error::new("Job is already paused")),
            JobVerb::Resume if !control.resume() => {
                Err(Error::new("Can't resume a job that was not paused"))
            }
            JobVerb::Pause | JobVerb::Resume => Ok(()),
            JobVerb::Cancel { force } => {
                match status {
                    JobStatus::Pending => self.job_abort(serial, None),
                    _ => control.cancel(force),
                }
                Ok(())
            }
            JobVerb::Complete => {
                control.complete();
                Ok(())
            }
            JobVerb::SetSpeed(speed) => {
                control.set_speed(speed);
                Ok(())
            }
            JobVerb::Finalize => {
                self.job_finalize(serial);
                Ok(())
            }
            JobVerb::Dismiss => {
                self.job_dismiss(serial);
                Ok(())
            }
        }
    }
}
