//! One error type for the treaty: a sentence that says what was attempted, what went wrong, and
//! what to do.

use std::fmt;

/// What went wrong between a machine and its accelerator.
#[derive(Debug)]
pub struct Error {
    /// What was attempted and what happened, as one clause without a final period.
    what: String,
    /// What the user can do about it, if anything.
    remedy: Option<String>,
    /// The underlying cause.
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that says `what` happened.
    pub fn new(what: impl Into<String>) -> Error {
        Error { what: what.into(), remedy: None, source: None }
    }
    /// Adds what the user can do.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Error {
        self.remedy = Some(remedy.into());
        self
    }
    /// Adds the underlying cause; it is shown after `what`.
    pub fn caused_by(mut self, e: impl std::error::Error + Send + Sync + 'static) -> Error {
        self.source = Some(Box::new(e));
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(s) = &self.source {
            write!(f, ": {s}")?;
        }
        if let Some(r) = &self.remedy {
            write!(f, "; {r}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
