//! Linux tap devices: frames to and from a network interface of the host.

use super::poller::{Poller, Ready};
use super::{Card, Delivery, Link, MAX_FRAME, Offloads, Taken, VNET_HEADER, VnetHeader};
use crate::block::pieces::Src;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// `linux/if_tun.h`.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8_u32 as libc::Ioctl;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

/// Frames moved in each direction in one turn.
const TURN: usize = 256;

/// A tap device.
pub struct Tap {
    file: File,
    readable: bool,
    writable: bool,
    /// A frame that the interface did not take yet, with its header.
    to_host: Option<Vec<u8>>,
    /// What was read last, with its header; a frame that the guest did not take yet.
    to_guest: Vec<u8>,
    waiting: usize,
}

impl Tap {
    /// Opens the interface `name` (made if it is not there and the process may), or a new one if it
    /// is empty.
    pub fn open(name: &str) -> io::Result<Tap> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        // SAFETY: an all-zero ifreq is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::other("the interface's name is longer than 15 bytes"));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the request lives through the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Tap::new(file)
    }

    /// A tap device that somebody else has opened, with `IFF_VNET_HDR`.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Tap> {
        let file = File::from(fd);
        // SAFETY: no memory is passed.
        let set = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Tap::new(file)
    }

    fn new(file: File) -> io::Result<Tap> {
        let size = VNET_HEADER as libc::c_int;
        // SAFETY: the pointer is to an int that lives through the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let to_guest = vec![0; VNET_HEADER + MAX_FRAME];
        Ok(Tap { file, readable: true, writable: true, to_host: None, to_guest, waiting: 0 })
    }

    /// Writes a frame; returns whether it is done with (a frame that is refused is lost).
    fn write(&mut self, header: &VnetHeader, frame: &Src<'_>) -> bool {
        let mut header = header.to_bytes();
        let mut iov = Vec::with_capacity(1 + frame.iov().len());
        iov.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
        iov.extend_from_slice(frame.iov());
        let n = iov.len().min(1024) as libc::c_int;
        // SAFETY: the header and the pieces are readable memory and only read.
        let written = unsafe { libc::writev(self.file.as_raw_fd(), iov.as_ptr(), n) };
        let blocked = written < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock;
        self.writable = !blocked;
        !blocked
    }

    fn send(&mut self, card: &dyn Card) -> bool {
        if self.writable
            && let Some(f) = self.to_host.take()
        {
            let (header, frame) = f.split_at(VNET_HEADER);
            let header = header.try_into().map(VnetHeader::from_bytes).unwrap_or_default();
            if !self.write(&header, &Src::new(frame)) {
                self.to_host = Some(f);
            }
        }
        if self.to_host.is_some() {
            return false;
        }
        let mut left = TURN;
        card.transmit(&mut |header, frame| {
            left -= 1;
            if frame.len() as usize > MAX_FRAME || self.write(header, frame) {
                return if left == 0 { Taken::Enough } else { Taken::More };
            }
            let mut kept = vec![0; VNET_HEADER + frame.len() as usize];
            kept[..VNET_HEADER].copy_from_slice(&header.to_bytes());
            frame.copy_to(&mut kept[VNET_HEADER..]);
            self.to_host = Some(kept);
            Taken::Enough
        }) && self.to_host.is_none()
    }

    /// Returns whether there is more.
    fn receive(&mut self, card: &dyn Card) -> bool {
        for _ in 0..TURN {
            if self.waiting == 0 {
                if !self.readable {
                    return false;
                }
                match (&self.file).read(&mut self.to_guest) {
                    Ok(n) if n > VNET_HEADER => self.waiting = n,
                    Ok(_) => continue,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => {
                        self.readable = false;
                        return false;
                    }
                }
            }
            let (header, frame) = self.to_guest[..self.waiting].split_at(VNET_HEADER);
            let header = header.try_into().map(VnetHeader::from_bytes).unwrap_or_default();
            if card.receive(&header, &[frame], 0) == Delivery::Full {
                return false;
            }
            self.waiting = 0;
        }
        true
    }
}

impl Link for Tap {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn start(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add_edge(&self.file, 0)
    }

    fn attached(&mut self, card: &dyn Card) {
        let o = card.offloads();
        let mut flags = 0;
        if o.csum {
            flags |= TUN_F_CSUM;
            flags |= if o.tso4 { TUN_F_TSO4 } else { 0 };
            flags |= if o.tso6 { TUN_F_TSO6 } else { 0 };
        }
        // SAFETY: the argument is a number.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, flags) } < 0 {
            log::warn!("tap: offloads {o:?} are refused: {}", io::Error::last_os_error());
        }
    }

    fn turn(&mut self, card: &dyn Card, _: &Poller, ready: &[Ready]) -> Option<Duration> {
        for r in ready {
            self.readable |= r.read;
            self.writable |= r.write;
        }
        let sending = self.send(card);
        let receiving = self.receive(card);
        (sending || receiving).then_some(Duration::ZERO)
    }
}
