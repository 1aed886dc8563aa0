//! What to tell when KVM cannot go on: the reason, the instruction, the registers.

use super::Vcpu;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use std::fmt::Write;
use tandem_accel::Error;
use tandem_accel::x86::{X86State, gpr, seg};
use vm_memory::{Bytes, GuestAddress};

/// Longest instruction.
const MAX_INSTRUCTION: usize = 15;

/// An internal error of KVM (KVM_EXIT_INTERNAL_ERROR).
pub(super) fn internal_error(vcpu: &mut Vcpu) -> Error {
    let run = vcpu.fd.get_kvm_run();
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member; the
    // emulation-failure member begins alike.
    let (suberror, ndata, data) = unsafe {
        let i = run.__bindgen_anon_1.internal;
        (i.suberror, i.ndata as usize, i.data)
    };
    let meaning = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate this instruction",
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception arose while another was delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "delivering an event failed",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the hardware gave an unexpected exit reason",
        _ => "unknown suberror",
    };
    let mut what = format!("KVM internal error {suberror}: {meaning}");
    let mut bytes = Vec::new();
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        // data[0]: flags; data[1]: length and bytes of the instruction, if the flag says so.
        let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        if ndata >= 3 && data[0] & flag != 0 {
            let raw: Vec<u8> = data[1..4].iter().flat_map(|w| w.to_le_bytes()).collect();
            let len = usize::from(raw[0]).min(MAX_INSTRUCTION);
            bytes = raw[1..=len].to_vec();
        }
    } else if ndata > 0 {
        let shown: Vec<_> =
            data[..ndata.min(data.len())].iter().map(|d| format!("{d:#x}")).collect();
        let _ = write!(what, " (data {})", shown.join(" "));
    }
    failure(vcpu, &what, &bytes)
}

/// An error that stops the vCPU, with its registers and the bytes at its instruction pointer
/// (`bytes` if the kernel gave them).
pub(super) fn failure(vcpu: &Vcpu, what: &str, bytes: &[u8]) -> Error {
    let mut text = format!("vCPU {}: {what}", vcpu.index);
    match vcpu.read_state() {
        Ok(s) => {
            let fetched = if bytes.is_empty() { fetch(vcpu, &s) } else { bytes.to_vec() };
            if !fetched.is_empty() {
                text.push_str("\n  code at CS:RIP:");
                for b in fetched {
                    let _ = write!(text, " {b:02x}");
                }
            }
            registers(&mut text, &s);
        }
        Err(e) => {
            let _ = write!(text, " (its registers cannot be read: {e})");
        }
    }
    let remedy = if crate::diagnose::has_hardware() {
        "if the guest is sound, report this with the registers; or use --accel tcg"
    } else {
        "this host's KVM has no virtualisation hardware and cannot run everything; use --accel tcg"
    };
    Error::new(text).remedy(remedy)
}

/// The bytes at CS:RIP, as many as are mapped.
fn fetch(vcpu: &Vcpu, s: &X86State) -> Vec<u8> {
    let Some(map) = vcpu.vm.map.get() else { return Vec::new() };
    let long = s.seg[seg::CS].attr & tandem_accel::x86::ATTR_L != 0;
    let base = if long { 0 } else { s.seg[seg::CS].base };
    let linear = base.wrapping_add(s.rip);
    let Ok(t) = vcpu.fd.translate_gva(linear) else { return Vec::new() };
    if t.valid == 0 {
        return Vec::new();
    }
    let in_page = 0x1000 - (t.physical_address & 0xfff) as usize;
    let mut bytes = vec![0; MAX_INSTRUCTION.min(in_page)];
    match map.ram().read_slice(&mut bytes, GuestAddress(t.physical_address)) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

fn registers(text: &mut String, s: &X86State) {
    const NAMES: [(&str, usize); 8] = [
        ("rax", gpr::RAX),
        ("rbx", gpr::RBX),
        ("rcx", gpr::RCX),
        ("rdx", gpr::RDX),
        ("rsi", gpr::RSI),
        ("rdi", gpr::RDI),
        ("rbp", gpr::RBP),
        ("rsp", gpr::RSP),
    ];
    for (i, (name, n)) in NAMES.into_iter().enumerate() {
        let lead = if i % 4 == 0 { "\n " } else { "" };
        let _ = write!(text, "{lead} {name}={:016x}", s.gpr[n]);
    }
    for i in 8..16 {
        let lead = if i % 4 == 0 { "\n " } else { "" };
        let _ = write!(text, "{lead} {:<3}={:016x}", format!("r{i}"), s.gpr[i]);
    }
    let _ = write!(text, "\n  rip={:016x} rflags={:08x} efer={:x}", s.rip, s.rflags, s.efer);
    let _ = write!(text, "\n  cr0={:x} cr2={:x} cr3={:x} cr4={:x}", s.cr0, s.cr2, s.cr3, s.cr4);
    for (name, n) in
        [("cs", seg::CS), ("ss", seg::SS), ("ds", seg::DS), ("es", seg::ES), ("tr", seg::TR)]
    {
        let g = &s.seg[n];
        let _ = write!(
            text,
            "\n  {name}={:04x} base={:016x} limit={:08x} attr={:05x}",
            g.selector, g.base, g.limit, g.attr
        );
    }
}
