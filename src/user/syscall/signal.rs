//! Calls about signals.

use super::{Answer, error, through};
use crate::user::frame::{AltStack, SS_AUTODISARM, SS_DISABLE, SS_ONSTACK};
use crate::user::signals::{self, Action, KEPT, SURE};
use crate::user::thread::Guest;
use tandem_accel::x86::gpr;
use tandem_tcg::x86::mode::MMU_USER;

/// Smallest alternate stack (`MINSIGSTKSZ`).
const MIN_STACK: u64 = 2048;

fn read_u64(guest: &mut Guest, at: u64) -> Option<u64> {
    guest.thread.env().read_u64(at, MMU_USER).ok()
}

fn write_words(guest: &mut Guest, at: u64, words: &[u64]) -> Option<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    guest.thread.env().write_bytes(at, &bytes, MMU_USER).ok()
}

/// `None`: the program's memory is not there.
fn done(r: Option<Answer>) -> Answer {
    r.unwrap_or(error(libc::EFAULT))
}

/// rt_sigaction(2).
pub fn action(guest: &mut Guest, a: [u64; 6]) -> Answer {
    let signal = a[0] as i32;
    if a[3] != 8 || !(1..=64).contains(&signal) {
        return error(libc::EINVAL);
    }
    if a[1] != 0 && SURE & signals::bit(signal) != 0 {
        return error(libc::EINVAL);
    }
    let mut change = || {
        let new = match a[1] {
            0 => None,
            at => {
                let mut w = [0; 4];
                for (i, w) in w.iter_mut().enumerate() {
                    *w = read_u64(guest, at.wrapping_add(8 * i as u64))?;
                }
                let [handler, flags, restorer, mask] = w;
                Some(Action { handler, flags, restorer, mask: mask & !SURE })
            }
        };
        let old = guest.actions.get(signal);
        if let Some(new) = new {
            guest.actions.set(signal, new);
        }
        if a[2] != 0 {
            write_words(guest, a[2], &[old.handler, old.flags, old.restorer, old.mask])?;
        }
        Some(Answer::Value(0))
    };
    done(change())
}

/// rt_sigprocmask(2).
pub fn mask(guest: &mut Guest, a: [u64; 6]) -> Answer {
    if a[3] != 8 {
        return error(libc::EINVAL);
    }
    let mut change = || {
        let old = guest.mask;
        if a[1] != 0 {
            let set = read_u64(guest, a[1])?;
            let new = match a[0] as i32 {
                libc::SIG_BLOCK => old | set,
                libc::SIG_UNBLOCK => old & !set,
                libc::SIG_SETMASK => set,
                _ => return Some(error(libc::EINVAL)),
            };
            guest.mask = new & !SURE;
            if !guest.waits().load(std::sync::atomic::Ordering::Acquire) {
                signals::block(guest.mask);
            }
        }
        if a[2] != 0 {
            write_words(guest, a[2], &[old])?;
        }
        Some(Answer::Value(0))
    };
    done(change())
}

/// sigaltstack(2).
pub fn alt_stack(guest: &mut Guest, a: [u64; 6]) -> Answer {
    let sp = guest.thread.cpu().gpr[gpr::RSP];
    let old = guest.alt;
    let on_it = old.size > 0 && old.flags & SS_AUTODISARM == 0 && old.holds(sp);
    let mut change = || {
        if a[0] != 0 {
            let new = AltStack {
                sp: read_u64(guest, a[0])?,
                flags: read_u64(guest, a[0].wrapping_add(8))? as u32,
                size: read_u64(guest, a[0].wrapping_add(16))?,
            };
            if on_it {
                return Some(error(libc::EPERM));
            }
            guest.alt = match new.flags & !SS_AUTODISARM {
                SS_DISABLE => AltStack::default(),
                0 | SS_ONSTACK if new.size < MIN_STACK => return Some(error(libc::ENOMEM)),
                0 | SS_ONSTACK => AltStack { flags: new.flags & SS_AUTODISARM, ..new },
                _ => return Some(error(libc::EINVAL)),
            };
        }
        if a[1] != 0 {
            let flags = match (old.size, on_it) {
                (0, _) => SS_DISABLE,
                (_, true) => SS_ONSTACK,
                _ => old.flags,
            };
            write_words(guest, a[1], &[old.sp, flags.into(), old.size])?;
        }
        Some(Answer::Value(0))
    };
    done(change())
}

/// rt_sigsuspend(2).
pub fn suspend(guest: &mut Guest, a: [u64; 6]) -> Answer {
    if a[1] != 8 {
        return error(libc::EINVAL);
    }
    let Some(mask) = read_u64(guest, a[0]) else { return error(libc::EFAULT) };
    let host = mask & !KEPT;
    let r = through(guest, libc::SYS_rt_sigsuspend as u64, [&raw const host as u64, 8, 0, 0, 0, 0]);
    waited(guest, r, mask)
}

/// ppoll(2), pselect6(2), epoll_pwait(2) and epoll_pwait2(2), which may wait with another mask.
pub fn with_mask(guest: &mut Guest, nr: u64, a: [u64; 6]) -> Answer {
    let at = match nr as i64 {
        libc::SYS_ppoll => a[3],
        libc::SYS_pselect6 if a[5] == 0 => 0,
        libc::SYS_pselect6 => match read_u64(guest, a[5]) {
            Some(at) => at,
            None => return error(libc::EFAULT),
        },
        _ => a[4],
    };
    if at == 0 {
        return through(guest, nr, a);
    }
    let Some(mask) = read_u64(guest, at) else { return error(libc::EFAULT) };
    let host = mask & !KEPT;
    let mut b = a;
    let pair = [&raw const host as u64, 8];
    match nr as i64 {
        libc::SYS_ppoll => b[3] = pair[0],
        libc::SYS_pselect6 => b[5] = pair.as_ptr() as u64,
        _ => b[4] = pair[0],
    }
    let r = through(guest, nr, b);
    waited(guest, r, mask)
}

/// After a wait with `mask`: a signal that has ended it is one that `mask` lets through.
fn waited(guest: &mut Guest, r: Answer, mask: u64) -> Answer {
    if matches!(r, Answer::Interrupted { begun: true }) {
        guest.waiting_mask = Some(mask);
    }
    r
}
