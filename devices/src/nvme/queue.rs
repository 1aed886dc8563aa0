//! Submission and completion queues: rings in guest memory (NVM Express Base 1.4 §4.1, §4.6).

use super::command::{Command, LEN, Status};
use tandem_accel::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// A submission queue.
#[derive(Debug)]
pub struct Submission {
    base: u64,
    size: u16,
    head: u16,
    tail: u16,
    /// Its completion queue.
    pub completion: u16,
}

impl Submission {
    /// A queue of `size` entries (at least 2) at `base`.
    pub fn new(base: u64, size: u16, completion: u16) -> Submission {
        Submission { base, size, head: 0, tail: 0, completion }
    }

    /// The doorbell: returns whether the value makes sense.
    pub fn set_tail(&mut self, tail: u32) -> bool {
        let good = tail < u32::from(self.size);
        if good {
            self.tail = tail as u16;
        }
        good
    }

    /// Whether there is a command.
    pub fn has_more(&self) -> bool {
        self.head != self.tail
    }

    /// The next command, left where it is; `None` if it is not in memory.
    pub fn peek(&self, ram: &GuestRam) -> Option<Command> {
        let mut b = [0; LEN];
        let at = self.base.checked_add(u64::from(self.head) * LEN as u64)?;
        ram.read_slice(&mut b, GuestAddress(at)).ok()?;
        Some(Command::new(&b))
    }

    /// Takes the next command off.
    pub fn advance(&mut self) {
        self.head = (self.head + 1) % self.size;
    }

    /// Where the next command is taken from.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct Completion {
    base: u64,
    size: u16,
    head: u16,
    tail: u16,
    phase: bool,
    /// The interrupt vector, if it interrupts.
    pub vector: Option<u16>,
    /// Commands that will complete here.
    pub expected: u16,
    /// Submission queues that use it.
    pub users: u16,
}

impl Completion {
    const ENTRY: u64 = 16;

    /// A queue of `size` entries (at least 2) at `base`.
    pub fn new(base: u64, size: u16, vector: Option<u16>) -> Completion {
        Completion { base, size, head: 0, tail: 0, phase: true, vector, expected: 0, users: 0 }
    }

    /// The doorbell: returns whether the value makes sense.
    pub fn set_head(&mut self, head: u32) -> bool {
        let good = head < u32::from(self.size);
        if good {
            self.head = head as u16;
        }
        good
    }

    /// Whether the host has not yet seen everything.
    pub fn is_pending(&self) -> bool {
        self.head != self.tail
    }

    /// Whether one more command may complete here.
    pub fn has_room(&self) -> bool {
        let used = (u32::from(self.tail) + u32::from(self.size) - u32::from(self.head))
            % u32::from(self.size);
        used + u32::from(self.expected) + 1 < u32::from(self.size)
    }

    /// Tells the host that command `id` of queue `from`, whose head is `head`, is done. There is
    /// room: it was asked for. Returns false if the queue is not in memory.
    pub fn post(&mut self, ram: &GuestRam, (from, head): (u16, u16), id: u16, end: End) -> bool {
        let Some(at) = self.base.checked_add(u64::from(self.tail) * Completion::ENTRY) else {
            return false;
        };
        let mut e = [0; 16];
        e[..4].copy_from_slice(&end.result.to_le_bytes());
        e[8..10].copy_from_slice(&head.to_le_bytes());
        e[10..12].copy_from_slice(&from.to_le_bytes());
        e[12..14].copy_from_slice(&id.to_le_bytes());
        e[14..].copy_from_slice(&(end.status.field() << 1 | u16::from(self.phase)).to_le_bytes());
        // The phase, by which the host sees a new entry, is written last.
        let body = ram.write_slice(&e[..12], GuestAddress(at)).is_ok();
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        let last = u32::from_le_bytes([e[12], e[13], e[14], e[15]]);
        let done = body && ram.write_obj(last.to_le(), GuestAddress(at.wrapping_add(12))).is_ok();
        self.tail += 1;
        if self.tail == self.size {
            (self.tail, self.phase) = (0, !self.phase);
        }
        done
    }
}

/// How a command has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Whether it went well.
    pub status: Status,
    /// What some commands return.
    pub result: u32,
}

impl From<Status> for End {
    fn from(status: Status) -> End {
        End { status, result: 0 }
    }
}
