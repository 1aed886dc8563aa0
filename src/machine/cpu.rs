//! Processors: CPUID tables from the CPU model, and the states in which vCPUs start.

use super::Failure;
use crate::config::{Fault, VmConfig};
use std::sync::Arc;
use tandem_accel::AccelOps;
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::x86::model::{KVM_SIGNATURE, ModelSpec, Platform, Topology, build};
use tandem_accel::x86::{MpState, X86State, gpr};
use tandem_devices::firmware::smbios;
use tandem_devices::irqchip::ApicConfig;

/// IA32_APIC_BASE bit: bootstrap processor.
const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_MTRR_DEF_TYPE (SDM vol. 3 §12.11.2.1).
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
const CPUID_1_ECX_X2APIC: u32 = 1 << 21;
const CPUID_1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// The processors of a machine as the guest sees them.
pub struct Processors {
    /// Local APIC IDs in vCPU order.
    pub apic_ids: Vec<u32>,
    /// What CPUID answers, in vCPU order.
    pub cpuid: Vec<Arc<CpuidTable>>,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
}

impl Processors {
    /// The processors that `config` asks for, as `accel` can give them. A feature that it cannot
    /// give is a fault of the configuration.
    pub fn new(config: &VmConfig, accel: &dyn AccelOps) -> Result<Processors, Failure> {
        let usage = |errors: Vec<tandem_accel::Error>| {
            Failure::Usage(errors.into_iter().map(Fault::from).collect())
        };
        let spec = ModelSpec::parse(&config.cpu).map_err(usage)?;
        let smp = config.smp;
        let topology =
            Topology::new(smp.sockets, smp.cores, smp.threads).map_err(|e| usage(vec![e]))?;
        let supported = accel.supported_cpuid().map_err(Failure::Accelerator)?;
        let tsc_hz = accel.tsc_hz();
        let platform = Platform {
            accel: &accel.name().to_uppercase(),
            supported: &supported,
            topology,
            tsc_hz,
            hypervisor: Some(KVM_SIGNATURE),
        };
        let table = build(&spec, &platform).map_err(usage)?;
        let apic_ids: Vec<u32> = (0..smp.cpus).map(|i| topology.apic_id(i)).collect();
        let cpuid = apic_ids.iter().map(|id| Arc::new(table.for_apic_id(*id))).collect();
        Ok(Processors { apic_ids, cpuid, tsc_hz })
    }

    /// What the machine's own local APICs need to know.
    pub fn apic_config(&self) -> ApicConfig {
        let features = self.cpuid[0].query(1, 0).ecx;
        ApicConfig {
            tsc_hz: self.tsc_hz,
            x2apic: features & CPUID_1_ECX_X2APIC != 0,
            tsc_deadline: features & CPUID_1_ECX_TSC_DEADLINE != 0,
            phys_bits: self.cpuid[0].query(0x8000_0008, 0).eax as u8,
        }
    }

    /// What SMBIOS says of a processor, numbers apart.
    pub fn smbios(&self) -> smbios::Cpu {
        let leaf = |l| self.cpuid[0].query(l, 0);
        let text = |words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_string()
        };
        let (vendor, signature) = (leaf(0), leaf(1));
        let name = [leaf(0x8000_0002), leaf(0x8000_0003), leaf(0x8000_0004)];
        let name: Vec<u32> = name.iter().flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx]).collect();
        smbios::Cpu {
            signature: (signature.eax, signature.edx),
            vendor: text(&[vendor.ebx, vendor.edx, vendor.ecx]),
            name: text(&name),
            mhz: (self.tsc_hz / 1_000_000).min(0xffff) as u16,
            ..smbios::Cpu::default()
        }
    }

    /// The bootstrap processor after RESET: firmware's first state. EDX holds the processor
    /// signature (SDM vol. 3 §10.1.1).
    pub fn after_reset(&self) -> X86State {
        let mut state = X86State::default();
        state.gpr[gpr::RDX] = self.cpuid[0].query(1, 0).eax.into();
        state
    }

    /// `state` as firmware would have handed it over.
    pub fn after_firmware(&self, state: X86State) -> X86State {
        // Firmware leaves memory write-back on all processors; systems complain if it does not.
        let msrs = vec![(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
        X86State { msrs, ..state }
    }

    /// The state in which vCPU `index` starts: the bootstrap processor as `first` says, the others
    /// with the same MSRs and waiting for a start-up IPI.
    pub fn initial_state(&self, index: usize, first: &X86State) -> X86State {
        if index == 0 {
            return first.clone();
        }
        let msrs = first.msrs.clone();
        let mut state = X86State { mp: MpState::WaitForSipi, msrs, ..X86State::default() };
        state.apic_base &= !APIC_BASE_BSP;
        // RESET and INIT leave the processor signature in EDX (SDM vol. 3 §10.1.1).
        state.gpr[gpr::RDX] = self.cpuid[index].query(1, 0).eax.into();
        state
    }
}
