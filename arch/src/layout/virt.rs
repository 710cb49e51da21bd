// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The guest-physical map of QEMU's machine `virt`, and its interrupts.
//!
//! What lies below RAM is fixed. Guests hard-code where flash and RAM are and take the rest from the device tree or from
//! ACPI; all of it stays where QEMU has it nevertheless. What lies above is computed, in this order:
//!
//! ```text
//! RAM
//! persistent memory, each image in a section of its own
//! room for memory modules that are added later
//! from 256 GiB on, or further up if the above does not end there, each aligned to its size:
//!   redistributors of processors 123 and up
//!   PCI configuration space
//!   64-bit PCI window
//! ```
//!
//! Where addresses have too few bits for that, the window shrinks, and then configuration space moves below RAM, where it
//! has room for 16 buses.

use super::cursor::{Cursor, DoesNotFit, bits_for, module_room};
use super::{GIB, MIB, Range};

/// GIC distributor.
pub const GIC_DISTRIBUTOR: Range = Range::new(0x0800_0000, 0x1_0000);
/// CPU interface of a GICv2.
pub const GIC_CPU_INTERFACE: Range = Range::new(0x0801_0000, 0x1_0000);
/// Frame to which a GICv2m gets its messages.
pub const GIC_V2M: Range = Range::new(0x0802_0000, 0x1000);
/// Interrupt translation service of a GICv3.
pub const GIC_ITS: Range = Range::new(0x0808_0000, 0x2_0000);
/// Redistributors of the first 123 processors.
const GIC_REDISTRIBUTORS: Range = Range::new(0x080A_0000, 0xF6_0000);
/// Serial port PL011.
pub const UART: Range = Range::new(0x0900_0000, 0x1000);
/// Real-time clock PL031.
pub const RTC: Range = Range::new(0x0901_0000, 0x1000);
/// General-purpose input PL061.
pub const GPIO: Range = Range::new(0x0903_0000, 0x1000);
/// Event selector of the generic event device.
pub const GED: Range = Range::new(0x0908_0000, 4);
/// PCI hot-plug registers: the board says how many.
pub const PCI_HOTPLUG: u64 = 0x090C_0000;
/// 32-bit PCI memory.
pub const PCI_WINDOW_32: Range = Range::new(0x1000_0000, 0x2EFF_0000);
/// Where the PCI bus's I/O ports, from 0 on, lie in memory.
pub const PCI_WINDOW_IO: Range = Range::new(0x3EFF_0000, 0x1_0000);
/// Configuration space of 16 buses.
const ECAM_LOW: Range = Range::new(0x3F00_0000, 16 * MIB);
/// First address of RAM.
pub const RAM: u64 = GIB;

/// Where the high ranges begin at the latest.
const HIGH: u64 = 256 * GIB;
/// Two pages of 64 KiB for each processor.
pub const REDISTRIBUTOR_SIZE: u64 = 128 << 10;
/// Room for the redistributors of the other processors, up to 512 in all.
const MORE_REDISTRIBUTORS: u64 = 64 * MIB;
/// Most processors.
pub const MAX_CPUS: u32 = 512;
const ECAM_SIZE: u64 = 256 * MIB;
/// Largest and smallest 64-bit PCI window.
const PCI_WINDOW_64: (u64, u64) = (512 * GIB, GIB);
/// Fewest bits that a hypervisor lets an address have.
const FEWEST_ADDRESS_BITS: u8 = 32;

