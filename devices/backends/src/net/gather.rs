//! Writing memory that lies in pieces to a socket that does not block.

use socket2::Socket;
use std::io;
use std::os::fd::AsRawFd;

/// Whether trying again later may do.
pub fn would_block(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Writes pieces in one call; returns how many bytes the socket took.
///
/// # Safety
///
/// Each piece is readable memory during the call.
pub unsafe fn send(socket: &Socket, iov: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_ptr().cast_mut();
    msg.msg_iovlen = iov.len().min(1024) as _;
    // SAFETY: the pieces are readable memory (the caller's contract) and only read.
    match unsafe { libc::sendmsg(socket.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) } {
        n if n >= 0 => Ok(n as usize),
        _ => Err(io::Error::last_os_error()),
    }
}
