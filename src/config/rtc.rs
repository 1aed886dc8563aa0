//! The date that a machine's clock shows, and whether late ticks of it are made up for.

use super::Fault;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use tandem_devices::timer::rtc::LostTicks;

/// The battery-backed clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rtc {
    /// What it shows at the start.
    pub base: Base,
    /// Periodic interrupts that the guest could not take in time come later.
    pub slew: bool,
}

/// What the clock shows at the start: `utc`, `localtime`, or a date such as `2026-11-20T13:45:59`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Base {
    /// The host's time in UTC.
    #[default]
    Utc,
    /// The host's time in the host's time zone.
    Local,
    /// This date and time.
    At(DateTime),
}

impl Base {
    /// Reads it.
    pub fn parse(s: &str) -> Result<Base, Fault> {
        match s {
            "utc" => Ok(Base::Utc),
            "localtime" => Ok(Base::Local),
            // Nanoseconds since 1970 in 64 bits end in 2262.
            date => match date.parse::<DateTime>() {
                Ok(d) if (1970..2262).contains(&d.year()) => Ok(Base::At(d)),
                _ => Err(Fault::new(
                    format!("the clock cannot show '{date}'"),
                    "write utc, localtime, or a date from 1970 on such as 2026-11-20T13:45:59",
                )),
            },
        }
    }

    /// What the clock shows in nanoseconds since 1970, when it is `utc` (in the same unit).
    pub fn at(self, utc: i64) -> i64 {
        match self {
            Base::Utc => utc,
            Base::Local => {
                let now = Timestamp::from_nanosecond(utc.into()).unwrap_or(Timestamp::UNIX_EPOCH);
                let offset = TimeZone::system().to_offset(now).seconds();
                utc.saturating_add(i64::from(offset) * 1_000_000_000)
            }
            Base::At(date) => date
                .to_zoned(TimeZone::UTC)
                .map(|z: Zoned| z.timestamp().as_nanosecond())
                .ok()
                .and_then(|ns| i64::try_from(ns).ok())
                .unwrap_or(utc),
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Base::Utc => f.write_str("utc"),
            Base::Local => f.write_str("localtime"),
            Base::At(date) => write!(f, "{date}"),
        }
    }
}

impl Serialize for Base {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Base {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Base, D::Error> {
        Base::parse(&String::deserialize(d)?).map_err(de::Error::custom)
    }
}

impl Rtc {
    /// Sets `base`, `clock` or `driftfix`; `None`: there is no such key.
    pub fn set(&mut self, key: &str, value: &str) -> Option<Result<(), Fault>> {
        Some(match (key, value) {
            ("base", _) => Base::parse(value).map(|b| self.base = b),
            ("driftfix", "slew" | "none") => {
                self.slew = value == "slew";
                Ok(())
            }
            ("driftfix", _) => Err(Fault::new(
                format!("driftfix={value} is not known"),
                "use driftfix=slew to make up for late ticks, or driftfix=none",
            )),
            ("clock", "host") => Ok(()),
            ("clock", _) => Err(Fault::new(
                format!("-rtc clock={value} is not supported"),
                "the clock follows the host's while the machine runs; use clock=host",
            )),
            _ => return None,
        })
    }

    /// Reads `key=value,…`.
    pub fn parse(s: &str, faults: &mut Vec<Fault>) -> Rtc {
        let mut rtc = Rtc::default();
        for word in s.split(',') {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match rtc.set(key, value) {
                Some(Ok(())) => {}
                Some(Err(f)) => faults.push(f),
                None => faults.push(Fault::new(
                    format!("--rtc has no '{key}'"),
                    "it takes base=utc|localtime|DATE and driftfix=slew|none",
                )),
            }
        }
        rtc
    }

    /// What becomes of late ticks.
    pub fn lost_ticks(&self) -> LostTicks {
        if self.slew { LostTicks::Slew } else { LostTicks::Discard }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases() {
        let day = Base::parse("2006-06-17").unwrap();
        assert_eq!(day.at(5), 1_150_502_400 * 1_000_000_000);
        assert_eq!(day.to_string(), "2006-06-17T00:00:00");
        let second = Base::parse("2006-06-17T16:01:21").unwrap();
        assert_eq!(second.at(5) - day.at(5), (16 * 3600 + 81) * 1_000_000_000);
        assert_eq!(Base::Utc.at(5), 5);
        for bad in ["", "now", "2006-13-01", "1969-01-01", "2262-01-01", "2006-06-17T25:00:00"] {
            assert!(Base::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn words() {
        let mut faults = Vec::new();
        let rtc = Rtc::parse("base=localtime,driftfix=slew,clock=host", &mut faults);
        assert_eq!((rtc, faults.len()), (Rtc { base: Base::Local, slew: true }, 0));
        Rtc::parse("base=never,driftfix=x,clock=vm,speed=2", &mut faults);
        assert_eq!(faults.len(), 4);
    }
}
