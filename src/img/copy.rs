//! Commands that move data: `convert`, `commit`, `rebase`, `compare`.

use super::create::create_image;
use super::{Failure, Progress, open};
use crate::cli::img::{Commit, Compare, Convert, Rebase};
use std::path::Path;
use std::sync::Arc;
use tandem_backends::block::chain::status;
use tandem_backends::block::open::{OpenSpec, open_snapshot};
use tandem_backends::block::pieces::is_zero;
use tandem_backends::block::{
    BlockWrite, Error, ExtentKind, Image, Layered, Preallocation, resolve,
};

/// Bytes moved at once.
const CHUNK: u64 = 2 << 20;

fn writable(image: &dyn Image) -> Result<&dyn BlockWrite, Error> {
    image.writable().ok_or(Error::ReadOnly)
}

/// A snapshot's name or ID without the key that says which of them it is.
fn plain_name(which: &str) -> &str {
    let keys = ["snapshot.name=", "snapshot.id="];
    keys.iter().find_map(|k| which.strip_prefix(k)).unwrap_or(which)
}

/// Sources one behind the other.
struct Sources {
    images: Vec<Arc<dyn Image>>,
    size: u64,
}

impl Sources {
    fn open(a: &Convert, files: &[std::path::PathBuf]) -> Result<Sources, Failure> {
        let mut images = Vec::new();
        for file in files {
            let spec = OpenSpec {
                format: a.source_format.clone(),
                force_share: a.force_share,
                ..OpenSpec::read(file)
            };
            images.push(match &a.snapshot {
                Some(which) => open_snapshot(&spec, plain_name(which))?,
                None => open(&spec)?,
            });
        }
        let size = images.iter().map(|i| i.size()).sum();
        Ok(Sources { images, size })
    }

    /// The image that byte `at` is in, and the byte of it that this is.
    fn at(&self, mut at: u64) -> Option<(&Arc<dyn Image>, u64)> {
        self.images.iter().find_map(|i| match at.checked_sub(i.size()) {
            None => Some((i, at)),
            Some(rest) => {
                at = rest;
                None
            }
        })
    }
}

/// `convert`.
pub fn convert(a: &Convert) -> Result<u8, Failure> {
    let Some((target, files)) = a.files.split_last() else {
        return Err(Failure::usage("convert needs a source and a target"));
    };
    let sources = Sources::open(a, files)?;
    let sparse = super::size(&a.sparse_size)?;
    if !a.no_create {
        create_image(&super::create::Wanted {
            file: target,
            format: &a.target_format,
            size: Some(sources.size),
            options: &a.options,
            backing: a.backing.as_deref(),
            backing_format: a.backing_format.as_deref(),
            unsafe_backing: false,
            quiet: true,
        })?;
    }
    let spec = OpenSpec { format: Some(a.target_format.clone()), ..OpenSpec::write(target) };
    let image = open(&spec)?;
    if image.size() < sources.size {
        return Err(Failure::usage("the target is smaller than the source; resize it first"));
    }
    if a.compress && image.compressor().is_none() {
        return Err(Failure::usage(format!("format {} does not compress", a.target_format)));
    }
    // A device that was not made by us may hold anything.
    let zero = a.target_is_zero || !(a.no_create || image.file().is_device());
    let mut copy = Copy { a, target: &*image, sparse, zero, unit: CHUNK };
    if a.compress
        && let Some(c) = image.compressor()
    {
        copy.unit = c.unit();
    }
    let mut progress = Progress::new(a.progress, a.quiet, sources.size);
    copy.run(&sources, &mut progress)?;
    writable(&*image)?.flush()?;
    progress.finish();
    Ok(0)
}

struct Copy<'a> {
    a: &'a Convert,
    target: &'a dyn Image,
    sparse: u64,
    /// The target reads as zeros where nothing is written.
    zero: bool,
    unit: u64,
}

