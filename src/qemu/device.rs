//! Options about devices, objects and networks.

use super::Builder;
use super::keyval::Pairs;
use crate::cli::run;
use crate::config::firmware::Item;
use crate::config::{Device, Fault, Netdev, Object};
use serde_json::Value;

type Done = Result<(), Fault>;

impl Builder {
    pub(super) fn device(&mut self, value: &str) -> Done {
        if value == "help" || value == "?" {
            return self.ask(super::Question::Other(run::Question::Devices));
        }
        if let Some((name, "help")) = value.split_once(',') {
            let q = run::Question::DeviceProperties(name.into());
            return self.ask(super::Question::Other(q));
        }
        let mut p = Pairs::parse("device", value, Some("driver"))?;
        let driver = p.need("driver")?;
        if driver == "isa-serial" {
            let chardev = p.need("chardev")?;
            let index = p.number("index")?;
            let _ = p.take("id");
            self.leftovers(p, &["chardev", "index", "id"]);
            self.isa_serials.push((index, chardev));
            return Ok(());
        }
        let props = p.rest();
        self.config.devices.push(Device { driver, props });
        Ok(())
    }

    pub(super) fn object(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("object", value, Some("qom-type"))?;
        let qom_type = p.need("qom-type")?;
        let id = p.need("id")?;
        if let "memory-backend-ram" | "memory-backend-memfd" = qom_type.as_str() {
            let size = p.need("size")?;
            let bytes = match size.parse::<u64>() {
                Ok(n) => n,
                Err(_) => crate::config::Size::parse(&size)?.bytes(),
            };
            self.memory_backends.insert(id, bytes);
            for (key, good) in [("share", "off"), ("prealloc", "off"), ("merge", "on")] {
                if let Some(v) = p.take(key).filter(|v| v != good) {
                    let what = format!("-object {qom_type},{key}={v} is not supported");
                    self.faults.push(Fault::new(what, format!("use {key}={good}")));
                }
            }
            let _ = (p.take("dump"), p.take("x-use-canonical-path-for-ramblock-id"));
            self.leftovers(p, &["size"]);
            return Ok(());
        }
        self.config.objects.push(Object { qom_type, id, props: p.rest() });
        Ok(())
    }

    pub(super) fn fw_cfg(&mut self, value: &str) -> Done {
        let mut p = Pairs::parse("fw_cfg", value, Some("name"))?;
        let name = p.need("name")?;
        let (string, file) = (p.take("string"), p.take("file").map(Into::into));
        self.leftovers(p, &["name", "string", "file"]);
        self.config.firmware.items.push(Item { name, string, file });
        Ok(())
    }

    pub(super) fn netdev(&mut self, value: &str) -> Done {
        let flat = network_words("netdev", value)?;
        let made = Netdev::parse("-netdev", &flat, &mut self.faults);
        self.config.networks.extend(made);
        Ok(())
    }

    /// `-nic` and the older `-net`: a network together with its card.
    pub(super) fn nic(&mut self, value: &str) -> Done {
        let kind = value.split(',').next().unwrap_or_default();
        if kind == "none" {
            self.config.networks.clear();
            return Ok(());
        }
        // The card of the older form stands by itself; each network gets one in any case.
        if kind == "nic" {
            let mut p = Pairs::parse("net nic", value, Some("type"))?;
            let model = p.take("model").unwrap_or_else(|| "virtio".into());
            if !matches!(model.as_str(), "virtio" | "virtio-net-pci") {
                return Err(Fault::new(
                    format!("there is no network card '{model}'"),
                    "use model=virtio-net-pci",
                ));
            }
            let _ = p.take("type");
            self.leftovers(p, &["model"]);
            return Ok(());
        }
        let made = Netdev::parse("--net", value, &mut self.faults);
        self.config.networks.extend(made);
        Ok(())
    }
}

/// `KIND,key=value…`, from that or from JSON.
pub fn network_words(option: &str, value: &str) -> Result<String, Fault> {
    if !value.starts_with('{') {
        return Ok(value.to_string());
    }
    let mut p = Pairs::parse(option, value, None)?;
    let mut words = p.need("type")?;
    for key in ["hostfwd", "guestfwd"] {
        let Some(Value::Array(all)) = p.take_value(key) else { continue };
        for text in all.iter().filter_map(|v| v["str"].as_str()) {
            words += &format!(",{key}={}", text.replace(',', ",,"));
        }
    }
    for (k, v) in p.rest() {
        words += &format!(",{k}={}", v.replace(',', ",,"));
    }
    Ok(words)
}
