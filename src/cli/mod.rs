//! The command line of `tandem`.
//!
//! Flags only carry text here. [`run::RunArgs::config`] turns them into a [`crate::config::VmConfig`]
//! and collects what is wrong with them, so that a user sees every fault at once; nothing below
//! this module knows about flags.

pub mod exit;
pub mod img;
pub mod nbd;
#[cfg(feature = "tcg")]
pub mod qemu_user;
pub mod run;
#[cfg(feature = "tcg")]
pub mod user;

use clap::{Parser, Subcommand};

/// Runs virtual machines on KVM or by translation, with the same virtual hardware on both.
#[derive(Parser, Debug)]
#[command(
    name = "tandem",
    version,
    about,
    max_term_width = 100,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Start with `tandem doctor`, which says what works on this host, then \
                  `tandem run --help`."
)]
pub struct Cli {
    /// Say more about what goes on; repeat for details
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a virtual machine
    Run(Box<run::RunArgs>),
    /// Run a virtual machine that is described in QEMU's words: tandem qemu -help
    ///
    /// The same as calling tandem by the name qemu-system-x86_64.
    #[command(disable_help_flag = true)]
    Qemu,
    /// Manage machines that run: status, stop, cont, reset, powerdown, quit, info, wait, console
    Ctl(Box<crate::ctl::CtlArgs>),
    /// Make, look at, check, copy and change disk images
    Img(Box<img::ImgArgs>),
    /// Export a disk image to NBD clients
    Nbd(Box<nbd::NbdArgs>),
    /// Run one Linux program by translation; its system calls are the host's
    #[cfg(feature = "tcg")]
    User(Box<user::UserArgs>),
    /// Say which accelerators work on this host, why not, and how to fix it
    ///
    /// Runs a small guest on each accelerator as proof. Exits with 0 if at least one works.
    Doctor,
}
