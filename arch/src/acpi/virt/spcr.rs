// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! SPCR: the serial port is a console (Microsoft, Serial Port Console Redirection Table, version 2).

use acpi_tables::sdt::Sdt;

use super::super::{Fields, table};
use super::Device;

const REVISION: u8 = 2;
const PL011: u8 = 3;
/// Generic address: memory, 32 bits wide, by doublewords.
const MEMORY: [u8; 4] = [0, 32, 0, 3];
/// The interrupt is one of a GIC.
const GIC_INTERRUPT: u8 = 1 << 3;
const BAUD_115200: u8 = 7;
const ONE_STOP_BIT: u8 = 1;
const VT_UTF8: u8 = 2;
const NO_PCI_DEVICE: u16 = 0xFFFF;

pub(super) fn spcr(uart: &Device) -> Sdt {
    let mut body = Vec::new();
    body.fields8(&[PL011, 0, 0, 0]);
    body.fields8(&MEMORY);
    body.fields64(&[uart.at.base]);
    body.fields8(&[GIC_INTERRUPT, 0]);
    body.fields32(&[uart.interrupt]);
    body.fields8(&[BAUD_115200, 0, ONE_STOP_BIT, 0, VT_UTF8, 0]);
    body.fields16(&[NO_PCI_DEVICE, NO_PCI_DEVICE]);
    // PCI bus, device, function; flags; segment; reserved.
    body.fields8(&[0; 12]);
    table(b"SPCR", REVISION, &body)
}
