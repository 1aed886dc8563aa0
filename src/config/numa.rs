//! Nodes of processors and memory (NUMA), as the guest is told of them.
//!
//! A node is a name for processors and memory that lie near each other. Translated or not, all of
//! the guest's memory is as near to one host thread as to another; the nodes are there for software
//! that is to be tried on such a machine.

use super::{Fault, Size, Smp};
use serde::{Deserialize, Serialize};
use tandem_accel::suggest::one_of;

/// Most nodes.
pub const MAX_NODES: usize = 128;
/// Distance of a node to itself (ACPI 6.4 §5.2.17).
pub const LOCAL: u8 = 10;
/// Distance to another node where nothing else is said.
pub const REMOTE: u8 = 20;

/// The nodes of a machine; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Numa {
    /// Nodes; a node's number is its place.
    pub nodes: Vec<Node>,
    /// Distances that are not 20.
    pub distances: Vec<Distance>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// Its processors. If no node names any, sockets are dealt out in turn.
    pub cpus: Vec<u32>,
    /// Its memory. If no node says, each has as much.
    pub memory: Option<Size>,
}

/// How far one node is from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distance {
    /// From this node.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// 10 is a node's distance to itself, 255 means not reachable (ACPI 6.4 §5.2.17).
    pub value: u8,
}

/// Which node everything is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Node of each processor.
    pub cpus: Vec<u32>,
    /// Bytes of memory of each node, in the order in which memory is dealt out.
    pub memory: Vec<u64>,
    /// Distances, row by row.
    pub distances: Vec<Vec<u8>>,
}

impl Numa {
    /// Reads one `--numa`: `node[,nodeid=N][,cpus=A[-B]]…[,mem=SIZE]` or `dist,src=A,dst=B,val=V`.
    pub fn add(&mut self, text: &str, faults: &mut Vec<Fault>) {
        let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
        let words = rest.split(',').filter(|w| !w.is_empty());
        let pairs: Vec<_> = words.map(|w| w.split_once('=').unwrap_or((w, ""))).collect();
        let done = match kind {
            "node" => self.add_node(&pairs),
            "dist" => self.add_distance(&pairs),
            _ => Err(Fault::new(
                format!("--numa {text} names no kind of thing"),
                "begin with node or dist, for example --numa node,cpus=0-1,mem=1G",
            )),
        };
        faults.extend(done.err());
    }

    fn add_node(&mut self, pairs: &[(&str, &str)]) -> Result<(), Fault> {
        let mut number = self.nodes.len();
        let mut node = Node::default();
        for &(key, value) in pairs {
            match key {
                "nodeid" => number = count(key, value)? as usize,
                "cpus" => node.cpus.extend(range(value)?),
                "mem" => node.memory = Some(Size::parse(value)?),
                _ => return Err(unknown(key, &["nodeid", "cpus", "mem"])),
            }
        }
        if number >= MAX_NODES {
            return Err(Fault::new(
                format!("--numa nodeid={number} is too large"),
                format!("number the nodes from 0 to {}", MAX_NODES - 1),
            ));
        }
        if number < self.nodes.len() && self.nodes[number] != Node::default() {
            let what = format!("--numa nodeid={number} is given twice");
            return Err(Fault::new(what, "give each node once"));
        }
        self.nodes.resize(self.nodes.len().max(number + 1), Node::default());
        self.nodes[number] = node;
        Ok(())
    }

    fn add_distance(&mut self, pairs: &[(&str, &str)]) -> Result<(), Fault> {
        let (mut from, mut to, mut value) = (None, None, None);
        for &(key, text) in pairs {
            let slot = match key {
                "src" => &mut from,
                "dst" => &mut to,
                "val" => &mut value,
                _ => return Err(unknown(key, &["src", "dst", "val"])),
            };
            *slot = Some(count(key, text)?);
        }
        let (Some(from), Some(to), Some(value)) = (from, to, value) else {
            let what = "--numa dist says not everything";
            return Err(Fault::new(what, "write --numa dist,src=NODE,dst=NODE,val=10…255"));
        };
        let value = u8::try_from(value).map_err(|_| {
            Fault::new(format!("--numa val={value} is no distance"), "use 10 to 255")
        })?;
        self.distances.push(Distance { from, to, value });
        Ok(())
    }

