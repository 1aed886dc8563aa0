//! Pass-through instructions on a host that cannot execute them: there is never a thunk.

use crate::code::CompileError;
use crate::ir::Native;
use crate::target::Target;

/// Does not exist here.
#[derive(Clone, Copy, Debug)]
pub(super) enum Thunk {}

/// Makes no thunks.
#[derive(Debug)]
pub(super) struct ThunkPool;

impl ThunkPool {
    pub(super) fn new(_target: &Target) -> ThunkPool {
        ThunkPool
    }
    pub(super) fn thunk(&mut self, _native: &Native) -> Result<Option<Thunk>, CompileError> {
        Ok(None)
    }
    pub(super) fn clear(&mut self) {}
}

/// Operands and results of a thunk.
#[derive(Debug, Default)]
pub(super) struct ThunkArgs {
    pub mem: u64,
    pub b: u64,
    pub c: u64,
    pub dst: u64,
    pub dst2: u64,
    pub flags: u64,
    pub vec: u64,
    pub opmask: u64,
    pub mxcsr: u32,
    pub mxcsr_out: u32,
    pub trap_mask: u32,
    pub host_mxcsr: u32,
}

impl Thunk {
    pub(super) unsafe fn call(self, _args: &mut ThunkArgs) {
        match self {}
    }
}
