//! File descriptors that a client passes along with its messages (SCM_RIGHTS on a unix socket).

use crate::monitor::session::Session;
use crate::qapi::define::Nothing;
use crate::qapi::{Context, Error, Result};
use std::sync::Arc;

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

crate::commands! {
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
