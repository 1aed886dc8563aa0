//! What firmware is told about booting, under the names of QEMU's `-boot`.

use super::{Fault, parse};
use serde::{Deserialize, Serialize};
use tandem_accel::suggest::one_of;

/// Devices of a letter each: which place of CMOS memory's list means them.
const LETTERS: [(char, u8); 4] = [('a', 1), ('c', 2), ('d', 3), ('n', 4)];
/// Disk, CD-ROM, network.
const USUAL: &str = "cdn";
/// Places in that list.
const PLACES: usize = 3;

/// What firmware is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct BootOrder {
    /// Kinds of devices in the order in which a BIOS tries them: `c` disk, `d` CD-ROM, `n` network,
    /// `a` floppy. Devices with a `bootindex` come first in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<String>,
    /// The same for the first start; a reset goes back to `order`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub once: Option<String>,
    /// Firmware offers a menu.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub menu: bool,
    /// How long it waits for the key of its menu, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub splash_time: Option<u16>,
    /// How long a BIOS waits after a failure before it starts anew, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reboot_timeout: Option<u16>,
    /// Devices without a `bootindex` are not tried.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
}

impl BootOrder {
    /// Whether nothing is said.
    pub fn is_none(&self) -> bool {
        *self == BootOrder::default()
    }

    /// Takes `[order=]dc,once=d,menu=on,splash-time=5000,reboot-timeout=1000,strict=on`.
    pub fn parse(&mut self, option: &str, text: &str, faults: &mut Vec<Fault>) {
        for (i, word) in parse::split_commas(text).iter().enumerate() {
            let (key, value) = match word.split_once('=') {
                None if i == 0 => ("order", word.as_str()),
                pair => pair.unwrap_or((word, "on")),
            };
            let mut bad = |remedy: String| {
                faults.push(Fault::new(format!("{option} {key}={value} does not work"), remedy));
            };
            match key {
                "order" => self.order = Some(value.into()),
                "once" => self.once = Some(value.into()),
                "menu" | "strict" => match value {
                    "on" | "off" if key == "menu" => self.menu = value == "on",
                    "on" | "off" => self.strict = value == "on",
                    _ => bad("write on or off".into()),
                },
                "splash-time" | "reboot-timeout" => match value.parse() {
                    Ok(ms) if key == "splash-time" => self.splash_time = Some(ms),
                    Ok(ms) => self.reboot_timeout = Some(ms),
                    Err(_) => bad("write milliseconds, 0 to 65535".into()),
                },
                _ => bad(one_of(
                    key,
                    &["order", "once", "menu", "splash-time", "reboot-timeout", "strict"],
                )),
            }
        }
    }

    /// What is wrong with it.
    pub fn judge(&self, faults: &mut Vec<Fault>) {
        for order in [&self.order, &self.once].into_iter().flatten() {
            let mut seen = String::new();
            for letter in order.chars() {
                let what = match LETTERS.iter().any(|(l, _)| *l == letter) {
                    false => format!("there is no boot device '{letter}'"),
                    true if seen.contains(letter) => format!("boot device '{letter}' comes twice"),
                    true => {
                        seen.push(letter);
                        continue;
                    }
                };
                faults
                    .push(Fault::new(what, "use c (disk), d (CD-ROM) and n (network), each once"));
            }
        }
    }

    fn cmos(order: &str) -> [u8; 2] {
        let mut list = [0; PLACES];
        for (place, letter) in list.iter_mut().zip(order.chars()) {
            let known = LETTERS.iter().find(|(l, _)| *l == letter);
            *place = known.map_or(0, |(_, n)| *n);
        }
        // The first in the low half of the first byte; the second byte's low half says that nobody
        // looks for a floppy's signature.
        [list[1] << 4 | list[0], list[2] << 4 | 1]
    }

    /// The two bytes of CMOS memory with the order: at the first start, and after a reset.
    pub fn cmos_bytes(&self) -> ([u8; 2], [u8; 2]) {
        let order = self.order.as_deref().unwrap_or(USUAL);
        (Self::cmos(self.once.as_deref().unwrap_or(order)), Self::cmos(order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_become_places() {
        let mut b = BootOrder::default();
        assert_eq!(b.cmos_bytes(), ([0x32, 0x41], [0x32, 0x41]));
        let mut faults = Vec::new();
        b.parse("-boot", "dc,once=n,menu=on,splash-time=5000", &mut faults);
        b.judge(&mut faults);
        assert_eq!(faults, []);
        assert_eq!(b.cmos_bytes(), ([0x04, 0x01], [0x23, 0x01]));
        assert_eq!((b.menu, b.splash_time, b.strict), (true, Some(5000), false));
        b.parse("-boot", "order=ccx,splash-time=70000,mneu=on,strict=2", &mut faults);
        b.judge(&mut faults);
        let all: Vec<String> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(all.len(), 5, "{all:?}");
        assert!(all.iter().any(|f| f.contains("'x'")) && all.iter().any(|f| f.contains("twice")));
    }
}
