//! The terminal at a machine's serial port.

use crate::terminal::{self, EscapeKeys, Key, RawMode};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Joins the terminal and the socket at `path` until either ends or the user leaves.
pub fn attach(path: &Path) -> Result<(), String> {
    let mut socket = UnixStream::connect(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let raw = match terminal::is_terminal() {
        true => Some(RawMode::enter().map_err(|e| e.to_string())?),
        false => None,
    };
    let ended = pump(&mut socket, raw.is_some());
    drop(raw);
    ended.map_err(|e| e.to_string())
}

fn pump(socket: &mut UnixStream, keys: bool) -> io::Result<()> {
    let mut escape = EscapeKeys::default();
    let mut input_open = true;
    // Unbuffered, so that poll sees all there is.
    // SAFETY: standard input is open as long as the process; the object never closes it.
    let mut stdin = ManuallyDrop::new(unsafe { File::from_raw_fd(0) });
    let mut buf = [0; 4096];
    loop {
        let fd = |fd, on: bool| libc::pollfd {
            fd: if on { fd } else { -1 },
            events: libc::POLLIN,
            revents: 0,
        };
        let mut polled = [fd(0, input_open), fd(socket.as_raw_fd(), true)];
        // SAFETY: two valid entries.
        if unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) } < 0 {
            let e = io::Error::last_os_error();
            if e.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(e);
        }
        if polled[1].revents != 0 {
            let n = socket.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            let mut out = io::stdout().lock();
            out.write_all(&buf[..n])?;
            out.flush()?;
        }
        if polled[0].revents != 0 {
            let n = stdin.read(&mut buf)?;
            if n == 0 {
                input_open = false;
                if !keys {
                    continue;
                }
                return Ok(());
            }
            for b in &buf[..n] {
                match if keys { escape.key(*b) } else { Some(Key::Guest(*b)) } {
                    Some(Key::Guest(b)) => socket.write_all(&[b])?,
                    Some(Key::Quit) => return Ok(()),
                    Some(Key::Help) => eprint!("{}", terminal::HELP),
                    Some(Key::Break) | None => {}
                }
            }
        }
    }
}
