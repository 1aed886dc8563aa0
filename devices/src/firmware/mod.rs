//! What firmware finds: its own code in ROM or flash below 4 GiB, the shadow of the BIOS area below
//! 1 MiB, and the firmware configuration device that tells it about the machine.
//!
//! ```text
//!   ffff_ffff ─┬─ ROM or flash: reset vector            (flash::Flash: a second one holds variables)
//!             …│
//!    f_ffff ───┼─ copy of its end, or RAM: shadow::Shadow, switched by the PAM registers of the MCH
//!    c_0000 ───┴─ nothing, or RAM
//!   ports 510h ── fw_cfg::FwCfg ── E820, processors, boot order, SMBIOS, ACPI tables with the
//!                                  loader::Script that places them
//! ```
//!
//! What always holds: nothing here decides anything at reset but what hardware would; everything
//! else is firmware's doing, on any accelerator.

pub mod bootorder;
pub mod flash;
pub mod fw_cfg;
pub mod loader;
pub mod shadow;
pub mod smbios;
