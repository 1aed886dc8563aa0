//! Jobs: lists of them, and what they can be told.

use crate::machine::Machine;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};

crate::choice! {
    /// What a job does.
    pub enum JobType {
        /// Writes what images hold into one behind them.
        Commit = "commit",
        /// Writes what images behind hold into the frontmost.
        Stream = "stream",
        /// Copies a disk and follows its changes.
        Mirror = "mirror",
        /// Copies a disk as it is when the job begins.
        Backup = "backup",
        /// Makes an image.
        Create = "create",
    }
    /// What a job is at.
    pub enum JobStatus {
        /// Nothing yet.
        Undefined = "undefined",
        /// It is made and does not work yet.
        Created = "created",
        /// It works.
        Running = "running",
        /// It stands still.
        Paused = "paused",
        /// It follows changes, and waits to be completed.
        Ready = "ready",
        /// The same, and it stands still.
        Standby = "standby",
        /// It waits for other jobs of its transaction.
        Waiting = "waiting",
        /// It waits to be finalized.
        Pending = "pending",
        /// It failed or was cancelled, and cleans up.
        Aborting = "aborting",
        /// It is over, and waits to be dismissed.
        Concluded = "concluded",
        /// It is gone.
        Null = "null",
    }
    /// How requests fare.
    pub enum IoStatus {
        /// They succeed.
        Ok = "ok",
        /// The last one failed.
        Failed = "failed",
        /// The last one failed for want of room.
        Nospace = "nospace",
    }
    /// A direction.
    pub enum IoOperation {
        /// Reading.
        Read = "read",
        /// Writing.
        Write = "write",
    }
    /// What was done about an error.
    pub enum BlockErrorAction {
        /// It is left out.
        Ignore = "ignore",
        /// The job fails.
        Report = "report",
        /// The job pauses.
        Stop = "stop",
    }
}

impl JobType {
    /// Whether it is about a disk in use.
    pub fn is_block(self) -> bool {
        self != JobType::Create
    }
}

/// What a job can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobVerb {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// End without what it is for; also one that is ready if by force.
    Cancel {
        /// By force.
        force: bool,
    },
    /// End with what it is for.
    Complete,
    /// Copy at most so many bytes a second; 0: no limit.
    SetSpeed(u64),
    /// Do what is to be done in the end.
    Finalize,
    /// Vanish.
    Dismiss,
}

impl JobVerb {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            JobVerb::Pause => "pause",
            JobVerb::Resume => "resume",
            JobVerb::Cancel { .. } => "cancel",
            JobVerb::Complete => "complete",
            JobVerb::SetSpeed(_) => "set-speed",
            JobVerb::Finalize => "finalize",
            JobVerb::Dismiss => "dismiss",
        }
    }

    /// Whether a job in this state can be told so.
    pub fn fits(self, status: JobStatus) -> bool {
        use JobStatus::*;
        match self {
            JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed(_) => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            JobVerb::Cancel { .. } => {
                matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            JobVerb::Complete => status == Ready,
            JobVerb::Finalize => status == Pending,
            JobVerb::Dismiss => status == Concluded,
        }
    }
}

/// Events of jobs.
pub mod events {
    use super::{BlockErrorAction, IoOperation, JobStatus, JobType};

    crate::events! {
        /// A job is at something else.
        JobStatusChange = "JOB_STATUS_CHANGE" {
            /// Its name.
            id: String,
            /// What it is at now.
            status: JobStatus,
        }
        /// A job on a disk is over.
        BlockJobCompleted = "BLOCK_JOB_COMPLETED" {
            /// Kind of the job.
            r#type: JobType,
            /// Its name.
            device: String,
            /// Bytes to do in all.
            len: u64,
            /// Bytes done.
            offset: u64,
            /// Its limit in bytes a second; 0 is none.
            speed: u64,
            /// Why it failed.
            error: Option<String>,
        }
        /// A job on a disk was cancelled.
        BlockJobCancelled = "BLOCK_JOB_CANCELLED" {
            /// Kind of the job.
            r#type: JobType,
            /// Its name.
            device: String,
            /// Bytes to do in all.
            len: u64,
            /// Bytes done.
            offset: u64,
            /// Its limit in bytes a second; 0 is none.
            speed: u64,
        }
        /// An image could not be read or written.
        BlockJobError = "BLOCK_JOB_ERROR" {
            /// Name of the job.
            device: String,
            /// What failed.
            operation: IoOperation,
            /// What was done about it.
            action: BlockErrorAction,
        }
        /// A job waits to be completed.
        BlockJobReady = "BLOCK_JOB_READY" {
            /// Kind of the job.
            r#type: JobType,
            /// Its name.
            device: String,
            /// Bytes to do in all.
            len: u64,
            /// Bytes done.
            offset: u64,
            /// Its limit in bytes a second; 0 is none.
            speed: u64,
        }
        /// A job waits to be finalized.
        BlockJobPending = "BLOCK_JOB_PENDING" {
            /// Kind of the job.
            r#type: JobType,
            /// Its name.
            id: String,
        }
    }
}

