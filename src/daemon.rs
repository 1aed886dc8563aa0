//! Going on in the background: the parent ends when the machine is built, with the outcome.

use crate::cli::exit::Exit;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// The child's end of the promise to tell its parent how it went.
pub struct Detached {
    parent: Option<File>,
}

/// What a process is after [`detach`].
pub enum Side {
    /// The one that runs the machine.
    Child(Detached),
    /// The one that was called; it ends with this status.
    Parent(u8),
}

impl Detached {
    /// A process that stays where it is.
    pub fn not() -> Detached {
        Detached { parent: None }
    }

    /// The machine is built: writes the process id, and lets the parent end.
    pub fn ready(&mut self, pidfile: Option<&Path>) -> io::Result<()> {
        if let Some(path) = pidfile {
            let mut f = File::options().create(true).write(true).truncate(true).open(path)?;
            writeln!(f, "{}", std::process::id())?;
        }
        let Some(mut parent) = self.parent.take() else { return Ok(()) };
        std::env::set_current_dir("/")?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for fd in 0..3 {
            // SAFETY: dup2 takes no memory; the first three descriptors are the standard ones, which
            // nobody owns as an object.
            if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        parent.write_all(&[1])
    }
}

/// Splits off a child without a terminal. The parent waits until the child is ready or has ended.
/// Call while there is one thread.
pub fn detach() -> io::Result<Side> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills the two integers of the array.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh descriptors that nobody else owns.
    let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: there is one thread, so that the child finds every lock free and all memory consistent.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(read);
            // SAFETY: no memory is passed. It fails only for a process group's leader, which a fresh
            // child is not.
            unsafe { libc::setsid() };
            Ok(Side::Child(Detached { parent: Some(write.into()) }))
        }
        child => {
            drop(write);
            let mut word = [0];
            if File::from(read).read_exact(&mut word).is_ok() {
                return Ok(Side::Parent(Exit::Done.status()));
            }
            let mut status = 0;
            // SAFETY: the pointer is to a live integer.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            let ended = libc::WIFEXITED(status);
            let code = libc::WEXITSTATUS(status) as u8;
            Ok(Side::Parent(if ended && code != 0 { code } else { Exit::Host.status() }))
        }
    }
}
