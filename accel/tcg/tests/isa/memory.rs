//! Memory that the host processor and translated code see at the same addresses, so that one case
//! can run on both without relocation. One machine at a time: [`Arena::lock`].

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Data page addresses: [`DATA_LEN`] bytes from here.
pub const DATA: u64 = 0x1000_0000;
/// Bytes of data, stack included.
pub const DATA_LEN: usize = 0x4000;
/// Where the stack pointer starts.
pub const STACK: u64 = DATA + 0x3800;
/// Code.
pub const CODE: u64 = 0x1100_0000;
/// Bytes of code.
pub const CODE_LEN: usize = 0x1000;
/// Registers in and out of a native run.
pub const CONTEXT: u64 = 0x1200_0000;

/// The fixed mappings.
#[derive(Debug)]
pub struct Arena(());

static ARENA: Mutex<Option<Arena>> = Mutex::new(None);

fn map(addr: u64, len: usize, prot: i32) {
    // SAFETY: a fixed mapping that must not replace anything, checked below.
    let p = unsafe {
        libc::mmap(
            addr as *mut libc::c_void,
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(p as u64, addr, "no room at {addr:#x}: {}", std::io::Error::last_os_error());
}

impl Arena {
    /// The arena, for as long as the guard lives.
    pub fn lock() -> MutexGuard<'static, Option<Arena>> {
        let mut guard = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() {
            map(DATA, DATA_LEN, libc::PROT_READ | libc::PROT_WRITE);
            map(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
            map(CONTEXT, 0x1000, libc::PROT_READ | libc::PROT_WRITE);
            *guard = Some(Arena(()));
        }
        guard
    }
}

/// Whether `len` bytes at `addr` are data.
pub fn is_data(addr: u64, len: u64) -> bool {
    addr >= DATA && len <= DATA_LEN as u64 && addr - DATA <= DATA_LEN as u64 - len
}

/// Whether `len` bytes at `addr` may be read: data or code.
pub fn is_readable(addr: u64, len: u64) -> bool {
    is_data(addr, len) || addr >= CODE && addr < CODE + CODE_LEN as u64 - len
}

/// The data, as it is.
pub fn data() -> Vec<u8> {
    // SAFETY: mapped by `Arena::lock`, whose guard every caller holds.
    unsafe { std::slice::from_raw_parts(DATA as *const u8, DATA_LEN).to_vec() }
}

/// Replaces the data.
pub fn set_data(bytes: &[u8]) {
    assert_eq!(bytes.len(), DATA_LEN);
    // SAFETY: as above; nothing else refers to the data meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), DATA as *mut u8, DATA_LEN) };
}

/// Writes `bytes` at `addr` in the code or context pages.
pub fn poke(addr: u64, bytes: &[u8]) {
    // SAFETY: as above; callers stay within the mappings made there.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
}

/// Reads the 8 bytes at `addr` in the context page.
pub fn peek(addr: u64) -> u64 {
    // SAFETY: as above.
    unsafe { (addr as *const u64).read() }
}
