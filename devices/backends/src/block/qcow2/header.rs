//! The header of a qcow2 image, with its extensions and the backing file's name: everything at the
//! start of the first cluster. (Specification: docs/interop/qcow2.txt of QEMU's documentation.)

use super::super::error::{Error, Result};
use super::super::file::HostFile;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// What we write: up to and with the compression type, padded.
const OUR_LEN: usize = 112;
/// The longest backing file name.
pub const MAX_BACKING_NAME: usize = 1023;
/// Limits that QEMU sets too: no sane image exceeds them, and they bound what we allocate.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// As above, of the refcount table.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// Refcounts may be behind; they are to be rebuilt.
pub const INCOMPAT_DIRTY: u64 = 1;
/// Damage was found; not to be written.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// The compression type is not zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// Refcounts are updated lazily.
pub const COMPAT_LAZY: u64 = 1;
/// Bitmaps are consistent with the data.
pub const AUTOCLEAR_BITMAPS: u64 = 1;

const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;

/// Names of features, for the table that lets old programs say what they lack: kind (0
/// incompatible, 1 compatible, 2 autoclear), bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl Compression {
    /// Its name in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// The header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size: 9–21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub reftable_offset: u64,
    /// Its length.
    pub reftable_clusters: u32,
    /// Number of snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Feature bits that a program must know to open the image.
    pub incompatible: u64,
    /// Feature bits that it may ignore.
    pub compatible: u64,
    /// Feature bits that it clears if it does not know them and writes.
    pub autoclear: u64,
    /// log2 of the bits of a refcount: 0–6.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Extensions that mean nothing to us, kept as they are.
    pub others: Vec<(u32, Vec<u8>)>,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_be_bytes)
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::Corrupt(format!("the qcow2 header is bad: {what}"))
}

fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| bad("a name in it is not UTF-8"))
}

impl Header {
    /// Whether `start`, the first bytes of a file, are those of a qcow2 image.
    pub fn probe(start: &[u8]) -> bool {
        start.len() >= 8 && u32_at(start, 0) == MAGIC && matches!(u32_at(start, 4), 2 | 3)
    }

    /// Reads and judges the header of `file`.
    pub fn read(file: &HostFile) -> Result<Header> {
        let mut fixed = [0; OUR_LEN];
        file.read_bytes(0, &mut fixed)?;
        if u32_at(&fixed, 0) != MAGIC {
            let path = file.path().display();
            return Err(Error::Corrupt(format!("'{path}' is not a qcow2 image")));
        }
        let version = u32_at(&fixed, 4);
        if !matches!(version, 2 | 3) {
            let what = format!("qcow2 version {version} is unknown; only 2 and 3 are");
            return Err(Error::Unsupported(what));
        }
        let v3 = version == 3;
        let mut h = Header {
            version,
            cluster_bits: u32_at(&fixed, 20),
            size: u64_at(&fixed, 24),
            l1_size: u32_at(&fixed, 36),
            l1_offset: u64_at(&fixed, 40),
            reftable_offset: u64_at(&fixed, 48),
            reftable_clusters: u32_at(&fixed, 56),
            snapshots: u32_at(&fixed, 60),
            snapshots_offset: u64_at(&fixed, 64),
            incompatible: if v3 { u64_at(&fixed, 72) } else { 0 },
            compatible: if v3 { u64_at(&fixed, 80) } else { 0 },
            autoclear: if v3 { u64_at(&fixed, 88) } else { 0 },
            refcount_order: if v3 { u32_at(&fixed, 96) } else { 4 },
            compression: Compression::Zlib,
            backing_file: None,
            backing_format: None,
            others: Vec::new(),
        };
        let len = if v3 { u32_at(&fixed, 100) as usize } else { V2_LEN };
        if !(9..=21).contains(&h.cluster_bits) {
            return Err(bad(format!("clusters of 2^{} bytes", h.cluster_bits)));
        }
        let cluster = 1usize << h.cluster_bits;
        if v3 && (len < V3_LEN || len > cluster) {
            return Err(bad(format!("its length is {len}")));
        }
        let mut start = vec![0; cluster];
        file.read_bytes(0, &mut start)?;
        h.judge_features(&fixed, len)?;
        h.judge_tables()?;
        let (name_at, name_len) = (u64_at(&fixed, 8), u32_at(&fixed, 16) as usize);
        let mut end = cluster;
        if name_at != 0 && name_len != 0 {
            let at = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = start.get(at..at.saturating_add(name_len));
            match name {
                Some(n) if n.len() <= MAX_BACKING_NAME => h.backing_file = Some(text(n)?),
                _ => return Err(bad("the backing file's name lies outside of it")),
            }
            end = at;
        }
        h.read_extensions(start.get(len..end).unwrap_or_default())?;
        Ok(h)
    }

