// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The PCI host bridge: `pci/host-generic-pci.yaml`; PCI Bus Binding to Open Firmware, 2.1.

use vm_fdt::FdtWriter;

use super::{LEVEL_HIGH, Outcome, SHARED, phandle, reg};
use crate::layout::Range;

/// First cell of a PCI address: the space.
const SPACE_IO: u32 = 0x0100_0000;
const SPACE_MEMORY_32: u32 = 0x0200_0000;
const SPACE_MEMORY_64: u32 = 0x0300_0000;
/// Of a device's address, the bits of its slot that decide where its pins lead; of its pin, all.
const SLOT_MASK: u32 = 3 << 11;
const PIN_MASK: u32 = 7;
/// Requester ids of one segment.
const REQUESTERS: u32 = 0x1_0000;

/// The PCI host bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHost {
    /// Configuration space, one MiB for each bus.
    pub ecam: Range,
    /// Memory windows, each below or above 4 GiB.
    pub memory: Vec<Range>,
    /// Where I/O ports, from 0 on, lie in memory.
    pub io: Range,
    /// Shared interrupts that INTA to INTD of the root bus lead to.
    pub interrupts: [u8; 4],
}

/// With `messages`, devices can send some.
pub(super) fn node(fdt: &mut FdtWriter, pci: &PciHost, messages: bool) -> Outcome {
    let node = fdt.begin_node(&format!("pcie@{:x}", pci.ecam.base))?;
    let last_bus = u32::try_from((pci.ecam.size >> 20).saturating_sub(1)).unwrap_or(255);
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("linux,pci-domain", 0)?;
    fdt.property_array_u32("bus-range", &[0, last_bus])?;
    fdt.property_null("dma-coherent")?;
    reg(fdt, &[pci.ecam])?;
    fdt.property_array_u32("ranges", &windows(pci))?;
    fdt.property_array_u32("interrupt-map-mask", &[SLOT_MASK, 0, 0, PIN_MASK])?;
    fdt.property_array_u32("interrupt-map", &interrupt_map(pci))?;
    if messages {
        fdt.property_array_u32("msi-map", &[0, phandle::MSI, 0, REQUESTERS])?;
    }
    fdt.end_node(node)
}

/// Each window: its address on the bus, its address in memory, its size.
fn windows(pci: &PciHost) -> Vec<u32> {
    let wide = |value: u64| [(value >> 32) as u32, value as u32];
    let window = |space: u32, on_bus: u64, range: Range| {
        let parts = [wide(on_bus), wide(range.base), wide(range.size)];
        [space].into_iter().chain(parts.into_iter().flatten()).collect::<Vec<u32>>()
    };
    let memory = pci.memory.iter().filter(|range| range.size != 0).map(|&range| {
        let space = if range.end() <= 1 << 32 { SPACE_MEMORY_32 } else { SPACE_MEMORY_64 };
        window(space, range.base, range)
    });
    std::iter::once(window(SPACE_IO, 0, pci.io)).chain(memory).flatten().collect()
}

/// Pins are rotated by slot, so four slots tell it all.
fn interrupt_map(pci: &PciHost) -> Vec<u32> {
    let rows = (0..4_u32).flat_map(|slot| (1..=4_u32).map(move |pin| (slot, pin)));
    let row = |(slot, pin): (u32, u32)| {
        let line = pci.interrupts[((slot + pin - 1) % 4) as usize];
        [slot << 11, 0, 0, pin, phandle::GIC, 0, 0, SHARED, line.into(), LEVEL_HIGH]
    };
    rows.flat_map(row).collect()
}
