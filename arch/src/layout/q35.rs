// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest-physical map of QEMU's machine `q35`, and its I/O ports.
//!
//! What lies below 4 GiB is fixed by the chipset (Intel MCH, 316966; ICH9, 316972) and by what firmware and
//! Linux expect. What lies above is computed, in this order:
//!
//! ```text
//! RAM that does not fit below 4 GiB
//! persistent memory, each image in a section of its own
//! room for memory modules that are added later
//! 64-bit PCI window, aligned to its size
//! ```

use super::cursor::{Cursor, DoesNotFit, module_room};
use super::{GIB, MIB, Range};

/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_MAX: u64 = 0xB000_0000;
/// Where RAM below 4 GiB ends if there is more than [`LOW_RAM_MAX`]: gigabyte pages stay whole.
const LOW_RAM_SPLIT: u64 = 2 * GIB;
/// Video memory and option ROMs: nothing that Linux may use as RAM.
pub const LEGACY_HOLE: Range = Range::new(0xA_0000, 0x6_0000);
/// ACPI root pointer and tables: inside the BIOS area, plain RAM here.
pub const ACPI_TABLES: Range = Range::new(0xE_0000, 0x2_0000);
/// PCI Express configuration space of buses 0 to 255.
pub const ECAM: Range = Range::new(0xB000_0000, 256 * MIB);
/// 32-bit PCI memory.
pub const PCI_WINDOW_32: Range = Range::new(0xC000_0000, 0x3EC0_0000);
/// PCI I/O ports that are free for base address registers.
pub const PCI_WINDOW_IO: Range = Range::new(0x1000, 0xF000);
/// I/O APIC.
pub const IO_APIC: u64 = 0xFEC0_0000;
/// Local APICs, and where MSIs are sent.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// Where RAM goes on above the 32-bit devices.
pub const HIGH_RAM: u64 = 4 * GIB;

/// Largest and smallest 64-bit PCI window.
const PCI_WINDOW_64: (u64, u64) = (512 * GIB, GIB);

/// What the map depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// RAM at boot in bytes.
    pub ram: u64,
    /// RAM that can ever be, in bytes; at least `ram`.
    pub max_ram: u64,
    /// Memory modules that can be added.
    pub slots: u32,
    /// Sizes of the persistent memory images in bytes.
    pub nvdimms: Vec<u64>,
    /// Width of a guest-physical address.
    pub address_bits: u8,
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Q35Map {
    /// RAM from address 0 on.
    pub low_ram: Range,
    /// RAM from 4 GiB on; empty if all fits below.
    pub high_ram: Range,
    /// One for each image. Nothing else lies in the sections that it begins or ends in.
    pub nvdimms: Vec<Range>,
    /// Room for modules; empty if none can be added.
    pub module_window: Range,
    /// 64-bit PCI memory.
    pub pci_window_64: Range,
}

impl Q35Map {
    /// Lay out a machine.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn new(request: &Request) -> Result<Self, DoesNotFit> {
        let mut next = Cursor::new(HIGH_RAM, request.address_bits);
        let low = if request.ram > LOW_RAM_MAX { LOW_RAM_SPLIT } else { request.ram };
        let high_ram = next.take("RAM", request.ram - low, MIB)?;
        let nvdimms = next.images(&request.nvdimms)?;
        let window = module_room(request.ram, request.max_ram, request.slots);
        let module_window = next.take("the window for memory modules", window, GIB)?;
        let pci_window_64 = next.largest("the 64-bit PCI window", PCI_WINDOW_64)?;
        Ok(Self { low_ram: Range::new(0, low), high_ram, nvdimms, module_window, pci_window_64 })
    }

    /// The pieces of RAM, in ascending order.
    pub fn ram(&self) -> impl Iterator<Item = Range> + use<> {
        [self.low_ram, self.high_ram].into_iter().filter(|range| range.size != 0)
    }
}

