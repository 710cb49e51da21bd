// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! The PCI host bridge (ACPI 6.5, section 6; PCI Firmware Specification 3.3, section 4). Left out: `_OSC`, so that native
//! PCIe services stay off and ACPI alone hot-plugs.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, BufferData, EISAName, Equal, If, Memory32Fixed,
    Method, Package, Return, Uuid, ZERO,
};

use super::aml::{
    Encoded, device, encoded, hardware_id, io_ports, low16, low32, name, references, resources,
};
use super::{PciHost, PciInterrupt, Registers, pcihp};
use crate::layout::{GIB, Range};

/// The functions that PCI host bridges have.
const HOST_BRIDGE_DSM: &str = "E5C937D0-3553-4D7A-9117-EA4D19C3434D";

pub(super) fn host_bridge(pci: &PciHost) -> Encoded {
    let last_bus = u16::try_from((pci.ecam.size >> 20).saturating_sub(1)).unwrap_or(255);
    let mut windows =
        vec![encoded(&AddressSpace::<u16>::new_bus_number(0, last_bus)), io_window(pci)];
    windows.extend(pci.config_ports.map(io_ports));
    windows.extend(pci.memory.iter().filter(|range| range.size != 0).map(memory_window));
    let mut children = vec![
        hardware_id("PNP0A08"),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &0u8),
        name("_SEG", &0u8),
        name("_BBN", &0u8),
        // DMA is coherent, section 6.2.17: on Arm nothing goes without saying.
        name("_CCA", &1u8),
        resources(&windows),
        interrupt_routes(&pci.interrupts),
    ];
    if pci.keep_addresses {
        children.push(keep_addresses());
    }
    if let Some(hotplug) = &pci.hotplug {
        children.extend(pcihp::host_bridge(hotplug));
    }
    device("PCI0", &children)
}

/// `_DSM`, function 5 (PCI Firmware Specification 3.3, section 4.6.5): 0 says that boot configurations must be kept.
/// Where there is no such word, Linux on arm64 begins anew, and leaves no room behind a bridge without devices.
fn keep_addresses() -> Encoded {
    const KEEP: u8 = 5;
    const FUNCTIONS: u8 = 1 | 1 << KEEP;
    let answer = |function: u8, with: &dyn Aml| {
        let answer = Return::new(with);
        encoded(&If::new(&Equal::new(&Arg(2), &function), vec![&answer]))
    };
    let known = [answer(0, &BufferData::new(vec![FUNCTIONS])), answer(KEEP, &ZERO)];
    let uuid = Uuid::new(HOST_BRIDGE_DSM);
    let ours = encoded(&If::new(&Equal::new(&Arg(0), &uuid), references(&known)));
    let others = encoded(&Return::new(&BufferData::new(vec![0])));
    encoded(&Method::new("_DSM".into(), 4, true, vec![&ours, &others]))
}

fn io_window(pci: &PciHost) -> Encoded {
    let (first, last) = (low16(pci.io.base), low16(pci.io.end() - 1));
    match pci.io_in_memory {
        None => encoded(&AddressSpace::<u16>::new_io(first, last, None)),
        Some(at) => {
            encoded(&AddressSpace::<u32>::new_io(first.into(), last.into(), Some(low32(at))))
        }
    }
}

/// ECAM must be reserved by a device of the motherboard, or Linux does not trust MCFG; hot-plug registers, so that
/// nobody else takes them.
pub(super) fn motherboard(pci: &PciHost) -> Encoded {
    let mut used = vec![memory(pci.ecam)];
    used.extend(pci.hotplug.iter().map(|hotplug| match hotplug.registers {
        Registers::Ports(ports) => io_ports(ports),
        Registers::Memory(range) => memory(range),
    }));
    device("MRES", &[hardware_id("PNP0C02"), name("_UID", &0u8), resources(&used)])
}

fn memory(range: Range) -> Encoded {
    match (u32::try_from(range.base), u32::try_from(range.size)) {
        (Ok(base), Ok(size)) => encoded(&Memory32Fixed::new(true, base, size)),
        _ => memory_window(&range),
    }
}

fn memory_window(range: &Range) -> Encoded {
    let (first, last) = (range.base, range.end() - 1);
    let cacheable = AddressSpaceCacheable::NotCacheable;
    match (u32::try_from(first), u32::try_from(last)) {
        (Ok(first), Ok(last)) if range.base < 4 * GIB => {
            encoded(&AddressSpace::<u32>::new_memory(cacheable, true, first, last, None))
        }
        _ => encoded(&AddressSpace::<u64>::new_memory(cacheable, true, first, last, None)),
    }
}

/// `_PRT`, section 6.2.13: pins go straight to inputs of the interrupt controller.
fn interrupt_routes(interrupts: &[PciInterrupt]) -> Encoded {
    let routes: Vec<Encoded> = interrupts
        .iter()
        .map(|route| {
            let address = u32::from(route.slot) << 16 | 0xFFFF;
            encoded(&Package::new(vec![&address, &route.pin, &0u8, &route.gsi]))
        })
        .collect();
    name("_PRT", &Package::new(references(&routes)))
}
