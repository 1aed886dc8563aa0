//! Dumps of guest memory.

use super::output;
use crate::qapi::define::Nothing;
use crate::qapi::{Context, Error, Result};
use std::fs::File;

crate::choice! {
    /// How a dump fares.
    pub enum DumpStatus {
        /// There was none.
        None = "none",
        /// It is being written.
        Active = "active",
        /// It is written.
        Completed = "completed",
        /// It could not be written.
        Failed = "failed",
    }
    /// How a dump is written.
    pub enum DumpGuestMemoryFormat {
        /// An ELF core file.
        Elf = "elf",
    }
}

crate::object! {
    /// How a dump fares.
    pub struct DumpQueryResult {
        /// Its state.
        status: DumpStatus,
        /// Bytes of memory written.
        completed: u64,
        /// Bytes of memory to write.
        total: u64,
    }
    /// What dumps there can be.
    pub struct DumpGuestMemoryCapability {
        /// Their formats.
        formats: Vec<DumpGuestMemoryFormat>,
    }
}

/// Where `file:PATH` or `fd:NAME` leads.
fn target(cx: &Context<'_>, protocol: &str, detach: bool) -> Result<File> {
    if let Some(path) = protocol.strip_prefix("file:") {
        return output::create(path.as_ref());
    }
    let Some(name) = protocol.strip_prefix("fd:") else {
        return Err(Error::new("parameter 'protocol' must start with 'file:' or 'fd:'"));
    };
    if !detach {
        // Nobody may be reading at the other end.
        return Err(Error::new("a dump to a file descriptor needs detach=true"));
    }
    let fd = cx.session.and_then(|s| s.named_fds().remove(name));
    let fd =
        fd.ok_or_else(|| Error::new(format!("File descriptor named '{name}' has not been found")))?;
    Ok(File::from(fd))
}

crate::commands! {
    /// Writes guest memory and the processors' registers to an ELF core file. The guest stands still
    /// meanwhile. DUMP_COMPLETED tells of the end.
    fn "dump-guest-memory"(cx, {
        /// Whether addresses are those of the guest's page tables; only false is possible.
        paging: bool,
        /// `file:PATH`, or `fd:NAME` of a descriptor that `getfd` has named.
        protocol: String,
        /// The reply comes at once.
        detach: Option<bool>,
        /// The format.
        format: Option<DumpGuestMemoryFormat>,
    }) -> Nothing {
        let (detach, _) = (detach.unwrap_or(false), format);
        match paging {
            true => Err(Error::new("paging=true is not supported; dump physical addresses")),
            false => target(cx, &protocol, detach)
                .and_then(|to| cx.vm.start_dump(to, detach))
                .map(|()| Nothing {}),
        }
    }

    /// Tells how the last dump fares.
    fn "query-dump"(cx) -> DumpQueryResult { Ok(cx.vm.dump_progress()) }

    /// Tells what dumps there can be.
    fn "query-dump-guest-memory-capability"(_cx) -> DumpGuestMemoryCapability {
        Ok(DumpGuestMemoryCapability { formats: vec![DumpGuestMemoryFormat::Elf] })
    }
}
