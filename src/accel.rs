//! Which accelerator runs a machine, and why.

use crate::config::{Accel, TcgOptions, VmConfig};
use crate::log;
use crate::machine::Failure;
use std::sync::Arc;
use tandem_accel::{AccelOps, Error, Result};

/// The first accelerator of the configured list that works on this host.
///
/// `auto` is KVM where it works, else TCG, and says in one line which and why; an explicit list
/// falls back only to what it names.
pub fn choose(config: &VmConfig) -> std::result::Result<Arc<dyn AccelOps>, Failure> {
    let mut reasons = Vec::new();
    for entry in &config.accel {
        let made = match entry {
            Accel::Auto => return auto(config),
            Accel::Kvm => kvm(),
            Accel::Tcg(options) => tcg(config, options),
        };
        match made {
            Ok(accel) => {
                if let Some(why) = reasons.last() {
                    log::note(&format!("running on {}, as {why}", entry.name()));
                }
                return Ok(accel);
            }
            Err(e) => reasons.push(e),
        }
    }
    let all: Vec<String> = reasons.iter().map(|e| e.to_string()).collect();
    Err(Failure::Accelerator(Error::new(all.join("; "))))
}

/// Writes out what is still in the execution log's buffer; for the end of the process.
pub fn finish_log() {
    #[cfg(feature = "tcg")]
    tandem_tcg::log::flush();
}

/// Whether this host has KVM, whatever the machine runs on.
pub fn kvm_is_present() -> bool {
    kvm().is_ok()
}

fn auto(config: &VmConfig) -> std::result::Result<Arc<dyn AccelOps>, Failure> {
    match kvm_for_anything() {
        Ok(accel) => {
            log::note(&"running on kvm, as /dev/kvm works");
            Ok(accel)
        }
        Err(why) => {
            let accel = tcg(config, &TcgOptions::default()).map_err(Failure::Accelerator)?;
            log::note(&format!("running on tcg, as {why}"));
            Ok(accel)
        }
    }
}

/// KVM, if it can be expected to run whatever a processor runs. One without hardware emulates
/// privileged code with gaps, in which stock systems get stuck; `--accel kvm` takes it all the same.
#[cfg(feature = "kvm")]
fn kvm_for_anything() -> Result<Arc<dyn AccelOps>> {
    let accel = kvm()?;
    if tandem_kvm::has_hardware() {
        return Ok(accel);
    }
    Err(Error::new("/dev/kvm has no virtualisation hardware behind it, and cannot run everything")
        .remedy("use a host with VT-x or AMD-V (nested virtualisation), or try --accel kvm"))
}

#[cfg(not(feature = "kvm"))]
fn kvm_for_anything() -> Result<Arc<dyn AccelOps>> {
    kvm()
}

#[cfg(feature = "kvm")]
fn kvm() -> Result<Arc<dyn AccelOps>> {
    Ok(tandem_kvm::KvmAccel::new()?)
}

#[cfg(not(feature = "kvm"))]
fn kvm() -> Result<Arc<dyn AccelOps>> {
    Err(Error::new("this tandem was built without KVM").remedy("run with --accel tcg"))
}

#[cfg(feature = "tcg")]
fn tcg(config: &VmConfig, options: &TcgOptions) -> Result<Arc<dyn AccelOps>> {
    use crate::config::accel::{TcgBackend, TcgThreads};
    use tandem_accel::clock::Clock;
    use tandem_tcg::log::{Items, NAMES};
    use tandem_tcg::{BackendKind, TcgAccel};

    let mut made = tandem_tcg::TcgOptions {
        backend: match options.backend {
            TcgBackend::Jit => BackendKind::Jit,
            TcgBackend::Interp => BackendKind::Interp,
        },
        one_insn_per_tb: options.one_insn_per_tb,
        perf_map: options.perfmap,
        single_thread: options.thread == TcgThreads::Single,
        icount: options.icount.map(|i| tandem_tcg::Icount { shift: i.shift, sleep: i.sleep }),
        ..tandem_tcg::TcgOptions::default()
    };
    if let Some(mib) = options.tb_size {
        made.code_bytes = (mib as usize) << 20;
    }
    let items = config.log.items.iter();
    made.log.items = items
        .filter_map(|name| NAMES.iter().find(|(n, ..)| n == name))
        .fold(Items::empty(), |all, (_, item, _)| all | *item);
    made.log.file.clone_from(&config.log.file);
    made.log.filter =
        config.log.filter.iter().map(|&(at, len)| at..=at.saturating_add(len - 1)).collect();
    Ok(TcgAccel::new(made, Clock::new())?)
}

#[cfg(not(feature = "tcg"))]
fn tcg(_config: &VmConfig, _options: &TcgOptions) -> Result<Arc<dyn AccelOps>> {
    Err(Error::new("this tandem was built without TCG").remedy("run with --accel kvm"))
}
