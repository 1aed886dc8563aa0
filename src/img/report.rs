//! What `info`, `check`, `map` and `snapshot -l` print: qemu-img's words and JSON keys.

use super::{Failure, open};
use crate::cli::img::{Check, Info, Map, Output, Source};
use serde::Serialize;
use serde_json::{Map as JsonMap, Value, json};
use std::path::Path;
use std::sync::Arc;
use tandem_backends::block::chain::{Status, status};
use tandem_backends::block::open::OpenSpec;
use tandem_backends::block::qcow2::Options;
use tandem_backends::block::{CheckReport, Error, Image, Repair, SECTOR, Snapshot, resolve};

/// Bytes for people, as qemu-img writes them: three digits and a unit.
pub fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut v, mut u) = (bytes as f64, 0);
    // 999.5 would be written as 1000.
    while v >= 999.5 && u + 1 < units.len() {
        v /= 1024.0;
        u += 1;
    }
    let digits = match v {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let mut s = format!("{v:.digits$}");
    if s.contains('.') {
        s = s.trim_end_matches('0').trim_end_matches('.').to_string();
    }
    format!("{s} {}", units[u])
}

fn print_json(v: &impl Serialize) {
    println!("{}", serde_json::to_string_pretty(v).expect("plain data"));
}

fn snapshot_json(s: &Snapshot) -> Value {
    let mut v = json!({
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date.0,
        "date-nsec": s.date.1,
        "vm-clock-sec": s.vm_clock / 1_000_000_000,
        "vm-clock-nsec": s.vm_clock % 1_000_000_000,
    });
    if let Some(n) = s.icount {
        v["icount"] = n.into();
    }
    v
}

/// Year, month, day of a number of days since 1970 (Gregorian).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// The table of snapshots; dates are UTC.
pub fn snapshot_table(list: &[Snapshot]) -> String {
    let mut s = format!(
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for n in list {
        let t = i64::from(n.date.0);
        let ((y, m, d), day) = (civil(t / 86_400), t % 86_400);
        let date =
            format!("{y:04}-{m:02}-{d:02} {:02}:{:02}:{:02}", day / 3600, day / 60 % 60, day % 60);
        let ms = n.vm_clock / 1_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            ms / 3_600_000,
            ms / 60_000 % 60,
            ms / 1000 % 60,
            ms % 1000
        );
        let icount = n.icount.map_or("--".into(), |n| n.to_string());
        let size = human(n.vm_state_size);
        s += &format!("{:<7} {:<16} {size:>8} {date} {clock:>15} {icount:>10}\n", n.id, n.name);
    }
    s
}

/// What is told about one image.
fn describe(image: &dyn Image, name: &Path) -> Result<Value, Error> {
    let d = image.describe();
    let mut v = JsonMap::new();
    v.insert("virtual-size".into(), image.size().into());
    v.insert("filename".into(), name.display().to_string().into());
    v.insert("format".into(), d.format.into());
    v.insert("actual-size".into(), image.file().allocated()?.into());
    v.insert("dirty-flag".into(), d.dirty.into());
    if let Some(n) = d.cluster_size {
        v.insert("cluster-size".into(), n.into());
    }
    if let (Some(file), format) = image.layered().map_or((None, None), |l| l.backing_name()) {
        let full = resolve(name, &file).display().to_string();
        v.insert("backing-filename".into(), file.into());
        v.insert("full-backing-filename".into(), full.into());
        if let Some(f) = format {
            v.insert("backing-filename-format".into(), f.into());
        }
    }
    let snapshots = image.snapshots().map(|s| s.list()).unwrap_or_default();
    if !snapshots.is_empty() {
        let list: Vec<Value> = snapshots.iter().map(snapshot_json).collect();
        v.insert("snapshots".into(), list.into());
    }
    if let Some(q) = d.qcow2 {
        let mut data = json!({
            "compat": if q.version >= 3 { "1.1" } else { "0.10" },
            "compression-type": q.compression.name(),
            "refcount-bits": q.refcount_bits,
        });
        if q.version >= 3 {
            data["lazy-refcounts"] = q.lazy_refcounts.into();
            data["corrupt"] = d.corrupt.into();
            data["extended-l2"] = false.into();
        }
        v.insert("format-specific".into(), json!({ "type": "qcow2", "data": data }));
    }
    let len = image.file().len()?.next_multiple_of(SECTOR);
    let child = json!({
        "filename": name.display().to_string(),
        "format": if image.file().is_device() { "host_device" } else { "file" },
        "virtual-size": len,
        "actual-size": image.file().allocated()?,
        "dirty-flag": false,
        "children": [],
    });
    v.insert("children".into(), json!([{ "name": "file", "info": child }]));
    Ok(Value::Object(v))
}

