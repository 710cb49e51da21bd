// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! A PCI-to-PCI bridge, QEMU's `pci-bridge` without its own hot-plug controller (PCI-to-PCI Bridge
//! Architecture Specification 1.2, chapter 3).
//!
//! The bridge is its registers; the host bridge forwards by what they say at the moment. Left out: delayed
//! transactions, error reporting, the reset of the secondary bus, VGA and ISA decoding, and holding back
//! what devices behind a bridge write while it may not be bus master.

use super::config::{self, ConfigSpace, Identity, command, offset};
use super::{Bar, BarSpace, PciFunction};
use crate::bus::Access;

/// Registers of the type 1 header, section 3.2.
pub mod register {
    #![allow(missing_docs)] // The names are the specification's.
    pub const PRIMARY_BUS: u16 = 0x18;
    pub const SECONDARY_BUS: u16 = 0x19;
    pub const SUBORDINATE_BUS: u16 = 0x1A;
    pub const SECONDARY_LATENCY: u16 = 0x1B;
    pub const IO_BASE: u16 = 0x1C;
    pub const IO_LIMIT: u16 = 0x1D;
    pub const MEMORY_BASE: u16 = 0x20;
    pub const MEMORY_LIMIT: u16 = 0x22;
    pub const PREFETCHABLE_BASE: u16 = 0x24;
    pub const PREFETCHABLE_LIMIT: u16 = 0x26;
    pub const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
    pub const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2C;
    pub const BRIDGE_CONTROL: u16 = 0x3E;
}

/// Header type of a bridge, without the bit for more functions.
pub const HEADER_TYPE: u8 = 1;
/// Granularity of the window for I/O ports.
pub const IO_GRANULARITY: u64 = 4 << 10;
/// Granularity of the windows for memory.
pub const MEMORY_GRANULARITY: u64 = 1 << 20;
/// Low bits of the prefetchable registers: addresses have 64 bits.
const PREFETCHABLE_64: u16 = 1;
/// Address bits of a window's registers; what is below them is all zeros in a base and all ones in a limit.
const IO_ADDRESS: u8 = 0xF0;
const MEMORY_ADDRESS: u16 = 0xFFF0;
/// Bits of bridge control that can be written and change nothing here: parity, SERR, ISA, master abort.
const CONTROL_WRITABLE: u16 = 0b10_0111;

const VENDOR_REDHAT: u16 = 0x1B36;
const DEVICE_PCI_BRIDGE: u16 = 0x0001;
const CLASS_PCI_BRIDGE: u32 = 0x06_0400;

/// A range of addresses that a bridge forwards; empty if `base` is above `limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First address.
    pub base: u64,
    /// Last address.
    pub limit: u64,
}

impl Extent {
    fn contains(&self, bar: &Bar) -> bool {
        let last = bar.address.checked_add(bar.size - 1);
        bar.address >= self.base && last.is_some_and(|last| last <= self.limit)
    }
}

/// What a bridge forwards to its secondary bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forwarding {
    /// Number of the secondary bus; 0 before it is numbered.
    pub secondary: u8,
    /// Highest number of a bus behind the bridge.
    pub subordinate: u8,
    /// I/O ports.
    pub io: Extent,
    /// Memory.
    pub memory: Extent,
    /// Prefetchable memory.
    pub prefetchable: Extent,
    /// The command register, which enables each space.
    pub command: u16,
}

impl Forwarding {
    /// Whether accesses to `bar` reach the secondary bus.
    pub fn reaches(&self, bar: &Bar) -> bool {
        match bar.space {
            BarSpace::Io => self.command & command::IO != 0 && self.io.contains(bar),
            BarSpace::Memory => {
                self.command & command::MEMORY != 0
                    && (self.memory.contains(bar) || self.prefetchable.contains(bar))
            }
        }
    }
}

/// The bridge.
#[derive(Debug)]
pub struct PciBridge {
    config: ConfigSpace,
}

impl Default for PciBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciBridge {
    /// A bridge that forwards nothing yet.
    pub fn new() -> Self {
        use register::*;
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR_REDHAT,
            device: DEVICE_PCI_BRIDGE,
            revision: 0,
            class: CLASS_PCI_BRIDGE,
            // A type 1 header has other registers in these places.
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.define(offset::HEADER_TYPE, &[HEADER_TYPE]);
        config.allow(PRIMARY_BUS, &[0xFF; 4]);
        config.allow(IO_BASE, &[IO_ADDRESS; 2]);
        for base in [MEMORY_BASE, MEMORY_LIMIT, PREFETCHABLE_BASE, PREFETCHABLE_LIMIT] {
            config.allow(base, &MEMORY_ADDRESS.to_le_bytes());
        }
        config.define(PREFETCHABLE_BASE, &PREFETCHABLE_64.to_le_bytes());
        config.define(PREFETCHABLE_LIMIT, &PREFETCHABLE_64.to_le_bytes());
        config.allow(PREFETCHABLE_BASE_UPPER, &[0xFF; 8]);
        config.allow(BRIDGE_CONTROL, &CONTROL_WRITABLE.to_le_bytes());
        Self { config }
    }

