// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The functions by which software recognises a chipset: of a q35 the MCH host bridge (Intel 316966) and the ICH9
//! LPC bridge (Intel 316972, chapter 13), of others QEMU's generic host bridge. Their registers read as firmware would
//! have left them; what they decode is fixed by the board, so a guest cannot move it.

use crate::bus::Access;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::{Bar, PciFunction};

const VENDOR_INTEL: u16 = 0x8086;
const VENDOR_REDHAT: u16 = 0x1B36;
/// QEMU's subsystem ids, by which drivers tell an emulated chipset.
const SUBSYSTEM_VENDOR: u16 = 0x1AF4;
const SUBSYSTEM: u16 = 0x1100;

const GENERIC_HOST_BRIDGE_DEVICE: u16 = 0x0008;
const MCH_DEVICE: u16 = 0x29C0;
const CLASS_HOST_BRIDGE: u32 = 0x06_0000;
/// MCH: base of ECAM in bits 35:26, its size in 2:1, enable in 0.
const PCIEXBAR: u16 = 0x60;
const PCIEXBAR_ENABLE: u64 = 1;

const LPC_DEVICE: u16 = 0x2918;
const LPC_REVISION: u8 = 2;
const CLASS_ISA_BRIDGE: u32 = 0x06_0100;
/// LPC: base of the power management block, its enable bit, and the routes of legacy interrupts, all off.
const PMBASE: u16 = 0x40;
const PMBASE_IO: u32 = 1;
const ACPI_CNTL: u16 = 0x44;
const ACPI_CNTL_ENABLE: u8 = 1 << 7;
const PIRQ_ROUTES: [u16; 2] = [0x60, 0x68];
const PIRQ_OFF: [u8; 4] = [0x80; 4];

/// A function of the chipset: configuration space and nothing behind it.
#[derive(Debug)]
pub struct Bridge {
    config: ConfigSpace,
}

impl Bridge {
    /// The host bridge of a chipset that no other system knows.
    pub fn generic() -> Self {
        let identity = Identity {
            vendor: VENDOR_REDHAT,
            ..identity(GENERIC_HOST_BRIDGE_DEVICE, 0, CLASS_HOST_BRIDGE)
        };
        Self { config: ConfigSpace::new(&identity) }
    }

    /// The host bridge of a q35, which tells where ECAM is. Its size is 256, 128 or 64 MiB.
    pub fn mch(ecam_base: u64, ecam_size: u64) -> Self {
        let mut config = ConfigSpace::new(&identity(MCH_DEVICE, 0, CLASS_HOST_BRIDGE));
        let length = match ecam_size >> 20 {
            64 => 2 << 1,
            128 => 1 << 1,
            _ => 0,
        };
        config.define(PCIEXBAR, &(ecam_base | length | PCIEXBAR_ENABLE).to_le_bytes());
        Self { config }
    }

    /// The LPC bridge, which tells where the power management block is.
    pub fn lpc(pm_base: u16) -> Self {
        let mut config = ConfigSpace::new(&identity(LPC_DEVICE, LPC_REVISION, CLASS_ISA_BRIDGE));
        config.define(PMBASE, &(u32::from(pm_base) | PMBASE_IO).to_le_bytes());
        config.define(ACPI_CNTL, &[ACPI_CNTL_ENABLE]);
        for register in PIRQ_ROUTES {
            config.define(register, &PIRQ_OFF);
        }
        Self { config }
    }
}

fn identity(device: u16, revision: u8, class: u32) -> Identity {
    Identity {
        vendor: VENDOR_INTEL,
        device,
        revision,
        class,
        subsystem_vendor: SUBSYSTEM_VENDOR,
        subsystem: SUBSYSTEM,
    }
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
    fn software_recognises_the_chipset_and_cannot_move_it() {
        let mut mch = Bridge::mch(0xB000_0000, 256 << 20);
        let mut lpc = Bridge::lpc(0x600);
        assert_eq!((read32(&mut mch, 0), read32(&mut lpc, 0)), (0x29C0_8086, 0x2918_8086));
        assert_eq!(read32(&mut lpc, 8), 0x0601_0002);
        for (bridge, register, value) in [(&mut mch, 0x60, 0xB000_0001), (&mut lpc, 0x40, 0x601)] {
            bridge.config_write(register, &0u32.to_le_bytes());
            assert_eq!(read32(bridge, register), value);
        }
    }
}
