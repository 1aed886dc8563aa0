//! Options about disks.

use super::keyval::Pairs;
use super::{Builder, Node, NodeKind};
use crate::config::{Drive, Fault, Interface};
use serde_json::Value;

type Done = Result<(), Fault>;

impl Builder {
    pub(super) fn drive(&mut self, value: &str) -> Done {
        let mut d = Drive::parse(value, &mut self.faults);
        if let Some(d) = &mut d {
            d.snapshot |= self.snapshot;
        }
        self.config.drives.extend(d);
        Ok(())
    }

    /// `-hda` to `-hdd`.
    pub(super) fn ide_disk(&mut self, port: u8, file: &str) -> Done {
        let (interface, index) = (Interface::Ide, Some(port));
        self.config.drives.push(Drive { file: file.into(), interface, index, ..Drive::default() });
        Ok(())
    }

    pub(super) fn blockdev(&mut self, value: &str) -> Done {
        let p = Pairs::parse("blockdev", value, Some("driver"))?;
        self.node(p, None).map(|_| ())
    }

    /// Takes a node, and those inside its definition; returns its name. `name` is one made up by who
    /// contains it, for a node that has none of its own.
    fn node(&mut self, mut p: Pairs, name: Option<String>) -> Result<String, Fault> {
        let driver = p.need("driver")?;
        let name = match (p.take("node-name"), name) {
            (Some(n), _) | (None, Some(n)) => n,
            (None, None) => {
                return Err(Fault::new("-blockdev has no 'node-name'", "add node-name=NAME"));
            }
        };
        if self.nodes.iter().any(|n| n.name == name) {
            let what = format!("two block nodes are called '{name}'");
            return Err(Fault::new(what, "give each a node-name of its own"));
        }
        let mut drive = Drive { id: Some(name.clone()), ..Drive::default() };
        drive.interface = Interface::None;
        self.common(&mut p, &mut drive)?;
        let kind = match driver.as_str() {
            "file" => {
                drive.file = p.need("filename")?.into();
                if let Some(aio) = p.take("aio") {
                    drive.aio = Some(aio);
                }
                let _ = (p.take("locking"), p.take("auto-read-only"), p.take("drop-cache"));
                NodeKind::File(Box::new(drive))
            }
            "raw" | "qcow2" => {
                drive.format = Some(driver.clone());
                let no_backing = match p.take_value("backing") {
                    None => false,
                    Some(Value::Null) => true,
                    Some(Value::String(node)) => {
                        drive.backing = Some(node);
                        false
                    }
                    Some(_) => {
                        let what = format!("-blockdev {name}: 'backing' is no node's name");
                        return Err(Fault::new(what, "name a node, or write null"));
                    }
                };
                let (file, inline) = match p.take_value("file") {
                    Some(Value::String(file)) => (file, false),
                    Some(inner @ Value::Object(_)) => {
                        let made_up = format!("{name}:file");
                        let inner = Pairs::parse("blockdev", &inner.to_string(), None)?;
                        (self.node(inner, Some(made_up))?, true)
                    }
                    _ => {
                        let what = format!("-blockdev {name} has no 'file'");
                        return Err(Fault::new(what, "add file=NODE"));
                    }
                };
                NodeKind::Format { drive: Box::new(drive), file, no_backing, inline }
            }
            _ => {
                let drivers = ["file", "raw", "qcow2"];
                let remedy = tandem_accel::suggest::one_of(&driver, &drivers);
                return Err(Fault::new(format!("-blockdev {driver} is not supported"), remedy));
            }
        };
        self.leftovers(p, &["driver", "node-name", "filename", "file", "read-only", "cache"]);
        self.nodes.push(Node { name: name.clone(), kind });
        Ok(name)
    }

    fn common(&mut self, p: &mut Pairs, drive: &mut Drive) -> Done {
        drive.readonly = p.flag("read-only")?.unwrap_or(false);
        let _ = p.flag("auto-read-only")?;
        let mut cache = p.inner("cache");
        let (direct, no_flush) = (cache.flag("direct")?, cache.flag("no-flush")?);
        self.leftovers(cache, &["direct", "no-flush"]);
        drive.cache = match (direct.unwrap_or(false), no_flush.unwrap_or(false)) {
            (false, false) => None,
            (true, false) => Some("none".into()),
            (false, true) => Some("unsafe".into()),
            (true, true) => {
                let what = "cache.direct=on with cache.no-flush=on is not supported";
                self.faults.push(Fault::new(what, "use one of them"));
                None
            }
        };
        drive.discard = matches!(p.take("discard").as_deref(), Some("unmap" | "on"));
        drive.detect_zeroes = p.take("detect-zeroes");
        Ok(())
    }

    /// Makes drives of the nodes: those of formats, and those of files on which no format lies.
    pub(super) fn settle_nodes(&mut self) {
        let nodes = std::mem::take(&mut self.nodes);
        let below = |name: &str| nodes.iter().find(|n| n.name == name).map(|n| &n.kind);
        let covered = |name: &str| {
            let lies_on =
                |n: &Node| matches!(&n.kind, NodeKind::Format { file, .. } if file == name);
            nodes.iter().any(lies_on)
        };
        for node in &nodes {
            match &node.kind {
                NodeKind::File(_) if covered(&node.name) => {}
                NodeKind::File(d) => {
                    let format = Some("raw".into());
                    self.config.drives.push(Drive { format, protocol: true, ..(**d).clone() });
                }
                NodeKind::Format { drive, file, no_backing, inline } => match below(file) {
                    Some(NodeKind::File(f)) => {
                        let d = (**drive).clone().on_file(f, file, *no_backing, *inline);
                        self.config.drives.push(d);
                    }
                    Some(NodeKind::Format { .. }) => self.faults.push(Fault::new(
                        format!("block node '{}' is a format on a format", node.name),
                        "put it on a file",
                    )),
                    None => self.faults.push(Fault::new(
                        format!("block node '{}' lies on '{file}', which is not there", node.name),
                        "add it with -blockdev",
                    )),
                },
            }
        }
    }
}