    /// Says where everything is; `None` for a machine without nodes.
    pub fn place(&self, smp: Smp, memory: Size) -> Result<Option<Placement>, Vec<Fault>> {
        if self.nodes.is_empty() && self.distances.is_empty() {
            return Ok(None);
        }
        let mut faults = Vec::new();
        if self.nodes.len() > MAX_NODES {
            let what = format!("a machine cannot have {} nodes", self.nodes.len());
            faults.push(Fault::new(what, format!("give at most {MAX_NODES}")));
            return Err(faults);
        }
        let cpus = self.place_cpus(smp, &mut faults);
        let memory = self.place_memory(memory, &mut faults);
        let distances = self.table(&mut faults);
        if faults.is_empty() {
            Ok(Some(Placement { cpus, memory, distances }))
        } else {
            Err(faults)
        }
    }

    fn place_cpus(&self, smp: Smp, faults: &mut Vec<Fault>) -> Vec<u32> {
        let nodes = self.nodes.len().max(1) as u32;
        if self.nodes.iter().all(|n| n.cpus.is_empty()) {
            let per_socket = smp.cores.saturating_mul(smp.threads).max(1);
            return (0..smp.cpus).map(|i| i / per_socket % nodes).collect();
        }
        let mut places = vec![None; smp.cpus as usize];
        for (n, node) in self.nodes.iter().enumerate() {
            for &cpu in &node.cpus {
                match places.get_mut(cpu as usize) {
                    None => faults.push(Fault::new(
                        format!("node {n} has processor {cpu}, and the machine has {}", smp.cpus),
                        "count processors from 0",
                    )),
                    Some(Some(other)) => faults.push(Fault::new(
                        format!("processor {cpu} is in node {other} and in node {n}"),
                        "put it into one of them",
                    )),
                    Some(place) => *place = Some(n as u32),
                }
            }
        }
        let left: Vec<_> = (0..).zip(&places).filter(|(_, p)| p.is_none()).collect();
        if let Some((cpu, _)) = left.first() {
            faults.push(Fault::new(
                format!("processor {cpu} is in no node"),
                format!("add it to one, for example --numa node,cpus={cpu}"),
            ));
        }
        places.into_iter().map(Option::unwrap_or_default).collect()
    }

    fn place_memory(&self, memory: Size, faults: &mut Vec<Fault>) -> Vec<u64> {
        let said: Vec<u64> = self.nodes.iter().flat_map(|n| n.memory).map(Size::bytes).collect();
        let nodes = self.nodes.len() as u64;
        if said.is_empty() {
            let each = (memory.bytes() / nodes.max(1)) & !((1 << 20) - 1);
            let mut shares = vec![each; nodes as usize];
            if let Some(last) = shares.last_mut() {
                *last = memory.bytes() - each * (nodes - 1);
            }
            return shares;
        }
        let total = said.iter().try_fold(0u64, |a, b| a.checked_add(*b));
        if said.len() < self.nodes.len() {
            faults.push(Fault::new(
                "some nodes say how much memory they have, others do not",
                "give mem=SIZE for all of them or for none",
            ));
        } else if total != Some(memory.bytes()) {
            faults.push(Fault::new(
                format!("the nodes' memory together is not the machine's {memory}"),
                "make the sum of mem=SIZE what --memory says",
            ));
        }
        said
    }

    fn table(&self, faults: &mut Vec<Fault>) -> Vec<Vec<u8>> {
        let n = self.nodes.len();
        let row = |i: usize| (0..n).map(|j| if i == j { LOCAL } else { REMOTE }).collect();
        let mut table: Vec<Vec<u8>> = (0..n).map(row).collect();
        // What is said in one direction holds for the other, unless that is said, too.
        for both in [true, false] {
            for &Distance { from, to, value } in &self.distances {
                let (i, j) = (from as usize, to as usize);
                let good = if from == to { value == LOCAL } else { value > LOCAL };
                if i >= n || j >= n || !good {
                    if both {
                        faults.push(Fault::new(
                            format!(
                                "a distance of {value} from node {from} to node {to} cannot be"
                            ),
                            "name nodes that are there; 10 is a node's own, others are 11 to 255",
                        ));
                    }
                    continue;
                }
                table[i][j] = value;
                if both {
                    table[j][i] = value;
                }
            }
        }
        table
    }
}

