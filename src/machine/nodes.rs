//! Where nodes are in the guest's memory.

use super::memmap::MemoryMap;
use crate::config::VmConfig;
use tandem_devices::acpi::board::{MemoryRange, Numa};

/// The nodes of a configuration that has been judged, for the ACPI tables.
pub fn nodes(config: &VmConfig) -> Option<Numa> {
    let placement = config.numa.place(config.smp, config.memory).ok().flatten()?;
    let runs = MemoryMap::new(config.memory).runs(&placement.memory);
    let range = |(node, base, len): (usize, u64, u64)| MemoryRange { node: node as u32, base, len };
    Some(Numa {
        cpus: placement.cpus,
        memory: runs.into_iter().map(range).collect(),
        distances: placement.distances,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Size, Smp};

    #[test]
    fn a_node_goes_round_the_hole() {
        let mut c = VmConfig {
            memory: Size::mib(4096),
            smp: Smp { cpus: 2, sockets: 2, cores: 1, threads: 1 },
            ..VmConfig::default()
        };
        assert_eq!(nodes(&c), None);
        let mut faults = Vec::new();
        c.numa.add("node,mem=1G", &mut faults);
        c.numa.add("node,mem=3G", &mut faults);
        assert!(faults.is_empty());
        let map = MemoryMap::new(c.memory);
        let range = |node, base, len| MemoryRange { node, base, len };
        let numa = nodes(&c).unwrap();
        assert_eq!(
            numa.memory,
            [
                range(0, 0, 1 << 30),
                range(1, 1 << 30, map.low_end - (1 << 30)),
                range(1, 1 << 32, map.high),
            ]
        );
        assert_eq!(numa.cpus, [0, 1]);
    }
}
