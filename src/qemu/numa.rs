//! `-numa`: nodes, with memory named by memory backends.

use super::Builder;
use super::keyval::Pairs;
use crate::config::{Fault, parse};

type Done = Result<(), Fault>;

impl Builder {
    /// `node,…`, `dist,…` or `cpu,…`; nodes are made when all backends are known.
    pub(super) fn numa(&mut self, value: &str) -> Done {
        self.numa.push(value.to_string());
        Ok(())
    }

    pub(super) fn settle_numa(&mut self) {
        // Nodes first: `cpu` puts processors into nodes that may come after it.
        let (cpus, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.numa).into_iter().partition(|w| w.starts_with("cpu,"));
        let mut backed = 0u64;
        for text in others {
            let words: Vec<String> = parse::split_commas(&text)
                .into_iter()
                .map(|word| match word.strip_prefix("memdev=") {
                    None => word,
                    Some(id) => match self.memory_backends.get(id) {
                        Some(bytes) => {
                            backed = backed.saturating_add(*bytes);
                            format!("mem={bytes}B")
                        }
                        None => {
                            self.faults.push(Fault::new(
                                format!("-numa {text}: memory backend '{id}' is not there"),
                                format!("add -object memory-backend-ram,id={id},size=…"),
                            ));
                            word
                        }
                    },
                })
                .collect();
            if !words.iter().any(|w| w.starts_with("memdev=")) {
                self.config.numa.add(&words.join(","), &mut self.faults);
            }
        }
        for text in cpus {
            let done = self.numa_cpu(&text);
            self.faults.extend(done.err());
        }
    }

    /// `cpu,node-id=N[,socket-id=S][,core-id=C][,thread-id=T]`: all processors that these name.
    fn numa_cpu(&mut self, text: &str) -> Done {
        let mut p = Pairs::parse("numa", text, Some("type"))?;
        let _ = p.take("type");
        let node: u32 = p.need("node-id")?.parse().map_err(|_| {
            Fault::new(format!("-numa {text} names no node"), "write node-id=NUMBER")
        })?;
        let (socket, core) = (p.number::<u32>("socket-id")?, p.number::<u32>("core-id")?);
        let thread = p.number::<u32>("thread-id")?;
        self.leftovers(p, &["node-id", "socket-id", "core-id", "thread-id"]);
        let smp = self.config.smp;
        let (cores, threads) = (smp.cores.max(1), smp.threads.max(1));
        let named = (0..smp.cpus).filter(|i| {
            let is = |want: Option<u32>, at: u32| want.is_none_or(|w| w == at);
            is(socket, i / (cores * threads))
                && is(core, i / threads % cores)
                && is(thread, i % threads)
        });
        let named: Vec<u32> = named.collect();
        match self.config.numa.nodes.get_mut(node as usize) {
            Some(n) if !named.is_empty() => n.cpus.extend(named),
            Some(_) => {
                let what = format!("-numa {text} names no processor");
                return Err(Fault::new(what, "use ids that -smp has"));
            }
            None => {
                let what = format!("-numa {text}: there is no node {node}");
                return Err(Fault::new(what, format!("add -numa node,nodeid={node}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Size, numa::Node};
    use crate::qemu::{Parsed, parse};

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn backends_and_single_processors() {
        let line = "-smp 4,sockets=2,cores=1,threads=2 -m 512 -numa cpu,node-id=1,socket-id=0 \
                    -numa node,nodeid=0,memdev=a -numa node,nodeid=1,memdev=b \
                    -numa cpu,node-id=0,socket-id=1,thread-id=1 \
                    -numa cpu,node-id=1,socket-id=1,thread-id=0 \
                    -object memory-backend-ram,id=a,size=134217728 \
                    -object memory-backend-ram,id=b,size=384M";
        let Ok(Parsed::Machine(c, _)) = parse(&words(line)) else { panic!("{line}") };
        let node = |cpus: &[u32], mib| Node { cpus: cpus.into(), memory: Some(Size::mib(mib)) };
        assert_eq!(c.numa.nodes, [node(&[3], 128), node(&[0, 1, 2], 384)]);
    }

    #[test]
    fn faults() {
        let line = "-numa node,memdev=x -numa cpu,node-id=4 -numa cpu,node-id=x -numa hmat-lb,x=1";
        let Err(faults) = parse(&words(line)) else { panic!("{line}") };
        let all: Vec<String> = faults.iter().map(|f| f.to_string()).collect();
        for text in ["backend 'x'", "no node 4", "names no node", "begin with node or dist"] {
            assert!(all.iter().any(|f| f.contains(text)), "{text}: {all:?}");
        }
    }
}
