//! Sizes of memory.

use super::Fault;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// A number of bytes, written as `512M`, `4G`, `65536K`; a plain number counts MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// `n` MiB.
    pub const fn mib(n: u64) -> Size {
        Size(n << 20)
    }

    /// Bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Reads a size.
    pub fn parse(s: &str) -> Result<Size, Fault> {
        let fault =
            || Fault::new(format!("'{s}' is not a memory size"), "write for example 512M or 4G");
        let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match s[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "M" | "MB" | "MIB" => 20,
            "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(fault()),
        };
        let n: u64 = digits.parse().map_err(|_| fault())?;
        n.checked_mul(1 << shift).map(Size).ok_or_else(fault)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0 & ((1 << shift) - 1) == 0 {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Size, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a memory size such as \"512M\", or a number of MiB")
            }
            fn visit_str<E: de::Error>(self, s: &str) -> Result<Size, E> {
                Size::parse(s).map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Size, E> {
                Size::parse(&n.to_string()).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Size, E> {
                Size::parse(&n.to_string()).map_err(E::custom)
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_every_spelling() {
        assert_eq!(Size::parse("512M").unwrap(), Size::mib(512));
        assert_eq!(Size::parse("512").unwrap(), Size::mib(512));
        assert_eq!(Size::parse("4G").unwrap(), Size::mib(4096));
        assert_eq!(Size::parse("4gib").unwrap(), Size::mib(4096));
        assert_eq!(Size::parse("65536K").unwrap(), Size::mib(64));
        for bad in ["", "M", "-1", "1.5G", "12Q", "99999999999999999999", "99999999T"] {
            assert!(Size::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for n in [0, 1, 4096, 3 << 20, 512 << 20, 4 << 30, 1 << 40] {
            assert_eq!(Size::parse(&Size(n).to_string()).unwrap(), Size(n));
        }
    }
}
