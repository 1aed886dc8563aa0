//! What can go wrong with an image.

use std::io;
use std::path::Path;

/// Result of a block operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed block operation: a sentence, with its cause as source where the host gave one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused.
    #[error("cannot {what}")]
    Io {
        /// What was attempted, beginning with a verb.
        what: String,
        /// Why the host refused.
        source: io::Error,
    },
    /// The image contradicts itself or its format.
    #[error("{0}")]
    Corrupt(String),
    /// The image or the host lacks something that was asked for.
    #[error("{0}")]
    Unsupported(String),
    /// An option or argument makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Another process uses the image in a way that excludes ours.
    #[error("{0}")]
    Locked(String),
    /// A write to an image that is open for reading.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// A request beyond the end of the image.
    #[error("the request lies beyond the end of the image")]
    OutOfRange,
}

impl Error {
    /// The host refused to do `what`.
    pub fn io(what: impl Into<String>, source: io::Error) -> Error {
        Error::Io { what: what.into(), source }
    }

    /// The host refused to do `verb` with the file at `path`.
    pub(crate) fn at(verb: &str, path: &Path, source: io::Error) -> Error {
        Error::Io { what: format!("{verb} '{}'", path.display()), source }
    }

    /// Whether the host ran out of room.
    pub fn is_no_space(&self) -> bool {
        let code = match self {
            Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        };
        matches!(code, Some(libc::ENOSPC | libc::EDQUOT))
    }

    /// Whether a request of this kind can never succeed here, as opposed to one that failed.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Error::Unsupported(_))
    }

    /// The sentence with all its causes, separated by colons.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(e) = next {
            text += &format!(": {e}");
            next = e.source();
        }
        text
    }
}
