//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// All stations.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);

    /// The next address for a card that has none given: 52:54:00:12:34:56 and up.
    pub fn next() -> MacAddr {
        static CARDS: AtomicU8 = AtomicU8::new(0);
        let n = CARDS.fetch_add(1, Ordering::Relaxed);
        MacAddr([0x52, 0x54, 0x00, 0x12, 0x34, 0x56_u8.wrapping_add(n)])
    }

    /// Whether it names a group of stations.
    pub fn is_multicast(&self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not an Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write six bytes in hexadecimal, for example 52:54:00:12:34:56")]
pub struct NotMac;

impl FromStr for MacAddr {
    type Err = NotMac;
    fn from_str(s: &str) -> Result<MacAddr, NotMac> {
        let mut mac = [0; 6];
        let mut words = s.split([':', '-']);
        for b in &mut mac {
            let word = words.next().filter(|w| !w.is_empty() && w.len() <= 2).ok_or(NotMac)?;
            *b = u8::from_str_radix(word, 16).map_err(|_| NotMac)?;
        }
        if words.next().is_some() { Err(NotMac) } else { Ok(MacAddr(mac)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let mac: MacAddr = "52:54:0:12:34:Ff".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:ff");
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:567", "g::::::"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }
}
