//! The accelerator: options, the compile target, and vCPU threads.

use crate::env::Env as EnvOf;
use crate::exec::{Doorbell, Runner, Shared, Vcpu};
use crate::tb::TbCache;
use crate::x86::{self, Cpu, Env};
use crate::{log, runtime};
use std::mem::offset_of;
use std::sync::Arc;
use tandem_accel::clock::Clock;
use tandem_accel::memory::GuestMap;
use tandem_accel::vcpu::{VcpuControl, VcpuHandle, VcpuSpec, run_loop};
use tandem_accel::x86::cpuid::CpuidTable;
use tandem_accel::{AccelOps, Error, IrqChip, Result};
use tandem_jit::code::Backend;
use tandem_jit::interp::InterpBackend;
use tandem_jit::target::{MemModel, Target, VecState};

/// How blocks are run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BackendKind {
    /// Compiled to host code where the host has a back end, else interpreted.
    #[default]
    Jit,
    /// The IR is interpreted.
    Interp,
}

/// Options of the accelerator.
#[derive(Clone, Debug)]
pub struct TcgOptions {
    /// How blocks are run.
    pub backend: BackendKind,
    /// One guest instruction per block.
    pub one_insn_per_tb: bool,
    /// Size of the code memory in bytes.
    pub code_bytes: usize,
    /// What to log.
    pub log: log::Options,
}

impl Default for TcgOptions {
    fn default() -> TcgOptions {
        TcgOptions {
            backend: BackendKind::Jit,
            one_insn_per_tb: false,
            code_bytes: 256 << 20,
            log: log::Options::default(),
        }
    }
}

/// Frequency of a translated TSC: it counts nanoseconds of the virtual clock.
const TSC_HZ: u64 = tandem_accel::clock::NANOS_PER_SEC;

/// Translation, set up for one VM.
pub struct TcgAccel {
    options: TcgOptions,
    clock: Arc<Clock>,
    target: Arc<Target>,
    shared: Arc<Shared>,
    tbs: Arc<TbCache>,
}

/// What code is compiled for.
fn target(vec: VecState) -> Target {
    Target {
        globals: x86::cpu::globals(),
        pc_global: x86::cpu::global::RIP.0,
        helpers: x86::helpers::table(),
        env: crate::env::Core::layout(size_of::<Env>()),
        mem: MemModel::Softmmu {
            page_bits: crate::softmmu::PAGE_BITS as u8,
            tables: EnvOf::<Cpu>::tlb_layouts(),
        },
        vec,
        runtime: runtime::table(),
    }
}

/// How much vector state this host has.
pub fn host_vectors() -> VecState {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return VecState::Zmm;
        }
        if is_x86_feature_detected!("avx") {
            return VecState::Ymm;
        }
    }
    VecState::Xmm
}

/// The compile target on this host.
#[cfg(test)]
pub(crate) fn host_target() -> Target {
    target(host_vectors())
}

/// The compiler for this host; the interpreter where there is none.
#[cfg(target_arch = "x86_64")]
fn jit(target: &Arc<Target>, code_bytes: usize) -> Result<Arc<dyn Backend>> {
    let backend = tandem_jit::x86_64::X64Backend::new(target.clone(), code_bytes)
        .map_err(|e| Error::new("setting up the compiler's code memory").caused_by(e))?;
    Ok(backend)
}
#[cfg(not(target_arch = "x86_64"))]
fn jit(target: &Arc<Target>, _code_bytes: usize) -> Result<Arc<dyn Backend>> {
    Ok(InterpBackend::new(target.clone()))
}

impl TcgAccel {
    /// Sets translation up.
    pub fn new(options: TcgOptions, clock: Arc<Clock>) -> Result<Arc<TcgAccel>> {
        log::init(&options.log)?;
        let target = Arc::new(target(host_vectors()));
        let backend: Arc<dyn Backend> = match options.backend {
            BackendKind::Jit => jit(&target, options.code_bytes)?,
            BackendKind::Interp => InterpBackend::new(target.clone()),
        };
        let shared = Arc::new(Shared::default());
        let watch = shared.clone();
        let tbs = TbCache::new(backend, move |ppage, on| watch.watch(ppage, on));
        Ok(Arc::new(TcgAccel { options, clock, target, shared, tbs }))
    }

    /// The block table, for statistics.
    pub fn tbs(&self) -> &Arc<TbCache> {
        &self.tbs
    }
}

impl AccelOps for TcgAccel {
    fn name(&self) -> &'static str {
        "tcg"
    }

    fn attach_memory(&self, map: &Arc<GuestMap>) -> Result<()> {
        map.subscribe(self.shared.phys.clone());
        map.set_watcher(self.tbs.clone());
        Ok(())
    }

    fn irqchip(&self) -> IrqChip {
        IrqChip::Userspace
    }

    fn supported_cpuid(&self) -> Result<CpuidTable> {
        Ok(x86::cpuid::supported())
    }

    fn create_vcpu_thread(&self, spec: VcpuSpec) -> Result<VcpuHandle> {
        let control = VcpuControl::new();
        let bell = Doorbell::new(control.clone());
        let (ram, _) = self.shared.phys.snapshot();
        let vcpu = Box::new(Vcpu::new(
            &spec,
            self.clock.clone(),
            ram,
            self.shared.clone(),
            self.tbs.clone(),
            self.target.clone(),
            bell.clone(),
            self.options.one_insn_per_tb,
            self.options.log.needs_every_block(),
        ));
        let mem = self.tbs.backend.alloc_env().map_err(|e| {
            Error::new(format!("cannot allocate the state of vCPU {}", spec.index)).caused_by(e)
        })?;
        let mut runner = Runner::new(mem, vcpu, &spec.state)?;
        self.shared.add(bell.clone());
        if let Some(intc) = &spec.intc {
            intc.attach(bell.clone());
        }
        let (index, events, loop_control) = (spec.index, spec.events, control.clone());
        let thread = std::thread::Builder::new()
            .name(format!("tcg-vcpu{index}"))
            .spawn(move || run_loop(index, &mut runner, &loop_control, &*events))
            .map_err(|e| {
                Error::new(format!("cannot start the thread of vCPU {index}")).caused_by(e)
            })?;
        Ok(VcpuHandle::new(index, control, bell, Some(thread)))
    }

    fn clock(&self) -> Arc<Clock> {
        self.clock.clone()
    }

    fn tsc_hz(&self) -> u64 {
        TSC_HZ
    }

    fn reset(&self) -> Result<()> {
        // The chips are the machine's, and the vCPUs' state is written by it.
        Ok(())
    }
}

// Zeroed memory must be a valid Env, and generated code needs the core at offset 0.
const _: () = assert!(offset_of!(Env, core) == 0);