/// I/O ports that the chipset fixes.
pub mod port {
    /// i8042 keyboard controller: data.
    pub const I8042_DATA: u16 = 0x60;
    /// i8042: command and status.
    pub const I8042_COMMAND: u16 = 0x64;
    /// RTC index; data one above.
    pub const CMOS: u16 = 0x70;
    /// First 16550.
    pub const COM1: u16 = 0x3F8;
    /// pvpanic.
    pub const PVPANIC: u16 = 0x505;
    /// ICH9 power management base.
    pub const PM_BASE: u16 = 0x600;
    /// PCI configuration address; data four above, the reset control register between them.
    pub const PCI_CONFIG: u16 = 0xCF8;
    /// PCI hot-plug registers, where QEMU has them.
    pub const PCI_HOTPLUG: u16 = 0xCC0;
    /// Reset control register.
    pub const RESET_CONTROL: u16 = 0xCF9;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::cursor::SECTION;
    use proptest::prelude::*;

    fn request(ram: u64) -> Request {
        Request { ram, max_ram: ram, address_bits: 46, ..Request::default() }
    }

    #[test]
    fn ram_is_split_where_qemu_splits_it() {
        for (ram, low, high) in [
            (128 * MIB, 128 * MIB, 0),
            (LOW_RAM_MAX, LOW_RAM_MAX, 0),
            (LOW_RAM_MAX + MIB, 2 * GIB, LOW_RAM_MAX + MIB - 2 * GIB),
            (6 * GIB, 2 * GIB, 4 * GIB),
        ] {
            let map = Q35Map::new(&request(ram)).unwrap();
            assert_eq!((map.low_ram.size, map.high_ram.size), (low, high), "{ram:#x}");
        }
    }

    #[test]
    fn an_image_has_sections_of_its_own() {
        let map = Q35Map::new(&Request { nvdimms: vec![3 * MIB], ..request(6 * GIB) }).unwrap();
        assert_eq!(map.nvdimms, [Range::new(8 * GIB, 3 * MIB)]);
        assert!(map.pci_window_64.base >= 8 * GIB + SECTION);
    }

    #[test]
    fn the_pci_window_shrinks_before_it_fails() {
        let small = Request { address_bits: 36, ..request(GIB) };
        assert_eq!(Q35Map::new(&small).unwrap().pci_window_64, Range::new(32 * GIB, 32 * GIB));
        let full = Request { address_bits: 36, ..request(65 * GIB) };
        assert!(matches!(Q35Map::new(&full), Err(DoesNotFit { what: "RAM", .. })));
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_disjoint_and_inside(
            ram in 1u64..2 << 20, more in 0u64..1 << 20, slots in 0u32..64,
            nvdimms in prop::collection::vec(1u64..4 * GIB, 0..4), address_bits in 36u8..=52,
        ) {
            let request = Request {
                ram: ram * MIB, max_ram: (ram + more) * MIB, slots, nvdimms: nvdimms.clone(), address_bits,
            };
            let Ok(map) = Q35Map::new(&request) else { return Ok(()) };
            let mut all: Vec<Range> = map.ram().collect();
            prop_assert_eq!(all.iter().map(|r| r.size).sum::<u64>(), request.ram);
            prop_assert_eq!(map.nvdimms.len(), nvdimms.len());
            for (range, asked) in map.nvdimms.iter().zip(nvdimms) {
                prop_assert!(range.base % GIB == 0 && range.size == asked);
            }
            all.extend(&map.nvdimms);
            all.extend([map.module_window, map.pci_window_64, ECAM, PCI_WINDOW_32]);
            all.retain(|r| r.size != 0);
            for (i, a) in all.iter().enumerate() {
                prop_assert!(a.end() <= 1 << address_bits);
                prop_assert!(all[i + 1..].iter().all(|b| !a.overlaps(b)));
            }
            prop_assert!(map.pci_window_64.base % map.pci_window_64.size == 0);
        }
    }
}