fn count(key: &str, value: &str) -> Result<u32, Fault> {
    value.parse().map_err(|_| {
        Fault::new(format!("--numa {key}={value} is not a number"), "give a plain number")
    })
}

fn unknown(key: &str, keys: &[&str]) -> Fault {
    Fault::new(format!("--numa has no key '{key}'"), one_of(key, keys))
}

/// `3` or `0-3`.
fn range(text: &str) -> Result<std::ops::RangeInclusive<u32>, Fault> {
    let (a, b) = text.split_once('-').unwrap_or((text, text));
    let (a, b) = (count("cpus", a)?, count("cpus", b)?);
    if a > b || b > u32::from(u16::MAX) {
        let what = format!("--numa cpus={text} is no range of processors");
        return Err(Fault::new(what, "write for example cpus=0-3"));
    }
    Ok(a..=b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(words: &[&str], cpus: u32, mib: u64) -> Result<Option<Placement>, String> {
        let (mut numa, mut faults) = (Numa::default(), Vec::new());
        words.iter().for_each(|w| numa.add(w, &mut faults));
        let smp = Smp { cpus, sockets: cpus, cores: 1, threads: 1 };
        let all = |f: Vec<Fault>| f.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n");
        if !faults.is_empty() {
            return Err(all(faults));
        }
        numa.place(smp, Size::mib(mib)).map_err(all)
    }

    #[test]
    fn what_is_not_said_is_dealt_out() {
        assert_eq!(place(&[], 4, 512), Ok(None));
        let p = place(&["node", "node"], 4, 513).unwrap().unwrap();
        assert_eq!(p.cpus, [0, 1, 0, 1]);
        assert_eq!(p.memory, [256 << 20, 257 << 20]);
        assert_eq!(p.distances, [[10, 20], [20, 10]]);
    }

    #[test]
    fn what_is_said_holds() {
        let p = place(
            &[
                "node,nodeid=1,cpus=0-1,cpus=3,mem=100M",
                "node,nodeid=0,cpus=2,mem=412M",
                "dist,src=0,dst=1,val=31",
            ],
            4,
            512,
        );
        let p = p.unwrap().unwrap();
        assert_eq!(p.cpus, [1, 1, 0, 1]);
        assert_eq!(p.memory, [412 << 20, 100 << 20]);
        assert_eq!(p.distances, [[10, 31], [31, 10]]);
        let one_way = ["node", "node", "dist,src=1,dst=0,val=50", "dist,src=0,dst=1,val=40"];
        assert_eq!(place(&one_way, 2, 512).unwrap().unwrap().distances, [[10, 40], [50, 10]]);
    }

    #[test]
    fn faults_name_the_thing() {
        let says = |words: &[&str], text: &str| {
            let e = place(words, 2, 512).unwrap_err();
            assert!(e.contains(text), "{e}");
        };
        says(&["nod"], "begin with node or dist");
        says(&["node,cpu=1"], "did you mean 'cpus'");
        says(&["node,cpus=3-1"], "no range");
        says(&["node,cpus=0-4000000000"], "no range");
        says(&["node,nodeid=4000"], "0 to 127");
        says(&["node,cpus=0", "node"], "processor 1 is in no node");
        says(&["node,cpus=0-1", "node,cpus=1"], "processor 1 is in node 0 and in node 1");
        says(&["node,cpus=0-2"], "has processor 2, and the machine has 2");
        says(&["node,mem=1G"], "not the machine's 512");
        says(&["node,mem=512M", "node"], "for all of them or for none");
        says(&["node", "dist,src=0,dst=1,val=20"], "from node 0 to node 1");
        says(&["node", "dist,src=0,dst=0,val=11"], "cannot be");
        says(&["node", "dist,src=0,dst=0,val=1000"], "no distance");
        says(&["dist,src=0"], "not everything");
    }
}
