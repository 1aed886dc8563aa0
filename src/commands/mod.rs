//! The commands: everything that can be done to a machine from outside, one file for each subject.
//!
//! Every front end ends here: QMP sessions and monitors for people call these commands, and so does
//! whatever `tandem ctl` sends. A file defines the types of its subject, its commands
//! ([`crate::commands!`]) and what they do; nothing else calls into it.

mod balloon;
mod block;
mod block_jobs;
mod blockdev;
mod chardev;
mod cpu;
mod descriptors;
mod devices;
pub mod dump;
pub mod events;
pub mod exports;
mod hotplug;
mod human;
mod introspection;
pub mod jobs;
pub mod machine;
mod media;
pub mod memory;
mod migration;
mod network;
mod output;
mod paging;
mod qom;
pub mod run_state;
mod screen;
mod snapshots;
