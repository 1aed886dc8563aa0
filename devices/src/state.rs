//! The contract of a device whose state can be saved.
//!
//! A state is plain typed data that lives in its device's file, carries its own kind and version,
//! and names no accelerator. Taking it has no side effect; putting it back makes no interrupt edge
//! and no output. Both happen while the machine is paused.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A state that does not fit the device; the device is unchanged.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the saved state of {kind} cannot be restored: {why}")]
pub struct RestoreError {
    /// [`Stateful::KIND`].
    pub kind: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// A device with state.
pub trait Stateful {
    /// The state as plain data.
    type State: Serialize + DeserializeOwned + Clone + PartialEq + std::fmt::Debug;
    /// Stable name of the format.
    const KIND: &'static str;
    /// Version of the format; grows when a field changes meaning.
    const VERSION: u32;
    /// Takes the state.
    fn state(&self) -> Self::State;
    /// Puts a state back.
    fn restore(&self, state: &Self::State) -> Result<(), RestoreError>;
}
