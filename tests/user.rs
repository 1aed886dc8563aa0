//! Programs under `tandem user`: each prints the same, and ends the same way, as on the host itself.

mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use vm::{Dir, finish, skip, tandem, text};

const LIMIT: Duration = Duration::from_secs(300);

/// Compiles a program of `tests/user`; `None` (and a word why) where there is no compiler.
fn compiled(dir: &Dir, name: &str, flags: &[&str]) -> Option<PathBuf> {
    if Command::new("cc").arg("--version").stdout(Stdio::null()).status().is_err() {
        skip("there is no C compiler");
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/user").join(format!("{name}.c"));
    let to = dir.path(name);
    let made = Command::new("cc")
        .args(["-O1", "-pthread", "-w", "-o"])
        .arg(&to)
        .arg(source)
        .args(flags)
        .arg("-lm")
        .status();
    assert!(made.expect("cc").success());
    Some(to)
}

/// `command` on the host, and under `tandem user` with `options`.
fn both(command: &[&str], options: &[&str]) -> (Output, Output) {
    let native = finish(Command::new(command[0]).args(&command[1..]), LIMIT);
    let translated = finish(tandem().arg("user").args(options).args(command), LIMIT);
    (native, translated)
}

fn check(command: &[&str], options: &[&str]) {
    let (native, translated) = both(command, options);
    assert_eq!(text(&translated.stdout), text(&native.stdout), "{}", text(&translated.stderr));
    assert_eq!(translated.status, native.status, "{}", text(&translated.stderr));
}

fn c_program(name: &str, flags: &[&str], options: &[&str]) {
    let dir = Dir::new(&format!("user-{name}-{}", flags.len() + options.len()));
    if let Some(program) = compiled(&dir, name, flags) {
        check(&[program.to_str().unwrap()], options);
    }
}

#[test]
fn signals() {
    c_program("signals", &[], &[]);
}

#[test]
fn signals_of_a_static_program_one_instruction_at_a_time() {
    c_program("signals", &["-static"], &["-one-insn-per-tb"]);
}

#[test]
fn threads() {
    c_program("threads", &[], &[]);
}

#[test]
fn processes() {
    c_program("processes", &[], &[]);
}

#[test]
fn processes_of_a_static_program() {
    c_program("processes", &["-static"], &[]);
}

#[test]
fn memory() {
    c_program("memory", &[], &[]);
}

#[test]
fn programs_of_the_system() {
    for command in [
        &["/bin/sh", "-c", "for i in 1 2 3; do echo $((i*i)); done | sort -r; (exit 3)"][..],
        &["/bin/bash", "-c", "a=($(seq 100)); echo ${#a[@]} ${a[-1]}; kill -TERM $$"],
        &["/bin/ls", "-l", "/etc/passwd", "/proc/self/nothing"],
        &["/usr/bin/perl", "-e", "print join(',', map { sprintf '%.3f', sqrt $_ } 1..50), \"\\n\""],
        &["/bin/gzip", "-9c", "/etc/services"],
        &["/usr/bin/openssl", "dgst", "-sha512", "/etc/services"],
        &["/usr/bin/awk", "BEGIN { for (i = 0; i < 1e5; i++) s += i * i; print s }"],
    ] {
        if !Path::new(command[0]).exists() {
            skip(&format!("there is no {}", command[0]));
            continue;
        }
        check(command, &[]);
    }
}

#[test]
fn a_script_is_run_by_its_interpreter() {
    let dir = Dir::new("user-script");
    let script = dir.file(
        "script",
        b"#!/bin/sh -e\necho \"$0\" \"$#\" \"$1\" | sed 's,.*/,,'\nfalse\necho no\n",
    );
    Command::new("chmod").args(["+x", &script]).status().unwrap();
    check(&[&script, "a b", "c"], &[]);
}

#[test]
fn names_environment_and_calls() {
    let say = |words: &[&str]| finish(tandem().arg("user").args(words), LIMIT);
    let said = say(&[
        "-0",
        "me",
        "-E",
        "A=x y",
        "-U",
        "HOME",
        "--",
        "/bin/sh",
        "-c",
        "echo $0 $A ${HOME-none}",
    ]);
    assert_eq!(text(&said.stdout), "me x y none\n");
    let said = say(&["-strace", "/bin/true"]);
    let calls = text(&said.stderr);
    for call in ["execve", "openat(", "mmap(", "exit_group(0"] {
        assert!(calls.contains(call) || call == "execve", "{call}: {calls}");
    }
    let said = say(&["-d", "in_asm,op,out_asm", "/bin/true"]);
    let log = text(&said.stderr);
    for part in ["IN:", "OUT:", "syscall"] {
        assert!(log.contains(part), "{part}");
    }
}

#[test]
fn bad_usage_and_crashes_are_one_sentence() {
    let say = |words: &[&str]| finish(tandem().arg("user").args(words), LIMIT);
    let said = say(&["/etc/passwd"]);
    assert_eq!(said.status.code(), Some(2));
    let why = text(&said.stderr);
    assert!(why.contains("cannot run '/etc/passwd': it is not an ELF program"), "{why}");
    let said = say(&["/no/such/program"]);
    assert!(text(&said.stderr).contains("cannot run '/no/such/program'"));
    let said = say(&["-d", "nothing", "/bin/true"]);
    assert!(text(&said.stderr).contains("-d nothing: there is no such item"));
    use std::os::unix::process::ExitStatusExt;
    let dir = Dir::new("user-crash");
    let source = dir.file("crash.c", b"int main(void) { return *(volatile int *)0x123456; }\n");
    let program = dir.path("crash");
    let Ok(made) = Command::new("cc").args(["-o"]).arg(&program).arg(&source).status() else {
        return skip("there is no C compiler");
    };
    assert!(made.success());
    let said = say(&[program.to_str().unwrap()]);
    assert_eq!(said.status.signal(), Some(libc::SIGSEGV));
    let why = text(&said.stderr);
    assert!(why.contains("crash: the program was ended by SIGSEGV at 0x"), "{why}");
    assert!(why.contains("accessing 0x123456"), "{why}");
}
