//! The script by which firmware places tables that it gets as files: allocate a file's memory, add
//! the address of one file to a field of another, put a checksum into a field (behaviour: the
//! linker/loader interface of QEMU's `etc/table-loader`).

/// Bytes of a file name's field.
const NAME: usize = 56;
/// Bytes of a command.
const COMMAND: usize = 128;

/// Where a file's memory is taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zone {
    /// Anywhere below 4 GiB.
    High = 1,
    /// The BIOS area below 1 MiB, where software scans for root pointers.
    BiosArea = 2,
}

/// A script under construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, number: u32, body: &[u8]) {
        let end = self.0.len() + COMMAND;
        self.0.extend(number.to_le_bytes());
        self.0.extend(body);
        self.0.resize(end, 0);
    }

    /// Loads `file` to memory of its own, aligned to `align` (a power of two).
    pub fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        let mut b = name(file);
        b.extend(align.to_le_bytes());
        b.push(zone as u8);
        self.command(1, &b);
    }

    /// Adds the address of `target` to the little-endian field of `size` bytes at `offset` of
    /// `file`.
    pub fn add_pointer(&mut self, file: &str, target: &str, offset: u32, size: u8) {
        let mut b = name(file);
        b.extend(name(target));
        b.extend(offset.to_le_bytes());
        b.push(size);
        self.command(2, &b);
    }

    /// Makes bytes `start..start + len` of `file` sum to zero by the byte at `offset`, which holds
    /// zero before.
    pub fn add_checksum(&mut self, file: &str, offset: u32, start: u32, len: u32) {
        let mut b = name(file);
        for v in [offset, start, len] {
            b.extend(v.to_le_bytes());
        }
        self.command(3, &b);
    }

    /// The script as a file.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A file name's field.
fn name(file: &str) -> Vec<u8> {
    let mut b = file.as_bytes().to_vec();
    b.truncate(NAME - 1);
    b.resize(NAME, 0);
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_layout() {
        let mut s = Script::default();
        s.allocate("a", 64, Zone::BiosArea);
        s.add_pointer("a", "b", 0x24, 8);
        s.add_checksum("b", 9, 1, 0x102);
        let b = s.bytes();
        assert_eq!(b.len(), 3 * 128);
        assert_eq!((b[0], b[4], b[60], b[64]), (1, b'a', 64, 2));
        let p = &b[128..];
        assert_eq!((p[0], p[4], p[60], p[116], p[120]), (2, b'a', b'b', 0x24, 8));
        let c = &b[256..];
        assert_eq!((c[0], c[4], c[60], c[64], c[68], c[69]), (3, b'b', 9, 1, 2, 1));
    }
}
