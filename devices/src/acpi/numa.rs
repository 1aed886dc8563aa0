//! The tables that tell of nodes: SRAT and SLIT.

use super::board::Board;
use super::system::table;

const ENABLED: u32 = 1;

/// System resource affinity table, revision 3 (ACPI 6.4 §5.2.16), of a board with nodes.
pub fn srat(board: &Board) -> Option<Vec<u8>> {
    let numa = board.numa.as_ref()?;
    let mut b = Vec::new();
    b.extend(1u32.to_le_bytes());
    b.extend([0; 8]);
    for (cpu, node) in board.cpus.iter().zip(&numa.cpus) {
        match u8::try_from(cpu.apic_id) {
            // Local APIC affinity (§5.2.16.1).
            Ok(id) if id < 255 => {
                let domain = node.to_le_bytes();
                b.extend([0, 16, domain[0], id]);
                b.extend(ENABLED.to_le_bytes());
                b.extend([0, domain[1], domain[2], domain[3]]);
                b.extend([0; 4]);
            }
            // Local x2APIC affinity (§5.2.16.3).
            _ => {
                b.extend([2, 24, 0, 0]);
                b.extend(node.to_le_bytes());
                b.extend(cpu.apic_id.to_le_bytes());
                b.extend(ENABLED.to_le_bytes());
                b.extend([0; 8]);
            }
        }
    }
    // Memory affinity (§5.2.16.2).
    for m in &numa.memory {
        b.extend([1, 40]);
        b.extend(m.node.to_le_bytes());
        b.extend([0; 2]);
        b.extend(m.base.to_le_bytes());
        b.extend(m.len.to_le_bytes());
        b.extend([0; 4]);
        b.extend(ENABLED.to_le_bytes());
        b.extend([0; 8]);
    }
    Some(table(*b"SRAT", 3, &b))
}

/// System locality information table (ACPI 6.4 §5.2.17) of a board with nodes.
pub fn slit(board: &Board) -> Option<Vec<u8>> {
    let numa = board.numa.as_ref()?;
    let mut b = (numa.distances.len() as u64).to_le_bytes().to_vec();
    numa.distances.iter().for_each(|row| b.extend(row));
    Some(table(*b"SLIT", 1, &b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::board::{MemoryRange, Numa};

    #[test]
    fn nodes_are_told() {
        let mut board = Board::q35(vec![0, 1, 300]);
        assert_eq!((srat(&board), slit(&board)), (None, None));
        board.numa = Some(Numa {
            cpus: vec![0, 0x102, 1],
            memory: vec![MemoryRange { node: 1, base: 1 << 32, len: 0x1000 }],
            distances: vec![vec![10, 21], vec![22, 10]],
        });
        let t = srat(&board).unwrap();
        assert_eq!(t.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
        assert_eq!(t.len(), 36 + 12 + 2 * 16 + 24 + 40);
        assert_eq!(t[64..80], [0, 16, 2, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(t[80..92], [2, 24, 0, 0, 1, 0, 0, 0, 44, 1, 0, 0]);
        assert_eq!(t[104..120], [1, 40, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(t[120..136], [0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        let s = slit(&board).unwrap();
        assert_eq!(s[36..], [2, 0, 0, 0, 0, 0, 0, 0, 10, 21, 22, 10]);
    }
}
