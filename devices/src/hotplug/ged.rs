// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Event selector of a generic event device (ACPI 6.5, section 5.6.9; bits as in QEMU's
//! `docs/specs/acpi_hw_reduced_hotplug.rst`): one register of four bytes. Reading it takes all events.

use serde::{Deserialize, Serialize};

use crate::bus::{Access, IoDevice};
use crate::irq::IrqLine;

/// What the guest is to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum GedEvent {
    /// The power button was pressed.
    PowerButton = 1 << 1,
    /// PCI devices have come, or are to go.
    Pci = 1 << 4,
}

/// The register.
#[derive(Debug)]
pub struct Ged {
    // Wiring.
    irq: IrqLine,
    // State.
    state: State,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    events: u32,
}

impl Ged {
    /// Bytes of the register.
    pub const SIZE: u64 = 4;

    /// A device whose interrupt, an edge, is `irq`.
    pub fn new(irq: IrqLine) -> Self {
        Self { irq, state: State::default() }
    }

    /// Tell the guest of `event`.
    pub fn raise(&mut self, event: GedEvent) {
        self.state.events |= event as u32;
        self.irq.pulse();
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.state = State::default();
    }
}

impl IoDevice for Ged {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) else {
            return Access::Unclaimed;
        };
        *data = std::mem::take(&mut self.state.events).to_le_bytes();
        Access::Done
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Access::Unclaimed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::irq::IrqSink;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl IrqSink for Edges {
        fn set_level(&self, high: bool) {
            self.0.fetch_add(high.into(), Ordering::Relaxed);
        }
    }

    #[test]
    fn each_event_is_an_edge_and_reading_takes_all() {
        let edges = Arc::new(Edges::default());
        let mut ged = Ged::new(IrqLine::new(Arc::clone(&edges) as _));
        ged.raise(GedEvent::PowerButton);
        ged.raise(GedEvent::Pci);
        assert_eq!(edges.0.load(Ordering::Relaxed), 2);
        let mut data = [0; 4];
        assert_eq!(ged.read(0, &mut data[..2]), Access::Unclaimed);
        assert_eq!(ged.read(0, &mut data), Access::Done);
        assert_eq!(data, [0x12, 0, 0, 0]);
        assert_eq!(ged.read(0, &mut data), Access::Done);
        assert_eq!(data, [0; 4]);
        ged.raise(GedEvent::Pci);
        ged.reset();
        assert_eq!(ged.read(0, &mut data), Access::Done);
        assert_eq!(data, [0; 4]);
        assert_eq!(ged.write(0, &data), Access::Unclaimed);
    }
}
