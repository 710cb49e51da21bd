// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! FADT (ACPI 6.5, section 5.2.9) and GTDT (section 5.2.25): what is the same for all machines.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::sdt::Sdt;

use super::super::{Fields, OEM_ID, OEM_REVISION, OEM_TABLE_ID, table};

/// `ARM_BOOT_ARCH`: PSCI, by the instruction HVC.
const PSCI_COMPLIANT: u16 = 1;
const PSCI_USE_HVC: u16 = 1 << 1;

pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::LowPowerS0IdleCapable);
    fadt.arm_boot_arch = (PSCI_COMPLIANT | PSCI_USE_HVC).into();
    fadt.finalize()
}

const GTDT_REVISION: u8 = 3;
/// There is no such block of registers.
const NO_BLOCK: u64 = !0;
/// Level-triggered, active high, never loses its context.
const ALWAYS_ON: u32 = 1 << 2;

pub(super) fn gtdt(timers: [u32; 4]) -> Sdt {
    let mut body = Vec::new();
    body.fields64(&[NO_BLOCK]);
    body.fields32(&[0]);
    timers.iter().for_each(|&timer| body.fields32(&[timer, ALWAYS_ON]));
    body.fields64(&[NO_BLOCK]);
    // Neither platform timers nor a virtual timer of the hypervisor.
    body.fields32(&[0, 0, 0, 0]);
    table(b"GTDT", GTDT_REVISION, &body)
}
