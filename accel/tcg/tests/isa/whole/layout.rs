//! The user address space of whole programs, the same on the host and in the guest.

/// Writable data, [`super::super::memory::DATA`] and its length; a page that can only be read
/// follows, then nothing.
pub use crate::memory::{DATA, DATA_LEN};
/// Bytes of read-only data behind the data.
pub const READ_ONLY_LEN: usize = 0x1000;
/// Code.
pub const CODE: u64 = 0x1300_0000;
/// Bytes of code.
pub const CODE_LEN: usize = 0x3000;
/// FS and GS bases that programs start with point into the data, that far from its start.
pub const FS_OFFSET: u64 = 0x400;
/// See [`FS_OFFSET`].
pub const GS_OFFSET: u64 = 0x800;

/// Selectors as Linux has them: 32-bit user code.
pub const USER32_CS: u16 = 0x23;
/// User data.
pub const USER_DS: u16 = 0x2b;
/// 64-bit user code.
pub const USER_CS: u16 = 0x33;
/// 16-bit code at [`CODE`], in the LDT.
pub const CS16: u16 = 0x17;
/// 16-bit data and stack at [`DATA`], with that limit, in the LDT.
pub const DS16: u16 = 0x1f;

/// Code and data selectors of a program in code of this size.
pub fn selectors(bits: u32) -> (u16, u16) {
    match bits {
        64 => (USER_CS, USER_DS),
        32 => (USER32_CS, USER_DS),
        _ => (CS16, DS16),
    }
}

/// HLT, which ends a program.
pub const END: u8 = 0xf4;

/// Memory of a program: the data, and the code with [`END`] everywhere else.
#[derive(Clone)]
pub struct Memory {
    /// Data, [`DATA_LEN`] bytes.
    pub data: Vec<u8>,
    /// Read-only data, [`READ_ONLY_LEN`] bytes.
    pub read_only: Vec<u8>,
    /// Code, [`CODE_LEN`] bytes.
    pub code: Vec<u8>,
}

impl Default for Memory {
    fn default() -> Memory {
        Memory {
            data: vec![0; DATA_LEN],
            read_only: vec![0; READ_ONLY_LEN],
            code: vec![END; CODE_LEN],
        }
    }
}
