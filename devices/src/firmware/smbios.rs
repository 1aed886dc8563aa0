//! SMBIOS (DMTF DSP0134 3.4) as a pure function from a description of the machine to bytes: what
//! `dmidecode` and the kernel's DMI list show.

/// What the tables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Maker of the machine.
    pub manufacturer: String,
    /// Product.
    pub product: String,
    /// Version of the product.
    pub version: String,
    /// UUID of the machine as text has it; all zeros: none.
    pub uuid: [u8; 16],
    /// Name of the firmware's maker and its version; `None`: firmware describes itself.
    pub firmware: Option<(String, String)>,
    /// Processors.
    pub cpu: Cpu,
    /// Bytes of RAM, by range: first address and length.
    pub memory: Vec<(u64, u64)>,
}

/// The processors, all alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Sockets.
    pub sockets: u16,
    /// Cores of a socket.
    pub cores: u16,
    /// Threads of a socket.
    pub threads: u16,
    /// CPUID leaf 1: EAX and EDX.
    pub signature: (u32, u32),
    /// Name of the vendor.
    pub vendor: String,
    /// Name of the processor.
    pub name: String,
    /// Frequency in MHz, 0 if unknown.
    pub mhz: u16,
}

/// Structures and the entry point that leads to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// The structures.
    pub structures: Vec<u8>,
    /// The 32-bit entry point (§5.2.1), with the address of the structures still 0.
    pub entry: Vec<u8>,
}

/// Length of the 32-bit entry point.
pub const ENTRY_LEN: usize = 31;

/// Handles by structure type: the type in the upper byte.
const SYSTEM: u16 = 0x0100;
const CHASSIS: u16 = 0x0300;
const PROCESSOR: u16 = 0x0400;
const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_DEVICE: u16 = 0x1100;
const MAPPED: u16 = 0x1300;
/// Most megabytes of one memory device, so that its old-style size field holds them.
const DIMM_MIB: u64 = 16 << 10;
/// "Unknown", in most enumerations.
const UNKNOWN: u8 = 2;
const OTHER: u8 = 1;

/// A structure under construction: formatted part and strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Structure {
        let mut bytes = vec![kind, 0];
        bytes.extend(handle.to_le_bytes());
        Structure { bytes, strings: Vec::new(), count: 0 }
    }
    fn u8(&mut self, v: u8) -> &mut Self {
        self.bytes.push(v);
        self
    }
    fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes.extend(v.to_le_bytes());
        self
    }
    fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes.extend(v.to_le_bytes());
        self
    }
    fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes.extend(v.to_le_bytes());
        self
    }
    fn raw(&mut self, v: &[u8]) -> &mut Self {
        self.bytes.extend(v);
        self
    }
    /// A string's number; an empty string has none.
    fn string(&mut self, s: &str) -> &mut Self {
        let text: Vec<u8> = s.bytes().filter(|b| *b != 0).collect();
        let number = if text.is_empty() { 0 } else { self.count + 1 };
        if number != 0 {
            self.count = number;
            self.strings.extend(text);
            self.strings.push(0);
        }
        self.u8(number)
    }
    fn put(&mut self, to: &mut Set) {
        self.bytes[1] = self.bytes.len() as u8;
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        self.strings.push(0);
        to.largest = to.largest.max(self.bytes.len() + self.strings.len());
        to.bytes.append(&mut self.bytes);
        to.bytes.append(&mut self.strings);
        to.count += 1;
    }
}

#[derive(Default)]
struct Set {
    bytes: Vec<u8>,
    count: u16,
    largest: usize,
}

/// The tables of a machine.
pub fn tables(d: &Description) -> Tables {
    let mut set = Set::default();
    if let Some((vendor, version)) = &d.firmware {
        firmware(vendor, version).put(&mut set);
    }
    system(d).put(&mut set);
    chassis(d).put(&mut set);
    for socket in 0..d.cpu.sockets {
        processor(&d.cpu, socket).put(&mut set);
    }
    memory(d, &mut set);
    // No errors at boot.
    Structure::new(32, 0x2000).raw(&[0; 6]).u8(0).put(&mut set);
    Structure::new(127, 0x7f00).put(&mut set);
    let entry = entry(&set);
    Tables { structures: set.bytes, entry }
}

/// Type 0, BIOS information (§7.1).
fn firmware(vendor: &str, version: &str) -> Structure {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    let mut s = Structure::new(0, 0);
    s.string(vendor).string(version).u16(0xe800).string("01/01/2024").u8(0);
    s.u64(CHARACTERISTICS_NOT_SUPPORTED).u8(0).u8(VIRTUAL_MACHINE);
    s.u8(0).u8(0).u8(0xff).u8(0xff);
    s
}

