//! The words of qemu-x86_64 as those of `tandem user`.

use std::ffi::OsString;

/// Options with a value that both have, theirs and ours.
const VALUED: [(&str, &str); 7] = [
    ("-L", "-L"),
    ("-0", "-0"),
    ("-E", "-E"),
    ("-U", "-U"),
    ("-cpu", "--cpu"),
    ("-d", "-d"),
    ("-D", "-D"),
];
/// Options without one.
const PLAIN: [(&str, &str); 5] = [
    ("-strace", "--strace"),
    ("-one-insn-per-tb", "--one-insn-per-tb"),
    ("-perfmap", "--perfmap"),
    ("-h", "--help"),
    ("-help", "--help"),
];

/// Our words for `words`, which stand behind the program's own name. What we do not have stays as it
/// is, for the parser to refuse by name.
pub fn translate(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_str().unwrap_or_default();
        // They take two dashes for one.
        let name = match text.strip_prefix("--") {
            Some(rest) if !rest.is_empty() => &text[1..],
            _ => text,
        };
        if let Some((_, ours)) = VALUED.iter().find(|(theirs, _)| *theirs == name) {
            out.push(ours.into());
            out.extend(words.next());
        } else if let Some((_, ours)) = PLAIN.iter().find(|(theirs, _)| *theirs == name) {
            out.push(ours.into());
        } else if text.starts_with('-') && text != "--" {
            out.push(word);
        } else {
            // The program, and all that is its own.
            if text != "--" {
                out.push("--".into());
            }
            out.push(word);
            out.extend(words);
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_end_at_the_program() {
        let say = |s: &str| {
            let words = translate(s.split_whitespace().map(OsString::from));
            let words: Vec<_> = words.iter().map(|w| w.to_str().unwrap()).collect();
            words.join(" ")
        };
        assert_eq!(
            say("-L / -strace -cpu max ls -L -strace"),
            "-L / --strace --cpu max -- ls -L -strace"
        );
        assert_eq!(say("--strace -- ls -d"), "--strace -- ls -d");
        assert_eq!(say("-g 1234 ls"), "-g -- 1234 ls");
    }
}
