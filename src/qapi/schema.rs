//! Introspection: what `query-qmp-schema` answers, made from the definitions.

use super::{Error, Object, Path, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tandem_accel::suggest::one_of;

/// A member of an object type.
pub struct Member {
    /// Name.
    pub name: String,
    /// What it means, by lines.
    pub doc: &'static [&'static str],
    /// Name of its type.
    pub ty: String,
    /// It may be left out.
    pub optional: bool,
}

/// What a type is.
pub enum Entity {
    /// One of JSON's own.
    Builtin(&'static str),
    /// One of some words, each with what it means.
    Choice(Vec<(&'static str, &'static [&'static str])>),
    /// A list of another type.
    Array(String),
    /// An object; if it has variants: the tag, and the type of further members for its values.
    Object(Vec<Member>, Option<(&'static str, Vec<(&'static str, String)>)>),
}

/// A type with its documentation.
pub struct Described {
    /// What it is.
    pub entity: Entity,
    /// What it means, by lines.
    pub doc: &'static [&'static str],
}

/// Types by name, as gathered from definitions.
#[derive(Default)]
pub struct Schema {
    types: BTreeMap<String, Described>,
}

impl Schema {
    /// All types that commands and events use.
    pub fn whole() -> Schema {
        let mut s = Schema::default();
        for c in super::commands() {
            (c.arguments)(&mut s);
            (c.returns)(&mut s);
        }
        for e in super::events() {
            (e.data)(&mut s);
        }
        s
    }

    /// The types.
    pub fn types(&self) -> &BTreeMap<String, Described> {
        &self.types
    }

    pub(super) fn builtin(&mut self, name: &str, json: &'static str) -> String {
        let described = Described { entity: Entity::Builtin(json), doc: &[] };
        self.types.entry(name.to_string()).or_insert(described);
        name.to_string()
    }

    pub(super) fn array(&mut self, element: String) -> String {
        let name = format!("[{element}]");
        let described = Described { entity: Entity::Array(element), doc: &[] };
        self.types.entry(name.clone()).or_insert(described);
        name
    }

    /// Takes note of a type of words.
    pub fn choice(
        &mut self,
        name: &str,
        doc: &'static [&'static str],
        values: &[(&'static str, &'static [&'static str])],
    ) -> String {
        let described = Described { entity: Entity::Choice(values.to_vec()), doc };
        self.types.entry(name.to_string()).or_insert(described);
        name.to_string()
    }

    /// Takes note of an object type.
    pub fn object<T: Object>(&mut self, name: &str, doc: &'static [&'static str]) -> String {
        if !self.types.contains_key(name) {
            // Stands in until the members are known, as a type may contain itself.
            let entity = Entity::Object(Vec::new(), None);
            self.types.insert(name.to_string(), Described { entity, doc });
            let entity = Entity::Object(T::members(self), T::variants(self));
            self.types.insert(name.to_string(), Described { entity, doc });
        }
        name.to_string()
    }

    /// Takes note of the arguments of a command or the data of an event.
    pub fn arguments<T: Object>(&mut self, of: &str) -> String {
        let empty = T::members(self).is_empty();
        let name = if empty { "q_empty".to_string() } else { format!("q_obj_{of}-arg") };
        self.object::<T>(&name, &[])
    }

    /// The answer of `query-qmp-schema`.
    pub fn to_json(&self) -> Vec<Value> {
        let mut all: Vec<Value> = Vec::new();
        let mut me = Schema::default();
        for c in super::commands() {
            let (arg, ret) = ((c.arguments)(&mut me), (c.returns)(&mut me));
            let mut v = json!({
                "name": c.name, "meta-type": "command", "arg-type": arg, "ret-type": ret,
            });
            if !c.features.is_empty() {
                v["features"] = c.features.into();
            }
            all.push(v);
        }
        for e in super::events() {
            let arg = (e.data)(&mut me);
            all.push(json!({ "name": e.name, "meta-type": "event", "arg-type": arg }));
        }
        all.extend(self.types.iter().map(|(name, d)| entity(name, &d.entity)));
        all
    }
}

fn entity(name: &str, e: &Entity) -> Value {
    match e {
        Entity::Builtin(json) => json!({"name": name, "meta-type": "builtin", "json-type": json}),
        Entity::Array(element) => {
            json!({"name": name, "meta-type": "array", "element-type": element})
        }
        Entity::Choice(values) => {
            let words: Vec<&str> = values.iter().map(|(w, _)| *w).collect();
            let members: Vec<Value> = words.iter().map(|w| json!({ "name": w })).collect();
            json!({"name": name, "meta-type": "enum", "members": members, "values": words})
        }
        Entity::Object(members, variants) => {
            let members: Vec<Value> = members
                .iter()
                .map(|m| match m.optional {
                    // A member that may be left out has a default, which the schema leaves open.
                    true => json!({"name": m.name, "type": m.ty, "default": null}),
                    false => json!({"name": m.name, "type": m.ty}),
                })
                .collect();
            let mut v = json!({"name": name, "meta-type": "object", "members": members});
            if let Some((tag, cases)) = variants {
                v["tag"] = (*tag).into();
                v["variants"] =
                    cases.iter().map(|(case, ty)| json!({"case": case, "type": ty})).collect();
            }
            v
        }
    }
}

/// The value of `word` among `all`.
pub fn find_word<T: Copy>(all: &[(&'static str, T)], word: &str, at: &Path<'_>) -> Result<T> {
    match all.iter().find(|(w, _)| *w == word) {
        Some((_, v)) => Ok(*v),
        None => {
            let words: Vec<&str> = all.iter().map(|(w, _)| *w).collect();
            Err(no_word(word, &words, at))
        }
    }
}

/// The error of a word that is none of `words`.
pub fn no_word(word: &str, words: &[&str], at: &Path<'_>) -> Error {
    let short: String = word.chars().take(64).collect();
    let remedy = one_of(&short, words);
    Error::new(format!("Parameter '{at}' does not accept value '{short}'; {remedy}"))
}
