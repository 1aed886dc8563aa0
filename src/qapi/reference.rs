//! The reference page of the interface, made from the definitions. `docs/qmp.md` holds it; a test
//! keeps the two the same.

use super::schema::{Described, Entity, Schema};
use std::fmt::Write;

/// The page, in Markdown.
pub fn page() -> String {
    let schema = Schema::whole();
    let mut own = Schema::default();
    let mut s = String::from(
        "# QMP reference\n\nMade from the definitions in `src/commands`; `tandem run --qmp help` \
         prints it.\n\n## Commands\n",
    );
    for c in super::commands() {
        let (args, ret) = ((c.arguments)(&mut own), (c.returns)(&mut own));
        let _ = write!(s, "\n### {}\n\n{}", c.name, text(c.doc));
        members(&mut s, schema.types().get(&args));
        if ret != "Nothing" {
            let _ = writeln!(s, "\nReturns: {}", link(&ret));
        }
    }
    s += "\n## Events\n";
    for e in super::events() {
        let data = (e.data)(&mut own);
        let _ = write!(s, "\n### {}\n\n{}", e.name, text(e.doc));
        members(&mut s, schema.types().get(&data));
    }
    s += "\n## Types\n";
    for (name, d) in schema.types() {
        if matches!(d.entity, Entity::Builtin(_) | Entity::Array(_)) || name.starts_with("q_") {
            continue;
        }
        let _ = write!(s, "\n### {name}\n\n{}", text(d.doc));
        members(&mut s, Some(d));
    }
    s
}

/// Lines of documentation, without the space after the comment's mark.
fn text(doc: &[&str]) -> String {
    doc.iter().map(|l| format!("{}\n", l.strip_prefix(' ').unwrap_or(l))).collect()
}

fn one_line(doc: &[&str]) -> String {
    doc.iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ")
}

fn link(ty: &str) -> String {
    format!("`{ty}`")
}

fn members(s: &mut String, d: Option<&Described>) {
    match d.map(|d| &d.entity) {
        Some(Entity::Object(members, variants)) => {
            if !members.is_empty() {
                s.push('\n');
            }
            for m in members {
                let optional = if m.optional { ", optional" } else { "" };
                let doc = one_line(m.doc);
                let _ = writeln!(s, "- `{}` ({}{optional}): {doc}", m.name, link(&m.ty));
            }
            if let Some((tag, cases)) = variants {
                for (case, ty) in cases {
                    let _ = writeln!(s, "  - `{tag}` = `{case}`: members of {}", link(ty));
                }
            }
        }
        Some(Entity::Choice(values)) => {
            s.push('\n');
            for (word, doc) in values {
                let _ = writeln!(s, "- `{word}`: {}", one_line(doc));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    /// `TANDEM_BLESS=1 cargo test reference` writes the page anew.
    #[test]
    fn the_page_in_the_repository_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/qmp.md");
        let page = super::page();
        if std::env::var_os("TANDEM_BLESS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == page,
            "docs/qmp.md is not current: run TANDEM_BLESS=1 cargo test reference"
        );
    }

    #[test]
    fn everything_is_documented() {
        for c in crate::qapi::commands() {
            assert!(!c.doc.is_empty(), "{}", c.name);
        }
        for e in crate::qapi::events() {
            assert!(!e.doc.is_empty(), "{}", e.name);
        }
        for (name, d) in crate::qapi::schema::Schema::whole().types() {
            if let super::Entity::Object(members, _) = &d.entity {
                members.iter().for_each(|m| assert!(!m.doc.is_empty(), "{name}.{}", m.name));
            }
        }
    }

    #[test]
    fn names_are_unique() {
        for pair in crate::qapi::commands().windows(2) {
            assert_ne!(pair[0].name, pair[1].name);
        }
    }
}