/// Interrupts, by their number among those of their kind. In tables and messages stands the INTID, which is that plus
/// [`interrupt::PRIVATE`] or [`interrupt::SHARED`].
pub mod interrupt {
    /// INTID of the first private peripheral interrupt, of which each processor has its own.
    pub const PRIVATE: u32 = 16;
    /// INTID of the first shared peripheral interrupt.
    pub const SHARED: u32 = 32;
    /// Private: maintenance of a GIC's virtualization.
    pub const GIC_MAINTENANCE: u32 = 9;
    /// Private: timers, as ACPI and device trees list them: secure, non-secure, virtual, hypervisor's.
    pub const TIMERS: [u32; 4] = [13, 14, 11, 10];
    /// Shared: serial port.
    pub const UART: u32 = 1;
    /// Shared: INTA to INTD of the PCI root bus.
    pub const PCI: [u8; 4] = [3, 4, 5, 6];
    /// Shared: general-purpose input.
    pub const GPIO: u32 = 7;
    /// Shared: generic event device.
    pub const GED: u32 = 9;
    /// Shared: first of those that messages to a GICv2m raise, and how many there are.
    pub const V2M: (u32, u32) = (48, 64);
    /// All that there are, software-generated and private ones included.
    pub const COUNT: u32 = 288;
}

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
    /// Processors that there can be, at most [`MAX_CPUS`].
    pub max_cpus: u32,
    /// Most bits that a guest-physical address can have on this host.
    pub address_bits: u8,
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtMap {
    /// RAM.
    pub ram: Range,
    /// One for each image. Nothing else lies in the sections that it begins or ends in.
    pub nvdimms: Vec<Range>,
    /// Room for modules; empty if none can be added.
    pub module_window: Range,
    /// One region, or two for more than 123 processors.
    pub redistributors: Vec<Range>,
    /// PCI configuration space.
    pub ecam: Range,
    /// 64-bit PCI memory; empty if there is no room for it.
    pub pci_window_64: Range,
}

