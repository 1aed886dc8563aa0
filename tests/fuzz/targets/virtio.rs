//! Hostile drivers at every virtio device, over PCI and MMIO. The first byte chooses which.
//!
//! A device serves one driver after the other, as a real one does: a case begins and ends with a
//! reset. Making one for each case would take most of the time.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, LazyLock};
use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::hostile::subjects::SUBJECTS;
use tandem_devices::virtio::hostile::{Choices, mmio, pci};

static DEVICES: LazyLock<Vec<Arc<dyn VirtioDevice>>> =
    LazyLock::new(|| SUBJECTS.iter().map(|s| (s.make)()).collect());

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let n = usize::from(*first);
    let which = n / 2 % SUBJECTS.len();
    let device = DEVICES[which].clone();
    let mut choices = Choices::bytes(rest);
    match n % 2 {
        0 => pci(device, SUBJECTS[which].header, &mut choices),
        _ => mmio(device, &mut choices),
    }
});
