// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The chipset's own PCI functions: the host bridge (Intel 3 Series MCH, 316966, section 5) and the LPC bridge
//! (ICH9, 316972, section 13). A guest recognises the machine by them, and finds in them what firmware has
//! programmed: where ECAM and the power management block are, and that pins lead to the I/O APIC.
//!
//! The registers are fixed: here is no firmware that would move anything. Left out: memory attributes (PAM,
//! SMRAM), the root complex block, SMI.

use crate::bus::Access;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::{Bar, PciFunction};

const INTEL: u16 = 0x8086;
/// QEMU's, since a board without one is unknown to guests.
const SUBSYSTEM_VENDOR: u16 = 0x1AF4;
const SUBSYSTEM: u16 = 0x1100;

/// A bridge: registers and nothing else.
#[derive(Debug)]
pub struct Bridge {
    config: ConfigSpace,
}

impl Bridge {
    /// The host bridge, 00:00.0. ECAM is at `ecam`, for 256 buses.
    pub fn host(ecam: u64) -> Self {
        const MCH: u16 = 0x29C0;
        const CLASS_HOST_BRIDGE: u32 = 0x06_00_00;
        /// PCI Express register range base address: 64 bits; bits 2:1 say how large, 0 is 256 MiB.
        const PCIEXBAR: u16 = 0x60;
        const PCIEXBAR_ENABLE: u64 = 1;
        let mut config = config(MCH, CLASS_HOST_BRIDGE);
        config.define(PCIEXBAR, &(ecam | PCIEXBAR_ENABLE).to_le_bytes());
        Self { config }
    }

    /// The LPC bridge, 00:1f.0. Power management is at port `pm_base`, and its interrupt is IRQ 9.
    pub fn lpc(pm_base: u16) -> Self {
        const ICH9_LPC: u16 = 0x2918;
        const CLASS_ISA_BRIDGE: u32 = 0x06_01_00;
        const PMBASE: u16 = 0x40;
        const PMBASE_IS_IO: u32 = 1;
        const ACPI_CNTL: u16 = 0x44;
        const ACPI_ENABLE: u8 = 1 << 7;
        /// PIRQA to PIRQD and PIRQE to PIRQH.
        const PIRQ_ROUTING: [u16; 2] = [0x60, 0x68];
        /// To the I/O APIC only.
        const NOT_TO_PIC: u8 = 1 << 7;
        let mut config = config(ICH9_LPC, CLASS_ISA_BRIDGE);
        config.define(PMBASE, &(u32::from(pm_base) | PMBASE_IS_IO).to_le_bytes());
        config.define(ACPI_CNTL, &[ACPI_ENABLE]);
        for routing in PIRQ_ROUTING {
            config.define(routing, &[NOT_TO_PIC; 4]);
        }
        Self { config }
    }
}

fn config(device: u16, class: u32) -> ConfigSpace {
    ConfigSpace::new(&Identity {
        vendor: INTEL,
        device,
        revision: 2,
        class,
        subsystem_vendor: SUBSYSTEM_VENDOR,
        subsystem: SUBSYSTEM,
    })
}

impl PciFunction for Bridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn bar_read(&mut self, _index: u8, _offset: u64, _data: &mut [u8]) -> Access {
        Access::Unclaimed
    }

    fn bar_write(&mut self, _index: u8, _offset: u64, _data: &[u8]) -> Access {
        Access::Unclaimed
    }

    fn reset(&mut self) {
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read32(bridge: &mut Bridge, offset: u16) -> u32 {
        let mut data = [0; 4];
        bridge.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_host_bridge_tells_where_ecam_is() {
        let mut bridge = Bridge::host(0xB000_0000);
        assert_eq!(read32(&mut bridge, 0), 0x29C0_8086);
        assert_eq!(read32(&mut bridge, 8), 0x0600_0002);
        bridge.config_write(0x60, &[0; 4]);
        assert_eq!([0x60, 0x64].map(|at| read32(&mut bridge, at)), [0xB000_0001, 0]);
    }

    #[test]
    fn the_lpc_bridge_tells_where_power_management_is() {
        let mut bridge = Bridge::lpc(0x600);
        assert_eq!(read32(&mut bridge, 0), 0x2918_8086);
        assert_eq!(read32(&mut bridge, 8), 0x0601_0002);
        assert_eq!([0x40, 0x44].map(|at| read32(&mut bridge, at)), [0x601, 0x80]);
        assert_eq!([0x60, 0x68].map(|at| read32(&mut bridge, at)), [0x8080_8080; 2]);
    }
}
