//! The monitor for people: command lines in, text out.
//!
//! One row of [`COMMANDS`] or [`INFO`] defines a command: its name, arguments, help and what it does.
//! What changes the machine goes through the same commands as QMP's ([`qmp`]); what only looks may
//! look at the machine itself.

mod examine;
mod info;

use crate::machine::Machine;
use crate::qapi::{self, Context, Members};
use serde_json::Value;
use tandem_accel::suggest::closest_or;

/// What a command comes to: its output, or a sentence about what is wrong.
type Output = Result<String, String>;

/// A command.
pub struct Row {
    /// Name.
    pub name: &'static str,
    /// Short names.
    pub aliases: &'static [&'static str],
    /// Arguments as the help shows them.
    pub arguments: &'static str,
    /// What it does.
    pub about: &'static str,
    /// Runs it with the words after its name.
    run: fn(&mut Machine, &str) -> Output,
}

/// All commands.
pub static COMMANDS: &[Row] = &[
    row("help", &["?"], "[command]", "list the commands", help),
    row("info", &[], "subject", "show something; help info lists the subjects", info_command),
    row("stop", &["s"], "", "stop the guest", |vm, _| plain(vm, "stop")),
    row("cont", &["c"], "", "let the guest go on", |vm, _| plain(vm, "cont")),
    row("system_reset", &[], "", "reset the machine", |vm, _| plain(vm, "system_reset")),
    row("system_powerdown", &[], "", "press the power button", |vm, _| {
        plain(vm, "system_powerdown")
    }),
    row("quit", &["q"], "", "end the machine without asking the guest", |vm, _| plain(vm, "quit")),
    row("x", &[], "/fmt addr", "show memory at an address of processor 0", |vm, words| {
        examine::memory(vm, words, true)
    }),
    row("xp", &[], "/fmt addr", "show memory at a physical address", |vm, words| {
        examine::memory(vm, words, false)
    }),
    row("device_add", &[], "driver[,prop=value…]", "put a device behind a root port", device_add),
    row("device_del", &[], "id", "ask the guest to let go of a device", |vm, id| {
        qmp(vm, "device_del", serde_json::json!({ "id": id })).map(|_| String::new())
    }),
    row("eject", &[], "[-f] device", "open a tray and take out what is in it", |vm, words| {
        let (force, device) = forced(words);
        qmp(vm, "eject", serde_json::json!({ "device": device, "force": force }))
            .map(|_| String::new())
    }),
    row("change", &[], "[-f] device file [format]", "put another medium into a tray", change),
    row("screendump", &[], "file [-f ppm|png] [device]", "write what a display shows to a file", {
        screendump
    }),
    row("memsave", &[], "addr size file", "write memory at an address to a file", |vm, words| {
        examine::save(vm, words, "memsave")
    }),
    row("pmemsave", &[], "addr size file", "write physical memory to a file", |vm, words| {
        examine::save(vm, words, "pmemsave")
    }),
];

/// Subjects of `info`.
pub static INFO: &[Row] = &[
    row("status", &[], "", "what the machine does", |vm, _| info::status(vm)),
    row("version", &[], "", "the version", |_, _| info::version()),
    row("name", &[], "", "the machine's name", |vm, _| info::name(vm)),
    row("uuid", &[], "", "the machine's UUID", |vm, _| info::uuid(vm)),
    row("kvm", &[], "", "whether it runs on KVM", |vm, _| info::kvm(vm)),
    row("cpus", &[], "", "the processors", |vm, _| info::cpus(vm)),
    row("registers", &[], "[-a|index]", "registers of processors", info::registers),
    row("mtree", &[], "", "who answers at which address", |vm, _| info::mtree(vm)),
    row("qtree", &[], "", "the devices", |vm, _| info::qtree(vm)),
    row("pci", &[], "", "PCI functions", |vm, _| info::pci(vm)),
    row("block", &[], "", "disks", |vm, _| info::block(vm)),
    row("blockstats", &[], "", "what was done with disks", |vm, _| info::blockstats(vm)),
    row("network", &[], "", "networks and their cards", |vm, _| info::network(vm)),
    row("chardev", &[], "", "character devices", |vm, _| info::chardev(vm)),
    row("memory_size_summary", &[], "", "size of guest memory", |vm, _| info::memory(vm)),
];

const fn row(
    name: &'static str,
    aliases: &'static [&'static str],
    arguments: &'static str,
    about: &'static str,
    run: fn(&mut Machine, &str) -> Output,
) -> Row {
    Row { name, aliases, arguments, about, run }
}

