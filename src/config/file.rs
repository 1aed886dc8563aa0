//! Machines in TOML files.

use super::{Fault, VmConfig};
use std::path::Path;
use tandem_accel::suggest::closest;

/// Reads a machine from a file.
pub fn read(path: &Path) -> Result<VmConfig, Vec<Fault>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| {
        vec![Fault::new(format!("configuration '{shown}' cannot be read: {e}"), "name a file")]
    })?;
    toml::from_str(&text).map_err(|e| vec![fault(&shown.to_string(), &text, &e)])
}

/// What is wrong, with the line and, for a key that there is not, the one that was probably meant.
fn fault(path: &str, text: &str, e: &toml::de::Error) -> Fault {
    let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    let at = line.map_or(String::new(), |l| format!(", line {l}"));
    let message = e.message();
    let unknown = message.strip_prefix("unknown field `").and_then(|m| m.split_once('`'));
    let remedy = unknown.and_then(|(name, rest)| {
        let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        closest(name, known).map(|c| format!("did you mean '{c}'?"))
    });
    let what = format!("configuration '{path}'{at}: {message}");
    Fault::new(what, remedy.unwrap_or_else(|| "compare with tandem run … --print-config".into()))
}

/// Writes a machine.
pub fn write(config: &VmConfig) -> String {
    // Every value of the type has a form in TOML; a test writes one of each.
    toml::to_string(config).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_faults_with_a_suggestion() {
        let read = |text: &str| {
            let e = toml::from_str::<VmConfig>(text).unwrap_err();
            fault("vm.toml", text, &e).to_string()
        };
        let said = read("machine = \"q35\"\nmemry = \"1G\"\n");
        assert!(said.contains("line 2") && said.contains("did you mean 'memory'?"), "{said}");
        let said = read("memory = 12Q\n");
        assert!(said.contains("vm.toml"), "{said}");
    }

    #[test]
    fn what_is_written_reads_back() {
        let words = "-M q35 -m 256 -S -name x -device virtio-rng-pci,id=r -serial null \
                     -qmp unix:/tmp/x,server=on,wait=off -drive file=/tmp/d,id=a -nic user,id=n \
                     -chardev null,id=c -device isa-serial,chardev=c,index=1";
        let words: Vec<String> = words.split_whitespace().map(str::to_string).collect();
        let Ok(crate::qemu::Parsed::Machine(c, _)) = crate::qemu::parse(&words) else {
            panic!("it does not parse")
        };
        let text = write(&c);
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), *c, "{text}");
    }
}
