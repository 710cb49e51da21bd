// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! DSDT: what cannot be found by probing (ACPI 6.5, chapters 6 and 19).

use acpi_tables::aml::{Interrupt, Method, Package, Scope};
use acpi_tables::sdt::Sdt;

use super::super::aml::{
    Encoded, device, encoded, hardware_id, io_ports, name, references, resources,
};
use super::super::{nfit, pci, pcihp, table, to_bytes};
use super::{Description, LegacyDevice};

const REVISION: u8 = 2;
/// Sleep type of S5, as the power management block understands it.
const SLEEP_TYPE_OFF: u8 = 5;

pub(super) fn dsdt(machine: &Description) -> Sdt {
    let mut system = vec![pci::host_bridge(&machine.pci), pci::motherboard(&machine.pci)];
    system.extend(machine.legacy.iter().map(legacy_device));
    if !machine.nvdimms.is_empty() {
        system.push(nfit::root_device(&machine.nvdimms));
    }
    let mut body = to_bytes(&Scope::new("\\_SB_".into(), references(&system)));
    let off = SLEEP_TYPE_OFF;
    body.extend(name("\\_S5_", &Package::new(vec![&off, &off, &0u8, &0u8])).0);
    if machine.pci.hotplug.is_some() {
        body.extend(hotplug_event(machine.hotplug_event).0);
    }
    table(b"DSDT", REVISION, &body)
}

/// The method of general-purpose event `event`, section 5.6.4.
fn hotplug_event(event: u8) -> Encoded {
    let look = pcihp::look_at_all();
    let method = Method::new(format!("_E{event:02X}").as_str().into(), 0, false, vec![&look]);
    encoded(&Scope::new("\\_GPE".into(), vec![&method]))
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
