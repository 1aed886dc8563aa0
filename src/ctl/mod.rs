//! `tandem ctl`: managing machines that run, over their QMP sockets.

mod client;
mod console;
pub mod runtime;

use crate::log;
use clap::{Args, Subcommand};
use client::{Client, Failure};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Flags of `tandem ctl`.
#[derive(Args, Debug)]
#[command(after_help = HELP)]
pub struct CtlArgs {
    /// Print what the machine answers as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Name of a machine (tandem run --name) or path of its QMP socket; for list: leave out
    #[arg(value_name = "MACHINE")]
    machine: String,
    /// What to do.
    #[command(subcommand)]
    action: Option<Action>,
}

const HELP: &str = "tandem ctl list lists the machines of this user.

Exit status:
  0  done
  1  the machine refused; the reason is on standard error
  2  bad usage
  3  the machine is not there, or went away
  4  time was up (wait)";

/// What to do with a machine.
#[derive(Subcommand, Debug)]
pub enum Action {
    /// Say what the machine does
    Status,
    /// Stop the guest
    Stop,
    /// Let the guest go on
    Cont,
    /// Reset the machine
    Reset,
    /// Press the power button
    Powerdown,
    /// End the machine without asking the guest
    Quit,
    /// Show a subject: what info of the monitor shows
    Info {
        /// Subject and its arguments
        #[arg(value_name = "SUBJECT", trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run a command line of the monitor
    Hmp {
        /// The line
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Send a QMP message and print the reply
    Raw {
        /// The message, for example '{"execute": "query-block"}'
        message: String,
    },
    /// Wait for the end of the machine, or an event
    Wait {
        /// shutdown (the machine has ended or shut down), or event=NAME
        #[arg(long = "for", value_name = "WHAT", default_value = "shutdown")]
        what: String,
        /// Seconds to wait at most
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
    },
    /// Print events as they come
    Events,
    /// Be the terminal at the serial port; Ctrl-A x leaves
    Console,
}

/// How a command ended.
enum Status {
    Done,
    Refused,
    Usage,
    Gone,
    TimeUp,
}

impl From<Status> for ExitCode {
    fn from(s: Status) -> ExitCode {
        ExitCode::from(match s {
            Status::Done => 0,
            Status::Refused => 1,
            Status::Usage => 2,
            Status::Gone => 3,
            Status::TimeUp => 4,
        })
    }
}

/// Runs `tandem ctl`.
pub fn run(args: &CtlArgs) -> ExitCode {
    let status = match (&args.action, args.machine.as_str()) {
        (None, "list") => list(args.json),
        (None, _) => {
            log::error(&"what shall be done with the machine? tandem ctl --help lists it");
            Status::Usage
        }
        (Some(action), machine) => on_machine(machine, action, args.json),
    };
    status.into()
}

/// Path of the socket that a user names.
fn socket(machine: &str) -> Result<PathBuf, Status> {
    if machine.contains('/') {
        return Ok(machine.into());
    }
    runtime::place(machine).map(|p| p.qmp()).map_err(|f| {
        log::error(&f);
        Status::Usage
    })
}

fn list(as_json: bool) -> Status {
    let mut all = Vec::new();
    for name in runtime::names() {
        let Ok(place) = runtime::place(&name) else { continue };
        match Client::connect(&place.qmp()).and_then(|mut c| c.execute("query-status", json!({}))) {
            Ok(s) => all.push((name, s["status"].as_str().unwrap_or_default().to_string())),
            // Left over from one that was killed.
            Err(Failure::Lost(e)) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(place.qmp());
                let _ = std::fs::remove_file(place.console());
            }
            Err(_) => {}
        }
    }
    if as_json {
        let all: Vec<Value> = all.iter().map(|(n, s)| json!({ "name": n, "status": s })).collect();
        println!("{}", Value::from(all));
    } else {
        all.iter().for_each(|(n, s)| println!("{n:<30} {s}"));
    }
    Status::Done
}

fn on_machine(machine: &str, action: &Action, as_json: bool) -> Status {
    let path = match socket(machine) {
        Ok(p) => p,
        Err(s) => return s,
    };
    if let Action::Console = action {
        let place = runtime::place(machine);
        return match place.map_err(|f| f.to_string()).and_then(|p| console::attach(&p.console())) {
            Ok(()) => Status::Done,
            Err(e) => {
                log::error(&format!("no console of '{machine}': {e}"));
                Status::Gone
            }
        };
    }
    let done = Client::connect(&path).and_then(|mut c| act(&mut c, action, as_json));
    match done {
        Ok(s) => s,
        Err(Failure::Refused(why)) => {
            log::error(&why);
            Status::Refused
        }
        Err(Failure::Lost(e)) => {
            log::error(&format!(
                "machine '{machine}' is not there: {e}; tandem ctl list shows those that are"
            ));
            Status::Gone
        }
    }
}

fn act(c: &mut Client, action: &Action, as_json: bool) -> Result<Status, Failure> {
    let plain = |c: &mut Client, command: &str| {
        let v = c.execute(command, json!({}))?;
        if as_json {
            println!("{v}");
        }
        Ok(Status::Done)
    };
    match action {
        Action::Status => {
            let v = c.execute("query-status", json!({}))?;
            match as_json {
                true => println!("{v}"),
                false => println!("{}", v["status"].as_str().unwrap_or_default()),
            }
            Ok(Status::Done)
        }
        Action::Stop => plain(c, "stop"),
        Action::Cont => plain(c, "cont"),
        Action::Reset => plain(c, "system_reset"),
        Action::Powerdown => plain(c, "system_powerdown"),
        Action::Quit => plain(c, "quit"),
        Action::Info { words } => hmp(c, &format!("info {}", words.join(" ")), as_json),
        Action::Hmp { words } => hmp(c, &words.join(" "), as_json),
        Action::Raw { message } => {
            let Ok(message) = serde_json::from_str::<Value>(message) else {
                log::error(&"that is no JSON");
                return Ok(Status::Usage);
            };
            let reply = c.raw(&message)?;
            println!("{reply}");
            Ok(if reply.get("error").is_some() { Status::Refused } else { Status::Done })
        }
        Action::Wait { what, timeout } => wait(c, what, *timeout),
        Action::Events => loop {
            if let Some(e) = c.event(None)? {
                println!("{e}");
            }
        },
        Action::Console => Ok(Status::Done),
    }
}

fn hmp(c: &mut Client, line: &str, as_json: bool) -> Result<Status, Failure> {
    let v = c.execute("human-monitor-command", json!({ "command-line": line }))?;
    let text = v.as_str().unwrap_or_default();
    match as_json {
        true => println!("{v}"),
        false => print!("{text}"),
    }
    Ok(if text.starts_with("Error: ") { Status::Refused } else { Status::Done })
}

fn wait(c: &mut Client, what: &str, timeout: Option<f64>) -> Result<Status, Failure> {
    let name = match what.split_once('=') {
        None if what == "shutdown" => None,
        Some(("event", name)) if !name.is_empty() => Some(name),
        _ => {
            log::error(&format!("nobody can wait for '{what}'; use shutdown or event=NAME"));
            return Ok(Status::Usage);
        }
    };
    let limit = timeout.and_then(|s| Duration::try_from_secs_f64(s).ok());
    let end = limit.and_then(|l| Instant::now().checked_add(l));
    if name.is_none() && c.execute("query-status", json!({}))?["status"] == "shutdown" {
        return Ok(Status::Done);
    }
    loop {
        match c.event(end) {
            Ok(Some(e)) if e["event"] == name.unwrap_or("SHUTDOWN") => return Ok(Status::Done),
            Ok(Some(_)) => {}
            Ok(None) => return Ok(Status::TimeUp),
            // Its end is what was waited for.
            Err(Failure::Lost(_)) if name.is_none() => return Ok(Status::Done),
            Err(e) => return Err(e),
        }
    }
}
