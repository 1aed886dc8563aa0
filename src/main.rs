//! `tandem`: a virtual machine monitor with two accelerators behind one machine.
//!
//! ```text
//!   cli ──► config (plain data, validate) ──► machine (build order, governor, main loop)
//!        monitor ──► qapi, commands ────────────┤   ├─ boot      kernel to memory and first state
//!                                               │   └─ accel     which accelerator, and why
//!   terminal, signals: raw mode, restored on every way out    doctor: what works on this host
//! ```

mod accel;
mod boot;
mod cli;
mod commands;
mod config;
mod ctl;
mod daemon;
mod doctor;
mod img;
mod log;
mod machine;
mod monitor;
mod nbd;
mod qapi;
mod qemu;
mod signals;
mod terminal;
#[cfg(feature = "tcg")]
mod user;

use clap::Parser;
use cli::exit::Exit;
use cli::run::{Question, RunArgs, print_log_items};
use cli::{Cli, Command};
use config::{Fault, VmConfig};
use daemon::{Detached, Side};
use machine::inbox::Inbox;
use machine::{Ending, Failure, Machine};
use monitor::{Hub, Server};
use qemu::{Parsed, Process, table};
use std::process::ExitCode;
use tandem_accel::Error;
use tandem_devices::registry;

fn main() -> ExitCode {
    install_panic_hook();
    if let Some(words) = qemu_words() {
        log::install(0);
        return qemu_main(&words);
    }
    let cli = match user_words() {
        Some(words) => Cli::parse_from(words),
        None => Cli::parse(),
    };
    log::install(cli.verbose);
    if let Command::Img(args) = &cli.command {
        // Signals end it as they end any program.
        return img::run(args);
    }
    if let Command::Nbd(args) = &cli.command {
        // It may fork, so nothing has been set up yet.
        return nbd::run(args);
    }
    let exit = match &cli.command {
        #[cfg(feature = "tcg")]
        Command::User(args) => user::run(args),
        Command::Run(args) => run(args),
        Command::Doctor => match signals::install() {
            Ok(()) => doctor::run(),
            Err(e) => {
                log::error(&format!("cannot install signal handlers: {e}"));
                Exit::Host
            }
        },
        Command::Ctl(args) => return ctl::run(args),
        // These have been dealt with.
        Command::Img(_) | Command::Nbd(_) | Command::Qemu => Exit::Done,
    };
    exit.into()
}

/// The words of a command line in QEMU's form, if this is one: after `tandem qemu`, or all if we are
/// called by QEMU's name.
fn qemu_words() -> Option<Vec<String>> {
    let mut words = std::env::args_os().map(|w| w.to_string_lossy().into_owned());
    let me = words.next().unwrap_or_default();
    let name = me.rsplit('/').next().unwrap_or_default();
    if name.starts_with("qemu-system-") || name == "qemu-kvm" {
        return Some(words.collect());
    }
    let all: Vec<String> = words.collect();
    let first = all.first().map(String::as_str).unwrap_or_default();
    // No command, but an option that is not ours: somebody takes us for QEMU under this name.
    const OURS: [&str; 6] = ["-h", "--help", "-V", "--version", "-v", "--verbose"];
    let option = first.strip_prefix('-').filter(|_| !OURS.contains(&first));
    let known = option.is_some_and(|o| table::find(o.trim_start_matches('-')).is_some());
    match first {
        "qemu" => Some(all[1..].to_vec()),
        _ if known => Some(all),
        _ => None,
    }
}

/// The words of a command line for one program: with QEMU's options, whether `tandem user` or we are
/// called by QEMU's name.
fn user_words() -> Option<Vec<std::ffi::OsString>> {
    #[cfg(feature = "tcg")]
    {
        let mut words = std::env::args_os();
        let me = words.next()?;
        let name = std::path::Path::new(&me).file_name()?.to_str()?;
        if !matches!(name, "qemu-x86_64" | "qemu-x86_64-static") && words.next()? != "user" {
            return None;
        }
        let ours = ["tandem".into(), "user".into()];
        Some(ours.into_iter().chain(cli::qemu_user::translate(words)).collect())
    }
    #[cfg(not(feature = "tcg"))]
    None
}