/// Type 1, system information (§7.2).
fn system(d: &Description) -> Structure {
    const WAKE_POWER_SWITCH: u8 = 6;
    let mut s = Structure::new(1, SYSTEM);
    s.string(&d.manufacturer).string(&d.product).string(&d.version).string("");
    // The first three fields are little-endian numbers.
    let u = &d.uuid;
    s.raw(&[u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6]]).raw(&u[8..]);
    s.u8(WAKE_POWER_SWITCH).string("").string("");
    s
}

/// Type 3, enclosure (§7.4).
fn chassis(d: &Description) -> Structure {
    const SAFE: u8 = 3;
    let mut s = Structure::new(3, CHASSIS);
    s.string(&d.manufacturer).u8(OTHER).string(&d.version).string("").string("");
    s.u8(SAFE).u8(SAFE).u8(SAFE).u8(UNKNOWN).u32(0).u8(0).u8(0).u8(0).u8(0).string("");
    s
}

/// Type 4, processor (§7.5).
fn processor(c: &Cpu, socket: u16) -> Structure {
    const CENTRAL: u8 = 3;
    const POPULATED_ENABLED: u8 = 0x41;
    const CAPABLE_64BIT: u16 = 1 << 2;
    let count = |n: u16| if n > 255 { 0xff } else { n as u8 };
    let mut s = Structure::new(4, PROCESSOR + socket);
    s.string(&format!("CPU {socket}")).u8(CENTRAL).u8(OTHER).string(&c.vendor);
    s.u32(c.signature.0).u32(c.signature.1).string(&c.name);
    s.u8(0).u16(0).u16(c.mhz).u16(c.mhz).u8(POPULATED_ENABLED).u8(OTHER);
    // No cache structures.
    s.u16(0xffff).u16(0xffff).u16(0xffff).string("").string("").string("");
    s.u8(count(c.cores)).u8(count(c.cores)).u8(count(c.threads)).u16(CAPABLE_64BIT);
    s.u16(OTHER.into()).u16(c.cores).u16(c.cores).u16(c.threads);
    s
}

/// Types 16, 17 and 19: the memory array, its devices, and where they appear (§7.17, 7.18, 7.20).
fn memory(d: &Description, set: &mut Set) {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const MULTI_BIT_ECC: u8 = 6;
    const NO_ERROR_INFORMATION: u16 = 0xfffe;
    const FORM_DIMM: u8 = 9;
    const TYPE_RAM: u8 = 7;
    let total: u64 = d.memory.iter().map(|(_, len)| len).sum();
    let (mib, kib) = (total >> 20, total >> 10);
    let devices = mib.div_ceil(DIMM_MIB).max(1);
    let mut array = Structure::new(16, MEMORY_ARRAY);
    array.u8(SYSTEM_BOARD).u8(SYSTEM_MEMORY).u8(MULTI_BIT_ECC);
    let small = u32::try_from(kib).ok().filter(|k| *k < 0x8000_0000);
    array.u32(small.unwrap_or(0x8000_0000)).u16(NO_ERROR_INFORMATION);
    array.u16(devices.min(0xffff) as u16).u64(if small.is_some() { 0 } else { total });
    array.put(set);
    let mut left = mib;
    for i in 0..devices.min(0x100) as u16 {
        let size = left.min(DIMM_MIB);
        left -= size;
        let mut s = Structure::new(17, MEMORY_DEVICE + i);
        s.u16(MEMORY_ARRAY).u16(NO_ERROR_INFORMATION).u16(0xffff).u16(0xffff);
        s.u16(size as u16).u8(FORM_DIMM).u8(0).string(&format!("DIMM {i}")).string("");
        s.u8(TYPE_RAM).u16(1 << 1).u16(0).string(&d.manufacturer).string("").string("").string("");
        s.u8(0).u32(0).u16(0).u16(0).u16(0).u16(0);
        s.put(set);
    }
    for (i, (start, len)) in d.memory.iter().filter(|(_, len)| *len > 0).enumerate() {
        let end = start + len - 1;
        let kib = (u32::try_from(start >> 10).ok()).zip(u32::try_from(end >> 10).ok());
        let mut s = Structure::new(19, MAPPED + i as u16);
        let (a, b) = kib.unwrap_or((u32::MAX, u32::MAX));
        s.u32(a).u32(b).u16(MEMORY_ARRAY).u8(1);
        let wide = kib.is_none();
        s.u64(if wide { *start } else { 0 }).u64(if wide { end } else { 0 });
        s.put(set);
    }
}

