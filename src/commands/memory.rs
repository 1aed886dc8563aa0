//! Guest memory: its size, its contents.

use super::{output, paging};
use crate::machine::Machine;
use crate::qapi::define::Nothing;
use crate::qapi::{Error, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use tandem_accel::x86::X86State;
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = 4096;
/// Bytes written at once.
const PIECE: u64 = 1 << 20;

crate::object! {
    /// Sizes of memory in bytes.
    pub struct MemoryInfo {
        /// What the machine was started with.
        base_memory: u64,
        /// What was plugged in.
        plugged_memory: Option<u64>,
    }
}

/// Reads guest physical memory.
pub fn read_physical(vm: &Machine, at: u64, buf: &mut [u8]) -> Result<()> {
    vm.memory()
        .ram()
        .read_slice(buf, GuestAddress(at))
        .map_err(|_| Error::new(format!("there is no memory at guest physical address {at:#x}")))
}

/// Reads guest memory at a linear address, through the page tables of a processor in `state`.
pub fn read_virtual(vm: &Machine, state: &X86State, at: u64, buf: &mut [u8]) -> Result<()> {
    let entry = |p: u64, len: usize| {
        let mut b = [0; 8];
        read_physical(vm, p, b.get_mut(..len)?).ok()?;
        Some(u64::from_le_bytes(b))
    };
    let mut done = 0;
    while done < buf.len() {
        let here = at.wrapping_add(done as u64);
        let n = ((PAGE - here % PAGE) as usize).min(buf.len() - done);
        let physical = paging::translate(state, here, entry)
            .ok_or_else(|| Error::new(format!("nothing is mapped at address {here:#x}")))?;
        read_physical(vm, physical, &mut buf[done..done + n])?;
        done += n;
    }
    Ok(())
}

fn memsave(vm: &Machine, at: u64, size: u64, path: &Path, cpu: i64) -> Result<Nothing> {
    let index = usize::try_from(cpu).unwrap_or(usize::MAX);
    let vcpu = vm.vcpus().nth(index);
    let (vcpu, _) = vcpu.ok_or_else(|| Error::new(format!("there is no processor {cpu}")))?;
    let state = vcpu.state()?;
    save(at, size, path, |at, buf| read_virtual(vm, &state, at, buf))
}

/// Writes guest physical memory to a file.
fn pmemsave(vm: &Machine, start: u64, size: u64, path: &Path) -> Result<Nothing> {
    save(start, size, path, |at, buf| read_physical(vm, at, buf))
}

/// Writes what `read` gives to a file, piece by piece.
fn save(
    start: u64,
    size: u64,
    path: &Path,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Nothing> {
    let end = start.checked_add(size).ok_or_else(|| {
        Error::new("Parameter 'size' reaches beyond the end of the address space")
    })?;
    let cannot = |e: std::io::Error| Error::new(format!("'{}': {e}", path.display()));
    let mut file = output::create(path)?;
    let mut buf = vec![0; PIECE.min(size) as usize];
    let mut at = start;
    while at < end {
        let n = (end - at).min(PIECE) as usize;
        read(at, &mut buf[..n])?;
        file.write_all(&buf[..n]).map_err(cannot)?;
        at += n as u64;
    }
    Ok(Nothing {})
}

crate::commands! {
    /// Tells the size of guest memory.
    fn "query-memory-size-summary"(cx) -> MemoryInfo {
        Ok(MemoryInfo { base_memory: cx.vm.config().memory.bytes(), plugged_memory: Some(0) })
    }

    /// Writes guest memory at an address of a processor to a file.
    fn "memsave"(cx, {
        /// Address.
        val: u64,
        /// Bytes.
        size: u64,
        /// The file, which is created or emptied.
        filename: PathBuf,
        /// The processor through whose page tables to look; the first if absent.
        cpu_index: Option<i64>,
    }) -> Nothing { memsave(cx.vm, val, size, &filename, cpu_index.unwrap_or(0)) }

    /// Writes guest physical memory to a file.
    fn "pmemsave"(cx, {
        /// Guest physical address.
        val: u64,
        /// Bytes.
        size: u64,
        /// The file, which is created or emptied.
        filename: PathBuf,
    }) -> Nothing { pmemsave(cx.vm, val, size, &filename) }
}