fn find<'a>(rows: &'a [Row], what: &str, name: &str) -> Result<&'a Row, String> {
    let named = |r: &&Row| r.name == name || r.aliases.contains(&name);
    rows.iter().find(named).ok_or_else(|| {
        let names: Vec<&str> = rows.iter().map(|r| r.name).collect();
        let remedy = closest_or(name, &names, || "list them with help".into());
        format!("there is no {what} '{name}'; {remedy}")
    })
}

/// Runs a line; returns what to show, which ends with a line break unless it is empty.
pub fn execute(vm: &mut Machine, line: &str) -> String {
    let line = line.trim();
    if line.is_empty() {
        return String::new();
    }
    // Formats follow examining commands without a space.
    let end = line.find(|c: char| c.is_whitespace() || c == '/').unwrap_or(line.len());
    let (name, words) = line.split_at(end);
    let result = find(COMMANDS, "command", name).and_then(|c| (c.run)(vm, words.trim()));
    let mut text = result.unwrap_or_else(|e| format!("Error: {e}"));
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn info_command(vm: &mut Machine, words: &str) -> Output {
    let (name, rest) = words.split_once(char::is_whitespace).unwrap_or((words, ""));
    if name.is_empty() {
        return Ok(list(INFO, "info "));
    }
    find(INFO, "subject", name).and_then(|r| (r.run)(vm, rest.trim()))
}

fn list(rows: &[Row], prefix: &str) -> String {
    let line = |r: &Row| {
        let names = [&[r.name][..], r.aliases].concat().join("|");
        let space = if r.arguments.is_empty() { "" } else { " " };
        format!("{prefix}{names}{space}{} -- {}\n", r.arguments, r.about)
    };
    rows.iter().map(line).collect()
}

fn help(_: &mut Machine, words: &str) -> Output {
    match words {
        "" => Ok(list(COMMANDS, "")),
        "info" => Ok(list(INFO, "info ")),
        name => find(COMMANDS, "command", name).map(|r| list(std::slice::from_ref(r), "")),
    }
}

/// Runs a command of QMP.
fn qmp(vm: &mut Machine, name: &str, arguments: Value) -> Result<Value, String> {
    let members = match arguments {
        Value::Object(m) => m,
        _ => Members::new(),
    };
    let command = qapi::command(name).map_err(|e| e.to_string())?;
    (command.run)(&mut Context { vm, session: None }, members).map_err(|e| e.to_string())
}

fn device_add(vm: &mut Machine, words: &str) -> Output {
    let mut members = Members::new();
    for (i, word) in crate::config::parse::split_commas(words).iter().enumerate() {
        let (key, value) = match word.split_once('=') {
            None if i == 0 => ("driver", word.as_str()),
            pair => pair.unwrap_or((word, "on")),
        };
        members.insert(key.into(), value.into());
    }
    qmp(vm, "device_add", Value::Object(members)).map(|_| String::new())
}

/// Whether the first word is `-f`, and the rest.
fn forced(words: &str) -> (bool, &str) {
    match words.strip_prefix("-f ") {
        Some(rest) => (true, rest.trim()),
        None => (false, words),
    }
}

fn change(vm: &mut Machine, words: &str) -> Output {
    let (force, words) = forced(words);
    let mut words = words.split_whitespace();
    let (Some(device), Some(filename)) = (words.next(), words.next()) else {
        return Err("name a device and a file".into());
    };
    let mut members = Members::new();
    members.insert("device".into(), device.into());
    members.insert("filename".into(), filename.into());
    members.insert("force".into(), force.into());
    for (key, word) in ["format", "read-only-mode"].iter().zip(words) {
        members.insert((*key).into(), word.into());
    }
    qmp(vm, "blockdev-change-medium", Value::Object(members)).map(|_| String::new())
}

fn screendump(vm: &mut Machine, words: &str) -> Output {
    let (mut members, mut words) = (Members::new(), words.split_whitespace());
    while let Some(word) = words.next() {
        let (key, value) = match word {
            "-f" => ("format", words.next().ok_or("after -f comes ppm or png")?),
            name if !members.contains_key("filename") => ("filename", name),
            device => ("device", device),
        };
        members.insert(key.into(), value.into());
    }
    qmp(vm, "screendump", Value::Object(members)).map(|_| String::new())
}

/// Runs one that takes and returns nothing.
fn plain(vm: &mut Machine, name: &str) -> Output {
    qmp(vm, name, Value::Null).map(|_| String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_help_shows_all() {
        for rows in [COMMANDS, INFO] {
            let names: Vec<_> =
                rows.iter().flat_map(|r| [&[r.name][..], r.aliases].concat()).collect();
            for (i, n) in names.iter().enumerate() {
                assert!(!names[..i].contains(n), "{n}");
                assert!(list(rows, "").contains(n));
            }
        }
        assert!(find(COMMANDS, "command", "conr").err().unwrap().contains("cont"));
    }
}
