//! Scripts: files that begin with `#!` and the program that reads them (execve(2)).

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// How much of the first line counts (`BINPRM_BUF_SIZE`).
const LONGEST: usize = 256;

/// The program that reads the script, and its one argument.
pub fn interpreter(script: &Path) -> Option<(PathBuf, Option<OsString>)> {
    let mut head = Vec::new();
    File::open(script).ok()?.take(LONGEST as u64).read_to_end(&mut head).ok()?;
    parse(&head)
}

fn parse(head: &[u8]) -> Option<(PathBuf, Option<OsString>)> {
    let line = head.strip_prefix(b"#!")?;
    let line = line.split(|&b| b == b'\n').next()?.trim_ascii();
    let end = line.iter().position(|b| matches!(b, b' ' | b'\t')).unwrap_or(line.len());
    let (program, argument) = line.split_at(end);
    let argument = argument.trim_ascii();
    let word = |b: &[u8]| OsString::from_vec(b.to_vec());
    (!program.is_empty())
        .then(|| (word(program).into(), (!argument.is_empty()).then(|| word(argument))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_lines() {
        let parse = |s: &str| {
            parse(s.as_bytes())
                .map(|(p, a)| (p.display().to_string(), a.map(|a| a.into_string().unwrap())))
        };
        assert_eq!(parse("#!/bin/sh\necho"), Some(("/bin/sh".into(), None)));
        assert_eq!(
            parse("#! /usr/bin/env  python3 -u \n"),
            Some(("/usr/bin/env".into(), Some("python3 -u".into())))
        );
        assert_eq!((parse("#!\n"), parse("# !/bin/sh"), parse("")), (None, None, None));
    }
}
