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
            Accel::Kvm => kvm(config),
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

fn auto(config: &VmConfig) -> std::result::Result<Arc<dyn AccelOps>, Failure> {
    match kvm(config) {
        Ok(accel) => {
            log::note(&"running on kvm, as /dev/kvm works");
            Ok(accel)
        }
        Err(why) => {
            let accel = tcg(config, &TcgOptions::default()).map_err(Failure::Accelerator)?;
            log::note(&format!("running on tcg, as {why}, or run with --accel tcg"));
            Ok(accel)
        }
    }
}

fn kvm(_config: &VmConfig) -> Result<Arc<dyn AccelOps>> {
    Err(Error::new("this tandem was built without KVM"))
}

fn tcg(_config: &VmConfig, _options: &TcgOptions) -> Result<Arc<dyn AccelOps>> {
    Err(Error::new("this tandem was built without TCG"))
}
