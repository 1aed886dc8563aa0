//! Expansion ROMs of cards, from the host's files.

use super::decode::Direct;
use crate::registry::{DeviceFault, Properties};
use std::sync::Arc;
use tandem_accel::memory::{GuestMap, Region, RegionKind};
use tandem_backends::rom;

/// The ROM that the property `romfile` names, in memory of a size that a register can say.
pub fn option_rom(p: &Properties, map: &Arc<GuestMap>) -> Result<Option<Arc<Direct>>, DeviceFault> {
    let name = p.text("romfile").unwrap_or_default();
    let Some(path) = rom::find(name).filter(|_| !name.is_empty()) else {
        if !name.is_empty() {
            log::warn!("ROM '{name}' is not installed ; firmware does without it");
        }
        return Ok(None);
    };
    let cannot = |e: String| {
        let what = format!("ROM '{}' cannot be read: {e}", path.display());
        DeviceFault::new(what, "name another with romfile=FILE, or none with romfile=")
    };
    let bytes = rom::read(&path).map_err(|e| cannot(e.to_string()))?;
    let len = (bytes.len() as u64).next_power_of_two().max(0x1000);
    let region = Region::new("option ROM", RegionKind::Rom, 0, len);
    let region = region.map_err(|e| cannot(e.to_string()))?;
    region.load(0, &bytes);
    Ok(Some(Arc::new(Direct { map: map.clone(), region })))
}
