//! The inputs of the machine's interrupt chips, one per GSI, that wires are joined to.

use std::sync::Arc;
use tandem_accel::irq::{IrqInput, IrqLine, IrqSink};

/// Number of GSIs: the inputs of one IOAPIC.
pub const GSI_COUNT: u32 = 24;

/// One shared input per GSI 0–23. Clones share the inputs.
#[derive(Clone)]
pub struct IrqInputs(Arc<[Arc<IrqInput>]>);

impl IrqInputs {
    /// Inputs of `sink`. Make one per machine, so that wires to the same GSI are ORed.
    pub fn new(sink: Arc<dyn IrqSink>) -> IrqInputs {
        IrqInputs((0..GSI_COUNT).map(|gsi| IrqInput::new(sink.clone(), gsi)).collect())
    }
    /// A new wire to `gsi`; one that leads nowhere if there is no such input.
    pub fn line(&self, gsi: u32) -> IrqLine {
        match self.0.get(gsi as usize) {
            Some(input) => input.line(),
            None => IrqLine::unconnected(),
        }
    }
}
