//! The vsyscall page at ffff_ffff_ff60_0000h: three calls at fixed addresses, which old programs jump
//! to (Linux `arch/x86/entry/vsyscall`).

use super::host;
use super::thread::Guest;
use tandem_accel::x86::gpr;
use tandem_tcg::x86::exception::{Exception, vector};
use tandem_tcg::x86::mode::MMU_USER;

const PAGE: u64 = 0xffff_ffff_ff60_0000;
const CALLS: [i64; 3] = [libc::SYS_gettimeofday, libc::SYS_time, libc::SYS_getcpu];

/// Serves a call, if `e` is a jump to one: as if it were a function. Returns whether it was.
pub fn serve(guest: &mut Guest, e: &Exception) -> bool {
    const FETCH: u32 = 16;
    let rip = guest.thread.cpu().rip;
    let offset = rip.wrapping_sub(PAGE);
    let fetched = matches!(e.vector, vector::PF if e.error.unwrap_or(0) & FETCH != 0);
    if !fetched || !offset.is_multiple_of(1024) {
        return false;
    }
    let Some(&nr) = CALLS.get((offset / 1024) as usize) else { return false };
    let sp = guest.thread.cpu().gpr[gpr::RSP];
    let Ok(back) = guest.thread.env().read_u64(sp, MMU_USER) else { return false };
    let cpu = guest.thread.cpu();
    let args = [gpr::RDI, gpr::RSI, gpr::RDX].map(|r| cpu.gpr[r]);
    // SAFETY: these only write to where the program says; the kernel checks it.
    let r = unsafe { host::syscall(nr, [args[0], args[1], args[2], 0, 0, 0]) };
    cpu.gpr[gpr::RAX] = r as u64;
    cpu.gpr[gpr::RSP] = sp.wrapping_add(8);
    cpu.rip = back;
    true
}
