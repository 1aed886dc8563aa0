//! Reading a `--cpu` argument.

use super::{MODELS, Model, ModelSpec};
use crate::Error;
use crate::x86::feature;

impl ModelSpec {
    /// Parses `MODEL[,+feature][,-feature][,feature=on|off][,property=value]`. Properties, as QEMU
    /// names them: `vendor`, `family`, `model`, `stepping`, `model-id` (brand string), `phys-bits`,
    /// `kvm=on|off` (whether the guest sees the hypervisor's leaves).
    ///
    /// # Errors
    /// One per fault, each naming the faulty part and the remedy.
    pub fn parse(arg: &str) -> Result<ModelSpec, Vec<Error>> {
        let mut parts = arg.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let mut errors = Vec::new();
        let model = MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name));
        if model.is_none() {
            errors.push(
                Error::new(format!("unknown CPU model {name:?}"))
                    .remedy(format!("use one of {}", names(MODELS))),
            );
        }
        let mut spec = ModelSpec {
            model: model.unwrap_or(&MODELS[0]),
            features: Vec::new(),
            vendor: None,
            family: None,
            model_nr: None,
            stepping: None,
            brand: None,
            phys_bits: None,
            paravirt: true,
        };
        for part in parts.filter(|p| !p.is_empty()) {
            if let Err(e) = spec.apply(part) {
                errors.push(e);
            }
        }
        if errors.is_empty() { Ok(spec) } else { Err(errors) }
    }

    fn apply(&mut self, part: &str) -> Result<(), Error> {
        if let Some(name) = part.strip_prefix('+') {
            return self.feature(name, true);
        }
        if let Some(name) = part.strip_prefix('-') {
            return self.feature(name, false);
        }
        match part.split_once('=') {
            Some((key, value)) => self.property(key, value),
            None => self.feature(part, true),
        }
    }

    fn feature(&mut self, name: &str, on: bool) -> Result<(), Error> {
        let f = feature::find(name).ok_or_else(|| {
            Error::new(format!("unknown CPU feature {name:?}"))
                .remedy("features are named as in QEMU or /proc/cpuinfo")
        })?;
        self.features.push((f, on));
        Ok(())
    }

    fn property(&mut self, key: &str, value: &str) -> Result<(), Error> {
        match key {
            "vendor" => {
                let v: [u8; 12] = value.as_bytes().try_into().map_err(|_| {
                    Error::new(format!("CPU vendor {value:?} is not 12 characters long"))
                        .remedy("use AuthenticAMD or GenuineIntel")
                })?;
                self.vendor = Some(v);
            }
            "family" => self.family = Some(number(key, value, 0, 0xf + 0xff)?),
            "model" => self.model_nr = Some(number(key, value, 0, 0xff)?),
            "stepping" => self.stepping = Some(number(key, value, 0, 0xf)?),
            "model-id" if value.len() > 48 => {
                return Err(Error::new(format!("CPU model-id {value:?} is too long"))
                    .remedy("give at most 48 characters"));
            }
            "model-id" => self.brand = Some(value.to_string()),
            "phys-bits" => self.phys_bits = Some(number(key, value, 32, 52)? as u8),
            "kvm" => self.paravirt = switch(key, value)?,
            _ => {
                let on = switch(key, value)?;
                return self.feature(key, on);
            }
        }
        Ok(())
    }
}

fn names(models: &[Model]) -> String {
    let v: Vec<_> = models.iter().map(|m| m.name).collect();
    v.join(", ")
}

fn switch(key: &str, value: &str) -> Result<bool, Error> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::new(format!("{key}={value} in the CPU model is neither on nor off"))
            .remedy(format!("use {key}=on or {key}=off"))),
    }
}

fn number(key: &str, value: &str, min: u32, max: u32) -> Result<u32, Error> {
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => value.parse(),
    };
    parsed.ok().filter(|n| (min..=max).contains(n)).ok_or_else(|| {
        Error::new(format!("{key}={value} in the CPU model is no number in range"))
            .remedy(format!("give {min} to {max}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_argument() {
        let s =
            ModelSpec::parse("x86-64-v3,+aes,-avx2,bmi1=off,avx2=on,phys-bits=36,kvm=off").unwrap();
        assert_eq!(s.name(), "x86-64-v3");
        let said = |n| s.explicit(feature::find(n).unwrap());
        assert_eq!(said("aes"), Some(true));
        assert_eq!(said("avx2"), Some(true));
        assert_eq!(said("bmi1"), Some(false));
        assert_eq!(said("fma"), None);
        assert_eq!(s.phys_bits, Some(36));
        assert!(!s.paravirt);
    }

    #[test]
    fn every_fault_is_reported() {
        let e = ModelSpec::parse("athlon9,+frob,avx=maybe,phys-bits=99,vendor=AMD").unwrap_err();
        let text: Vec<_> = e.iter().map(|e| e.to_string()).collect();
        assert_eq!(text.len(), 5, "{text:?}");
        assert!(text[0].contains("athlon9") && text[0].contains("x86-64-v3"), "{}", text[0]);
        assert!(text[1].contains("frob"));
    }
}
