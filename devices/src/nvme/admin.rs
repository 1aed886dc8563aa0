//! Admin commands: queues, features, and what the controller tells of itself (NVM Express Base 1.4
//! §5).

use super::command::{Command, PAGE, Status};
use super::controller::{Controller, MAX_ENTRIES, State};
use super::identify::{self, MAX_EVENTS};
use super::queue::{Completion, End, Submission};
use tandem_accel::memory::GuestRam;

/// Commands.
mod op {
    pub const DELETE_SUBMISSION: u8 = 0x00;
    pub const CREATE_SUBMISSION: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_COMPLETION: u8 = 0x04;
    pub const CREATE_COMPLETION: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const EVENT_REQUEST: u8 = 0x0c;
}

/// Features (§5.21.1).
mod feature {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER: u8 = 0x02;
    pub const TEMPERATURE: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const WRITE_CACHE: u8 = 0x06;
    pub const QUEUES: u8 = 0x07;
    pub const COALESCING: u8 = 0x08;
    pub const VECTOR: u8 = 0x09;
    pub const ATOMICITY: u8 = 0x0a;
    pub const EVENTS: u8 = 0x0b;
}

/// What Set Features has set, of what is only remembered.
#[derive(Debug, Default)]
pub struct Features {
    arbitration: u32,
    temperature: [u32; 2],
    recovery: u32,
    coalescing: u32,
    atomicity: u32,
    events: u32,
}

/// What comes of a command.
pub enum Reply {
    /// It is done.
    Done(End),
    /// It is kept until there is an event.
    Kept,
    /// It waits for commands of a queue that is to go.
    Waits,
}

impl From<Status> for Reply {
    fn from(s: Status) -> Reply {
        Reply::Done(s.into())
    }
}

/// Executes a command of the admin queue. `is_busy` says whether a queue's commands are with the
/// drive.
pub fn execute(
    controller: &Controller,
    s: &mut State,
    c: &Command,
    ram: &GuestRam,
    is_busy: fn(&State, u16) -> bool,
) -> Reply {
    let (id, size) = (c.words[0] as u16, (c.words[0] >> 16).saturating_add(1));
    let done = |r: Result<(), Status>| r.err().unwrap_or(Status::OK).into();
    match c.opcode {
        op::DELETE_SUBMISSION => {
            if s.submissions.get(usize::from(id)).is_some() && id != 0 && is_busy(s, id) {
                return Reply::Waits;
            }
            done(delete_submission(s, id))
        }
        op::CREATE_SUBMISSION => done(create_submission(s, c, id, size)),
        op::DELETE_COMPLETION => done(delete_completion(s, id)),
        op::CREATE_COMPLETION => done(create_completion(controller, s, c, id, size)),
        op::IDENTIFY => done(identify(controller, c, ram)),
        op::GET_LOG_PAGE => done(log_page(c, ram)),
        // Nothing can be called back; result bit 0 says so.
        op::ABORT => Reply::Done(End { status: Status::OK, result: 1 }),
        op::SET_FEATURES => match set(controller, s, c) {
            Ok(result) => Reply::Done(End { status: Status::OK, result }),
            Err(status) => status.into(),
        },
        op::GET_FEATURES => match get(controller, s, c) {
            Ok(result) => Reply::Done(End { status: Status::OK, result }),
            Err(status) => status.into(),
        },
        op::EVENT_REQUEST => {
            if s.events.len() > usize::from(MAX_EVENTS) {
                return Status::EVENTS.into();
            }
            // There is never an event.
            s.events.push(c.id);
            Reply::Kept
        }
        _ => Status::OPCODE.into(),
    }
}

/// Base and length of a queue to be made.
fn ring(c: &Command, size: u32) -> Result<(u64, u16), Status> {
    if size < 2 || size > MAX_ENTRIES.into() {
        return Err(Status::QUEUE_SIZE);
    }
    // Contiguous, from a page on.
    if c.words[1] & 1 == 0 {
        return Err(Status::FIELD);
    }
    if !c.address().is_multiple_of(PAGE) {
        return Err(Status::PRP_OFFSET);
    }
    Ok((c.address(), size as u16))
}

fn create_completion(
    controller: &Controller,
    s: &mut State,
    c: &Command,
    id: u16,
    size: u32,
) -> Result<(), Status> {
    let place = s.completions.get_mut(usize::from(id)).filter(|q| q.is_none());
    let place = place.ok_or(Status::QUEUE_ID)?;
    let (base, size) = ring(c, size)?;
    let vector = (c.words[1] >> 16) as u16;
    if vector >= controller.msix.vectors() {
        return Err(Status::VECTOR);
    }
    *place = Some(Completion::new(base, size, (c.words[1] & 2 != 0).then_some(vector)));
    Ok(())
}

fn create_submission(s: &mut State, c: &Command, id: u16, size: u32) -> Result<(), Status> {
    let place = s.submissions.get_mut(usize::from(id)).filter(|q| q.is_none());
    let place = place.ok_or(Status::QUEUE_ID)?;
    let to = (c.words[1] >> 16) as u16;
    // Not the admin queue's.
    let completion = s.completions.get_mut(usize::from(to)).and_then(Option::as_mut);
    let completion = completion.filter(|_| to != 0).ok_or(Status::NO_CQ)?;
    let (base, size) = ring(c, size)?;
    completion.users += 1;
    *place = Some(Submission::new(base, size, to));
    Ok(())
}

