// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! IORT: who translates the messages of PCI devices (Arm DEN0049E.b).

use acpi_tables::sdt::Sdt;

use super::super::{Fields, table};

const REVISION: u8 = 3;
const HEADER: u32 = 48;
const ITS_GROUP: u8 = 0;
const ITS_GROUP_SIZE: u16 = 24;
const ROOT_COMPLEX: u8 = 2;
const ROOT_COMPLEX_SIZE: u16 = 36;
const MAPPING_SIZE: u16 = 20;
/// Requester ids of one segment, less one.
const LAST_REQUESTER: u32 = 0xFFFF;
/// Bits of the addresses that devices reach.
const ADDRESS_BITS: u8 = 64;

pub(super) fn iort() -> Sdt {
    let mut body = Vec::new();
    body.fields32(&[2, HEADER, 0]);

    body.fields8(&[ITS_GROUP]);
    body.fields16(&[ITS_GROUP_SIZE]);
    body.fields8(&[1]);
    // Identifier, no mappings; one service, number 0.
    body.fields32(&[0, 0, 0, 1, 0]);

    body.fields8(&[ROOT_COMPLEX]);
    body.fields16(&[ROOT_COMPLEX_SIZE + MAPPING_SIZE]);
    body.fields8(&[3]);
    body.fields32(&[1, 1, ROOT_COMPLEX_SIZE.into()]);
    // Cache-coherent; no allocation hints; coherent path to memory, and device attributes as processors have them.
    body.fields32(&[1]);
    body.fields8(&[0, 0, 0, 0b11]);
    // No address translation service; segment 0.
    body.fields32(&[0, 0]);
    body.fields8(&[ADDRESS_BITS, 0, 0, 0]);
    body.fields32(&[0, LAST_REQUESTER, 0, HEADER, 0]);
    table(b"IORT", REVISION, &body)
}