impl Copy<'_> {
    fn run(&self, sources: &Sources, progress: &mut Progress) -> Result<(), Failure> {
        let depth = if self.a.backing.is_some() { 0 } else { u32::MAX };
        let mut buf = vec![0; self.unit as usize];
        let mut at = 0;
        while at < sources.size {
            let Some((source, from)) = sources.at(at) else { break };
            let s = status(source, from, source.size() - from, depth)?;
            if s.zero || !s.data {
                let skip = if self.a.compress {
                    // Only whole units.
                    let end = at + s.len;
                    let end = if end == sources.size { end } else { end - end % self.unit };
                    if at % self.unit == 0 { end.saturating_sub(at) } else { 0 }
                } else {
                    s.len
                };
                if skip > 0 {
                    let behind = !s.present && depth == 0;
                    let reads_so = self.zero && self.a.backing.is_none();
                    if !(behind || reads_so) {
                        writable(self.target)?.write_zeroes(at, skip, true)?;
                    }
                    at += skip;
                    progress.at(at);
                    continue;
                }
            }
            let n = (self.unit - at % self.unit).min(sources.size - at);
            let n = if self.a.compress { n } else { n.min(s.len) };
            let part = &mut buf[..n as usize];
            self.read(sources, at, part)?;
            self.write(at, part)?;
            at += n;
            progress.at(at);
        }
        Ok(())
    }

    /// Reads across the borders of sources.
    fn read(&self, sources: &Sources, mut at: u64, mut into: &mut [u8]) -> Result<(), Error> {
        while !into.is_empty() {
            let Some((image, from)) = sources.at(at) else { return Err(Error::OutOfRange) };
            let n = (image.size() - from).min(into.len() as u64) as usize;
            let (now, later) = into.split_at_mut(n);
            image.read_bytes(from, now)?;
            (into, at) = (later, at + n as u64);
        }
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> Result<(), Error> {
        let leave_out = self.zero && self.a.backing.is_none() && self.sparse > 0;
        if self.a.compress
            && let Some(c) = self.target.compressor()
        {
            return match leave_out && is_zero(data) {
                true => Ok(()),
                false => c.write_compressed(at, data),
            };
        }
        let w = writable(self.target)?;
        if self.sparse == 0 {
            return w.write_bytes(at, data);
        }
        let grain = (self.sparse.next_multiple_of(512) as usize).min(data.len().max(512));
        let mut from = 0;
        while from < data.len() {
            let zero = |i: usize| is_zero(&data[i..(i + grain).min(data.len())]);
            let kind = zero(from);
            let mut to = from + grain;
            while to < data.len() && zero(to) == kind {
                to += grain;
            }
            let part = &data[from..to.min(data.len())];
            match kind {
                false => w.write_bytes(at + from as u64, part)?,
                true if leave_out => {}
                true => w.write_zeroes(at + from as u64, part.len() as u64, true)?,
            }
            from = to;
        }
        Ok(())
    }
}

/// The image behind `image`, opened apart from it.
fn behind(path: &Path, image: &dyn Image, write: bool) -> Result<Option<Arc<dyn Image>>, Failure> {
    let (name, format) = image.layered().map_or((None, None), Layered::backing_name);
    let Some(name) = name else { return Ok(None) };
    let spec = OpenSpec { format, write, ..OpenSpec::read(resolve(path, &name)) };
    Ok(Some(open(&spec)?))
}

/// `commit`.
pub fn commit(a: &Commit) -> Result<u8, Failure> {
    let spec = OpenSpec { format: a.format.clone(), backing: false, ..OpenSpec::write(&a.file) };
    let top = open(&spec)?;
    let Some(base) = behind(&a.file, &*top, true)? else {
        return Err(Failure::usage(format!("nothing is behind '{}'", a.file.display())));
    };
    if base.size() < top.size() {
        let r = base.resizable().ok_or(Error::ReadOnly)?;
        r.resize(top.size(), Preallocation::Off)?;
    }
    let mut progress = Progress::new(a.progress, a.quiet, top.size());
    let w = writable(&*base)?;
    let mut buf = vec![0; CHUNK as usize];
    let mut at = 0;
    while at < top.size() {
        let e = top.extents().extent(at)?;
        let n = e.len.clamp(1, CHUNK);
        match e.kind {
            ExtentKind::Unallocated => {}
            ExtentKind::Zero => w.write_zeroes(at, n, true)?,
            ExtentKind::Data => {
                top.read_bytes(at, &mut buf[..n as usize])?;
                w.write_bytes(at, &buf[..n as usize])?;
            }
        }
        at += n;
        progress.at(at);
    }
    w.flush()?;
    progress.finish();
    if !a.keep
        && let Some(l) = top.layered()
    {
        l.clear()?;
        writable(&*top)?.flush()?;
    }
    if !a.quiet {
        println!("Image committed.");
    }
    Ok(0)
}

/// `rebase`.
pub fn rebase(a: &Rebase) -> Result<u8, Failure> {
    let spec = OpenSpec {
        format: a.source.format.clone(),
        backing: false,
        ..OpenSpec::write(&a.source.file)
    };
    let top = open(&spec)?;
    let Some(layers) = top.layered() else {
        return Err(Failure::usage(format!(
            "format {} has no images behind",
            top.describe().format
        )));
    };
    let new = a.backing.as_deref().filter(|b| !b.is_empty());
    if !a.unsafe_mode {
        let old = behind(&a.source.file, &*top, false)?;
        let new = match new {
            Some(name) => {
                let path = resolve(&a.source.file, name);
                Some(open(&OpenSpec { format: a.backing_format.clone(), ..OpenSpec::read(path) })?)
            }
            None => None,
        };
        layers.set_backing(old.clone());
        let mut progress = Progress::new(a.progress, a.quiet, top.size());
        let mut keep = Keep { top: &*top, old: old.as_deref(), new: new.as_deref() };
        keep.run(&mut progress)?;
        writable(&*top)?.flush()?;
        progress.finish();
    }
    layers.rename_backing(new, a.backing_format.as_deref().filter(|_| new.is_some()))?;
    layers.set_backing(None);
    Ok(0)
}

