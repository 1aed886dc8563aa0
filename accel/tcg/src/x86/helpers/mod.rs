//! Functions that generated code calls, one file per subject, and their table.
//!
//! A helper is an `extern "C" fn(env: *mut Env, …u64) -> u64`. It declares its effects in the table;
//! system code proper returns `Result<_, Exception>` and the thin helper turns an error into a
//! pending fault ([`raise`]).

use super::Env;
use super::exception::Exception;

/// Makes `e` the pending fault of the helper that is running and returns 0. Generated code sees it
/// when the helper returns.
pub fn raise(env: &mut Env, e: Exception) -> u64 {
    env.cpu.exception = e;
    env.core.fault = 1;
    0
}
