// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! SRAT: all processors and memory are in one node; the window for memory modules is marked as such, so
//! that Linux can place hot-added memory (ACPI 6.5, section 5.2.16).

use acpi_tables::sdt::Sdt;

use super::super::{Fields, table};
use super::Description;
use crate::layout::Range;

const REVISION: u8 = 3;
const MEMORY: u8 = 1;
const X2APIC: u8 = 2;
const ENABLED: u32 = 1;
const HOT_PLUGGABLE: u32 = 1 << 1;
const NODE: u32 = 0;

pub(super) fn srat(machine: &Description) -> Sdt {
    let mut body = Vec::new();
    // The first reserved field is 1 for compatibility, section 5.2.16, table 5.57.
    body.fields32(&[1, 0, 0]);
    for id in 0..machine.max_cpus {
        body.fields8(&[X2APIC, 24, 0, 0]);
        body.fields32(&[NODE, id, ENABLED, 0, 0]);
    }
    for &range in &machine.ram {
        memory(&mut body, range, ENABLED);
    }
    if machine.module_window.size != 0 {
        memory(&mut body, machine.module_window, ENABLED | HOT_PLUGGABLE);
    }
    table(b"SRAT", REVISION, &body)
}

fn memory(body: &mut Vec<u8>, range: Range, flags: u32) {
    body.fields8(&[MEMORY, 40]);
    body.fields32(&[NODE]);
    body.fields16(&[0]);
    body.fields64(&[range.base, range.size]);
    body.fields32(&[0, flags, 0, 0]);
}
