// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Local APIC: what firmware leaves in it (Intel SDM volume 3A, section 11.5.1; MultiProcessor
//! Specification 1.4, section 3.6.2.1).

/// A local APIC register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LapicRegister {
    /// Offset in the register page.
    pub offset: u16,
    /// Value.
    pub value: u32,
}

const LVT_LINT0: u16 = 0x350;
const LVT_LINT1: u16 = 0x360;
const DELIVER_NMI: u32 = 0b100 << 8;
const DELIVER_EXT_INT: u32 = 0b111 << 8;

/// Virtual wire mode: the legacy interrupt controller on LINT0, NMI on LINT1.
pub const AT_BOOT: [LapicRegister; 2] = [
    LapicRegister { offset: LVT_LINT0, value: DELIVER_EXT_INT },
    LapicRegister { offset: LVT_LINT1, value: DELIVER_NMI },
];
