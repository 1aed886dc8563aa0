//! The in-kernel PIC, IOAPIC and PIT. KVM has no RESET for them: their state is read when they are
//! new, and RESET writes it back.

use crate::error::failed;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use tandem_accel::Result;

const CHIPS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "the first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "the second PIC"),
    (KVM_IRQCHIP_IOAPIC, "the IOAPIC"),
];

/// State of the chips as the kernel made them.
pub(crate) struct ResetState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

/// Creates PIC, IOAPIC and PIT (which answers the speaker port 61h too), and local APICs for the
/// vCPUs to come.
pub(crate) fn create(vm: &VmFd) -> Result<ResetState> {
    vm.create_irq_chip()
        .map_err(|e| failed("create the interrupt chips", "KVM_CREATE_IRQCHIP", e))?;
    let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(config).map_err(|e| failed("create the timer chip", "KVM_CREATE_PIT2", e))?;
    ResetState::read(vm)
}

impl ResetState {
    fn read(vm: &VmFd) -> Result<ResetState> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, (id, name)) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)
                .map_err(|e| failed(&format!("read the state of {name}"), "KVM_GET_IRQCHIP", e))?;
        }
        let pit = vm
            .get_pit2()
            .map_err(|e| failed("read the state of the timer chip", "KVM_GET_PIT2", e))?;
        Ok(ResetState { irqchips, pit })
    }

    /// Puts the chips into the state they were made in.
    pub fn restore(&self, vm: &VmFd) -> Result<()> {
        for (chip, (_, name)) in self.irqchips.iter().zip(CHIPS) {
            vm.set_irqchip(chip)
                .map_err(|e| failed(&format!("reset {name}"), "KVM_SET_IRQCHIP", e))?;
        }
        vm.set_pit2(&self.pit).map_err(|e| failed("reset the timer chip", "KVM_SET_PIT2", e))
    }
}
