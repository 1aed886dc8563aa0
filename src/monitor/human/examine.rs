//! `x`, `xp`, `memsave`, `pmemsave`: looking at guest memory.

use super::{Output, qmp};
use crate::commands::memory;
use crate::machine::Machine;
use serde_json::json;
use std::fmt::Write;

/// Items shown at once, at most.
const MAX_ITEMS: u64 = 65536;

/// How items are shown.
struct Format {
    count: u64,
    letter: char,
    size: usize,
}

impl Format {
    /// Reads `/[count][x|d|u|o|c][b|h|w|g]`.
    fn parse(s: &str) -> Result<Format, String> {
        let digits = s.chars().take_while(char::is_ascii_digit).count();
        let (count, letters) = s.split_at(digits);
        let count = if count.is_empty() { 1 } else { count.parse().unwrap_or(u64::MAX) };
        if count > MAX_ITEMS {
            return Err(format!("at most {MAX_ITEMS} items can be shown"));
        }
        let mut f = Format { count, letter: 'x', size: 4 };
        for c in letters.chars() {
            match c {
                'x' | 'd' | 'u' | 'o' | 'c' => f.letter = c,
                'b' => f.size = 1,
                'h' => f.size = 2,
                'w' => f.size = 4,
                'g' => f.size = 8,
                'i' | 's' => return Err(format!("format '{c}' is not supported; use x")),
                _ => return Err(format!("'{c}' is no format; use x, d, u, o, c and b, h, w, g")),
            }
        }
        Ok(f)
    }

    fn show(&self, v: u64) -> String {
        let width = self.size * 2;
        let signed = (v << (64 - 8 * self.size)) as i64 >> (64 - 8 * self.size);
        match self.letter {
            'd' => signed.to_string(),
            'u' => v.to_string(),
            'o' => format!("{v:#o}"),
            'c' => format!("{:?}", v as u8 as char),
            _ => format!("0x{v:0width$x}"),
        }
    }
}

/// A number: decimal, or hexadecimal with 0x.
fn number(s: &str) -> Result<u64, String> {
    let n = match s.strip_prefix("0x") {
        Some(h) => u64::from_str_radix(h, 16),
        None => s.parse(),
    };
    n.map_err(|_| format!("'{s}' is no number"))
}

pub(super) fn memory(vm: &mut Machine, words: &str, virtual_: bool) -> Output {
    let (format, rest) = match words.strip_prefix('/') {
        Some(w) => {
            let (f, rest) = w.split_once(char::is_whitespace).unwrap_or((w, ""));
            (Format::parse(f)?, rest.trim())
        }
        None => (Format::parse("")?, words),
    };
    if rest.is_empty() {
        return Err("an address is missing".into());
    }
    let start = number(rest)?;
    let state = match virtual_ {
        true => {
            let (vcpu, _) = vm.vcpus().next().ok_or("there is no processor")?;
            Some(vcpu.state().map_err(|e| e.to_string())?)
        }
        false => None,
    };
    let per_line = (16 / format.size) as u64;
    let mut s = String::new();
    for i in 0..format.count {
        let at = start.wrapping_add(i * format.size as u64);
        if i % per_line == 0 {
            let _ = write!(s, "{}{at:016x}:", if i > 0 { "\n" } else { "" });
        }
        let mut bytes = [0; 8];
        let buf = &mut bytes[..format.size];
        let read = match &state {
            Some(state) => memory::read_virtual(vm, state, at, buf),
            None => memory::read_physical(vm, at, buf),
        };
        if let Err(e) = read {
            let _ = write!(s, " {e}");
            break;
        }
        let _ = write!(s, " {}", format.show(u64::from_le_bytes(bytes)));
    }
    Ok(s)
}

pub(super) fn save(vm: &mut Machine, words: &str, command: &str) -> Output {
    let words: Vec<&str> = words.split_whitespace().collect();
    let [at, size, file] = words[..] else {
        return Err(format!("write {command} ADDRESS SIZE FILE"));
    };
    let arguments = json!({ "val": number(at)?, "size": number(size)?, "filename": file });
    qmp(vm, command, arguments).map(|_| String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let f = Format::parse("4xg").unwrap();
        assert_eq!((f.count, f.size, f.show(0xab).as_str()), (4, 8, "0x00000000000000ab"));
        assert_eq!(Format::parse("dh").unwrap().show(0xfffe), "-2");
        assert_eq!(Format::parse("cb").unwrap().show(65), "'A'");
        assert!(Format::parse("99999999999999999999x").is_err() && Format::parse("z").is_err());
        assert_eq!((number("0x10"), number("10")), (Ok(16), Ok(10)));
    }
}
