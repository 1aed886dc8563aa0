//! Answers to questions of the command line.

use super::{Question, table};
use crate::cli::exit::Exit;

/// Prints the answer.
pub fn answer(q: &Question) -> Exit {
    match q {
        Question::Version => {
            let v = crate::commands::machine::version();
            let q = v.qemu;
            // Programs look for the first words and the number behind them.
            println!("QEMU emulator version {}.{}.{} ({})", q.major, q.minor, q.micro, v.package);
        }
        Question::Help => print!("{}", table::help()),
        Question::Machines => {
            println!("Supported machines are:");
            println!("q35                  PC (Q35 + ICH9) (default)");
            println!("microvm              fewest devices, no PCI, starts at once");
            println!("none                 empty machine");
        }
        Question::Accelerators => {
            println!("Accelerators supported by this program:");
            for (name, built) in [("kvm", cfg!(feature = "kvm")), ("tcg", cfg!(feature = "tcg"))] {
                if built {
                    println!("{name}");
                }
            }
        }
        Question::Other(q) => return crate::answer(q),
    }
    Exit::Done
}
