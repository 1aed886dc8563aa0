//! Several vCPUs on threads of their own: what they see of each other's stores, locked instructions
//! and changes of code, and what other threads may ask of them at any time.
//!
//! The guests are programs in 64-bit mode. What they may observe is what an x86 processor allows
//! (SDM vol. 3 §9.2): the tests look for what it forbids. They hold at any speed of the host.

mod code;
mod control;
mod locked;
mod machine;
mod order;
