// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! NFIT: persistent memory (ACPI 6.5, section 5.2.25). One range, one module and one control region for each
//! image, not interleaved, without labels: Linux then shows each as `/dev/pmemN`.

use acpi_tables::sdt::Sdt;

use super::aml::{Encoded, device, hardware_id, name};
use super::{Fields, Nvdimm, table};

const REVISION: u8 = 1;
const SPA_RANGE: u16 = 0;
const REGION_MAPPING: u16 = 1;
const CONTROL_REGION: u16 = 4;
/// Byte-addressable persistent memory: 66f0d379-b4f3-4074-ac43-0d3318b78cdb.
const PERSISTENT_MEMORY: [u8; 16] = [
    0x79, 0xd3, 0xf0, 0x66, 0xf3, 0xb4, 0x74, 0x40, 0xac, 0x43, 0x0d, 0x33, 0x18, 0xb7, 0x8c, 0xdb,
];
/// `EFI_MEMORY_WB | EFI_MEMORY_NV`.
const WRITE_BACK_NON_VOLATILE: u64 = 0x8 | 0x8000;
/// Module state: not armed, so the guest treats it as read-only.
const NOT_ARMED: u16 = 1 << 3;
/// JEDEC JESD245: byte-addressable, no energy source.
const FORMAT_BYTE_ADDRESSABLE: u16 = 0x301;
const VENDOR_INTEL: u16 = 0x8086;

/// The handle by which tables and the name space call module `index`.
pub(super) fn handle(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX - 1) + 1
}

pub(super) fn nfit(nvdimms: &[Nvdimm]) -> Sdt {
    let mut body = Vec::new();
    body.fields32(&[0]);
    for (index, nvdimm) in nvdimms.iter().enumerate() {
        let (handle, number) = (handle(index), handle(index) as u16);
        body.fields16(&[SPA_RANGE, 56, number, 0]);
        body.fields32(&[0, 0]);
        body.fields8(&PERSISTENT_MEMORY);
        body.fields64(&[nvdimm.range.base, nvdimm.range.size, WRITE_BACK_NON_VOLATILE]);

        let state = if nvdimm.read_only { NOT_ARMED } else { 0 };
        body.fields16(&[REGION_MAPPING, 48]);
        body.fields32(&[handle]);
        body.fields16(&[number, 0, number, number]);
        body.fields64(&[nvdimm.range.size, 0, 0]);
        body.fields16(&[0, 1, state, 0]);

        body.fields16(&[CONTROL_REGION, 32, number, VENDOR_INTEL, 1, 1, 0, 0, 0]);
        body.fields8(&[0; 6]);
        body.fields32(&[handle]);
        body.fields16(&[FORMAT_BYTE_ADDRESSABLE, 0]);
    }
    table(b"NFIT", REVISION, &body)
}

/// Section 9.19: the root device, and one child for each module, found by its NFIT handle.
pub(super) fn root_device(nvdimms: &[Nvdimm]) -> Encoded {
    let mut children = vec![hardware_id("ACPI0012")];
    children.extend(
        (0..nvdimms.len())
            .map(|index| device(&format!("NV{index:02X}"), &[name("_ADR", &handle(index))])),
    );
    device("NVDR", &children)
}
