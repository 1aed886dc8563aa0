//! `tandem doctor`: what works on this host, why not, and how to fix it.
//!
//! For each accelerator: whether it is usable, with the reason and the remedy if not, and the proof:
//! a small guest that goes through all processor modes runs on it. Then the features of the host's
//! processor that matter to translation.

mod host;
mod proof;

use crate::cli::exit::Exit;

/// What was found out about one accelerator.
struct Finding {
    name: &'static str,
    works: bool,
    lines: Vec<String>,
}

impl Finding {
    fn print(&self) {
        println!("\n{}: {}", self.name, if self.works { "works" } else { "does not work" });
        self.lines.iter().for_each(|l| println!("  {l}"));
    }

    /// Runs the small guest on `accel` and notes the outcome.
    fn prove(&mut self, accel: &str) {
        let proof = proof::run(accel);
        let seconds = proof.took.as_secs_f64();
        let outcome = match &proof.verdict {
            Ok(()) => format!("ran in {seconds:.2} s"),
            Err(why) => format!("failed after {seconds:.2} s: {why}"),
        };
        self.works &= proof.verdict.is_ok();
        self.lines.push(format!("the small guest with --accel {accel}: {outcome}"));
    }
}

/// Examines the host and prints the report. Succeeds if at least one accelerator works.
pub fn run() -> Exit {
    println!("tandem {} on {}, {}", env!("CARGO_PKG_VERSION"), host::kernel(), host::processor());
    let mut any = false;
    for examine in [kvm, tcg] {
        let finding = examine();
        finding.print();
        any |= finding.works;
    }
    let features = host::features();
    if !features.is_empty() {
        println!("\nfeatures of this processor that matter to tcg:");
        for f in features {
            let mark = if f.present { "yes" } else { "no" };
            println!("  {:<10} {mark:<4} {}", f.name, f.means);
        }
    }
    if any { Exit::Done } else { Exit::Accelerator }
}

#[cfg(feature = "kvm")]
fn kvm() -> Finding {
    let mut finding = Finding { name: "kvm", works: true, lines: Vec::new() };
    match tandem_kvm::probe() {
        Err(diagnosis) => {
            finding.works = false;
            finding.lines.push(format!("why: {}", diagnosis.what));
            finding.lines.push(format!("fix: {}", diagnosis.remedy));
        }
        Ok(info) => {
            finding.lines.push(format!(
                "API version {}, up to {} vCPUs, TSC at {:.2} GHz",
                info.api_version,
                info.max_vcpus,
                info.tsc_hz as f64 / 1e9
            ));
            if !info.hardware {
                finding.lines.push(
                    "this processor shows no VT-x or AMD-V: privileged code is emulated, slowly \
                     and with gaps; stock systems may not boot, use --accel tcg for them"
                        .into(),
                );
            }
            if !info.lacking.is_empty() {
                finding.lines.push(format!("this kernel lacks {}", info.lacking.join(", ")));
            }
            finding.prove("kvm");
        }
    }
    finding
}

#[cfg(not(feature = "kvm"))]
fn kvm() -> Finding {
    let lines = vec!["why: this tandem was built without it".into(), built_without("kvm")];
    Finding { name: "kvm", works: false, lines }
}

#[cfg(feature = "tcg")]
fn tcg() -> Finding {
    let mut finding = Finding { name: "tcg", works: true, lines: Vec::new() };
    if cfg!(target_arch = "x86_64") {
        finding.prove("tcg");
    } else {
        finding.lines.push("no code generator for this host; the interpreter is used".into());
    }
    finding.prove("tcg,backend=interp");
    finding
}

#[cfg(not(feature = "tcg"))]
fn tcg() -> Finding {
    let lines = vec!["why: this tandem was built without it".into(), built_without("tcg")];
    Finding { name: "tcg", works: false, lines }
}

#[cfg(not(all(feature = "kvm", feature = "tcg")))]
fn built_without(name: &str) -> String {
    format!("fix: build it with --features {name}")
}
