//! What is wrong with a configuration.

use std::fmt;

/// One fault: what is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    what: String,
    remedy: String,
}

impl Fault {
    /// `what` names the thing and what is wrong with it; `remedy` says what to do. Both are clauses
    /// without a final period.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault { what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remedy.as_str() {
            "" => f.write_str(&self.what),
            remedy => write!(f, "{}; {remedy}", self.what),
        }
    }
}

impl From<tandem_devices::registry::DeviceFault> for Fault {
    fn from(f: tandem_devices::registry::DeviceFault) -> Fault {
        Fault { what: f.what, remedy: f.remedy }
    }
}

/// A sentence of the treaty already holds its remedy.
impl From<tandem_accel::Error> for Fault {
    fn from(e: tandem_accel::Error) -> Fault {
        Fault { what: e.to_string(), remedy: String::new() }
    }
}

/// The candidate that `word` was probably meant to be: the nearest by edit distance, if it is near
/// (at most a third of the word differs).
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (distance(&word.to_lowercase(), &c.to_lowercase()), c))
        .min_by_key(|(d, _)| *d)
        .filter(|(d, c)| *d <= (word.chars().count().max(c.chars().count()) / 3).max(1))
        .map(|(_, c)| c)
}

/// The remedy for a word that is none of `names`: the likely one, else the list.
pub fn one_of(word: &str, names: &[&str]) -> String {
    match closest(word, names.iter().copied()) {
        Some(c) => format!("did you mean '{c}'?"),
        None => format!("use one of {}", names.join(", ")),
    }
}

/// Levenshtein distance, by one row of the table at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_suggested_and_far_ones_are_not() {
        assert_eq!(closest("qemu46", ["qemu64", "max", "host"]), Some("qemu64"));
        assert_eq!(closest("KVN", ["kvm", "tcg"]), Some("kvm"));
        assert_eq!(closest("pentium", ["qemu64", "max", "host"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
