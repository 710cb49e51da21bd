// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! MADT: interrupt controllers (ACPI 6.5, section 5.2.12).

use acpi_tables::sdt::Sdt;

use super::super::{Fields, table};
use super::Description;

const REVISION: u8 = 5;
const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
const LOCAL_X2APIC: u8 = 9;
/// There are two 8259s as well.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 1 << 1;
/// Interrupt flags: active high, level-triggered.
const HIGH_LEVEL: u16 = 0b1101;
/// Identifiers that a local APIC entry can hold.
const FIRST_X2APIC_ID: u32 = 255;
const ALL_PROCESSORS: u8 = 0xFF;

pub(super) fn madt(machine: &Description) -> Sdt {
    let mut body = Vec::new();
    body.fields32(&[low32(machine.local_apic), PCAT_COMPAT]);
    for id in 0..machine.max_cpus {
        processor(&mut body, id, if id < machine.cpus { ENABLED } else { ONLINE_CAPABLE });
    }
    body.fields8(&[IO_APIC, 12, 0, 0]);
    body.fields32(&[low32(machine.io_apic), 0]);
    body.fields8(&[SOURCE_OVERRIDE, 10, 0, machine.pm.sci]);
    body.fields32(&[machine.pm.sci.into()]);
    body.fields16(&[HIGH_LEVEL]);
    body.fields8(&[LOCAL_APIC_NMI, 6, ALL_PROCESSORS, 0, 0, 1]);
    table(b"APIC", REVISION, &body)
}

fn processor(body: &mut Vec<u8>, id: u32, flags: u32) {
    match u8::try_from(id) {
        Ok(id) if u32::from(id) < FIRST_X2APIC_ID => {
            body.fields8(&[LOCAL_APIC, 8, id, id]);
            body.fields32(&[flags]);
        }
        _ => {
            body.fields8(&[LOCAL_X2APIC, 16, 0, 0]);
            body.fields32(&[id, flags, id]);
        }
    }
}

/// Interrupt controllers of a PC lie below 4 GiB.
fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}
