// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! DSDT: what cannot be found by probing (ACPI 6.5, chapters 6 and 19; PCI Firmware Specification 3.3,
//! section 4). Left out: `_OSC`, so that native PCIe services stay off and ACPI alone hot-plugs.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{
    Description, LegacyDevice, Nvdimm, PciHost, PciInterrupt, nfit, pcihp, table, to_bytes,
};
use crate::layout::{GIB, Range};

const REVISION: u8 = 2;
/// Sleep type of S5, as the power management block understands it.
const SLEEP_TYPE_OFF: u8 = 5;

/// AML that is encoded already, so that it outlives the values it was made from.
pub(super) struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn encoded(aml: &dyn Aml) -> Encoded {
    Encoded(to_bytes(aml))
}

pub(super) fn name(path: &str, value: &dyn Aml) -> Encoded {
    encoded(&Name::new(path.into(), value))
}

pub(super) fn device(path: &str, children: &[Encoded]) -> Encoded {
    encoded(&Device::new(path.into(), references(children)))
}

fn resources(children: &[Encoded]) -> Encoded {
    name("_CRS", &ResourceTemplate::new(references(children)))
}

pub(super) fn references(children: &[Encoded]) -> Vec<&dyn Aml> {
    children.iter().map(|child| child as &dyn Aml).collect()
}

pub(super) fn dsdt(machine: &Description) -> Sdt {
    let mut system = vec![host_bridge(&machine.pci), motherboard(&machine.pci)];
    system.extend(machine.legacy.iter().map(legacy_device));
    if !machine.nvdimms.is_empty() {
        system.push(nvdimm_root(&machine.nvdimms));
    }
    let mut body = to_bytes(&Scope::new("\\_SB_".into(), references(&system)));
    let off = SLEEP_TYPE_OFF;
    body.extend(name("\\_S5_", &Package::new(vec![&off, &off, &0u8, &0u8])).0);
    if let Some(hotplug) = &machine.pci.hotplug {
        body.extend(pcihp::event(hotplug).0);
    }
    table(b"DSDT", REVISION, &body)
}

fn hardware_id(hid: &'static str) -> Encoded {
    if hid.starts_with("PNP") { name("_HID", &EISAName::new(hid)) } else { name("_HID", &hid) }
}

fn host_bridge(pci: &PciHost) -> Encoded {
    let last_bus = u16::try_from((pci.ecam.size >> 20).saturating_sub(1)).unwrap_or(255);
    let mut windows = vec![
        encoded(&AddressSpace::<u16>::new_bus_number(0, last_bus)),
        io_ports(pci.config_ports),
        encoded(&AddressSpace::<u16>::new_io(low16(pci.io.base), low16(pci.io.end() - 1), None)),
    ];
    windows.extend(pci.memory.iter().map(memory_window));
    let mut children = vec![
        hardware_id("PNP0A08"),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &0u8),
        name("_SEG", &0u8),
        name("_BBN", &0u8),
        resources(&windows),
        interrupt_routes(&pci.interrupts),
    ];
    if let Some(hotplug) = &pci.hotplug {
        children.extend(pcihp::host_bridge(hotplug));
    }
    device("PCI0", &children)
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

/// ECAM must be reserved by a device of the motherboard, or Linux does not trust MCFG.
fn motherboard(pci: &PciHost) -> Encoded {
    let (base, size) = (low32(pci.ecam.base), low32(pci.ecam.size));
    let mut used = vec![encoded(&Memory32Fixed::new(true, base, size))];
    used.extend(pci.hotplug.iter().map(|hotplug| io_ports(hotplug.ports)));
    device("MRES", &[hardware_id("PNP0C02"), name("_UID", &0u8), resources(&used)])
}

fn legacy_device(row: &LegacyDevice) -> Encoded {
    let mut used = vec![io_ports(row.ports)];
    if let Some(irq) = row.irq {
        used.push(encoded(&Interrupt::new(true, true, false, false, irq)));
    }
    device(
        row.name,
        &[hardware_id(row.hid), name("_UID", &0u8), name("_STA", &0xFu8), resources(&used)],
    )
}

/// Section 9.19: the root device, and one child for each module, found by its NFIT handle.
fn nvdimm_root(nvdimms: &[Nvdimm]) -> Encoded {
    let mut children = vec![hardware_id("ACPI0012")];
    children.extend(
        (0..nvdimms.len())
            .map(|index| device(&format!("NV{index:02X}"), &[name("_ADR", &nfit::handle(index))])),
    );
    device("NVDR", &children)
}

fn io_ports(ports: Range) -> Encoded {
    let size = u8::try_from(ports.size).unwrap_or(u8::MAX);
    encoded(&IO::new(low16(ports.base), low16(ports.base), 1, size))
}

pub(super) fn low16(port: u64) -> u16 {
    u16::try_from(port).unwrap_or(u16::MAX)
}

fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_ids_are_compressed_where_eisa_knows_them() {
        assert_eq!(
            hardware_id("PNP0A08").0,
            [8, b'_', b'H', b'I', b'D', 0x0C, 0x41, 0xD0, 0x0A, 0x08]
        );
        assert!(hardware_id("QEMU0001").0.ends_with(b"QEMU0001\0"));
    }
}