/// Runs what a command line in QEMU's form says.
fn qemu_main(words: &[String]) -> ExitCode {
    let fail = |faults: &[Fault]| {
        faults.iter().for_each(|f| log::error(f));
        Exit::Usage.into()
    };
    let (config, process) = match qemu::parse(words) {
        Err(faults) => return fail(&faults),
        Ok(Parsed::Question(q)) => return qemu::answer::answer(&q).into(),
        Ok(Parsed::Machine(config, process)) => (config, process),
    };
    let faults = config.validate();
    if !faults.is_empty() {
        return fail(&faults);
    }
    launch(&config, process).into()
}

/// Runs a validated machine, in the background if asked.
fn launch(config: &VmConfig, process: Process) -> Exit {
    let detached = match process.daemonize {
        false => Detached::not(),
        true => match daemon::detach() {
            Ok(Side::Child(d)) => d,
            Ok(Side::Parent(status)) => return Exit::Of(status),
            Err(e) => {
                log::error(&format!("cannot go on in the background: {e}"));
                return Exit::Host;
            }
        },
    };
    if let Err(e) = signals::install() {
        log::error(&format!("cannot install signal handlers: {e}"));
        return Exit::Host;
    }
    let ended = govern(config, detached, &process);
    accel::finish_log();
    if let Some(path) = &process.pidfile {
        let _ = std::fs::remove_file(path);
    }
    match ended {
        Ok(Ending::Exit(exit)) => exit,
        Ok(Ending::Signal(signal)) => signals::die_by(signal),
        Err(failure) => failure.report(),
    }
}

/// A bug must not leave the user with a raw terminal, or with a machine of which a part has died.
fn install_panic_hook() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        default(info);
        log::error(&"this is a bug in tandem; please report it with the lines above");
        std::process::exit(Exit::Bug.status().into());
    }));
}

fn run(args: &RunArgs) -> Exit {
    if let Some(question) = args.question() {
        return answer(&question);
    }
    let (config, mut faults) = args.config();
    faults.extend(config.validate());
    if !faults.is_empty() {
        faults.iter().for_each(|f| log::error(f));
        return Exit::Usage;
    }
    if args.print_config {
        print!("{}", config::file::write(&config));
        return Exit::Done;
    }
    launch(&config, Process { daemonize: args.detach, pidfile: None })
}

/// Builds the machine with its monitors and runs it to its end.
fn govern(config: &VmConfig, mut detached: Detached, process: &Process) -> Result<Ending, Failure> {
    let cannot = |e| Failure::Host(Error::new("cannot make an event queue").caused_by(e));
    let inbox = Inbox::new().map_err(cannot)?;
    let hub = Hub::new().map_err(cannot)?;
    let mut opened = Vec::new();
    for m in &config.monitors {
        let all = monitor::endpoint::open(&m.at).map_err(Failure::Host)?;
        opened.extend(all.into_iter().map(|o| (m.clone(), o)));
    }
    let accel = accel::choose(config)?;
    let machine = Machine::build(config, accel, &inbox, &hub)?;
    // Dropped last: clients are told how it ended.
    let _server = match opened.is_empty() {
        true => None,
        false => Some(Server::start(&hub, &inbox, opened).map_err(Failure::Host)?),
    };
    detached
        .ready(process.pidfile.as_deref())
        .map_err(|e| Failure::Host(Error::new("cannot go on in the background").caused_by(e)))?;
    machine.run()
}

/// Answers what a command line asks instead of running a machine.
pub fn answer(question: &Question) -> Exit {
    match question {
        Question::LogItems => print_log_items(),
        Question::Qmp => print!("{}", qapi::reference::page()),
        Question::CpuModels => {
            println!("CPU models:");
            for m in tandem_accel::x86::model::models() {
                println!("  {:<10} {}", m.name, m.about);
            }
        }
        Question::Devices => print!("{}", registry::help()),
        Question::DeviceProperties(name) => match registry::find(name) {
            Ok(t) => print!("{}", t.help()),
            Err(fault) => {
                log::error(&fault);
                return Exit::Usage;
            }
        },
    }
    Exit::Done
}