/// The 32-bit entry point, version 2.8.
fn entry(set: &Set) -> Vec<u8> {
    let mut e = b"_SM_\0".to_vec();
    e.extend([ENTRY_LEN as u8, 2, 8]);
    e.extend((set.largest as u16).to_le_bytes());
    e.extend([0; 6]);
    e.extend(b"_DMI_\0");
    e.extend((set.bytes.len() as u16).to_le_bytes());
    e.extend([0; 4]);
    e.extend(set.count.to_le_bytes());
    e.push(0x28);
    sum(&mut e);
    e
}

/// Sets both checksums of a 32-bit entry point.
fn sum(e: &mut [u8]) {
    let total = |b: &[u8]| b.iter().fold(0u8, |a, x| a.wrapping_sub(*x));
    (e[4], e[0x15]) = (0, 0);
    e[0x15] = total(&e[0x10..]);
    e[4] = total(e);
}

impl Tables {
    /// Entry point and structures in one piece, to be put at `at` (a multiple of 16 in the BIOS
    /// area), for machines that start without firmware.
    pub fn placed(&self, at: u32) -> Vec<u8> {
        let mut bytes = self.entry.clone();
        bytes[0x18..0x1c].copy_from_slice(&(at + 32).to_le_bytes());
        sum(&mut bytes);
        bytes.resize(32, 0);
        bytes.extend(&self.structures);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(gib: u64) -> Description {
        Description {
            manufacturer: "tandem".into(),
            product: "q35".into(),
            version: "1".into(),
            uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
            firmware: Some(("tandem".into(), "1".into())),
            cpu: Cpu { sockets: 2, cores: 2, threads: 4, vendor: "A".into(), ..Cpu::default() },
            memory: vec![(0, 2 << 30), (4 << 30, (gib - 2) << 30)],
        }
    }

    /// Type, formatted part, strings.
    fn parse(mut b: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut all = Vec::new();
        while !b.is_empty() {
            let (formatted, rest) = b.split_at(b[1].into());
            let end = rest.windows(2).position(|w| w == [0, 0]).unwrap();
            let text = String::from_utf8(rest[..end].to_vec()).unwrap();
            let strings = text.split('\0').filter(|s| !s.is_empty()).map(String::from).collect();
            all.push((formatted[0], formatted.to_vec(), strings));
            b = &rest[end + 2..];
        }
        all
    }

    #[test]
    fn structures_parse_back() {
        let t = tables(&description(20));
        let all = parse(&t.structures);
        let kinds: Vec<u8> = all.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 4, 16, 17, 17, 19, 19, 32, 127]);
        let lengths: Vec<usize> = all.iter().map(|s| s.1.len()).collect();
        assert_eq!(lengths, [24, 27, 22, 48, 48, 23, 40, 40, 31, 31, 11, 4]);
        assert_eq!(all[1].2, ["tandem", "q35", "1"]);
        assert_eq!(all[1].1[8..16], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
        // 16 GiB and 4 GiB, in MiB.
        assert_eq!((&all[6].1[12..14], &all[7].1[12..14]), (&[0, 0x40][..], &[0, 0x10][..]));
        // The upper range ends above what KiB in 32 bits hold only beyond 4 TiB.
        assert_eq!(all[9].1[8..12], ((22u32 << 20) - 1).to_le_bytes());
        let handles: std::collections::BTreeSet<_> = all.iter().map(|s| (s.1[2], s.1[3])).collect();
        assert_eq!(handles.len(), all.len());
    }

    #[test]
    fn the_entry_point_sums_to_zero() {
        let t = tables(&description(4));
        let bytes = t.placed(0xf_0000);
        let sum = |b: &[u8]| b.iter().fold(0u8, |a, x| a.wrapping_add(*x));
        assert_eq!((sum(&bytes[..31]), sum(&bytes[16..31])), (0, 0));
        assert_eq!((sum(&t.entry), &bytes[..4], &bytes[16..21]), (0, &b"_SM_"[..], &b"_DMI_"[..]));
        assert_eq!(bytes[0x18..0x1c], 0xf_0020u32.to_le_bytes());
        assert_eq!(bytes[0x16..0x18], (t.structures.len() as u16).to_le_bytes());
        assert_eq!(bytes[32..], t.structures);
    }
}
