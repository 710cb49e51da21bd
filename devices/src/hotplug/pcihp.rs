// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! PCI hot-plug registers (QEMU's `docs/specs/acpi_pci_hotplug.rst`): five registers of four bytes, behind
//! one selector for all buses whose slots can be hot-plugged.
//!
//! The board sets a bit and raises a general-purpose event; the guest's ACPI method reads the bits, tells the
//! operating system, and writes a slot's bit to the eject register once the device is no longer used. A guest
//! may also eject what nobody asked it to give up, as a person at its console can. Left out: the
//! ACPI index of a device, which reads as zero.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::{Access, IoDevice};

/// Slots with a new device; reading clears them.
const UP: u64 = 0x00;
/// Slots whose device is to be removed.
const DOWN: u64 = 0x04;
/// Write: eject. Read: features beyond the base set, of which there are none.
const EJECT: u64 = 0x08;
/// Slots whose device can be removed.
const REMOVABLE: u64 = 0x0C;
/// Which bus the registers above speak of.
const SELECT: u64 = 0x10;
/// ACPI index of a device.
const INDEX: u64 = 0x14;

/// Who takes an ejected device off its bus. Called by a vCPU with the registers' lock held.
pub trait EjectSink: Send + Sync {
    /// The guest lets go of the device in `slot` of hot-plug bus `bus`.
    fn eject(&self, bus: usize, slot: u8);
}

/// The registers: [`PciHotplug::PORTS`] ports.
pub struct PciHotplug {
    sink: Arc<dyn EjectSink>,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    selected: u32,
    buses: Vec<SlotBits>,
}

/// A bit for each slot of a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct SlotBits {
    occupied: u32,
    up: u32,
    down: u32,
}

impl fmt::Debug for PciHotplug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciHotplug").field("state", &self.state).finish_non_exhaustive()
    }
}

impl PciHotplug {
    /// Ports that the block takes.
    pub const PORTS: u64 = 0x18;

    /// Registers for this many buses, whose slots are all empty.
    pub fn new(buses: usize, sink: Arc<dyn EjectSink>) -> Self {
        let state = State { selected: 0, buses: vec![SlotBits::default(); buses] };
        Self { sink, state }
    }

    /// There is a new device in `slot` of hot-plug bus `bus`.
    pub fn insert(&mut self, bus: usize, slot: u8) {
        if let Some((bits, slot)) = self.bits(bus, slot) {
            bits.occupied |= slot;
            bits.up |= slot;
        }
    }

    /// Ask the guest to give up the device in `slot`. Asking again changes nothing.
    pub fn request_removal(&mut self, bus: usize, slot: u8) {
        if let Some((bits, slot)) = self.bits(bus, slot) {
            bits.down |= slot & bits.occupied;
        }
    }

    /// The device in `slot` is gone, whatever the guest has been told of it.
    pub fn remove(&mut self, bus: usize, slot: u8) {
        if let Some((bits, slot)) = self.bits(bus, slot) {
            bits.forget(slot);
        }
    }

    /// Back to the state after power-on: the guest finds what is there by itself.
    pub fn reset(&mut self) {
        self.state.selected = 0;
        for bits in &mut self.state.buses {
            (bits.up, bits.down) = (0, 0);
        }
    }

    fn bits(&mut self, bus: usize, slot: u8) -> Option<(&mut SlotBits, u32)> {
        let slot = 1u32.checked_shl(slot.into())?;
        self.state.buses.get_mut(bus).map(|bits| (bits, slot))
    }

    /// The bus that the guest has selected, if there is one.
    fn selected(&mut self) -> Option<(usize, &mut SlotBits)> {
        let bus = usize::try_from(self.state.selected).ok()?;
        self.state.buses.get_mut(bus).map(|bits| (bus, bits))
    }

    fn register(&mut self, offset: u64) -> Option<u32> {
        let selected = self.state.selected;
        let bits = self.selected().map(|(_, bits)| bits);
        Some(match (offset, bits) {
            (SELECT, _) => selected,
            (UP, Some(bits)) => std::mem::take(&mut bits.up),
            (DOWN, Some(bits)) => bits.down,
            (REMOVABLE, Some(bits)) => bits.occupied,
            (UP | DOWN | REMOVABLE | EJECT | INDEX, _) => 0,
            _ => return None,
        })
    }

    /// Each slot in `slots` that has a device is ejected once.
    fn eject(&mut self, slots: u32) {
        let Some((bus, bits)) = self.selected() else { return };
        let slots = slots & bits.occupied;
        bits.forget(slots);
        for slot in (0..32).filter(|slot| slots >> slot & 1 != 0) {
            self.sink.eject(bus, slot);
        }
    }
}

