// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The configuration space of one function (PCI Local Bus Specification 3.0, chapter 6).
//!
//! A register is its value and the bits of it that a guest can write. Base address registers need nothing
//! more: the bits below their size are not writable, so a guest that writes ones reads the size back.
//!
//! Type 0 headers only. Extended configuration space (offset 0x100 and up) is empty: it reads as zero.

use serde::{Deserialize, Serialize};

use super::cap::{Capability, HEADER_LEN};
use super::{Bar, BarSpace};

/// Offsets of the type 0 header, section 6.1.
pub mod offset {
    #![allow(missing_docs)] // The names are the specification's.
    pub const VENDOR_ID: u16 = 0x00;
    pub const DEVICE_ID: u16 = 0x02;
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const REVISION_ID: u16 = 0x08;
    pub const CLASS_CODE: u16 = 0x09;
    pub const HEADER_TYPE: u16 = 0x0E;
    pub const BAR0: u16 = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2C;
    pub const SUBSYSTEM_ID: u16 = 0x2E;
    pub const CAPABILITIES: u16 = 0x34;
    pub const INTERRUPT_LINE: u16 = 0x3C;
    pub const INTERRUPT_PIN: u16 = 0x3D;
}

/// Bits of the command register, section 6.2.2.
pub mod command {
    /// Respond to I/O space accesses.
    pub const IO: u16 = 1;
    /// Respond to memory space accesses.
    pub const MEMORY: u16 = 1 << 1;
    /// May act as bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Does not drive its interrupt pin.
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
    /// What a guest can change. Parity and system errors do not happen here.
    pub(super) const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | INTERRUPT_DISABLE;
}

/// Bits of the status register, section 6.2.3.
pub mod status {
    /// The function wants to interrupt through its pin.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There is a capability list.
    pub const CAPABILITIES: u16 = 1 << 4;
}

/// Low bits of a base address register, section 6.2.5.1.
pub mod bar {
    /// Decodes I/O space.
    pub const IO: u32 = 1;
    /// Memory, 64 bits wide.
    pub const WIDE: u32 = 0b100;
    /// Memory whose reads have no side effects.
    pub const PREFETCHABLE: u32 = 0b1000;
    /// What is not address, of an I/O register.
    pub const IO_FLAGS: u32 = 0b11;
    /// What is not address, of a memory register.
    pub const MEMORY_FLAGS: u32 = 0b1111;
}

/// Base address registers of a type 0 header.
pub const BARS: u8 = 6;
/// Bytes of configuration space before the extended part.
const SIZE: usize = 256;
/// Where device specific registers and capabilities start.
const FIRST_FREE: usize = 0x40;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// What a base address register decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Prefetchable memory anywhere. Takes two registers.
    Memory64,
}

/// Configuration space.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    // Configuration.
    initial: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
    bars: [Option<(BarKind, u64)>; BARS as usize],
    next_capability: usize,
    last_pointer: usize,
    // State.
    state: ConfigState,
}

/// What a guest has written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    values: Vec<u8>,
}

