//! The one factory: paths and formats to images, with everything behind them.

use super::error::{Error, Result};
use super::file::{HostFile, OpenMode};
use super::lock::Access;
use super::qcow2::{CreateOptions, Options, Qcow2, header::Header};
use super::raw::Raw;
use super::{Image, Layered, resolve};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Formats.
pub const FORMATS: [&str; 2] = ["qcow2", "raw"];
/// Images behind each other, at most.
const MAX_CHAIN: usize = 256;

/// What to open and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSpec {
    /// Where the image is.
    pub path: PathBuf,
    /// Its format; found out from its first bytes if absent. A guest that may write a raw image can
    /// make it look like another format, so a raw image should be opened as such.
    pub format: Option<String>,
    /// For writing.
    pub write: bool,
    /// Past the host's caches.
    pub direct: bool,
    /// Read without locks, while others may write.
    pub force_share: bool,
    /// Open what is behind it, too.
    pub backing: bool,
    /// How to use a qcow2 image.
    pub options: Options,
}

impl OpenSpec {
    /// The image at `path` for reading, with what is behind it.
    pub fn read(path: impl Into<PathBuf>) -> OpenSpec {
        OpenSpec {
            path: path.into(),
            format: None,
            write: false,
            direct: false,
            force_share: false,
            backing: true,
            options: Options::default(),
        }
    }

    /// The same for writing.
    pub fn write(path: impl Into<PathBuf>) -> OpenSpec {
        OpenSpec { write: true, ..OpenSpec::read(path) }
    }

    fn mode(&self) -> OpenMode {
        let access = match (self.force_share, self.write) {
            (true, false) => Access::Unlocked,
            (_, true) => Access::Write,
            (_, false) => Access::Read,
        };
        OpenMode { write: self.write, direct: self.direct, access }
    }
}

/// The format of `file` by its first bytes.
pub fn probe(file: &HostFile) -> Result<&'static str> {
    let mut start = [0; 16];
    file.read_bytes(0, &mut start)?;
    Ok(if Header::probe(&start) { "qcow2" } else { "raw" })
}

/// Fails if `format` is none that we know.
pub fn check_format(format: &str) -> Result<()> {
    if FORMATS.contains(&format) {
        return Ok(());
    }
    let known = FORMATS.join(", ");
    Err(Error::Invalid(format!("there is no image format '{format}'; use one of {known}")))
}

/// Opens an image and, unless told otherwise, what is behind it for reading.
pub fn open(spec: &OpenSpec) -> Result<Arc<dyn Image>> {
    open_link(spec, &mut Vec::new())
}

fn open_link(spec: &OpenSpec, chain: &mut Vec<(u64, u64)>) -> Result<Arc<dyn Image>> {
    if let Some(f) = &spec.format {
        check_format(f)?;
    }
    let file = Arc::new(HostFile::open(&spec.path, spec.mode())?);
    let identity = file.identity()?;
    if chain.contains(&identity) {
        let path = spec.path.display();
        return Err(Error::Invalid(format!("'{path}' is behind itself: its chain is a loop")));
    }
    chain.push(identity);
    if chain.len() > MAX_CHAIN {
        return Err(Error::Invalid(format!("more than {MAX_CHAIN} images behind each other")));
    }
    let format = match &spec.format {
        Some(f) => f.as_str(),
        None => probe(&file)?,
    };
    if format == "raw" {
        return Ok(Arc::new(Raw::new(file)?));
    }
    let image = Arc::new(Qcow2::open(file, spec.options)?);
    attach_backing(&image, spec, chain)?;
    Ok(image)
}

/// Opens what is behind `image` and puts it there.
fn attach_backing(image: &Qcow2, spec: &OpenSpec, chain: &mut Vec<(u64, u64)>) -> Result<()> {
    if let (true, (Some(name), format)) = (spec.backing, image.backing_name()) {
        let path = resolve(&spec.path, &name);
        let behind = OpenSpec { path, format, write: false, ..spec.clone() };
        let behind = open_link(&behind, chain).map_err(|e| match e {
            Error::Io { what, source } => {
                Error::Io { what: format!("{what} (behind '{}')", spec.path.display()), source }
            }
            e => e,
        })?;
        image.set_backing(Some(behind));
    }
    Ok(())
}

/// The disk that the qcow2 image at `spec` had when its snapshot was taken, for reading.
pub fn open_snapshot(spec: &OpenSpec, which: &str) -> Result<Arc<dyn Image>> {
    let file =
        Arc::new(HostFile::open(&spec.path, OpenSpec { write: false, ..spec.clone() }.mode())?);
    if probe(&file)? != "qcow2" {
        let path = spec.path.display();
        return Err(Error::Invalid(format!("'{path}' holds no snapshots; only qcow2 images do")));
    }
    let image = Qcow2::open(file, spec.options)?;
    image.show_snapshot(which)?;
    attach_backing(&image, spec, &mut Vec::new())?;
    Ok(Arc::new(image))
}

/// An image in front of `behind` that takes all writes and vanishes when it is closed. It lies in
/// `$TMPDIR`, else /var/tmp.
pub fn throw_away(behind: Arc<dyn Image>) -> Result<Arc<dyn Image>> {
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let file = Arc::new(HostFile::temporary(Path::new(&dir))?);
    CreateOptions { size: behind.size(), ..CreateOptions::default() }.create(&file)?;
    let image = Qcow2::open(file, Options::default())?;
    image.set_backing(Some(behind));
    Ok(Arc::new(image))
}