impl SlotBits {
    fn forget(&mut self, slots: u32) {
        self.occupied &= !slots;
        self.up &= !slots;
        self.down &= !slots;
    }
}

impl IoDevice for PciHotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return Access::Unclaimed };
        let Some(value) = self.register(offset) else { return Access::Unclaimed };
        *data = value.to_le_bytes();
        Access::Done
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return Access::Unclaimed };
        let value = u32::from_le_bytes(data);
        match offset {
            SELECT => self.state.selected = value,
            EJECT => self.eject(value),
            UP | DOWN | REMOVABLE | INDEX => {}
            _ => return Access::Unclaimed,
        }
        Access::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Ejected(Mutex<Vec<(usize, u8)>>);

    impl EjectSink for Ejected {
        fn eject(&self, bus: usize, slot: u8) {
            self.0.lock().push((bus, slot));
        }
    }

    fn device(buses: usize) -> (PciHotplug, Arc<Ejected>) {
        let sink = Arc::new(Ejected::default());
        (PciHotplug::new(buses, Arc::clone(&sink) as Arc<dyn EjectSink>), sink)
    }

    fn read(device: &mut PciHotplug, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert_eq!(device.read(offset, &mut data), Access::Done);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut PciHotplug, offset: u64, value: u32) {
        assert_eq!(device.write(offset, &value.to_le_bytes()), Access::Done);
    }

    #[test]
    fn the_guest_learns_of_a_device_once_and_gives_it_up_when_asked() {
        let (mut device, ejected) = device(2);
        device.insert(1, 3);
        assert_eq!(read(&mut device, UP), 0, "another bus is selected");
        write(&mut device, SELECT, 1);
        assert_eq!([UP, UP].map(|at| read(&mut device, at)), [8, 0]);
        assert_eq!(read(&mut device, REMOVABLE), 8);
        device.request_removal(1, 3);
        device.request_removal(1, 3);
        assert_eq!([DOWN, DOWN].map(|at| read(&mut device, at)), [8, 8], "until it is ejected");
        write(&mut device, EJECT, 8);
        write(&mut device, EJECT, 8);
        assert_eq!(*ejected.0.lock(), [(1, 3)], "once");
        assert_eq!([UP, DOWN, EJECT, REMOVABLE].map(|at| read(&mut device, at)), [0; 4]);
    }

    #[test]
    fn a_guest_ejects_what_is_there_and_nothing_else() {
        let (mut device, ejected) = device(1);
        device.insert(0, 1);
        device.insert(0, 30);
        write(&mut device, EJECT, u32::MAX);
        assert_eq!(*ejected.0.lock(), [(0, 1), (0, 30)]);
        device.insert(0, 1);
        write(&mut device, SELECT, 1);
        write(&mut device, EJECT, u32::MAX);
        write(&mut device, SELECT, u32::MAX);
        write(&mut device, EJECT, u32::MAX);
        assert_eq!(ejected.0.lock().len(), 2);
        assert_eq!(read(&mut device, SELECT), u32::MAX);
    }

    #[test]
    fn a_reset_forgets_what_was_told_and_keeps_what_is_there() {
        let (mut device, _) = device(1);
        device.insert(0, 1);
        device.insert(0, 2);
        device.request_removal(0, 2);
        device.remove(0, 2);
        device.request_removal(0, 2);
        device.reset();
        assert_eq!([UP, DOWN, REMOVABLE].map(|at| read(&mut device, at)), [0, 0, 2]);
    }

    #[test]
    fn only_whole_registers_answer() {
        let (mut device, _) = device(1);
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (0, 8), (PciHotplug::PORTS, 4), (u64::MAX, 4)]
        {
            assert_eq!(device.read(offset, &mut vec![0; len]), Access::Unclaimed);
            assert_eq!(device.write(offset, &vec![0; len]), Access::Unclaimed);
        }
    }

    proptest! {
        #[test]
        fn each_device_is_ejected_at_most_once(
            writes in prop::collection::vec((0u64..0x20, prop_oneof![0u32..4, any::<u32>()]), 0..40),
            plugs in prop::collection::btree_set((0usize..2, 1u8..31), 0..20),
        ) {
            let (mut device, ejected) = device(2);
            plugs.iter().for_each(|&(bus, slot)| device.insert(bus, slot));
            for (offset, value) in writes {
                let _ = device.write(offset, &value.to_le_bytes());
                let _ = device.read(offset, &mut [0; 4]);
            }
            let ejected = ejected.0.lock();
            let mut once = ejected.clone();
            once.sort_unstable();
            once.dedup();
            prop_assert_eq!(once.len(), ejected.len());
            prop_assert!(once.iter().all(|it| plugs.contains(it)));
        }
    }
}