/// Copies what the old image behind shows, where the new one shows something else.
struct Keep<'a> {
    top: &'a dyn Image,
    old: Option<&'a dyn Image>,
    new: Option<&'a dyn Image>,
}

fn read_or_zeros(image: Option<&dyn Image>, at: u64, into: &mut [u8]) -> Result<(), Error> {
    let there = image.map_or(0, |i| i.size().saturating_sub(at)).min(into.len() as u64) as usize;
    let (now, rest) = into.split_at_mut(there);
    rest.fill(0);
    match image {
        Some(i) if there > 0 => i.read_bytes(at, now),
        _ => Ok(()),
    }
}

impl Keep<'_> {
    fn run(&mut self, progress: &mut Progress) -> Result<(), Error> {
        let w = writable(self.top)?;
        let unit = self.top.describe().cluster_size.unwrap_or(65536);
        let (mut a, mut b) = (vec![0; unit as usize], vec![0; unit as usize]);
        let mut at = 0;
        while at < self.top.size() {
            let e = self.top.extents().extent(at)?;
            if e.kind != ExtentKind::Unallocated {
                at += e.len.max(1);
                continue;
            }
            let end = at + e.len;
            while at < end {
                let n = (unit - at % unit).min(end - at) as usize;
                read_or_zeros(self.old, at, &mut a[..n])?;
                read_or_zeros(self.new, at, &mut b[..n])?;
                if a[..n] != b[..n] {
                    w.write_bytes(at, &a[..n])?;
                }
                at += n as u64;
                progress.at(at);
            }
        }
        Ok(())
    }
}

/// `compare`. Its exit statuses are its own.
pub fn compare(a: &Compare) -> u8 {
    let spec = |file: &Path, format: &Option<String>| OpenSpec {
        format: format.clone(),
        force_share: a.force_share,
        ..OpenSpec::read(file)
    };
    let both = open(&spec(&a.first, &a.first_format))
        .and_then(|x| Ok((x, open(&spec(&a.second, &a.second_format))?)));
    let (first, second) = match both {
        Ok(b) => b,
        Err(e) => {
            crate::log::error(&e.chain());
            return 2;
        }
    };
    match differ(a, &first, &second) {
        Ok(None) => {
            if !a.quiet {
                println!("Images are identical.");
            }
            0
        }
        Ok(Some(what)) => {
            if !a.quiet {
                println!("{what}");
            }
            1
        }
        Err(e) => {
            crate::log::error(&e.chain());
            4
        }
    }
}

/// How two images differ, if they do.
fn differ(
    a: &Compare,
    first: &Arc<dyn Image>,
    second: &Arc<dyn Image>,
) -> Result<Option<String>, Error> {
    let (n, m) = (first.size(), second.size());
    if n != m {
        if a.strict {
            return Ok(Some("Strict mode: Image size mismatch!".into()));
        }
        if !a.quiet {
            eprintln!("tandem: warning: Image size mismatch!");
        }
    }
    let (end, common) = (n.max(m), n.min(m));
    let mut progress = Progress::new(a.progress, a.quiet, end);
    let (mut x, mut y) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut at = 0;
    while at < common {
        let s = status(first, at, common - at, u32::MAX)?;
        let t = status(second, at, s.len, u32::MAX)?;
        if a.strict && s.present != t.present {
            return Ok(Some(format!("Strict mode: Offset {at} block status mismatch!")));
        }
        let mut len = t.len;
        if (s.data && !s.zero) || (t.data && !t.zero) {
            len = len.min(CHUNK);
            let (x, y) = (&mut x[..len as usize], &mut y[..len as usize]);
            first.read_bytes(at, x)?;
            second.read_bytes(at, y)?;
            if let Some(i) = x.iter().zip(&*y).position(|(a, b)| a != b) {
                // By sectors, as images are made of them.
                let at = at + (i as u64 & !511);
                return Ok(Some(format!("Content mismatch at offset {at}!")));
            }
        }
        at += len;
        progress.at(at);
    }
    // What one has more must be zeros.
    let longer = if n > m { first } else { second };
    while at < end {
        let s = status(longer, at, (end - at).min(CHUNK), u32::MAX)?;
        let part = &mut x[..s.len as usize];
        if s.data {
            longer.read_bytes(at, part)?;
            if let Some(i) = part.iter().position(|b| *b != 0) {
                let at = at + (i as u64 & !511);
                return Ok(Some(format!("Content mismatch at offset {at}!")));
            }
        }
        at += s.len;
        progress.at(at);
    }
    progress.finish();
    Ok(None)
}
