//! `tandem`: a virtual machine monitor with two accelerators behind one machine.
//!
//! ```text
//!   cli ──► config (plain data, validate) ──► machine (build order, governor, main loop)
//!                                               │   ├─ boot      kernel to memory and first state
//!                                               │   └─ accel     which accelerator, and why
//!   terminal, signals: raw mode, restored on every way out    doctor: what works on this host
//! ```

mod accel;
mod boot;
mod cli;
mod config;
mod doctor;
mod img;
mod log;
mod machine;
mod signals;
mod terminal;

use clap::Parser;
use cli::exit::Exit;
use cli::run::{Question, RunArgs, print_log_items};
use cli::{Cli, Command};
use machine::{Ending, Machine};
use std::process::ExitCode;
use tandem_devices::registry;

fn main() -> ExitCode {
    install_panic_hook();
    let cli = Cli::parse();
    log::install(cli.verbose);
    if let Command::Img(args) = &cli.command {
        // Signals end it as they end any program.
        return img::run(args);
    }
    if let Err(e) = signals::install() {
        log::error(&format!("cannot install signal handlers: {e}"));
        return Exit::Host.into();
    }
    let exit = match &cli.command {
        Command::Run(args) => run(args),
        Command::Doctor => doctor::run(),
        Command::Img(_) => Exit::Done,
    };
    exit.into()
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
    let ended = accel::choose(&config)
        .and_then(|accel| Machine::build(&config, accel))
        .and_then(Machine::run);
    accel::finish_log();
    match ended {
        Ok(Ending::Exit(exit)) => exit,
        Ok(Ending::Signal(signal)) => signals::die_by(signal),
        Err(failure) => failure.report(),
    }
}

fn answer(question: &Question) -> Exit {
    match question {
        Question::LogItems => print_log_items(),
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
