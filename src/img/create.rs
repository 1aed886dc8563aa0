//! `create`, and the options of new images.

use super::{Failure, open, size};
use crate::cli::img::Create;
use crate::config::parse::split_commas;
use std::path::Path;
use tandem_accel::suggest::one_of;
use tandem_backends::block::file::HostFile;
use tandem_backends::block::open::{FORMATS, OpenSpec, check_format};
use tandem_backends::block::qcow2::{Compression, CreateOptions};
use tandem_backends::block::raw::Raw;
use tandem_backends::block::{Preallocation, resolve};

/// Options of `-o`.
const OPTIONS: [&str; 10] = [
    "size",
    "backing_file",
    "backing_fmt",
    "cluster_size",
    "compat",
    "refcount_bits",
    "lazy_refcounts",
    "compression_type",
    "preallocation",
    "extended_l2",
];

/// A new image.
pub struct Wanted<'a> {
    pub file: &'a Path,
    pub format: &'a str,
    pub size: Option<u64>,
    pub options: &'a [String],
    pub backing: Option<&'a str>,
    pub backing_format: Option<&'a str>,
    pub unsafe_backing: bool,
    pub quiet: bool,
}

fn on_off(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(Failure::usage(format!("option {key} cannot be '{value}'; write on or off"))),
    }
}

/// A preallocation mode.
pub fn preallocation(name: &str) -> Result<Preallocation, Failure> {
    let names = Preallocation::NAMES.map(|(n, _)| n);
    let found = Preallocation::NAMES.iter().find(|(n, _)| *n == name);
    found.map(|(_, p)| *p).ok_or_else(|| {
        let remedy = one_of(name, &names);
        Failure::usage(format!("there is no preallocation mode '{name}'; {remedy}"))
    })
}

fn set(o: &mut CreateOptions, key: &str, value: &str) -> Result<(), Failure> {
    let bad =
        |remedy: &str| Err(Failure::usage(format!("option {key} cannot be '{value}'; {remedy}")));
    match key {
        "size" => o.size = size(value)?,
        "backing_file" => o.backing_file = Some(value.into()),
        "backing_fmt" => o.backing_format = Some(value.into()),
        "cluster_size" => o.cluster_size = size(value)?,
        "compat" => match value {
            "0.10" | "v2" => o.version = 2,
            "1.1" | "v3" => o.version = 3,
            _ => return bad("use 0.10 or 1.1"),
        },
        "refcount_bits" => match value.parse() {
            Ok(n) => o.refcount_bits = n,
            Err(_) => return bad("use a power of two from 1 to 64"),
        },
        "lazy_refcounts" => o.lazy_refcounts = on_off(key, value)?,
        "compression_type" => match value {
            "zlib" => o.compression = Compression::Zlib,
            "zstd" => o.compression = Compression::Zstd,
            _ => return bad("use zlib or zstd"),
        },
        "preallocation" => o.preallocation = preallocation(value)?,
        "extended_l2" if on_off(key, value)? => return bad("subclusters are not supported"),
        "extended_l2" => {}
        _ => {
            let remedy = one_of(key, &OPTIONS);
            return Err(Failure::usage(format!("images have no option '{key}'; {remedy}")));
        }
    }
    Ok(())
}

/// `create`.
pub fn create(a: &Create) -> Result<u8, Failure> {
    create_image(&Wanted {
        file: &a.file,
        format: &a.format,
        size: a.size.as_deref().map(size).transpose()?,
        options: &a.options,
        backing: a.backing.as_deref(),
        backing_format: a.backing_format.as_deref(),
        unsafe_backing: a.unsafe_backing,
        quiet: a.quiet,
    })?;
    Ok(0)
}

/// Makes an image.
pub fn create_image(w: &Wanted) -> Result<(), Failure> {
    check_format(w.format)?;
    let mut o = CreateOptions::default();
    let mut compat = None;
    for list in w.options {
        for word in split_commas(list).iter().filter(|w| !w.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, "on"));
            if w.format == "raw" && !matches!(key, "size" | "preallocation") {
                let what = format!("format raw has no option '{key}'; use size or preallocation");
                return Err(Failure::usage(what));
            }
            set(&mut o, key, value)?;
            if key == "compat" {
                compat = Some(value.to_string());
            }
        }
    }
    o.backing_file = w.backing.map(str::to_string).or(o.backing_file);
    o.backing_format = w.backing_format.map(str::to_string).or(o.backing_format);
    let mut bytes = w.size.or((o.size > 0).then_some(o.size));
    if let Some(name) = &o.backing_file {
        if w.format == "raw" {
            return Err(Failure::usage("format raw has no images behind; use -f qcow2"));
        }
        let Some(format) = &o.backing_format else {
            return Err(Failure::usage(format!(
                "the format of '{name}' is not given; name it with -F ({})",
                FORMATS.join(", ")
            )));
        };
        check_format(format)?;
        if !w.unsafe_backing {
            let path = resolve(w.file, name);
            let spec = OpenSpec { format: Some(format.clone()), ..OpenSpec::read(path) };
            bytes = bytes.or(Some(open(&spec)?.size()));
        }
    }
    let Some(bytes) = bytes else {
        return Err(Failure::usage("the new image has no size; give one, for example 10G"));
    };
    o.size = bytes.next_multiple_of(512);
    if !w.quiet {
        println!("{}", formatting(w, &o, compat.as_deref()));
    }
    let file = HostFile::create(w.file)?;
    let made = match w.format {
        "raw" => Raw::create(&file, o.size, o.preallocation),
        _ => o.create(&file),
    };
    if made.is_err() && !file.is_device() {
        let _ = std::fs::remove_file(w.file);
    }
    Ok(made?)
}

/// The mode with its name, if it is not the default.
fn given(how: Preallocation) -> Option<(&'static str, Preallocation)> {
    let named = Preallocation::NAMES.into_iter().find(|(_, p)| *p == how);
    named.filter(|(_, p)| *p != Preallocation::Off)
}

/// The line that qemu-img prints about a new image.
fn formatting(w: &Wanted, o: &CreateOptions, compat: Option<&str>) -> String {
    let mut s = format!("Formatting '{}', fmt={}", w.file.display(), w.format);
    let on = |b: bool| if b { "on" } else { "off" };
    if w.format == "qcow2" {
        s += &format!(" cluster_size={} extended_l2=off", o.cluster_size);
        if let Some((name, _)) = given(o.preallocation) {
            s += &format!(" preallocation={name}");
        }
        s += &format!(" compression_type={}", o.compression.name());
    }
    s += &format!(" size={}", o.size);
    if let Some(b) = &o.backing_file {
        s += &format!(" backing_file={b}");
    }
    if let Some(f) = &o.backing_format {
        s += &format!(" backing_fmt={f}");
    }
    if w.format == "qcow2" {
        if let Some(c) = compat {
            s += &format!(" compat={c}");
        }
        let bits = o.refcount_bits;
        s += &format!(" lazy_refcounts={} refcount_bits={bits}", on(o.lazy_refcounts));
    }
    s
}