fn delete_submission(s: &mut State, id: u16) -> Result<(), Status> {
    let place = s.submissions.get_mut(usize::from(id)).filter(|_| id != 0);
    let gone = place.and_then(Option::take).ok_or(Status::QUEUE_ID)?;
    if let Some(c) = s.completions.get_mut(usize::from(gone.completion)).and_then(Option::as_mut) {
        c.users = c.users.saturating_sub(1);
    }
    Ok(())
}

fn delete_completion(s: &mut State, id: u16) -> Result<(), Status> {
    let place = s.completions.get_mut(usize::from(id)).filter(|_| id != 0);
    let place = place.filter(|p| p.is_some()).ok_or(Status::QUEUE_ID)?;
    if place.as_ref().is_some_and(|c| c.users > 0) {
        return Err(Status::DELETION);
    }
    *place = None;
    Ok(())
}

/// Copies an answer to where the command says.
fn answer(c: &Command, ram: &GuestRam, bytes: &[u8]) -> Result<(), Status> {
    let spans = c.data(ram, bytes.len() as u64)?;
    spans.write(ram, bytes).then_some(()).ok_or(Status::TRANSFER)
}

fn identify(controller: &Controller, c: &Command, ram: &GuestRam) -> Result<(), Status> {
    let facts = &controller.facts;
    let bytes = match c.words[0] & 0xff {
        0 if c.namespace == 1 || c.namespace == u32::MAX => facts.namespace(),
        0 | 3 if c.namespace != 1 => return Err(Status::NAMESPACE),
        1 => facts.controller(),
        2 if c.namespace >= 0xffff_fffe => return Err(Status::NAMESPACE),
        2 => facts.list(c.namespace),
        3 => facts.descriptors(),
        _ => return Err(Status::FIELD),
    };
    answer(c, ram, &bytes)
}

fn log_page(c: &Command, ram: &GuestRam) -> Result<(), Status> {
    let words = u64::from(c.words[0] >> 16 | (c.words[1] & 0xffff) << 16) + 1;
    let offset = u64::from(c.words[2]) | u64::from(c.words[3]) << 32;
    let page = identify::log(c.words[0] as u8).ok_or(Status::LOG_PAGE)?;
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = page.get(from..).filter(|_| offset & 3 == 0).ok_or(Status::FIELD)?;
    let n = rest.len().min(usize::try_from(words.saturating_mul(4)).unwrap_or(usize::MAX));
    answer(c, ram, rest.get(..n).unwrap_or_default())
}

/// The two temperature thresholds of the composite temperature, over and under.
fn threshold(word: u32) -> Result<usize, Status> {
    match (word >> 16 & 0xf, word >> 20 & 3) {
        (0, kind @ (0 | 1)) => Ok(kind as usize),
        _ => Err(Status::FIELD),
    }
}

/// Number of pairs of queues, as a feature's value.
fn queues(controller: &Controller) -> u32 {
    let n = u32::from(controller.pairs) - 1;
    n | n << 16
}

fn set(controller: &Controller, s: &mut State, c: &Command) -> Result<u32, Status> {
    // Nothing is saved.
    if c.words[0] >> 31 != 0 {
        return Err(Status(0x10d));
    }
    let value = c.words[1];
    let f = &mut s.features;
    match c.words[0] as u8 {
        feature::ARBITRATION => f.arbitration = value,
        feature::POWER if value & 0x1f == 0 => {}
        feature::TEMPERATURE => f.temperature[threshold(value)?] = value & 0xffff,
        feature::ERROR_RECOVERY => f.recovery = value,
        feature::WRITE_CACHE => controller.drive().set_writeback(value & 1 != 0),
        feature::QUEUES if value & 0xffff != 0xffff && value >> 16 != 0xffff => {
            return Ok(queues(controller));
        }
        feature::COALESCING => f.coalescing = value & 0xffff,
        feature::VECTOR => {}
        feature::ATOMICITY => f.atomicity = value,
        feature::EVENTS => f.events = value,
        _ => return Err(Status::FIELD),
    }
    Ok(0)
}

fn get(controller: &Controller, s: &State, c: &Command) -> Result<u32, Status> {
    let f = &s.features;
    let default = c.words[0] >> 8 & 7 == 1;
    Ok(match c.words[0] as u8 {
        feature::ARBITRATION => f.arbitration,
        feature::POWER => 0,
        feature::TEMPERATURE => match threshold(c.words[1])? {
            0 if default || f.temperature[0] == 0 => 343,
            kind => f.temperature[kind],
        },
        feature::ERROR_RECOVERY => f.recovery,
        feature::WRITE_CACHE => controller.drive().writeback().into(),
        feature::QUEUES => queues(controller),
        feature::COALESCING => f.coalescing,
        feature::VECTOR if c.words[1] & 0xffff < controller.msix.vectors().into() => {
            // Without coalescing.
            c.words[1] & 0xffff | 1 << 16
        }
        feature::ATOMICITY => f.atomicity,
        feature::EVENTS => f.events,
        _ => return Err(Status::FIELD),
    })
}