fn describe_for_people(image: &dyn Image, v: &Value) -> Result<String, Error> {
    let text = |k: &str| v[k].as_str().unwrap_or_default().to_string();
    let size = image.size();
    let mut s = format!(
        "image: {}\nfile format: {}\nvirtual size: {} ({size} bytes)\ndisk size: {}\n",
        text("filename"),
        text("format"),
        human(size),
        human(v["actual-size"].as_u64().unwrap_or(0)),
    );
    if v["dirty-flag"] == true {
        s += "cleanly shut down: no\n";
    }
    if let Some(n) = v["cluster-size"].as_u64() {
        s += &format!("cluster_size: {n}\n");
    }
    if v.get("backing-filename").is_some() {
        let (short, full) = (text("backing-filename"), text("full-backing-filename"));
        let actual = if short == full { String::new() } else { format!(" (actual path: {full})") };
        s += &format!("backing file: {short}{actual}\n");
        if v.get("backing-filename-format").is_some() {
            s += &format!("backing file format: {}\n", text("backing-filename-format"));
        }
    }
    let snapshots = image.snapshots().map(|s| s.list()).unwrap_or_default();
    if !snapshots.is_empty() {
        s += &format!("Snapshot list:\n{}", snapshot_table(&snapshots));
    }
    if let Some(q) = image.describe().qcow2 {
        s += "Format specific information:\n";
        s += &format!("    compat: {}\n", if q.version >= 3 { "1.1" } else { "0.10" });
        s += &format!("    compression type: {}\n", q.compression.name());
        if q.version >= 3 {
            s += &format!("    lazy refcounts: {}\n", q.lazy_refcounts);
        }
        s += &format!("    refcount bits: {}\n", q.refcount_bits);
        if q.version >= 3 {
            s += &format!("    corrupt: {}\n    extended l2: false\n", image.describe().corrupt);
        }
    }
    let len = image.file().len()?.next_multiple_of(SECTOR);
    let allocated = human(image.file().allocated()?);
    s += &format!(
        "Child node '/file':\n    filename: {}\n    protocol type: file\n    file length: {} ({len} \
         bytes)\n    disk size: {allocated}\n",
        text("filename"),
        human(len),
    );
    Ok(s)
}

/// Opens for looking: as it is, repaired by nobody.
fn look(source: &Source, backing: bool) -> OpenSpec {
    OpenSpec {
        format: source.format.clone(),
        force_share: source.force_share,
        backing,
        options: Options { repair: false, ..Options::default() },
        ..OpenSpec::read(&source.file)
    }
}

/// `info`.
pub fn info(a: &Info) -> Result<u8, Failure> {
    let (mut all, mut human) = (Vec::new(), Vec::new());
    let mut spec = look(&a.source, false);
    loop {
        let image = open(&spec)?;
        let v = describe(&*image, &spec.path)?;
        human.push(describe_for_people(&*image, &v)?);
        all.push(v);
        let behind = image.layered().map_or((None, None), |l| l.backing_name());
        match behind {
            (Some(name), format) if a.backing_chain && all.len() < 256 => {
                spec = OpenSpec { path: resolve(&spec.path, &name), format, ..spec };
            }
            _ => break,
        }
    }
    match (a.output, a.backing_chain) {
        (Output::Human, _) => print!("{}", human.join("\n")),
        (Output::Json, true) => print_json(&all),
        (Output::Json, false) => print_json(&all[0]),
    }
    Ok(0)
}

/// `check`.
pub fn check(a: &Check) -> Result<u8, Failure> {
    let repair = match a.repair.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(w) => {
            return Err(Failure::usage(format!(
                "nothing called '{w}' can be repaired; use leaks or all"
            )));
        }
    };
    let mut spec = look(&a.source, false);
    spec.write = repair != Repair::None;
    let image = open(&spec)?;
    let Some(checker) = image.checker() else {
        if !a.quiet {
            eprintln!("tandem: this image format does not support checks");
        }
        return Ok(63);
    };
    let r = checker.check(repair)?;
    match a.output {
        Output::Human if !a.quiet => print!("{}", check_for_people(&r)),
        Output::Human => {}
        Output::Json => print_json(&check_json(&r, &spec.path, image.describe().format)),
    }
    Ok(match &r {
        r if r.check_errors > 0 => 1,
        r if r.corruptions > 0 => 2,
        r if r.leaks > 0 => 3,
        _ => 0,
    })
}

