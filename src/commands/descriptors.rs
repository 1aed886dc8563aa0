//! File descriptors that a client passes along with its messages (SCM_RIGHTS on a unix socket).

use crate::monitor::session::Session;
use crate::qapi::define::Nothing;
use crate::qapi::{Context, Error, Result};
use std::sync::Arc;
use tandem_backends::fdset;

fn session<'a>(cx: &Context<'a>) -> Result<&'a Arc<Session>> {
    cx.session.ok_or_else(|| Error::new("only a program's session can pass descriptors"))
}

fn getfd(cx: &Context<'_>, name: String) -> Result<Nothing> {
    let session = session(cx)?;
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        let text = "Parameter 'fdname' expects a name not starting with a digit";
        return Err(Error::new(text));
    }
    let fd = session.take_received();
    let fd = fd.ok_or_else(|| Error::new("No file descriptor supplied via SCM_RIGHTS"))?;
    session.named_fds().insert(name, fd);
    Ok(Nothing {})
}

fn closefd(cx: &Context<'_>, name: &str) -> Result<Nothing> {
    match session(cx)?.named_fds().remove(name) {
        Some(_) => Ok(Nothing {}),
        None => Err(Error::new(format!("File descriptor named '{name}' not found"))),
    }
}

crate::object! {
    /// A descriptor that was added.
    pub struct AddfdInfo {
        /// Number of its set.
        fdset_id: u64,
        /// Its own number.
        fd: i64,
    }
    /// A descriptor in a set.
    pub struct FdsetFdInfo {
        /// Its number.
        fd: i64,
        /// Words of whoever added it.
        opaque: Option<String>,
    }
    /// A set of descriptors.
    pub struct FdsetInfo {
        /// Its number.
        fdset_id: u64,
        /// What is in it.
        fds: Vec<FdsetFdInfo>,
    }
}

fn add(cx: &Context<'_>, set: Option<u64>, opaque: Option<String>) -> Result<AddfdInfo> {
    let fd = session(cx)?.take_received();
    let fd = fd.ok_or_else(|| Error::new("No file descriptor supplied via SCM_RIGHTS"))?;
    let (fdset_id, fd) = fdset::add(fd, set, opaque);
    Ok(AddfdInfo { fdset_id, fd: fd.into() })
}

fn remove(set: u64, fd: Option<i64>) -> Result<Nothing> {
    let number = fd.map(|n| i32::try_from(n).unwrap_or(-1));
    if fdset::remove(set, number) {
        return Ok(Nothing {});
    }
    let which = match fd {
        Some(fd) => format!("fdset-id:{set}, fd:{fd}"),
        None => format!("fdset-id:{set}"),
    };
    Err(Error::new(format!("File descriptor named '{which}' not found")))
}

fn list() -> Vec<FdsetInfo> {
    let one = |m: &fdset::Member| FdsetFdInfo { fd: m.number().into(), opaque: m.opaque.clone() };
    let sets = fdset::sets();
    let info =
        sets.iter().map(|(n, all)| FdsetInfo { fdset_id: *n, fds: all.iter().map(one).collect() });
    info.collect()
}

crate::commands! {
    /// Adds a file descriptor that came along with this message to a set, whose path is
    /// `/dev/fdset/N`.
    fn "add-fd"(cx, {
        /// Number of the set; a new one if absent.
        fdset_id: Option<u64>,
        /// Words about it.
        opaque: Option<String>,
    }) -> AddfdInfo { add(cx, fdset_id, opaque) }

    /// Removes a descriptor from a set. Who has opened the set's path keeps what they got.
    fn "remove-fd"(_cx, {
        /// Number of the set.
        fdset_id: u64,
        /// Number of the descriptor; all if absent.
        fd: Option<i64>,
    }) -> Nothing { remove(fdset_id, fd) }

    /// Lists the sets of descriptors.
    fn "query-fdsets"(_cx) -> Vec<FdsetInfo> { Ok(list()) }

    /// Names a file descriptor that came along with this message, for later commands of this
    /// session. A descriptor that has the name already is closed.
    fn "getfd"(cx, {
        /// Name; must not begin with a digit.
        fdname: String,
    }) -> Nothing { getfd(cx, fdname) }

    /// Closes a descriptor that `getfd` has named.
    fn "closefd"(cx, {
        /// Its name.
        fdname: String,
    }) -> Nothing { closefd(cx, &fdname) }
}
