// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! MADT: interrupt controllers (ACPI 6.5, section 5.2.12).

use acpi_tables::sdt::Sdt;

use super::super::{Fields, table};
use super::{Description, Gic};
use crate::arm64::id::affinity;

/// With CPU interfaces of 80 bytes.
const REVISION: u8 = 5;
const GICC: u8 = 0x0B;
const GICD: u8 = 0x0C;
const GIC_MSI_FRAME: u8 = 0x0D;
const GICR: u8 = 0x0E;
const GIC_ITS: u8 = 0x0F;
const ENABLED: u32 = 1;

pub(super) fn madt(machine: &Description) -> Sdt {
    let mut body = Vec::new();
    // No local APIC, no 8259s.
    body.fields32(&[0, 0]);
    let (distributor, version) = match machine.gic {
        Gic::V2 { distributor, .. } => (distributor, 2),
        Gic::V3 { distributor, .. } => (distributor, 3),
    };
    body.fields8(&[GICD, 24, 0, 0]);
    body.fields32(&[0]);
    body.fields64(&[distributor]);
    body.fields32(&[0]);
    body.fields8(&[version, 0, 0, 0]);
    (0..machine.cpus).for_each(|cpu| cpu_interface(&mut body, cpu, &machine.gic));
    match &machine.gic {
        Gic::V2 { frame, .. } => {
            body.fields8(&[GIC_MSI_FRAME, 24, 0, 0]);
            body.fields32(&[0]);
            body.fields64(&[*frame]);
            // The frame's own registers say which interrupts.
            body.fields32(&[0, 0]);
        }
        Gic::V3 { redistributors, its, .. } => {
            for region in redistributors {
                body.fields8(&[GICR, 16, 0, 0]);
                body.fields64(&[region.base]);
                body.fields32(&[u32::try_from(region.size).unwrap_or(u32::MAX)]);
            }
            if let Some(its) = its {
                body.fields8(&[GIC_ITS, 20, 0, 0]);
                body.fields32(&[0]);
                body.fields64(&[*its]);
                body.fields32(&[0]);
            }
        }
    }
    table(b"APIC", REVISION, &body)
}

/// Section 5.2.12.14. Redistributors are told by their regions.
fn cpu_interface(body: &mut Vec<u8>, cpu: u32, gic: &Gic) {
    let (base, maintenance) = match gic {
        Gic::V2 { cpu_interface, .. } => (*cpu_interface, 0),
        Gic::V3 { maintenance, .. } => (0, *maintenance),
    };
    body.fields8(&[GICC, 80, 0, 0]);
    // Number, UID, flags, parking protocol, performance interrupt.
    body.fields32(&[cpu, cpu, ENABLED, 0, 0]);
    // Parked address, base, GICV, GICH.
    body.fields64(&[0, base, 0, 0]);
    body.fields32(&[maintenance]);
    // Redistributor, MPIDR.
    body.fields64(&[0, affinity(cpu)]);
    body.fields32(&[0]);
}