fn check_json(r: &CheckReport, name: &Path, format: &str) -> Value {
    let mut v = json!({
        "filename": name.display().to_string(),
        "format": format,
        "check-errors": r.check_errors,
        "image-end-offset": r.image_end,
    });
    for (key, n) in [
        ("total-clusters", r.total_clusters),
        ("corruptions", r.corruptions),
        ("leaks", r.leaks),
        ("corruptions-fixed", r.corruptions_fixed),
        ("leaks-fixed", r.leaks_fixed),
        ("allocated-clusters", r.allocated_clusters),
        ("fragmented-clusters", r.fragmented_clusters),
        ("compressed-clusters", r.compressed_clusters),
    ] {
        if n > 0 {
            v[key] = n.into();
        }
    }
    v
}

fn check_for_people(r: &CheckReport) -> String {
    let mut s: String = r.findings.iter().map(|f| format!("{f}\n")).collect();
    if r.corruptions_fixed + r.leaks_fixed > 0 {
        s += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            r.leaks_fixed, r.corruptions_fixed
        );
    }
    if r.corruptions + r.leaks + r.check_errors == 0 {
        s += "No errors were found on the image.\n";
    }
    if r.corruptions > 0 {
        s += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            r.corruptions
        );
    }
    if r.leaks > 0 {
        s += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            r.leaks
        );
    }
    if r.check_errors > 0 {
        s += &format!("\n{} internal errors have occurred during the check.\n", r.check_errors);
    }
    let percent = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 * 100.0 / b as f64 };
    if r.total_clusters > 0 && r.allocated_clusters > 0 {
        s += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            r.allocated_clusters,
            r.total_clusters,
            percent(r.allocated_clusters, r.total_clusters),
            percent(r.fragmented_clusters, r.allocated_clusters),
            percent(r.compressed_clusters, r.allocated_clusters),
        );
    }
    s + &format!("Image end offset: {}\n", r.image_end)
}

/// `map`.
pub fn map(a: &Map) -> Result<u8, Failure> {
    let image: Arc<dyn Image> = open(&look(&a.source, true))?;
    let start = super::size(&a.start_offset)?;
    let most = a.max_length.as_deref().map(super::size).transpose()?.unwrap_or(u64::MAX);
    let end = start.saturating_add(most).min(image.size());
    let mut runs: Vec<(u64, Status)> = Vec::new();
    let mut at = start;
    while at < end {
        let s = status(&image, at, end - at, u32::MAX)?;
        let len = s.len;
        match runs.last_mut() {
            Some((from, last)) if goes_on(last, &s) => {
                debug_assert!(*from + last.len == at);
                last.len += len;
            }
            _ => runs.push((at, s)),
        }
        at += len.max(1);
    }
    if runs.is_empty() {
        // An empty disk is one empty run, as qemu-img has it.
        let nothing = Status {
            len: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            host: None,
        };
        runs.push((start, nothing));
    }
    if a.output == Output::Json {
        let list: Vec<Value> = runs
            .iter()
            .map(|(start, s)| {
                let mut v = json!({
                    "start": start, "length": s.len, "depth": s.depth, "present": s.present,
                    "zero": s.zero, "data": s.data, "compressed": s.compressed,
                });
                if let Some((host, _)) = &s.host {
                    v["offset"] = (*host).into();
                }
                v
            })
            .collect();
        print_json(&list);
        return Ok(0);
    }
    println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    for (start, s) in runs.iter().filter(|(_, s)| s.data && !s.zero) {
        let Some((host, file)) = &s.host else {
            return Err(Failure::usage("the image has compressed clusters; use --output=json"));
        };
        let hex = |n: u64| format!("{n:#x}");
        println!("{:<16}{:<16}{:<16}{}", hex(*start), hex(s.len), hex(*host), file.display());
    }
    Ok(0)
}

/// Whether `next` continues `last`.
fn goes_on(last: &Status, next: &Status) -> bool {
    let same = (last.depth, last.present, last.zero, last.data, last.compressed)
        == (next.depth, next.present, next.zero, next.data, next.compressed);
    let together = match (&last.host, &next.host) {
        (None, None) => true,
        (Some((a, f)), Some((b, g))) => a + last.len == *b && f == g,
        _ => false,
    };
    same && together
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (n, text) in [
            (0, "0 B"),
            (1 << 20, "1 MiB"),
            (200_704, "196 KiB"),
            (1536 << 20, "1.5 GiB"),
            (1000, "0.977 KiB"),
            (10 << 30, "10 GiB"),
        ] {
            assert_eq!(human(n), text);
        }
    }

    #[test]
    fn days_to_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_777), (2026, 11, 20));
    }
}
