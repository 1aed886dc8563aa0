//! Remedies for words that name nothing: what was probably meant.

/// The candidate that `word` was probably meant to be: the nearest by edit distance, if it is near
/// (at most a third of the word differs).
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (distance(&word.to_lowercase(), &c.to_lowercase()), c))
        .min()
        .filter(|(d, c)| *d <= (word.chars().count().max(c.chars().count()) / 3).max(1))
        .map(|(_, c)| c)
}

/// "did you mean …?" with the likely one of `names`, else what `other` says.
pub fn closest_or(word: &str, names: &[&str], other: impl FnOnce() -> String) -> String {
    match closest(word, names.iter().copied()) {
        Some(c) => format!("did you mean '{c}'?"),
        None => other(),
    }
}

/// "did you mean …?" with the likely one of `names`, else the list of them.
pub fn one_of(word: &str, names: &[&str]) -> String {
    closest_or(word, names, || format!("use one of {}", names.join(", ")))
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
        assert_eq!(one_of("x", &["alpha", "beta"]), "use one of alpha, beta");
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
