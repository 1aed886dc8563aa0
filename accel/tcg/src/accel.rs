//! The accelerator: options, the compile target, and vCPU threads.

use crate::counters::Counters;
use crate::env::Env as EnvOf;
use crate::exec::{Doorbell, Icount, Pace, Runner, Shared, Turns, Vcpu, VcpuOptions};
use crate::perfmap::PerfMap;
use crate::tb::TbCache;
use crate::x86::{self, Cpu, Env};
use crate::{log, runtime};
use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use tandem_accel::clock::{Clock, NANOS_PER_SEC};
use tandem_accel::memory::{GuestMap, MemoryListener, Region};
use tandem_accel::vcpu::{Seat, VcpuControl, VcpuHandle, VcpuSpec, run_loop};
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
    /// All vCPUs in turn on one thread; `icount` implies it.
    pub single_thread: bool,
    /// Guest time from executed instructions.
    pub icount: Option<Icount>,
    /// Size of the code memory in bytes.
    pub code_bytes: usize,
    /// What to log.
    pub log: log::Options,
    /// Writes a map of the translated code for `perf` (see [`crate::perfmap`]).
    pub perf_map: bool,
}

impl Default for TcgOptions {
    fn default() -> TcgOptions {
        TcgOptions {
            backend: BackendKind::Jit,
            one_insn_per_tb: false,
            single_thread: false,
            icount: None,
            code_bytes: 256 << 20,
            log: log::Options::default(),
            perf_map: false,
        }
    }
}

impl TcgOptions {
    /// Whether two runs with the same input are the same.
    fn is_deterministic(&self) -> bool {
        self.icount.is_some_and(|i| i.shift.is_some())
    }
}

/// Frequency of a translated TSC: it counts nanoseconds of the virtual clock.
pub(crate) const TSC_HZ: u64 = NANOS_PER_SEC;

/// Translation, set up for one VM.
pub struct TcgAccel {
    options: TcgOptions,
    clock: Arc<Clock>,
    target: Arc<Target>,
    shared: Arc<Shared>,
    tbs: Arc<TbCache>,
    counters: Mutex<Vec<Arc<Counters>>>,
    /// Where vCPUs take turns.
    turns: Option<(Arc<Turns>, Arc<Pace>)>,
}

/// UTC at the start of a machine whose runs are to be alike: 2000-01-01, in nanoseconds.
const FIXED_EPOCH: u64 = 946_684_800 * NANOS_PER_SEC;
/// Seed of the random numbers of such a machine.
const FIXED_SEED: u64 = 0x7461_6e64_656d;

