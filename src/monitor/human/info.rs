//! `info …`: what the machine is and does, for people.

use super::{Output, qmp};
use crate::machine::Machine;
use serde_json::{Value, json};
use std::fmt::Write;
use tandem_accel::x86::{X86State, seg};

fn text(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

pub(super) fn status(vm: &mut Machine) -> Output {
    let s = crate::commands::run_state::status(vm);
    let why = if s.running { String::new() } else { format!(" ({})", s.status.word()) };
    Ok(format!("VM status: {}{why}", if s.running { "running" } else { "paused" }))
}

pub(super) fn version() -> Output {
    let v = crate::commands::machine::version();
    Ok(format!("{}.{}.{} ({})", v.qemu.major, v.qemu.minor, v.qemu.micro, v.package))
}

pub(super) fn name(vm: &mut Machine) -> Output {
    Ok(vm.config().name.clone().unwrap_or_default())
}

pub(super) fn uuid(vm: &mut Machine) -> Output {
    Ok(text(&qmp(vm, "query-uuid", Value::Null)?["UUID"]))
}

pub(super) fn kvm(vm: &mut Machine) -> Output {
    let on = vm.accel().name() == "kvm";
    Ok(format!("kvm support: {}", if on { "enabled" } else { "disabled" }))
}

pub(super) fn cpus(vm: &mut Machine) -> Output {
    let mut s = String::new();
    for (i, (vcpu, thread)) in vm.vcpus().enumerate() {
        let mark = if i == 0 { '*' } else { ' ' };
        let _ = writeln!(s, "{mark} CPU #{i}: thread_id={thread} ({:?})", vcpu.run_state());
    }
    Ok(s)
}

pub(super) fn registers(vm: &mut Machine, words: &str) -> Output {
    let count = vm.vcpus().count();
    let range = match words {
        "-a" => 0..count,
        "" => 0..count.min(1),
        n => {
            let n: usize = n.parse().map_err(|_| format!("'{n}' is no number of a processor"))?;
            if n >= count {
                return Err(format!("there is no processor {n}; there are {count}"));
            }
            n..n + 1
        }
    };
    let mut s = String::new();
    for (i, (vcpu, _)) in vm.vcpus().enumerate().filter(|(i, _)| range.contains(i)) {
        let state = vcpu.state().map_err(|e| e.to_string())?;
        let _ = write!(s, "\nCPU#{i}\n{}", show(&state));
    }
    Ok(s)
}

fn show(r: &X86State) -> String {
    let mut s = String::new();
    let names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"];
    for (i, v) in r.gpr.iter().enumerate() {
        let name = names.get(i).map_or_else(|| format!("R{i:<2}"), |n| n.to_string());
        let end = if i % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(s, "{name}={v:016x}{end}");
    }
    let _ =
        writeln!(s, "RIP={:016x} RFL={:08x} CPL={}", r.rip, r.rflags, r.seg[seg::CS].selector & 3);
    for (i, name) in ["ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"].iter().enumerate() {
        let g = &r.seg[i];
        let _ = writeln!(
            s,
            "{name:<3}={:04x} {:016x} {:08x} {:08x}",
            g.selector, g.base, g.limit, g.attr
        );
    }
    let _ = writeln!(s, "GDT= {:016x} {:08x}", r.gdtr.base, r.gdtr.limit);
    let _ = writeln!(s, "IDT= {:016x} {:08x}", r.idtr.base, r.idtr.limit);
    let _ =
        writeln!(s, "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", r.cr0, r.cr2, r.cr3, r.cr4);
    for (i, d) in r.dr.iter().enumerate() {
        let _ = write!(s, "DR{i}={d:016x} ");
    }
    let _ = writeln!(s, "\nDR6={:016x} DR7={:016x}", r.dr6, r.dr7);
    let _ = writeln!(s, "EFER={:016x} XCR0={:x}", r.efer, r.xcr0);
    s
}

pub(super) fn mtree(vm: &mut Machine) -> Output {
    let mut s = String::from("memory\n");
    for r in vm.memory().regions() {
        let _ =
            writeln!(s, "  {:016x}-{:016x} {} ({:?})", r.gpa, r.gpa + r.len() - 1, r.name, r.kind);
    }
    if let Some(bus) = vm.io_bus() {
        for (space, title) in [(&bus.mmio, "memory-mapped I/O"), (&bus.pio, "ports")] {
            let _ = writeln!(s, "{title}");
            for (start, len, name) in space.ranges() {
                let _ = writeln!(s, "  {start:016x}-{:016x} {name}", start + (len - 1));
            }
        }
    }
    Ok(s)
}

pub(super) fn qtree(vm: &mut Machine) -> Output {
    let mut s = String::new();
    for d in &vm.config().devices {
        let _ = writeln!(s, "dev: {}", d.driver);
        for (k, v) in &d.props {
            let _ = writeln!(s, "  {k} = {v:?}");
        }
    }
    Ok(s)
}

pub(super) fn pci(vm: &mut Machine) -> Output {
    let mut s = String::new();
    let Some(root) = vm.pci() else { return Ok("no PCI".into()) };
    for (at, d) in root.devices() {
        list_function(&mut s, 0, &at.to_string(), &*d);
        if let Some((number, _)) = d.function().secondary_range() {
            for (behind, inner) in d.secondary().map(|b| b.devices()).unwrap_or_default() {
                list_function(&mut s, number, &behind.to_string(), &*inner);
            }
        }
    }
    Ok(s)
}

fn list_function(s: &mut String, bus: u8, at: &str, d: &dyn tandem_devices::pci::PciDevice) {
    let f = d.function();
    let id = f.u32(0);
    let class = f.u32(8) >> 16;
    let _ = writeln!(
        s,
        "{bus:02x}:{at} {}: class {class:04x}, {:04x}:{:04x}",
        f.name(),
        id & 0xffff,
        id >> 16
    );
    for (reg, kind, len) in f.bars() {
        let index = ((reg - 0x10) / 4) as u8;
        let place = f.bar_address(index).map_or("not placed".into(), |a| format!("{a:#x}"));
        let _ = writeln!(s, "    BAR{index}: {kind:?} at {place}, {len:#x} bytes");
    }
}

pub(super) fn block(vm: &mut Machine) -> Output {
    let mut s = String::new();
    for b in qmp(vm, "query-block", Value::Null)?.as_array().into_iter().flatten() {
        let i = &b["inserted"];
        let tray = match (b["tray_open"].as_bool(), b["locked"] == true) {
            (Some(true), _) => "    the tray is open\n",
            (Some(false), true) => "    the guest keeps the tray closed\n",
            _ => "",
        };
        if i.is_null() {
            let _ = write!(s, "{}: no medium\n{tray}", text(&b["device"]));
            continue;
        }
        let ro = if i["ro"] == true { ", read-only" } else { "" };
        let _ = writeln!(
            s,
            "{} ({}): {} ({}{ro})",
            text(&i["node-name"]),
            text(b.get("qdev").unwrap_or(&Value::Null)),
            text(&i["file"]),
            text(&i["drv"])
        );
        let _ = write!(s, "    {} bytes\n{tray}", i["image"]["virtual-size"]);
    }
    Ok(s)
}

pub(super) fn blockstats(vm: &mut Machine) -> Output {
    let mut s = String::new();
    for b in qmp(vm, "query-blockstats", Value::Null)?.as_array().into_iter().flatten() {
        let _ = write!(s, "{}:", text(&b["node-name"]));
        for (k, v) in b["stats"].as_object().into_iter().flatten() {
            let _ = write!(s, " {k}={v}");
        }
        s.push('\n');
    }
    Ok(s)
}

pub(super) fn network(vm: &mut Machine) -> Output {
    let c = vm.config();
    let mut s = String::new();
    for (i, n) in c.networks.iter().enumerate() {
        let name = n.name(i);
        let kind = serde_json::to_value(&n.kind).unwrap_or_default();
        let _ = writeln!(s, "{name}: type={}", text(&kind["type"]));
        for d in c.devices.iter().filter(|d| d.props.contains(&("netdev".into(), name.clone()))) {
            let _ = writeln!(s, "  {}", d.driver);
        }
    }
    Ok(s)
}

pub(super) fn chardev(vm: &mut Machine) -> Output {
    let all = qmp(vm, "query-chardev", Value::Null)?;
    let line = |c: &Value| format!("{}: filename={}\n", text(&c["label"]), text(&c["filename"]));
    Ok(all.as_array().into_iter().flatten().map(line).collect())
}

pub(super) fn memory(vm: &mut Machine) -> Output {
    let v = qmp(vm, "query-memory-size-summary", json!({}))?;
    Ok(format!("base memory: {}\nplugged memory: {}", v["base-memory"], v["plugged-memory"]))
}