    fn byte(&self, at: u16) -> u8 {
        let mut data = [0];
        self.config.read(at, &mut data);
        data[0]
    }

    /// The window whose base and limit registers are at `base` and behind it.
    fn memory(&self, base: u16) -> Extent {
        let address = |at| u64::from(self.config.u16(at) & MEMORY_ADDRESS) << 16;
        Extent { base: address(base), limit: address(base + 2) | (MEMORY_GRANULARITY - 1) }
    }
}

impl PciFunction for PciBridge {
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

    fn forwarding(&self) -> Option<Forwarding> {
        use register::*;
        let io = |at| u64::from(self.byte(at) & IO_ADDRESS) << 8;
        let low = self.memory(PREFETCHABLE_BASE);
        let upper = |at| u64::from(self.config.u32(at)) << 32;
        Some(Forwarding {
            secondary: self.byte(SECONDARY_BUS),
            subordinate: self.byte(SUBORDINATE_BUS),
            io: Extent { base: io(IO_BASE), limit: io(IO_LIMIT) | (IO_GRANULARITY - 1) },
            memory: self.memory(MEMORY_BASE),
            prefetchable: Extent {
                base: upper(PREFETCHABLE_BASE_UPPER) | low.base,
                limit: upper(PREFETCHABLE_LIMIT_UPPER) | low.limit,
            },
            command: self.config.u16(config::offset::COMMAND),
        })
    }

    fn reset(&mut self) {
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(bridge: &mut PciBridge, at: u16, value: &[u8]) {
        bridge.config_write(at, value);
    }

    fn bar(space: BarSpace, address: u64, size: u64) -> Bar {
        Bar { index: 0, space, address, size }
    }

    #[test]
    fn linux_recognises_qemus_bridge() {
        let mut bridge = PciBridge::new();
        let mut data = [0; 64];
        bridge.config_read(0, &mut data);
        assert_eq!(data[..4], [0x36, 0x1B, 0x01, 0x00]);
        assert_eq!(data[9..12], [0x00, 0x04, 0x06]);
        assert_eq!(data[14], 1);
        // Sizing a BAR that is not there, and the width of the windows.
        write(&mut bridge, 0x10, &[0xFF; 8]);
        write(&mut bridge, register::IO_BASE, &[0xFF; 2]);
        write(&mut bridge, register::PREFETCHABLE_BASE, &[0xFF; 4]);
        bridge.config_read(0, &mut data);
        assert_eq!(data[0x10..0x18], [0; 8]);
        assert_eq!(data[0x1C..0x1E], [0xF0, 0xF0]);
        assert_eq!(data[0x24..0x28], [0xF1, 0xFF, 0xF1, 0xFF]);
    }

    #[test]
    fn windows_forward_what_lies_wholly_inside_and_is_enabled() {
        let mut bridge = PciBridge::new();
        write(&mut bridge, register::PRIMARY_BUS, &[0, 5, 7]);
        write(&mut bridge, register::IO_BASE, &[0x20, 0x30]);
        write(&mut bridge, register::MEMORY_BASE, &[0x00, 0xC0, 0x10, 0xC0]);
        write(&mut bridge, register::PREFETCHABLE_BASE, &[0x00, 0x10, 0x00, 0x10]);
        write(&mut bridge, register::PREFETCHABLE_BASE_UPPER, &[0x80, 0, 0, 0, 0x80, 0, 0, 0]);
        let off = bridge.forwarding().unwrap();
        assert_eq!((off.secondary, off.subordinate), (5, 7));
        assert_eq!(off.io, Extent { base: 0x2000, limit: 0x3FFF });
        assert_eq!(off.memory, Extent { base: 0xC000_0000, limit: 0xC01F_FFFF });
        let prefetchable = Extent { base: 0x80_1000_0000, limit: 0x80_100F_FFFF };
        assert_eq!(off.prefetchable, prefetchable);
        let inside = [
            bar(BarSpace::Io, 0x3FE0, 0x20),
            bar(BarSpace::Memory, 0xC01F_F000, 0x1000),
            bar(BarSpace::Memory, 0x80_1000_0000, 0x10_0000),
        ];
        assert!(inside.iter().all(|bar| !off.reaches(bar)), "not enabled");
        write(&mut bridge, offset::COMMAND, &(command::IO | command::MEMORY).to_le_bytes());
        let on = bridge.forwarding().unwrap();
        assert!(inside.iter().all(|bar| on.reaches(bar)));
        let outside = [
            bar(BarSpace::Io, 0x4000, 0x20),
            bar(BarSpace::Memory, 0xC01F_F000, 0x2000),
            bar(BarSpace::Memory, 0x3000, 0x1000),
            bar(BarSpace::Memory, u64::MAX - 0xFFF, 0x1000),
        ];
        assert!(outside.iter().all(|bar| !on.reaches(bar)));
        bridge.reset();
        assert_eq!(bridge.forwarding(), PciBridge::new().forwarding());
    }
}
