// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest's part of hot-plug: the methods of our DSDT and what Linux does behind them, by hand.

use ecr_vmm::hypervisor::fake::GuestCpu;

use crate::board::{ECAM, hotplug_read, hotplug_write, wait_for_hotplug};
use crate::rig::{MIB, read_u16};

const UP: u16 = 0x00;
const DOWN: u16 = 0x04;
const EJECT: u16 = 0x08;
const SELECT: u16 = 0x10;

/// What the event's method notifies a slot of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// There is a new device.
    Up { bus: u8, slot: u8 },
    /// The device is to be ejected.
    Down { bus: u8, slot: u8 },
}

/// Wait for the event, and do what its method does.
pub(crate) fn changes(cpu: &GuestCpu, buses: u8) -> Vec<Change> {
    wait_for_hotplug(cpu);
    let mut changes = Vec::new();
    for bus in 0..buses {
        hotplug_write(cpu, SELECT, &u32::from(bus).to_le_bytes());
        let slots = |register: u16| {
            let bits = hotplug_read(cpu, register);
            (0..32u8).filter(move |slot| bits >> slot & 1 != 0)
        };
        changes.extend(slots(UP).map(|slot| Change::Up { bus, slot }));
        changes.extend(slots(DOWN).map(|slot| Change::Down { bus, slot }));
    }
    changes
}

/// `_EJ0` of the slots in `slots`.
pub(crate) fn eject(cpu: &GuestCpu, bus: u8, slots: u32) {
    hotplug_write(cpu, SELECT, &u32::from(bus).to_le_bytes());
    hotplug_write(cpu, EJECT, &slots.to_le_bytes());
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
