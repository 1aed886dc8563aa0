//! Character devices.

use crate::machine::Machine;
use tandem_backends::chardev::CharBackend;

crate::object! {
    /// A character device.
    pub struct ChardevInfo {
        /// Its name.
        label: String,
        /// Where it leads.
        filename: String,
        /// Whether something of the machine is connected to it.
        frontend_open: bool,
    }
}

fn all(vm: &Machine) -> Vec<ChardevInfo> {
    let config = vm.config();
    let mut all = Vec::new();
    for (i, (label, chardev)) in vm.serial_chardevs().enumerate() {
        use crate::config::Serial;
        let filename = match (chardev.pty_name(), config.serial(i).map(|(_, s)| s)) {
            (Some(name), _) => format!("pty:{}", name.display()),
            (None, Some(Serial::Stdio)) => "stdio".into(),
            (None, Some(Serial::File(p) | Serial::Append(p))) => format!("file:{}", p.display()),
            (None, Some(Serial::Unix(p))) => format!("unix:{},server=on", p.display()),
            _ => "null".into(),
        };
        all.push(ChardevInfo { label, filename, frontend_open: true });
    }
    for (label, chardev) in vm.named_chardevs() {
        use crate::config::Serial;
        let to = config.chardevs.iter().find(|c| c.id == *label).map(|c| &c.to);
        let filename = match (chardev.pty_name(), to) {
            (Some(name), _) => format!("pty:{}", name.display()),
            (None, Some(Serial::Stdio)) => "stdio".into(),
            (None, Some(Serial::File(p) | Serial::Append(p))) => format!("file:{}", p.display()),
            (None, Some(Serial::Unix(p))) => format!("unix:{},server=on", p.display()),
            (None, Some(Serial::Listen(at))) => format!("tcp:{at},server=on"),
            (None, Some(Serial::Connect { to, .. })) => to.replace("inet:", "tcp:"),
            (None, Some(Serial::Ring(_))) => "ringbuf".into(),
            _ => "null".into(),
        };
        let frontend_open = chardev.is_open();
        all.push(ChardevInfo { label: label.clone(), filename, frontend_open });
    }
    for (i, m) in config.monitors.iter().enumerate() {
        let label = m.chardev.clone().unwrap_or_else(|| format!("compat_monitor{i}"));
        all.push(ChardevInfo { label, filename: m.at.to_string(), frontend_open: true });
    }
    all
}

crate::commands! {
    /// Lists the character devices.
    fn "query-chardev"(cx) -> Vec<ChardevInfo> { Ok(all(cx.vm)) }
}
