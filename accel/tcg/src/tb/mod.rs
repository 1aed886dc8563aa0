//! Translation blocks: the cache, the links between blocks, and what happens when code is written.
//!
//! What always holds:
//!
//! * A block is found by [`TbKey`] plus the physical address of its first byte; the pages it lies on
//!   are watched ([`tandem_accel::memory::PageBits`]) for as long as a block lies on them.
//! * An invalid block is out of the table, poisoned (its entries leave), and nothing links to it.
//!   Its code memory is reused only by a flush of everything, with no vCPU inside generated code.
//! * Lock order: cache lock → mail of the vCPUs, page bits. No guest page table is walked under the
//!   cache lock.

mod cache;
mod written;

pub use cache::{CodeWatch, Found, NewTb, Range, Tb, TbCache, TbKey, Watched};
pub use written::{LOCK_RETRY, SMC_RETRY, WRAP_RETRY, clear_code, code_written, write_code};
