// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest's part of hot-plug: the methods of our DSDT and what Linux does behind them, by hand.

use ecr_vmm::hypervisor::fake::GuestCpu;

use crate::rig::{ECAM, MIB, PM_BASE, read_u16};

const SCI: u32 = 9;
const GPE0_STATUS: u16 = PM_BASE + 0x20;
const GPE0_ENABLE: u16 = PM_BASE + 0x28;
const PCI_EVENT: u8 = 1 << 1;
const UP: u16 = 0xCC0;
const DOWN: u16 = 0xCC4;
const EJECT: u16 = 0xCC8;
const SELECT: u16 = 0xCD0;

/// What the event's method notifies a slot of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// There is a new device.
    Up { bus: u8, slot: u8 },
    /// The device is to be ejected.
    Down { bus: u8, slot: u8 },
}

/// Enable the event.
pub(crate) fn listen(cpu: &GuestCpu) {
    cpu.port_write(GPE0_ENABLE, &[PCI_EVENT]);
}

/// Wait for the event, and do what its method does.
pub(crate) fn changes(cpu: &GuestCpu, buses: u8) -> Vec<Change> {
    cpu.wait_for_line(SCI);
    cpu.port_write(GPE0_STATUS, &[PCI_EVENT]);
    let mut changes = Vec::new();
    for bus in 0..buses {
        cpu.port_write(SELECT, &u32::from(bus).to_le_bytes());
        let slots = |register: u16| {
            let mut bits = [0; 4];
            cpu.port_read(register, &mut bits);
            let bits = u32::from_le_bytes(bits);
            (0..32u8).filter(move |slot| bits >> slot & 1 != 0)
        };
        changes.extend(slots(UP).map(|slot| Change::Up { bus, slot }));
        changes.extend(slots(DOWN).map(|slot| Change::Down { bus, slot }));
    }
    changes
}

/// `_EJ0` of the slots in `slots`.
pub(crate) fn eject(cpu: &GuestCpu, bus: u8, slots: u32) {
    cpu.port_write(SELECT, &u32::from(bus).to_le_bytes());
    cpu.port_write(EJECT, &slots.to_le_bytes());
}

/// The configuration space of device `slot`, function 0, on the bus of this number.
pub(crate) fn behind(bus: u8, slot: u8) -> u64 {
    ECAM + u64::from(bus) * MIB + (u64::from(slot) << 15)
}

/// Give the BARs of the virtio function at `config` addresses in the windows of the bridge at `bridge`.
pub(crate) fn place_bars(cpu: &GuestCpu, bridge: u64, config: u64) {
    let slot = (config >> 15 & 31) as u32;
    let memory = u32::from(read_u16(cpu, bridge + 0x20) & 0xFFF0) << 16;
    let low = u32::from(read_u16(cpu, bridge + 0x24) & 0xFFF0) << 16;
    cpu.write_u32(config + 0x14, memory + slot * 0x1000);
    cpu.write_u32(config + 0x20, low + slot * 0x4000);
    cpu.write_u32(config + 0x24, cpu.read_u32(bridge + 0x28));
}
