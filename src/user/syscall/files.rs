//! Files of /proc that would show this process instead of the program.

use super::{Answer, error, through};
use crate::user::thread::Guest;
use std::ffi::{CStr, CString, OsString};
use std::fmt::Write as _;
use std::io::{Seek, Write};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use tandem_tcg::user::Prot;
use tandem_tcg::x86::mode::MMU_USER;

/// Longest path (`PATH_MAX`).
const LONGEST: usize = 4096;

/// The path at `at` in the program's memory.
pub fn path(guest: &mut Guest, at: u64) -> Result<CString, Answer> {
    string(guest, at, LONGEST, libc::ENAMETOOLONG)
}

/// The string at `at` in the program's memory, which is shorter than `longest`; else `too_long`.
pub fn string(
    guest: &mut Guest,
    at: u64,
    longest: usize,
    too_long: i32,
) -> Result<CString, Answer> {
    let mut bytes = Vec::new();
    while bytes.len() < longest {
        let here = at.wrapping_add(bytes.len() as u64);
        // To the end of the page: what lies behind it may not be there.
        let mut piece = vec![0; (4096 - here as usize % 4096).min(longest - bytes.len())];
        let read = guest.thread.env().read_bytes(here, &mut piece, MMU_USER);
        read.map_err(|_| error(libc::EFAULT))?;
        let end = piece.iter().position(|&b| b == 0);
        bytes.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
        if end.is_some() {
            return CString::new(bytes).map_err(|_| error(libc::EINVAL));
        }
    }
    Err(error(too_long))
}

/// The name of a file in this process's own directory of /proc.
fn own(path: &CStr) -> Option<&str> {
    let path = path.to_str().ok()?.strip_prefix("/proc/")?;
    let (who, file) = path.split_once('/')?;
    let me = who == "self" || who.parse() == Ok(std::process::id());
    let me = me || who == "thread-self";
    me.then_some(file)
}

/// open(2) and its kin, of the path at `at`.
pub fn open(guest: &mut Guest, nr: u64, at: u64, a: [u64; 6]) -> Answer {
    let name = match path(guest, at) {
        Ok(n) => n,
        Err(e) => return e,
    };
    let program = guest.program.clone();
    match own(&name) {
        Some("exe") => {
            let Ok(exe) = CString::new(program.exe.as_os_str().as_bytes()) else {
                return error(libc::ENOENT);
            };
            let mut b = a;
            b[if nr as i64 == libc::SYS_open { 0 } else { 1 }] = exe.as_ptr() as u64;
            through(guest, nr, b)
        }
        Some("cmdline") => {
            let words = program.args.iter().flat_map(|w| w.as_bytes().iter().chain(&[0]));
            made(&words.copied().collect::<Vec<u8>>())
        }
        Some("auxv") => made(&program.auxv),
        Some("maps") => made(maps(guest).as_bytes()),
        _ => through(guest, nr, a),
    }
}

/// A file with this content.
fn made(content: &[u8]) -> Answer {
    // SAFETY: the name is a string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"proc".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return error(libc::EMFILE);
    }
    // SAFETY: a new descriptor that nobody else owns.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    match file.write_all(content).and_then(|()| file.rewind()) {
        Ok(()) => Answer::Value(file.into_raw_fd().into()),
        Err(_) => error(libc::ENOMEM),
    }
}

/// /proc/self/maps: the host's lines where the program has memory, with what the program was granted.
fn maps(guest: &Guest) -> String {
    let host = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let space = guest.program.process.space();
    let mut text = String::new();
    for line in host.lines() {
        let Some((range, rest)) = line.split_once(' ') else { continue };
        let Some((start, end)) = range.split_once('-') else { continue };
        let hex = |s| u64::from_str_radix(s, 16).unwrap_or(0);
        let (start, end) = (hex(start), hex(end));
        let mut words = rest.splitn(3, ' ');
        let (shared, offset) = (words.next().unwrap_or("---p"), hex(words.next().unwrap_or("0")));
        let rest = words.next().unwrap_or("");
        let mut at = start;
        while let Some((s, e, prot)) = space.next_area(at).filter(|a| a.0 < end) {
            let (s, e) = (s.max(start), e.min(end));
            let bit = |p, c| if prot.contains(p) { c } else { '-' };
            let _ = writeln!(
                text,
                "{s:x}-{e:x} {}{}{}{} {:08x} {rest}",
                bit(Prot::READ, 'r'),
                bit(Prot::WRITE, 'w'),
                bit(Prot::EXEC, 'x'),
                shared.chars().nth(3).unwrap_or('p'),
                if rest.contains('/') { offset + (s - start) } else { 0 },
            );
            at = e;
        }
    }
    text
}

/// readlink(2) and its kin: the path at `at`, to the buffer and its size.
pub fn read_link(guest: &mut Guest, nr: u64, at: u64, to: [u64; 2], a: [u64; 6]) -> Answer {
    match path(guest, at) {
        Ok(name) if own(&name) == Some("exe") => {
            let exe: OsString = guest.program.exe.clone().into_os_string();
            let bytes = exe.into_vec();
            let n = bytes.len().min(to[1] as usize);
            match guest.thread.env().write_bytes(to[0], &bytes[..n], MMU_USER) {
                Ok(()) if n > 0 => Answer::Value(n as i64),
                Ok(()) => error(libc::EINVAL),
                Err(_) => error(libc::EFAULT),
            }
        }
        Ok(_) => through(guest, nr, a),
        Err(e) => e,
    }
}
