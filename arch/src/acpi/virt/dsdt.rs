// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! DSDT: what cannot be found by probing (ACPI 6.5, chapters 5.6.9, 6, 8 and 19).

use acpi_tables::aml::{
    And, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt, Local,
    Memory32Fixed, Method, Notify, OpRegion, OpRegionSpace, Path, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::super::aml::{
    Encoded, device, encoded, hardware_id, low32, name, references, resources,
};
use super::super::{nfit, pci, pcihp, table, to_bytes};
use super::{Description, Device, event};

const REVISION: u8 = 2;
/// What the operating system is told of a button that was pressed.
const BUTTON_PRESSED: u8 = 0x80;
const POWER_BUTTON: &str = "\\_SB_.PWRB";
/// The event selector's name.
const SELECTOR: [u8; 4] = *b"ESEL";
const SELECTOR_BITS: usize = 32;

/// The clock is not here: ACPI has no name for a PL031. Such a guest learns the time from KVM's clock, `/dev/ptp0`.
pub(super) fn dsdt(machine: &Description) -> Sdt {
    let mut system: Vec<Encoded> = (0..machine.cpus).map(processor).collect();
    system.extend(machine.uart.as_ref().map(uart));
    system.push(device("PWRB", &[hardware_id("PNP0C0C"), name("_UID", &0u8)]));
    system.push(pci::host_bridge(&machine.pci));
    system.push(pci::motherboard(&machine.pci));
    if !machine.nvdimms.is_empty() {
        system.push(nfit::root_device(&machine.nvdimms));
    }
    system.push(generic_event_device(machine));
    table(b"DSDT", REVISION, &to_bytes(&Scope::new("\\_SB_".into(), references(&system))))
}

fn processor(index: u32) -> Encoded {
    device(&format!("C{index:03X}"), &[hardware_id("ACPI0007"), name("_UID", &index)])
}

fn memory(device: &Device) -> Encoded {
    encoded(&Memory32Fixed::new(true, low32(device.at.base), low32(device.at.size)))
}

fn uart(uart: &Device) -> Encoded {
    let interrupt = encoded(&Interrupt::new(true, false, false, false, uart.interrupt));
    let used = [memory(uart), interrupt];
    device("COM0", &[hardware_id("ARMH0011"), name("_UID", &0u8), resources(&used)])
}

/// Section 5.6.9: its method takes all events, and acts on each.
fn generic_event_device(machine: &Description) -> Encoded {
    let ged = &machine.ged;
    let interrupt = encoded(&Interrupt::new(true, true, false, false, ged.interrupt));
    let (base, size) = (low32(ged.at.base), low32(ged.at.size));
    let region = OpRegion::new("EREG".into(), OpRegionSpace::SystemMemory, &base, &size);
    let field = Field::new(
        "EREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(SELECTOR, SELECTOR_BITS)],
    );
    let button = Path::new(POWER_BUTTON);
    let mut body = vec![
        encoded(&Store::new(&Local(0), &Path::new("ESEL"))),
        on(event::POWER_BUTTON, &encoded(&Notify::new(&button, &BUTTON_PRESSED))),
    ];
    if machine.pci.hotplug.is_some() {
        body.push(on(event::PCI, &pcihp::look_at_all()));
    }
    device(
        "GED_",
        &[
            hardware_id("ACPI0013"),
            name("_UID", &0u8),
            resources(&[interrupt]),
            encoded(&region),
            encoded(&field),
            encoded(&Method::new("_EVT".into(), 1, true, references(&body))),
        ],
    )
}

/// Do `action` if `event` is among those taken.
fn on(event: u32, action: &Encoded) -> Encoded {
    encoded(&If::new(&And::new(&ZERO, &Local(0), &event), vec![action]))
}