    fn judge_features(&mut self, fixed: &[u8], len: usize) -> Result<()> {
        if u32_at(fixed, 32) != 0 {
            return Err(Error::Unsupported("encrypted qcow2 images are not supported".into()));
        }
        if self.incompatible & INCOMPAT_DATA_FILE != 0 {
            let what = "qcow2 images with an external data file are not supported";
            return Err(Error::Unsupported(what.into()));
        }
        if self.incompatible & INCOMPAT_EXTENDED_L2 != 0 {
            let what = "qcow2 images with extended L2 entries (subclusters) are not supported";
            return Err(Error::Unsupported(what.into()));
        }
        let known = INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_COMPRESSION;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let what = format!("the qcow2 image has unknown features (bits {unknown:#x})");
            return Err(Error::Unsupported(what));
        }
        if self.incompatible & INCOMPAT_COMPRESSION != 0 {
            self.compression = match fixed[104] {
                _ if len < 105 => return Err(bad("it has no room for its compression type")),
                1 => Compression::Zstd,
                n => {
                    let what = format!("qcow2 compression type {n} is unknown");
                    return Err(Error::Unsupported(what));
                }
            };
        } else if len > 104 && fixed[104] != 0 {
            return Err(bad("a compression type without its feature bit"));
        }
        if self.refcount_order > 6 {
            return Err(bad(format!("refcounts of 2^{} bits", self.refcount_order)));
        }
        Ok(())
    }

    /// Judges where and how large the tables are.
    fn judge_tables(&self) -> Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        let aligned = |at: u64| at & (cluster - 1) == 0 && at >> 56 == 0;
        if self.size >> 62 != 0 {
            return Err(bad(format!("a disk of {} bytes", self.size)));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(bad(format!("an L1 table of {} entries", self.l1_size)));
        }
        if u64::from(self.l1_size) < l1_entries(self.size, self.cluster_bits) {
            return Err(bad("the L1 table is too small for the disk"));
        }
        if !aligned(self.l1_offset) || (self.l1_size > 0 && self.l1_offset == 0) {
            return Err(bad(format!("an L1 table at {:#x}", self.l1_offset)));
        }
        if u64::from(self.reftable_clusters) * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(bad(format!("a refcount table of {} clusters", self.reftable_clusters)));
        }
        if !aligned(self.reftable_offset) || self.reftable_offset == 0 {
            return Err(bad(format!("a refcount table at {:#x}", self.reftable_offset)));
        }
        if self.snapshots > MAX_SNAPSHOTS || !aligned(self.snapshots_offset) {
            return Err(bad(format!("{} snapshots", self.snapshots)));
        }
        Ok(())
    }

    fn read_extensions(&mut self, mut area: &[u8]) -> Result<()> {
        while area.len() >= 8 {
            let (kind, len) = (u32_at(area, 0), u32_at(area, 4) as usize);
            if kind == 0 {
                break;
            }
            let data = area[8..].get(..len).ok_or_else(|| bad("an extension is too long"))?;
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(text(data)?),
                // Ours is written instead.
                EXT_FEATURE_NAMES => {}
                _ => self.others.push((kind, data.to_vec())),
            }
            area = area.get(8 + len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(())
    }

    /// The table of bitmaps: offset and length in bytes of their directory, if there is one that is
    /// consistent.
    pub fn bitmap_directory(&self) -> Option<(u64, u64, u32)> {
        let (_, data) = self.others.iter().find(|(k, _)| *k == EXT_BITMAPS)?;
        let valid = self.autoclear & AUTOCLEAR_BITMAPS != 0 && data.len() >= 24;
        valid.then(|| (u64_at(data, 16), u64_at(data, 8), u32_at(data, 0)))
    }

    /// The bytes at the start of the image.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let v3 = self.version == 3;
        let mut b = Vec::with_capacity(1024);
        let put32 = |b: &mut Vec<u8>, v: u32| b.extend(v.to_be_bytes());
        let put64 = |b: &mut Vec<u8>, v: u64| b.extend(v.to_be_bytes());
        put32(&mut b, MAGIC);
        put32(&mut b, self.version);
        // The backing file's name: where and how long, when that is known.
        put64(&mut b, 0);
        put32(&mut b, 0);
        put32(&mut b, self.cluster_bits);
        put64(&mut b, self.size);
        put32(&mut b, 0);
        put32(&mut b, self.l1_size);
        put64(&mut b, self.l1_offset);
        put64(&mut b, self.reftable_offset);
        put32(&mut b, self.reftable_clusters);
        put32(&mut b, self.snapshots);
        put64(&mut b, self.snapshots_offset);
        if v3 {
            put64(&mut b, self.incompatible);
            put64(&mut b, self.compatible);
            put64(&mut b, self.autoclear);
            put32(&mut b, self.refcount_order);
            put32(&mut b, OUR_LEN as u32);
            b.push((self.compression == Compression::Zstd).into());
            b.resize(OUR_LEN, 0);
        }
        let extension = |b: &mut Vec<u8>, kind: u32, data: &[u8]| {
            put32(b, kind);
            put32(b, data.len() as u32);
            b.extend(data);
            b.resize(b.len().next_multiple_of(8), 0);
        };
        if let Some(f) = &self.backing_format {
            extension(&mut b, EXT_BACKING_FORMAT, f.as_bytes());
        }
        if v3 {
            extension(&mut b, EXT_FEATURE_NAMES, &feature_names());
        }
        for (kind, data) in &self.others {
            extension(&mut b, *kind, data);
        }
        extension(&mut b, 0, &[]);
        if let Some(name) = &self.backing_file {
            if name.len() > MAX_BACKING_NAME {
                let most = MAX_BACKING_NAME;
                let what = format!("the backing file's name is longer than {most} bytes");
                return Err(Error::Invalid(what));
            }
            let at = b.len();
            b.extend(name.as_bytes());
            b[8..16].copy_from_slice(&(at as u64).to_be_bytes());
            b[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        }
        if b.len() > 1 << self.cluster_bits {
            // Small clusters may have no room for names of features, which nobody needs.
            let what = "the backing file's name does not fit into a cluster; use larger clusters";
            return if b.len() - FEATURE_BYTES <= 1 << self.cluster_bits && v3 {
                self.encode_without_feature_names(b)
            } else {
                Err(Error::Invalid(what.into()))
            };
        }
        Ok(b)
    }

    /// Takes the table of feature names out of an encoded header.
    fn encode_without_feature_names(&self, mut b: Vec<u8>) -> Result<Vec<u8>> {
        let mut at = OUR_LEN;
        while u32_at(&b, at) != EXT_FEATURE_NAMES {
            at += 8 + (u32_at(&b, at + 4) as usize).next_multiple_of(8);
        }
        b.drain(at..at + FEATURE_BYTES);
        if self.backing_file.is_some() {
            let name = u64_at(&b, 8) - FEATURE_BYTES as u64;
            b[8..16].copy_from_slice(&name.to_be_bytes());
        }
        Ok(b)
    }

    /// Writes it to `file`.
    pub fn write(&self, file: &HostFile) -> Result<()> {
        file.write_bytes(0, &self.encode()?)
    }
}

/// Bytes of the extension with the names of features.
const FEATURE_BYTES: usize = 8 + 48 * FEATURE_NAMES.len();

fn feature_names() -> Vec<u8> {
    let mut b = Vec::new();
    for (kind, bit, name) in FEATURE_NAMES {
        let end = b.len() + 48;
        b.extend([kind, bit]);
        b.extend(name.as_bytes());
        b.resize(end, 0);
    }
    b
}

/// L1 entries that a disk of `size` bytes needs.
pub fn l1_entries(size: u64, cluster_bits: u32) -> u64 {
    size.div_ceil(1 << (2 * cluster_bits - 3))
}