impl ConfigSpace {
    /// Configuration space with nothing but a header.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            initial: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            bars: [None; BARS as usize],
            next_capability: FIRST_FREE,
            last_pointer: offset::CAPABILITIES.into(),
            state: ConfigState { values: vec![0; SIZE] },
        };
        let [class0, class1, class2, _] = identity.class.to_le_bytes();
        space.define(offset::VENDOR_ID, &identity.vendor.to_le_bytes());
        space.define(offset::DEVICE_ID, &identity.device.to_le_bytes());
        space.define(offset::REVISION_ID, &[identity.revision, class0, class1, class2]);
        space.define(offset::SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        space.define(offset::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        space.allow(offset::COMMAND, &command::WRITABLE.to_le_bytes());
        space.allow(offset::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Give registers their value after power-on.
    ///
    /// # Panics
    /// Outside of configuration space: a mistake in the device model. So for all that describe a function.
    pub fn define(&mut self, offset: u16, value: &[u8]) {
        let start = usize::from(offset);
        self.initial[start..start + value.len()].copy_from_slice(value);
        self.set(offset, value);
    }

    /// Let the guest write the bits of `mask`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let start = usize::from(offset);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }

    /// Interrupt through pin INTA (1) to INTD (4).
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.define(offset::INTERRUPT_PIN, &[pin]);
    }

    /// Add base address register `index`. `size` is a power of two, at least 16.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) {
        assert!(size.is_power_of_two() && size >= 16, "size {size:#x} of BAR {index}");
        let at = offset::BAR0 + u16::from(index) * 4;
        let mask = !(size - 1);
        let (flags, mask): (u32, &[u8]) = match kind {
            BarKind::Io => (bar::IO, &mask.to_le_bytes()[..4]),
            BarKind::Memory32 => (0, &mask.to_le_bytes()[..4]),
            BarKind::Memory64 => (bar::WIDE | bar::PREFETCHABLE, &mask.to_le_bytes()),
        };
        self.define(at, &flags.to_le_bytes());
        self.allow(at, mask);
        self.bars[usize::from(index)] = Some((kind, size));
    }

    /// Add a capability behind those there are, and return its offset.
    pub fn add_capability(&mut self, capability: &Capability) -> u16 {
        let at = self.next_capability;
        let pointer = u8::try_from(at).unwrap_or(0);
        assert!(at + capability.len() <= SIZE, "no room for capability {:#x}", capability.id);
        let offset = u16::from(pointer);
        let body = offset + HEADER_LEN as u16;
        self.define(self.last_pointer as u16, &[pointer]);
        self.define(offset, &[capability.id, 0]);
        self.define(body, &capability.body);
        self.allow(body, &capability.writable);
        self.define(offset::STATUS, &status::CAPABILITIES.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = (at + capability.len()).next_multiple_of(4);
        offset
    }

    /// Read `data.len()` bytes; zero outside.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        match self.state.values.get(start..start + data.len()) {
            Some(values) => data.copy_from_slice(values),
            None => data.fill(0),
        }
    }

    /// Write those bits that a guest can write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.state.values.iter_mut().zip(self.writable.iter());
        for ((value, writable), new) in registers.skip(offset.into()).zip(data) {
            *value = *value & !writable | new & writable;
        }
    }

    /// Set the bits of the status register in `mask` to `bits`.
    pub fn set_status(&mut self, mask: u16, bits: u16) {
        let status = self.u16(offset::STATUS) & !mask | bits & mask;
        self.set(offset::STATUS, &status.to_le_bytes());
    }

    /// Change a register, whether a guest could or not.
    pub fn set(&mut self, offset: u16, value: &[u8]) {
        let start = usize::from(offset);
        self.state.values[start..start + value.len()].copy_from_slice(value);
    }

    /// A 16-bit register.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A 32-bit register.
    pub fn u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Where the base address registers decode at present. One that was never placed holds zero, which
    /// nobody decodes.
    pub fn bars(&self) -> Vec<Bar> {
        let command = self.u16(offset::COMMAND);
        let all = (0..BARS).zip(self.bars);
        all.filter_map(|(index, bar)| {
            let (kind, size) = bar?;
            let (space, enabled) = match kind {
                BarKind::Io => (BarSpace::Io, command::IO),
                BarKind::Memory32 | BarKind::Memory64 => (BarSpace::Memory, command::MEMORY),
            };
            let address = self.address(index, kind);
            (command & enabled != 0 && address != 0).then_some(Bar { index, space, address, size })
        })
        .collect()
    }

    fn address(&self, index: u8, kind: BarKind) -> u64 {
        let at = offset::BAR0 + u16::from(index) * 4;
        let low = self.u32(at);
        match kind {
            BarKind::Io => (low & !bar::IO_FLAGS).into(),
            BarKind::Memory32 => (low & !bar::MEMORY_FLAGS).into(),
            BarKind::Memory64 => {
                u64::from(low & !bar::MEMORY_FLAGS) | u64::from(self.u32(at + 4)) << 32
            }
        }
    }

    /// Back to the values after power-on.
    pub fn reset(&mut self) {
        self.state.values.copy_from_slice(&*self.initial);
    }

    /// What a guest has written, to be kept.
    pub fn state(&self) -> &ConfigState {
        &self.state
    }

    /// Take back what was kept. Bits that a guest could not have written keep their value.
    pub fn restore(&mut self, state: &ConfigState) {
        self.reset();
        self.write(0, &state.values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_00_00,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        });
        space.add_bar(0, BarKind::Io, 0x20);
        space.add_bar(1, BarKind::Memory32, 0x1000);
        space.add_bar(4, BarKind::Memory64, 0x4000);
        space
    }

    fn write32(space: &mut ConfigSpace, offset: u16, value: u32) {
        space.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn the_header_identifies_the_function_and_is_read_only() {
        let mut space = space();
        write32(&mut space, 0, 0);
        assert_eq!(space.u32(0), 0x1042_1AF4);
        assert_eq!(space.u32(8), 0x0100_0001);
        assert_eq!(space.u32(0x2C), 0x1100_1AF4);
    }

    #[test]
    fn ones_written_to_a_bar_read_back_as_its_size() {
        let mut space = space();
        for at in (0x10..0x28).step_by(4) {
            write32(&mut space, at, u32::MAX);
        }
        let read: Vec<u32> = (0x10..0x28).step_by(4).map(|at| space.u32(at)).collect();
        assert_eq!(read, [0xFFFF_FFE1, 0xFFFF_F000, 0, 0, 0xFFFF_C00C, 0xFFFF_FFFF]);
    }

    #[test]
    fn bars_decode_only_in_an_enabled_space_and_once_placed() {
        let mut space = space();
        write32(&mut space, 0x10, 0xC001);
        write32(&mut space, 0x20, 0xC);
        write32(&mut space, 0x24, 0x80);
        assert_eq!(space.bars(), []);
        space.write(offset::COMMAND, &command::MEMORY.to_le_bytes());
        let memory =
            Bar { index: 4, space: BarSpace::Memory, address: 0x80_0000_0000, size: 0x4000 };
        assert_eq!(space.bars(), [memory]);
        space.write(offset::COMMAND, &(command::MEMORY | command::IO).to_le_bytes());
        let ports = Bar { index: 0, space: BarSpace::Io, address: 0xC000, size: 0x20 };
        assert_eq!(space.bars(), [ports, memory]);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        assert_eq!(space.u16(offset::STATUS) & status::CAPABILITIES, 0);
        let first = space.add_capability(&Capability::new(0x09, [1, 2, 3]));
        let second =
            space.add_capability(&Capability::new(0x11, [0, 0, 0, 0]).writable(2, &[0x00, 0xC0]));
        assert_eq!(space.u16(offset::STATUS), status::CAPABILITIES);
        assert_eq!(space.u16(offset::CAPABILITIES), first);
        assert_eq!(space.u16(first), second << 8 | 0x09);
        assert_eq!(space.u16(second), 0x11);
        write32(&mut space, second, u32::MAX);
        assert_eq!(space.u32(second), 0xC000_0011);
    }

    #[test]
    fn reset_and_restore_bring_values_back() {
        let mut space = space();
        let initial = space.state().clone();
        write32(&mut space, 0x14, 0xC000_0000);
        let placed = space.state().clone();
        space.reset();
        assert_eq!(space.state(), &initial);
        space.restore(&placed);
        assert_eq!(space.u32(0x14), 0xC000_0000);
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_read_only(
            writes in prop::collection::vec((0u16..0x1000, prop::collection::vec(any::<u8>(), 1..5)), 0..50)
        ) {
            let fresh = space();
            let mut space = space();
            for (offset, data) in writes {
                space.write(offset, &data);
                space.read(offset, &mut [0; 4]);
                let _ = space.bars();
            }
            for (index, &writable) in space.writable.iter().enumerate() {
                let (now, then) = (space.state.values[index], fresh.state.values[index]);
                prop_assert_eq!(now & !writable, then & !writable);
            }
        }
    }
}
