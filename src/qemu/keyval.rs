//! Option values: `first,key=value,nested.key=value,flag` with `,,` for a comma, or a JSON object.
//!
//! Both become one JSON object. In the first form all values are strings; a word without `=` is the
//! implied key's value in front, and `on` (or `off` with `no` before its name) elsewhere.

use crate::config::{Fault, parse};
use serde_json::{Map, Value};

/// The pairs of one option.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// The option, for messages.
    option: String,
    members: Map<String, Value>,
}

impl Pairs {
    /// Reads the value of `option`; `implied` is the key of a first word without one.
    pub fn parse(option: &str, text: &str, implied: Option<&str>) -> Result<Pairs, Fault> {
        if text.starts_with('{') {
            return match serde_json::from_str(text) {
                Ok(Value::Object(members)) => Ok(Pairs { option: option.into(), members }),
                Ok(_) => Err(Fault::new(format!("-{option} needs a JSON object"), "write {…}")),
                Err(e) => {
                    Err(Fault::new(format!("-{option} is no JSON: {e}"), "correct its spelling"))
                }
            };
        }
        let mut pairs = Pairs { option: option.into(), members: Map::new() };
        for (i, word) in parse::split_commas(text).iter().enumerate() {
            match word.split_once('=') {
                Some((key, value)) => pairs.insert(key, value)?,
                None => match implied.filter(|_| i == 0) {
                    Some(key) => pairs.insert(key, word)?,
                    None if word.is_empty() => {}
                    None => match word.strip_prefix("no").filter(|w| *w == "wait" || *w == "delay")
                    {
                        Some(key) => pairs.insert(key, "off")?,
                        None => pairs.insert(word, "on")?,
                    },
                },
            }
        }
        Ok(pairs)
    }

    /// Puts a value at a key, which may name members of members by dots.
    fn insert(&mut self, key: &str, value: &str) -> Result<(), Fault> {
        let mut at = &mut self.members;
        let mut steps = key.split('.').peekable();
        while let Some(step) = steps.next() {
            if steps.peek().is_none() {
                at.insert(step.to_string(), value.into());
                break;
            }
            let inner = at.entry(step).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(inner) = inner else {
                let what =
                    format!("-{}: key '{key}' lies inside one that has a value", self.option);
                return Err(Fault::new(what, "give one of the two"));
            };
            at = inner;
        }
        Ok(())
    }

    /// Takes the text at `key`; numbers and truth values of JSON are written as text.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.members.remove(key).map(|v| scalar(&v))
    }

    /// Takes what is at `key` as it is.
    pub fn take_value(&mut self, key: &str) -> Option<Value> {
        self.members.remove(key)
    }

    /// Takes the text at `key`, which must be there.
    pub fn need(&mut self, key: &str) -> Result<String, Fault> {
        self.take(key).ok_or_else(|| {
            Fault::new(format!("-{} has no '{key}'", self.option), format!("add {key}=…"))
        })
    }

    /// Takes a truth value.
    pub fn flag(&mut self, key: &str) -> Result<Option<bool>, Fault> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(Some(true)),
            "off" | "no" | "false" | "n" => Ok(Some(false)),
            _ => Err(Fault::new(
                format!("-{} {key} cannot be '{text}'", self.option),
                "write on or off",
            )),
        }
    }

    /// Takes a number.
    pub fn number<T: std::str::FromStr>(&mut self, key: &str) -> Result<Option<T>, Fault> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.parse() {
            Ok(n) => Ok(Some(n)),
            Err(_) => {
                let what = format!("-{} {key} cannot be '{text}'", self.option);
                Err(Fault::new(what, "write a number that fits"))
            }
        }
    }

    /// Takes the object at `key`.
    pub fn inner(&mut self, key: &str) -> Pairs {
        let members = match self.members.remove(key) {
            Some(Value::Object(m)) => m,
            Some(other) => {
                self.members.insert(key.into(), other);
                Map::new()
            }
            None => Map::new(),
        };
        Pairs { option: format!("{} {key}", self.option), members }
    }

    /// What is left, as flat pairs of text.
    pub fn rest(self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        flatten("", &self.members, &mut all);
        all
    }

    /// The faults of keys that nobody has taken; `known` are those that exist.
    pub fn leftovers(self, known: &[&str]) -> Vec<Fault> {
        let option = self.option.clone();
        self.rest()
            .into_iter()
            .map(|(key, value)| {
                let what = format!("-{option} {key}={value} is not supported");
                Fault::new(
                    what,
                    tandem_accel::suggest::closest_or(&key, known, || "remove it".into()),
                )
            })
            .collect()
    }
}

/// A JSON scalar as the other form would write it.
fn scalar(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Bool(true) => "on".into(),
        Value::Bool(false) => "off".into(),
        other => other.to_string(),
    }
}

fn flatten(prefix: &str, members: &Map<String, Value>, all: &mut Vec<(String, String)>) {
    for (key, value) in members {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(inner) => flatten(&key, inner, all),
            other => all.push((key, scalar(other))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let mut a =
            Pairs::parse("blockdev", "file,node-name=a,,b,cache.direct=on,ro", Some("driver"))
                .unwrap();
        let json = r#"{"driver":"file","node-name":"a,b","cache":{"direct":true},"ro":true}"#;
        let mut b = Pairs::parse("blockdev", json, None).unwrap();
        for p in [&mut a, &mut b] {
            assert_eq!(p.take("driver").as_deref(), Some("file"));
            assert_eq!(p.need("node-name").unwrap(), "a,b");
            assert_eq!(p.inner("cache").flag("direct").unwrap(), Some(true));
            assert_eq!(p.flag("ro").unwrap(), Some(true));
            assert!(p.need("x").is_err());
            assert!(p.clone().rest().is_empty());
        }
    }

    #[test]
    fn faults_are_told() {
        assert!(Pairs::parse("x", "{", None).is_err());
        assert!(Pairs::parse("x", "a=1,a.b=2", None).is_err());
        let mut p = Pairs::parse("x", "wait=maybe,serverr=on,n=300", None).unwrap();
        assert!(p.flag("wait").is_err() && p.number::<u8>("n").is_err());
        assert!(p.leftovers(&["server"])[0].to_string().contains("did you mean 'server'?"));
        let mut p = Pairs::parse("x", "socket,nowait", Some("backend")).unwrap();
        assert_eq!(p.flag("wait").unwrap(), Some(false));
    }
}