impl VirtMap {
    /// Lay out a machine.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn new(request: &Request) -> Result<Self, DoesNotFit> {
        let mut next = Cursor::new(RAM, request.address_bits);
        let ram = next.take("RAM", request.ram, MIB)?;
        let nvdimms = next.images(&request.nvdimms)?;
        let window = module_room(request.ram, request.max_ram, request.slots);
        let module_window = next.take("the window for memory modules", window, GIB)?;
        next.skip_to(HIGH);
        next.align(GIB);
        let first_region = GIC_REDISTRIBUTORS.size / REDISTRIBUTOR_SIZE;
        let mut redistributors = vec![GIC_REDISTRIBUTORS];
        if u64::from(request.max_cpus) > first_region {
            let what = "the room for the interrupts of more than 123 processors";
            redistributors.push(next.take(what, MORE_REDISTRIBUTORS, MORE_REDISTRIBUTORS)?);
        } else {
            // So that nothing moves when there are more processors.
            next.skip_to(next.end() + MORE_REDISTRIBUTORS);
        }
        let ecam = next.take("PCI configuration space", ECAM_SIZE, ECAM_SIZE).unwrap_or(ECAM_LOW);
        let pci_window_64 = next
            .largest("the 64-bit PCI window", PCI_WINDOW_64)
            .unwrap_or(Range::new(module_window.end(), 0));
        Ok(Self { ram, nvdimms, module_window, redistributors, ecam, pci_window_64 })
    }

    /// Bits that an address must have.
    pub fn address_bits(&self) -> u8 {
        let ends = self.nvdimms.iter().chain(&self.redistributors).map(Range::end);
        let ends = ends.chain(
            [self.ram, self.module_window, self.ecam, self.pci_window_64].map(|range| range.end()),
        );
        bits_for(ends.max().unwrap_or(0)).max(FEWEST_ADDRESS_BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(ram: u64) -> Request {
        Request { ram, max_ram: ram, max_cpus: 1, address_bits: 48, ..Request::default() }
    }

    #[test]
    fn a_small_machine_has_everything_where_qemu_has_it() {
        let map = VirtMap::new(&Request { max_cpus: 512, ..request(GIB) }).unwrap();
        assert_eq!(map.ram, Range::new(GIB, GIB));
        assert_eq!(map.redistributors[1].base, 0x40_0000_0000);
        assert_eq!(map.ecam.base, 0x40_1000_0000);
        assert_eq!(map.pci_window_64, Range::new(0x80_0000_0000, 512 * GIB));
        assert_eq!(map.address_bits(), 40);
        let few = VirtMap::new(&request(GIB)).unwrap();
        assert_eq!(few, VirtMap { redistributors: vec![GIC_REDISTRIBUTORS], ..map });
    }

    #[test]
    fn high_ranges_float() {
        // 2 GiB of RAM, ten modules, and 522535 MiB at most.
        let large = Request {
            ram: 2 * GIB,
            max_ram: 522_535 * MIB,
            slots: 10,
            max_cpus: 200,
            ..request(0)
        };
        let map = VirtMap::new(&large).unwrap();
        assert_eq!(map.redistributors[1].base, 522 * GIB);
        assert_eq!(map.ecam.base, 522 * GIB + 256 * MIB);
        assert_eq!(map.pci_window_64, Range::new(1024 * GIB, 512 * GIB));
        assert_eq!(map.address_bits(), 41);
        let map = VirtMap::new(&Request { address_bits: 40, ..large }).unwrap();
        assert_eq!(map.pci_window_64, Range::new(768 * GIB, 256 * GIB));
        assert_eq!(map.address_bits(), 40);
    }

    #[test]
    fn high_ranges_shrink_and_move_before_anything_is_refused() {
        let narrow = Request { address_bits: 36, ..request(GIB) };
        let map = VirtMap::new(&narrow).unwrap();
        assert_eq!((map.ecam, map.pci_window_64.size, map.address_bits()), (ECAM_LOW, 0, 32));
        let error = VirtMap::new(&Request { address_bits: 36, ..request(64 * GIB) }).unwrap_err();
        assert_eq!((error.what, error.bits, error.needed), ("RAM", 36, 37));
        let error = VirtMap::new(&Request { max_cpus: 124, ..narrow }).unwrap_err();
        assert_eq!(error.needed, 39);
    }

    proptest! {
        #[test]
        fn ranges_are_aligned_disjoint_and_inside(
            ram in 1u64..2 << 20, more in 0u64..1 << 20, slots in 0u32..64, max_cpus in 1..=MAX_CPUS,
            nvdimms in prop::collection::vec(1u64..4 * GIB, 0..4), address_bits in 32u8..=52,
        ) {
            let request = Request {
                ram: ram * MIB,
                max_ram: (ram + more) * MIB,
                slots,
                nvdimms: nvdimms.clone(),
                max_cpus,
                address_bits,
            };
            let Ok(map) = VirtMap::new(&request) else { return Ok(()) };
            prop_assert_eq!(map.ram, Range::new(RAM, request.ram));
            for (range, asked) in map.nvdimms.iter().zip(nvdimms) {
                prop_assert!(range.base % GIB == 0 && range.size == asked);
            }
            let cpus: u64 = map.redistributors.iter().map(|region| region.size / REDISTRIBUTOR_SIZE).sum();
            prop_assert!(cpus >= max_cpus.into());
            let mut all = vec![
                GIC_DISTRIBUTOR, GIC_CPU_INTERFACE, GIC_V2M, GIC_ITS, UART, RTC, GPIO, GED,
                Range::new(PCI_HOTPLUG, 0x18), PCI_WINDOW_32, PCI_WINDOW_IO,
                map.ram, map.module_window, map.ecam, map.pci_window_64,
            ];
            all.extend(&map.nvdimms);
            all.extend(&map.redistributors);
            all.retain(|range| range.size != 0);
            for (i, a) in all.iter().enumerate() {
                prop_assert!(a.end() <= 1 << map.address_bits().min(address_bits));
                prop_assert!(all[i + 1..].iter().all(|b| !a.overlaps(b)), "{all:x?}");
            }
            for aligned in [map.ecam, map.pci_window_64] {
                prop_assert!(aligned.size == 0 || aligned.base % aligned.size == 0);
            }
        }
    }
}