/// What code is compiled for.
fn target(vec: VecState) -> Target {
    let mem = MemModel::Softmmu {
        page_bits: crate::softmmu::PAGE_BITS as u8,
        tables: EnvOf::<Cpu>::tlb_layouts(),
    };
    Target {
        globals: x86::cpu::globals(),
        pc_global: x86::cpu::global::RIP.0,
        helpers: x86::helpers::table(),
        env: crate::env::Core::layout(size_of::<Env>()),
        mem,
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

/// What code is compiled for whose guest addresses are addresses of the host.
pub(crate) fn linear_target() -> Target {
    Target { mem: MemModel::Linear { base: 0 }, ..target(host_vectors()) }
}

/// The back end of this kind.
pub(crate) fn backend(
    kind: BackendKind,
    target: &Arc<Target>,
    code_bytes: usize,
) -> Result<Arc<dyn Backend>> {
    match kind {
        BackendKind::Jit => jit(target, code_bytes),
        BackendKind::Interp => Ok(InterpBackend::new(target.clone())),
    }
}

impl TcgAccel {
    /// Sets translation up.
    pub fn new(options: TcgOptions, clock: Arc<Clock>) -> Result<Arc<TcgAccel>> {
        log::init(&options.log)?;
        let target = Arc::new(target(host_vectors()));
        let backend = backend(options.backend, &target, options.code_bytes)?;
        let shared = Arc::new(Shared::default());
        let perf_map = options.perf_map.then(PerfMap::create).transpose()?;
        let tbs = TbCache::new(backend, perf_map, shared.clone());
        let turns = (options.single_thread || options.icount.is_some())
            .then(|| (Arc::default(), Pace::new(clock.clone(), options.icount)));
        if options.is_deterministic() {
            clock.set_epoch(FIXED_EPOCH);
        }
        let vcpus = Arc::downgrade(&shared);
        clock.wait_for(move || vcpus.upgrade().map_or(u64::MAX, |s| s.oldest_call()));
        let counters = Mutex::default();
        Ok(Arc::new(TcgAccel { options, clock, target, shared, tbs, counters, turns }))
    }

    /// The block table, for statistics.
    pub fn tbs(&self) -> &Arc<TbCache> {
        &self.tbs
    }

    /// All counters by name: those of the block table, and the sums over the vCPUs.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.tbs.counters;
        let table = [
            ("translations", &c.translations),
            ("translated_insns", &c.insns),
            ("invalidations", &c.invalidations),
            ("links", &c.links),
            ("code_flushes", &c.flushes),
        ];
        let mut all: Vec<_> = table.map(|(n, c)| (n, c.load(Ordering::Relaxed))).to_vec();
        let (used, room) = self.tbs.backend.usage();
        all.extend([("code_bytes", used as u64), ("code_bytes_max", room as u64)]);
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for vcpu in self.counters.lock().unwrap().iter() {
            let list = vcpu.list();
            if sums.is_empty() {
                sums = list;
            } else {
                sums.iter_mut().zip(list).for_each(|(sum, c)| sum.1 += c.1);
            }
        }
        all.extend(sums);
        all
    }

    /// A vCPU to be run on a thread of the caller's, and how to reach it from others.
    ///
    /// # Errors
    /// There is no memory for its state, or `spec.state` is an impossible one.
    pub fn runner(&self, spec: &VcpuSpec) -> Result<(Runner, Arc<Doorbell>)> {
        let bell = Doorbell::new(spec.apic_id, VcpuControl::new(), &self.clock);
        let runner = self.runner_with(spec, bell.clone())?;
        Ok((runner, bell))
    }

    fn runner_with(&self, spec: &VcpuSpec, bell: Arc<Doorbell>) -> Result<Runner> {
        let counters = Arc::new(Counters::default());
        self.counters.lock().unwrap().push(counters.clone());
        let vcpu = Box::new(Vcpu::new(
            spec,
            self.clock.clone(),
            self.shared.clone(),
            self.tbs.clone(),
            self.target.clone(),
            bell.clone(),
            counters,
            VcpuOptions {
                pace: self.turns.as_ref().map(|(_, pace)| pace.clone()),
                seed: self.options.is_deterministic().then_some(FIXED_SEED),
                one_insn: self.options.one_insn_per_tb,
                nochain: self.options.log.needs_every_block(),
                space: None,
            },
        ));
        let mem = self.tbs.backend.alloc_env().map_err(|e| {
            Error::new(format!("cannot allocate the state of vCPU {}", spec.index)).caused_by(e)
        })?;
        let runner = Runner::new(mem, vcpu, &spec.state)?;
        self.shared.add(bell.clone());
        if let Some(intc) = &spec.intc {
            intc.attach(bell);
        }
        Ok(runner)
    }
}

/// Carries changes of the memory map to the list of RAM, the blocks and the vCPUs.
pub(crate) struct MapFollower {
    pub shared: Arc<Shared>,
    pub tbs: Arc<TbCache>,
}

impl MapFollower {
    /// Code at these addresses may now be other code.
    fn changed(&self, r: &Region) {
        self.tbs.forget(r.gpa, r.len());
        self.shared.memory_changed();
    }
}

impl MemoryListener for MapFollower {
    fn added(&self, r: &Region) {
        self.shared.phys.add(r);
        self.changed(r);
    }
    fn removed(&self, r: &Region) {
        self.shared.phys.remove(r);
        self.changed(r);
    }
}

impl AccelOps for TcgAccel {
    fn name(&self) -> &'static str {
        "tcg"
    }

    fn attach_memory(&self, map: &Arc<GuestMap>) -> Result<()> {
        map.subscribe(Arc::new(MapFollower { shared: self.shared.clone(), tbs: self.tbs.clone() }));
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
        let bell = Doorbell::new(spec.apic_id, control.clone(), &self.clock);
        let runner = self.runner_with(&spec, bell.clone())?;
        let (index, events, loop_control) = (spec.index, spec.events, control.clone());
        if let Some((turns, pace)) = &self.turns {
            turns.bring(pace, index, runner, loop_control, events)?;
            return Ok(VcpuHandle::new(index, control, bell, None));
        }
        let thread = std::thread::Builder::new()
            .name(format!("tcg-vcpu{index}"))
            .spawn(move || run_loop(Seat::take(index, runner, loop_control, events)))
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

    fn executed(&self) -> Option<u64> {
        let (_, pace) = self.turns.as_ref()?;
        pace.makes_time().then(|| pace.executed())
    }

    fn hold(&self) {
        if let Some((_, pace)) = self.turns.as_ref().filter(|(_, p)| p.makes_time()) {
            pace.hold();
        }
    }

    fn reset(&self) -> Result<()> {
        // The chips are the machine's, and the vCPUs' state is written by it.
        Ok(())
    }
}

// Zeroed memory must be a valid Env, and generated code needs the core at offset 0.
const _: () = assert!(offset_of!(Env, core) == 0);