crate::object! {
    /// A job.
    pub struct JobInfo {
        /// Name.
        id: String,
        /// Kind.
        r#type: JobType,
        /// What it is at.
        status: JobStatus,
        /// Progress.
        current_progress: u64,
        /// What progress will be in the end.
        total_progress: u64,
        /// Why it failed.
        error: Option<String>,
    }
    /// A job on a disk.
    pub struct BlockJobInfo {
        /// Kind.
        r#type: JobType,
        /// Name.
        device: String,
        /// Bytes to do in all.
        len: u64,
        /// Bytes done.
        offset: u64,
        /// It works at this moment.
        busy: bool,
        /// Somebody paused it.
        paused: bool,
        /// Its limit in bytes a second; 0 is none.
        speed: u64,
        /// How its requests fare.
        io_status: IoStatus,
        /// It waits to be completed.
        ready: bool,
        /// What it is at.
        status: JobStatus,
        /// It ends without being told to.
        auto_finalize: bool,
        /// It vanishes without being told to.
        auto_dismiss: bool,
        /// Why it failed.
        error: Option<String>,
        /// A mirror's target has every change before the guest is told that it is done.
        actively_synced: Option<bool>,
    }
}

fn jobs(vm: &Machine) -> Vec<JobInfo> {
    let one = |j: &crate::machine::jobs::Job| {
        let p = j.progress();
        JobInfo {
            id: j.wish().id.clone(),
            r#type: j.wish().kind,
            status: j.status(),
            current_progress: p.offset,
            total_progress: p.len,
            error: j.error().map(str::to_string),
        }
    };
    vm.jobs().all().iter().map(one).collect()
}

fn block_jobs(vm: &Machine) -> Vec<BlockJobInfo> {
    let one = |j: &crate::machine::jobs::Job| {
        let (p, w) = (j.progress(), j.wish());
        BlockJobInfo {
            r#type: w.kind,
            device: w.id.clone(),
            len: p.len,
            offset: p.offset,
            busy: j.busy(),
            paused: p.paused,
            speed: p.speed,
            io_status: j.io_status(),
            ready: p.ready,
            status: j.status(),
            auto_finalize: w.auto_finalize,
            auto_dismiss: w.auto_dismiss,
            error: j.error().map(str::to_string),
            actively_synced: (w.kind == JobType::Mirror)
                .then(|| j.mirror().is_some_and(|m| p.ready && m.blocks_writes())),
        }
    };
    vm.jobs().all().iter().filter(|j| j.wish().kind.is_block()).map(one).collect()
}

fn tell(vm: &mut Machine, id: &str, verb: JobVerb) -> Result<Nothing> {
    vm.tell_job(id, verb).map(|()| Nothing {})
}

/// The same for a command that knows jobs on disks only.
fn tell_block(vm: &mut Machine, id: &str, verb: JobVerb) -> Result<Nothing> {
    let found = vm.jobs().all().iter().find(|j| j.wish().id == id && j.wish().kind.is_block());
    match found {
        Some(j) if matches!(verb, JobVerb::Cancel { force: false }) && j.progress().paused => {
            let text = format!("The block job for device '{id}' is currently paused");
            Err(Error::new(text))
        }
        Some(_) => tell(vm, id, verb),
        None => Err(Error::not_active(format!("Block job '{id}' not found"))),
    }
}

crate::commands! {
    /// Lists jobs.
    fn "query-jobs"(cx) -> Vec<JobInfo> { Ok(jobs(cx.vm)) }

    /// Makes a job stand still.
    fn "job-pause"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Pause) }

    /// Lets a job go on.
    fn "job-resume"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Resume) }

    /// Ends a job without what it is for.
    fn "job-cancel"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Cancel { force: true }) }

    /// Ends a job that is ready with what it is for.
    fn "job-complete"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Complete) }

    /// Does what is to be done in the end of a job that was started with auto-finalize false.
    fn "job-finalize"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Finalize) }

    /// Removes a job that is over and was started with auto-dismiss false.
    fn "job-dismiss"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell(cx.vm, &id, JobVerb::Dismiss) }

    /// Lists jobs on disks.
    fn "query-block-jobs"(cx) -> Vec<BlockJobInfo> { Ok(block_jobs(cx.vm)) }

    /// Limits a job.
    fn "block-job-set-speed"(cx, {
        /// Its name.
        device: String,
        /// Bytes a second, at most; 0: no limit.
        speed: u64,
    }) -> Nothing { tell_block(cx.vm, &device, JobVerb::SetSpeed(speed)) }

    /// Ends a job without what it is for. A mirror that is ready ends with the target as a copy,
    /// unless by force.
    fn "block-job-cancel"(cx, {
        /// Its name.
        device: String,
        /// Also when it is ready or paused.
        force: Option<bool>,
    }) -> Nothing {
        tell_block(cx.vm, &device, JobVerb::Cancel { force: force.unwrap_or(false) })
    }

    /// Makes a job stand still.
    fn "block-job-pause"(cx, {
        /// Its name.
        device: String,
    }) -> Nothing { tell_block(cx.vm, &device, JobVerb::Pause) }

    /// Lets a job go on.
    fn "block-job-resume"(cx, {
        /// Its name.
        device: String,
    }) -> Nothing { tell_block(cx.vm, &device, JobVerb::Resume) }

    /// Ends a job that is ready with what it is for.
    fn "block-job-complete"(cx, {
        /// Its name.
        device: String,
    }) -> Nothing { tell_block(cx.vm, &device, JobVerb::Complete) }

    /// Does what is to be done in the end of a job that was started with auto-finalize false.
    fn "block-job-finalize"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell_block(cx.vm, &id, JobVerb::Finalize) }

    /// Removes a job that is over and was started with auto-dismiss false.
    fn "block-job-dismiss"(cx, {
        /// Its name.
        id: String,
    }) -> Nothing { tell_block(cx.vm, &id, JobVerb::Dismiss) }
}
