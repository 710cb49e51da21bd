// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! pvpanic as a PCI function, for machines without ports of their own (QEMU `docs/specs/pvpanic.rst`, PCI interface).
//! BAR 0 holds the register of [`Pvpanic`]; nothing interrupts.

use std::sync::Arc;

use super::{GuestRequestSink, Pvpanic};
use crate::bus::{Access, IoDevice};
use crate::pci::config::{BarKind, ConfigSpace, Identity};
use crate::pci::{Bar, PciFunction};

/// QEMU's `pvpanic-pci`.
const IDENTITY: Identity = Identity {
    vendor: 0x1B36,
    device: 0x0011,
    revision: 1,
    // A system peripheral of no other kind.
    class: 0x08_80_00,
    subsystem_vendor: 0x1AF4,
    subsystem: 0x1100,
};
const BAR: u8 = 0;
/// The register is one byte. A page for it keeps others out of what a guest maps (PCI 3.0, section 6.2.5.1).
const BAR_SIZE: u64 = 4 << 10;
const REGISTER: u64 = 0;

/// The function.
#[derive(Debug)]
pub struct PvpanicPci {
    // Wiring.
    register: Pvpanic,
    // State.
    config: ConfigSpace,
}

impl PvpanicPci {
    /// A function that tells `requests`.
    pub fn new(requests: Arc<dyn GuestRequestSink>) -> Self {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_bar(BAR, BarKind::Memory32, BAR_SIZE);
        Self { register: Pvpanic::new(requests), config }
    }
}

impl PciFunction for PvpanicPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bars(&self) -> Vec<Bar> {
        self.config.bars()
    }

    fn bar_read(&mut self, _index: u8, offset: u64, data: &mut [u8]) -> Access {
        match (offset, data) {
            (REGISTER, data @ [_]) => self.register.read(offset, data),
            _ => Access::Unclaimed,
        }
    }

    fn bar_write(&mut self, _index: u8, offset: u64, data: &[u8]) -> Access {
        match (offset, data) {
            (REGISTER, [_]) => self.register.write(offset, data),
            _ => Access::Unclaimed,
        }
    }

    fn reset(&mut self) {
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::bus::Bus;
    use crate::chipset::GuestRequest;
    use crate::chipset::testing::Requests;
    use crate::pci::assign::{Window, Windows, assign};
    use crate::pci::config::{command, offset};
    use crate::pci::host::{DevFn, PciHost};

    const AT: DevFn = DevFn::new(1, 0);
    const BASE: u64 = 0x1000_0000;

    /// A machine whose firmware has placed BAR 0 at [`BASE`], and the memory that it decodes in.
    fn machine() -> (PciHost, Arc<Bus>, Arc<Requests>) {
        let (memory, requests) = (Arc::new(Bus::new()), Requests::new());
        let host = PciHost::new(Arc::clone(&memory), Arc::default());
        let function = PvpanicPci::new(Arc::clone(&requests) as _);
        host.add(AT, Arc::new(Mutex::new(function))).unwrap();
        place(&host);
        (host, memory, requests)
    }

    fn place(host: &PciHost) {
        let none = Window { base: 0, size: 0 };
        let memory32 = Window { base: BASE, size: BAR_SIZE };
        assign(host, &Windows { io: none, memory32, memory64: none }, [0; 4]).unwrap();
    }

    /// What a driver's probe does to the command register.
    fn enable(host: &PciHost) {
        let done = host.config_write(0, AT, offset::COMMAND, &command::MEMORY.to_le_bytes());
        assert_eq!(done, Access::Done);
    }

    #[test]
    fn a_driver_finds_its_register_and_reports_a_panic() {
        let (host, memory, requests) = machine();
        let mut ids = [0; 4];
        assert_eq!(host.config_read(0, AT, offset::VENDOR_ID, &mut ids), Access::Done);
        // The identity of drivers/misc/pvpanic/pvpanic-pci.c.
        assert_eq!(u32::from_le_bytes(ids), 0x0011_1B36);
        enable(&host);
        let mut offered = [0];
        assert_eq!(memory.read(BASE, &mut offered), Access::Done);
        assert_eq!(offered, [3]);
        for (event, request) in [(1, GuestRequest::Panicked), (2, GuestRequest::CrashLoaded)] {
            assert_eq!(memory.write(BASE, &[event]), Access::Done);
            assert_eq!(requests.take(), [request]);
        }
    }

    #[test]
    fn only_the_register_itself_answers() {
        let (host, memory, requests) = machine();
        assert_eq!(memory.write(BASE, &[1]), Access::Unclaimed, "not enabled");
        enable(&host);
        let accesses = [(0, 2), (0, 4), (0, 8), (1, 1), (2, 2), (BAR_SIZE - 1, 1), (BAR_SIZE, 1)];
        for (at, len) in accesses {
            let mut data = vec![0; len];
            assert_eq!(memory.read(BASE + at, &mut data), Access::Unclaimed, "{at:#x}, {len}");
            assert!(data.iter().all(|&byte| byte == 0xFF));
            assert_eq!(memory.write(BASE + at, &vec![1; len]), Access::Unclaimed);
        }
        assert_eq!(requests.take(), []);
    }

    #[test]
    fn after_a_reset_it_answers_nowhere_until_it_is_placed_again() {
        let (host, memory, requests) = machine();
        enable(&host);
        host.reset();
        enable(&host);
        assert_eq!(memory.write(BASE, &[1]), Access::Unclaimed);
        place(&host);
        enable(&host);
        assert_eq!(memory.write(BASE, &[1]), Access::Done);
        assert_eq!(requests.take(), [GuestRequest::Panicked]);
    }
}
