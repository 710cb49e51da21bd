// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! FADT: fixed hardware (ACPI 6.5, section 5.2.9; ICH9 datasheet, section 13.8.3).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::PowerManagement;

/// Offsets in the power management block.
const PM1_CONTROL: u16 = 4;
const PM_TIMER: u16 = 8;
const GPE0: u16 = 0x20;
const GPE0_LENGTH: u8 = 0x10;
/// `IAPC_BOOT_ARCH`: there are ISA devices, and no VGA. The missing 8042 bit saves the guest from probing
/// for a keyboard; resets through it work nevertheless.
const LEGACY_DEVICES: u16 = 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// Where the RTC keeps the century.
const CMOS_CENTURY: u8 = 0x32;
/// Values above these mean that there is no C2 and no C3.
const NO_C2: u16 = 0xFFF;
const NO_C3: u16 = 0xFFF;

/// The power button is fixed hardware; ACPI mode is always on, so there is no SMI command.
pub(super) fn fadt(pm: &PowerManagement, facs: u64, dsdt: u64) -> FADT {
    let io = |port: u16, bytes: u8, access| {
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_64(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::from(pm.sci).into();
    fadt.pm1a_evt_blk = u32::from(pm.base).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(pm.base + PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(pm.base + PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = u32::from(pm.base + GPE0).into();
    fadt.gpe0_blk_len = GPE0_LENGTH;
    fadt.x_pm1a_evt_blk = io(pm.base, 4, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = io(pm.base + PM1_CONTROL, 2, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = io(pm.base + PM_TIMER, 4, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = io(pm.base + GPE0, GPE0_LENGTH, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    fadt.reset_reg = io(pm.reset_port, 1, AccessSize::ByteAccess);
    fadt.reset_value = pm.reset_value;
    fadt.finalize()
}
